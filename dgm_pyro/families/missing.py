r"""Missing features: programs of the observed part of each datum.

Where the features are independent given the latents, missing features integrate to one and can be left out,

.. math::
    p(x_{obs}) = \int p(z) \prod_{i \in obs} p(x_i \mid z)\, dz,

which is exact for a program without latents. If the guide reads a fixed value for each missing feature, every bound on
log p(x) becomes a bound on log p(x_obs). The importance-weighted one is the MIWAE bound, which converges to
log p(x_obs) as the number of particles grows. All of this assumes that features are missing at random: whether a
feature is missing does not depend on its value.

If features depend on each other, missing ones can be left out where each feature can be conditioned on the observed
ones alone, as in `families.anyorder`.

Source: Mattei and Frellsen 2019 (MIWAE, arXiv 1812.02633); Nazabal et al. 2020 (HI-VAE, arXiv 1807.03653).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from dgm_pyro.data import Data
from dgm_pyro.families.distributions import features_of
from dgm_pyro.program import Program

__all__ = ["Observed", "ObservedDistribution", "observed_part"]


def observed_part(program: Program, data: Data) -> Program:
    """The program that scores ``data``: p(x_obs) where features are missing, else ``program`` itself.

    Raises:
        ValueError: missing features cannot be left out of this program.
    """
    if not data.misses:
        return program
    if not program.takes_missing:
        raise ValueError(
            f"{data.name} misses features, but this {type(program).__name__} cannot leave the missing ones out, "
            "because its features depend on one another: use a VAE with independent features (dgm train vae) or a "
            "chain in any order (dgm train any-order); or first fill them in with one of these, by dgm.infer.impute; "
            "or keep the complete rows alone, data[data.mask.flatten(1).all(1)]"
        )
    return Observed(program)


class Observed(Program):
    """p(x_obs): a program of x in which NaN marks missing features. It shares the parameters of p(x).

    Args:
        program: p(x).
    """

    blank: Tensor

    def __init__(self, program: Program):
        super().__init__()
        self.program = program
        self.event_shape, self.variable, self.tractable = program.event_shape, program.variable, program.tractable
        self.conditional, self.given_shape = program.conditional, program.given_shape
        self.num_classes, self.any_precision = program.num_classes, True
        self.register_buffer("blank", program.placeholder().detach(), persistent=False)

    def arguments(self, data: Data) -> tuple[Tensor, Any, dict[str, Tensor]]:
        x, given, observed = self.program.arguments(data)
        missing = torch.zeros_like(x, dtype=torch.bool) if data.mask is None else ~data.mask
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        return x.masked_fill(missing, torch.nan), given, observed

    def whole(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x with each NaN replaced by a value that p(x) takes, and a mask that is True where x was observed."""
        mask = ~x.isnan()
        known = torch.where(mask, x, self.blank.to(x.dtype))
        return known if self.program.levels is None else known.long(), mask

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        if value is None:
            return self.program.joint(name, None, given)
        x, mask = self.whole(value)
        with _Masked(name, mask):
            self.program.joint(name, x, given)
        return value

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        self.program.posterior(name, self.whole(value)[0], given)

    def latents(self, name: str) -> tuple[str, ...] | None:
        return self.program.latents(name)

    def unroll(self) -> Program:
        return self.replaced(program=self.program.unroll())

    def unroll_latents(self) -> Program:
        return self.replaced(program=self.program.unroll_latents())

    def support_given(self, given: Any = None, batch_size: int = 1) -> constraints.Constraint | None:
        return self.program.support_given(given, batch_size)

    def check(self, x: Any, given: Any = None, *, values: bool = True, support: bool | None = None) -> None:
        self.program.check(self.whole(x)[0], given, values=values, support=support)


class _Masked(Messenger):
    """Scores only the observed features of a site."""

    def __init__(self, name: str, mask: Tensor):
        super().__init__()
        self.name, self.mask = name, mask

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            msg["fn"] = ObservedDistribution(features_of(msg["fn"], self.mask), self.mask, len(msg["fn"].event_shape))


class ObservedDistribution(TorchDistribution):
    """The distribution of features of which only those with a True ``mask`` are scored.

    Args:
        distribution: the distribution of single features, of batch shape ``(*batch, *event_shape)``.
        mask: ``(B, *event_shape)``.
        dims: number of dimensions of an event.
    """

    arg_constraints: ClassVar = {}

    def __init__(self, distribution: Any, mask: Tensor, dims: int):
        self.distribution, self.seen, self.dims = distribution, mask, dims
        self.has_rsample = distribution.has_rsample
        shape = distribution.batch_shape
        cut = len(shape) - dims
        super().__init__(torch.Size(shape[:cut]), torch.Size(shape[cut:]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        line: constraints.Constraint = constraints.independent(self.distribution.support, self.dims)
        return line

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ObservedDistribution:
        expanded = self.distribution.expand(torch.Size((*batch_shape, *self.event_shape)))
        return ObservedDistribution(expanded, self.seen, self.dims)

    def log_prob(self, value: Tensor) -> Tensor:
        terms: Tensor = self.distribution.log_prob(value)
        terms = torch.where(self.seen, terms, torch.zeros_like(terms))
        return terms.flatten(-self.dims).sum(-1) if self.dims else terms

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        drawn: Tensor = self.distribution.sample(torch.Size(sample_shape))
        return drawn
