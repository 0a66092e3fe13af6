"""Networks of x that read features of what is given, in place of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dgm_pyro.checks import check_type
from dgm_pyro.networks.caches import Cache, cache_maker
from dgm_pyro.registry import register

__all__ = ["FeaturesOfGiven"]


@register
class FeaturesOfGiven(nn.Module):
    """``network(x, features(given))``: a network of x and of features that another network computes.

    With a `PixelCNN` and a `ConvDecoder` it is the likelihood of a PixelVAE (Gulrajani et al. 2016, arXiv 1611.05013):
    z determines feature maps of the size of the image, and every pixel reads the maps at its place and the pixels
    before it.

    Args:
        network: a network with a second input, ``network(x, given)``, such as a masked one.
        features: a network of ``given``, with as many outputs as ``network`` reads.

    Attributes:
        given_shape: shape of the input of ``features``.

    Raises:
        TypeError, ValueError: an argument is no module, ``network`` takes no given, or one of them does not declare the
            shapes that it reads.

    >>> import torch
    >>> from dgm_pyro.networks import ConvDecoder, PixelCNN
    >>> maps = ConvDecoder((5,), (4, 8, 8))
    >>> network = FeaturesOfGiven(PixelCNN((1, 8, 8), 1, width=8, layers=2, given_shape=(4, 8, 8)), maps)
    >>> network(torch.zeros(3, 1, 8, 8), torch.randn(3, 5)).shape
    torch.Size([3, 1, 1, 8, 8])
    """

    def __init__(self, network: nn.Module, features: nn.Module):
        super().__init__()
        check_type(network, nn.Module, "network", "a torch.nn.Module")
        check_type(features, nn.Module, "features", "a torch.nn.Module")
        features_shape: Any = getattr(network, "given_shape", None)
        if features_shape is None:
            raise ValueError(
                f"network must take a given, network(x, given), but this {type(network).__name__} has no given_shape: "
                "build it with given_shape= the shape of the features"
            )
        if getattr(features, "in_shape", None) is None:
            raise ValueError(
                f"features must say what it reads, but this {type(features).__name__} has no in_shape: use a network "
                "of dgm.networks, or set its in_shape"
            )
        self.network, self.features = network, features
        self.in_shape, self.given_shape = network.in_shape, features.in_shape
        self.features_shape = torch.Size(features_shape)
        self.num_classes = getattr(features, "num_classes", None)
        self.levels = getattr(network, "levels", None)
        self.order: Any = getattr(network, "order", None)
        self.num_predictors = getattr(network, "num_predictors", 0)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        output: Tensor = self.network(x, self._features(given))
        return output

    def _features(self, given: Tensor) -> Tensor:
        features: Tensor = self.features(given)
        return features.reshape(given.shape[0], *self.features_shape)

    @property
    def cache(self) -> Callable[..., Cache] | None:
        """The network's cache, for which the features are computed once; None if the network has no cache."""
        make = cache_maker(self.network)
        if make is None:
            return None
        return lambda batch_size, given: make(batch_size, self._features(given))
