"""Guides against formulas: stated covariances, autograd's determinants, exact posteriors, and the order of statements.

Statistical tests are seeded and held to 4.5 standard errors.
"""

import pyro
import pytest
import torch
from programs import assert_same_number, jittered
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import dgm_pyro as dgm
from dgm_pyro import guides, networks
from dgm_pyro.families.conditionals import positive
from dgm_pyro.networks import MLP
from dgm_pyro.objectives import elbo

pytestmark = pytest.mark.usefixtures("float64")


class Table(nn.Module):
    """A network that returns the same raw parameters whatever it is given."""

    def __init__(self, raw):
        super().__init__()
        self.raw = nn.Parameter(raw)

    def forward(self, given):
        return self.raw.expand(len(given), *self.raw.shape)


# -- Normals with covariances ------------------------------------------------------------------------------------------


def test_a_full_rank_normal_has_the_covariance_stated():
    raw = torch.randn(4, 3)
    lower = raw[1:].mT.tril(-1) + torch.diag(positive(raw[1:].diagonal()))
    program = guides.FullRankNormal(3, parameters=raw)
    torch.testing.assert_close(program().covariance_matrix, lower @ lower.mT)
    expected = MultivariateNormal(raw[0], covariance_matrix=lower @ lower.mT)
    z = torch.randn(5, 3)
    torch.testing.assert_close(program.log_prob(z), expected.log_prob(z))
    conditional = guides.FullRankNormal(3, Table(raw))
    torch.testing.assert_close(conditional.log_prob(z, torch.zeros(5, 1)), expected.log_prob(z))


def test_a_low_rank_normal_has_the_covariance_stated():
    raw = torch.randn(4, 3)
    program = guides.LowRankNormal(3, 2, parameters=raw)
    covariance = raw[2:].mT @ raw[2:] + torch.diag(positive(raw[1]) ** 2)
    torch.testing.assert_close(program().covariance_matrix, covariance)
    z = torch.randn(5, 3)
    torch.testing.assert_close(program.log_prob(z), MultivariateNormal(raw[0], covariance).log_prob(z))


@pytest.mark.parametrize("make", [guides.FullRankNormal, lambda shape, **o: guides.LowRankNormal(shape, 1, **o)])
def test_correlated_normals_start_as_the_standard_one_and_have_a_closed_kl(make):
    standard, z = dgm.Normal(3), torch.randn(5, 3)
    torch.testing.assert_close(make(3).log_prob(z), standard.log_prob(z))
    torch.testing.assert_close(kl_divergence(make(3)(), standard()), torch.tensor(0.0), rtol=0, atol=1e-12)
    q, p = jittered(make(3, learned=True), 1.0)(), jittered(dgm.Normal(3, learned=True))()
    diagonal = MultivariateNormal(p.base_dist.loc, torch.diag(p.base_dist.scale**2))
    full = MultivariateNormal(q.mean, q.covariance_matrix)
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(full, diagonal))


def test_features_that_depend_on_each_other_are_no_features_of_a_chain():
    with pytest.raises(ValueError, match="features of a FullRankNormal depend on each other: use dgm"):
        dgm.Autoregressive(guides.FullRankNormal(2, networks.MADE(2, 3, (4,))))
    with pytest.raises(ValueError, match="FullRankNormal is over vectors"):
        guides.FullRankNormal((1, 2, 2))


# -- planar and Sylvester ----------------------------------------------------------------------------------------------

BIJECTIONS = {
    "planar": lambda: networks.Planar(4),
    "planar-one-feature": lambda: networks.Planar(1),
    "sylvester": lambda: networks.Sylvester(4),
    "sylvester-no-reflection": lambda: networks.Sylvester(3, 0),
    "sylvester-one-feature": lambda: networks.Sylvester(1, 1),
}


@pytest.fixture(params=BIJECTIONS, name="bijection")
def _bijection(request):
    return jittered(BIJECTIONS[request.param](), 1.0)


def test_determinants_equal_autograds(bijection):
    z = 2 * torch.randn(6, bijection.num_features)
    x, log_det = bijection(z)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda v: bijection(v)[0][0], v[None])[:, 0] for v in z])
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian)[1])
    back, inverse_log_det = bijection.inverse(x)
    torch.testing.assert_close(back, z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-9, atol=1e-9)


def test_the_inverse_is_differentiable(bijection):
    """By the implicit function theorem, in x and in the parameters."""
    x = bijection(torch.randn(3, bijection.num_features))[0].detach().requires_grad_()
    names, values = zip(*bijection.named_parameters(), strict=True)

    def inverse(x, *values):
        return torch.func.functional_call(
            _Backwards(bijection), {f"bijection.{n}": v for n, v in zip(names, values, strict=True)}, (x,)
        )

    assert torch.autograd.gradcheck(inverse, (x, *values), atol=1e-6)


class _Backwards(nn.Module):
    def __init__(self, bijection):
        super().__init__()
        self.bijection = bijection

    def forward(self, x):
        return self.bijection.inverse(x)


def test_extreme_parameters_stay_invertible(bijection):
    with torch.no_grad():
        bijection.raw.mul_(100)
    z = torch.randn(6, bijection.num_features)
    x, log_det = bijection(z)
    assert torch.isfinite(log_det).all()
    back, _ = bijection.inverse(x)
    torch.testing.assert_close(bijection(back)[0], x, rtol=1e-6, atol=1e-6)


def test_planar_by_the_papers_formula():
    """Rezende and Mohamed 2015, equations 10 and 12, with the u that the class made of the raw one."""
    bijection, z = jittered(networks.Planar(3), 1.0), torch.randn(5, 3)
    w, b = bijection.raw[:3], bijection.raw[-1]
    x, log_det = bijection(z)
    h = (z @ w + b).tanh()
    u = (x - z)[0] / h[0]
    torch.testing.assert_close(x, z + h.unsqueeze(-1) * u)
    torch.testing.assert_close(log_det, (1 + (1 - h**2) * (w @ u)).abs().log())
    assert w @ u > -1
    with torch.no_grad():
        bijection.raw[3:6].zero_()
    assert_same_number(bijection(z)[0], z)


def test_reflections_make_an_orthogonal_matrix():
    v = torch.randn(2, 3, 4)
    q = torch.stack([networks.planar.reflect(e.expand(2, 4), v) for e in torch.eye(4)], -1)
    torch.testing.assert_close(q @ q.mT, torch.eye(4).expand(2, 4, 4))
    z = torch.randn(2, 4)
    torch.testing.assert_close(networks.planar.reflect(z, v.flip(-2)), (q.mT @ z.unsqueeze(-1)).squeeze(-1))


@pytest.mark.parametrize("make", [guides.planar, guides.sylvester])
def test_posteriors_of_bent_normals_integrate_to_one(make):
    encoder = jittered(make(2, layers=2, hidden=(6,), given_shape=(3,)))
    axis, x = torch.linspace(-15, 15, 301), torch.randn(1, 3)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = encoder.log_prob(z, x.expand(len(z), 3)).exp()
    assert abs(density.sum().item() * 0.1**2 - 1) < 1e-9


# -- exact posteriors --------------------------------------------------------------------------------------------------


def linear(scale_type="feature", learned=True):
    prior = jittered(dgm.Normal(2, learned=learned))
    likelihood = jittered(dgm.Normal((1, 2, 2), MLP((2,), 4, ()).first.embed[1], scale_type=scale_type))
    return prior, likelihood


def linear_evidence(prior, likelihood, x):
    """log N(x; W m + b, W S W' + T)."""
    w, b = likelihood.network.weight, likelihood.network.bias
    m, s = prior().base_dist.loc, prior().base_dist.scale
    t = positive(likelihood.raw_scale).expand(1, 2, 2).flatten()
    return MultivariateNormal(w @ m + b, w @ torch.diag(s**2) @ w.mT + torch.diag(t**2)).log_prob(x.flatten(1))


@pytest.mark.parametrize("scale", ["feature", "shared"])
def test_with_the_exact_linear_posterior_every_draw_is_the_evidence(scale):
    prior, likelihood = linear(scale)
    vae = dgm.VAE(prior, likelihood, guides.LinearGaussianPosterior(prior, likelihood))
    x = torch.randn(6, 1, 2, 2)
    expected = linear_evidence(prior, likelihood, x)
    torch.testing.assert_close(vae.log_weights(x, num_particles=5), expected.expand(5, -1))
    # and remains so while the parameters move
    jittered(vae)
    torch.testing.assert_close(vae.log_weights(x), linear_evidence(prior, likelihood, x).unsqueeze(0))


@pytest.mark.parametrize(
    ("prior", "likelihood"),
    [
        (lambda: dgm.Bernoulli(3, learned=True), lambda: dgm.Normal(2, MLP((3,), 4))),
        (lambda: dgm.Categorical((), 5, learned=True), lambda: dgm.Bernoulli(4, MLP((), 4, num_classes=5))),
        (lambda: dgm.Categorical(2, 3, learned=True), lambda: dgm.Normal(2, MLP((2,), 4, levels=3))),
        (
            lambda: dgm.Autoregressive(dgm.Bernoulli(3, networks.MADE(3, 1, (6,), levels=2))),
            lambda: dgm.Normal(2, MLP((3,), 4, levels=2)),
        ),
    ],
)
def test_with_an_enumerated_posterior_every_draw_is_the_evidence(prior, likelihood):
    prior, likelihood = jittered(prior(), 1.0), jittered(likelihood())
    encoder = guides.EnumeratedPosterior(prior, likelihood)
    vae = dgm.VAE(prior, likelihood, encoder)
    x = torch.randn(6, 2) if likelihood.levels is None else torch.randint(2, (6, 4))
    every = encoder.outcomes
    joint = torch.stack([likelihood.log_prob(x, z.expand(6, *z.shape)) for z in every], -1) + prior.log_prob(every)
    evidence = joint.logsumexp(-1)
    torch.testing.assert_close(vae.log_weights(x, num_particles=5), evidence.expand(5, -1))
    posterior = torch.stack([encoder.log_prob(z.expand(6, *z.shape), x) for z in every], -1)
    torch.testing.assert_close(posterior, joint - evidence.unsqueeze(-1))


def test_parts_without_a_closed_posterior_are_refused():
    prior, likelihood = linear()
    with pytest.raises(ValueError, match="must be linear with a scale that does not depend on z"):
        guides.LinearGaussianPosterior(prior, dgm.Normal(3, nn.Linear(2, 6)))
    with pytest.raises(ValueError, match="over vectors, without a network"):
        guides.LinearGaussianPosterior(dgm.Bernoulli(2), likelihood)
    with pytest.raises(ValueError, match="z must take at most 4096 values"):
        guides.EnumeratedPosterior(dgm.Bernoulli(13), dgm.Normal(3, nn.Linear(13, 6)))
    with pytest.raises(ValueError, match="z must take at most 4096 values, but the prior is Normal"):
        guides.EnumeratedPosterior(prior, likelihood)
    hierarchy = dgm.VAE(dgm.Normal(1), dgm.Normal(2, nn.Linear(1, 4)), latent_name="z2")
    with pytest.raises(ValueError, match="prior of SemiAmortized must have a density of its own, but VAE has none"):
        guides.SemiAmortized(dgm.Normal(2, nn.Linear(4, 4)), hierarchy, likelihood)


# -- semi-amortized ----------------------------------------------------------------------------------------------------


def gaussian_elbo(prior, likelihood, raw, x):
    """The ELBO of q = N(loc, diag scale^2) on the linear-Gaussian model, less its gap: log p(x) - KL(q || p(z | x))."""
    posterior = guides.LinearGaussianPosterior(prior, likelihood)(x)
    loc, scale = raw[:, 0], positive(raw[:, 1])
    q = MultivariateNormal(loc, torch.diag_embed(scale**2))
    exact = MultivariateNormal(posterior.mean, posterior.covariance_matrix)
    return linear_evidence(prior, likelihood, x) - kl_divergence(q, exact)


def test_steps_never_lower_the_elbo_of_a_conjugate_model():
    prior, likelihood = linear()
    base = jittered(dgm.Normal(2, MLP((1, 2, 2), 4, (6,))))
    x = torch.randn(20, 1, 2, 2)
    values = []
    for steps in range(1, 12):
        torch.manual_seed(0)
        encoder = guides.SemiAmortized(base, prior, likelihood, gradient_steps=steps, lr=0.02, num_samples=2)
        q = encoder(x).base_dist
        raw = torch.stack([q.loc, q.scale.expm1().log()], 1)
        values.append(gaussian_elbo(prior, likelihood, raw, x))
        # With as many draws as features, the average over the fixed draws is the expectation itself.
        torch.testing.assert_close(encoder.bound(raw, x), values[-1])
    values.insert(0, gaussian_elbo(prior, likelihood, base.raw_parameters(x), x))
    rise = torch.stack(values).diff(dim=0)
    assert rise.min() > 0
    assert (values[-1] <= linear_evidence(prior, likelihood, x)).all()


def test_semi_amortized_needs_no_gradient_mode_and_gives_the_same_without():
    prior, likelihood = linear()
    encoder = guides.SemiAmortized(dgm.Normal(2, MLP((1, 2, 2), 4)), prior, likelihood, gradient_steps=3, lr=0.05)
    x = torch.randn(4, 1, 2, 2)
    with torch.no_grad():
        quiet = encoder(x)
    assert not quiet.mean.requires_grad
    assert_same_number(quiet.mean, encoder(x).mean)
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    assert_same_number(quiet.stddev, encoder(x).stddev)


def test_training_differentiates_through_the_steps():
    """The gradient of the refined mean and scale, against finite differences."""
    prior, likelihood = linear()
    x = torch.randn(3, 1, 2, 2)
    encoder = guides.SemiAmortized(
        dgm.Normal(2, nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), given_shape=(1, 2, 2)), prior, likelihood, 2, 0.1
    )
    weight = encoder.encoder.network[1].weight

    def refined(weight):
        q = torch.func.functional_call(encoder, {"encoder.network.1.weight": weight}, (x,))
        return q.mean, q.stddev

    assert torch.autograd.gradcheck(refined, (weight,), atol=1e-6)


# -- from the top down -------------------------------------------------------------------------------------------------


def ladder(levels=2):
    prior, encoder, size = dgm.Normal(2, learned=True), dgm.Normal(2, MLP((3,), 4, (6,))), 2
    for i in range(levels, 1, -1):
        prior = dgm.VAE(prior, dgm.Normal(2, MLP((2,), 4, (6,))), latent_name=f"z{i}")
        bottom = guides.PrecisionWeighted(dgm.Normal(size, MLP((3,), 4, (6,))), prior.likelihood)
        encoder = guides.TopDown(encoder, bottom, latent_name=f"z{i}")
    return jittered(dgm.VAE(prior, dgm.Normal(3, MLP((2,), 6, (6,))), encoder))


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_a_ladder_states_its_latents_in_the_models_order(levels):
    vae, x = ladder(levels), torch.randn(5, 3)
    order = [*(f"z{i}" for i in range(levels, 1, -1)), "z"]
    for view in (vae.guide, vae.model):
        assert dgm.program.latent_sites(poutine.trace(view).get_trace(x)) == order
    assert sorted(vae.latents("x")) == sorted(order)


def test_the_analytic_kl_of_a_ladder_is_the_sampled_one():
    vae, x = ladder(3), torch.randn(4, 3)
    batch = (4000, 4)
    with torch.no_grad():
        analytic = elbo(vae, x, batch=batch).kl
        sampled = elbo(vae, x, batch=batch, analytic_kl=False).kl
    assert list(analytic) == ["z3", "z2", "z"]
    # z3 is first in both orders: its closed form has no noise at all.
    assert analytic["z3"].std(0).max() < 1e-12
    for name in analytic:
        error = ((analytic[name].var(0) + sampled[name].var(0)) / batch[0]).sqrt()
        assert ((analytic[name] - sampled[name]).mean(0).abs() < 4.5 * error).all(), name
        assert analytic[name].var(0).sum() < sampled[name].var(0).sum()


def test_precision_weighting_is_the_product_of_two_normals():
    q, p = jittered(dgm.Normal(2, MLP((3,), 4, (6,)))), jittered(dgm.Normal(2, MLP((1,), 4, (6,))))
    product = guides.PrecisionWeighted(q, p)
    x, above, z = torch.randn(1, 3), torch.randn(1, 1), torch.randn(7, 2)
    unnormalized = q.log_prob(z, x.expand(7, 3)) + p.log_prob(z, above.expand(7, 1))
    difference = unnormalized - product.log_prob(z, (x.expand(7, 3), above.expand(7, 1)))
    torch.testing.assert_close(difference, difference[:1].expand(7))


def test_a_ladder_with_the_exact_posterior_has_the_evidence_for_every_draw():
    """z2 ~ N(0, 1), z ~ N(z2, 1), x ~ N(z, 1): q(z2 | x) = N(x / 3, 2 / 3), q(z | z2, x) = N((z2 + x) / 2, 1 / 2)."""

    def fixed(weight, scale):
        network = nn.Linear(len(weight), 2)
        with torch.no_grad():
            network.weight.copy_(torch.tensor([weight, [0.0] * len(weight)]))
            network.bias.copy_(torch.tensor([0.0, torch.tensor(scale).expm1().log()]))
        return dgm.Normal(1, network)

    prior = dgm.VAE(dgm.Normal(1), fixed([1.0], 1.0), latent_name="z2")
    bottom = guides.PrecisionWeighted(fixed([1.0], 1.0), prior.likelihood)
    vae = dgm.VAE(prior, fixed([1.0], 1.0), guides.TopDown(fixed([1 / 3], (2 / 3) ** 0.5), bottom))
    x = torch.randn(5, 1)
    expected = torch.distributions.Normal(0.0, 3**0.5).log_prob(x).squeeze(-1)
    torch.testing.assert_close(vae.log_weights(x, num_particles=6), expected.expand(6, -1))


def test_guides_that_do_not_fit_the_hierarchy():
    prior = dgm.VAE(dgm.Normal(1), dgm.Normal(2, MLP((1,), 4)), latent_name="z2")
    likelihood, flat = dgm.Normal(3, MLP((2,), 6)), dgm.Normal(2, MLP((3,), 4))
    bottom = dgm.Normal(2, MLP((3,), 4, given_shape=(1,)))
    with pytest.raises(ValueError, match=r"prior's latents \('z2',\) have no guide: give the prior an encoder, or"):
        dgm.VAE(prior, likelihood, flat)
    with pytest.raises(ValueError, match=r"latents of its own, \('top',\), but the prior has \('z2',\)"):
        dgm.VAE(prior, likelihood, guides.TopDown(dgm.Normal(1, MLP((3,), 2)), bottom, latent_name="top"))
    with pytest.raises(ValueError, match=r"latents of its own, \('z2',\), but the prior has \(\)"):
        dgm.VAE(dgm.Normal(2), likelihood, guides.TopDown(dgm.Normal(1, MLP((3,), 2)), bottom))
    with pytest.raises(ValueError, match=r"bottom must be given the pair \(x, z2\)"):
        guides.TopDown(dgm.Normal(1, MLP((3,), 2)), flat)
    with pytest.raises(TypeError, match=r"generative must be a dgm.Normal with a network, got Bernoulli"):
        guides.PrecisionWeighted(flat, dgm.Bernoulli(2, MLP((1,), 2)))
    with pytest.raises(ValueError, match="this VAE has no encoder"):
        prior.log_weights(torch.randn(4, 2))
    assert prior.sample(4).shape == (4, 2)


# -- Pyro's AutoGuides -------------------------------------------------------------------------------------------------


def test_a_fitted_autoguide_finds_the_exact_posterior():
    prior, likelihood = linear()
    posterior = guides.LinearGaussianPosterior(prior, likelihood)
    vae = dgm.VAE(prior, likelihood, dgm.Normal(2, MLP((1, 2, 2), 4)))
    x = torch.randn(3, 1, 2, 2)
    before, state = [p.detach().clone() for p in vae.parameters()], torch.get_rng_state()
    guide, bound = guides.fit_guide(vae, x, AutoMultivariateNormal, gradient_steps=600)
    assert torch.equal(torch.get_rng_state(), state)
    evidence = linear_evidence(prior, likelihood, x).mean().item()
    assert abs(bound - evidence) < 0.005
    assert guide(x)["z"].shape == (3, 2)
    loc = guide.guide.loc.detach().reshape(3, 2)
    torch.testing.assert_close(loc, posterior(x).mean, rtol=0, atol=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())


def test_two_fitted_guides_do_not_share_parameters():
    prior, likelihood = linear()
    vae = dgm.VAE(prior, likelihood, guides.LinearGaussianPosterior(prior, likelihood))
    x, other = torch.randn(2, 1, 2, 2), 5 + torch.randn(4, 1, 2, 2)
    first, _ = guides.fit_guide(vae, x, AutoNormal, gradient_steps=5)
    second, _ = guides.fit_guide(vae, other, AutoNormal, gradient_steps=5)
    assert first(x)["z"].shape == (2, 2)
    assert second(other)["z"].shape == (4, 2)
    assert not [name for name in pyro.get_param_store() if "AutoNormal" in name or "locs" in name]
    assert Trace_ELBO().loss(vae.model, second, other) > 0


def test_chains_and_hierarchies_are_fitted_too():
    two = ladder(2)
    x = torch.randn(3, 3)
    guide, bound = guides.fit_guide(two, x, AutoNormal, gradient_steps=200, lr=0.05)
    assert set(guide(x)) == {"z", "z2"}
    start = guides.fit_guide(two, x, AutoNormal, gradient_steps=1)[1]
    assert bound > start
