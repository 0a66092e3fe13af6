r"""A guide that follows the plates of a model: local latents given global ones.

Latents :math:`z_{ij}` in a plate are independent of each other given what is outside of it. So is the posterior, where
the data are in the plate too, and q has the same form:

.. math::
    q(u) = q(u_\text{global}) \prod_i q(u_i \mid u_\text{global}, x_i) \prod_{ij} q(u_{ij} \mid u_i, u_\text{global},
    x_{ij})

A local q is a Normal whose location and scale come from one network for all elements of a plate. The network reads the
latents above the element and its covariates :math:`x_i`: data of the element, so that q is amortized, or else numbers
that are learned for it. The number of dependencies grows with the plate, not with its square.

Source: Agrawal and Domke 2021 (Amortized variational inference for simple hierarchical models, arXiv 2111.03144).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from dgm_pyro.checks import check_finite
from dgm_pyro.families.conditionals import inverse_softplus, positive
from dgm_pyro.program import Conditional

__all__ = ["Group", "Hierarchical", "HierarchicalDistribution", "LocalNormal", "groups_of"]

HIDDEN = 32
LEARNED = 4
"""Number of covariates that are learned for an element without any."""


@dataclass(frozen=True)
class Group:
    """The latents that are in the same plates.

    Attributes:
        plates: names of the plates, from the left; empty for global latents.
        sizes: sizes of these plates.
        places: indices in u of the latents of each element, ``(J, D)``, J the product of the sizes.
    """

    plates: tuple[str, ...]
    sizes: tuple[int, ...]
    places: Tensor

    def elements_of(self, other: Group) -> Tensor:
        """For each element, the index of the element of ``other`` that contains it, ``(J,)``."""
        index = torch.arange(len(other.places)).reshape(other.sizes)
        shape = [size if name in other.plates else 1 for name, size in zip(self.plates, self.sizes, strict=True)]
        return index.reshape(shape).expand(self.sizes).flatten()


def groups_of(nodes: Any, reals: Mapping[str, torch.Size]) -> list[Group]:
    """The latents of a trace by their plates, the outer ones first.

    Args:
        nodes: nodes of the trace.
        reals: the shapes of the latents as reals, in the order of u.
    """
    found, start = dict[tuple[str, ...], tuple[tuple[int, ...], list[Tensor]]](), 0
    for name, shape in reals.items():
        frames = sorted((f for f in nodes[name]["cond_indep_stack"] if f.vectorized), key=lambda frame: frame.dim)
        batch = len(nodes[name]["fn"].batch_shape)
        places = torch.arange(start, start + shape.numel()).reshape(shape)
        places = places.movedim([batch + frame.dim for frame in frames], [*range(len(frames))])
        sizes = tuple(places.shape[: len(frames)])
        plates = tuple(frame.name for frame in frames)
        found.setdefault(plates, (sizes, []))[1].append(places.reshape(math.prod(sizes), -1))
        start += shape.numel()
    groups = [Group(plates, sizes, torch.cat(parts, -1)) for plates, (sizes, parts) in found.items()]
    return sorted(groups, key=lambda group: len(group.plates))


class LocalNormal(nn.Module):
    """q of the elements of a plate: a Normal with covariances within an element, given what is above.

    Args:
        num_features: number of latents of an element.
        above: number of latents above that an element is given.
        covariates: covariates of the elements, ``(J, F)``; or J, to learn the covariates and a term per element that
            is added to the network's output.
    """

    def __init__(self, num_features: int, above: int, covariates: Tensor | int):
        super().__init__()
        self.num_features = num_features
        if isinstance(covariates, Tensor):
            spread = covariates.std(0) if len(covariates) > 1 else torch.ones_like(covariates[0])
            center = covariates.mean(0)
            self.register_buffer("covariates", (covariates - center) / torch.where(spread > 0, spread, 1.0))
        else:
            self.covariates = nn.Parameter(torch.randn(covariates, LEARNED))
            self.own = nn.Parameter(torch.zeros(covariates, num_features * (1 + num_features)))
        reads = above + self.covariates.shape[-1]
        self.network = nn.Sequential(nn.Linear(reads, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU())
        self.out = nn.Linear(reads + HIDDEN, num_features * (1 + num_features))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, above: Tensor) -> TorchDistribution:
        """q of all elements given the latents above each, ``(*batch, J, above)``."""
        covariates = self.covariates.expand(*above.shape[:-1], self.covariates.shape[-1])
        given = torch.cat([above, covariates], -1)
        raw = self.out(torch.cat([given, self.network(given)], -1)) + getattr(self, "own", 0.0)
        loc, rows = (
            raw[..., : self.num_features],
            raw[..., self.num_features :].unflatten(-1, (self.num_features, self.num_features)),
        )
        diagonal = positive(rows.diagonal(dim1=-2, dim2=-1) + inverse_softplus(1.0))
        return dist.MultivariateNormal(loc, scale_tril=rows.tril(-1) + torch.diag_embed(diagonal), validate_args=False)


class Hierarchical(Conditional):
    """q over all latents of a model with plates; `dgm.guides.auto(model, q, structure="plates")` makes it.

    Args:
        groups: the latents by their plates.
        make: a function from the number of global latents to their q.
        covariates: data of the elements of each plate, by the plate's name, ``(J, F)``.

    Raises:
        ValueError: no latents are in a plate of that name, or the plate has another size.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        make: Callable[[int], Conditional],
        covariates: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        self.groups = list(groups)
        covariates = {name: _as_columns(value, name) for name, value in (covariates or {}).items()}
        sizes = dict(itertools.chain(*(zip(group.plates, group.sizes, strict=True) for group in groups)))
        for name, value in covariates.items():
            if sizes.get(name) != len(value):
                have = ", ".join(f"{plate} of {size}" for plate, size in sizes.items()) or "no plates"
                raise ValueError(f"covariates[{name!r}] has {len(value)} rows, but the latents are in {have}")
        self.event_shape = torch.Size([sum(group.places.numel() for group in groups)])
        everywhere = not groups[0].plates
        self.top = make(groups[0].places.numel()) if everywhere else None
        self.local = nn.ModuleList()
        for i, group in enumerate(groups):
            if not group.plates:
                continue
            above = sum(groups[j].places.shape[1] for j in self.above(i))
            read = [covariates[name][group.elements_of(_plate_group(name, sizes[name]))]
                    for name in group.plates if name in covariates]  # fmt: skip
            self.local.append(
                LocalNormal(group.places.shape[1], above, torch.cat(read, -1) if read else len(group.places))
            )
        self.register_buffer("order", torch.cat([group.places.flatten() for group in groups]).argsort())

    def above(self, i: int) -> list[int]:
        """The groups that group i is given: those whose plates are a subset of its own."""
        return [j for j, other in enumerate(self.groups) if set(other.plates) < set(self.groups[i].plates)]

    def forward(self, given: Any = None) -> TorchDistribution:
        return HierarchicalDistribution(self)


def _plate_group(name: str, size: int) -> Group:
    """A plate alone."""
    return Group((name,), (size,), torch.arange(size).unsqueeze(-1))


def _as_columns(value: Any, name: str) -> Tensor:
    check_finite(value, f"covariates[{name!r}]")
    return value.reshape(len(value), -1).to(torch.get_default_dtype())


class HierarchicalDistribution(TorchDistribution):
    """The distribution of u that a `Hierarchical` states, event shape ``(D,)``."""

    arg_constraints: ClassVar = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, program: Hierarchical, batch_shape: Any = ()):
        self.program = program
        super().__init__(torch.Size(batch_shape), program.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TorchDistribution:
        return HierarchicalDistribution(self.program, batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        # A local q has the batch shape of the latents that it is given.
        parts = self._visit_groups(lambda i, q: q.rsample(() if q.batch_shape else shape), shape)
        return torch.cat([part.flatten(-2) for part in parts], -1)[..., self.program.order]  # type: ignore[index]

    def log_prob(self, value: Tensor) -> Tensor:
        total = value.new_zeros(value.shape[:-1])

        def score(i: int, q: Any) -> Tensor:
            nonlocal total
            part = value[..., self.program.groups[i].places.to(value.device)]
            single = i == 0 and self.program.top is not None
            total = total + (q.log_prob(part.squeeze(-2)) if single else q.log_prob(part).sum(-1))
            return part.squeeze(-2) if single else part

        self._visit_groups(score, value.shape[:-1])
        return total

    def _visit_groups(self, visit: Callable[[int, Any], Tensor], batch: torch.Size) -> list[Tensor]:
        """The values of the groups, ``(*batch, J, D)``, each from ``visit``, called with its number and its q."""
        program, values, local = self.program, list[Tensor](), iter(self.program.local)
        for i, group in enumerate(program.groups):
            if not group.plates:
                assert program.top is not None
                values.append(visit(i, program.top()).unsqueeze(-2))
                continue
            above = [values[j][..., group.elements_of(program.groups[j]), :] for j in program.above(i)]
            nothing = torch.zeros(*batch, len(group.places), 0, device=program.order.device)  # type: ignore[arg-type]
            values.append(visit(i, next(local)(torch.cat(above, -1) if above else nothing)))
        return values
