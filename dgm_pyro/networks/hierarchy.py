"""The deterministic paths of a deep hierarchy of latents: bottom-up from x to coarser features, and top-down with z.

Source: Child 2021 (VDVAE, arXiv 2011.10650), figure 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_pyro.checks import check_counts, check_network_options, check_type
from dgm_pyro.networks.convolutional import Block, ConvNet, image_shape
from dgm_pyro.registry import register

__all__ = ["BottomUp", "TopDownStep"]


@register
class BottomUp(nn.Module):
    """Images ``(B, *in_shape)`` to a tuple of features, ``(B, *shape)`` for each of ``out_shapes``.

    Args:
        in_shape: ``(C, H, W)``.
        out_shapes: shapes of the features, from the finest to the coarsest; each resolution is the one before it,
            halved any number of times.
        blocks: residual blocks at each shape.
        levels: the image takes integers 0 .. levels - 1, and is scaled to [-1, 1].
        dropout: probability, inside the residual blocks.

    >>> [a.shape[1:] for a in BottomUp((3, 8, 8), [(4, 8, 8), (4, 4, 4)])(torch.zeros(1, 3, 8, 8))]
    [torch.Size([4, 8, 8]), torch.Size([4, 4, 4])]
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shapes: Sequence[Sequence[int]],
        *,
        blocks: int = 1,
        levels: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.in_shape, self.given_shape, self.levels = image_shape(in_shape), None, levels
        check_type(out_shapes, Sequence, "out_shapes", "a sequence of shapes")
        self.out_shapes = tuple(image_shape(shape, "out_shapes") for shape in out_shapes)
        self.stages = nn.ModuleList(
            ConvNet(a, b, width=b[0], blocks=blocks, levels=None if i else levels, dropout=dropout)
            for i, (a, b) in enumerate(itertools.pairwise((self.in_shape, *self.out_shapes)))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(itertools.accumulate(self.stages, lambda h, stage: stage(h), initial=x))[1:]


@register
class TopDownStep(nn.Module):
    """h and z, ``(B, *in_shape)`` and ``(B, *given_shape)``, to the h of the next level, ``(B, *out_shape)``.

    A linear map of each pixel of z is added to h. It starts small, so that the sum over many levels stays bounded.

    Args:
        in_shape: shape of one h, ``(C, H, W)``.
        given_shape: shape of one z, of the same resolution.
        out_shape: shape of the next h, with the same number of channels and the same resolution or a finer one.
        blocks: residual blocks after z.
        dropout: probability, inside the blocks.

    >>> TopDownStep((4, 2, 2), (1, 2, 2), (4, 4, 4))(torch.zeros(3, 4, 2, 2), torch.zeros(3, 1, 2, 2)).shape
    torch.Size([3, 4, 4, 4])
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        given_shape: Sequence[int],
        out_shape: Sequence[int],
        *,
        blocks: int = 1,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_counts(blocks=blocks)
        check_network_options(dropout=dropout)
        self.in_shape, self.given_shape = image_shape(in_shape), image_shape(given_shape, "given_shape")
        self.out_shape = image_shape(out_shape, "out_shape")
        channels, *size = self.in_shape
        if list(self.given_shape[1:]) != size or self.out_shape[0] != channels:
            raise ValueError(
                f"in_shape is {tuple(in_shape)}, so given_shape must have its resolution and out_shape its channels, "
                f"got {tuple(given_shape)} and {tuple(out_shape)}"
            )
        self.latent = nn.Conv2d(self.given_shape[0], channels, 1)
        with torch.no_grad():
            self.latent.weight.mul_(0.3)
        self.blocks = nn.Sequential(*(Block(channels, dropout) for _ in range(blocks)))

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        h = self.blocks(h + self.latent(z))
        return h if self.in_shape == self.out_shape else F.interpolate(h, self.out_shape[1:], mode="nearest")
