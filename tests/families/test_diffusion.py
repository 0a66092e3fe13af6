"""Diffusion: the equations one by one, then the whole against data whose exact denoiser is known.

For Gaussian data N(m, S) the best denoiser is linear, so that the model's chain is linear-Gaussian: every moment,
evidence and flow has a closed form. Statistical tests are seeded; z-scores are held to 4.5 standard errors.
"""

import itertools
import math

import pyro.infer
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import denoised_normal, jittered, log_joint
from pyro import poutine
from scipy import stats
from torch import nn
from torch.distributions import Categorical, MultivariateNormal, Normal, kl_divergence

import dgm_pyro as dgm
from dgm_pyro.families.diffusion import SCHEDULES, Denoised, _Shift
from dgm_pyro.networks import MLP, DenoisingMLP, DenoisingUNet
from dgm_pyro.objectives import DenoisingLoss, EDMWeight, elbo, objective_named
from dgm_pyro.program import seeded

pytestmark = pytest.mark.usefixtures("float64")


class GaussianDenoiser(nn.Module):
    """E[x_0 | x_t] for data N(mean, cov), told t / T."""

    def __init__(self, schedule, mean, cov):
        super().__init__()
        self.noise_schedule, self.mean, self.cov = schedule, mean, cov

    def forward(self, x, t):
        index = (t * self.noise_schedule.num_steps).round().long()
        alpha, sigma = self.noise_schedule.alpha[index, None], self.noise_schedule.sigma[index, None]
        return denoised_normal(x, alpha, sigma, self.mean, self.cov)


class Constant(nn.Module):
    """A network that predicts what it was told to, whatever it sees."""

    def __init__(self, prediction, num_classes=None):
        super().__init__()
        self.prediction = prediction

    def forward(self, x, t):
        return self.prediction.expand(len(x), *self.prediction.shape[1:])


def gaussian(schedule, mean, cov, *, doubt=True, **options):
    """A diffusion with the exact denoiser of N(mean, cov), its v the variances of p(x_0 | x_t), or 0 but for t = 1."""
    schedule = SCHEDULES[schedule[0]](*schedule[1:])
    program = dgm.Diffusion(len(mean), GaussianDenoiser(schedule, mean, cov), schedule, predict="x0", **options)
    with torch.no_grad():
        for t in range(1, schedule.num_steps + 1):
            noise = (schedule.sigma[t] / schedule.alpha[t]) ** 2 * torch.eye(len(mean))
            variance = (cov - cov @ torch.linalg.solve(cov + noise, cov)).diagonal()
            program.raw_scale[t - 1] = variance.sqrt().expm1().log() if doubt or t == 1 else -math.inf
    return program.eval()


def small(shape=2, num_steps=6, *, levels=None, seed=0, **options):
    """A diffusion with random weights."""
    event_shape = (shape,) if isinstance(shape, int) else shape
    network = {name: options.pop(name) for name in ("num_classes", "given_shape") if name in options}
    num_parameters = levels if options.get("predict") == "levels" else 1
    torch.manual_seed(seed)
    denoiser = DenoisingMLP(event_shape, (12, 12), num_parameters=num_parameters, **network)
    return jittered(dgm.Diffusion(shape, denoiser, levels=levels, num_steps=num_steps, **options), 0.2)


def times(program):
    return torch.arange(1, program.num_steps + 1)


def assert_mean(values, expected=0.0, sigmas=4.5):
    error = values.std() / len(values) ** 0.5
    z = (values.mean() - expected).item() / (error.item() + 1e-12)
    assert abs(z) < sigmas, f"mean {values.mean():.5f} is {z:.1f} standard errors from {float(expected):.5f}"


# -- schedules ---------------------------------------------------------------------------------------------------------


@given(name=st.sampled_from(sorted(SCHEDULES)), steps=st.integers(1, 2000))
def test_named_schedules_lose_the_signal_step_by_step_and_end_in_noise(name, steps):
    schedule = SCHEDULES[name](steps)
    assert schedule.num_steps == steps
    alpha, sigma = schedule.alpha, schedule.sigma
    assert len(alpha) == steps + 1
    assert alpha[0] == 1
    assert sigma[0] == 0
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-12)
    log_snr = alpha[1:].log() - sigma[1:].log()
    assert (log_snr.diff() < 0).all()
    assert alpha[-1] ** 2 < 0.003
    for constant in (schedule.from_clean, schedule.from_noisy, schedule.spread):
        assert torch.isfinite(constant).all()
        assert (constant >= 0).all()


@given(name=st.sampled_from(sorted(SCHEDULES)), steps=st.integers(1, 2000))
def test_named_schedules_survive_single_precision(name, steps):
    torch.set_default_dtype(torch.float32)
    try:
        schedule = SCHEDULES[name](steps)
    finally:
        torch.set_default_dtype(torch.float64)
    for buffer in schedule.buffers():
        assert buffer.dtype == torch.float32
        assert torch.isfinite(buffer).all()
    assert (schedule.alpha.diff() <= 0).all()
    assert (schedule.sigma[1:] > 0).all()


@pytest.mark.parametrize(
    ("alpha_bar", "message"),
    [
        ([], "non-empty"),
        ([[0.9, 0.5]], r"non-empty sequence, got shape \(1, 2\)"),
        ([0.9, 0.9], "fall at every step.*t=2"),
        ([0.9, 0.5, 0.6], "fall at every step.*t=3"),
        ([1.0, 0.5], "strictly between 0 and 1"),
        ([0.9, 0.0], "strictly between 0 and 1"),
        ([0.9, -0.1], "strictly between 0 and 1"),
        ([float("nan")], "strictly between 0 and 1"),
    ],
)
def test_a_schedule_that_is_none_is_refused(alpha_bar, message):
    with pytest.raises(ValueError, match=message):
        dgm.Schedule(alpha_bar)


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, "10"])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_need_a_number_of_steps(name, steps):
    with pytest.raises(ValueError, match="num_steps must be a positive int"):
        SCHEDULES[name](steps)


# -- the equations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_noising_composes_the_single_steps(name):
    """q(x_t | x_0) is what t steps N(sqrt(1 - beta) x, beta) make of x_0."""
    program = small(3, 30, noise_schedule=name)
    schedule, x0 = program.noise_schedule, torch.randn(3)
    beta = 1 - (schedule.alpha[1:] / schedule.alpha[:-1]) ** 2
    mean, variance = x0, torch.zeros(())
    q = program.noised(x0.expand(30, 3), times(program)).base_dist
    for t in range(30):
        mean, variance = (1 - beta[t]).sqrt() * mean, (1 - beta[t]) * variance + beta[t]
        torch.testing.assert_close(q.mean[t], mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(q.variance[t], variance.expand(3), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_noising_backwards_has_the_same_marginals(name):
    """q(x_T | x_0) prod q(x_{t-1} | x_t, x_0), the unrolled guide, has the marginals q(x_t | x_0)."""
    program = small(1, 30, noise_schedule=name)
    x0 = torch.full((1, 1), 0.7)
    q = program.noised(x0, torch.tensor([30])).base_dist
    mean, variance = q.mean, q.variance
    for t in range(30, 1, -1):
        at = torch.tensor([t])
        back = program.reverse(mean, at, x0).base_dist
        slope = program.reverse(mean + 1, at, x0).mean - back.mean
        mean, variance = back.mean, slope**2 * variance + back.variance
        q = program.noised(x0, at - 1).base_dist
        torch.testing.assert_close(mean, q.mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(variance, q.variance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("t", [2, 3, 7, 12])
def test_one_step_back_is_bayes_rule(t):
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0), on a grid."""
    program = small(1, 12, noise_schedule="linear")
    alpha, sigma = program.noise_schedule.alpha, program.noise_schedule.sigma
    x0, x_t = torch.tensor([[0.8]]), torch.tensor([[-0.4]])
    forward = alpha[t] / alpha[t - 1]
    posterior = program.reverse(x_t, torch.tensor([t]), x0).base_dist
    grid = posterior.mean.item() + posterior.stddev.item() * torch.linspace(-8, 8, 4001)
    log_q = Normal(forward * grid, (1 - forward**2).sqrt()).log_prob(x_t.squeeze())
    log_q = log_q + Normal(alpha[t - 1] * 0.8, sigma[t - 1]).log_prob(grid)
    log_q = log_q - log_q.logsumexp(0) - (grid[1] - grid[0]).log()
    torch.testing.assert_close(posterior.log_prob(grid[None]).squeeze(), log_q, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("t", [2, 3, 12])
def test_the_models_step_back_averages_over_what_x_0_may_be(t):
    """p(x_{t-1} | x_t) is the integral of q(x_{t-1} | x_t, x_0) N(x_0; x_0_hat, v), on a grid."""
    program = small(1, 12, noise_schedule="linear")
    x_t, at = torch.tensor([[-0.4]]), torch.tensor([t])
    clean = 0.3 + 0.6 * torch.linspace(-10, 10, 4001)
    prior = Normal(0.3, 0.6).log_prob(clean) + (clean[1] - clean[0]).log()
    modeled = program.reverse(x_t, at, Denoised(torch.tensor([[0.3]]), torch.tensor([[0.36]]))).base_dist
    grid = modeled.mean.item() + modeled.stddev.item() * torch.linspace(-4, 4, 9)
    steps = program.reverse(x_t.expand(4001, 1), at.expand(4001), clean.unsqueeze(-1)).base_dist
    expected = (steps.log_prob(grid) + prior.unsqueeze(-1)).logsumexp(0)
    torch.testing.assert_close(modeled.log_prob(grid).squeeze(0), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_terms_of_the_bound_are_the_divergences_they_stand_for(name):
    program = small((1, 2, 2), 20, noise_schedule=name, subsample=20)
    x, x_t, t = torch.randn(3, 1, 2, 2), torch.randn(20, 3, 1, 2, 2), times(program).unsqueeze(-1).expand(20, 3)
    with dgm.program.batch_plates((3,)), poutine.trace() as traced:
        poutine.condition(program.joint, data={"x_t": x_t})("x", x)
    traced.trace.compute_log_prob()
    stated = {name: site["log_prob"] for name, site in traced.trace.nodes.items() if site["type"] == "sample"}
    denoised = program.denoise(x_t, t)

    # KL(N(a, s^2) || N(b, r^2)) = log(r / s) + (s^2 + (a - b)^2) / (2 r^2) - 1 / 2
    alpha, sigma = (getattr(program.noise_schedule, scale).reshape(-1, 1, 1, 1, 1) for scale in ("alpha", "sigma"))
    beta = 1 - (alpha[2:] / alpha[1:-1]) ** 2
    s2 = beta * (sigma[1:-1] / sigma[2:]) ** 2
    clean = alpha[1:-1] * beta / sigma[2:] ** 2
    r2 = s2 + clean**2 * denoised.variance[1:]
    kl = 0.5 * (r2 / s2).log() + (s2 + (clean * (x - denoised.x0[1:])) ** 2) / (2 * r2) - 0.5
    torch.testing.assert_close(stated["x_kl"][1:], -kl.sum((2, 3, 4)), rtol=1e-7, atol=1e-10)
    assert (stated["x_kl"][0] == 0).all()

    last = program.likelihood(Denoised(denoised.x0[0], denoised.variance[0])).log_prob(x)
    torch.testing.assert_close(stated["x_likelihood"][0], last)
    assert (stated["x_likelihood"][1:] == 0).all()

    q = program.noised(x, torch.full((3,), 20)).base_dist
    to_prior = kl_divergence(q, Normal(torch.zeros_like(x), torch.ones_like(x))).sum((1, 2, 3))
    torch.testing.assert_close(stated["x_T_kl"], -to_prior, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(program.prior_kl(x), to_prior, rtol=1e-9, atol=1e-12)


def test_all_predictions_of_one_clean_x_agree():
    schedule = dgm.Schedule([0.9, 0.5, 0.2, 0.01])
    x0, noise, t = torch.randn(4, 3), torch.randn(4, 3), torch.arange(1, 5)
    alpha, sigma = schedule.alpha[1:, None], schedule.sigma[1:, None]
    x_t = alpha * x0 + sigma * noise
    # Karras et al. 2022, table 1, on y = x_t / alpha with noise of scale sigma / alpha, for data of scale 0.3.
    y, scale = x_t / alpha, sigma / alpha
    c_skip, c_out = 0.09 / (scale**2 + 0.09), scale * 0.3 / (scale**2 + 0.09).sqrt()
    predictions = {"x0": x0, "noise": noise, "v": alpha * noise - sigma * x0, "edm": (x0 - c_skip * y) / c_out}
    for predict, prediction in predictions.items():
        options = {"sigma_data": 0.3} if predict == "edm" else {}
        program = dgm.Diffusion(3, Constant(prediction), schedule, predict=predict, **options)
        torch.testing.assert_close(program.denoise(x_t, t).x0, x0, rtol=1e-9, atol=1e-12)
    v = dgm.Diffusion(3, Constant(-predictions["v"]), schedule, predict="edm", sigma_data=1.0)
    torch.testing.assert_close(v.denoise(x_t, t).x0, x0, rtol=1e-9, atol=1e-12)


def assert_preconditioned(program, t, s):
    """For x_0 of variance s^2, c_in x_t and (x_0 - c_skip x_t) / c_out have unit variance, and are uncorrelated."""
    alpha, sigma = (level.flatten() for level in program.noise_at(t))
    c_in, c_skip, c_out = (each.flatten() for each in program.preconditioning(t))
    one = torch.ones_like(alpha)
    torch.testing.assert_close(c_in**2 * (alpha**2 * s**2 + sigma**2), one, rtol=1e-9, atol=0)
    of_x0, of_noise = (1 - c_skip * alpha) / c_out, -c_skip * sigma / c_out
    torch.testing.assert_close(of_x0**2 * s**2 + of_noise**2, one, rtol=1e-6, atol=0)
    torch.testing.assert_close(of_x0 * alpha * s**2 + of_noise * sigma, 0 * one, rtol=0, atol=1e-6)
    torch.testing.assert_close(c_in * (alpha * one), (sigma**2 / alpha**2 + s**2) ** -0.5)  # table 1, on x_t / alpha


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_what_edm_sees_and_predicts_has_unit_variance_at_every_time(name):
    program = small(noise_schedule=name, num_steps=30, predict="edm", sigma_data=0.3)
    assert_preconditioned(program, times(program), 0.3)
    c_noise = program.noise_schedule.log_snr[1:] / -8
    told = program.clock(times(program))
    torch.testing.assert_close(told[[0, -1]], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(told * (c_noise[-1] - c_noise[0]) + c_noise[0], c_noise, rtol=1e-9, atol=1e-9)


class Predicting(nn.Module):
    """The exact x_0 as another prediction: `edm` sees c_in x_t."""

    def __init__(self, exact, predict):
        super().__init__()
        self.exact, self.predict = exact, predict
        self.program = []  # in a list, as it contains this network

    def forward(self, x, clock):
        (program,) = self.program
        fallen = program.noise_schedule.log_snr[1] - program.noise_schedule.log_snr
        told = fallen / fallen[-1] if self.predict == "edm" else torch.arange(program.num_steps + 1) / program.num_steps
        t = 1 + (told[1:] - clock.unsqueeze(-1)).abs().argmin(-1)
        alpha, sigma = program.noise_at(t)
        c_in, c_skip, c_out = program.preconditioning(t)
        x_t = x / c_in if self.predict == "edm" else x
        x0 = self.exact(x_t, t / program.num_steps)
        return {
            "x0": x0,
            "noise": (x_t - alpha * x0) / sigma,
            "v": (alpha * x_t - x0) / sigma,
            "edm": (x0 - c_skip * x_t) / c_out,
        }[self.predict]


@pytest.mark.parametrize("predict", ["noise", "v", "edm"])
def test_the_exact_denoiser_has_one_bound_under_every_prediction(predict):
    mean, cov = torch.tensor([0.6, -1.2]), torch.tensor([[0.6, -0.3], [-0.3, 0.5]])
    expected = gaussian(("log-snr", 12), mean, cov)
    network = Predicting(expected.denoiser, predict)
    program = dgm.Diffusion(2, network, expected.noise_schedule, predict=predict).eval()
    network.program.append(program)
    program.raw_scale = expected.raw_scale
    x, bounds = torch.randn(20, 2), []
    for each in (expected, program):
        torch.manual_seed(0)
        bounds.append(elbo(each, x).value)
    torch.testing.assert_close(*bounds)


# -- weighted errors ---------------------------------------------------------------------------------------------------

# By hand: of the squared errors of the noise and of x_0, ``(T, B)``, and the signal-to-noise ratio.
WEIGHTED = {
    "simple": (
        r"-E_{t, \epsilon} [\|\epsilon - \hat\epsilon\|^2] \quad (\mathrm{no\ bound})",
        lambda noise, x0, snr: noise,
    ),
    "min-snr:3": (
        r"-E_{t, \epsilon} [\min(\mathrm{SNR}(t), 3) \, \|x - \hat x\|^2] \quad (\mathrm{no\ bound})",
        lambda noise, x0, snr: snr.clamp(max=3) * x0,
    ),
}


@pytest.mark.parametrize("predict", ["noise", "x0", "v", "edm"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weighted_error_and_its_gradient_are_those_by_hand(name, predict):
    formula, by_hand = WEIGHTED[name]
    program, objective = small(2, 6, predict=predict, subsample=6), objective_named(name)
    assert objective.formula == formula
    x, t = torch.randn(5, 2), times(program).unsqueeze(-1).expand(6, 5)
    torch.manual_seed(0)
    found = objective(program, x)
    torch.manual_seed(0)
    bound = elbo(program, x).value
    torch.manual_seed(0)
    noise = torch.randn(6, 5, 2)
    alpha, sigma = program.noise_at(t)
    x_t = alpha * x + sigma * noise
    x0 = program.denoise(x_t, t).x0
    errors = ((noise - (x_t - alpha * x0) / sigma).square().sum(-1), (x - x0).square().sum(-1))
    expected = -by_hand(*errors, (alpha / sigma).square().squeeze(-1)).mean(0)
    torch.testing.assert_close(found.value, expected)
    denoiser = [*program.denoiser.parameters()]
    ours, hand = (torch.autograd.grad(v.sum(), denoiser, retain_graph=True) for v in (found.surrogate, expected))
    torch.testing.assert_close(ours, hand)
    # v learns from the bound.
    ours, hand = (torch.autograd.grad(v.sum(), program.raw_scale) for v in (found.surrogate, bound))
    torch.testing.assert_close(ours, hand)


def test_the_weight_of_edm_is_that_of_the_papers_loss():
    """Karras et al. 2022, eq. 8: lambda(sigma) |D(y) - x_0|^2, ln sigma drawn from N(-1.2, 1.2^2), by quadrature."""
    log_sigma = torch.linspace(-8, 5, 4001)
    sigma = log_sigma.exp()
    error = sigma**2 / (1 + sigma)  # of some denoiser
    weight = (sigma**2 + 0.3**2) / (sigma * 0.3) ** 2
    expected = (Normal(-1.2, 1.2).log_prob(log_sigma).exp() * weight * error).sum() * (log_sigma[1] - log_sigma[0])
    log_snr = -2 * log_sigma  # falls at the rate `fall` in a time that runs from 0 to 1
    fall = (log_snr[0] - log_snr[-1]).expand(4001)
    stated = 0.5 * fall * log_snr.exp() * EDMWeight(0.3)(log_snr, fall) * error
    torch.testing.assert_close(stated.mean(), expected, rtol=1e-3, atol=0)
    assert "0.3^{-2}" in EDMWeight(0.3).formula


def test_the_weight_of_edm_is_for_the_scale_of_the_program():
    """By name it is the error of that program's network; a number of one's own stays."""
    x, found = torch.randn(5, 2), {}
    for objective in ("edm", "edm:0.3", "edm:0.5"):
        torch.manual_seed(0)
        found[objective] = objective_named(objective)(small(2, 6, predict="edm", sigma_data=0.3, subsample=6), x).value
    torch.testing.assert_close(found["edm"], found["edm:0.3"], rtol=0, atol=0)
    assert not torch.allclose(found["edm"], found["edm:0.5"])
    with pytest.raises(ValueError, match="sigma_data is for predict='edm' alone: leave it out for 'v'"):
        small(predict="v", sigma_data=0.3)


def test_weight_one_is_the_bound_where_nothing_is_left_uncertain():
    """With v = 0 each divergence is the squared error, times half the step's fall in signal-to-noise ratio."""
    program = small(2, 6, subsample=3)
    with torch.no_grad():
        program.raw_scale[1:] = -math.inf
    x = torch.randn(50, 2)
    torch.manual_seed(0)
    bound = elbo(program, x)
    first = program.noise_schedule.log_snr[1]
    torch.manual_seed(0)
    found = DenoisingLoss(lambda log_snr, fall: (log_snr < first) * 1.0)(program, x)
    torch.testing.assert_close(found.value, -bound.kl["x_kl"])


def test_importance_sampled_times_have_the_same_weighted_error():
    program = uneven(subsample=2).eval()
    x = torch.randn(1, 2).expand(20000, 2)
    with torch.no_grad():
        sampled = objective_named("simple")(program, x).value
        program.subsample = program.num_steps
        assert_mean(sampled - objective_named("simple")(program, x).value)


def test_training_by_a_weighted_error_is_judged_by_the_bound():
    torch.set_default_dtype(torch.float32)
    data = dgm.data.load("moons", num_data=200)
    program = small(2, 10, predict="edm", subsample=10).float()
    history = dgm.fit(program, data, "simple", epochs=1, lr=1e-2, validation=data, progress=False)
    assert (history.unit, history.validation_unit) == ("weighted squared error, no bound", "nats per datum")
    with seeded(0, torch.device("cpu")), torch.no_grad():
        bound = dgm.ELBO()(program.eval(), data.x).value.mean()
    assert history.epochs[0].validation == pytest.approx(-bound.item(), rel=1e-5)
    found = dgm.evaluate(program, data, num_samples=1, seed=0)
    assert (found.kind, found.measure) == ("elbo", "density")
    assert abs(found.nats - bound.item()) < 4.5 * found.stderr


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(levels=5, predict="levels"), "predicts levels: build it with predict='v' or 'edm'"),
        (lambda: small().unroll(), "error of a denoiser of x, but UnrolledDiffusion has none.*'elbo'"),
        (
            lambda: dgm.VAE(small(), dgm.Normal(2, MLP((2,), 4)), dgm.Normal(2, MLP((2,), 4))),
            "but VAE has none: use it for a Diffusion",
        ),
    ],
)
def test_a_weighted_error_that_is_not_stated_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        objective_named("simple")(make(), torch.zeros(3, 2))


def test_predicted_levels_meet_the_noise_by_bayes_rule():
    """p(x_0 | x_t) is proportional to prior(x_0) q(x_t | x_0), summed over the levels by hand."""
    program = small((1, 2), 4, levels=5, predict="levels").eval()
    x_t, t = torch.randn(4, 1, 2), times(program)
    denoised = program.denoise(x_t, t)
    prior = program.denoiser(x_t, t / 4).softmax(1)
    for i in range(4):
        for d in range(2):
            grid = torch.arange(5) / 2 - 1
            noise = Normal(program.noise_schedule.alpha[i + 1] * grid, program.noise_schedule.sigma[i + 1])
            weights = prior[i, :, 0, d] * noise.log_prob(x_t[i, 0, d]).exp()
            weights = weights / weights.sum()
            torch.testing.assert_close(denoised.logits[i, 0, d].softmax(-1), weights, rtol=1e-9, atol=1e-12)
            mean = (weights * grid).sum()
            torch.testing.assert_close(denoised.x0[i, 0, d], mean, rtol=1e-9, atol=1e-12)
            variance = (weights * grid**2).sum() - mean**2
            torch.testing.assert_close(denoised.variance[i, 0, d], variance, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("predict", ["v", "levels"])
def test_the_last_step_is_a_mass_on_the_integers(predict):
    program = small(3, levels=17, predict=predict)
    denoised = program.denoise(3 * torch.randn(50, 3), torch.ones(50, dtype=torch.long))
    levels = torch.arange(17).reshape(-1, 1, 1).expand(17, 50, 3)
    mass = program.likelihood(denoised).base_dist.log_prob(levels).exp().sum(0)
    torch.testing.assert_close(mass, torch.ones(50, 3), rtol=0, atol=1e-12)


def test_the_last_steps_variance_is_what_the_denoiser_says():
    """Mean and variance of the discretized logistic on a fine grid; a logistic of scale 1 would have pi^2 / 3."""
    program = small(1, levels=1001)
    levels = torch.arange(1001).unsqueeze(-1)
    grid = program.clean(levels).squeeze(-1)
    mass = program.likelihood(Denoised(torch.tensor([[0.1]]), torch.tensor([[0.05**2]]))).log_prob(levels).exp()
    mean = (mass * grid).sum()
    torch.testing.assert_close(mean, torch.tensor(0.1), rtol=1e-4, atol=0)
    torch.testing.assert_close((mass * (grid - mean) ** 2).sum(), torch.tensor(0.05**2), rtol=1e-3, atol=0)


# -- two forms, one model ----------------------------------------------------------------------------------------------


PAIRS = {
    "one time of six": {"subsample": 1},
    "three times": {"subsample": 3},
    "four times, unevenly spread": {"subsample": 4},
    "all times": {"subsample": 6},
    "a single step": {"num_steps": 1},
    "noise": {"predict": "noise", "noise_schedule": "linear"},
    "x0": {"predict": "x0", "noise_schedule": "log-snr", "subsample": 2},
    "integers": {"levels": 5, "subsample": 2},
    "levels": {"levels": 5, "predict": "levels", "subsample": 2},
    "images": {"shape": (1, 2, 1)},
}


def test_a_chain_embeds_each_of_its_times_once(float64):
    """However many data: the embedding depends on the time alone."""
    program, rows = small(num_steps=4), []
    program.denoiser.time.register_forward_hook(lambda _, args, output: rows.append(len(output)))
    program.unroll().log_weights(torch.randn(7, 2), num_particles=3)
    program.sample(7)
    assert rows == [1] * 8


@pytest.mark.parametrize("options", PAIRS.values(), ids=PAIRS)
def test_plated_and_unrolled_forms_state_one_bound(options):
    program = small(**options).eval()
    x = torch.randint(5, (1, *program.event_shape)) if program.levels else torch.randn(1, *program.event_shape)
    n = 20000
    x = x.expand(n, *program.event_shape)
    with torch.no_grad():
        plated, unrolled = elbo(program, x).value, elbo(program.unroll(), x).value
        sampled = elbo(program.unroll(), x, analytic_kl=False).value
    assert_mean(plated - unrolled)
    assert_mean(sampled - unrolled)


def test_both_forms_have_one_gradient():
    program = small(subsample=2, num_steps=4).eval()
    x = torch.randn(1, 2).expand(500, 2)
    gradients = {}
    for name, form in (("plated", program), ("unrolled", program.unroll())):
        gradients[name] = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(elbo(form, x).value.mean(), [*form.parameters()])])
                for _ in range(40)
            ]
        )
    difference = gradients["plated"] - gradients["unrolled"]
    z = difference.mean(0) / (difference.std(0) / 40**0.5 + 1e-9)
    assert z.abs().max() < 6  # the largest of some 600, from 40 draws
    assert z.std() < 1.3


def test_pyros_own_elbo_sees_the_same_bound():
    program = small(subsample=2, levels=4).eval()
    x = torch.randint(4, (1, 2)).expand(1000, 2)
    draws = [pyro.infer.Trace_ELBO().loss(program.model, program.guide, x) / 1000 for _ in range(30)]
    with torch.no_grad():
        unrolled = elbo(program.unroll(), x.repeat(20, 1)).value
    assert_mean(torch.tensor(draws) + unrolled.mean())


@pytest.mark.parametrize("options", [{"subsample": 1}, {"subsample": 6}], ids=str)
def test_as_a_prior_it_states_one_bound_under_particles_too(options):
    """Latent diffusion: particles, the data and time are three plates."""
    vae = dgm.VAE(
        small(2, **options), dgm.Normal(3, MLP((2,), 6, hidden=(5,))), dgm.Normal(2, MLP((3,), 4, hidden=(5,)))
    ).eval()
    x = torch.randn(1, 3).expand(4000, 3)
    with torch.no_grad():
        single = elbo(vae, x).value
        particles = elbo(vae, x, batch=(3, 4000)).value
        unrolled = elbo(vae.unroll(), x).value
    assert particles.shape == (3, 4000)
    assert_mean(single - unrolled)
    assert_mean(particles.mean(0) - unrolled)
    weights = vae.log_weights(x[:7], num_particles=3)
    assert weights.shape == (3, 7)
    assert vae.sample(4).shape == (4, 3)


def test_labels_enumerated_to_the_left_meet_every_prediction():
    """Under TraceEnum_ELBO the label has a dimension of its own, left of time, particles and data."""
    for options in ({}, {"levels": 4, "predict": "levels"}, {"predict": "noise", "subsample": 3}):
        program = dgm.Labeled(dgm.Categorical((), 3), small(2, num_classes=3, **options)).eval()
        x = torch.randint(4, (1, 2)) if program.levels else torch.randn(1, 2)
        for form in (program, program.unroll()):
            x_many = x.expand(400, 2)
            every = pyro.infer.config_enumerate(form.guide)
            enumerated = [pyro.infer.TraceEnum_ELBO().loss(form.model, every, x_many) for _ in range(12)]
            single = [pyro.infer.Trace_ELBO().loss(form.model, form.guide, x_many) for _ in range(12)]
            assert_mean(torch.tensor(enumerated) - torch.tensor(single))


# -- the evidence of integers, by quadrature ---------------------------------------------------------------------------


@pytest.mark.parametrize("predict", ["v", "levels"])
def test_the_bound_lies_below_the_exact_mass_and_importance_weights_reach_it(predict):
    """One pixel, T = 2: p(x_0) = sum over a grid of p(x_2) p(x_1 | x_2) p(x_0 | x_1)."""
    program = small(1, 2, levels=4, predict=predict, noise_schedule=dgm.Schedule([0.6, 0.1])).eval()
    grid = torch.linspace(-9, 9, 601).unsqueeze(-1)
    width = (grid[1] - grid[0]).log().item()
    two, one = torch.full((601,), 2), torch.full((601,), 1)
    with torch.no_grad():
        x1_given_x2 = program.reverse(grid, two, program.denoise(grid, two)).base_dist  # rows x_2, columns x_1
        log_p1 = (Normal(0, 1).log_prob(grid) + x1_given_x2.log_prob(grid.T)).logsumexp(0) + width
        levels = torch.arange(4).reshape(4, 1, 1).expand(4, 601, 1)
        log_p0 = program.likelihood(program.denoise(grid, one)).log_prob(levels)
        exact = (log_p1 + log_p0).logsumexp(1) + width
        torch.testing.assert_close(exact.exp().sum(), torch.tensor(1.0), rtol=0, atol=1e-6)
        x = torch.arange(4).unsqueeze(-1)
        weights = program.log_weights(x, num_particles=30_000)
    bound = weights.mean(0)
    assert (bound < exact).all()
    ratio = (weights - exact).exp()
    for level in range(4):
        assert_mean(ratio[:, level], 1.0)
    # Two draws are better than one, and 30 better than two.
    by_two, by_thirty = (weights.reshape(-1, k, 4).logsumexp(1).mean(0) - math.log(k) for k in (2, 30))
    assert (bound < by_two).all()
    assert (by_two < by_thirty).all()


# -- Gaussian data, where everything is known --------------------------------------------------------------------------


def expected_elbo(program, mean, scale):
    """E over x_0 ~ N(mean, scale^2) and q of the bound, exactly: it is quadratic in each, so that +-1 sd suffice."""
    total = []
    for x0 in (mean - scale, mean + scale):
        for sign in (-1, 1):
            t, x0_t = times(program), x0.expand(program.num_steps, 1, 1)
            q = program.noised(x0_t, t.unsqueeze(-1))
            x_t = q.mean + sign * q.variance.sqrt()
            log_p, log_q = log_joint(program, x0.reshape(1, 1), None, {"x_t": x_t})
            total.append((log_p - log_q).item())
    return sum(total) / 4


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_with_the_exact_denoiser_of_a_gaussian_every_draw_is_the_evidence(steps):
    """With v the variance of p(x_0 | x_t) the chain is the true one backwards: no gap and no noise, at any T."""
    mean, scale = torch.tensor([0.6, -2.0]), torch.tensor([0.7, 1.5])
    program = gaussian(("log-snr", steps, 6.0, -30.0), mean, torch.diag(scale**2))
    x = mean + 3 * torch.randn(5, 2)
    exact = Normal(mean, scale).log_prob(x).sum(-1)
    weights = program.log_weights(x, num_particles=10)
    torch.testing.assert_close(weights, exact.expand(10, 5), rtol=0, atol=1e-4)


def test_without_doubt_about_x_0_the_bound_tends_to_the_evidence_at_first_order():
    mean, scale = torch.tensor([0.6]), torch.tensor([0.7])
    evidence = -0.5 * math.log(2 * math.pi * math.e * scale.item() ** 2)
    steps = [16, 32, 64, 128, 256, 512]
    gaps = []
    for n in steps:
        program = gaussian(("log-snr", n, 6.0, -14.0), mean, torch.diag(scale**2), doubt=False, subsample=n)
        gaps.append(evidence - expected_elbo(program, mean, scale))
    assert all(gap > 0 for gap in gaps)
    assert gaps[-1] < 0.05
    assert slope(steps[2:], gaps[2:]) == pytest.approx(-1, abs=0.1)


def slope(steps, errors):
    x, y = torch.tensor(steps).double().log(), torch.tensor(errors).double().log()
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def test_the_bound_of_the_chain_is_below_its_own_evidence():
    """The chain with the exact denoiser is linear-Gaussian, so that the evidence of the model itself is known."""
    mean, cov = torch.tensor([0.3, -1.0]), torch.tensor([[0.5, 0.3], [0.3, 0.4]])
    program = gaussian(("linear", 4), mean, cov)
    evidence = MultivariateNormal(*moments(program))
    x = mean + torch.randn(6, 2)
    exact = evidence.log_prob(x)
    with torch.no_grad():
        weights = program.log_weights(x, num_particles=20_000)
    assert (weights.mean(0) < exact).all()
    for row in range(6):
        assert_mean((weights[:, row] - exact[row]).exp(), 1.0)


def moments(program):
    """Mean and covariance of the x_0 of a linear-Gaussian chain, step by step through its own equations."""
    size = program.event_shape[0]
    mean, cov = torch.zeros(size), torch.eye(size)
    points = torch.cat([torch.zeros(1, size), torch.eye(size)])
    with torch.no_grad():
        for t in range(program.num_steps, 0, -1):
            at = torch.full((size + 1,), t)
            denoised = program.denoise(points, at)
            step = (program.reverse(points, at, denoised) if t > 1 else program.likelihood(denoised)).base_dist
            intercept, matrix = step.mean[0], (step.mean[1:] - step.mean[0]).T
            mean, cov = matrix @ mean + intercept, matrix @ cov @ matrix.T + torch.diag(step.variance[0])
    return mean, cov


def test_samplers_reproduce_mean_and_covariance():
    mean, cov = torch.tensor([0.6, -1.2]), torch.tensor([[0.6, -0.3], [-0.3, 0.5]])
    program = gaussian(("cosine", 25), mean, cov)
    expected_mean, expected_cov = moments(program)
    n = 20000
    for x in (program.sample(n), program.unroll().sample(n)):
        for d in range(2):
            assert_mean(x[:, d], expected_mean[d])
        centerd = x - expected_mean
        for i, j in ((0, 0), (0, 1), (1, 1)):
            assert_mean(centerd[:, i] * centerd[:, j], expected_cov[i, j])


def test_the_samples_mean_and_covariance_tend_to_the_datas_at_first_order():
    mean, cov = torch.tensor([0.6, -1.2]), torch.tensor([[0.6, -0.3], [-0.3, 0.5]])
    steps, errors = [32, 64, 128, 256, 512], []
    for n in steps:
        found_mean, found_cov = moments(gaussian(("log-snr", n, 10.0, -14.0), mean, cov, doubt=False))
        errors.append((found_cov - cov).norm().item())
        assert (found_mean - mean).norm() < 1e-2
    assert errors[-1] < 0.05
    assert slope(steps, errors) == pytest.approx(-1, abs=0.1)


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_the_samples_of_the_exact_denoiser_have_the_datas_moments_at_any_number_of_steps(steps):
    mean, scale = torch.tensor([0.6, -1.2]), torch.tensor([0.6, 1.5])
    found_mean, found_cov = moments(gaussian(("log-snr", steps, 6.0, -30.0), mean, torch.diag(scale**2)))
    torch.testing.assert_close(found_mean, mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(found_cov, torch.diag(scale**2), rtol=0, atol=1e-5)


def test_ddim_converges_to_the_probability_flow_at_first_order():
    """For Gaussian data the flow is x_0 = m + s (x_T - alpha_T m) / sqrt(alpha_T^2 s^2 + sigma_T^2)."""
    mean, scale = torch.tensor([0.6]), torch.tensor([0.5])
    program = gaussian(("cosine", 4000), mean, torch.diag(scale**2))
    alpha, sigma = program.noise_schedule.alpha[-1], program.noise_schedule.sigma[-1]
    torch.manual_seed(3)
    x_T = torch.randn(64, 1)
    exact = mean + scale * (x_T - alpha * mean) / (alpha**2 * scale**2 + sigma**2).sqrt()
    steps, errors = [10, 20, 40, 80, 160, 320], []
    for n in steps:
        torch.manual_seed(3)
        errors.append((program.sample(64, sampler="ddim", num_steps=n) - exact).abs().max().item())
    assert errors[-1] < 0.01
    assert slope(steps, errors) == pytest.approx(-1, abs=0.15)


# -- samplers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"levels": 6}, {"levels": 6, "predict": "levels"}], ids=str)
def test_the_ancestral_sampler_is_the_chain_of_the_model(options):
    """DDIM's formula at eta = 1 and all steps is q(x_{t-1} | x_t, x_0_hat), on the same random numbers."""
    program = small(2, 8, **options).eval()
    torch.manual_seed(5)
    drawn = program.sample(100)
    torch.manual_seed(5)
    x = torch.randn(100, 2)
    with torch.no_grad():
        for t in range(8, 1, -1):
            at = torch.full((100,), t)
            step = program.reverse(x, at, program.denoise(x, at))
            x = step.mean + step.variance.sqrt() * torch.randn(100, 2)
        last = program.likelihood(program.denoise(x, torch.ones(100, dtype=torch.long))).sample()
    torch.testing.assert_close(drawn, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_fewer_steps_are_the_coarser_schedule(sampler, steps):
    """Skipping times is the chain of the schedule at those times, since q(x_s | x_t, x_0) does not see between."""
    network = MLP((2,), 2, hidden=(8,))

    class Timeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x, t):
            return self.network(x)

    fine = dgm.Diffusion(2, Timeless(), num_steps=12, predict="x0").eval()
    kept = [time.t for time in fine._chosen_times(steps, "uniform")]
    coarse = dgm.Diffusion(
        2, Timeless(), dgm.Schedule(fine.noise_schedule.alpha[sorted(kept)] ** 2), predict="x0"
    ).eval()
    coarse.raw_scale = nn.Parameter(fine.raw_scale[[t - 1 for t in sorted(kept)]])
    torch.manual_seed(1)
    expected = coarse.sample(50, sampler=sampler)
    torch.manual_seed(1)
    torch.testing.assert_close(fine.sample(50, sampler=sampler, num_steps=steps), expected, rtol=1e-7, atol=1e-9)


@given(data=st.data(), total=st.integers(1, 1500))
def test_times_are_evenly_spread_from_noise_to_the_last_step(data, total):
    steps = data.draw(st.integers(1, total))
    program = dgm.Diffusion(1, Constant(torch.zeros(1, 1)), num_steps=total)
    spread = [time.t for time in program._chosen_times(steps, "uniform")]
    assert len(spread) == steps
    assert spread[0] == total
    assert spread[-1] == 1 or steps == 1
    gaps = [a - b for a, b in itertools.pairwise(spread)]
    assert all(gap > 0 for gap in gaps)
    assert max(gaps, default=1) - min(gaps, default=1) <= 1


def test_a_coarser_ancestral_chain_is_exact_for_gaussians_too():
    """Skipping times widens each step by what v says: the moments of the data remain."""
    mean, scale = torch.tensor([0.6]), torch.tensor([0.5])
    program = gaussian(("log-snr", 60, 6.0, -30.0), mean, torch.diag(scale**2))
    x = program.sample(20000, num_steps=5).squeeze(-1)
    assert_mean(x, 0.6)
    assert_mean((x - 0.6) ** 2, 0.25)


def test_ddim_is_deterministic_after_the_first_draw():
    program = small(2, 8).eval()
    torch.manual_seed(0)
    first = program.sample(10, sampler="ddim")
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.randn(10, 2)
    assert torch.equal(torch.rand(1), after)
    torch.manual_seed(0)
    assert torch.equal(program.sample(10, sampler="ddim"), first)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
@pytest.mark.parametrize("predict", ["v", "levels"])
def test_samples_of_integers_are_integers(sampler, predict):
    program = small((1, 2, 2), 4, levels=5, predict=predict)
    x = program.sample(50, sampler=sampler)
    assert x.dtype == torch.int64
    program.check(x)


# -- which times a batch looks at --------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 40), st.integers(0, 1000))
def test_shifts_are_spread_evenly_over_the_batch(steps, particles, size, seed):
    torch.manual_seed(seed)
    shift = _Shift(steps, torch.zeros(())).expand((particles, size)).sample()
    assert shift.shape == (particles, size)
    counts = torch.bincount(shift.flatten(), minlength=steps)
    assert len(counts) == steps
    share = particles * size / steps
    assert counts.min() >= math.floor(share) - 1
    assert counts.max() <= math.ceil(share) + 1


def test_the_shift_of_each_datum_is_uniform():
    shift = torch.stack([_Shift(7, torch.zeros(()), (5,)).sample() for _ in range(7000)])
    for datum in shift.T:
        assert stats.chisquare(torch.bincount(datum, minlength=7)).pvalue > 1e-4
    torch.testing.assert_close(_Shift(7, torch.zeros(())).log_prob(shift).exp(), torch.full((7000, 5), 1 / 7))


@pytest.mark.parametrize(("subsample", "steps"), [(1, 5), (2, 6), (4, 6), (3, 3)])
def test_every_time_is_looked_at_equally_often(subsample, steps):
    seen = []

    class Spy(DenoisingMLP):
        def forward(self, x, t, given=None):
            seen.append((t * steps).round().long())
            return super().forward(x, t, given)

    program = dgm.Diffusion(2, Spy((2,), (4,)), num_steps=steps, subsample=subsample)
    for _ in range(100):
        elbo(program, torch.zeros(12, 2))
    counts = torch.bincount(torch.cat(seen), minlength=steps + 1)[1:]
    assert counts.sum() == 1200 * subsample
    assert counts.min() > 0.8 * counts.double().mean()  # evenly spread, so far closer than independent draws


def uneven(**options):
    """A diffusion that looks at its times with very different probabilities."""
    program = small(2, 8, importance=True, **options)
    program.mean_square.copy_(torch.tensor([25.0, 9.0, 4.0, 0.0, 1.0, 0.01, 100.0, 0.5]))
    return program


@pytest.mark.parametrize("options", [{}, {"subsample": 3}, {"levels": 4, "subsample": 2}], ids=str)
def test_importance_sampled_times_state_the_same_bound(options):
    program = uneven(**options).eval()
    x = torch.randint(4, (1, 2)) if program.levels else torch.randn(1, 2)
    x = x.expand(30000, 2)
    with torch.no_grad():
        sampled = elbo(program, x).value
        program.subsample = program.num_steps
        every = elbo(program, x).value
    assert_mean(sampled - every)


def test_importance_sampled_times_have_their_probabilities():
    program = uneven(subsample=2)
    seen = []
    program.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[1] * 8).round().long()))
    root = program.mean_square.sqrt()
    expected = 0.95 * root / root.sum() + 0.05 / 8
    torch.testing.assert_close(program.eval().time_probabilities(), expected)
    for _ in range(200):
        elbo(program, torch.zeros(10, 2))
    counts = torch.bincount(torch.cat(seen), minlength=9)[1:]
    # Systematic sampling is closer to its expectation than independent draws would be.
    assert ((counts - 4000 * expected).abs() < 4.5 * (4000 * expected).sqrt()).all()


def test_the_probabilities_follow_the_size_of_the_terms():
    """Trained on nothing, the mean squares are those of the terms, time by time; evaluation leaves them alone."""
    program = small(2, 6, importance=True)
    x = torch.randn(1, 2).expand(2000, 2)
    before = program.mean_square.clone()
    elbo(program.eval(), x)
    assert torch.equal(program.mean_square, before)
    with torch.no_grad():
        for _ in range(40):
            elbo(program.train(), x)
        t = torch.arange(1, 7).unsqueeze(-1).expand(6, 20000)
        x0 = x[:1].expand(6, 20000, 2)
        x_t = program.noised(x0, t).sample()
        denoised = program.denoise(x_t, t)
        kl = kl_divergence(program.reverse(x_t, t, x0), program.reverse(x_t, t, denoised))
        term = torch.where(t > 1, kl, program.likelihood(denoised).log_prob(x0))
    # Each is a mean over a batch's 333 or so: from its memory of one batch.
    error = (term**2).std(1) * (1 / 300 + 1 / 20000) ** 0.5
    assert ((program.mean_square - (term**2).mean(1)).abs() < 4.5 * error).all()


def test_importance_sampling_takes_variance_away():
    x = torch.randn(1, 2).expand(20000, 2)
    variances = {}
    for importance in (False, True):
        program = small(2, 30, noise_schedule="cosine", importance=importance)
        with torch.no_grad():
            for _ in range(30):
                elbo(program.train(), x)
            variances[importance] = elbo(program.eval(), x).value.var()
    assert variances[True] < 0.7 * variances[False]


# -- labels ------------------------------------------------------------------------------------------------------------


def test_a_label_reaches_the_network_and_so_does_a_vector():
    t, x_t = torch.tensor([1, 4, 6]), torch.randn(3, 2)
    for options, context in (
        ({"num_classes": 4}, torch.tensor([3, 0, 1])),
        ({"given_shape": (5,)}, torch.randn(3, 5)),
    ):
        program = small(2, **options, predict="x0").eval()
        torch.testing.assert_close(program.denoise(x_t, t, context).x0, program.denoiser(x_t, t / 6, context))
        other = context.roll(1, 0)
        assert (program.denoise(x_t, t, other).x0 - program.denoise(x_t, t, context).x0).abs().min() > 1e-6
        torch.manual_seed(0)
        many = program.sample(3, context)
        assert many.shape == (3, 2)
        torch.manual_seed(0)
        one = program.sample(3, context[:1])
        torch.testing.assert_close(one[0], many[0])
        assert program.log_weights(x_t, context, 4).shape == (4, 3)


@pytest.mark.parametrize("predict", ["noise", "x0", "v"])
def test_guidance_extrapolates_from_untold_to_told(predict):
    program = small(2, num_classes=3, predict=predict, label_dropout=0.2).eval()
    x_t, t, y = torch.randn(4, 2), torch.tensor([1, 2, 5, 6]), torch.tensor([0, 1, 2, 1])
    told, untold = (program.denoise(x_t, t, label).x0 for label in (y, torch.full_like(y, 3)))
    for w in (0.0, 0.7, 3.0, -1.0):
        torch.testing.assert_close(program.denoise(x_t, t, y, guidance=w).x0, (1 + w) * told - w * untold)


def test_guided_levels_are_the_product_of_powers():
    """Extrapolated logits: p(x_0 | y)^(1 + w) p(x_0)^(-w), then Bayes' rule with the noise as ever."""
    program = small(2, num_classes=3, predict="levels", levels=4, label_dropout=0.2).eval()
    x_t, t, y = torch.randn(4, 2), torch.tensor([1, 2, 5, 6]), torch.tensor([0, 1, 2, 1])
    told, untold = (Categorical(logits=program.denoiser(x_t, t / 6, label).movedim(1, -1)) for label in (y, y * 0 + 3))
    prior = (1 + 2.0) * told.logits - 2.0 * untold.logits
    noise = program.noised(program.grid.reshape(4, 1, 1).expand(4, 4, 2), t).base_dist.log_prob(x_t).movedim(0, -1)
    expected = (prior + noise).log_softmax(-1)
    found = program.denoise(x_t, t, y, guidance=2.0).logits.log_softmax(-1)
    torch.testing.assert_close(found, expected)


def test_guidance_zero_is_the_model_itself():
    program = small(2, num_classes=3, label_dropout=0.1).eval()
    draws = []
    for options in ({}, {"guidance": 0.0}, {"guidance": 1.5}):
        torch.manual_seed(0)
        draws.append(program.sample(5, torch.tensor([2]), **options))
    assert torch.equal(draws[0], draws[1])
    assert not torch.allclose(draws[0], draws[2])


def test_labels_are_hidden_in_training_only():
    seen = []

    class Spy(DenoisingMLP):
        def forward(self, x, t, given=None):
            seen.append(given)
            return super().forward(x, t, given)

    program = dgm.Diffusion(2, Spy((2,), (4,), num_classes=3), num_steps=5, label_dropout=0.3)
    x, y = torch.randn(4000, 2), torch.ones(4000, dtype=torch.long)
    elbo(program.train(), x, y)
    hidden = (seen[-1] == 3).double()
    assert ((seen[-1] == 3) | (seen[-1] == 1)).all()
    assert_mean(hidden, 0.3)
    elbo(program.eval(), x, y)
    assert (seen[-1] == 1).all()
    elbo(program.train().unroll(), x, y)
    chain = torch.stack(seen[-5:])
    assert_mean((chain[0] == 3).double(), 0.3)
    assert (chain == chain[0]).all()  # a label is hidden from the whole chain, or from none of it
    program.train().sample(100, torch.tensor([1]))  # a draw for y = 1 is for y = 1, in whatever mode
    assert (seen[-1] == 1).all()


def test_labels_that_are_enumerated_are_hidden_one_by_one():
    seen = []

    class Spy(DenoisingMLP):
        def forward(self, x, t, given=None):
            seen.append(given)
            return super().forward(x, t, given)

    program = dgm.Diffusion(2, Spy((2,), (4,), num_classes=3), num_steps=5, label_dropout=0.5)
    labeled = dgm.Labeled(dgm.Categorical((), 3), program).train()
    every = pyro.infer.config_enumerate(labeled.guide)
    pyro.infer.TraceEnum_ELBO().loss(labeled.model, every, torch.randn(200, 2))
    hidden = (seen[-1] == 3).reshape(3, 200)
    assert (hidden.sum(1) > 50).all()
    assert (hidden.sum(1) < 150).all()


# -- what it is built from ---------------------------------------------------------------------------------------------


def build(**options):
    settings = {"event_shape": 2, "denoiser": DenoisingMLP((2,), (4,)), "num_steps": 5} | options
    return lambda: dgm.Diffusion(**settings)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (build(denoiser=lambda x, t: x), TypeError, "denoiser must be a torch.nn.Module"),
        (
            build(noise_schedule="quadratic"),
            ValueError,
            "noise_schedule must be a Schedule or one of .*cosine.*'quadratic'",
        ),
        (build(noise_schedule=0.5), TypeError, "noise_schedule must be a Schedule"),
        (build(num_steps=0), ValueError, "num_steps must be a positive int"),
        (build(predict="score"), ValueError, "predict must be one of noise, x0, v.*'score'"),
        (build(predict="levels"), ValueError, "levels.*needs integer data"),
        (build(subsample=6), ValueError, "subsample must be an int from 1 to the 5 steps"),
        (build(subsample=0), ValueError, "subsample must be an int"),
        (build(subsample=True), ValueError, "subsample must be an int"),
        (build(levels=1), ValueError, "levels must be an int of at least 2"),
        (build(label_dropout=1.0), ValueError, "label_dropout must be a probability below 1"),
        (build(label_dropout=-0.1), ValueError, "label_dropout must be a probability below 1"),
        (build(label_dropout=0.1), ValueError, "label_dropout needs a denoiser with num_classes"),
        (build(event_shape=0), ValueError, "event_shape must be a positive int"),
    ],
)
def test_a_diffusion_that_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_network_of_another_shape_is_refused_with_both_shapes():
    program = dgm.Diffusion(2, Constant(torch.zeros(1, 3)), num_steps=5)
    with pytest.raises(ValueError, match=r"denoiser returned shape \(4, 3\).*predict 'v'.*\(B, \*\(2,\)\)"):
        program.log_weights(torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"sampler": "euler"}, r"sampler must be one of ancestral, ddim, dpm\+\+, heun, or a Sampler, got 'euler'"),
        ({}, {"num_steps": 0}, "num_steps must be a positive int"),
        ({}, {"spacing": "log"}, "spacing must be one of uniform, quadratic, karras, or a Spacing, got 'log'"),
        ({}, {"num_steps": 7}, "num_steps must be an int from 1 to the 6"),
        ({}, {"num_steps": 2.0}, "num_steps must be a positive int"),
        ({}, {"guidance": 1.0}, "guidance needs a denoiser with num_classes, trained with label_dropout"),
        ({"given_shape": (2,)}, {"guidance": 1.0, "given": torch.ones(1, 2).double()}, "guidance needs a denoiser"),
        ({"num_classes": 3}, {"guidance": 1.0, "given": torch.zeros(1).long()}, "trained with label_dropout"),
        (
            {"num_classes": 3},
            {"guidance": math.nan, "given": torch.zeros(1).long()},
            "guidance must be a finite number",
        ),
        ({"num_classes": 3}, {"given": torch.tensor([3])}, "labels from 3 to 3, but the program has 3 classes"),
        ({"num_classes": 3}, {}, "conditional: pass given, one integer label"),
        ({}, {"given": torch.zeros(1).long()}, "not conditional"),
        ({}, {"num_samples": 0}, "num_samples must be a positive integer"),
    ],
)
def test_sampling_options_that_cannot_be_are_refused(options, arguments, message):
    program = small(2, **options)
    with pytest.raises(ValueError, match=message):
        program.sample(**{"num_samples": 2} | arguments)


# -- learning ----------------------------------------------------------------------------------------------------------


def test_training_learns_a_density_that_no_gaussian_has():
    torch.set_default_dtype(torch.float32)
    train, test = dgm.data.load("moons", num_data=2000), dgm.data.load("moons", "test", num_data=3000)
    program = dgm.Diffusion(2, DenoisingMLP((2,), (32, 32, 32)), num_steps=20, subsample=4)
    before = dgm.evaluate(program.unroll(), test, num_samples=1)
    dgm.fit(program, train, epochs=30, lr=1e-2, batch_size=128, progress=False)
    after = dgm.evaluate(program.unroll(), test, num_samples=1)
    fitted = MultivariateNormal(train.x.mean(0), train.x.T.cov()).log_prob(test.x)
    assert after.nats > before.nats + 1
    gain = after.values - fitted
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5
    x = program.sample(1000)
    # Both arcs have radius 2 about these centers, with noise 0.2.
    radius = torch.stack([(x - center).norm(dim=1) for center in torch.tensor([[-1.0, -0.5], [1.0, 0.5]])])
    assert ((radius - 2).abs().min(0).values < 0.6).double().mean() > 0.8


def test_a_unet_diffusion_of_integers_learns():
    torch.set_default_dtype(torch.float32)
    x = torch.zeros(64, 1, 4, 4, dtype=torch.uint8)
    x[:32, :, :2], x[32:, :, 2:] = 3, 3
    program = dgm.Diffusion(
        (1, 4, 4),
        DenoisingUNet((1, 4, 4), (8, 16), num_parameters=4),
        "log-snr",
        num_steps=10,
        levels=4,
        predict="levels",
    )
    data = dgm.Data(x, levels=4)
    before = dgm.evaluate(program, data)
    dgm.fit(program, data, epochs=30, lr=1e-2, batch_size=16, validation=None, progress=False)
    after = dgm.evaluate(program, data)
    assert before.bits_per_dim > 1
    # Two equally likely pictures are one bit per datum, 1 / 16 per pixel.
    assert 1 / 16 - 3 * after.stderr < after.bits_per_dim < 0.35
