"""Fits whose steps are taken at once are those fits: the same densities, gradients and modes."""

import copy
import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive

import dgm_pyro as dgm
from dgm_pyro.families import autoguide
from dgm_pyro.families.autoguide import GuidedPosterior, Stacked
from dgm_pyro.infer.compare import train_guide

comparison = sys.modules["dgm_pyro.infer.compare"]  # not the function of that name

Y = torch.tensor([28.0, 8.0, -3.0, 7.0])


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(autoguide, "STEPS", 20)  # of the Normal to start from


def schools(y):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("schools", len(y)):
        pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(mu, tau)), 10.0), obs=y)


def guides(name, restarts=3):
    posterior, guide, found = dgm.Posterior(schools, Y), dgm.guides.auto(schools, name), []
    for start in range(restarts):
        comparison._set_up(posterior, guide, start, 0)
        found.append(copy.deepcopy(guide))
    return posterior, found


def parts(each):
    return [(guide.q, guide.loc, guide.factor) for guide in each]


@pytest.mark.parametrize("name", ["meanfield", "lowrank", "realnvp", "iaf", "sylvester"])
def test_draws_and_densities_are_those_of_each_guide(float64, name):
    _, each = guides(name)
    stacked = Stacked(parts(each))
    q = stacked.get_posterior().expand((5, 3))
    u = q.rsample()
    log_q = q.log_prob(u)
    assert (u.shape, log_q.shape) == ((5, 3, 6), (5, 3))
    assert len({float(value) for value in u.detach()[..., 0].flatten()}) == 15  # no draw is another's
    for i, guide in enumerate(each):
        alone = guide.get_posterior(Y)
        torch.testing.assert_close(alone.log_prob(u[:, i].detach()), log_q[:, i], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(q.log_prob(u.detach()), log_q, rtol=1e-6, atol=1e-6)  # of draws from elsewhere


@pytest.mark.parametrize("objective", [dgm.ELBO(4), dgm.IWAE(4)], ids=["elbo", "iwae"])
def test_the_gradient_of_all_is_that_of_each(float64, monkeypatch, objective):
    """From the same normal numbers: each guide's own row of those of all."""
    posterior, each = guides("fullrank")
    noise = torch.randn(4, 3, 6)
    stacked = Stacked(parts(each))
    monkeypatch.setattr(
        "dgm_pyro.families.autoguide.StackedDistribution.rsample",
        lambda q, shape=(): placed(
            q, stacked.for_each(lambda d, z: moved(d, z), noise, in_dims=(-2,), out_dims=(-2, -1))
        ),
    )
    program = GuidedPosterior(posterior, stacked, 12)
    (-objective(program, torch.zeros(3)).surrogate.sum()).backward()
    for i, guide in enumerate(each):
        u, log_q = moved(guide.get_posterior(Y), noise[:, i])
        log_weights = posterior.log_joint(u) - log_q
        value = log_weights.mean() if isinstance(objective, dgm.ELBO) else log_weights.logsumexp(0) - math.log(4)
        (-value).backward()
        for parameter, all_of_them in zip(guide.q.parameters(), stacked.stacked, strict=True):
            torch.testing.assert_close(all_of_them.grad[i], parameter.grad, rtol=1e-6, atol=1e-8)


def moved(q, z):
    """The draws that standard normal numbers make, and their densities."""
    u = q.transforms[0](q.base_dist.loc + (q.base_dist.scale_tril @ z.unsqueeze(-1)).squeeze(-1))
    return u, q.log_prob(u)


def placed(q, drawn):
    q._drawn = drawn
    return drawn[0]


def two_modes():
    """One of them has 0.9 of the mass."""
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 20.0))
    modes = dist.Normal(torch.tensor([-4.0, 4.0]), 0.3).log_prob(z) + torch.tensor([0.1, 0.9]).log()
    pyro.factor("modes", modes.logsumexp(-1))


@pytest.mark.parametrize("jobs", [None, 1])
def test_the_fit_of_the_large_mode_is_kept(jobs):
    """The evidence of a mode is N(+-4; 0, 20^2 + 0.3^2) times its mass, and a Normal fits it."""
    posterior = dgm.Posterior(two_modes)
    guide = dgm.guides.auto(two_modes, "meanfield")
    values = train_guide(posterior, guide, gradient_steps=60, restarts=5, jobs=jobs)
    exact = dist.Normal(0.0, math.sqrt(400.09)).log_prob(torch.tensor(4.0)) + math.log(0.9)
    assert values[-1] == pytest.approx(float(exact), abs=0.05)
    assert guide.median()["z"] == pytest.approx(4.0, abs=0.2)
    draws = Predictive(two_modes, guide=guide, num_samples=50)()
    assert (draws["z"] > 2).all()


@pytest.mark.parametrize(("name", "objective"), [("mixture", None), ("meanfield", "stl")])
def test_fits_that_vmap_does_not_take_are_one_after_another(name, objective):
    found = []
    for jobs in (None, 1):
        guide = dgm.guides.auto(schools, name)
        options = {"gradient_steps": 3, "restarts": 2, "objective": objective, "jobs": jobs}
        found.append((train_guide(dgm.Posterior(schools, Y), guide, **options), guide.start))
    assert found[0] == found[1]


def test_a_fit_whose_gradient_is_not_finite_stays_where_it_is():
    """The others take the step of clipped Adam that each takes alone."""
    together, gradients = torch.nn.Parameter(torch.ones(3, 2)), torch.tensor([[0.3, 4.0], [math.nan, 1.0], [2e3, 1.0]])
    together.grad = gradients.clone()
    comparison._step_each(torch.optim.Adam([together], lr=0.1), [together])
    for i in range(3):
        alone = torch.nn.Parameter(torch.ones(2))
        alone.grad = gradients[i].clone()
        comparison._step(torch.optim.Adam([alone], lr=0.1), [alone])
        torch.testing.assert_close(together[i], alone)
    assert torch.equal(together[1].detach(), torch.ones(2))


@pytest.mark.parametrize("jobs", [None, 1])
def test_a_q_that_is_an_object_is_where_every_fit_starts(jobs):
    torch.manual_seed(0)
    q = dgm.flow.realnvp(6, layers=2, hidden=(8,))
    before = copy.deepcopy(q.state_dict())
    posterior, guide = dgm.Posterior(schools, Y), dgm.guides.auto(schools, q)
    values = train_guide(posterior, guide, gradient_steps=30, num_particles=64, restarts=3, jobs=jobs)
    for name, value in q.state_dict().items():
        assert torch.equal(value, before[name])
    # The guide that comes back is the fit whose values do: on the last step the learning rate is next to nothing.
    torch.manual_seed(1)
    _, log_weights = autoguide.weigh(posterior, guide, 4000)
    assert values[-1] == pytest.approx(log_weights.mean().item(), abs=4 * log_weights.std().item() / 8)


class OneScale(dgm.Conditional):
    """N(shift, scale^2) of one real; the scale is a number, and the shift is not learned."""

    def __init__(self):
        super().__init__()
        self.event_shape = torch.Size((1,))
        self.log_scale = torch.nn.Parameter(torch.tensor(0.7))
        self.shift = torch.nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, given=None):
        return dist.Normal(self.shift, self.log_scale.exp()).to_event(1)


@pytest.mark.parametrize("jobs", [None, 1])
def test_numbers_are_learned_and_frozen_parameters_are_not(jobs):
    """q can be the posterior, N(0, 1/2): the ELBO is then the evidence, and frozen parameters are at their start."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    guide = dgm.guides.auto(model, OneScale())
    values = train_guide(dgm.Posterior(model), guide, gradient_steps=150, restarts=2, lr=0.05, jobs=jobs)
    assert torch.equal(guide.q.shift, torch.zeros(1))
    assert (guide.factor * guide.q.log_scale.exp()).item() == pytest.approx(math.sqrt(0.5), rel=0.03)
    assert values[-1] == pytest.approx(float(dist.Normal(0.0, math.sqrt(2.0)).log_prob(torch.tensor(0.0))), abs=0.02)
