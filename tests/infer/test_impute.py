"""Missing features: every method against the conditional by brute force, or against an analytic one."""

import math

import pytest
import torch
from programs import CASES, _mlp, continuous, diffusion, jittered, made, vae
from test_evaluation import linear_vae
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import flow
from dgm_pyro.infer import impute

pytestmark = pytest.mark.usefixtures("float64")


def seeded(program, size=0.7, seed=0):
    torch.manual_seed(seed)
    return jittered(program, size).eval()


def by_enumeration(log_prob, x, mask, levels):
    """p(x_mis | x_obs) of one datum over every completion: the completions, and their probabilities."""
    free = (~mask).flatten().nonzero().flatten()
    every = torch.cartesian_prod(*[torch.arange(levels)] * len(free)).reshape(-1, len(free))
    complete = x.flatten().long().expand(len(every), -1).clone()
    complete[:, free] = every
    return every, log_prob(complete.reshape(-1, *x.shape)).softmax(0)


def frequencies(draws, mask, levels):
    """How often each completion was drawn, in the order of `by_enumeration`."""
    free = draws.flatten(1)[:, (~mask).flatten()].long()
    codes = (free * levels ** torch.arange(free.shape[1] - 1, -1, -1)).sum(-1)
    return torch.bincount(codes, minlength=levels ** free.shape[1]) / len(draws)


def agree(observed, expected, size):
    """Whether frequencies of ``size`` independent draws are those expected: 4.5 standard errors, and chi-square."""
    error = (expected * (1 - expected) / size).sqrt()
    return bool(((observed - expected).abs() < 4.5 * error + 1e-3).all())


# -- autoregressive ----------------------------------------------------------------------------------------------------

ORDER = (2, 0, 3, 1)
MASKS = {
    "prefix": (True, False, True, False),  # the first two of the order
    "suffix": (False, True, False, True),
    "middle": (True, False, False, False),
    "none": (False, False, False, False),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_autoregressive_by_enumeration(mask):
    program = seeded(made(dgm.Categorical, 4, levels=3, order=ORDER))
    x, mask = torch.tensor([[0, 2, 1, 2], [1, 1, 0, 0]]), torch.tensor(mask)
    draws = impute(program, x, mask, 4000, num_particles=40000)
    assert draws.shape == (4000, 2, 4)
    assert draws.dtype == x.dtype
    assert torch.equal(draws[..., mask], x[:, mask].expand(4000, -1, -1))
    for b in range(2):
        _, expected = by_enumeration(lambda every: program.log_prob(every).detach(), x[b], mask, 3)
        assert agree(frequencies(draws[:, b], mask, 3), expected, 4000)


def test_a_prefix_is_exact_with_any_number_of_particles():
    """One particle per draw, and each row of data its own prefix."""
    program = seeded(made(dgm.Bernoulli, 3))
    x = torch.tensor([[1, 0, 0]]).expand(3000, 3)
    mask = torch.tensor([True, False, False]).expand(3000, 3).clone()
    mask[1500:, 1] = True
    draws = impute(program, x, mask, 1, num_particles=1)[0]
    for rows in (slice(1500), slice(1500, 3000)):
        _, expected = by_enumeration(lambda every: program.log_prob(every).detach(), x[0], mask[rows][0], 2)
        assert agree(frequencies(draws[rows], mask[rows][0], 2), expected, 1500)


def test_the_label_of_a_conditional_program_is_used():
    program = seeded(made(dgm.Categorical, 2, levels=3, num_classes=3), 1.0)
    x, y, mask = torch.zeros(3, 2, dtype=torch.uint8), torch.arange(3), torch.tensor([False, True])
    draws = impute(program, x, mask, 3000, y, num_particles=30000)
    assert draws.dtype == torch.uint8
    for b in range(3):
        log_prob = lambda every, b=b: program.log_prob(every, y[b : b + 1].expand(len(every))).detach()  # noqa: E731
        _, expected = by_enumeration(log_prob, x[b], mask, 3)
        assert agree(frequencies(draws[:, b], mask, 3), expected, 3000)


# -- sums and products -------------------------------------------------------------------------------------------------


def test_independent_features_keep_their_own_distribution():
    program = dgm.Categorical(3, 4, parameters=torch.randn(4, 3))
    mask = torch.tensor([False, True, False])
    draws = impute(program, torch.tensor([[0, 1, 0]]), mask, 5000)[:, 0]
    _, expected = by_enumeration(program.log_prob, torch.tensor([0, 1, 0]), mask, 4)
    assert agree(frequencies(draws, mask, 4), expected, 5000)


@pytest.mark.parametrize("name", ["labeled-integers", "labeled-made"])
def test_labels_are_summed_out(name):
    program = seeded(CASES[name].make(), 1.0)
    shape, levels = program.event_shape, program.levels
    x, mask = torch.ones(1, *shape, dtype=torch.long), torch.arange(shape[0]) == shape[0] - 1
    draws = impute(program, x, mask, 4000, num_particles=16000)
    _, expected = by_enumeration(lambda every: program.log_prob(every).detach(), x[0], mask, levels)
    assert agree(frequencies(draws[:, 0], mask, levels), expected, 4000)


# -- latents -----------------------------------------------------------------------------------------------------------


def quadrature(program, every, given=None):
    """log p(x) over a grid of a 1-D standard Normal z."""
    z = torch.linspace(-7, 7, 1401).unsqueeze(-1)
    log_p = program.prior().log_prob(z)
    likelihood = program.likelihood.exact_log_prob(
        every.unsqueeze(1).expand(-1, len(z), -1), z.expand(len(every), -1, -1)
    )
    return (likelihood + log_p).logsumexp(1).detach()


def test_a_vae_by_quadrature():
    program = seeded(dgm.VAE(dgm.Normal(1), dgm.Bernoulli(4, nn.Linear(1, 4)), dgm.Normal(1, nn.Linear(4, 2))), 1.5)
    x, mask = torch.tensor([[1, 0, 0, 1]]), torch.tensor([True, False, True, False])
    draws = impute(program, x, mask, 3000, num_particles=9000, num_temperatures=10)
    _, expected = by_enumeration(lambda every: quadrature(program, every.double()), x[0], mask, 2)
    assert agree(frequencies(draws[:, 0], mask, 2), expected, 3000)


def test_a_linear_vae_has_the_conditional_of_its_normal():
    program, exact = linear_vae()
    x, mask = torch.tensor([[1.5, math.nan], [-0.3, math.nan]]), torch.tensor([True, False])
    draws = impute(program, x, mask, 1500, num_particles=6000, num_temperatures=10, num_leapfrog=5)
    check_conditional(draws, x, exact, 1500)


def check_conditional(draws, x, exact, size):
    """The second coordinate given the first, of a 2-D Normal."""
    c = exact.covariance_matrix
    mean = exact.loc[1] + c[0, 1] / c[0, 0] * (x[:, 0] - exact.loc[0])
    variance = c[1, 1] - c[0, 1] ** 2 / c[0, 0]
    assert torch.equal(draws[..., 0], x[:, 0].expand(size, -1))
    assert ((draws[..., 1].mean(0) - mean).abs() < 4.5 * (variance / size).sqrt()).all()
    assert ((draws[..., 1].var(0) / variance - 1).abs() < 4.5 * math.sqrt(2 / size)).all()


@pytest.mark.parametrize("name", ["vae-bit-latent", "vae-categorical-latent"])
def test_discrete_latents(name):
    """Means of the missing feature against importance sampling by hand, with far more draws."""
    program = seeded(CASES[name].make(), 0.5)
    x, mask = torch.tensor([[0.7, 0.0]]), torch.tensor([True, False])
    draws = impute(program, x, mask, 2000, num_particles=20000)[:, 0, 1]
    z = program.prior().sample((200_000,))
    parameters = program.likelihood.raw_parameters(z)
    loc, scale = parameters[:, 0].detach(), torch.nn.functional.softplus(parameters[:, 1]).detach()
    weights = torch.distributions.Normal(loc[:, 0], scale[:, 0]).log_prob(x[0, 0]).softmax(0)
    mean = (weights * loc[:, 1]).sum()
    variance = (weights * (scale[:, 1] ** 2 + loc[:, 1] ** 2)).sum() - mean**2
    assert abs(draws.mean() - mean) < 4.5 * (variance / 2000).sqrt()


@pytest.mark.parametrize("name", ["vae-codes", "vae-codes-autoregressive"])
def test_one_hot_codes(name):
    """The missing feature's first two moments, summed over every code."""
    program = seeded(CASES[name].make(), 0.5)
    x, mask = torch.tensor([[0.7, -0.4, 0.0]]), torch.tensor([True, True, False])
    draws = impute(program, x, mask, 4000, num_particles=40_000)[:, 0, 2]
    codes = torch.cartesian_prod(*[torch.arange(program.prior.event_shape[-1])] * 2)
    every = torch.nn.functional.one_hot(codes).double()
    features = program.likelihood(every).base_dist
    log_seen = features.log_prob(x)[:, :2].sum(-1)
    weights = (program.prior.log_prob(every) + log_seen).softmax(0).detach()
    loc, scale = features.loc[:, 2].detach(), features.scale[:, 2].detach()
    mean, square = (weights * loc).sum(), (weights * (scale**2 + loc**2)).sum()
    assert abs(draws.mean() - mean) < 4.5 * ((square - mean**2) / 4000).sqrt()
    assert abs(draws.square().mean() - square) < 4.5 * (draws.square().var() / 4000).sqrt()


def test_pixelvae_of_a_prefix():
    program = seeded(
        dgm.VAE(
            dgm.Normal(1),
            made(dgm.Bernoulli, 3, given_shape=(1,)),
            dgm.Normal(1, _mlp((3,), 2)),
        ),
        1.0,
    )
    x, mask = torch.tensor([[1, 0, 0]]), torch.tensor([True, False, False])
    draws = impute(program, x, mask, 3000, num_particles=9000, num_temperatures=10, num_leapfrog=5)
    _, expected = by_enumeration(lambda every: quadrature(program, every.double()), x[0], mask, 2)
    assert agree(frequencies(draws[:, 0], mask, 2), expected, 3000)
    with pytest.raises(
        ValueError, match=r"autoregressive, and in its order a missing feature comes before an observed one.*prefix"
    ):
        impute(program, x, torch.tensor([False, True, False]))


# -- flows -------------------------------------------------------------------------------------------------------------


def test_a_flow_on_a_grid():
    """The mean and the variance of the missing coordinate, against the density on a grid."""
    program = seeded(flow.nsf(2, layers=2, hidden=(6,), bins=4), 0.3)
    x, mask = torch.tensor([[0.4, 0.0]]), torch.tensor([True, False])
    draws = impute(program, x, mask, 1000, num_particles=3000, num_temperatures=12, num_leapfrog=4)[:, 0, 1]
    grid = torch.linspace(-12, 12, 4801)
    weights = program.log_prob(torch.stack([torch.full_like(grid, 0.4), grid], -1)).detach().softmax(0)
    mean = (weights * grid).sum()
    variance = (weights * (grid - mean) ** 2).sum()
    assert abs(draws.mean() - mean) < 4.5 * (variance / 1000).sqrt()
    fourth = (weights * (grid - mean) ** 4).sum()
    assert abs(draws.var() - variance) < 4.5 * ((fourth - variance**2) / 1000).sqrt()


def test_a_dequantized_flow_by_quadrature():
    program = seeded(dgm.Dequantized(flow.realnvp(2, layers=2, hidden=(6,), unit_cube=True), levels=3), 0.4)
    fine = (torch.arange(300) + 0.5) / 300
    density = program.flow.log_prob(torch.cartesian_prod(fine, fine)).detach().exp().reshape(3, 100, 3, 100)
    table = density.mean((1, 3)) / 9
    mask = torch.tensor([False, True])
    draws = impute(program, torch.tensor([[0, 2]]), mask, 2000, num_particles=6000, num_temperatures=10, num_leapfrog=4)
    expected = table[:, 2] / table[:, 2].sum()
    assert agree(frequencies(draws[:, 0], mask, 3), expected, 2000)


# -- diffusion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: diffusion(2, num_steps=6), lambda: continuous(2)], ids=["discrete", "continuous"]
)
def test_a_diffusion_by_a_long_run_of_its_own(make):
    """Draws of p(x) whose first coordinate happens to be near the one observed."""
    program = seeded(make(), 0.3)
    x, mask = torch.tensor([[0.5, 0.0]]), torch.tensor([True, False])
    draws = impute(program, x, mask, 2000, num_particles=20000)[:, 0, 1]
    many = program.sample(400_000)
    near = many[(many[:, 0] - 0.5).abs() < 0.03, 1]
    error = (draws.var() / 2000 + near.var() / len(near)).sqrt()
    assert abs(draws.mean() - near.mean()) < 4.5 * error
    assert abs(draws.var().log() - near.var().log()) < 4.5 * math.sqrt(3 / 2000)


@pytest.mark.parametrize(
    "make",
    [lambda: diffusion(2, levels=3, num_steps=4), lambda: continuous(2, levels=3)],
    ids=["discrete", "continuous"],
)
def test_a_diffusion_of_integers_by_its_own_frequencies(make):
    program = seeded(make(), 0.3)
    mask = torch.tensor([True, False])
    draws = impute(program, torch.tensor([[2, 0]]), mask, 3000, num_particles=30000)
    many = program.sample(200_000)
    near = many[many[:, 0] == 2]
    expected = torch.bincount(near[:, 1], minlength=3) / len(near)
    assert agree(frequencies(draws[:, 0], mask, 3), expected, 3000)


# -- the contract ------------------------------------------------------------------------------------------------------


def test_draws_are_distinct_where_weights_allow():
    program, _ = linear_vae()
    draws = impute(program, torch.tensor([[0.1, 0.0]]), torch.tensor([True, False]), 30, num_temperatures=20)
    assert len(draws[:, 0, 1].unique()) == 30


def test_all_observed_is_x_and_the_seed_decides():
    program = vae(dgm.Normal(2))
    x = torch.randn(4, 2)
    everything = torch.ones(2, dtype=torch.bool)
    assert torch.equal(impute(program, x, everything, 3, num_temperatures=3, num_leapfrog=1), x.expand(3, 4, 2))
    state = torch.get_rng_state()
    one, again, other = (impute(program, x, ~everything, 3, num_temperatures=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


# The programs whose methods nothing above runs: contexts, chains among latents, labels, unusual shapes.
OTHERS = (
    "bernoulli-given-label",
    "dequantized-given-label",
    "diffusion-given-label",
    "diffusion-levels",
    "diffusion-unet",
    "flow-mixture-base",
    "labeled-dequantized",
    "labeled-diffusion",
    "labeled-vae",
    "made-mixture",
    "mixture-given-vector",
    "normal-image",
    "nsf-given-image",
    "pixelcnn-given-label",
    "realnvp-given-label",
    "vae-autoregressive-prior",
    "vae-diffusion-prior",
    "vae-flow-prior",
    "vae-given-label",
    "vae-labeled-prior",
    "vae-logistic",
    "vae-two-levels",
)


@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_program_imputes(name):
    case = CASES[name]
    program = case.build()
    x, given = case.draw(program, 3)
    mask = torch.arange(x[0].numel()).reshape(x.shape[1:]) % 2 == 0
    draws = impute(program, x, mask, 2, given, num_particles=8, num_temperatures=2, num_leapfrog=1)
    assert draws.shape == (2, *x.shape)
    assert draws.dtype == x.dtype
    assert torch.equal(draws[:, :, mask], x[:, mask].expand(2, 3, -1))
    program.check(draws.flatten(0, 1), None if given is None else _twice(given))


def _twice(given):
    if isinstance(given, tuple):
        return tuple(map(_twice, given))
    return given.repeat(2, *(1,) * (given.dim() - 1))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2), TypeError, r"mask must be a tensor of bool.*torch.float32.*mask.bool\(\)"),
        ([True, False], TypeError, "mask must be a tensor of bool.*list"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"mask has shape \(3,\), but x has \(4, 2\): pass \(2,\)"),
    ],
)
def test_masks_that_do_not_fit(mask, error, message):
    with pytest.raises(error, match=message):
        impute(dgm.Normal(2), torch.zeros(4, 2), mask)


def test_programs_that_cannot():
    cells = CASES["vae-dequantized-likelihood"].build()
    with pytest.raises(ValueError, match="x_continuous"):
        impute(cells, torch.zeros(3, 2).byte(), torch.tensor([True, False]))
    labels = CASES["discriminative"].build()
    rows = dgm.OneHot(dgm.Categorical(2, 3))
    with pytest.raises(ValueError, match=r"impute the integer codes with program\.program"):
        impute(rows, rows.sample(4), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="no x to impute"):
        impute(labels, torch.zeros(3), torch.ones(3).bool())


class Copied(dgm.Normal):
    """Missing features are copies of the observed one: a family that says itself how they are drawn."""

    def completions(self, by, x, mask, given=None):
        seen = torch.where(mask, x, torch.zeros_like(x)).sum(-1, keepdim=True)
        return seen.expand(3, *x.shape), torch.zeros(3, len(x))


def test_a_family_of_your_own_is_imputed_by_its_method():
    x, mask = torch.tensor([[0.5, 9.0], [-1.0, 9.0]]), torch.tensor([True, False])
    assert torch.equal(dgm.infer.impute(Copied(2), x, mask, 2), x[:, :1].expand(2, 2, 2))
