"""Implicit programs, the objectives that compare samples, and what is said of programs without a density.

They are not in `programs.CASES`: nearly every invariant tested there is one of densities.
"""

import math

import pyro
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import adversarial, implicit
from dgm_pyro.networks import MLP
from dgm_pyro.objectives import COMPARISONS, objective_named
from dgm_pyro.training.adversarial import (
    DIVERGENCES,
    Adversarial,
    KernelScore,
    density_ratio,
    divergence_bound,
    squared_distance,
)

ANGLES = torch.arange(8) * math.pi / 4
RING = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
GRID = torch.cartesian_prod(torch.arange(-1.5, 2.0), torch.arange(-1.5, 2.0))


def generator(**options):
    return MLP((2,), options.pop("outputs", 3), hidden=(6,), activation="tanh", **options)


def tiny(**options):
    torch.manual_seed(0)
    return dgm.Implicit(3, dgm.Normal(2), generator(), **options)


def labeled():
    torch.manual_seed(0)
    return dgm.Implicit(3, dgm.Normal(2), generator(num_classes=4))


@dgm.register
class Shift(nn.Module):
    """x = z + shift: of a standard Normal, a Normal whose every distance is known."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, z):
        return z + self.shift


# -- the program -------------------------------------------------------------------------------------------------------


def test_x_is_the_generator_of_z():
    program = tiny()
    trace = poutine.trace(program.model).get_trace(5)
    z, x = trace.nodes["z"]["value"], trace.nodes["x"]["value"]
    assert z.shape == (5, 2)
    torch.testing.assert_close(x, program.generator(z))
    # z alone has a probability: x is certain.
    torch.testing.assert_close(trace.log_prob_sum(), program.prior.log_prob(z).sum())


def test_it_samples_the_pushforward():
    """Mean and covariance of a linear map, within four standard errors."""
    torch.manual_seed(0)
    linear = nn.Linear(2, 3).double()
    program = dgm.Implicit(3, dgm.Normal(2).double(), linear)
    x = program.sample(40_000)
    covariance = linear.weight @ linear.weight.T
    error = (covariance.diagonal() / len(x)).sqrt()
    assert ((x.mean(0) - linear.bias).abs() < 4 * error).all()
    error = ((covariance.diagonal().outer(covariance.diagonal()) + covariance**2) / len(x)).sqrt()
    assert ((x.T.cov() - covariance).abs() < 4 * error).all()


def test_plain_pyro_reads_it():
    program = tiny()
    drawn = pyro.infer.Predictive(program.model, num_samples=7)(4)
    assert drawn["x"].shape == (7, 4, 3)
    z = torch.randn(4, 2)
    conditioned = poutine.condition(program.model, data={"z": z})(4)
    torch.testing.assert_close(conditioned, program.generator(z))


def test_inside_particle_plates_it_has_more_batch_dimensions():
    program = labeled()
    with poutine.block(), pyro.plate("particles", 5, dim=-2), pyro.plate("data", 4, dim=-1):
        assert program.joint("x", given=torch.arange(4)).shape == (5, 4, 3)


def test_a_label_chooses_what_is_generated():
    program = labeled()
    assert program.conditional
    assert program.num_classes == 4
    z, y = torch.randn(6, 2), torch.arange(6) % 4
    x = poutine.condition(program.model, data={"z": z})(6, y)
    torch.testing.assert_close(x, program.generator(z, y))
    assert program.sample(6, given=y).shape == (6, 3)
    prior = dgm.Normal(2, nn.Embedding(4, 4))
    assert dgm.Implicit(3, prior, generator()).sample(2, given=torch.tensor([0, 3])).shape == (2, 3)
    with pytest.raises(ValueError, match="conditional: pass given, one integer label"):
        program.sample(6)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_integers_are_rounded_and_the_gradient_is_not(levels):
    program = tiny(levels=levels)
    x = program.sample(50)
    program.check(x)  # integers in range
    assert program.measure == "mass"
    raw = torch.linspace(-4, 4, 9, requires_grad=True)
    implicit._round_straight_through((levels - 1) * raw.sigmoid()).sum().backward()
    torch.testing.assert_close(raw.grad, (levels - 1) * raw.sigmoid() * (1 - raw.sigmoid()))


def test_a_prior_may_be_any_program():
    prior = dgm.VAE(dgm.Normal(1), dgm.Normal(2, nn.Linear(1, 4)), dgm.Normal(1, nn.Linear(2, 2)), latent_name="u")
    program = dgm.Implicit(3, prior, generator())
    assert program.latents("x") == ("z", "u")
    assert program.sample(4).shape == (4, 3)


@pytest.mark.parametrize(
    "question",
    [
        lambda p, x: p.log_prob(x),
        lambda p, x: p.log_weights(x, num_particles=3),
        lambda p, x: p.model(x),
        lambda p, x: p.guide(x),
        lambda p, x: poutine.condition(p.model, data={"x": x})(4),
        lambda p, x: dgm.evaluate(p, x),
        lambda p, x: dgm.evaluate(p, x, num_particles=5),
        lambda p, x: dgm.ELBO()(p, x),
        lambda p, x: dgm.fit(p, x, epochs=1, progress=False, validation=None),
        lambda p, x: dgm.fit(p, x, "iwae", epochs=1, progress=False, validation=None),
    ],
    ids=["log_prob", "log_weights", "model", "guide", "condition", "evaluate", "iwae", "ELBO", "fit", "fit iwae"],
)
def test_what_needs_a_density_says_that_there_is_none(question):
    program = tiny()
    before = [p.clone() for p in program.parameters()]
    with pytest.raises(dgm.IntractableError) as error:
        question(program, torch.zeros(4, 3))
    for text in ("has no density", "not be invertible", "program.sample(n)", "Predictive", "'gan'", "dgm.quality"):
        assert text in " ".join(str(error.value).split())
    assert all(torch.equal(a, b) for a, b in zip(before, program.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dgm.Implicit(3, nn.Linear(2, 3), generator()), TypeError, "prior must be a dgm.Program, got Lin"),
        (lambda: dgm.Implicit(3, dgm.Normal(2), len), TypeError, "generator must be a torch.nn.Module, got builtin"),
        (lambda: dgm.Implicit(3, dgm.Normal(4), generator()), ValueError, r"z of shape \(2,\).*event_shape is \(4,\)"),
        (lambda: dgm.Implicit(0, dgm.Normal(2), generator()), ValueError, "event_shape must be a positive int"),
        (lambda: tiny(levels=1), ValueError, "levels must be an int of at least 2"),
        (lambda: tiny(latent_name="x"), ValueError, "two latents of this Implicit are named 'x'"),
        (lambda: tiny(latent_name=""), ValueError, "latent_name must be the name of a site"),
        (lambda: dgm.Implicit(4, dgm.Normal(2), generator()).sample(5), ValueError, r"shape \(5, 3\).*\(5, 4\)"),
        (lambda: Adversarial("lsgan"), ValueError, "game must be one of gan, wasserstein, kl, .*got 'lsgan'"),
        (lambda: Adversarial(critic="mlp"), TypeError, "critic must be a torch.nn.Module or None, got str"),
        (lambda: Adversarial(r1=-1), ValueError, "r1 must be a number of at least 0"),
        (lambda: Adversarial(gradient_penalty=math.nan), ValueError, "gradient_penalty must be a number"),
        (lambda: Adversarial(critic_steps=0), ValueError, "critic_steps must be a positive integer"),
        (lambda: Adversarial(critic_lr=0), ValueError, "critic_lr must be a number above 0"),
        (lambda: Adversarial()(tiny(), torch.zeros(4, 3)), ValueError, "the critic is not set up.*prepare"),
        (lambda: KernelScore("cosine"), ValueError, "kernel must be one of energy, gaussian, got 'cosine'"),
        (lambda: KernelScore(scales=()), ValueError, "scales must name at least one"),
        (lambda: KernelScore(scales=(0.0,)), ValueError, "scales must be a number above 0"),
        (lambda: KernelScore(num_samples=1), ValueError, "num_samples must be at least 2"),
        (lambda: objective_named("f-gan:tv"), ValueError, "'f-gan:tv': divergence must be one of kl, reverse-kl"),
        (lambda: objective_named("mmd:0"), ValueError, "'mmd:0': scale must be a number above 0"),
        (
            lambda: KernelScore()(dgm.Bernoulli(3, learned=True), torch.zeros(4, 3)),
            ValueError,
            "draws of this Bernoulli carry no gradient.*'elbo'",
        ),
        (lambda: dgm.compile(tiny(), "gan"), ValueError, "Adversarial cannot be compiled, because it trains a critic"),
        (lambda: fitted(tiny(), torch.randn(200, 3), "gan", compile=True), ValueError, "Adversarial cannot be comp"),
        (lambda: dgm.compile(tiny(), "mmd"), ValueError, "KernelScore cannot be compiled, because it fixes the number"),
        (
            lambda: fitted(tiny(), torch.randn(20, 3), Adversarial(critic=nn.Linear(3, 2))),
            ValueError,
            r"critic returned shape \(18, 2\), but it must return one number per datum, \(18, 1\)",
        ),
        (lambda: density_ratio(torch.zeros(4, 2), torch.zeros(4, 3)), ValueError, r"q has shape \(4, 3\)"),
        (lambda: density_ratio(torch.zeros(4, 2), torch.zeros(4, 2), divergence="tv"), ValueError, "divergence must"),
        (lambda: implicit.parzen(torch.zeros(3, 2), torch.zeros(3, 2), 0.0), ValueError, "scale must be"),
        (lambda: implicit.noisy(tiny(), -1.0), ValueError, "scale must be a number above 0, got -1.0"),
        (lambda: dgm.build("implicit", dgm.data.load("digits"), labeled=True), ValueError, "no density.*p.y . x"),
    ],
)  # fmt: skip
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def fitted(program, data, objective, **options):
    return dgm.fit(program, data, objective, **{"epochs": 1, "progress": False, **options})


@pytest.mark.parametrize("make", [tiny, labeled, lambda: tiny(levels=5)], ids=["reals", "given", "integers"])
def test_a_checkpoint_draws_the_same(make, tmp_path):
    program = make()
    dgm.save(program, tmp_path / "run")
    loaded = dgm.load(tmp_path / "run")
    given = torch.arange(4) if program.conditional else None
    draws = []
    for each in (program, loaded):
        torch.manual_seed(3)
        draws.append(each.sample(4, given))
    assert torch.equal(*draws)


# -- kernel scores -----------------------------------------------------------------------------------------------------


def mean_distance(shift, scale):
    """E|x| of x ~ N(shift, scale^2)."""
    normal = torch.distributions.Normal(0.0, 1.0)
    ratio = torch.tensor(shift / scale, dtype=torch.float64)
    return float(scale * (2 * normal.log_prob(ratio).exp() + ratio * (2 * normal.cdf(ratio) - 1)))


def mean_kernel(shift, scale, width):
    """E exp(-x^2 / (2 width^2)) of x ~ N(shift, scale^2)."""
    total = width**2 + scale**2
    return width / math.sqrt(total) * math.exp(-(shift**2) / (2 * total))


def exact_distance(score, shift):
    """Between N(0, 1) and N(shift, 1), in one dimension."""
    root2 = math.sqrt(2)
    if score.kernel == "energy":
        return 2 * mean_distance(shift, root2) - 2 * mean_distance(0, root2)
    near = [mean_kernel(0, root2, width) for width in score.scales]
    far = [mean_kernel(shift, root2, width) for width in score.scales]
    return 2 * (sum(near) - sum(far)) / len(score.scales)


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("score", [KernelScore(), objective_named("mmd")], ids=["energy", "mmd"])
def test_a_kernel_score_is_unbiased(score, shift):
    """Five points on each side suffice: the mean of 4000 estimates is exact within four standard errors."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 4000, 5, 1, dtype=torch.float64) + torch.tensor([0, shift]).reshape(2, 1, 1, 1)
    estimates = score.mean_of_pairs(x) + score.mean_of_pairs(y) - 2 * score.similarity(x, y).mean((-1, -2))
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - exact_distance(score, shift)) < 4 * error


@pytest.mark.parametrize("score", [KernelScore(), objective_named("mmd")], ids=["energy", "mmd"])
def test_the_objective_is_that_estimate_of_data_and_draws(score):
    program = dgm.Implicit(1, dgm.Normal(1).double(), Shift(0.7).double())
    x = torch.randn(5, 1, dtype=torch.float64)
    torch.manual_seed(0)
    value = score(program, x).value
    torch.manual_seed(0)
    y = program.sample(5)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    k = lambda a, b: float(score.similarity(a.reshape(1, 1), b.reshape(1, 1)))  # noqa: E731
    within = sum(k(y[i], y[j]) for i, j in pairs) / 20
    by_hand = [
        2 * sum(k(x[i], y[j]) for j in range(5)) / 5 - within - sum(k(x[i], x[j]) for j in range(5) if j != i) / 4
        for i in range(5)
    ]
    torch.testing.assert_close(value, torch.tensor(by_hand, dtype=torch.float64))
    assert squared_distance(x, y, score) == pytest.approx(-value.mean().item())


@pytest.mark.parametrize("score", [KernelScore(), objective_named("mmd")], ids=["energy", "mmd"])
def test_the_gradient_of_a_kernel_score_is_unbiased(score):
    program = dgm.Implicit(1, dgm.Normal(1).double(), Shift(0.7).double())
    torch.manual_seed(0)
    gradients = []
    for _ in range(400):
        loss = -score(program, torch.randn(5, 1, dtype=torch.float64)).surrogate.mean()
        gradients.append(torch.autograd.grad(loss, program.generator.shift)[0])
    gradients = torch.stack(gradients)
    slope = (exact_distance(score, 0.7 + 1e-5) - exact_distance(score, 0.7 - 1e-5)) / 2e-5
    assert abs(gradients.mean() - slope) < 4 * gradients.std() / len(gradients) ** 0.5


def test_a_kernel_score_given_a_label_is_proper():
    """E of the score at p(x | y) shifted by s: less 2 E|N(s, 2)| - E|N(0, 2)|, whatever the label."""

    class Place(nn.Module):  # x = z + y + shift
        in_shape, given_shape, num_classes = torch.Size((1,)), torch.Size(), 3

        def __init__(self, shift):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

        def forward(self, z, y):
            return z + y.unsqueeze(-1) + self.shift

    torch.manual_seed(0)
    y = torch.arange(9000) % 3
    x = torch.randn(9000, 1, dtype=torch.float64) + y.unsqueeze(-1)
    for shift in (0.0, 0.5):
        value = KernelScore()(dgm.Implicit(1, dgm.Normal(1).double(), Place(shift)), x, y).value
        exact = mean_distance(0, math.sqrt(2)) - 2 * mean_distance(shift, math.sqrt(2))
        assert abs(value.mean() - exact) < 4 * value.std() / len(value) ** 0.5


def test_a_batch_of_one_has_a_value():
    assert torch.isfinite(KernelScore()(tiny(), torch.randn(1, 3)).value).all()


# -- games -------------------------------------------------------------------------------------------------------------


def gaussian_kl(shift):
    return shift**2 / 2


def quadrature(divergence, shift):
    """D_f(N(shift, 1) || N(0, 1)) by its definition."""
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    p, q = (torch.distributions.Normal(s, 1.0).log_prob(x).exp() for s in (shift, 0.0))
    m = (p + q) / 2
    integrand = {
        "kl": p * (p / q).log(),
        "reverse-kl": q * (q / p).log(),
        "js": p * (p / m).log() + q * (q / m).log(),
        "pearson": (p - q) ** 2 / q,
        "hellinger": (p.sqrt() - q.sqrt()) ** 2,
    }[divergence]
    return torch.trapezoid(integrand, x)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_bound_is_the_divergence_at_the_log_ratio_and_below_it_elsewhere(divergence):
    """By quadrature, in float64; the exact critic of N(s, 1) and N(0, 1) is s x - s^2 / 2."""
    shift = 0.8
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    p, q = (torch.distributions.Normal(s, 1.0).log_prob(x).exp() for s in (shift, 0.0))
    t, conjugate = DIVERGENCES[divergence]

    def bound(critic):
        return torch.trapezoid(p * t(critic) - q * conjugate(critic), x)

    exact, best = quadrature(divergence, shift), shift * x - shift**2 / 2
    torch.testing.assert_close(bound(best), exact, rtol=0, atol=1e-8)
    for other in (best + 0.3, 1.2 * best, 0.5 * best, 0 * best):
        assert bound(other) < exact - 1e-4


@pytest.mark.parametrize("divergence", ["kl", "js", "reverse-kl"])
def test_a_linear_critic_learns_the_density_ratio_of_two_normals(divergence):
    """The slope and offset are known, and the KL: within four standard errors and what 40000 samples leave unknown."""
    shift = 1.0
    torch.manual_seed(0)
    p, q = torch.randn(40_000, 1) + shift, torch.randn(40_000, 1)
    ratio = density_ratio(p, q, nn.Linear(1, 1), divergence=divergence, gradient_steps=1500, batch_size=512, lr=0.02)
    fresh_p, fresh_q = torch.randn(40_000, 1) + shift, torch.randn(40_000, 1)
    exact = shift * fresh_p.squeeze() - shift**2 / 2
    assert (ratio(fresh_p) - exact).abs().mean() < 0.06
    kl, error = ratio.kl(fresh_p)
    assert abs(kl - gaussian_kl(shift)) < 4 * error + 0.02
    bound, error = ratio.bound(fresh_p, fresh_q, "kl")
    assert bound < gaussian_kl(shift) + 4 * error
    assert abs(bound - gaussian_kl(shift)) < 4 * error + 0.01
    value, error = ratio.bound(fresh_p, fresh_q)
    assert abs(value - quadrature(divergence, shift)) < 4 * error + 0.01


def test_a_network_learns_a_density_ratio_that_is_not_linear():
    """KL of N(0, 1) from N(0, 2^2) in two dimensions, 2 (log 2 - 3/8): the plug-in, and the bound below it."""
    torch.manual_seed(0)
    p, q = torch.randn(20_000, 2), 2 * torch.randn(20_000, 2)
    ratio = density_ratio(p, q, gradient_steps=800)
    exact = 2 * (math.log(2) - 3 / 8)
    fresh = torch.randn(20_000, 2)
    kl, error = ratio.kl(fresh)
    assert abs(kl - exact) < 4 * error + 0.03
    bound, error = ratio.bound(fresh, 2 * torch.randn(20_000, 2), "kl")
    assert exact - 0.03 - 4 * error < bound < exact + 4 * error


def test_a_ratio_is_a_function_of_its_seed():
    p, q = torch.randn(50, 2), torch.randn(50, 2)
    a, b, c = (density_ratio(p, q, gradient_steps=5, seed=seed)(p) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def in_game(objective, dims=3):
    critic = nn.Linear(dims, 1).double()
    objective = Adversarial(objective.game, critic, r1=objective.r1, gradient_penalty=objective.gradient_penalty)
    objective.prepare(dgm.Implicit(dims, dgm.Normal(dims).double(), Shift().double()))
    return objective, critic


def test_the_penalties_of_a_linear_critic_by_hand():
    """V(x) = w x + b has the slope |w| everywhere: R1 is r1 |w|^2 / 2, the gradient penalty lambda (|w| - 1)^2."""
    real, fake = torch.randn(2, 7, 3, dtype=torch.float64)
    torch.manual_seed(0)
    for objective in (Adversarial("wasserstein", r1=0.7), Adversarial("wasserstein", r1=0, gradient_penalty=3.0)):
        objective, critic = in_game(objective)
        w = critic.weight.detach().squeeze(0)
        norm = w.norm()
        means = real.mean(0) - fake.mean(0)
        penalty = 0.7 / 2 * norm**2 if objective.r1 else 3 * (norm - 1) ** 2
        slope = 0.7 * w if objective.r1 else 6 * (norm - 1) * w / norm
        loss = objective.critic_loss(real, fake)
        torch.testing.assert_close(loss.detach(), penalty - means @ w, rtol=0, atol=1e-9)
        (gradient,) = torch.autograd.grad(loss, critic.weight)
        torch.testing.assert_close(gradient.squeeze(0), slope - means, rtol=0, atol=1e-9)


class Bowl(nn.Module):
    """V(x) = |x|^2 / 2, whose slope at x is |x|; it keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x):
        self.asked.append(x.detach())
        return 0.5 * x.square().sum(1)


def test_the_gradient_penalty_is_asked_at_uniform_points_between_data_and_samples():
    real, fake = torch.randn(2, 4000, 3, dtype=torch.float64)
    critic = Bowl()
    objective = Adversarial("wasserstein", nn.Linear(3, 1), r1=0.0, gradient_penalty=3.0)
    objective.prepare(dgm.Implicit(3, dgm.Normal(3).double(), Shift().double()))
    objective.critic = critic
    loss = objective.critic_loss(real, fake)
    of_data, of_samples, points = critic.asked
    assert torch.equal(of_data, real)
    assert torch.equal(of_samples, fake)
    shares = (points - fake) / (real - fake)  # one for all features of a datum, its own for each
    torch.testing.assert_close(shares, shares[:, :1].expand_as(shares), rtol=0, atol=1e-6)
    assert stats.kstest(shares[:, 0].numpy(), "uniform").pvalue > 1e-3
    penalty = 3.0 * (points.norm(dim=1) - 1).square().mean()
    distance = (real.square().sum(1) / 2).mean() - (fake.square().sum(1) / 2).mean()
    torch.testing.assert_close(loss, penalty - distance, rtol=0, atol=1e-9)


def test_the_loss_of_the_gan_by_hand():
    """The critic's loss is the cross-entropy of "data or sample?" less log 4; the program's payoff is log sigma(V)."""
    real, fake = torch.randn(2, 7, 3, dtype=torch.float64)
    objective, critic = in_game(Adversarial("gan", r1=0.0))
    logits = torch.cat([critic(real), critic(fake)]).squeeze(-1)
    target = torch.cat([torch.ones(7), torch.zeros(7)]).double()
    entropy = nn.functional.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(objective.critic_loss(real, fake), 2 * entropy - math.log(4))
    program = dgm.Implicit(3, dgm.Normal(3).double(), Shift(0.3).double())
    torch.manual_seed(0)
    value = objective(program, real).value
    torch.manual_seed(0)
    torch.testing.assert_close(value, critic(program.sample(7)).sigmoid().log().squeeze(-1))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_program_descends_what_the_critic_ascends(divergence):
    """The two losses of an f-divergence are the two sides of one number, as functions of the samples."""
    objective, critic = in_game(Adversarial(divergence, r1=0.0))
    program = dgm.Implicit(3, dgm.Normal(3).double(), Shift(0.3).double())
    real = torch.randn(7, 3, dtype=torch.float64)
    grads = []
    for loss in (
        lambda: -objective(program, real).surrogate.mean(),
        lambda: divergence_bound(divergence, critic(real).squeeze(), critic(adversarial.draw(program, 7)).squeeze()),
    ):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(loss(), program.generator.shift)[0])
    torch.testing.assert_close(*grads)


def test_the_critic_is_held_still_while_the_program_moves():
    program, objective = tiny(), Adversarial()
    objective.prepare(program)
    x = torch.randn(8, 3)
    for _ in range(2):
        before = [p.clone() for p in [*program.parameters(), *objective.critic.parameters()]]
        objective.update(program, x, None, 1e-2)
        assert all(torch.equal(a, b) for a, b in zip(before, program.parameters(), strict=False))
        moved = objective.critic.parameters()
        assert any(not torch.equal(a, b) for a, b in zip(before[-8:], moved, strict=False))
        assert all(p.grad is None for p in program.parameters())
        (-objective(program, x).surrogate.mean()).backward()
        assert all(p.grad is not None for p in program.parameters())
        program.zero_grad(set_to_none=True)


# -- training ----------------------------------------------------------------------------------------------------------

NAMES = ["gan", "wgan-gp", "f-gan:kl", "f-gan:reverse-kl", "f-gan:pearson", "f-gan:hellinger", "energy", "mmd"]


@pytest.mark.parametrize("text", NAMES)
def test_a_training_is_reproduced_bit_for_bit(text):
    data = torch.randn(130, 3)
    states, histories = [], []
    for _ in range(2):
        program = tiny()
        histories.append(fitted(program, data, text, epochs=2, seed=5))
        states.append(torch.cat([p.flatten() for p in program.parameters()]))
        torch.randn(1)  # the global random state is not what decides
    assert torch.equal(*states)
    assert histories[0].losses == histories[1].losses
    assert [e.validation for e in histories[0].epochs] == [e.validation for e in histories[1].epochs]
    assert not torch.equal(states[0], torch.cat([p.flatten() for p in tiny().parameters()]))


@pytest.mark.parametrize("text", ["gan", "energy"])
def test_integers_are_compared_in_the_precision_of_the_program(text, float64):
    data, program, values = torch.randint(5, (40, 3)), tiny(levels=5), []
    objective = objective_named(text)
    if isinstance(objective, Adversarial):
        objective = Adversarial(critic=nn.Linear(3, 1))
        objective.prepare(program)
    for default in (torch.float64, torch.float32):
        torch.set_default_dtype(default)
        torch.manual_seed(1)
        values.append(objective(program, data).value)
    assert values[1].dtype == torch.float64
    torch.testing.assert_close(values[1], values[0], rtol=1e-9, atol=1e-9)


def test_every_name_of_a_comparison_is_tested():
    assert {text.partition(":")[0] for text in NAMES} == set(COMPARISONS)
    for make in COMPARISONS.values():
        assert make.__doc__.splitlines()[0].endswith(".")


def test_a_game_is_validated_by_the_energy_distance():
    program = tiny()
    held_out = torch.randn(40, 3)
    history = fitted(program, torch.randn(60, 3), "gan", validation=held_out, seed=2)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        expected = -KernelScore()(program, held_out).value.mean()
    assert history.epochs[0].validation == pytest.approx(expected.item(), rel=1e-5)
    assert set(history.epochs[0].reconstruction) == {"x"}
    assert set(history.epochs[0].kl) == {"critic"}


@pytest.mark.parametrize("text", ["gan", "energy", "mmd"])
def test_a_class_conditional_generator_learns_its_classes(text):
    """Three points far apart, one per label: the mean of each within 0.4."""
    torch.manual_seed(0)
    y = torch.arange(600) % 3
    places = torch.tensor([[-2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    data = dgm.Data(places[y] + 0.2 * torch.randn(600, 2), y)
    program = dgm.Implicit(2, dgm.Normal(2), MLP((2,), 2, hidden=(32, 32), num_classes=3))
    critic = MLP((2,), 1, hidden=(32, 32), num_classes=3)
    objective = Adversarial(critic=critic) if text == "gan" else text
    fitted(program, data, objective, epochs=40, lr=5e-3, batch_size=100)
    for label in range(3):
        x = program.sample(500, given=torch.tensor([label]))
        assert (x.mean(0) - places[label]).abs().max() < 0.4


@pytest.mark.parametrize("text", ["energy", "mmd"])
def test_any_program_that_draws_with_a_gradient_can_be_trained(text):
    """A Normal, whose mean and scale are known: by samples alone."""
    torch.manual_seed(0)
    data = 3 + 0.5 * torch.randn(2000, 1)
    program = dgm.Normal(1, learned=True)
    fitted(program, data, text, epochs=20, lr=0.1, batch_size=200)
    fitted_normal = program()
    assert abs(fitted_normal.mean.item() - 3) < 0.15
    assert abs(fitted_normal.stddev.item() - 0.5) < 0.15


# -- judging samples ---------------------------------------------------------------------------------------------------


def test_coverage_of_the_data_themselves():
    """A Normal of the plane has 1 - exp(-9 / 2) within three standard deviations."""
    torch.manual_seed(0)
    x = RING[torch.arange(20_000) % 8] + 0.1 * torch.randn(20_000, 2)
    modes, share = implicit.mode_coverage(x, RING, 0.1)
    assert modes == 8
    exact = 1 - math.exp(-4.5)
    assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / len(x))
    assert implicit.mode_coverage(x[torch.arange(20_000) % 8 < 5], RING, 0.1)[0] == 5
    assert implicit.mode_coverage(torch.zeros(100, 2), RING, 0.1) == (0, 0.0)


def test_parzen_is_the_density_of_the_mixture():
    torch.manual_seed(0)
    samples, x = torch.randn(2, 5, 3, dtype=torch.float64)
    exact = torch.stack([torch.distributions.Normal(s, 0.3).log_prob(x).sum(-1) for s in samples]).logsumexp(0)
    torch.testing.assert_close(implicit.parzen(samples, x, 0.3), exact - math.log(5))


def test_evidence_of_the_noisy_model_by_annealing():
    """A noisy linear generator has p(x) Normal, W W^T + s^2 I: AIS within four standard errors, and Parzen below it."""
    torch.manual_seed(0)
    linear = nn.Linear(2, 3)
    program = dgm.Implicit(3, dgm.Normal(2), linear)
    model = implicit.noisy(program, 0.5)
    covariance = linear.weight @ linear.weight.T + 0.25 * torch.eye(3)
    truth = torch.distributions.MultivariateNormal(linear.bias, covariance)
    x = truth.sample((20,)).detach()
    exact = truth.log_prob(x).detach()
    found = dgm.infer.ais(model, x, num_chains=16, num_temperatures=100)
    log_p = found.log_weights.logsumexp(0) - math.log(16)
    error = (found.log_weights - log_p).exp().std(0) / 4
    assert ((log_p - exact).abs() < 4 * error + 1e-3).all()
    by_samples = implicit.parzen(program.sample(20_000), x, 0.5)
    torch.testing.assert_close(by_samples.float(), exact, rtol=0, atol=0.25)


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("centers", "steps", "r1", "units"),
    [
        pytest.param(RING, 2880, 0.003, 64, id="ring"),
        pytest.param(GRID, 8190, 0.0005, 96, id="grid", marks=pytest.mark.nightly),
    ],
)
def test_every_mode_is_covered(centers, steps, r1, units):
    """All eight modes of the ring, all 16 of the grid, and 90 % of the samples within three standard deviations."""
    torch.manual_seed(0)
    x = centers[torch.arange(500 * len(centers)) % len(centers)] + 0.1 * torch.randn(500 * len(centers), 2)
    program = dgm.Implicit(2, dgm.Normal(2), MLP((2,), 2, hidden=(units, units), activation="tanh"))
    critic = MLP((2,), 1, hidden=(units, units), activation="relu")
    game = Adversarial(critic=critic, r1=r1, critic_lr=0.5)
    epochs = steps // math.ceil(len(x) / 128)
    fitted(program, x, game, epochs=epochs, batch_size=128, lr=5e-3, ema=0.99, validation=None)
    torch.manual_seed(1)
    modes, share = implicit.mode_coverage(program.sample(5000), centers, 0.1)
    assert modes == len(centers)
    assert share > 0.9


def test_digits_by_name():
    data = dgm.data.load("digits")
    program = dgm.build("implicit", data)
    fitted(program, data[:200], "gan")
    program.check(program.sample(5))
    assert program.event_shape == (1, 8, 8)
