"""A training that is killed or interrupted at any moment and resumed ends with the bits of one that was not.

This file is a test and, run by itself, the process that is killed.
"""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import dgm_pyro as dgm
from dgm_pyro import checkpoint, files, jobs
from dgm_pyro.checkpoint import CheckpointError
from dgm_pyro.jobs import Interrupted
from dgm_pyro.networks import MADE
from dgm_pyro.training import states
from dgm_pyro.training.states import States

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
STEPS = 5 * 4


class Killed(BaseException):
    """In the place of a SIGKILL."""


def program(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dgm.Autoregressive(dgm.Normal(3, MADE(3, 2, hidden=(8,))))


def fit(folder=None, seed=1, **others):
    """The weights that a training ends with; ``seed`` of those that the program comes with."""
    options = {"epochs": 5, "batch_size": 8, "validation": 0.2, "ema": 0.9, "device": "cpu", "progress": False}
    trained = program(seed)
    history = dgm.fit(trained, X, resume=folder, **options | others)
    return {name: value.clone() for name, value in trained.state_dict().items()}, history


@pytest.fixture(scope="module")
def whole():
    return fit(seed=0)[0]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class At:
    """An augmentation that does something at the n-th batch, of the whole training or of this process."""

    def __init__(self, number, act):
        self.left, self.act = number, act

    def __repr__(self):
        return "At"

    def __call__(self, x):
        self.left -= 1
        if self.left == 0:
            self.act()
        return x


def killed():
    raise Killed


@pytest.mark.parametrize("step", [1, 2, 4, 5, 11, 20])
def test_killed_at_a_step_and_resumed_the_weights_are_those_of_the_uninterrupted_training(step, tmp_path, whole):
    """With a state after each step: what is lost is the step that was not finished."""
    often = {"checkpoint_minutes": 1e-9}
    quiet = At(0, killed)
    with pytest.raises(Killed):
        fit(tmp_path, 0, augment=At(step, killed), **often)
    assert json.loads((tmp_path / "state.json").read_text())["steps"] == step - 1
    weights, history = fit(tmp_path, augment=quiet, **often)
    assert quiet.left == step - 1 - STEPS
    assert same(weights, whole)
    assert len(history.epochs) == 5
    again = At(0, killed)
    assert same(fit(tmp_path, augment=again)[0], whole)  # its end is stored, too
    assert again.left == 0


def test_killed_while_a_state_is_written_the_one_before_is_there(tmp_path, whole, monkeypatch):
    replace = os.replace
    for number in range(1, 12, 2):
        count = iter(range(100))
        folder = tmp_path / str(number)

        def replacing(*paths, count=count, number=number):
            if next(count) == number:
                monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
                raise Killed
            replace(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", replacing)
            with pytest.raises(Killed):
                fit(folder, 0, checkpoint_minutes=1e-9)
        monkeypatch.undo()
        assert same(fit(folder, 0)[0], whole)
        assert len(os.listdir(folder)) == 2  # nothing is left of what was not finished


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stores_the_state_after_the_step_and_says_how_to_go_on(number, tmp_path, whole):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"interrupted after step 6 of 20, which is stored: give the same call") as it:
        fit(tmp_path, 0, augment=At(6, lambda: signal.raise_signal(number)))
    assert isinstance(it.value, KeyboardInterrupt)
    assert it.value.status == 128 + number
    assert signal.getsignal(number) == before
    assert same(fit(tmp_path)[0], whole)


def test_a_second_signal_does_not_wait_for_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "AT_ONCE", -1)

    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("nobody stopped")

    with pytest.raises(KeyboardInterrupt) as it:
        fit(tmp_path, 0, augment=At(6, twice))
    assert not isinstance(it.value, Interrupted)


def test_the_same_signal_twice_at_once_is_one(tmp_path, whole):
    """``timeout 3600 dgm train`` sends SIGTERM to the process, and to its group."""

    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        fit(tmp_path, 0, augment=At(6, twice))
    assert same(fit(tmp_path)[0], whole)


def test_in_a_thread_signals_are_left_alone(tmp_path, whole):
    found = []
    thread = threading.Thread(target=lambda: found.append(fit(tmp_path)[0]))
    thread.start()
    thread.join()
    assert same(found[0], fit()[0])


def test_a_state_of_ones_own_is_resumed(whole):
    options = dgm.TrainingOptions(epochs=5, batch_size=8, validation=0.2, ema=0.9, device="cpu")
    with dgm.Training(program(), X, options=options) as training:
        training.advance()
        state = copy.deepcopy(training.state_dict())
    assert same(fit(state)[0], whole)


def test_other_data_of_the_same_size_are_refused(tmp_path):
    with pytest.raises(Killed):
        fit(tmp_path, 0, augment=At(3, killed))
    for other in (X.flip(0), X + torch.eye(40, 3) * 1e-3):
        with pytest.raises(ValueError, match=r"belongs to another training .*the digest of the data was"):
            dgm.fit(program(), other, resume=tmp_path, epochs=5, batch_size=8, validation=0.2, ema=0.9, progress=False)


def test_another_writer_is_refused(tmp_path):
    with files.only_writer(tmp_path), pytest.raises(BlockingIOError, match="another process"):
        fit(tmp_path)


def test_a_state_runs_no_code_and_a_damaged_one_is_one_line(tmp_path):
    with pytest.raises(Killed):
        fit(tmp_path, 0, augment=At(3, killed))
    [path] = tmp_path.glob("state-*.safetensors")
    content, header = path.read_bytes(), (tmp_path / "state.json").read_text()
    size = int.from_bytes(content[:8], "little")
    assert b"pickle" not in content
    spoilt = [b"", content[:-1], content[:-1] + b"?", b"\x00" * len(content), content[: size // 2]]
    for each in spoilt:
        path.write_bytes(each)
        with pytest.raises(CheckpointError, match=r"is damaged .*: start the training again"):
            fit(tmp_path)
    path.write_bytes(content)
    for each in (
        "",
        "[]",
        "{}",
        header.replace("dgm_pyro training", "another"),
        header.replace('"sha256": "', '"a": "'),
    ):
        (tmp_path / "state.json").write_text(each)
        with pytest.raises(CheckpointError, match=r"state.json is damaged .*: start the training again"):
            fit(tmp_path)
    (tmp_path / "state.json").write_text(header)
    fit(tmp_path)


@pytest.mark.parametrize("value", [1, -2.5, "a", None, True, [1, [2.0, {}]], {0: {"a": (1, 2)}}, float("inf"), b""])
def test_a_tree_comes_back_as_it_was(value):
    if value == b"":
        with pytest.raises(TypeError, match=r"builtins\.bytes"):
            checkpoint.encoded({"a": value})
        return
    tensor = torch.arange(6).reshape(2, 3).T
    tree, tensors = checkpoint.encoded({"value": value, "tensors": [tensor, {3: tensor.double()}]})
    back = checkpoint.decoded(json.loads(json.dumps(tree)), tensors)
    assert back["value"] == value
    assert type(back["value"]) is type(value)
    assert torch.equal(back["tensors"][0], tensor)
    assert torch.equal(back["tensors"][1][3], tensor.double())


def test_states_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    """At best epochs no more often than the time that storing takes allows; every epoch is the best here."""
    written, now = [], [0.0]
    write = States.write

    def slow(self):
        written.append(now[0])
        write(self)
        self.cost = 1.0
        self.stored = now[0]

    def epoch(x):
        now[0] += 0.5  # seconds of a step
        return x

    monkeypatch.setattr(States, "write", slow)
    monkeypatch.setattr(states.time, "monotonic", lambda: now[0])
    fit(tmp_path, augment=epoch, epochs=50, validation=None)
    assert len(written) == 2 + (125 - 1) // 20


def test_a_real_kill(tmp_path, whole):
    """By SIGKILL, wherever the process is after three steps."""
    folder, places = tmp_path / "run", str(Path(dgm.__file__).parent.parent)
    with subprocess.Popen([sys.executable, __file__, str(folder)], env=os.environ | {"PYTHONPATH": places}) as process:
        while process.poll() is None and ((states.read_header(folder) or {}).get("steps", 0) < 3):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 3 <= states.read_header(folder)["steps"] < STEPS
    assert same(fit(folder)[0], whole)
    assert len(os.listdir(folder)) == 2


if __name__ == "__main__":
    fit(sys.argv[1], 0, augment=lambda x: time.sleep(0.04) or x, checkpoint_minutes=1e-9)
