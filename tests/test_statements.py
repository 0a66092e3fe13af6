"""docs/notes.md names code, tests and chapters that exist; and the statements that no other test is about.

The table has a row for each statement of the notes. Here are the tests of those that compare families, or need a truth
worked out by hand: how sure a network is of noise, the two terms of the bound, and why a step of a diffusion is small.
"""

import ast
import functools
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import corruptions
from dgm_pyro.experiments.tour import stops
from dgm_pyro.families.diffusion import Denoised, log_snr
from dgm_pyro.program import guide_trace

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "notes.md"
ATTRIBUTION = "an attribution"  # in place of a test: there is nothing to run


def rows():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if row[0] != "statement"]


def headings(chapter):
    text = (ROOT / chapter).with_suffix(".py").read_text()
    return {slug(heading) for heading in re.findall(r"^# ##+ (.*)$", text, re.MULTILINE)}


def slug(heading):
    """The anchor of a heading: as GitHub makes it, and the site."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@functools.cache
def names_in(file):
    tree = ast.parse(next((ROOT / "tests").rglob(file)).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_statement_has_code_a_test_and_a_chapter():
    table = rows()
    assert len(table) > 80
    for row in table:
        statement, code, test, chapter = row
        assert statement, row
        assert re.search(r"`[\w.]+`", code), statement
        assert re.search(r"`[\w/.]+::\w+`", test) or test.startswith(ATTRIBUTION), statement
        assert re.search(r"\]\(\.\./tutorials/", chapter), statement


def test_the_code_of_statements_can_be_imported():
    for _, code, _, _ in rows():
        for name in re.findall(r"`([\w.]+)`", code):
            root, *path = name.split(".")
            assert root == "dgm", name
            functools.reduce(getattr, path, dgm)


def test_the_tests_of_statements_exist():
    for _, _, tests, _ in rows():
        for file, test in re.findall(r"`([\w/.]+)::(\w+)`", tests):
            assert test in names_in(file), f"{file}::{test}"


def test_the_chapters_of_statements_have_these_sections():
    for _, _, _, chapters in rows():
        for target in re.findall(r"\]\(([^)]+)\)", chapters):
            path, anchor = target.split("#")
            chapter = (PAGE.parent / path).resolve().relative_to(ROOT)
            assert anchor in headings(chapter), target


# -- a network is sure of what it has never seen -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return dgm.data.load("digits"), dgm.data.load("digits", "test")


def test_a_network_is_sure_of_noise_and_p_of_x_is_not(digits):
    train, test = digits
    torch.manual_seed(0)
    # Without the dropout of dgm.build("classifier", ...), which makes it less sure.
    network = dgm.Discriminative(dgm.Categorical((), 10, dgm.networks.MLP(train.event_shape, 10, levels=17)))
    dgm.fit(network, train, epochs=10, lr=2e-3, progress=False)
    generative = stops.independent_pixels_by_class(train)

    noisy = corruptions.add_noise(test.x, 12.0, 17)
    clean_beliefs, beliefs = (network.class_probabilities(x) for x in (test.x, noisy))
    right = (clean_beliefs.argmax(1) == test.y).double().mean()
    still_right = (beliefs.argmax(1) == test.y).double().mean()
    # Standard errors of shares of 360 digits are at most 0.026.
    assert right > 0.9
    assert still_right < 0.6
    assert beliefs.amax(1).double().mean() > still_right + 0.2
    # Of p(y | x) by Bayes' rule the same is true; what is not as sure is p(x).
    by_bayes = generative.class_probabilities(noisy)
    assert by_bayes.amax(1).double().mean() > (by_bayes.argmax(1) == test.y).double().mean() + 0.2
    lowest_of_digits = generative.log_prob(test.x).quantile(0.05)
    assert (generative.log_prob(noisy) < lowest_of_digits).double().mean() > 0.95


# -- the two terms of the bound ----------------------------------------------------------------------------------------


def test_the_two_terms_of_the_bound_pull_apart():
    """The more the KL weighs, the nearer q(z | x) is to p(z), and the worse x is explained; the bound is best at 1."""
    torch.manual_seed(0)
    x = torch.randn(400, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.4]])
    found = {}
    for beta in (0.1, 1.0, 10.0):
        torch.manual_seed(1)
        vae = dgm.VAE(
            dgm.Normal(1), dgm.Normal(2, nn.Linear(1, 2), scale_type="shared"), dgm.Normal(1, nn.Linear(2, 2))
        )
        dgm.fit(vae, x, f"beta:{beta}", epochs=20, lr=0.05, validation=None, progress=False)
        evidence = dgm.evaluate(vae, x, num_samples=200, progress=False)
        found[beta] = (sum(evidence.reconstruction.values()), sum(evidence.kl.values()), evidence.nats)
    reconstruction, kl, bound = zip(*found.values(), strict=True)
    assert kl[0] > kl[1] > kl[2]
    assert reconstruction[0] > reconstruction[1] > reconstruction[2]
    assert bound[1] > max(bound[0], bound[2])
    assert kl[2] < 0.01  # q(z | x) is the prior: x is not worth ten times its nats


# -- the way back of a diffusion ---------------------------------------------------------------------------------------


class TwoPoints(nn.Module):
    """The exact denoiser of x_0 = +-1 with equal probability: E[x_0 | x_t] = tanh(alpha x_t / sigma^2)."""

    def __init__(self, schedule):
        super().__init__()
        self.noise_schedule = schedule

    def forward(self, x, t):
        t = (t * self.noise_schedule.num_steps).round().long().unsqueeze(-1)
        return torch.tanh(self.noise_schedule.alpha[t] * x / self.noise_schedule.sigma[t] ** 2)


@pytest.fixture
def two_points(float64):
    schedule = log_snr(50, 4.0, -5.0)
    return dgm.Diffusion(1, TwoPoints(schedule), schedule, predict="x0")


def density_before(x_s, x_t, alpha_s, alpha_t):
    """q(x_s | x_t) on an even grid of x_s, normalized there, for x_0 = +-1 and s < t."""
    step = alpha_t / alpha_s
    log_q = torch.logsumexp(
        -((x_s.unsqueeze(-1) - alpha_s * torch.tensor([1.0, -1.0])) ** 2) / (2 * (1 - alpha_s**2)), -1
    )
    log_q = log_q - (x_t - step * x_s) ** 2 / (2 * (1 - step**2))
    return torch.softmax(log_q, 0) / (x_s[1] - x_s[0])


def test_a_large_step_leaves_two_answers_and_a_small_one_a_normal(float64):
    """KL(q(x_s | x_t) || the Normal of its moments) falls as beta^3: its skewness is of order beta^(3/2)."""
    alpha_t, x_t = math.sqrt(0.5), torch.tensor(0.2)  # nearer to noise, the KL is lost in rounding
    x_s = torch.linspace(-5, 5, 40_001)
    width = x_s[1] - x_s[0]
    modes, divergences = [], []
    for beta in (0.48, 0.02, 0.01, 0.005):
        p = density_before(x_s, x_t, alpha_t / math.sqrt(1 - beta), alpha_t)
        modes.append(int(((p[1:-1] > p[:-2]) & (p[1:-1] > p[2:]) & (p[1:-1] > 1e-6)).sum()))
        mean = (p * x_s).sum() * width
        normal = torch.distributions.Normal(mean, ((p * (x_s - mean) ** 2).sum() * width).sqrt())
        divergences.append((p * (p.clamp_min(1e-300).log() - normal.log_prob(x_s))).sum() * width)
    assert modes == [2, 1, 1, 1]
    assert divergences[0] > 0.5
    assert divergences[1] < 1e-5
    for larger, smaller in itertools.pairwise(divergences[1:]):
        assert math.log2(larger / smaller) == pytest.approx(3, abs=0.1)


def test_the_way_back_follows_the_gradient_that_the_denoiser_knows(two_points):
    """E[x_0 | x_t] = (x_t + sigma^2 grad log q(x_t)) / alpha, and with it the mean of q(x_{t-1} | x_t) is exact."""
    schedule, t = two_points.noise_schedule, 20
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    x_t = torch.linspace(-2, 2, 9).unsqueeze(-1).requires_grad_()
    ends = alpha * torch.tensor([1.0, -1.0])
    (gradient,) = torch.autograd.grad(torch.logsumexp(-((x_t - ends) ** 2) / (2 * sigma**2), -1).sum(), x_t)
    times = torch.full((len(x_t),), t)
    denoised = two_points.denoise(x_t.detach(), times)
    torch.testing.assert_close(denoised.x0, ((x_t + sigma**2 * gradient) / alpha).detach())

    x_s = torch.linspace(-6, 6, 20_001)
    p = torch.stack([density_before(x_s, x, schedule.alpha[t - 1], alpha) for x in x_t.detach().flatten()])
    width = x_s[1] - x_s[0]
    mean = (p * x_s).sum(-1) * width
    variance = (p * (x_s - mean.unsqueeze(-1)) ** 2).sum(-1) * width
    exact = Denoised(denoised.x0, 1 - denoised.x0**2)  # the variance of x_0 = +-1 with this mean
    back = two_points.reverse(x_t.detach(), times, exact).base_dist
    torch.testing.assert_close(back.loc.flatten(), mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(back.scale.flatten() ** 2, variance, rtol=1e-7, atol=1e-8)


# -- what a diffusion is made of ---------------------------------------------------------------------------------------


def learned_by(program, x):
    """Parameters that the densities of the guide's sites depend on."""
    guide = guide_trace(program, x)
    guide.compute_log_prob()
    total = sum(site["log_prob"].sum() for site in guide.nodes.values() if site["type"] == "sample")
    if not total.requires_grad:
        return set()
    gradients = torch.autograd.grad(total, list(program.parameters()), allow_unused=True)
    return {
        name for (name, _), gradient in zip(program.named_parameters(), gradients, strict=True) if gradient is not None
    }


def test_a_diffusion_has_one_network_and_its_guide_none(digits):
    x = digits[1].x[:8]
    diffusion, vae = dgm.build("diffusion", digits[0]), dgm.build("vae", digits[0])
    assert learned_by(diffusion, x) == set()
    assert {name.split(".")[0] for name, _ in diffusion.named_parameters()} == {"denoiser"}
    of_encoder = {name for name, _ in vae.named_parameters() if name.startswith("encoder.")}
    assert learned_by(vae, x) == of_encoder
    assert {name.split(".")[0] for name, _ in vae.named_parameters()} == {"encoder", "likelihood"}


def test_a_denoising_mlp_is_linear_layers_between_ends_of_the_datas_size():
    network = dgm.networks.DenoisingMLP((3, 4), hidden=(16, 16, 16))
    assert network.layers[0].in_features == network.last.out_features == 12
    assert [type(layer) for layer in network.layers] == [nn.Linear] * 3
    assert isinstance(network.activation, nn.SiLU)
    assert network(torch.randn(5, 3, 4), torch.rand(5)).shape == (5, 3, 4)
    # Without an activation all of it would be one linear map of x, at a given time.
    network.activation = nn.Identity()
    t, x = torch.full((3,), 0.3), torch.randn(3, 3, 4)
    x[2] = x[0] + x[1]
    zero = network(torch.zeros(3, 3, 4), t)
    of = network(x, t) - zero
    torch.testing.assert_close(of[2], of[0] + of[1], rtol=1e-4, atol=1e-5)
