"""Convolutional networks between images and vectors, for encoders and likelihoods, and from images to images.

All are stacks of residual blocks, and change the resolution by strided convolutions. `ConvEncoder` and `ConvDecoder`
halve sizes to `ceil(n / 2)`, so any size works: 28 becomes 14, 7. `ConvNet` preserves positions.

Source: He et al. 2016 (arXiv 1603.05027) for the blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_pyro.checks import as_shape, check_count, check_counts, check_network_options, check_sizes
from dgm_pyro.networks.mlp import InputEmbedding, check_given, input_shapes, to_unit
from dgm_pyro.registry import register

__all__ = ["ConvDecoder", "ConvEncoder", "ConvNet"]


class Block(nn.Module):
    """x + conv(act(conv(act(x)))), initially the identity."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.dropout(F.silu(self.conv1(F.silu(x)))))


@register
class ConvEncoder(nn.Module):
    """Images ``(B, C, H, W)`` to ``(B, out_features)``, with an optional ``given`` added before the last layer.

    Args:
        in_shape: ``(C, H, W)``.
        out_features: P * numel for a conditional's network.
        channels: widths; each entry halves the resolution.
        blocks: residual blocks at each resolution.
        width: width of the layer before the last.
        given_shape: shape of one ``given``, for ``network(image, given)``.
        num_classes: number of class labels, where ``given`` is one.
        levels: the image takes integers 0 .. levels - 1, and is scaled to [-1, 1].
        dropout: probability, inside the residual blocks and before the last layer.

    >>> import torch, dgm_pyro as dgm
    >>> dgm.networks.ConvEncoder((1, 7, 7), 10)(torch.zeros(2, 1, 7, 7)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_features: int,
        channels: Sequence[int] = (32, 64),
        *,
        blocks: int = 1,
        width: int = 256,
        given_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        levels: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        heights, widths = sizes(in_shape, channels, "in_shape")
        check_counts(out_features=out_features, blocks=blocks, width=width)
        check_network_options(levels=levels, num_classes=num_classes, dropout=dropout)
        self.in_shape, self.given_shape = input_shapes(in_shape, given_shape, num_classes)
        self.num_classes, self.levels = num_classes, levels
        stages: list[nn.Module] = []
        for a, b in itertools.pairwise((in_shape[0], *channels)):
            stages += [nn.Conv2d(a, b, 3, stride=2, padding=1), *(Block(b, dropout) for _ in range(blocks))]
        self.stages = nn.Sequential(*stages, nn.SiLU(), nn.Flatten())
        self.first = nn.Linear(channels[-1] * heights[-1] * widths[-1], width)
        self.embedding = None if self.given_shape is None else InputEmbedding(self.given_shape, num_classes, width)
        self.last = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, out_features))

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        check_given(self, given)
        h = self.first(self.stages(to_unit(x, self.levels).to(self.first.weight.dtype)))
        return self.last(h if self.embedding is None else h + self.embedding(given))


@register
class ConvDecoder(nn.Module):
    """Vectors ``(B, *in_shape)`` to ``(B, P, C, H, W)``, with an optional ``given`` as a second input.

    Args:
        in_shape: shape of one input, such as ``(16,)`` for z; ``()`` for a class label.
        out_shape: ``(C, H, W)``.
        num_parameters: P of the conditional, its parameters per feature.
        channels: widths, from the finest resolution to the coarsest, as in `ConvEncoder`.
        blocks: residual blocks at each resolution below the full one.
        given_shape: shape of one ``given``, for ``network(input, given)``.
        num_classes: number of class labels; of the input if ``in_shape`` is ``()``, else of ``given``.
        levels: the input takes integers 0 .. levels - 1, and is scaled to [-1, 1].
        dropout: probability, inside the residual blocks.

    >>> import torch, dgm_pyro as dgm
    >>> dgm.networks.ConvDecoder((5,), (1, 7, 7), num_parameters=2)(torch.zeros(3, 5)).shape
    torch.Size([3, 2, 1, 7, 7])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        num_parameters: int = 1,
        channels: Sequence[int] = (32, 64),
        *,
        blocks: int = 1,
        given_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        levels: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        heights, widths = sizes(out_shape, channels, "out_shape")
        check_counts(num_parameters=num_parameters, blocks=blocks)
        check_network_options(levels=levels, num_classes=num_classes, dropout=dropout)
        label_in = as_shape(in_shape, "in_shape") == ()
        self.in_shape, self.given_shape = input_shapes(in_shape, given_shape, None if label_in else num_classes)
        self.num_classes = num_classes
        self.coarsest = (channels[-1], heights[-1], widths[-1])
        features = math.prod(self.coarsest)
        self.first = InputEmbedding(self.in_shape, num_classes if label_in else None, features, levels)
        self.embedding = (
            None
            if self.given_shape is None
            else InputEmbedding(self.given_shape, None if label_in else num_classes, features)
        )
        stages: list[nn.Module] = []
        for i in reversed(range(len(channels))):
            finer = channels[i - 1] if i > 0 else max(8, channels[0] // 2)
            # A kernel of 4 covers every output twice; of odd sizes the last row and column are cropped.
            crop = (2 * heights[i + 1] - heights[i], 2 * widths[i + 1] - widths[i])
            up = nn.ConvTranspose2d(channels[i], finer, 4, stride=2, padding=1)
            stages += [*(Block(channels[i], dropout) for _ in range(blocks)), nn.SiLU(), up]
            stages += [nn.ZeroPad2d((0, -crop[1], 0, -crop[0]))] if any(crop) else []
        last = nn.Conv2d(max(8, channels[0] // 2), num_parameters * out_shape[0], 3, padding=1)
        self.stages = nn.Sequential(*stages, nn.SiLU(), last)
        self.out_shape = torch.Size((num_parameters, *out_shape))

    def forward(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        check_given(self, given)
        h = self.first(z) if self.embedding is None else self.first(z) + self.embedding(given)
        return self.stages(h.unflatten(1, self.coarsest)).unflatten(1, self.out_shape[:2])


@register
class ConvNet(nn.Module):
    """Images ``(B, *in_shape)`` to images ``(B, *out_shape)``, whose resolutions differ by a power of two.

    Args:
        in_shape: ``(C, H, W)``.
        out_shape: ``(C, H, W)`` of the output.
        num_parameters: P of a conditional, its parameters per feature; the output is then ``(B, P, *out_shape)``.
        width: channels of the residual blocks, which work at the lower resolution.
        blocks: number of residual blocks.
        given_shape: shape of one ``given``, for ``network(image, given)``: an image with the resolution of the blocks,
            or any other shape, whose embedding is added to each pixel.
        num_classes: number of class labels, where ``given`` is one.
        levels: the image takes integers 0 .. levels - 1, and is scaled to [-1, 1].
        dropout: probability, inside the residual blocks.

    Raises:
        ValueError: one resolution is not the other times a power of two.

    >>> import torch, dgm_pyro as dgm
    >>> dgm.networks.ConvNet((3, 8, 8), (5, 2, 2))(torch.zeros(7, 3, 8, 8)).shape
    torch.Size([7, 5, 2, 2])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        num_parameters: int | None = None,
        width: int = 64,
        *,
        blocks: int = 1,
        given_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        levels: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_counts(width=width, blocks=blocks)
        check_network_options(levels=levels, num_classes=num_classes, dropout=dropout)
        self.in_shape, self.given_shape = input_shapes(in_shape, given_shape, num_classes)
        self.num_classes, self.levels = num_classes, levels
        (depth, *size), (out_depth, *out_size) = image_shape(in_shape), image_shape(out_shape, "out_shape")
        halvings = round(math.log2(size[0] / out_size[0]))
        if [n / 2**halvings for n in size] != out_size:
            raise ValueError(
                f"out_shape is {tuple(out_shape)}, but in_shape {tuple(in_shape)}: give heights and widths that differ "
                "by one power of two"
            )
        self.out_shape = torch.Size(
            out_shape if num_parameters is None else (check_count(num_parameters, "num_parameters"), *out_shape)
        )
        down = [layer for _ in range(1, halvings) for layer in (nn.SiLU(), nn.Conv2d(width, width, 4, 2, 1))]
        self.first = nn.Sequential(nn.Conv2d(depth, width, *((4, 2, 1) if halvings > 0 else (3, 1, 1))), *down)
        self.embedding: nn.Module | None = None
        if self.given_shape is not None:
            image = len(self.given_shape) == 3 and list(self.given_shape[1:]) == min(size, out_size)
            self.embedding = (
                nn.Conv2d(self.given_shape[0], width, 1)
                if image
                else nn.Sequential(InputEmbedding(self.given_shape, num_classes, width), nn.Unflatten(1, (-1, 1, 1)))
            )
        # Without the norm, the output grows with the input, and a stack of couplings diverges.
        self.blocks = nn.Sequential(*(Block(width, dropout) for _ in range(blocks)), nn.GroupNorm(1, width), nn.SiLU())
        up = [layer for _ in range(-halvings) for layer in (nn.ConvTranspose2d(width, width, 4, 2, 1), nn.SiLU())]
        self.up, self.last = nn.Sequential(*up), nn.Conv2d(width, (num_parameters or 1) * out_depth, 3, padding=1)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        check_given(self, given)
        h = self.first(to_unit(x, self.levels).to(self.last.weight.dtype))
        if self.embedding is not None:
            h = h + self.embedding(given)
        return self.last(self.up(self.blocks(h))).unflatten(1, self.out_shape[:-2])


def image_shape(shape: Sequence[int], argument: str = "in_shape") -> torch.Size:
    """``shape`` as a torch.Size, if it is the shape of an image."""
    image = as_shape(shape, argument)
    if len(image) != 3:
        raise ValueError(f"{argument} must be that of an image, (C, H, W), got {tuple(image)}")
    return image


def sizes(shape: Sequence[int], channels: Sequence[int], argument: str) -> tuple[list[int], list[int]]:
    """Heights and widths of an image of ``shape`` at each resolution, the finest first."""
    if len(as_shape(shape, argument)) != 3:
        raise ValueError(f"{argument} must be (C, H, W) for a convolutional network, got {shape}: use MLP")
    check_sizes(channels=channels)
    heights, widths = [shape[1]], [shape[2]]
    for _ in channels:
        heights.append(math.ceil(heights[-1] / 2))
        widths.append(math.ceil(widths[-1] / 2))
    return heights, widths


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """Images ``(B, C, H, W)`` with their patches, P pixels a side, as pixels: ``(B, C P^2, H/P, W/P)``."""
    # F.pixel_unshuffle does the same, but returns an empty batch as it came.
    _, _, height, width = x.shape
    rows = x.unflatten(3, (width // patch_size, patch_size)).unflatten(2, (height // patch_size, patch_size))
    return rows.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The images ``(B, C, H, W)`` of `patchify`."""
    return patches.unflatten(1, (-1, patch_size, patch_size)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)
