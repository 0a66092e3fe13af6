"""Networks of the observed features of x, and of the mask that marks them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dgm_pyro.checks import as_shape, check_network_options, check_sizes, check_type
from dgm_pyro.networks.columns import ColumnReader
from dgm_pyro.networks.mlp import to_unit
from dgm_pyro.registry import register

__all__ = ["ObservedInput"]


@register
class ObservedInput(nn.Module):
    """A network of the observed features of x and of the mask: ``network(inputs, *given)`` of both, concatenated.

    A feature that is not observed enters as 0, whatever its value.

    Args:
        in_shape: shape of one x; an int D for vectors.
        network: a network of ``(B, 2 * D)`` inputs; with a reader, of ``(B, reader.out_features + D)``.
        levels: x takes the integers 0 .. levels - 1, and is scaled to [-1, 1].
        reader: a `ColumnReader` without a network, which reads the columns of a table.

    Attributes:
        given_shape: shape of the mask; a pair of it and the network's own ``given_shape``, if it has one.

    Raises:
        ValueError, TypeError: the network or the reader reads another number of inputs, or an argument has another
            type.

    >>> network = ObservedInput(3, nn.Linear(6, 3))
    >>> x, seen = torch.tensor([[2.0, 5.0, 1.0], [2.0, 7.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0]])
    >>> first, second = network(x, seen.expand(2, 3))
    >>> torch.equal(first, second)
    True
    """

    widths: Tensor

    def __init__(
        self,
        in_shape: int | Sequence[int],
        network: nn.Module,
        *,
        levels: int | None = None,
        reader: ColumnReader | None = None,
    ):
        super().__init__()
        check_sizes(in_shape=in_shape)
        check_type(network, nn.Module, "network", "a torch.nn.Module")
        check_type(reader, ColumnReader | None, "reader", "a ColumnReader or None")
        check_network_options(levels=levels)
        self.in_shape, self.network, self.levels, self.reader = as_shape(in_shape), network, levels, reader
        if reader is not None and reader.in_shape != self.in_shape:
            raise ValueError(
                f"reader reads {len(reader.widths)} columns, but in_shape is {tuple(self.in_shape)}: build both for "
                "the same table"
            )
        widths = [1] * math.prod(self.in_shape) if reader is None else reader.widths
        self.size = sum(widths)
        inputs = self.size + len(widths)
        found = getattr(network, "in_shape", (getattr(network, "in_features", inputs),))
        if tuple(found) != (inputs,):
            raise ValueError(
                f"network reads inputs of shape {tuple(found)}, but x of shape {tuple(self.in_shape)} and its mask "
                f"make {inputs}: build it for inputs of shape ({inputs},)"
            )
        given = getattr(network, "given_shape", None)
        self.given_shape = self.in_shape if given is None else (self.in_shape, given)
        self.num_classes = getattr(network, "num_classes", None)
        self.register_buffer("widths", torch.tensor(widths), persistent=False)

    def forward(self, x: Tensor, seen: Tensor, *given: Tensor) -> Tensor:
        inputs = to_unit(x, self.levels, seen.dtype) if self.reader is None else self.reader(x)
        seen = seen.flatten(1)
        # All inputs of a category are hidden together.
        wide = seen.repeat_interleave(self.widths, 1, output_size=self.size)
        return self.network(torch.cat([inputs.flatten(1).to(seen.dtype) * wide, seen], 1), *given)
