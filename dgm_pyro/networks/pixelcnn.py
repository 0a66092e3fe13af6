r"""PixelCNN: a convolutional network in which a pixel depends only on those above it and, in its row, to its left.

Masked square kernels would miss some of the pixels to the upper right. Two stacks of convolutions reach all of them:
the *vertical* stack reads the rows above, and the *horizontal* stack reads the pixels to the left and the vertical
stack. Both start from an image shifted by one pixel (down, and to the right), and after that may read their own
position. Kernels that reach only up and left are plain kernels on an image padded on these sides.

Every layer is gated and reads h, what is given, through biases (van den Oord et al. 2016, eq. 4):

.. math::
    y = \tanh(W_1 * x + V_1 h) \odot \sigma(W_2 * x + V_2 h)

If h is an image of the same height and width, each pixel has its own biases: :math:`V h` is then a convolution with
kernel 1 (eq. 5).

The channels of a pixel are ordered too. The stacks read whole pixels. The parameters of a channel depend on the skip
connections of its pixel, and on the channels before it in that pixel.

There are two ways to read distant pixels. Attention blocks between the layers read all pixels before (PixelSNAIL). With
several stages, as in PixelCNN++, further layers work at half the resolution, at a fourth of the cost, and so on::

    layers --------------------------- + -- layers      full resolution
          \-- down -- layers -- up --/                  half of it

A block is 2 x 2 pixels. Its place at half the resolution may read what the first of its pixels may read, so all four
may read it. The vertical stack reads the first row of the block and the row above it, in three columns. The horizontal
stack reads the first pixel and the one to its left.

Sampling goes row by row: `PixelCNN.cache` runs the vertical stack one row at a time, once the row above is known, and
the horizontal stack one pixel at a time.

Sources: van den Oord et al. 2016 (Conditional image generation with PixelCNN decoders, arXiv 1606.05328), section 2;
for whole pixels, their channels and lower resolutions, Salimans et al. 2017 (PixelCNN++, arXiv 1701.05517), sections
2.2 to 2.4; for attention, Chen et al. 2018 (PixelSNAIL, arXiv 1712.09763). In PixelCNN++ every layer has its own
short-cut to the way up; here each resolution has one. The attention block is a layer of `CausalTransformer`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_pyro.checks import check_count, check_counts, check_network_options, is_integer
from dgm_pyro.networks.attention import AttentionLayer, check_heads
from dgm_pyro.networks.caches import Growing
from dgm_pyro.networks.mlp import InputEmbedding, input_shapes, to_unit
from dgm_pyro.registry import register

__all__ = ["PixelCNN"]

Stacks = tuple[Tensor, Tensor, Tensor]
"""The vertical stack, the horizontal one and the skips, ``(B, C, H, W)`` each."""


class MapEmbedding(nn.Module):
    """Images ``(B, C, H, W)`` to biases at each pixel, ``(B, out_features, H, W)``, or at a lower resolution."""

    def __init__(self, in_features: int, out_features: int, stage: int):
        super().__init__()
        self.embed = nn.Conv2d(in_features, out_features, 2**stage, 2**stage)

    def forward(self, given: Tensor) -> Tensor:
        if not given.is_floating_point():
            raise TypeError(f"given must hold reals, got {given.dtype}: pass given.float()")
        return self.embed(given.to(self.embed.weight.dtype))


class GatedLayer(nn.Module):
    """One layer of both stacks: (vertical, horizontal, given) to (vertical, horizontal, skip)."""

    def __init__(self, width: int, kernel_size: int, embedding: nn.Module | None, dropout: float):
        super().__init__()
        self.reach = kernel_size // 2
        self.embedding = embedding
        self.dropout = nn.Dropout(dropout)
        self.vertical = nn.Conv2d(width, 2 * width, (self.reach + 1, kernel_size))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, self.reach + 1))
        self.across = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, 2 * width, 1)

    def forward(self, v: Tensor, h: Tensor, given: Tensor | None) -> Stacks:
        a = self.vertical(F.pad(self.dropout(v), (self.reach, self.reach, self.reach, 0)))
        b = self.horizontal(F.pad(self.dropout(h), (self.reach, 0, 0, 0))) + self.across(a)
        if self.embedding is not None and given is not None:
            bias_a, bias_b = biases(self.embedding, given).chunk(2, 1)
            a, b = a + bias_a, b + bias_b
        residual, skip = self.out(gate(b)).chunk(2, 1)
        return gate(a), h + residual, skip


class Down(nn.Module):
    """Both stacks, ``(B, C, H, W)``, at half the resolution: what the first pixel of a block of 2 x 2 may read."""

    def __init__(self, width: int):
        super().__init__()
        self.vertical = nn.Conv2d(width, width, (2, 3), 2)
        self.horizontal = nn.Conv2d(width, width, (1, 2), 2)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.vertical(F.pad(v, (1, 1, 1, 0))), self.horizontal(F.pad(h, (1, 0, 0, 0)))


class Up(nn.Module):
    """Both stacks and the skips at twice the resolution: four pixels from each place."""

    def __init__(self, width: int):
        super().__init__()
        self.vertical, self.horizontal, self.skip = (nn.ConvTranspose2d(width, width, 2, 2) for _ in range(3))

    def forward(self, v: Tensor, h: Tensor, skips: Tensor) -> Stacks:
        return self.vertical(v), self.horizontal(h), self.skip(skips)


class PixelAttention(nn.Module):
    """Causal attention between pixels: the horizontal stack and the features of the pixels to the stack, all
    ``(B, C, H, W)``.

    The stack at a pixel has read only pixels before it. So a pixel may attend to itself. To its stack the block adds
    the features of the pixel before it in the order. At the start of a row that pixel ends the row above, where
    convolutions may not reach.
    """

    def __init__(self, width: int, heads: int, pixels: int, dropout: float):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(pixels, width))
        self.layer = AttentionLayer(width, heads, dropout)

    def forward(self, h: Tensor, pixels: Tensor) -> Tensor:
        before = F.pad(pixels.flatten(2), (1, -1))
        return self.layer((h.flatten(2) + before).mT + self.positions).mT.unflatten(2, h.shape[2:])


class ChannelsBefore(nn.Module):
    """``(B, C, H, W)`` to ``(B, C * width, H, W)``: features for each channel, from the channels before it."""

    mask: Tensor

    def __init__(self, depth: int, width: int):
        super().__init__()
        self.every = nn.Conv2d(depth, depth * width, 1, bias=False)
        before = torch.ones(depth, depth).tril(-1).repeat_interleave(width, 0)
        self.register_buffer("mask", before[:, :, None, None], persistent=False)

    @property
    def weight(self) -> Tensor:
        return self.every.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


@register
class PixelCNN(nn.Module):
    """``(B, C, H, W)`` to ``(B, P, C, H, W)``: the P parameters of each feature, from the features before it alone.

    Pixels are ordered row by row, and each pixel's channels follow each other. With one stage and no attention, the
    receptive field of a pixel has 1 + L (k // 2) pixels to the left, the same number of rows above, and in these
    L (k // 2) columns to either side. Choose L and k to cover the image, or add stages or attention. Stages extend the
    field above. To the left they extend it in even rows only, counted from 0: in odd rows it stays 1 + 2 L (k // 2),
    because a lower resolution reads the first pixel of each block of 2 x 2.

    Args:
        in_shape: shape of one image, ``(C, H, W)``.
        num_parameters: P, the number of parameters per feature.
        width: channels of each stack.
        layers: L, the number of gated layers of a group. There are 2 S - 1 groups: one at each resolution on the way
            down, and one at each but the lowest on the way up.
        kernel_size: k, odd.
        stages: S, the number of resolutions. Each further one has half the sides, which must be even.
        attention: number of attention blocks, spread evenly over the last group, at the full resolution; fewer than L.
            The time of each grows with the square of the number of pixels.
        heads: number of attention heads per block, of which ``width`` is a multiple; ignored without attention.
        given_shape: shape of one ``given``, for ``network(x, given)``. Images ``(D, H, W)`` with the H and W of x are
            read pixel by pixel, by a pixel in its own row and the rows above; anything else is read as a vector.
        num_classes: number of class labels, where ``given`` is a label.
        levels: x takes the integers 0 .. levels - 1, and is scaled to [-1, 1].
        dropout: share of the features that are dropped in training.

    Attributes:
        order: the flat indices of the features, first to last.

    Raises:
        ValueError: ``in_shape`` is not the shape of an image, or its sides are no multiples of 2^(S - 1); the kernel
            size is even or below 3; a size is no positive integer; ``attention`` is negative, or not less than
            ``layers``; or, with attention, ``width`` is no multiple of ``heads``.

    >>> PixelCNN((1, 4, 4), 3, width=8, layers=2)(torch.zeros(5, 1, 4, 4)).shape
    torch.Size([5, 3, 1, 4, 4])
    >>> PixelCNN((3, 4, 4), 2, width=8, layers=2).order[:4]  # the channels of a pixel, then the next pixel
    (0, 16, 32, 1)
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        num_parameters: int,
        width: int = 32,
        layers: int = 8,
        kernel_size: int = 3,
        *,
        stages: int = 1,
        attention: int = 0,
        heads: int = 4,
        given_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        levels: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.in_shape, self.given_shape = input_shapes(in_shape, given_shape, num_classes)
        if len(self.in_shape) != 3:
            raise ValueError(
                f"in_shape is {tuple(self.in_shape)}, but PixelCNN models images, (C, H, W): use MADE for other shapes"
            )
        check_counts(num_parameters=num_parameters, width=width, layers=layers, stages=stages)
        check_network_options(levels=levels, num_classes=num_classes, dropout=dropout)
        if not is_integer(kernel_size) or kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3, got {kernel_size!r}")
        check_count(attention, "attention", at_least=0)
        if attention >= layers:
            raise ValueError(f"attention must be less than layers, {layers}, got {attention}")
        if attention:
            check_heads(width, heads)
        if any(side % 2 ** (stages - 1) for side in self.in_shape[1:]):
            raise ValueError(
                f"with stages={stages}, the sides of the image must be multiples of {2 ** (stages - 1)}, got "
                f"{self.in_shape[1]} x {self.in_shape[2]} pixels"
            )
        self.num_classes, self.levels, self.stages, self.group_size = num_classes, levels, stages, layers
        depth = self.in_shape[0]
        pixels = torch.arange(self.in_shape.numel()).reshape(depth, -1)
        self.order = tuple(pixels.T.flatten().tolist())

        self.first = nn.Conv2d(depth, width, 1)
        self.layers = nn.ModuleList(
            GatedLayer(width, kernel_size, self._embedding(4 * width, min(group, 2 * (stages - 1) - group)), dropout)
            for group in range(2 * stages - 1)
            for _ in range(layers)
        )
        self.down = nn.ModuleList(Down(width) for _ in range(stages - 1))
        self.up = nn.ModuleList(Up(width) for _ in range(stages - 1))
        # Each key is the index of the layer that follows the block.
        start = 2 * (stages - 1) * layers
        places = [start + i * layers // (attention + 1) for i in range(1, attention + 1)]
        self.attention = nn.ModuleDict(
            {str(place): PixelAttention(width, heads, pixels.shape[1], dropout) for place in places}
        )
        self.last = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 1),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(2 * width * depth, num_parameters * depth, 1, groups=depth),
        )
        self.within = None if depth == 1 else ChannelsBefore(depth, 2 * width)

    def _embedding(self, out_features: int, stage: int) -> nn.Module | None:
        """A network that embeds ``given`` for a layer at this resolution; None without a given."""
        if self.given_shape is None:
            return None
        if len(self.given_shape) == 3 and self.given_shape[1:] == self.in_shape[1:]:
            return MapEmbedding(self.given_shape[0], out_features, stage)
        return InputEmbedding(self.given_shape, self.num_classes, out_features)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        x = to_unit(x, self.levels).to(self.first.weight.dtype)
        pixels = self.first(x)
        v, h = F.pad(pixels, (0, 0, 1, -1)), F.pad(pixels, (1, -1, 0, 0))
        _, _, skips = self._stage(0, (v, h, torch.zeros_like(h)), pixels, given)
        hidden = self.last[:2](skips)
        if self.within is not None:
            hidden = hidden.repeat(1, x.shape[1], 1, 1) + self.within(x)
        return self.last[2:](hidden).unflatten(1, (x.shape[1], -1)).transpose(1, 2)

    def _stage(self, stage: int, stacks: Stacks, pixels: Tensor, given: Tensor | None) -> Stacks:
        """The layers at one resolution, with those at all lower ones between them."""
        stacks = self._run_group(stage, stacks, pixels, given)
        if stage == self.stages - 1:
            return stacks
        v, h = self.down[stage](*stacks[:2])
        lower = self.up[stage](*self._stage(stage + 1, (v, h, torch.zeros_like(h)), pixels, given))
        v, h, skips = (here + there for here, there in zip(stacks, lower, strict=True))
        return self._run_group(2 * (self.stages - 1) - stage, (v, h, skips), pixels, given)

    def _run_group(self, number: int, stacks: Stacks, pixels: Tensor, given: Tensor | None) -> Stacks:
        v, h, skips = stacks
        for i in self._group(number):
            if str(i) in self.attention:
                h = self.attention[str(i)](h, pixels)
            v, h, skip = self.layers[i](v, h, given)
            skips = skips + skip
        return v, h, skips

    def _group(self, number: int) -> range:
        """The indices of the layers of one group; there are 2 S - 1."""
        return range(number * self.group_size, (number + 1) * self.group_size)

    def cache(self, batch_size: int, given: Tensor | None = None) -> PixelCNNCache:
        """A `caches.Cache` of ``batch_size`` images: every activation is computed once.

        Args:
            given: ``(batch_size, *given_shape)``, or ``(batch_size,)`` labels.
        """
        return PixelCNNCache(self, batch_size, given)


class PixelCNNCache:
    """The pixels of the last row, after the first convolution, and the cache of the layers."""

    def __init__(self, network: PixelCNN, batch_size: int, given: Tensor | None):
        self.network, self.place = network, 0
        self.depth, _, self.width = network.in_shape
        self.first = as_matrix(network.first)
        middle, last = (as_matrix(layer) for layer in network.last if isinstance(layer, nn.Conv2d))
        self.middle, self.last = middle, [*zip(*(part.chunk(self.depth) for part in last), strict=True)]
        self.within = [] if network.within is None else network.within.weight.flatten(1).chunk(self.depth)

        blank = network.first.weight.new_zeros(batch_size, network.first.out_channels)
        self.blank, self.pixels = blank, [blank] * self.width  # the last row, after the first convolution
        self.stage = cached_stage(network, 0, blank, given)
        self.values: list[Tensor] = []  # the channels of the pixel at this place, so far
        self.hidden = blank

    def step(self, value: Tensor | None) -> Tensor:
        pixel, channel = divmod(self.place, self.depth)
        if value is not None:
            self.values.append(to_unit(value, self.network.levels).to(self.blank.dtype))
        if channel == 0:
            if self.values:
                self.pixels.append(F.linear(torch.stack(self.values, -1), *self.first))
                self.values = []
            row, column = divmod(pixel, self.width)
            before = self.pixels[-1]
            if column == 0:
                self.stage.row(torch.stack(self.pixels, -1).unsqueeze(2), row)
                self.pixels = []
            _, skips = self.stage.pixel(before if column else self.blank, before, row, column)
            self.hidden = F.linear(skips.relu(), *self.middle)
        self.place += 1
        hidden = self.hidden
        if channel > 0:
            hidden = hidden + F.linear(torch.stack(self.values, -1), self.within[channel][:, :channel])
        return F.linear(hidden.relu(), *self.last[channel])

    def take(self, rows: Tensor) -> None:
        self.blank, self.hidden = self.blank.index_select(0, rows), self.hidden.index_select(0, rows)
        for each in (self.values, self.pixels):
            each[:] = [part.index_select(0, rows) for part in each]
        self.stage.take(rows)


class CachedStage:
    """The layers at one resolution, and those at all lower ones between them.

    The lower resolutions are computed at every second row and column, and their results serve four pixels.
    """

    def __init__(self, network: PixelCNN, stage: int, blank: Tensor, given: Tensor | None):
        width = network.in_shape[-1] >> stage
        self.first_layers = CachedLayers(network, stage, width, blank, given)
        self.lower = cached_stage(network, stage + 1, blank, given)
        self.last_layers = CachedLayers(network, 2 * (network.stages - 1) - stage, width, blank, given)
        down, up = network.down[stage], network.up[stage]
        assert isinstance(down, Down)
        assert isinstance(up, Up)
        self.down, self.up = down, up
        self.blank = self.left = blank
        self.above = self.two_rows = blank[:, :, None, None].expand(-1, -1, 1, width)
        self.blocks: list[Tensor] = []  # of these two rows: the horizontal stack and the skips, ``(N, 2 C, 2, 2)``

    def row(self, v: Tensor, row: int) -> Tensor:
        """The vertical stack at the next row, ``(N, C, 1, W)`` to the same."""
        v = self.first_layers.row(v, row)
        if row % 2 == 0:
            lower = self.down.vertical(F.pad(torch.cat((self.above, v), 2), (1, 1)))
            self.two_rows, self.blocks = self.up.vertical(self.lower.row(lower, row // 2)), []
        self.above, self.left = v, self.blank
        return self.last_layers.row(v + self.two_rows[:, :, row % 2, None], row)

    def pixel(self, h: Tensor, before: Tensor, row: int, column: int) -> tuple[Tensor, Tensor]:
        """The horizontal stack and the skips at the next pixel, ``(N, C)`` each.

        Args:
            h: the horizontal stack, ``(N, C)``.
            before: the features of the pixel before this one in the order, at the full resolution, for attention
                blocks, ``(N, C)``.
            row, column: place of the pixel at this resolution.
        """
        h, skips = self.first_layers.pixel(h, before, row, column)
        if row % 2 == 0 and column % 2 == 0:
            pair = torch.stack((self.left, h), -1).unsqueeze(2)
            lower = self.down.horizontal(pair)[..., 0, 0]
            lower_h, lower_skips = self.lower.pixel(lower, before, row // 2, column // 2)
            block = self.up.horizontal(lower_h[..., None, None]), self.up.skip(lower_skips[..., None, None])
            self.blocks.append(torch.cat(block, 1))
        self.left = h
        up_h, up_skips = self.blocks[column // 2][..., row % 2, column % 2].chunk(2, 1)
        h, more = self.last_layers.pixel(h + up_h, before, row, column)
        return h, skips + up_skips + more

    def take(self, rows: Tensor) -> None:
        for part in (self.first_layers, self.lower, self.last_layers):
            part.take(rows)
        self.above, self.two_rows = self.above.index_select(0, rows), self.two_rows.index_select(0, rows)
        self.blank, self.left = self.blank.index_select(0, rows), self.left.index_select(0, rows)
        self.blocks = [block.index_select(0, rows) for block in self.blocks]


def cached_stage(network: PixelCNN, stage: int, blank: Tensor, given: Tensor | None) -> CachedLayers | CachedStage:
    if stage == network.stages - 1:
        return CachedLayers(network, stage, network.in_shape[-1] >> stage, blank, given)
    return CachedStage(network, stage, blank, given)


class CachedLayers:
    r"""What a group of layers still reads: rows of the vertical stack and pixels of the horizontal one.

    At a pixel the horizontal stack is a loop over L small layers, in which launching a kernel takes longer than its
    computation. So the loop does as little as possible: the terms of the pixels to the left are computed for all layers
    before it, the skips after it, and the biases of the residual connections are left out. The loop's h is that of
    `PixelCNN.forward` minus the sum of these biases so far, `behind`.
    """

    def __init__(self, network: PixelCNN, number: int, width: int, blank: Tensor, given: Tensor | None):
        group = network._group(number)
        self.layers = [layer for layer in (network.layers[i] for i in group) if isinstance(layer, GatedLayer)]
        self.channels, self.reach = network.first.out_channels, self.layers[0].reach

        taps = torch.stack([layer.horizontal.weight[:, :, 0] for layer in self.layers])  # (L, 2 C, C, reach + 1)
        self.of_left = taps[..., :-1].permute(0, 3, 2, 1).flatten(1, 2).contiguous()  # (L, reach C, 2 C)
        of_h = taps[..., -1].mT.contiguous()  # (L, C, 2 C)
        residuals, skips = torch.stack([layer.out.weight[:, :, 0, 0] for layer in self.layers]).mT.chunk(2, -1)
        residual_bias, skip_bias = torch.stack([bias_of(layer.out) for layer in self.layers]).chunk(2, -1)
        self.behind = (residual_bias.cumsum(0) - residual_bias).unsqueeze(1)  # (L, 1, C)
        self.at_end = residual_bias.sum(0)
        self.bias = torch.stack([bias_of(layer.horizontal) for layer in self.layers]).unsqueeze(1) + self.behind @ of_h
        self.of_h, self.residuals = of_h.unbind(), residuals.contiguous().unbind()
        self.skips, self.skip_bias = skips.flatten(0, 1), skip_bias.sum(0)

        self.embeddings = (
            [] if given is None else [biases(layer.embedding, given) for layer in self.layers if layer.embedding]
        )
        self.above = [blank[:, :, None, None].expand(-1, -1, self.reach, width)] * len(self.layers)
        self.from_above = blank.new_zeros(width, len(self.layers), blank.shape[0], 2 * self.channels)
        self.left = blank.new_zeros(len(self.layers), blank.shape[0], self.reach * self.channels)
        blocks = dict(network.attention.items())
        self.attention = {
            i: CachedAttention(block, blank.shape[0])
            for i, j in enumerate(group)
            if isinstance(block := blocks.get(str(j)), PixelAttention)
        }

    def row(self, v: Tensor, row: int) -> Tensor:
        """Run the vertical stack at the next row, and keep its inputs to the horizontal one, ``(W, L, N, 2 C)``."""
        reads = []
        for i, layer in enumerate(self.layers):
            window = torch.cat((self.above[i], v), 2)
            self.above[i] = window[:, :, 1:]
            a = layer.vertical(F.pad(window, (self.reach, self.reach)))
            b = layer.across(a)
            if self.embeddings:
                bias = self.embeddings[i]  # of one row for a vector or a label
                bias_a, bias_b = bias[:, :, row % bias.shape[2], None].chunk(2, 1)
                a, b = a + bias_a, b + bias_b
            v = gate(a)
            reads.append(b.squeeze(2).permute(2, 0, 1))
        self.from_above = torch.stack(reads, 1) + self.bias
        self.left = torch.zeros_like(self.left)
        return v

    def pixel(self, h: Tensor, before: Tensor, row: int, column: int) -> tuple[Tensor, Tensor]:
        """The horizontal stack and the skips at the next pixel, as for `CachedStage.pixel`."""
        inputs, gated = [], []
        read = torch.baddbmm(self.from_above[column], self.left, self.of_left).unbind()
        for i, (of_left, of_h, residual) in enumerate(zip(read, self.of_h, self.residuals, strict=True)):
            if i in self.attention:
                h = self.attention[i].next(h + self.behind[i] + before) - self.behind[i]
            inputs.append(h)
            b = torch.addmm(of_left, h, of_h)
            b[:, : self.channels].tanh_()
            gated.append(F.glu(b, 1))  # equal to `gate`
            h = torch.addmm(h, gated[-1], residual)
        here = torch.stack(inputs) + self.behind
        self.left = here if self.reach == 1 else torch.cat((self.left[..., self.channels :], here), -1)
        return h + self.at_end, torch.addmm(self.skip_bias, torch.cat(gated, 1), self.skips)

    def take(self, rows: Tensor) -> None:
        self.left, self.from_above = self.left.index_select(1, rows), self.from_above.index_select(2, rows)
        for each in (self.embeddings, self.above):
            each[:] = [part.index_select(0, rows) for part in each]
        for block in self.attention.values():
            block.take(rows)


class CachedAttention:
    """The keys and values of a `PixelAttention` at the pixels so far."""

    def __init__(self, block: PixelAttention, batch_size: int):
        self.block = block
        pixels, width = block.positions.shape
        none = block.positions.new_empty(batch_size, block.layer.heads, 0, width // block.layer.heads)
        self.keys, self.values = Growing(none, pixels, dim=2), Growing(none, pixels, dim=2)

    def next(self, h: Tensor) -> Tensor:
        """The block at the next pixel, ``(N, C)`` to the same."""
        token = (h + self.block.positions[self.keys.value.shape[2]]).unsqueeze(1)
        return self.block.layer.next(token, self.keys, self.values).squeeze(1)

    def take(self, rows: Tensor) -> None:
        self.keys.take(rows)
        self.values.take(rows)


def biases(embedding: nn.Module, given: Tensor) -> Tensor:
    """The embedding of ``given``, ``(B, C, H, W)``; of a vector or a label, ``(B, C, 1, 1)``."""
    embedded: Tensor = embedding(given)
    return embedded if embedded.dim() == 4 else embedded[..., None, None]


def as_matrix(layer: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a 1x1 convolution, for `F.linear`."""
    return layer.weight.flatten(1), bias_of(layer)


def bias_of(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()
