"""Dequantized flows: log P(x) is the integral of the density over a cell, which is known where the flow is simple.

Identities hold in float64 to 1e-9; averages of draws within four standard errors.
"""

import math

import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import jittered
from pyro import poutine
from torch import nn

import dgm_pyro as dgm
from dgm_pyro.families.conditionals import Uniform
from dgm_pyro.families.dequantized import Floor, dequantizer
from dgm_pyro.families.flow import iaf, maf, nsf, nsf_autoregressive, realnvp
from dgm_pyro.families.multiscale import convolutional_dequantizer
from dgm_pyro.networks import (
    MADE,
    MLP,
    Affine,
    DenoisingMLP,
    Elementwise,
    MaskedAutoregressive,
    NormalCDF,
    RationalQuadraticSpline,
    Sigmoid,
)

pytestmark = pytest.mark.usefixtures("float64")

IMAGE = (1, 2, 2)


def every(levels, features):
    """All outcomes, (levels ** features, features)."""
    grids = torch.meshgrid(*[torch.arange(levels)] * features, indexing="ij")
    return torch.stack([g.flatten() for g in grids], -1)


def on_line():
    """A flow of one feature whose distribution function is known: Phi of what the inverse map makes of v."""
    return jittered(dgm.Flow(1, [Elementwise(1, RationalQuadraticSpline(4, -2.0, 2.0)), NormalCDF()]), 0.7)


# -- the integral over a cell ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (3,), IMAGE])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_uniform_on_the_cube_makes_all_outcomes_equally_likely_without_variance(shape, levels):
    for flow in (dgm.Flow(shape, [], base=Uniform(shape)), dgm.Flow(shape, [NormalCDF()])):
        program = dgm.Dequantized(flow, levels)
        x = torch.randint(levels, (50, *shape))
        expected = torch.full((4, 50), -math.prod(shape) * math.log(levels))
        torch.testing.assert_close(program.log_weights(x, num_particles=4), expected, rtol=0, atol=1e-7)


@torch.no_grad()
def cell_masses(flow, levels):
    """P(x) for all x of one feature, by the flow's distribution function."""
    edges = torch.linspace(0, 1, levels + 1)[1:-1].unsqueeze(-1)
    inner = torch.distributions.Normal(0.0, 1.0).cdf(flow.inverse_map(edges)).squeeze(-1)
    return torch.cat((torch.zeros(1), inner, torch.ones(1))).diff()


def log_mean_exp(weights):
    """The estimate of log P and its standard error, by the delta method."""
    ratio = (weights - weights.max(0).values).exp()
    error = ratio.std(0) / ratio.mean(0) / math.sqrt(len(weights))
    return weights.logsumexp(0) - math.log(len(weights)), error


@pytest.mark.parametrize("guide", [None, lambda: jittered(dequantizer(1, 5), 0.1), on_line])
def test_weights_average_to_the_mass_of_the_cell_and_their_logarithms_to_less(guide):
    flow = on_line()
    program = dgm.Dequantized(flow, 5, guide and guide())
    x = torch.arange(5).unsqueeze(-1)
    exact = cell_masses(flow, 5).log()
    torch.testing.assert_close(exact.exp().sum(), torch.tensor(1.0))
    weights = program.log_weights(x, num_particles=20_000)
    estimate, error = log_mean_exp(weights)
    assert ((estimate - exact).abs() < 4 * error).all()
    elbo, elbo_error = weights.mean(0), weights.std(0) / math.sqrt(len(weights))
    assert (elbo < exact + 4 * elbo_error).all()
    assert (elbo < exact - 4 * elbo_error).any()


def test_masses_of_all_outcomes_in_the_plane_add_to_one():
    program = dgm.Dequantized(jittered(nsf_autoregressive(2, layers=2, hidden=(8,), bins=4, unit_cube=True), 0.1), 3)
    estimate, error = log_mean_exp(program.log_weights(every(3, 2), num_particles=20_000))
    total, total_error = estimate.exp().sum(), (estimate.exp() * error).square().sum().sqrt()
    assert abs(total - 1) < 4 * total_error
    assert total_error < 0.01


def test_samples_follow_the_masses_of_the_cells():
    flow = on_line()
    x = dgm.Dequantized(flow, 5).sample(20_000)
    assert x.dtype == torch.int64
    expected = cell_masses(flow, 5)
    observed = torch.bincount(x.flatten(), minlength=5) / 20_000
    assert ((observed - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_the_elbo_is_pyros():
    flow, guide = realnvp(IMAGE, layers=2, hidden=(8,), unit_cube=True), dequantizer(IMAGE, 17)
    program = jittered(dgm.Dequantized(flow, 17, guide))
    x = torch.randint(17, (6, *IMAGE))
    torch.manual_seed(5)
    ours = program.log_weights(x).sum()
    torch.manual_seed(5)
    theirs = pyro.infer.Trace_ELBO(max_plate_nesting=1)
    torch.testing.assert_close(-torch.tensor(theirs.loss(program.model, program.guide, x)), ours)


def test_the_volume_of_a_cell_enters_the_guide():
    program = dgm.Dequantized(dgm.Flow(IMAGE, [NormalCDF()]), 17, jittered(dequantizer(IMAGE, 17)))
    x = torch.randint(17, (6, *IMAGE))
    trace = poutine.trace(program.guide).get_trace(x)
    trace.compute_log_prob()
    v = trace.nodes["x_continuous"]["value"]
    u = 17 * v - x
    assert ((u > 0) & (u < 1)).all()
    by_hand = program.dequantizer.log_prob(u, given=x) + 4 * math.log(17)
    torch.testing.assert_close(trace.nodes["x_continuous"]["log_prob"], by_hand)


# -- the guide ---------------------------------------------------------------------------------------------------------


def digits_like(size):
    """Two features of six levels that go together, so that the density is steep across cells."""
    first = torch.distributions.Binomial(5, torch.tensor(0.3)).sample((size, 1))
    return torch.cat((first, (5 - first + torch.randint(2, (size, 1))).clamp(0, 5)), -1).long()


def fitted(program, steps=150):
    optimizer = torch.optim.Adam(program.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -program.log_weights(digits_like(128)).mean()
        loss.backward()
        optimizer.step()
    return program


def test_variational_dequantization_tightens_the_bound():
    torch.manual_seed(0)
    flow = realnvp(2, layers=4, hidden=(16,), unit_cube=True)
    plain = fitted(dgm.Dequantized(flow, 6))
    for parameter in flow.parameters():
        parameter.requires_grad_(False)
    program = dgm.Dequantized(flow, 6, dequantizer(2, 6, hidden=(16,)))
    optimizer = torch.optim.Adam(program.dequantizer.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        (-program.log_weights(digits_like(128)).mean()).backward()
        optimizer.step()
    x = digits_like(500)
    uniform, variational = plain.log_weights(x, num_particles=200), program.log_weights(x, num_particles=200)
    # the same flow, so the same log P: a higher bound is a tighter one
    gain = variational.mean(0) - uniform.mean(0)
    assert gain.mean() > 4 * gain.std() / math.sqrt(len(x))
    assert gain.mean() > 0.02
    exact, _ = log_mean_exp(uniform)
    assert variational.mean() < exact.mean()


@pytest.mark.parametrize("level", [pytest.param(0, marks=pytest.mark.nightly), 255])
def test_the_bound_of_constant_data_is_at_most_zero(level):
    """log P(x) <= 0. A q that moves to an edge of the cell, where draws round to one number, would promise more."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    flow = realnvp(2, layers=8, hidden=(16,), unit_cube=True)
    program = dgm.Dequantized(flow, 256, dequantizer(2, 256, hidden=(16,)))
    x = torch.full((256, 2), level)
    optimizer = torch.optim.Adam(program.parameters(), lr=5e-3)
    for step in range(600 if level else 1200):
        optimizer.zero_grad()
        (-program.log_weights(x).mean()).backward()
        optimizer.step()
        if step % 300 == 299:
            with torch.no_grad():
                weights = program.log_weights(x, num_particles=20)
            assert -0.1 < weights.mean() < 4 * weights.std() / weights.numel() ** 0.5


@pytest.mark.parametrize(
    "make", [lambda: dequantizer((1, 4, 4), 256), lambda: convolutional_dequantizer((1, 4, 4), 256, width=4)]
)
def test_dequantizers_stay_within_the_cells_whatever_their_network_says(make):
    torch.set_default_dtype(torch.float32)
    q, x = make(), torch.randint(256, (50, 1, 4, 4))
    for size in (1.0, 30.0, 1000.0):
        with torch.no_grad():
            for parameter in q.parameters():
                parameter.copy_(size * torch.randn_like(parameter))
            u = q(x).sample((500,))
        assert ((u < 3e-5) | (u > 1 - 3e-5)).double().mean() < 1e-4


def test_too_many_levels_for_the_precision_are_dequantized_uniformly():
    torch.set_default_dtype(torch.float32)
    with pytest.raises(ValueError, match=r"levels is 65536, but with more than 2048 levels .*use the uniform one"):
        dequantizer(2, 65536)
    data = dgm.Data(torch.randint(65536, (20, 2)), levels=65536)
    assert isinstance(dgm.build("maf", data).dequantizer, Uniform)
    assert not isinstance(dgm.build("maf", dgm.Data(data.x // 256, levels=256)).dequantizer, Uniform)
    torch.set_default_dtype(torch.float64)
    assert dequantizer(2, 65536).event_shape == (2,)


def test_a_beta_is_no_guide_of_a_flow():
    flow = maf(2, layers=1, hidden=(4,), unit_cube=True)
    beta = dgm.Beta(2, MLP((2,), 4, (4,)))
    with pytest.raises(TypeError, match="guide must not be a Beta"):
        dgm.Dequantized(flow, 4, beta)
    with pytest.raises(TypeError, match="encoder must not be a Beta where the prior is a flow"):
        dgm.VAE(flow, dgm.Normal(2, MLP((2,), 4, (4,))), beta)


GUIDES = {
    "uniform": lambda: None,
    "normal": lambda: dequantizer(IMAGE, 17),
    "flow": lambda: nsf(IMAGE, layers=2, hidden=(8,), bins=4, given_shape=IMAGE, given_levels=17, unit_cube=True),
    "iaf": lambda: iaf(IMAGE, layers=2, hidden=(8,), given_shape=IMAGE, given_levels=17, unit_cube=True),
    "on-the-cube": lambda: dgm.Flow(
        IMAGE,
        [MaskedAutoregressive(cube := RationalQuadraticSpline(4, 0, 1, "linear"), MADE(4, cube.num_parameters, (8,)))],
        base=Uniform(IMAGE),
    ),
    "unconditional": lambda: maf(IMAGE, layers=1, hidden=(8,), unit_cube=True),
}


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_every_guide_gives_finite_bounds_and_every_parameter_a_gradient(make):
    program = jittered(dgm.Dequantized(nsf(IMAGE, layers=2, hidden=(8,), bins=4, unit_cube=True), 17, make()))
    x = torch.randint(17, (32, *IMAGE), dtype=torch.uint8)
    weights = program.log_weights(x, num_particles=3)
    assert weights.shape == (3, 32)
    weights.mean().backward()
    for name, parameter in program.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_guide_may_read_x_and_given():
    guide = dgm.Flow(2, [NormalCDF()], dgm.Normal(2, MLP((2,), 4, (8,), levels=5, num_classes=3)))
    program = jittered(dgm.Dequantized(realnvp(2, layers=2, hidden=(8,), num_classes=3, unit_cube=True), 5, guide))
    x, y = torch.randint(5, (6, 2)), torch.arange(6) % 3
    trace = poutine.trace(program.guide).get_trace(x, y)
    trace.compute_log_prob()
    site = trace.nodes["x_continuous"]
    by_hand = guide.log_prob(5 * site["value"] - x, given=(x, y)) + 2 * math.log(5)
    torch.testing.assert_close(site["log_prob"], by_hand)


# -- given, and programs around it -------------------------------------------------------------------------------------


def test_given_reaches_the_flow():
    program = jittered(dgm.Dequantized(realnvp(2, layers=2, hidden=(8,), num_classes=3, unit_cube=True), 5), 1.0)
    assert (program.conditional, program.num_classes) == (True, 3)
    x, y = torch.randint(5, (6, 2)), torch.arange(6) % 3
    torch.manual_seed(0)
    one = program.log_weights(x, y)
    torch.manual_seed(0)
    other = program.log_weights(x, (y + 1) % 3)
    assert (one - other).abs().min() > 1e-6
    assert program.sample(6, y).shape == (6, 2)


def test_labels_are_summed_out_over_a_dequantized_flow():
    program = jittered(dgm.Dequantized(realnvp(2, layers=2, hidden=(8,), num_classes=3, unit_cube=True), 5))
    labeled = dgm.Labeled(dgm.Categorical((), 3), program)
    x = torch.randint(5, (4, 2))
    torch.manual_seed(0)
    weights = labeled.log_weights(x, num_particles=20_000)
    estimate, error = log_mean_exp(weights)
    parts = [log_mean_exp(program.log_weights(x, torch.full((4,), y), num_particles=20_000)) for y in range(3)]
    sums = torch.stack([part[0] for part in parts]).logsumexp(0) - math.log(3)
    errors = torch.stack([error, *(part[1] for part in parts)]).square().sum(0).sqrt()
    assert ((estimate - sums).abs() < 4 * errors).all()


def test_latents_nest_and_unroll():
    program = dgm.Dequantized(nsf(2, layers=1, hidden=(8,), unit_cube=True), 5)
    assert program.latents("x") == ("x_continuous",)
    assert program.latents("y") == ("y_continuous",)
    assert program.unroll() is program
    squashed = dgm.VAE(
        dgm.Normal(1), dgm.Flow(2, [NormalCDF()], dgm.Normal(2, nn.Linear(1, 4))), dgm.Normal(1, nn.Linear(2, 2))
    )
    nested = dgm.Dequantized(squashed, 5)
    assert nested.latents("x") == ("x_continuous", "z")
    assert nested.log_weights(torch.randint(5, (3, 2)), num_particles=2).shape == (2, 3)
    assert nested.unroll().flow is nested.flow  # there is no chain in it
    prior = dgm.Diffusion(1, DenoisingMLP((1,), (4,)), num_steps=2)
    chained = dgm.Dequantized(dgm.VAE(prior, squashed.likelihood, squashed.encoder), 5)
    assert chained.unroll().latents("x") == ("x_continuous", "z", "z_2", "z_1")


def test_the_continuous_latent_can_be_conditioned_and_inferred():
    program = dgm.Dequantized(on_line(), 5)
    v = torch.tensor([[0.1], [0.5], [0.99]])
    with poutine.condition(data={"x_continuous": v}):
        assert program.model(3).tolist() == [[0], [2], [4]]
    posterior = pyro.infer.Predictive(program.model, guide=program.guide, num_samples=50)(torch.tensor([[3]]))
    assert ((posterior["x_continuous"] >= 0.6) & (posterior["x_continuous"] <= 0.8)).all()


# -- edges -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [NormalCDF(), Sigmoid()])
def test_no_draw_of_bytes_scores_an_infinity(end):
    """A million draws in single precision, of which some round to the edges of their cells."""
    torch.set_default_dtype(torch.float32)  # the float64 fixture restores it
    program = dgm.Dequantized(dgm.Flow(1000, [Elementwise(1000, Affine()), end]), 256)
    for x in (0, 1, 254, 255):
        weights = program.log_weights(torch.full((250, 1000), x, dtype=torch.uint8))
        assert torch.isfinite(weights).all()
        assert weights.dtype == torch.float32
    weights = program.log_weights(torch.randint(256, (250, 1000), dtype=torch.uint8), num_particles=4)
    assert torch.isfinite(weights).all()


@given(st.integers(2, 1000), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60)
def test_every_place_in_a_cell_belongs_to_it_after_rounding(levels, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(levels, (2000,), generator=generator)
    u = torch.rand(2000, generator=generator, dtype=dtype)
    u[:4] = torch.tensor([0.0, 1.0, 1e-9, 1 - 1e-9], dtype=dtype)
    v = (x.to(dtype) + u) / levels
    assert (Floor(v, levels).log_prob(x) == 0).all()
    middle = (x.to(dtype) + 0.5) / levels
    assert torch.equal(Floor(middle, levels).sample(), x)
    assert (Floor(middle, levels).log_prob((x + 1) % levels) == -math.inf).all()


def test_floor_samples_its_support():
    distribution = Floor(torch.tensor([-0.5, 0.0, 0.24, 0.25, 1.0, 1.5]), 4)
    assert distribution.sample().tolist() == [0, 0, 0, 1, 3, 3]
    assert distribution.sample((2,)).shape == (2, 6)
    assert distribution.support.check(distribution.sample()).all()
    assert (distribution.log_prob(distribution.sample()) == 0).all()
    assert distribution.expand((2, 6)).sample().shape == (2, 6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float64])
def test_integers_of_any_dtype_are_the_same_outcome(dtype):
    program = dgm.Dequantized(on_line(), 5)
    x = torch.arange(5).unsqueeze(-1)
    torch.manual_seed(0)
    expected = program.log_weights(x)
    torch.manual_seed(0)
    assert torch.equal(program.log_weights(x.to(dtype)), expected)


# -- bad input ---------------------------------------------------------------------------------------------------------

GOOD = lambda: dgm.Dequantized(dgm.Flow(2, [NormalCDF()]), 5)  # noqa: E731

BAD = {
    "no-cube": (
        lambda: dgm.Dequantized(realnvp(2), 5),
        ValueError,
        r"flow of Dequantized must live on the unit cube.*NormalCDF\(\).*unit_cube=True",
    ),
    "no-cube-normal": (lambda: dgm.Dequantized(dgm.Normal(2), 5), ValueError, "unit cube, but this Normal does not"),
    "no-cube-guide": (
        lambda: dgm.Dequantized(realnvp(2, unit_cube=True), 5, guide=realnvp(2, given_shape=(2,))),
        ValueError,
        "guide of Dequantized must live on the unit cube",
    ),
    "a-mass": (
        lambda: dgm.Dequantized(dgm.Bernoulli(2), 5),
        TypeError,
        "with a density, such as dgm.Flow, got Bernoulli",
    ),
    "no-program": (lambda: dgm.Dequantized(nn.Linear(2, 2), 5), TypeError, "flow must be a dgm.Program, got Linear"),
    "levels-one": (
        lambda: dgm.Dequantized(realnvp(2, unit_cube=True), 1),
        ValueError,
        "levels must be an int of at least 2",
    ),
    "levels-real": (lambda: dgm.Dequantized(realnvp(2, unit_cube=True), 5.0), ValueError, "levels must be an int"),
    "guide-shape": (
        lambda: dgm.Dequantized(realnvp(2, unit_cube=True), 5, guide=Uniform(3)),
        ValueError,
        r"guide's event_shape is \(3,\), but the flow's is \(2,\)",
    ),
    "guide-given": (
        lambda: dgm.Dequantized(realnvp(2, unit_cube=True), 5, guide=realnvp(2, given_shape=(3,), unit_cube=True)),
        ValueError,
        r"guide expects given_shape \(3,\), but it is given x, of shape \(2,\)",
    ),
    "guide-type": (
        lambda: dgm.Dequantized(realnvp(2, unit_cube=True), 5, guide=nn.Linear(2, 2)),
        TypeError,
        "guide must be a dgm_pyro.Conditional or None, got Linear",
    ),
    "exact": (lambda: GOOD().log_prob(torch.zeros(1, 2)), dgm.IntractableError, "log_weights"),
    "x-fraction": (lambda: GOOD().log_weights(torch.full((1, 2), 0.5)), ValueError, r"x holds 0\.5.*integers 0 \.\. 4"),
    "x-too-large": (lambda: GOOD().log_weights(torch.full((1, 2), 5)), ValueError, "5 levels"),
    "x-negative": (lambda: GOOD().log_weights(torch.full((1, 2), -1)), ValueError, "from -1 to -1"),
    "x-shape": (lambda: GOOD().log_weights(torch.zeros(1, 3)), ValueError, r"x has shape \(1, 3\)"),
    "given": (lambda: GOOD().sample(2, torch.zeros(2)), ValueError, "not conditional"),
}


@pytest.mark.parametrize(("act", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name(act, error, message):
    with pytest.raises(error, match=message):
        act()
