"""Metrics of doubt by hand, attacks against analytic gradients, weights in doubt against a posterior on a grid."""

import functools
import math

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import classification, corruptions
from dgm_pyro.uses.classification import Bayesian, accuracy, beliefs, nll, reliability, risk_coverage

# Confidences 0.9, 0.9, 0.6, 0.7, 0.55; the first, the fourth and the fifth answer are right.
P = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.55, 0.45]])
Y = torch.tensor([0, 1, 0, 1, 0])


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_accuracy_and_nll_by_hand():
    assert accuracy(P, Y) == pytest.approx(3 / 5)
    terms = [-math.log(p) for p in (0.9, 0.1, 0.4, 0.7, 0.55)]
    value, error = nll(P, Y)
    assert value == pytest.approx(sum(terms) / 5, rel=1e-6)
    assert error == pytest.approx(torch.tensor(terms).std().item() / 5**0.5, rel=1e-5)
    assert nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))[0] == math.inf


def test_calibration_error_by_hand():
    """Bins (0.5, 0.75] and (0.75, 1]: 3 answers, 2 right, mean confidence 1.85 / 3; 2 answers, 1 right, 0.9."""
    found = reliability(P, Y, bins=4)
    assert found.count.tolist() == [0, 0, 3, 2]
    assert found.accuracy[2:].tolist() == pytest.approx([2 / 3, 1 / 2])
    assert found.confidence[2:].tolist() == pytest.approx([1.85 / 3, 0.9])
    assert found.ece == pytest.approx(3 / 5 * (2 - 1.85) / 3 + 2 / 5 * 0.4)
    errors = torch.tensor([0 - 0.6, 1 - 0.7, 1 - 0.55, 0.9 - 1, 0.9 - 0])
    assert found.stderr == pytest.approx(errors.std().item() / 5**0.5, rel=1e-5)
    assert "0.617     0.667        3" in str(found)


def test_the_error_of_the_calibration_error_is_its_spread():
    """An overconfident classifier: confidence uniform in [0.5, 1], right with 0.8 of it."""
    random, found = torch.Generator().manual_seed(0), []
    for _ in range(400):
        confidence = 0.5 + 0.5 * torch.rand(500, generator=random)
        y = (torch.rand(500, generator=random) > 0.8 * confidence).long()
        found.append(reliability(torch.stack([confidence, 1 - confidence], 1), y, bins=5))
    values = torch.tensor([each.ece for each in found])
    assert values.mean().item() == pytest.approx(0.2 * 0.75, abs=4 * values.std().item() / 400**0.5)
    error = torch.tensor([each.stderr for each in found]).mean().item()
    assert error == pytest.approx(values.std().item(), rel=4 / (2 * 400) ** 0.5)


def test_a_calibrated_classifier_has_the_noise_that_is_announced():
    """p(y | x) drawn and y drawn from it: no miscalibration, and an ECE of the order of sqrt(bins / N) / 2."""
    random = torch.Generator().manual_seed(0)
    confidence = 0.5 + 0.5 * torch.rand(4000, generator=random)
    y = (torch.rand(4000, generator=random) > confidence).long()
    found = reliability(torch.stack([confidence, 1 - confidence], 1), y, bins=10)
    assert 0.3 < found.ece / (0.5 * (10 / 4000) ** 0.5) < 1.7


def test_risk_and_coverage_by_hand():
    right = torch.tensor([True, False, True, True, False])
    uncertainty = torch.tensor([0.1, 0.9, 0.2, 0.3, 0.2])
    found = risk_coverage(right, uncertainty)  # kept in turn: 0.1 | two of 0.2, of which one is right | 0.3 | 0.9
    assert found.coverage.tolist() == pytest.approx([1 / 5, 3 / 5, 4 / 5, 1])
    assert found.risk.tolist() == pytest.approx([0, 1 / 3, 1 / 4, 2 / 5])
    assert found.area == pytest.approx((0 * 1 + 2 / 3 + 1 / 4 + 2 / 5) / 5)
    assert [found.accuracy_at(c) for c in (0.2, 0.3, 0.6, 0.8, 1.0)] == pytest.approx([1, 2 / 3, 2 / 3, 3 / 4, 3 / 5])


def test_perfect_doubt_rejects_what_is_wrong_and_useless_doubt_nothing():
    right = torch.rand(1000) < 0.7
    share = right.double().mean().item()
    perfect = risk_coverage(right, (~right).double())
    assert perfect.accuracy_at(share) == 1
    useless = risk_coverage(right, torch.zeros(1000))
    assert useless.coverage.tolist() == [1]
    assert useless.area == pytest.approx(1 - share)


def test_beliefs_from_bounds_tighten_with_particles():
    """log p(x) of a class-conditional linear VAE: IWAE rises with K, and every class counts in the sum."""
    digits = dgm.data.load("digits-binary", num_data=30)
    program = dgm.build("vae", digits, labeled=True, latent_size=2, hidden=(8,))
    bounds = []
    for num_particles in (1, 50):
        torch.manual_seed(0)
        probabilities, log_p = beliefs(program, digits.x, num_particles=num_particles)
        bounds.append(log_p.mean())
    assert bounds[0] < bounds[1]
    torch.manual_seed(0)
    expected = program.eval().log_joint(digits.x, 50)
    assert torch.equal(log_p, expected.logsumexp(0))
    assert torch.equal(probabilities, expected.softmax(0).T)


# -- corruptions -------------------------------------------------------------------------------------------------------


def test_shifts_are_rolls_with_zeros():
    x = torch.randint(1, 9, (3, 1, 5, 4))
    moved = corruptions.shift(x, 2, -1)
    assert torch.equal(moved[..., 2:, :3], x[..., :3, 1:])
    assert moved[..., :2, :].abs().sum() == 0
    assert moved[..., 3].abs().sum() == 0
    assert torch.equal(corruptions.shift(x), x)


def test_rotations_by_right_angles_are_exact():
    x = torch.randint(17, (3, 1, 8, 8), dtype=torch.uint8)
    for turns in range(5):
        assert torch.equal(corruptions.rotate(x, 90.0 * turns, 17), torch.rot90(x, turns, (-2, -1)))


def test_a_small_rotation_moves_a_point_on_its_circle():
    x = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    x[0, 0, 20, 35] = 1.0  # 15 to the right of the center
    turned = corruptions.rotate(x, 30.0)[0, 0]
    place = torch.arange(41, dtype=torch.float64) - 20
    center = torch.stack([(turned.sum(0) * place).sum(), -(turned.sum(1) * place).sum()]) / turned.sum()
    expected = 15 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    assert torch.allclose(center, expected.double(), atol=0.1)  # a tenth of a pixel


def test_blur_keeps_the_mass_and_adds_the_variance():
    x = torch.zeros(1, 1, 61, 61, dtype=torch.float64)
    x[0, 0, 30, 30] = 1.0
    blurred = corruptions.blur(x, 3.0)[0, 0]
    place = torch.arange(61, dtype=torch.float64) - 30
    assert blurred.sum().item() == pytest.approx(1.0)
    for across in (0, 1):
        assert (blurred.sum(across) * place**2).sum().item() == pytest.approx(9.0, rel=3e-3)  # cut off at 4 sigma
    flat = torch.full((1, 1, 8, 8), 9, dtype=torch.uint8)
    assert torch.equal(corruptions.blur(flat, 2.0, 17), flat)


@pytest.mark.parametrize("name", ["rotate", "blur"])
def test_levels_stay_levels(name):
    x = dgm.data.load("digits", "test").x[:20]
    changed = getattr(corruptions, name)(x, 1.3, 17)
    assert changed.dtype == x.dtype
    assert changed.max() <= 16


# -- attacks -----------------------------------------------------------------------------------------------------------


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight, bias
    return dgm.Discriminative(dgm.Categorical((), len(weight), layer))


def test_fgsm_follows_the_analytic_gradient(float64):
    """For logits W x: the gradient of -log p(y | x) is W^T (p - e_y)."""
    weight, bias = torch.randn(3, 5), torch.randn(3)
    classifier, x, y = linear(weight, bias), torch.randn(20, 5), torch.randint(3, (20,))
    error = classifier.class_probabilities(x) - nn.functional.one_hot(y, 3)
    expected = x + 0.2 * (error @ weight).sign()
    assert torch.allclose(corruptions.fgsm(classifier, x, y, 0.2), expected)


def test_pgd_finds_the_corner_of_a_linear_classifier(float64):
    """For two classes the worst x in the ball is the corner against w_y - w_other, from any start."""
    weight = torch.randn(2, 6)
    classifier, x, y = linear(weight, torch.zeros(2)), torch.randn(20, 6), torch.randint(2, (20,))
    worst = x - 0.3 * (weight[y] - weight[1 - y]).sign()
    assert torch.allclose(corruptions.pgd(classifier, x, y, 0.3), worst)


def test_attacks_in_parts_are_the_attack(float64, monkeypatch):
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    classifier, x, y = dgm.Discriminative(dgm.Categorical((), 3, network)), torch.randn(20, 6), torch.arange(20) % 3
    whole = corruptions.pgd(classifier, x, y, 0.3, gradient_steps=4)
    monkeypatch.setattr(corruptions, "AT_ONCE", 7)
    torch.testing.assert_close(corruptions.pgd(classifier, x, y, 0.3, gradient_steps=4), whole)


def test_an_attack_on_bayes_rule_is_that_on_the_logits_it_implies(float64):
    """p(x | y) Normal of one scale: log p(x | y) p(y) differs between classes by a linear function of x."""
    means = torch.randn(3, 4)
    table = nn.Embedding(3, 8)
    table.weight.data = torch.cat([means, torch.full((3, 4), dgm.Normal(1).initial()[1].item())], 1)
    generative = dgm.Labeled(dgm.Categorical((), 3), dgm.Normal(4, table))
    discriminative = linear(means, -0.5 * (means**2).sum(1))
    x, y = torch.randn(10, 4), torch.randint(3, (10,))
    assert torch.allclose(generative.class_probabilities(x), discriminative.class_probabilities(x))
    for attack in (corruptions.fgsm, corruptions.pgd):
        assert torch.allclose(attack(generative, x, y, 0.4), attack(discriminative, x, y, 0.4))


@pytest.mark.parametrize("name", ["made", "pixelcnn", "vae", "nsf", "classifier"])
def test_attacks_stay_in_their_ball_and_on_the_levels(name):
    digits = dgm.data.load("digits", num_data=6)
    program = dgm.build(name, digits, labeled=name != "classifier")
    before = program.training
    for attack in (corruptions.fgsm, functools.partial(corruptions.pgd, gradient_steps=2)):
        moved = attack(program, digits.x, digits.y, 2, 17)
        assert moved.dtype == digits.x.dtype
        assert (moved.long() - digits.x.long()).abs().max() <= 2
        assert moved.max() <= 16
        assert not torch.equal(moved, digits.x)
    assert program.training == before
    assert all(parameter.grad is None for parameter in program.parameters())


@pytest.mark.parametrize(
    ("attempt", "error", "words"),
    [
        (lambda: accuracy(P, Y[:2]), ValueError, "y has shape"),
        (lambda: nll(P, Y + 1), ValueError, "labels from 1 to 2, but probabilities has 2 classes"),
        (lambda: risk_coverage(Y == 1, P), ValueError, "pass \\(N,\\) of each"),
        (lambda: risk_coverage(Y == 1, Y * math.nan), ValueError, "NaN"),
        (lambda: corruptions.shift(torch.zeros(1, 1, 4, 4), 4), ValueError, "only 4 x 4 pixels"),
        (lambda: corruptions.rotate(torch.zeros(4, 4), 4), ValueError, "images are \\(N, 1, H, W\\)"),
        (lambda: corruptions.fgsm(dgm.Normal(2), P, Y, 0.1), TypeError, "has no p\\(y \\| x\\)"),
        (lambda: corruptions.fgsm(lambda x: x, P, Y, 0.5, 17), ValueError, "epsilon is 0.5"),
        (lambda: corruptions.fgsm(lambda x: x.round().detach(), P, Y, 0.5), ValueError, "no gradient in x"),
        (lambda: Bayesian(nn.Linear(2, 2), dgm.Data(P)), ValueError, "without labels"),
        (lambda: Bayesian(nn.Linear(2, 2), dgm.Data(P, Y)).draws(P), ValueError, "call its fit\\(\\) first"),
        (lambda: Bayesian(nn.Linear(2, 2), dgm.Data(P, Y), "iaf"), ValueError, "guide must be one of map, normal"),
    ],
)
def test_bad_input(attempt, error, words):
    with pytest.raises(error, match=words):
        attempt()


@pytest.mark.parametrize("program", ["labeled", "discriminative"])
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(3, 5), ValueError, r"x has shape \(3, 5\)"),
        (torch.zeros(0, 2), ValueError, "x is empty"),
        (torch.full((3, 2), math.nan), ValueError, "x holds NaN"),
        (torch.zeros(3, 2).double(), TypeError, "x has dtype torch.float64"),
        (torch.zeros(3, 2).bool(), TypeError, "x has dtype torch.bool"),
        (dgm.Data(torch.zeros(3, 2)), TypeError, "got Data: use x.x"),
    ],
)
def test_data_that_do_not_fit_a_classifier_are_named(program, x, error, words):
    classifier = dgm.Categorical((), 2, nn.Linear(2, 2))
    classifiers = {
        "labeled": dgm.Labeled(dgm.Categorical((), 2), dgm.Normal(2, nn.Embedding(2, 4))),
        "discriminative": dgm.Discriminative(classifier),
    }
    with pytest.raises(error, match=words):
        beliefs(classifiers[program], x)


# -- weights in doubt --------------------------------------------------------------------------------------------------


def test_a_posterior_over_weights_is_that_on_a_grid():
    """Logistic regression in two weights: E[p(y | x, w)] and log evidence by the sum over a grid of weights."""
    x = torch.randn(40, 1)
    y = (torch.rand(40) < torch.sigmoid(2 * x[:, 0])).long()
    layer = nn.Linear(1, 2)
    full = functools.partial(AutoMultivariateNormal, init_scale=0.1)
    bayesian = Bayesian(layer, dgm.Data(x, y), full).fit(epochs=300, batch_size=40, lr=0.05)

    # Only the difference of the two logits matters: its slope and offset are N(0, 2), as two weights are N(0, 1).
    axis = torch.linspace(-6, 6, 301)
    w = torch.cartesian_prod(axis, axis)
    log_prior = -(w**2).sum(1) / 4
    logits = w[:, :1] * x[:, 0] + w[:, 1:]
    log_post = log_prior + (logits * y - nn.functional.softplus(logits)).sum(1)
    post = log_post.double().softmax(0)
    new = torch.tensor([[-3.0], [0.0], [0.5], [4.0]])
    expected = (post[:, None] * torch.sigmoid(w[:, :1] * new[:, 0] + w[:, 1:])).sum(0)
    drawn = bayesian.draws(new, 400).exp()[..., 1]
    error = drawn.std(0) / 400**0.5
    # 4 standard errors of the draws, and 0.01 for a posterior that is not quite Normal.
    assert ((drawn.mean(0) - expected).abs() < 4 * error + 0.01).all()
    cell = (axis[1] - axis[0]) ** 2 / (4 * math.pi)
    evidence = log_post.double().logsumexp(0) + math.log(cell)
    bound = -40 * sum(bayesian.losses[-100:]) / 100
    assert evidence - 0.5 < bound < evidence + 0.1
    information = bayesian.mutual_information(new, 100)
    assert (information > 0).all()
    assert information[0] > information[1]  # far from the data the weights matter more


def test_the_prior_of_the_weights_keeps_the_variance_of_what_goes_through():
    """The variance of a linear layer's output: scale^2 (mean square of x + 1), whatever the number of inputs."""
    scale, draws = 1.5, 4000
    for width in (3, 48):
        x = torch.randn(1, width)
        bayesian = Bayesian(nn.Linear(width, 2), dgm.Data(x, torch.tensor([0])), scale=scale)
        with torch.no_grad():
            logits = torch.stack([bayesian.model(x)[0] for _ in range(draws)])
        expected = scale**2 * (x.square().mean().item() + 1)
        # The standard error of a Normal's variance is variance * sqrt(2 / n).
        assert logits.var().item() == pytest.approx(expected, abs=4 * expected / draws**0.5)


@pytest.mark.parametrize("guide", ["map", "normal", "lowrank"])
def test_guides_are_swapped_and_do_not_share_parameters(guide):
    digits = dgm.data.load("digits", num_data=300)
    network = dgm.networks.MLP((1, 8, 8), 10, (32,), levels=17)
    initial = [parameter.clone() for parameter in network.parameters()]
    first = Bayesian(network, digits, guide).fit(epochs=15, batch_size=32, lr=0.03)
    before = first.class_probabilities(digits.x, 4)
    assert first.losses[-1] < first.losses[0]
    assert accuracy(before, digits.y) > 0.8
    Bayesian(network, digits, guide).fit(epochs=1, seed=1)
    assert torch.equal(first.class_probabilities(digits.x, 4), before)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), initial, strict=True))
    assert not list(pyro.get_param_store().keys())
    if guide == "map":
        assert first.mutual_information(digits.x, 4).abs().max() < 1e-5
    moved = corruptions.pgd(first.log_class_probabilities, digits.x[:20], digits.y[:20], 4, 17, gradient_steps=3)
    assert accuracy(first.class_probabilities(moved), digits.y[:20]) < accuracy(before[:20], digits.y[:20])


def test_the_names_in_the_docstring_are_there():
    assert set(classification.GUIDES) == {"map", "normal", "lowrank"}
