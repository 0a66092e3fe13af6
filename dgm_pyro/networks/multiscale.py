r"""Bijections of images: the parts of a multiscale flow.

An image ``(C, H, W)`` is the vector of its features in that order, as for every `Bijection`. So bijections of vectors
act on images too, with the help of these:

- `Squeeze` moves blocks of 2x2 pixels to channels: four times the channels, half the resolution;
- `PerPixel` applies a bijection of C features to each pixel: ``PerPixel(shape, LULinear(C))`` is the invertible 1x1
  convolution, ``PerPixel(shape, ActNorm(C))`` the activation normalization per channel;
- `Partial` maps the last features and passes the others. A multiscale flow continues with half of the channels after
  each scale, and factors the others out;
- `Coupling` with a `ConvNet` of the channels that pass. In a squeezed image, halves of the channels are halves of the
  pixels or of the colors;
- `LogisticMixture`, a univariate map for couplings.

Sources: Dinh et al. 2017 (RealNVP, arXiv 1605.08803), section 3.6; Kingma and Dhariwal 2018 (Glow, arXiv 1807.03039);
Ho et al. 2019 (Flow++, arXiv 1902.00275).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_pyro.checks import check_count, check_type
from dgm_pyro.networks.bijections import Affine, Bijection, Univariate, bounded
from dgm_pyro.networks.convolutional import image_shape, patchify, unpatchify
from dgm_pyro.registry import register

__all__ = ["LogisticMixture", "Partial", "PerPixel", "Squeeze", "squeezed"]


@register
class Squeeze(Bijection):
    """z of shape (4 C, H / 2, W / 2) from x of shape (C, H, W): each block of 2x2 pixels becomes one pixel.

    Args:
        in_shape: ``(C, H, W)``, H and W even.
    """

    domain = codomain = "any"

    def __init__(self, in_shape: Sequence[int]):
        super().__init__()
        self.in_shape = image_shape(in_shape)
        self.out_shape = squeezed(self.in_shape)
        self.num_features = self.in_shape.numel()

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return unpatchify(z.reshape(-1, *self.out_shape), 2).flatten(1), z.new_zeros(z.shape[0])

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return patchify(x.reshape(-1, *self.in_shape), 2).flatten(1), x.new_zeros(x.shape[0])


@register
class PerPixel(Bijection):
    """One bijection of C features, applied to each pixel of an image.

    Args:
        in_shape: ``(C, H, W)``.
        bijection: a bijection of C features, without a ``given``.
    """

    def __init__(self, in_shape: Sequence[int], bijection: Bijection):
        super().__init__()
        self.in_shape = image_shape(in_shape)
        check_type(bijection, Bijection, "bijection", "a Bijection of dgm_pyro.networks")
        if bijection.num_features not in (None, self.in_shape[0]) or bijection.given_shape is not None:
            raise ValueError(
                f"bijection must be of the {self.in_shape[0]} channels of in_shape {tuple(self.in_shape)}, without a "
                f"given, but it has num_features={bijection.num_features} and given_shape={bijection.given_shape}"
            )
        self.bijection, self.num_features = bijection, self.in_shape.numel()
        self.domain, self.codomain = bijection.domain, bijection.codomain

    def _pixels(self, value: Tensor) -> Tensor:
        return value.reshape(-1, *self.in_shape).movedim(1, -1).reshape(-1, self.in_shape[0])

    def _map(self, map: Callable[..., Any], value: Tensor) -> tuple[Tensor, Tensor]:
        channels, *size = self.in_shape
        out, log_det = map(self._pixels(value))
        return out.reshape(-1, *size, channels).movedim(-1, 1).flatten(1), log_det.reshape(-1, math.prod(size)).sum(-1)

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(self.bijection, z)

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(self.bijection.inverse, x)

    def initialize(self, x: Tensor) -> None:
        self.bijection.initialize(self._pixels(x))


@register
class Partial(Bijection):
    """Another bijection applied to the last features; the features before pass unchanged.

    Args:
        num_features: D, the number of all features.
        bijection: a bijection of at most D features, whose domain and codomain are equal.
    """

    bijection: Bijection

    def __init__(self, num_features: int, bijection: Bijection):
        super().__init__()
        check_count(num_features, "num_features")
        check_type(bijection, Bijection, "bijection", "a Bijection of dgm_pyro.networks")
        moving = bijection.num_features
        if moving is None or moving > num_features or bijection.domain != bijection.codomain:
            raise ValueError(
                f"bijection must have at most {num_features} features and equal domain and codomain, but it has "
                f"num_features={moving}, domain={bijection.domain!r} and codomain={bijection.codomain!r}"
            )
        self.num_features, self.bijection, self.passing = num_features, bijection, num_features - moving
        self.domain = self.codomain = bijection.domain
        self.given_shape, self.num_classes = bijection.given_shape, bijection.num_classes

    def _map(self, map: Callable[..., Any], value: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        out, log_det = map(value[:, self.passing :], given)
        return torch.cat((value[:, : self.passing], out), -1), log_det

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(self.bijection, z, given)

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(self.bijection.inverse, x, given)

    def initialize(self, x: Tensor) -> None:
        self.bijection.initialize(x[:, self.passing :])


@register
class LogisticMixture(Univariate):
    r"""z = (logit F(x) - t) exp(-s), F the distribution function of a mixture of K logistics (Flow++, section 3.2).

    .. math::
        F(x) = \sum_k \pi_k\, \sigma((x - \mu_k) e^{-s_k})

    P = 2 + 3 K: t and s as in `Affine`, then logits of the weights, locations and raw log-scales. From z to x, F is
    inverted by bisection between the smallest and the largest inverse of its single logistics.

    Args:
        components: K.
        bound: the log-scales lie in (-bound, bound), for any output of a network.
    """

    def __init__(self, components: int = 4, bound: float = 5.0):
        super().__init__()
        self.components = check_count(components, "components")
        self.affine = Affine(bound)
        self.num_parameters = 2 + 3 * components

    def inverse(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        affine, mixture = self._split(raw)
        logit, log_slope = _logit_of_mixture(x, *mixture)
        z, more = self.affine.inverse(logit, affine)
        return z, log_slope + more

    def forward(self, z: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        affine, mixture = self._split(raw)
        logit, more = self.affine(z, affine)
        x = _x_of_logit(logit.detach(), *(part.detach() for part in mixture))
        # One Newton step, for the last digits and for the gradient of the inverse function.
        reached, log_slope = _logit_of_mixture(x, *mixture)
        x = x + (logit - reached) * torch.exp(-log_slope.detach())
        return x, more - _logit_of_mixture(x, *mixture)[1]

    def _split(self, raw: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        affine, mixture = raw.split((2, 3 * self.components), -2)
        weights, loc, raw_scale = mixture.unflatten(-2, (3, self.components)).unbind(-3)
        return affine, (weights.log_softmax(-2), loc, bounded(raw_scale, self.affine.bound))


def _logit_of_mixture(x: Tensor, log_weights: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """logit F(x), and the logarithm of its derivative."""
    u = (x.unsqueeze(-2) - loc) * torch.exp(-log_scale)
    below, above = F.logsigmoid(u), F.logsigmoid(-u)
    log_below, log_above = (log_weights + below).logsumexp(-2), (log_weights + above).logsumexp(-2)
    log_density = (log_weights + below + above - log_scale).logsumexp(-2)
    return log_below - log_above, log_density - log_below - log_above


def _x_of_logit(logit: Tensor, log_weights: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    ends = loc + logit.unsqueeze(-2) * log_scale.exp()
    low, high = ends.amin(-2), ends.amax(-2)
    for _ in range(1 - int(math.log2(torch.finfo(logit.dtype).eps))):
        middle = (low + high) / 2
        left = _logit_of_mixture(middle, log_weights, loc, log_scale)[0] < logit
        low, high = torch.where(left, middle, low), torch.where(left, high, middle)
    return (low + high) / 2


def squeezed(shape: Sequence[int]) -> torch.Size:
    """The shape of an image of ``shape`` after `Squeeze`."""
    channels, height, width = shape
    if height % 2 or width % 2:
        raise ValueError(f"in_shape {tuple(shape)} cannot be squeezed: height and width must be even")
    return torch.Size((4 * channels, height // 2, width // 2))
