"""fit: reproducible, recoverable, and as good as the best that can be computed by other means."""

import copy
import itertools
import json
import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from programs import CASES, data_for, vae
from pyro.infer import (
    JitTrace_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)
from torch import nn
from torch.distributions import MultivariateNormal

import dgm_pyro as dgm
from dgm_pyro import ELBO, IWAE, NonFiniteLossError
from dgm_pyro.networks import MLP
from dgm_pyro.objectives import Bound, elbo
from dgm_pyro.training.step import PyroObjective


def fit(program, data, objective=None, **options):
    settings = {"epochs": 3, "batch_size": 8, "lr": 1e-2, "validation": None, "progress": False}
    return dgm.fit(program, data, objective, **settings | options)


def weights(program):
    return {name: p.detach().clone() for name, p in program.named_parameters()}


def numbers(history):
    """A history without its clock."""
    epochs = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in history.as_dict()["epochs"]]
    return epochs, history.best_epoch, history.stopped_early


def classifier(features=2, classes=3, hidden=()):
    layers = []
    for a, b in itertools.pairwise((features, *hidden, classes)):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return dgm.Discriminative(dgm.Categorical((), classes, nn.Sequential(*layers[:-1]), given_shape=(features,)))


# -- reproducible ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vae", "vae-bit-latent", "diffusion", "labeled-vae", "discriminative"])
def test_equal_seeds_give_equal_bits(name):
    case = CASES[name]
    results = []
    for noise in range(2):
        torch.manual_seed(noise)  # what came before must not matter
        program = case.build()
        data = data_for(case, program)
        history = fit(program, data, validation=0.25, seed=7)
        results.append((weights(program), numbers(history)))
    (first, first_numbers), (second, second_numbers) = results
    assert first_numbers == second_numbers
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_another_seed_gives_another_result():
    case = CASES["vae"]
    losses = []
    for seed in (0, 1):
        program = case.build()
        losses.append(fit(program, data_for(case, program), seed=seed).losses)
    assert losses[0] != losses[1]


def test_the_callers_random_state_is_left_alone():
    program = CASES["vae"].build()
    data = data_for(CASES["vae"], program)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    fit(program, data, validation=0.25)
    fit(program, data, Trace_ELBO())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_the_callers_param_store_is_left_alone():
    pyro.param("mine", torch.tensor(3.0))
    program = CASES["vae"].build()
    for objective in (None, Trace_ELBO()):
        fit(program, data_for(CASES["vae"], program), objective)
    assert [*pyro.get_param_store().keys()] == ["mine"]
    assert pyro.param("mine").item() == 3.0


def test_the_callers_validation_setting_is_left_alone():
    program = CASES["vae"].build()
    with pyro.validation_enabled(True):
        fit(program, data_for(CASES["vae"], program))
        with pytest.raises(ValueError, match="constraint"):
            torch.distributions.Normal(0.0, torch.tensor(-1.0))


def test_training_starts_from_the_weights_it_finds():
    """Two epochs, then nothing more to do than to keep them: an lr of nearly zero moves nothing."""
    program = CASES["normal-learned"].build()
    before = weights(program)
    fit(program, torch.randn(24, 2), lr=1e-12)
    for name, value in weights(program).items():
        torch.testing.assert_close(value, before[name])


# -- every program -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.trainable])
def test_every_program_trains(name):
    case = CASES[name]
    program = case.build()
    data = data_for(case, program, 32)
    before = weights(program)
    history = fit(program, data, epochs=2, batch_size=16, validation=0.25)
    assert len(history.epochs) == 2
    assert all(math.isfinite(loss) for loss in history.losses)
    assert not program.training
    assert any(not torch.equal(value, before[name]) for name, value in weights(program).items())


def test_a_normal_becomes_that_of_maximum_likelihood(float64):
    x = 2 + 3 * torch.randn(200, 2)
    program = dgm.Normal(2, learned=True)
    fit(program, x, epochs=400, batch_size=200, lr=0.2)
    distribution = program().base_dist
    torch.testing.assert_close(distribution.mean, x.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(distribution.stddev, x.std(0, correction=0), rtol=1e-3, atol=1e-3)


class Affine(nn.Module):
    """A location that is linear in the input, a scale that does not depend on it."""

    def __init__(self, features, out):
        super().__init__()
        self.loc, self.raw_scale = nn.Linear(features, out), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return torch.cat([self.loc(x), self.raw_scale.expand(len(x), -1)], -1)


@pytest.mark.parametrize("objective", [ELBO(4), IWAE(8)], ids=repr)
def test_a_linear_gaussian_vae_becomes_the_best_gaussian(float64, objective):
    """Factor analysis with one factor in two dimensions reaches every covariance: its optimum is the full Gaussian."""
    chol = torch.tensor([[1.0, 0.0], [0.8, 0.5]])
    x = torch.randn(400, 2) @ chol.T + torch.tensor([1.0, -0.5])
    program = dgm.VAE(dgm.Normal(1), dgm.Normal(2, Affine(1, 2)), dgm.Normal(1, Affine(2, 1)))
    fit(program, x, objective, epochs=120, batch_size=100, lr=4e-2)
    network = program.likelihood.network
    loading, noise = network.loc.weight, F.softplus(network.raw_scale)
    marginal = MultivariateNormal(network.loc.bias, loading @ loading.T + torch.diag(noise**2))
    best = MultivariateNormal(x.mean(0), x.T.cov(correction=0))
    gap = (best.log_prob(x) - marginal.log_prob(x)).mean().item()
    assert 0 <= gap < 5e-3
    bound = dgm.evaluate(program, x, num_particles=50).nats  # the encoder is exact in the optimum, too
    assert bound == pytest.approx(marginal.log_prob(x).mean().item(), abs=5e-3)


# -- objectives --------------------------------------------------------------------------------------------------------


PYRO = {
    "Trace_ELBO": Trace_ELBO(),
    "Trace_ELBO, particles": Trace_ELBO(num_particles=2, vectorize_particles=True),
    "TraceMeanField_ELBO": TraceMeanField_ELBO(),
    "TraceGraph_ELBO": TraceGraph_ELBO(),
    "RenyiELBO": RenyiELBO(alpha=0.5, num_particles=2),
    "ReweightedWakeSleep": ReweightedWakeSleep(num_particles=2),
    "TraceTMC_ELBO": TraceTMC_ELBO(),
}


@pytest.mark.parametrize("objective", PYRO.values(), ids=PYRO)
def test_any_elbo_of_pyro_trains(objective):
    torch.manual_seed(0)
    program = vae(dgm.Normal(2))
    x = 3 + 0.3 * torch.randn(64, 2)
    before, asked = weights(program), copy.deepcopy(vars(objective))
    history = fit(program, x, objective, epochs=12, batch_size=16, lr=3e-2, validation=0.25)
    assert history.losses[-1] < history.losses[0] - 1
    assert history.epochs[-1].validation < history.epochs[0].validation - 1
    assert history.epochs[-1].reconstruction == {}
    moved = {name for name, value in weights(program).items() if not torch.equal(value, before[name])}
    assert moved == set(before)
    assert vars(objective) == asked  # an ELBO remembers plates: ours must not change the user's


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (JitTrace_ELBO(), "compile=True"),
        (JitTraceMeanField_ELBO(), "compile=True"),
        (TraceTailAdaptive_ELBO(num_particles=2, vectorize_particles=True), r"pyro\.infer\.SVI"),
    ],
    ids=lambda o: type(o).__name__,
)
def test_an_elbo_of_pyro_that_cannot_be_is_refused_before_anything_happens(objective, message):
    program = vae(dgm.Normal(2))
    before = weights(program)
    with pytest.raises(ValueError, match=rf"{type(objective).__name__}.*{message}"):
        fit(program, torch.randn(8, 2), objective)
    assert all(torch.equal(value, before[name]) for name, value in weights(program).items())


def test_pyros_enumeration_trains_and_sums_the_labels_out():
    torch.manual_seed(0)
    program = dgm.Labeled(
        dgm.Categorical((), 2, learned=True),
        dgm.Normal(1, nn.Embedding(2, 2)),
        dgm.Categorical((), 2, MLP((1,), 2, hidden=(4,))),
    )
    x = torch.cat([torch.randn(40, 1) - 3, torch.randn(60, 1) + 3])
    before = weights(program)
    history = fit(program, x, TraceEnum_ELBO(), epochs=20, batch_size=25, lr=3e-2)
    assert history.losses[-1] < history.losses[0] - 0.5
    assert all(not torch.equal(value, before[name]) for name, value in weights(program).items())


@pytest.mark.parametrize("objective", [Trace_ELBO(), TraceMeanField_ELBO()], ids=lambda o: type(o).__name__)
def test_pyros_gradient_is_ours_per_datum(float64, objective):
    program = CASES["vae"].build()
    x, _ = CASES["vae"].draw(program, 6)
    theirs = PyroObjective(objective)
    theirs.sums(program, x, None, {})  # the first call looks for plates, and draws
    program.zero_grad()
    torch.manual_seed(3)
    value = theirs.sums(program, x, None, {})["value"][""] / len(x)
    gradients = [p.grad.clone() for p in program.parameters()]
    torch.manual_seed(3)
    bound = ELBO(analytic_kl=isinstance(objective, TraceMeanField_ELBO))(program, x)
    torch.testing.assert_close(value, bound.value.mean().detach())
    expected = torch.autograd.grad(-bound.value.mean(), [*program.parameters()])
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b)


OURS = ["elbo", "beta:0.5", "annealed", "free-bits:0.1", "stl", "iwae", "dreg:4", "rws", "enumerate", ELBO(3), IWAE(2)]


@pytest.mark.parametrize("objective", OURS, ids=str)
def test_our_objectives_train_by_name_or_instance(objective):
    torch.manual_seed(0)
    program = vae(dgm.Normal(2))
    history = fit(program, 3 + 0.3 * torch.randn(64, 2), objective, epochs=12, lr=3e-2)
    assert history.losses[-1] < history.losses[0] - 1


def test_an_objective_of_your_own_is_trained_and_validated():
    """A beta-VAE in five lines: its loss, not the ELBO's, is in the history, and at the best epoch."""
    seen = []

    def beta(program, x, given=None, observed=None):
        bound = elbo(program, x, given, observed=observed)
        seen.append(program.training)
        value = sum(bound.reconstruction.values()) - 4 * sum(bound.kl.values())
        return Bound(value, value, bound.reconstruction, {site: 4 * kl for site, kl in bound.kl.items()})

    torch.manual_seed(0)
    program = vae(dgm.Normal(2))
    data = torch.randn(40, 2)
    history = fit(program, data, beta, epochs=2, batch_size=10, validation=torch.randn(20, 2))
    assert seen == [True] * 4 + [False] + [True] * 4 + [False]
    for epoch in history.epochs:
        assert epoch.loss == pytest.approx(
            4 * 0 + sum(epoch.kl.values()) - sum(epoch.reconstruction.values()), rel=1e-6
        )


class Recorded:
    """An objective that writes down at which share of training it is used."""

    def __init__(self):
        self.used, self.elapsed = [], None

    def at(self, elapsed):
        self.elapsed = elapsed
        return self

    def __call__(self, program, x, given=None, observed=None):
        self.used.append((program.training, round(self.elapsed, 9)))
        return elbo(program, x, given, observed=observed)


def test_an_objective_is_told_of_its_progress_and_validated_at_its_end():
    objective = Recorded()
    fit(vae(dgm.Normal(2)), torch.randn(40, 2), objective, epochs=2, batch_size=16, validation=torch.randn(8, 2))
    steps = [(True, round(i / 5, 9)) for i in range(6)]
    assert objective.used == [*steps[:3], (False, 1.0), *steps[3:], (False, 1.0)]


def test_annealing_trains_with_its_schedule():
    """Step by step the history is that of ELBOs with these weights, one epoch each."""
    x = torch.randn(20, 2)
    weights_used = []

    def schedule(progress):
        weights_used.append(progress)
        return 0.5 * progress

    program = CASES["vae"].build()
    history = fit(program, x, ELBO(beta=schedule), epochs=5, batch_size=20, validation=torch.randn(8, 2))
    assert weights_used == [w for i in range(5) for w in (i / 4, 1.0)]
    for i, epoch in enumerate(history.epochs):
        expected = 0.5 * i / 4 * sum(epoch.kl.values()) - sum(epoch.reconstruction.values())
        assert epoch.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("particles", [1, 2, 64])
def test_validation_takes_no_more_memory_than_training_or_four_batches_of_one_draw(particles):
    rows = []

    class Counted(IWAE):
        def __call__(self, program, x, given=None, observed=None):
            if not program.training:
                rows.append(len(x))
            return super().__call__(program, x, given, observed)

    fit(
        vae(dgm.Normal(2)),
        torch.randn(20, 2),
        Counted(particles),
        epochs=1,
        batch_size=10,
        validation=torch.randn(50, 2),
    )
    assert sum(rows) == 50
    assert max(rows) == {1: 40, 2: 20, 64: 10}[particles]


# -- validation --------------------------------------------------------------------------------------------------------


def overfitting():
    """Random labels and a wide network: the validation loss falls a little, then rises without end."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), torch.randint(3, (60,))
    return classifier(5, 3, (64,)), dgm.Data(x[:30], y[:30], num_classes=3), dgm.Data(x[30:], y[30:], num_classes=3)


def test_the_best_validated_weights_are_kept():
    program, train, held_out = overfitting()
    history = fit(program, train, epochs=40, lr=2e-2, validation=held_out)
    validation = [epoch.validation for epoch in history.epochs]
    best = min(validation)
    assert history.best_epoch == 1 + validation.index(best) < 40
    assert validation[-1] > best + 0.5
    assert -dgm.evaluate(program, held_out).nats == pytest.approx(best, abs=1e-6)
    assert history.epochs[-1].loss < 0.2  # it did overfit


def test_of_a_bound_too_the_recorded_loss_is_that_of_the_weights_kept():
    torch.manual_seed(0)
    program, x = vae(dgm.Normal(2)), torch.randn(80, 2)
    history = fit(program, x[:40], epochs=5, batch_size=8, validation=x[40:], seed=3)
    recorded = min(epoch.validation for epoch in history.epochs)
    torch.manual_seed(3)
    with torch.no_grad():
        again = torch.cat([dgm.ELBO()(program, batch).value for batch in x[40:].split(32)])
    assert -again.mean().item() == pytest.approx(recorded, abs=1e-5)


def test_without_validation_the_last_weights_are_kept():
    program, train, _ = overfitting()
    history = fit(program, train, epochs=4, batch_size=30, lr_schedule="constant")
    assert history.best_epoch == 4
    assert [epoch.validation for epoch in history.epochs] == [None] * 4
    assert not history.stopped_early


def test_early_stopping_waits_as_long_as_told():
    program, train, held_out = overfitting()
    history = fit(program, train, epochs=40, lr=2e-2, validation=held_out, early_stopping=5)
    assert history.stopped_early
    assert len(history.epochs) == history.best_epoch + 5
    assert -dgm.evaluate(program, held_out).nats == pytest.approx(
        min(epoch.validation for epoch in history.epochs), abs=1e-6
    )


def test_a_fraction_is_held_out_by_the_seed():
    """fit(data, validation=0.25) is fit(a, validation=b) for a, b = data.split(0.25)."""
    x = torch.randn(40, 2)
    data = dgm.Data(x)
    train, held_out = data.split(0.25, seed=5)
    results = []
    for arguments in ({"data": data, "validation": 0.25}, {"data": train, "validation": held_out.x}):
        program = CASES["normal-learned"].build()
        results.append((numbers(fit(program, **arguments, seed=5)), weights(program)))
    assert results[0][0] == results[1][0]
    assert torch.equal(*(result[1]["parameter"] for result in results))


def test_validation_does_not_change_training():
    case = CASES["vae"]
    losses = []
    for validation in (None, torch.randn(10, 2)):
        program = case.build()
        losses.append(fit(program, data_for(case, program), validation=validation).losses)
    assert losses[0] == losses[1]


# -- the optimizer, by hand --------------------------------------------------------------------------------------------


def by_hand(network, x, y, steps, lr, *, weight_decay=0.0, rate=lambda step: 1.0, ema=None):
    """AdamW in full batches on the cross-entropy; returns the averaged weights, if asked."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    average = [p.detach().clone() for p in network.parameters()]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * rate(step)
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        if ema is not None:
            decay = min(ema, (2 + step) / (11 + step))
            average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, network.parameters(), strict=True)]
    return average if ema is not None else [p.detach() for p in network.parameters()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lr_schedule": "constant"}, {}),
        ({"lr_schedule": "constant", "weight_decay": 0.3}, {"weight_decay": 0.3}),
        ({"lr_schedule": "constant", "ema": 0.9}, {"ema": 0.9}),
        ({"lr_schedule": "constant", "ema": 0.2}, {"ema": 0.2}),
        ({"lr_schedule": "cosine"}, {"rate": lambda step: 0.5 * (1 + math.cos(math.pi * step / 30))}),
    ],
    ids=["constant", "decay", "average", "quick-average", "cosine"],
)
def test_it_is_adamw(float64, options, expected):
    x, y = torch.randn(20, 2), torch.randint(3, (20,))
    program = classifier()
    reference = copy.deepcopy(program.classifier.network)
    fit(program, dgm.Data(x, y), epochs=30, batch_size=20, lr=1e-2, **options)
    for ours, theirs in zip(program.parameters(), by_hand(reference, x, y, 30, 1e-2, **expected), strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-7, atol=1e-9)


def test_the_rate_is_warmed_up_over_the_first_fiftieth(float64):
    x, y = torch.randn(20, 2), torch.randint(3, (20,))
    program = classifier()
    reference = copy.deepcopy(program.classifier.network)
    fit(program, dgm.Data(x, y), epochs=200, batch_size=20, lr=1e-2, lr_schedule="constant")
    expected = by_hand(reference, x, y, 200, 1e-2, rate=lambda step: min(1.0, (step + 1) / 4))
    for ours, theirs in zip(program.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-7, atol=1e-9)


def test_averaged_weights_are_what_is_validated():
    program, train, held_out = overfitting()
    history = fit(program, train, epochs=15, lr=2e-2, validation=held_out, ema=0.95)
    best = min(epoch.validation for epoch in history.epochs)
    assert -dgm.evaluate(program, held_out).nats == pytest.approx(best, abs=1e-6)


def test_frozen_parameters_stay_where_they_are():
    program = vae(dgm.Normal(2))
    program.likelihood.requires_grad_(False)
    before = weights(program)
    fit(program, torch.randn(20, 2), weight_decay=0.5, ema=0.9)
    for name, value in weights(program).items():
        assert torch.equal(value, before[name]) == name.startswith("likelihood")


# -- modes, batches, augmentation --------------------------------------------------------------------------------------


# Calls, with one row, by which `fit` asks for the support of the data and of the validation data.
SUPPORTS = 2


class Spy(nn.Module):
    """A linear classifier that remembers the mode and the batch of each call."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(2, 3), []

    def forward(self, x):
        if len(x) > 1:  # x is stated for one row to find its support
            self.calls.append((self.training, x.detach().clone()))
        return self.linear(x)


def test_every_datum_is_seen_once_per_epoch_in_training_mode():
    spy = Spy()
    program = dgm.Discriminative(dgm.Categorical((), 3, spy))
    x = torch.arange(20.0).reshape(10, 2)
    fit(
        program,
        dgm.Data(x, torch.arange(10) % 3),
        epochs=2,
        batch_size=4,
        validation=dgm.Data(-x, torch.arange(10) % 3),
    )
    calls = spy.calls
    assert [mode for mode, _ in calls] == [True] * 3 + [False] + [True] * 3 + [False]
    assert [len(batch) for mode, batch in calls if mode] == [4, 4, 2, 4, 4, 2]
    first, second = (torch.cat([batch for _, batch in calls[i : i + 3]]) for i in (0, 4))
    assert not torch.equal(first, x)
    assert not torch.equal(first, second)
    for epoch in (first, second):
        assert torch.equal(epoch[epoch[:, 0].argsort()], x)
    assert torch.equal(calls[3][1], -x)
    assert not program.training


def test_augmentation_is_for_training_only():
    spy = Spy()
    program = dgm.Discriminative(dgm.Categorical((), 3, spy))
    data = dgm.Data(torch.ones(10, 2), torch.arange(10) % 3)
    fit(program, data, epochs=1, batch_size=5, validation=data, augment=lambda x: x + 5)
    assert [batch.unique().tolist() for _, batch in spy.calls] == [[6.0], [6.0], [1.0]]


# -- the history -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vae", "vae-two-levels", "diffusion", "vae-diffusion-prior", "labeled-vae"])
def test_the_terms_add_up_to_the_loss(name):
    case = CASES[name]
    program = case.build()
    history = fit(program, data_for(case, program), epochs=2, batch_size=7, validation=0.25)
    for epoch in history.epochs:
        assert sum(epoch.kl.values()) - sum(epoch.reconstruction.values()) == pytest.approx(epoch.loss, rel=1e-5)
    assert all(later.seconds > earlier.seconds for earlier, later in itertools.pairwise(history.epochs))
    assert history.losses == [epoch.loss for epoch in history.epochs]
    assert json.loads(json.dumps(history.as_dict()))["best_epoch"] == history.best_epoch


def test_the_loss_is_the_mean_over_the_data_not_over_the_batches():
    """lr so small that nothing moves: an epoch of batches of 7, 7 and 2 data is the mean over 16."""
    program = CASES["normal-learned"].build()
    x = torch.randn(16, 2)
    expected = -program.log_prob(x).mean().item()
    history = fit(program, x, epochs=1, batch_size=7, lr=1e-12)
    assert history.losses == [pytest.approx(expected, rel=1e-6)]


def test_a_loss_that_is_no_likelihood_is_not_given_in_nats(capsys):
    program = dgm.Flow(2, [dgm.networks.LULinear(2)], dgm.Normal(2))
    history = dgm.fit(program, torch.randn(40, 2), "energy", epochs=1)
    assert history.unit == "squared distance"
    assert "squared distance" in capsys.readouterr().err
    assert dgm.fit(program, torch.randn(40, 2), epochs=1, progress=False).unit == "nats per datum"


def test_the_bar_shows_the_loss_in_nats(capsys):
    program = CASES["normal-learned"].build()
    dgm.fit(program, torch.randn(16, 2), epochs=2, validation=0.25)
    shown = capsys.readouterr().err
    assert "fit Normal" in shown
    assert "nats" in shown
    assert "validation" in shown
    fit(program, torch.randn(16, 2))
    assert capsys.readouterr().err == ""


# -- when it goes wrong ------------------------------------------------------------------------------------------------


class Breaking(dgm.Conditional):
    """A Normal whose location becomes NaN at one call in training; `unused` comes first among the parameters."""

    def __init__(self, call, where="loss"):
        super().__init__()
        self.event_shape = torch.Size((2,))
        self.call, self.where, self.calls = call, where, 0
        self.unused = nn.Parameter(torch.zeros(2))
        self.loc = nn.Parameter(torch.zeros(2))

    def forward(self, given=None):
        loc = self.loc + self.unused
        if self.training:
            self.calls += 1
            if self.calls == self.call:
                if self.where == "loss":
                    loc = loc * math.nan
                elif self.where == "gradient":  # |0|^(1/2) has the value 0, and a gradient without end
                    loc = loc + (self.loc * 0).abs().sqrt() * 0
                else:  # a gradient whose entries are finite, but not its norm
                    loc = loc + 1e30 * (self.loc - self.loc.detach())
        return dist.Normal(loc, 1.0).to_event(1)


def state_after(epochs):
    program = Breaking(0)
    fit(program, torch.ones(20, 2), epochs=epochs, batch_size=5, lr_schedule="constant")
    return weights(program)


@pytest.mark.parametrize("where", ["loss", "gradient", "norm"])
def test_the_first_number_that_is_none_stops_it_and_the_last_epoch_is_restored(where):
    program = Breaking(4 * 2 + 3, where)  # the third step of the third epoch
    with pytest.raises(NonFiniteLossError) as caught:
        fit(program, torch.ones(20, 2), epochs=6, batch_size=5, lr_schedule="constant")
    error = caught.value
    assert (error.epoch, error.step, error.restored_epoch) == (3, 11, 2)
    assert error.site == ("x" if where == "loss" else "loc")
    assert f"at site {error.site!r}, epoch 3, step 11" in str(error)
    assert "the weights of epoch 2 again" in str(error)
    for name, value in state_after(2).items():
        assert torch.equal(weights(program)[name], value)
    assert not program.training


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_in_the_first_epoch_the_weights_it_came_with_are_restored(where):
    program = Breaking(2, where)
    before = weights(program)
    with pytest.raises(NonFiniteLossError, match="the weights of before training again") as caught:
        fit(program, torch.ones(20, 2), batch_size=5)
    assert (caught.value.epoch, caught.value.step, caught.value.restored_epoch) == (1, 2, 0)
    assert all(torch.equal(value, before[name]) for name, value in weights(program).items())


def test_a_pyro_objective_is_watched_too():
    program = Breaking(7)
    before = weights(program)
    with pytest.warns(UserWarning, match="NaN"), pytest.raises(NonFiniteLossError) as caught:
        fit(program, torch.ones(20, 2), Trace_ELBO(), batch_size=20, epochs=9)
    assert caught.value.site == "x"
    assert caught.value.restored_epoch == caught.value.epoch - 1 > 0
    assert not torch.equal(weights(program)["loc"], before["loc"])
    assert torch.isfinite(weights(program)["loc"]).all()


def test_the_site_at_fault_is_named():
    program = vae(dgm.Normal(2))
    data = torch.randn(20, 2)
    broken = copy.deepcopy(program)
    with torch.no_grad():
        broken.encoder.network.rest[-1].bias[-1] = math.nan  # the scale of q(z | x)
    with pytest.raises(NonFiniteLossError) as caught:
        fit(broken, data)
    assert caught.value.site in ("x", "z")
    broken = copy.deepcopy(program)
    with torch.no_grad():
        broken.likelihood.network.rest[-1].bias[0] = math.inf
    with pytest.raises(NonFiniteLossError) as caught:
        fit(broken, data)
    assert caught.value.site == "x"
    broken = vae(dgm.Normal(2, learned=True))
    with torch.no_grad():
        broken.prior.parameter[0] = math.nan
    with pytest.raises(NonFiniteLossError) as caught:
        fit(broken, data)
    assert caught.value.site == "z"


class BreakingInValidation(Breaking):
    def forward(self, given=None):
        self.calls += not self.training
        loc = self.loc * math.nan if self.calls == self.call and not self.training else self.loc
        return dist.Normal(loc + self.unused, 1.0).to_event(1)


def test_a_validation_loss_that_is_none_stops_it_too():
    program = BreakingInValidation(SUPPORTS + 3)
    with pytest.raises(NonFiniteLossError, match="the validation loss is not finite") as caught:
        fit(program, torch.ones(20, 2), batch_size=5, epochs=6, validation=torch.ones(5, 2), lr_schedule="constant")
    assert (caught.value.epoch, caught.value.step, caught.value.restored_epoch) == (3, 12, 2)
    assert all(torch.equal(weights(program)[name], value) for name, value in state_after(2).items())


def test_an_interrupt_leaves_the_best_weights_so_far():
    """Ctrl-C in the middle of an epoch: it comes through, and what was learned is in the program."""
    program, train, held_out = overfitting()
    calls = []

    def augment(x):
        calls.append(len(x))
        if len(calls) == 4 * 20 + 2:
            raise KeyboardInterrupt
        return x

    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        fit(program, train, epochs=40, lr=2e-2, validation=held_out, augment=augment)
    assert torch.equal(torch.get_rng_state(), before)
    assert not program.training
    assert not [*pyro.get_param_store().keys()]

    twin, train, held_out = overfitting()
    history = fit(twin, train, epochs=40, lr=2e-2, validation=held_out)
    best = min(epoch.validation for epoch in history.epochs[:20])
    assert -dgm.evaluate(program, held_out).nats == pytest.approx(best, abs=1e-6)


def test_an_error_of_the_users_leaves_the_best_weights_so_far():
    program = Breaking(0)
    before = weights(program)

    def objective(program, x, given=None, observed=None):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fit(program, torch.ones(20, 2), objective)
    assert all(torch.equal(value, before[name]) for name, value in weights(program).items())


# -- what it refuses ---------------------------------------------------------------------------------------------------


X = torch.zeros(10, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be a positive integer, got 0"),
        ({"epochs": 2.0}, ValueError, "epochs must be a positive integer"),
        ({"batch_size": -1}, ValueError, "batch_size must be a positive integer"),
        ({"lr": 0}, ValueError, "lr must be a number above 0, got 0"),
        ({"lr": math.nan}, ValueError, "lr must be a number above 0"),
        ({"lr": "fast"}, ValueError, "lr must be a number above 0, got 'fast'"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be a number of at least 0"),
        ({"lr_schedule": "linear"}, ValueError, "lr_schedule must be one of cosine, constant, .*got 'linear'"),
        ({"early_stopping": 0, "validation": 0.2}, ValueError, "early_stopping must be a positive integer"),
        ({"early_stopping": 3}, ValueError, "early_stopping needs validation data"),
        ({"ema": 1.0}, ValueError, "ema must be a decay between 0 and 1"),
        ({"ema": 0}, ValueError, "ema must be a decay between 0 and 1"),
        ({"validation": 1.0}, ValueError, "validation must be a fraction between 0 and 1"),
        ({"validation": 0.0}, ValueError, "validation must be a fraction between 0 and 1"),
        ({"validation": 0.01}, ValueError, "leaves one part empty"),
        ({"validation": "all"}, TypeError, "validation must be a dgm.data.Data or a torch.Tensor, got str"),
        (
            {"validation": torch.zeros(5, 3)},
            ValueError,
            r"x has shape \(5, 3\), but the program's event_shape is \(2,\)",
        ),
        ({"validation": torch.full((5, 2), math.nan)}, ValueError, "NaN"),
        ({"objective": "likelihood"}, ValueError, "objective must be one of elbo, beta, .*got 'likelihood'"),
        ({"objective": 3}, TypeError, "objective must be callable, a name, or a Pyro ELBO, got int"),
        ({"objective": ELBO}, TypeError, r"objective is the class ELBO: pass an instance, ELBO\(\)"),
        ({"objective": Trace_ELBO}, TypeError, r"objective is the class Trace_ELBO: pass an instance, Trace_ELBO\(\)"),
        ({"seed": "zero"}, TypeError, "seed must be an integer, got 'zero'"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ({"seed": None}, TypeError, "seed must be an integer, got None"),
        ({"seed": 2**70}, ValueError, f"seed must be an integer of at least 0 and at most 64 bits, got {2**70}"),
        ({"device": "gpu"}, ValueError, "device must be 'auto', 'cpu', 'cuda'"),
        ({"data": torch.zeros(10, 3)}, ValueError, r"x has shape \(10, 3\)"),
        ({"data": [1, 2]}, TypeError, "data must be a dgm.data.Data or a torch.Tensor, got list"),
        ({"data": torch.zeros(0, 2)}, ValueError, "x is empty"),
        ({"data": dgm.Data(torch.zeros(10, 2).long(), levels=3)}, ValueError, "integer data.*Dequantized"),
        ({"program": nn.Linear(2, 2)}, TypeError, "program must be a dgm.Program, got Linear"),
        ({"program": dgm.Normal(2)}, ValueError, "no parameters that require a gradient"),
    ],
)
def test_options_that_cannot_be_are_refused_and_nothing_changes(options, error, message):
    program = CASES["normal-learned"].build()
    before, mode = weights(program), program.training
    with pytest.raises(error, match=message):
        fit(**{"program": program, "data": X} | options)
    assert program.training == mode
    assert all(torch.equal(value, before[name]) for name, value in weights(program).items())


def test_an_objective_that_returns_no_bound_is_refused():
    program = CASES["normal-learned"].build()
    before = weights(program)
    with pytest.raises(TypeError, match=r"an objective must return a dgm\.objectives\.Bound, but .* returned a Tensor"):
        fit(program, X, lambda program, x, given, observed: program.exact_log_prob(x))
    assert all(torch.equal(value, before[name]) for name, value in weights(program).items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        fit(CASES["normal-learned"].build(), X, device="cuda")


@pytest.mark.parametrize("size", [1, 4])
def test_data_that_the_fraction_does_not_split_are_refused(size):
    with pytest.raises(ValueError, match=f"validation=0.1 of {size} data.*validation=None"):
        dgm.fit(dgm.Normal(2, learned=True), torch.randn(size, 2), epochs=1, progress=False)


class Seen(nn.Module):
    """A network that needs two data in training, and remembers those of each batch."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 4))
        self.batches = []

    def forward(self, x):
        if self.training:
            self.batches.append(x[:, 0].tolist())
        return self.layers(x)


@pytest.mark.parametrize(("size", "expected"), [(9, [4, 4]), (10, [4, 4, 2]), (8, [4, 4]), (3, [3])])
def test_a_last_batch_of_one_is_left_out_and_the_shuffling_leaves_out_another(size, expected):
    network, x = Seen(), torch.arange(float(size))[:, None]
    encoder = dgm.Normal(2, network, given_shape=(1,))
    program = dgm.VAE(dgm.Normal(2), dgm.Normal(1, MLP((2,), 2, hidden=(4,))), encoder)
    dgm.fit(program, x, epochs=6, batch_size=4, validation=None, progress=False)
    epochs = [network.batches[i : i + len(expected)] for i in range(0, len(network.batches), len(expected))]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [expected] * 6
    left_out = {row for epoch in epochs for row in x[:, 0].tolist() if not any(row in batch for batch in epoch)}
    assert len(left_out) > 1 if size == 9 else not left_out


FAR = {
    "offset": (lambda x: x + 1e6, r"feature 0 .*mean 1e\+06 and standard deviation [01].*Standardized"),
    "wide": (lambda x: x * torch.tensor([1.0, 1e5]), r"feature 1 .*Standardized"),
    "offset constant": (lambda x: torch.cat((x[:, :1], torch.full((len(x), 1), 500.0)), 1), "feature 1 .*Standardized"),
}


@pytest.mark.parametrize("name", FAR)
def test_data_far_from_scale_one_are_warned_of(name):
    move, message = FAR[name]
    with pytest.warns(UserWarning, match=message):
        dgm.fit(dgm.Normal(2, learned=True), move(torch.randn(200, 2)), epochs=1, progress=False)


def test_ordinary_data_and_an_actnorm_are_not():
    x = torch.randn(200, 2) * torch.tensor([0.0, 50.0]) + torch.tensor([1.0, 90.0])
    dgm.fit(dgm.Normal(2, learned=True), x, epochs=1, progress=False)  # warnings are errors here
    dgm.fit(dgm.Flow(2, [dgm.networks.ActNorm(2)]), torch.randn(200, 2) + 1e4, epochs=1, progress=False)


def test_labels_are_checked_before_training():
    x, y = torch.randn(6, 2), torch.tensor([0, 1, 2, -1, 1, 5])
    labeled, conditional = CASES["labeled"].build(), CASES["normal-given-label"].build()
    with pytest.raises(ValueError, match="6 classes, but this Labeled has 3"):
        fit(labeled, dgm.Data(x, y))
    y = y.clamp(max=2)
    for objective in (None, "iwae", "rws", "enumerate", "free-bits", TraceEnum_ELBO()):
        with pytest.raises(ValueError, match=r"unknown labels \(-1\).*'y'.*semi-supervised"):
            fit(labeled, dgm.Data(x, y), objective)
    known = dgm.Data(x[:3], y[:3])
    with pytest.raises(ValueError, match="unknown labels"):
        fit(labeled, known, validation=dgm.Data(x, y))
    with pytest.raises(ValueError, match="labels from -1 to 2"):
        fit(conditional, dgm.Data(x, y))
    with pytest.raises(ValueError, match=r"conditional: pass Data\(x, y\)"):
        fit(conditional, dgm.Data(x))
    with pytest.raises(TypeError, match=r"Data\(x, y\) with labels"):
        fit(conditional, x)
    fit(CASES["normal-learned"].build(), dgm.Data(x, y))  # who reads no labels has nothing against them
