"""Generated images: characters that can be told apart, splits of patches that share no pixel, the same by one seed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dgm_pyro as dgm
from dgm_pyro import image_sets


def test_the_nearest_glyph_is_mostly_of_the_same_character():
    train, test = dgm.data.load("glyphs", num_data=4000), dgm.data.load("glyphs", "test", num_data=300)
    nearest = torch.cdist(test.x.flatten(1).float(), train.x.flatten(1).float()).argmin(1)
    # Zeros and letters O of one font are one shape, as are some ones and letters I.
    assert (train.y[nearest] == test.y).float().mean() > 0.75


def test_small_letters_come_after_capitals():
    x, y = image_sets.glyphs(np.random.default_rng(0), 3000, num_classes=62, size=28)
    ink = np.array([x[y == image_sets.CHARACTERS.index(character)].mean() for character in "Oo"])
    assert ink[0] > 1.2 * ink[1]


def test_an_image_is_distorted_about_its_middle():
    inverse = image_sets._distortions(np.random.default_rng(0), 500, 56).reshape(-1, 2, 3)
    came_from = inverse @ [28, 28, 1] - 28  # of the pixel in the middle
    assert abs(came_from).max() < 56 * image_sets.SHIFT * 1.7
    volumes = np.linalg.det(inverse[:, :, :2])
    assert abs(np.log(volumes).mean()) < 4 * image_sets.LOG_SCALE * np.sqrt(2 / 500)


def test_a_glyph_in_color_differs_from_its_background():
    blank, full = (np.full((500, 1, 8, 8), value, np.uint8) for value in (0, 255))
    back, front = (image_sets._colored_glyphs(np.random.default_rng(0), ink).astype(int) for ink in (blank, full))
    assert abs(front - back).mean((2, 3)).max(1).min() > 60


@pytest.mark.parametrize("size", [8, 32])
def test_splits_of_patches_share_no_column(monkeypatch, size):
    columns = np.tile(np.arange(640)[None, :, None], (427, 1, 3))
    photographs = SimpleNamespace(images=[columns, columns])
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: photographs)
    seen = {}
    for split in image_sets.BANDS:
        x, _ = image_sets.patches(np.random.default_rng(0), 2000, size=size, split=split)
        assert x.shape == (2000, 3, size, size)
        assert (np.diff(x, axis=3) == 1).all()
        seen[split] = set(x.flat)
    assert len(seen["train"]) + len(seen["valid"]) + len(seen["test"]) == 640
    assert set.union(*seen.values()) == set(range(640))


def test_patches_are_of_the_photographs():
    from sklearn.datasets import load_sample_images

    x = dgm.data.load("patches-8", num_data=3).x.permute(0, 2, 3, 1).numpy()
    photographs = np.stack(load_sample_images().images)
    windows = np.lib.stride_tricks.sliding_window_view(photographs, (8, 8), axis=(1, 2)).transpose(0, 1, 2, 4, 5, 3)
    for patch in x:
        corners = (windows[:, :, :, 0, 0] == patch[0, 0]).all(-1)
        assert (windows[corners] == patch).all((1, 2, 3)).any()


@pytest.mark.parametrize("name", ["glyphs", "glyphs-62", "glyphs-color", "patches-16"])
def test_a_seed_gives_the_same_images_and_splits_differ(name):
    first, again = (dgm.data.load(name, num_data=20, seed=1) for _ in range(2))
    others = [dgm.data.load(name, num_data=20, seed=2), dgm.data.load(name, "test", num_data=20, seed=1)]
    assert torch.equal(first.x, again.x)
    assert not any(torch.equal(first.x, other.x) for other in others)
    assert first.levels == 256


def test_glyphs_of_few_levels_are_the_glyphs_rounded_to_them():
    found = dgm.data.load("glyphs-digits", num_data=50, seed=3)
    x, y = image_sets.glyphs(np.random.default_rng((3, 0)), 50, num_classes=10, size=28)
    assert (found.levels, found.num_classes) == (17, 10)
    assert torch.equal(found.x, torch.from_numpy(x.astype(float) / 255 * 16).round().to(torch.uint8))
    assert torch.equal(found.y, torch.from_numpy(y))
    assert set(np.unique(found.x)) == set(range(17))
