r"""Anomalies: is this x like the data, by which score, and how often is that a false alarm?

The obvious score is the surprise :math:`-\log p(x)`. But p(x) is a density over whole images, and a smooth or mostly
blank image is probable under almost every program, for any content. The other scores correct for this:

=================  ===================================================  ==========================================
score              s(x), in nats; higher is more anomalous              what it asks
=================  ===================================================  ==========================================
`Surprise`         :math:`-\log p(x)`, or minus a bound                 is x improbable?
`Typicality`       :math:`|-\log p(x) - H|`, H the mean surprise of     is x as probable as the data are?
                   reference data
`Ratio`            :math:`\log p_0(x) - \log p(x)`, with p_0 a          does knowing the form of the data help, beyond
                   background program                                   what the pixels alone tell?
`Complexity`       :math:`-\log p(x) - L(x)`, with L(x) the length of   does the program code x shorter than a
                   x under a lossless compressor                        compressor that knows nothing?
`WAIC`             :math:`\mathrm{Var}_i[\log p_i(x)] - E_i[\log        do programs trained alike disagree about x?
                   p_i(x)]` over an ensemble
`PosteriorKL`      :math:`KL(q(z \mid x) \,\|\, p(z))`                  does x need an unusual z?
=================  ===================================================  ==========================================

A score is any callable from x, ``(N, *event_shape)``, to ``(N,)``; those here are functions of each datum alone, whose
bounds take noise of the datum's own (`dgm_pyro.noise`). `Detector` turns one into an alarm with a chosen
rate of false alarms: with the scores :math:`s_1 \dots s_n` of reference data, the threshold is the
:math:`\lceil (n + 1)(1 - \alpha) \rceil`-th smallest. If x and the reference data are exchangeable, the rank of s(x)
among the n + 1 is uniform, so that :math:`P(s(x) > t) \le \alpha` whatever the score and the program, and ties only
lower it. The probability is over x *and* the reference data; it says nothing of what is detected. It does rest on s(x)
not depending on which other x come with it.

Source: Bishop 1994 (surprise); Nalisnick et al. 2019 (arXiv 1906.02994, typicality of single data); Ren et al. 2019
(arXiv 1906.02845, ratio); Serra et al. 2020 (arXiv 1909.11480, complexity); Choi et al. 2018 (arXiv 1810.01392, WAIC);
Vovk et al. 2005 (conformal prediction); DeLong et al. 1988 (standard error of the AUROC).
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dgm_pyro.noise as noise
from dgm_pyro.checks import (
    INTEGERS,
    check_choice,
    check_count,
    check_dense,
    check_finite,
    check_number,
    check_seed,
    check_type,
)
from dgm_pyro.data import Data
from dgm_pyro.evaluation import evaluate, evaluating, program_device
from dgm_pyro.objectives import ELBO
from dgm_pyro.program import Program, check_program, seeded

Score = Callable[[Tensor], Tensor]

ROUNDING = 1e-5
"""Scores that differ by no more than this, relative to the larger of themselves and 1, are ties."""


def log_p(program: Program, x: Tensor, *, num_particles: int = 1, batch_size: int = 256, seed: int = 0) -> Tensor:
    """log p(x) in nats, ``(N,)`` doubles: exact, or a bound (8 draws of the ELBO; IWAE with ``num_particles`` > 1).

    Args:
        program: one of p(x): neither conditional nor discriminative.
        x: ``(N, *event_shape)``.

    Raises:
        ValueError: the program has no p(x), or x does not fit.
    """
    _require_p_of_x(program)
    check_dense(x, "x")
    return evaluate(program, x, num_particles=num_particles, batch_size=batch_size, seed=seed).values


def _require_p_of_x(program: Any) -> None:
    check_program(program)
    if program.variable != "x" or program.conditional:
        raise ValueError(
            f"this {type(program).__name__} is conditional and has no p(x) to score x by: use a program of x alone, "
            "such as dgm.Labelled(prior, program) around a class-conditional one"
        )


@dataclass
class Surprise:
    """-log p(x), or minus its bound, in nats.

    Args:
        program: of p(x).
        num_particles: of the bound, for latent variables; 1 for the ELBO.
    """

    program: Program
    num_particles: int = 1

    def __post_init__(self) -> None:
        _require_p_of_x(self.program)
        check_count(self.num_particles, "num_particles")

    def __call__(self, x: Tensor) -> Tensor:
        return -log_p(self.program, x, num_particles=self.num_particles)


class Typicality:
    """Distance of the surprise of x from the mean surprise of reference data, in nats.

    Args:
        surprise: a `Surprise`, or a program.
        reference: data like those that the program was trained on, but others: ``(N, *event_shape)``.
    """

    def __init__(self, surprise: Surprise | Program, reference: Tensor | Data):
        self.surprise = _surprise(surprise)
        self.entropy = self.surprise(_x(reference, "reference")).mean().item()

    def __call__(self, x: Tensor) -> Tensor:
        return (self.surprise(x) - self.entropy).abs()


class Ratio:
    """log p_0(x) - log p(x), in nats, for a background program p_0 that knows the pixels but not their form.

    A background is the same program trained on mutated data:
    ``dgm.fit(background, data, augment=lambda x: dgm.corruptions.mutate(x, 0.3, 256))``.

    Args:
        surprise, background: a `Surprise` each, or a program, of the same measure.

    Raises:
        ValueError: one is a mass and the other a density.
    """

    def __init__(self, surprise: Surprise | Program, background: Surprise | Program):
        self.surprise, self.background = _surprise(surprise), _surprise(background, "background")
        ours, theirs = self.surprise.program.measure, self.background.program.measure
        if ours != theirs:
            raise ValueError(f"the program is a {ours}, but the background is a {theirs}: train both on the same data")

    def __call__(self, x: Tensor) -> Tensor:
        return self.surprise(x) - self.background(x)


class Complexity:
    """-log p(x) less the length of x under a lossless compressor, in nats.

    Args:
        surprise: a `Surprise`, or a program, of a mass on at most 256 levels: only that has a code length.
        compressor: a name in `COMPRESSORS`: "png" for images, "zlib" for any x.
    """

    def __init__(self, surprise: Surprise | Program, compressor: str = "png"):
        self.surprise, self.compressor = _surprise(surprise), compressor
        levels = self.surprise.program.levels
        if levels is None or levels > 256:
            what = "a density on reals" if levels is None else f"a mass on {levels} levels"
            raise ValueError(f"a compressor codes integers 0 .. 255, but the program is {what}: use another score")
        check_choice(compressor, COMPRESSORS, "compressor")

    def __call__(self, x: Tensor) -> Tensor:
        return self.surprise(x) - math.log(2) * code_bits(x, self.compressor)


class WAIC:
    """Var_i[log p_i(x)] - E_i[log p_i(x)] over programs trained alike from different seeds.

    The mean is in nats and the variance in nats squared, so its weight depends on the unit, as in the source. The
    variance is over the ensemble as a population (divided by its size).

    Args:
        ensemble: at least two programs, or a `Surprise` each.
    """

    def __init__(self, ensemble: Sequence[Surprise | Program]):
        check_type(ensemble, Sequence, "ensemble", "a sequence of programs")
        self.ensemble = [_surprise(each, "ensemble") for each in ensemble]
        if len(self.ensemble) < 2:
            raise ValueError(f"ensemble has {len(self.ensemble)} program(s), but a variance needs at least 2")

    def __call__(self, x: Tensor) -> Tensor:
        surprises = torch.stack([surprise(x) for surprise in self.ensemble])
        return surprises.var(0, correction=0) + surprises.mean(0)


@dataclass
class PosteriorKL:
    """KL(q(z | x) || p(z)), over all latents, in nats; in closed form where there is one, else by ``draws`` draws.

    Args:
        program: one with latent variables.
    """

    program: Program
    draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _require_p_of_x(self.program)
        check_count(self.draws, "draws")
        check_seed(self.seed)
        if self.program.tractable:
            raise ValueError(f"this {type(self.program).__name__} has no latents, so no posterior: use another score")

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        self.program.check(x)
        where, bound, parts = program_device(self.program), ELBO(num_particles=self.draws), []
        with evaluating(self.program), seeded(self.seed, where):
            for batch in x.split(256):
                with noise.per_datum(batch.to(where), self.seed):
                    kl = bound(self.program, batch.to(where)).kl
                parts.append(sum(kl.values(), torch.zeros(())).double().cpu())
        return torch.cat(parts)


def _surprise(surprise: Surprise | Program, argument: str = "surprise") -> Surprise:
    check_type(surprise, (Surprise, Program), argument, "a Surprise or a dgm.Program")
    return surprise if isinstance(surprise, Surprise) else Surprise(surprise)


def _x(data: Tensor | Data, argument: str = "x") -> Tensor:
    x = data.x if isinstance(data, Data) else data
    check_dense(x, argument)
    return x


# -- code lengths ------------------------------------------------------------------------------------------------------


def _png(x: Tensor) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(x[0].numpy()).save(file, "png", optimize=True)
    return file.getvalue()


def _zlib(x: Tensor) -> bytes:
    return zlib.compress(x.contiguous().numpy().tobytes(), 9)


COMPRESSORS: dict[str, Callable[[Tensor], bytes]] = {"png": _png, "zlib": _zlib}


def code_bits(x: Tensor, compressor: str = "png") -> Tensor:
    """The length of each x in bits under a lossless compressor, headers included, ``(N,)`` doubles.

    Args:
        x: integers 0 .. 255, ``(N, 1, H, W)`` for "png", ``(N, *event_shape)`` for "zlib".

    Raises:
        ValueError, TypeError: x holds reals or other integers, or is no image of one channel; no such compressor.
    """
    check_choice(compressor, COMPRESSORS, "compressor")
    check_finite(x, "x")
    if x.dtype not in INTEGERS and not torch.equal(x, x.round()):
        raise TypeError(f"x has dtype {x.dtype} and fractions, but a compressor codes integers: use another score")
    if int(x.min()) < 0 or int(x.max()) > 255:
        raise ValueError(f"x holds values from {int(x.min())} to {int(x.max())}, but one byte holds 0 .. 255")
    if compressor == "png" and (x.dim() != 4 or x.shape[1] != 1):
        raise ValueError(f"x has shape {tuple(x.shape)}, but png codes images (N, 1, H, W): use compressor='zlib'")
    code = COMPRESSORS[compressor]
    return torch.tensor([8.0 * len(code(each)) for each in x.to("cpu", torch.uint8)], dtype=torch.double)


# -- alarms ------------------------------------------------------------------------------------------------------------


class Detector:
    """An alarm on a score, calibrated to a rate of false alarms.

    Args:
        score: any callable from x to scores, higher for anomalies; a program means its `Surprise`.

    Attributes:
        threshold: scores above it, by more than `ROUNDING`, are flagged; None before `calibrate`.

    >>> import torch, dgm_pyro as dgm
    >>> detector = dgm.anomaly.Detector(dgm.Normal(1)).calibrate(torch.randn(999, 1), false_alarm_rate=0.01)
    >>> detector.flag(torch.tensor([[0.1], [9.0]]))
    tensor([False,  True])
    """

    def __init__(self, score: Score | Program):
        if not callable(score):
            raise TypeError(f"score must be a function of x or a dgm.Program, got {type(score).__name__}")
        self.score: Score = Surprise(score) if isinstance(score, Program) else score
        self.threshold: float | None = None
        self.reference = torch.zeros(0)

    def calibrate(self, reference: Tensor | Data, false_alarm_rate: float = 0.01) -> Detector:
        """Set the threshold by normal data that were not used in training; returns the detector itself.

        Args:
            reference: ``(N, *event_shape)``, at least 1 / false_alarm_rate - 1 of them.
            false_alarm_rate: alpha, in (0, 1): the largest probability that a datum like these is flagged.

        Raises:
            ValueError: the rate is out of range, the reference is too small for it, or a score is not finite.
        """
        check_number(false_alarm_rate, "false_alarm_rate", above=0, at_most=1)
        scores = self._scores(_x(reference, "reference"))
        rank = math.ceil((len(scores) + 1) * (1 - false_alarm_rate) - 1e-9)  # 100 * (1 - 0.99) is 1.0000000000000009
        if not 1 <= rank <= len(scores):
            need = math.ceil(1 / false_alarm_rate - 1e-9) - 1
            raise ValueError(
                f"{len(scores)} reference data cannot set a false_alarm_rate of {false_alarm_rate}: pass at least "
                f"{max(1, need)}, and a rate below 1"
            )
        self.reference = scores.sort().values
        self.threshold = self.reference[rank - 1].item()
        return self

    def flag(self, x: Tensor | Data) -> Tensor:
        """Whether each x is anomalous, bools ``(N,)``.

        Raises:
            ValueError: the detector is not calibrated.
        """
        if self.threshold is None:
            raise ValueError("the detector has no threshold yet: call detector.calibrate(reference_data) first")
        scores = self._scores(_x(x))
        return scores - _rounding(scores) > self.threshold

    def p_values(self, x: Tensor | Data) -> Tensor:
        """Conformal p-values, ``(N,)``: the share of the reference data, x itself counted in, that score no lower.

        ``flag`` is ``p_values <= false_alarm_rate``.
        """
        if self.threshold is None:
            raise ValueError("the detector has no reference yet: call detector.calibrate(reference_data) first")
        scores = self._scores(_x(x))
        below = torch.searchsorted(self.reference, scores - _rounding(scores))
        return (1 + len(self.reference) - below) / (1 + len(self.reference))

    def _scores(self, x: Tensor) -> Tensor:
        scores = self.score(x).detach().double().cpu()
        if scores.shape != x.shape[:1]:
            raise ValueError(f"the score returned shape {tuple(scores.shape)} for {len(x)} data: return one per datum")
        if torch.isnan(scores).any():
            raise ValueError("the score of some x is NaN: clean the data, or use another score")
        return scores


def _rounding(scores: Tensor) -> Tensor:
    """Largest difference by rounding between scores of equal data: batches multiply matrices in another order."""
    return ROUNDING * scores.abs().clamp(min=1)


@dataclass(frozen=True)
class Separation:
    """Quality of a score that separates anomalies from normal data.

    Attributes:
        auroc: probability that an anomaly scores above a normal datum, a tie counting half; 0.5 is a coin.
        stderr: of it, over both sets of data (DeLong).
    """

    auroc: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.auroc:.4f} +- {self.stderr:.4f}"


def separation(normal: Tensor, anomalous: Tensor) -> Separation:
    """The AUROC of two sets of scores, ``(N,)`` and ``(M,)``, with its standard error."""
    check_finite(normal, "normal")
    check_finite(anomalous, "anomalous")
    normal, anomalous = normal.cpu().double(), anomalous.cpu().double()
    above_normal, above_anomalous = _share_below(normal, anomalous), _share_below(anomalous, normal)
    variance = sum(
        each.var().item() / len(each) if len(each) > 1 else math.nan for each in (above_normal, above_anomalous)
    )
    return Separation(auroc(anomalous, normal), math.sqrt(variance))


def _share_below(values: Tensor, x: Tensor) -> Tensor:
    """The share of ``values`` below each x, ties counting half."""
    order = values.sort().values
    counts = torch.searchsorted(order, x) + torch.searchsorted(order, x, right=True)
    return counts.double() / (2 * len(values))


def auroc(normal: Tensor, anomalous: Tensor) -> float:
    """The probability that a normal datum scores above an anomalous one, a tie counting half."""
    from sklearn.metrics import roc_auc_score

    labels = [1] * len(normal) + [0] * len(anomalous)
    return float(roc_auc_score(labels, torch.cat([normal.cpu(), anomalous.cpu()]).numpy()))
