"""Columns of a table as inputs of a network: categories one-hot, amounts in logarithms, numbers standardized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_pyro.checks import as_reals, check_count, check_type, is_integer
from dgm_pyro.networks.masked import MADE, MaskedLinear
from dgm_pyro.networks.standardize import standard
from dgm_pyro.registry import register

__all__ = ["ColumnMADE", "ColumnReader"]


@register
class ColumnReader(nn.Module):
    """A network of the columns of a table; without a network, the inputs that it would read.

    Args:
        categories: number of values of each column that is a category, which is read one-hot; None for a number.
        logarithms: indices of the columns of which log(1 + x) is read instead of x.
        shift, scale: shift and scale of each column as it is read, ``(D,)``, or one number for all.
        network: ``network(inputs, *given)``, with ``(B, out_features)`` inputs.

    Attributes:
        widths: number of inputs of each column.
        out_features: the sum of the widths.

    Raises:
        ValueError, TypeError: an argument does not fit the columns.

    >>> ColumnReader([None, 3], shift=[2.0, 0.0], scale=[4.0, 1.0])(torch.tensor([[4.0, 1.0]]))
    tensor([[0.5000, 0.0000, 1.0000, 0.0000]])
    """

    shift: Tensor
    scale: Tensor
    is_logarithm: Tensor

    def __init__(
        self,
        categories: Sequence[int | None],
        logarithms: Sequence[int] = (),
        shift: Tensor | float | Sequence[float] = 0.0,
        scale: Tensor | float | Sequence[float] = 1.0,
        network: nn.Module | None = None,
    ):
        super().__init__()
        check_type(logarithms, (tuple, list), "logarithms", "a sequence of indices of columns")
        check_type(network, nn.Module | None, "network", "a torch.nn.Module or None")
        check_type(categories, Sequence, "categories", "a sequence of numbers of values, None for a column of numbers")
        self.categories, self.logarithms, self.network = tuple(categories), tuple(logarithms), network
        self.widths = [
            1 if count is None else check_count(count, "categories", at_least=2) for count in self.categories
        ]
        if any(not is_integer(i) or not 0 <= i < len(self.categories) for i in self.logarithms):
            raise ValueError(f"logarithms must be indices of the {len(self.categories)} columns, got {logarithms!r}")
        self.out_features, self.in_shape = sum(self.widths), torch.Size((len(self.widths),))
        for name in ("given_shape", "num_classes"):  # what conditionals ask a network for
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))
        for name, value in (("shift", as_reals(shift, "shift")), ("scale", as_reals(scale, "scale", positive=True))):
            if value.dim() > 1 or value.numel() not in (1, len(self.widths)):
                raise ValueError(f"{name} has shape {tuple(value.shape)}, but there are {len(self.widths)} columns")
            self.register_buffer(name, value.detach().to(torch.get_default_dtype()).expand(self.in_shape).clone())

        is_logarithm = torch.tensor([i in self.logarithms for i in range(len(self.widths))])
        self.register_buffer("is_logarithm", is_logarithm, persistent=False)

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        numbers = standard(torch.where(self.is_logarithm, x.clamp_min(0).log1p(), x), self.shift, self.scale)
        parts = [
            numbers[..., i : i + 1]
            if count is None
            else F.one_hot(x[..., i].long().clamp(0, count - 1), count).to(numbers.dtype)
            for i, count in enumerate(self.categories)
        ]
        inputs = torch.cat(parts, -1)
        return inputs if self.network is None else self.network(inputs, *given)


@register
class ColumnMADE(MADE):
    """A `MADE` over the columns of a table, whose inputs come from ``reader``.

    Args:
        reader: a `ColumnReader` without a network.
        num_parameters, hidden, options: as for `MADE`.
    """

    cache = None  # type: ignore[assignment]  # the inputs are not the features, so sampling takes a pass per feature

    def __init__(self, reader: ColumnReader, num_parameters: int, hidden: Sequence[int] = (256, 256), **options: Any):
        check_type(reader, ColumnReader, "reader", "a ColumnReader")
        super().__init__(reader.in_shape, num_parameters, hidden, **options)
        self.reader, widths = reader, torch.tensor(reader.widths)
        place = torch.empty(len(widths), dtype=torch.long)
        place[list(self.order)] = torch.arange(len(widths))
        inputs = (place + 1).repeat_interleave(widths)
        lowest = min(1 if self.given_shape is None else 0, len(widths) - 1)
        self.first = MaskedLinear(inputs, torch.linspace(lowest, len(widths) - 1, self.first.out_features).round())
        self.direct = MaskedLinear(inputs, place.repeat(num_parameters), bias=False)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        return super().forward(self.reader(x), given)
