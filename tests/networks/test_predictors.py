"""The predictions of PredictedLogistic: by their definition, in their order, and in the mass of all images."""

import math

import pytest
import torch
from torch import nn

import dgm_pyro as dgm
from dgm_pyro.networks import CausalTransformer, PixelCNN
from dgm_pyro.networks.mlp import networks_in
from dgm_pyro.networks.predictors import NeighborPredictors


class Constant(nn.Module):
    """A masked network of the same parameters for every feature, which it gives as if it computed in bf16."""

    def __init__(self, in_shape, values, levels):
        super().__init__()
        self.in_shape, self.levels = torch.Size(in_shape), levels
        self.order = tuple(torch.arange(self.in_shape.numel()).reshape(in_shape[0], -1).T.flatten().tolist())
        self.values = nn.Parameter(torch.as_tensor(values))

    def forward(self, x):
        values = self.values.reshape(-1, 1, 1, 1).expand(len(x), -1, *self.in_shape)
        return torch.einsum("npchw,pq->nqchw", values, torch.eye(len(self.values)))


def by_definition(image, channel, row, column):
    """The predictions of one feature of an image of values in [-1, 1], in words of one feature at a time."""

    def value(c, i, j):
        return image[c, i, j].item() if i >= 0 and j >= 0 else 0.0

    def along(c):
        left, above, corner = value(c, row, column - 1), value(c, row - 1, column), value(c, row - 1, column - 1)
        return [left, above, left + above - corner]

    found = along(channel)
    if len(image) == 1:
        return found
    errors = [value(channel - 1, row, column) - each for each in along(channel - 1)] if channel else [0.0] * 3
    return found + [each + error for each, error in zip(found, errors, strict=True)]


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_parameter_is_as_defined(depth, precision):
    shape, count = (depth, 3, 4), 3 if depth == 1 else 6
    values = torch.arange(24) / 8  # exact in bf16
    program = dgm.Autoregressive(dgm.PredictedLogistic(shape, 9, 8, Constant(shape, values, 9)))
    x = torch.randint(9, (2, *shape))
    with networks_in(precision):
        logits, locations, scales = program.raw_parameters(x).unflatten(-1, (3, 8)).unbind(-2)
    m, spread = values[8:16], torch.linspace(-1, 1, 8 - count)
    assert (logits == values[:8]).all()
    two_levels = math.log(math.expm1(4 / 8))
    start = torch.tensor([two_levels] * count + [0.0] * (8 - count))
    torch.testing.assert_close(scales, (values[16:] + start).expand_as(scales))
    for n, c, i, j in torch.cartesian_prod(torch.arange(2), *(torch.arange(size) for size in shape)).tolist():
        near = torch.tensor(by_definition(x[n] / 4 - 1, c, i, j)) + 0.1 * m[:count]
        expected = torch.cat((near, spread + m[count:]))
        torch.testing.assert_close(locations[n, c, i, j], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda shape: PixelCNN(shape, 24, width=4, layers=2, levels=3), (1, 2, 3)),
        (lambda shape: PixelCNN(shape, 24, width=4, layers=2, levels=3), (2, 3, 1)),
        (lambda shape: PixelCNN(shape, 24, width=4, layers=2, levels=3), (3, 1, 2)),
        (lambda shape: CausalTransformer(shape, 24, 8, 1, 2, levels=3), (2, 1, 3)),
    ],
)
@pytest.mark.usefixtures("float64")
def test_the_masses_of_all_images_sum_to_one(make, shape):
    program = dgm.Autoregressive(dgm.PredictedLogistic(shape, 3, 8, make(shape)))
    every = torch.cartesian_prod(*[torch.arange(3)] * 6).reshape(-1, *shape)
    torch.testing.assert_close(program.log_prob(every).logsumexp(0), torch.tensor(0.0), rtol=0, atol=1e-12)


def test_a_network_without_a_cache_samples_by_whole_passes():
    shape = (1, 2, 3)
    predicted = NeighborPredictors(Constant(shape, torch.zeros(15), 256), 5)
    assert predicted.cache(3) is None
    torch.manual_seed(0)
    x = dgm.Autoregressive(dgm.PredictedLogistic(shape, 256, 5, Constant(shape, torch.zeros(15), 256))).model(3)
    assert x.shape == (3, *shape)


def test_flat_images_cost_what_the_start_says():
    """Six of the 11 components, all of equal weight, are at the neighbors' value; their scale is two levels."""
    x = torch.arange(60, 200, 5).to(torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)
    silent = Constant((3, 16, 16), torch.zeros(33), 256)
    program = dgm.Autoregressive(dgm.PredictedLogistic((3, 16, 16), 256, 11, silent))
    inside = program.factors.univariate(program.raw_parameters(x)).log_prob(x)[:, :, 1:, 1:]
    of_the_others = 5 / 11 / 256  # their scales are wide, so about uniform
    bits = -math.log2(6 / 11 * math.tanh(1 / 8) + of_the_others)
    assert abs(-inside.mean().item() / math.log(2) - bits) < 0.05


def test_a_double_network_computes_in_double():
    network = PixelCNN((1, 4, 4), 15, width=4, layers=1, levels=9).double()
    program = dgm.Autoregressive(dgm.PredictedLogistic((1, 4, 4), 9, 5, network))
    assert program.raw_parameters(torch.zeros(1, 1, 4, 4, dtype=torch.long)).dtype == torch.float64


def test_it_can_be_built_without_memory():
    with torch.device("meta"):
        factors = dgm.PredictedLogistic((1, 2, 2), 9, 5, CausalTransformer((1, 2, 2), 15, 8, 1, 2, levels=9))
    assert factors.start.is_meta


def test_another_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"event_shape is \(1, 4, 5\), but the network reads images of shape \(1, 4, 4\)"
    ):
        dgm.PredictedLogistic((1, 4, 5), 9, 5, PixelCNN((1, 4, 4), 15, width=4, layers=1, levels=9))


def serpentine(height, width):
    rows = torch.arange(height * width).reshape(height, width)
    return tuple(torch.cat([row if i % 2 == 0 else row.flip(0) for i, row in enumerate(rows)]).tolist())


@pytest.mark.parametrize(
    ("network", "components", "error", "message"),
    [
        (nn.Linear(3, 3), 5, ValueError, "this Linear has in_shape=None, levels=None and no order"),
        (PixelCNN((1, 4, 4), 15, width=4, layers=1), 5, ValueError, r"in_shape=\(1, 4, 4\), levels=None and an order"),
        (PixelCNN((1, 4, 4), 6, width=4, layers=1, levels=9), 2, ValueError, "components must be"),
        (PixelCNN((3, 4, 4), 15, width=4, layers=1, levels=9), 5, ValueError, "components must be"),
        ("pixelcnn", 5, TypeError, "network must be a torch.nn.Module"),
        (
            CausalTransformer((1, 32, 32), 15, 8, 1, 2, levels=9, order=serpentine(32, 32)),
            5,
            ValueError,
            "features before the one to the left",
        ),
        (
            CausalTransformer((1, 2, 2), 15, 8, 1, 2, levels=9, order=(2, 3, 0, 1)),
            5,
            ValueError,
            "features before the one above",
        ),
        (
            CausalTransformer((2, 1, 1), 18, 8, 1, 2, levels=9, order=(1, 0)),
            6,
            ValueError,
            "features before the one at the channel before",
        ),
    ],
)
def test_what_cannot_be_predicted_is_refused(network, components, error, message):
    with pytest.raises(error, match=message):
        dgm.PredictedLogistic(getattr(network, "in_shape", (1, 4, 4)), 9, components, network)


@pytest.mark.parametrize(
    ("levels", "components", "message"),
    [(17, 5, "levels is 17, but the network reads 9"), (9, 4, "components is 4, so network must have 12 parameters")],
)
def test_another_number_of_levels_or_components_is_refused(levels, components, message):
    network = PixelCNN((1, 4, 4), 15, width=4, layers=1, levels=9)
    with pytest.raises(ValueError, match=message):
        dgm.Autoregressive(dgm.PredictedLogistic((1, 4, 4), levels, components, network))
