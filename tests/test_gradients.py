"""Gradients of the objectives, on models whose exact gradients are known.

The model is linear and Gaussian in one dimension: z ~ N(0, 1), x | z ~ N(a z + b, r^2), q(z | x) = N(c x + d, s^2). Its
parameters are given one row per datum, all rows equal, so that one backward pass yields as many independent draws of
the gradient as there are data. Means are held to 4 standard errors, seeds fixed.
"""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import CASES
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from torch import nn
from torch.distributions import Normal

import dgm_pyro as dgm
from dgm_pyro import ELBO, IWAE, RWS, STL, DReG, Enumerate, FreeBits
from dgm_pyro.objectives import elbo, objective_named, rloo, vimco
from dgm_pyro.program import guide_trace

pytestmark = pytest.mark.usefixtures("float64")

X = 0.7
P = {"a": 0.9, "b": 0.2, "r": 0.6}
Q = {"c": 0.4, "d": -0.3, "s": 0.8}
DRAWS = 40000


class Rows(dgm.Conditional):
    """N(slope * given + offset, scale^2), its parameters one row per datum."""

    conditional = True

    def __init__(self, slope, offset, scale, size=DRAWS, family=dist.Normal):
        super().__init__()
        self.event_shape = self.given_shape = torch.Size((1,))
        self.family = family
        self.slope, self.offset, self.scale = (
            nn.Parameter(torch.full((size, 1), value)) for value in (slope, offset, scale)
        )

    def forward(self, given=None):
        return self.family(self.slope * given + self.offset, self.scale).to_event(1)


def model(size=DRAWS, family=dist.Normal, **changes):
    q = Q | changes
    return dgm.VAE(dgm.Normal(1), Rows(*P.values(), size), Rows(*q.values(), size, family))


def draws_of(objective, program):
    """Independent draws of the gradient, one per row, by the names of the parameters."""
    size = len(program.likelihood.slope)
    bound = objective(program, torch.full((size, 1), X))
    parts = (program.likelihood, program.encoder)
    leaves = [getattr(part, name) for part in parts for name in ("slope", "offset", "scale")]
    found = torch.autograd.grad(bound.surrogate.sum(), leaves)
    return dict(zip("abrcds", (g.squeeze(-1) for g in found), strict=True))


def assert_means(draws, expected, sigmas=4.0):
    for name, value in expected.items():
        error = (draws[name].std() / len(draws[name]) ** 0.5).item() + 1e-12
        z = (draws[name].mean().item() - value) / error
        assert abs(z) < sigmas, f"d/d{name}: {draws[name].mean():.4f} +- {error:.4f}, exactly {value:.4f}"


def variance(draws, names="cds"):
    return sum(draws[name].var().item() for name in names)


# -- exact gradients ---------------------------------------------------------------------------------------------------


def elbo_gradient(beta=1.0, **changes):
    """By hand: -log r - ((x - a m - b)^2 + a^2 s^2) / 2 r^2 - beta ((s^2 + m^2 - 1) / 2 - log s) with m = c x + d."""
    a, b, r = P.values()
    c, d, s = (Q | changes).values()
    m = c * X + d
    error = X - a * m - b
    dm = a * error / r**2 - beta * m
    return {
        "a": (error * m - a * s**2) / r**2,
        "b": error / r**2,
        "r": -1 / r + (error**2 + (a * s) ** 2) / r**3,
        "c": dm * X,
        "d": dm,
        "s": -(a**2) * s / r**2 - beta * (s - 1 / s),
    }


def exact_posterior():
    """q(z | x) = p(z | x): precision 1 + a^2 / r^2."""
    a, b, r = P.values()
    s2 = 1 / (1 + a**2 / r**2)
    return {"c": s2 * a / r**2, "d": -s2 * a * b / r**2, "s": math.sqrt(s2)}


def pairs():
    """Two standard normal draws, and the weight of each pair, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    return torch.stack(torch.meshgrid(nodes, nodes, indexing="ij")), weights.outer(weights)


def two_draws():
    """Parameters, log p(x, z) and log q(z | x) of two draws; z follows c, d and s, and is detached on demand."""
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in (P | Q).items()}
    a, b, r, c, d, s = leaves.values()
    noise, weight = pairs()

    def log_p_and_q(path):
        z = c * X + d + s * noise
        z = z if path else z.detach()
        log_p = Normal(0.0, 1.0).log_prob(z) + Normal(a * z + b, r).log_prob(torch.tensor(X))
        return log_p, Normal(c * X + d, s).log_prob(z)

    return leaves, log_p_and_q, weight


def gradient_of(value, leaves):
    found = torch.autograd.grad(value, list(leaves.values()))
    return {name: g.item() for name, g in zip(leaves, found, strict=True)}


def iwae_gradient():
    leaves, log_p_and_q, weight = two_draws()
    log_p, log_q = log_p_and_q(path=True)
    return gradient_of((weight * ((log_p - log_q).logsumexp(0) - math.log(2))).sum(), leaves)


def wake_gradient():
    """The mean of sum_k w_k d log p(x, z_k) and of sum_k w_k d log q(z_k | x), the weights normalized and constant."""
    leaves, log_p_and_q, weight = two_draws()
    log_p, log_q = log_p_and_q(path=False)
    shares = (log_p - log_q).softmax(0).detach()
    return gradient_of((weight * (shares * (log_p + log_q)).sum(0)).sum(), leaves)


def dream_gradient():
    """By hand: the gradient of E_p(x, z)[log q(z | x)], from E[z x] = a, E[x] = b, E[x^2] = a^2 + b^2 + r^2."""
    a, b, r = P.values()
    c, d, s = Q.values()
    second = a**2 + b**2 + r**2
    square = 1 - 2 * c * a + c**2 * second + d**2 + 2 * c * d * b
    return {"c": (a - c * second - d * b) / s**2, "d": (-c * b - d) / s**2, "s": -1 / s + square / s**3}


def test_the_exact_gradients_agree_with_autograd():
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in (P | Q).items()}
    a, b, r, c, d, s = leaves.values()
    m = c * X + d
    bound = -r.log() - ((X - a * m - b) ** 2 + (a * s) ** 2) / (2 * r**2) - 3 * ((s**2 + m**2 - 1) / 2 - s.log())
    assert elbo_gradient(beta=3.0) == pytest.approx(gradient_of(bound, leaves))
    assert all(abs(elbo_gradient(**exact_posterior())[name]) < 1e-12 for name in "cds")


# -- every objective's gradient is that of what it says ----------------------------------------------------------------

ELBOS = [ELBO(), ELBO(analytic_kl=False), ELBO(3), STL(), STL(3), Enumerate()]


@pytest.mark.parametrize("objective", ELBOS, ids=repr)
def test_elbo(objective):
    assert_means(draws_of(objective, model()), elbo_gradient())


@pytest.mark.parametrize("objective", [ELBO(beta=3.0), ELBO(beta=3.0, analytic_kl=False)], ids=repr)
def test_beta(objective):
    assert_means(draws_of(objective, model()), elbo_gradient(beta=3.0))


def test_annealing_goes_from_the_likelihood_to_the_elbo():
    objective = dgm.objectives.annealed(0.5)
    for progress, beta in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        assert_means(draws_of(objective.at(progress), model()), elbo_gradient(beta=beta))
    assert_means(draws_of(objective, model()), elbo_gradient())  # asked directly, it is at its end


@pytest.mark.parametrize("per_feature", [False, True])
def test_free_bits(per_feature):
    """KL = 0.066 nats: under a higher floor it has no gradient, as if beta were 0; above a lower one it is the ELBO."""
    kl = (Q["s"] ** 2 + (Q["c"] * X + Q["d"]) ** 2 - 1) / 2 - math.log(Q["s"])
    assert_means(draws_of(FreeBits(kl - 0.01, per_feature), model()), elbo_gradient())
    assert_means(draws_of(FreeBits(kl + 0.01, per_feature), model()), elbo_gradient(beta=0.0))


@pytest.mark.parametrize("objective", [IWAE(2), DReG(2)], ids=repr)
def test_importance_weighted(objective):
    assert_means(draws_of(objective, model()), iwae_gradient())


@pytest.mark.parametrize("family", [dist.Normal, NonreparameterizedNormal])
def test_wake(family):
    """The score of the weighted draws, whether or not they could be reparameterized."""
    draws = draws_of(RWS(2), model(family=family))
    assert_means(draws, wake_gradient())
    assert wake_gradient()["a"] == pytest.approx(iwae_gradient()["a"])  # wake-theta is the gradient of the bound


def test_sleep():
    wake, dream = wake_gradient(), dream_gradient()
    draws = draws_of(RWS(2, sleep=1.0), model())
    assert_means(draws, dream | {name: wake[name] for name in "abr"})
    mixed = {name: 0.75 * wake[name] + 0.25 * dream[name] for name in "cds"}
    assert_means(draws_of(RWS(2, sleep=0.25), model()), mixed)


# -- latents without a path --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [ELBO(analytic_kl=False), ELBO(4, analytic_kl=False), rloo(4)], ids=repr)
def test_the_score_function_has_the_gradient_of_the_path(objective):
    assert_means(draws_of(objective, model(family=NonreparameterizedNormal)), elbo_gradient())


@pytest.mark.parametrize("objective", [IWAE(2), vimco(2)], ids=repr)
def test_importance_weighted_by_the_score_function(objective):
    assert_means(draws_of(objective, model(family=NonreparameterizedNormal)), iwae_gradient())


@pytest.mark.parametrize("particles", [2, 8])
def test_the_others_as_a_baseline_lower_the_variance(particles):
    program = model(family=NonreparameterizedNormal)
    plain, compared = ELBO(particles), rloo(particles)
    assert variance(draws_of(compared, program)) < variance(draws_of(plain, program))
    plain, compared = IWAE(particles), vimco(particles)
    assert variance(draws_of(compared, program)) < variance(draws_of(plain, program))


def test_what_can_be_reparameterized_has_no_score_function():
    torch.manual_seed(3)
    a = draws_of(ELBO(4), model(100))
    torch.manual_seed(3)
    b = draws_of(rloo(4), model(100))
    assert all(torch.equal(a[name], b[name]) for name in a)


# -- less variance, where a paper promises it --------------------------------------------------------------------------


def test_sticking_the_landing_has_no_variance_at_the_exact_posterior():
    program = model(**exact_posterior())
    stuck, plain = draws_of(STL(), program), draws_of(ELBO(analytic_kl=False), program)
    for name in "cds":
        assert stuck[name].abs().max() < 1e-12
        assert plain[name].std() > 0.5


@pytest.mark.parametrize("change", [0.9, 1.1])
def test_near_it_sticking_the_landing_has_less_variance(change):
    q = exact_posterior()
    program = model(**{name: value * change for name, value in q.items()})
    stuck, plain = draws_of(STL(), program), draws_of(ELBO(analytic_kl=False), program)
    assert variance(stuck) < variance(plain) / 10


def signal_to_noise(objective, size, name):
    draws = draws_of(objective, model(size))[name]
    return (draws.mean().abs() / draws.std()).item()


@pytest.mark.parametrize("particles", [4, 16, 64])
def test_doubly_reparameterized_has_less_variance(particles):
    size = 2**18 // particles
    plain, double = (draws_of(objective(particles), model(size)) for objective in (IWAE, DReG))
    assert variance(double) < variance(plain) / 3


@pytest.mark.parametrize("name", ["d", "s"])
def test_its_signal_grows_out_of_the_noise_where_that_of_iwae_drowns(name):
    """Over a factor 16 of K the ratio grows by some sqrt(16) for DReG, and falls by as much for IWAE (section 3)."""
    few, many = 4, 64
    size = 2**20 // many
    grown = signal_to_noise(DReG(many), size, name) / signal_to_noise(DReG(few), size, name)
    drowned = signal_to_noise(IWAE(many), size, name) / signal_to_noise(IWAE(few), size, name)
    assert grown > 2
    assert drowned < 0.5


# -- several latents ---------------------------------------------------------------------------------------------------


def two_levels(size):
    """z2 ~ N(0, 1), z | z2 and x | z linear; the guide is q(z | x) q(z2 | z)."""
    top = dgm.VAE(dgm.Normal(1), Rows(0.8, 0.1, 0.6, size), Rows(0.3, 0.2, 0.9, size), latent_name="z2")
    return dgm.VAE(top, Rows(1.2, -0.1, 0.5, size), Rows(0.5, 0.1, 0.4, size))


def log_weights(program, z, z2, x, detach):
    """log p(x, z, z2) - log q(z, z2 | x), by hand; ``detach`` the guide's parameters."""
    p_x, q_z, p_z, q_z2 = program.likelihood, program.encoder, program.prior.likelihood, program.prior.encoder
    read = (lambda t: t.detach()) if detach else (lambda t: t)
    normal = lambda part, given, f=lambda t: t: Normal(f(part.slope) * given + f(part.offset), f(part.scale))  # noqa: E731
    log_p = Normal(0.0, 1.0).log_prob(z2) + normal(p_z, z2).log_prob(z) + normal(p_x, z).log_prob(x)
    log_q = normal(q_z, x, read).log_prob(z) + normal(q_z2, z, read).log_prob(z2)
    return (log_p - log_q).squeeze(-1)


@pytest.mark.parametrize("objective", [STL(3), DReG(3)], ids=repr)
def test_each_path_is_weighted_once_though_one_latent_depends_on_the_other(objective):
    """Tucker et al. 2019, eq. 8, and Roeder et al. 2017, eq. 8, written out at the same draws."""
    program = two_levels(5)
    x = torch.randn(5, 1)
    torch.manual_seed(3)
    ours = torch.autograd.grad(objective(program, x).surrogate.sum(), list(program.parameters()))
    torch.manual_seed(3)
    guide = guide_trace(program, x, batch=(3, 5))
    z, z2 = guide.nodes["z"]["value"], guide.nodes["z2"]["value"]
    along = log_weights(program, z, z2, x, detach=True)
    fixed = log_weights(program, z.detach(), z2.detach(), x, detach=True)
    shares = along.softmax(0).detach() if isinstance(objective, DReG) else torch.full_like(along, 1 / 3)
    # Of `along`, the model's part is not along a path: take it back, and weight it as `fixed`.
    weights_of_path = shares**2 if isinstance(objective, DReG) else shares
    surrogate = (weights_of_path * (along - fixed) + shares * fixed).sum()
    theirs = torch.autograd.grad(surrogate, list(program.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objectives", [(ELBO(), STL()), (IWAE(3), DReG(3))], ids=["STL", "DReG"])
def test_two_levels_have_the_same_gradient_in_the_mean(objectives):
    program = two_levels(DRAWS)
    x = torch.full((DRAWS, 1), X)
    plain, path = (torch.autograd.grad(o(program, x).surrogate.sum(), list(program.parameters())) for o in objectives)
    for a, b in zip(plain, path, strict=True):
        difference = a - b
        assert difference.mean().abs() < 4 * difference.std() / DRAWS**0.5


@pytest.mark.parametrize("name", ["vae-flow-encoder", "vae-flow-prior", "vae-diffusion-prior", "vae-given-label"])
def test_any_guide_that_scores_its_draws_will_do(name):
    """STL and DReG against ELBO and IWAE on programs at large: equal values, and equal gradients in the mean."""
    case = CASES[name]
    program = case.build()
    x, given = case.draw(program, 2)
    for plain, path in ((ELBO(analytic_kl=False), STL()), (IWAE(3), DReG(3))):
        rows = []
        for i in range(30):
            pair = []
            for objective in (plain, path):
                torch.manual_seed(i)
                repeated = [None if t is None else t.repeat_interleave(20, 0) for t in (x, given)]
                bound = objective(program, *repeated)
                pair.append(bound)
            torch.testing.assert_close(pair[0].value, pair[1].value, rtol=1e-6, atol=1e-6)
            grads = [
                torch.autograd.grad(b.surrogate.mean(), list(program.parameters()), allow_unused=True) for b in pair
            ]
            both = [(torch.zeros(1) if g is None else g.flatten() for g in found) for found in grads]
            rows.append(torch.cat(list(both[0])) - torch.cat(list(both[1])))
        rows = torch.stack(rows)
        z = rows.mean(0) / (rows.std(0) / len(rows) ** 0.5 + 1e-9)
        assert z.abs().max() < 5.5  # the largest of some hundreds


# -- discrete latents --------------------------------------------------------------------------------------------------


def flat_gradient(program, loss):
    found = torch.autograd.grad(loss, list(program.parameters()), allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(program.parameters(), found, strict=True)
        ]
    )


def assert_zero_mean(draws, sigmas=5.5):
    z = draws.mean(0) / (draws.std(0) / len(draws) ** 0.5 + 1e-12)
    assert z.abs().max() < sigmas, f"the largest of {z.numel()} z-scores is {z.abs().max():.1f}"


DISCRETE = ["vae-bit-latent", "vae-categorical-latent", "vae-discrete-autoregressive-prior"]


def every_latent(program, x):
    """log p(x, z) and log q(z | x) for every z, each ``(outcomes, B)``, one z after the other."""
    prior = program.prior
    rows = []
    for outcome in itertools.product(range(prior.levels), repeat=prior.event_shape.numel()):
        z = torch.tensor(outcome).reshape(prior.event_shape).expand(len(x), *prior.event_shape)
        z = z.double() if isinstance(prior, dgm.Bernoulli) else z
        log_p = prior.exact_log_prob(z) + program.likelihood.exact_log_prob(x, z)
        rows.append((log_p, program.encoder.exact_log_prob(z, x)))
    return [torch.stack(part) for part in zip(*rows, strict=True)]


@pytest.mark.parametrize("name", DISCRETE)
def test_enumeration_is_the_sum_over_every_latent(name):
    program = CASES[name].build()
    x, _ = CASES[name].draw(program, 3)
    log_p, log_q = every_latent(program, x)
    exact = (log_q.exp() * (log_p - log_q)).sum(0)
    bound = Enumerate()(program, x)
    torch.testing.assert_close(bound.value, exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sum(bound.reconstruction.values()) - sum(bound.kl.values()), exact)
    ours, theirs = flat_gradient(program, bound.surrogate.sum()), flat_gradient(program, exact.sum())
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


class Mixed(dgm.Program):
    """A label, bits that depend on it, and a real z given both, each drawn by a guide in the same order."""

    def __init__(self):
        super().__init__()
        self.event_shape = torch.Size((1,))
        self.label = dgm.Categorical((), 3, nn.Linear(1, 3))
        self.bits = dgm.Bernoulli(2, nn.Linear(2, 2))
        self.real = dgm.Normal(1, nn.Linear(4, 2))
        self.means = nn.Parameter(torch.randn(3, 1))
        self.mix = nn.Parameter(torch.randn(2, 1))

    def joint(self, name, value=None, given=None):
        y = pyro.sample("y", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        bits = pyro.sample("bits", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
        z = pyro.sample("z", dist.Normal(self.means[y], 1.0).to_event(1))
        return pyro.sample(name, dist.Normal(z + bits @ self.mix, 0.5).to_event(1), obs=value)

    def posterior(self, name, value, given=None):
        y = self.label.joint("y", given=value)
        f = y.unsqueeze(-1).to(value.dtype)
        x, f = torch.broadcast_tensors(value, f)
        bits = self.bits.joint("bits", given=torch.cat([x, f], -1))
        batch = torch.broadcast_shapes(bits.shape[:-1], x.shape[:-1])
        self.real.joint("z", given=torch.cat([x.expand(*batch, 1), f.expand(*batch, 1), bits.expand(*batch, 2)], -1))

    def latents(self, name):
        return ("y", "bits", "z")


def test_several_discrete_latents_and_a_real_one():
    """Against the ELBO with observed labels and bits, one combination after the other, at their probability."""
    torch.manual_seed(0)
    program = Mixed()
    x = torch.randn(1, 1).expand(4000, 1)
    ours = Enumerate()(program, x)
    by_hand = 0
    for y, b0, b1 in itertools.product(range(3), (0.0, 1.0), (0.0, 1.0)):
        observed = {"y": torch.full((4000,), y), "bits": torch.tensor([b0, b1]).expand(4000, 2)}
        inner = elbo(program, x, observed=observed)
        log_q = program.label(x).log_prob(observed["y"])
        log_q = log_q + program.bits(torch.cat([x, torch.full_like(x, y)], -1)).log_prob(observed["bits"])
        by_hand = by_hand + log_q.exp() * (inner.value - log_q)
    assert_zero_mean((ours.value - by_hand).detach().unsqueeze(-1), 4)
    a, b = (flat_gradient(program, value.mean()) for value in (ours.surrogate, by_hand))
    rows = [
        flat_gradient(program, Enumerate()(program, x[:100]).surrogate.mean()) for _ in range(60)
    ]  # for the error of the mean
    error = torch.stack(rows).std(0) / 40**0.5
    assert ((a - b).abs() <= 4 * 2**0.5 * error + 1e-9).all()


def test_a_label_that_is_observed_is_not_enumerated():
    case = CASES["labeled-classifier"]
    program = case.build()
    x, _ = case.draw(program, 6)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    torch.manual_seed(3)
    ours = Enumerate()(program, x, observed={"y": y})
    torch.manual_seed(3)
    torch.testing.assert_close(ours.value, elbo(program, x, observed={"y": y}).value)


def test_labels_are_enumerated_as_by_semi_supervised():
    case = CASES["labeled-classifier"]
    program = case.build()
    x, _ = case.draw(program, 2)
    x = x.repeat(300, 1)
    rows = []
    for _ in range(60):
        a, b = Enumerate()(program, x), dgm.SemiSupervised()(program, x)
        difference = (a.value - b.value).mean().detach().reshape(1)
        rows.append(
            torch.cat(
                [difference, flat_gradient(program, a.surrogate.mean()) - flat_gradient(program, b.surrogate.mean())]
            )
        )
    assert_zero_mean(torch.stack(rows))


def test_too_many_outcomes_are_refused():
    program = CASES["vae-bit-latent"].build()
    x, _ = CASES["vae-bit-latent"].draw(program, 2)
    with pytest.raises(ValueError, match=r"enumerate 'z', 3 feature\(s\) of 2 values, takes 8 outcomes.*is 7"):
        Enumerate(7)(program, x)
    assert Enumerate(8)(program, x).value.shape == (2,)


@pytest.mark.parametrize("name", DISCRETE[:2])
def test_wake_of_discrete_latents_is_the_sum_over_every_pair(name):
    program = CASES[name].build()
    x, _ = CASES[name].draw(program, 2)
    log_p, log_q = every_latent(program, x)
    both = lambda t: torch.stack(torch.broadcast_tensors(t.unsqueeze(0), t.unsqueeze(1)))  # noqa: E731
    shares = both(log_p - log_q).softmax(0).detach()
    chance = both(log_q).sum(0).exp().detach()
    exact = (chance * (shares * both(log_p + log_q)).sum(0)).sum((0, 1)).mean()
    expected = flat_gradient(program, exact)
    rows = [flat_gradient(program, RWS(2)(program, x.repeat(200, 1)).surrogate.mean()) - expected for _ in range(100)]
    assert_zero_mean(torch.stack(rows))


@pytest.mark.parametrize(("plain", "compared"), [(ELBO(4), rloo(4)), (IWAE(4), vimco(4))], ids=["rloo", "vimco"])
@pytest.mark.parametrize("name", DISCRETE[:2])
def test_baselines_for_discrete_latents_change_no_mean_and_lower_the_variance(name, plain, compared):
    program = CASES[name].build()
    x, _ = CASES[name].draw(program, 2)
    rows = {
        objective: torch.stack(
            [flat_gradient(program, objective(program, x.repeat(20, 1)).surrogate.mean()) for _ in range(100)]
        )
        for objective in (plain, compared)
    }
    assert_zero_mean(rows[plain] - rows[compared])
    assert rows[compared].var(0).sum() < rows[plain].var(0).sum()


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [STL(), DReG(2)], ids=repr)
def test_a_latent_without_a_path_is_named(objective):
    program = CASES["vae-bit-latent"].build()
    x, _ = CASES["vae-bit-latent"].draw(program, 2)
    with pytest.raises(ValueError, match=r"'z' \(Bernoulli\) is not reparameterized: use .*'enumerate'"):
        objective(program, x)


class Unscored(dist.Normal):
    """A distribution that remembers the score of its own draw, and knows no other."""

    def log_prob(self, value):
        raise NotImplementedError("Unscored has no inverse")


@pytest.mark.parametrize("objective", [STL(), DReG(2)], ids=repr)
def test_a_guide_that_cannot_score_is_named(objective):
    with pytest.raises(ValueError, match=r"draws of 'z' a second time, but .* cannot \(Unscored has no inverse\)"):
        objective(model(2, Unscored), torch.zeros(2, 1))


@pytest.mark.parametrize("objective", [STL(), DReG(2)], ids=repr)
def test_a_guide_that_is_not_the_same_twice_is_refused(objective):
    network = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    program = dgm.VAE(dgm.Normal(1), dgm.Normal(1, nn.Linear(1, 2)), dgm.Normal(1, network))
    with pytest.raises(ValueError, match="the two runs differ: remove dropout"):
        objective(program.train(), torch.zeros(2, 1))
    objective(program.eval(), torch.zeros(2, 1))


# -- at the optimum ----------------------------------------------------------------------------------------------------


def fit(program, x, objective, **options):
    settings = {"epochs": 200, "batch_size": len(x), "lr": 5e-2, "validation": None, "progress": False}
    dgm.fit(program, x, objective, **settings | options)


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc, self.raw_scale = nn.Linear(1, 1), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.cat([self.loc(x), self.raw_scale.expand(len(x), 1)], -1)


CONTINUOUS = ["elbo", "elbo:4", "annealed", "free-bits:0.05", "stl:4", "iwae:8", "dreg:8", "rws:8"]


@pytest.mark.parametrize("objective", CONTINUOUS)
def test_the_optimum_is_the_analytic_evidence(objective):
    """The best p(x) is N(mean, variance) of the data, and the guide can be exact.

    A location off by e standard deviations costs e^2 / 2 nats and a scale off by a share e costs e^2: 2e-3 nats are
    some 5 % of a standard deviation, the noise of a few steps at the end of a cosine schedule. The bound that the
    objective maximizes lies below by as much again for a guide that is off by as much.
    """
    torch.manual_seed(0)
    x = 0.5 + 1.3 * torch.randn(200, 1)
    program = dgm.VAE(dgm.Normal(1), dgm.Normal(1, Affine()), dgm.Normal(1, Affine()))
    fit(program, x, objective)
    network = program.likelihood.network
    scale = (network.loc.weight[0, 0] ** 2 + nn.functional.softplus(network.raw_scale) ** 2).sqrt()
    evidence = Normal(network.loc.bias, scale).log_prob(x).mean().item()
    best = Normal(x.mean(), x.std(correction=0)).log_prob(x).mean().item()
    assert 0 <= best - evidence < 2e-3
    with torch.no_grad():
        bound = objective_named(objective)(program, x.repeat(200, 1)).value.mean().item()
    assert abs(best - bound) < 5e-3


@pytest.mark.parametrize("objective", ["enumerate", "rloo:8", "vimco:8", "rws:8"])
def test_with_a_discrete_latent_it_is_the_entropy_of_the_data(objective):
    """z is a bit and p(x | z) any table over 4 values, so that the best p(x) is the frequency of each value.

    A frequency f estimated as f + e costs e^2 / 2f nats: 5e-3 nats are errors of some 5 % of each.
    """
    torch.manual_seed(0)
    x = torch.multinomial(torch.tensor([0.5, 0.25, 0.15, 0.1]), 200, replacement=True).unsqueeze(-1)
    program = dgm.VAE(
        dgm.Bernoulli(1, learned=True),
        dgm.Categorical(1, 4, nn.Linear(1, 4)),
        dgm.Bernoulli(1, nn.Embedding(4, 1), given_shape=(1,)),
    )
    fit(program, x, objective)
    with torch.no_grad():
        z = torch.tensor([[0.0], [1.0]])
        p = program.prior().log_prob(z).exp() @ program.likelihood(z).base_dist.probs.squeeze(1)
    frequency = torch.bincount(x.flatten(), minlength=4) / len(x)
    gap = (frequency * (frequency.log() - p.log())).sum().item()
    assert 0 <= gap < 5e-3
