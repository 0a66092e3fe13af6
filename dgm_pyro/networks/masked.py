r"""Masked multilayer perceptrons, in which each output depends on some of the inputs only.

Number the features by their place in an order. A unit of *degree* m may depend on the first m features and on no
others, which holds if it reads only units of at most its own degree:

.. math::
    W_{ab} = 0 \quad \text{unless} \quad m_b \le m_a

The feature at place i = 1 .. D is an input of degree i, and the parameters of its conditional
:math:`p(x_i \mid x_{<i})` are outputs of degree i - 1. The hidden degrees are free; here they are spread evenly from 1
to D - 1, or from 0 with a ``given``, so that some units carry ``given`` to the first feature. Direct connections from
the inputs to the outputs, masked by the same rule, make every allowed dependency possible even with few hidden units.

With its units sorted by degree, a layer's mask is a staircase: the units of degree m are neighbors, and read a prefix
of the layer before. They can be computed once feature m is known, and `MADE.cache` computes them then.

Source: Germain et al. 2015 (MADE, arXiv 1502.03509), sections 3 and 4; residual blocks: Durkan and Nash 2019
(Autoregressive energy machines, arXiv 1904.05626), section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_pyro.checks import as_shape, check_count, check_network_options, check_sizes
from dgm_pyro.networks.caches import Growing
from dgm_pyro.networks.mlp import InputEmbedding, activation_named, input_shapes, to_unit
from dgm_pyro.registry import register

__all__ = ["MADE", "MaskedLinear"]


class MaskedLinear(nn.Linear):
    """A linear layer whose outputs read no input of a higher degree than their own.

    Args:
        degrees_in: degrees of the inputs, ``(in_features,)``.
        degrees_out: degrees of the outputs, ``(out_features,)``.
        bias: whether to add a bias.
    """

    mask: Tensor

    def __init__(self, degrees_in: Tensor, degrees_out: Tensor, bias: bool = True):
        super().__init__(len(degrees_in), len(degrees_out), bias)
        device = self.weight.device  # may be the meta device
        self.register_buffer("mask", degrees_in.to(device) <= degrees_out.to(device).unsqueeze(-1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedBlock(nn.Module):
    """``layer(activation(h)) + c``; residual: ``h + second(activation(layer(activation(h)) + c))``."""

    def __init__(self, degrees_in: Tensor, degrees_out: Tensor, residual: bool, activation: nn.Module):
        super().__init__()
        self.activation = activation
        self.layer = MaskedLinear(degrees_in, degrees_out)
        self.second = MaskedLinear(degrees_out, degrees_out) if residual else None

    def forward(self, h: Tensor, c: Tensor | float) -> Tensor:
        inner = self.layer(self.activation(h)) + c
        return inner if self.second is None else h + self.second(self.activation(inner))


@register
class MADE(nn.Module):
    """``(B, *in_shape)`` to ``(B, P, *in_shape)``: the P parameters of each feature, from the features before it alone.

    Args:
        in_shape: shape of one x, of D features; an int D for vectors.
        num_parameters: P, the number of parameters per feature.
        hidden: widths of the hidden layers, at least one.
        order: "natural" (row by row), or the D flat indices of the features, first to last.
        residual: whether all hidden layers but the first are residual blocks of two layers; all widths must be equal.
        given_shape: shape of one ``given``, for ``network(x, given)``; it is added to every hidden layer.
        num_classes: number of class labels, where ``given`` is a label.
        levels: x takes the integers 0 .. levels - 1, and is scaled to [-1, 1].
        dropout: share of the hidden units that are dropped in training.
        activation: one of relu, silu, gelu, tanh, elu.

    Attributes:
        order: the flat indices of the features, first to last.

    Raises:
        ValueError: the order is no permutation, a size is no positive integer, there is no hidden layer, or the widths
            of residual blocks differ.

    >>> MADE((3,), 2, hidden=(8,), order=(2, 0, 1))(torch.zeros(5, 3)).shape
    torch.Size([5, 2, 3])
    """

    def __init__(
        self,
        in_shape: int | Sequence[int],
        num_parameters: int,
        hidden: Sequence[int] = (256, 256),
        *,
        order: str | Sequence[int] = "natural",
        residual: bool = False,
        given_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        levels: int | None = None,
        dropout: float = 0.0,
        activation: str = "silu",
    ):
        super().__init__()
        check_sizes(in_shape=in_shape, hidden=hidden)
        check_count(num_parameters, "num_parameters")
        check_network_options(levels=levels, num_classes=num_classes, dropout=dropout)
        self.in_shape, self.given_shape = input_shapes(in_shape, given_shape, num_classes)
        self.num_parameters, self.num_classes, self.levels = num_parameters, num_classes, levels
        size = math.prod(self.in_shape)
        self.order = check_order(order, size)
        hidden = as_shape(hidden)
        if residual and len(set(hidden)) > 1:
            raise ValueError(f"residual blocks have one width, but hidden is {tuple(hidden)}: make all widths equal")

        place = torch.empty(size, dtype=torch.long)
        place[list(self.order)] = torch.arange(size)
        inputs, outputs = place + 1, place.repeat(num_parameters)
        lowest = min(1 if self.given_shape is None else 0, size - 1)
        degrees = [torch.linspace(lowest, size - 1, width).round() for width in hidden]
        # Number of units of degree 0 .. D - 1 in each hidden layer.
        self.counts = [torch.bincount(each.long(), minlength=size).tolist() for each in degrees]

        self.activation = nn.Sequential(activation_named(activation), nn.Dropout(dropout))
        self.first = MaskedLinear(inputs, degrees[0])
        self.blocks = nn.ModuleList(MaskedBlock(a, b, residual, self.activation) for a, b in pairwise(degrees))
        self.last = MaskedLinear(degrees[-1], outputs)
        self.direct = MaskedLinear(inputs, outputs, bias=False)
        self.embeddings = nn.ModuleList()
        if self.given_shape is not None:
            self.embeddings.extend(InputEmbedding(self.given_shape, num_classes, width) for width in hidden)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        x = to_unit(x, self.levels).to(self.first.weight.dtype).flatten(1)
        embedded = [embed(given) for embed in self.embeddings] or [0.0] * (1 + len(self.blocks))
        h = self.first(x) + embedded[0]
        for block, c in zip(self.blocks, embedded[1:], strict=True):
            h = block(h, c)
        raw = self.last(self.activation(h)) + self.direct(x)
        return raw.unflatten(-1, (self.num_parameters, *self.in_shape))

    def cache(self, batch_size: int, given: Tensor | None = None) -> MADECache:
        """A `caches.Cache` of ``batch_size`` chains: each unit is computed once, when its last input is known.

        Args:
            given: ``(batch_size, *given_shape)``, or ``(batch_size,)`` labels.
        """
        return MADECache(self, batch_size, given)


class MADECache:
    """The known inputs, by place, and the known hidden units, by degree."""

    def __init__(self, network: MADE, batch_size: int, given: Tensor | None):
        self.network, self.degree = network, -1
        self.embeddings = [embed(given) for embed in network.embeddings]
        self.layers = [Stairs(network.first, network.counts[0], network.order)]
        self.second: list[Stairs] = []
        for block, counts in zip(network.blocks, network.counts[1:], strict=True):
            assert isinstance(block, MaskedBlock)
            self.layers.append(Stairs(block.layer, counts))
            if block.second is not None:
                self.second.append(Stairs(block.second, counts))
        features = len(network.order)
        shape = (network.num_parameters, features, -1)
        self.last = network.last.weight.reshape(shape).unbind(1)
        self.bias = network.last.bias.reshape(shape[:2]).unbind(1)
        self.direct = in_order(network.direct.weight, network.order).reshape(shape).unbind(1)

        none = network.first.weight.new_empty(batch_size, 0)
        self.x = Growing(none, features)
        self.units = [Growing(none, sum(counts)) for counts in network.counts]
        self.inner = [Growing(none, sum(counts)) for counts in network.counts[1:]]

    def step(self, value: Tensor | None) -> Tensor:
        n, self.degree = self.network, self.degree + 1
        if value is not None:
            self.x.append(to_unit(value, n.levels).to(self.x.value.dtype).unsqueeze(-1))
        if any(counts[self.degree] for counts in n.counts):
            self._new_units()
        j = n.order[self.degree]
        hidden = self.units[-1].value
        raw = F.linear(hidden, self.last[j][:, : hidden.shape[1]], self.bias[j])
        return raw + F.linear(self.x.value, self.direct[j][:, : self.degree])

    def _new_units(self) -> None:
        """Compute the units with the degree of the latest feature."""
        activation = self.network.activation
        h = self._layer(0, self.x.value)
        for i, units in enumerate(self.units[:-1]):
            inner = self._layer(i + 1, units.append(activation(h)))
            h = h + self.second[i](self.degree, self.inner[i].append(activation(inner))) if self.second else inner
        self.units[-1].append(activation(h))

    def _layer(self, i: int, x: Tensor) -> Tensor:
        layer = self.layers[i]
        h = layer(self.degree, x)
        return h + self.embeddings[i][:, layer.steps[self.degree]] if self.embeddings else h

    def take(self, rows: Tensor) -> None:
        self.embeddings = [embedded.index_select(0, rows) for embedded in self.embeddings]
        for known in (self.x, *self.units, *self.inner):
            known.take(rows)


class Stairs:
    """A masked layer that is evaluated one degree at a time.

    Args:
        layer: a layer whose outputs are sorted by degree.
        counts: number of outputs of each degree.
        order: the order of the features, if they are the inputs; otherwise the inputs are sorted by degree.
    """

    def __init__(self, layer: MaskedLinear, counts: Sequence[int], order: Sequence[int] | None = None):
        weight = layer.weight if order is None else in_order(layer.weight, order)
        self.weights, self.biases = weight.split(counts), layer.bias.split(counts)
        ends = list(accumulate(counts, initial=0))
        self.steps = [slice(a, b) for a, b in pairwise(ends)]

    def __call__(self, degree: int, x: Tensor) -> Tensor:
        """The outputs of a degree, from the inputs of at most this degree, which come first."""
        return F.linear(x, self.weights[degree][:, : x.shape[1]], self.biases[degree])


def in_order(weight: Tensor, order: Sequence[int]) -> Tensor:
    """The columns of ``weight`` in an order of the features."""
    if tuple(order) == tuple(range(len(order))):
        return weight
    return weight.index_select(1, torch.tensor(order, device=weight.device))


def check_order(order: str | Sequence[int], num_features: int) -> tuple[int, ...]:
    """The order as flat indices, first to last."""
    if isinstance(order, str):
        if order != "natural":
            raise ValueError(f"order must be 'natural' or a sequence of indices, got {order!r}")
        return tuple(range(num_features))
    try:
        indices = tuple(int(i) for i in order)
    except (TypeError, ValueError) as error:
        raise TypeError(f"order must be 'natural' or a sequence of indices, got {order!r}") from error
    if sorted(indices) != list(range(num_features)):
        raise ValueError(
            f"order must name each of the {num_features} features 0 .. {num_features - 1} once, got {indices}"
        )
    return indices
