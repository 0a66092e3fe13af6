"""A run's folder is one run at every moment: while it is written, after its writer was killed, beside another."""

import itertools
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import dgm_pyro as dgm
from dgm_pyro import cli, files, jobs
from dgm_pyro.experiments import runs, sweep
from dgm_pyro.families.standardized import core_of
from dgm_pyro.training import fit

OPTIONS = dgm.TrainingOptions(epochs=1, device="cpu", validation=None)


class Killed(BaseException):
    """In the place of a SIGKILL: nothing handles it."""


def train(folder, model="made", **others):
    return runs.train(folder, model, "moons", {}, OPTIONS, num_data=16, progress=False, **others)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    train(folder := tmp_path_factory.mktemp("runs") / "run")
    return folder


def killed_at(patch, number):
    """A kill before the ``number``-th file is moved to its place: what was written beside it stays."""
    calls, replace = itertools.count(), os.replace

    def replacing(*paths):
        if next(calls) == number:
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            raise Killed
        replace(*paths)

    patch.setattr(files.os, "replace", replacing)


def held(folder):
    """The model of the run: the program and the record agree."""
    program, record = runs.read(folder)
    assert isinstance(core_of(program), {"made": dgm.Autoregressive, "vae": dgm.VAE}[record.model])
    return record.model


def test_an_overwriting_that_is_killed_leaves_the_old_run_or_the_new_one(run, tmp_path, monkeypatch):
    found = []
    for number in range(20):
        folder = shutil.copytree(run, tmp_path / str(number))
        with monkeypatch.context() as patch:
            killed_at(patch, number)
            try:
                train(folder, "vae", force=True)
            except Killed:
                found.append(held(folder))
            else:
                break
        train(folder, force=True)
        assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".safetensors"]
    assert found == sorted(found)
    assert {*found} == {"made", "vae"}  # killed after the program was replaced, and before the record was
    assert held(folder) == "vae"


def test_a_reader_between_the_two_files_of_a_writer_reads_one_run(run, tmp_path, monkeypatch):
    folder, seen = shutil.copytree(run, tmp_path / "run"), []
    replace = os.replace

    def replacing(*paths):
        replace(*paths)
        seen.append(held(folder))

    monkeypatch.setattr(files.os, "replace", replacing)
    train(folder, "vae", force=True)
    assert seen == sorted(seen)
    assert {*seen} == {"made", "vae"}


def test_the_record_names_its_weights_and_one_that_does_not_is_of_another_moment(run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    assert record["weights"] == json.loads((run / "program.json").read_text())["weights"]["sha256"]
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "run.json").write_text(json.dumps(record | {"data_dir": "elsewhere"}))
    assert runs.read(folder)[1].data_dir == "elsewhere"  # the user may edit it
    (folder / "run.json").write_text(json.dumps(record | {"model": "vae", "weights": "0" * 64}))
    assert runs.read(folder)[1].model == "made"
    del record["weights"]  # of before there was a digest
    (folder / "run.json").write_text(json.dumps(record))
    assert runs.read(folder)[1].model == "made"


OPENED = []


def _note_opened(event, arguments):
    """For writing, by whatever library."""
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        OPENED.append(Path(arguments[0]))


sys.addaudithook(_note_opened)


def test_nothing_is_written_in_its_place(tmp_path):
    """Pictures, tables and arrays are written beside it and moved there; the log of a training grows by lines."""
    OPENED.clear()
    (tmp_path / "mine.csv").write_text("a,b\n" + "0.5,1\n1,0\n0,2\n" * 8)
    command = ["train", "made", "--data", str(tmp_path / "mine.csv"), "--epochs", "1", "--device", "cpu"]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 0
    assert cli.main(["anomaly", str(tmp_path / "run"), str(tmp_path / "mine.csv"), "--false-alarm-rate", "0.5"]) == 0
    found = [path.name for path in OPENED if path.is_relative_to(tmp_path / "run")]
    assert {"anomalies.csv", "anomalies.png", "program.json", "learning-curves.png"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert {name for name in found if not re.fullmatch(r"\..+\.part", name)} == {"metrics.jsonl"}


def test_two_trainings_into_one_folder_the_second_refuses_in_one_line(tmp_path, capsys):
    command = ["train", "made", "--data", "moons", "--num-data", "16", "--epochs", "1", "--out", str(tmp_path / "run")]
    with files.only_writer(tmp_path / "run"):
        for force in ([], ["--force"]):
            assert cli.main([*command, *force]) == 1
            error = capsys.readouterr().err
            assert "is being written by another process" in error
            assert error.count("\n") == 1
    assert cli.main([*command, "--device", "cpu"]) == 0


def test_where_no_run_is_the_remedy_can_be_followed(tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "empty").mkdir()
    for name, remedy in (("nowhere", "train one with"), ("empty", "train one with"), ("thesis", "choose the folder")):
        assert cli.main(["evaluate", str(tmp_path / name)]) == 1
        assert f"holds no run, because it has no run.json: {remedy}" in capsys.readouterr().err
    train(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="is not empty"):
        train(tmp_path / "thesis")


def test_what_a_terminal_would_obey_is_shown_escaped(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    for name in ("\x1b[2J\x1b]0;title\x07", "\ud800", "\u202egnp", "two\nlines"):
        (folder / "run.json").write_text(json.dumps(record | {"model": name}))
        assert cli.main(["evaluate", str(folder)]) == 1
        error = capsys.readouterr().err
        assert error[:-1].isprintable()
        assert "is damaged (model is" in error
    assert cli.main(["evaluate", "\x1b[2J"]) == 1
    assert "dgm: \\x1b[2J holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        (3, "reading is a int"),
        ({"columns": 3}, "columns is a int"),
        ({"digests": []}, "digests is a list"),
        ({"kinds": {"a": []}}, r"the kind of 'a' is \[\]"),
        ({"kinds": {"\x1b[2J": 3}}, r"the kind of '\\x1b\[2J' is 3"),
    ],
)
def test_a_record_of_another_form_is_damaged(run, tmp_path, reading, words):
    folder = shutil.copytree(run, tmp_path / "run")
    program, record = runs.read(run)
    runs.write(folder, program, replace(record, options=record.options | {"reading": reading}))
    content = json.loads((folder / "run.json").read_text())
    for changed in ({}, {"options": {}, "weights": "0"}):  # with another digest the copy beside the weights is read
        (folder / "run.json").write_text(json.dumps(content | changed))
        with pytest.raises(ValueError, match=rf"the record in .* is damaged \({words}\): train the run again"):
            runs.read(folder)


def test_a_cell_with_damaged_weights_is_trained_anew(tmp_path):
    options = sweep.Options("made", "moons", num_data=16, num_particles=1, training=OPTIONS)
    before = sweep.sweep(tmp_path / "s", options, progress=False).rows[0].cells
    cell = tmp_path / "s" / "cells" / "seed0"
    (cell / "evaluation.json").unlink()
    [weights] = cell.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    after = sweep.sweep(tmp_path / "s", options, progress=False)
    assert after.failed == 0
    assert after.rows[0].cells[0]["nats"] == before[0]["nats"]
    assert runs.read(cell)[1].model == "made"


def test_a_sweep_has_one_writer(tmp_path):
    options = sweep.Options("made", "moons", num_data=16, num_particles=1, training=OPTIONS)
    with files.only_writer(tmp_path / "s"), pytest.raises(BlockingIOError, match="another process"):
        sweep.sweep(tmp_path / "s", options, progress=False)


# -- resumed -----------------------------------------------------------------------------------------------------------

COMMAND = [
    *("train", "vae", "--data", "moons", "--num-data", "64", "--epochs", "4", "--batch-size", "16"),
    *("--device", "cpu", "--seed", "3", "--out"),
]


@pytest.fixture
def signaled(monkeypatch):
    """A function that makes the signal come at the n-th step of a training."""

    def at(number, step):
        gradient, steps = fit.Training._gradient, []

        def counted(self, *arguments):
            steps.append(1)
            if len(steps) == step:
                signal.raise_signal(number)
            return gradient(self, *arguments)

        monkeypatch.setattr(fit.Training, "_gradient", counted)

    return at


def without_clock(record):
    for each in (record["history"], *record["history"]["epochs"]):
        del each["seconds"]
    return record


def contents(folder):
    """What a run holds, but for the times."""
    return [
        without_clock(json.loads((folder / "run.json").read_text())),
        json.loads((folder / "program.json").read_text())["weights"],
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()],
    ]


@pytest.mark.parametrize(("number", "again"), [(signal.SIGINT, "the folder"), (signal.SIGTERM, "the command")])
def test_the_command_says_how_to_go_on_and_that_leads_to_the_same_run(tmp_path, capsys, signaled, number, again):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert cli.main([*COMMAND, str(whole)]) == 0
    signaled(number, 6)
    capsys.readouterr()
    assert cli.main([*COMMAND, str(folder)]) == 128 + number
    error = capsys.readouterr().err
    assert error == f"dgm: interrupted after step 6 of 16, which is stored: resume with dgm train --resume {folder}\n"
    assert not (folder / "run.json").exists()
    with pytest.raises(FileExistsError, match="interrupted: continue it with dgm train --resume"):
        train(folder)
    command = ["train", "--resume", str(folder)] if again == "the folder" else [*COMMAND, str(folder), "--resume"]
    assert cli.main(command) == 0
    assert contents(folder) == contents(whole)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jsonl", ".png", ".safetensors"}
    assert not [*folder.glob("state*")]
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    assert cli.main(command) == 0  # it is complete: as torchrun gives the command again
    assert "was complete, so nothing was done; earlier, trained 4 epochs" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_what_resume_cannot_do_is_one_line(tmp_path, capsys, signaled, run):
    signaled(signal.SIGTERM, 6)
    assert cli.main([*COMMAND, str(tmp_path / "run")]) == 143
    capsys.readouterr()
    for command, message in (
        (["train", "--resume", str(tmp_path / "nowhere")], "holds no training to resume"),
        (["train", "--resume", str(tmp_path / "run"), "--lr", "0.1"], "uses the options of that run: leave out lr"),
        (
            [*COMMAND, str(tmp_path / "run"), "--resume", "--lr", "0.1"],
            "belongs to another training (lr was 0.001 and is now",
        ),
        ([*COMMAND, str(run), "--resume"], "holds a run with other options"),
    ):
        assert cli.main(command) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_force_begins_anew(tmp_path, signaled):
    signaled(signal.SIGTERM, 6)
    assert cli.main([*COMMAND, str(tmp_path / "run")]) == 143
    train(tmp_path / "run", force=True)
    assert held(tmp_path / "run") == "made"
    assert not [*(tmp_path / "run").glob("state*")]


def test_a_training_that_diverges_leaves_no_folder(tmp_path):
    with pytest.raises(dgm.NonFiniteLossError):
        runs.train(
            tmp_path / "run", "vae", "moons", {}, replace(OPTIONS, lr=1e30, epochs=5), num_data=64, progress=False
        )
    assert not (tmp_path / "run").exists()


def test_a_cell_that_was_interrupted_is_resumed(tmp_path, signaled, monkeypatch):
    options = sweep.Options("vae", "moons", num_data=64, num_particles=1, training=replace(OPTIONS, epochs=6))
    whole = sweep.sweep(tmp_path / "whole", options, progress=False)
    signaled(signal.SIGTERM, 4)
    with pytest.raises(jobs.Interrupted):
        sweep.sweep(tmp_path / "s", options, progress=False)
    assert (tmp_path / "s" / "cells" / "seed0" / "state.json").is_file()
    monkeypatch.undo()
    advanced, advance = [], fit.Training.advance
    monkeypatch.setattr(fit.Training, "advance", lambda self, *a: advanced.append(self.taken) or advance(self, *a))
    again = sweep.sweep(tmp_path / "s", options, progress=False)
    assert advanced == [4, 5]
    assert again.rows[0].cells[0]["nats"] == whole.rows[0].cells[0]["nats"]


# -- the options of a run ----------------------------------------------------------------------------------------------


def test_what_a_run_wrote_a_run_reads(tmp_path):
    """But for what the command says."""
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    told = ["--set", "hidden=8,4", "--validation", "0", "--clip-norm", "0", "--optimizer", "SGD(momentum=0.5)"]
    assert cli.main([*COMMAND, str(one), *told, "--lr-schedule", "StepLR(step_size=3)", "--no-compile"]) == 0
    assert cli.main(["train", "--config", str(one / "run.json"), "--device", "cpu", "--out", str(two)]) == 0
    assert contents(one) == contents(two)
    record = json.loads((two / "run.json").read_text())["options"]
    assert record["hidden"] == [8, 4]
    assert (record["validation"], record["clip_norm"], record["compile"]) == (None, None, False)
    other = ["made", "--config", str(one / "run.json"), "--set", "hidden=16,", "--epochs", "1", "--device", "cpu"]
    assert cli.main(["train", *other, "--out", str(three)]) == 1  # a MADE has no hidden here
    other[0] = "vae"
    assert cli.main(["train", *other, "--out", str(three)]) == 0
    changed = json.loads((three / "run.json").read_text())["options"]
    assert {name for name in record if changed[name] != record[name]} == {"hidden", "epochs"}


def test_a_run_is_made_again_with_the_columns_and_settings_that_it_had(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["a,b,y,c", *(f"{i % 7 - 3.5},{i},{i % 2},{'uvw'[i % 3]}" for i in range(60))]))
    one, two, three, four = (tmp_path / name for name in ("one", "two", "three", "four"))
    told = ["--data", str(table), "--columns", "a,c", "--label", "y", "--kinds", "auto", "--labeled", "--epochs", "1"]
    assert cli.main(["train", "vae", *told, "--set", "hidden=6,", "--device", "cpu", "--out", str(one)]) == 0
    config = ["train", "--config", str(one / "run.json"), "--device", "cpu", "--out"]
    assert cli.main([*config, str(two)]) == 0
    assert contents(one) == contents(two)
    table.write_text(table.read_text().replace("3.5", "4.5"))  # which is another training
    assert cli.main([*config, str(three), "--columns", "c,a", "--set", "max_parameters=99999"]) == 0
    before, after = (json.loads((run / "run.json").read_text())["options"] for run in (one, three))
    assert (after["hidden"], after["max_parameters"], after["reading"]["columns"]) == ([6], 99999, ["c", "a"])
    assert [after["reading"][name] for name in ("label", "kinds")] == [
        before["reading"][name] for name in ("label", "kinds")
    ]
    assert cli.main([*config, str(four), "--data", "moons", "--num-data", "64"]) == 0


def test_a_damaged_record_is_no_configuration(tmp_path, capsys):
    content = {"model": "vae", "data": "moons", "data_dir": None, "options": {"reading": 3}, "history": {"seconds": 1}}
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert cli.main(["train", "--config", str(tmp_path / "run.json"), "--out", str(tmp_path / "run")]) == 1
    assert re.search(
        r"run\.json is damaged \(reading is a int\): choose the run\.json of a run", capsys.readouterr().err
    )


@pytest.mark.parametrize("text", ["hidden", "hidden=", "name=x", "lr=1", "=3"])
def test_settings_that_do_not_fit_are_one_line(tmp_path, capsys, text):
    assert cli.main([*COMMAND, str(tmp_path / "run"), "--set", text]) == 1
    assert "--set must be NAME=VALUE with a NAME of prior" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_record_of_a_table_without_its_columns_gives_an_array(tmp_path):
    """As of a run that was made from Python, without the options for reading the file."""
    record = runs.record_of("vae", str(tmp_path / "table.csv"), dgm.History())
    x = torch.randn(3, 2)
    path = runs.write_alike(tmp_path / "samples", x, record, None)
    assert path == tmp_path / "samples.npy"
    assert torch.equal(torch.from_numpy(np.load(path)), x)
