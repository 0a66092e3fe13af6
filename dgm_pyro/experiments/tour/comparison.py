"""A generative and a discriminative classifier, compared under increasing noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dgm_pyro.data import Data
from dgm_pyro.program import Program
from dgm_pyro.uses.classification import beliefs, share
from dgm_pyro.uses.corruptions import add_noise, shuffle_pixels

SHUFFLED, NOISY = "shuffled pixels", "additive noise"
"""The two kinds of anomalies."""

ANOMALY_NOISE = 0.5
"""Standard deviation of the noise of the anomalies, in gray levels: rounded, it moves a third of the gray pixels by
one, and half as many of those that are black or white, which are clipped: some 23 % of a digit."""

NOISE = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Standard deviations of the noise for the classifiers, in gray levels."""

FALSE_ALARMS = 0.05
"""Share of the clean test digits for which the alarm on p(x) is raised."""


@dataclass
class ClassifierComparison:
    """The generative and the discriminative classifier under noise, with a value for each of `NOISE`.

    Attributes:
        accuracy, confidence: by classifier; confidence is the mean of the highest p(y | x).
        log_p: mean log p(x) under the generative classifier, in nats.
        alarm: share of the digits whose log p(x) is below the `FALSE_ALARMS` quantile of the clean ones.
        shuffled: confidence on shuffled pixels, by classifier.
        probabilities: p(y | x) at all levels of noise, ``(N, classes)``, by classifier.
        y: the true labels of these, ``(N,)``.
    """

    accuracy: dict[str, list[float]] = field(default_factory=dict)
    confidence: dict[str, list[float]] = field(default_factory=dict)
    log_p: list[float] = field(default_factory=list)
    alarm: list[float] = field(default_factory=list)
    shuffled: dict[str, float] = field(default_factory=dict)
    probabilities: dict[str, Tensor] = field(default_factory=dict)
    y: Tensor = field(default_factory=lambda: torch.zeros(0))

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


def compare_classifiers(classifiers: dict[str, Program], test: Data, seed: int = 0) -> ClassifierComparison:
    """Accuracy, confidence and log p(x) of each classifier on test digits with increasing noise."""
    assert test.y is not None
    assert test.levels is not None
    comparison = ClassifierComparison(y=test.y.repeat(len(NOISE)))
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
