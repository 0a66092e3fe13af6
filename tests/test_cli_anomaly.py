"""``dgm anomaly`` and ``dgm classify``: tables, pictures, numbers, and what they say when something is wrong."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from test_cli import dgm_ok, width_of

import dgm_pyro as dgm
from dgm_pyro import anomaly, cli
from dgm_pyro.experiments import runs
from dgm_pyro.uses.classification import beliefs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anomaly")
    recipes = {
        "pixels": ["pixels", "--lr", "0.1", "--epochs", "10"],
        "background": ["pixels", "--lr", "0.1", "--epochs", "1"],
        "vae": ["vae", "--latent-size", "4"],
        "labeled": ["pixels", "--labeled", "--lr", "0.1", "--epochs", "20"],
        "classifier": ["classifier", "--epochs", "5"],
        "points": ["realnvp", "--data", "moons"],
        "mutated": ["pixels", "--lr", "0.1", "--epochs", "10", "--mutate", "1"],
    }
    for name, (model, *options) in recipes.items():
        short = ["--num-data", "500", "--validation", "0", *(() if "--epochs" in options else ("--epochs", "1"))]
        dgm_ok("train", model, *options, *short, "--device", "cpu", "--out", folder / name)
    np.save(folder / "noise.npy", np.random.default_rng(0).integers(0, 17, (30, 8, 8)))
    np.save(folder / "far.npy", np.full((5, 2), 50.0))
    np.save(folder / "words.npy", np.array(["a", "b"]))
    np.save(folder / "large.npy", np.zeros((5, 9, 9)))
    np.savez(folder / "several.npz", a=np.zeros((5, 8, 8)))
    (folder / "several.npz").rename(folder / "several.npy")
    (folder / "text.npy").write_text("0 1 2 3 4 5 6 7")
    (folder / "empty.npy").write_bytes(b"")
    (folder / "folder.npy").mkdir()
    return folder


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_noise_is_flagged_and_digits_hardly(trained, tmp_path, capsys):
    out = tmp_path / "found.png"
    dgm_ok("anomaly", trained / "pixels", trained / "noise.npy", "--false-alarm-rate", "0.05", "--out", out)
    printed = capsys.readouterr().out
    assert "30 of 30" in printed
    assert "1.0000 +- 0.0000" in printed
    assert width_of(out) > 300
    rows = rows_of(out.with_suffix(".csv"))
    assert sorted(int(row["index"]) for row in rows) == list(range(30))
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    noise = torch.from_numpy(np.load(trained / "noise.npy"))[:, None]
    surprise = anomaly.NegativeLogLikelihood(dgm.load(trained / "pixels"))(noise)
    assert scores[0] == pytest.approx(surprise.max().item(), rel=1e-5)


def test_a_background_of_mutated_data_alone_knows_nothing_but_the_levels(trained):
    program, record = runs.read(trained / "mutated")
    assert record.options["mutate"] == 1
    log_p = program.log_prob(dgm.data.load("digits", "test").x).double()
    # 500 data decide 16 free parameters of each pixel, at a cost of 16 / (2 x 500) nats: 1.02 for the 64 of them.
    assert log_p.mean().item() == pytest.approx(-64 * math.log(17), abs=2)


def test_every_score_in_one_table(trained, capsys):
    dgm_ok(
        "anomaly", trained / "vae", trained / "noise.npy", "--scores", "likelihood,typicality,complexity,ratio,waic,kl",
        "--background", trained / "background", "--ensemble", trained / "background", "--json",
    )  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    names = ["likelihood", "typicality", "complexity", "ratio", "waic", "kl"]
    assert [row["score"] for row in found["scores"]] == names
    assert found["num_reference"] == 180
    for row in found["scores"]:
        assert row["false_alarms"] < 0.05  # 0.01 of 180, by far less than 4 standard errors
        assert 0 <= row["auroc"] <= 1


@pytest.mark.parametrize("dtype", [">i4", ">u2", ">f8", "<f2", "g", "?"])
def test_numbers_are_read_whatever_machine_wrote_them(trained, tmp_path, dtype):
    bits = np.random.default_rng(1).integers(0, 2, (9, 1, 8, 8))
    for name, array in (("ours", bits), ("theirs", np.asfortranarray(bits.astype(dtype)))):
        np.save(tmp_path / f"{name}.npy", array)
        dgm_ok("anomaly", trained / "pixels", tmp_path / f"{name}.npy", "--out", tmp_path / f"{name}.png")
    assert rows_of(tmp_path / "theirs.csv") == rows_of(tmp_path / "ours.csv")


def test_the_table_says_what_its_numbers_are(trained, tmp_path, capsys, monkeypatch):
    out = tmp_path / "found.png"
    dgm_ok("anomaly", trained / "pixels", "digits", "--out", out)
    printed = capsys.readouterr().out
    assert "threshold (nats)" in printed
    assert "AUROC: probability that one of the data scores above a normal datum; 0.5 is chance" in printed
    threshold = float(printed.split("\nlikelihood")[1].split()[0])
    log_p = dgm.load(trained / "pixels").log_prob(dgm.data.load("digits", "test").x)
    assert (-log_p).min() < threshold < (-log_p).max()  # in nats, whatever the number of pixels
    dgm_ok("anomaly", trained / "pixels", "digits", "--out", out, "--json")
    assert json.loads(capsys.readouterr().out)["unit"] == "nats"
    monkeypatch.setenv("COLUMNS", "200")
    dgm_ok("anomaly", "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "Scores and thresholds are in nats" in said
    assert "The AUROC is the probability that one of the DATA scores above a normal datum" in said


def test_points_need_no_picture_of_pixels(trained, capsys):
    dgm_ok("anomaly", trained / "points", trained / "far.npy")
    assert "5 of 5" in capsys.readouterr().out


def test_answers_with_doubt(trained, tmp_path, capsys):
    out = tmp_path / "answers.csv"
    dgm_ok("classify", trained / "labeled", "digits", "--false-alarm-rate", "0.1", "--out", out)
    assert "rejected, by log p(x)" in capsys.readouterr().out
    rows, test = rows_of(out), dgm.data.load("digits", "test")
    probabilities, log_p = beliefs(dgm.load(trained / "labeled"), test.x)
    assert [int(row["class"]) for row in rows] == probabilities.argmax(-1).tolist()
    assert [float(row["log_p_x"]) for row in rows] == pytest.approx(log_p.tolist(), rel=1e-4)
    assert [float(row["p_3"]) for row in rows] == pytest.approx(probabilities[:, 3].tolist(), rel=1e-4)
    # The 360 digits are their own reference: those above the 325th, ceil(0.9 * 361), are rejected.
    assert sum(int(row["reject"]) for row in rows) == 35
    assert width_of(out.with_suffix(".png")) > 300


def test_noise_is_rejected_by_who_knows_p_of_x(trained, tmp_path, capsys):
    dgm_ok("classify", trained / "labeled", trained / "noise.npy")
    assert "30 of 30 answers rejected" in capsys.readouterr().out
    dgm_ok("classify", trained / "classifier", trained / "noise.npy")
    assert "it has no p(x)" in capsys.readouterr().out
    assert rows_of(trained / "classifier" / "classified.csv")[0]["log_p_x"] == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("anomaly", "pixels", "noise.npy", "--scores", "luck"), "scores must be one of likelihood"),
        (("anomaly", "pixels", "noise.npy", "--scores", "ratio"), "needs a background (--background RUN)"),
        (("anomaly", "pixels", "noise.npy", "--scores", "waic"), "needs an ensemble (--ensemble RUN,RUN,...)"),
        (("anomaly", "pixels", "noise.npy", "--scores", "kl"), "has no latents"),
        (("anomaly", "pixels", "noise.npy", "--false-alarm-rate", "0.001"), "pass at least 999"),
        (("anomaly", "pixels", "noise.npy", "--out", "found.jpg"), "--out must end in .png"),
        (("anomaly", "pixels", "words.npy"), "pass an array of numbers"),
        (("anomaly", "pixels", "several.npy"), "several.npy is not an array (the magic string is not correct"),
        (("anomaly", "pixels", "text.npy"), "text.npy is not an array (the magic string is not correct"),
        (("anomaly", "pixels", "empty.npy"), "empty.npy is not an array (EOF"),
        (("anomaly", "pixels", "folder.npy"), "holds no images"),
        (("anomaly", "pixels", "large.npy"), "the run takes (N, *(1, 8, 8))"),
        (("anomaly", "pixels", "missing.npy"), "and no file or folder"),
        (("anomaly", "pixels", "moons"), "real data (a density)"),
        (("anomaly", "classifier", "noise.npy"), "has no p(x)"),
        (("classify", "pixels", "noise.npy"), "has no p(y | x)"),
        (("classify", "labeled", "noise.npy", "--out", "table.png"), "--out must end in .csv"),
        (("classify", "labeled", "noise.npy", "--num-particles", "0"), "num_particles must be a positive integer"),
    ],
)
def test_bad_input_is_one_line(trained, capfd, arguments, words):
    command, run, data, *options = arguments
    data = str(trained / data) if data.endswith(".npy") else data
    assert cli.main([command, str(trained / run), data, *options]) != 0
    error = capfd.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
