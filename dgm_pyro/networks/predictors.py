r"""Predictions of a feature of an image from its neighbors, as the locations of a mixture.

A pixel is often equal or close to the pixel to its left, or to the one above. A network has to reproduce that value
through all its layers, and bf16 numbers near 1 are half a level of 256 apart. So some of the components of the mixture
start from a prediction, and the network gives a small correction of it:

.. math::
    p(x_i \mid x_{<i}) = \sum_k \pi_k \, L(x_i; a_k + 0.1 \, m_k, s_k)

where L is a discretized logistic, the predictions :math:`a_k` are sums and differences of features before i, and the
network gives :math:`\pi`, m and s from all of :math:`x_{<i}`. The locations of the other components are from the
network alone, as in PixelCNN++ (Salimans et al. 2017, arXiv 1701.05517, section 2.1).

The predictions are three of those of lossless JPEG: the pixel to the left, the pixel above, and left + above - corner,
where the corner is the pixel above the left one (ITU-T T.81, table H.1, selections 1, 2 and 4). For several channels
there are three more: each prediction, plus its error at the channel before. In the first channel these equal the first
three. Pixels outside the image are 0, the middle of the range.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_pyro.checks import check_count, check_type
from dgm_pyro.networks.caches import Cache, cache_maker
from dgm_pyro.networks.masked import check_order
from dgm_pyro.networks.mlp import to_unit

__all__ = ["NeighborPredictors", "num_predictors"]

CORRECTION = 0.1


class NeighborPredictors(nn.Module):
    """A masked network for a mixture of discretized logistics, whose first components start from predictions.

    `PredictedLogistic` puts it around its network.

    Args:
        network: a masked network of images of integers, ``(B, C, H, W)`` to ``(B, 3 * components, C, H, W)``.
        components: number of logistics per feature, at least `num_predictors`.

    Raises:
        TypeError, ValueError: ``network`` is no module, does not read images of integers, or has an order in which a
            feature comes before one that predicts it; there are fewer components than predictions.
    """

    gain: Tensor

    def __init__(self, network: nn.Module, components: int):
        super().__init__()
        check_type(network, nn.Module, "network", "a torch.nn.Module")
        shape, levels, order = (getattr(network, name, None) for name in ("in_shape", "levels", "order"))
        if shape is None or len(shape) != 3 or levels is None or order is None:
            raise ValueError(
                "network must be masked and read images of integers, but this "
                f"{type(network).__name__} has in_shape={None if shape is None else tuple(shape)}, levels={levels} and "
                f"{'no' if order is None else 'an'} order: pass networks.PixelCNN((C, H, W), 3 * components, "
                "levels=levels)"
            )
        self.num_predictors = num_predictors(shape[0])
        check_count(components, "components", at_least=self.num_predictors)
        self.network, self.components, self.levels, self.in_shape = network, components, levels, torch.Size(shape)
        self.order = check_order(order, self.in_shape.numel())
        self.given_shape = getattr(network, "given_shape", None)
        self.num_classes = getattr(network, "num_classes", None)
        place = torch.tensor(self.order, device="cpu").argsort().reshape(shape)
        before = place[:, :, :-1] < place[:, :, 1:], place[:, :-1] < place[:, 1:], place[:-1] < place[1:]
        for where, fits in zip(("to the left", "above", "at the channel before"), before, strict=True):
            if not fits.all():
                raise ValueError(
                    f"the order of network has features before the one {where}, which predicts them: use an order row "
                    "by row, as that of networks.PixelCNN"
                )
        gain = torch.ones(3, components)
        gain[1, : self.num_predictors] = CORRECTION
        self.register_buffer("gain", gain.flatten(), persistent=False)

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        raw, parameters = self.network(x, *given), self.gain.shape[0]
        if math.prod(raw.shape[1:]) != parameters * math.prod(self.in_shape):
            raise ValueError(
                f"components is {self.components}, so network must have {parameters} parameters for each feature of "
                f"{tuple(self.in_shape)}, but its output has shape {tuple(raw.shape[1:])}"
            )
        x = to_unit(x, self.levels, self.gain.dtype)
        left, above, corner = F.pad(x, (1, -1)), F.pad(x, (0, 0, 1, -1)), F.pad(x, (1, -1, 1, -1))
        raw = raw.reshape(x.shape[0], parameters, *self.in_shape)
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
        return raw * self.gain.reshape(-1, *(1,) * rest) + moved

    def cache(self, batch_size: int, *given: Tensor) -> PredictorCache | None:
        """The network's cache and the features so far; None if the network has no cache."""
        make = cache_maker(self.network)
        cache = None if make is None else make(batch_size, *given)
        return None if cache is None else PredictorCache(self, cache, batch_size)


class PredictorCache:
    """The network's cache, and the images so far, with a row of zeros above and a column to the left."""

    def __init__(self, network: NeighborPredictors, cache: Cache, batch_size: int):
        depth, height, width = network.in_shape
        self.network, self.cache, self.place = network, cache, 0
        self.images = network.gain.new_zeros(batch_size, depth, height + 1, width + 1)

    def step(self, value: Tensor | None) -> Tensor:
        if value is not None:  # an integer, so that no gradient needs the images of before
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


def num_predictors(depth: int) -> int:
    """Number of predictions of each feature of an image of ``depth`` channels."""
    return 3 if depth == 1 else 6


def from_neighbors(left: Tensor, above: Tensor, corner: Tensor, here: Tensor) -> Tensor:
    """The predictions of ``here``, all ``(B, C, ...)``, in order: ``(B, num_predictors, C, ...)``."""
    along = torch.stack((left, above, left + above - corner), 1)
    if here.shape[1] == 1:
        return along
    error = (here.unsqueeze(1) - along)[:, :, :-1]
    of_channel_before = F.pad(error, (0, 0) * (here.dim() - 2) + (1, 0))
    return torch.cat((along, along + of_channel_before), 1)
