"""Two processes at one training are as one: the same curve, the same weights, one writer, one message.

This file is a test and, started by torchrun, what each of two processes runs: every recipe, its outcome written down.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import programs
import pyro
import pytest
import torch
from programs import CASES, EVERY_PART, data_for, vae
from pyro.infer import Trace_ELBO
from torch import nn

import dgm_pyro as dgm
from dgm_pyro import cli, objectives
from dgm_pyro.experiments import runs
from dgm_pyro.jobs import Interrupted
from dgm_pyro.networks import MADE, MLP
from dgm_pyro.training import compilation, distributed, step
from dgm_pyro.training import fit as training
from dgm_pyro.training.distributed import ProcessGroup

OPTIONS = {"epochs": 3, "batch_size": 8, "lr": 1e-2, "progress": False, "device": "cpu"}


# -- recipes: what one process and two do alike ------------------------------------------------------------------------


def rows(count, features=3, seed=7):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made():
    return dgm.Autoregressive(dgm.Normal(3, MADE(3, 2, hidden=(16,)))).double()


class Idle(dgm.Conditional):
    """A Normal with a parameter that no loss reaches."""

    def __init__(self):
        super().__init__()
        self.event_shape = torch.Size((3,))
        self.location = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, given=None):
        return pyro.distributions.Normal(self.location, torch.ones_like(self.location)).to_event(1)


def trained(program, data, objective=None, **options):
    history = dgm.fit(program, data, objective, **OPTIONS | options)
    epochs = [{k: v for k, v in each.items() if k != "seconds"} for each in history.as_dict()["epochs"]]
    return {
        "epochs": epochs,
        "best": history.best_epoch,
        "stopped": history.stopped_early,
        "compiled": history.compiled,
        "state": {name: value.clone() for name, value in program.state_dict().items()},
    }


def autoregressive(count=45, **options):
    """The last batch has 5 data, 3 and 2; the processes start from weights of their own, and go on from the first's."""
    torch.manual_seed(distributed.process_group().rank)
    return trained(made(), rows(count), validation=rows(70, seed=8), **options)


def odd():
    return autoregressive(count=50, batch_size=9, ema=0.9, weight_decay=0.1)


def flow():
    """Its ActNorm sets itself up by the first batch."""
    torch.manual_seed(0)
    program = CASES["flow-linear"].build(dtype=torch.float64)
    return trained(program, rows(45), validation=None)


def quantized():
    """Its codebook follows the encodings of both; without resets, which draw them from one."""
    torch.manual_seed(0)
    program = CASES["vae-quantized"].build(dtype=torch.float64)
    program.encoder.codebook.dead_below = 0.0
    x, _ = CASES["vae-quantized"].draw(program, 45)
    return trained(program, dgm.Data(x, levels=3), validation=None)


def idle():
    return trained(Idle(), rows(24), validation=None)


def partly_labeled():
    """Some shares have no unlabeled datum, and some no other, so that the processes run other statements."""
    torch.manual_seed(0)
    program = dgm.Labeled(
        dgm.Categorical((), 3), dgm.Normal(3, nn.Embedding(3, 6)), dgm.Categorical((), 3, MLP((3,), 3, ()))
    ).double()
    y = torch.randint(-1, 1, (40,), generator=torch.Generator().manual_seed(1))
    data = dgm.Data(rows(40), y, num_classes=3)
    return trained(program, data, "semi-supervised", batch_size=4, validation=None)


def early():
    return autoregressive(count=16, epochs=30, lr=0.2, lr_schedule="constant", early_stopping=2)


@contextlib.contextmanager
def exported_only():
    """Graphs, run as they are: compiling takes long."""
    optimized = step.optimized
    step.optimized = lambda graph, **options: compilation.optimized(graph, "eager")
    try:
        yield
    finally:
        step.optimized = optimized


def graph():
    with exported_only():
        return autoregressive(compile=True)


def noisy():
    torch.manual_seed(0)
    program = vae(dgm.Normal(2)).double()
    return trained(program, rows(64, 2), validation=0.25, epochs=24, batch_size=16, lr=1e-4)


def remembering():
    torch.manual_seed(0)
    program = CASES["diffusion-importance"].build(dtype=torch.float64)
    return trained(program, rows(32, program.event_shape[0]), validation=0.25)


def accumulated():
    return autoregressive(accumulate=2, clip_norm=0.5, validate_every=4)


ALIKE = {
    each.__name__: each
    for each in (accumulated, autoregressive, odd, flow, quantized, idle, partly_labeled, early, graph)
}


# -- recipes for two alone ---------------------------------------------------------------------------------------------


def not_finite():
    """One datum of the last batch has no density: it is in the share of one process."""
    program, data = Idle(), rows(32)
    data[5] = 1e200
    warnings.filterwarnings("ignore", "feature 0 of the data has mean")  # which is what they are for
    torch.set_default_dtype(torch.float64)  # in which data may be so large
    try:
        trained(program, data, validation=None, epochs=2)
    except dgm.NonFiniteLossError as error:
        return {"what": str(error), "site": error.site, "step": error.step, "state": program.state_dict()}
    finally:
        torch.set_default_dtype(torch.float32)


def draws():
    """The bounds of equal data in both shares, at one step."""
    seen = []

    def objective(program, x, given=None, observed=None):
        bound = objectives.elbo(program, x)
        seen.append(bound.value.detach())
        return bound

    torch.manual_seed(0)
    program = vae(dgm.Normal(2)).double()
    trained(program, rows(1, 2).expand(16, 2), objective, validation=None, epochs=1, batch_size=16)
    return {"bounds": seen[-1]}


def refused():
    try:
        trained(Idle(), rows(16), Trace_ELBO(), validation=None)
    except ValueError as error:
        return {"error": str(error)}


def agreed():
    team = distributed.process_group()
    tensors = [torch.full((2, 3), float(team.rank)).T, torch.tensor(team.rank == 1), torch.tensor(team.rank)]
    parameter = nn.Parameter(torch.full((2,), float(team.rank)))
    team.agree([*tensors, parameter])
    steps = [(7, 5), (0, 0), (0, 3)]
    earliest = [int(team.earliest(torch.tensor(each[team.rank]))) for each in steps]
    return {"tensors": [*tensors, parameter.detach()], "earliest": earliest}


def resumed():
    """A training, and one that a signal to the second process interrupted within an epoch, and that was resumed."""
    folder = Path(tempfile.gettempdir()) / f"resumed-{os.environ['TORCHELASTIC_RUN_ID']}"
    rank, left = distributed.process_group().rank, [9]

    def signaled(x):
        left[0] -= 1
        if left[0] == 0 and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return x

    def run(seed, **others):
        torch.manual_seed(seed)
        options = {"batch_size": 8, "validation": 0.25, "ema": 0.9}
        return trained(CASES["diffusion-importance"].build(seed), rows(64, 2).float(), **options | others)

    every, training.WATCH_EVERY = training.WATCH_EVERY, 5
    try:
        whole = run(0)
        try:
            run(0, augment=signaled, resume=folder)
            said = "it was not interrupted"
        except Interrupted as error:
            said = str(error)
        return {"whole": whole, "said": said, "resumed": run(1, resume=folder)}
    finally:
        training.WATCH_EVERY = every
        distributed.process_group().wait()
        shutil.rmtree(folder, ignore_errors=True)


def inductor():
    return autoregressive(compile=True, epochs=2)


def registry(names=EVERY_PART):
    """Programs from weights that differ, each with noise of its own."""
    states = {}
    for name, case in CASES.items():
        if case.trainable and name in names:
            program = case.build(seed=distributed.process_group().rank)
            data = data_for(case, program, 24)
            states[name] = trained(program, data, epochs=1, batch_size=9, validation=0.25, ema=0.9)
    return states


def rest():
    return registry(CASES.keys() - EVERY_PART)


APART = {each.__name__: each for each in (resumed, noisy, remembering, not_finite, draws, refused, agreed, registry)}


def failing(out):
    """What `dgm train` does when something goes wrong in the second process, and there alone."""
    norm, steps = training.Training._norm, []

    def broken(self, sums):
        steps.append(sums)
        if distributed.process_group().rank == 1 and len(steps) == 3:
            raise OSError("the disk is on fire")
        return norm(self, sums)

    training.Training._norm = broken
    sys.exit(cli.main(["train", "made", "--data", "moons", "--num-data", "90", "--device", "cpu", "--out", out]))


def restarted(*arguments):
    """`dgm` with a second process that is killed in its 20th step, when torchrun starts it for the first time."""
    gradient, steps = training.Training._gradient, []

    def killed(self, *batch):
        steps.append(batch)
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and os.environ["RANK"] == "1" and len(steps) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return gradient(self, *batch)

    training.Training._gradient = killed
    sys.exit(cli.main([*arguments]))


def run_here(folder, names):
    """In each of the processes: run the recipes and write the outcomes down."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".torch.jit.script_method", DeprecationWarning)
    team = distributed.join("cpu")
    torch.save({name: RECIPES[name]() for name in names}, Path(folder) / f"{team.rank}.pt")
    distributed.leave()


RECIPES = ALIKE | APART | {"inductor": inductor, "rest": rest}


# -- starting them -----------------------------------------------------------------------------------------------------


def torchrun(*arguments, logs, processes=2, restarts=0):
    """Start ``arguments``; the exit status, and what each process said on stdout and stderr."""
    places = os.pathsep.join(filter(None, (str(Path(programs.__file__).parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places, "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
         f"--max-restarts={restarts}",
         "--log-dir", str(logs), "--redirects=3", *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    said = {
        (int(path.parent.name), path.stem): path.read_text() for path in Path(logs).rglob("std*.log") if path.is_file()
    }
    return done.returncode, said


def outcomes(names, folder):
    status, said = torchrun(__file__, "recipes", folder, *names, logs=folder / "logs")
    assert status == 0, said
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The outcomes of the recipes in each of two processes."""
    return outcomes([*ALIKE, *APART], tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory):
    return outcomes(["inductor"], tmp_path_factory.mktemp("machine_code"))


def assert_close(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_close(a[name], b[name])
    elif isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            assert_close(one, other)
    elif isinstance(a, (float, torch.Tensor)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    else:
        assert a == b


def assert_same_bits(one, other):
    assert all(torch.equal(one["state"][name], other["state"][name]) for name in one["state"])


def assert_alike_in_both(names, first, second):
    assert first.keys() == second.keys() == {name for name in names if CASES[name].trainable}
    for name in first:
        assert_same_bits(first[name], second[name])
        assert first[name]["epochs"] == second[name]["epochs"]


# -- the division of labour --------------------------------------------------------------------------------------------


def test_shares_are_a_partition_and_their_weighted_means_the_mean():
    for size in (1, 2, 3):
        for count in (2 * size, 7, 8, 9):
            batch = rows(count)
            teams = [ProcessGroup(rank, size) for rank in range(size)]
            shares = [team.share(batch) for team in teams]
            assert torch.equal(torch.cat(shares), batch)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
            means = [team.weight(batch) * share.mean(0) for team, share in zip(teams, shares, strict=True)]
            torch.testing.assert_close(torch.stack(means).mean(0), batch.mean(0))


def test_a_last_batch_too_small_to_share_is_left_out():
    assert [ProcessGroup().batches(count, 8) for count in (1, 8, 9, 10, 17)] == [1, 1, 1, 2, 2]
    assert [ProcessGroup().batches(count, 1) for count in (1, 2)] == [1, 2]
    assert [ProcessGroup(0, 2).batches(count, 8) for count in (4, 8, 9, 11, 12, 16)] == [1, 1, 1, 1, 2, 2]
    assert [ProcessGroup(2, 3).batches(count, 8) for count in (6, 13, 14)] == [1, 1, 2]


@pytest.mark.parametrize(("count", "batch_size"), [(3, 8), (100, 3)])
def test_too_few_data_for_the_processes_are_refused(count, batch_size):
    with pytest.raises(ValueError, match="a batch has 3 data, but 2 processes need at least 4"):
        ProcessGroup(0, 2).batches(count, batch_size)


def test_one_process_alone_has_nobody_to_ask():
    values, step = torch.tensor([1.0, 2.0]), torch.tensor(4)
    assert ProcessGroup().total(values) is values
    assert ProcessGroup().earliest(step) is step
    ProcessGroup().agree([values])
    ProcessGroup().wait()
    assert distributed.process_group() == ProcessGroup() == distributed.join()
    assert ProcessGroup().writes
    assert not ProcessGroup(1, 2).writes
    assert distributed.is_first_to_fail()


def test_two_processes_resume_to_the_last_bit(two):
    """Each with its own random numbers, and buffers that differ within an epoch."""
    for outcome in (each["resumed"] for each in two):
        assert outcome["said"].startswith("interrupted after step 10 of 18")
        assert_same_bits(outcome["whole"], outcome["resumed"])
        assert outcome["whole"]["epochs"] == outcome["resumed"]["epochs"]


def test_two_agree_and_find_the_earliest(two):
    for outcome in two:
        for tensor, value in zip(outcome["agreed"]["tensors"], (0.0, False, 0, 0.0), strict=True):
            assert (tensor == value).all()
        assert outcome["agreed"]["earliest"] == [5, 0, 3]


class Gpus:
    """As many GPUs as one says, as `torch.cuda` would show them."""

    def __init__(self, monkeypatch, count):
        self.taken = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", self.taken.append)


def test_each_process_takes_the_gpu_of_its_number(monkeypatch):
    gpus = Gpus(monkeypatch, 4)
    for rank in range(4):
        distributed._take_gpu("auto", rank, 4)
    assert gpus.taken == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="8 processes were started, but there are 4 GPUs"):
        distributed._take_gpu("auto", 5, 8)
    with pytest.raises(ValueError, match="got 'cuda:1'"):
        distributed._take_gpu("cuda:1", 0, 4)


def test_a_process_that_sees_one_gpu_takes_that(monkeypatch):
    """As where a scheduler shows each process its own."""
    gpus = Gpus(monkeypatch, 1)
    distributed._take_gpu("auto", 3, 1)
    assert gpus.taken == [0]


# -- as one process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALIKE)
def test_the_curve_and_the_weights_are_those_of_one_process(two, name):
    one = RECIPES[name]()
    for outcome in two:
        assert_close(outcome[name], one)
    assert_same_bits(*(outcome[name] for outcome in two))


def test_the_recipes_are_what_they_are_for(two):
    first = two[0]
    assert first["early"]["stopped"]
    assert first["early"]["best"] < len(first["early"]["epochs"]) < 30
    assert first["graph"]["compiled"]
    assert torch.equal(first["idle"]["state"]["idle"], torch.ones(2, dtype=torch.float64))
    assert first["flow"]["state"] != {}
    assert any(name.endswith("initialized") and bool(value) for name, value in first["flow"]["state"].items())


@pytest.mark.nightly  # minutes with a cold cache; graphs are compared above, machine code in one process elsewhere
def test_so_they_are_compiled(machine_code):
    one = autoregressive(epochs=2)
    for outcome in machine_code:
        assert outcome["inductor"].pop("compiled")
        assert_close(outcome["inductor"], {name: value for name, value in one.items() if name != "compiled"})


def test_with_noise_the_weights_are_equal_and_the_curve_is_that_of_one_in_the_mean(two):
    first, second = (outcome["noisy"] for outcome in two)
    assert_same_bits(first, second)
    assert first["epochs"] == second["epochs"]
    pairs = zip(first["epochs"], noisy()["epochs"], strict=True)
    apart = torch.tensor([two["loss"] - one["loss"] for two, one in pairs], dtype=torch.float64)
    assert 0 < apart.std() < 1
    assert apart.mean().abs() < 4 * apart.std() / len(apart) ** 0.5


def test_every_part_ends_with_the_same_weights_in_both(two):
    assert_alike_in_both(EVERY_PART, *(outcome["registry"] for outcome in two))


@pytest.mark.nightly
def test_so_does_every_program(tmp_path):
    names = CASES.keys() - EVERY_PART
    assert len(names) > 100
    assert_alike_in_both(names, *(outcome["rest"] for outcome in outcomes(["rest"], tmp_path)))


def test_each_process_has_noise_of_its_own(two):
    first, second = (outcome["draws"]["bounds"] for outcome in two)
    assert first.shape == second.shape == (8,)
    assert len(torch.cat([first, second]).unique()) == 16


def test_what_a_layer_remembers_of_the_data_is_equal_too(two):
    assert_same_bits(*(outcome["remembering"] for outcome in two))


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_in_one_stops_all_with_one_message(two):
    first, second = (outcome["not_finite"] for outcome in two)
    assert first["what"] == second["what"]
    assert first["what"].startswith("the loss is not finite at site 'x', epoch 1")
    assert_same_bits(first, second)
    assert all(torch.isfinite(value).all() for value in first["state"].values())


def test_what_cannot_be_shared_is_refused_in_all(two):
    for outcome in two:
        assert "Trace_ELBO has its own backward pass" in outcome["refused"]["error"]


def test_an_error_in_one_ends_all_and_is_said_once(tmp_path):
    status, said = torchrun(__file__, "failing", tmp_path / "run", logs=tmp_path / "logs")
    assert status != 0
    assert said[1, "stderr"].splitlines()[-1] == "dgm: the disk is on fire"
    assert not any("Traceback" in text for text in said.values())
    assert "dgm:" not in said[0, "stderr"]
    assert not (tmp_path / "run" / runs.RECORD).exists()


# -- the command -------------------------------------------------------------------------------------------------------


def test_one_writes_the_run_that_one_process_would_have_written(tmp_path):
    recipe = ["train", "made", "--data", "moons", "--num-data", "100", "--epochs", "2", "--batch-size", "16"]
    recipe += ["--device", "cpu", "--out"]
    status, said = torchrun("-m", "--", "dgm_pyro", *recipe, tmp_path / "two", logs=tmp_path / "logs")
    assert status == 0, said
    assert said[0, "stdout"].count("next: dgm evaluate") == 1
    assert said[1, "stdout"] == said[1, "stderr"] == ""
    assert cli.main([*recipe, str(tmp_path / "one")]) == 0
    records = {name: json.loads((tmp_path / name / runs.RECORD).read_text()) for name in ("one", "two")}
    assert records["two"]["options"].pop("processes") == 2
    assert records["one"]["options"] == records["two"]["options"]
    for a, b in zip(*(records[name]["history"]["epochs"] for name in ("one", "two")), strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5)  # of a few steps in float32
    files = {name: sorted(path.stem.split("-")[0] for path in (tmp_path / name).iterdir()) for name in ("one", "two")}
    assert files["one"] == files["two"]
    x = dgm.data.load("moons", "test").x
    one, two = (dgm.load(tmp_path / name).log_prob(x) for name in ("one", "two"))
    # Adam moves a weight whose gradient is rounding alone by as much as any other, so that a few x differ by more.
    assert (one - two).abs().mean() < 1e-5


@pytest.mark.nightly
def test_torchrun_restarts_a_training_that_lost_a_process_and_it_ends_with_the_same_weights(tmp_path):
    recipe = ["train", "made", "--data", "moons", "--num-data", "100", "--epochs", "8", "--batch-size", "16"]
    recipe += ["--device", "cpu", "--checkpoint-minutes", "1e-9", "--resume", "--out"]
    status, said = torchrun("-m", "--", "dgm_pyro", *recipe, tmp_path / "whole", logs=tmp_path / "logs")
    assert status == 0, said
    status, said = torchrun(__file__, "restarted", *recipe, tmp_path / "run", logs=tmp_path / "more", restarts=1)
    assert status == 0, said
    whole, run = (json.loads((tmp_path / name / runs.RECORD).read_text()) for name in ("whole", "run"))
    assert run["weights"] == whole["weights"]
    assert len({path.parent.parent.name for path in (tmp_path / "more").rglob("stdout.log")}) == 2  # two attempts


@pytest.mark.parametrize("command", ["sweep", "tour"])
def test_other_commands_are_refused_under_torchrun(command, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    assert cli.main([command]) == 1
    assert "torchrun works with dgm train alone" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert cli.main([command]) == 1
    assert capsys.readouterr().err == ""


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what in ("failing", "restarted"):
        {"failing": failing, "restarted": restarted}[what](*arguments)
    else:
        run_here(arguments[0], arguments[1:])
