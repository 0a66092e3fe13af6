r"""Anomaly detection: scores of how unlike the data x is, and alarms with a controlled false alarm rate.

The obvious score is the negative log-likelihood :math:`-\log p(x)`. But a smooth or mostly blank image has a high p(x)
under almost every program, whatever its content. The other scores correct for this:

=======================  ===================================================  ==========================================
score                    s(x), in nats; higher is more anomalous              question
=======================  ===================================================  ==========================================
`NegativeLogLikelihood`  :math:`-\log p(x)`, or minus a bound                 is x improbable?
`Typicality`             :math:`|-\log p(x) - H|`, H the mean of              is x as probable as the data are?
                         :math:`-\log p` over reference data
`Ratio`                  :math:`\log p_0(x) - \log p(x)`, with p_0 a          does the program beat a model of single
                         background program                                   pixel statistics on x?
`Complexity`             :math:`-\log p(x) - L(x)`, with L(x) the length of   does the program code x shorter than a
                         x under a lossless compressor                        general-purpose compressor?
`WAIC`                   :math:`\mathrm{Var}_i[\log p_i(x)] - E_i[\log        do programs from different seeds disagree
                         p_i(x)]` over an ensemble                            on x?
`PosteriorKL`            :math:`KL(q(z \mid x) \,\|\, p(z))`                  does x need an unusual z?
=======================  ===================================================  ==========================================

A score is any callable from x, ``(N, *event_shape)``, to ``(N,)``. The scores here are functions of each datum alone:
their bounds use noise that belongs to the datum (`dgm_pyro.noise`). `Detector` turns a score into an alarm with a
chosen false alarm rate. With the scores :math:`s_1 \dots s_n` of reference data, the threshold is the
:math:`\lceil (n + 1)(1 - \alpha) \rceil`-th smallest. If x and the reference data are exchangeable, the rank of s(x)
among the n + 1 is uniform, so :math:`P(s(x) > t) \le \alpha` for any score and program; ties only lower it. The
probability is over x *and* the reference data, and says nothing about the share of anomalies detected. It assumes that
s(x) does not depend on the other data in the batch.

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
    generator,
)
from dgm_pyro.data import Data
from dgm_pyro.evaluation import check_whole, evaluate, evaluating, program_device
from dgm_pyro.objectives import ELBO
from dgm_pyro.program import Program, check_program, seeded
from dgm_pyro.results import Result, Table

__all__ = [
    "COMPRESSORS",
    "SCORES",
    "WAIC",
    "Alarm",
    "Anomalies",
    "Complexity",
    "Detector",
    "NegativeLogLikelihood",
    "PosteriorKL",
    "Ratio",
    "Separation",
    "Typicality",
    "auroc",
    "code_bits",
    "detect",
    "log_p",
    "separation",
]

Score = Callable[[Tensor], Tensor]

ROUNDING = 1e-5
"""Scores that differ by no more than this, relative to the larger of themselves and 1, are ties."""


def log_p(
    program: Program,
    x: Tensor,
    *,
    num_particles: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """log p(x) in nats, ``(N,)`` doubles: exact, or a bound (8 draws of the ELBO; IWAE with ``num_particles`` > 1).

    Args:
        program: a program of p(x), neither conditional nor discriminative.
        x: ``(N, *event_shape)``.
        num_particles: particles of the bound; 1 for the ELBO.
        batch_size: data per batch; the numbers do not depend on it.
        seed: seed of the draws, which belong to each datum (`noise.per_datum`).
        progress: whether to show a bar.

    Raises:
        ValueError: the program has no p(x), or x does not fit.
    """
    _require_p_of_x(program)
    check_dense(x, "x")
    found = evaluate(program, x, num_particles=num_particles, batch_size=batch_size, seed=seed, progress=progress)
    return found.values


def _require_p_of_x(program: Any) -> None:
    check_program(program)
    if program.variable != "x" or program.conditional:
        raise ValueError(
            f"this {type(program).__name__} is conditional and has no p(x) to score x by: use a program of x alone, "
            "such as dgm.Labeled(prior, program) for a class-conditional program"
        )


@dataclass
class NegativeLogLikelihood:
    """-log p(x), or minus its bound, in nats.

    Args:
        program: a program of p(x).
        num_particles: particles of the bound, for latent variables; 1 for the ELBO.
        progress: whether to show a bar.
    """

    program: Program
    num_particles: int = 1
    progress: bool = False

    def __post_init__(self) -> None:
        _require_p_of_x(self.program)
        check_count(self.num_particles, "num_particles")

    def __call__(self, x: Tensor) -> Tensor:
        return -log_p(self.program, x, num_particles=self.num_particles, progress=self.progress)


class Typicality:
    """Distance of -log p(x) from its mean over reference data, in nats.

    Args:
        nll: a `NegativeLogLikelihood`, or a program.
        reference: held-out data from the distribution of the training data, ``(N, *event_shape)``.
    """

    def __init__(self, nll: NegativeLogLikelihood | Program, reference: Tensor | Data):
        self.nll = _as_nll(nll)
        self.entropy = self.nll(_as_tensor(reference, "reference")).mean().item()

    def __call__(self, x: Tensor) -> Tensor:
        return (self.nll(x) - self.entropy).abs()


class Ratio:
    """log p_0(x) - log p(x), in nats, for a background program p_0 of pixel statistics without their structure.

    A background is the same program trained on mutated data:
    ``dgm.fit(background, data, augment=lambda x: dgm.corruptions.mutate(x, 0.3, 256))``.

    Args:
        nll, background: each a `NegativeLogLikelihood` or a program, of the same measure.

    Raises:
        ValueError: one is a mass and the other a density.
    """

    def __init__(self, nll: NegativeLogLikelihood | Program, background: NegativeLogLikelihood | Program):
        self.nll, self.background = _as_nll(nll), _as_nll(background, "background")
        ours, theirs = self.nll.program.measure, self.background.program.measure
        if ours != theirs:
            raise ValueError(f"the program is a {ours}, but the background is a {theirs}: train both on the same data")

    def __call__(self, x: Tensor) -> Tensor:
        return self.nll(x) - self.background(x)


class Complexity:
    """-log p(x) minus the length of x under a lossless compressor, in nats.

    Args:
        nll: a `NegativeLogLikelihood`, or a program, of a mass on at most 256 levels; a density has no code length.
        compressor: a name in `COMPRESSORS`: "png" for images, "zlib" for any x.

    Raises:
        ValueError: the program is no such mass, or there is no such compressor.
    """

    def __init__(self, nll: NegativeLogLikelihood | Program, compressor: str = "png"):
        self.nll, self.compressor = _as_nll(nll), compressor
        levels = self.nll.program.levels
        if levels is None or levels > 256:
            what = "a density on reals" if levels is None else f"a mass on {levels} levels"
            raise ValueError(f"a compressor codes integers 0 .. 255, but the program is {what}: use another score")
        check_choice(compressor, COMPRESSORS, "compressor")

    def __call__(self, x: Tensor) -> Tensor:
        return self.nll(x) - math.log(2) * code_bits(x, self.compressor)


class WAIC:
    """Var_i[log p_i(x)] - E_i[log p_i(x)] over programs with the same training but different seeds.

    The mean is in nats and the variance in nats squared, so their relative weight depends on the unit, as in the
    source. The variance is that of the ensemble as a population (divided by its size).

    Args:
        ensemble: at least two programs, or a `NegativeLogLikelihood` each.

    Raises:
        ValueError: the ensemble has fewer than two programs.
    """

    def __init__(self, ensemble: Sequence[NegativeLogLikelihood | Program]):
        check_type(ensemble, Sequence, "ensemble", "a sequence of programs")
        self.ensemble = [_as_nll(each, "ensemble") for each in ensemble]
        if len(self.ensemble) < 2:
            raise ValueError(f"ensemble has {len(self.ensemble)} program(s), but a variance needs at least 2")

    def __call__(self, x: Tensor) -> Tensor:
        nats = torch.stack([nll(x) for nll in self.ensemble])
        return nats.var(0, correction=0) + nats.mean(0)


@dataclass
class PosteriorKL:
    """KL(q(z | x) || p(z)) over all latents, in nats, in closed form or from ``num_samples`` draws.

    Args:
        program: a program with latent variables.

    Raises:
        ValueError: the program has no latents.
    """

    program: Program
    num_samples: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _require_p_of_x(self.program)
        check_count(self.num_samples, "num_samples")
        check_seed(self.seed)
        if self.program.tractable:
            raise ValueError(f"this {type(self.program).__name__} has no latents, so no posterior: use another score")

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        where, bound, parts = program_device(self.program), ELBO(self.num_samples), []
        check_dense(x, "x")
        self.program.check(x.to(where))
        with evaluating(self.program), seeded(self.seed, where):
            for batch in x.split(256):
                with noise.per_datum(batch.to(where), self.seed):
                    kl = bound(self.program, batch.to(where)).kl
                parts.append(sum(kl.values(), torch.zeros(())).double().cpu())
        return torch.cat(parts)


def _as_nll(nll: NegativeLogLikelihood | Program, argument: str = "nll") -> NegativeLogLikelihood:
    check_type(nll, (NegativeLogLikelihood, Program), argument, "a NegativeLogLikelihood or a dgm.Program")
    return nll if isinstance(nll, NegativeLogLikelihood) else NegativeLogLikelihood(nll)


def _as_tensor(data: Tensor | Data, argument: str = "x") -> Tensor:
    if isinstance(data, Data):
        check_whole(data, "a score")
    x = data.x if isinstance(data, Data) else data
    check_dense(x, argument)
    return x


# -- code lengths ------------------------------------------------------------------------------------------------------


def _png(x: Tensor) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(x[0].numpy() if len(x) == 1 else x.movedim(0, -1).numpy()).save(file, "png", optimize=True)
    return file.getvalue()


def _zlib(x: Tensor) -> bytes:
    return zlib.compress(x.contiguous().numpy().tobytes(), 9)


COMPRESSORS: dict[str, Callable[[Tensor], bytes]] = {"png": _png, "zlib": _zlib}


def code_bits(x: Tensor, compressor: str = "png") -> Tensor:
    """The length of each x in bits under a lossless compressor, headers included, ``(N,)`` doubles.

    Args:
        x: integers 0 .. 255, ``(N, 1, H, W)`` or ``(N, 3, H, W)`` for "png", ``(N, *event_shape)`` for "zlib".
        compressor: a name in `COMPRESSORS`.

    Raises:
        ValueError, TypeError: x holds reals or other integers, or is no image; or there is no such compressor.
    """
    check_choice(compressor, COMPRESSORS, "compressor")
    check_finite(x, "x")
    if x.dtype not in INTEGERS and not torch.equal(x, x.round()):
        raise TypeError(f"x has dtype {x.dtype} and fractions, but a compressor codes integers: use another score")
    if int(x.min()) < 0 or int(x.max()) > 255:
        raise ValueError(
            f"x holds values from {int(x.min())} to {int(x.max())}, but one byte holds 0 .. 255: use another score"
        )
    if compressor == "png" and (x.dim() != 4 or x.shape[1] not in (1, 3)):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but png codes images (N, 1, H, W) or (N, 3, H, W): use compressor='zlib'"
        )
    code = COMPRESSORS[compressor]
    return torch.tensor([8.0 * len(code(each)) for each in x.to("cpu", torch.uint8)], dtype=torch.double)


# -- alarms ------------------------------------------------------------------------------------------------------------


class Detector:
    """An alarm on a score, calibrated to a rate of false alarms.

    Args:
        score: any callable from x to scores, higher for anomalies; a program stands for its `NegativeLogLikelihood`.

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
        self.score: Score = NegativeLogLikelihood(score) if isinstance(score, Program) else score
        self.threshold: float | None = None
        self.reference = torch.zeros(0)

    def calibrate(self, reference: Tensor | Data, false_alarm_rate: float = 0.01) -> Detector:
        """Set the threshold from normal data that were not used in training; returns the detector itself.

        Args:
            reference: ``(N, *event_shape)``, at least 1 / false_alarm_rate - 1 data.
            false_alarm_rate: alpha, in (0, 1): the largest probability that a datum like these is flagged.

        Raises:
            ValueError: the rate is out of range, the reference is too small for it, or a score is not finite.
        """
        check_number(false_alarm_rate, "false_alarm_rate", above=0, at_most=1)
        scores = self._checked_scores(_as_tensor(reference, "reference"))
        rank = math.ceil((len(scores) + 1) * (1 - false_alarm_rate) - 1e-9)  # 100 * (1 - 0.99) is 1.0000000000000009
        if not 1 <= rank <= len(scores):
            need = math.ceil(1 / false_alarm_rate - 1e-9) - 1
            raise ValueError(
                f"{len(scores)} reference data cannot set a false_alarm_rate of {false_alarm_rate}: pass at least "
                f"{max(1, need)}, or a rate of at least {1 / (len(scores) + 1):.2g} (--false-alarm-rate), and below 1"
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
        scores = self._checked_scores(_as_tensor(x))
        return scores - _rounding_error(scores) > self.threshold

    def p_values(self, x: Tensor | Data) -> Tensor:
        """Conformal p-values, ``(N,)``: the share of the reference data and x itself whose score is at least that of x.

        ``flag`` is ``p_values <= false_alarm_rate``.
        """
        if self.threshold is None:
            raise ValueError("the detector has no reference yet: call detector.calibrate(reference_data) first")
        scores = self._checked_scores(_as_tensor(x))
        below = torch.searchsorted(self.reference, scores - _rounding_error(scores))
        return (1 + len(self.reference) - below) / (1 + len(self.reference))

    def _checked_scores(self, x: Tensor) -> Tensor:
        scores = self.score(x).detach().double().cpu()
        if scores.shape != x.shape[:1]:
            raise ValueError(f"the score returned shape {tuple(scores.shape)} for {len(x)} data: return one per datum")
        if torch.isnan(scores).any():
            raise ValueError("the score of some x is NaN: clean the data, or use another score")
        return scores


def _rounding_error(scores: Tensor) -> Tensor:
    """Largest rounding difference between scores of equal data, because batches multiply matrices in other orders."""
    return ROUNDING * scores.abs().clamp(min=1)


@dataclass(frozen=True)
class Separation:
    """How well a score separates anomalies from normal data.

    Attributes:
        auroc: probability that an anomaly scores above a normal datum, ties counting half; 0.5 is chance.
        stderr: standard error of the AUROC over both sets of data (DeLong).
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
    """The probability that a normal datum scores above an anomalous one, ties counting half."""
    from sklearn.metrics import roc_auc_score

    labels = [1] * len(normal) + [0] * len(anomalous)
    return float(roc_auc_score(labels, torch.cat([normal.cpu(), anomalous.cpu()]).numpy()))


# -- a search through data ---------------------------------------------------------------------------------------------

SCORES = ("likelihood", "typicality", "complexity", "ratio", "waic", "kl")
"""Names of the scores that `detect` can take."""


@dataclass(frozen=True)
class Alarm:
    """The result of one score on the data.

    Attributes:
        score: name of the score.
        threshold: scores above it are flagged; in nats (for WAIC, nats and nats squared).
        flagged: number of flagged data.
        false_alarms: share flagged of the normal data that did not set the threshold.
        separation: AUROC of the data against these normal data.
    """

    score: str
    threshold: float
    flagged: int
    false_alarms: float
    separation: Separation


@dataclass(frozen=True)
class Anomalies(Result):
    """The result of `detect`.

    Attributes:
        scores, p_values, flags: score, p-value and flag of each x by the first score, ``(N,)``.
        alarms: the `Alarm` of each score.
        num_reference: number of normal data that set the thresholds.
        num_normal: number of normal data that AUROC and false alarms are measured on.
        false_alarm_rate: largest probability that a normal datum is flagged.
    """

    scores: Tensor
    p_values: Tensor
    flags: Tensor
    alarms: tuple[Alarm, ...]
    num_reference: int
    num_normal: int
    false_alarm_rate: float

    @property
    def ranked(self) -> Tensor:
        """Indices of the data, the most anomalous first, ``(N,)``."""
        return self.scores.argsort(descending=True)

    def records(self) -> list[dict[str, Any]]:
        """One row per datum, the most anomalous first."""
        return [
            {
                "index": i,
                "score": f"{self.scores[i]:.6g}",
                "p_value": f"{self.p_values[i]:.6g}",
                "flagged": int(self.flags[i]),
            }
            for i in self.ranked.tolist()
        ]

    def parts(self) -> list[str | Table]:
        rows = [
            [
                alarm.score,
                f"{alarm.threshold:.2f}",
                f"{alarm.flagged} of {len(self.scores)}",
                f"{alarm.false_alarms:.4f}",
                str(alarm.separation),
            ]
            for alarm in self.alarms
        ]
        return [
            f"{len(self.scores)} data against {self.num_normal} normal ones; thresholds from {self.num_reference} "
            f"others, false-alarm rate {self.false_alarm_rate:g}",
            Table(["score", "threshold (nats)", "flagged", "false alarms", "AUROC"], rows),
            "AUROC: probability that one of the data scores above a normal datum; 0.5 is chance",
        ]

    def as_dict(self) -> dict[str, Any]:
        """The table as plain Python, for JSON."""
        rows = [
            {
                "score": alarm.score,
                "threshold": alarm.threshold,
                "flagged": alarm.flagged,
                "of": len(self.scores),
                "false_alarms": alarm.false_alarms,
                "auroc": alarm.separation.auroc,
                "auroc_stderr": alarm.separation.stderr,
            }
            for alarm in self.alarms
        ]
        return {"num_reference": self.num_reference, "unit": "nats", "scores": rows}


def detect(
    program: Program,
    x: Tensor | Data,
    normal: Tensor | Data,
    scores: Sequence[str] = ("likelihood",),
    *,
    background: Program | None = None,
    ensemble: Sequence[Program] = (),
    false_alarm_rate: float = 0.01,
    num_particles: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> Anomalies:
    """Detect anomalies in x, by one score or several.

    A random half of the normal data sets the thresholds; AUROC and false alarms are measured on the other half.

    Args:
        program: a program of p(x).
        x: data to search, ``(N, *event_shape)``.
        normal: held-out data from the distribution of the training data.
        scores: names among `SCORES`; the first ranks the data.
        background: for "ratio", a program trained on mutated data: see `Ratio`.
        ensemble: for "waic", programs trained like ``program`` from other seeds.
        false_alarm_rate: largest probability that a normal datum is flagged.
        num_particles: particles of the bounds on log p(x).
        seed: seed of the split into halves.
        progress: whether to show bars.

    Raises:
        ValueError, TypeError: there is no such score, a score lacks a program, or the data do not fit.

    >>> import torch, dgm_pyro as dgm
    >>> found = dgm.anomaly.detect(dgm.Normal(1), torch.tensor([[0.1], [9.0]]), torch.randn(400, 1))
    >>> found.flags
    tensor([False,  True])
    """
    check_type(scores, Sequence, "scores", "a sequence of names")
    names = [scores] if isinstance(scores, str) else list(scores) or ["likelihood"]
    for name in names:
        check_choice(name, SCORES, "scores")
    if background is not None:
        check_program(background, "background")
    for each in ensemble:
        check_program(each, "ensemble")
    check_count(num_particles, "num_particles")
    x, kept = _as_tensor(x), _as_tensor(normal, "normal")
    if len(kept) < 2:
        raise ValueError("normal has one datum: pass at least two, one to calibrate and one to measure on")
    order = torch.randperm(len(kept), generator=generator(seed))
    reference, held_out = kept[order[: len(kept) // 2]], kept[order[len(kept) // 2 :]]

    def nll(program: Program) -> NegativeLogLikelihood:
        return NegativeLogLikelihood(program, num_particles, progress)

    alarms, first = list[Alarm](), dict[str, Tensor]()
    for name in names:
        score = _score(name, nll, program, background, ensemble, reference)
        values, normal_values = score(x), score(held_out)
        detector = Detector(lambda found: found).calibrate(score(reference), false_alarm_rate)
        flags = detector.flag(values)
        first = first or {"scores": values, "p_values": detector.p_values(values), "flags": flags}
        assert detector.threshold is not None
        false_alarms = detector.flag(normal_values).double().mean().item()
        separated = separation(normal_values, values)
        alarms.append(Alarm(name, detector.threshold, int(flags.sum()), false_alarms, separated))
    return Anomalies(**first, alarms=tuple(alarms), num_reference=len(reference), num_normal=len(held_out),
                     false_alarm_rate=false_alarm_rate)  # fmt: skip


def _score(
    name: str,
    nll: Callable[[Program], NegativeLogLikelihood],
    program: Program,
    background: Program | None,
    ensemble: Sequence[Program],
    reference: Tensor,
) -> Score:
    if name == "ratio" and background is None:
        raise ValueError("the score 'ratio' needs a background (--background RUN): a program trained on mutated data")
    if name == "waic" and not ensemble:
        raise ValueError("the score 'waic' needs an ensemble (--ensemble RUN,RUN,...): programs from other seeds")
    makers: dict[str, Callable[[], Score]] = {
        "likelihood": lambda: nll(program),
        "typicality": lambda: Typicality(nll(program), reference),
        "complexity": lambda: Complexity(nll(program), "png" if len(program.event_shape) == 3 else "zlib"),
        "ratio": lambda: Ratio(nll(program), nll(background)),  # type: ignore[arg-type]
        "waic": lambda: WAIC([nll(each) for each in (program, *ensemble)]),
        "kl": lambda: PosteriorKL(program),
    }
    return makers[name]()
