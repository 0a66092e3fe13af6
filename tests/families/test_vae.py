"""VAEs against evidences that are known exactly, and against Pyro's own estimates."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import CASES
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.distributions import MultivariateNormal

import dgm_pyro as dgm
from dgm_pyro.networks import MLP

pytestmark = pytest.mark.usefixtures("float64")


class Gaussian(dgm.Conditional):
    """N(weight given + bias, covariance): the linear-Gaussian piece that everything exact is made of."""

    conditional = True

    def __init__(self, weight, bias, covariance):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.register_buffer("covariance", covariance)
        self.event_shape = torch.Size(bias.shape)
        self.given_shape = torch.Size(weight.shape[1:])

    def forward(self, given=None):
        return dist.MultivariateNormal(given @ self.weight.T + self.bias, self.covariance)

    def reversed(self, prior_mean, prior_covariance):
        """p(given | x) by Bayes' rule, for given ~ N(prior_mean, prior_covariance)."""
        marginal = self.weight @ prior_covariance @ self.weight.T + self.covariance
        gain = prior_covariance @ self.weight.T @ torch.linalg.inv(marginal)
        mean = prior_mean - gain @ (self.weight @ prior_mean + self.bias)
        covariance = prior_covariance - gain @ self.weight @ prior_covariance
        return Gaussian(gain.detach(), mean.detach(), (covariance + covariance.T).detach() / 2)

    def pushed(self, prior_mean, prior_covariance):
        """Mean and covariance of x."""
        return (
            self.weight @ prior_mean + self.bias,
            self.weight @ prior_covariance @ self.weight.T + self.covariance,
        )


def random_gaussian(features, size):
    a = torch.randn(features, features)
    return Gaussian(torch.randn(features, size), torch.randn(features), a @ a.T / features + 0.3 * torch.eye(features))


def standard(size):
    return torch.zeros(size), torch.eye(size)


# -- exact evidences ---------------------------------------------------------------------------------------------------


def test_with_the_exact_posterior_every_sample_of_the_elbo_is_the_evidence():
    likelihood = random_gaussian(4, 2)
    vae = dgm.VAE(dgm.Normal(2), likelihood, likelihood.reversed(*standard(2)))
    x = 2 * torch.randn(6, 4)
    evidence = MultivariateNormal(*likelihood.pushed(*standard(2))).log_prob(x)
    weights = vae.log_weights(x, num_particles=20)
    torch.testing.assert_close(weights, evidence.expand(20, -1), rtol=1e-9, atol=1e-9)
    for elbo in (Trace_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True)):
        assert -elbo.loss(vae.model, vae.guide, x) == pytest.approx(evidence.sum().item(), abs=1e-8)


def test_the_same_with_the_textbook_parts():
    """A one-dimensional z has a diagonal posterior, so that Normal and Linear suffice."""
    loading, loc, scale = torch.tensor([[0.8], [-0.5], [1.1]]), torch.randn(3), torch.tensor([0.4, 0.7, 0.5])
    precision = 1 + (loading.squeeze() ** 2 / scale**2).sum()
    gain = (loading.T / scale**2) / precision
    decoder, encoder = nn.Linear(1, 6), nn.Linear(3, 2)
    raw = lambda s: torch.log(torch.expm1(s))  # noqa: E731
    with torch.no_grad():
        decoder.weight.copy_(torch.cat([loading, torch.zeros(3, 1)]))
        decoder.bias.copy_(torch.cat([loc, raw(scale)]))
        encoder.weight.copy_(torch.cat([gain, torch.zeros(1, 3)]))
        encoder.bias.copy_(torch.cat([-gain @ loc, raw(precision.rsqrt()).reshape(1)]))
    vae = dgm.VAE(dgm.Normal(1), dgm.Normal(3, decoder), dgm.Normal(1, encoder))
    x = torch.randn(5, 3)
    evidence = MultivariateNormal(loc, loading @ loading.T + torch.diag(scale**2)).log_prob(x)
    torch.testing.assert_close(vae.log_weights(x, num_particles=9), evidence.expand(9, -1), rtol=1e-9, atol=1e-9)


def test_a_hierarchy_with_exact_posteriors():
    """z2 -> z -> x, and the guide x -> z -> z2: q(z | x) from the marginal of z, q(z2 | z) by Bayes' rule."""
    upper, lower = random_gaussian(3, 2), random_gaussian(4, 3)
    prior = dgm.VAE(dgm.Normal(2), upper, upper.reversed(*standard(2)), latent_name="z2")
    marginal = upper.pushed(*standard(2))
    vae = dgm.VAE(prior, lower, lower.reversed(*marginal))
    x = torch.randn(5, 4)
    evidence = MultivariateNormal(*lower.pushed(*marginal)).log_prob(x)
    torch.testing.assert_close(vae.log_weights(x, num_particles=7), evidence.expand(7, -1), rtol=1e-9, atol=1e-9)
    assert vae.latents("x") == ("z", "z2")


def test_a_vae_as_likelihood_with_exact_posteriors():
    """x | z is itself a VAE with latent u: z -> u -> x, where u's prior is conditional on z."""

    class IgnoringZ(Gaussian):
        def __init__(self, inner, size):
            super().__init__(inner.weight.detach(), inner.bias.detach(), inner.covariance)
            self.given_shape = (self.given_shape, torch.Size((size,)))

        def forward(self, given=None):
            return super().forward(given[0])

    class PosteriorOfU(dgm.Conditional):
        """q(u | x, z) for u ~ N(upper z + bias, S) and x ~ N(lower u + bias, R)."""

        conditional = True

        def __init__(self, upper, lower):
            super().__init__()
            self.upper, self.lower = upper, lower
            self.event_shape = upper.event_shape
            self.given_shape = (lower.event_shape, upper.given_shape)

        def forward(self, given=None):
            x, z = given
            mean = z @ self.upper.weight.T + self.upper.bias
            marginal = self.lower.weight @ self.upper.covariance @ self.lower.weight.T + self.lower.covariance
            gain = self.upper.covariance @ self.lower.weight.T @ torch.linalg.inv(marginal)
            covariance = self.upper.covariance - gain @ self.lower.weight @ self.upper.covariance
            residual = x - mean @ self.lower.weight.T - self.lower.bias
            return dist.MultivariateNormal(mean + residual @ gain.T, (covariance + covariance.T) / 2)

    upper, lower = random_gaussian(2, 2), random_gaussian(3, 2)
    inner = dgm.VAE(upper, IgnoringZ(lower, 2), PosteriorOfU(upper, lower), latent_name="u")
    assert inner.given_shape == (2,)
    through = Gaussian(
        (lower.weight @ upper.weight).detach(),
        (lower.weight @ upper.bias + lower.bias).detach(),
        (lower.weight @ upper.covariance @ lower.weight.T + lower.covariance).detach(),
    )
    vae = dgm.VAE(dgm.Normal(2), inner, through.reversed(*standard(2)))
    x = torch.randn(4, 3)
    evidence = MultivariateNormal(*through.pushed(*standard(2))).log_prob(x)
    torch.testing.assert_close(vae.log_weights(x, num_particles=5), evidence.expand(5, -1), rtol=1e-9, atol=1e-9)
    assert vae.latents("x") == ("z", "u")


class Stacked(dgm.Conditional):
    """A Gaussian given the pair (a, b): linear in both."""

    conditional = True

    def __init__(self, gaussian, split):
        super().__init__()
        self.gaussian = gaussian
        self.event_shape = gaussian.event_shape
        size = gaussian.weight.shape[1]
        self.given_shape = (torch.Size((split,)), torch.Size((size - split,)))

    def forward(self, given=None):
        a, b = given
        b = b.expand(*a.shape[:-1], -1)
        return self.gaussian(torch.cat([a, b], -1))


def test_conditional_evidence():
    """p(x | y) = integral of p(z | y) p(x | z, y): all three parts read y, the last two as the pair."""
    prior, likelihood = random_gaussian(2, 3), random_gaussian(4, 2 + 3)
    to_x, from_y = likelihood.weight[:, :2].detach(), likelihood.weight[:, 2:].detach()
    marginal = to_x @ prior.covariance @ to_x.T + likelihood.covariance
    gain = prior.covariance @ to_x.T @ torch.linalg.inv(marginal)
    # E[z | x, y] = m(y) + gain (x - to_x m(y) - from_y y - bias), with m(y) = prior.weight y + prior.bias
    rest = torch.eye(2) - gain @ to_x
    posterior = Gaussian(
        torch.cat([gain, (rest @ prior.weight - gain @ from_y).detach()], 1),
        (rest @ prior.bias - gain @ likelihood.bias).detach(),
        rest @ prior.covariance,
    )
    vae = dgm.VAE(prior, Stacked(likelihood, 2), Stacked(posterior, 4))
    assert vae.conditional
    assert vae.given_shape == (3,)
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    mean = (y @ prior.weight.T + prior.bias) @ to_x.T + y @ from_y.T + likelihood.bias
    evidence = MultivariateNormal(mean, marginal).log_prob(x)
    weights = vae.log_weights(x, y, num_particles=8)
    torch.testing.assert_close(weights, evidence.expand(8, -1), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(evidence, MultivariateNormal(mean.roll(1, 0), marginal).log_prob(x))


def test_label_given_against_a_grid_over_z():
    """p(x | y) of a nonlinear VAE with labels, integrated on a grid of one latent."""
    vae = dgm.VAE(
        dgm.Normal(1, nn.Embedding(3, 2)),
        dgm.Normal(2, MLP((1,), 4, (5,), num_classes=3)),
        dgm.Normal(1, MLP((2,), 2, (5,), num_classes=3)),
    ).eval()
    with torch.no_grad():
        vae.encoder.network.rest[-1].bias[1] += 2  # wider than any posterior, so that the weights have a variance
    x, y = torch.randn(3, 2), torch.tensor([0, 1, 2])
    z = torch.linspace(-15, 15, 20_001)
    with torch.no_grad():
        exact = []
        for row, label in zip(x, y, strict=True):
            labels = label.expand(len(z))
            prior = vae.prior.log_prob(z.unsqueeze(-1), labels)
            likelihood = vae.likelihood.log_prob(row.expand(len(z), -1), (z.unsqueeze(-1), labels))
            exact.append((prior + likelihood).logsumexp(0) + math.log(30 / 20_000))
        weights = vae.log_weights(x, y, num_particles=20_000)
    estimates = (weights - torch.stack(exact)).exp()  # mean one
    assert ((estimates.mean(0) - 1).abs() < 4.5 * estimates.std(0) / len(weights) ** 0.5).all()


# -- discrete latents --------------------------------------------------------------------------------------------------


def test_bit_latents_against_the_sum_over_all_of_them():
    case = CASES["vae-bit-latent"]
    vae = case.build()
    x, _ = case.draw(vae, 3)
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    with torch.no_grad():
        log_joint = [vae.prior.log_prob(every) + vae.likelihood.log_prob(row.expand(8, -1), every) for row in x]
        exact = torch.stack(log_joint).logsumexp(-1)
        weights = vae.log_weights(x, num_particles=20_000)
    ratio = (weights - exact).exp()
    assert ((ratio.mean(0) - 1).abs() < 4.5 * ratio.std(0) / len(weights) ** 0.5).all()


def test_a_categorical_latent_with_its_exact_posterior():
    """Bayes' rule as the encoder: again every sample of the ELBO is the evidence."""
    prior = dgm.Categorical((), 4, parameters=torch.randn(4))
    likelihood = dgm.Normal(2, nn.Embedding(4, 4))

    class Bayes(dgm.Conditional):
        event_shape, levels, conditional = torch.Size(), 4, True

        def forward(self, given=None):
            z = torch.arange(4).expand(*given.shape[:-1], 4)
            x = given.unsqueeze(-2).expand(*z.shape, 2)
            return dist.Categorical(logits=prior().log_prob(z) + likelihood(z).log_prob(x))

    vae = dgm.VAE(prior, likelihood, Bayes())
    x = torch.randn(5, 2)
    masses, z = prior().probs, torch.arange(4)
    exact = torch.stack([(masses.log() + likelihood(z).log_prob(row)).logsumexp(0) for row in x])
    torch.testing.assert_close(vae.log_weights(x, num_particles=10), exact.expand(10, -1), rtol=1e-9, atol=1e-9)


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_the_importance_weighted_bound_rises_to_the_evidence():
    likelihood = random_gaussian(3, 2)
    vae = dgm.VAE(dgm.Normal(2), likelihood, dgm.Normal(2, nn.Linear(3, 4)))
    x = torch.randn(4, 3)
    with torch.no_grad():
        evidence = MultivariateNormal(*likelihood.pushed(*standard(2))).log_prob(x).sum()
        weights = vae.log_weights(x, num_particles=200_000)
        bounds = []
        for k in (1, 4, 20, 200):
            groups = (weights.reshape(-1, k, 4).logsumexp(1) - math.log(k)).sum(-1)
            bounds.append((groups.mean(), groups.std() / len(groups) ** 0.5))
    for (lower, error), (higher, other) in itertools.pairwise(bounds):
        assert higher - lower > 4.5 * (error**2 + other**2).sqrt()
    assert bounds[-1][0] < evidence + 4.5 * bounds[-1][1]
    assert evidence - bounds[-1][0] < 0.3 * (evidence - bounds[0][0])


def test_the_gap_of_the_elbo_is_the_divergence_from_the_posterior():
    """log p(x) - ELBO = KL(q(z | x) || p(z | x)), in closed form for Gaussians."""
    likelihood = random_gaussian(3, 2)
    vae = dgm.VAE(dgm.Normal(2), likelihood, dgm.Normal(2, nn.Linear(3, 4)))
    x = torch.randn(4, 3)
    with torch.no_grad():
        posterior = likelihood.reversed(*standard(2))(x)
        q = vae.encoder(x)
        q = MultivariateNormal(q.base_dist.loc, torch.diag_embed(q.base_dist.scale**2))
        gap = torch.distributions.kl_divergence(q, posterior)
        evidence = MultivariateNormal(*likelihood.pushed(*standard(2))).log_prob(x)
        weights = vae.log_weights(x, num_particles=50_000)
    error = weights.std(0) / len(weights) ** 0.5
    assert ((weights.mean(0) - (evidence - gap)).abs() < 4.5 * error).all()


def test_gradients_are_those_of_the_evidence():
    """At the exact posterior the expected gradient of the ELBO in the model's parameters is that of log p(x)."""
    likelihood = random_gaussian(3, 2)
    vae = dgm.VAE(dgm.Normal(2), likelihood, likelihood.reversed(*standard(2)))
    x = torch.randn(5, 3)
    parameters = [likelihood.weight, likelihood.bias]
    evidence = MultivariateNormal(*likelihood.pushed(*standard(2))).log_prob(x).sum()
    exact = torch.autograd.grad(evidence, parameters)
    draws = [torch.autograd.grad(vae.log_weights(x, num_particles=20).mean(0).sum(), parameters) for _ in range(100)]
    for i, gradient in enumerate(exact):
        estimates = torch.stack([draw[i] for draw in draws])
        error = estimates.std(0) / len(draws) ** 0.5
        assert ((estimates.mean(0) - gradient).abs() < 4.5 * error).all()


def test_gradients_of_the_guide_are_those_of_its_divergence():
    """In the encoder's parameters, the expected gradient of the ELBO is that of -KL(q(z | x) || p(z | x))."""
    likelihood = random_gaussian(3, 2)
    vae = dgm.VAE(dgm.Normal(2), likelihood, dgm.Normal(2, nn.Linear(3, 4)))
    x = torch.randn(4, 3)
    parameters = list(vae.encoder.parameters())
    q = vae.encoder(x).base_dist
    q = MultivariateNormal(q.loc, torch.diag_embed(q.scale**2))
    posterior = likelihood.reversed(*standard(2))(x)
    posterior = MultivariateNormal(posterior.mean.detach(), posterior.covariance_matrix.detach())
    exact = torch.autograd.grad(-torch.distributions.kl_divergence(q, posterior).sum(), parameters)
    draws = [torch.autograd.grad(vae.log_weights(x, num_particles=50).mean(0).sum(), parameters) for _ in range(100)]
    for i, gradient in enumerate(exact):
        estimates = torch.stack([draw[i] for draw in draws])
        error = estimates.std(0) / len(draws) ** 0.5
        assert ((estimates.mean(0) - gradient).abs() < 4.5 * error).all()


# -- Pyro's own estimates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("vae")])
def test_log_weights_equal_pyros_elbo_on_the_same_random_numbers(name):
    program = CASES[name].build().eval().unroll()
    x, given = CASES[name].draw(program, 5)
    for particles, elbo in (
        (1, Trace_ELBO(max_plate_nesting=1)),
        (6, Trace_ELBO(num_particles=6, vectorize_particles=True, max_plate_nesting=2)),
    ):
        with torch.no_grad():
            pyro.set_rng_seed(3)
            theirs = -elbo.loss(program.model, program.guide, x, given)
            pyro.set_rng_seed(3)
            ours = program.log_weights(x, given, num_particles=particles).mean(0).sum().item()
        assert ours == pytest.approx(theirs, rel=1e-10, abs=1e-10)


# -- givens ------------------------------------------------------------------------------------------------------------


def test_the_parts_receive_z_and_y():
    """Likelihood and encoder get the pairs (z, y) and (x, y), with the network's one batch dimension."""
    seen = {}

    class Pair(nn.Module):
        def __init__(self, role, first, outputs):
            super().__init__()
            self.role, self.in_shape, self.given_shape = role, torch.Size(first), torch.Size()
            self.num_classes = 4
            self.linear = nn.Linear(math.prod(first) + 1, outputs)

        def forward(self, a, y):
            seen[self.role] = (a.shape, y)
            return self.linear(torch.cat([a.flatten(1), y.unsqueeze(-1).to(a)], -1))

    vae = dgm.VAE(dgm.Normal(2), dgm.Normal((1, 2, 2), Pair("z", (2,), 8)), dgm.Normal(2, Pair("x", (1, 2, 2), 4)))
    assert (vae.conditional, vae.given_shape, vae.num_classes) == (True, (), 4)
    x, y = torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 3, 0])
    assert vae.log_weights(x, y, num_particles=3).shape == (3, 5)
    assert seen["z"][0] == (15, 2)
    assert torch.equal(seen["z"][1], y.repeat(3))
    assert seen["x"][0] == (5, 1, 2, 2)
    assert torch.equal(seen["x"][1], y)
    assert vae.sample(3, torch.tensor([2])).shape == (3, 1, 2, 2)
    assert torch.equal(seen["z"][1], torch.tensor([2, 2, 2]))


def test_only_some_parts_may_read_y():
    """A conditional prior alone, or a likelihood that reads y with an encoder that does not."""
    conditional_prior = dgm.VAE(
        dgm.Normal(2, nn.Embedding(3, 4)), dgm.Normal(4, nn.Linear(2, 8)), dgm.Normal(2, nn.Linear(4, 4))
    )
    likelihood_only = dgm.VAE(
        dgm.Normal(2), dgm.Normal(4, MLP((2,), 8, (3,), num_classes=3)), dgm.Normal(2, nn.Linear(4, 4))
    )
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    for vae in (conditional_prior, likelihood_only):
        assert (vae.conditional, vae.num_classes) == (True, 3)
        pyro.set_rng_seed(0)
        first = vae.log_weights(x, y)
        pyro.set_rng_seed(0)
        assert not torch.allclose(vae.log_weights(x, y.roll(1)), first)


def test_a_label_of_z_is_not_a_label_of_x():
    """num_classes of a likelihood that reads a categorical z says nothing of the VAE's own given."""
    vae = dgm.VAE(
        dgm.Categorical((), 3, network=nn.Embedding(7, 3)),
        dgm.Normal(2, nn.Embedding(3, 4)),
        dgm.Categorical((), 3, network=nn.Linear(2, 3)),
    )
    assert vae.num_classes == 7
    assert vae.log_weights(torch.randn(2, 2), torch.tensor([6, 0])).shape == (1, 2)


# -- what is refused ---------------------------------------------------------------------------------------------------


def parts(prior=None, likelihood=None, encoder=None, **options):
    return dgm.VAE(
        prior or dgm.Normal(2),
        likelihood or dgm.Normal(5, nn.Linear(2, 10)),
        encoder or dgm.Normal(2, nn.Linear(5, 4)),
        **options,
    )


def test_two_latents_of_one_name():
    level = lambda name: dgm.VAE(  # noqa: E731
        dgm.Normal(2), dgm.Normal(2, nn.Linear(2, 4)), dgm.Normal(2, nn.Linear(2, 4)), latent_name=name
    )
    with pytest.raises(ValueError, match=r"two latents of this VAE are named 'z'.*latent_name='z2'"):
        parts(prior=level("z"))
    with pytest.raises(ValueError, match="named 'x'"):
        parts(prior=level("x"))
    three = dgm.VAE(level("b"), dgm.Normal(2, nn.Linear(2, 4)), dgm.Normal(2, nn.Linear(2, 4)), latent_name="a")
    with pytest.raises(ValueError, match="named 'b'"):
        parts(prior=three, latent_name="b")
    assert parts(prior=three).latents("x") == ("z", "a", "b")


class Leaky(dgm.Program):
    """A user's program whose guide has one site too many, or too few, and that declares no latents."""

    event_shape = torch.Size((2,))

    def __init__(self, guided):
        super().__init__()
        self.guided = guided
        self.loc = nn.Parameter(torch.zeros(()))

    def joint(self, name, value=None, given=None):
        z = pyro.sample("z", dist.Normal(self.loc, 1.0))
        return pyro.sample(name, dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 2]).to_event(1), obs=value)

    def posterior(self, name, value, given=None):
        for site in self.guided:
            pyro.sample(site, dist.Normal(self.loc, 1.0).expand(value.shape[:1]))


def test_a_guide_site_that_the_model_lacks():
    program, x = Leaky(["z", "extra"]), torch.zeros(3, 2)
    message = r"guide samples 'extra', which the model lacks; the model's latents are 'z'"
    with pytest.raises(ValueError, match=message):
        program.log_weights(x)
    with pytest.raises(ValueError, match=message):
        program.guide(x)
    with pytest.raises(ValueError, match=message):
        SVI(program.model, program.guide, pyro.optim.Adam({}), Trace_ELBO()).step(x)


def test_a_latent_that_the_guide_lacks():
    with pytest.raises(ValueError, match=r"model samples 'z', which the guide lacks.*posterior\(\), which has none"):
        Leaky([]).log_weights(torch.zeros(3, 2))


def test_an_undeclared_but_matching_guide_costs_one_trace_of_the_model():
    class Counting(Leaky):
        calls = 0

        def joint(self, name, value=None, given=None):
            self.calls += 1
            return super().joint(name, value, given)

    program, x = Counting(["z"]), torch.zeros(3, 2)
    for _ in range(3):
        program.guide(x)
    assert program.calls == 1
    pyro.set_rng_seed(0)
    first = Trace_ELBO().loss(program.model, program.guide, x)
    fresh = Counting(["z"])
    pyro.set_rng_seed(0)
    assert Trace_ELBO().loss(fresh.model, fresh.guide, x) == first, "the look at the model draws no random numbers"


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: parts(prior=dgm.Normal(3)), ValueError, r"encoder's event_shape is \(2,\), but the prior's is \(3,\)"),
        (
            lambda: parts(encoder=dgm.Normal((2, 1), nn.Linear(5, 4))),
            ValueError,
            r"encoder's event_shape is \(2, 1\), but the prior's",
        ),
        (
            lambda: parts(likelihood=dgm.Normal(5)),
            ValueError,
            r"likelihood is given the prior's event_shape \(2,\), but this Normal is not conditional",
        ),
        (lambda: parts(encoder=dgm.Normal(2)), ValueError, r"encoder is given .* but this Normal is not conditional"),
        (
            lambda: parts(likelihood=dgm.Normal(5, nn.Linear(3, 10))),
            ValueError,
            r"likelihood expects given_shape \(3,\), but it is given the prior's event_shape \(2,\)",
        ),
        (
            lambda: parts(encoder=dgm.Normal(2, MLP((4,), 4))),
            ValueError,
            r"encoder expects given_shape \(4,\), but it is given the likelihood's event_shape \(5,\)",
        ),
        (
            lambda: parts(
                likelihood=dgm.Normal(5, MLP((2,), 10, given_shape=(3,))),
                encoder=dgm.Normal(2, MLP((5,), 4, given_shape=(4,))),
            ),
            ValueError,
            r"encoder expects given_shape .*4.*, but it is given .*3",
        ),
        (
            lambda: parts(
                prior=dgm.Normal(2, nn.Linear(4, 4)), likelihood=dgm.Normal(5, MLP((2,), 10, given_shape=(3,)))
            ),
            ValueError,
            r"prior expects given_shape \(4,\), but it is given this VAE's given_shape \(3,\)",
        ),
        (
            lambda: parts(
                prior=dgm.Normal(2, nn.Embedding(7, 4)), likelihood=dgm.Normal(5, MLP((2,), 10, num_classes=3))
            ),
            ValueError,
            r"num_classes differs .*'prior': 7, 'likelihood': 3",
        ),
        (
            lambda: parts(
                encoder=dgm.VAE(
                    dgm.Normal(1, nn.Linear(5, 2)),
                    dgm.Normal(2, MLP((1,), 4, given_shape=(5,))),
                    dgm.Normal(1, MLP((2,), 2, given_shape=(5,))),
                    latent_name="aux",
                )
            ),
            ValueError,
            r"encoder has latents of its own, \('aux',\)",
        ),
        (
            lambda: parts(prior="normal"),
            TypeError,
            "prior must be a dgm.Program, got str",
        ),
        (lambda: parts(likelihood=nn.Linear(2, 5)), TypeError, "likelihood must be a dgm.Program, got Linear"),
        (lambda: parts(encoder=dist.Normal(0, 1)), TypeError, "encoder must be a dgm.Program, got the dist"),
        (lambda: parts(latent_name=""), ValueError, "latent_name must be the name of a site"),
        (lambda: parts(latent_name="x"), ValueError, "named 'x'"),
    ],
)
def test_parts_that_do_not_fit(build, error, message):
    with pytest.raises(error, match=message):
        build()
