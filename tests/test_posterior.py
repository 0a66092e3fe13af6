"""Any Pyro model as a density of a real vector: its terms are those of Pyro's own traces, for one vector and many."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import EFFECTS, ERRORS, MODELS, Y, eight_schools
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch.distributions import biject_to

import dgm_pyro as dgm
from dgm_pyro.posterior import CholeskyFactor, Posterior

pytestmark = pytest.mark.usefixtures("float64")

# What torch.func.vmap refuses: reading a value, and the in-place operations of some distributions.
UNMAPPED = {"branches-on-a-value", "reads-a-number", "ordinal-regression", "dirichlet-multinomial", "heavy-tails"}


def made(name):
    function, args, kwargs = MODELS[name]
    return Posterior(function, *args, **kwargs)


def near_start(posterior, size):
    torch.manual_seed(3)
    return 0.4 * torch.randn(size, posterior.D)


def by_pyro(posterior, values):
    """log p of one set of values by Pyro's traces, and the Jacobian's term by each site's own support."""
    data = {**values, **posterior.subsamples}
    model = poutine.condition(posterior.model, data=data)
    with poutine.block(), pyro.validation_enabled(False):
        trace = poutine.trace(model).get_trace(*posterior.args, **posterior.kwargs)
        if posterior.enumerated:
            loss = TraceEnum_ELBO(max_plate_nesting=posterior.nesting)
            enumerated, empty = config_enumerate(model, "parallel"), lambda *args, **kwargs: None
            log_joint = -loss.loss(enumerated, empty, *posterior.args, **posterior.kwargs)
        else:
            log_joint = trace.log_prob_sum()
    log_det = 0.0
    for name in posterior.names:
        site = trace.nodes[name]
        support = biject_to(site["fn"].support)
        term = support.log_abs_det_jacobian(support.inv(site["value"]), site["value"])
        if site["mask"] is not None and site["mask"] is not False and term.dim():  # elements that nothing depends on
            term = term[site["mask"].expand_as(term)]
        log_det = log_det + term.sum()
    return log_joint, log_det


@pytest.mark.parametrize("name", MODELS)
def test_log_joint_is_that_of_the_trace(name):
    posterior = made(name)
    u = near_start(posterior, 3)
    values = posterior.constrain(u)
    log_joint = posterior.log_joint(u)
    for i in range(3):
        trace, log_det = by_pyro(posterior, {site: value[i] for site, value in values.items()})
        assert abs(log_joint[i] - trace - log_det) < 1e-9
        assert abs(posterior.log_joint(u[i]) - log_joint[i]) < 1e-9
    assert torch.allclose(posterior.log_prior(u) + posterior.log_likelihood(u), log_joint, rtol=0, atol=1e-9)
    assert posterior.mapped == (name not in UNMAPPED)


@pytest.mark.parametrize("name", MODELS)
def test_constrain_is_inverted(name):
    posterior = made(name)
    u = near_start(posterior, 4)
    values = posterior.constrain(u)
    assert {site: value.shape[1:] for site, value in values.items()} == posterior.shapes
    assert torch.allclose(posterior.unconstrain(values), u, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["eight-schools", "flat-regression", "precision-by-wishart", "partly-observed", "mixture", "heavy-tails"]
)
def test_the_recorded_density_is_the_density(name):
    posterior = made(name)
    u = near_start(posterior, 3).requires_grad_()
    value = posterior.log_joint(u)
    (gradient,) = torch.autograd.grad(value.sum(), u)
    recorded = posterior.compiled(3)
    for _ in range(2):
        again, slope = recorded(u.detach())
        assert torch.allclose(again, value, rtol=0, atol=1e-9)
        assert torch.allclose(slope, gradient, rtol=1e-9, atol=1e-9)
    elsewhere = near_start(posterior, 6)[3:]
    assert torch.allclose(recorded(elsewhere)[0], posterior.log_joint(elsewhere), rtol=0, atol=1e-9)


@pytest.mark.parametrize("squared", [False, True])
def test_the_jacobian_of_a_covariance(squared):
    transform, u = CholeskyFactor(squared), torch.randn(6)
    row, column = torch.tril_indices(3, 3)
    jacobian = torch.autograd.functional.jacobian(lambda u: transform(u)[row, column], u)
    value = transform(u)
    assert abs(jacobian.det().abs().log() - transform.log_abs_det_jacobian(u, value)) < 1e-10
    assert torch.allclose(transform.inv(value), u)
    assert torch.linalg.eigvals(value).real.min() > 0


def test_the_prior_is_drawn_and_data_are_simulated():
    posterior = made("eight-schools")
    u = posterior.prior(400)
    values = posterior.constrain(u)
    assert abs(values["mu"].mean()) < 4.5 * 5 / 20
    assert abs((values["tau"] < 5).double().mean() - 0.5) < 4.5 * 0.5 / 20
    other, data, exact = posterior.simulated(seed=1)
    assert data.keys() == {"y"}
    assert other.D == posterior.D
    assert not torch.allclose(other.log_likelihood(exact), posterior.log_likelihood(exact))
    chi = torch.stack([-2 * (p.log_likelihood(v) + ERRORS.log().sum() + 4 * torch.log(torch.tensor(2 * torch.pi)))
                       for p, _, v in (posterior.simulated(seed=i) for i in range(40))])  # fmt: skip
    assert abs(chi.mean() - 8) < 4.5 * 4 / 40**0.5  # of 8 degrees of freedom


def test_nothing_of_the_caller_is_touched():
    state, stored = torch.get_rng_state(), dict(pyro.get_param_store())
    with poutine.trace() as outer:
        posterior = made("subsampled")
        posterior.constrain(posterior.initial(2))
        posterior.prior(2) if not posterior.improper else None
    assert torch.equal(torch.get_rng_state(), state)
    assert not outer.trace.nodes
    assert dict(pyro.get_param_store()).keys() == stored.keys()


def test_plates_around_a_call_are_not_those_of_the_model():
    posterior = made("radon")
    u = near_start(posterior, 2)
    alone = posterior.log_joint(u)
    with pyro.plate("county", 2), pyro.plate("other", 5):
        assert torch.equal(posterior.log_joint(u), alone)


def test_a_mask_leaves_what_it_hides_out_of_u():
    posterior = made("partly-observed")
    assert 1 + int((Y <= 0).sum()) == posterior.D
    assert made("masked-prior").D == 1
    assert made("masked-prior").improper == ("mu",)


def test_deterministic_values():
    posterior = made("eight-schools")
    u = near_start(posterior, 2)
    values = posterior.constrain(u, deterministic=True)
    assert torch.allclose(values["theta"], values["mu"].unsqueeze(-1) + values["tau"].unsqueeze(-1) * values["raw"])
    assert "theta" not in posterior.constrain(u)


def no_latents(y):
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def counts(y):
    n = pyro.sample("n", dist.Poisson(3.0))
    mu = pyro.sample("mu", dist.Normal(n, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def sphere(y):
    pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))


def random_outside(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu + torch.randn(()), 1.0), obs=y)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (no_latents, "no continuous latents"),
        (counts, "'n' is discrete, and a Poisson has no finite support"),
        (sphere, "'direction' has the support Sphere"),
        (random_outside, "differs from run to run"),
    ],
)
def test_what_is_no_density_is_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        Posterior(wrong, torch.zeros(()))


def test_what_is_no_model_is_refused_with_the_remedy():
    guide = pyro.infer.autoguide.AutoNormal(eight_schools)
    for wrong, message in [
        ((eight_schools, guide), r"dgm.Posterior\(model, \*args\)"),
        (guide, "pass its model"),
        (dgm.Normal(2), "pass it to dgm.infer itself"),
        (dist.Normal(0.0, 1.0), "distribution"),
        (3, "callable"),
    ]:
        with pytest.raises(TypeError, match=message):
            Posterior(wrong, EFFECTS, ERRORS)


def test_wrong_vectors_and_values():
    posterior = made("eight-schools")
    with pytest.raises(ValueError, match=r"u has shape \(3, 9\), but .* takes \(\*batch, 10\)"):
        posterior.log_joint(torch.zeros(3, 9))
    with pytest.raises(ValueError, match="values has no 'tau'"):
        posterior.unconstrain({"mu": torch.zeros(2), "raw": torch.zeros(2, 8)})
    with pytest.raises(ValueError, match=r"values\['raw'\] has shape \(2, 7\)"):
        posterior.unconstrain({"mu": torch.zeros(2), "tau": torch.ones(2), "raw": torch.zeros(2, 7)})
    with pytest.raises(ValueError, match="'beta', 'sigma' is not a normalized distribution"):
        made("flat-regression").prior(2)


def covariance_of_a_number():
    """p(a) p(data | a), where a covariance has no Cholesky factor below a = -3, near which the data lie."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    factor = torch.linalg.cholesky(torch.eye(2) * (a + 3))
    pyro.factor("data", -0.5 * factor.sum() - 6 * (a + 3))


def density_of_a_number(a):
    at = (a + 3).clamp_min(0)
    return torch.where(a > -3, dist.Normal(0.0, 1.0).log_prob(a) - at.sqrt() - 6 * at, -torch.inf)


@pytest.mark.parametrize("shape", [(1,), (9, 1), (1, 1), (3, 1, 1), (2, 5, 1)])
def test_the_density_is_zero_where_a_matrix_has_no_factorization(shape):
    posterior = Posterior(covariance_of_a_number)
    u = torch.linspace(-5, 1, torch.Size(shape).numel()).reshape(shape).requires_grad_()
    a = u.detach()[..., 0]
    found = posterior.log_joint(u)
    torch.testing.assert_close(found, density_of_a_number(a))
    inside = a > -3
    (gradient,) = torch.autograd.grad(found[inside].sum() + 0 * u.sum(), u)
    exact = torch.where(inside, -a - 0.5 * (a + 3).clamp_min(1e-9).rsqrt() - 6, 0.0)
    torch.testing.assert_close(gradient[..., 0], exact)


def test_annealing_stays_where_a_matrix_has_a_factorization():
    posterior = Posterior(covariance_of_a_number)
    found = dgm.infer.ais(posterior, num_chains=16, num_temperatures=10, num_leapfrog=3, seed=2)
    grid = torch.linspace(-3, 8, 20_001)
    evidence = torch.trapezoid(density_of_a_number(grid).exp(), grid)
    weights = found.log_weights.exp()
    assert abs(weights.mean() - evidence) < 4 * weights.std() / 16**0.5


@pytest.mark.parametrize("shape", [(), (2,)])
def test_the_density_is_finite_where_a_latent_rounds_to_zero(shape):
    """exp(-104) is 0 in single precision, where the density of a Gamma of shape 0.01 is infinite."""

    def model():
        z = pyro.sample("z", dist.Gamma(0.01, 0.01).expand(shape).to_event(len(shape)))
        pyro.sample("y", dist.Poisson(z + 1.0).to_event(len(shape)), obs=torch.zeros(shape))

    posterior = Posterior(model)
    u = torch.tensor([-50.0, -104.0, -200.0], dtype=torch.float32).unsqueeze(-1).expand(3, posterior.D)
    found = posterior.log_joint(u).double()
    gamma = torch.distributions.Gamma(torch.tensor(0.01).double(), torch.tensor(0.01).double())
    true = posterior.D * (gamma.log_prob(u[:, 0].double().exp()) + u[:, 0] - 1.0)
    torch.testing.assert_close(found[0], true[0], rtol=1e-4, atol=0)
    assert (found[1:] < true[1:]).all()
    assert torch.isfinite(found).all()
