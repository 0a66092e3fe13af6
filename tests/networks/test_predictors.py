"""The predictions of NeighborPredictors: by their definition, in their order, and in the mass of all images."""

import pytest
import torch
from torch import nn

import dgm_pyro as dgm
from dgm_pyro.networks import CausalTransformer, NeighborPredictors, PixelCNN


class Silent(nn.Module):
    """A masked network that gives zeros, so that only the predictions are left."""

    def __init__(self, in_shape, num_parameters, levels):
        super().__init__()
        self.in_shape, self.levels, self.num_parameters = torch.Size(in_shape), levels, num_parameters
        self.order = tuple(torch.arange(self.in_shape.numel()).reshape(in_shape[0], -1).T.flatten().tolist())
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.weight * x.new_zeros(len(x), self.num_parameters, *self.in_shape, dtype=self.weight.dtype)


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


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_first_locations_are_the_predictions(depth):
    shape, count = (depth, 3, 4), 3 if depth == 1 else 6
    network = NeighborPredictors(Silent(shape, 3 * 8, levels=9), 8)
    assert network.num_predictors == count
    program = dgm.Autoregressive(dgm.DiscretizedLogistic(shape, 9, 8, network))
    x = torch.randint(9, (2, *shape))
    logits, locations, _ = program.raw_parameters(x).unflatten(-1, (3, 8)).unbind(-2)
    assert not logits.any()
    for n, c, i, j in torch.cartesian_prod(torch.arange(2), *(torch.arange(size) for size in shape)).tolist():
        expected = [*by_definition(x[n] / 4 - 1, c, i, j), *torch.linspace(-1, 1, 8 - count).tolist()]
        torch.testing.assert_close(locations[n, c, i, j], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda shape: PixelCNN(shape, 24, width=4, layers=2, levels=3), (1, 2, 3)),
        (lambda shape: PixelCNN(shape, 24, width=4, layers=2, levels=3), (2, 3, 1)),
        (lambda shape: PixelCNN(shape, 24, width=4, layers=2, levels=3), (3, 1, 2)),
        (lambda shape: CausalTransformer(shape, 24, 8, 1, 2, levels=3), (2, 1, 3)),
    ],
)
def test_the_masses_of_all_images_sum_to_one(make, shape):
    program = dgm.Autoregressive(dgm.DiscretizedLogistic(shape, 3, 8, NeighborPredictors(make(shape), 8)))
    every = torch.cartesian_prod(*[torch.arange(3)] * 6).reshape(-1, *shape)
    torch.testing.assert_close(program.log_prob(every).logsumexp(0), torch.tensor(0.0), rtol=0, atol=1e-5)


def test_an_order_without_the_neighbors_before_a_feature_is_refused():
    network = CausalTransformer((1, 2, 2), 24, 8, 1, 2, levels=3, order=(3, 2, 1, 0))
    with pytest.raises(ValueError, match="not autoregressive in its order"):
        dgm.Autoregressive(dgm.DiscretizedLogistic((1, 2, 2), 3, 8, NeighborPredictors(network, 8)))


def test_a_network_without_a_cache_samples_by_whole_passes():
    shape = (1, 2, 3)
    network = NeighborPredictors(Silent(shape, 15, levels=256), 5)
    assert network.cache is None
    x = dgm.Autoregressive(dgm.DiscretizedLogistic(shape, 256, 5, network)).model(3)
    assert x.shape == (3, *shape)


def test_flat_images_cost_little_before_any_training():
    data = dgm.Data(torch.arange(0, 256, 5).to(torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16), levels=256)
    torch.manual_seed(0)
    found = {
        asked: dgm.evaluate(dgm.build("pixelcnn", data, predictors=asked), data).bits_per_dim for asked in (True, False)
    }
    assert found[True] < 6 < 8 < found[False]


@pytest.mark.parametrize(
    ("network", "components", "error", "message"),
    [
        (nn.Linear(3, 3), 5, ValueError, "network must read images of integers"),
        (PixelCNN((1, 4, 4), 15, width=4, layers=1), 5, ValueError, "got in_shape=\\(1, 4, 4\\) and levels=None"),
        (PixelCNN((1, 4, 4), 6, width=4, layers=1, levels=9), 2, ValueError, "components must be"),
        (PixelCNN((3, 4, 4), 15, width=4, layers=1, levels=9), 5, ValueError, "components must be"),
        ("pixelcnn", 5, TypeError, "network must be a torch.nn.Module"),
    ],
)
def test_what_cannot_be_predicted_is_refused(network, components, error, message):
    with pytest.raises(error, match=message):
        NeighborPredictors(network, components)
