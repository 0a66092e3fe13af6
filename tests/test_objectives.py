"""Objectives: against Pyro's own on the same random numbers, against sums over every latent, against exact evidences.

Statistical tests are seeded; z-scores are held to 4.5 standard errors, the largest of many to 5.5.
"""

import copy
import itertools
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.mathtext import MathTextParser
from programs import CASES, assert_same_number, made, once_per_part
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.func import functional_call

import dgm_pyro as dgm
from dgm_pyro import ELBO, IWAE, SemiSupervised, networks
from dgm_pyro.networks import MLP
from dgm_pyro.objectives import (
    COMPARISONS,
    OBJECTIVES,
    RWS,
    STL,
    DenoisingLoss,
    DReG,
    EDMWeight,
    Enumerate,
    FreeBits,
    MinSNRWeight,
    VariationalBound,
    WarmUp,
    elbo,
    log_mean_exp,
    objective_named,
)
from dgm_pyro.training.adversarial import GAMES, Adversarial, divergence_bound
from dgm_pyro.training.compilation import CompilationError

pytestmark = pytest.mark.usefixtures("float64")

REPARAMETERIZED = [
    "vae",
    "vae-linear",
    "vae-bernoulli",
    "vae-logistic",
    "vae-image-latent",
    "vae-learned-prior",
    "vae-given-label",
    "vae-conditional-prior",
    "vae-two-levels",
    "vae-three-levels",
    "vae-in-likelihood",
    "vae-diffusion-prior",
    "diffusion",
    "diffusion-integers",
    "diffusion-given-label",
]
# Guides whose latents come in the model's order: there Pyro's mean-field ELBO is right, and ours must agree.
IN_ORDER = ["vae", "vae-bernoulli", "vae-logistic", "vae-learned-prior", "vae-given-label", "vae-conditional-prior"]


def gradients(program, loss):
    program.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in program.named_parameters() if p.grad is not None}


def flat_gradient(program, loss):
    found = torch.autograd.grad(loss, [*program.parameters()], allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(program.parameters(), found, strict=True)
        ]
    )


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def assert_zero_mean(draws, sigmas=5.5):
    """Each column of ``draws``, ``(n, columns)``, has mean zero."""
    z = draws.mean(0) / (draws.std(0) / len(draws) ** 0.5 + 1e-12)
    assert z.abs().max() < sigmas, f"the largest of {z.numel()} z-scores is {z.abs().max():.1f}"


# -- against Pyro ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unrolled", [False, True], ids=["as it is", "unrolled"])
@pytest.mark.parametrize("name", REPARAMETERIZED)
def test_without_closed_forms_it_is_trace_elbo(name, unrolled):
    case = CASES[name]
    program = case.build().unroll() if unrolled else case.build()
    x, given = case.draw(program, 4)
    torch.manual_seed(3)
    bound = ELBO(analytic_kl=False)(program, x, given)
    ours = gradients(program, -bound.surrogate.mean())
    torch.manual_seed(3)
    loss = Trace_ELBO().differentiable_loss(program.model, program.guide, x, given) / 4
    torch.testing.assert_close(-bound.value.mean(), loss, rtol=1e-10, atol=1e-10)
    assert_same(ours, gradients(program, loss))


@pytest.mark.parametrize("name", [*IN_ORDER, "diffusion", "diffusion-integers"])
def test_with_closed_forms_it_is_the_mean_field_elbo(name):
    case = CASES[name]
    program = case.build().unroll()  # the plated diffusion has a discrete shift, which TraceMeanField_ELBO refuses
    x, given = case.draw(program, 4)
    torch.manual_seed(3)
    bound = ELBO()(program, x, given)
    ours = gradients(program, -bound.surrogate.mean())
    torch.manual_seed(3)
    loss = TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, x, given) / 4
    torch.testing.assert_close(-bound.value.mean(), loss, rtol=1e-10, atol=1e-10)
    assert_same(ours, gradients(program, loss))


def test_particles_are_trace_elbos_vectorized_particles():
    program = CASES["vae"].build()
    x, _ = CASES["vae"].draw(program, 4)
    torch.manual_seed(3)
    ours = ELBO(5, analytic_kl=False)(program, x)
    torch.manual_seed(3)
    theirs = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    torch.testing.assert_close(
        -ours.value.mean(), theirs.differentiable_loss(program.model, program.guide, x) / 4, rtol=1e-10, atol=1e-10
    )


def test_for_a_single_datum_iwae_is_pyros_renyi_elbo():
    """Over several data RenyiELBO takes the logarithm of the mean of products, which is another bound."""
    program = CASES["vae"].build()
    x, _ = CASES["vae"].draw(program, 1)
    torch.manual_seed(3)
    bound = IWAE(6)(program, x)
    torch.manual_seed(3)
    theirs = RenyiELBO(alpha=0, num_particles=6, vectorize_particles=True, max_plate_nesting=1)
    assert -bound.value.item() == pytest.approx(theirs.loss(program.model, program.guide, x), rel=1e-10)


class Weighted(dgm.VAE):
    """Sites under poutine.scale and poutine.mask."""

    def joint(self, name, value=None, given=None):
        with poutine.scale(scale=0.3):
            z = self.prior.joint(self.latent_name)
        with poutine.mask(mask=torch.tensor([True, False, True, True])):
            return self.likelihood.joint(name, value, given=z)

    def posterior(self, name, value, given=None):
        with poutine.scale(scale=0.3):
            super().posterior(name, value, given)


def test_scales_and_masks_are_obeyed():
    program = Weighted(dgm.Normal(2), dgm.Normal(2, nn.Linear(2, 4)), dgm.Normal(2, nn.Linear(2, 4)))
    x = torch.randn(4, 2)
    for ours, theirs in ((ELBO(analytic_kl=False), Trace_ELBO()), (ELBO(), TraceMeanField_ELBO())):
        torch.manual_seed(3)
        bound = ours(program, x)
        torch.manual_seed(3)
        assert -bound.value.sum().item() == pytest.approx(theirs.loss(program.model, program.guide, x), rel=1e-10)


# -- what it holds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("analytic_kl", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_value_is_reconstruction_less_divergence(name, analytic_kl):
    case = CASES[name]
    program = case.build()
    x, given = case.draw(program, 4)
    for objective in (ELBO(analytic_kl=analytic_kl), ELBO(3, analytic_kl=analytic_kl)):
        bound = objective(program, x, given)
        terms = [*bound.reconstruction.values(), *(-kl for kl in bound.kl.values())]
        assert all(term.shape == (4,) for term in terms)
        assert bound.value.shape == bound.surrogate.shape == (4,)
        torch.testing.assert_close(sum(terms), bound.value)
        torch.testing.assert_close(bound.surrogate, bound.value)
        if program.tractable:
            torch.testing.assert_close(bound.value, program.log_prob(x, given))
            assert not bound.kl


def test_terms_are_named_after_their_sites():
    program = CASES["vae-two-levels"].build()
    x, _ = CASES["vae-two-levels"].draw(program, 4)
    bound = ELBO()(program, x)
    assert set(bound.reconstruction) == {"x"}
    assert set(bound.kl) == {"z", "z2"}
    assert (bound.kl["z2"] > 0).all()  # the top level has a closed form


def test_nothing_is_tracked_without_gradients():
    program = CASES["vae-bit-latent"].build()
    x, _ = CASES["vae-bit-latent"].draw(program, 4)
    with torch.no_grad():
        for objective in (ELBO(), ELBO(2), IWAE(3)):
            assert not objective(program, x).value.requires_grad


@pytest.mark.parametrize("count", [0, 1.5, True])
@pytest.mark.parametrize(("make", "argument"), [(ELBO, "num_samples"), (IWAE, "num_particles")])
def test_particles_are_counted(make, argument, count):
    with pytest.raises(ValueError, match=f"{argument} must be a positive integer"):
        make(count)


# -- closed forms where the order of the guide allows them -------------------------------------------------------------


def test_a_closed_form_holds_only_what_the_guide_has_drawn():
    """A bottom-up guide draws z before z2, so that KL(q(z) || p(z | z2)) at the z2 drawn from z would be biased."""
    program, _ = linear_gaussian()
    n = 40000
    x = torch.tensor([[0.7]]).expand(n, 1)
    with torch.no_grad():
        closed, sampled = ELBO()(program, x).value, ELBO(analytic_kl=False)(program, x).value
        # The same, nested by hand.
        z = program.encoder(x).sample()
        inner = program.prior
        z2 = inner.encoder(z).sample()
        log_q = program.encoder(x).log_prob(z) + inner.encoder(z).log_prob(z2)
        log_p = inner.prior().log_prob(z2) + inner.likelihood(z2).log_prob(z) + program.likelihood(z).log_prob(x)
        by_hand = log_p - log_q
        with pytest.warns(UserWarning, match="order"), pyro.validation_enabled(True):
            biased = -TraceMeanField_ELBO().loss(program.model, program.guide, x) / n
    assert_zero_mean((closed - sampled).unsqueeze(-1))
    assert_zero_mean((closed - by_hand).unsqueeze(-1))
    error = (closed.var() / n).sqrt().item()
    assert abs(biased - closed.mean().item()) > 10 * error  # what the closed form would have given


def linear_gaussian():
    """z2 ~ N(0, 1), z | z2 ~ N(a z2, s^2), x | z ~ N(b z, r^2), and its exact evidence; the guide is not exact."""
    top = dgm.VAE(normal(1), linear(0.8, 0.6), linear(0.3, 0.9), latent_name="z2")
    return dgm.VAE(top, linear(1.2, 0.5), linear(0.5, 0.4)), MultivariateNormal(
        torch.zeros(1), torch.tensor([[1.2**2 * (0.8**2 + 0.6**2) + 0.5**2]])
    )


def normal(features):
    return dgm.Normal(features, learned=True)


def linear(slope, scale):
    network = nn.Linear(1, 2)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[slope], [0.0]]))
        network.bias.copy_(torch.tensor([0.0, math.log(math.expm1(scale))]))
    return dgm.Normal(1, network)


def test_in_expectation_closed_forms_change_neither_value_nor_gradient():
    program, evidence = linear_gaussian()
    x = torch.tensor([[0.7]])
    draws = {}
    for objective in (ELBO(), ELBO(analytic_kl=False), ELBO(2)):
        bounds = [objective(program, x.expand(200, 1)) for _ in range(100)]
        draws[repr(objective)] = torch.stack(
            [
                torch.cat([b.value.mean().detach().reshape(1), flat_gradient(program, b.surrogate.mean())])
                for b in bounds
            ]
        )
    closed, sampled, particles = draws.values()
    assert_zero_mean(closed - sampled)
    assert_zero_mean(closed - particles)
    assert (closed[:, 0].mean() < evidence.log_prob(x)).all()
    assert closed.var(0).sum() < sampled.var(0).sum()


class TopDown(dgm.Program):
    """A guide in the model's own order, q(z2 | x) q(z | z2, x): both divergences have closed forms."""

    def __init__(self):
        super().__init__()
        self.event_shape = torch.Size((1,))
        self.network = MLP((1,), 2, hidden=(5,))
        self.slope = nn.Parameter(torch.tensor(0.4))

    def joint(self, name, value=None, given=None):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        z = pyro.sample("z", dist.Normal(self.slope * z2, 0.7).to_event(1))
        return pyro.sample(name, dist.Normal(z, 0.5).to_event(1), obs=value)

    def posterior(self, name, value, given=None):
        loc, raw = self.network(value).chunk(2, -1)
        z2 = pyro.sample("z2", dist.Normal(loc, raw.exp()).to_event(1))
        pyro.sample("z", dist.Normal(0.5 * z2 + 0.3 * value, 0.4).to_event(1))

    def latents(self, name):
        return ("z2", "z")


def test_a_guide_in_the_models_order_gets_every_closed_form():
    program = TopDown()
    x = torch.tensor([[0.7]]).expand(20000, 1)
    torch.manual_seed(3)
    bound = ELBO()(program, x)
    torch.manual_seed(3)
    theirs = TraceMeanField_ELBO().loss(program.model, program.guide, x)
    assert -bound.value.sum().item() == pytest.approx(theirs, rel=1e-10)
    assert (bound.kl["z"] > 0).all()
    assert (bound.kl["z2"] > 0).all()
    assert_zero_mean((bound.value - ELBO(analytic_kl=False)(program, x).value).detach().unsqueeze(-1))


# -- latents that cannot be reparameterized ----------------------------------------------------------------------------


def every_latent(program, x):
    """log p(x, z) and log q(z | x) for every z, each ``(outcomes, B)``."""
    prior = program.prior
    if prior.event_shape == ():
        outcomes = torch.arange(prior.levels)
    else:
        outcomes = torch.tensor([*itertools.product((0, 1), repeat=prior.event_shape.numel())])
    rows = []
    for z in outcomes:
        z = z.expand(len(x), *prior.event_shape)
        log_p = prior().log_prob(z) + program.likelihood(z.double() if z.dim() > 1 else z).log_prob(x)
        rows.append((log_p, program.encoder(x).log_prob(z)))
    return [torch.stack(part) for part in zip(*rows, strict=True)]


DISCRETE = ["vae-bit-latent", "vae-categorical-latent"]


@pytest.mark.parametrize("objective", [ELBO(), ELBO(analytic_kl=False), ELBO(3), ELBO(3, leave_one_out=True)], ids=repr)
@pytest.mark.parametrize("name", DISCRETE)
def test_the_score_function_gradient_is_that_of_the_sum_over_every_latent(name, objective):
    program = CASES[name].build()
    x, _ = CASES[name].draw(program, 2)
    log_p, log_q = every_latent(program, x)
    exact = (log_q.exp() * (log_p - log_q)).sum(0).mean()
    exact_gradient = flat_gradient(program, exact)
    draws = []
    for _ in range(150):
        bound = objective(program, x.repeat(100, 1))
        value = bound.value.mean().detach().reshape(1) - exact.detach()
        draws.append(torch.cat([value, flat_gradient(program, bound.surrogate.mean()) - exact_gradient]))
    assert_zero_mean(torch.stack(draws))


@pytest.mark.parametrize("objective", [IWAE(2), IWAE(2, leave_one_out=True)], ids=repr)
@pytest.mark.parametrize("name", DISCRETE)
def test_iwaes_score_function_gradient_is_that_of_the_sum_over_every_pair(name, objective):
    program = CASES[name].build()
    x, _ = CASES[name].draw(program, 2)
    log_p, log_q = every_latent(program, x)
    log_w = log_p - log_q
    pairs = torch.logaddexp(log_w.unsqueeze(0), log_w.unsqueeze(1)) - math.log(2)
    exact = ((log_q.unsqueeze(0) + log_q.unsqueeze(1)).exp() * pairs).sum((0, 1)).mean()
    exact_gradient = flat_gradient(program, exact)
    draws = []
    for _ in range(150):
        bound = objective(program, x.repeat(100, 1))
        value = bound.value.mean().detach().reshape(1) - exact.detach()
        draws.append(torch.cat([value, flat_gradient(program, bound.surrogate.mean()) - exact_gradient]))
    assert_zero_mean(torch.stack(draws))


@pytest.mark.parametrize("name", DISCRETE)
def test_pyros_score_function_has_the_same_mean(name):
    program = CASES[name].build()
    x, _ = CASES[name].draw(program, 2)
    x = x.repeat(100, 1)
    draws = []
    for _ in range(100):
        ours = flat_gradient(program, ELBO(analytic_kl=False)(program, x).surrogate.mean())
        theirs = flat_gradient(program, -Trace_ELBO().differentiable_loss(program.model, program.guide, x) / 200)
        draws.append(ours - theirs)
    assert_zero_mean(torch.stack(draws))


def test_a_discrete_latent_above_a_continuous_one_passes_its_score_on():
    """Labels drawn from a classifier, then z from an encoder that reads the label: against the sum over labels."""
    case = CASES["labeled-classifier"]
    program = case.build()
    x, _ = case.draw(program, 2)
    x = x.repeat(200, 1)
    draws = []
    for _ in range(150):
        sampled = elbo(program, x)
        summed = SemiSupervised()(program, x)
        difference = (sampled.value.mean() - summed.value.mean()).detach().reshape(1)
        gradient = flat_gradient(program, sampled.surrogate.mean()) - flat_gradient(program, summed.surrogate.mean())
        draws.append(torch.cat([difference, gradient]))
    assert_zero_mean(torch.stack(draws))


def test_a_weighted_surrogate_keeps_the_right_gradient():
    """A surrogate that had not the bound's value would leak into the gradient of q(y | x), which weighs it."""
    inner = dgm.VAE(
        dgm.Bernoulli(2, MLP((), 2, hidden=(4,), num_classes=2)),
        dgm.Normal(2, MLP((2,), 4, hidden=(4,))),
        dgm.Bernoulli(2, MLP((2,), 2, hidden=(4,), num_classes=2)),
    )
    program = dgm.Labeled(dgm.Categorical((), 2), inner, dgm.Categorical((), 2, MLP((2,), 2, hidden=(4,))))
    x = torch.randn(2, 2)
    log_q_y = program.classifier(x).logits
    exact = 0
    for label in range(2):
        y = torch.full((2,), label)
        q_z = inner.encoder((x, y))
        bound = program.prior().log_prob(y) - log_q_y[:, label]
        for bits in itertools.product((0.0, 1.0), repeat=2):
            z = torch.tensor(bits).expand(2, 2)
            log_p = inner.prior(y).log_prob(z) + inner.likelihood(z).log_prob(x)
            bound = bound + q_z.log_prob(z).exp() * (log_p - q_z.log_prob(z))
        exact = exact + (log_q_y[:, label].exp() * bound).mean()
    exact_gradient = flat_gradient(program, exact)
    draws = [
        flat_gradient(program, SemiSupervised()(program, x.repeat(100, 1)).surrogate.mean()) - exact_gradient
        for _ in range(150)
    ]
    assert_zero_mean(torch.stack(draws))


# -- importance weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vae", "vae-two-levels", "diffusion", "vae-diffusion-prior"])
def test_iwae_is_the_log_mean_of_the_weights(name):
    """Value, and the gradient: each log weight's, weighted by its share (Burda et al. 2016, eq. 14)."""
    case = CASES[name]
    program = case.build()
    x, given = case.draw(program, 3)
    torch.manual_seed(3)
    bound = IWAE(4)(program, x, given)
    ours = gradients(program, bound.surrogate.mean())
    torch.manual_seed(3)
    log_w = program.log_weights(x, given, num_particles=4)
    torch.testing.assert_close(bound.value, (log_w.exp().mean(0)).log())
    shares = log_w.softmax(0).detach()
    assert_same(ours, gradients(program, (shares * log_w).sum(0).mean()))


def test_iwae_of_one_particle_is_the_elbo():
    program = CASES["vae"].build()
    x, _ = CASES["vae"].draw(program, 3)
    torch.manual_seed(3)
    one = IWAE(1)(program, x)
    torch.manual_seed(3)
    torch.testing.assert_close(one.value, ELBO(analytic_kl=False)(program, x).value)
    torch.testing.assert_close(one.reconstruction["x"] - one.kl["z"], one.value)


def test_iwae_rises_with_particles_towards_the_evidence():
    program, evidence = linear_gaussian()
    x = torch.tensor([[0.7]])
    exact = evidence.log_prob(x).item()
    with torch.no_grad():
        bounds = {k: IWAE(k)(program, x.expand(20000 // k, 1)).value for k in (1, 4, 16, 64)}
    means = [b.mean().item() for b in bounds.values()]
    assert means == sorted(means)
    assert means[0] < exact - 0.05
    last = bounds[64]
    assert abs(means[-1] - exact) < 0.01 + 4.5 * (last.std() / len(last) ** 0.5).item()


class Counting(nn.Module):
    """A network that counts its calls and the rows it is given."""

    def __init__(self, network):
        super().__init__()
        self.network, self.calls, self.rows = network, 0, 0
        for name in ("order", "given_shape"):
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))

    def forward(self, x, *context):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.network(x, *context)


@pytest.mark.parametrize("name", ["vae-autoregressive-prior", "pixelvae", "labeled-made", "labeled-classifier"])
def test_what_has_an_exact_density_is_not_unrolled(name):
    """One site and one pass for an autoregressive part, and the number that its unrolled form gives."""
    case = CASES[name]
    program = case.build()
    x, given = case.draw(program, 4)
    torch.manual_seed(3)
    ours = program.log_weights(x, given, num_particles=3)
    torch.manual_seed(3)
    unrolled = elbo(program.unroll(), x, given, batch=(3, 4), analytic_kl=False).value
    torch.testing.assert_close(ours, unrolled, rtol=1e-10, atol=1e-10)
    if not program.tractable:
        torch.manual_seed(3)
        torch.testing.assert_close(IWAE(3)(program, x, given).value, ours.logsumexp(0) - math.log(3))


def test_an_autoregressive_level_of_a_hierarchy_stays_one_site():
    """z | z2 is a chain, but the encoder states z as a whole, and so must every form of the model."""
    chain = made(dgm.MixtureOfNormals, 2, components=2, given_shape=(1,))
    inner = dgm.VAE(dgm.Normal(1), chain, dgm.Normal(1, nn.Linear(2, 2)), latent_name="z2")
    program = dgm.VAE(inner, dgm.Normal(2, nn.Linear(2, 4)), dgm.Normal(2, nn.Linear(2, 4)))
    x = torch.randn(4, 2)
    values = []
    for form in (program, program.unroll(), program.unroll_latents()):
        torch.manual_seed(3)
        values.append(elbo(form, x, analytic_kl=False).value)
    for value in values[1:]:
        assert_same_number(value, values[0])


def test_importance_weights_cost_one_pass_each():
    """K particles of B data: the encoder sees B rows, prior and likelihood K B rows, once each."""
    prior, likelihood, encoder = (
        Counting(n) for n in (networks.MADE(2, 6, hidden=(8,)), MLP((2,), 4, hidden=(6,)), MLP((2,), 4, hidden=(6,)))
    )
    program = dgm.VAE(
        dgm.Autoregressive(dgm.MixtureOfNormals(2, 2, prior)), dgm.Normal(2, likelihood), dgm.Normal(2, encoder)
    )
    prior.calls = prior.rows = 0  # what the constructor tried
    IWAE(5)(program, torch.randn(4, 2))
    assert [(n.calls, n.rows) for n in (prior, likelihood, encoder)] == [(1, 20), (1, 20), (1, 4)]


def test_enumeration_costs_one_row_per_outcome():
    likelihood, encoder = Counting(nn.Linear(3, 4)), Counting(nn.Linear(2, 3))
    shapes = {"given_shape": (3,)}, {"given_shape": (2,)}
    program = dgm.VAE(dgm.Bernoulli(3), dgm.Normal(2, likelihood, **shapes[0]), dgm.Bernoulli(3, encoder, **shapes[1]))
    Enumerate()(program, torch.randn(50, 2))
    assert (likelihood.rows, encoder.rows) == (8, 50)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_by_its_name_has_its_defaults(name):
    objective = objective_named(name)
    assert repr(objective) == repr(OBJECTIVES[name]())
    assert OBJECTIVES[name].__doc__.splitlines()[0].endswith((".", "known", "unknown."))  # what `dgm list` shows


@pytest.mark.parametrize(
    ("text", "objective"),
    [
        ("elbo:5", ELBO(5)),
        ("iwae:50", IWAE(50)),
        ("dreg:16", dgm.DReG(16)),
        ("stl:2", dgm.STL(2)),
        ("rws:3", dgm.RWS(3)),
        ("rloo:6", ELBO(6, leave_one_out=True)),
        ("vimco:6", IWAE(6, leave_one_out=True)),
        ("beta:4", ELBO(beta=4.0)),
        ("beta:0.25", ELBO(beta=0.25)),
        ("annealed:0.1", ELBO(beta=WarmUp(0.1))),
        ("free-bits:0.5", FreeBits(0.5)),
        ("enumerate:64", Enumerate(64)),
        ("semi-supervised:50", SemiSupervised(50.0)),
        ("simple", DenoisingLoss()),
        ("min-snr:3", DenoisingLoss(MinSNRWeight(3.0))),
        ("edm:0.3", DenoisingLoss(EDMWeight(0.3))),
    ],
)
def test_an_argument_follows_the_name(text, objective):
    assert objective_named(text) == objective


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mse", "objective must be one of elbo, beta, .*as in iwae:50, got 'mse'"),
        ("", "objective must be one of"),
        ("IWAE", "objective must be one of"),
        ("iwae:", "'iwae:': num_particles must be an integer, got ''.*iwae:8"),
        ("iwae:5.5", "num_particles must be an integer, got '5.5'"),
        ("iwae:0", "'iwae:0': num_particles must be a positive integer, got 0"),
        ("vimco:1", "num_particles must be at least 2"),
        ("beta:high", "weight must be a number, got 'high': write beta:4.0"),
        ("beta:-1", "weight must be a number of at least 0, got -1.0"),
        ("beta:nan", "weight must be a number of at least 0, got nan"),
        ("annealed:0", "fraction must be a number above 0 and at most 1, got 0.0"),
        ("annealed:2", "fraction must be a number above 0 and at most 1"),
        ("free-bits:-3", "nats must be a number of at least 0"),
        ("enumerate:0", "max_outcomes must be a positive integer"),
        ("simple:2", "objective 'simple:2': simple takes no number, got '2': write simple"),
        ("min-snr:0", "gamma must be a number above 0, got 0"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        objective_named(text)


@pytest.mark.parametrize("text", [*OBJECTIVES])
def test_of_a_tractable_program_every_objective_is_the_exact_evidence(text):
    if text == "semi-supervised":
        pytest.skip("for programs with a classifier")
    case = CASES["made"]
    program = case.build()
    x, given = case.draw(program, 4)
    torch.testing.assert_close(objective_named(text)(program, x, given).value, program.log_prob(x, given))


EVERYWHERE = ["beta", "free-bits:0.1", "stl:2", "iwae:3", "dreg:3", "rws:3", "rloo:3", "vimco:3", "enumerate"]


@pytest.mark.parametrize("text", EVERYWHERE)
@pytest.mark.parametrize("name", once_per_part(CASES))
def test_every_objective_takes_every_program(name, text):
    """Or says why not, by an error of ours that names another objective."""
    case = CASES[name]
    program = case.build()
    x, given = case.draw(program, 4)
    try:
        bound = objective_named(text)(program, x, given)
    except ValueError as error:
        assert re.search(r"not reparameterized: use the objective|cannot \(.*use another encoder", str(error))  # noqa: PT017
        assert text in ("stl:2", "dreg:3")
        return
    assert bound.value.shape == bound.surrogate.shape == (4,)
    torch.testing.assert_close(bound.value, bound.surrogate)
    assert all(term.shape == (4,) for term in [*bound.kl.values(), *bound.reconstruction.values()])


def test_known_bounds_are_known():
    assert {type(objective_named(name)) for name in OBJECTIVES} == {*VariationalBound.__subclasses__(), SemiSupervised}


# -- free bits ---------------------------------------------------------------------------------------------------------


def test_free_bits_floor_each_site_over_the_mean_of_the_batch():
    """Equation 15 of the source, at the same draws."""
    program = TopDown()
    x = torch.randn(50, 1)
    torch.manual_seed(3)
    plain = ELBO()(program, x)
    z2, z = plain.kl["z2"].mean(), plain.kl["z"].mean()
    for nats in (0.0, (min(z, z2) + max(z, z2)).item() / 2, max(z, z2).item() + 1):
        torch.manual_seed(3)
        bound = FreeBits(nats)(program, x)
        expected = plain.reconstruction["x"].mean() - z.clamp_min(nats) - z2.clamp_min(nats)
        torch.testing.assert_close(bound.value.mean(), expected)


def test_free_bits_of_a_bottom_up_hierarchy_floor_all_latents_together():
    for name in ("vae-two-levels", "vae-diffusion-prior"):
        case = CASES[name]
        program = case.build()
        x, given = case.draw(program, 50)
        torch.manual_seed(3)
        plain = ELBO()(program, x, given)
        kl = (plain.reconstruction["x"] - plain.value).mean()
        for nats in (kl.item() - 1, kl.item() + 1):
            torch.manual_seed(3)
            bound = FreeBits(max(nats, 0.0))(program, x, given)
            expected = plain.reconstruction["x"].mean() - kl.clamp_min(nats)
            torch.testing.assert_close(bound.value.mean(), expected)


def test_free_bits_per_feature_floor_each_feature():
    program = CASES["vae"].build()
    x, _ = CASES["vae"].draw(program, 50)
    q = program.encoder(x).base_dist
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(torch.zeros(2), 1.0)).mean(0)
    nats = kl.mean().item()  # between the two
    torch.manual_seed(3)
    plain = ELBO()(program, x)
    torch.manual_seed(3)
    bound = FreeBits(nats, per_feature=True)(program, x)
    expected = plain.reconstruction["x"].mean() - kl.clamp_min(nats).sum()
    torch.testing.assert_close(bound.value.mean(), expected)


@pytest.mark.parametrize("name", ["vae-flow-prior", "vae-two-levels", "vae-diffusion-prior"])
def test_free_bits_per_feature_need_features(name):
    case = CASES[name]
    program = case.build()
    with pytest.raises(ValueError, match="per_feature needs a divergence per feature"):
        FreeBits(0.1, per_feature=True)(program, *case.draw(program, 2))


def test_the_path_gradient_is_that_of_the_draws_before_the_model_has_looked_at_them():
    """An importance-sampled diffusion changes its times when its model is stated: the guide is scored before."""
    program = CASES["diffusion-importance"].build().train()
    program.mean_square.copy_(torch.linspace(1.0, 30.0, len(program.mean_square)))
    x, _ = CASES["diffusion-importance"].draw(program, 50)
    values = []
    for objective in (ELBO(2, analytic_kl=False), STL(2)):
        torch.manual_seed(0)
        values.append(objective(copy.deepcopy(program), x).value)
    torch.testing.assert_close(values[1], values[0])


# -- programs that are none --------------------------------------------------------------------------------------------


class Unguided(TopDown):
    def posterior(self, name, value, given=None):
        pyro.sample("z2", dist.Normal(value, 1.0).to_event(1))

    def latents(self, name):
        return None


class Overguided(TopDown):
    def posterior(self, name, value, given=None):
        super().posterior(name, value, given)
        pyro.sample("w", dist.Normal(value, 1.0).to_event(1))

    def latents(self, name):
        return None


@pytest.mark.parametrize("objective", [ELBO(), ELBO(3), IWAE(2)], ids=repr)
def test_a_latent_without_a_guide_site_is_named(objective):
    with pytest.raises(ValueError, match="the model samples 'z', which the guide lacks"):
        objective(Unguided(), torch.zeros(2, 1))


@pytest.mark.parametrize("objective", [ELBO(), ELBO(3), IWAE(2)], ids=repr)
def test_a_guide_site_without_a_latent_is_named(objective):
    with pytest.raises(ValueError, match="the guide samples 'w', which the model lacks"):
        objective(Overguided(), torch.zeros(2, 1))


def test_semi_supervised_needs_a_classifier():
    for name in ("vae", "labeled", "labeled-vae"):
        program = CASES[name].build()
        x, _ = CASES[name].draw(program, 2)
        with pytest.raises(ValueError, match=r"SemiSupervised needs a Labeled program with a classifier"):
            SemiSupervised()(program, x)


def test_enumeration_by_pyro_is_the_same_bound():
    """TraceEnum_ELBO on the one hand, every label tried on the other; z is drawn, so only in the mean."""
    case = CASES["labeled-classifier"]
    program = case.build()
    x, _ = case.draw(program, 3)
    x = x.repeat(300, 1)
    draws = []
    for _ in range(60):
        guide = pyro.infer.config_enumerate(program.guide)
        loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(program.model, guide, x) / 900
        bound = SemiSupervised()(program, x)
        difference = (loss + bound.value.mean()).detach().reshape(1)
        gradient = flat_gradient(program, loss) + flat_gradient(program, bound.surrogate.mean())
        draws.append(torch.cat([difference, gradient]))
    assert_zero_mean(torch.stack(draws))


# -- what an objective prints ------------------------------------------------------------------------------------------


class Drawn:
    """The terms of formulas at K draws of a VAE with independent Normals, ``(K, B)``."""

    def __init__(self, vae, x, num_particles):
        q = vae.encoder(x.expand(num_particles, *x.shape))
        self.z = q.rsample()
        self.log_likelihood, log_prior = vae.likelihood(self.z).log_prob(x), vae.prior().log_prob(self.z)
        self.log_p, self.log_q = self.log_likelihood + log_prior, q.log_prob(self.z)
        fixed = {name: p.detach() for name, p in vae.encoder.named_parameters()}
        q_fixed = functional_call(vae.encoder, fixed, (x.expand(num_particles, *x.shape),))
        self.log_q_fixed = q_fixed.log_prob(self.z)
        self.kl_by_feature = kl_divergence(q.base_dist, vae.prior().base_dist)
        self.kl = self.kl_by_feature.sum(-1)
        self.shares = (self.log_p - self.log_q).softmax(0).detach()


ELBO_FORMULA = r"E_{q(z \mid x)} [\log p(x, z) - \log q(z \mid x)]"
IWAE_FORMULA = r"E [\log \frac{1}{3} \sum_{k=1}^{3} p(x, z_k) / q(z_k \mid x)]"
BETA_FORMULA = r"E_{q(z \mid x)} [\log p(x \mid z)] - %s \, KL(q(z \mid x) \,\|\, p(z))"
WRITTEN = [
    (ELBO(analytic_kl=False), ELBO_FORMULA, lambda d: (d.log_p - d.log_q).mean(0)),
    (objective_named("beta:4"), BETA_FORMULA % 4, lambda d: (d.log_likelihood - 4 * d.kl).mean(0)),
    (ELBO(beta=WarmUp()), BETA_FORMULA % r"\beta(t)", lambda d: (d.log_likelihood - d.kl).mean(0)),
    (
        FreeBits(0.5),
        r"E_{q(z \mid x)} [\log p(x \mid z)] - \max(0.5, KL(q(z \mid x) \,\|\, p(z)))",
        lambda d: (d.log_likelihood - d.kl.clamp(min=0.5)).mean(0),
    ),
    (
        FreeBits(0.1, per_feature=True),
        r"E_{q(z \mid x)} [\log p(x \mid z)] - \sum_i \max(0.1, KL(q(z_i \mid x) \,\|\, p(z_i)))",
        lambda d: (d.log_likelihood - d.kl_by_feature.clamp(min=0.1).sum(-1)).mean(0),
    ),
    (
        STL(3),
        r"E_{q_\phi(z \mid x)} [\log p(x, z) - \log q_{\mathrm{sg}(\phi)}(z \mid x)]",
        lambda d: (d.log_p - d.log_q_fixed).mean(0),
    ),
    (IWAE(3), IWAE_FORMULA, lambda d: log_mean_exp(d.log_p - d.log_q)),
]


def vae_of_normals():
    vae = CASES["vae"].build()
    return vae, CASES["vae"].draw(vae, 1)[0]


@pytest.mark.parametrize(("objective", "formula", "by_hand"), WRITTEN, ids=lambda value: repr(value)[:20])
def test_a_formula_is_what_the_objective_computes(objective, formula, by_hand):
    """Value and gradient at the same draws, for one datum, whose KL is the mean over the batch that free bits floor."""
    assert objective.formula == formula
    vae, x = vae_of_normals()
    draws = getattr(objective, "num_particles", getattr(objective, "num_samples", 1))
    torch.manual_seed(0)
    bound = objective(vae, x)
    torch.manual_seed(0)
    expected = by_hand(Drawn(vae, x, draws))
    torch.testing.assert_close(bound.value, expected)
    torch.testing.assert_close(flat_gradient(vae, bound.surrogate.sum()), flat_gradient(vae, expected.sum()))


def test_the_formulas_of_reweighted_gradients_are_what_is_ascended():
    """DReG ascends the guide's pathwise gradient; RWS ascends a sum whose weights and draws are constants."""
    vae, x = vae_of_normals()
    assert DReG(3).formula == (
        r"E [\log \frac{1}{3} \sum_{k=1}^{3} w_k], \quad w_k = p(x, z_k) / q_\phi(z_k \mid x), \quad "
        r"\nabla_\phi = E [\sum_k \bar w_k^2 \frac{\partial \log w_k}{\partial z_k} "
        r"\frac{\partial z_k}{\partial \phi}], \quad \bar w_k \propto w_k"
    )
    torch.manual_seed(0)
    bound = DReG(3)(vae, x)
    torch.manual_seed(0)
    drawn = Drawn(vae, x, 3)
    log_w = drawn.log_p - drawn.log_q_fixed
    torch.testing.assert_close(bound.value, log_mean_exp(log_w))
    paths = flat_gradient(vae.encoder, (drawn.shares.square() * log_w).sum())
    torch.testing.assert_close(flat_gradient(vae.encoder, bound.surrogate.sum()), paths)

    assert RWS(3).formula == (
        r"E [\sum_{k=1}^{3} \mathrm{sg}(\bar w_k) (\log p(x, z_k) + \log q(z_k \mid x))], "
        r"\quad \bar w_k \propto p(x, z_k) / q(z_k \mid x)"
    )
    assert r"0.75 \, \log q(z_k \mid x))] + 0.25 \, E_{p(x', z')} [\log q(z' \mid x')]" in RWS(3, 0.25).formula
    torch.manual_seed(0)
    bound = RWS(3)(vae, x)
    z = drawn.z.detach()
    log_p = vae.prior().log_prob(z) + vae.likelihood(z).log_prob(x)
    ascended = (drawn.shares * (log_p + vae.encoder(x.expand(3, *x.shape)).log_prob(z))).sum()
    torch.testing.assert_close(flat_gradient(vae, bound.surrogate.sum()), flat_gradient(vae, ascended))


def test_the_formula_of_enumeration_is_the_sum_over_every_latent():
    assert Enumerate().formula == r"\sum_z q(z \mid x) [\log p(x, z) - \log q(z \mid x)]"
    vae = dgm.VAE(dgm.Bernoulli(2), dgm.Normal(3, nn.Linear(2, 6)), dgm.Bernoulli(2, nn.Linear(3, 2)))
    x, total = torch.randn(4, 3), 0
    for values in itertools.product([0.0, 1.0], repeat=2):
        z = torch.tensor(values).expand(4, 2)
        log_q = vae.encoder(x).log_prob(z)
        total = total + log_q.exp() * (vae.prior().log_prob(z) + vae.likelihood(z).log_prob(x) - log_q)
    torch.testing.assert_close(Enumerate()(vae, x).value, total)


PLAYED = {
    "js": lambda p, q: (2 * p.sigmoid()).log().mean() + (2 * (-q).sigmoid()).log().mean(),
    "kl": lambda p, q: (1 + p).mean() - q.exp().mean(),
    "reverse-kl": lambda p, q: -(-p).exp().mean() - (q - 1).mean(),
    "pearson": lambda p, q: 2 * (p.exp() - 1).mean() - ((2 * q).exp() - 1).mean(),
    "hellinger": lambda p, q: (1 - (-p / 2).exp()).mean() - ((q / 2).exp() - 1).mean(),
}
PLAYED_WRITTEN = {
    "js": r"E_p[\log 2 \sigma(V)] + E_q[\log 2 \sigma(-V)]",
    "kl": r"E_p[1 + V] - E_q[e^V]",
    "reverse-kl": r"E_p[-e^{-V}] - E_q[V - 1]",
    "pearson": r"E_p[2 (e^V - 1)] - E_q[e^{2V} - 1]",
    "hellinger": r"E_p[1 - e^{-V/2}] - E_q[e^{V/2} - 1]",
}


@pytest.mark.parametrize("game", PLAYED)
def test_the_formula_of_a_game_is_what_the_critic_ascends(game):
    assert Adversarial(game).formula == rf"\min_q \max_V \, {PLAYED_WRITTEN[game]}"
    p, q = torch.randn(2, 50)
    torch.testing.assert_close(divergence_bound(game, p, q), PLAYED[game](p, q))


def test_every_objective_has_a_formula_that_can_be_set():
    """By matplotlib's mathtext, which knows less of LaTeX than a notebook."""
    objectives = [objective_named(name) for name in OBJECTIVES | COMPARISONS]
    objectives += [
        DenoisingLoss(lambda log_snr, fall: fall),
        RWS(sleep=0.5),
        FreeBits(per_feature=True),
        *map(Adversarial, GAMES),
    ]
    parser = MathTextParser("path")
    for objective in objectives:
        assert objective._repr_latex_() == f"$${objective.formula}$$"
        parser.parse(f"${objective.formula}$")


@pytest.mark.parametrize(
    "number",
    [
        lambda vae, x: ELBO()(vae, x),
        lambda vae, x: IWAE(3)(vae, x),
        lambda vae, x: vae.log_weights(x, num_particles=3),
        lambda vae, x: dgm.evaluate(vae, x),
        lambda vae, x: dgm.fit(vae, x, epochs=1, validation=None, progress=False),
        lambda vae, x: dgm.compile(vae)(x),
    ],
    ids=["elbo", "iwae", "log_weights", "evaluate", "fit", "compiled"],
)
@pytest.mark.parametrize("discrete", ["prior", "encoder"])
@pytest.mark.parametrize("validated", [True, False])
def test_a_mass_and_a_density_make_no_bound(number, discrete, validated):
    """E[log p(x, z) - log q(z)] would be finite, and above log p(x) for a prior that is narrow at the two values."""
    bits, reals = dgm.Bernoulli(2, nn.Linear(3, 2)), dgm.Normal(2, nn.Linear(3, 4))
    prior, encoder = (dgm.Bernoulli(2), reals) if discrete == "prior" else (dgm.Normal(2), bits)
    vae = dgm.VAE(prior, dgm.Normal(3, nn.Linear(2, 6)), encoder)
    q, p = ("density", "mass") if discrete == "prior" else ("mass", "density")
    refused = f"^the guide gives 'z' a {q}, but the model a {p}|to be within the support"
    with (
        pyro.settings.context(validate_distributions_pyro=validated),
        pytest.raises((ValueError, CompilationError), match=refused),
    ):
        number(vae, torch.randn(4, 3))
