"""Pareto-smoothed importance sampling: the arithmetic of ArviZ, exact evidences, and a k-hat that tells a bad guide."""

import math

import arviz
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import CASES
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from test_evaluation import linear_vae

import dgm_pyro as dgm
from dgm_pyro.infer import ais, bidirectional, psis, smc
from dgm_pyro.infer.psis import smooth

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([1.4, -0.3, 0.9], dtype=torch.float64)


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu.sum(), 0.5), obs=y)


def skewed(y):
    """A positive latent, for the Jacobian."""
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(3.0), 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Exponential(rate), obs=y)


POSITIVE = torch.tensor([0.4, 1.1, 0.3], dtype=torch.float64)


def of_positive(y):
    """log p(y) of `skewed`."""
    return math.lgamma(6) - math.lgamma(3) + 3 * math.log(2) - 6 * (2 + y.sum(-1)).log()


SKEWED = of_positive(POSITIVE)


def of_data(y):
    """log p(y) of `conjugate`."""
    return dist.MultivariateNormal(torch.zeros(3), 5 * torch.ones(3, 3) + 0.25 * torch.eye(3)).log_prob(y)


def exact_q():
    a = torch.ones(3, 2)
    precision = torch.diag(torch.tensor([1.0, 0.25])) + a.T @ a / 0.25
    return dist.MultivariateNormal(torch.linalg.solve(precision, a.T @ Y / 0.25), precision_matrix=precision)


@pytest.mark.parametrize("scale", [0.3, 0.8, 1.5, 3.0])
@pytest.mark.parametrize("size", [25, 200, 3000])
def test_smoothing_is_that_of_arviz(scale, size):
    torch.manual_seed(int(10 * scale))
    log_weights = scale * dist.StudentT(4.0, 0.0, 1.0).sample((size,)) - 300
    smoothed, k_hat = smooth(log_weights)
    theirs, k = arviz.psislw(log_weights.numpy())
    assert torch.allclose(smoothed, torch.as_tensor(theirs), atol=1e-8)
    assert abs(k_hat - float(k)) < 1e-9
    assert abs(smoothed.logsumexp(0)) < 1e-12


def test_columns_are_smoothed_apart():
    log_weights = torch.randn(60, 3, 2) * torch.tensor([0.5, 2.0])
    smoothed, k_hat = smooth(log_weights)
    alone, k = smooth(log_weights[:, 2, 1])
    assert torch.equal(smoothed[:, 2, 1], alone)
    assert k_hat[2, 1] == k


def test_equal_weights():
    smoothed, k_hat = smooth(torch.zeros(100))
    assert torch.allclose(smoothed.exp(), torch.full((100,), 0.01))
    assert k_hat.isinf()


def test_the_exact_posterior_has_constant_weights():
    found = psis(dgm.Posterior(conjugate, Y), guide=exact_q(), num_particles=50)
    assert torch.allclose(found.log_weights, of_data(Y))
    assert abs(found.log_evidence - of_data(Y)) < 1e-9
    assert abs(found.effective_size - 50) < 1e-3


def fitted(guide, model, *args, gradient_steps=300, lr=0.05):
    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO(num_particles=4))
    torch.manual_seed(0)
    for _ in range(gradient_steps):
        svi.step(*args)
    return guide


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_the_evidence_by_any_guide_of_pyro(make):
    """AutoNormal has a site for each latent, the other one vector for all: both with the Jacobian of a positive one."""
    guide = fitted(make(skewed), skewed, POSITIVE, gradient_steps=150)
    found = psis(dgm.Posterior(skewed, POSITIVE), guide=guide, num_particles=2000)
    assert abs(found.log_evidence - SKEWED) < 4.5 * found.stderr
    assert found.stderr < 0.05
    assert found.elbo < SKEWED


def test_a_mean_field_of_ten_correlated_latents_is_told():
    exact = dist.MultivariateNormal(torch.zeros(10), 0.9 * torch.ones(10, 10) + 0.1 * torch.eye(10))
    posterior = dgm.Posterior(lambda: pyro.sample("z", exact))
    meanfield = dist.Normal(torch.zeros(10), exact.precision_matrix.diagonal().rsqrt()).to_event(1)
    found = psis(posterior, guide=meanfield, num_particles=2000)
    assert found.k_hat > 0.7
    assert not found.reliable
    assert "misses a part" in str(found)
    wide = dist.MultivariateNormal(torch.zeros(10), 1.2 * exact.covariance_matrix)
    good = psis(posterior, guide=wide, num_particles=2000)
    assert good.k_hat < 0.3
    assert abs(good.log_evidence) < 4.5 * good.stderr
    assert "can be corrected" in str(good)


def test_a_program_is_judged_datum_by_datum():
    program, exact = linear_vae()
    x = exact.sample((3,))
    found = psis(program, x, num_particles=4000)
    assert found.k_hat.shape == (3,)
    assert ((found.log_evidence - exact.log_prob(x)).abs() < 4.5 * found.stderr + 1e-6).all()
    assert torch.allclose(psis(program, x[1:2], num_particles=4000).k_hat, found.k_hat[1:2])


# -- the other estimates of one evidence -------------------------------------------------------------------------------


def test_annealing_tempering_and_weights_agree():
    posterior = dgm.Posterior(conjugate, Y)
    annealed = ais(posterior, num_chains=30, num_temperatures=60, num_leapfrog=4)
    assert annealed.latents["mu"].shape == (30, 2)
    error = (annealed.log_weights - annealed.log_evidence).exp().std() / 30**0.5
    assert abs(annealed.log_evidence - of_data(Y)) < 4.5 * error
    assert error < 0.2
    population = smc(posterior, num_particles=200, num_temperatures=20, num_leapfrog=3)
    assert abs(population.log_evidence - of_data(Y)) < 0.3
    mean = (population.log_weights.softmax(0).unsqueeze(-1) * population.state["mu"]).sum(0)
    assert ((mean - exact_q().mean).abs() < 4.5 * exact_q().variance.sqrt() / 100**0.5).all()


def test_annealing_from_a_guide_serves_an_improper_prior():
    def flat(y):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)

    posterior = dgm.Posterior(flat, Y)
    with pytest.raises(ValueError, match="'mu' is not a normalized distribution"):
        ais(posterior, num_temperatures=3)
    wide = dist.Normal(Y.mean().expand(1), 1.5).to_event(1)
    found = ais(posterior, num_chains=40, num_temperatures=30, num_leapfrog=3, initial=wide)
    truth = dist.Normal(Y.mean(), 1.0).log_prob(Y).sum() + 0.5 * math.log(2 * math.pi / 3)
    error = (found.log_weights - found.log_evidence).exp().std() / 40**0.5
    assert abs(found.log_evidence - truth) < 4.5 * error


def test_weights_of_tempered_smc_have_no_bias():
    """However few the particles and temperatures."""
    posterior = dgm.Posterior(skewed, POSITIVE)
    ratio = torch.stack([
        smc(posterior, num_particles=8, num_temperatures=3, num_leapfrog=1, seed=seed).log_evidence - SKEWED
        for seed in range(30)]).exp()  # fmt: skip
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / 30**0.5


def test_tempered_smc_of_a_program():
    program, exact = linear_vae()
    x = exact.sample((4,))
    found = smc(program, x, num_particles=400, num_temperatures=15, num_leapfrog=3)
    assert (found.log_evidence - exact.log_prob(x)).abs().max() < 0.3


def test_the_sandwich_of_simulated_data_closes():
    posterior = dgm.Posterior(skewed, POSITIVE)
    found = bidirectional(posterior, 3, num_chains=20, num_temperatures=50, num_leapfrog=3)
    truth = of_positive(found.x["y"])
    assert ((found.lower - truth).abs() < 0.2).all()
    assert ((found.upper - truth).abs() < 0.2).all()
    assert len(truth.unique()) == 3


# -- wrong objects -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [ais, psis, smc, dgm.infer.nuts])
def test_what_is_no_target_is_answered_with_how_to_wrap_it(call):
    guide = AutoNormal(conjugate)
    for wrong, remedy in [
        (conjugate, r"wrap a Pyro model with its data, dgm.Posterior\(model, \*args\)"),
        ((conjugate, guide), "wrap the model of the pair"),
        (guide, "it is a guide; wrap the model"),
    ]:
        with pytest.raises(TypeError, match=remedy):
            call(wrong, Y)
    with pytest.raises(TypeError, match="a Posterior has its own data: leave it out"):
        call(dgm.Posterior(conjugate, Y), Y)


def test_guides_that_cannot_be_weighed():
    posterior = dgm.Posterior(conjugate, Y)
    with pytest.raises(TypeError, match="pass guide="):
        psis(posterior)
    with pytest.raises(ValueError, match=r"guide is a point \(.*\), which has no density"):
        psis(posterior, guide=fitted(AutoDelta(conjugate), conjugate, Y, gradient_steps=1))
    with pytest.raises(ValueError, match="the guide gives 'mu' a mass, but the model a density"):
        psis(posterior, guide=lambda y: pyro.sample("mu", dist.Bernoulli(0.3).expand([2]).to_event(1)))
    with pytest.raises(ValueError, match=r"has shape \(2,\): fit .* to the same model"):
        psis(posterior, guide=dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pytest.raises(TypeError, match="has a guide of its own"):
        psis(CASES["vae"].build(), torch.zeros(2, 2), guide=exact_q())
