r"""Autoregressive models in any order: one network of every p(x_i | x_S), for any set S of the other features.

An order of the features is a latent, uniform over the D! permutations :math:`\sigma`,

.. math::
    p(x) = \frac{1}{D!} \sum_\sigma p(x \mid \sigma), \qquad
    p(x \mid \sigma) = \prod_{i=1}^{D} p(x_{\sigma_i} \mid x_{\sigma_{<i}}),

If the network's conditionals are those of one joint, every order gives the same p(x). With the prior as the guide, the
bound is the mean over orders, a sum over the places of the order,

.. math::
    \log p(x) \ge E_\sigma \log p(x \mid \sigma) = D\, E_{\sigma, t} \Big[\frac{1}{D - t}
    \sum_{i \ge t + 1} \log p(x_{\sigma_i} \mid x_{\sigma_1} .. x_{\sigma_t})\Big],

with t uniform on 0 .. D - 1. A single pass of the network, which is given t features, is an unbiased estimate.

*Missing features.* The same holds for the observed features alone: the missing ones come last in the order, and their
conditionals are left out. So p(x_obs | order) is exact, and training needs no complete rows. p(x_obs) is the marginal
of p(x) if the conditionals are those of one joint. A learned network is only approximately consistent, and p(x_obs) is
then a normalized distribution of its own for each set of observed features. The missing features are drawn from their
conditionals given the observed ones, without weights.

Two forms on the same parameters: *plated*, `AnyOrder`, whose bound is estimated at one place for each datum;
*unrolled*, `AnyOrder.unroll`, whose x is scored at all places. `AnyOrder.in_order` is p(x | sigma), which is exact.

Source: Uria, Murray and Larochelle 2014 (A deep and tractable density estimator, arXiv 1310.1757), eqs. 5-8;
Hoogeboom et al. 2022 (Autoregressive diffusion models, arXiv 2110.02037), eqs. 2-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import constraints

from dgm_pyro.checks import check_type
from dgm_pyro.families.conditionals import IndependentConditional, Uniform, check_factors
from dgm_pyro.families.diffusion import Even, noising
from dgm_pyro.networks.masked import check_order
from dgm_pyro.program import (
    Conditional,
    Program,
    inside,
    is_pair,
    log_mean_exp,
    parameter_of,
    unwrapped,
)
from dgm_pyro.registry import register

__all__ = ["AnyOrder", "AnyOrderDistribution", "InOrder", "UnrolledAnyOrder"]


@register
class AnyOrder(Program):
    """The chain rule over the features in a random order, in its plated form.

    Args:
        factors: p(x_i | x_S): a `Bernoulli`, `Categorical`, `Columns`, ... whose network is called ``network(x, seen)``
            or ``network(x, seen, given)`` with the mask of S, ``(B, *event_shape)`` ones and zeros, such as
            `networks.ObservedInput`. Features outside of S are replaced before the call.

    Sites of ``joint("x")``: ``x``; ``x_order``, uniform keys by which the features are sorted, the smallest first; and
    ``x_place``, the place of the order at which the bound is estimated.

    Raises:
        TypeError: ``factors`` is no conditional with parameters.
        ValueError: its network is missing, reads no mask, or reads x of another shape.

    >>> import torch, dgm_pyro as dgm
    >>> network = dgm.networks.ObservedInput(3, dgm.networks.MLP((6,), 3, (8,)), levels=2)
    >>> program = dgm.AnyOrder(dgm.Bernoulli(3, network))
    >>> every = torch.cartesian_prod(*[torch.arange(2)] * 3)
    >>> round(program.in_order((2, 0, 1)).log_prob(every).exp().sum().item(), 4)
    1.0
    """

    takes_missing = True
    blank: Tensor

    def __init__(self, factors: IndependentConditional):
        super().__init__()
        check_factors(factors)
        self.factors = factors
        self.event_shape, self.levels, self.num_classes = factors.event_shape, factors.levels, factors.num_classes
        remedy = "give it one that is called network(x, seen), such as dgm.networks.ObservedInput"
        if factors.network is None:
            raise ValueError(f"factors has no network: {remedy}")
        shapes: Any = factors.given_shape or (self.event_shape, self.event_shape)
        if not is_pair(shapes):
            raise ValueError(f"the network of factors reads no mask, only one input of shape {tuple(shapes)}: {remedy}")
        read: Any = shapes[1]
        if is_pair(read):  # of the mask and of what is given
            shapes = (shapes[0], *read)
        if any(tuple(shape) != tuple(self.event_shape) for shape in shapes[:2]):
            raise ValueError(
                f"the network of factors reads x and a mask of shapes {tuple(shapes[0])} and {tuple(shapes[1])}, but "
                f"the event_shape of this {type(factors).__name__} is {tuple(self.event_shape)}: build both for the "
                "same shape"
            )
        factors.given_shape = shapes
        self.conditional = len(shapes) > 2
        self.given_shape = shapes[2] if self.conditional else None
        factors.of_feature(factors.initial().flatten(1)[:, 0], 0)  # raises where features depend on each other
        self.support: Any = factors.distribution(factors.initial()).support
        self.keys = Uniform(self.event_shape)
        # The network must read values of the support, even where the mask hides them.
        self.register_buffer("blank", inside(self.support, torch.zeros(self.event_shape)), persistent=False)

    def raw_parameters(self, x: Tensor, seen: Tensor, given: Any = None) -> Tensor:
        """The raw parameters of every p(x_i | x_S, given) in one pass, ``(*batch, *event_shape, P)``.

        Args:
            x: ``(*batch, *event_shape)``.
            seen: bool, True in S, of a shape that broadcasts with x.
            given: ``(*batch, *given_shape)``.
        """
        like = parameter_of(self)
        parts = torch.where(seen, x, self.blank.to(x.dtype)), seen.to(like.dtype)
        raw = self.factors.raw_parameters((*parts, given) if self.conditional else parts)
        return raw.movedim(-1 - len(self.event_shape), -1)

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        keys, place = self._noise(name)
        return pyro.sample(name, AnyOrderDistribution(self, keys, place, given), obs=value)

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        self._noise(name)

    def _noise(self, name: str) -> tuple[Tensor, Tensor]:
        return noising(f"{name}_order", self.keys()), noising(f"{name}_place", Even(self.keys.low))

    def latents(self, name: str) -> tuple[str, ...]:
        return f"{name}_order", f"{name}_place"

    def in_order(self, order: str | Sequence[int] = "natural") -> InOrder:
        """p(x | order) on the same parameters, which is exact.

        Args:
            order: "natural" (row by row), or the D flat indices of the features, first to last.

        Raises:
            ValueError, TypeError: the order is no permutation.
        """
        return InOrder(self, order)

    def unroll(self) -> UnrolledAnyOrder:
        return UnrolledAnyOrder(self)

    def placeholder(self) -> Tensor:
        return self.factors.placeholder()

    def completions(self, by: Any, x: Tensor, mask: Tensor, given: Any = None) -> tuple[Tensor, Tensor]:
        keys = torch.rand(by.num_samples, *x.shape, dtype=self.blank.dtype, device=x.device)
        drawn, log_p = AnyOrderDistribution(self, keys, None, given).completed(x, mask)
        # The missing features do not depend on the order of the observed ones: no draw weighs more than another.
        return drawn, log_mean_exp(log_p).expand(by.num_samples, -1)


@register
class UnrolledAnyOrder(Program):
    """The definition: the order ``x_order``, uniform, and p(x | order) of every feature given those before it.

    Args:
        program: the plated form, whose parameters it shares.
    """

    takes_missing = True

    def __init__(self, program: AnyOrder):
        super().__init__()
        self.program = program
        self.event_shape, self.levels = program.event_shape, program.levels
        self.conditional, self.given_shape = program.conditional, program.given_shape
        self.num_classes = program.num_classes

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        keys = pyro.sample(f"{name}_order", self.program.keys())
        return pyro.sample(name, AnyOrderDistribution(self.program, keys, None, given), obs=value)

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        pyro.sample(f"{name}_order", self.program.keys())

    def latents(self, name: str) -> tuple[str, ...]:
        return (f"{name}_order",)

    def placeholder(self) -> Tensor:
        return self.program.placeholder()

    def completions(self, by: Any, x: Tensor, mask: Tensor, given: Any = None) -> tuple[Tensor, Tensor]:
        return self.program.completions(by, x, mask, given)


@register
class InOrder(Conditional):
    """p(x | order): the chain rule in one order.

    Args:
        program: the program of any order, whose parameters it shares.
        order: "natural" (row by row), or the D flat indices of the features, first to last.

    Raises:
        ValueError, TypeError: the order is no permutation.
    """

    keys: Tensor

    def __init__(self, program: AnyOrder, order: str | Sequence[int] = "natural"):
        super().__init__()
        check_type(program, AnyOrder, "program", "a dgm.AnyOrder")
        self.program, self.order = program, check_order(order, program.event_shape.numel())
        self.event_shape, self.levels = program.event_shape, program.levels
        self.conditional, self.given_shape = program.conditional, program.given_shape
        self.num_classes = program.num_classes
        keys = torch.tensor(self.order).argsort().to(program.blank) / len(self.order)
        self.register_buffer("keys", keys.reshape(self.event_shape), persistent=False)

    def forward(self, given: Any = None) -> AnyOrderDistribution:
        """The distribution of x given ``given``."""
        return AnyOrderDistribution(self.program, self.keys, None, given)

    def placeholder(self) -> Tensor:
        return self.program.placeholder()

    def completions(self, by: Any, x: Tensor, mask: Tensor, given: Any = None) -> tuple[Tensor, Tensor]:
        return by.in_order(self, x, mask, given)


class AnyOrderDistribution(TorchDistribution):
    """The distribution by which `AnyOrder` states x.

    Args:
        program: the `AnyOrder` with the conditionals.
        keys: ``(*batch, *event_shape)``; features come in the order of their keys.
        place: in [0, 1), ``(*batch,)``: the place of the order, as a share of D, at which the log-probability is
            estimated; None to sum over all places.
        given: ``(*batch, *given_shape)``.
    """

    arg_constraints: ClassVar = {}
    has_rsample = False

    def __init__(
        self,
        program: AnyOrder,
        keys: Tensor,
        place: Tensor | None,
        given: Any = None,
        batch_shape: Sequence[int] | None = None,
    ):
        self.program, self.keys, self.place, self.given = program, keys, place, given
        if batch_shape is None:
            batch_shape = keys.shape[: keys.dim() - len(program.event_shape)]
            if program.conditional:
                batch_shape = torch.broadcast_shapes(
                    batch_shape, given.shape[: given.dim() - len(program.given_shape or ())]
                )
        super().__init__(torch.Size(batch_shape), program.event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return self.program.support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> AnyOrderDistribution:
        # Keys and given are left small: they broadcast.
        return AnyOrderDistribution(self.program, self.keys, self.place, self.given, batch_shape)

    def blank(self) -> Tensor:
        """A value of the support, drawn by no pass."""
        x = self.program.blank.expand(*self.batch_shape, *self.event_shape)
        return x if self.program.levels is None else x.long()

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x | order, given) in nats, or its estimate, ``(*batch,)``."""
        terms = self._sum_event_dims(self.terms(value))
        return terms.expand(torch.broadcast_shapes(terms.shape, self.batch_shape))

    def of_observed(self, mask: Tensor) -> _Features:
        """The distribution of single features, where only those with a True ``mask`` were observed."""
        return _Features(self, mask)

    def terms(self, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """The term of each feature in the log-probability of the observed ones, in nats, ``(*batch, *event_shape)``.

        Args:
            value: ``(*batch, *event_shape)``; a value of the support where it is missing.
            mask: True where observed, of the shape of ``value``; None for all. The terms of missing features are
                meaningless.
        """
        p = self.program
        observed = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
        rank, number = self._rank_in_order(observed), self._sum_event_dims(observed)
        if self.place is None:
            raw = p.raw_parameters(value, rank < 0, self.given)
            for i in range(1, self.event_shape.numel()):
                here = p.raw_parameters(value, observed & (rank < i), self.given)
                raw = torch.where((rank == i).unsqueeze(-1), here, raw)
            return p.factors.univariate(raw).log_prob(value)
        t = torch.minimum((self.place * number).long(), number - 1).clamp_min(0)
        after = rank >= self._append_event_dims(t)
        raw = p.raw_parameters(value, observed & ~after, self.given)
        weight = self._append_event_dims(number / (number - t).clamp_min(1)).to(raw.dtype)
        terms = weight * p.factors.univariate(raw).log_prob(value)
        return torch.where(observed & after, terms, torch.zeros_like(terms))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw the features one after the other, ``(*sample_shape, *batch_shape, *event_shape)``."""
        blank = self.program.blank.expand((*sample_shape, *self.batch_shape, *self.event_shape))
        return self.completed(blank, torch.zeros_like(blank, dtype=torch.bool))[0]

    @torch.no_grad()
    def completed(self, x: Tensor, mask: Tensor, observed_first: bool = True) -> tuple[Tensor, Tensor]:
        """x with its missing features drawn in the order, each given those before it.

        Args:
            x: ``(B, *event_shape)``; a value of the support where it is missing.
            mask: True where observed, of the shape of x.
            observed_first: whether the observed features come before the missing ones, else at their own places.

        Returns:
            x, ``(*batch, *event_shape)``, and the log-probability of its observed features given those before them,
            ``(*batch,)``.
        """
        p, x, log_p = self.program, x.to(self.keys.dtype), torch.zeros_like(self._sum_event_dims(self.keys))
        rank = self._rank_in_order(mask if observed_first else torch.ones_like(mask))
        for i in range(self.event_shape.numel()):
            here, features = rank == i, p.factors.univariate(p.raw_parameters(x, rank < i, self.given))
            log_p = log_p + self._sum_event_dims(torch.where(here & mask, features.log_prob(x), 0.0))
            x = torch.where(here & ~mask, features.sample().to(x.dtype), x)
        return x if p.levels is None else x.long(), log_p

    def _rank_in_order(self, observed: Tensor) -> Tensor:
        """The place of each feature in the order, 0 .. D - 1, the observed ones first; ``(*batch, *event_shape)``."""
        keys = torch.where(observed, self.keys, self.keys + 1).flatten(-len(self.event_shape))
        return keys.argsort(-1).argsort(-1).unflatten(-1, self.event_shape)

    def _sum_event_dims(self, terms: Tensor) -> Tensor:
        return sum_rightmost(terms, len(self.event_shape))

    def _append_event_dims(self, value: Tensor) -> Tensor:
        return value.reshape(*value.shape, *(1,) * len(self.event_shape))


class _Features(TorchDistribution):
    """The features of an `AnyOrderDistribution`, each given the observed ones before it.

    Args:
        joint: the distribution of all.
        seen: True where observed, ``(B, *event_shape)``.
    """

    arg_constraints: ClassVar = {}
    has_rsample = False

    def __init__(self, joint: AnyOrderDistribution, seen: Tensor):
        self.joint, self.seen = joint, seen
        super().__init__(torch.Size((*joint.batch_shape, *joint.event_shape)), validate_args=False)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return unwrapped(self.joint.support)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _Features:
        return _Features(self.joint.expand(batch_shape[: len(batch_shape) - len(self.joint.event_shape)]), self.seen)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.joint.terms(value, self.seen)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.joint.sample(sample_shape)
