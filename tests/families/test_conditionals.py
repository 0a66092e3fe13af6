"""The conditionals against formulas by hand, in every way to parameterize them."""

import copy
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st
from programs import assert_same_number
from scipy import integrate, stats
from torch import nn

import dgm_pyro as dgm
from dgm_pyro.families import distributions
from dgm_pyro.families.conditionals import inverse_softplus, positive
from dgm_pyro.networks import MLP

pytestmark = pytest.mark.usefixtures("float64")

# name -> constructor of a conditional with keyword arguments, and its number of raw parameters per feature
FAMILIES = {
    "normal": (dgm.Normal, {}, 2),
    "bernoulli": (dgm.Bernoulli, {}, 1),
    "categorical": (dgm.Categorical, {"levels": 5}, 5),
    "mixture": (dgm.MixtureOfNormals, {"components": 3}, 9),
    "logistic": (dgm.DiscretizedLogistic, {"levels": 7, "components": 2}, 6),
}


@pytest.fixture(params=FAMILIES, name="family")
def _family(request):
    return FAMILIES[request.param]


class Table(nn.Module):
    """Returns the same output for every row, whatever is given."""

    def __init__(self, output):
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, given):
        return self.output.expand(len(given), *self.output.shape)


def outcomes(program, n):
    if program.levels is None:
        return torch.randn(n, *program.event_shape)
    return torch.randint(program.levels, (n, *program.event_shape))


def softplus(value):
    return np.log1p(np.exp(-abs(value))) + max(value, 0.0)


def softmax(values):
    e = np.exp(values - np.max(values))
    return e / e.sum()


# -- formulas ----------------------------------------------------------------------------------------------------------


def test_normal_by_hand():
    raw = torch.randn(2, 3)
    x = torch.randn(4, 3)
    scale = np.vectorize(softplus)(raw[1].numpy())
    expected = stats.norm(raw[0].numpy(), scale).logpdf(x.numpy()).sum(-1)
    actual = dgm.Normal(3, parameters=raw).log_prob(x)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-12, atol=1e-12)


def test_bernoulli_by_hand():
    raw = torch.randn(1, 4)
    x = torch.randint(2, (5, 4))
    p = 1 / (1 + np.exp(-raw[0].numpy()))
    expected = np.where(x.numpy() == 1, np.log(p), np.log(1 - p)).sum(-1)
    torch.testing.assert_close(
        dgm.Bernoulli(4, parameters=raw).log_prob(x), torch.tensor(expected), rtol=1e-12, atol=1e-12
    )


def test_categorical_by_hand():
    raw = torch.randn(3, 2)
    x = torch.randint(3, (6, 2))
    log_p = np.log(np.stack([softmax(raw[:, i].numpy()) for i in range(2)]))
    expected = [log_p[0, a] + log_p[1, b] for a, b in x.tolist()]
    torch.testing.assert_close(
        dgm.Categorical(2, 3, parameters=raw).log_prob(x), torch.tensor(expected), rtol=1e-12, atol=1e-12
    )


def test_mixture_of_normals_by_hand():
    """P = 3 * components, in the order logits, locations, raw scales."""
    raw = torch.randn(3 * 4, 2)
    x = torch.randn(5, 2)
    logits, loc, raw_scale = raw.reshape(3, 4, 2).numpy()
    expected = np.zeros(5)
    for feature in range(2):
        weights = softmax(logits[:, feature])
        scale = [softplus(value) for value in raw_scale[:, feature]]
        density = sum(
            w * stats.norm(m, s).pdf(x[:, feature].numpy())
            for w, m, s in zip(weights, loc[:, feature], scale, strict=True)
        )
        expected += np.log(density)
    actual = dgm.MixtureOfNormals(2, 4, parameters=raw).log_prob(x)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-11, atol=1e-11)


def test_mixture_of_normals_integrates_to_one():
    program = dgm.MixtureOfNormals(1, 3, parameters=torch.randn(9, 1))
    density = lambda x: program.log_prob(torch.tensor([[x]])).exp().item()  # noqa: E731
    total, error = integrate.quad(density, -60, 60, points=[-3, -1, 0, 1, 3], limit=200)
    assert abs(total - 1) < 1e-8 + error


def test_discretized_logistic_by_hand():
    """A weighted sum of differences of sigmoids half a level apart, the outer bins open to infinity."""
    levels, components = 6, 3
    raw = torch.randn(3 * components, 1)
    logits, loc, raw_scale = raw.reshape(3, components).numpy()
    scale = [softplus(value) for value in raw_scale]
    x = np.arange(levels)
    center = 2 * x / (levels - 1) - 1
    above = np.where(x == levels - 1, np.inf, center + 1 / (levels - 1))
    below = np.where(x == 0, -np.inf, center - 1 / (levels - 1))
    masses = sum(
        w * (stats.logistic(m, s).cdf(above) - stats.logistic(m, s).cdf(below))
        for w, m, s in zip(softmax(logits), loc, scale, strict=True)
    )
    program = dgm.DiscretizedLogistic(1, levels, components, parameters=raw)
    actual = program.log_prob(torch.arange(levels).unsqueeze(-1)).exp()
    torch.testing.assert_close(actual, torch.tensor(masses), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(actual.sum(), torch.tensor(1.0), rtol=0, atol=1e-12)


@hypothesis_given(
    levels=st.integers(2, 12),
    components=st.integers(1, 4),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60)
def test_masses_of_single_features_sum_to_one(levels, components, spread, seed):
    torch.manual_seed(seed)
    for program in (
        dgm.Categorical((), levels, parameters=spread * torch.randn(levels)),
        dgm.DiscretizedLogistic((), levels, components, parameters=spread * torch.randn(3 * components)),
        dgm.Bernoulli((), parameters=spread * torch.randn(1)),
    ):
        log_mass = program.log_prob(torch.arange(program.levels))
        torch.testing.assert_close(log_mass.exp().sum(), torch.tensor(1.0), rtol=0, atol=1e-11)


def test_the_standard_members():
    zero = torch.zeros(1, 2)
    torch.testing.assert_close(dgm.Normal(2).log_prob(zero), torch.tensor([-math.log(2 * math.pi)]))
    torch.testing.assert_close(dgm.Bernoulli(2).log_prob(zero), torch.tensor([-2 * math.log(2)]))
    torch.testing.assert_close(dgm.Categorical(2, 5).log_prob(zero), torch.tensor([-2 * math.log(5)]))
    mixture = dgm.MixtureOfNormals((), 3)()
    torch.testing.assert_close(mixture.component_distribution.loc, torch.tensor([-2.0, 0.0, 2.0]))
    torch.testing.assert_close(mixture.component_distribution.scale, torch.ones(3))
    torch.testing.assert_close(mixture.mixture_distribution.probs, torch.full((3,), 1 / 3))
    logistic = dgm.DiscretizedLogistic((), 9, 3)()
    torch.testing.assert_close(logistic.component_distribution.loc, torch.tensor([-1.0, 0.0, 1.0]))
    assert dgm.MixtureOfNormals((), 1)().component_distribution.loc == 0


def test_a_scale_at_its_floor_comes_back():
    """Its gradient is that of softplus, sigmoid(raw), below the floor as above; its values are cut off there."""
    raw = torch.tensor([-30.0, -14.0, -13.0, 0.0, 40.0], requires_grad=True)
    scale = positive(raw)
    assert torch.equal(scale, F.softplus(raw).clamp_min(1e-6))
    (gradient,) = torch.autograd.grad(scale.sum(), raw)
    torch.testing.assert_close(gradient, raw.sigmoid())

    program = dgm.Normal(1, parameters=torch.tensor([[0.0], [-20.0]]), learned=True)
    x = torch.tensor([[-1.0], [1.0]])
    optimizer = torch.optim.Rprop(program.parameters(), lr=0.1)  # the signs alone: the first gradients are huge
    for _ in range(100):
        optimizer.zero_grad()
        (-program.log_prob(x).mean()).backward()
        optimizer.step()
    assert program().base_dist.scale.item() == pytest.approx(1.0, abs=0.05)


def test_softplus_scales_are_positive_at_any_raw_value():
    raw = torch.tensor([-1e6, -100.0, -1.0, 0.0, 1.0, 100.0, 1e6])
    assert (positive(raw) > 0).all()
    assert (positive(raw.float()) > 0).all()
    torch.testing.assert_close(positive(torch.tensor(inverse_softplus(0.37))), torch.tensor(0.37))
    program = dgm.Normal(7, parameters=torch.stack([torch.zeros(7), raw]))
    assert torch.isfinite(program.log_prob(torch.zeros(1, 7))).all()


# -- where the parameters come from ------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_shape", [(), (3,), (1, 2, 2)])
def test_network_outputs_may_be_flat_or_shaped(family, event_shape):
    """(B, P, *event_shape) and (B, P * numel), P first, are one distribution; that of the same free parameters."""
    make, options, num_parameters = family
    raw = torch.randn(num_parameters, *event_shape)
    shaped = make(event_shape, **options, network=Table(raw))
    # A mixture's network says how its parameters differ from the standard ones.
    free = make(event_shape, **options, parameters=raw if shaped.start is None else raw + shaped.initial())
    flat = make(event_shape, **options, network=Table(raw.reshape(-1)))
    assert free.num_parameters == num_parameters
    x, given = outcomes(free, 6), torch.randn(6, 2)
    expected = free.log_prob(x)
    assert expected.shape == (6,)
    assert_same_number(shaped.log_prob(x, given), expected)
    assert_same_number(flat.log_prob(x, given), expected)
    assert flat.sample(6, given).shape == (6, *event_shape)


def test_any_linear_layer_serves(family):
    make, options, num_parameters = family
    program = make(3, **options, network=nn.Linear(2, 3 * num_parameters))
    x, given = outcomes(program, 5), torch.randn(5, 2)
    assert program.conditional
    program.log_prob(x, given).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in program.parameters())
    # a row depends on its own given alone
    other = torch.cat([given[:1], torch.randn(4, 2)])
    torch.testing.assert_close(program.log_prob(x, other)[0], program.log_prob(x, given)[0])


def test_labels_and_images_may_be_given(family):
    make, options, num_parameters = family
    labels = torch.tensor([0, 2, 2, 1])
    for network in (nn.Embedding(3, 2 * num_parameters), MLP((), 2 * num_parameters, (4,), num_classes=3)):
        program = make(2, **options, network=network)
        assert program.num_classes == 3
        x = outcomes(program, 1).expand(4, 2)
        log_prob = program.log_prob(x, labels)
        assert_same_number(log_prob[1], log_prob[2])
        assert log_prob[1] != log_prob[0]
        torch.testing.assert_close(program.log_prob(x, labels.to(torch.uint8)), log_prob)
        assert program.sample(3, torch.tensor([1])).shape == (3, 2)
    images = make(2, **options, network=MLP((1, 4, 4), 2 * num_parameters, (4,), levels=17))
    given = torch.randint(17, (4, 1, 4, 4), dtype=torch.uint8)
    assert images.given_shape == (1, 4, 4)
    assert images.log_prob(outcomes(images, 4), given).shape == (4,)
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2 * num_parameters))
    program = make(2, **options, network=convolution)
    assert program.log_prob(outcomes(program, 4), torch.randn(4, 1, 4, 4)).shape == (4,)


def test_parameters_are_learned_fixed_or_given(family):
    make, options, num_parameters = family
    fixed, learned = make(3, **options), make(3, **options, learned=True)
    assert not list(fixed.parameters())
    assert [tuple(parameter.shape) for parameter in learned.parameters()] == [(num_parameters, 3)]
    assert list(fixed.state_dict()) == list(learned.state_dict()) == ["parameter"]
    x = outcomes(fixed, 4)
    torch.testing.assert_close(learned.log_prob(x), fixed.log_prob(x))
    start = torch.randn(num_parameters, 3)
    program = make(3, **options, parameters=start, learned=True)
    assert torch.equal(program.parameter, start)
    with torch.no_grad():
        program.parameter.add_(1.0)
    assert not torch.equal(program.parameter, start), "the argument is copied, not kept"


def test_more_batch_dimensions_than_one(family):
    """Inside particle plates given has further dimensions, which the network never sees."""
    make, options, num_parameters = family
    seen = []

    class Recording(nn.Linear):
        def forward(self, given):
            seen.append(given.shape)
            return super().forward(given)

    program = make(3, **options, network=Recording(2, 3 * num_parameters), given_shape=(2,))
    given = torch.randn(4, 5, 2)
    distribution = program(given)
    assert (distribution.batch_shape, distribution.event_shape) == ((4, 5), (3,))
    assert seen == [(20, 2)]
    x = outcomes(program, 5)
    one_by_one = torch.stack([program.log_prob(x, row) for row in given])
    torch.testing.assert_close(distribution.log_prob(x), one_by_one)


def test_pairs_broadcast_against_each_other():
    """(z, y) with particles on z only: the label is repeated, not refused."""
    program = dgm.Normal(3, MLP((2,), 6, (4,), num_classes=5))
    z, y = torch.randn(4, 6, 2), torch.randint(5, (6,))
    rows = [program((z[k], y)).base_dist.loc for k in range(4)]
    torch.testing.assert_close(program((z, y)).base_dist.loc, torch.stack(rows))


@pytest.mark.parametrize("outputs", [(5,), (7,), (3, 2), (2, 3, 1)])
def test_a_network_of_the_wrong_size_is_named(outputs):
    """Not even a transposed output of the right size, (B, *event_shape, P), is taken for (B, P, *event_shape)."""
    program = dgm.Normal(3, Table(torch.zeros(outputs)))
    with pytest.raises(ValueError, match=r"network of Normal returned shape .*event_shape \(3,\).*2 parameters"):
        program.log_prob(torch.zeros(4, 3), torch.zeros(4, 2))


# -- samples and types -------------------------------------------------------------------------------------------------


def test_sample_moments_of_a_mixture():
    program = dgm.MixtureOfNormals(1, 2, parameters=torch.tensor([[0.0], [1.0], [-2.0], [1.0], [0.3], [-0.5]]))
    x = program.sample(20_000).squeeze(-1)
    weights = softmax(np.array([0.0, 1.0]))
    scale = np.array([softplus(0.3), softplus(-0.5)])
    cdf = lambda v: sum(w * stats.norm(m, s).cdf(v) for w, m, s in zip(weights, (-2, 1), scale, strict=True))  # noqa: E731
    assert stats.kstest(x.numpy(), cdf).pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["bernoulli", "categorical", "logistic"])
def test_integers_of_any_type_are_outcomes(name, dtype):
    make, options, _ = FAMILIES[name]
    program = make(3, **options, learned=True)
    x = torch.tensor([[0, 1, 1], [1, 1, 0]])
    torch.testing.assert_close(program.log_prob(x.to(dtype)), program.log_prob(x), rtol=0, atol=0)
    assert program.measure == "mass"


def test_reparameterized_where_pyro_is():
    assert dgm.Normal(2)().has_rsample
    assert not any(program().has_rsample for program in (dgm.Bernoulli(2), dgm.Categorical(2, 3)))


def test_a_conditional_of_ones_own():
    class Laplace(dgm.Conditional):
        def __init__(self):
            super().__init__()
            self.event_shape = torch.Size((2,))
            self.loc = nn.Parameter(torch.zeros(2))

        def forward(self, given=None):
            return dist.Laplace(self.loc, 1.0).to_event(1)

    program = Laplace()
    torch.testing.assert_close(program.log_prob(torch.ones(3, 2)), torch.full((3,), -2 * (1 + math.log(2))))
    assert program.tractable
    assert program.latents("x") == ()
    assert program.measure == "density"


def test_a_distribution_of_another_event_shape_is_refused():
    """Without to_event the features would count as data, silently so where there are as many."""

    class Laplace(dgm.Conditional):
        event_shape = torch.Size((3,))

        def forward(self, given=None):
            return dist.Laplace(torch.zeros(3), 1.0)

    for use in (lambda p: p.log_prob(torch.zeros(3, 3)), lambda p: p.sample(3), lambda p: p.model(torch.zeros(3, 3))):
        with pytest.raises(ValueError, match=r"Laplace returned .* event_shape \(\).*\(3,\).*to_event"):
            use(Laplace())


def test_components_under_a_network_start_apart():
    """A network that says nothing yet makes the standard member."""
    for make, levels in ((dgm.MixtureOfNormals, ()), (dgm.DiscretizedLogistic, (9,))):
        silent = make(2, *levels, 3, network=Table(torch.zeros(9, 2)))
        x, given = outcomes(silent, 6), torch.zeros(6, 1)
        assert_same_number(silent.log_prob(x, given), make(2, *levels, 3).log_prob(x))


@pytest.mark.parametrize(("scale", "numel"), [("feature", 6), ("shared", 1)])
@pytest.mark.parametrize("event_shape", [(6,), (1, 2, 3)])
def test_a_scale_that_is_learned_beside_the_network(scale, numel, event_shape):
    program = dgm.Normal(event_shape, nn.Linear(2, 6), scale_type=scale)
    assert program.num_parameters == 1
    assert program.raw_scale.numel() == numel
    with torch.no_grad():
        program.raw_scale.copy_(torch.randn(program.raw_scale.shape))
    x, given = torch.randn(5, *event_shape), torch.randn(5, 2)
    loc, sd = program.network(given).reshape(5, *event_shape), F.softplus(program.raw_scale)
    expected = (-(((x - loc) / sd) ** 2) / 2 - sd.log() - math.log(2 * math.pi) / 2).flatten(1).sum(-1)
    torch.testing.assert_close(program.log_prob(x, given), expected)
    program.log_prob(x, given).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in program.parameters())


def test_the_standard_scale_is_one_to_the_precision_it_is_built_in():
    standard = dgm.Normal(3)
    assert (standard().base_dist.scale - 1).abs().max() < 4e-16
    assert standard.float()().base_dist.scale.tolist() == [1.0] * 3
    assert (standard.double()().base_dist.scale - 1).abs().max() < 5e-10


def test_a_learned_scale_needs_a_network():
    with pytest.raises(ValueError, match="scale_type='shared' is for a Normal with a network"):
        dgm.Normal(2, scale_type="shared")
    with pytest.raises(ValueError, match="scale_type must be one of network, feature, shared, got 'fixed'"):
        dgm.Normal(2, nn.Linear(1, 2), scale_type="fixed")


@pytest.mark.parametrize("scale", ["network", "feature", "shared"])
def test_the_scale_starts_where_it_is_told(scale):
    network = nn.Linear(2, 6 if scale == "network" else 3)
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    given = torch.randn(4, 2)
    for initial in (0.05, 1.0, 7.0):
        stddev = dgm.Normal(3, network, scale_type=scale, initial_scale=initial)(given).stddev
        torch.testing.assert_close(stddev, torch.full((4, 3), initial))
    default = dgm.Normal(3, network, scale_type=scale)(given).stddev
    torch.testing.assert_close(default, torch.full((4, 3), math.log(2) if scale == "network" else 1.0))


@pytest.mark.parametrize("initial", [0.0, -1.0, math.inf, math.nan])
def test_a_start_that_is_no_scale_is_refused(initial):
    with pytest.raises(ValueError, match="initial_scale must be a number above 0"):
        dgm.Normal(3, nn.Linear(2, 6), initial_scale=initial)
    with pytest.raises(ValueError, match="initial_scale is for a Normal with a network"):
        dgm.Normal(3, initial_scale=0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda network: dgm.Normal((2, 3), network),
        lambda network: dgm.Normal((2, 3), network, scale_type="feature"),
        lambda network: dgm.Bernoulli((2, 3), network),
        lambda network: dgm.Categorical((2, 3), 4, network),
        lambda network: dgm.MixtureOfNormals((2, 3), 2, network),
        lambda network: dgm.DiscretizedLogistic((2, 3), 4, 2, network),
    ],
    ids=["normal", "normal-scale", "bernoulli", "categorical", "mixture", "logistic"],
)
def test_a_function_of_the_output_size_makes_the_network(make, tmp_path):
    sized = make(lambda size: nn.Linear(5, size))
    assert sized.network.out_features == 6 * sized.num_parameters
    plain = make(copy.deepcopy(sized.network))
    given, x = torch.randn(7, 5), torch.zeros(7, 2, 3, dtype=None if sized.levels is None else torch.long)
    assert torch.equal(sized.log_prob(x, given), plain.log_prob(x, given))
    dgm.save(sized, tmp_path / "sized")
    assert torch.equal(dgm.load(tmp_path / "sized").log_prob(x, given), plain.log_prob(x, given))


@pytest.mark.parametrize(
    ("network", "message"),
    [(3, "not callable"), (lambda size: size, r"network\(4\) is of type int"), (torch.tanh, "network must be")],
)
def test_what_makes_no_network_is_refused(network, message):
    with pytest.raises(TypeError, match=message):
        dgm.Normal(2, network)


# -- conditionals against scipy ----------------------------------------------------------------------------------------


def softplus_inverse(value):
    return math.log(math.expm1(value))


# name -> a program of fixed raw parameters, the distribution of scipy that it is, and values to score
AGAINST_SCIPY = {
    "student-t": (
        dgm.StudentT(1, parameters=torch.tensor([[0.4], [softplus_inverse(1.7)], [softplus_inverse(2.5)]])),
        stats.t(3.5, 0.4, 1.7),
        [-30.0, 0.0, 0.4, 5.0],
    ),
    "log-normal": (
        dgm.LogNormal(1, parameters=torch.tensor([[0.4], [softplus_inverse(0.6)]])),
        stats.lognorm(0.6, scale=math.exp(0.4)),
        [0.01, 1.0, 7.0],
    ),
    "beta": (
        dgm.Beta(1, parameters=torch.tensor([[math.log(3.0)], [softplus_inverse(2.0)]])),
        stats.beta(1.5, 0.5),
        [1e-4, 0.3, 0.999],
    ),
    "poisson": (dgm.Poisson(1, parameters=torch.tensor([[math.log(3.5)]])), stats.poisson(3.5), [0, 1, 4, 30]),
    "negative-binomial": (
        dgm.NegativeBinomial(1, parameters=torch.tensor([[math.log(3.5)], [softplus_inverse(2.0)]])),
        stats.nbinom(2.0, 2.0 / 5.5),
        [0, 1, 4, 30],
    ),
}


@pytest.mark.parametrize("name", AGAINST_SCIPY)
def test_densities_and_draws_are_those_of_scipy(name):
    program, reference, values = AGAINST_SCIPY[name]
    program = copy.deepcopy(program).double()
    x = torch.tensor(values, dtype=torch.float64).unsqueeze(-1)
    discrete = program.measure == "mass"
    expected = (reference.logpmf if discrete else reference.logpdf)(np.array(values))
    torch.testing.assert_close(program.log_prob(x), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    torch.manual_seed(0)
    drawn = program.sample(4000).flatten().numpy()
    if discrete:
        mean, error = drawn.mean(), drawn.std() / 4000**0.5
        assert abs(mean - reference.mean()) < 4.5 * error
        assert abs((drawn == 0).mean() - reference.pmf(0)) < 4.5 * 0.5 / 4000**0.5
    else:
        assert stats.kstest(drawn, reference.cdf).pvalue > 1e-4


def test_draws_of_a_narrow_beta_are_neither_0_nor_1():
    """Where most of the mass is within rounding of the ends, which have no finite density."""
    program = dgm.Beta(1, parameters=torch.tensor([[0.0], [softplus_inverse(1e-3)]])).float()
    drawn = program.sample(1000)
    assert (drawn > 0).all()
    assert (drawn < 1).all()
    assert 300 < (drawn > 0.5).sum() < 700
    assert torch.isfinite(program.log_prob(drawn)).all()


@pytest.mark.parametrize(("a", "b"), [(1.0, 1e-9), (1e-3, 1e-3), (0.3, 0.1), (2.0, 5.0)])
def test_importance_weights_from_a_beta_average_to_at_most_the_mass_of_the_target(a, b):
    """The target is uniform. Draws that round to one number near 0 or 1 would have weights without bound."""
    proposal = distributions.Beta(torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32))
    weights = (-proposal.log_prob(proposal.sample((20_000,)))).double().exp()
    assert weights.mean() < 1 + 4 * weights.std() / len(weights) ** 0.5


def test_zero_inflation_by_hand():
    share, rate = 0.3, 2.0
    parameters = torch.tensor([[math.log(share / (1 - share))], [math.log(rate)]])
    program = dgm.ZeroInflated(dgm.Poisson(1), parameters=parameters)
    expected = [math.log(share + (1 - share) * math.exp(-rate)), math.log(1 - share) + stats.poisson(rate).logpmf(3)]
    torch.testing.assert_close(program.log_prob(torch.tensor([[0.0], [3.0]])), torch.tensor(expected))
    with pytest.raises(TypeError, match="base must be a mass on integers, but LogNormal has a density"):
        dgm.ZeroInflated(dgm.LogNormal(1))
    with pytest.raises(ValueError, match="leave them out"):
        dgm.ZeroInflated(dgm.Poisson(1, learned=True))


@pytest.mark.parametrize(
    ("program", "x", "wrong"),
    [
        (dgm.LogNormal(1), 0.0, "x holds 0 in row 1"),
        (dgm.Beta(1), 1.0, "x holds 1 in row 1"),
        (dgm.Poisson(1), -1.0, "x holds -1 in row 1"),
        (dgm.NegativeBinomial(1), 0.5, "x holds 0.5 in row 1"),
    ],
)
def test_data_outside_of_the_support_are_refused(program, x, wrong):
    good = torch.full((1, 1), 0.5 if program.measure == "density" else 2.0)
    with pytest.raises(ValueError, match=wrong):
        dgm.evaluate(copy.deepcopy(program).double(), torch.cat([good, torch.full((1, 1), x)]).double())


def test_a_rate_out_of_range_recovers():
    program = dgm.Poisson(1, parameters=torch.full((1, 1), 60.0), learned=True)
    program.log_prob(torch.ones(1, 1)).sum().backward()
    assert torch.isfinite(program.parameter.grad).all()
    assert program.parameter.grad.item() < 0
