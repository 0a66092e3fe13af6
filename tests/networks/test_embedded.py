"""EmbeddedGiven: the network at the embedding, and what it refuses."""

import pytest
import torch
from torch import nn

from dgm_pyro.networks import MADE, MLP, ConvDecoder, EmbeddedGiven, PixelCNN


@pytest.mark.parametrize(
    ("embedding", "given"),
    [
        (lambda: MLP((2,), 48, (8,)), torch.randn(5, 2)),
        (lambda: MLP((), 48, (8,), num_classes=3), torch.tensor([0, 2, 1, 1, 0])),
        (lambda: nn.Linear(2, 48), torch.randn(5, 2)),
        (lambda: nn.Embedding(3, 48), torch.tensor([0, 2, 1, 1, 0])),
        (lambda: ConvDecoder((2,), (3, 4, 4), channels=(4,)), torch.randn(5, 2)),
    ],
)
def test_it_is_the_network_at_the_embedding(embedding, given):
    embedding = embedding()
    pixels = PixelCNN((1, 4, 4), 2, width=4, layers=2, given_shape=(3, 4, 4))
    network, x = EmbeddedGiven(pixels, embedding), torch.randn(5, 1, 4, 4)
    assert tuple(network.given_shape) == tuple(given.shape[1:])
    assert torch.equal(network(x, given), pixels(x, embedding(given).reshape(5, 3, 4, 4)))
    assert network(x[:0], given[:0]).shape == (0, 2, 1, 4, 4)


def test_it_has_a_cache_if_the_network_has_one():
    pixels = PixelCNN((1, 2, 2), 1, width=4, layers=1, given_shape=(3,))
    assert EmbeddedGiven(pixels, nn.Linear(2, 3)).cache(5, torch.randn(5, 2)) is not None
    pixels.cache = None
    assert EmbeddedGiven(pixels, nn.Linear(2, 3)).cache(5, torch.randn(5, 2)) is None


@pytest.mark.parametrize(
    ("network", "embedding", "message"),
    [
        (MADE(3, 1), nn.Linear(2, 3), "this MADE has in_shape=.* and given_shape=None"),
        (MADE(3, 1, num_classes=3), nn.Linear(2, 3), r"this MADE has in_shape=.* and given_shape=torch.Size\(\[\]\)"),
        (nn.Linear(3, 3), nn.Linear(2, 3), "this Linear has in_shape=None"),
        (MADE(3, 1, given_shape=(4,)), nn.Sequential(nn.Linear(2, 4)), "this Sequential has no in_shape"),
    ],
)
def test_networks_that_do_not_fit_are_refused(network, embedding, message):
    with pytest.raises(ValueError, match=message):
        EmbeddedGiven(network, embedding)


def test_an_embedding_with_a_given_of_its_own_is_refused():
    with pytest.raises(ValueError, match="this MLP takes a given of its own"):
        EmbeddedGiven(MADE(3, 1, given_shape=(4,)), MLP((3,), 4, (4,), given_shape=(2,)))


def test_another_number_of_features_is_named():
    network = EmbeddedGiven(MADE(3, 1, given_shape=(4,)), nn.Linear(2, 5))
    with pytest.raises(ValueError, match=r"embedding has outputs of shape \(5,\), but network reads \(4,\)"):
        network(torch.zeros(2, 3), torch.randn(2, 2))
