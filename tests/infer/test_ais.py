"""Annealed importance sampling: exact evidences, no bias, and the sandwich of its two directions."""

import math

import pytest
import torch
from programs import CASES, diffusion, vae
from pyro import poutine
from test_evaluation import linear_vae
from torch.distributions import Normal

import dgm_pyro as dgm
from dgm_pyro.infer import HMC, ais, bidirectional, nuts
from dgm_pyro.infer.ais import temperatures
from dgm_pyro.infer.posterior import joint_trace, log_joint

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("initial", ["prior", "guide"])
def test_the_evidence_of_a_linear_vae(initial):
    program, exact = linear_vae()
    x = exact.sample((100,))
    found = ais(program, x, num_temperatures=100, num_leapfrog=5, initial=initial)
    error = found.log_evidence - exact.log_prob(x)
    assert abs(error.mean()) < 0.05
    assert abs(error.mean()) < 4.5 * error.std() / 10
    assert ((found.acceptance > 0.4) & (found.acceptance < 0.9)).all()


@pytest.mark.parametrize("initial", ["prior", "guide"])
@pytest.mark.parametrize("num_temperatures", [1, 4])
def test_weights_have_no_bias(initial, num_temperatures):
    """However few the temperatures: the mean weight is p(x), by quadrature of a program that is not Gaussian."""
    torch.manual_seed(1)
    program = vae(dgm.MixtureOfNormals(1, 2, learned=True), size=1)
    x = torch.tensor([[0.3, -0.2]])
    z = torch.linspace(-9, 9, 4001).unsqueeze(-1)
    log_joint = program.prior.log_prob(z) + program.likelihood.log_prob(x.expand(4001, 2), z)
    truth = (log_joint.logsumexp(0) + math.log(18 / 4000)).detach()
    found = ais(program, x, num_chains=20_000, num_temperatures=num_temperatures, num_leapfrog=2, initial=initial)
    ratio = (found.log_weights[:, 0] - truth).exp()
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / math.sqrt(len(ratio))


def test_weighted_ends_of_chains_are_posterior_draws():
    program, _ = linear_vae()
    x = torch.tensor([[1.0, -0.5]])
    found = ais(program, x, num_chains=4000, num_temperatures=20)
    precision = 1 + (0.9**2 + 0.4**2) / 0.25
    mean = x @ torch.tensor([0.9, -0.4]) / 0.25 / precision
    weights, z = found.log_weights.softmax(0), found.latents["z"].squeeze(-1)
    error = (weights**2 * (z - mean) ** 2).sum().sqrt()
    assert abs((weights * z).sum() - mean) < 4.5 * error


def test_the_sandwich_closes():
    program, exact = linear_vae()
    widths = []
    for num_temperatures in (5, 60):
        found = bidirectional(program, 200, num_chains=4, num_temperatures=num_temperatures, num_leapfrog=5)
        truth = exact.log_prob(found.x)
        assert (found.lower - truth).mean() < 3 * (found.lower - truth).std() / math.sqrt(200)
        assert (found.upper - truth).mean() > -3 * (found.upper - truth).std() / math.sqrt(200)
        widths.append((found.upper - found.lower).mean())
    assert 0 < widths[1] < 0.3 * widths[0]
    assert widths[1] < 0.1


def test_the_reverse_direction_has_no_bias_either():
    """At exact posterior draws of one x, the reverse weights have the mean 1 / p(x): over simulated x, p(x) w' is 1."""
    program, exact = linear_vae()
    found = bidirectional(program, 4000, num_chains=1, num_temperatures=6, num_leapfrog=2)
    ratio = (exact.log_prob(found.x) - found.upper).exp()
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / math.sqrt(4000)
    chi = exact.log_prob(found.x) + 0.5 * 2 * (1 + math.log(2 * math.pi)) + exact.covariance_matrix.logdet() / 2
    assert abs(chi.mean()) < 4.5 / math.sqrt(4000)  # x comes from the program: its mean log p(x) is the entropy


@pytest.mark.parametrize(
    "name", ["vae-mixture-prior", "vae-flow-prior", "vae-autoregressive-prior", "vae-two-levels", "vae-flow-encoder"]
)
def test_it_agrees_with_many_importance_weights(name):
    case = CASES[name]
    program = case.build()
    x, given = case.draw(program, 4)
    found = ais(program, x, given, num_temperatures=15, num_leapfrog=4, initial="guide", num_chains=32)
    with torch.no_grad():
        weights = program.log_weights(x, given, 20_000)
    iwae = weights.logsumexp(0) - math.log(20_000)
    relative = (found.log_weights - found.log_evidence).exp().std(0) / math.sqrt(32)
    other = (weights - iwae).exp().std(0) / math.sqrt(20_000)
    assert ((found.log_evidence - iwae).abs() < 4.5 * (relative**2 + other**2).sqrt() + 0.02).all()


@pytest.mark.parametrize("name", ["dequantized", "diffusion", "vae-diffusion-prior", "vae-given-label", "vae-logistic"])
def test_other_programs_run(name):
    case = CASES[name]
    program = case.build().train()
    x, given = case.draw(program, 2)
    state = torch.get_rng_state()
    found = ais(program, x, given, num_temperatures=2, num_leapfrog=1, initial="guide", num_chains=3)
    assert found.log_weights.isfinite().all()
    assert program.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in program.parameters())


def test_nuts_ais_and_importance_weights_agree():
    """Three roads to log p(x) of a linear-Gaussian program, within 0.05 nats of one another and of the truth.

    NUTS has no evidence of its own, but log p(x) = log p(x, z) - log p(z | x) at every z (Chib 1995): with a Normal
    fitted to its draws as the posterior, and averaged over them, it is off by the KL between the two.
    """
    program, exact = linear_vae()
    x = exact.sample((4,))
    z = nuts(program, x, 400, 60, num_chains=1, max_tree_depth=3, seed=1)["z"]
    log_joint = program.prior.log_prob(z.flatten(0, 1)) + program.likelihood.log_prob(x.repeat(400, 1), z.flatten(0, 1))
    chib = (log_joint.reshape(400, 4) - Normal(z.mean(0), z.std(0)).log_prob(z).sum(-1)).mean(0).detach()
    annealed = ais(program, x, num_temperatures=100, num_leapfrog=5, num_chains=64).log_evidence
    iwae = dgm.evaluate(program, x, num_particles=5000).values
    truth = exact.log_prob(x)
    for estimate in (chib, annealed, iwae):
        assert (estimate - truth).abs().mean() < 0.05
    assert (chib - annealed).mean().abs() < 0.05
    assert (annealed - iwae).mean().abs() < 0.05


def test_the_densities_of_a_chain_are_read_in_as_many_passes_as_that_of_one_step(monkeypatch):
    """A pass looks at every site: one for each of them would take time quadratic in the steps."""
    passes = []
    whole = poutine.Trace.compute_log_prob
    monkeypatch.setattr(poutine.Trace, "compute_log_prob", lambda *args: (passes.append(1), whole(*args))[1])
    counts = []
    for steps in (1, 20):
        program = diffusion(2, num_steps=steps).unroll().eval()
        trace = joint_trace(program, None, batch=(4, 3))
        x, names = trace.nodes["_RETURN"]["value"][0], program.latents("x")
        latents = {name: trace.nodes[name]["value"] for name in names}
        passes.clear()
        terms = log_joint(program, x, latents, batch=(4, 3))
        counts.append(len(passes))
        trace.nodes["x"]["value"] = x
        torch.testing.assert_close(sum(terms).sum(), trace.log_prob_sum())
    assert counts[0] == counts[1]


def test_a_transition_of_ones_own():
    """Random-walk Metropolis, with the same contract as HMC."""

    def metropolis(u, step, density):
        proposal = u + step.unsqueeze(-1) * torch.randn_like(u)
        probability = (density(proposal) - density(u)).clamp(max=0).exp()
        return torch.where((torch.rand_like(probability) < probability).unsqueeze(-1), proposal, u), probability

    program, exact = linear_vae()
    x = exact.sample((50,))
    error = ais(program, x, transition=metropolis, num_temperatures=200).log_evidence - exact.log_prob(x)
    assert abs(error.mean()) < 4.5 * error.std() / math.sqrt(50) + 0.02


def test_a_trajectory_leaves_its_density_invariant():
    """On a density on the line that is not Normal, the histogram after one move is that before."""
    density = lambda u: -(u**4).sum(-1) / 4  # noqa: E731
    grid = torch.linspace(-4, 4, 8001)
    inverse = (-(grid**4) / 4).exp().cumsum(0)
    inverse = inverse / inverse[-1]
    u = grid[torch.searchsorted(inverse, torch.rand(20_000)).clamp(max=8000)].reshape(1, -1, 1)
    moved, acceptance = HMC(3)(u, torch.full((20_000,), 0.7), density)
    assert 0.3 < acceptance.mean() < 0.99
    assert not torch.equal(moved, u)
    assert ks(moved.flatten(), u.flatten()) < 1.95 * math.sqrt(2 / 20_000)


def ks(a, b):
    both = torch.cat([a, b]).sort().values
    return max((torch.searchsorted(a.sort().values, both) - torch.searchsorted(b.sort().values, both)).abs()) / len(a)


def test_divergent_trajectories_are_rejected():
    density = lambda u: -(u**4).sum(-1)  # noqa: E731
    u = torch.ones(2, 3, 1)
    moved, acceptance = HMC(20)(u, torch.full((3,), 1e6), density)
    assert torch.equal(moved, u)
    assert (acceptance == 0).all()


def test_temperatures():
    for schedule in ("linear", "sigmoid"):
        betas = temperatures(50, schedule)
        assert betas[0] == 0
        assert betas[-1] == 1
        assert (betas.diff() > 0).all()
    steps = temperatures(50).diff()
    assert steps[0] < steps[25] / 5
    torch.testing.assert_close(steps, steps.flip(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains must be a positive integer"),
        ({"num_temperatures": 0}, "num_temperatures must be a positive integer"),
        ({"num_leapfrog": 0}, "num_leapfrog must be a positive integer"),
        ({"initial": "posterior"}, "initial must be one of prior, guide, got 'posterior'"),
        ({"temperature_schedule": "cubic"}, "temperature_schedule must be one of sigmoid, linear, got 'cubic'"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        ais(linear_vae()[0], torch.zeros(2, 2), **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("normal", "exact: use program.log_prob"),
        ("vae-bit-latent", "latents 'z' are discrete.*observe them.*dgm.evaluate"),
        ("labeled-vae", "latents 'y' are discrete"),
        ("dequantized", "not finite at draws from the prior.*initial='guide'"),
    ],
)
def test_programs_without_a_path(name, message):
    case = CASES[name]
    program = case.build()
    x, _ = case.draw(program, 2)
    with pytest.raises(ValueError, match=message):
        ais(program, x)


def test_a_known_label_is_no_latent():
    """log p(x, y) of a labeled VAE, which is log p(y) + log p(x | y)."""
    program = dgm.Labeled(dgm.Categorical((), 3, learned=True), vae(dgm.Normal(2), num_classes=3))
    x, y = torch.randn(3, 2), torch.tensor([0, 2, 1])
    joint = ais(program, x, observed={"y": y}, num_temperatures=15, num_leapfrog=4).log_evidence
    given = ais(program.program, x, y, num_temperatures=15, num_leapfrog=4).log_evidence
    torch.testing.assert_close(joint, given + program.prior.log_prob(y).detach(), atol=1e-9, rtol=0)
