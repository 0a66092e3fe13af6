"""Pyro distributions that the field needs and Pyro does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, constraints
from torch.distributions.utils import broadcast_all

__all__ = ["Bernoulli", "Beta", "DiscretizedLogistic", "Mixture"]


def features_of(distribution: Any, mask: Tensor | None = None) -> Any:
    """The distribution of single features, batched over them, where features are independent.

    Args:
        mask: True where a feature was observed, for a distribution that can state each feature given the observed ones.

    Raises:
        ValueError: the features are not independent, as far as the distribution says.
    """
    base, dims = distribution, distribution.event_dim
    while dims > 0 and isinstance(base, Independent):
        base, dims = base.base_dist, dims - base.reinterpreted_batch_ndims
    transforms = getattr(base, "transforms", [])
    if transforms and all(hasattr(transform, "of_features") for transform in transforms):
        parts = [transform.of_features() for transform in transforms]
        return dist.TransformedDistribution(features_of(base.base_dist, mask), parts)
    if mask is not None and hasattr(base, "of_observed"):
        return base.of_observed(mask)
    if dims > 0:
        raise ValueError(f"the features of x are not independent under {type(base).__name__}")
    return base


def finite_mean(distribution: Any) -> Tensor | None:
    """The mean where it has a closed form and is finite, else None."""
    try:
        mean: Tensor = distribution.mean
    except (NotImplementedError, AttributeError):
        return None
    return mean if bool(torch.isfinite(mean).all()) else None


def mean_of(distribution: Any, levels: int | None, device: torch.device) -> Tensor:
    """E[x] in the units of x; for integers, the sum over their values.

    Args:
        levels: x takes the integers 0 .. levels - 1; None where it takes reals.

    Raises:
        ValueError: the features of x are integers that depend on one another.
        NotImplementedError: the mean has no closed form.
    """
    if levels is None:
        mean: Tensor = distribution.mean
        return mean
    feature = features_of(distribution)
    return sum(
        (v * feature.log_prob(torch.full(feature.batch_shape, v, device=device)).exp() for v in range(1, levels)),
        torch.zeros(()),
    )


class Bernoulli(dist.Bernoulli):
    """Pyro's Bernoulli, extended to score integers; Pyro's own takes bits as floats only."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value.to(self.logits.dtype))


class Beta(dist.Beta):
    """Pyro's Beta on the open interval: no draw is 0 or 1, where the density is zero or infinite.

    All draws nearer to 0 or 1 than the least number of the interval are that number. Its density is the mean over these
    draws, so a bound with a Beta as q does not gain from draws that are one number.
    """

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        info = torch.finfo(self.concentration1.dtype)
        return constraints.interval(info.tiny, 1 - info.eps / 2)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """x = g / (g + h) of Gamma variables g and h, computed from their logarithms because small ones round to 0."""
        shape = self._extended_shape(torch.Size(sample_shape))
        g, h = (_log_gamma(a.expand(shape)) for a in (self.concentration1, self.concentration0))
        return (g - h).sigmoid().clamp(self.support.lower_bound, self.support.upper_bound)

    def log_prob(self, value: Tensor) -> Tensor:
        log_density = super().log_prob(value)
        # The integral of x^(a - 1) from 0 to w is w w^(a - 1) / a.
        log_density = torch.where(
            value <= self.support.lower_bound, log_density - self.concentration1.log(), log_density
        )
        return torch.where(value >= self.support.upper_bound, log_density - self.concentration0.log(), log_density)


def _log_gamma(a: Tensor) -> Tensor:
    """Logarithms of Gamma(a) variables: Gamma(a + 1) times U ** (1 / a), U uniform (Marsaglia and Tsang 2000)."""
    uniform = torch.rand_like(a).clamp_min(torch.finfo(a.dtype).tiny)
    log_gamma: Tensor = torch._standard_gamma(a + 1).log() + uniform.log() / a
    return log_gamma


class Mixture(dist.MixtureSameFamily):
    """Pyro's mixture with the components' support, which Pyro wraps in a constraint that autoguides and NUTS refuse."""

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return self.component_distribution.support


class DiscretizedLogistic(TorchDistribution):
    r"""A logistic density integrated over the bins of the integers 0 .. levels - 1 (Salimans et al. 2017, eq. 2).

    Level v is at :math:`2v / (levels - 1) - 1` in [-1, 1]. Its bin reaches half way to its neighbors, and the two edge
    bins reach to infinity, so the masses sum to one exactly.

    Args:
        loc: location, on the scale where the levels span [-1, 1].
        scale: positive scale, on the same scale.
        levels: number of integers.
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}
    has_rsample = False

    def __init__(self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None):
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: Sequence[int], _instance: DiscretizedLogistic | None = None) -> DiscretizedLogistic:
        new = self._get_checked_instance(DiscretizedLogistic, _instance)
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        new.levels = self.levels
        super(DiscretizedLogistic, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass in nats, of the shape that ``value`` and the batch broadcast to."""
        if self._validate_args:
            self._validate_sample(value)
        half = 1.0 / (self.levels - 1)
        # Neighbors compute their common edge in the same way: rounding moves mass between them and loses none.
        value = value.to(self.loc.dtype)
        upper = ((2 * value + 1) * half - 1 - self.loc) / self.scale
        lower = ((2 * value - 1) * half - 1 - self.loc) / self.scale
        # sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - exp(b - a)): exact where the difference itself would cancel.
        first, last = value == 0, value == self.levels - 1
        zero = torch.zeros_like(upper)
        width = torch.where(first | last, zero, torch.log(-torch.expm1(-2 * half / self.scale)))
        below = torch.where(last, zero, F.logsigmoid(upper))
        above = torch.where(first, zero, F.logsigmoid(-lower))
        return below + above + width

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Integers of dtype int64, ``sample_shape + batch_shape``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        tiny = torch.finfo(self.loc.dtype).tiny
        uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device).clamp(min=tiny)
        logistic = self.loc + self.scale * (uniform.log() - torch.log1p(-uniform))
        return ((logistic + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1).long()
