"""What draws predict: conjugate moments, the density of each datum, leave-one-out; and ArviZ's groups."""

import math

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import MODELS, mixture
from torch.distributions import constraints

import dgm_pyro as dgm
from dgm_pyro import plots

pytestmark = pytest.mark.usefixtures("float64")

SD = 0.5
Y = torch.tensor([1.4, -0.3, 0.9, 0.2, 1.1], dtype=torch.float64)
PRECISION = 1 + len(Y) / SD**2
MEAN = float(Y.sum()) / SD**2 / PRECISION


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, SD), obs=y)


def exact():
    return dist.Normal(torch.tensor([MEAN]), PRECISION**-0.5).to_event(1)


@pytest.fixture(scope="module")
def weighted():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wide = dist.Normal(torch.tensor([MEAN]), 1.3 * PRECISION**-0.5).to_event(1)
        return dgm.infer.psis(dgm.Posterior(conjugate, Y), guide=wide, num_particles=4000)
    finally:
        torch.set_default_dtype(before)


def test_predictions_have_the_conjugate_moments(weighted):
    found = dgm.infer.predictive_check(weighted.posterior, weighted, num_samples=4000)
    assert found.source == "posterior"
    variance = 1 / PRECISION + SD**2
    y = found.replicated["y"]
    assert y.shape == (4000, 5)
    assert abs(y.mean() - MEAN) < 4.5 * (1 / PRECISION / 4000) ** 0.5 + 0.01
    assert abs(y.var() / variance - 1) < 4.5 * (2 / 4000) ** 0.5
    # Of the prior, the mean of five data is N(0, 1 + SD^2 / 5).
    prior = dgm.infer.predictive_check(weighted.posterior, num_samples=1000)
    share = 0.5 * math.erfc(float(Y.mean()) / (2 * (1 + SD**2 / 5)) ** 0.5)
    assert abs(prior.p_values("y")["mean"] - share) < 4.5 * (share * (1 - share) / 1000) ** 0.5
    assert len(plots.predictions(prior).axes) == 1


def single(y):
    pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0)), 1.0), obs=y)


def test_a_statistic_that_no_replicate_reaches_is_told():
    far = torch.cat([Y, torch.tensor([40.0])])
    found = dgm.infer.predictive_check(dgm.Posterior(conjugate, far), num_samples=100)
    assert found.p_values("y")["max"] == 0
    assert "max of y" in str(found)
    one = dgm.infer.predictive_check(dgm.Posterior(single, Y[0]), num_samples=100)
    assert list(one.p_values("y")) == ["value"]


def scaled(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", 50, subsample=torch.arange(len(y))), pyro.poutine.mask(mask=y > 0):
        pyro.sample("y", dist.Normal(mu, SD), obs=y)


def test_the_density_of_each_datum_has_no_scale_and_heeds_the_mask():
    u = torch.randn(7, 1)
    expected = dist.Normal(u, SD).log_prob(Y)
    found = dgm.Posterior(conjugate, Y).pointwise(u)["y"]
    assert torch.allclose(found, expected)
    masked = dgm.Posterior(scaled, Y).pointwise(u)["y"]
    assert torch.allclose(masked, torch.where(Y > 0, expected, 0.0))


def counts(y):
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Binomial(10, rate / (1 + rate)), obs=y)


def test_data_that_vmap_cannot_draw_are_drawn_one_by_one():
    posterior = dgm.Posterior(counts, torch.tensor([3.0, 4.0]))
    u = posterior.initial(400)
    drawn = posterior.predict(u)["y"]
    share = posterior.constrain(u)["rate"]
    share = (share / (1 + share)).unsqueeze(-1)
    error = (10 * share * (1 - share)).sum(0).sqrt()
    assert ((drawn - 10 * share).sum(0).abs() < 4.5 * error).all()
    assert torch.equal(drawn, posterior.predict(u)["y"])


def test_leaving_one_out_is_that_of_the_formula():
    draws = dgm.infer.psis(dgm.Posterior(conjugate, Y), guide=exact(), num_particles=4000)
    found = draws.loo()
    others = Y.sum() - Y
    precision = 1 + (len(Y) - 1) / SD**2
    truth = dist.Normal(others / SD**2 / precision, (1 / precision + SD**2) ** 0.5).log_prob(Y)
    weights = (-draws.posterior.pointwise(draws.u)["y"]).exp()  # their mean is 1 / p(y_i | others)
    error = weights.std(0) / weights.mean(0) / 4000**0.5
    assert error.max() < 0.05
    assert ((found.values - truth).abs() < 4.5 * error).all()
    assert (found.k_hats < 0.7).all()
    assert "all estimates are reliable" in str(found)
    assert found.minus(found) == (0, 0)


def test_the_groups_of_arviz(weighted):
    data = weighted.to_arviz(num_prior=300)
    groups = {"posterior", "posterior_predictive", "log_likelihood", "observed_data", "prior", "prior_predictive"}
    assert set(data.groups()) == groups
    assert data.posterior["mu"].shape == (1, 4000)
    assert np.allclose(data.posterior["twice"], 2 * data.posterior["mu"])
    assert data.log_likelihood["y"].shape == (1, 4000, 5)
    assert data.prior_predictive["y"].shape == (1, 300, 5)
    assert np.array_equal(data.observed_data["y"], Y)
    # Resampled by weight: the moments are those of the posterior, not of the guide.
    assert abs(float(data.posterior["mu"].std()) * PRECISION**0.5 - 1) < 4.5 * (1 / 2000) ** 0.5
    assert abs(float(arviz.loo(data).elpd_loo) - weighted.loo().nats) < 1e-6


OTHERS = {
    "nuts": lambda p: dgm.infer.nuts(p, num_samples=40, warmup=40),
    "ais": lambda p: dgm.infer.ais(p, num_chains=200, num_temperatures=10),
    "smc": lambda p: dgm.infer.smc(p, num_particles=200, num_temperatures=10),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_result_has_its_draws(name):
    found = OTHERS[name](dgm.Posterior(conjugate, Y))
    u = found.vectors()
    assert abs(u.mean() - MEAN) < 4.5 * (1 / PRECISION / 40) ** 0.5
    data = found.to_arviz(num_prior=10)
    assert data.posterior["mu"].shape == u.shape[:2]
    assert ("sample_stats" in data.groups()) == (name == "nuts")


def test_chains_are_drawn_with_those_that_differ_first():
    def two():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    found = dgm.infer.nuts(dgm.Posterior(two), num_samples=20, warmup=20)
    found.samples["z"][0, :, 1] += 10.0
    figure = plots.chains(found, most=1)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["z[1]"]
    lines = figure.axes[0].lines
    assert np.array_equal(lines[0].get_ydata(), found.samples["z"][0, :, 1])
    with pytest.raises(ValueError, match="observes no data"):
        dgm.infer.predictive_check(dgm.Posterior(two), found)
    with pytest.raises(ValueError, match=r"state them in a pyro\.plate"):
        found.loo()


def test_what_cannot_be_predicted(weighted):
    summed = dgm.Posterior(mixture, torch.tensor([0.3, 1.0]))
    for call in (summed.predict, summed.pointwise):
        with pytest.raises(ValueError, match="are summed out"):
            call(summed.initial(2))
    function, args, _ = MODELS["flat-regression"]
    with pytest.raises(ValueError, match="not a normalized distribution"):
        dgm.infer.predictive_check(dgm.Posterior(function, *args))
    with pytest.raises(TypeError, match="samples must be 'prior', or draws of the posterior"):
        dgm.infer.predictive_check(weighted.posterior, "posterior")
    program = dgm.VAE(dgm.Normal(1), dgm.Normal(2, torch.nn.Linear(1, 4)), dgm.Normal(1, torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="draws of a Program"):
        dgm.infer.psis(program, torch.zeros(3, 2), num_particles=25).to_arviz()


def test_an_improper_prior_has_no_group():
    def flat(y):
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, SD), obs=y)

    found = dgm.infer.psis(dgm.Posterior(flat, Y), guide=exact(), num_particles=25).to_arviz()
    assert "prior" not in found.groups()
    assert "posterior_predictive" in found.groups()
