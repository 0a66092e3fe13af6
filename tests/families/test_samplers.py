"""Samplers against the exact flow of Gaussian data, against diffusers, and against one another.

For data N(m, s^2) per feature the probability flow from x at noise level (alpha, sigma) is a scaling about the mean,
x_0 = m + s (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2), so that every solver's error is known.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_diffusion import GaussianDenoiser, assert_mean, gaussian, moments, slope, small
from torch import nn

import dgm_pyro as dgm
from dgm_pyro.families import samplers
from dgm_pyro.families.diffusion import SCHEDULES, Denoised
from dgm_pyro.families.samplers import DDIM, SAMPLERS, SPACINGS, Ancestral, DPMSolver, Heun, Time
from dgm_pyro.networks import DenoisingMLP

pytestmark = pytest.mark.usefixtures("float64")

MEAN, SCALE = torch.tensor([0.6, -0.4], dtype=torch.float64), torch.tensor([0.5, 1.3], dtype=torch.float64)


def at(log_snr):
    alpha2 = 1 / (1 + math.exp(-log_snr))
    return Time(log_snr, alpha2**0.5, (1 - alpha2) ** 0.5, log_snr)


def exact_denoiser(x, t):
    """E[x_0 | x_t] of N(MEAN, SCALE^2), per feature."""
    gain = t.alpha * SCALE**2 / (t.alpha**2 * SCALE**2 + t.sigma**2)
    return Denoised(MEAN + gain * (x - t.alpha * MEAN), SCALE**2 * t.sigma**2 / (t.alpha**2 * SCALE**2 + t.sigma**2))


def flow(x, t, s):
    """The exact probability flow from time t to time s."""
    spread_t, spread_s = (((a.alpha * SCALE) ** 2 + a.sigma**2) ** 0.5 for a in (t, s))
    return s.alpha * MEAN + spread_s / spread_t * (x - t.alpha * MEAN)


# -- orders of convergence ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "order"), [(DDIM(), 1), (DPMSolver(), 2), (Heun(), 2)], ids=str)
@pytest.mark.parametrize("spacing", ["even in log-snr", "uneven"])
def test_the_order_of_convergence_to_the_probability_flow(sampler, order, spacing):
    x_T, start, end = torch.randn(32, 2), -4.0, 6.0
    counts, errors = [20, 40, 80, 160, 320], []
    for n in counts:
        way = torch.linspace(0, 1, n + 1)
        way = way if spacing == "even in log-snr" else 0.5 * (way + way**2)
        times = [at(start + (end - start) * share) for share in way.tolist()]
        found = samplers.run_sampler(sampler, x_T, times, exact_denoiser)
        errors.append((found - flow(x_T, times[0], times[-1])).abs().max().item())
    assert slope(counts, errors) == pytest.approx(-order, abs=0.15)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ["dpm++", "heun"])
def test_second_order_solvers_beat_ddim_on_every_schedule(schedule, sampler):
    program = gaussian((schedule, 1000), MEAN, torch.diag(SCALE**2))
    torch.manual_seed(0)
    first = program.noise_schedule.times[-1]
    exact = flow(torch.randn(64, 2), first, Time(0, 1.0, 0.0, math.inf))

    def error(sampler, steps):
        torch.manual_seed(0)
        return (program.sample(64, sampler=sampler, num_steps=steps, spacing="karras") - exact).abs().max()

    assert error(sampler, 80) < error("ddim", 80) / 5


def test_equal_steps_are_equal_whatever_makes_them():
    """The first step of DPM++ is DDIM's; Ancestral with a certain x_0 is DDIM at eta = 1."""
    x, t, s = torch.randn(5, 2), at(-1.0), at(0.5)
    torch.testing.assert_close(DPMSolver()(x, t, s, exact_denoiser, None)[0], DDIM()(x, t, s, exact_denoiser, None)[0])

    def certain(x, t):
        return Denoised(exact_denoiser(x, t).x0, torch.zeros_like(x))

    drawn = []
    for sampler in (Ancestral(), DDIM(1.0)):
        torch.manual_seed(1)
        drawn.append(sampler(x, t, s, certain, None)[0])
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-12, atol=1e-12)


# -- moments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_reproduces_mean_and_covariance_at_every_eta(eta):
    mean, cov = torch.tensor([0.6, -1.2]), torch.tensor([[0.6, -0.3], [-0.3, 0.5]])
    program = gaussian(("log-snr", 300, 12.0, -12.0), mean, cov)
    x = program.sample(4000, sampler=DDIM(eta))
    for d in range(2):
        assert_mean(x[:, d], mean[d])
    centerd = x - mean
    # Besides 4.5 standard errors there is the bias of 300 steps: what the ancestral chain of as many has.
    bias = (moments(gaussian(("log-snr", 300, 12.0, -12.0), mean, cov, doubt=False))[1] - cov).abs().max()
    for i, j in ((0, 0), (0, 1), (1, 1)):
        found = centerd[:, i] * centerd[:, j]
        assert (found.mean() - cov[i, j]).abs() < 4.5 * found.std() / 4000**0.5 + bias


@pytest.mark.parametrize("steps", [3, 10])
def test_the_ancestral_sampler_has_the_datas_moments_at_few_steps(steps):
    """Its variance knows how far off x_0_hat may be; so for independent Gaussians no step is too long."""
    program = gaussian(("log-snr", 40, 10.0, -30.0), MEAN, torch.diag(SCALE**2))
    for spacing in SPACINGS:
        x = program.sample(20000, num_steps=steps, spacing=spacing)
        for d in range(2):
            assert_mean(x[:, d], MEAN[d])
            assert_mean((x[:, d] - MEAN[d]) ** 2, SCALE[d] ** 2)


# -- guidance ----------------------------------------------------------------------------------------------------------


class TwoGaussians(nn.Module):
    """Told: the denoiser of N(1, 0.25). Untold (label 1): that of N(0, 1)."""

    num_classes, given_shape = 1, torch.Size(())

    def __init__(self, schedule):
        super().__init__()
        self.told = GaussianDenoiser(schedule, torch.ones(1), 0.25 * torch.eye(1))
        self.untold = GaussianDenoiser(schedule, torch.zeros(1), torch.eye(1))
        self.calls = []

    def forward(self, x, t, label):
        self.calls.append(len(x))
        return torch.where((label == 1).unsqueeze(-1), self.untold(x, t), self.told(x, t))


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "heun"])
def test_guidance_follows_the_flow_of_the_guided_score(sampler):
    """For w = 1, tau = log(sigma / alpha), y = x / alpha: dy / dtau = y - (2 x0_told - x0_untold), linear in y."""
    schedule = SCHEDULES["log-snr"](2000, 8.0, -8.0)
    program = dgm.Diffusion(1, TwoGaussians(schedule), schedule, predict="x0", label_dropout=0.1).eval()
    torch.manual_seed(0)
    found = program.sample(32, torch.tensor([0]), sampler=sampler, num_steps=500, guidance=1.0)
    assert set(program.denoiser.calls) == {64}  # told and untold go through the network together
    torch.manual_seed(0)
    y = torch.randn(32, 1) / schedule.times[-1].alpha

    def velocity(y, tau):
        n2 = math.exp(2 * tau)
        told = 1 + 0.25 / (0.25 + n2) * (y - 1)
        return y - (2 * told - y / (1 + n2))

    tau, grid = -schedule.times[-1].log_snr / 2, 20000
    h = (-schedule.times[0].log_snr / 2 - tau) / grid
    for _ in range(grid):  # the midpoint rule
        y = y + h * velocity(y + h / 2 * velocity(y, tau), tau + h / 2)
        tau += h
    n2 = math.exp(2 * tau)
    exact = 2 * (1 + 0.25 / (0.25 + n2) * (y - 1)) - y / (1 + n2)
    tolerance = 3e-2 if sampler == "ddim" else 1e-3
    torch.testing.assert_close(found, exact, rtol=0, atol=tolerance)


def test_guidance_of_the_ancestral_chain_has_the_moments_of_its_own_equations():
    schedule = SCHEDULES["log-snr"](12)
    program = dgm.Diffusion(1, TwoGaussians(schedule), schedule, predict="x0", label_dropout=0.1).eval()
    x, label = torch.tensor([[0.0], [1.0]]), torch.zeros(2, dtype=torch.long)
    mean, variance = torch.zeros(()), torch.ones(())
    with torch.no_grad():
        for t in range(12, 0, -1):
            denoised = program.denoise(x, torch.full((2,), t), label, guidance=1.5)
            step = program.reverse(x, torch.full((2,), t), denoised) if t > 1 else program.likelihood(denoised)
            a, b = step.mean.squeeze(-1)
            mean, variance = a + (b - a) * mean, (b - a) ** 2 * variance + step.variance[0, 0]
    drawn = program.sample(20000, torch.tensor([0]), guidance=1.5).squeeze(-1)
    assert_mean(drawn, mean)
    assert_mean((drawn - mean) ** 2, variance)


# -- spacings ----------------------------------------------------------------------------------------------------------


@given(data=st.data(), total=st.integers(1, 300), name=st.sampled_from(sorted(SPACINGS)))
def test_times_fall_from_noise_to_the_last_each_once(data, total, name):
    steps = data.draw(st.integers(1, total))
    schedule = data.draw(st.sampled_from(sorted(SCHEDULES)))
    program = small(1, total, noise_schedule=schedule)
    chosen = [time.t for time in program.times(steps, SPACINGS[name])]
    assert len(chosen) == steps
    assert chosen[0] == total
    assert chosen[-1] == 1 or steps == 1
    assert all(t > s for t, s in itertools.pairwise(chosen))


def test_spacings_are_even_in_what_they_say():
    noise = torch.linspace(-5.0, 4.0, 1000)
    at_places = {name: spacing(9, noise) for name, spacing in SPACINGS.items()}
    assert torch.allclose(at_places["uniform"].diff(), torch.tensor(-999.0 / 8))
    assert torch.allclose((at_places["quadratic"] / 999).sqrt().diff(), torch.tensor(-1.0 / 8))
    sigma = (-5.0 + 9.0 * at_places["karras"] / 999).exp()
    steps = (sigma ** (1 / 7)).diff()
    assert torch.allclose(steps, steps.mean(), rtol=1e-9, atol=0)


@given(low=st.floats(-15, 0), width=st.floats(0.1, 30), steps=st.integers(2, 60), total=st.integers(2, 40))
@settings(max_examples=300)
def test_every_spacing_begins_and_ends_exactly_at_the_ends(low, width, steps, total):
    noise = torch.linspace(low, low + width, total)
    for spacing in SPACINGS.values():
        places = spacing(steps, noise)
        assert (places[0].item(), places[-1].item()) == (total - 1, 0)
        assert spacing(1, noise).tolist() == [total - 1]


# -- seeds, shapes, arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [*SAMPLERS, DDIM(0.5)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"levels": 5}, {"levels": 5, "predict": "levels"}, {"num_classes": 3, "label_dropout": 0.1}],
    ids=str,
)
def test_equal_seeds_give_equal_samples_of_the_program(sampler, options):
    program = small((1, 2, 2), 8, **options).eval()
    label = torch.tensor([2]) if program.conditional else None
    guidance = {"guidance": 1.5} if program.conditional else {}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(program.sample(6, label, sampler=sampler, num_steps=4, spacing="karras", **guidance))
    program.check(drawn[0], None if label is None else label.expand(6))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_sampler_of_ones_own_is_any_callable():
    def euler(x, t, s, denoise, carried):
        x0 = denoise(x, t).x0
        return s.alpha * x0 + s.sigma * (x - t.alpha * x0) / t.sigma, None

    program = small(2, 8).eval()
    drawn = []
    for sampler in (euler, "ddim"):
        torch.manual_seed(0)
        drawn.append(program.sample(5, sampler=sampler))
    torch.testing.assert_close(drawn[0], drawn[1])


def test_the_network_is_called_as_often_as_the_table_says():
    class Spy(DenoisingMLP):
        def forward(self, x, t, given=None):
            calls.append(len(x))
            return super().forward(x, t, given)

    program = dgm.Diffusion(2, Spy((2,), (4,)), num_steps=9).eval()
    for sampler, expected in {"ancestral": 5, "ddim": 5, "dpm++": 5, "heun": 9}.items():
        calls = []
        program.sample(3, sampler=sampler, num_steps=5)
        assert len(calls) == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sampler": "dpm"}, ValueError, r"sampler must be one of ancestral, ddim, dpm\+\+, heun.*'dpm'"),
        ({"sampler": DDIM}, TypeError, r"sampler must be a name or a callable"),
        ({"sampler": 3}, TypeError, r"sampler must be a name or a callable.*3"),
        ({"spacing": "cosine"}, ValueError, "spacing must be one of uniform, quadratic, karras.*'cosine'"),
        ({"spacing": 7}, TypeError, "spacing must be a name or a callable.*7"),
        ({"num_steps": True}, ValueError, "num_steps must be a positive int, got True"),
        ({"num_steps": 7}, ValueError, "num_steps must be an int from 1 to the 6 of the schedule, got 7"),
        ({"guidance": math.inf}, ValueError, "guidance must be a finite number"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        small(2).sample(2, **options)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_ddim_needs_a_share(eta):
    with pytest.raises(ValueError, match="eta must be a number of at least 0 and at most 1"):
        DDIM(eta)


# -- diffusers ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # diffusers' own, of versions
@pytest.mark.parametrize("name", ["ddim", "dpm++"])
@pytest.mark.parametrize("steps", [20, 250])
def test_diffusers_takes_the_same_steps(name, steps):
    """With one network, one schedule, one x_T and the same times; they reckon noise in single precision."""
    diffusers = pytest.importorskip("diffusers")
    program = small(3, 1000, noise_schedule="linear", predict="noise").eval()
    alpha = program.noise_schedule.alpha
    options = {"trained_betas": (1 - (alpha[1:] / alpha[:-1]) ** 2).tolist(), "timestep_spacing": "trailing"}
    if name == "ddim":
        scheduler = diffusers.DDIMScheduler(**options, clip_sample=False, set_alpha_to_one=True)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(**options, lower_order_final=False, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    torch.manual_seed(0)
    ours = program.sample(4, sampler=name, num_steps=steps, spacing=lambda steps, noise: scheduler.timesteps)
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(program.denoiser(x, torch.full((4,), (int(t) + 1) / 1000)), t, x).prev_sample
    torch.testing.assert_close(ours, x.to(ours.dtype), rtol=1e-3, atol=1e-3)
