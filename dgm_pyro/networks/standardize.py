"""Standardization, (x - shift) / scale: a layer before a network, and both directions for programs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dgm_pyro.checks import as_reals, check_type
from dgm_pyro.registry import register

__all__ = ["Standardize"]


@register
class Standardize(nn.Module):
    """A network of (x - shift) / scale; without a network, this value itself.

    The difference is computed in the precision of x or of ``shift``, whichever is higher; the result has the precision
    of the network. So float64 data far from zero lose nothing, although the network computes in float32.

    Args:
        shift, scale: tensors, numbers or sequences that broadcast with one x; the scale is positive.
        network: ``network(x, *given)``.

    Raises:
        ValueError, TypeError: shift or scale are not finite numbers, or a scale is not positive.

    >>> x = torch.tensor([[1e6 + 0.2]], dtype=torch.float64)
    >>> Standardize(torch.tensor([1e6], dtype=torch.float64), 0.1)(x).round(decimals=4)
    tensor([[2.]])
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        shift: Tensor | float | Sequence[float],
        scale: Tensor | float | Sequence[float],
        network: nn.Module | None = None,
    ):
        super().__init__()
        check_type(network, nn.Module | None, "network", "a torch.nn.Module or None")
        self.network = network
        for name in ("in_shape", "given_shape", "num_classes"):  # what conditionals ask a network for
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))
        self.register_buffer("shift", as_reals(shift, "shift").detach().clone())
        self.register_buffer("scale", as_reals(scale, "scale", positive=True).detach().to(torch.get_default_dtype()))

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        u = standard(x, self.shift, self.scale)
        return u if self.network is None else self.network(u, *given)


def standard(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(x - shift) / scale, in the precision of ``scale``."""
    return ((x - shift) / scale).to(scale.dtype)


def in_units(u: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """shift + scale * u, in the precision of ``shift``: the inverse of `standard`."""
    return shift + scale * u
