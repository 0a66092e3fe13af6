"""The page "Your own data" runs as printed in an empty folder, and commands speak the user's columns and units."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

import dgm_pyro as dgm
from dgm_pyro import cli
from dgm_pyro.experiments import runs, sweep

PAGE = Path(__file__).parent.parent / "docs" / "your-own-data.md"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHORTER = {r"--epochs \d+": "--epochs 1", r"epochs=\d+": "epochs=1", "--num-temperatures 20": "--num-temperatures 2"}


def ok(*arguments):
    assert cli.main([*map(str, arguments)]) == 0


def refused(capfd, *arguments):
    capfd.readouterr()
    assert cli.main([*map(str, arguments)]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    return line


def rows_of(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The folder in which the page has run."""
    folder, namespace = tmp_path_factory.mktemp("page"), {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for language, block in BLOCK.findall(PAGE.read_text()):
            for printed, run in SHORTER.items():
                block = re.sub(printed, run, block)
            if language == "python":
                exec(compile(block, str(PAGE), "exec"), namespace)
            else:
                for line in block.splitlines():
                    ok(*line.removeprefix("dgm ").split())
    return folder


def test_samples_of_a_table_have_its_columns_and_units(page):
    rows = rows_of(page / "plant" / "samples.csv")
    assert len(rows) == 100
    assert list(rows[0]) == ["power", "pressure"]
    assert abs(np.mean([float(row["pressure"]) for row in rows]) - 1.015e5) < 1e3


@pytest.mark.parametrize("run", ["plant", "gaps"])
def test_imputations_keep_what_was_seen_and_fill_in_the_rest(page, run):
    drawn = pandas.read_csv(page / run / "imputed.csv")
    seen = pandas.read_csv(page / "holes.csv")
    assert len(drawn) == 5 * 20
    assert list(drawn) == ["row", "draw", "power", "pressure"]
    truth = seen.loc[drawn["row"], ["power", "pressure"]].to_numpy()
    known = ~np.isnan(truth)
    np.testing.assert_allclose(drawn[["power", "pressure"]].to_numpy()[known], truth[known], rtol=1e-6)
    assert drawn["power"].notna().all()
    assert drawn[drawn["row"] == 0]["power"].nunique() == 5


def test_words_come_back_in_samples_and_imputations(page):
    seen = pandas.read_csv(page / "holes.csv")
    sampled, drawn = (pandas.read_csv(page / "mixed" / f"{name}.csv") for name in ("samples", "imputed"))
    assert set(sampled["season"]) == {"summer", "winter"}
    assert sampled["hour"].between(-0.01, 24.01).all()
    assert (drawn["season"] == seen.loc[drawn["row"], "season"].to_numpy()).all()
    assert drawn["power"].notna().all()
    kinds = json.loads((page / "mixed" / "run.json").read_text())["options"]["reading"]["kinds"]
    assert kinds == {"hour": ["bounded", -0.01, 24.01], "power": ["real"], "pressure": ["real"],
                     "season": ["category", "summer", "winter"]}  # fmt: skip


def test_evaluate_says_which_columns_are_a_mass(page, capfd):
    capfd.readouterr()
    ok("evaluate", page / "mixed")
    assert "a mass of season, a density of hour, power, pressure" in capfd.readouterr().out


def test_classes_keep_their_names(page):
    rows = rows_of(page / "seasons" / "classified.csv")
    assert {row["class"] for row in rows} <= {"summer", "winter"}
    assert float(rows[0]["p_summer"]) + float(rows[0]["p_winter"]) == pytest.approx(1, abs=1e-4)
    assert len(rows_of(page / "seasons" / "samples.csv")) == 50


def test_samples_say_what_they_are_given_by_name(page, tmp_path, capfd):
    capfd.readouterr()
    ok("sample", page / "by-hour", "-n", "2", "--given", "18", "--out", tmp_path / "x.png")
    assert "2 samples of maf on plant, given hour = 18" in capfd.readouterr().out


def test_gray_images_are_drawn_as_photographs(page):
    with Image.open(page / "pixels" / "samples.png") as picture:
        dark = np.mean(np.asarray(picture.convert("L")) < 64)
    assert dark > 0.2, "digits are mostly 0, which is black, on white paper"


def test_anomalous_images_are_named_by_their_files(page):
    rows = rows_of(page / "pixels" / "anomalies.csv")
    files = sorted(each.name for each in (page / "pictures" / "class-1").iterdir())
    assert [row["file"] for row in sorted(rows, key=lambda row: int(row["index"]))] == files


def test_images_are_written_as_images(page):
    files = sorted((page / "pixels" / "samples").glob("*.png"))
    assert len(files) == 9
    with Image.open(files[0]) as image:
        assert (image.size, image.mode) == ((8, 8), "L")
        assert (np.asarray(image) % 17 == 0).all()  # 255 / 15: 16 levels over the bytes


def test_a_run_remembers_its_file_and_notices_another(page, tmp_path, capfd):
    record = json.loads((page / "plant" / "run.json").read_text())
    assert record["data"] == str(page / "plant.csv")
    assert record["options"]["reading"]["columns"] == ["power", "pressure"]
    before = (page / "plant.csv").read_text()
    try:
        (page / "plant.csv").write_text(before.replace("\n", "\n1,2,3,winter\n", 1))
        assert "plant.csv have changed since the run was trained" in refused(capfd, "evaluate", page / "plant")
        ok("evaluate", page / "plant", "--data", page / "today.csv", "--json")
        assert json.loads(capfd.readouterr().out)["num_data"] == 30
    finally:
        (page / "plant.csv").write_text(before)


def test_the_test_split_is_held_out_and_the_same_for_every_seed(page):
    source = str(page / "plant.csv")
    reading = {"columns": ["power"]}
    train, test = (runs.points(source, split, reading) for split in ("train", "test"))
    whole = dgm.data.open(source, columns=["power"])
    assert (len(train), len(test)) == (480, 120)
    assert torch.equal(torch.cat([train.x, test.x]).sort(0).values, whole.x.sort(0).values)
    other = runs.points(source, "test", reading | {"test": str(page / "today.csv")})
    assert torch.equal(other.x, dgm.data.open(page / "today.csv", columns="power").x)


def test_evidence_is_in_the_units_of_the_table(page, capfd):
    """Dividing a column by 1000 adds log 1000 nats to its log density; training sees the same standardized values."""
    table = pandas.read_csv(page / "plant.csv")
    found = []
    for scale in (1.0, 1000.0):
        path = page / f"scaled-{scale:.0f}.csv"
        (table[["power"]] / scale).to_csv(path, index=False)
        ok("train", "pixels", "--data", path, "--epochs", 1, "--device", "cpu", "--out", page / path.stem)
        capfd.readouterr()
        ok("evaluate", page / path.stem, "--json")
        found.append(json.loads(capfd.readouterr().out)["nats"])
    assert found[1] - found[0] == pytest.approx(math.log(1000), abs=1e-3)


def test_columns_are_found_by_name_whatever_their_order(page, tmp_path):
    table = pandas.read_csv(page / "today.csv")
    table[["pressure", "season", "power"]].to_csv(tmp_path / "other.csv", index=False)
    program, record = runs.read(page / "plant")
    first, other = (
        runs.inputs(str(path), program, None, record.reading) for path in (page / "today.csv", tmp_path / "other.csv")
    )
    assert torch.equal(first.x, other.x)


def test_a_sweep_and_a_comparison_read_it_too(page):
    options = sweep.Options(
        "vae", str(page / "plant.csv"), num_particles=2, training=dgm.TrainingOptions(epochs=1, device="cpu"),
        reading={"columns": ["power", "pressure"]},
    )  # fmt: skip
    found = sweep.sweep(page / "sweep", options, prior=["normal", "learned"], progress=False)
    assert found.failed == 0
    again = sweep.sweep(page / "sweep", options, prior=["normal", "learned"], progress=False)
    assert again.as_dict() == found.as_dict()
    cells = sorted((page / "sweep" / "cells").iterdir())
    compared = sweep.compare(cells, data=str(page / "today.csv"))
    assert {len(each.values) for each in compared.evidences.values()} == {30}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "nothing.csv"), "no data set 'nothing.csv', and no file or folder"),
        (("--data", "plant.csv"), "line 2, column 'season' holds"),
        (("--data", "plant.csv", "--columns", "force"), "columns names 'force', but"),
        (("--data", "plant.csv", "--kinds", "auto"), "for the models pixels, made, any-order, vae, not for 'maf'"),
        (("--data", "plant.csv", "--kinds", "hour"), "--kinds must be auto or COLUMN=KIND,..., got 'hour'"),
        (("--data", "moons", "--label", "season"), "options for reading a file, but moons is a data set"),
        (("--data", "holes.csv", "--columns", "power,hour", "--num-data", "17"), "num_data is 17, but holes has 16"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(page, monkeypatch, capfd, arguments, words):
    monkeypatch.chdir(page)
    assert words in refused(capfd, "train", "maf", *arguments, "--out", "refused")
    assert not (page / "refused").exists()
