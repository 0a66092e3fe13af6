"""Units: the density of a standardized program is that of x, and what `build` makes does not depend on units."""

import math
import warnings

import pyro
import pytest
import torch
from programs import CASES, diffusion, standardized, vae
from torch.distributions import MultivariateNormal, Normal

import dgm_pyro as dgm
from dgm_pyro.catalog import MODELS, units_of

SHIFT, SCALE = torch.tensor([3.0, -200.0]), torch.tensor([0.1, 50.0])


def moved(program):
    return dgm.Standardized(program, SHIFT, SCALE)


def test_a_part_of_the_program_within_is_named_where_it_is():
    program = dgm.Standardized(dgm.Normal(2), 0.0, 2.0)
    with pytest.raises(AttributeError, match=r"use \.program\.network, or build with standardize=False"):
        _ = program.network
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = program.nothing


def test_the_density_is_that_of_the_moved_distribution():
    x = SHIFT + SCALE * torch.randn(9, 2)
    torch.testing.assert_close(moved(dgm.Normal(2)).log_prob(x), Normal(SHIFT, SCALE).log_prob(x).sum(-1))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["standardized-flow", "standardized-made"])
def test_it_integrates_to_one_in_the_units_of_x(name):
    program = CASES[name].build()
    places = torch.linspace(-9, 9, 241)
    grid = torch.cartesian_prod(0.5 + 0.7 * places, -1 + 1.6 * places)
    area = (0.7 * 18 / 240) * (1.6 * 18 / 240)
    assert abs(program.log_prob(grid).exp().sum().item() * area - 1) < 2e-3


def test_a_support_moves_along():
    cube = dgm.Standardized(dgm.Uniform(2), shift=[1.0, -1.0], scale=[2.0, 0.5])
    support = cube.support_given()
    inside, outside = torch.tensor([[1.2, -0.6]]), torch.tensor([[1.2, 0.2]])
    assert cube.log_prob(inside).item() == 0
    assert support.check(inside).all()
    assert not support.check(outside).all()
    with pytest.raises(ValueError, match="outside of the support"):
        dgm.evaluate(cube, outside)


def test_float64_data_far_from_zero_lose_nothing():
    offset = torch.tensor([1e6, -1e8], dtype=torch.float64)
    near, far = moved(dgm.Normal(2)), dgm.Standardized(dgm.Normal(2), SHIFT + offset, SCALE)
    x = SHIFT + SCALE * torch.randn(50, 2).double()
    torch.testing.assert_close(far.log_prob(x + offset), near.log_prob(x), rtol=1e-5, atol=1e-5)
    drawn = far.sample(500)
    assert drawn.dtype == torch.float64
    torch.testing.assert_close((drawn - offset - SHIFT).std(0), SCALE.double(), rtol=0.15, atol=0)


def test_what_is_nested_keeps_its_own_units():
    """A site of x, and of each feature of an unrolled chain, can be read and conditioned in the units of x."""
    program = standardized(CASES["made-mixture"].build()).unroll()
    trace = pyro.poutine.trace(program.model).get_trace(6)
    x = trace.nodes["x"]["value"]
    each = torch.stack([trace.nodes[f"x_{i}"]["value"] for i in (1, 2)], -1)
    torch.testing.assert_close(x, each)
    fixed = pyro.poutine.condition(program.model, {"x_1": torch.full((4,), 7.5)})(4)
    torch.testing.assert_close(fixed[:, 0], torch.full((4,), 7.5))


def test_evidence_by_other_means_is_in_the_units_of_x():
    program, x = diffusion(2), torch.randn(3, 2)
    found = dgm.infer.smc(moved(program), SHIFT + SCALE * x, num_particles=8).log_evidence
    torch.testing.assert_close(found, dgm.infer.smc(program, x, num_particles=8).log_evidence - SCALE.log().sum(),
                               atol=0.5, rtol=0)  # fmt: skip
    options = {"num_particles": 20, "num_temperatures": 0, "gradient_steps": 3, "num_samples": 400}
    inner = vae(dgm.Normal(2))
    plain, units = dgm.infer.gaps(inner, x, **options), dgm.infer.gaps(moved(inner), SHIFT + SCALE * x, **options)
    torch.testing.assert_close(units.elbo, plain.elbo - SCALE.log().sum().double(), atol=0.3, rtol=0)
    assert torch.equal(units.x, SHIFT + SCALE * x)


OF_IMAGES = [name for name, (_, meaning) in MODELS.items() if meaning.endswith("(images)")]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("implicit", "classifier", *OF_IMAGES)])
def test_what_is_built_by_name_does_not_depend_on_units(name):
    """A scale that is a power of two changes no rounding: the same training, its nats moved by the Jacobian."""
    x, found = torch.randn(40, 2), []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        data = dgm.Data(scale * x)
        program = dgm.build(name, data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dgm.fit(program, data, epochs=1, progress=False, validation=None)
        found.append(dgm.evaluate(program, data, num_samples=200).nats)
    tolerance = 1e-4 if program.tractable else 0.2  # noise belongs to the data, which differ
    assert found[0] - found[1] == pytest.approx(2 * math.log(1024), abs=tolerance)


def test_correlated_normals_of_unequal_scales_are_learned_in_their_own_units():
    scales = torch.logspace(-1, 2, 5).double()
    places = torch.arange(5)
    correlations = 0.8 ** (places - places.unsqueeze(-1)).abs().double()
    truth = MultivariateNormal(torch.full((5,), 1e6).double(), correlations * scales.outer(scales))
    torch.manual_seed(0)
    train, test = dgm.Data(truth.sample((2000,))), dgm.Data(truth.sample((1000,)))
    program = dgm.build("maf", train)
    dgm.fit(program, train, epochs=6, progress=False, validation=None)
    assert dgm.evaluate(program, test).nats == pytest.approx(truth.log_prob(test.x).mean().item(), abs=0.3)


def test_units_put_the_bulk_within_reach():
    torch.manual_seed(0)
    x = torch.randn(20_000, 4) * torch.tensor([2.0, 1.0, 1.0, 1.0]) + torch.tensor([5.0, 0.0, 0.0, 0.0])
    x[:, 1] = x[:, 1] / x[:, 2]  # Cauchy: its quartiles are -1 and 1
    x[:, 3] = 8 * torch.rand(20_000) + 1
    shift, scale = units_of(x)
    torch.testing.assert_close(shift, torch.tensor([5.0, 0.0, 0.0, 5.0]), atol=0.1, rtol=0)
    expected = torch.tensor([2 * 2.576, 2 / 1.349 * 2.576, 2.576, 4 * 0.99]) / 4
    torch.testing.assert_close(scale, expected, rtol=0.05, atol=0)


def test_units_of_a_feature_that_is_nearly_always_zero():
    x = torch.zeros(1000, 1)
    x[::400] = 50.0
    shift, scale = units_of(x)
    torch.testing.assert_close(torch.cat([shift, scale]), torch.cat([x.mean(0), x.std(0, correction=0)]))


def test_units_of_images_are_those_of_their_channels():
    images = torch.randn(50, 2, 4, 4) * torch.tensor([1.0, 10.0]).reshape(2, 1, 1)
    shift, scale = units_of(images)
    assert shift.shape == scale.shape == (2, 1, 1)
    torch.testing.assert_close(scale.flatten(), torch.tensor([0.644, 6.44]), rtol=0.1, atol=0)


def test_a_constant_feature_and_one_too_coarse_are_named():
    x = torch.randn(100, 3)
    x[:, 1] = 4.0
    with pytest.warns(UserWarning, match="feature 1 of x is constant"):
        shift, scale = units_of(x)
    assert shift[1] == 4
    assert scale[1] == 1
    with pytest.warns(UserWarning, match="feature 2 of x is too coarse in torch.float32.*pass float64"):
        units_of(torch.randn(100, 3) + torch.tensor([0.0, 0.0, 1e6]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        units_of(torch.randn(100, 3).double() + 1e6)


def test_units_are_printed_and_can_be_left_out():
    data = dgm.Data(torch.randn(20, 2))
    assert str(dgm.build("vae", data)).startswith("Standardized VAE")
    assert isinstance(dgm.build("vae", data, standardize=False), dgm.VAE)
    assert isinstance(dgm.build("vae", dgm.Data(torch.randint(3, (20, 2)), levels=3)), dgm.VAE)


def test_classifiers_read_their_x_standardized():
    x, y = torch.randn(64, 2), torch.arange(64) % 2
    x[:, 0] += 4 * y
    data = dgm.Data(1e4 * x, y)
    for program in (dgm.build("classifier", data), dgm.build("vae", data, labeled=True)):
        dgm.fit(program, data, epochs=30, lr=0.01, progress=False, validation=None)
        assert (program.classify(data.x) == y).float().mean() > 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: dgm.Standardized(dgm.Normal(2), [0.0] * 3, 1.0),
            r"shift has shape \(3,\), but the program's event_shape is \(2,\)",
        ),
        (lambda: dgm.Standardized(dgm.Normal(2), 0.0, [1.0, 0.0]), "scale must be positive, got 0"),
        (lambda: dgm.Standardized(dgm.Normal(2), 0.0), "shift and scale go together"),
        (lambda: dgm.Standardized(dgm.Normal(2)), "nothing is standardized"),
        (lambda: dgm.Standardized(dgm.Normal(2), given_shift=0.0, given_scale=1.0), "need a single real given"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_mass_has_no_units():
    with pytest.raises(TypeError, match="is a mass, and integers have no other units"):
        dgm.Standardized(dgm.Bernoulli(2), 0.0, 1.0)
