"""Sweeps, which train every combination of names with several seeds, one run per cell; and comparisons of runs.

A sweep's folder holds ``sweep.json`` (its options), ``cells/NAME`` (runs that ``dgm sample``, ``evaluate`` and ``gaps``
open, each with an ``evaluation.json``), and the results: ``table.md``, ``table.csv``, ``cells.csv``, ``sweep.png``.

A cell is finished when it has an ``evaluation.json``, which is written last and in one step. So a sweep that was killed
can be resumed. A failed cell has a ``failed.json`` with the error, and the next sweep tries it again.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import joblib
import torch
from tqdm import tqdm

import dgm_pyro.checkpoint as checkpoint
import dgm_pyro.files as files
import dgm_pyro.old_names as old_names
from dgm_pyro.catalog import build, option_names
from dgm_pyro.checks import check_choice, check_count, check_path, check_type, find_device
from dgm_pyro.data import Data
from dgm_pyro.evaluation import Evidence, evaluate
from dgm_pyro.experiments import runs
from dgm_pyro.families.implicit import Implicit
from dgm_pyro.families.standardized import core_of
from dgm_pyro.infer.checks import units
from dgm_pyro.jobs import Interrupted, in_parallel, processes
from dgm_pyro.objectives import objective_named
from dgm_pyro.program import Program
from dgm_pyro.results import Result, Table, as_csv, with_error
from dgm_pyro.training.optimizers import optimizer_of
from dgm_pyro.training.options import TrainingOptions, changes, option_types, value_of

__all__ = ["Cell", "Comparison", "Options", "Row", "Sweep", "compare", "sweep"]

AXES = ("prior", "encoder", "likelihood", "objective")
VARIED = sorted(
    {*option_types(), *option_names()}
    - {"seed", "device", "checkpoint_minutes", "labeled", "standardize", "columns", *AXES}
)
"""Options, other than the axes, whose values a sweep can vary."""

UNIT_DATA = 512


@dataclass(frozen=True)
class Options:
    """The options that all cells of a sweep share; a sweep can be resumed only with the same ones."""

    model: str = "vae"
    data: str = "digits-binary"
    data_dir: str | None = None
    num_data: int | None = None
    latent_size: int | None = None
    num_particles: int = 1000
    training: TrainingOptions = field(default_factory=TrainingOptions)
    reading: dict[str, Any] = field(default_factory=dict)
    standardize: bool = True

    def recipe(self) -> dict[str, Any]:
        """The options in ``sweep.json``: all but the device, and the seeds, which belong to the cells."""
        recipe = {**vars(self), **self.training.recipe()}
        return {name: value for name, value in recipe.items() if name not in ("training", "seed")}


@dataclass(frozen=True)
class Cell:
    """One combination and one seed. Axes that were not swept are missing from ``choices``."""

    choices: tuple[tuple[str, str], ...]
    seed: int

    @property
    def name(self) -> str:
        # A number alone could be of any option: 0.001 may be a learning rate or a weight decay.
        parts = [choice if axis in AXES else f"{axis}={choice}" for axis, choice in self.choices]
        return "-".join([*(re.sub(r"[^\w.+=-]", "_", part) for part in parts), f"seed{self.seed}"])


@dataclass(frozen=True)
class Row:
    """One combination over its seeds; lists have one number for each finished seed."""

    choices: dict[str, str]
    cells: list[dict[str, Any]]
    errors: list[str]

    def over_seeds(self, name: str) -> tuple[float, float]:
        """Mean over the seeds and its standard error; NaN where there is none."""
        values = [cell[name] for cell in self.cells if cell[name] is not None]
        mean = statistics.fmean(values) if values else math.nan
        return mean, statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Sweep(Result):
    """The result of `sweep`."""

    folder: Path
    options: Options
    axes: dict[str, tuple[str, ...]]
    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Number of cells that did not finish."""
        return sum(len(row.errors) for row in self.rows)

    def failures(self) -> dict[str, list[str]]:
        """The errors, and the combinations in which they occurred."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            for error in dict.fromkeys(row.errors):
                found.setdefault(error, []).append(" ".join(row.choices.values()))
        return found

    def table(self) -> Table:
        """The rows, the best on top."""
        swept = [axis for axis in self.axes if len(self.axes[axis]) > 1] or list(self.axes)[:1]
        kinds = sorted({cell["kind"] for row in self.rows for cell in row.cells})
        kinds = kinds or [f"iwae-{self.options.num_particles}"]
        kind = ", ".join(kind if kind == "exact" else kind.upper() for kind in kinds)
        evidence = [f"bits/dim ({kind})", f"nats/datum ({kind})"]
        header = [*swept, *evidence, "bits/dim (ELBO)", "nats/datum (KL)", "active units", "seconds", "seeds"]
        rows = []
        for row in sorted(self.rows, key=lambda row: row.over_seeds("bits_per_dim")[0] if row.cells else math.inf):
            choices = [row.choices[axis] for axis in swept]
            if not row.cells:
                rows.append([*choices, f"failed: {row.errors[0]}"[:60], "", "", "", "", "", "0"])
                continue
            seeds = f"{len(row.cells)}" + (f" ({len(row.errors)} failed)" if row.errors else "")
            rows.append(
                [
                    *choices,
                    with_error(*row.over_seeds("bits_per_dim"), 4),
                    with_error(*row.over_seeds("nats"), 2),
                    with_error(*row.over_seeds("elbo_bits_per_dim"), 4),
                    with_error(*row.over_seeds("kl"), 2),
                    with_error(row.over_seeds("active")[0], math.nan, 1),
                    with_error(row.over_seeds("seconds")[0], math.nan, 1),
                    seeds,
                ]
            )
        return Table(header, rows)

    def parts(self) -> list[str | Table]:
        return [self.table()]

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        cells = [cell for row in self.rows for cell in row.cells]
        return {"folder": str(self.folder), "failed": self.failed, "cells": cells}


def sweep(
    out: str | os.PathLike[str],
    options: Options | None = None,
    *,
    prior: Sequence[str] = (),
    encoder: Sequence[str] = (),
    likelihood: Sequence[str] = (),
    objective: Sequence[str] = (),
    vary: Mapping[str, Sequence[Any]] | None = None,
    seeds: int = 1,
    jobs: int | None = None,
    progress: bool = True,
) -> Sweep:
    """Train and evaluate every combination of the names, with ``seeds`` seeds each; finished cells are kept.

    Args:
        out: folder of the sweep.
        options: options that all cells share.
        prior, encoder, likelihood, objective: names in `dgm_pyro.catalog` and `dgm_pyro.objectives`; empty for the
            model's default.
        vary: values of further options, by name: training options, such as ``{"lr": [1e-3, 3e-3]}``, and options of
            `dgm.build`, such as ``{"hidden": [(64,), (256, 256)]}``. An option with one value holds for all cells.
        seeds: number of seeds, 0 .. seeds - 1.
        jobs: number of processes; 1 trains in this process. They take turns on the GPUs, if there are any and the
            options name no device, and share the cores, unless OMP_NUM_THREADS sets the threads of each. Default that
            of `joblib.parallel_config`, or 1. With its backend "dask", the cells run on that cluster, whose workers
            must see the same folder and have one thread each.
        progress: whether to print the number of cells and their times, with a bar on a terminal.

    Returns:
        The `Sweep`; its tables and picture are also written to the folder.

    Raises:
        ValueError: a name is unknown, an option fits no cell, the model has no density, or the folder holds a sweep
            with other options, or other cells of the same names.
        FileExistsError: the folder holds something else.
    """
    check_path(out, "out")
    check_type(options, Options | None, "options", "a sweep.Options or None")
    options = options or Options()
    check_count(seeds, "seeds")
    if jobs is not None:
        check_count(jobs, "jobs")
    check_count(options.num_particles, "num_particles")
    given = dict(zip(AXES, (prior, encoder, likelihood, objective), strict=True))
    for axis, names in given.items():
        check_type(names, Sequence, axis, "a sequence of names")
    check_type(vary, Mapping | None, "vary", "a mapping of options to sequences of values")
    for axis, values in (vary or {}).items():
        check_choice(axis, VARIED, "a name in vary")
        check_type(values, Sequence, f"vary[{axis!r}]", "a sequence of values")
        given[axis] = [str(value) for value in values]
    axes = {axis: tuple(dict.fromkeys(names)) for axis, names in given.items() if names}
    combinations = [tuple(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())]
    find_device(options.training.device)
    source, reading, points = runs.opened(options.data, options.reading, options.data_dir, options.num_data)
    options = replace(options, data=source, reading=reading)
    _check_combinations(options, combinations, points[:16])
    folder = Path(out)
    files.refuse_file(folder, "a sweep is")
    with files.only_writer(folder):
        _open_sweep(folder, options)
        cells = [Cell(choices, seed) for seed in range(seeds) for choices in combinations]
        _run_missing(folder, options, cells, jobs, progress)
        result = collect(folder, options, axes or {"model": (options.model,)}, combinations, seeds)
        _write_tables(result)
    return result


def _run_missing(folder: Path, options: Options, cells: Sequence[Cell], jobs: int | None, progress: bool) -> None:
    """Run the cells that are not finished, and print the progress."""
    missing = _new_choices_first([cell for cell in cells if not _is_finished(folder, cell)])
    if progress:
        kept = len(cells) - len(missing)
        _print_progress(f"{len(missing)} cells to train" + (f", {kept} are finished" if kept else ""))
    shown = progress and sys.stderr.isatty()
    done, taken, told = set[Cell](), dict[Cell, float](), 0.0
    start = time.perf_counter()
    with tqdm(total=len(cells), initial=len(cells) - len(missing), desc="sweep", unit="cell", disable=not shown) as bar:
        for cell, seconds in _run_all(folder, options, missing, jobs):
            done.add(cell)
            if _is_finished(folder, cell):
                taken[cell] = seconds
            bar.set_postfix_str(cell.name, refresh=False)
            bar.update()
            rest = [each for each in missing if each not in done]
            passed = time.perf_counter() - start
            if progress and rest and taken and not shown and passed > 2 * told:  # a bar says it itself
                left, told = predicted(taken, rest) / min(joblib.effective_n_jobs(jobs), len(rest)), passed
                _print_progress(
                    f"{cell.name} took {seconds:.0f} s: about {left:.0f} s for the other {len(rest)}"
                    + _assumption(taken, rest)
                )


def _new_choices_first(cells: Sequence[Cell]) -> list[Cell]:
    """The cells, those with new choices first, because these tell how long each choice takes."""
    seen: set[tuple[str, str]] = set()
    news = []
    for cell in cells:
        news.append(not seen.issuperset(cell.choices))
        seen.update(cell.choices)
    first = [cell for cell, new in zip(cells, news, strict=True) if new]
    return first + [cell for cell, new in zip(cells, news, strict=True) if not new]


def predicted(taken: Mapping[Cell, float], rest: Sequence[Cell]) -> float:
    """Predicted seconds for the ``rest``, if each choice multiplies the time of a cell by its own factor."""
    choices = sorted({choice for cell in (*taken, *rest) for choice in cell.choices})

    def design(cells: Iterable[Cell]) -> torch.Tensor:
        rows = [[1.0, *(float(choice in cell.choices) for choice in choices)] for cell in cells]
        return torch.tensor(rows, dtype=torch.float64)

    times = torch.tensor([*taken.values()], dtype=torch.float64).clamp_min(1e-3)
    factors = torch.linalg.lstsq(design(taken), times.log()[:, None], driver="gelsd").solution
    return float((design(rest) @ factors).exp().sum())


def _assumption(taken: Iterable[Cell], rest: Iterable[Cell]) -> str:
    """The assumption of the prediction, if no finished cell has some of the choices."""
    known = {choice for cell in taken for choice in cell.choices}
    unknown = dict.fromkeys(name for cell in rest for axis, name in cell.choices if (axis, name) not in known)
    return f", if {', '.join(unknown)} {'takes' if len(unknown) == 1 else 'take'} as long" if unknown else ""


def _print_progress(line: str) -> None:
    print(f"sweep: {line}", file=sys.stderr, flush=True)


def _check_combinations(options: Options, combinations: Sequence[tuple[tuple[str, str], ...]], points: Data) -> None:
    """Build every combination once, so that mistakes are reported before any training."""
    seen = set()
    for choices in combinations:
        swaps, objective, training = _cell_arguments(options, Cell(choices, 0))
        if objective is not None:
            objective_named(objective)
        key = str((swaps, training))
        if key not in seen:
            seen.add(key)
            program = build(options.model, points, **swaps)
            optimizer_of(training, program.parameters())
            if isinstance(core_of(program), Implicit):
                raise ValueError(
                    f"{options.model} has no density, by which a sweep compares: use dgm train and dgm sample"
                )


def _cell_arguments(options: Options, cell: Cell) -> tuple[dict[str, Any], str | None, TrainingOptions]:
    """The arguments of `build`, the objective and the training options of a cell."""
    choices = {axis: choice if axis in AXES else value_of(choice) for axis, choice in cell.choices}
    objective = choices.pop("objective", None)
    varied: dict[str, Any] = {axis: choices.pop(axis) for axis in [*choices] if axis in option_types()}
    if options.latent_size is not None:
        choices = {"latent_size": options.latent_size, **choices}
    if not options.standardize:
        choices["standardize"] = False
    return choices, objective, replace(options.training, **{"seed": cell.seed, **varied})


def _open_sweep(folder: Path, options: Options) -> None:
    """Make ``folder`` the folder of a sweep, or check that it holds one with the same options."""
    path = folder / "sweep.json"
    if path.is_file():
        stored = runs.read_json(path, {}, "choose another --out")
        before = Options().recipe() | old_names.renamed(stored, old_names.OPTIONS)
        changed = changes(before, options.recipe())
        if changed:
            raise ValueError(
                f"{folder} holds a sweep with other options ({'; '.join(changed)}): use those, or another --out"
            )
        return
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and holds no sweep: choose another --out")
    runs.write_json(path, options.recipe())


# -- cells -------------------------------------------------------------------------------------------------------------


def _cell_folder(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / cell.name


def _is_finished(folder: Path, cell: Cell) -> bool:
    """Whether the cell has been evaluated.

    Raises:
        ValueError: the folder of that name holds a cell with other choices.
    """
    place = _cell_folder(folder, cell)
    if not ((place / "evaluation.json").is_file() and (place / runs.RECORD).is_file()):
        return False
    choices = runs.read_json(place / "evaluation.json", NUMBERS, REMEDY)["choices"]
    if choices != dict(cell.choices):
        before, now = (", ".join(" ".join(choice) for choice in of.items()) for of in (choices, dict(cell.choices)))
        raise ValueError(
            f"{place} holds a cell with {before}, but in this sweep that name means {now}: choose another --out"
        )
    return True


def _run_all(folder: Path, options: Options, cells: Sequence[Cell], jobs: int | None) -> Iterator[tuple[Cell, float]]:
    """Run the cells, and yield each finished cell and its seconds."""
    places = itertools.cycle(devices(options.training.device, processes(jobs)))
    tasks = [
        (folder.absolute(), replace(options, training=replace(options.training, device=place)), cell)
        for cell, place in zip(cells, places, strict=False)
    ]
    try:
        yield from in_parallel(run_cell, tasks, jobs)
    except Interrupted as error:
        raise Interrupted(f"interrupted: run the same command again to resume {folder}", error.status) from None


def devices(device: str, jobs: int) -> list[str]:
    """The device of each of ``jobs`` processes: the GPUs in turn, if there are any and ``device`` names none."""
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    return [f"cuda:{job % gpus}" if gpus else device for job in range(jobs)] or [device]


def run_cell(folder: Path, options: Options, cell: Cell) -> tuple[Cell, float]:
    """Train and evaluate one cell; return it and its seconds. Errors are recorded, not raised."""
    place, start = _cell_folder(folder, cell), time.perf_counter()
    place.mkdir(parents=True, exist_ok=True)
    try:
        # Non-finite numbers cannot be written, which is an error of this cell too.
        runs.write_json(place / "evaluation.json", _train_and_evaluate(place, options, cell))
    except Exception as error:  # of any kind, because the other cells continue
        text = " ".join(f"{type(error).__name__}: {error}".split())
        runs.write_json(place / "failed.json", {"error": text, **asdict(cell)})
    else:
        (place / "failed.json").unlink(missing_ok=True)
    return cell, time.perf_counter() - start


def _train_and_evaluate(place: Path, options: Options, cell: Cell) -> dict[str, Any]:
    program, record = _load_cell(place, options) or _train_cell(place, options, cell)
    test = record.points("test", options.data_dir)
    bound = evaluate(program, test)
    best = evaluate(program, test, num_particles=options.num_particles) if bound.kind == "elbo" else bound
    latent = getattr(program, "latent_name", None)
    active = None
    if latent is not None:
        active = int(units(program, test[:UNIT_DATA])[latent].active.sum())
    return {
        "choices": dict(cell.choices),
        "seed": cell.seed,
        "bits_per_dim": best.bits_per_dim,
        "nats": best.nats,
        "kind": best.kind,
        "measure": best.measure,
        "elbo_bits_per_dim": bound.bits_per_dim,
        "elbo_nats": bound.nats,
        "kl": sum(bound.kl.values()) if bound.kl else None,
        "active": active,
        "seconds": record.history["seconds"],
        "parameters": sum(parameter.numel() for parameter in program.parameters()),
    }


def _load_cell(place: Path, options: Options) -> tuple[Program, runs.Record] | None:
    """The run of a cell that was killed during its evaluation; None if there is none, or if it is damaged."""
    try:
        return runs.read(place, find_device(options.training.device))
    except (FileNotFoundError, ValueError):
        return None


def _train_cell(place: Path, options: Options, cell: Cell) -> tuple[Program, runs.Record]:
    """Train a cell, from its stored state if there is a readable one."""
    swaps, objective, training = _cell_arguments(options, cell)
    train = functools.partial(
        runs.train,
        place,
        options.model,
        options.data,
        swaps,
        training,
        data_dir=options.data_dir,
        reading=options.reading,
        num_data=options.num_data,
        objective=objective,
        progress=False,
        force=True,
    )
    try:
        program, record, _ = train(resume=True)
    except checkpoint.CheckpointError:
        program, record, _ = train()
    return program, record


NUMBERS: dict[str, runs.Kind] = {
    "choices": dict,
    "kind": str,
    **dict.fromkeys(("bits_per_dim", "nats", "elbo_bits_per_dim", "seconds"), int | float),
    **dict.fromkeys(("kl", "active"), int | float | None),
    "parameters": int,
}
"""Fields of a cell's evaluation that the tables need."""

REMEDY = "remove it, and run the same command again"


# -- results -----------------------------------------------------------------------------------------------------------


def collect(
    folder: Path,
    options: Options,
    axes: dict[str, tuple[str, ...]],
    combinations: Sequence[tuple[tuple[str, str], ...]],
    seeds: int,
) -> Sweep:
    """The `Sweep` from the files of its cells."""
    rows = []
    for choices in combinations:
        done, errors = [], []
        for seed in range(seeds):
            place = _cell_folder(folder, Cell(choices, seed))
            if (place / "evaluation.json").is_file():
                done.append(runs.read_json(place / "evaluation.json", NUMBERS, REMEDY))
            elif (place / "failed.json").is_file():
                errors.append(runs.read_json(place / "failed.json", {"error": str}, REMEDY)["error"])
        rows.append(Row(dict(choices) or {"model": options.model}, done, errors))
    return Sweep(folder, options, axes, rows)


def _write_tables(result: Sweep) -> None:
    from dgm_pyro.experiments import plots

    files.write_text(result.folder / "table.md", result.table().markdown() + "\n")
    numbers = ("bits_per_dim", "nats", "elbo_bits_per_dim", "kl", "active", "seconds", "parameters")
    summary: list[dict[str, Any]] = []
    for row in result.rows:
        line: dict[str, Any] = dict(row.choices)
        for name in numbers:
            mean, error = row.over_seeds(name)
            line |= {name: _cell_of(mean), f"{name}_stderr": _cell_of(error)}
        summary.append({**line, "seeds": len(row.cells), "failed": len(row.errors)})
    files.write_text(result.folder / "table.csv", as_csv(summary))
    cells = [{**cell["choices"], **{k: v for k, v in cell.items() if k != "choices"}}
             for row in result.rows for cell in row.cells]  # fmt: skip
    if cells:
        files.write_text(result.folder / "cells.csv", as_csv(cells))
        plots.write_picture(result.folder / "sweep.png", plots.heat_map(*_heat_map_panels(result)))


def _cell_of(value: float) -> float | str:
    return "" if math.isnan(value) else value


def _heat_map_panels(result: Sweep) -> tuple[dict[str, dict[tuple[str, str], tuple[float, float]]], str]:
    """Panels of cells (row, column) for the heat map: two axes span a panel, and the others name the panels."""
    swept = sorted((axis for axis in result.axes if len(result.axes[axis]) > 1), key=lambda a: -len(result.axes[a]))
    down, across = (*swept, None, None)[:2] if swept else (next(iter(result.axes)), None)
    panels: dict[str, dict[tuple[str, str], tuple[float, float]]] = {}
    for row in result.rows:
        title = ", ".join(f"{axis} {row.choices[axis]}" for axis in swept[2:])
        place = (row.choices[down] if down else "", row.choices[across] if across else "")
        panels.setdefault(title, {})[place] = row.over_seeds("bits_per_dim")
    kind = next(cell["kind"] for row in result.rows for cell in row.cells)
    return panels, f"{result.options.data}: bits per dimension ({kind}), lower is better"


# -- runs side by side -------------------------------------------------------------------------------------------------


# Marks in the table for a difference that is a bound.
RELATIONS = {"at least": "> ", "at most": "< "}


def _folder_of(names: Collection[str]) -> str:
    """The common folder of all runs; empty if there is none."""
    parents = {os.path.dirname(name) for name in names}
    return os.path.commonpath(parents) if len({os.path.isabs(parent) for parent in parents}) == 1 else ""


@dataclass(frozen=True)
class Comparison(Result):
    """Runs on the same data; differences are relative to the first."""

    evidences: dict[str, Evidence]
    parameters: dict[str, int]
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        reference = next(iter(self.evidences.values()))
        lines = {}
        for name, evidence in self.evidences.items():
            difference = evidence.minus(reference)
            lines[name] = {
                **evidence.as_dict(),
                "difference_nats": difference.nats,
                "difference_stderr": None if math.isnan(difference.stderr) else difference.stderr,
                "difference_kind": difference.kind,
                "parameters": self.parameters[name],
                "seconds": self.seconds[name],
            }
        return lines

    def parts(self) -> list[str | Table]:
        reference, *others = self.evidences
        header = ["run", "bits/dim", "nats", "kind", "difference", "parameters", "seconds"]
        rows, kinds = [], set[str]()
        shared = _folder_of(self.evidences)
        for name, evidence in self.evidences.items():
            difference = evidence.minus(self.evidences[reference])
            if name in others:
                kinds.add(difference.kind)
            sign = RELATIONS.get(difference.kind, "")
            rows.append(
                [
                    os.path.relpath(name, shared) if shared else name,
                    f"{evidence.bits_per_dim:.4f}",
                    with_error(evidence.nats, evidence.nats_stderr, 3),
                    evidence.kind,
                    sign + str(difference).partition(" nats")[0] if name in others else "-",
                    f"{self.parameters[name]:,}",
                    f"{self.seconds[name]:.1f}",
                ]
            )
        first, where = self.evidences[reference], f"; runs in {shared}" if shared else ""
        signs = "; > at least, < at most" if kinds & RELATIONS.keys() else ""
        parts: list[str | Table] = [
            f"{len(first.values)} of {first.data}, a {first.measure}{where}",
            Table(header, rows),
            f"difference: nats more than {rows[0][0]}, paired datum by datum{signs}",
        ]
        if kinds != {"exact"}:
            parts.append(
                "a bound may be below log p(x) by its gap (dgm gaps), which also affects a difference of two bounds"
            )
        return parts


def compare(
    folders: Sequence[str | os.PathLike[str]],
    *,
    split: str = "test",
    num_particles: int = 1,
    data: str | None = None,
    data_dir: str | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Evaluate runs on the data of the first, or on other ``data``, with differences paired datum by datum.

    Args:
        folders: folders of at least two runs.
        split: split of the data set.
        num_particles: as for `dgm.evaluate`.
        data: name of another data set, or path of a file.
        data_dir: folder of the data set's files.
        device: device to compute on.
        seed: seed of the draws.
        progress: whether to show bars.

    Raises:
        ValueError: there are fewer than two runs, or they are not comparable: a mass and a density, or other data.
    """
    check_type(folders, Sequence, "folders", "a sequence of paths")
    for folder in folders:
        check_path(folder, "folders")
    names = list(dict.fromkeys(str(folder) for folder in folders))
    if len(names) < 2:
        raise ValueError(f"folders names {len(names)} run(s): name at least two different runs")
    where = find_device(device)
    loaded = {name: runs.read(name, where) for name in names}
    first, record = loaded[names[0]]
    for name, (program, other) in loaded.items():
        if program.measure != first.measure:
            raise ValueError(
                f"{name} holds a {program.measure}, but {names[0]} a {first.measure}, and a mass and a density are not "
                "comparable: wrap the flow in dgm.Dequantized(flow, levels=...), for two masses on the integers"
            )
        if other.data != record.data:
            raise ValueError(
                f"{name} was trained on {other.data}, but {names[0]} on {record.data}, and numbers on different data "
                "are not comparable: train both on the same --data"
            )
        if program.variable != first.variable:
            raise ValueError(
                f"{name} is a model of {program.variable}, but {names[0]} of {first.variable}, and p(x) and p(y | x) "
                "are not comparable: choose runs of one kind"
            )
    points = record.points(split, data_dir) if data is None else runs.inputs(data, first, data_dir, record.reading)
    evidences = {
        name: evaluate(program, points, num_particles=num_particles, seed=seed, progress=progress)
        for name, (program, _) in loaded.items()
    }
    parameters = {name: sum(p.numel() for p in program.parameters()) for name, (program, _) in loaded.items()}
    return Comparison(evidences, parameters, {name: other.history["seconds"] for name, (_, other) in loaded.items()})
