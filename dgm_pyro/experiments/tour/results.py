"""The measurements of each program of the tour, and of the whole tour."""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dgm_pyro.checkpoint as checkpoint
import dgm_pyro.data as datasets
from dgm_pyro.data import Data
from dgm_pyro.evaluation import Evidence, evaluate, evaluating
from dgm_pyro.experiments import runs
from dgm_pyro.experiments.tour.comparison import ANOMALY_NOISE, NOISY, SHUFFLED, ClassifierComparison
from dgm_pyro.experiments.tour.stops import DIGITS, Plan, Stop, levels_of
from dgm_pyro.families.diffusion import Diffusion
from dgm_pyro.families.labeled import Discriminative, Labeled
from dgm_pyro.families.vae import VAE
from dgm_pyro.program import Program, seeded
from dgm_pyro.training.fit import History, fit
from dgm_pyro.training.states import States
from dgm_pyro.uses.anomaly import Separation, separation
from dgm_pyro.uses.classification import beliefs, share
from dgm_pyro.uses.corruptions import add_noise, shuffle_pixels
from dgm_pyro.uses.representations import decode, encode, latents, probe

# Number of images in a row.
NUM_SHOWN = 10


@dataclass
class StopResult:
    """The result of a stop: the trained program and its measurements."""

    stop: Stop
    program: Program
    history: History
    kept: bool = False  # from the tour that this one resumes
    evidence: Evidence | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None
    reconstructions: Tensor | None = None
    latents: Tensor | None = None
    probe: float | None = None
    accuracy: float | None = None

    @property
    def bits_per_dim(self) -> float:
        return math.inf if self.evidence is None else self.evidence.bits_per_dim

    @functools.cached_property
    def separations(self) -> dict[str, Separation]:
        """How well a low log p(x) separates each kind of anomaly from test digits."""
        if self.evidence is None:
            return {}
        return {kind: separation(-self.evidence.values, -scores) for kind, scores in self.scores.items()}

    @property
    def aurocs(self) -> dict[str, float]:
        return {kind: each.auroc for kind, each in self.separations.items()}

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
            "auroc_stderr": {kind: each.stderr for kind, each in self.separations.items()},
            "probe": self.probe,
            "accuracy": self.accuracy,
            "checkpoint": f"checkpoints/{self.stop.name}",
        }


@dataclass
class Tour:
    """The state of a tour: its options, and the results so far. `run` makes one."""

    out: Path
    quick: bool
    seed: int
    device: torch.device
    plan: Plan = DIGITS
    longer: int = 1
    results: list[StopResult] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    comparison: ClassifierComparison | None = None
    complete: bool = False
    pixel_probe: float | None = None
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.train, self.test = (
            datasets.load(self.plan.data, split, num_data=size)[: quick_size if self.quick else None]
            for split, size, quick_size in zip(("train", "test"), self.plan.sizes, self.plan.quick_sizes, strict=True)
        )
        self.anomalies = {
            SHUFFLED: shuffle_pixels(self.test.x, self.seed),
            NOISY: add_noise(self.test.x, ANOMALY_NOISE, self.levels, self.seed),
        }

    def visit(self, stop: Stop) -> StopResult:
        """Train a program, and measure all that it supports."""
        kept = self._load_stop(stop)
        program, history = kept or self._train_stop(stop)
        result = StopResult(stop, program, history, kept is not None)

        if program.variable == "x":

            def ask(data: Data) -> Evidence:
                return evaluate(program, data, seed=self.seed, **stop.ask)

            with at_all_times(program):
                result.evidence = ask(self.test)
                result.scores = {name: ask(self._like_test(x)).values for name, x in self.anomalies.items()}
            result.samples = self._sample_classes(program)
        if isinstance(program, VAE):
            shown = self.test.x[:NUM_SHOWN]
            result.reconstructions = decode(program, encode(program, shown)).round().to(shown)
        features, test_features = latents(program, self.train.x), latents(program, self.test.x)
        if features is not None and test_features is not None:
            result.latents, result.probe = test_features, self._probe(features, test_features)
        if isinstance(program, (Labeled, Discriminative)):
            guess = beliefs(program, self.test.x)[0].argmax(-1)
            result.accuracy = share(guess == self.test.y)
        return result

    def _load_stop(self, stop: Stop) -> tuple[Program, History] | None:
        """The program that an interrupted tour has trained; None if there is none, or if it is damaged."""
        try:
            program, record = runs.read(self._stop_folder(stop), self.device)
            return program, History.from_dict(record.history)
        except (FileNotFoundError, ValueError):
            return None

    def _train_stop(self, stop: Stop) -> tuple[Program, History]:
        with seeded(self.seed, torch.device("cpu")):
            program = stop.make(self.train)
        options, place, history = stop.options(self.quick, self.longer), self._stop_folder(stop), History()
        place.mkdir(exist_ok=True)
        states = States(place, advice=f"resume with {command(self)} --resume")
        if options is None:
            program.to(self.device).eval()
        else:
            train = functools.partial(fit, program, self.train, seed=self.seed, device=self.device, **options)
            try:
                history = train(resume=states)
            except checkpoint.CheckpointError:
                states.remove()
                history = train(resume=states)
        record = runs.record_of(stop.name, self.plan.data, history, seed=self.seed, **(options or {}))
        runs.write(place, program, record)
        states.remove()
        return program, history

    def _stop_folder(self, stop: Stop) -> Path:
        return self.out / "checkpoints" / stop.name

    def _like_test(self, x: Tensor) -> Data:
        return Data(x, levels=self.test.levels, name=self.test.name)

    def _sample_classes(self, program: Program) -> Tensor:
        """Four rows of samples, of all classes in order if the program is conditional on classes."""
        classes = torch.arange(self.num_classes, device=self.device).repeat(4)
        with seeded(self.seed, self.device), evaluating(program):
            return program.sample(len(classes), classes if isinstance(program, Labeled) else None).cpu()

    def _probe(self, train: Tensor, test: Tensor) -> float:
        assert self.train.y is not None
        assert self.test.y is not None
        return probe(train, self.train.y, test, self.test.y)

    def result(self, name: str) -> StopResult | None:
        return next((result for result in self.results if result.stop.name == name), None)

    @property
    def models(self) -> list[StopResult]:
        """Results of programs with a p(x), without the references, in the order of the tour."""
        return [result for result in self.results if result.evidence is not None and not result.stop.reference]

    @property
    def counting(self) -> StopResult | None:
        """The better of the references, which count instead of training."""
        references = [result for result in self.results if result.stop.reference and result.evidence is not None]
        return min(references, key=lambda result: result.bits_per_dim, default=None)

    @property
    def size(self) -> str:
        """Height and width of the images, as text."""
        return " x ".join(str(side) for side in self.test.event_shape[1:])

    @property
    def num_dims(self) -> int:
        return self.test.event_shape.numel()

    @property
    def latent_size(self) -> int:
        """The number of features of a VAE's z."""
        codes = (result.latents for result in self.results if isinstance(result.program, VAE))
        return next(z[0].numel() for z in codes if z is not None)

    @property
    def num_classes(self) -> int:
        assert self.test.num_classes is not None
        return self.test.num_classes

    @property
    def levels(self) -> int:
        return levels_of(self.test)

    def metrics(self) -> dict[str, Any]:
        return {
            "complete": self.complete,
            "quick": self.quick,
            "longer": self.longer,
            "seed": self.seed,
            "device": str(self.device),
            "data": self.plan.data,
            "num_test": len(self.test),
            "anomaly_noise": ANOMALY_NOISE,
            "probe_of_pixels": self.pixel_probe,
            "seconds": round(time.perf_counter() - self.started, 1),
            "versions": versions(),
            "programs": [result.metrics() for result in self.results],
            "classifiers": None if self.comparison is None else self.comparison.metrics(),
            "failures": self.failures,
        }


def command(tour: Tour) -> str:
    """The command of the tour."""
    parts = [tour.plan.command] + ["--quick"] * tour.quick + [f"--longer {tour.longer}"] * (tour.longer > 1)
    parts += [f"--seed {tour.seed}"] * (tour.seed > 0)
    return " ".join(parts + [f"--out {tour.out}"] * (str(tour.out) != "tour"))


@contextlib.contextmanager
def at_all_times(program: Program) -> Iterator[None]:
    """Sum a diffusion's bound over all times: the few times of a training step would add noise to each score."""
    if not isinstance(program, Diffusion):
        yield
        return
    subsample, program.subsample = program.subsample, program.num_steps
    try:
        yield
    finally:
        program.subsample = subsample


def versions() -> dict[str, str]:
    """Versions of the software that the numbers depend on."""
    packages = {name: version(name) for name in ("dgm_pyro", "pyro-ppl", "numpy", "scikit-learn", "matplotlib")}
    return {"python": platform.python_version(), "torch": torch.__version__} | packages
