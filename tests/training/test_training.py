"""A training that was stored and continued is the one that was not: every number and weight, to the last bit.

This file is a test and, run by itself, the new process in which the trainings of a folder are continued.
"""

import copy
import dataclasses
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import programs
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import CASES, data_for, once_per_part, vae
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import nn

import dgm_pyro as dgm
from dgm_pyro.networks import MLP
from dgm_pyro.training import compilation, optimizers, step
from dgm_pyro.training import fit as training_module
from dgm_pyro.training.distributed import ProcessGroup
from dgm_pyro.training.fit import Training, fit
from dgm_pyro.training.options import TrainingOptions, option_types

# -- recipes -----------------------------------------------------------------------------------------------------------


def options(**others):
    return TrainingOptions(**{"epochs": 6, "batch_size": 8, "lr": 1e-2, "validation": 0.25, "device": "cpu"} | others)


def of(name, objective=None, size=40, augment=None, **others):
    """A training of a program of the registry, whose first weights differ with ``seed``."""

    def make(seed):
        program = CASES[name].build(seed)
        return Training(program, data_for(CASES[name], program, size), objective, options(**others), augment=augment)

    return make


def overfitting(seed):
    """Random labels and a wide network: after a few epochs the validation loss rises, and early stopping sees it."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(5, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3))
    noise = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=noise), torch.randint(3, (60,), generator=noise)
    train, held_out = dgm.Data(x[:30], y[:30], num_classes=3), dgm.Data(x[30:], y[30:], num_classes=3)
    program = dgm.Discriminative(dgm.Categorical((), 3, network, given_shape=(5,)))
    return Training(program, train, options=options(epochs=9, early_stopping=2), validation=held_out)


def few_labels(seed):
    program = CASES["labeled-classifier"].build(seed)
    x = CASES["labeled-classifier"].draw(program, 40)[0]
    y = torch.where(torch.arange(40) % 4 > 0, -1, torch.arange(40) % 3)
    return Training(program, dgm.Data(x, y), "semi-supervised:5", options())


def game(objective, **others):
    def make(seed):
        torch.manual_seed(seed)
        program = dgm.Implicit(prior=dgm.Normal(2), generator=MLP((2,), 2, (8,)), event_shape=2)
        x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
        return Training(program, x, objective, options(**others))

    return make


def moved_noise(x):
    return x + 0.1 * torch.randn_like(x)


class Switch(dgm.Program):
    """A latent bit without a reparameterised gradient, and the baseline that Pyro keeps of its cost."""

    event_shape = torch.Size((2,))

    def __init__(self):
        super().__init__()
        self.loc, self.logit = nn.Parameter(torch.randn(2)), nn.Parameter(torch.zeros(()))

    def joint(self, name, value=None, given=None):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        return pyro.sample(name, dist.Normal(self.loc * z.unsqueeze(-1), 1.0).to_event(1), obs=value)

    def posterior(self, name, value, given=None):
        baseline = {"use_decaying_avg_baseline": True, "baseline_beta": 0.5}
        pyro.sample("z", dist.Bernoulli(logits=self.logit.expand(len(value))), infer={"baseline": baseline})

    def latents(self, name):
        return ("z",)


def baseline(seed):
    torch.manual_seed(seed)
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    return Training(Switch(), x, TraceGraph_ELBO(), options(validation=None))


def dropped_out(seed):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(2, 16), nn.Dropout(0.3), nn.Linear(16, 4))
    program = dgm.VAE(dgm.Normal(2), dgm.Normal(2, MLP((2,), 4)), dgm.Normal(2, network, given_shape=(2,)))
    return Training(program, torch.linspace(-1, 1, 80).reshape(40, 2), "iwae:3", options(batch_size=7))


RECIPES = {
    "annealed": of("vae", "annealed"),
    "average": of("flow-linear", ema=0.9, weight_decay=0.1),
    "early": overfitting,
    "last weights": of("made", validation=None, lr_schedule="constant"),
    "few labels": few_labels,
    "diffusion": of("diffusion"),
    "importance": of("diffusion-importance"),
    "game": game("gan", ema=0.9),
    "critic": game(dgm.Adversarial("wasserstein", r1=0.0, gradient_penalty=1.0, critic_steps=2)),
    "kernel": game("energy"),
    "Pyro": of("vae", Trace_ELBO()),
    "Renyi": of("vae", RenyiELBO(alpha=0.5, num_particles=2)),
    "enumerated": of("vae-bit-latent", TraceEnum_ELBO()),
    "baseline": baseline,
    "augmented": of("vae", augment=moved_noise),
    "dropout": dropped_out,
    "bf16": of("vae", precision="bf16"),
    "graph": of("vae", "annealed", compile=True, ema=0.9),
    "schedule of torch": of("vae", optimizer="SGD(momentum=0.9)", lr_schedule="StepLR(step_size=7, gamma=0.5)"),
    "steps": of("vae", gradient_steps=11, validate_every=4, accumulate=2, drop_last=True),
    "graph of a flow": of("flow-linear", compile=True, augment=moved_noise),
}  # fmt: skip
REGISTRY = {name: of(name, size=24, epochs=2, ema=0.9) for name, case in CASES.items() if case.trainable}


# -- continued ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs_only(monkeypatch):
    """Compile to the exported graph, without machine code."""
    monkeypatch.setattr(step, "optimized", lambda graph, **options: compilation.optimized(graph, "eager"))


def finished(training, until=None, more=0):
    """Its state after the last epoch, or ``more`` steps after epoch ``until``."""
    with training:
        while not training.finished and len(training.history.epochs) != until:
            training.advance()
        for _ in range(more):
            assert training.advance(lambda: True) is None
        return copy.deepcopy(training.state_dict())


def stored(state, folder):
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def without_clock(state):
    """A state whose history has no wall-clock times."""
    state = copy.deepcopy(state)
    for each in (state["history"], *state["history"]["epochs"]):
        del each["seconds"]
    return state


def differences(one, other, where="state"):
    """Where two trees of tensors and plain Python are not equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return (
            [] if isinstance(other, torch.Tensor) and torch.equal(one, other) and one.dtype == other.dtype else [where]
        )
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [each for key in one for each in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            each for i, pair in enumerate(zip(one, other, strict=True)) for each in differences(*pair, f"{where}/{i}")
        ]
    return [] if one == other and type(one) is type(other) else [f"{where}: {one!r} and {other!r}"]


def assert_alike(one, whole, other, continued):
    assert differences(without_clock(whole), without_clock(continued)) == []
    assert differences({**one.program.state_dict()}, {**other.program.state_dict()}) == []
    assert not other.program.training


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_that_is_stored_and_continued_is_the_one_that_is_not(name, tmp_path, graphs_only):
    assert_continued(RECIPES[name], tmp_path)


@pytest.mark.parametrize("name", once_per_part(REGISTRY))
def test_so_is_that_of_every_program(name, tmp_path):
    assert_continued(REGISTRY[name], tmp_path)


def assert_continued(make, tmp_path):
    """Within an epoch; the program that continues comes with other weights, the process with another random state."""
    whole = finished(one := make(seed=0))
    until = len(one.history.epochs) // 2
    state = stored(finished(make(seed=0), until, more=2), tmp_path)
    torch.manual_seed(12345)
    (other := make(seed=1)).load_state_dict(state)
    assert len(other.history.epochs) == until
    assert other.taken == until * (other.options.validate_every or other.steps_per_epoch) + 2
    assert_alike(one, whole, other, finished(other))
    assert math.isfinite(other.history.losses[-1])


@pytest.mark.parametrize("until", range(1, 5))
def test_early_stopping_continues_to_wait(until, tmp_path):
    whole = finished(one := overfitting(0))
    assert one.history.stopped_early
    assert 2 < len(one.history.epochs) < 9
    (other := overfitting(1)).load_state_dict(stored(finished(overfitting(0), until), tmp_path))
    assert_alike(one, whole, other, finished(other))


@pytest.mark.slow
def test_machine_code_continues_to_the_last_bit(tmp_path):
    whole = finished(one := RECIPES["graph"](0))
    assert one.history.compiled
    (other := RECIPES["graph"](1)).load_state_dict(stored(finished(RECIPES["graph"](0), 3), tmp_path))
    assert_alike(one, whole, other, finished(other))


IN_A_NEW_PROCESS = ["annealed", "average", "early", "few labels", "game", "Pyro", "baseline"]


def test_a_new_process_continues(tmp_path):
    for name in IN_A_NEW_PROCESS:
        (tmp_path / name).mkdir()
        stored(finished(RECIPES[name](0), 3), tmp_path / name)
    places = os.pathsep.join(filter(None, (str(Path(programs.__file__).parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": places}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in IN_A_NEW_PROCESS:
        whole = finished(RECIPES[name](0))
        continued = torch.load(tmp_path / name / "end.pt", weights_only=True)
        assert differences(without_clock(whole), without_clock(continued)) == []


def continue_all(folder):
    for name in IN_A_NEW_PROCESS:
        training = RECIPES[name](1)
        training.load_state_dict(torch.load(folder / name / "state.pt", weights_only=True))
        torch.save(finished(training), folder / name / "end.pt")


PARTS = {
    "program": "average",
    "best": "early",
    "optimizer": "annealed",
    "average": "average",
    "objective": "game",
    "order": "annealed",
    "random": "annealed",
    "params": "baseline",
    "history": "annealed",
    "taken": "annealed",
    "totals": "annealed",
    "scheduler": "schedule of torch",
}


@pytest.mark.parametrize("part", PARTS)
def test_no_part_of_the_state_can_be_left_out(part):
    """With that part as it was at the start, another training comes of it."""
    make = RECIPES[PARTS[part]]
    whole = finished(make(0))
    start, middle = finished(make(0), 0), finished(make(0), 2, more=2)
    assert {*middle} == {"recipe", *PARTS}
    training = make(0)
    training.load_state_dict(middle | {part: start[part]})
    try:
        assert differences(without_clock(whole), without_clock(finished(training))) != []
    except RuntimeError:  # it does not even run
        assert part == "history"


def test_a_state_can_be_loaded_twice():
    """Two trainings of one state share none of its tensors."""
    make = RECIPES["game"]
    state = finished(make(0), 3)
    ends = []
    for _ in range(2):
        (training := make(0)).load_state_dict(state)
        ends.append(without_clock(finished(training)))
    assert differences(*ends) == []


def test_the_clock_goes_on():
    training = RECIPES["annealed"](0)
    training.load_state_dict(finished(RECIPES["annealed"](0), 3))
    before = training.history.seconds
    finished(training)
    seconds = [epoch.seconds for epoch in training.history.epochs]
    assert seconds == sorted(seconds)
    assert seconds[2] == before < seconds[3]
    assert training.history.seconds == seconds[-1]


# -- one training ------------------------------------------------------------------------------------------------------


def test_it_is_fit():
    """Epoch by epoch, with other random numbers drawn between the epochs."""
    data = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    one, other = vae(dgm.Normal(2)), vae(dgm.Normal(2))
    other.load_state_dict(one.state_dict())
    history = fit(one, data, "annealed", epochs=3, batch_size=8, seed=4, progress=False, device="cpu")
    told = TrainingOptions(epochs=3, batch_size=8, seed=4, device="cpu")
    with Training(other, data, "annealed", told) as training:
        while not training.finished:
            before = torch.get_rng_state()
            training.advance()
            assert torch.equal(torch.get_rng_state(), before)
            torch.randn(3)
    assert not [*pyro.get_param_store().keys()]
    assert training.history.losses == history.losses
    assert training.history.best_epoch == history.best_epoch
    assert differences({**one.state_dict()}, {**other.state_dict()}) == []


def test_a_state_is_of_the_end_of_a_step():
    """Neither after the training, when the program has the best weights, nor after a step that was interrupted."""
    calls = []

    def interrupted(x):
        calls.append(len(x))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return x

    ended, broken = RECIPES["annealed"](0), of("vae", augment=interrupted)(0)
    finished(ended)
    with broken:
        broken.advance()
        broken.state_dict()
        with pytest.raises(KeyboardInterrupt):
            broken.advance()
        for act in (broken.state_dict, broken.advance, ended.state_dict, ended.advance):
            with pytest.raises(RuntimeError, match="the training is not between two steps"):
                act()


def test_a_state_of_another_training_is_refused_and_nothing_changes():
    state = finished(RECIPES["annealed"](0), 3)
    for make, message in (
        (
            of("vae", "annealed", lr=0.5, batch_size=9),
            "lr was 0.01 and is now 0.5; batch_size was 8|batch_size was 8 .*lr",
        ),
        (of("vae", "annealed", size=48), "the number of training data was 30 and is now 36"),
        (of("vae", "iwae:3"), r"the objective was 'ELBO\(.*' and is now 'IWAE\(num_particles=3"),
        (of("vae", pyro.infer.Trace_ELBO(2)), r"is now 'Trace_ELBO\(num_particles=2"),
        (of("normal-learned", "annealed"), "another program"),
    ):
        training = make(1)
        before = copy.deepcopy(training.state_dict())
        with pytest.raises(ValueError, match=message):
            training.load_state_dict(state)
        assert differences(before, training.state_dict()) == []


@pytest.mark.parametrize("part", ["recipe", *PARTS])
def test_a_state_without_a_part_is_refused_and_nothing_changes(part):
    training, state = RECIPES["annealed"](1), finished(RECIPES["annealed"](0), 3)
    before = copy.deepcopy(training.state_dict())
    with pytest.raises(ValueError, match=f"state has no '{part}'"):
        training.load_state_dict({name: value for name, value in state.items() if name != part})
    assert differences(before, training.state_dict()) == []


@pytest.mark.parametrize("part", ["program", "best"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: {name: value.double() for name, value in weights.items()}, "torch.float64"),
        (lambda weights: dict(list(weights.items())[1:]), "was None"),
        (lambda weights: weights | {"another": torch.zeros(1)}, "another"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_changes(part, change, message):
    training, state = RECIPES["annealed"](1), finished(RECIPES["annealed"](0), 3)
    before = copy.deepcopy(training.state_dict())
    with pytest.raises(ValueError, match=f"state belongs to another program .in '{part}', .*{message}"):
        training.load_state_dict(state | {part: change(state[part])})
    assert differences(before, training.state_dict()) == []


def test_a_training_that_was_interrupted_continues_from_a_state():
    again, interruptions = RECIPES["annealed"](0), [KeyboardInterrupt]

    def interrupted(x):
        if interruptions and again.history.epochs:
            raise interruptions.pop()
        return x

    again.augment = interrupted
    with again:
        again.advance()
        state = copy.deepcopy(again.state_dict())
        with pytest.raises(KeyboardInterrupt):
            again.advance()
        again.load_state_dict(state)
        end = finished(again)
    assert differences(without_clock(finished(RECIPES["annealed"](0))), without_clock(end)) == []


# -- options -----------------------------------------------------------------------------------------------------------


def test_fit_and_the_options_are_one():
    """A new option is added to `TrainingOptions`; `fit` repeats its name, and this test says where it does not."""
    arguments = inspect.signature(dgm.fit, eval_str=True).parameters
    own = {"program", "data", "objective", "augment", "resume", "trackers", "progress"}
    fields = {field.name: field.default for field in dataclasses.fields(TrainingOptions)}
    assert {name: each.default for name, each in arguments.items() if name not in own} == fields
    for name, (kind, meaning) in option_types().items():
        if name == "validation":
            kind = dgm.Data | torch.Tensor | kind
        elif name == "device":
            kind = kind | torch.device
        elif name == "optimizer":
            kind = kind | optimizers.OptimizerFactory
        elif name == "lr_schedule":
            kind = kind | optimizers.SchedulerFactory
        assert arguments[name].annotation == kind, name
        assert f"{name}: {meaning}" in dgm.fit.__doc__
        assert f"{name}: {meaning}" in TrainingOptions.__doc__


def test_fit_hands_every_option_on(monkeypatch):
    told = TrainingOptions(
        epochs=2, gradient_steps=5, minutes=9.0, batch_size=7, accumulate=7, drop_last=True, lr=0.02, weight_decay=0.3,
        lr_schedule="constant", optimizer="SGD", clip_norm=None, skip_norm=5.0, seed=3, device="cpu", validation=0.3,
        validate_every=2,
        early_stopping=1, ema=0.5, compile=False, checkpoint_minutes=1.0, precision="bf16",
    )  # fmt: skip
    default = TrainingOptions()
    assert all(value != getattr(default, name) for name, value in vars(told).items())
    seen = []
    start = Training.__init__

    def spy(self, program, data, objective, options, **others):
        seen.append(options)
        start(self, program, data, objective, options, **others)

    monkeypatch.setattr(Training, "__init__", spy)
    dgm.fit(vae(dgm.Normal(2)), torch.randn(30, 2), progress=False, **vars(told))
    assert seen == [told]


def test_the_options_need_no_torch():
    """So that the command line can list them at once."""
    code = "import sys, dgm_pyro.training.options; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_a_finished_training_refuses_to_go_on():
    """The cosine would rise again."""
    with RECIPES["annealed"](0) as training:
        while not training.finished:
            training.advance()
        end = copy.deepcopy(training.state_dict())
        with pytest.raises(RuntimeError, match="is finished after 24 steps"):
            training.advance()
        assert differences(end, training.state_dict()) == []


def counted(**others):
    """The steps of a training of 30 data in batches of 8, and the training."""
    training = of("vae", **others)(0)
    finished(training)
    return training


def test_steps_take_the_place_of_epochs():
    """As many as are asked for, the learning rate falling over them; the last epoch is shorter."""
    training = counted(gradient_steps=10)
    assert training.taken == 10
    assert len(training.history.epochs) == 3  # of 4, 4 and 2
    assert training._lr_factor(10) == pytest.approx(0.5 * (1 + math.cos(math.pi * 9 / 10)))
    whole, other = counted(gradient_steps=24), counted(epochs=6)
    assert differences(*({**each.program.state_dict()} for each in (whole, other))) == []


def test_validation_comes_every_so_many_steps_and_changes_no_weight():
    one, other = counted(epochs=6), counted(epochs=6, validate_every=5)
    assert [len(each.history.epochs) for each in (one, other)] == [6, 5]  # 4 times 5 and once 4
    last = [each.last for each in (one, other)]
    assert differences(*last) == []
    assert one.history.losses[0] != other.history.losses[0]


def test_the_time_ends_a_training_at_a_step(monkeypatch):
    now = [0.0]

    def second(x):
        now[0] += 1.0
        return x

    monkeypatch.setattr(training_module.time, "perf_counter", lambda: now[0])
    training = of("vae", augment=second, minutes=0.11, epochs=50)(0)
    finished(training)
    assert training.taken == 7  # a second each
    assert training.history.out_of_time
    assert training.history.epochs[-1].validation is not None


@pytest.mark.parametrize("name", ["made", "realnvp", "categorical-image"])
def test_the_parts_of_a_batch_are_the_batch(name):
    """Where nothing is drawn: the same weights up to rounding, also where the parts of a last batch are not alike."""
    with programs.precision(torch.float64):
        one, other = (of(name, batch_size=12, accumulate=parts)(0) for parts in (1, 4))
        finished(one)
        finished(other)
    for parameter, again in zip(one.program.parameters(), other.program.parameters(), strict=True):
        torch.testing.assert_close(parameter, again, rtol=1e-9, atol=1e-9)
    for epoch, again in zip(one.history.epochs, other.history.epochs, strict=True):
        assert epoch.loss == pytest.approx(again.loss, rel=1e-9)


@pytest.mark.parametrize("objective", ["gan", Trace_ELBO()])
def test_objectives_that_take_their_own_steps_have_no_parts(objective):
    make = game(objective, accumulate=2) if objective == "gan" else of("vae", objective, accumulate=2)
    with pytest.raises(ValueError, match="accumulate must be 1 for"):
        make(0)


def test_a_smaller_last_batch_can_be_left_out():
    training = counted(drop_last=True, epochs=2)
    assert training.steps_per_epoch == 3  # of 30 data in batches of 8
    assert training.taken == 6
    assert {len(rows) for rows in training._batches[: training.steps_per_epoch]} == {8}


def test_gradients_are_clipped_to_the_norm_that_is_asked_for():
    """Plain gradient descent moves by the learning rate times the norm, at most."""
    for largest in (0.01, None):
        training = of("made", optimizer="SGD", clip_norm=largest, lr=0.5, gradient_steps=1, validation=None)(0)
        before = [p.detach().clone() for p in training.program.parameters()]
        finished(training)
        moved = torch.cat([(p - b).flatten() for p, b in zip(training.program.parameters(), before, strict=True)])
        assert (moved.norm() <= 0.5 * 0.01 * (1 + 1e-5)) == (largest is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", ["", "factors.network.first"])
def test_a_fused_adam_clips_as_one_that_is_not(dtype, part):
    """Adam does not see a constant factor, but it sees one that changes from step to step."""
    found = []
    with programs.precision(dtype):
        for fused in (True, False):
            program = CASES["made"].build(0)
            some = [p for name, p in program.named_parameters() if name.startswith(part)]
            training = Training(
                program,
                data_for(CASES["made"], program, 40),
                options=options(clip_norm=0.3, gradient_steps=5, validation=None),
                optimizer=lambda _, some=some, fused=fused: torch.optim.AdamW(some, lr=0.05, fused=fused),
            )
            finished(training)
            found.append([p.detach() for p in training.program.parameters()])
            assert not hasattr(training.optimizer, "grad_scale")  # it may be a user's, for further steps
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_the_norm_is_that_of_what_the_optimizer_updates(monkeypatch):
    """Gradients of other parameters neither count nor add up from step to step."""
    norms, norm = [], Training._norm
    monkeypatch.setattr(Training, "_norm", lambda self, sums: norms.append(norm(self, sums)) or norms[-1])
    program = CASES["made"].build(0)
    last = program.factors.network.last
    training = Training(
        program,
        data_for(CASES["made"], program, 8),
        options=options(gradient_steps=3, validation=None),
        optimizer=lambda _: torch.optim.SGD(last.parameters(), lr=1e-9),
    )
    finished(training)
    whole = torch.cat([p.grad.flatten() for p in last.parameters()]).norm()
    torch.testing.assert_close(torch.stack(norms), whole.expand(3), rtol=1e-4, atol=0)


class Pulling:
    """The ELBO, less the squared distance of ``parameter`` from 2 in steps where the program is ``trained``."""

    def __init__(self, parameter, trained=lambda step: True):
        self.parameter, self.trained, self.steps = parameter, trained, 0

    def __repr__(self):
        return "Pulling"

    def __call__(self, program, x, given=None, observed=None):
        self.steps += 1
        bound = dgm.ELBO()(program, x, given, observed)
        if not self.trained(self.steps):
            return bound
        return dataclasses.replace(bound, surrogate=bound.surrogate - 1000 * (self.parameter - 2).square().sum())


QUICKLY = {"gradient_steps": 4, "batch_size": 8, "validation": None, "progress": False, "device": "cpu"}


def test_a_parameter_that_is_not_the_programs_is_trained_clipped_and_not_compiled():
    program, other = dgm.Normal(2, learned=True), nn.Parameter(torch.zeros(3))
    options = {"optimizer": lambda own: torch.optim.SGD([*own, other], lr=1.0), "clip_norm": 0.1, **QUICKLY}
    history = dgm.fit(program, torch.randn(16, 2), Pulling(other), lr_schedule="constant", **options)
    assert not history.compiled
    torch.testing.assert_close(other.norm(), torch.tensor(0.4), rtol=1e-3, atol=0)  # 4 steps of 0.1
    with pytest.raises(ValueError, match="updates parameter 1 of the optimizer: make these parameters of the program"):
        dgm.fit(program, torch.randn(16, 2), Pulling(other), compile=True, **options)


def test_several_processes_refuse_a_parameter_whose_gradient_they_do_not_average(monkeypatch):
    program, other = dgm.Normal(2, learned=True), nn.Parameter(torch.zeros(3))
    monkeypatch.setattr(training_module, "process_group", lambda: ProcessGroup(0, 2))
    with pytest.raises(ValueError, match=r"updates parameter 1 of the optimizer: .* or train in one process"):
        dgm.fit(program, torch.randn(16, 2), optimizer=lambda own: torch.optim.SGD([*own, other], lr=1.0), **QUICKLY)


def test_a_step_without_a_gradient_of_what_is_updated_changes_nothing():
    program = dgm.Normal(2, learned=True)
    program.extra = nn.Parameter(torch.zeros(3))
    objective = Pulling(program.extra, trained=lambda step: step == 2)
    options = {"optimizer": lambda _: torch.optim.SGD([program.extra], lr=1e-4), **QUICKLY, "clip_norm": None}
    dgm.fit(program, torch.randn(16, 2), objective, lr_schedule="constant", **options)
    torch.testing.assert_close(program.extra.detach(), torch.full((3,), 0.4))


def test_the_callers_optimizer_keeps_its_learning_rate():
    program = dgm.Normal(2, learned=True)
    optimizer = torch.optim.Adam(program.parameters(), lr=0.1)
    dgm.fit(program, torch.randn(16, 2), optimizer=lambda _: optimizer, **QUICKLY)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_state_of_an_optimizer_with_other_groups_is_refused_and_changes_nothing():
    x = torch.randn(16, 2)

    def training(groups):
        program = vae(dgm.Normal(2))
        of_groups = lambda own: torch.optim.SGD(groups(list(own)), lr=0.1)  # noqa: E731
        return Training(program, x, options=options(validation=None), optimizer=of_groups)

    with training(lambda own: [{"params": [p]} for p in own]) as one, training(lambda own: own) as other:
        before = [p.clone() for p in other.program.parameters()]
        one.advance()
        with pytest.raises(ValueError, match=r"groups of \[1, 1, .*\] parameters, but this one has groups of \[\d+\]"):
            other.load_state_dict(one.state_dict())
        assert all(map(torch.equal, other.program.parameters(), before))


def test_an_optimizer_of_another_program_is_refused():
    program, other = CASES["made"].build(0), CASES["made"].build(1)
    with pytest.raises(ValueError, match="optimizer updates no parameter of this Autoregressive"):
        dgm.fit(program, data_for(CASES["made"], program, 8), optimizer=lambda _: torch.optim.Adam(other.parameters()))


def test_steps_of_too_long_a_gradient_are_left_out():
    """They move no weight, and the momentum of the optimizer does not see them."""
    for largest, left_out in ((1e-6, 4), (1e6, 0)):
        training = of("made", optimizer="AdamW", skip_norm=largest, gradient_steps=4, validation=None)(0)
        before = [p.detach().clone() for p in training.program.parameters()]
        finished(training)
        assert training.history.skipped == left_out
        unmoved = [torch.equal(p, b) for p, b in zip(training.program.parameters(), before, strict=True)]
        assert all(unmoved) if left_out else not any(unmoved)
        assert (len(training.optimizer.state) == 0) == (left_out == 4)


# -- optimizers and schedules ------------------------------------------------------------------------------------------


def test_an_optimizer_by_name_is_the_one_that_is_made():
    def momentum(parameters):
        return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1)

    def steps(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=7)

    by_name = counted(optimizer="SGD(momentum=0.9)", lr_schedule="StepLR(step_size=7)", weight_decay=0.1)
    case = CASES["vae"]
    program = case.build(0)
    made = Training(program, data_for(case, program, 40), options=options(), optimizer=momentum, lr_schedule=steps)
    finished(made)
    assert differences(*({**each.program.state_dict()} for each in (by_name, made))) == []
    rates = [group["lr"] for group in by_name.optimizer.param_groups]
    assert rates == [pytest.approx(1e-2 * 0.1 ** (24 // 7))]


def test_each_group_of_a_made_optimizer_keeps_its_share_of_the_rate():
    program, data = vae(dgm.Normal(2)), torch.randn(40, 2)
    made = []

    def groups(parameters):
        first, *rest = parameters
        made.append(torch.optim.AdamW([{"params": [first], "lr": 1e-4}, {"params": rest, "lr": 1e-2}]))
        return made[0]

    dgm.fit(program, data, epochs=1, optimizer=groups, device="cpu", progress=False)
    low, high = (group["lr"] for group in made[0].param_groups)
    assert low == pytest.approx(high / 100)


def test_a_rate_that_is_a_tensor_is_the_callers():
    """The schedule begins at its value, which stays."""
    found = []
    for lr in (torch.tensor(0.1), 0.1):
        torch.manual_seed(0)
        program = dgm.Normal(2, learned=True)
        dgm.fit(
            program, torch.randn(100, 2) + 3, epochs=20, batch_size=20, validation=None, device="cpu", progress=False,
            optimizer=lambda parameters, lr=lr: torch.optim.Adam(parameters, lr=lr),
        )  # fmt: skip
        found.append(program().mean.detach())
        assert float(lr) == pytest.approx(0.1)
    assert torch.equal(*found)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"optimizer": "Adm"}, "optimizer must be one of .*Adam.*, got 'Adm'"),
    ({"optimizer": "LBFGS"}, "'LBFGS' evaluates the loss several times"),
    ({"optimizer": "SGD(momentum=-1)"}, r"optimizer 'SGD.*' cannot be made: Invalid momentum"),
    ({"optimizer": "SGD(speed=1)"}, r"cannot be made: .*unexpected keyword"),
    ({"optimizer": "SGD(0.1)"}, "a call like"),
    ({"optimizer": "SGD(momentum=open('x'))"}, "a call like"),
    ({"optimizer": "torch.optim.SGD"}, "a call like"),
    ({"optimizer": "Adafactor", "weight_decay": 0.0, "lr_schedule": "StepLR"}, "lr_schedule 'StepLR' cannot be made"),
    ({"optimizer": "Rprop", "weight_decay": 0.1}, "weight_decay is 0.1, but Rprop has none"),
    ({"lr_schedule": "ReduceLROnPlateau"}, "lr_schedule must be one of cosine, constant, .*StepLR"),
    ({"accumulate": 3}, "accumulate is 3, which must divide batch_size, 8"),
    ({"gradient_steps": 0}, "gradient_steps must be a positive integer"),
    ({"minutes": 0}, "minutes must be a number above 0"),
    ({"clip_norm": -1.0}, "clip_norm must be a number above 0"),
    ({"skip_norm": -1.0}, "skip_norm must be a number above 0"),
    ({"drop_last": 1}, "drop_last must be True or False"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_changes(wrong, message):
    program = CASES["vae"].build(0)
    before = copy.deepcopy(program.state_dict())
    with pytest.raises((ValueError, TypeError), match=message):
        Training(program, data_for(CASES["vae"], program, 40), options=options(**wrong))
    assert differences({**before}, {**program.state_dict()}) == []


def test_a_factory_that_makes_something_else_is_refused():
    for wrong in (
        {"optimizer": lambda parameters: "Adam"},
        {"lr_schedule": torch.optim.lr_scheduler.ReduceLROnPlateau},
    ):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} must make a torch"):
            dgm.fit(vae(dgm.Normal(2)), torch.randn(40, 2), progress=False, **wrong)


# -- trackers ----------------------------------------------------------------------------------------------------------


class Diary:
    def __init__(self):
        self.told = []

    def on_start(self, training):
        self.told.append(("start", len(training.history.epochs)))

    def on_epoch(self, epoch):
        self.told.append(("epoch", epoch.epoch))

    def on_end(self, history):
        self.told.append(("end", len(history.epochs)))


def test_a_tracker_is_told_of_start_epochs_and_end_whatever_ends_it():
    diary, calls = Diary(), []

    def stopped(x):
        calls.append(x)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return x

    settings = {"epochs": 3, "batch_size": 8, "validation": None, "device": "cpu", "progress": False}
    dgm.fit(vae(dgm.Normal(2)), torch.randn(32, 2), trackers=[diary], **settings)
    assert diary.told == [("start", 0), ("epoch", 1), ("epoch", 2), ("epoch", 3), ("end", 3)]
    with pytest.raises(KeyboardInterrupt):
        dgm.fit(vae(dgm.Normal(2)), torch.randn(32, 2), trackers=[diary], augment=stopped, **settings)
    assert diary.told[5:] == [("start", 0), ("epoch", 1), ("epoch", 2), ("end", 2)]


if __name__ == "__main__":
    continue_all(Path(sys.argv[1]))


def test_parameters_may_be_frozen_between_epochs():
    program = vae(dgm.Normal(2))
    options = dgm.TrainingOptions(epochs=3, batch_size=8, validation=None, device="cpu")
    with Training(program, torch.randn(24, 2), options=options) as training:
        training.advance()
        program.encoder.requires_grad_(False)
        before = copy.deepcopy(program.encoder.state_dict())
        training.advance()
        for name, value in program.encoder.state_dict().items():
            assert torch.equal(value, before[name])
        program.likelihood.network.rest[0].weight.data.fill_(torch.nan)
        with pytest.raises(dgm.NonFiniteLossError, match="step 7"):
            training.advance()
