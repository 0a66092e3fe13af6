r"""Caches: the values that a masked network keeps while x is filled feature by feature, to compute nothing twice.

The parameters of :math:`p(x_i \mid x_{<i})` depend on features before i only, and most of their computation was already
possible at the feature before. A network that can reuse it has one more method,

    network.cache(batch_size, given=None)     # a `Cache` of that many rows, at the first place of ``network.order``

and sampling then costs one pass of the network in total, instead of one pass per feature. A network without this method
is called with the whole x each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["Cache", "Growing", "cache_maker"]


class Cache(Protocol):
    """State of N partly sampled chains."""

    def step(self, value: Tensor | None) -> Tensor:
        """Move to the next place of the order.

        Args:
            value: the feature at the last place, in the form of the network's input, ``(N,)``; None at the first place.

        Returns:
            The raw parameters of the feature at the new place, ``(N, P)``.
        """

    def take(self, rows: Tensor) -> None:
        """Replace the chains by those at ``rows``, indices ``(M,)``; some may be dropped, some repeated."""


def cache_maker(network: nn.Module | None) -> Callable[..., Cache | None] | None:
    """``network.cache``, if there is one and its results equal those of a pass of the network.

    It may return None: a network around another one has a cache if that one has.

    They may differ with dropout in training mode, which draws again in each pass, and with forward hooks.
    """
    make = getattr(network, "cache", None)
    if network is None or make is None:
        return None
    for module in network.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            return None
    return make


class Growing:
    """A tensor that grows along one dimension.

    With gradients, each append concatenates, because tensors in autograd's graph must not change. Otherwise it writes
    into memory that was allocated once.

    Args:
        value: initial value, of length 0 along ``dim``.
        capacity: final length.
        dim: the dimension that grows.
    """

    def __init__(self, value: Tensor, capacity: int, dim: int = 1):
        self.value, self.capacity, self.dim = value, capacity, dim
        self.memory: Tensor | None = None

    def append(self, piece: Tensor) -> Tensor:
        """Append ``piece``, and return the whole tensor."""
        if torch.is_grad_enabled():
            self.memory, self.value = None, torch.cat((self.value, piece), self.dim)
            return self.value
        start, size = self.value.shape[self.dim], piece.shape[self.dim]
        if self.memory is None:
            shape = list(self.value.shape)
            shape[self.dim] = self.capacity
            self.memory = piece.new_empty(shape)
            self.memory.narrow(self.dim, 0, start).copy_(self.value)
        self.memory.narrow(self.dim, start, size).copy_(piece)
        self.value = self.memory.narrow(self.dim, 0, start + size)
        return self.value

    def take(self, rows: Tensor) -> None:
        self.memory, self.value = None, self.value.index_select(0, rows)
