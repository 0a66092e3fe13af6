"""The parts of a `Flow` as transforms of torch: bijections at one ``given``, and transforms of Pyro.

A transform caches its last pair of z and x, so a density after a sample needs no inverse.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions.transforms import ComposeTransform, Transform, _InverseTransform

from dgm_pyro.networks.bijections import (
    Bijection,
)


class Given(NamedTuple):
    value: Tensor  # (*batch, *shape)
    batch: torch.Size
    shape: torch.Size


class CachedTransform(Transform):
    """A transform that caches its last pair of z and x, with the log-determinant between them.

    Subclasses give `forward`, z to x and log|det dx/dz|, and `inverse`, x to z and log|det dz/dx|.
    """

    bijective = True

    def __init__(self, domain: constraints.Constraint, codomain: constraints.Constraint):
        super().__init__(cache_size=1)
        self.domain, self.codomain = domain, codomain

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    @property
    def inv(self) -> Transform:
        # torch keeps the inverse, which keeps this: a cycle that would hold the graph of every step until collected.
        return _InverseTransform(self)

    def with_cache(self, cache_size: int = 1) -> Transform:
        return self

    def __call__(self, z: Tensor) -> Tensor:
        known, x = self._cached_x_y
        if known is not z or not self._may_reuse_pair():
            x, self._log_det = self.forward(z)
            self._remember_pair(z, x)
        return x

    def _inv_call(self, x: Tensor) -> Tensor:
        z, known = self._cached_x_y
        if known is not x or not self._may_reuse_pair():
            z, log_det = self.inverse(x)
            self._log_det = -log_det
            self._remember_pair(z, x)
        return z

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        # In torch's names x goes to y; they are z and x here.
        known_z, known_x = self._cached_x_y
        if known_z is not x or known_x is not y or not self._may_reuse_pair():
            return self.forward(x)[1]
        return self._log_det

    def _remember_pair(self, z: Tensor, x: Tensor) -> None:
        self._cached_x_y = z, x  # type: ignore[assignment]  # torch says (None, None)
        self._with_gradient = torch.is_grad_enabled()

    def _may_reuse_pair(self) -> bool:
        # A pair cached by `sample` carries no gradient: a score-function estimator that reused it would be zero.
        return self._with_gradient or not torch.is_grad_enabled()


class BijectionTransform(CachedTransform):
    """A bijection of vectors at one ``given``, as a transform of tensors with any batch."""

    def __init__(
        self,
        bijection: Bijection,
        given: Given | None,
        shape: torch.Size,
        line_in: constraints.Constraint,
        line_out: constraints.Constraint,
    ):
        super().__init__(*(constraints.independent(line, len(shape)) for line in (line_in, line_out)))
        self.bijection, self.given, self.shape = bijection, given, shape

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._on_vectors(self.bijection, z)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._on_vectors(self.bijection.inverse, x)

    def _on_vectors(self, map: Callable[..., tuple[Tensor, Tensor]], value: Tensor) -> tuple[Tensor, Tensor]:
        full = self.forward_shape(value.shape)
        batch = full[: len(full) - len(self.shape)]
        given = None
        if self.given is not None:
            given = self.given.value.expand(*batch, *self.given.shape).reshape(-1, *self.given.shape)
        out, log_det = map(value.expand(full).reshape(-1, self.shape.numel()), given)
        return out.reshape(full), log_det.reshape(batch)

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        if self.given is None:
            return torch.Size(shape)
        batch = torch.broadcast_shapes(shape[: len(shape) - len(self.shape)], self.given.batch)
        return torch.Size((*batch, *self.shape))

    inverse_shape = forward_shape


class PyroTransform(CachedTransform):
    """One of Pyro's transforms, without its own cache: each call uses a fresh copy.

    Args:
        transform: the transform.
        batch: batch shape of the ``given`` that it was conditioned on; some of Pyro's transforms do not broadcast.
    """

    def __init__(self, transform: Transform, batch: Sequence[int] = ()):
        super().__init__(transform.domain, transform.codomain)
        self.transform, self.batch = transform, batch

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        twin, z = fresh_twin(self.transform), z.expand(self._broadcast(z.shape, self.domain.event_dim))
        x = twin(z)
        return x, twin.log_abs_det_jacobian(z, x)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        twin, x = fresh_twin(self.transform), x.expand(self._broadcast(x.shape, self.codomain.event_dim))
        z = twin.inv(x)
        return z, -twin.log_abs_det_jacobian(z, x)

    def _broadcast(self, shape: Sequence[int], event_dim: int) -> torch.Size:
        if not self.batch:
            return torch.Size(shape)
        cut = len(shape) - max(event_dim, 1)  # an elementwise one still has its parameters along the last dimension
        return torch.Size((*torch.broadcast_shapes(shape[:cut], self.batch), *shape[cut:]))

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return self.transform.forward_shape(self._broadcast(shape, self.domain.event_dim))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        return self.transform.inverse_shape(self._broadcast(shape, self.codomain.event_dim))


LINES = {"real": constraints.real, "unit": constraints.unit_interval}


MEANINGS = {"real": "the real line", "unit": "the unit interval"}


REMEDIES = {
    "real": "put it before the Sigmoid, or Inverse(Sigmoid()) before it",
    "unit": "use base=dgm.Uniform(event_shape), or put Sigmoid() before it",
}


def line_of(constraint: constraints.Constraint) -> str | None:
    """ "real" or "unit", or None for anything else."""
    if type(constraint) is type(constraints.real):  # which a copied flow has copies of
        return "real"
    bounds = getattr(constraint, "lower_bound", None), getattr(constraint, "upper_bound", None)
    return "unit" if all(isinstance(b, int | float) for b in bounds) and bounds == (0, 1) else None


def modules_of(part: Any) -> Iterator[nn.Module]:
    """The modules of a transform, including those within torch's inverse and composition, to be registered."""
    if isinstance(part, nn.Module):
        yield part
    elif isinstance(part, _InverseTransform):
        yield from modules_of(part.inv)
    elif isinstance(part, ComposeTransform):
        for inner in part.parts:
            yield from modules_of(inner)


def loose_tensors(part: Any) -> Iterator[tuple[Any, str]]:
    """The tensor attributes, with their owners, of a transform that is no module and of transforms within it."""
    if isinstance(part, nn.Module):
        return
    if isinstance(part, _InverseTransform):
        yield from loose_tensors(part.inv)
        return
    for name, value in vars(part).items():
        if isinstance(value, Tensor):
            yield part, name
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Transform) and name != "_inv":  # which leads back
                yield from loose_tensors(inner)


def tensors_of(part: Any) -> Iterator[Tensor]:
    for module in modules_of(part):
        yield from module.parameters()
    for owner, name in loose_tensors(part):
        yield vars(owner)[name]


def fresh_twin(transform: Any) -> Any:
    """A copy of one of Pyro's transforms on the same parameters, with empty caches."""
    if isinstance(transform, list):
        return [fresh_twin(part) for part in transform]
    if isinstance(transform, dict):
        return {name: fresh_twin(part) for name, part in transform.items()}
    if isinstance(transform, _InverseTransform):
        return fresh_twin(transform.inv).inv
    if not isinstance(transform, Transform):
        return transform
    twin = object.__new__(type(transform))
    for name, value in transform.__dict__.items():
        if name == "_inv" or name.startswith("_cached"):
            value = (None, None) if name == "_cached_x_y" else None
        elif isinstance(value, Transform) or name in ("parts", "transforms", "_modules"):
            value = fresh_twin(value)
        twin.__dict__[name] = value
    return twin


def require_invertible(part: Transform | dist.ConditionalTransform, shape: torch.Size, owner: str) -> None:
    message = (
        f"{owner} has no inverse, so the flow could not score data: use networks.Coupling or "
        "networks.MaskedAutoregressive with networks.Affine or networks.RationalQuadraticSpline, or Pyro's "
        "AffineCoupling, AffineAutoregressive, SplineCoupling or Spline"
    )
    if isinstance(part, dist.ConditionalTransform):
        if isinstance(part, ONE_WAY):
            raise ValueError(message)
        parts = () if isinstance(part, nn.Module) else vars(part).values()
        if any(isinstance(value, nn.Module) or getattr(value, "requires_grad", False) for value in parts):
            raise ValueError(_untrained_message(owner))
        return
    if not part.bijective:
        raise ValueError(message)
    z = torch.linspace(0.1, 0.9, 2 * shape.numel()).reshape(2, *shape)
    for like in tensors_of(part):
        z = z.to(like if like.is_floating_point() else like.device)
    copied: dict[int, Any] = {}
    try:
        twin = copy.deepcopy(fresh_twin(part), copied)
    except RuntimeError as error:  # of a tensor that was computed from parameters, which torch does not copy
        raise ValueError(_untrained_message(owner)) from error
    try:
        with torch.enable_grad():
            x = twin(z)
        # Some of Pyro's transforms claim an inverse that only finds what they have mapped just before; hence the clone.
        with torch.no_grad():
            twin.inv(x.detach().clone())
    except (KeyError, NotImplementedError) as error:
        raise ValueError(message) from error
    held = {id(copied.get(id(p))) for module in modules_of(part) for p in module.parameters()}
    if any(id(leaf) not in held for leaf in _leaf_tensors(x)):
        raise ValueError(_untrained_message(owner))


def _untrained_message(owner: str) -> str:
    return (
        f"{owner} has parameters that no module of the flow holds, so they would not be trained: make it a "
        "TransformModule that holds them, as docs/flows.md shows for the transforms of zuko"
    )


def _leaf_tensors(x: Tensor) -> Iterator[Tensor]:
    """The tensors with a gradient of their own that ``x`` was computed from."""
    seen, waiting = set(), [x.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [below for below, _ in node.next_functions]


ONE_WAY = (
    dist.transforms.ConditionalPlanar,
    dist.transforms.ConditionalRadial,
    dist.transforms.ConditionalNeuralAutoregressive,
)
