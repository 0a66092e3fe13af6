"""Runs side by side: paired differences, and what is not comparable is refused."""

import json

import pytest
import torch

import dgm_pyro as dgm
from dgm_pyro import cli
from dgm_pyro.evaluation import Evidence
from dgm_pyro.experiments import runs
from dgm_pyro.experiments.sweep import Comparison, compare


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    recipes = {
        "pixels": ("pixels", "digits-binary", {}),
        "vae": ("vae", "digits-binary", {"latent_size": 2}),
        "gray": ("pixels", "digits", {}),
        "points": ("realnvp", "moons", {}),
        "classifier": ("classifier", "digits-binary", {}),
    }
    for name, (model, data, swaps) in recipes.items():
        runs.train(
            folder / name, model, data, swaps, dgm.TrainingOptions(epochs=1, device="cpu"), num_data=64, progress=False
        )
    return {name: folder / name for name in recipes}


def test_differences_are_paired(folders):
    found = compare([folders["pixels"], folders["vae"]], num_particles=3)
    test = dgm.data.load("digits-binary", "test")
    a, b = (dgm.evaluate(dgm.load(folders[name]), test, num_particles=3) for name in ("pixels", "vae"))
    numbers = found.as_dict()[str(folders["vae"])]
    difference, error = b.minus(a)
    assert numbers["difference_nats"] == pytest.approx(difference)
    assert numbers["difference_stderr"] == pytest.approx(error)
    assert error < a.nats_stderr + b.nats_stderr
    assert numbers["parameters"] == sum(p.numel() for p in dgm.load(folders["vae"]).parameters())
    assert [evidence.kind for evidence in found.evidences.values()] == ["exact", "iwae-3"]
    assert numbers["difference_kind"] == "at least"
    assert "more than pixels, paired datum by datum; > at least" in str(found)
    assert "a bound may be below log p(x) by its gap" in str(found)
    assert f"  > {difference:+.3f} +- {error:.3f}  " in str(found)
    assert f", a mass; runs in {folders['vae'].parent}\n" in str(found)


@pytest.mark.parametrize(
    ("names", "folder", "shown"),
    [
        (["runs/vae", "runs/iaf"], "runs", ["vae", "iaf"]),
        (["/a/b/runs/one", "/a/b/two"], "/a/b", ["runs/one", "two"]),
        (["vae", "runs/iaf"], "", ["vae", "runs/iaf"]),
        (["/a/vae", "runs/iaf"], "", ["/a/vae", "runs/iaf"]),
    ],
)
def test_the_table_fits_a_terminal(names, folder, shown):
    """With one long name, and numbers as large as they get."""
    kinds = ["exact", "iwae-1000"]
    values = torch.tensor([[-1234.5, -1200.25, -1111.0], [-1200.125, -1190.0, -1101.5]])
    evidences = {
        name: Evidence(each, kind, "mass", 784, "Any", "mnist-binary (test)")
        for name, each, kind in zip(names, values, kinds, strict=True)
    }
    found = Comparison(evidences, dict.fromkeys(names, 12_345_678), dict.fromkeys(names, 1234.5))
    lines = str(found).splitlines()
    assert lines[0] == "3 of mnist-binary (test), a mass" + (f"; runs in {folder}" if folder else "")
    assert [line.split()[0] for line in lines[2:4]] == shown
    assert max(map(len, lines)) <= 100
    assert "> +18.042" in lines[3]


@pytest.mark.parametrize(
    ("other", "message"),
    [("points", r"a mass and a density.*Dequantized"), ("gray", "same --data"), ("classifier", r"p\(y \| x\)")],
)
def test_what_is_not_comparable_is_refused_with_a_remedy(folders, other, message):
    with pytest.raises(ValueError, match=message):
        compare([folders["pixels"], folders[other]])


def test_one_run_is_no_comparison(folders):
    with pytest.raises(ValueError, match="at least two"):
        compare([folders["vae"], folders["vae"]])


def test_the_command(folders, capsys):
    pair = [str(folders["pixels"]), str(folders["vae"])]
    assert cli.main(["compare", *pair]) == 0
    assert "parameters" in capsys.readouterr().out
    assert cli.main(["compare", *pair, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(pair)
    assert cli.main(["compare", pair[0], str(folders["points"])]) == 1
    error = capsys.readouterr().err
    assert "Dequantized" in error
    assert error.count("\n") == 1
