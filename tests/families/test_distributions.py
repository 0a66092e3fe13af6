"""The distributions against arithmetic of higher precision."""

import mpmath
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import biject_to, kl_divergence, transform_to

from dgm_pyro.families.distributions import Bernoulli, DiscretizedLogistic, Mixture

mpmath.mp.dps = 50

locations = st.floats(-3, 3) | st.sampled_from([0.0, -1.0, 1.0, -40.0, 40.0])
scales = st.sampled_from([1e-6, 1e-4, 1e-2, 1e2, 1e6]) | st.floats(1e-4, 10)
level_counts = st.sampled_from([2, 3, 17, 256]) | st.integers(2, 40)


def mass(value, loc, scale, levels):
    """sigma(upper edge) - sigma(lower edge), the outer edges at infinity, to 50 digits; mirrored right of the location,
    where both are one to many more digits than that."""
    loc, half = mpmath.mpf(loc), mpmath.mpf(1) / (levels - 1)
    center = 2 * value * half - 1
    below = -mpmath.inf if value == 0 else (center - half - loc) / mpmath.mpf(scale)
    above = mpmath.inf if value == levels - 1 else (center + half - loc) / mpmath.mpf(scale)
    if below > 0:
        below, above = -above, -below
    return 1 / (1 + mpmath.exp(-above)) - 1 / (1 + mpmath.exp(-below))


@pytest.mark.parametrize("levels", [2, 5, 256])
@pytest.mark.parametrize("scale", [1e-4, 0.05, 1.0, 1e3])
@pytest.mark.parametrize("loc", [-2.0, -1.0, 0.013, 0.5, 1.7])
def test_log_mass_equals_the_difference_of_sigmoids(levels, scale, loc, float64):
    values = [0, 1, levels // 2, levels - 2, levels - 1]
    expected = torch.tensor([float(mpmath.log(mass(v, loc, scale, levels))) for v in values])
    actual = DiscretizedLogistic(torch.tensor(loc), torch.tensor(scale), levels).log_prob(torch.tensor(values))
    # An edge is rounded to 1e-16 and then divided by the scale.
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-15 / scale + 1e-12)


@given(loc=locations, scale=scales, levels=level_counts, double=st.booleans())
@settings(max_examples=150)
def test_masses_sum_to_one(loc, scale, levels, double):
    dtype = torch.float64 if double else torch.float32
    distribution = DiscretizedLogistic(torch.tensor(loc, dtype=dtype), torch.tensor(scale, dtype=dtype), levels)
    log_mass = distribution.log_prob(torch.arange(levels))
    assert torch.isfinite(log_mass).all()
    assert (log_mass <= 0).all()
    # Neighbors share an edge to the last bit, so all that is left is the rounding of each mass.
    assert abs(log_mass.double().exp().sum().item() - 1) < (1e-13 if double else 5e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2, 1.0])
def test_no_mass_is_lost_between_the_bins_of_many_levels(scale, dtype, tolerance):
    loc = torch.linspace(-1.1, 1.1, 5000, dtype=dtype)
    masses = DiscretizedLogistic(loc, torch.tensor(scale, dtype=dtype), 256).log_prob(torch.arange(256).unsqueeze(-1))
    assert (masses.double().exp().sum(0) - 1).abs().max() < tolerance


@given(loc=locations, scale=scales, levels=level_counts)
@settings(max_examples=100)
def test_gradients_are_finite(loc, scale, levels):
    parameters = [torch.tensor(value, requires_grad=True) for value in (loc, scale)]
    DiscretizedLogistic(*parameters, levels).log_prob(torch.arange(levels)).sum().backward()
    assert all(torch.isfinite(parameter.grad) for parameter in parameters)


def test_gradients_equal_finite_differences(float64):
    parameters = [torch.tensor([-0.3, 0.9], requires_grad=True), torch.tensor([0.05, 0.7], requires_grad=True)]
    values = torch.arange(6).unsqueeze(-1)
    assert torch.autograd.gradcheck(lambda loc, scale: DiscretizedLogistic(loc, scale, 6).log_prob(values), parameters)


def test_the_outer_bins_reach_to_infinity(float64):
    far = DiscretizedLogistic(torch.tensor([-50.0, 50.0]), torch.tensor(0.3), 17)
    torch.testing.assert_close(far.log_prob(torch.tensor([0, 16])), torch.zeros(2), rtol=0, atol=1e-9)
    narrow = DiscretizedLogistic(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor(1e-4), 17)
    torch.testing.assert_close(narrow.log_prob(torch.tensor([0, 8, 16])), torch.zeros(3), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("loc", "scale", "levels"), [(0.2, 0.3, 5), (-1.5, 0.4, 3), (0.9, 0.05, 17), (0.0, 5.0, 8)])
def test_samples_follow_the_masses(loc, scale, levels, float64):
    distribution = DiscretizedLogistic(torch.tensor(loc), torch.tensor(scale), levels)
    n = 20_000
    x = distribution.sample((n,))
    assert x.dtype == torch.int64
    expected = n * distribution.log_prob(torch.arange(levels)).exp()
    keep = expected >= 5
    counts = torch.bincount(x, minlength=levels)
    assert counts[~keep].sum() <= 5 * expected[~keep].sum() + 10
    observed, hoped = counts[keep].double(), expected[keep]
    assert stats.chisquare(observed, hoped * observed.sum() / hoped.sum()).pvalue > 1e-4


def test_a_mixture_of_them_samples_its_masses(float64):
    mixture = Mixture(
        dist.Categorical(torch.tensor([0.3, 0.7])),
        DiscretizedLogistic(torch.tensor([-0.8, 0.6]), torch.tensor([0.1, 0.2]), 6),
    )
    masses = mixture.log_prob(torch.arange(6)).exp()
    torch.testing.assert_close(masses.sum(), torch.tensor(1.0))
    counts = torch.bincount(mixture.sample((20_000,)), minlength=6)
    assert stats.chisquare(counts, 20_000 * masses / masses.sum()).pvalue > 1e-4


def test_shapes_and_expansion():
    distribution = DiscretizedLogistic(torch.zeros(3), torch.ones(2, 1), 4)
    assert distribution.batch_shape == (2, 3)
    assert distribution.sample((5,)).shape == (5, 2, 3)
    assert distribution.log_prob(torch.zeros(7, 1, 1, dtype=torch.uint8)).shape == (7, 2, 3)
    wider = distribution.expand((4, 2, 3))
    assert (wider.batch_shape, wider.levels) == ((4, 2, 3), 4)
    assert wider.to_event(1).event_shape == (3,)
    torch.testing.assert_close(wider.log_prob(torch.tensor(2))[1], distribution.log_prob(torch.tensor(2)))
    assert distribution.support.is_discrete


@pytest.mark.parametrize("value", [-1, 4, 0.5])
def test_values_off_the_support_are_refused(value):
    with pytest.raises(ValueError, match="support"):
        DiscretizedLogistic(torch.tensor(0.0), torch.tensor(1.0), 4, validate_args=True).log_prob(torch.tensor(value))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scales_must_be_positive(scale):
    with pytest.raises(ValueError, match="scale"):
        DiscretizedLogistic(torch.tensor(0.0), torch.tensor(scale), 4, validate_args=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.float64])
def test_bernoulli_scores_any_dtype_in_the_precision_of_its_logits(dtype):
    logits = torch.tensor([-1.3, 0.4], dtype=torch.float64)
    log_prob = Bernoulli(logits=logits).log_prob(torch.tensor([1, 0], dtype=dtype))
    expected = torch.stack([logits[0].sigmoid().log(), (1 - logits[1].sigmoid()).log()])
    torch.testing.assert_close(log_prob, expected, rtol=1e-12, atol=0)


def test_bernoulli_is_pyros_in_all_else():
    ours, pyros = Bernoulli(logits=torch.zeros(3)), dist.Bernoulli(logits=torch.ones(3))
    torch.testing.assert_close(kl_divergence(ours, pyros), kl_divergence(dist.Bernoulli(logits=torch.zeros(3)), pyros))
    assert type(ours.expand((2, 3))) is Bernoulli
    assert ours.has_enumerate_support


def test_a_mixture_can_be_transformed_to_unconstrained_space():
    mixture = Mixture(dist.Categorical(torch.ones(4, 2)), dist.Normal(torch.zeros(4, 2), 1.0))
    for registry in (transform_to, biject_to):
        assert registry(mixture.to_event(1).support)(torch.ones(4)).shape == (4,)
    assert type(mixture.expand((3, 4))) is Mixture
    positive = Mixture(dist.Categorical(torch.ones(2)), dist.Exponential(torch.ones(2)))
    assert (transform_to(positive.support)(torch.tensor(-3.0)) > 0).all()
