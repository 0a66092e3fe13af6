"""The tour: train every family on real digits, ask each what generative models are for, and write a report.

What is asked of each program: samples; the density of unseen digits, in bits per dimension; anomalies, found by a low
p(x); a representation, probed by a linear classifier; and, of p(x, y), how far its answers can be trusted when noise
grows, next to a discriminative p(y | x).
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgm_pyro import data as datasets
from dgm_pyro import report, runs
from dgm_pyro.build import build
from dgm_pyro.conditionals import Categorical
from dgm_pyro.data import Data
from dgm_pyro.diffusion import Diffusion
from dgm_pyro.evaluation import Evidence, evaluate, evaluating
from dgm_pyro.labelled import Discriminative, Labelled
from dgm_pyro.program import Program, seeded
from dgm_pyro.questions import (
    ANOMALY_NOISE,
    NOISY,
    SHUFFLED,
    Comparison,
    add_noise,
    auroc,
    beliefs,
    compare,
    latents,
    share,
    shuffle_pixels,
)
from dgm_pyro.representations import probe
from dgm_pyro.tour_page import as_text, line_of, page_of, versions
from dgm_pyro.training import History, NonFiniteLossError, find_device, fit

# -- what is visited ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stop:
    """A program of the tour.

    Args:
        name: of its files; title: in tables; family: a key of `FAMILIES`.
        make: builds it for data.
        recipe: options of `fit`; None for a program that needs no training.
        quick_epochs: of the quick tour, in place of the recipe's.
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

    def options(self, quick: bool) -> dict[str, Any] | None:
        """Of `fit`."""
        if self.recipe is None or not quick:
            return self.recipe
        return self.recipe | {"epochs": self.quick_epochs}


def independent_pixels(data: Data) -> Program:
    """p(x) = prod_i p(x_i), each p(x_i) counted, every level half a time more than seen (Krichevsky, Trofimov 1981)."""
    frequencies = _log_frequencies(data.x, _levels(data))
    return Categorical(data.event_shape, _levels(data), learned=True, parameters=frequencies)


def independent_pixels_by_class(data: Data) -> Program:
    """p(x) = sum_y p(y) prod_i p(x_i | y), counted in the same way: the naive Bayes classifier."""
    assert data.y is not None
    assert data.num_classes is not None
    pixels = nn.Embedding(data.num_classes, _levels(data) * data.event_shape.numel())
    tables = [_log_frequencies(data.x[data.y == y], _levels(data)).flatten() for y in range(data.num_classes)]
    pixels.weight.data.copy_(torch.stack(tables))
    labels = _log_frequencies(data.y, data.num_classes)
    prior = Categorical((), data.num_classes, learned=True, parameters=labels)
    return Labelled(prior, Categorical(data.event_shape, _levels(data), pixels))


def _log_frequencies(x: Tensor, levels: int) -> Tensor:
    """Smoothed log-frequencies of the integers at each feature, ``(levels, *event_shape)``."""
    counts = torch.stack([(x == level).double().sum(0) for level in range(levels)])
    return ((counts + 0.5) / (len(x) + 0.5 * levels)).log().float()


def _levels(data: Data) -> int:
    assert data.levels is not None
    return data.levels


# The recipes were chosen by validation data alone: benchmarks/choose_settings.py.
STOPS: tuple[Stop, ...] = (
    Stop("pixels", "independent pixels", "reference", independent_pixels),
    Stop("pixels-by-class", "independent pixels by class", "reference", independent_pixels_by_class),
    Stop(
        "made",
        "MADE",
        "autoregressive",
        functools.partial(build, "made"),
        {"epochs": 100, "lr": 3e-3, "weight_decay": 0.01},
        quick_epochs=8,
    ),
    Stop(
        "pixelcnn",
        "PixelCNN",
        "autoregressive",
        functools.partial(build, "pixelcnn"),
        {"epochs": 20, "lr": 6e-3, "weight_decay": 0.01},
        quick_epochs=3,
    ),
    Stop(
        "flow",
        "spline flow",
        "flow",
        functools.partial(build, "nsf"),
        {"epochs": 60, "lr": 2e-3, "weight_decay": 1.0, "ema": 0.99},
        quick_epochs=8,
        ask={"num_particles": 16},
    ),
    Stop(
        "vae",
        "VAE",
        "vae",
        functools.partial(build, "vae"),
        {"objective": "annealed", "epochs": 120, "lr": 2e-3, "weight_decay": 0.01, "ema": 0.99},
        quick_epochs=15,
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
        },  # as above: only the prior differs
        quick_epochs=15,
        ask={"num_particles": 50},
    ),
    Stop(
        "diffusion",
        "diffusion",
        "diffusion",
        functools.partial(build, "diffusion"),
        {"epochs": 50, "lr": 2e-3, "weight_decay": 0.01, "ema": 0.995},
        quick_epochs=4,
        ask={"draws": 1, "batch_size": 64},
    ),
    Stop(
        "generative-classifier",
        "generative classifier",
        "labelled",
        # PixelCNN is as accurate on clean digits, takes ten times as long, and noise throws it off sooner.
        functools.partial(build, "made", labelled=True),
        {"epochs": 60, "lr": 3e-3, "weight_decay": 0.01},
        quick_epochs=8,
    ),
    Stop(
        "discriminative-classifier",
        "discriminative classifier",
        "discriminative",
        functools.partial(build, "classifier"),
        {"epochs": 80, "lr": 1e-3, "weight_decay": 1.0},
        quick_epochs=15,
    ),
)


@dataclass
class Result:
    """What a stop gave: the trained program, and its answers to what was asked."""

    stop: Stop
    program: Program
    history: History
    evidence: Evidence | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None
    latents: Tensor | None = None
    probe: float | None = None
    accuracy: float | None = None

    @property
    def bits_per_dim(self) -> float:
        return math.inf if self.evidence is None else self.evidence.bits_per_dim

    @functools.cached_property
    def aurocs(self) -> dict[str, float]:
        if self.evidence is None:
            return {}
        return {kind: auroc(self.evidence.values, scores) for kind, scores in self.scores.items()}

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.program.parameters())

    def metrics(self) -> dict[str, Any]:
        """The numbers, as plain Python."""
        density: dict[str, Any] = {"bits_per_dim": None, "kind": None, "stderr": None}
        if self.evidence is not None:
            density = self.evidence.as_dict()
            del density["program"], density["data"]
        return {
            "name": self.stop.name,
            "title": self.stop.title,
            "family": self.stop.family,
            "reference": self.stop.reference,
            **density,
            "seconds": round(self.history.seconds, 2),
            "parameters": self.parameters,
            "epochs": len(self.history.epochs),
            "best_epoch": self.history.best_epoch,
            "auroc": self.aurocs,
            "probe": self.probe,
            "accuracy": self.accuracy,
            "checkpoint": f"checkpoints/{self.stop.name}",
        }


# -- the tour ----------------------------------------------------------------------------------------------------------


@dataclass
class Tour:
    """The state of a tour: what it was given, and the results so far. `run` makes one."""

    out: Path
    quick: bool
    seed: int
    device: torch.device
    stops: Sequence[Stop] = STOPS
    results: list[Result] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    comparison: Comparison | None = None
    complete: bool = False
    pixel_probe: float | None = None
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.train = datasets.load("digits", "train")
        self.test = datasets.load("digits", "test")
        self.anomalies = {
            SHUFFLED: shuffle_pixels(self.test.x, self.seed),
            NOISY: add_noise(self.test.x, ANOMALY_NOISE, self.levels, self.seed),
        }

    def visit(self, stop: Stop) -> Result:
        """Train a program, and ask it everything that it can answer."""
        with seeded(self.seed, torch.device("cpu")):
            program = stop.make(self.train)
        options = stop.options(self.quick)
        history = History()
        if options is None:
            program.to(self.device).eval()
        else:
            history = fit(program, self.train, seed=self.seed, device=self.device, **options)
        result = Result(stop, program, history)
        record = runs.record_of(stop.name, "digits", history, seed=self.seed, **(options or {}))
        runs.write(self.out / "checkpoints" / stop.name, program, record)

        if program.variable == "x":

            def ask(data: Data) -> Evidence:
                return evaluate(program, data, seed=self.seed, **stop.ask)

            with at_all_times(program):
                result.evidence = ask(self.test)
                result.scores = {name: ask(self._like_test(x)).values for name, x in self.anomalies.items()}
            result.samples = self._samples(program)
        features, test_features = latents(program, self.train.x), latents(program, self.test.x)
        if features is not None and test_features is not None:
            result.latents, result.probe = test_features, self._probe(features, test_features)
        if isinstance(program, (Labelled, Discriminative)):
            guess = beliefs(program, self.test.x)[0].argmax(-1)
            result.accuracy = share(guess == self.test.y)
        return result

    def _like_test(self, x: Tensor) -> Data:
        return Data(x, levels=self.test.levels, name=self.test.name)

    def _samples(self, program: Program) -> Tensor:
        """40 draws; 4 rows of all classes, in order, where the program knows classes."""
        given = torch.arange(10, device=self.device).repeat(4) if isinstance(program, Labelled) else None
        with seeded(self.seed, self.device), evaluating(program):
            return program.sample(40, given).cpu()

    def _probe(self, train: Tensor, test: Tensor) -> float:
        assert self.train.y is not None
        assert self.test.y is not None
        return probe(train, self.train.y, test, self.test.y)

    def result(self, name: str) -> Result | None:
        return next((result for result in self.results if result.stop.name == name), None)

    @property
    def models(self) -> list[Result]:
        """Those with a p(x) that are no reference, in the order of the tour."""
        return [result for result in self.results if result.evidence is not None and not result.stop.reference]

    @property
    def levels(self) -> int:
        return _levels(self.test)

    def metrics(self) -> dict[str, Any]:
        return {
            "complete": self.complete,
            "quick": self.quick,
            "seed": self.seed,
            "device": str(self.device),
            "data": "digits",
            "num_test": len(self.test),
            "anomaly_noise": ANOMALY_NOISE,
            "probe_of_pixels": self.pixel_probe,
            "seconds": round(time.perf_counter() - self.started, 1),
            "versions": versions(),
            "programs": [result.metrics() for result in self.results],
            "classifiers": None if self.comparison is None else self.comparison.metrics(),
            "failures": self.failures,
        }


def run(
    out: str | Path = "tour",
    *,
    quick: bool = False,
    seed: int = 0,
    device: str = "auto",
    stops: Sequence[Stop] = STOPS,
) -> list[str]:
    """Take the tour. What is done is on disk at any time; interrupted, it still writes a report of that.

    Args:
        out: the folder to write: ``report.html``, ``metrics.json``, ``pictures/``, ``checkpoints/``.
        quick: train for seconds rather than minutes.
        seed: of everything.
        device: "auto", or a torch device.
        stops: the programs to visit.

    Returns:
        A line for each program whose training failed; the tour goes on without it.

    Raises:
        FileExistsError: ``out`` holds something that is no tour.
        ValueError: there is no such device.
    """
    where = find_device(device)
    tour = Tour(_cleared(Path(out)), quick, seed, where, stops)
    print(f"{len(stops)} programs on {len(tour.train)} digits of 8 x 8 pixels, tested on {len(tour.test)}; {where}")
    tour.pixel_probe = tour._probe(tour.train.x.flatten(1).float(), tour.test.x.flatten(1).float())
    try:
        for number, stop in enumerate(stops, start=1):
            print(f"[{number}/{len(stops)}] {stop.title}", flush=True)
            try:
                result = tour.visit(stop)
            except NonFiniteLossError as error:
                tour.failures.append(f"{stop.title}: {error}")
                print(f"        failed: {error}", flush=True)
                continue
            tour.results.append(result)
            print(f"        {line_of(result)}", flush=True)
            runs.write_json(tour.out / "metrics.json", tour.metrics())
        classifiers = {name: tour.result(f"{name}-classifier") for name in ("generative", "discriminative")}
        trained = {name: result.program for name, result in classifiers.items() if result is not None}
        if len(trained) == 2:
            print("classifiers under noise", flush=True)
            tour.comparison = compare(trained, tour.test, seed)
        tour.complete = not tour.failures
    finally:
        if tour.results:
            _finish(tour)
    return tour.failures


@contextlib.contextmanager
def at_all_times(program: Program) -> Iterator[None]:
    """Sum a diffusion's bound over all its times: the few of a training step would blur the score of each digit."""
    if not isinstance(program, Diffusion):
        yield
        return
    subsample, program.subsample = program.subsample, program.steps
    try:
        yield
    finally:
        program.subsample = subsample


def _cleared(out: Path) -> Path:
    """``out``, without what an earlier tour reported there."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, but a tour is a folder: choose another --out")
    if out.exists() and any(out.iterdir()) and not (out / "metrics.json").is_file():
        raise FileExistsError(f"{out} is not empty and holds no tour: choose another --out")
    for name in ("metrics.json", "report.html"):
        (out / name).unlink(missing_ok=True)
    for name in ("pictures", "checkpoints"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
    # A mark, so that a tour interrupted before its first result is still known as one.
    runs.write_json(out / "metrics.json", {"complete": False, "programs": []})
    return out


def _finish(tour: Tour) -> None:
    """Pictures, report and numbers of what there is; then the table."""
    print("pictures and report", flush=True)
    page = page_of(tour)
    for section in page.sections:
        for picture in section.all_pictures():
            picture.save(tour.out / "pictures")
    report.write(page, tour.out / "report.html")
    runs.write_json(tour.out / "metrics.json", tour.metrics())
    print()
    print(as_text(page.table))
    print()
    state = "" if tour.complete else "NOT COMPLETE: "
    print(f"{state}{tour.metrics()['seconds']:.0f} s; look at {tour.out / 'report.html'}", flush=True)
