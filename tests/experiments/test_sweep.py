"""Sweeps: every cell is a run, a killed sweep goes on, a failing cell does not stop the others."""

import csv
import json
import math
import re
from dataclasses import replace

import joblib
import pytest
import torch

import dgm_pyro as dgm
from dgm_pyro import cli, plots
from dgm_pyro.experiments import runs, sweep

QUICK = dgm.TrainingOptions(epochs=1, device="cpu")
FAST = sweep.Options(num_data=64, latent_size=2, num_particles=2, training=QUICK)
AXES = {"prior": ("normal", "learned"), "objective": ("elbo", "iwae:2")}


def training(**options):
    """`FAST` with other options of the training."""
    return replace(FAST, training=replace(QUICK, **options))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "one"
    return sweep.sweep(folder, FAST, **AXES, seeds=2, progress=False)


def test_every_cell_is_a_run_with_its_numbers(swept):
    assert len(list((swept.folder / "cells").iterdir())) == 8
    program, record = runs.read(swept.folder / "cells" / "learned-iwae_2-seed1")
    assert isinstance(program, dgm.VAE)
    assert record.options["prior"] == "learned"
    assert record.options["objective"] == "iwae:2"
    assert record.options["seed"] == 1
    numbers = json.loads((swept.folder / "cells" / "learned-iwae_2-seed1" / "evaluation.json").read_text())
    evidence = dgm.evaluate(program, dgm.data.load("digits-binary", "test"), num_particles=2)
    assert numbers["bits_per_dim"] == pytest.approx(evidence.bits_per_dim)
    assert numbers["kind"] == "iwae-2"
    assert 0 <= numbers["active"] <= 2


def test_the_table_has_means_and_standard_errors_over_seeds(swept):
    row = next(row for row in swept.rows if row.choices == {"prior": "learned", "objective": "elbo"})
    values = torch.tensor([cell["bits_per_dim"] for cell in row.cells], dtype=torch.double)
    mean, error = row.over_seeds("bits_per_dim")
    assert mean == pytest.approx(values.mean().item())
    assert error == pytest.approx(values.std().item() / math.sqrt(2))
    header, lines = swept.table().header, swept.table().rows
    assert header[:4] == ["prior", "objective", "bits/dim (IWAE-2)", "nats/datum (IWAE-2)"]
    assert header[4:] == ["bits/dim (ELBO)", "nats/datum (KL)", "active units", "seconds", "seeds"]
    means = [float(line[2].split(" +- ")[0]) for line in lines]
    assert means == sorted(means)
    assert f"{mean:.4f} +- {error:.4f}" in str(swept)
    nats, error = row.over_seeds("nats")
    assert nats == pytest.approx(-mean * 64 * math.log(2))
    assert f"{nats:.2f} +- {error:.2f}" in (swept.folder / "table.md").read_text()
    with (swept.folder / "cells.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    with (swept.folder / "table.csv").open() as file:
        line = next(line for line in csv.DictReader(file) if line["prior"] == "learned")
    assert (float(line["bits_per_dim"]), float(line["nats"])) == (mean, nats)
    assert (swept.folder / "table.md").read_text().startswith("| prior | objective |")
    assert (swept.folder / "sweep.png").stat().st_size > 5000


def test_finished_cells_are_kept_and_missing_ones_made(swept, monkeypatch):
    cells = swept.folder / "cells"
    kept = {path: path.stat().st_mtime_ns for path in cells.glob("*/evaluation.json")}
    (cells / "normal-elbo-seed0" / "evaluation.json").unlink()  # killed while it was evaluated
    (cells / "normal-elbo-seed1" / "evaluation.json").unlink()
    (cells / "normal-elbo-seed1" / "run.json").unlink()  # killed while it was trained
    trained = []
    train = runs.train
    monkeypatch.setattr(
        runs, "train", lambda place, *args, **kw: trained.append(place.name) or train(place, *args, **kw)
    )
    again = sweep.sweep(swept.folder, FAST, **AXES, seeds=2, progress=False)
    assert trained == ["normal-elbo-seed1"]
    changed = {path.parent.name for path, time in kept.items() if path.stat().st_mtime_ns != time}
    assert changed == {"normal-elbo-seed0", "normal-elbo-seed1"}
    before, after = ({str(row.choices): row.over_seeds("nats") for row in each.rows} for each in (swept, again))
    assert before == after  # the same seeds give the same numbers


def test_other_options_are_refused_and_more_names_are_not(swept):
    with pytest.raises(ValueError, match="epochs was 1 and is now 2"):
        sweep.sweep(swept.folder, training(epochs=2), **AXES)
    wider = sweep.sweep(swept.folder, FAST, **AXES | {"prior": ("normal", "mog")}, seeds=1, progress=False)
    assert [len(row.cells) for row in wider.rows] == [1, 1, 1, 1]


def test_a_cell_that_fails_is_recorded_and_tried_again(tmp_path, monkeypatch):
    train = runs.train

    def failing(place, model, data, swaps, options, **more):
        if swaps["prior"] == "learned":
            raise ArithmeticError("the loss\nis not finite")
        return train(place, model, data, swaps, options, **more)

    monkeypatch.setattr(runs, "train", failing)
    result = sweep.sweep(tmp_path / "s", FAST, prior=("normal", "learned"), progress=False)
    assert result.failed == 1
    assert [len(row.cells) for row in result.rows] == [1, 0]
    assert result.rows[1].errors == ["ArithmeticError: the loss is not finite"]
    assert "failed: ArithmeticError" in str(result)
    monkeypatch.setattr(runs, "train", train)
    assert sweep.sweep(tmp_path / "s", FAST, prior=("normal", "learned"), progress=False).failed == 0


def test_a_cell_whose_training_fails_leaves_the_others_and_the_table(tmp_path, capsys):
    command = ["sweep", "vae", "--prior", "bernoulli,normal", "--objective", "stl,elbo", "--num-data", "64",
               "--latent-size", "2", "--epochs", "1", "--num-particles", "2", "--device", "cpu",
               "--out", str(tmp_path / "s")]  # fmt: skip
    assert cli.main(command) == 1
    out, error = capsys.readouterr()
    assert len([line for line in out.splitlines() if line.startswith(("bernoulli", "normal"))]) == 4
    assert "bernoulli stl: " in error
    assert "reparameteri" in error
    assert (tmp_path / "s" / "cells" / "bernoulli-stl-seed0" / "failed.json").is_file()
    assert "failed" in (tmp_path / "s" / "table.md").read_text()


def test_an_error_of_several_cells_is_told_once(tmp_path, monkeypatch, capsys):
    def failing(*arguments, **options):
        raise ArithmeticError("no luck today")

    monkeypatch.setattr(runs, "train", failing)
    arguments = ["sweep", "vae", "--prior", "normal,learned", "--device", "cpu", "--out", str(tmp_path / "s")]
    assert cli.main(arguments) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "no luck today" in line]
    assert told == ["failed: normal, learned: ArithmeticError: no luck today"]


def test_the_number_of_cells_and_the_time_that_is_left_are_told(tmp_path, capsys):
    options = {"prior": ("normal", "learned"), "objective": ("elbo",)}
    sweep.sweep(tmp_path / "s", FAST, **options)
    error = capsys.readouterr().err
    assert "2 cells to train" in error
    assert re.search(r"normal-elbo-seed0 took \d+ s: about \d+ s for the other 1", error)
    sweep.sweep(tmp_path / "s", FAST, **options, seeds=2)
    assert "2 cells to train, 2 are finished" in capsys.readouterr().err


def cells_of(times):
    return {sweep.Cell((("prior", prior), ("encoder", encoder)), 0): time for (prior, encoder), time in times.items()}


def test_the_time_that_is_left_is_the_product_of_what_each_choice_multiplies_it_by():
    """One that takes 15 times as long as the first is no longer counted as taking as long."""
    prior, encoder = {"normal": 1.0, "flow": 2.0, "vamp": 7.0}, {"meanfield": 3.0, "iaf": 45.0}
    times = cells_of({(p, e): prior[p] * encoder[e] for p in prior for e in encoder})
    order = sweep._new_choices_first([*times])
    assert sorted(order, key=str) == sorted(times, key=str)
    assert {choice for cell in order[:4] for choice in cell.choices} == {c for cell in times for c in cell.choices}
    taken = {cell: times[cell] for cell in order[:4]}
    assert sweep.predicted(taken, order[4:]) == pytest.approx(sum(times[cell] for cell in order[4:]))
    assert sweep._assumption(taken, order[4:]) == ""
    assert sweep._assumption(order[:2], order[2:]) == ", if flow, vamp take as long"
    assert sweep._assumption(order[:3], order[3:]) == ", if vamp takes as long"


def test_a_sweep_without_standardization(tmp_path):
    command = "sweep maf --data moons --num-data 20 --epochs 1 --device cpu --no-standardize --out"
    assert cli.main([*command.split(), str(tmp_path / "s")]) == 0
    assert isinstance(runs.read(tmp_path / "s" / "cells" / "seed0")[0], dgm.Flow)


@pytest.mark.parametrize("spoilt", ["", "{", "[]", "[" * 10**5, '{"kind": "elbo"}', '{"choices": 3}', "\xff"])
def test_a_damaged_evaluation_is_named_with_what_to_do(tmp_path, capsys, spoilt):
    options = {"prior": ("normal",), "objective": ("elbo",)}
    sweep.sweep(tmp_path / "s", FAST, **options, progress=False)
    path = tmp_path / "s" / "cells" / "normal-elbo-seed0" / "evaluation.json"
    whole = path.read_bytes()
    path.write_bytes(spoilt.encode("latin-1"))
    with pytest.raises(ValueError, match=r"evaluation.json is damaged \(.*\): remove it, and run the same command"):
        sweep.sweep(tmp_path / "s", FAST, **options, progress=False)
    path.unlink()
    sweep.sweep(tmp_path / "s", FAST, **options, progress=False)
    ours, theirs = json.loads(path.read_text()), json.loads(whole)
    assert ours.pop("seconds") <= theirs.pop("seconds")  # the run itself is kept
    assert ours == theirs


def test_cells_of_two_axes_in_one_folder_are_not_taken_for_each_other(tmp_path):
    """The same number, or the same name, of another axis is another cell."""
    few = replace(FAST, num_data=32, num_particles=2, training=replace(FAST.training, epochs=1))
    rows = [sweep.sweep(tmp_path / "s", few, vary={axis: [1e-3]}, progress=False).rows[0]
            for axis in ("lr", "weight_decay")]  # fmt: skip
    assert all(row.cells[0]["choices"] == row.choices for row in rows)
    sweep.sweep(tmp_path / "s", few, prior=["normal"], progress=False)
    with pytest.raises(
        ValueError,
        match=r"normal-seed0 holds a cell with prior normal, but in this sweep that name means encoder normal",
    ):
        sweep._is_finished(tmp_path / "s", sweep.Cell((("encoder", "normal"),), 0))


def test_a_damaged_sweep_is_named(tmp_path):
    (tmp_path / "sweep.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"sweep.json is damaged \(it is a list\): choose another --out"):
        sweep.sweep(tmp_path, FAST, prior=("normal",))


def test_a_number_that_is_not_finite_fails_its_cell_alone(tmp_path, monkeypatch):
    whole = sweep._train_and_evaluate

    def infinite(place, options, cell):
        return whole(place, options, cell) | ({"nats": math.inf} if cell.seed == 0 else {})

    monkeypatch.setattr(sweep, "_train_and_evaluate", infinite)
    result = sweep.sweep(tmp_path / "s", FAST, prior=("normal",), objective=("elbo",), seeds=2, progress=False)
    assert [len(row.cells) for row in result.rows] == [1]
    assert "not JSON compliant" in result.rows[0].errors[0]


@pytest.mark.parametrize(
    ("axes", "message"),
    [({"prior": ("normal", "bogus")}, "bogus"), ({"objective": ("iwae:x",)}, "iwae:x"), ({"encoder": ("no",)}, "no")],
)
def test_unknown_names_are_an_error_before_anything_is_written(tmp_path, axes, message):
    with pytest.raises(ValueError, match=message):
        sweep.sweep(tmp_path / "s", FAST, **axes)
    assert not (tmp_path / "s").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="holds no sweep"):
        sweep.sweep(tmp_path, FAST, prior=("normal",))


def test_processes_give_the_same_numbers(swept, tmp_path):
    result = sweep.sweep(tmp_path / "s", FAST, prior=("normal",), objective=("elbo",), jobs=2, progress=False)
    before = next(row for row in swept.rows if row.choices == {"prior": "normal", "objective": "elbo"})
    assert result.rows[0].cells[0]["nats"] == pytest.approx(before.cells[0]["nats"], abs=1e-4)


@pytest.mark.parametrize(("gpus", "device", "places"), [
    (0, "auto", ["auto", "auto", "auto"]), (2, "auto", ["cuda:0", "cuda:1", "cuda:0"]),
    (2, "cpu", ["cpu", "cpu", "cpu"]), (2, "cuda:1", ["cuda:1", "cuda:1", "cuda:1"]), (1, "cuda", ["cuda:0"] * 3),
])  # fmt: skip
def test_cells_take_the_gpus_in_turn(tmp_path, monkeypatch, gpus, device, places):
    ran = []
    monkeypatch.setattr(sweep, "in_parallel", lambda function, tasks, jobs: ran.extend(tasks) or [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    cells = [sweep.Cell((), seed) for seed in range(3)]
    for jobs, expected in ((3, places), (1, [device] * 3)):
        ran.clear()
        assert not [*sweep._run_all(tmp_path, training(device=device), cells, jobs)]
        assert [options.training.device for _, options, _ in ran] == expected
    with joblib.parallel_config("threading", n_jobs=3):  # of a cluster, each worker chooses for itself
        ran.clear()
        assert not [*sweep._run_all(tmp_path, training(device=device), cells, None)]
    assert {options.training.device for _, options, _ in ran} == {device}


def test_a_sweep_of_before_there_were_some_options_is_resumed(swept):
    path = swept.folder / "sweep.json"
    options = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in options.items() if name != "precision"}))
    assert sweep.sweep(swept.folder, FAST, **AXES, seeds=1, progress=False).failed == 0
    with pytest.raises(ValueError, match="precision was 'float32' and is now 'bf16'"):
        sweep.sweep(swept.folder, training(precision="bf16"), **AXES, progress=False)


def test_every_option_of_the_training_reaches_every_cell(tmp_path):
    """A sweep leaves none behind on the way: run.json of a cell says what it was trained with."""
    told = dgm.TrainingOptions(
        epochs=2, gradient_steps=5, minutes=9.0, batch_size=7, accumulate=7, drop_last=True, lr=0.02, weight_decay=0.3,
        lr_schedule="constant", optimizer="SGD", clip_norm=None, skip_norm=1e6, device="cpu", validation=0.3,
        validate_every=2, early_stopping=1, ema=0.5, compile=False, checkpoint_minutes=1.0, precision="bf16",
    )  # fmt: skip
    default = dgm.TrainingOptions()
    assert [name for name, value in vars(told).items() if value == getattr(default, name)] == ["seed"]
    sweep.sweep(tmp_path, replace(FAST, training=told), seeds=2, progress=False)
    record = runs.read(tmp_path / "cells" / "seed1")[1]
    assert told.recipe().items() - record.options.items() == {("seed", 0)}
    assert record.options["seed"] == 1


def test_options_that_do_not_fit_are_an_error_before_anything_is_written(tmp_path):
    wrong = [
        *({"precision": "half"}, {"compile": "maybe"}, {"lr": -1.0}, {"epochs": 0}, {"batch_size": 0}),
        *({"device": "abacus"}, {"validation": 2.0}),
    ]
    bad = [(next(iter(each)), lambda each=each: training(**each)) for each in wrong]
    bad.append(("num_data", lambda: replace(FAST, num_data=10_000)))
    for name, options in bad:
        with pytest.raises(ValueError, match=name):
            sweep.sweep(tmp_path / "s", options(), prior=("normal",), progress=False)
    assert not (tmp_path / "s").exists()


def test_a_model_without_a_density_has_nothing_to_be_compared_by(tmp_path):
    with pytest.raises(ValueError, match="has no density"):
        sweep.sweep(tmp_path / "s", replace(FAST, model="implicit", latent_size=None))
    assert not (tmp_path / "s").exists()


def test_the_command(tmp_path, capsys):
    arguments = ["sweep", "vae", "--prior", "normal,learned", "--num-data", "64", "--latent-size", "2", "--epochs", "1",
                 "--num-particles", "2", "--device", "cpu", "--out", str(tmp_path / "s")]  # fmt: skip
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "bits/dim (IWAE-2)" in out
    assert "learned" in out
    assert cli.main([*arguments, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 2
    assert cli.main([*arguments, "--lr", "0.1"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "lr was 0.001 and is now 0.1" in error
    cell = str(tmp_path / "s" / "cells" / "normal-seed0")
    assert cli.main(["evaluate", cell]) == 0
    assert cli.main(["sample", cell, "-n", "4"]) == 0
    assert cli.main(["checks", cell, "--num-data", "50", "--num-samples", "100"]) == 0
    assert (tmp_path / "s" / "cells" / "normal-seed0" / "checks.png").is_file()
    gaps = ["gaps", cell, "--num-data", "3", "--num-particles", "4", "--num-temperatures", "3", "--gradient-steps", "3"]
    assert cli.main(gaps) == 0
    assert "amortization gap" in capsys.readouterr().out
    assert cli.main([*gaps, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[cell]["num_data"] == 3
    assert {"gaps.png", "gaps-worst.png"} <= {
        path.name for path in (tmp_path / "s" / "cells" / "normal-seed0").iterdir()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "vae", "--prior", "bogus"], "bogus"),
        (["gaps", "nowhere"], "holds no run"),
        (["checks", "nowhere"], "holds no run"),
        (["checks", "nowhere", "--out", "x.pdf"], "must end in .png"),
        (["compare", "nowhere", "elsewhere"], "holds no run"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_any_option_is_swept(tmp_path, capsys):
    """Numbers, names and tuples, of the training and of the model: each cell is the run with these options."""
    command = ["sweep", "vae", "--data", "moons", "--vary", "lr=1e-3,0.05", "--vary", "hidden=(8,),(4,4)", "--vary",
               "lr-schedule=constant", "--num-data", "64", "--epochs", "1", "--num-particles", "2", "--device", "cpu",
               "--out", str(tmp_path / "s")]  # fmt: skip
    assert cli.main(command) == 0
    assert re.search(r"^ *lr +hidden +bits/dim", capsys.readouterr().out, re.MULTILINE)
    record = runs.read(tmp_path / "s" / "cells" / "lr=0.05-hidden=_4__4_-lr_schedule=constant-seed0")[1]
    assert (record.options["lr"], record.options["hidden"]) == (0.05, [4, 4])
    assert record.options["lr_schedule"] == "constant"
    options = {"epochs": 1, "lr": 0.05, "lr_schedule": "constant", "device": "cpu"}
    alone = runs.train(
        tmp_path / "alone", "vae", "moons", {"hidden": (4, 4)}, dgm.TrainingOptions(**options), num_data=64
    )
    swept = dgm.load(tmp_path / "s" / "cells" / "lr=0.05-hidden=_4__4_-lr_schedule=constant-seed0")
    assert all(torch.equal(a, b) for a, b in zip(alone[0].parameters(), swept.parameters(), strict=True))
    for wrong, message in (
        ("speed=3", "a name in vary must be one of"),
        ("lr", "--vary must be NAME=VALUE"),
        ("lr=fast", "lr must be a number above 0, got 'fast'"),
        ("optimizer=Adam,Adm", "got 'Adm'"),
        ("grid=(4,4),(8,8)", "grid needs images"),
    ):
        assert cli.main(["sweep", "vae", "--data", "moons", "--vary", wrong, "--out", str(tmp_path / "w")]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


# -- the picture -------------------------------------------------------------------------------------------------------


def test_the_heat_map_writes_every_number():
    cells = {("normal", "iaf"): (0.5123, 0.002), ("normal", "nsf"): (0.4711, math.nan), ("vae", "iaf"): (math.nan,) * 2}
    figure = plots.heat_map({"": cells}, "Sweep")
    words = {text.get_text() for text in figure.axes[0].texts}
    assert {"0.512", "± 0.002", "0.471", "failed"} <= words
    assert len(plots.heat_map({"a": cells, "b": cells}).axes) == 2
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.heat_map({})
