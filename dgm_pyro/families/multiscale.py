r"""Multiscale flows: p(x) of images by a change of variables, from the finest scale to the coarsest.

From x to z, each scale squeezes the image (2x2 pixels become channels), applies couplings, and splits the channels: one
half, v, is factored out, and the other half, h, continues to the next scale. The factored-out half is Normal given h,

.. math::
    p(v \mid h) = N(\mu(h), \sigma(h)^2), \qquad z = (v - \mu(h)) / \sigma(h) \sim N(0, I),

which is one more affine coupling. So a multiscale flow is an ordinary `Flow` of the base N(0, I), made of the parts in
`networks.multiscale`, and z has the shape of x, ordered from the finest scale to the coarsest.

`convolutional_realnvp`, `glow` and `flow_plus_plus` differ in their couplings and in the layers between them.
`convolutional_dequantizer` is a q(u | x) with which `Dequantized` makes them models of integers.

Sources: Dinh et al. 2017 (RealNVP, arXiv 1605.08803), section 3; Kingma and Dhariwal 2018 (Glow, arXiv 1807.03039); Ho
et al. 2019 (Flow++, arXiv 1902.00275).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from dgm_pyro.checks import check_count
from dgm_pyro.families.dequantized import check_resolution, contracted
from dgm_pyro.families.flow import Flow, GivenArguments, embedding_of, end_of, start_near_zero
from dgm_pyro.networks.bijections import (
    ActNorm,
    Affine,
    Bijection,
    Coupling,
    LULinear,
    Univariate,
)
from dgm_pyro.networks.convolutional import ConvNet, image_shape
from dgm_pyro.networks.multiscale import LogisticMixture, Partial, PerPixel, Squeeze, squeezed

__all__ = ["convolutional_dequantizer", "convolutional_realnvp", "flow_plus_plus", "glow"]

MOST_SCALES = 3
# Bounds the log-scale of an affine coupling, because dozens of couplings follow each other.
BOUND = 2.0
Masked = Callable[[Sequence[int], Sequence[bool], Univariate], Coupling]
"""A function from the channels that pass and a univariate map to a coupling of images."""


def convolutional_realnvp(
    event_shape: Sequence[int],
    *,
    scales: int | None = None,
    layers: int = 6,
    width: int = 64,
    blocks: int = 1,
    given_shape: Sequence[int] | None = None,
    given_levels: int | None = None,
    num_classes: int | None = None,
    unit_cube: bool = False,
) -> Flow:
    """RealNVP of images: alternating affine couplings of checkerboards and of channels (Dinh et al. 2017).

    The checkerboard is one of the 2x2 blocks that are squeezed, so its networks work at half of the resolution. An
    `ActNorm` per channel replaces the paper's batch normalization.

    Args:
        event_shape: shape of one x, ``(C, H, W)``.
        scales: number of scales; each halves height and width, which must be even. Default: as many as possible, at
            most three, down to two pixels.
        layers: number of couplings at each scale.
        width: channels of the networks.
        blocks: residual blocks of each network.
        given_shape: shape of one ``given``, for a conditional flow; a network with one hidden layer embeds it for all
            couplings.
        given_levels: ``given`` takes the integers 0 .. given_levels - 1.
        num_classes: number of classes, where ``given`` is a label.
        unit_cube: whether x lies in the unit cube, as `Dequantized` needs.

    Raises:
        ValueError: x is no image, or its height or width is odd.

    >>> convolutional_realnvp((1, 4, 4), layers=2, width=4).sample(5).shape
    torch.Size([5, 1, 4, 4])
    """

    def step(shape: Sequence[int], i: int, masked: Masked) -> list[Bijection]:
        depth = shape[0]
        checkerboard = [(channel % 4 in (0, 3)) == bool(i % 2) for channel in range(depth)]
        passes = checkerboard if i % 4 < 2 else _passing_half(depth, i)
        return [PerPixel(shape, ActNorm(depth)), masked(shape, passes, Affine(BOUND))]

    reads = (given_shape, given_levels, num_classes)
    return _multiscale(event_shape, step, scales, layers, width, blocks, reads, unit_cube)


def glow(
    event_shape: Sequence[int],
    *,
    scales: int | None = None,
    layers: int = 8,
    width: int = 64,
    blocks: int = 1,
    given_shape: Sequence[int] | None = None,
    given_levels: int | None = None,
    num_classes: int | None = None,
    unit_cube: bool = False,
) -> Flow:
    """Glow: steps of ActNorm, an invertible 1x1 convolution and an affine coupling (Kingma and Dhariwal 2018).

    The convolution is parameterized by LU factors and starts as the identity. The halves of the couplings alternate.

    Args: as `convolutional_realnvp`.

    >>> glow((3, 4, 4), layers=1, width=4).log_prob(torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2])
    """
    reads = (given_shape, given_levels, num_classes)
    return _multiscale(event_shape, partial(_glow_step, Affine(BOUND)), scales, layers, width, blocks, reads, unit_cube)


def flow_plus_plus(
    event_shape: Sequence[int],
    *,
    scales: int | None = None,
    layers: int = 8,
    width: int = 64,
    blocks: int = 1,
    components: int = 4,
    given_shape: Sequence[int] | None = None,
    given_levels: int | None = None,
    num_classes: int | None = None,
    unit_cube: bool = False,
) -> Flow:
    """Flow++: the steps of `glow` with couplings by mixtures of logistics (Ho et al. 2019), without their attention.

    Sampling inverts each mixture by bisection.

    Args: as `convolutional_realnvp`, and ``components``, the number of logistics of each mixture.
    """
    step = partial(_glow_step, LogisticMixture(components, BOUND))
    reads = (given_shape, given_levels, num_classes)
    return _multiscale(event_shape, step, scales, layers, width, blocks, reads, unit_cube)


def convolutional_dequantizer(event_shape: Sequence[int], levels: int, *, width: int = 32, blocks: int = 1) -> Flow:
    """q(u | x) of images for variational dequantization: `dequantizer` with a convolutional network.

    Args:
        event_shape: shape of one x, ``(C, H, W)``.
        levels: x takes the integers 0 .. levels - 1.
        width, blocks: channels and residual blocks of the network.

    Raises:
        ValueError: ``levels`` are too many for torch's default dtype.

    >>> import dgm_pyro as dgm
    >>> shape = (1, 4, 4)
    >>> flow = dgm.multiscale.glow(shape, layers=1, width=4, unit_cube=True)
    >>> program = dgm.Dequantized(flow, 256, dgm.multiscale.convolutional_dequantizer(shape, 256, width=4))
    >>> program.sample(2).shape
    torch.Size([2, 1, 4, 4])
    """
    shape = image_shape(event_shape, "event_shape")
    network = ConvNet(shape, shape, 2, width, blocks=blocks, levels=check_resolution(levels))
    return contracted(shape, network, network.last)


def _glow_step(univariate: Univariate, shape: Sequence[int], i: int, masked: Masked) -> list[Bijection]:
    depth = shape[0]
    coupling = masked(shape, _passing_half(depth, i), univariate)
    return [PerPixel(shape, ActNorm(depth)), PerPixel(shape, LULinear(depth)), coupling]


def _passing_half(depth: int, i: int) -> list[bool]:
    """Whether each channel passes the i-th coupling unchanged: the last half and the first half alternate."""
    return [(channel < depth // 2) == bool(i % 2) for channel in range(depth)]


def _coupling(
    shape: Sequence[int],
    passes: Sequence[bool],
    univariate: Univariate,
    *,
    width: int,
    blocks: int,
    given_shape: Sequence[int] | None,
) -> Coupling:
    depth, *size = shape
    seen, moving = (sum(passes), *size), (depth - sum(passes), *size)
    network = ConvNet(seen, moving, univariate.num_parameters, width, blocks=blocks, given_shape=given_shape)
    start_near_zero(network.last)
    return Coupling([each for each in passes for _ in range(math.prod(size))], univariate, network)


def _multiscale(
    event_shape: Sequence[int],
    step: Callable[[Sequence[int], int, Masked], list[Bijection]],
    scales: int | None,
    layers: int,
    width: int,
    blocks: int,
    reads: GivenArguments,
    unit_cube: bool,
) -> Flow:
    shape = image_shape(event_shape, "event_shape")
    size = shape.numel()
    embedding, features = embedding_of(reads, (check_count(width, "width"),))
    masked: Masked = partial(_coupling, width=width, blocks=blocks, given_shape=features)
    scales = _num_scales(shape) if scales is None else check_count(scales, "scales")
    if any(side % 2**scales for side in shape[1:]):
        raise ValueError(
            f"height and width are halved at each of {scales} scales, but images are {shape[1]}x{shape[2]}: crop or "
            "pad them, or give fewer scales"
        )
    inward: list[Bijection] = []
    for scale in range(scales):
        inward.append(Squeeze(shape))
        shape = squeezed(shape)
        for i in range(check_count(layers, "layers")):
            inward += step(shape, i, masked)
        if scale < scales - 1:
            inward.append(masked(shape, _passing_half(shape[0], 0), Affine(BOUND)))
            shape = torch.Size((shape[0] // 2, *shape[1:]))
    return Flow(
        event_shape, [*(Partial(size, each) for each in reversed(inward)), *end_of(unit_cube)], embedding=embedding
    )


def _num_scales(shape: Sequence[int]) -> int:
    """How often height and width can be halved, down to two pixels: at least once, at most `MOST_SCALES` times."""
    scales, (height, width) = 1, shape[1:]
    while scales < MOST_SCALES and height % 4 == 0 and width % 4 == 0 and min(height, width) > 4:
        scales, height, width = scales + 1, height // 2, width // 2
    return scales
