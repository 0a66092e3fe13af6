"""Guides of any Pyro model: Pyro's own tools work on them, their density is right, and they start at the posterior."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import MODELS, Y, eight_schools_centered, mixture
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal

import dgm_pyro as dgm
from dgm_pyro.families.autoguide import GuidedPosterior, normal_fit
from dgm_pyro.families.guides import FAMILIES, MixtureOfVectors, auto

pytestmark = pytest.mark.usefixtures("float64")

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
Z = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.1


def linear(x, z):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 10.0).to_event(1))
    with pyro.plate("data", len(z)):
        pyro.sample("z", dist.Normal((x * beta).sum(-1), 0.5), obs=z)


def exact():
    precision = X.T @ X / 0.25 + torch.eye(3) / 100
    return dist.MultivariateNormal(torch.linalg.solve(precision, X.T @ Z / 0.25), precision_matrix=precision)


def called(guide, *args, **kwargs):
    torch.manual_seed(0)
    guide(*args, **kwargs)
    return guide


def test_the_start_is_the_exact_posterior_of_a_linear_model():
    posterior = dgm.Posterior(linear, X, Z)
    loc, factor = normal_fit(posterior, torch.zeros(3))
    assert ((loc - exact().mean).abs() < 0.1 * exact().variance.sqrt()).all()
    covariance = factor @ factor.mT
    assert torch.allclose(covariance, exact().covariance_matrix, rtol=0.25, atol=0.1 * float(exact().variance.min()))
    _, diagonal = normal_fit(posterior, torch.zeros(3), whiten=False)
    assert torch.equal(diagonal, diagonal.diagonal().diag())
    assert torch.allclose(diagonal.diagonal(), exact().precision_matrix.diagonal().rsqrt(), rtol=0.15)


def test_a_density_without_a_maximum_has_a_start_too():
    """Centered eight schools: the density grows without bound where tau shrinks."""
    function, args, kwargs = MODELS["eight-schools-centered"]
    guide = called(auto(function, "fullrank"), *args, **kwargs)
    tau = guide.median(*args, **kwargs)["tau"]
    assert 0.3 < tau < 15


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_scores_its_own_draws(name):
    guide = called(auto(linear, name), X, Z)
    assert isinstance(guide, AutoGuide)
    q = guide.get_posterior(X, Z)
    torch.manual_seed(1)
    u = q.rsample((5,))
    assert u.requires_grad
    log_q = q.log_prob(u)
    fresh = guide.get_posterior(X, Z).log_prob(u.detach())
    assert torch.allclose(log_q, fresh, atol=1e-6)
    found = dgm.infer.psis(dgm.Posterior(linear, X, Z), guide=guide, num_particles=2000)
    with torch.no_grad():
        posterior = dgm.Posterior(linear, X, Z)
        evidence = posterior.log_joint(exact().mean) - exact().log_prob(exact().mean)
    assert abs(found.log_evidence - evidence) < 4.5 * found.stderr + 0.02


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceGraph_ELBO()])
def test_svi_trains_it_and_pyros_tools_read_it(elbo):
    pyro.clear_param_store()
    guide = called(auto(linear, "realnvp"), X, Z)
    before = [p.detach().clone() for p in guide.parameters()]
    svi = SVI(linear, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    losses = [svi.step(X, Z) for _ in range(5)]
    assert all(map(math.isfinite, losses))
    assert any(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
    predicted = Predictive(linear, guide=guide, num_samples=30)(X, Z)
    assert predicted["z"].shape == (30, 12)
    sd = exact().variance.sqrt()
    assert ((guide.median(X, Z)["beta"] - exact().mean).abs() < 0.3 * sd).all()
    low, high = guide.quantiles([0.16, 0.84], X, Z)["beta"]
    assert torch.allclose((high - low) / 2, sd, rtol=0.25)
    trace = pyro.poutine.trace(guide).get_trace(X, Z)
    auxiliary = [name for name, site in trace.nodes.items() if site.get("infer", {}).get("is_auxiliary")]
    assert len(auxiliary) == 1


def test_many_particles_by_a_plate():
    guide = called(auto(linear, "fullrank"), X, Z)
    torch.manual_seed(0)
    loss = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1).loss(linear, guide, X, Z)
    posterior = dgm.Posterior(linear, X, Z)
    found = dgm.infer.psis(posterior, guide=guide, num_particles=2000)
    assert abs(loss + found.elbo) < 4.5 * found.log_weights.std() * (2 / 2000) ** 0.5


def test_discrete_latents_are_left_to_be_summed_out():
    guide = called(auto(mixture, "fullrank"), Y)
    loss = TraceEnum_ELBO(max_plate_nesting=1, num_particles=20)
    value = loss.loss(config_enumerate(mixture), guide, Y)
    found = dgm.infer.psis(dgm.Posterior(mixture, Y), guide=guide, num_particles=400)
    assert abs(value + found.elbo) < 4.5 * found.log_weights.std() * (1 / 20 + 1 / 400) ** 0.5


def test_a_conditional_and_a_function_as_q():
    by_object = called(auto(linear, dgm.Normal(3, learned=True)), X, Z)
    by_function = called(auto(linear, lambda size: dgm.Normal(size, learned=True)), X, Z)
    assert torch.equal(by_object.loc, by_function.loc)
    with pytest.raises(ValueError, match=r"event_shape \(2,\), but the model has 3"):
        called(auto(linear, dgm.Normal(2)), X, Z)


def test_guides_of_pyro_by_name_and_class():
    assert type(auto(linear, "AutoNormal")) is AutoNormal
    assert type(auto(linear, AutoMultivariateNormal)) is AutoMultivariateNormal
    function, args, _ = MODELS["flat-regression"]
    called(auto(function, "AutoNormal"), *args)  # no prior can be drawn
    called(auto(function, "nsf"), *args)


def test_what_is_no_q():
    with pytest.raises(ValueError, match="q must be one of meanfield"):
        auto(linear, "gaussian")
    with pytest.raises(TypeError, match=r"q must be one of .* got int"):
        auto(linear, 3)
    with pytest.raises(TypeError, match="pass the model alone"):
        auto((linear, auto(linear)), "nsf")
    function, args, _ = MODELS["partly-observed"]
    with pytest.raises(ValueError, match="a mask removes"):
        called(auto(function, "nsf"), *args)


def test_mixtures_have_gradients_along_the_path():
    """The mean of a mixture is known: its gradient by the draws is that of the formula."""
    torch.manual_seed(0)
    q = MixtureOfVectors(2, 3)
    draws = q().rsample((40_000,))
    target = torch.tensor([1.0, -2.0])
    (ours,) = torch.autograd.grad((draws @ target).mean(), q.logits)
    weights = q.logits.softmax(0)
    (theirs,) = torch.autograd.grad((weights @ q.loc) @ target, q.logits)
    assert torch.allclose(ours, theirs, atol=0.06)


OBJECTIVES = [dgm.ELBO(16, analytic_kl=False), dgm.STL(16), dgm.IWAE(16), dgm.DReG(16), dgm.RWS(16)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_every_objective_takes_a_posterior(objective):
    """One draw of 16 particles: the value from log p(u, y) - log q(u) by hand."""
    posterior = dgm.Posterior(linear, X, Z)
    guide = called(auto(linear, "fullrank"), X, Z)
    for recorded in (16, 1):
        program = GuidedPosterior(posterior, guide, recorded)
        torch.manual_seed(3)
        bound = objective(program, torch.zeros(1))
        torch.manual_seed(3)
        q = guide.get_posterior(X, Z)
        u = q.rsample((16, 1))
        weights = (posterior.log_joint(u) - q.log_prob(u)).squeeze(1)
        mean = isinstance(objective, dgm.ELBO | dgm.STL)
        expected = weights.mean() if mean else weights.logsumexp(0) - math.log(16)
        assert abs(bound.value - expected) < 1e-9
        gradients = torch.autograd.grad(bound.surrogate.sum(), [*guide.parameters()])
        assert all(gradient.isfinite().all() for gradient in gradients)
        if isinstance(objective, dgm.ELBO | dgm.IWAE):
            direct = torch.autograd.grad(expected, [*guide.parameters()])
            assert all(map(torch.allclose, gradients, direct))


def test_a_model_that_starts_from_values_of_its_own():
    from pyro.infer.autoguide.initialization import init_to_value

    guide = auto(eight_schools_centered, "meanfield", init_loc_fn=init_to_value(values={"tau": torch.tensor(4.0)}))
    _, args, kwargs = MODELS["eight-schools-centered"]
    assert called(guide, *args, **kwargs).loc.isfinite().all()
