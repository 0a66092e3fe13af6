"""``dgm impute``: the picture, the numbers, and what it says when something is wrong."""

import numpy as np
import pytest
import torch
from test_cli import dgm_ok, width_of

import dgm_pyro as dgm
from dgm_pyro import cli
from dgm_pyro.infer import hide


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("impute")
    for name, data in (
        ("vae", "digits-binary"),
        ("made", "digits-binary"),
        ("realnvp", "moons"),
        ("classifier", "digits"),
    ):
        short = ("--num-data", "64", "--epochs", "1", "--validation", "0")
        dgm_ok("train", name, "--data", data, *short, "--out", folder / name)
    return folder


@pytest.mark.parametrize("mask", ["left", "random:0.3"])
def test_a_picture_and_the_numbers_of_it(trained, tmp_path, mask, capsys):
    out = tmp_path / "new" / "half.png"
    dgm_ok(
        "impute", trained / "made", "--region", mask, "-n", "3", "--num-data", "2", "--num-particles", "8", "--out", out
    )
    assert "3 draws for each of 2 data" in capsys.readouterr().out
    drawn = torch.from_numpy(np.load(out.with_suffix(".npy")))
    x = dgm.data.load("digits-binary", "test").x[:2]
    assert drawn.shape == (3, *x.shape)
    seen = hide(mask, x.shape[1:])
    assert torch.equal(drawn[..., seen], x[:, seen].expand(3, -1, -1))
    assert width_of(out) > 300


def test_the_seed_decides_and_the_run_is_the_default_place(trained):
    options = (
        "impute",
        trained / "vae",
        "-n",
        "2",
        "--num-data",
        "2",
        "--num-particles",
        "4",
        "--num-temperatures",
        "2",
    )
    drawn = []
    for seed in (0, 0, 1):
        dgm_ok(*options, "--seed", seed)
        drawn.append(np.load(trained / "vae" / "imputed.npy"))
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_points_have_a_left_and_a_right(trained, tmp_path):
    out = tmp_path / "points.png"
    dgm_ok(
        "impute", trained / "realnvp", "--region", "right", "--num-data", "3", "-n", "2", "--num-particles", "4",
        "--num-temperatures", "2", "--out", out,
    )  # fmt: skip
    x = dgm.data.load("moons", "test").x[:3]
    drawn = np.load(out.with_suffix(".npy"))
    assert np.array_equal(drawn[:, :, 0], x[:, 0].expand(2, 3).numpy())
    assert not np.isnan(drawn).any()


@pytest.mark.parametrize(
    ("run", "options", "words"),
    [
        ("made", ("--region", "middle"), "must be one of left, right, top, bottom, center, random:SHARE, got"),
        ("made", ("--region", "random:half"), "share of features to hide, such as random:0.5"),
        ("made", ("--region", "random:1.5"), "share of features to hide, such as random:0.5"),
        ("made", ("-n", "0"), "num_samples must be a positive integer"),
        ("made", ("--num-data", "0"), "num_data must be a positive integer"),
        ("made", ("--out", "half.jpg"), "--out must end in .png"),
        ("realnvp", ("--region", "top"), "'top' needs images, but x has event_shape (2,)"),
        ("classifier", (), "has no p(x) to impute by"),
        ("nothing", (), "holds no run"),
    ],
)
def test_bad_input_is_one_line(trained, capfd, run, options, words):
    assert cli.main(["impute", str(trained / run), *options]) != 0
    error = capfd.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("region", "missing"), [("left", 32), ("right", 32), ("top", 32), ("bottom", 32), ("center", 16)]
)
def test_regions(region, missing):
    mask = hide(region, (1, 8, 8))
    assert (~mask).sum() == missing
    corners = {(0, 0), (0, 7), (7, 0), (7, 7)}
    hidden = {(i, j) for i, j in corners if not mask[0, i, j]}
    expected = {
        "left": {(0, 0), (7, 0)},
        "right": {(0, 7), (7, 7)},
        "top": {(0, 0), (0, 7)},
        "bottom": {(7, 0), (7, 7)},
    }
    assert hidden == expected.get(region, set())
    assert (~hide("random:0.25", (1, 8, 8))).sum() == 16
    assert not torch.equal(hide("random:0.25", (1, 8, 8), 1), hide("random:0.25", (1, 8, 8), 2))
