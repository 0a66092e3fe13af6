"""The programs of the tours, with settings chosen on validation data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dgm_pyro.catalog import build, conditional_for
from dgm_pyro.data import Data
from dgm_pyro.families.autoregressive import Autoregressive
from dgm_pyro.families.conditionals import Categorical
from dgm_pyro.families.diffusion import Diffusion
from dgm_pyro.families.labeled import Labeled
from dgm_pyro.networks import DenoisingUNet, PixelCNN
from dgm_pyro.program import Program


@dataclass(frozen=True)
class Stop:
    """A program of the tour.

    Args:
        name: stem of its files.
        title: name in tables.
        family: a key of `FAMILIES`.
        make: a function that builds it for data.
        recipe: options of `fit`; None for a program that needs no training.
        quick_epochs: epochs of the quick tour, instead of the recipe's.
        ask: options of `evaluate`.
    """

    name: str
    title: str
    family: str
    make: Callable[[Data], Program]
    recipe: dict[str, Any] | None = None
    quick_epochs: int = 0
    ask: dict[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> bool:
        return self.family == "reference"

    def options(self, quick: bool, longer: int = 1) -> dict[str, Any] | None:
        """Options of `fit`, with ``longer`` times the epochs."""
        if self.recipe is None or (not quick and longer == 1):
            return self.recipe
        return self.recipe | {"epochs": longer * (self.quick_epochs if quick else self.recipe["epochs"])}


@dataclass(frozen=True)
class Plan:
    """The images of a tour, and the programs that suit them.

    Args:
        command: the shell command.
        minutes: its processor time.
        data: name of a data set of digits, for `dgm_pyro.data.load`.
        about: origin of the data, in words.
        flow: parts of the flow, in words.
        stops: the programs, in order.
        sizes: numbers of training and of test images; None for all.
        quick_sizes: the same for the quick tour.
    """

    command: str
    minutes: int
    data: str
    about: str
    flow: str
    stops: Sequence[Stop]
    sizes: tuple[int | None, int | None] = (None, None)
    quick_sizes: tuple[int | None, int | None] = (None, None)


def independent_pixels(data: Data) -> Program:
    """p(x) = prod_i p(x_i), with counts as p(x_i), plus one half per level (Krichevsky and Trofimov 1981)."""
    frequencies = _log_frequencies(data.x, levels_of(data))
    return Categorical(data.event_shape, levels_of(data), learned=True, parameters=frequencies)


def independent_pixels_by_class(data: Data) -> Program:
    """p(x) = sum_y p(y) prod_i p(x_i | y), with counts in the same way: the naive Bayes classifier."""
    assert data.y is not None
    assert data.num_classes is not None
    pixels = nn.Embedding(data.num_classes, levels_of(data) * data.event_shape.numel())
    tables = [_log_frequencies(data.x[data.y == y], levels_of(data)).flatten() for y in range(data.num_classes)]
    pixels.weight.data.copy_(torch.stack(tables))
    labels = _log_frequencies(data.y, data.num_classes)
    prior = Categorical((), data.num_classes, learned=True, parameters=labels)
    return Labeled(prior, Categorical(data.event_shape, levels_of(data), pixels))


def small_pixelcnn(data: Data) -> Program:
    """A PixelCNN that is smaller than that of `build`, to train in minutes."""
    return Autoregressive(
        conditional_for(
            data, lambda p: PixelCNN(data.event_shape, p, width=24, layers=6, kernel_size=5, levels=data.levels)
        )
    )


def small_diffusion(data: Data) -> Program:
    """A diffusion with half the width of that of `build` and fewer steps, because the bound sums over all of them."""
    denoiser = DenoisingUNet(data.event_shape, (16, 32, 64), num_parameters=levels_of(data))
    return Diffusion(
        data.event_shape, denoiser, "log-snr", num_steps=30, subsample=2, predict="levels", levels=data.levels
    )


def _log_frequencies(x: Tensor, levels: int) -> Tensor:
    """Smoothed log-frequencies of the integers at each feature, ``(levels, *event_shape)``."""
    counts = torch.stack([(x == level).double().sum(0) for level in range(levels)])
    return ((counts + 0.5) / (len(x) + 0.5 * levels)).log().float()


def levels_of(data: Data) -> int:
    assert data.levels is not None
    return data.levels


# The recipes were chosen on validation data alone: benchmarks/choose_settings.py.
STOPS: tuple[Stop, ...] = (
    Stop("pixels", "independent pixels", "reference", independent_pixels),
    Stop("pixels-by-class", "independent pixels by class", "reference", independent_pixels_by_class),
    Stop(
        "made",
        "MADE",
        "autoregressive",
        functools.partial(build, "made"),
        {"epochs": 100, "lr": 3e-3, "weight_decay": 0.01},
        quick_epochs=6,
    ),
    Stop(
        "pixelcnn",
        "PixelCNN",
        "autoregressive",
        functools.partial(build, "pixelcnn"),
        {"epochs": 30, "lr": 6e-3, "weight_decay": 0.01},
        quick_epochs=2,
    ),
    Stop(
        "flow",
        "spline flow",
        "flow",
        functools.partial(build, "nsf"),
        {"epochs": 60, "lr": 2e-3, "weight_decay": 1.0, "ema": 0.99},
        quick_epochs=6,
        ask={"num_particles": 16},
    ),
    Stop(
        "vae",
        "VAE",
        "vae",
        functools.partial(build, "vae"),
        {"objective": "annealed", "epochs": 120, "lr": 2e-3, "weight_decay": 0.01, "ema": 0.99},
        quick_epochs=10,
        ask={"num_particles": 50},
    ),
    Stop(
        "vae-flow",
        "VAE, flow prior",
        "vae",
        functools.partial(build, "vae", prior="flow"),
        {
            "objective": "annealed",
            "epochs": 120,
            "lr": 2e-3,
            "weight_decay": 0.01,
            "ema": 0.99,
        },  # as above, so that only the prior differs
        quick_epochs=10,
        ask={"num_particles": 50},
    ),
    Stop(
        "diffusion",
        "diffusion",
        "diffusion",
        functools.partial(build, "diffusion"),
        {"epochs": 50, "lr": 4e-3, "weight_decay": 0.01, "ema": 0.995},
        quick_epochs=3,
        ask={"num_samples": 1, "batch_size": 64},
    ),
    Stop(
        "generative-classifier",
        "generative classifier",
        "labeled",
        # PixelCNN is as accurate on clean digits, but takes ten times as long and is less robust to noise.
        functools.partial(build, "made", labeled=True),
        {"epochs": 60, "lr": 3e-3, "weight_decay": 0.01},
        quick_epochs=6,
    ),
    Stop(
        "discriminative-classifier",
        "discriminative classifier",
        "discriminative",
        functools.partial(build, "classifier"),
        {"epochs": 80, "lr": 1e-3, "weight_decay": 1.0},
        quick_epochs=10,
    ),
)


def _on_images(name: str, recipe: dict[str, Any], **others: Any) -> Stop:
    """The stop ``name`` for images of 28x28 pixels."""
    (stop,) = (each for each in STOPS if each.name == name)
    return replace(stop, recipe={"weight_decay": 0.01} | recipe, quick_epochs=1, **others)


# The numbers of epochs keep the tour within a quarter of an hour. docs/images.md has the results of
# benchmarks/choose_settings.py --images for the learning rates.
IMAGE_STOPS: tuple[Stop, ...] = (
    *STOPS[:2],
    _on_images("pixelcnn", {"epochs": 4, "lr": 4e-3, "batch_size": 16}, make=small_pixelcnn),
    _on_images(
        "flow",
        {"epochs": 3, "lr": 3e-3, "ema": 0.98, "batch_size": 16},
        title="multiscale flow",
        make=functools.partial(build, "realnvp"),
        ask={"num_particles": 4},
    ),
    _on_images(
        "vae",
        {"epochs": 8, "lr": 2e-3, "ema": 0.99, "batch_size": 32},
        title="convolutional VAE",
        ask={"num_particles": 20},
    ),
    _on_images(
        "diffusion",
        {"epochs": 6, "lr": 5e-3, "ema": 0.99, "batch_size": 16},
        title="diffusion, U-Net",
        make=small_diffusion,
    ),
    # A PixelCNN would take ten passes, one for each class, of a slow network.
    _on_images("generative-classifier", {"epochs": 4, "lr": 2e-3}),
    _on_images("discriminative-classifier", {"epochs": 4, "lr": 1e-3}),
)

DIGITS = Plan(
    "dgm tour", 6, "digits", "scikit-learn’s digits", "made of monotone splines", STOPS, quick_sizes=(None, 100)
)
IMAGES = Plan(
    "dgm tour --images",
    15,
    "glyphs-digits",
    "digits in the fonts of matplotlib, rotated and stretched at random",
    "of convolutional couplings at three resolutions",
    IMAGE_STOPS,
    sizes=(4000, 200),
    quick_sizes=(200, 40),
)
