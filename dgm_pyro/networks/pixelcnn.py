r"""PixelCNN: a convolutional network in which every pixel sees only those above it and, in its row, to its left.

A masked square kernel would never see some of the pixels to the upper right. Two stacks of convolutions see them all:
the *vertical* stack reads the rows above, the *horizontal* stack the pixels to the left and the vertical stack. Both
start from an image moved by one pixel (down, and to the right), and from there on may see their own position; kernels
that reach up and left only are plain kernels on an image padded on these sides.

Every layer is gated and sees the context h through biases (van den Oord et al. 2016, eq. 4):

.. math::
    y = \tanh(W_1 * x + V_1 h) \odot \sigma(W_2 * x + V_2 h)

Source: van den Oord et al. 2016 (Conditional image generation with PixelCNN decoders, arXiv 1606.05328), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_pyro.networks.masked import check_sizes
from dgm_pyro.networks.mlp import Context, given_shape_of, to_unit
from dgm_pyro.registry import register


class GatedLayer(nn.Module):
    """One layer of both stacks: (vertical, horizontal, context) to (vertical, horizontal, skip)."""

    def __init__(self, channels: int, kernel_size: int, context: Context | None, dropout: float):
        super().__init__()
        self.reach = kernel_size // 2
        self.context = context
        self.dropout = nn.Dropout(dropout)
        self.vertical = nn.Conv2d(channels, 2 * channels, (self.reach + 1, kernel_size))
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, self.reach + 1))
        self.across = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.out = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, v: Tensor, h: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        a = self.vertical(F.pad(self.dropout(v), (self.reach, self.reach, self.reach, 0)))
        b = self.horizontal(F.pad(self.dropout(h), (self.reach, 0, 0, 0))) + self.across(a)
        if self.context is not None and context is not None:
            bias_a, bias_b = self.context(context)[..., None, None].chunk(2, 1)
            a, b = a + bias_a, b + bias_b
        residual, skip = self.out(gate(b)).chunk(2, 1)
        return gate(a), h + residual, skip


@register
class PixelCNN(nn.Module):
    """``(B, 1, H, W)`` to ``(B, P, 1, H, W)``: the P parameters of each pixel, from the pixels before it alone.

    Pixels are ordered row by row. After L layers of kernel size k, a pixel sees 1 + L (k // 2) pixels to the left, as
    many rows up, and in these L (k // 2) columns to either side: choose L and k so that the image is covered.

    Args:
        in_shape: shape of one image, ``(1, H, W)``.
        num_parameters: P, how many parameters a pixel has.
        channels: width of each stack.
        layers: L, how many gated layers.
        kernel_size: k, odd.
        context_shape: shape of one context, for ``network(x, context)``.
        num_classes: number of class labels, for a context of labels.
        levels: x takes the integers 0 .. levels - 1, and is scaled to [-1, 1].
        dropout: share of the features that are dropped in training.

    Attributes:
        order: the flat indices of the pixels, first to last.

    Raises:
        ValueError: the images have several channels, the kernel size is even, or a size is no positive integer.

    >>> PixelCNN((1, 4, 4), 3, channels=8, layers=2)(torch.zeros(5, 1, 4, 4)).shape
    torch.Size([5, 3, 1, 4, 4])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        num_parameters: int,
        channels: int = 32,
        layers: int = 8,
        kernel_size: int = 3,
        *,
        context_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        levels: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        if len(in_shape) != 3 or in_shape[0] != 1:
            raise ValueError(
                f"in_shape is {tuple(in_shape)}, but PixelCNN models images of one channel, (1, H, W): "
                "use MADE for other shapes"
            )
        check_sizes(in_shape=in_shape, num_parameters=num_parameters, channels=channels, layers=layers)
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3, got {kernel_size}")
        self.in_shape, self.context_shape = given_shape_of(in_shape, context_shape, num_classes)
        self.given_shape = self.in_shape if self.context_shape is None else (self.in_shape, self.context_shape)
        self.num_classes, self.levels = num_classes, levels
        self.order = tuple(range(self.in_shape.numel()))

        self.first = nn.Conv2d(1, channels, 1)
        self.layers = nn.ModuleList(
            GatedLayer(
                channels,
                kernel_size,
                None if self.context_shape is None else Context(self.context_shape, num_classes, 4 * channels),
                dropout,
            )
            for _ in range(layers)
        )
        self.last = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 1),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(2 * channels, num_parameters, 1),
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.first(to_unit(x, self.levels).to(self.first.weight.dtype))
        v, h = F.pad(x, (0, 0, 1, -1)), F.pad(x, (1, -1, 0, 0))
        skips = torch.zeros_like(x)
        for layer in self.layers:
            v, h, skip = layer(v, h, context)
            skips = skips + skip
        return self.last(skips).unsqueeze(2)


def gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()
