r"""Predictions of a feature of an image from its neighbors, as the locations of a mixture.

A pixel is often equal or close to the pixel to its left, or to the one above. A network has to reproduce that value
through all its layers, and in bf16 it can do so to within half of a level of 256 only. So some of the components of the
mixture start from a prediction, and the network gives a small correction of it:

.. math::
    p(x_i \mid x_{<i}) = \sum_k \pi_k \, L(x_i; a_k + 0.1 \, m_k, s_k)

where L is a discretized logistic, the predictions :math:`a_k` are sums and differences of features before i, and the
network gives :math:`\pi`, m and s from all of :math:`x_{<i}`. The other components have no prediction, as in PixelCNN++
(Salimans et al. 2017, arXiv 1701.05517, section 2.1).

The predictions are three of those of lossless JPEG: the pixel to the left, the pixel above, and left + above - corner,
where the corner is the pixel above the left one (ITU-T T.81, table H.1, selections 1, 2 and 4). For several channels
there are three more: each prediction, plus its error at the channel before. Pixels outside the image are 0, the middle
of the range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_pyro.checks import check_count, check_type
from dgm_pyro.networks.caches import Cache, cache_maker
from dgm_pyro.networks.mlp import to_unit
from dgm_pyro.registry import register

__all__ = ["NeighborPredictors"]

CORRECTION = 0.1


@register
class NeighborPredictors(nn.Module):
    """A masked network for a mixture of discretized logistics, whose first components start from predictions.

    The predictions of a feature are the feature to its left, the one above, and left + above - corner; for several
    channels also each of these plus its error at the channel before.

    Args:
        network: a masked network of images of integers, ``(B, C, H, W)`` to ``(B, 3 * components, C, H, W)``, such as
            `PixelCNN`. Its order must have all features that predict a feature before it.
        components: number of logistics per feature, at least the number of predictions.

    Attributes:
        num_predictors: number of predictions: 3, and 6 for several channels.

    Raises:
        TypeError, ValueError: ``network`` is no module, has no ``in_shape`` of an image or no ``levels``; or there are
            fewer components than predictions. `Autoregressive` raises if the order does not fit.

    >>> import dgm_pyro as dgm
    >>> network = NeighborPredictors(dgm.networks.PixelCNN((1, 4, 4), 3 * 5, width=8, layers=2, levels=256), 5)
    >>> program = dgm.Autoregressive(dgm.DiscretizedLogistic((1, 4, 4), 256, 5, network))
    >>> program.model(2).shape
    torch.Size([2, 1, 4, 4])
    """

    gain: Tensor

    def __init__(self, network: nn.Module, components: int):
        super().__init__()
        check_type(network, nn.Module, "network", "a torch.nn.Module")
        shape, levels = getattr(network, "in_shape", None), getattr(network, "levels", None)
        if shape is None or len(shape) != 3 or levels is None:
            raise ValueError(
                "network must read images of integers, so it needs in_shape (C, H, W) and levels, got "
                f"in_shape={None if shape is None else tuple(shape)} and levels={levels}: pass "
                "networks.PixelCNN((C, H, W), 3 * components, levels=levels)"
            )
        self.num_predictors = 3 if shape[0] == 1 else 6
        check_count(components, "components", at_least=self.num_predictors)
        self.network, self.components = network, components
        self.in_shape, self.levels = shape, levels
        self.given_shape = getattr(network, "given_shape", None)
        self.num_classes = getattr(network, "num_classes", None)
        self.order: Any = getattr(network, "order", None)
        gain = torch.ones(3, components)
        gain[1, : self.num_predictors] = CORRECTION
        self.register_buffer("gain", gain.flatten(), persistent=False)

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        raw = self.network(x, *given).reshape(x.shape[0], -1, *self.in_shape)
        x = to_unit(x, self.levels, self.gain.dtype)
        left, above, corner = F.pad(x, (1, -1)), F.pad(x, (0, 0, 1, -1)), F.pad(x, (1, -1, 1, -1))
        return self._around(from_neighbors(left, above, corner, x), raw)

    def _around(self, predicted: Tensor, raw: Tensor) -> Tensor:
        """Parameters whose first locations are the predictions and small corrections, ``(B, 3 K, ...)``.

        Args:
            predicted: the predictions, ``(B, num_predictors, ...)``.
            raw: output of the network, ``(B, 3 K, ...)``.
        """
        rest = raw.dim() - 2
        before, after = self.components, 2 * self.components - self.num_predictors
        moved = F.pad(predicted, (0, 0) * rest + (before, after))
        return raw.to(moved.dtype) * self.gain.reshape(-1, *(1,) * rest) + moved

    @property
    def cache(self) -> Callable[..., Cache] | None:
        """The network's cache and the features so far; None if the network has no cache."""
        make = cache_maker(self.network)
        if make is None:
            return None
        return lambda batch_size, *given: PredictorCache(self, make(batch_size, *given), batch_size)


class PredictorCache:
    """The network's cache, and the images so far, with a row of zeros above and a column to the left."""

    def __init__(self, network: NeighborPredictors, cache: Cache, batch_size: int):
        depth, height, width = network.in_shape
        self.network, self.cache, self.place = network, cache, 0
        self.images = network.gain.new_zeros(batch_size, depth, height + 1, width + 1)

    def step(self, value: Tensor | None) -> Tensor:
        if value is not None:
            channel, row, column = self._position(self.place - 1)
            self.images[:, channel, row + 1, column + 1] = to_unit(value, self.network.levels, self.images.dtype)
        channel, row, column = self._position(self.place)
        self.place += 1
        window = self.images[:, :, row : row + 2, column : column + 2]
        corner, above, left, here = window.flatten(2).unbind(-1)
        predicted = from_neighbors(left, above, corner, here)[..., channel]
        return self.network._around(predicted, self.cache.step(value))

    def _position(self, place: int) -> tuple[int, int, int]:
        _, height, width = self.network.in_shape
        channel, pixel = divmod(self.network.order[place], height * width)
        return channel, *divmod(pixel, width)

    def take(self, rows: Tensor) -> None:
        self.cache.take(rows)
        self.images = self.images.index_select(0, rows)


def from_neighbors(left: Tensor, above: Tensor, corner: Tensor, here: Tensor) -> Tensor:
    """The predictions of ``here``, all ``(B, C, ...)``, in order: ``(B, num_predictors, C, ...)``."""
    along = torch.stack((left, above, left + above - corner), 1)
    if here.shape[1] == 1:
        return along
    error = (here.unsqueeze(1) - along)[:, :, :-1]
    of_channel_before = F.pad(error, (0, 0) * (here.dim() - 2) + (1, 0))
    return torch.cat((along, along + of_channel_before), 1)
