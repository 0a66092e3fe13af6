"""What holds for every program, whatever it is: the registry in programs.py drives each test.

Statistical tests are seeded; z-scores are held to 4.5 standard errors, p-values to 1e-4.
"""

import copy
import itertools
import math

import pyro
import pytest
import torch
from programs import CASES, EVERY_PART, guide_latents, log_joint, model_latents, parts_of, score
from pyro import poutine
from scipy import stats

import dgm_pyro as dgm
from dgm_pyro.families.onehot import OneHotDistribution
from dgm_pyro.families.quantized import PointMass
from dgm_pyro.objectives import elbo
from dgm_pyro.program import store_name

pytestmark = pytest.mark.usefixtures("float64")

BATCH = 5


@pytest.fixture(params=CASES, name="case")
def _case(request):
    return CASES[request.param]


def rows(given, index):
    """Some rows of a given, which may be a tuple."""
    if given is None:
        return None
    return tuple(part[index] for part in given) if isinstance(given, tuple) else given[index]


def repeated(given, size):
    """The first row of a given, ``size`` times."""
    return rows(given, torch.zeros(size, dtype=torch.long))


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, BATCH])
def test_samples_are_outcomes_of_the_program(case, size):
    program = case.build()
    _, given = case.draw(program, size)
    x = program.sample(size, given)
    program.check(x, given)
    assert x.shape == (size, *program.event_shape)
    assert not x.requires_grad
    assert x.is_floating_point() or program.levels is not None


def test_one_given_serves_all_samples(case):
    program = case.build()
    if not program.conditional:
        return
    _, given = case.draw(program, 1)
    torch.manual_seed(3)
    together = program.sample(4, given)
    torch.manual_seed(3)
    torch.testing.assert_close(together, program.sample(4, repeated(given, 4)))


def test_equal_seeds_give_equal_samples(case):
    program = case.build()
    _, given = case.draw(program, BATCH)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(program.sample(BATCH, given).double())
    assert torch.equal(draws[0], draws[1])
    assert program.levels is not None or not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_finite_and_in_the_default_dtype(case, dtype):
    torch.set_default_dtype(dtype)  # the float64 fixture restores it
    program = case.build()
    for size, particles in ((1, 1), (1, 3), (BATCH, 2)):
        x, given = case.draw(program, size)
        before = x.clone()
        weights = program.log_weights(x, given, num_particles=particles)
        assert weights.shape == (particles, size)
        assert weights.dtype == dtype
        assert torch.isfinite(weights).all()
        assert torch.equal(x, before)
    assert program.sample(1, rows(given, slice(0, 1))).dtype in (dtype, torch.int64)


def test_exact_density_or_a_refusal_that_names_the_alternatives(case):
    program = case.build()
    x, given = case.draw(program, BATCH)
    if not program.tractable:
        with pytest.raises(dgm.IntractableError, match=r"log_weights.*dgm\.evaluate"):
            program.log_prob(x, given)
        return
    exact = program.log_prob(x, given)
    assert exact.shape == (BATCH,)
    if program.latents(program.variable) == ():
        torch.testing.assert_close(program.log_weights(x, given, num_particles=3), exact.expand(3, -1))
    # further batch dimensions at the left
    twice = lambda part: part.expand(2, *part.shape)  # noqa: E731
    wider = None if given is None else tuple(map(twice, given)) if isinstance(given, tuple) else twice(given)
    if case.given_shape is None or given is None:
        torch.testing.assert_close(program.exact_log_prob(twice(x), wider), exact.expand(2, -1))


def test_a_datum_is_scored_alone_as_in_a_batch(case):
    """Permutations and single rows; exact, with the latents held fixed."""
    program = case.build().unroll()
    x, given = case.draw(program, BATCH)
    z = guide_latents(program, x, given)
    whole = torch.stack(log_joint(program, x, given, z))
    for index in (torch.tensor([3, 0, 4, 1, 2]), *torch.arange(BATCH).unsqueeze(1)):
        part = log_joint(program, x[index], rows(given, index), {name: value[index] for name, value in z.items()})
        torch.testing.assert_close(torch.stack(part), whole[:, index], rtol=1e-9, atol=1e-9)


def test_memory_layout_changes_no_score(case):
    program = case.build().eval().unroll()
    x, given = case.draw(program, BATCH)
    z = guide_latents(program, x, given)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    for part, whole in zip(log_joint(program, strided, given, z), log_joint(program, x, given, z), strict=True):
        torch.testing.assert_close(part, whole)


def test_nothing_is_computed_on_another_device(case):
    """On torch's meta device, which has shapes but no values and refuses arithmetic with tensors of the CPU."""
    program = case.build(device="meta").eval()
    x, given = case.draw(program, BATCH, device="meta")
    with pyro.validation_enabled(False):
        assert elbo(program, x, given).value.device.type == "meta"
        for form in (program, program.unroll()):
            with torch.no_grad(), pyro.plate("data", BATCH, dim=-1):
                drawn = form.joint(program.variable, given=given)
            assert drawn.device.type == "meta"
            assert drawn.shape == x.shape


def test_a_draw_scores_as_if_it_came_from_elsewhere(case):
    """Distributions may remember how they made a draw (flows do), and must score it as they score any data."""
    program = case.build().eval()
    if not isinstance(program, dgm.Conditional):
        return
    _, given = case.draw(program, BATCH)
    distribution = program(given)
    draw = distribution.rsample if distribution.has_rsample else distribution.sample
    x = draw(() if program.conditional else (BATCH,))
    assert x.shape == (BATCH, *program.event_shape)
    torch.testing.assert_close(distribution.log_prob(x), program.log_prob(x.clone(), given), rtol=1e-8, atol=1e-8)


def test_evaluation_mode_changes_no_score(case):
    program = case.build()
    x, given = case.draw(program, BATCH)
    torch.manual_seed(0)
    training = program.train().log_weights(x, given)
    torch.manual_seed(0)
    torch.testing.assert_close(program.eval().log_weights(x, given), training)


def test_neither_sampling_nor_scoring_leaks_into_the_users_program(case):
    program = case.build()
    x, given = case.draw(program, BATCH)
    with poutine.trace() as traced:
        program.sample(BATCH, given)
        score(program, x, given)
    assert not [name for name in traced.trace.nodes if not name.startswith("_")]


# -- statements --------------------------------------------------------------------------------------------------------


def test_declared_latents_are_the_sites_of_model_and_guide(case):
    for program in (case.build(), case.build().unroll()):
        x, given = case.draw(program, BATCH)
        modeled, guided = model_latents(program, x, given), guide_latents(program, x, given)
        assert set(modeled) == set(guided)
        declared = program.latents(program.variable)
        if declared is not None:
            assert sorted(declared) == sorted(guided)


def test_a_program_nests_under_any_name(case):
    """joint("w") states the variable w, and latents("w") follows."""
    program = case.build()
    _, given = case.draw(program, BATCH)
    with dgm.program.batch_plates((BATCH,)), poutine.trace() as traced:
        w = program.joint("w", given=given)
    assert w.shape == (BATCH, *program.event_shape)
    sites = dgm.program.latent_sites(traced.trace)
    assert "w" in sites
    assert program.variable not in sites
    declared = program.latents("w")
    if declared is not None:
        assert set(declared) <= set(sites)


def test_unrolling_shares_the_parameters_and_the_density(case):
    program = case.build()
    twin = program.unroll()
    assert {id(parameter) for parameter in twin.parameters()} == {id(parameter) for parameter in program.parameters()}
    assert (twin.event_shape, twin.levels, twin.measure) == (program.event_shape, program.levels, program.measure)
    assert (twin.conditional, twin.given_shape) == (program.conditional, program.given_shape)
    x, given = case.draw(program, BATCH)
    if program.tractable and twin.tractable:
        torch.testing.assert_close(twin.log_prob(x, given), program.log_prob(x, given), rtol=1e-9, atol=1e-9)


# -- parameters --------------------------------------------------------------------------------------------------------


def test_every_parameter_learns(case):
    program = case.build()
    if not list(program.parameters()):
        return
    for seed in range(3):  # a label or level that one batch lacks is in another
        x, given = case.draw(program, 16, seed=seed)
        score(program, x, given, num_particles=2).sum().backward()
    still = [
        name
        for name, parameter in program.named_parameters()
        if (parameter.grad is None or not parameter.grad.any()) and not name.startswith(case.inert or ("-",))
    ]
    assert not still, f"no gradient reaches {still}"
    assert all(torch.isfinite(parameter.grad).all() for parameter in program.parameters() if parameter.grad is not None)


def test_gradients_equal_finite_differences(case):
    """Along a random direction of the parameters, under the same random numbers: so every path through the latents
    counts. Latents that cannot be reparameterized have no such derivative."""
    program = case.build().eval()
    parameters = list(program.parameters())
    x, given = case.draw(program, BATCH)
    guide = poutine.trace(program.unroll().guide).get_trace(x, given)
    drawn = [guide.nodes[name]["fn"] for name in dgm.program.latent_sites(guide)]
    # Straight through, the gradient is none of the draw, which jumps: it has a test of its own.
    jumps = (OneHotDistribution, PointMass)
    if not parameters or not all(fn.has_rsample and not isinstance(fn, jumps) for fn in drawn):
        return

    def total():
        torch.manual_seed(0)
        return program.log_weights(x, given, num_particles=2).sum()

    direction = [torch.randn_like(parameter) for parameter in parameters]
    gradients = torch.autograd.grad(total(), parameters, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None)
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, d in zip(parameters, direction, strict=True):
                parameter.add_(sign * step * d)
            values.append(total())
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=1e-5)


def test_a_copy_is_independent(case):
    program = case.build()
    x, given = case.draw(program, BATCH)
    twin = copy.deepcopy(program)
    if list(program.parameters()):
        for each in (program, twin):
            each.model(x, given)
        assert store_name(twin) != store_name(program)

    def weights(of):
        torch.manual_seed(0)
        return of.log_weights(x, given)

    before = weights(program)
    assert torch.equal(weights(twin), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.3)
    assert torch.equal(weights(program), before)
    if list(program.parameters()):
        assert not torch.equal(weights(twin), before)


def test_state_dict_carries_everything_that_was_learned(case):
    program, other = case.build(seed=0), case.build(seed=1)
    other.load_state_dict(program.state_dict())
    x, given = case.draw(program, BATCH)
    torch.manual_seed(0)
    before = program.log_weights(x, given)
    torch.manual_seed(0)
    assert torch.equal(other.log_weights(x, given), before)


# -- samples against densities -----------------------------------------------------------------------------------------

ENUMERABLE = 600


def enumerated(program):
    """Every outcome of a small discrete program, ``(levels ** numel, *event_shape)``; None if there are too many."""
    numel = math.prod(program.event_shape)
    if program.levels is None or program.levels**numel > ENUMERABLE:
        return None
    outcomes = itertools.product(range(program.levels), repeat=numel)
    return torch.tensor(list(outcomes)).reshape(-1, *program.event_shape)


def test_masses_sum_to_one_and_samples_follow_them(case):
    program = case.build()
    every = enumerated(program)
    if every is None or not program.tractable:
        return
    _, given = case.draw(program, 1)
    mass = program.log_prob(every, repeated(given, len(every))).exp().detach()
    torch.testing.assert_close(mass.sum(), torch.tensor(1.0), rtol=0, atol=1e-9)
    n = 20 * len(every) + 1000
    x = program.sample(n, repeated(given, n)).long().reshape(n, -1)
    code = (x * program.levels ** torch.arange(x.shape[1]).flip(0)).sum(-1)
    assert chi_square(torch.bincount(code, minlength=len(every)), n * mass) > 1e-4


def chi_square(counts, expected):
    """p-value, rare outcomes pooled so that every cell expects at least five."""
    order = expected.argsort()
    rare = order[expected[order].cumsum(0) <= 5]
    keep = torch.ones(len(expected), dtype=torch.bool)
    keep[rare] = False
    observed = [*counts[keep].tolist(), float(counts[~keep].sum())]
    hoped = [*expected[keep].tolist(), float(expected[~keep].sum())]
    if hoped[-1] == 0:
        assert observed.pop() == 0
        hoped.pop()
    elif hoped[-1] < 5 and len(hoped) > 1:  # the pool itself is rare: give it to the smallest kept cell
        smallest = min(range(len(hoped) - 1), key=hoped.__getitem__)
        observed[smallest] += observed.pop()
        hoped[smallest] += hoped.pop()
    scale = sum(observed) / sum(hoped)
    return stats.chisquare(observed, [scale * h for h in hoped]).pvalue


SMALL = [name for name, case in CASES.items() if math.prod(case.example.event_shape) <= 3]


@pytest.mark.parametrize("name", SMALL)
def test_statements_agree_with_what_they_sample(name):
    r"""Two ways to draw (x, z): a = p(x, z), and b = g(x) q(z | x) with a fixed proposal g. For any test function f,

        E_b[f a / (a + b)] = E_a[f b / (a + b)],

    both being the integral of f a b / (a + b). The terms are bounded, so it holds however poor the guide; it fails if
    p or q scores other than it samples, or does not integrate to one.
    """
    case = CASES[name]
    program = case.build().unroll().eval()
    n = 6000
    _, given = case.draw(program, 1)
    given = repeated(given, n)
    with torch.no_grad():
        trace = poutine.trace(program.model).get_trace(n, given)
        x_a = trace.nodes[program.variable]["value"]
        z_a = {site: trace.nodes[site]["value"] for site in dgm.program.latent_sites(trace) if site != program.variable}
        if program.levels is None:
            loc, scale = x_a.mean(0), x_a.std(0)
            real = program.measure == "density"
            proposal = torch.distributions.Normal(loc, scale) if real else torch.distributions.Poisson(loc)
            x_b = proposal.sample((n,))
            log_g = lambda x: proposal.log_prob(x).reshape(n, -1).sum(-1)  # noqa: E731
        else:
            x_b = torch.randint(program.levels, (n, *program.event_shape))
            log_g = lambda x: torch.tensor(-math.prod(program.event_shape) * math.log(program.levels))  # noqa: E731
        z_b = guide_latents(program, x_b, given)

        def log_ratio(x, z):
            log_p, log_q = log_joint(program, x, given, z)
            return log_p - log_q - log_g(x)

        in_b, in_a = log_ratio(x_b, z_b).sigmoid(), (-log_ratio(x_a, z_a)).sigmoid()
    assert in_b.mean() > 0.02, "the two hardly overlap: the test says nothing"
    assert_equal_means(in_b, in_a)
    for moment in (1, 2):
        for f_b, f_a in zip(features(x_b) ** moment, features(x_a) ** moment, strict=True):
            assert_equal_means(f_b * in_b, f_a * in_a)


def test_sample_draws_what_the_model_states(case):
    program = case.build().eval()
    n = 2000
    _, given = case.draw(program, 1)
    given = repeated(given, n)
    stated = poutine.trace(program.unroll().model).get_trace(n, given).nodes[program.variable]["value"].detach()
    drawn = program.sample(n, given)
    for moment in (1, 2):
        for a, b in zip(features(stated) ** moment, features(drawn) ** moment, strict=True):
            assert_equal_means(a, b)


def features(x):
    """Each feature and each product of neighbors, ``(F, n)``."""
    x = x.double().reshape(len(x), -1)
    return torch.cat([x, x[:, 1:] * x[:, :-1]], -1).T


def assert_equal_means(a, b):
    error = (a.var() / len(a) + b.var() / len(b)).sqrt() + 1e-12
    z = ((a.mean() - b.mean()) / error).item()
    assert abs(z) < 4.5, f"means {a.mean():.4f} and {b.mean():.4f} are {z:.1f} standard errors apart"


def test_what_is_tested_every_day_has_every_part():
    parts = {name: parts_of(name) for name in CASES}
    assert set().union(*(parts[name] for name in EVERY_PART)) == set().union(*parts.values())
