"""Multiscale flows: densities by the autograd Jacobian, masses that sum to one, and starts from data."""

import itertools
import math

import pytest
import torch
from programs import jittered
from torch.autograd.functional import jacobian

import dgm_pyro as dgm
from dgm_pyro import multiscale
from dgm_pyro.networks import ActNorm

SMALL = {"width": 3, "layers": 2}
FLOWS = {
    "realnvp": lambda shape, **options: multiscale.convolutional_realnvp(shape, **{**SMALL, "layers": 4, **options}),
    "glow": lambda shape, **options: multiscale.glow(shape, **{**SMALL, **options}),
    "flow++": lambda shape, **options: multiscale.flow_plus_plus(shape, components=2, **{**SMALL, **options}),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", FLOWS)
def test_the_density_is_that_of_the_autograd_jacobian(name):
    """On 3x4x4 images, over two scales: log p(x) = log N(z) + log |det dz/dx|, and sampling inverts scoring."""
    flow = jittered(FLOWS[name]((3, 4, 4), scales=2), 0.1)
    x = torch.randn(3, 4, 4)
    z = flow.inverse_map(x[None])
    matrix = jacobian(lambda x: flow.inverse_map(x[None]).flatten(), x, vectorize=True).reshape(48, 48)
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum() + matrix.slogdet()[1]
    torch.testing.assert_close(flow.log_prob(x[None])[0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flow.forward_map(z)[0], x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", FLOWS)
def test_single_precision_inverts_to_its_rounding(name):
    flow = jittered(FLOWS[name]((1, 4, 4)), 0.1)
    x = torch.randn(20, 1, 4, 4)
    torch.testing.assert_close(flow.forward_map(flow.inverse_map(x)), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FLOWS)
def test_masses_of_all_binary_images_sum_to_one(name):
    """By importance weights, the dequantizer their proposal; within four standard errors."""
    shape, every = (1, 2, 2), torch.tensor([*itertools.product(range(2), repeat=4)]).reshape(-1, 1, 2, 2)
    torch.manual_seed(3)
    q = jittered(multiscale.convolutional_dequantizer(shape, 2, width=3), 0.05)
    program = dgm.Dequantized(jittered(FLOWS[name](shape, unit_cube=True), 0.05), 2, q).eval()
    with torch.no_grad():
        weights = program.log_weights(every, num_particles=1000).double().exp()
    error = (weights.var(0) / len(weights)).sum().sqrt()
    assert error < 0.02
    assert abs(weights.mean(0).sum() - 1) < 4 * error


def test_what_is_done_is_normal_given_what_goes_on():
    """v is the first half of the channels that the finest scale left, and h the second."""
    flow = multiscale.glow((1, 4, 4), scales=2, layers=1, width=3)
    split = flow.transforms[4].bijection  # outward from z: a coupling, a convolution, an ActNorm, a squeeze
    v, h = torch.randn(2, 5, 8)
    z, log_det = split.inverse(torch.cat((v, h), 1))
    loc, raw_scale = split.network(h.reshape(5, 2, 2, 2)).flatten(2).unbind(1)
    scale = (raw_scale / (1 + raw_scale.abs() / 5)).exp()
    expected = torch.distributions.Normal(loc, scale).log_prob(v).sum(1)
    standard = torch.distributions.Normal(0, 1).log_prob(z[:, :8]).sum(1)
    torch.testing.assert_close(standard + log_det, expected)
    torch.testing.assert_close(z[:, 8:], h)


def test_the_first_batch_normalizes_each_channel_of_each_scale():
    flow = multiscale.glow((3, 8, 8), layers=2, width=4).train()
    x = 3 + 5 * torch.randn(40, 3, 8, 8) * torch.linspace(0.5, 2, 8)
    assert flow().log_prob(x).isfinite().all()  # with gradients: the first step
    u, normalized = x.flatten(1), 0
    for part in reversed(flow.transforms):
        u = part.inverse(u)[0]
        inner = getattr(part.bijection, "bijection", None)
        if isinstance(inner, ActNorm):
            pixels = u[:, part.passing :].unflatten(1, (inner.num_features, -1)).transpose(0, 1).flatten(1)
            torch.testing.assert_close(pixels.mean(1), torch.zeros(len(pixels)), rtol=0, atol=1e-4)
            torch.testing.assert_close(pixels.std(1), torch.ones(len(pixels)), rtol=0, atol=1e-4)
            normalized += 1
    assert normalized == 2 * 2
    before = flow.inverse_map(x)
    flow.initialize(x)  # the same data again
    torch.testing.assert_close(flow.inverse_map(x), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "scales"), [((1, 28, 28), 2), ((3, 32, 32), 3), ((3, 64, 64), 3), ((1, 8, 8), 2), ((1, 4, 4), 1)]
)
def test_scales_follow_the_resolution(shape, scales):
    flow = multiscale.convolutional_realnvp(shape, layers=1, width=1)
    assert sum(isinstance(part.bijection, dgm.networks.Squeeze) for part in flow.transforms) == scales
    kept = [part.bijection.num_features for part in flow.transforms]
    assert min(kept) == math.prod(shape) // 2 ** (scales - 1)


def test_an_odd_side_is_refused_by_its_name():
    with pytest.raises(ValueError, match="halved at each of 1 scales, but images are 5x4: crop or pad"):
        multiscale.glow((1, 5, 4))
    with pytest.raises(ValueError, match="halved at each of 3 scales, but images are 4x4"):
        multiscale.glow((1, 4, 4), scales=3)
