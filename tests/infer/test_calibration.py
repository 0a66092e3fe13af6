"""Calibration of a method: uniform ranks for the exact posterior of a conjugate model, and what a wrong q does."""

import importlib
import math
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import dgm_pyro as dgm
from dgm_pyro import plots
from dgm_pyro.infer.checks import Calibration, miscalibration

pytestmark = pytest.mark.usefixtures("float64")

SD = 0.5
Y = torch.tensor([1.4, -0.3, 0.9], dtype=torch.float64)


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 1.0))
    pyro.deterministic("twice", 2 * mu)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, SD), obs=y)


def exact(posterior, shift=0.0, widen=1.0):
    """p(mu | y) of the data that a posterior has, moved by ``shift`` sds and widened."""
    precision = 1 + len(Y) / SD**2
    mean = posterior.observed["y"].sum() / SD**2 / precision
    sd = precision**-0.5
    return dist.Normal((mean + shift * sd).reshape(1), widen * sd).to_event(1)


def sbc(num_samples=150, **change):
    return dgm.infer.sbc(
        dgm.Posterior(conjugate, Y), method=lambda posterior: exact(posterior, **change), num_samples=num_samples
    )


def test_the_exact_posterior_has_uniform_ranks():
    found = sbc()
    assert found.p_value > 0.01
    assert found.symmetry_p_values("mu") > 0.01
    assert torch.equal(found.ranks["mu"], found.ranks["twice"])
    for level in (0.5, 0.9):
        error = (level * (1 - level) / 150) ** 0.5
        assert abs(found.coverage("mu", level) - level) < 4 * error
    assert not miscalibration(found)


def test_a_narrow_q_covers_too_little_and_is_symmetric():
    found = sbc(widen=0.5)
    assert found.p_value < 1e-4
    assert found.symmetry_p_values("mu") > 0.01
    # The true mu is N(m, s^2); the central 90 % of N(m, s^2 / 4) are 1.645 / 2 of its sds.
    assert abs(found.coverage("mu") - math.erf(1.6449 / 2 / 2**0.5)) < 4 * (0.25 / 150) ** 0.5
    assert "too narrow" in str(found)


def test_a_shifted_q_is_not_symmetric():
    found = sbc(shift=0.5)
    assert found.symmetry_p_values("mu") < 1e-3
    assert "shifted" in str(found)


def test_p_values_of_symmetric_ranks_are_uniform():
    """Ranks that are U-shaped, and so far from uniform."""
    draws = torch.distributions.Beta(0.3, 0.3)
    torch.manual_seed(0)
    ranks = (draws.sample((400, 500)) * 1000).long().clamp_max(999)
    p = Calibration({"z": ranks}, 999, 20).symmetry_p_values("z")
    assert abs(float(p.mean()) - 0.5) < 4 * (1 / 12 / 500) ** 0.5 + 0.5 / 400**0.5
    assert float((p < 0.05).double().mean()) < 0.05 + 4 * (0.05 * 0.95 / 500) ** 0.5


def test_coverage_of_all_ranks_is_the_level():
    every = Calibration({"z": torch.arange(100).unsqueeze(-1)}, 99, 20)
    for level in (0.037, 0.5, 0.9, 1.0):
        assert abs(float(every.coverage("z", level)) - level) < 1e-12


@pytest.mark.parametrize("method", ["meanfield", AutoNormal])
def test_a_guide_is_fitted_to_each_simulation(method):
    options = {"num_samples": 1, "num_posterior_samples": 19, "bins": 2, "gradient_steps": 5}
    found, again = (dgm.infer.sbc(dgm.Posterior(conjugate, Y), method=method, **options) for _ in range(2))
    assert found.ranks["mu"].shape == (1, 1)
    assert torch.equal(found.ranks["mu"], again.ranks["mu"])


def test_nuts_is_a_method():
    found = dgm.infer.sbc(dgm.Posterior(conjugate, Y), method="nuts", num_samples=1, num_posterior_samples=9, bins=2)
    assert 0 <= int(found.ranks["mu"]) <= 9


def learned(y):
    """Its prior has a width that is a parameter, known to the param store alone."""
    sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), sd))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def of_learned(posterior):
    """p(mu | y) of `learned`, by the parameter."""
    shrunk = 1 / (1 + pyro.param("sd").detach() ** -2)
    return dist.Normal((shrunk * posterior.observed["y"]).reshape(1), shrunk.sqrt()).to_event(1)


def test_two_processes_rank_as_one_does():
    """They draw the same numbers, in the dtype and with the parameters of this one."""
    pyro.clear_param_store()
    pyro.param("sd", torch.tensor(3.0), constraint=dist.constraints.positive)
    pyro.param("sd")  # it leaves a reference on the parameter, which no pickle takes
    posterior = dgm.Posterior(learned, Y[0])
    options = {"method": of_learned, "num_samples": 40, "num_posterior_samples": 19, "bins": 2}
    alone, together = (dgm.infer.sbc(posterior, jobs=jobs, **options) for jobs in (1, 2))
    # Rounding moves a rank by one where a draw and the truth all but agree.
    assert (alone.ranks["mu"] - together.ranks["mu"]).abs().max() <= 1
    assert alone.ranks["mu"].unique().numel() > 10
    assert [*pyro.get_param_store()] == ["sd"]


class Unknown:
    """It arrives as what only this process could import."""

    def __reduce__(self):
        return importlib.import_module, ("of_this_process_alone",)


@pytest.mark.parametrize(("held", "why"), [(threading.Lock(), "lock"), (Unknown(), "of_this_process_alone")])
def test_what_cannot_be_sent_to_another_process_is_told(held, why):
    with pytest.raises(TypeError, match=f"cannot be sent to another process .*{why}.*: use jobs=1"):
        dgm.infer.sbc(dgm.Posterior(conjugate, Y), method=lambda posterior: held, num_samples=2, jobs=2)


def two(y):
    seen = pyro.sample("seen", dist.Normal(torch.zeros(()), 2.0))
    pyro.sample("unseen", dist.Normal(torch.zeros(()), 2.0))
    pyro.sample("y", dist.Normal(seen, 1.0), obs=y)


def test_check_names_what_no_data_determine():
    """The posterior mean of `seen` is 0.8 y, whose variance is 0.8 of its prior's."""

    def method(posterior):
        loc = torch.stack([0.8 * posterior.observed["y"], torch.zeros(())])
        return dist.Normal(loc, torch.tensor([0.8**0.5, 2.0])).to_event(1)

    posterior = dgm.Posterior(two, torch.tensor(1.0))
    found = dgm.infer.check(posterior, method=method, num_samples=200)
    assert abs(float(found.units["seen"].variance) - 0.8) < 4 * 0.8 * (2 / 200) ** 0.5
    assert found.units["unseen"].collapsed.tolist() == [True]
    assert [finding.where for finding in found.findings] == ["unseen"]
    assert found.calibration.p_value > 0.01
    assert plots.calibration(found).axes
    assert len(plots.coverage(found.calibration).axes[0].lines) >= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "method must be a guide that dgm.guides.auto knows"),
        ({"method": "gaussian"}, "q must be one of"),
        ({"method": AutoNormal(conjugate)}, "pass the guide's name or its class"),
        ({"method": lambda posterior: torch.zeros(3)}, r"returned \(3,\): it must return a fitted guide, or draws"),
        ({"method": "nuts", "given": Y}, "leave it out"),
    ],
)
def test_what_is_no_method(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        dgm.infer.sbc(dgm.Posterior(conjugate, Y), num_samples=2, **options)


def test_an_improper_prior_makes_no_data():
    def flat(y):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ValueError, match="'mu' is not a normalized distribution"):
        dgm.infer.sbc(dgm.Posterior(flat, Y[0]), method="meanfield")


# -- gaps and evidence of one posterior --------------------------------------------------------------------------------


def pair(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu.sum(), 1.0), obs=y)


PRECISION = torch.tensor([[1.0, 0.0], [0.0, 0.25]], dtype=torch.float64) + len(Y)
EVIDENCE = dist.MultivariateNormal(
    torch.zeros(3, dtype=torch.float64), 5 * torch.ones(3, 3, dtype=torch.float64) + torch.eye(3).double()
).log_prob(Y)
BEST = 0.5 * (PRECISION.diagonal().log().sum() - PRECISION.logdet())
"""KL of the best mean field."""


def moved(by):
    mean = torch.linalg.solve(PRECISION, torch.ones(2) * Y.sum())
    return dist.Normal(mean + by, PRECISION.diagonal().rsqrt()).to_event(1)


def test_gaps_of_a_mean_field_are_the_analytic_ones():
    posterior = dgm.Posterior(pair, Y)
    guide = dgm.guides.auto(pair, "meanfield")
    guide(Y)
    with torch.no_grad():
        guide.q.parameter[0] += 0.8  # far from where the fit begins
    before = [p.detach().clone() for p in guide.parameters()]
    found = dgm.infer.gaps(posterior, guide=guide, gradient_steps=200, num_samples=2000, num_temperatures=10)
    assert all(map(torch.equal, before, guide.parameters()))
    mean, error = found.log_evidence
    assert abs(mean - EVIDENCE) < 4 * error
    mean, error = found.best
    assert abs(mean - (EVIDENCE - BEST)) < 4 * error + 0.02
    assert found.optimization[0] > 0.3
    assert found.total[0] == pytest.approx(found.approximation[0] + found.optimization[0])
    assert "no amortization gap" in str(found)


def test_a_distribution_is_the_best_of_its_family():
    found = dgm.infer.gaps(dgm.Posterior(pair, Y), guide=moved(0.0), log_evidence=EVIDENCE.detach())
    assert found.best == found.elbo
    assert found.kind == "given"
    assert abs(found.approximation[0] - BEST) < 4 * found.approximation[1]


def test_parameters_that_no_step_would_move_are_named():
    def guide(y):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))

    with pytest.raises(TypeError, match="a function with the parameters loc in the param store: make it a PyroModule"):
        dgm.infer.gaps(dgm.Posterior(pair, Y), guide=guide)


def test_the_evidence_of_a_posterior():
    posterior = dgm.Posterior(pair, Y)
    guide = dist.MultivariateNormal(moved(0.0).mean, precision_matrix=PRECISION)
    tight = dgm.evaluate(posterior, guide=guide, num_particles=5000)
    assert tight.nats == pytest.approx(float(EVIDENCE), abs=1e-9)
    assert (tight.kind, tight.measure, tight.num_dims) == ("iwae-5000", "density", 3)
    bound = dgm.evaluate(posterior, guide=moved(0.0), num_samples=5000)
    assert abs(bound.nats - float(EVIDENCE - BEST)) < 0.05
    assert str(bound).endswith("nats, elbo, density)")
    other = dgm.evaluate(dgm.Posterior(conjugate, Y), guide=exact(dgm.Posterior(conjugate, Y)), num_particles=2)
    assert other.minus(tight).nats == pytest.approx(other.nats - tight.nats)
    later = dgm.Posterior(conjugate, Y + 1)
    of_others = dgm.evaluate(later, guide=exact(later))
    with pytest.raises(ValueError, match="of different data"):
        of_others.minus(tight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: dgm.infer.gaps(p), "pass guide="),
        (lambda p: dgm.evaluate(p), "pass guide="),
        (lambda p: dgm.evaluate(p, Y, guide=moved(0.0)), "has its own data"),
        (lambda p: dgm.infer.gaps(p, Y, guide=moved(0.0)), "has its own data"),
        (lambda p: dgm.infer.check(p, Y, method="nuts"), "data was passed, but a Posterior has its own data"),
        (lambda p: dgm.infer.gaps(dgm.Normal(2), Y, guide=moved(0.0)), "has a guide of its own"),
        (lambda p: dgm.infer.sbc(dgm.Normal(2), method="nuts"), "has a guide of its own"),
        (lambda p: dgm.infer.sbc(dgm.Normal(2), jobs=2), "leave jobs out"),
        (lambda p: dgm.infer.sbc(pair, method="nuts"), r"wrap a Pyro model with its data, dgm.Posterior\(model"),
        (lambda p: dgm.infer.gaps((pair, pair), Y), "wrap the model of the pair"),
        (lambda p: dgm.evaluate(pair, Y), r"wrap a Pyro model with its data, dgm.Posterior\(model"),
        (lambda p: dgm.infer.check(AutoNormal(pair), Y), "it is a guide; wrap the model"),
        (lambda p: dgm.infer.units(p, Y), "sbc, check and compare for it"),
    ],
)
def test_wrong_objects_are_answered_with_how_to_wrap_them(call, message):
    with pytest.raises(TypeError, match=message):
        call(dgm.Posterior(pair, Y))
