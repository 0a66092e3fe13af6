"""What generative models are for, as questions: is this like the rest, what is it, and how sure is the answer?

Every question is a function of programs and data; `dgm_pyro.tour` asks them all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dgm_pyro.corruptions import add_noise, shuffle_pixels
from dgm_pyro.data import Data
from dgm_pyro.evaluation import evaluating, program_device
from dgm_pyro.flow import Dequantized
from dgm_pyro.labelled import Discriminative, Labelled
from dgm_pyro.program import Program
from dgm_pyro.representations import encode
from dgm_pyro.vae import VAE

SHUFFLED, NOISY = "shuffled pixels", "additive noise"
"""Two kinds of anomalies."""

ANOMALY_NOISE = 0.5
"""Standard deviation of the noise of the anomalies, in grey levels: rounded, it moves a third of the grey pixels by
one, and half as many of those that are black or white, which are clipped: some 23 % of a digit."""

NOISE = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Standard deviations of the noise that the classifiers are shown, in grey levels."""

FALSE_ALARMS = 0.05
"""Share of the clean test digits that the alarm on p(x) may ring for."""


def auroc(normal: Tensor, anomalous: Tensor) -> float:
    """The probability that a normal datum scores above an anomalous one, a tie counting half."""
    from sklearn.metrics import roc_auc_score

    labels = [1] * len(normal) + [0] * len(anomalous)
    return float(roc_auc_score(labels, torch.cat([normal.cpu(), anomalous.cpu()]).numpy()))


def latents(program: Program, x: Tensor) -> Tensor | None:
    """What the program knows of x in place of x: the mean of q(z | x), or a flow's z; None without latents.

    Args:
        x: ``(N, *event_shape)``.

    Returns:
        ``(N, D)``, on the CPU.
    """
    return encode(program, x).flatten(1) if isinstance(program, (VAE, Dequantized)) else None


@torch.no_grad()
def beliefs(
    program: Program, x: Tensor, batch_size: int = 128, num_particles: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """p(y | x), ``(N, classes)``, and log p(x) in nats, ``(N,)``; None from a program that has no p(x).

    Where p(x | y) is not exact, both come from bounds with ``num_particles`` draws for each class (IWAE).
    No answer depends on the batch.
    """
    probabilities, log_p = [], []
    with evaluating(program):
        for batch in x.to(program_device(program)).split(batch_size):
            if isinstance(program, Labelled):
                log_joint = program.log_joint(batch, num_particles, seed)
                probabilities.append(log_joint.softmax(0).T.cpu())
                log_p.append(log_joint.logsumexp(0).cpu())
            else:
                assert isinstance(program, Discriminative)
                probabilities.append(program.class_probabilities(batch).cpu())
    return torch.cat(probabilities), torch.cat(log_p) if log_p else None


def share(true: Any) -> float:
    """How many of ``true`` are, from 0 to 1."""
    return float(torch.as_tensor(true).double().mean())


# -- two classifiers ---------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """The generative and the discriminative classifier as noise grows: a value for each of `NOISE`.

    Attributes:
        accuracy, confidence: by classifier; confidence is the mean of the highest p(y | x).
        log_p: mean log p(x) under the generative one, in nats.
        alarm: share of the digits whose log p(x) is below that of all but `FALSE_ALARMS` of the clean ones.
        shuffled: by classifier, its confidence where there is no digit, but shuffled pixels.
        probabilities, labels: by classifier, p(y | x), and the true y, of all levels of noise.
    """

    accuracy: dict[str, list[float]] = field(default_factory=dict)
    confidence: dict[str, list[float]] = field(default_factory=dict)
    log_p: list[float] = field(default_factory=list)
    alarm: list[float] = field(default_factory=list)
    shuffled: dict[str, float] = field(default_factory=dict)
    probabilities: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor = field(default_factory=lambda: torch.zeros(0))

    def metrics(self) -> dict[str, Any]:
        """The numbers, as plain Python."""
        return {
            "noise": list(NOISE),
            "accuracy": self.accuracy,
            "confidence": self.confidence,
            "log_p": self.log_p,
            "alarm": self.alarm,
            "false_alarms": FALSE_ALARMS,
            "confidence_on_shuffled_pixels": self.shuffled,
        }


def compare(classifiers: dict[str, Program], test: Data, seed: int = 0) -> Comparison:
    """Accuracy, confidence and log p(x) of each classifier on test digits with growing noise."""
    assert test.y is not None
    assert test.levels is not None
    comparison = Comparison(labels=test.y.repeat(len(NOISE)))
    noisy = [add_noise(test.x, scale, test.levels, seed) for scale in NOISE]
    for name, program in classifiers.items():
        believed = [beliefs(program, x) for x in noisy]
        tops = [probabilities.double().max(-1) for probabilities, _ in believed]
        comparison.accuracy[name] = [share(top.indices == test.y) for top in tops]
        comparison.confidence[name] = [top.values.mean().item() for top in tops]
        comparison.shuffled[name] = (
            beliefs(program, shuffle_pixels(test.x, seed))[0].double().max(-1).values.mean().item()
        )
        comparison.probabilities[name] = torch.cat([probabilities for probabilities, _ in believed])
        scores = [log_p.double() for _, log_p in believed if log_p is not None]
        if scores:
            threshold = scores[0].quantile(FALSE_ALARMS)
            comparison.log_p = [score.mean().item() for score in scores]
            comparison.alarm = [share(score < threshold) for score in scores]
    return comparison
