"""Diffusion in continuous time: its bound, its learned schedule and its flow, on Gaussian data whose all is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import denoised_normal, jittered
from scipy import stats
from test_diffusion import assert_mean, assert_preconditioned, slope
from torch import nn
from torch.distributions import MultivariateNormal, Normal

import dgm_pyro as dgm
from dgm_pyro.families import ode
from dgm_pyro.families.continuous import Even
from dgm_pyro.families.samplers import SAMPLERS, SPACINGS
from dgm_pyro.networks import DenoisingMLP
from dgm_pyro.objectives import DenoisingLoss, elbo, objective_named

pytestmark = pytest.mark.usefixtures("float64")


class Gaussian(nn.Module):
    """E[x_0 | x_t] for data N(mean, cov), told the time as a share of the fall of the log-SNR."""

    def __init__(self, schedule, mean, cov):
        super().__init__()
        self.noise_schedule, self.mean, self.cov = schedule, mean, cov

    def forward(self, x, t):
        log_snr = self.noise_schedule(t)[:, None]
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        return denoised_normal(x, alpha, sigma, self.mean, self.cov)


def gaussian(mean, cov, highest=10.0, lowest=-14.0, **options):
    """A program with the exact denoiser of N(mean, cov) and the exact p(x | x_{t=0}), if cov is diagonal."""
    schedule = dgm.LogSNR(highest, lowest)
    program = dgm.ContinuousDiffusion(len(mean), Gaussian(schedule, mean, cov), schedule, predict="x0", **options)
    noise = math.exp(-highest)
    variance = cov.diagonal() * noise / (cov.diagonal() + noise)
    with torch.no_grad():
        program.raw_scale.copy_(variance.sqrt().expm1().log())
    return program.eval()


def small(shape=2, seed=0, **options):
    network = {name: options.pop(name) for name in ("num_classes", "given_shape") if name in options}
    network["max_frequency"] = 10.0
    num_parameters = options.get("levels") if options.get("predict") == "levels" else 1
    event_shape = (shape,) if isinstance(shape, int) else shape
    torch.manual_seed(seed)
    program = dgm.ContinuousDiffusion(
        shape,
        DenoisingMLP(event_shape, (12, 12), num_parameters=num_parameters, **network),
        **{"num_steps": 6, **options},
    )
    return jittered(program, 0.1)


def mean_and_scale():
    return torch.tensor([0.6, -0.4]), torch.tensor([0.5, 1.3])


def test_one_step_of_the_ancestral_sampler_has_the_moments_of_standard_normals():
    """From x_T, which tells next to nothing of x_0, the draw spreads as the data do."""
    program = gaussian(torch.zeros(2), torch.eye(2))
    x = program.sample(20000, num_steps=1)
    for d in range(2):
        assert_mean(x[:, d], 0.0)
        assert_mean(x[:, d] ** 2, 1.0)


# -- the bound ---------------------------------------------------------------------------------------------------------


def test_the_bound_of_the_exact_denoiser_is_the_evidence():
    mean, scale = mean_and_scale()
    program = gaussian(mean, torch.diag(scale**2))
    x = mean + scale * torch.randn(20000, 2)
    with torch.no_grad():
        bound = elbo(program, x).value
    # What is lost is KL(q(x_1 | x) || N(0, I)) - KL(q(x_1) || N(0, I)): of order exp(-14).
    assert_mean(bound - Normal(mean, scale).log_prob(x).sum(-1))


def test_the_bound_is_the_limit_of_the_chains():
    """The unrolled chain of the same network has the bound of T steps, which falls short by O(1 / T)."""
    program = small(noise_schedule=dgm.LogSNR(4.0, -4.0))
    x, steps, gaps = torch.randn(1, 2), [8, 16, 32, 64], []
    n = 4000
    with torch.no_grad():
        torch.manual_seed(0)
        limit = elbo(program, x.expand(40 * n, 2)).value
        for program.num_steps in steps:
            bound = elbo(program.unroll(), x.expand(n, 2)).value
            gaps.append((limit.mean() - bound.mean()).item())
    error = (limit.var() / len(limit) + bound.var() / n).sqrt().item()
    assert all(gap > 0 for gap in gaps)
    extrapolated = 2 * gaps[-1] - gaps[-2]  # Richardson: what remains when 1 / T is taken away
    assert abs(extrapolated) < 4.5 * 3 * error
    assert slope(steps[:-1], gaps[:-1]) == pytest.approx(-1, abs=0.3)


@pytest.mark.parametrize("predict", ["noise", "x0", "v", "edm"])
def test_the_terms_are_the_integrand_by_finite_differences(predict):
    """-SNR'(t) / 2 |x - x_hat|^2, the derivative of the schedule taken numerically; and all else by hand."""
    program = small(noise_schedule="learned", predict=predict).eval()
    x, first, u, x_t = torch.randn(5, 2), torch.randn(5, 2), torch.rand(5), torch.randn(5, 2)
    with dgm.program.batch_plates((5,)), dgm.program.poutine.trace() as traced:
        conditioned = {"x_first": first, "x_time": u, "x_t": x_t}
        dgm.program.poutine.condition(program.joint, data=conditioned)("x", x)
    stated = {name: site["fn"].log_prob(site["value"]) for name, site in traced.trace.nodes.items()
              if site["type"] == "sample"}  # fmt: skip
    h = 1e-6
    snr = [program.noise_schedule(program.noise_schedule.spread(place)[0]).exp() for place in (u - h, u + h)]
    denoised = program.denoise(x_t, program.noise_schedule.spread(u)[0])
    expected = (snr[1] - snr[0]) / (2 * h) / 2 * ((x - denoised.x0) ** 2).sum(-1)
    torch.testing.assert_close(stated["x_kl"], expected, rtol=1e-6, atol=1e-9)
    last = program.likelihood(program.denoise(first, torch.zeros(5)))
    torch.testing.assert_close(stated["x_likelihood"], last.log_prob(x))


def test_what_edm_sees_and_predicts_has_unit_variance_at_every_time():
    program = small(predict="edm", sigma_data=0.3)
    assert_preconditioned(program, torch.linspace(0, 1, 50), 0.3)


def test_the_exact_denoiser_has_one_bound_as_the_network_of_edm():
    mean, scale = mean_and_scale()
    expected = gaussian(mean, torch.diag(scale**2))

    class Network(nn.Module):
        def forward(self, x, t):
            c_in, c_skip, c_out = program.preconditioning(t)
            x_t = x / c_in
            return (expected.denoiser(x_t, t) - c_skip * x_t) / c_out

    program = dgm.ContinuousDiffusion(2, Network(), expected.noise_schedule, predict="edm").eval()
    program.raw_scale = expected.raw_scale
    x, bounds = mean + scale * torch.randn(20, 2), []
    for each in (expected, program):
        torch.manual_seed(0)
        bounds.append(elbo(each, x).value)
    torch.testing.assert_close(*bounds)


@pytest.mark.parametrize("noise_schedule", ["linear", "learned"])
def test_weight_one_is_the_bound(noise_schedule):
    """In value, and in the denoiser's gradient of the integral; and no schedule learns from a weighted error."""
    program = small(noise_schedule=noise_schedule, predict="edm").eval()
    x = torch.randn(6, 2)
    torch.manual_seed(0)
    bound = elbo(program, x)
    torch.manual_seed(0)
    found = DenoisingLoss(lambda log_snr, fall: torch.ones_like(fall))(program, x)
    torch.testing.assert_close(found.value, -bound.kl["x_kl"])
    rest = bound.reconstruction["x_likelihood"] - bound.kl["x_T_kl"]
    torch.testing.assert_close(found.value + rest, bound.value)
    denoiser = [*program.denoiser.parameters()]
    ours, theirs = (
        torch.autograd.grad(v.sum(), denoiser, retain_graph=True) for v in (found.surrogate, -bound.kl["x_kl"])
    )
    torch.testing.assert_close(ours, theirs)
    (-found.surrogate.sum()).backward()
    assert all(p.grad is None for p in program.noise_schedule.parameters())
    torch.testing.assert_close(program.raw_scale.grad, -torch.autograd.grad(rest.sum(), program.raw_scale)[0])


def test_simple_is_the_error_of_the_noise_evenly_in_time_whatever_times_are_drawn():
    program = small(noise_schedule="learned", predict="noise").eval()
    x = torch.randn(1, 2).expand(20000, 2)
    with torch.no_grad():
        found = objective_named("simple")(program, x).value
        t, noise = torch.rand(20000), torch.randn(20000, 2)
        alpha, sigma = program.noise_at(t)
        by_hand = -(noise - program.denoiser(alpha * x + sigma * noise, t)).square().sum(-1)
    assert_mean(found - by_hand)


def test_one_network_call_serves_both_terms():
    calls = []

    class Spy(DenoisingMLP):
        def forward(self, x, t, given=None):
            calls.append((len(x), t))
            return super().forward(x, t, given)

    elbo(dgm.ContinuousDiffusion(2, Spy((2,), (4,))), torch.zeros(7, 2))
    ((rows, t),) = calls
    assert rows == 14
    assert (t[:7] == 0).all()


# -- the learned schedule ----------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(0, 20))
def test_the_learned_map_rises_from_0_to_1_with_the_slope_it_says(seed, units):
    torch.manual_seed(seed)
    schedule = jittered(dgm.LogSNR(num_units=units), 1.0)
    u = torch.linspace(0, 1, 200, requires_grad=True)
    t, said = schedule.spread(u)
    torch.testing.assert_close(t[[0, -1]], torch.tensor([0.0, 1.0]), rtol=0, atol=1e-12)
    assert (t.diff() > 0).all()
    (found,) = torch.autograd.grad(t.sum(), u)
    torch.testing.assert_close(said, found, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_the_log_density_is_that_at_fixed_times():
    """Against finite differences of -log t'(u(t)), u(t) found by bisection."""
    schedule = small(noise_schedule="learned").noise_schedule
    u = torch.tensor([0.1, 0.4, 0.8])
    t = schedule.spread(u)[0].detach()
    torch.testing.assert_close(schedule.log_density(u), -schedule.spread(u)[1].log())

    def log_density_at_t():
        low, high = torch.zeros(3), torch.ones(3)
        for _ in range(60):
            middle = (low + high) / 2
            below = schedule.spread(middle)[0] < t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return -schedule.spread(low)[1].log()

    for parameter in (schedule.centers, schedule.raw_steepness, schedule.raw_heights):
        values = schedule.log_density(u)
        gradient = torch.stack([torch.autograd.grad(v, parameter, retain_graph=True)[0] for v in values])
        for i in (0, 7):
            with torch.no_grad():
                parameter[i] += 1e-5
                above = log_density_at_t()
                parameter[i] -= 2e-5
                below = log_density_at_t()
                parameter[i] += 1e-5
            torch.testing.assert_close(gradient[:, i], (above - below) / 2e-5, rtol=1e-5, atol=1e-7)


def test_a_learned_schedule_leaves_the_bound_and_takes_its_variance_away():
    """Only the density of times is trained; the integrand of the wrong denoiser is far from even."""
    mean, scale = torch.tensor([0.0]), torch.tensor([0.3])
    linear = gaussian(mean, torch.diag(scale**2), 8.0, -14.0)
    learned = gaussian(mean, torch.diag(scale**2), 8.0, -14.0)
    learned.noise_schedule = dgm.LogSNR(8.0, -14.0, num_units=16)
    x = mean + scale * torch.randn(2000, 1)

    def terms(program):
        with torch.no_grad():
            return elbo(program, x.repeat(10, 1)).kl["x_kl"]

    before = terms(linear)
    optimizer = torch.optim.Adam(learned.noise_schedule.parameters(), lr=0.05)
    learned.train()
    for _ in range(300):
        optimizer.zero_grad()
        (-elbo(learned, x[:500]).value.mean()).backward()
        optimizer.step()
    after = terms(learned.eval())
    error = (before.var() / len(before) + after.var() / len(after)).sqrt()
    assert (after.mean() - before.mean()).abs() < 4.5 * error
    assert after.var() < 0.5 * before.var()


def test_the_ends_learn_from_the_bound():
    """By finite differences of the bound, on the same random numbers."""
    program = small(noise_schedule=dgm.LogSNR(3.0, -3.0, learned_ends=True), predict="x0")
    x = torch.randn(50, 2)

    def bound():
        torch.manual_seed(0)
        return elbo(program, x).value.mean()

    for parameter in (program.noise_schedule.highest, program.noise_schedule.raw_width):
        (found,) = torch.autograd.grad(bound(), parameter)
        with torch.no_grad():
            parameter += 1e-5
            above = bound()
            parameter -= 2e-5
            below = bound()
            parameter += 1e-5
        torch.testing.assert_close(found, (above - below) / 2e-5, rtol=1e-5, atol=1e-7)


def test_times_are_uniform_and_even():
    even = Even(torch.zeros(()))
    u = torch.stack([even.expand((5,)).sample() for _ in range(4000)])
    for datum in u.T:
        assert stats.kstest(datum, "uniform").pvalue > 1e-4
    gaps = u.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.2), rtol=0, atol=1e-6)  # drawn in single precision


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm++", 2), ("heun", 2)])
def test_samplers_converge_to_the_flow_at_any_number_of_steps(sampler, order):
    mean, scale = mean_and_scale()
    program = gaussian(mean, torch.diag(scale**2), 14.0, -4.0)
    alpha, sigma = (1 / (1 + math.exp(4.0))) ** 0.5, (1 / (1 + math.exp(-4.0))) ** 0.5
    torch.manual_seed(0)
    exact = mean + scale * (torch.randn(64, 2) - alpha * mean) / (alpha**2 * scale**2 + sigma**2).sqrt()
    steps, errors = [20, 40, 80, 160], []
    for n in steps:
        torch.manual_seed(0)
        errors.append((program.sample(64, sampler=sampler, num_steps=n) - exact).abs().max().item())
    assert slope(steps, errors) == pytest.approx(-order, abs=0.25)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_samples_have_the_datas_moments(sampler, spacing):
    mean, cov = torch.tensor([0.6, -1.2]), torch.tensor([[0.6, -0.3], [-0.3, 0.5]])
    program = gaussian(mean, cov, 12.0, -10.0)
    x = program.sample(2000, sampler=sampler, num_steps=400, spacing=spacing)
    for d in range(2):
        assert_mean(x[:, d], mean[d])
    centerd = x - mean
    for i, j in ((0, 0), (0, 1), (1, 1)):
        found = centerd[:, i] * centerd[:, j]
        # First-order chains of 400 steps are a few percent short.
        assert (found.mean() - cov[i, j]).abs() < 4.5 * found.std() / 2000**0.5 + 0.03


def test_guidance_of_labels_samples():
    program = small(num_classes=3, label_dropout=0.1).eval()
    torch.manual_seed(0)
    plain = program.sample(4, torch.tensor([1]), sampler="dpm++")
    torch.manual_seed(0)
    assert not torch.allclose(program.sample(4, torch.tensor([1]), sampler="dpm++", guidance=2.0), plain)


# -- the likelihood of the flow ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cov", [[[0.25, 0.0], [0.0, 1.69]], [[0.6, -0.3], [-0.3, 0.5]]])
def test_the_flow_of_the_exact_denoiser_has_the_exact_density(cov):
    """But for the noise at t = 0, exp(-highest), and the mean that remains at t = 1, exp(lowest / 2)."""
    mean, cov = torch.tensor([0.6, -0.4]), torch.tensor(cov)
    program = gaussian(mean, cov, 26.0, -26.0)
    x = mean + 1.5 * torch.randn(10, 2)
    exact = MultivariateNormal(mean, cov).log_prob(x)
    for tolerance in (1e-3, 1e-5, 1e-7):
        # A step's error is relative to the divergence so far, at most 48; there are some tens of steps.
        assert (program.ode_log_prob(x, tolerance=tolerance) - exact).abs().max() < 200 * tolerance


def test_the_density_of_the_flow_is_that_before_the_last_step_to_the_mean():
    """Covariance for data N(0, S): S + n before it, with the noise n = exp(-highest), and S^2 / (S + n) after it."""
    cov, noise = torch.diag(torch.tensor([0.5, 2.0])), math.exp(-1.0)
    program = gaussian(torch.zeros(2), cov, 1.0, -20.0)
    x = torch.randn(10, 2)
    before = MultivariateNormal(torch.zeros(2), cov + noise * torch.eye(2)).log_prob(x)
    torch.testing.assert_close(program.ode_log_prob(x, tolerance=1e-7), before, rtol=0, atol=2e-5)
    drawn = program.sample(20_000, sampler="heun", num_steps=300).var(0)
    after = cov.diagonal() ** 2 / (cov.diagonal() + noise)
    assert ((drawn - after).abs() < 4.5 * after * (2 / 20_000) ** 0.5).all()


def test_the_flow_of_any_network_is_a_density():
    """It sums to one, whatever the network: by quadrature."""
    program = small(1, noise_schedule=dgm.LogSNR(4.0, -5.0), predict="x0").eval()
    grid = torch.linspace(-12, 12, 1501).unsqueeze(-1)
    mass = program.ode_log_prob(grid, tolerance=1e-6).exp().sum() * (grid[1] - grid[0])
    torch.testing.assert_close(mass.squeeze(), torch.tensor(1.0), rtol=0, atol=1e-4)


def test_evaluate_takes_the_density_of_the_flow():
    program = small(noise_schedule=dgm.LogSNR(4.0, -5.0), predict="x0")
    x = torch.randn(7, 2)
    found = dgm.evaluate(program, x, ode=True, batch_size=3)
    assert (found.kind, found.measure, found.kl) == ("ode", "density", {})
    by_hand = torch.cat([program.eval().ode_log_prob(batch) for batch in x.split(3)])  # a batch shares its steps
    assert torch.equal(found.values, by_hand)
    with pytest.raises(ValueError, match="takes no particles, got num_particles=3"):
        dgm.evaluate(program, x, ode=True, num_particles=3)
    with pytest.raises(ValueError, match="ode=True is for a ContinuousDiffusion, got a Normal"):
        dgm.evaluate(dgm.Normal(2), x, ode=True)
    with pytest.raises(ValueError, match="is a density on reals, but this program is a mass"):
        dgm.evaluate(small(levels=4), torch.zeros(1, 2, dtype=torch.long), ode=True)


def test_random_directions_estimate_the_divergence_without_bias():
    program = small(3, noise_schedule=dgm.LogSNR(4.0, -4.0), predict="x0").eval()
    x = torch.randn(4, 3)
    exact, estimates = program.ode_log_prob(x), program.ode_log_prob(x, probes=400)
    assert estimates.shape == (400, 4)
    for datum, value in zip(estimates.T, exact, strict=True):
        assert_mean(datum, value)


def test_the_flow_takes_labels_and_images():
    program = small((1, 2, 2), num_classes=3, noise_schedule=dgm.LogSNR(4.0, -4.0)).eval()
    x, y = torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    together = program.ode_log_prob(x, y, tolerance=1e-7)
    alone = torch.cat([program.ode_log_prob(x[i : i + 1], y[i : i + 1], tolerance=1e-7) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)
    assert not any(parameter.grad is not None for parameter in program.parameters())


def test_the_solver_holds_its_tolerance():
    """dy / dt = (y_2, -y_1): a circle, to t = 20 and back."""
    start = torch.tensor([[1.0, 0.0]])
    for tolerance in (1e-4, 1e-6, 1e-9):
        calls = []

        def turn(t, y, calls=calls):
            calls.append(t)
            return torch.stack([y[:, 1], -y[:, 0]], 1)

        end = ode.solve(turn, start, 0.0, 20.0, tolerance=tolerance)
        exact = torch.tensor([[math.cos(20.0), -math.sin(20.0)]])
        assert (end - exact).abs().max() < 100 * tolerance
        assert max(calls) <= 20.0 + 1e-12
        assert (ode.solve(turn, end, 20.0, 0.0, tolerance=tolerance) - start).abs().max() < 200 * tolerance


def test_the_solver_knows_what_time_it_is():
    """dy / dt = 5 t^4 is integrated exactly by a method of order 5."""
    end = ode.solve(lambda t, y: 5 * t.unsqueeze(-1) ** 4, torch.zeros(1, 1), 0.0, 2.0, tolerance=1e-3)
    torch.testing.assert_close(end, torch.tensor([[32.0]]), rtol=1e-12, atol=0)


def test_a_solver_that_does_not_arrive_says_where_it_is():
    with pytest.raises(RuntimeError, match=r"took 5 steps from 0 and reached .*, not 100: raise the tolerance"):
        ode.solve(lambda t, y: -50 * y, torch.ones(1, 1), 0.0, 100.0, max_steps=5)


# -- what it is built from ---------------------------------------------------------------------------------------------


def build(**options):
    return lambda: dgm.ContinuousDiffusion(**{"event_shape": 2, "denoiser": DenoisingMLP((2,), (4,))} | options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dgm.LogSNR(1.0, 1.0), ValueError, "highest must be a number above lowest"),
        (lambda: dgm.LogSNR(math.nan), ValueError, "highest must be a finite number"),
        (lambda: dgm.LogSNR(num_units=-1), ValueError, "units must be an int of at least 0"),
        (
            build(noise_schedule="cosine"),
            ValueError,
            "noise_schedule must be a LogSNR or one of linear, learned.*'cosine'",
        ),
        (build(noise_schedule=3), TypeError, "noise_schedule must be a LogSNR or a name, got int"),
        (build(num_steps=1), ValueError, "num_steps must be an int of at least 2"),
        (build(predict="levels"), ValueError, "levels.*needs integer data"),
        (lambda: small(levels=4).ode_log_prob(torch.zeros(1, 2)), ValueError, "0 .. 3: use dgm.evaluate.*rand_like"),
        (lambda: small().ode_log_prob(torch.zeros(1, 2), probes=0), ValueError, "probes must be a positive integer"),
        (lambda: small().ode_log_prob(torch.zeros(1, 3)), ValueError, r"x has shape \(1, 3\)"),
        (lambda: small().sample(2, num_steps=0), ValueError, "num_steps must be a positive int"),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_training_learns_a_density_that_no_gaussian_has():
    torch.set_default_dtype(torch.float32)
    train, test = dgm.data.load("moons", num_data=2000), dgm.data.load("moons", "test", num_data=300)
    program = dgm.ContinuousDiffusion(2, DenoisingMLP((2,), (32, 32, 32), max_frequency=30.0), "learned")
    dgm.fit(program, train, epochs=30, lr=1e-2, batch_size=128, progress=False)
    bound = dgm.evaluate(program, test, num_samples=100)
    fitted = MultivariateNormal(train.x.mean(0), train.x.T.cov()).log_prob(test.x)
    program.eval()
    exact = program.ode_log_prob(test.x)
    gain = exact - fitted
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5
    assert bound.nats > fitted.mean()
