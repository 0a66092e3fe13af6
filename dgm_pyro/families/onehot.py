r"""Discrete codes as one-hot rows, with straight-through gradients.

A code k of K values is the row z of K numbers that is 1 at k and 0 elsewhere. A linear layer of z is then a codebook:
it picks a learned vector for each k. `OneHot` turns a program of integers into a program of such rows: a prior,
independent or `Autoregressive`, or an encoder. A draw has no derivative in the probabilities :math:`\pi`. The
*straight-through* gradient is that of the mean instead,

.. math::
    z = \mathrm{onehot}(k) + \pi - \mathrm{sg}(\pi), \quad k \sim \pi, \qquad
    \nabla f(z) := \sum_{i, v} \frac{\partial f}{\partial z_{iv}} \nabla \pi_{iv},

with sg the stop-gradient. This is exact in expectation where f is linear in each row, and biased elsewhere. Its
variance is far less than that of the score function. log p(z) is stated to be linear in each row,

.. math::
    \log p(z) = \sum_i \sum_v z_{iv} \log p(k_i = v \mid k_{<i}),

so the encoder learns the cost of each code at its own place, but not its effect on the cost of the codes after it.

The objective stays the ELBO: there is no codebook loss and no commitment loss, and the prior is learned jointly. van
den Oord et al. take the limit of a deterministic encoder and a uniform prior, where KL(q || p) is the constant d log K,
and fit the autoregressive prior to the codes afterwards.

Source: Bengio et al. 2013 (arXiv 1308.3432), straight through; van den Oord et al. 2017 (arXiv 1711.00937), VQ-VAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl

from dgm_pyro.families.autoregressive import Autoregressive, AutoregressiveDistribution
from dgm_pyro.families.conditionals import Categorical
from dgm_pyro.program import Conditional, parameter_of
from dgm_pyro.registry import register

__all__ = ["OneHot", "OneHotDistribution"]


class OverIntegers(Conditional):
    """Base of the conditionals that are built on a program of integers.

    Args:
        program: a `Categorical`, or an `Autoregressive` model of Categorical features.

    Raises:
        TypeError: ``program`` is neither.
    """

    def __init__(self, program: Categorical | Autoregressive):
        super().__init__()
        factors = program.factors if isinstance(program, Autoregressive) else program
        if not isinstance(factors, Categorical):
            raise TypeError(
                "program must be a dgm.Categorical, or a dgm.Autoregressive of Categorical features, got "
                f"{type(program).__name__}" + (f" of {type(factors).__name__}" if factors is not program else "")
            )
        self.program = program
        self.conditional, self.given_shape = program.conditional, program.given_shape
        self.num_classes = program.num_classes

    def _integers(self, given: Any = None) -> Any:
        """The distribution of the integers."""
        if self.conditional and self.program.given_shape is None:
            self.program.given_shape = self.given_shape
        return self.program(given)


@register
class OneHot(OverIntegers):
    """The one-hot rows of a program of integers, ``(*event_shape, K)``, whose draws have straight-through gradients.

    Draws of an autoregressive program have no gradient, so it can be a prior but not an encoder.

    Args:
        program: a `Categorical`, or an `Autoregressive` model of Categorical features.

    Raises:
        TypeError: ``program`` is neither.

    >>> import torch, dgm_pyro as dgm
    >>> OneHot(dgm.Categorical(2, 3)).log_prob(torch.eye(3)[None, :2]).exp()
    tensor([0.1111])
    """

    def __init__(self, program: Categorical | Autoregressive):
        super().__init__(program)
        assert program.levels is not None
        self.event_shape = torch.Size((*program.event_shape, program.levels))

    def forward(self, given: Any = None) -> OneHotDistribution:
        return OneHotDistribution(self._integers(given), self.event_shape[-1])

    def completions(self, by: Any, x: Tensor, mask: Tensor, given: Any = None) -> tuple[Tensor, Tensor]:
        raise ValueError(
            "there is no method to impute with a OneHot, whose features are rows: impute the integer codes with "
            "program.program"
        )


class OneHotDistribution(TorchDistribution):
    """The distribution that `OneHot` returns.

    Args:
        codes: the distribution of the integers: independent Categoricals, or an autoregressive model's.
        levels: K.
    """

    arg_constraints: ClassVar = {}

    def __init__(self, codes: Any, levels: int, validate_args: bool | None = None):
        self.codes, self.levels = codes, levels
        self.has_rsample = not isinstance(codes, AutoregressiveDistribution)
        super().__init__(codes.batch_shape, torch.Size((*codes.event_shape, levels)), validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.one_hot, len(self.codes.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: OneHotDistribution | None = None) -> OneHotDistribution:
        new = self._get_checked_instance(OneHotDistribution, _instance)
        new.codes, new.levels, new.has_rsample = self.codes.expand(batch_shape), self.levels, self.has_rsample
        super(OneHotDistribution, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_masses(self, k: Tensor | None = None) -> Tensor:
        """log p(k_i = v | k_<i) of every feature and value, ``(*batch, *event_shape)``; only a chain needs k."""
        if isinstance(self.codes, AutoregressiveDistribution):
            assert k is not None
            return self.codes.program.raw_parameters(k, self.codes.given).log_softmax(-1)
        return self._independent.logits

    @property
    def _independent(self) -> Any:
        """The Categorical distribution of single codes."""
        return self.codes.base_dist if self.codes.event_shape else self.codes

    @property
    def mean(self) -> Tensor:
        """The probabilities."""
        if not self.has_rsample:
            raise NotImplementedError("the mean of an autoregressive model has no closed form")
        return self._independent.probs

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z) in nats, linear in each row of z."""
        if self._validate_args:
            self._validate_sample(value)
        terms = value * self.log_masses(value.argmax(-1))
        log_prob = terms.flatten(terms.dim() - len(self.event_shape)).sum(-1)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """One-hot rows, ``(*sample_shape, *batch, *event_shape)``."""
        k = self.codes.sample(torch.Size(sample_shape))
        like = self._independent.logits if self.has_rsample else parameter_of(self.codes.program)
        return (k.unsqueeze(-1) == torch.arange(self.levels, device=k.device)).to(like.dtype)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """`sample`, with the gradient of the mean."""
        if not self.has_rsample:
            raise NotImplementedError("an autoregressive model's draws have no gradient: use sample")
        return self.sample(sample_shape) + (self.mean - self.mean.detach())


@register_kl(OneHotDistribution, OneHotDistribution)
def _kl(q: OneHotDistribution, p: OneHotDistribution) -> Tensor:
    if not (q.has_rsample and p.has_rsample):
        raise NotImplementedError  # a chain: the objective samples it
    log_q, log_p = q.log_masses(), p.log_masses()
    terms = log_q.exp() * (log_q - log_p)
    return terms.flatten(terms.dim() - len(q.event_shape)).sum(-1)
