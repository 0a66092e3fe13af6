r"""Classification with uncertainty: accuracy, confidence and calibration of p(y | x).

Three classifiers give p(y | x): `Discriminative` directly; `Labeled`, a generative classifier, by Bayes' rule from
p(x | y), which gives p(x) too; and `Bayesian`, a network whose weights w have a prior, averaged over their posterior:

.. math::
    p(y \mid x, D) = \int p(y \mid x, w)\, p(w \mid D)\, dw \approx \frac1K \sum_k p(y \mid x, w_k), \quad w_k \sim q(w)

Metrics of the predictions: accuracy; `nll`, :math:`-\log p(y \mid x)`; `reliability`, whether a share c of the
predictions with confidence c is right; and `risk_coverage`, the error rate of the remaining predictions when the most
uncertain ones are rejected, by any score.

Source: Guo et al. 2017 (arXiv 1706.04599), ECE; Geifman and El-Yaniv 2017 (arXiv 1705.08500), risk and coverage;
Blundell et al. 2015 (arXiv 1505.05424), weights with a variational posterior; Depeweg et al. 2018 (arXiv 1710.07283),
the part of the entropy that is uncertainty about w.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuide, AutoLowRankMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from pyro.optim import ClippedAdam
from torch import Tensor, nn
from tqdm import tqdm

from dgm_pyro.checks import (
    check_count,
    check_counts,
    check_dense,
    check_finite,
    check_labels,
    check_number,
    check_tensor,
    check_type,
    generator,
)
from dgm_pyro.data import Data
from dgm_pyro.evaluation import check_whole, evaluating, program_device, standard_error
from dgm_pyro.families.labeled import Discriminative, Labeled
from dgm_pyro.program import Program, check_program, differentiating, log_mean_exp, seeded
from dgm_pyro.results import Result, Table, with_error
from dgm_pyro.uses.anomaly import Detector

__all__ = [
    "GUIDES",
    "Answers",
    "Bayesian",
    "Reliability",
    "RiskCoverage",
    "accuracy",
    "answer",
    "beliefs",
    "nll",
    "reliability",
    "risk_coverage",
    "share",
]

# -- quality of the answers --------------------------------------------------------------------------------------------


def accuracy(probabilities: Tensor, y: Tensor) -> float:
    """Share of the data whose most probable class is the true one."""
    _check_predictions(probabilities, y)
    return (probabilities.argmax(-1) == y.to(probabilities.device)).double().mean().item()


def nll(probabilities: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean of -log p(y | x) in nats, and its standard error; infinite if a true class has probability 0."""
    _check_predictions(probabilities, y)
    values = -probabilities.double().gather(-1, y.to(probabilities.device).long()[:, None])[:, 0].log()
    return values.mean().item(), standard_error(values)


@dataclass(frozen=True)
class Reliability(Result):
    """Answers in bins of equal width by their confidence, the highest p(y | x).

    Attributes:
        count: number of answers in each bin, ``(bins,)``.
        confidence, accuracy: means in each bin; NaN in empty bins.
        ece: expected calibration error: the distance between confidence and accuracy in a bin, averaged over answers.
        stderr: standard error of the ece for fixed signs of the bins' differences. Where the differences are noise, the
            ece is biased upwards: a calibrated classifier has an ece of about sqrt(bins / N) / 2, not 0.
    """

    count: Tensor
    confidence: Tensor
    accuracy: Tensor
    ece: float
    stderr: float

    def parts(self) -> list[str | Table]:
        rows = [
            [f"{confidence:.3f}", f"{accuracy:.3f}", str(int(count))]
            for count, confidence, accuracy in zip(self.count, self.confidence, self.accuracy, strict=True)
            if count
        ]
        return [f"ECE {with_error(self.ece, self.stderr, 4)}", Table(["confidence", "accuracy", "answers"], rows)]

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON; empty bins are left out."""
        full = self.count > 0
        bins = {name: getattr(self, name)[full].tolist() for name in ("count", "confidence", "accuracy")}
        return {"ece": self.ece, "stderr": self.stderr, **bins}


def reliability(probabilities: Tensor, y: Tensor, bins: int = 15) -> Reliability:
    """The table of a reliability diagram, and the expected calibration error.

    Args:
        probabilities: p(y | x), ``(N, classes)``.
        y: the true labels, ``(N,)``.
        bins: number of bins of equal width; a confidence on an edge belongs to the lower bin.

    Raises:
        ValueError: the shapes do not fit, or a label is no class.
    """
    _check_predictions(probabilities, y)
    check_count(bins, "bins")
    confidence, guess = probabilities.detach().cpu().double().max(-1)
    right = (guess == y.cpu()).double()
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(bin_of, minlength=bins)
    total = lambda values: torch.bincount(bin_of, weights=values, minlength=bins)  # noqa: E731
    gap = total(right) - total(confidence)
    errors = gap.sign()[bin_of] * (right - confidence)
    return Reliability(
        count, total(confidence) / count, total(right) / count, errors.mean().item(), standard_error(errors)
    )


@dataclass(frozen=True)
class RiskCoverage:
    """The risk-coverage curve: the error rate of the kept answers, for each threshold on the uncertainty.

    Attributes:
        coverage: share of the answers that are kept, rising to 1.
        risk: share of the kept answers that are wrong.
    """

    coverage: Tensor
    risk: Tensor

    @property
    def area(self) -> float:
        """The mean risk over all coverages (AURC), with each step at the risk of its end; lower is better."""
        return (self.risk * self.coverage.diff(prepend=self.coverage.new_zeros(1))).sum().item()

    def accuracy_at(self, coverage: float) -> float:
        """Accuracy of the answers kept when as few as possible, but at least this share, are kept."""
        check_number(coverage, "coverage", above=0, at_most=1)
        # A coverage is k / N: the tolerance is for its rounding.
        return 1 - self.risk[int(torch.searchsorted(self.coverage, coverage - 1e-9))].item()


def risk_coverage(correct: Tensor, uncertainty: Tensor) -> RiskCoverage:
    """Risk and coverage when predictions are rejected by uncertainty, the highest first; ties are rejected together.

    Args:
        correct: whether each prediction is right, bools ``(N,)``.
        uncertainty: any score, higher for less certain predictions: ``-probabilities.max(-1).values``, -log p(x), ...
    """
    check_dense(correct, "correct")
    check_dense(uncertainty, "uncertainty")
    if correct.shape != uncertainty.shape or correct.dim() != 1 or not len(correct):
        shapes = f"correct has shape {tuple(correct.shape)} and uncertainty {tuple(uncertainty.shape)}"
        raise ValueError(f"{shapes}: pass (N,) of each")
    uncertainty, order = uncertainty.detach().cpu().double().sort()
    if torch.isnan(uncertainty).any():
        raise ValueError("uncertainty holds NaN, but every answer needs a score: clean it or drop those answers")
    wrong = (~correct.cpu().bool()[order]).double().cumsum(0)
    kept = torch.arange(1, len(uncertainty) + 1, dtype=torch.double)
    ends = torch.cat([uncertainty[1:] != uncertainty[:-1], torch.ones(1, dtype=torch.bool)])
    return RiskCoverage((kept / len(uncertainty))[ends], (wrong / kept)[ends])


def _check_predictions(probabilities: Tensor, y: Tensor) -> None:
    check_finite(probabilities, "probabilities")
    if probabilities.dim() != 2 or not len(probabilities):
        raise ValueError(f"probabilities has shape {tuple(probabilities.shape)}: pass (N, classes)")
    check_labels(y, "y", len(probabilities))
    if int(y.min()) < 0 or int(y.max()) >= probabilities.shape[-1]:
        raise ValueError(
            f"y holds labels from {int(y.min())} to {int(y.max())}, but probabilities has {probabilities.shape[-1]} "
            "classes: drop unknown labels, or pass probabilities of all classes"
        )


# -- uncertain weights -------------------------------------------------------------------------------------------------

GUIDES: dict[str, Callable[[Any], AutoGuide]] = {
    "map": functools.partial(AutoDelta, init_loc_fn=init_to_sample),
    "normal": functools.partial(AutoNormal, init_loc_fn=init_to_sample, init_scale=0.01),
    "lowrank": functools.partial(AutoLowRankMultivariateNormal, init_loc_fn=init_to_sample, init_scale=0.01, rank=10),
}
"""Posteriors over weights: a point, independent Normals, a Normal with covariances of rank 10.

They start at a draw from the prior, because at its median, zero, all units of a layer would learn the same.
"""


class _BayesianNetwork(PyroModule):
    """p(w) prod_i p(y_i | x_i, w): the network's parameters are sample sites."""

    def __init__(self, network: nn.Module, scale: float, num_data: int):
        super().__init__()
        self.network, self.num_data = copy.deepcopy(network), num_data
        to_pyro_module_(self.network)
        for part in list(self.network.modules()):
            for name, value in list(part.named_parameters(recurse=False)):
                width = scale / math.sqrt(value[0].numel()) if value.dim() > 1 else scale
                prior = dist.Normal(value.new_zeros(value.shape), width).to_event(value.dim())
                setattr(part, name, PyroSample(prior))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.network(x)
        with pyro.plate("data", max(self.num_data, len(x)), subsample_size=len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)
        return logits


class Bayesian:
    """A classifier whose network has a prior over its weights: w ~ N(0, scale^2 / fan in), biases ~ N(0, scale^2).

    Args:
        network: a network from x to logits, ``(B, classes)``; it is copied, and its weights are not used.
        data: data with labels.
        guide: q(w): a name in `GUIDES`, or any function from a Pyro model to an `AutoGuide`.
        scale: scale of the prior.

    Raises:
        ValueError, TypeError: the data have no labels, or an argument does not fit.

    >>> import torch, dgm_pyro as dgm
    >>> digits = dgm.data.load("digits")
    >>> bayesian = dgm.classification.Bayesian(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
    ...     dgm.Data(digits.x / 16, digits.y)).fit(epochs=1)
    >>> bayesian.class_probabilities(digits.x[:5] / 16).shape
    torch.Size([5, 10])
    """

    def __init__(
        self, network: nn.Module, data: Data, guide: str | Callable[[Any], AutoGuide] = "normal", scale: float = 1.0
    ):
        check_type(network, nn.Module, "network", "a torch.nn.Module")
        check_type(data, Data, "data", "a dgm.Data")
        if data.y is None or int(data.y.min()) < 0:
            raise ValueError(f"{data.name} has data without labels: a classifier needs a y for each x")
        check_whole(data, "a Bayesian")
        if not callable(guide) and not (isinstance(guide, str) and guide in GUIDES):
            raise ValueError(f"guide must be one of {', '.join(GUIDES)}, or a function of a model, got {guide!r}")
        check_number(scale, "scale", above=0)
        self.data, self.model = data, _BayesianNetwork(network, scale, len(data))
        self.guide = (GUIDES[guide] if isinstance(guide, str) else guide)(self.model)
        self.losses: list[float] = []

    @differentiating("Bayesian.fit")
    def fit(self, epochs: int = 50, batch_size: int = 64, lr: float = 1e-2, seed: int = 0) -> Bayesian:
        """Maximize the ELBO by `pyro.infer.SVI`; ``losses`` then has the negative ELBO per epoch, in nats per datum.

        Returns:
            The classifier itself.
        """
        check_counts(epochs=epochs, batch_size=batch_size)
        check_number(lr, "lr", above=0)
        x, y = self.data.x, self.data.y
        assert y is not None
        steps = epochs * math.ceil(len(x) / batch_size)
        # The rate falls exponentially, to a hundredth.
        optimizer = ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / steps), "clip_norm": 10.0})
        bound = TraceMeanField_ELBO() if isinstance(self.guide, (AutoNormal, AutoDelta)) else Trace_ELBO()
        svi, shuffling = SVI(self.model, self.guide, optimizer, bound), generator(seed)
        with _isolated_from_pyro(seed, x.device):
            for _ in range(epochs):
                batches = torch.randperm(len(x), generator=shuffling).split(batch_size)
                losses = [svi.step(x[rows], y[rows]) / len(x) for rows in batches]
                self.losses.append(sum(losses) / len(losses))
        return self

    def draws(self, x: Tensor, num_samples: int = 32, seed: int = 0) -> Tensor:
        """log p(y | x, w_k) in nats for K draws from q(w), ``(K, B, classes)``: the same w for all x; differentiable.

        Raises:
            ValueError: `fit` has not been called, or x does not fit.
        """
        check_count(num_samples, "num_samples")
        check_tensor(x, self.data.event_shape, "x", "the shape of one x of the data")
        check_finite(x, "x")
        if not self.losses:
            raise ValueError("this Bayesian has no q(w) yet: call its fit() first")
        drawn = []
        with _isolated_from_pyro(seed, x.device), poutine.block():
            for _ in range(num_samples):
                with torch.no_grad():
                    weights = poutine.trace(self.guide).get_trace(x[:1])
                drawn.append(poutine.replay(self.model, trace=weights)(x).log_softmax(-1))
        return torch.stack(drawn)

    def log_class_probabilities(self, x: Tensor, num_samples: int = 32, seed: int = 0) -> Tensor:
        """log p(y | x, D) in nats, ``(B, classes)``, differentiable in x, as `corruptions.pgd` needs."""
        return log_mean_exp(self.draws(x, num_samples, seed))

    @torch.no_grad()
    def class_probabilities(self, x: Tensor, num_samples: int = 32, seed: int = 0) -> Tensor:
        """p(y | x, D), ``(B, classes)``."""
        return self.log_class_probabilities(x, num_samples, seed).exp()

    @torch.no_grad()
    def mutual_information(self, x: Tensor, num_samples: int = 32, seed: int = 0) -> Tensor:
        """The mutual information of y and w given x, in nats, ``(B,)``: entropy of the mean minus mean entropy."""
        log_p = self.draws(x, num_samples, seed)
        log_mean = log_mean_exp(log_p)
        return (log_p.exp() * log_p).sum(-1).mean(0) - (log_mean.exp() * log_mean).sum(-1)


@contextlib.contextmanager
def _isolated_from_pyro(seed: int, device: torch.device) -> Iterator[None]:
    """A separate random state and param store: AutoGuides of one class would share the store's entries."""
    with seeded(seed, device), pyro.get_param_store().scope(), pyro.validation_enabled(False):
        yield


@torch.no_grad()
def beliefs(
    program: Program,
    x: Tensor,
    batch_size: int = 128,
    num_particles: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """p(y | x), ``(N, classes)``, and log p(x) in nats, ``(N,)``, or None for a program without p(x).

    Where p(x | y) is not exact, both come from bounds with ``num_particles`` draws for each class (IWAE).
    Predictions do not depend on the batch.

    Raises:
        TypeError, ValueError: the program has no p(y | x), or x does not fit.
    """
    check_program(program)
    if not isinstance(program, Labeled | Discriminative):
        raise TypeError(f"this {type(program).__name__} has no p(y | x): use a dgm.Labeled or a dgm.Discriminative")
    check_dense(x, "x")
    x = x.to(program_device(program))
    if isinstance(program, Labeled):
        program.check(x)
    probabilities, log_p = [], []
    batches = x.split(batch_size)
    with evaluating(program):
        for batch in tqdm(batches, desc="classify", unit="batch", disable=not progress, leave=False):
            if isinstance(program, Labeled):
                log_joint = program.log_joint(batch, num_particles, seed)
                probabilities.append(log_joint.softmax(0).T.cpu())
                log_p.append(log_joint.logsumexp(0).cpu())
            else:
                probabilities.append(program.class_probabilities(batch).cpu())
    return torch.cat(probabilities), torch.cat(log_p) if log_p else None


@dataclass(frozen=True)
class Answers(Result):
    """The result of `answer`.

    Attributes:
        probabilities: p(y | x), ``(N, classes)``.
        log_p: log p(x) in nats, or a bound, ``(N,)``; None for a classifier without p(x).
        rejected: whether each answer is rejected, bools ``(N,)``.
        false_alarm_rate: largest probability that a datum like the reference is rejected.
    """

    probabilities: Tensor
    log_p: Tensor | None
    rejected: Tensor
    false_alarm_rate: float

    @property
    def predictions(self) -> Tensor:
        """The most probable class of each x, ``(N,)``."""
        return self.probabilities.argmax(-1)

    def records(self) -> list[dict[str, Any]]:
        """One row per datum."""
        return [
            {
                "index": i,
                "class": int(row.argmax()),
                "log_p_x": "" if self.log_p is None else f"{self.log_p[i]:.6g}",
                "reject": int(self.rejected[i]),
                **{f"p_{y}": f"{share:.6g}" for y, share in enumerate(row.tolist())},
            }
            for i, row in enumerate(self.probabilities)
        ]

    def parts(self) -> list[str | Table]:
        by = "its highest p(y | x), because it has no p(x)" if self.log_p is None else "log p(x)"
        return [f"{int(self.rejected.sum())} of {len(self.rejected)} answers rejected, by {by}"]

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {
            "num_data": len(self.rejected),
            "rejected": int(self.rejected.sum()),
            "by": "p(y | x)" if self.log_p is None else "log p(x)",
            "false_alarm_rate": self.false_alarm_rate,
            "predictions": self.predictions.tolist(),
        }


def answer(
    program: Program,
    x: Tensor,
    reference: Tensor,
    *,
    false_alarm_rate: float = 0.01,
    num_particles: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> Answers:
    """Classify x, and reject data unlike the reference: by log p(x), or by the highest p(y | x) if there is no p(x).

    Args:
        program: a `Labeled` or a `Discriminative`.
        x: ``(N, *event_shape)``.
        reference: held-out data from the distribution of the training data, which set the threshold.
        false_alarm_rate: largest probability that a datum like the reference is rejected.
        num_particles: particles of the bounds, where p(x | y) is not exact.
        seed: seed of their draws.
        progress: whether to show a bar.

    Raises:
        TypeError, ValueError: the program has no p(y | x), the data do not fit, or the reference is too small.
    """
    check_dense(x, "x")
    check_dense(reference, "reference")
    check_count(num_particles, "num_particles")
    (probabilities, log_p), (usual, usual_log_p) = (
        beliefs(program, each, num_particles=num_particles, seed=seed, progress=progress) for each in (x, reference)
    )
    doubt, usual_doubt = (
        -p.max(-1).values if log is None else -log for p, log in ((probabilities, log_p), (usual, usual_log_p))
    )
    detector = Detector(lambda values: values).calibrate(usual_doubt, false_alarm_rate)
    return Answers(probabilities, log_p, detector.flag(doubt), false_alarm_rate)


def share(true: Any) -> float:
    """Fraction of entries of ``true`` that are true."""
    return float(torch.as_tensor(true).double().mean())


def share_stderr(share: float, count: int) -> float:
    """Standard error of a fraction of ``count`` independent data."""
    return math.sqrt(share * (1 - share) / count)
