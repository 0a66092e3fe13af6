"""``dgm represent``: codes, pictures, a table, and what it says when something is wrong."""

import json
import re

import numpy as np
import pytest
import torch
from test_cli import dgm_ok, width_of

import dgm_pyro as dgm
from dgm_pyro import cli, representations


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("represent")
    recipes = {
        "vae": ["vae", "--latent-size", "2", "--epochs", "5"],
        "hierarchy": ["vae", "--prior", "vae", "--latent-size", "6", "--data", "digits-binary"],
        "codes": ["vae", "--prior", "bernoulli", "--latent-size", "5", "--data", "digits-binary"],
        "flow": ["realnvp"],
        "points": ["diffusion", "--data", "moons"],
        "made": ["made"],
        "labeled": ["vae", "--labeled"],
        "labeled-made": ["made", "--labeled"],
        "clusters": ["vae", "--prior", "categorical", "--encoder", "categorical"],
        "vq": ["vae", "--prior", "codes-uniform", "--encoder", "codes", "--latent-size", "6"],
    }
    for name, (model, *options) in recipes.items():
        short = ["--num-data", "300", "--validation", "0", *(() if "--epochs" in options else ("--epochs", "1"))]
        dgm_ok("train", model, *options, *short, "--device", "cpu", "--out", folder / name)
    np.save(folder / "few.npy", dgm.data.load("digits", "test").x[:5].numpy())
    return folder


def files(folder):
    return {path.name for path in folder.iterdir() if path.stem.startswith("representation")}


def test_a_vae_of_two_latents_gives_all_pictures_and_a_table(trained, tmp_path, capsys):
    out = tmp_path / "representation.png"
    dgm_ok("represent", trained / "vae", "--num-data", "200", "--out", out)
    printed = capsys.readouterr().out
    parts = ("", "-grid", "-interpolation", "-traversals")
    assert files(tmp_path) == {f"representation{part}.png" for part in parts} | {"representation.npy"}
    assert all(width_of(tmp_path / f"representation{part}.png") > 300 for part in parts)
    program, test = dgm.load(trained / "vae"), dgm.data.load("digits", "test")
    z = representations.encode(program, test.x[:200])
    assert np.allclose(np.load(out.with_suffix(".npy")), z)
    assert "of 2 dimensions active" in printed
    known = dgm.data.load("digits", num_data=200)
    expected = representations.assess(representations.encode(program, known.x), known.y, z, test.y[:200])
    lines = [line.split(maxsplit=1) for line in printed.splitlines()]
    assert ["z", "  ".join(expected.cells())] in [[name, "  ".join(re.split(" {2,}", rest))] for name, rest in lines]
    pixels = representations.assess(known.x, known.y, test.x[:200], test.y[:200])
    assert ["x", "  ".join(pixels.cells())] in [[name, "  ".join(re.split(" {2,}", rest))] for name, rest in lines]


def test_levels_of_a_hierarchy(trained, tmp_path, capsys):
    out = tmp_path / "representation.png"
    dgm_ok("represent", trained / "hierarchy", "--site", "z2", "--num-data", "100", "--out", out, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["site"] == "z2"
    assert set(found["kl"]) == {"z", "z2"}
    assert len(found["kl"]["z2"]) == 3
    assert set(found["quality"]) == {"z2", "x"}
    assert np.load(out.with_suffix(".npy")).shape == (100, 3)
    assert files(tmp_path) == {"representation.png", "representation-traversals.png", "representation.npy"}


def test_discrete_codes_have_nothing_in_between(trained, tmp_path):
    dgm_ok("represent", trained / "codes", "--num-data", "100", "--out", tmp_path / "representation.png")
    assert files(tmp_path) == {"representation.png", "representation.npy"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clusters", "z of 30 data, a class among 16, as its probabilities"),
        ("vq", "z of 30 data, 6 codes of 8 values, as their probabilities"),
        ("codes", "z of 30 data, 5 bits, as their probabilities"),
        ("hierarchy", "z of 30 data, 6 features"),
    ],
)
def test_a_code_is_called_what_it_is(trained, tmp_path, capsys, name, words):
    dgm_ok("represent", trained / name, "--num-data", "30", "--out", tmp_path / "representation.png")
    assert words in capsys.readouterr().out


def test_the_advice_for_a_labeled_program_runs(trained, capsys):
    assert cli.main(["represent", str(trained / "labeled")]) == 1
    advice = capsys.readouterr().err.split("in Python: ")[1]
    x = dgm.data.load("digits", "test").x[:7]
    prepare, encode = advice.split("; ")
    names = {"dgm": dgm, "x": x}
    exec(prepare, names)
    torch.manual_seed(0)  # of the bounds that tell the class
    z, labeled = eval(encode, names), dgm.load(trained / "labeled")
    torch.manual_seed(0)
    assert torch.equal(z, representations.encode(labeled.program, x, labeled.classify(x)))
    assert z.shape[0] == 7


def test_a_flow_is_interpolated_and_points_are_mapped(trained, tmp_path, capsys):
    for name in ("flow", "points"):
        (tmp_path / name).mkdir()
        dgm_ok("represent", trained / name, "--num-data", "100", "--out", tmp_path / name / "representation.png")
    assert files(tmp_path / "flow") == {"representation.png", "representation-interpolation.png", "representation.npy"}
    assert files(tmp_path / "points") == {"representation.png", "representation.npy"}
    assert "active" not in capsys.readouterr().out


def test_data_without_labels_get_codes_and_pictures(trained, tmp_path, capsys):
    out = tmp_path / "representation.png"
    dgm_ok("represent", trained / "vae", trained / "few.npy", "--out", out, "--curve", "linear")
    assert "probe" not in capsys.readouterr().out
    program = dgm.load(trained / "vae")
    few = torch.from_numpy(np.load(trained / "few.npy"))
    assert np.allclose(np.load(out.with_suffix(".npy")), representations.encode(program, few))
    assert len(files(tmp_path)) == 5


def test_a_single_datum_has_a_code_and_no_map(trained, tmp_path, capsys):
    for name in ("hierarchy", "flow"):
        program = dgm.load(trained / name)
        x = dgm.data.load("digits-binary" if name == "hierarchy" else "digits", "test").x[:1]
        np.save(tmp_path / "one.npy", x)
        dgm_ok("represent", trained / name, tmp_path / "one.npy", "--out", tmp_path / "representation.png")
        assert f"of 1 data, {program.event_shape.numel() if name == 'flow' else 6} features" in capsys.readouterr().out
        assert np.allclose(np.load(tmp_path / "representation.npy"), representations.encode(program, x))
        assert files(tmp_path) == {"representation.npy"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("made",), "Autoregressive has no latent code"),
        (("labeled",), "has a code for each class"),
        (("labeled-made",), "Autoregressive has no latent code"),
        (("vae", "--site", "z2"), "site must be one of 'z', got 'z2'"),
        (("vae", "--curve", "bent"), "curve must be one of linear, spherical"),
        (("vae", "--num-data", "0"), "num_data must be a positive integer"),
        (("vae", "--out", "map.jpg"), "--out must end in .png"),
        (("vae", "missing.npy"), "and no file or folder"),
        (("vae", "moons"), "real data (a density)"),
    ],
)
def test_bad_input_is_one_line(trained, capfd, arguments, words):
    run, *options = arguments
    assert cli.main(["represent", str(trained / run), *options]) != 0
    error = capfd.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
