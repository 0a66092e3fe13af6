r"""Generative and discriminative classifiers: two factorizations of the joint p(x, y).

.. math::
    p(x, y) = p(x \mid y)\, p(y) = p(y \mid x)\, p(x)

`Labeled` models the left side. The sum rule gives :math:`p(x) = \sum_y p(x \mid y) p(y)` and Bayes' rule
:math:`p(y \mid x) = p(x \mid y) p(y) / p(x)`. `Discriminative` models p(y | x) alone, and has no p(x).
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import dgm_pyro.noise as noise
from dgm_pyro.checks import INTEGERS, check_count, check_dense, check_name, check_seed, check_tensor, check_type
from dgm_pyro.data import Data
from dgm_pyro.families.conditionals import Categorical
from dgm_pyro.program import (
    Conditional,
    Program,
    check_place,
    check_program,
    check_values,
    declare_given,
    log_mean_exp,
    require_distinct,
    seeded,
    unchecked,
)
from dgm_pyro.registry import register

__all__ = ["Discriminative", "Labeled"]


@register
class Labeled(Program):
    """The generative classifier p(y) p(x | y), over any family.

    The guide of y is the classifier q(y | x) if there is one, else Bayes' rule where p(x | y) is exact, else p(y).
    To sum y out in Pyro's `TraceEnum_ELBO`, wrap the guide: ``pyro.infer.config_enumerate(program.guide, "parallel")``.

    Args:
        prior: p(y), a `Categorical` of event shape ``()``.
        program: p(x | y), any program conditional on an integer label.
        classifier: q(y | x), a `Categorical` of event shape ``()`` conditional on x.
        label_name: the name of y.

    Raises:
        ValueError: the number of classes, or a shape, does not fit.
    """

    # Or None; a checker that knew it would refuse `labeled.classifier(x)`.
    classifier: Categorical | Any

    def __init__(
        self, prior: Categorical, program: Program, classifier: Categorical | None = None, label_name: str = "y"
    ):
        super().__init__()
        for role, part in (("prior", prior), ("classifier", classifier)):
            if part is not None and (not isinstance(part, Categorical) or part.event_shape != ()):
                raise TypeError(f"the {role} must be a Categorical of event_shape (), got {part!r}")
        check_type(prior, Categorical, "prior", "a Categorical of event_shape ()")
        check_name(label_name, "label_name")
        if prior.conditional:
            raise ValueError("the prior is p(y), given nothing: build it without a network, learned or with parameters")
        check_program(program)
        if classifier is not None and classifier.levels != prior.levels:
            raise ValueError(f"the classifier has {classifier.levels} classes, but the prior has {prior.levels}")
        if program.num_classes is not None and program.num_classes != prior.levels:
            raise ValueError(f"the program has {program.num_classes} classes, but the prior has {prior.levels}")
        declare_given(program, torch.Size(), "program", "a label of shape")
        if classifier is not None:
            declare_given(classifier, program.event_shape, "classifier", "the program's event_shape")
        self.prior, self.program, self.classifier, self.label_name = prior, program, classifier, label_name
        self.event_shape, self.levels, self.tractable = program.event_shape, program.levels, program.tractable
        sites = program.latents(self.variable)
        if sites is not None:
            require_distinct((self.variable, label_name, *sites), "this Labeled")

    @property
    def num_labels(self) -> int:
        """Number of values that y takes."""
        assert self.prior.levels is not None
        return self.prior.levels

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        y = pyro.sample(self.label_name, self.prior())
        return self.program.joint(name, value, given=y)

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        y = pyro.sample(self.label_name, self._label_guide(value))
        self.program.posterior(name, value, given=y)

    def _label_guide(self, x: Tensor) -> dist.TorchDistribution:
        if self.classifier is not None:
            return self.classifier(x)
        return dist.Categorical(logits=self.log_joint(x).movedim(0, -1)) if self.tractable else self.prior()

    def latents(self, name: str) -> tuple[str, ...] | None:
        inner = self.program.latents(name)
        return None if inner is None else (self.label_name, *inner)

    def codes(self) -> dict[str, Program]:
        """Empty: a `Labeled` has no code of its own.

        Raises:
            ValueError: the program within has a code for each class.
        """
        if self.program.codes():
            raise ValueError(
                "a Labeled program has a code for each class: use the program within and the labels, "
                "labeled.program.encode(x, given=labeled.classify(x))"
            )
        return {}

    def unroll(self) -> Labeled:
        return self.replaced(program=self.program.unroll())

    def unroll_latents(self) -> Labeled:
        return self.replaced(program=self.program.unroll_latents())

    def completions(self, by: Any, x: Tensor, mask: Tensor, given: Any = None) -> tuple[Tensor, Tensor]:
        """p(y, x_mis | x_obs): draws for every y, weighted by p(y) and p(x_obs | y)."""
        labels = torch.arange(self.num_labels, device=x.device)
        each = [self.program.completions(by, x, mask, y.expand(len(x))) for y in labels]
        log_prior = self.prior().log_prob(labels)
        weights = [log_weights + log_p for (_, log_weights), log_p in zip(each, log_prior, strict=True)]
        return torch.cat([drawn for drawn, _ in each]), torch.cat(weights)

    def arguments(self, data: Data) -> tuple[Tensor, Any, dict[str, Tensor]]:
        return data.x, None, ({} if data.y is None else {self.label_name: data.y})

    @unchecked()
    def exact_log_prob(self, x: Tensor, given: Any = None) -> Tensor:
        return self.log_joint(x).logsumexp(0)

    def log_joint(self, x: Tensor, num_particles: int = 1, seed: int = 0) -> Tensor:
        """log p(x | y) + log p(y) in nats for every class y, ``(classes, *batch)``.

        Exact where p(x | y) is exact. Else a lower bound of log p(x | y) from ``num_particles`` draws (IWAE; ELBO for
        1), with noise that belongs to each datum (`noise.per_datum`).

        Args:
            x: ``(*batch, *event_shape)``; one batch dimension where p(x | y) is not exact.
            num_particles: draws per datum and class; not used where p(x | y) is exact.
            seed: seed of the draws.
        """
        check_count(num_particles, "num_particles")
        check_dense(x, "x")
        check_seed(seed)
        batch = x.shape[: x.dim() - len(self.event_shape)]
        labels = torch.arange(self.num_labels, device=x.device)
        if self.tractable:
            y = labels.reshape(-1, *(1,) * len(batch)).expand(-1, *batch)
            log_likelihood = self.program.exact_log_prob(x.expand(self.num_labels, *x.shape), y)
        else:
            bounds = []
            for y in labels:
                # All classes share the draws, so their noise cancels in comparisons of classes.
                with seeded(seed, x.device), noise.per_datum(x, seed):
                    weights = self.program.log_weights(x, y.expand(len(x)), num_particles)
                bounds.append(log_mean_exp(weights))
            log_likelihood = torch.stack(bounds)
        log_prior = self.prior().log_prob(labels)
        return log_likelihood + log_prior.reshape(-1, *(1,) * len(batch))

    @torch.no_grad()
    def class_probabilities(self, x: Tensor, num_particles: int = 1, seed: int = 0) -> Tensor:
        """p(y | x) by Bayes' rule, ``(B, classes)``; from bounds on p(x | y) where it is not exact, see `log_joint`.

        Raises:
            ValueError: ``x`` does not fit.
        """
        self.check(x)
        return self.log_joint(x, num_particles, seed).softmax(0).T

    def classify(self, x: Tensor, num_particles: int = 1, seed: int = 0) -> Tensor:
        """The most probable class of each x, ``(B,)``; see `class_probabilities`."""
        return self.class_probabilities(x, num_particles, seed).argmax(-1)

    @torch.no_grad()
    def sample(self, num_samples: int = 1, given: Any = None, **options: Any) -> Tensor:
        """Draw x from p(x), or from p(x | y) for labels ``given``, ``(num_samples,)`` or ``(1,)``.

        Further options (``guidance=``, ``sampler=``) go to the program's own `sample`.

        Returns:
            ``(num_samples, *event_shape)``.
        """
        if given is None:
            self.check_draws(num_samples, None)
            given = self.prior().sample((num_samples,))
        return self.program.sample(num_samples, given, **options)


@register
class Discriminative(Conditional):
    """The discriminative classifier p(y | x): its variable is the label, and its ``given`` is x.

    Args:
        classifier: p(y | x), a `Categorical` of event shape ``()`` conditional on x.

    Raises:
        TypeError: ``classifier`` is not such a `Categorical`.
    """

    variable = "y"
    conditional = True

    def __init__(self, classifier: Categorical):
        super().__init__()
        if not isinstance(classifier, Categorical) or classifier.event_shape != () or not classifier.conditional:
            raise TypeError(
                f"classifier must be a Categorical of event_shape () with a network of x, got {classifier!r}"
            )
        self.classifier = classifier
        self.event_shape, self.levels = torch.Size(), classifier.levels
        self.given_shape = classifier.given_shape

    def forward(self, given: Any = None) -> dist.TorchDistribution:
        return self.classifier(given)

    def arguments(self, data: Data) -> tuple[Tensor, Any, dict[str, Tensor]]:
        if data.y is None:
            raise ValueError("a Discriminative models labels, but the data have none: pass Data(x, y)")
        return data.y, data.x, {}

    @torch.no_grad()
    def class_probabilities(self, x: Tensor) -> Tensor:
        """p(y | x), ``(B, classes)``.

        Raises:
            ValueError, TypeError: ``x`` has another shape, holds NaN, or holds values that the network does not take.
        """
        if self.given_shape is not None:
            check_tensor(x, self.given_shape, "x", "the program's given_shape")
        check_place(x, "x", self)
        self._check_values(x)
        return self.classifier(x).probs

    def check_given(self, given: Any, batch_size: int, *, values: bool = True) -> None:
        super().check_given(given, batch_size, values=values)
        if values:
            self._check_values(given)

    def _check_values(self, x: Tensor) -> None:
        """Check x against the levels of the network; without levels, x may hold any integers."""
        assert self.classifier.network is not None  # it is conditional
        told = (getattr(part, "levels", None) for part in self.classifier.network.modules())
        levels = next((levels for levels in told if levels is not None), None)
        if levels is not None or x.dtype not in INTEGERS:
            check_values(x, levels, f"the x of a {type(self).__name__}")

    def classify(self, x: Tensor) -> Tensor:
        """The most probable class of each x, ``(B,)``."""
        return self.class_probabilities(x).argmax(-1)
