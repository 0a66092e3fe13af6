"""Sizes of networks of images: widths, depths and latents for a resolution, channels and a number of images.

Below `CONVOLUTIONS_FROM` pixels a side an MLP is no larger than a convolutional network, and as good. Above, it has too
many weights, one for every pair of a pixel and a unit. Convolutions share weights among positions, so the number of
weights depends on the widths alone. Stages halve the resolution until at most 8 pixels a side are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dgm_pyro.checks import as_shape, check_count

__all__ = ["ImageSizes", "image_sizes"]

CONVOLUTIONS_FROM = 16
COARSEST = 8
WIDEST = 4
"""Largest ratio of a width to the first; widths double from stage to stage up to it."""


@dataclass(frozen=True)
class ImageSizes:
    """The sizes that `dgm.build` uses for images.

    Attributes:
        widths: channels of the stages of a convolutional network, each at half the resolution of the one before.
        unet: channels of a U-Net, the first at the full resolution.
        patch_size, patch_width: patch size and width of a diffusion transformer, equal to the pixels of the U-Net's
            lowest resolution and to their width.
        latent_size: number of features of z.
        layers, kernel_size: layers and kernel size of a PixelCNN.
        dropout: share of the features that are dropped in training, larger for fewer images.
    """

    widths: tuple[int, ...]
    unet: tuple[int, ...]
    patch_size: int
    patch_width: int
    latent_size: int
    layers: int
    kernel_size: int
    dropout: float

    @property
    def reach(self) -> int:
        """Number of pixels to the left, and of rows above, in the receptive field of a PixelCNN."""
        return self.layers * (self.kernel_size // 2)


def is_large(shape: Sequence[int]) -> bool:
    """Whether x are images, ``(C, H, W)``, that are large enough for convolutions."""
    return len(shape) == 3 and min(shape[1:]) >= CONVOLUTIONS_FROM


def image_sizes(shape: Sequence[int], num_data: int) -> ImageSizes:
    """Sizes for images of a shape.

    Args:
        shape: ``(C, H, W)``, at least 16 pixels a side.
        num_data: number of training images.

    >>> image_sizes((1, 28, 28), 50_000).widths, image_sizes((3, 64, 64), 50_000).widths
    ((32, 64), (48, 96, 192))
    """
    check_count(num_data, "num_data")
    if not is_large(as_shape(shape, "shape")):
        raise ValueError(
            f"shape must be (C, H, W) with at least {CONVOLUTIONS_FROM} pixels a side, got {tuple(shape)}: use MLP"
        )
    side = max(shape[1:])
    halvings = math.ceil(math.log2(side / COARSEST))
    first = 32 if shape[0] == 1 else 48
    exact = next(k for k in reversed(range(halvings + 1)) if all(size % 2**k == 0 for size in shape[1:]))
    kernel_size = 3 if side <= CONVOLUTIONS_FROM else 5
    return ImageSizes(
        widths=_doubled(first, halvings),
        unet=_doubled(first, exact + 1),
        patch_size=2**exact,
        patch_width=first * WIDEST,
        latent_size=16 * 2**halvings,
        layers=max(8, math.ceil(side / 2 / (kernel_size // 2))),
        kernel_size=kernel_size,
        dropout=0.2 if num_data < 5_000 else 0.1 if num_data < 100_000 else 0.0,
    )


def _doubled(first: int, stages: int) -> tuple[int, ...]:
    return tuple(first * min(2**i, WIDEST) for i in range(stages))
