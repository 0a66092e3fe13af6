"""The work of the ``dgm`` commands on runs: each function returns a result, and writes pictures and files of it.

A function that writes is called ``..._into``. It takes the path of its picture, and writes the numbers next to it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

import dgm_pyro.infer as infer
from dgm_pyro.catalog import ENCODERS, LIKELIHOODS, MODELS, PRIORS, TooLargeError, build
from dgm_pyro.checkpoint import load
from dgm_pyro.checks import check_count, find_device
from dgm_pyro.data import NAMES, Data, subset
from dgm_pyro.diagnosis import Diagnosis, doctor
from dgm_pyro.evaluation import Evidence, check_whole, evaluate, evaluating
from dgm_pyro.experiments import plots, runs
from dgm_pyro.experiments.inference import calibrate_into, infer_into, posterior_from
from dgm_pyro.experiments.runs import CURVES, Record
from dgm_pyro.experiments.sweep import Options, Sweep, sweep
from dgm_pyro.experiments.targets import pair_from
from dgm_pyro.experiments.trackers import RunFiles
from dgm_pyro.families.guides import FAMILIES
from dgm_pyro.families.labeled import Discriminative, Labeled
from dgm_pyro.files import write_text
from dgm_pyro.infer.compare import default_guides
from dgm_pyro.infer.gaps import Gaps
from dgm_pyro.objectives import OBJECTIVES
from dgm_pyro.program import Program, seeded
from dgm_pyro.results import Result, Table, as_csv
from dgm_pyro.sources import image_files
from dgm_pyro.training import distributed
from dgm_pyro.training.adversarial import COMPARISONS
from dgm_pyro.training.fit import History
from dgm_pyro.training.options import TrainingOptions
from dgm_pyro.uses import anomaly, classification, quality, representations

__all__ = [
    "Drawn",
    "GapsOfRuns",
    "OpenRun",
    "Shown",
    "TrainedRun",
    "check_into",
    "classify_into",
    "detect_into",
    "doctor_of",
    "evaluate_run",
    "gaps_into",
    "impute_into",
    "infer_of",
    "list_of_models",
    "list_of_names",
    "open_run",
    "represent_into",
    "resume_run",
    "sample_into",
    "sweep_into",
    "train_run",
]


@dataclass(frozen=True)
class OpenRun:
    """A run that a command has opened.

    Attributes:
        folder: folder of the run.
        program, record: its program, on ``device``, and its record.
        data_dir: folder of the files of its data set.
    """

    folder: Path
    program: Program
    record: Record
    device: torch.device
    data_dir: str | None

    def __str__(self) -> str:
        return str(self.record)

    def points(self, split: str, other: str | None = None) -> Data:
        """A split of the run's own data, or ``other`` data."""
        if other is None:
            return self.record.points(split, self.data_dir)
        return runs.inputs(other, self.program, self.data_dir, self.record.reading)

    @property
    def columns(self) -> list[str] | None:
        """Names of the columns of x, if it is a table of reals."""
        return self.record.reading.get("columns") if self.program.levels is None else None

    def shades(self) -> contextlib.AbstractContextManager[None]:
        """Draw gray images of a user's files as photographs, and those of named data sets as ink on paper."""
        return plots.photographs() if self.record.reading else contextlib.nullcontext()

    def output(self, out: Path | None, name: str) -> Path:
        """``out``, or by default the file ``name`` in the run."""
        return out or self.folder / name

    def require_x(self, action: str) -> None:
        """Raise if the run holds a discriminative classifier, which has no x."""
        if self.program.variable != "x":
            raise ValueError(
                f"this run holds a discriminative classifier, which has no p(x) to {action}: choose another run"
            )


def open_run(folder: Path, device: str = "auto", data_dir: str | None = None) -> OpenRun:
    """The run in a folder."""
    where = find_device(device)
    program, record = runs.read(folder, where)
    return OpenRun(folder, program, record, where, data_dir or record.data_dir)


Found = TypeVar("Found", bound=Result)


@dataclass(frozen=True)
class Shown(Result, Generic[Found]):
    """A result, with text about its source and the files written.

    Attributes:
        found: the result.
        before, after: text around it.
        facts: further entries of its JSON.
    """

    found: Found
    before: str = ""
    after: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def parts(self) -> list[str | Table]:
        first, *others = self.found.parts()
        start = [f"{self.before}{first}"] if isinstance(first, str) else [self.before, first]
        return [part for part in (*start, *others, self.after) if part]

    def as_dict(self) -> dict[str, Any]:
        return {**self.facts, **self.found.as_dict()}


@dataclass(frozen=True)
class Drawn(Result):
    """Samples, and the files written.

    Attributes:
        samples: the samples.
        what: a description of them.
        files: the picture, and the file of the values.
    """

    samples: Tensor
    what: str
    files: tuple[Path, Path]

    def parts(self) -> list[str | Table]:
        return [f"{' and '.join(map(str, self.files))}: {self.what}"]

    def as_dict(self) -> dict[str, Any]:
        return {"what": self.what, "files": [str(path) for path in self.files]}


@dataclass(frozen=True)
class TrainedRun(Result):
    """The history of a run, and suggestions for the next command.

    Attributes:
        folder: folder of the run.
        model: its name in the catalog.
        history: history of the training.
        given: names of the columns that x is conditioned on.
        was_complete: whether there was nothing to train.
    """

    folder: Path
    model: str
    history: History
    given: Sequence[str] = ()
    was_complete: bool = False

    def parts(self) -> list[str | Table]:
        history = self.history
        best = history.epochs[history.best_epoch - 1]
        loss = f"loss {best.loss:.3f} {history.unit}"
        if best.validation is not None:
            same = history.validation_unit == history.unit
            loss = f"loss {best.loss:.3f}, " if same else f"{loss}, "
            loss += f"validation {best.validation:.3f} {history.validation_unit}"
        doing = {"implicit": ("sample",), "classifier": ("evaluate",)}.get(self.model, ("evaluate", "sample"))
        number = " --given " + ",".join("NUMBER" for _ in self.given) if self.given else ""
        return [
            f"{self.folder}: {'was complete, so nothing was done; earlier, ' if self.was_complete else ''}"
            f"trained {len(history.epochs)} epoch{'s' * (len(history.epochs) != 1)} in "
            f"{history.seconds:.1f} s, "
            f"kept the weights of epoch {history.best_epoch}: {loss}",
            f"{self.folder / CURVES}: loss and terms by epoch",
            "next: " + "; ".join(f"dgm {each} {self.folder}{number if each == 'sample' else ''}" for each in doing),
        ]

    def as_dict(self) -> dict[str, Any]:
        return {"run": str(self.folder), "model": self.model, "history": self.history.as_dict()}


def train_run(
    folder: Path, model: str, data: str, swaps: Mapping[str, Any], options: TrainingOptions, **others: Any
) -> TrainedRun | None:
    """`runs.train`, also in several processes under torchrun, of which only the first returns the result.

    Args:
        swaps: parts for `dgm.build`; others: options of `runs.train`.
    """
    processes = distributed.join(options.device)
    tracker = RunFiles(folder, f"{model}-{Path(data).stem}")
    _, record, history = runs.train(folder, model, data, swaps, options, trackers=[tracker], **others)
    distributed.leave()
    return _trained_run(tracker, record, history) if processes.writes else None


def resume_run(folder: Path, device: str | None = None, *, progress: bool = True) -> TrainedRun | None:
    """`runs.resume`, also in several processes under torchrun, of which only the first returns the result."""
    processes = distributed.join(device or "auto")
    tracker = RunFiles(folder, str(folder))
    _, record, history = runs.resume(folder, device, trackers=[tracker], progress=progress)
    distributed.leave()
    return _trained_run(tracker, record, history) if processes.writes else None


def _trained_run(tracker: RunFiles, record: runs.Record, history: History) -> TrainedRun:
    return TrainedRun(
        tracker.folder, record.model, history, record.reading.get("given", ()), was_complete=not tracker.started
    )


def sweep_into(
    folder: Path,
    model: str,
    data: str,
    reading: Mapping[str, Any],
    options: TrainingOptions,
    *,
    data_dir: str | None = None,
    num_data: int | None = None,
    latent_size: int | None = None,
    num_particles: int = 1000,
    standardize: bool = True,
    **tried: Any,
) -> Shown[Sweep]:
    """`sweep.sweep` on a named data set or on a file.

    Args:
        tried: options of `sweep.sweep`: the values to try, the number of seeds and of processes.
    """
    every = Options(model, data, data_dir, num_data, latent_size, num_particles, options, dict(reading), standardize)
    found = sweep(folder, every, **tried)
    return Shown(
        found, after=f"{folder}: table.md, table.csv, cells.csv, sweep.png; each cell is a run in {folder / 'cells'}"
    )


def sample_into(
    run: OpenRun,
    out: Path | None,
    num_samples: int,
    *,
    class_name: str | None = None,
    given: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> Drawn:
    """Samples of a run's program: a picture, and the values in a file of the same kind as the training data.

    Args:
        class_name: the class to condition on, by name or number; given: the numbers to condition on.
        options: options of the program's `sample`; None for its default.
    """
    picture = run.output(out, "samples.png")
    run.require_x("sample from")
    options = {name: value for name, value in options.items() if value is not None}
    if ("guidance" in options or class_name is not None) and not isinstance(run.program, Labeled):
        raise ValueError("--class and --guidance need a run with labels: train it with dgm train --labeled")
    needed = run.record.reading.get("given", [])
    if needed and given is None:
        raise ValueError(f"this run models x given {', '.join(needed)}: pass --given, a number for each, such as "
                         f"--given {','.join(str(float(i)) for i in range(len(needed)))}")  # fmt: skip
    condition = None if given is None else torch.tensor([_parsed_numbers(given, run.record)], device=run.device)
    if class_name is not None:
        condition = torch.tensor([_class_of(class_name, run.record)], device=run.device)
    with seeded(seed, run.device), evaluating(run.program):
        x = run.program.sample(num_samples, condition, **options).cpu()
    about = f"{run}" + ("" if class_name is None else f", class {class_name}")
    values = [" = ".join(each) for each in zip(needed, given, strict=True)] if needed and given else given
    what = f"{num_samples} samples of {about}" + ("" if values is None else f", given {', '.join(values)}")
    with run.shades():
        shown = plots.samples(x, levels=run.program.levels, title=what, columns=run.columns, words=run.record.words)
    plots.write_picture(picture, shown)
    written = runs.write_alike(picture.with_suffix(""), x, run.record, run.program.levels)
    return Drawn(x, what, (picture, written))


def _class_of(class_name: str, record: Record) -> int:
    classes = record.reading.get("classes", [])
    if class_name in classes:
        return int(classes.index(class_name))
    if class_name.isdecimal():
        return int(class_name)
    known = ", ".join(classes) or "numbers from 0"
    raise ValueError(f"--class must be one of the run's classes, {known}, got {class_name!r}")


def _parsed_numbers(texts: Sequence[str], record: Record) -> list[float]:
    try:
        return [float(text) for text in texts]
    except ValueError as error:
        names = ", ".join(record.reading.get("given", []))
        raise ValueError(f"--given must be numbers, one for each of {names}, got {','.join(texts)!r}") from error


def impute_into(
    run: OpenRun,
    out: Path | None,
    num_samples: int,
    *,
    region: str | None = None,
    num_data: int | None = None,
    data: str | None = None,
    split: str = "test",
    seed: int = 0,
    **options: Any,
) -> Drawn:
    """`dgm.infer.impute` on data of a run: a picture, and the values in a file of the same kind as the training data.

    Args:
        region: the region to hide; default the missing features, or the left half if none are missing.
        num_data: number of data, from the start; default 8 of the run's own data, or all of ``data``.
        data: other data.
        options: options of `dgm.infer.impute`.
    """
    picture = run.output(out, "imputed.png")
    if num_data is not None:
        check_count(num_data, "num_data")
    points = run.points(split, data)[: num_data or (8 if data is None else None)]
    run.require_x("impute by")
    x, given, _ = run.program.arguments(points)
    if region is None and points.mask is None:
        region = "left"
    seen = torch.ones_like(x, dtype=torch.bool) if points.mask is None else points.mask
    if region is not None:
        seen = seen & infer.hide(region, run.program.event_shape, seed)
    drawn = infer.impute(
        run.program,
        x.to(run.device),
        seen.to(run.device),
        num_samples,
        None if given is None else given.to(run.device),
        seed=seed,
        **options,
    ).cpu()
    about = f"{run}, {f'{region} hidden' if region else 'missing values drawn'}"
    with run.shades():
        shown = plots.imputations(
            x[:8],
            seen[:8],
            drawn[:, :8],
            levels=run.program.levels,
            title=about,
            columns=run.columns,
            words=run.record.words,
        )
    plots.write_picture(picture, shown)
    places = {
        "row": [i for _ in range(num_samples) for i in range(len(x))],
        "draw": [draw for draw in range(num_samples) for _ in range(len(x))],
    }
    written = runs.write_alike(picture.with_suffix(""), drawn, run.record, run.program.levels, **places)
    return Drawn(drawn, f"{num_samples} draws for each of {len(x)} data of {about}", (picture, written))


def evaluate_run(
    run: OpenRun,
    data: str | None = None,
    split: str = "test",
    *,
    num_particles: int = 1,
    num_samples: int | None = None,
    ode: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Shown[Evidence]:
    """`dgm.evaluate` on data of a run, with the accuracy of a classifier and the program's formula.

    Args:
        num_samples: number of ELBO samples, if the evidence is an ELBO; None for the default of `dgm.evaluate`.
    """
    program, points = run.program, run.points(split, data)
    if num_samples is not None and (program.tractable or num_particles > 1 or ode):
        raise ValueError("--num-samples is the number of ELBO samples, but this evidence is no ELBO: leave it out")
    averaged: dict[str, Any] = {} if num_samples is None else {"num_samples": num_samples}
    evidence = evaluate(program, points, num_particles=num_particles, ode=ode, seed=seed, progress=progress, **averaged)
    of, why = ("log p(x)", "") if program.variable == "x" else ("log p(y | x)", ", because it has no p(x)")
    facts: dict[str, Any] = {"run": str(run.folder), "model": run.record.model, "split": split, "of": of}
    lines = [f"the evidence is that of {of}{why}"] if why else []
    if isinstance(program, Labeled | Discriminative) and points.num_classes is not None:
        facts["accuracy"] = _accuracy(program, points, progress)
        lines.append(f"accuracy {facts['accuracy']:.4f}")
    kinds = run.record.reading.get("kinds", {})
    masses = [name for name, (kind, *_) in kinds.items() if kind not in ("real", "positive", "bounded")]
    if masses:
        others = [name for name in kinds if name not in masses]
        lines.append(f"a mass of {', '.join(masses)}" + (f", a density of {', '.join(others)}" if others else ""))
    formula = program.formula()
    lines.append(f"the program: {formula.p}" + (f"; its guide: {formula.q}" if formula.q else ""))
    before = f"{run} ({split if data is None else data}, {len(points)} data): "
    return Shown(evidence, before, "\n".join(lines), facts)


def quality_of_run(
    run: OpenRun, data: str | None = None, split: str = "test", *, classifier: Path | None = None, seed: int = 0
) -> Shown[quality.SampleQuality]:
    """`quality.program_quality` on data of a run, with the same number of samples as data.

    Args:
        classifier: folder of a run of a discriminative classifier, whose last hidden layer gives the features; None for
            x itself.
    """
    run.require_x("sample for --quality")
    points, network = run.points(split, data), None
    if classifier is not None:
        loaded = load(classifier, device=run.device)
        if not isinstance(loaded, Discriminative) or loaded.given_shape != run.program.event_shape:
            raise ValueError(f"--classifier must be the run of a classifier of these data, but {classifier} is not")
        network = quality.hidden_features(loaded)
    given = run.program.arguments(points)[1] if run.program.conditional else None
    found = quality.program_quality(run.program, points.x, network, given=given, seed=seed)
    by = "x itself" if classifier is None else f"features of {classifier}"
    facts = {"run": str(run.folder), "model": run.record.model, "split": split, "features": by}
    return Shown(found, f"{run} ({split if data is None else data}), {by}, ", facts=facts)


@dataclass(frozen=True)
class GapsOfRuns(Result):
    """The gaps of several runs.

    Attributes:
        found: the gaps, by the folder of the run.
        about: model and data of each run, in words.
        picture: path of the picture, with a bar per run.
        worst: paths of the pictures of the worst explained images, one per run.
    """

    found: Mapping[Path, Gaps]
    about: Mapping[Path, str]
    picture: Path
    worst: Sequence[Path] = ()

    def parts(self) -> list[str | Table]:
        each = [[f"{folder} ({self.about[folder]})", *gaps.parts()] for folder, gaps in self.found.items()]
        worst = [f"{path}: the images with the lowest log p(x), and with the largest gap" for path in self.worst]
        return [*itertools.chain(*each), f"{self.picture}: a bar per run", *worst]

    def as_dict(self) -> dict[str, Any]:
        return {str(folder): gaps.as_dict() for folder, gaps in self.found.items()}


def gaps_into(
    opened: Sequence[OpenRun],
    out: Path | None,
    num_data: int,
    *,
    data: str | None = None,
    split: str = "test",
    **options: Any,
) -> GapsOfRuns:
    """`dgm.infer.gaps` of runs: a bar for each, and the worst explained images.

    Args:
        out: path of the picture; default a file in the first run.
        num_data: number of data, from the start.
        data: other data.
        options: options of `dgm.infer.gaps`.
    """
    check_count(num_data, "num_data")
    picture, found, about, pictures = opened[0].output(out, "gaps.png"), {}, {}, []
    for run in opened:
        points = run.points(split, data)[:num_data].to(run.device)
        x, given, _ = run.program.arguments(points)
        found[run.folder] = gaps = infer.gaps(run.program, x, given, **options)
        about[run.folder] = f"{run}, {split if data is None else data}"
        if plots.is_picture(points.x):
            name = f"{picture.stem}-{run.folder.name}-worst" if len(opened) > 1 else f"{picture.stem}-worst"
            title = f"Worst explained by {run.folder.name}"
            with run.shades():
                worst = plots.worst_explained(gaps, levels=run.program.levels, title=title)
            pictures.append(picture.with_name(f"{name}.png"))
            plots.write_picture(pictures[-1], worst)
    short = {folder.name for folder in found}
    names = {folder.name if len(short) == len(found) else str(folder): each for folder, each in found.items()}
    plots.write_picture(picture, plots.gaps(names, title=f"Gaps on {points.name}, {len(points)} data"))
    return GapsOfRuns(found, about, picture, pictures)


def check_into(
    run: OpenRun, out: Path | None, num_data: int, *, data: str | None = None, split: str = "test", **options: Any
) -> Shown[infer.Checks]:
    """`dgm.infer.check` of a run: rank histograms, and the KL of each dimension.

    Args:
        num_data: number of data on which the activity of units is measured.
        options: options of `dgm.infer.check`.
    """
    check_count(num_data, "num_data")
    picture = run.output(out, "checks.png")
    found = infer.check(run.program, run.points(split, data)[:num_data], **options)
    plots.write_picture(picture, plots.calibration(found, title=f"The guide of {run}"))
    return Shown(found, after=f"{picture}: rank histograms and the KL of each dimension")


def detect_into(
    run: OpenRun,
    out: Path | None,
    data: str,
    scores: Sequence[str],
    *,
    background: Path | None = None,
    ensemble: Sequence[str] = (),
    normal: str | None = None,
    **options: Any,
) -> Shown[anomaly.Anomalies]:
    """`dgm.anomaly.detect` with a run: a picture of the most anomalous data, and a CSV next to it.

    Args:
        background: folder of a run; ensemble: folders of several runs.
        normal: normal data, instead of the run's test split.
        options: options of `dgm.anomaly.detect`.
    """
    picture = run.output(out, "anomalies.png")
    points = run.points("test", data)
    found = anomaly.detect(
        run.program,
        points,
        run.points("test", normal),
        scores,
        background=None if background is None else runs.read(background, run.device)[0],
        ensemble=[runs.read(folder, run.device)[0] for folder in ensemble],
        **options,
    )
    flagged, score = found.flags, found.alarms[0].score
    share = f"{int(flagged.sum())} of {len(flagged)}"
    if run.columns is None:
        title = f"Most anomalous for {run} first, by {score}: {share} are flagged"
        with run.shades():
            shown = plots.samples(points.x[found.ranked[:36]], levels=run.program.levels, title=title)
    else:
        title = f"{data}, and what {run} flags by {score}: {share} rows"
        shown = plots.by_column(points.x, run.columns, words=run.record.words, marked=flagged, title=title)
    plots.write_picture(picture, shown)
    table = picture.with_suffix(".csv")
    write_text(table, as_csv(_with_files(found.records(), data)))
    facts = {"run": str(run.folder), "data": data}
    return Shown(found, f"{run}: ", f"{picture} and {table}: the most anomalous first", facts)


def classify_into(run: OpenRun, out: Path | None, data: str, **options: Any) -> Shown[classification.Answers]:
    """`dgm.classification.answer` with a run: a CSV, and a picture next to it.

    Args:
        options: options of `dgm.classification.answer`.
    """
    table = run.output(out, "classified.csv")
    points, reference = run.points("test", data), run.points("test")
    check_whole(points, f"a run of {run.record.model}")
    found = classification.answer(run.program, points.x, reference.x, **options)
    table.parent.mkdir(parents=True, exist_ok=True)
    write_text(table, as_csv(_with_files(_by_name(found.records(), run.record.reading.get("classes")), data)))
    written = str(table)
    if plots.is_picture(points.x):
        picture, title = table.with_suffix(".png"), f"{run}: answers, struck if rejected"
        shown = points.x[:36], found.probabilities[:36], found.rejected[:36]
        with run.shades():
            plots.write_picture(picture, plots.answers(*shown, levels=reference.levels, title=title))
        written += f" and {picture}"
    return Shown(found, f"{run}: ", written, {"run": str(run.folder), "data": data})


def _with_files(records: list[dict[str, Any]], data: str) -> list[dict[str, Any]]:
    """The records of data, with the file of each if the data are a folder of images."""
    folder = Path(data).expanduser()
    if data in NAMES or not folder.is_dir():
        return records
    files = image_files(folder)
    return [{"index": each["index"], "file": files[each["index"]], **each} for each in records]


def _by_name(records: list[dict[str, Any]], classes: list[str] | None) -> list[dict[str, Any]]:
    """Answers with the names of the classes instead of their numbers, if they have names."""
    if classes is None:
        return records
    names = {f"p_{i}": f"p_{name}" for i, name in enumerate(classes)}
    return [
        {names.get(key, key): classes[value] if key == "class" else value for key, value in record.items()}
        for record in records
    ]


def _accuracy(program: Program, points: Data, progress: bool, size: int = 8192) -> float:
    """The accuracy of p(y | x) on labeled data, of which ``size`` are in memory at once."""
    probabilities, labels = [], []
    for part in points.taken(slice(start, start + size) for start in range(0, len(points), size)):
        assert part.y is not None
        probabilities.append(classification.beliefs(program, part.x, progress=progress)[0])
        labels.append(part.y)
    return classification.accuracy(torch.cat(probabilities), torch.cat(labels))


def represent_into(
    run: OpenRun,
    out: Path | None,
    data: str | None,
    num_data: int,
    *,
    curve: str = "spherical",
    seed: int = 0,
    **options: Any,
) -> Shown[representations.Representation]:
    """`dgm.representations.represent` with a run: a map of the codes, pictures along them, and a .npy file.

    Args:
        num_data: the largest number of data, and of training data for the probe.
        curve: curve of the interpolation.
        options: options of `dgm.representations.represent`.
    """
    check_count(num_data, "num_data")
    picture = run.output(out, "representation.png")
    if isinstance(run.program, Labeled):
        run.program.program.code_named()  # raises if there is no code
        raise ValueError(
            f"{run.folder} has a code for each class, but no common map of them; in Python: labeled = "
            f"dgm.load({str(run.folder)!r}); dgm.representations.encode(labeled.program, x, labeled.classify(x))"
        )
    points, train = run.points("test", data)[:num_data], None
    if points.y is not None:
        train = run.points("train")
        train = subset(train, min(num_data, len(train)), np.random.default_rng((seed, 0)), "train")
    found = representations.represent(run.program, points, train, seed=seed, **options)
    title = f"{found.site} of {len(points)} data, {run}"
    written = [picture.with_suffix(".npy")]
    with run.shades():
        figures = plots.representation(found, run.program, points.x, curve=curve, title=title)
    for name, figure in figures.items():
        written.append(picture if name == "map" else picture.with_name(f"{picture.stem}-{name}.png"))
        plots.write_picture(written[-1], figure)
    written[0].parent.mkdir(parents=True, exist_ok=True)
    runs.write_array(written[0], found.z)
    return Shown(found, f"{run}: ", ", ".join(map(str, written)), {"run": str(run.folder)})


def doctor_of(
    target: str, data: str | None = None, arguments: str = "data", data_dir: str | None = None, **parts: str | None
) -> Diagnosis:
    """`dgm.doctor` on the folder of a run, a model by name, or the pair that FILE.py:MODEL,GUIDE names.

    Args:
        data: data for the check; default those of the run, or digits for a model name.
        arguments: name in the file of the arguments of the pair.
        parts: prior, encoder and likelihood of a model by name.
    """
    if ":" in target and not Path(target).is_dir():
        model, guide, args, kwargs = pair_from(target, arguments)
        return doctor(model, *args[:1]) if isinstance(model, Program) else doctor(model, guide, *args, **kwargs)
    if target in MODELS:
        points = runs.points(data or "digits", data_dir=data_dir)[:64]
        swaps: dict[str, Any] = {name: choice for name, choice in parts.items() if choice is not None}
        return doctor(build(target, points, **swaps), points)
    if target.endswith(".py"):
        raise ValueError(f"{target} is a file: name the model in it, and its guide: {target}:MODEL,GUIDE")
    run = open_run(Path(target), "cpu", data_dir)
    return doctor(run.program, run.points("train", data)[:64])


def infer_of(
    target: str,
    data: Path | None,
    out: Path,
    *,
    guides: Sequence[str] | None = None,
    calibrate: int = 0,
    gradient_steps: int = 1000,
    jobs: int | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Shown[infer.GuideComparison]:
    """`dgm.infer.compare` on the posterior of the model that FILE.py:MODEL names, and a folder of the results.

    Args:
        data: the .json file of the model's arguments.
        calibrate: number of simulations of `dgm.infer.sbc` for each guide; 0 leaves it out.
        guides, gradient_steps, jobs, seed, progress: options of both functions.
        options: options of `dgm.infer.compare`.
    """
    check_count(calibrate, "calibrate", at_least=0)
    posterior = posterior_from(target, data)
    guides = default_guides(posterior) if guides is None else guides
    if calibrate:
        posterior.simulated(seed)  # raises before the fits if the model cannot simulate data
    shared: dict[str, Any] = {"gradient_steps": gradient_steps, "jobs": jobs, "seed": seed, "progress": progress}
    found = infer_into(posterior, out, guides=guides, **shared, **options)
    calibrated = calibrate_into(posterior, out, guides, calibrate, **shared) if calibrate else {}
    told = [f"calibration of {name}\n{each}" for name, each in calibrated.items()]
    after = "\n".join([*told, f"{out}: the table, pictures, and the draws of each"])
    facts = {"target": target, "calibration": {name: each.as_dict() for name, each in calibrated.items()}}
    return Shown(found, f"{posterior!r}", after, facts)


def list_of_names() -> str:
    """All names that the commands take, with a line about each."""

    def lines(table: Mapping[str, tuple[Any, str]]) -> dict[str, str]:
        return {name: line for name, (_, line) in table.items()}

    sections = {
        "models: dgm train MODEL": lines(MODELS),
        "data sets: --data": NAMES,
        "priors of a vae: --prior": lines(PRIORS),
        "encoders of a vae: --encoder": lines(ENCODERS),
        "likelihoods of a vae: --likelihood": lines(LIKELIHOODS),
        "guides of any Pyro model: dgm infer --guides": lines(FAMILIES),
        "objectives: --objective NAME or NAME:NUMBER": {
            name: (each.__doc__ or "").strip().splitlines()[0].rstrip(".")
            for name, each in (OBJECTIVES | COMPARISONS).items()
        },
    }
    width = max(len(name) for section in sections.values() for name in section) + 2
    return "\n".join(
        "\n".join([title, *(f"  {name:<{width}}{line}" for name, line in section.items())])
        for title, section in sections.items()
    )


def list_of_models(data: str, data_dir: str | None = None) -> str:
    """Each model as built for data, with its size."""
    points, rows = runs.points(data, data_dir=data_dir), []
    for model in MODELS:
        try:
            formula = build(model, points).formula()
            rows.append([model, f"{formula.num_parameters:,}", formula.p])
        except TooLargeError as error:
            rows.append([model, f"{error.num_parameters:,}", "refused: too large, unless --set max_parameters=NUMBER"])
        except ValueError as error:
            rows.append([model, "", str(error)])
    return f"{points}\n{Table(['model', 'parameters', 'p'], rows)}"
