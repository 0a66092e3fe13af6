"""Convolutional encoders and decoders: what reaches what, at every size."""

import pytest
import torch

import dgm_pyro as dgm
from dgm_pyro.networks import ConvDecoder, ConvEncoder

SIZES = [(1, 8, 8), (1, 28, 28), (3, 7, 5), (2, 1, 9)]


def randomized(network):
    """The same network with every weight drawn: zero-initialized layers would hide what they do."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.double()


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_pixel_reaches_the_code_and_every_code_every_pixel(shape):
    encoder = randomized(ConvEncoder(shape, 3, (8, 8)))
    jacobian = torch.func.jacrev(lambda x: encoder(x.unsqueeze(0))[0])(torch.randn(shape, dtype=torch.float64))
    assert (jacobian != 0).all()
    decoder = randomized(ConvDecoder((3,), shape, 2, (8, 8)))
    jacobian = torch.func.jacrev(lambda z: decoder(z.unsqueeze(0))[0])(torch.randn(3, dtype=torch.float64))
    assert jacobian.shape == (2, *shape, 3)
    assert (jacobian != 0).all()


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_data_do_not_mix(shape):
    encoder = randomized(ConvEncoder(shape, 4, (8,), levels=3))
    x = torch.randint(3, (5, *shape), dtype=torch.uint8)
    torch.testing.assert_close(encoder(x)[2:3], encoder(x[2:3]))
    decoder = randomized(ConvDecoder((2,), shape, 1, (8,)))
    z = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(decoder(z)[2:3], decoder(z[2:3]))


def test_the_context_is_read_and_must_be_there():
    network = randomized(ConvEncoder((1, 4, 4), 2, (8,), num_classes=3))
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    outputs = [network(x, torch.tensor([y])) for y in range(3)]
    assert all((outputs[0] - other).abs().min() > 1e-6 for other in outputs[1:])
    with pytest.raises(ValueError, match="takes a given"):
        network(x)
    network = randomized(ConvDecoder((2,), (1, 4, 4), 1, (8,), given_shape=(3,)))
    z = torch.randn(1, 2, dtype=torch.float64)
    assert not torch.equal(network(z, torch.zeros(1, 3)), network(z, torch.ones(1, 3)))
    label = randomized(ConvDecoder((), (1, 4, 4), 1, (8,), num_classes=3))
    assert not torch.equal(label(torch.tensor([0])), label(torch.tensor([1])))


def test_a_convolutional_vae_learns():
    bars = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    for i in range(8):
        bars[i, 0, i] = 1
    torch.manual_seed(0)
    vae = dgm.VAE(
        dgm.Normal(2),
        dgm.Bernoulli((1, 8, 8), ConvDecoder((2,), (1, 8, 8), 1, (16, 16))),
        dgm.Normal(2, ConvEncoder((1, 8, 8), 4, (16, 16), levels=2)),
    )
    data = dgm.Data(bars.repeat(32, 1, 1, 1), levels=2, name="bars")
    dgm.fit(vae, data, epochs=60, batch_size=32, lr=5e-3, validation=None, progress=False)
    # The entropy of eight equally frequent bars is log 8 = 2.08 nats; independent pixels take 64 H(1/8) = 24.
    assert -dgm.evaluate(vae, bars, num_particles=100).nats < 4.0
