r"""A causal transformer: attention of every place in the order to earlier places only.

The features, in their order, are a sequence :math:`x_1, \dots, x_D`. The token at place i is the embedding of x_{i-1}
(at the first place, a learned start token) plus an embedding of the place. The output of the layers at place i gives
the parameters of :math:`p(x_i \mid x_{<i})`. A layer is

.. math::
    h \leftarrow h + \mathrm{attention}(\mathrm{norm}(h)), \qquad h \leftarrow h + \mathrm{mlp}(\mathrm{norm}(h))

where the query of place i attends to the keys and values of the places :math:`\le i`. These do not change later, so
`CausalTransformer.cache` keeps them and computes one place at a time.

Sources: Vaswani et al. 2017 (arXiv 1706.03762); norms before the layers: Xiong et al. 2020 (arXiv 2002.04745); pixels
as a sequence: Chen et al. 2020 (Image GPT).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_pyro.checks import check_counts, check_network_options, check_sizes
from dgm_pyro.networks.caches import Growing
from dgm_pyro.networks.masked import check_order
from dgm_pyro.networks.mlp import InputEmbedding, input_shapes
from dgm_pyro.registry import register

__all__ = ["CausalTransformer"]


def check_heads(width: int, heads: int) -> None:
    check_counts(heads=heads)
    if width % heads:
        raise ValueError(f"width must be a multiple of heads, got width={width} and heads={heads}")


class SelfAttention(nn.Module):
    """Attention of every place to every place, ``(N, T, width)`` to the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = _by_head(self.queries_keys_values(h), self.heads)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _by_head(read: Tensor, heads: int) -> list[Tensor]:
    """Queries, keys and values, ``(N, heads, T, width / heads)`` each, of ``(N, T, 3 width)``."""
    return [each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in read.chunk(3, -1)]


class AttentionLayer(nn.Module):
    """A layer of the causal transformer, ``(N, T, width)`` to the same."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self._queries_keys_values(h)
        return self._add_attended(h, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def next(self, h: Tensor, keys: Growing, values: Growing) -> Tensor:
        """The layer at one more place, ``(N, 1, width)``, given the keys and values of the places before it."""
        q, k, v = self._queries_keys_values(h)
        return self._add_attended(h, F.scaled_dot_product_attention(q, keys.append(k), values.append(v)))

    def _queries_keys_values(self, h: Tensor) -> list[Tensor]:
        return _by_head(self.queries_keys_values(self.norm(h)), self.heads)

    def _add_attended(self, h: Tensor, attended: Tensor) -> Tensor:
        h = h + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return h + self.dropout(self.mlp(self.norm_mlp(h)))


@register
class CausalTransformer(nn.Module):
    """``(B, *in_shape)`` to ``(B, P, *in_shape)``: the P parameters of each feature, from the features before it alone.

    Time and memory grow with the square of the number of features.

    Args:
        in_shape: shape of one x, of D features; an int D for vectors.
        num_parameters: P, the number of parameters per feature.
        width: width of the tokens, a multiple of ``heads``.
        layers: number of layers.
        heads: number of attention heads per layer, each on a part of the width.
        order: "natural" (row by row), or the D flat indices of the features, first to last.
        given_shape: shape of one ``given``, for ``network(x, given)``; its embedding is added to every token.
        num_classes: number of class labels, where ``given`` is a label.
        levels: x takes the integers 0 .. levels - 1, each with its own embedding; reals are embedded linearly.
        dropout: share of each layer's contribution that is dropped in training.

    Attributes:
        order: the flat indices of the features, first to last.

    Raises:
        ValueError: the order is no permutation, a size is no positive integer, or the heads do not divide the width.

    >>> CausalTransformer((3,), 2, width=8, layers=1, heads=2, order=(2, 0, 1))(torch.zeros(5, 3)).shape
    torch.Size([5, 2, 3])
    """

    sequence: Tensor
    places: Tensor

    def __init__(
        self,
        in_shape: int | Sequence[int],
        num_parameters: int,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        *,
        order: str | Sequence[int] = "natural",
        given_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        levels: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_sizes(in_shape=in_shape)
        check_counts(num_parameters=num_parameters, width=width, layers=layers)
        check_heads(width, heads)
        check_network_options(levels=levels, num_classes=num_classes, dropout=dropout)
        self.in_shape, self.given_shape = input_shapes(in_shape, given_shape, num_classes)
        self.num_parameters, self.num_classes, self.levels = num_parameters, num_classes, levels
        size = math.prod(self.in_shape)
        self.order = check_order(order, size)
        sequence = torch.tensor(self.order)
        self.register_buffer("sequence", sequence, persistent=False)
        self.register_buffer("places", sequence.argsort(), persistent=False)

        self.embed = nn.Linear(1, width) if levels is None else nn.Embedding(levels, width)
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.positions = nn.Parameter(0.02 * torch.randn(size, width))
        self.embedding: nn.Module | None = None
        if self.given_shape is not None:
            self.embedding = InputEmbedding(self.given_shape, num_classes, width)
        self.layers = nn.ModuleList(AttentionLayer(width, heads, dropout) for _ in range(layers))
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_parameters))
        self.heads, self.width = heads, width

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        sequence = self.tokens(x.flatten(1).index_select(1, self.sequence[:-1]))
        h = torch.cat((self.start.expand(x.shape[0], 1, -1), sequence), 1) + self.positions
        if self.embedding is not None:
            h = h + self.embedding(given).unsqueeze(1)
        for layer in self.layers:
            h = layer(h)
        return self.last(h).index_select(1, self.places).mT.unflatten(-1, self.in_shape)

    def tokens(self, x: Tensor) -> Tensor:
        """Features, ``(N, T)``, embedded, ``(N, T, width)``."""
        if self.levels is None:
            return self.embed(x.unsqueeze(-1).to(self.start.dtype))
        return self.embed(x.long())

    def cache(self, batch_size: int, given: Tensor | None = None) -> TransformerCache:
        """A `caches.Cache` of ``batch_size`` chains: the keys and values of the places so far.

        Args:
            given: ``(batch_size, *given_shape)``, or ``(batch_size,)`` labels.
        """
        return TransformerCache(self, batch_size, given)


class TransformerCache:
    """The keys and values of every layer, ``(N, heads, places so far, width / heads)``."""

    def __init__(self, network: CausalTransformer, batch_size: int, given: Tensor | None):
        self.network, self.place = network, 0
        like = network.start
        self.embedding = like.new_zeros(batch_size, 1) if network.embedding is None else network.embedding(given)
        none = like.new_empty(batch_size, network.heads, 0, network.width // network.heads)
        self.seen = [[Growing(none, len(network.order), dim=2) for _ in "kv"] for _ in network.layers]

    def step(self, value: Tensor | None) -> Tensor:
        n = self.network
        token = n.start if value is None else n.tokens(value.unsqueeze(1)).squeeze(1)
        h = (token + n.positions[self.place] + self.embedding).unsqueeze(1)
        for layer, (keys, values) in zip(n.layers, self.seen, strict=True):
            assert isinstance(layer, AttentionLayer)
            h = layer.next(h, keys, values)
        self.place += 1
        return n.last(h).squeeze(1)

    def take(self, rows: Tensor) -> None:
        self.embedding = self.embedding.index_select(0, rows)
        for keys, values in self.seen:
            keys.take(rows)
            values.take(rows)
