r"""Denoisers: networks of a noisy x_t and the time t that predict noise, x_0 or v in the shape of x.

`DenoisingTransformer` (DiT) cuts the image into patches and reads them as a sequence. With c the embedding of time and
label, a layer is

.. math::
    h \leftarrow h + g_1\, \mathrm{attention}((1 + \gamma_1)\, \mathrm{norm}(h) + \beta_1), \qquad
    h \leftarrow h + g_2\, \mathrm{mlp}((1 + \gamma_2)\, \mathrm{norm}(h) + \beta_2),

where the gates g, scales :math:`\gamma` and shifts :math:`\beta` are a linear map of silu(c) that starts at zero
(adaLN-Zero), so every layer is initially the identity.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_pyro.checks import (
    as_shape,
    check_count,
    check_counts,
    check_network_options,
    check_number,
    check_sizes,
    check_type,
)
from dgm_pyro.networks.attention import SelfAttention
from dgm_pyro.networks.convolutional import patchify, unpatchify
from dgm_pyro.networks.mlp import InputEmbedding, activation_named
from dgm_pyro.registry import register

__all__ = ["DenoisingMLP", "DenoisingTransformer", "DenoisingUNet", "TimeEmbedding"]


class TimeEmbedding(nn.Module):
    """Time in [0, 1] to ``(B, out_features)``: sines and cosines of geometrically spaced frequencies, then two layers.

    Source: Ho et al. 2020 (DDPM), appendix B; Vaswani et al. 2017, section 3.5.
    """

    frequencies: Tensor

    def __init__(self, out_features: int, num_frequencies: int = 16, max_frequency: float = 1000.0):
        super().__init__()
        exponents = torch.linspace(0, 1, num_frequencies)
        self.register_buffer("frequencies", math.pi / 2 * max_frequency**exponents)
        self.layers = nn.Sequential(
            nn.Linear(2 * num_frequencies, out_features), nn.SiLU(), nn.Linear(out_features, out_features)
        )

    def forward(self, t: Tensor) -> Tensor:
        angles = t.unsqueeze(-1) * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], -1))


class Denoiser(nn.Module):
    """Base class of denoisers: the time and label embeddings.

    A label may be the null label ``num_classes``, which means "no label" (classifier-free guidance,
    Ho and Salimans 2021).
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        time_features: int,
        given_shape: Sequence[int] | None,
        num_classes: int | None,
        num_parameters: int,
        max_frequency: float,
    ):
        super().__init__()
        check_count(num_parameters, "num_parameters")
        check_number(max_frequency, "max_frequency", above=0)
        check_network_options(num_classes=num_classes)
        self.event_shape = as_shape(event_shape)
        self.out_shape = self.event_shape if num_parameters == 1 else torch.Size((num_parameters, *self.event_shape))
        self.num_classes = num_classes
        if num_classes is not None:
            given_shape = ()
        self.given_shape = None if given_shape is None else as_shape(given_shape, "given_shape")
        self.time = TimeEmbedding(time_features, max_frequency=max_frequency)
        self.embedding: InputEmbedding | None = None
        if self.given_shape is not None:
            self.embedding = InputEmbedding(
                self.given_shape, None if num_classes is None else num_classes + 1, time_features
            )

    def embed(self, t: Tensor, given: Tensor | None) -> Tensor:
        """The embedding of times, ``(B,)``, and of ``given``: ``(B, F)``, or ``(1, F)`` for one time, expanded."""
        # A chain has one time for all data, expanded with stride 0. Its embedding is computed once, and broadcasts.
        embedded = self.time(t[:1] if t.dim() > 0 and t.stride(0) == 0 else t)
        if self.embedding is not None and given is not None:
            embedded = embedded + self.embedding(given)
        return embedded


@register
class DenoisingMLP(Denoiser):
    """Layers as wide as ``hidden``, an input and an output of the data's size; time enters every layer.

    Args:
        event_shape: shape of one x.
        hidden: widths of the hidden layers.
        given_shape: shape of one ``given``, for a conditional denoiser.
        num_classes: number of classes, where ``given`` is a label.
        num_parameters: P per feature: 1 for a diffusion that predicts a value, L for one that predicts L levels.
        activation: one of relu, silu, gelu, tanh, elu.
        max_frequency: highest frequency of the sines of time. Lower ones, such as 30, make the network smoother in
            time, which is better in continuous time, above all for the solver of the probability flow.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        hidden: Sequence[int] = (256, 256, 256),
        *,
        given_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        num_parameters: int = 1,
        activation: str = "silu",
        max_frequency: float = 1000.0,
    ):
        check_sizes(hidden=hidden)  # at least one width, for time to enter
        hidden = as_shape(hidden)
        features = hidden[0]
        super().__init__(event_shape, features, given_shape, num_classes, num_parameters, max_frequency)
        numel = math.prod(self.event_shape)
        widths = [numel, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.modulations = nn.ModuleList(nn.Linear(features, b) for b in hidden)
        self.last = nn.Linear(widths[-1], num_parameters * numel)
        self.activation = activation_named(activation)

    def forward(self, x: Tensor, t: Tensor, given: Tensor | None = None) -> Tensor:
        """``(B, *event_shape)`` and times in [0, 1], ``(B,)``, to ``(B, *event_shape)``, P first if > 1."""
        embedded = self.activation(self.embed(t, given))
        h = x.reshape(x.shape[0], math.prod(self.event_shape))  # not len(), which would fix the batch size in an export
        for i, (layer, modulation) in enumerate(zip(self.layers, self.modulations, strict=True)):
            new = self.activation(layer(h) + modulation(embedded))
            h = new + h if i > 0 and new.shape == h.shape else new
        return self.last(h).reshape(-1, *self.out_shape)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group normalization; the time embedding scales and shifts between them.

    It does so after the normalization, which would remove a shift of whole channels (Dhariwal and Nichol 2021, section
    3).
    """

    def __init__(self, in_channels: int, out_channels: int, time_features: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(min(8, in_channels), in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(time_features, 2 * out_channels)
        self.norm2 = nn.GroupNorm(min(8, out_channels), out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.modulation(embedded)[:, :, None, None].chunk(2, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return self.skip(x) + self.conv2(self.dropout(F.silu(h * (1 + scale) + shift)))


class AttentionBlock(nn.Module):
    """h + attention(norm(h)) over the pixels of an image, initially the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm, self.attention = nn.GroupNorm(8, width), SelfAttention(width, heads)
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.attention.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x).flatten(2).mT).mT.unflatten(2, x.shape[2:])


@register
class DenoisingUNet(Denoiser):
    """A small U-Net: residual blocks down, across and up, halving the resolution between entries of ``channels``.

    Args:
        event_shape: ``(C, H, W)``; H and W must be divisible by patch_size * 2 ** (len(channels) - 1).
        channels: width at each resolution, multiples of 8.
        given_shape, num_classes, num_parameters, max_frequency: as in `DenoisingMLP`.
        dropout: probability, inside the residual blocks.
        heads: number of attention heads over the pixels of the lowest resolution; 0 for no attention.
        fourier: n of the features sin(2^n pi x) and cos(2^n pi x) that the network reads in addition to x, such as
            (7, 8) for 256 levels. They distinguish neighboring levels.
        patch_size: height and width of the patches that are one pixel of the highest resolution. With 2, a step takes a
            quarter of the time, for the same channels.

    Source: Ho et al. 2020 (DDPM), appendix B, with attention at the lowest resolution alone; Kingma et al. 2021 (VDM,
    arXiv 2107.00630), appendix C, for the Fourier features; Hoogeboom et al. 2023 (arXiv 2301.11093), section 3.3, for
    the patches.
    """

    fourier: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        channels: Sequence[int] = (48, 96),
        *,
        given_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        num_parameters: int = 1,
        dropout: float = 0.0,
        max_frequency: float = 1000.0,
        heads: int = 0,
        fourier: Sequence[int] = (),
        patch_size: int = 1,
    ):
        if len(as_shape(event_shape)) != 3:
            raise ValueError(f"event_shape must be (C, H, W) for a U-Net, got {event_shape}: use DenoisingMLP")
        check_sizes(channels=channels)
        check_counts(patch_size=patch_size)
        check_count(heads, "heads", at_least=0)
        check_type(fourier, Sequence, "fourier", "a sequence of integers")
        exponents = [check_count(n, "fourier", at_least=0) for n in fourier]
        check_network_options(dropout=dropout)
        if any(width % 8 for width in channels):
            raise ValueError(f"channels must be positive multiples of 8, got {tuple(channels)}")
        depth, *sides = event_shape
        if any(side % patch_size for side in sides):
            raise ValueError(f"patch_size must divide H and W of {tuple(event_shape)}, got {patch_size}")
        if any(side // patch_size % 2 ** (len(channels) - 1) for side in sides):
            of_patches = f" in patches of {patch_size}x{patch_size}" if patch_size > 1 else ""
            raise ValueError(
                f"event_shape {tuple(event_shape)}{of_patches} cannot be halved {len(channels) - 1} times: give fewer "
                "channels"
            )
        features = 2 * channels[-1]
        super().__init__(event_shape, features, given_shape, num_classes, num_parameters, max_frequency)
        self.register_buffer("fourier", math.pi * 2.0 ** torch.tensor(exponents).reshape(-1, 1, 1, 1), persistent=False)
        self.patch_size = patch_size
        self.first = nn.Conv2d((1 + 2 * len(exponents)) * depth * patch_size**2, channels[0], 3, padding=1)
        ins = [channels[0], *channels[:-1]]
        self.down = nn.ModuleList(ResidualBlock(a, b, features, dropout) for a, b in zip(ins, channels, strict=True))
        self.middle = ResidualBlock(channels[-1], channels[-1], features, dropout)
        self.attention = AttentionBlock(channels[-1], heads) if heads > 0 else nn.Identity()
        outs = [channels[0], *channels[:-1]]
        self.up = nn.ModuleList(ResidualBlock(2 * b, a, features, dropout) for a, b in zip(outs, channels, strict=True))
        self.last = nn.Sequential(
            nn.GroupNorm(8, channels[0]),
            nn.SiLU(),
            nn.Conv2d(channels[0], num_parameters * depth * patch_size**2, 3, padding=1),
        )

    def forward(self, x: Tensor, t: Tensor, given: Tensor | None = None) -> Tensor:
        """``(B, C, H, W)`` and times in [0, 1], ``(B,)``, to ``(B, C, H, W)``, P first if > 1."""
        embedded = F.silu(self.embed(t, given))
        if len(self.fourier) > 0:
            angles = (self.fourier * x.unsqueeze(1)).flatten(1, 2)
            x = torch.cat([x, angles.sin(), angles.cos()], 1)
        h = self.first(patchify(x, self.patch_size))
        kept = []
        for i, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if i > 0 else h, embedded)
            kept.append(h)
        h = self.attention(self.middle(h, embedded))
        for i in reversed(range(len(self.up))):
            h = self.up[i](torch.cat([h, kept[i]], 1), embedded)
            if i > 0:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        return unpatchify(self.last(h), self.patch_size).reshape(-1, *self.out_shape)


class TransformerBlock(nn.Module):
    """A layer of `DenoisingTransformer`, ``(N, T, width)`` to the same; initially the identity."""

    def __init__(self, width: int, heads: int, time_features: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention, self.dropout = SelfAttention(width, heads), nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = _zero_initialized(nn.Linear(time_features, 6 * width))

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedded).unsqueeze(1).chunk(6, -1)
        h = h + gate1 * self.dropout(self.attention(self.norm(h) * (1 + scale1) + shift1))
        return h + gate2 * self.dropout(self.mlp(self.norm(h) * (1 + scale2) + shift2))


def _zero_initialized(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def places(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of the row, and of the column, of each place of a grid, ``(rows * columns, width)``."""
    frequencies = 10_000.0 ** -torch.linspace(0, 1, width // 4 + 1)[:-1]

    def code(size: int) -> Tensor:
        angles = torch.arange(size).unsqueeze(-1) * frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)

    row, column = code(rows).unsqueeze(1), code(columns).unsqueeze(0)
    return torch.cat([row.expand(-1, columns, -1), column.expand(rows, -1, -1)], -1).flatten(0, 1)


@register
class DenoisingTransformer(Denoiser):
    """A diffusion transformer (DiT): attention over the patches of an image, modulated by time and label (adaLN-Zero).

    Time and memory grow with the square of the number of patches. Initially, the network returns zero.

    Args:
        event_shape: ``(C, H, W)``.
        patch_size: height and width of a patch, which must divide H and W.
        width: width of the embedding of a patch; a multiple of 4 and of ``heads``.
        layers: number of layers.
        heads: number of attention heads per layer, each on a part of the width.
        given_shape, num_classes, num_parameters, max_frequency: as in `DenoisingMLP`.
        dropout: share of each layer's contribution that is dropped in training.

    Source: Peebles and Xie 2023 (arXiv 2212.09748), section 3.2.
    """

    places: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        patch_size: int = 4,
        width: int = 128,
        layers: int = 6,
        heads: int = 4,
        *,
        given_shape: Sequence[int] | None = None,
        num_classes: int | None = None,
        num_parameters: int = 1,
        dropout: float = 0.0,
        max_frequency: float = 1000.0,
    ):
        if len(as_shape(event_shape)) != 3:
            raise ValueError(f"event_shape must be (C, H, W) for a DiT, got {event_shape}: use DenoisingMLP")
        check_counts(patch_size=patch_size, width=width, layers=layers, heads=heads)
        check_network_options(dropout=dropout)
        depth, height, across = event_shape
        if height % patch_size or across % patch_size:
            raise ValueError(f"patch_size must divide H and W of {tuple(event_shape)}, got {patch_size}")
        if width % 4:
            raise ValueError(f"width must be a multiple of 4, for the sines of rows and columns, got {width}")
        super().__init__(event_shape, width, given_shape, num_classes, num_parameters, max_frequency)
        self.patch_size = patch_size
        self.register_buffer("places", places(height // patch_size, across // patch_size, width), persistent=False)
        self.first = nn.Linear(depth * patch_size**2, width)
        self.layers = nn.ModuleList(TransformerBlock(width, heads, width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = _zero_initialized(nn.Linear(width, 2 * width))
        self.last = _zero_initialized(nn.Linear(width, num_parameters * depth * patch_size**2))

    def forward(self, x: Tensor, t: Tensor, given: Tensor | None = None) -> Tensor:
        """``(B, C, H, W)`` and times in [0, 1], ``(B,)``, to ``(B, C, H, W)``, P first if > 1."""
        embedded = F.silu(self.embed(t, given))
        patches = patchify(x, self.patch_size)
        h = self.first(patches.flatten(2).mT) + self.places
        for layer in self.layers:
            h = layer(h, embedded)
        shift, scale = self.modulation(embedded).unsqueeze(1).chunk(2, -1)
        h = self.last(self.norm(h) * (1 + scale) + shift)
        return unpatchify(h.mT.unflatten(2, patches.shape[2:]), self.patch_size).reshape(-1, *self.out_shape)
