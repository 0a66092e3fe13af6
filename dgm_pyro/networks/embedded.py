"""Networks of x and of an embedding of what is given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dgm_pyro.checks import check_type
from dgm_pyro.networks.caches import Cache, cache_maker
from dgm_pyro.networks.mlp import num_classes_read_by, shape_read_by
from dgm_pyro.registry import register

__all__ = ["EmbeddedGiven"]


@register
class EmbeddedGiven(nn.Module):
    """``network(x, embedding(given))``.

    With a `PixelCNN` and a `ConvDecoder` it is the network of the likelihood of a PixelVAE (Gulrajani et al. 2016,
    arXiv 1611.05013): the decoder maps z to images of features, and a pixel reads the features and the pixels before.

    Args:
        network: a network with a second input that is no label, ``network(x, given)``, such as a masked one.
        embedding: a network of ``given``, with as many outputs as ``network`` reads.

    Attributes:
        given_shape: shape of one ``given``, the input of ``embedding``.

    Raises:
        TypeError, ValueError: an argument is no module, does not declare the shapes that it reads, or ``network`` reads
            no given, or a label; in a call, the embedding has another number of features.

    >>> from dgm_pyro.networks import ConvDecoder, PixelCNN
    >>> pixels = PixelCNN((1, 8, 8), 1, width=8, layers=2, given_shape=(4, 8, 8))
    >>> network = EmbeddedGiven(pixels, ConvDecoder((5,), (4, 8, 8)))
    >>> network(torch.zeros(3, 1, 8, 8), torch.randn(3, 5)).shape
    torch.Size([3, 1, 1, 8, 8])
    """

    def __init__(self, network: nn.Module, embedding: nn.Module):
        super().__init__()
        check_type(network, nn.Module, "network", "a torch.nn.Module")
        check_type(embedding, nn.Module, "embedding", "a torch.nn.Module")
        shape: Any = getattr(network, "given_shape", None)
        if not shape or getattr(network, "in_shape", None) is None:
            raise ValueError(
                f"network must read x and the embedding, network(x, given), but this {type(network).__name__} has "
                f"in_shape={getattr(network, 'in_shape', None)} and given_shape={shape}: build it with given_shape= "
                "the shape of the embedding"
            )
        given_shape = shape_read_by(embedding)
        if given_shape is None:
            raise ValueError(
                f"embedding must say what it reads, but this {type(embedding).__name__} has no in_shape: use a network "
                "of dgm.networks, or set its in_shape"
            )
        if getattr(embedding, "given_shape", None) is not None:
            raise ValueError(
                f"embedding must read the given alone, but this {type(embedding).__name__} takes a given of its own: "
                "build it without given_shape and num_classes"
            )
        self.network, self.embedding, self.embedded_shape = network, embedding, torch.Size(shape)
        self.in_shape, self.given_shape = network.in_shape, given_shape
        self.num_classes = num_classes_read_by(embedding)
        self.levels = getattr(network, "levels", None)
        self.order: Any = getattr(network, "order", None)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        output: Tensor = self.network(x, self._embed(given))
        return output

    def _embed(self, given: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(given)
        if math.prod(embedded.shape[1:]) != math.prod(self.embedded_shape):
            raise ValueError(
                f"embedding has outputs of shape {tuple(embedded.shape[1:])}, but network reads "
                f"{tuple(self.embedded_shape)}: build both for the same number of features"
            )
        return embedded.reshape(embedded.shape[0], *self.embedded_shape)

    def cache(self, batch_size: int, given: Tensor) -> Cache | None:
        """The network's cache, with the embedding computed once; None if the network has none."""
        make = cache_maker(self.network)
        return None if make is None else make(batch_size, self._embed(given))
