"""Runs: one folder with a trained program (a checkpoint) and, in ``run.json``, the record of its training.

``dgm.load`` reads the program alone from the same folder. ``run.json`` names the digest of its weights, and
``program.json``, which is replaced in one step, holds a copy of the record. So a reader always reads one consistent
run, also while another process writes and after a writer was killed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dgm_pyro.checkpoint as checkpoint
import dgm_pyro.data as data_sets
import dgm_pyro.files as files
import dgm_pyro.old_names as old_names
import dgm_pyro.sources as sources
from dgm_pyro.catalog import build
from dgm_pyro.checkpoint import CheckpointError
from dgm_pyro.checks import check_number, check_path, check_type, close_to, near_name
from dgm_pyro.data import Data, subset
from dgm_pyro.evaluation import as_data, program_device
from dgm_pyro.program import Program, check_program, seeded
from dgm_pyro.results import as_csv
from dgm_pyro.training.distributed import process_group
from dgm_pyro.training.fit import History, NonFiniteLossError, Tracker, fit
from dgm_pyro.training.options import TrainingOptions, changes
from dgm_pyro.training.states import States, read_header
from dgm_pyro.uses import corruptions

__all__ = ["Record", "inputs", "points", "read", "resume", "train", "write", "write_alike", "write_array"]

RECORD = "run.json"
METRICS = "metrics.jsonl"
CURVES = "learning-curves.png"

Kind = type | types.UnionType | Mapping[str, type | types.UnionType]

KINDS: dict[str, Kind] = {
    "model": str, "data": str, "data_dir": str | None, "options": dict, "history": {"seconds": int | float}
}  # fmt: skip
"""Types of the fields of a record."""

READING: dict[str, Kind] = {
    "columns": list, "kinds": dict, "classes": list, "label": str, "given": list | tuple | str, "test": str,
    "digests": dict,
}  # fmt: skip
"""Types of the entries that `Record.reading` may have."""


@dataclass(frozen=True)
class Record:
    """The record of the training of a program.

    Attributes:
        model: the name passed to `dgm.build`.
        data: the name passed to `dgm.data.load`, or the path passed to `dgm.data.open`.
        data_dir: the folder from which a named data set was read.
        options: options of the model and of the training, by name; "reading" has those of `points`.
        history: history of the training, as plain Python.
    """

    model: str
    data: str
    data_dir: str | None
    options: dict[str, Any]
    history: dict[str, Any]

    @property
    def reading(self) -> dict[str, Any]:
        """The options for reading the data from a file; empty for a named data set."""
        found: dict[str, Any] = self.options.get("reading", {})
        return found

    @property
    def words(self) -> dict[str, list[str]]:
        """The words of each column that is a category or ordinal, in the order of their numbers."""
        kinds = self.reading.get("kinds", {}).items()
        return {name: words for name, (kind, *words) in kinds if kind in sources.WITH_WORDS}

    def __str__(self) -> str:
        return f"{self.model} on {Path(self.data).stem}"

    def points(self, split: str, data_dir: str | None = None, num_data: int | None = None, seed: int = 0) -> Data:
        """A split of the data that the program was trained on.

        Raises:
            ValueError: the file has changed since the training.
        """
        return points(self.data, split, self.reading, data_dir or self.data_dir, num_data, seed)


TEST_SHARE = 0.2
SPLITS = ("train", "test")


def points(
    data: str,
    split: str = "train",
    reading: Mapping[str, Any] | None = None,
    data_dir: str | None = None,
    num_data: int | None = None,
    seed: int = 0,
) -> Data:
    """Data by the name of a data set, or from a file.

    The test split of a file is a random fifth of it, the same for every seed, or another file.

    Args:
        data: a name for `dgm.data.load`, or a path for `dgm.data.open`.
        split: "train" or "test", or another split of a named set.
        reading: options of `dgm.data.open` for a file; "test", the path of its test data; "digests", the required
            `Data.digest` of both.
        data_dir: folder of the files of a named set.
        num_data: size of a random subset; all data by default.
        seed: seed of the subset.

    Raises:
        ValueError, FileNotFoundError: there is no such data set or file, or a file has changed.
    """
    check_type(data, str, "data", "the name of a data set or a path")
    options = dict(reading or {})
    if data in data_sets.NAMES:
        if options:
            raise ValueError(
                f"{', '.join(options)} are options for reading a file, but {data} is a data set: leave them out"
            )
        return data_sets.load(data, split, data_dir=data_dir, num_data=num_data, seed=seed)
    if split not in SPLITS:
        raise ValueError(f"{data} has no split {split!r}: choose one of {', '.join(SPLITS)}")
    test, digests = options.pop("test", None), options.pop("digests", {})
    own = test is not None and split == "test"
    found = _read_source(test if own else data, options, digests.get("test" if own else "train"))
    return _split_of(found, split, test is None, num_data, seed)


def _split_of(found: Data, split: str, whole: bool, num_data: int | None, seed: int = 0) -> Data:
    """A split of the data that were read; for a ``whole`` file, which has both splits, a part of it."""
    if whole:
        found = found.split(TEST_SHARE)[SPLITS.index(split)]
    return subset(found, num_data, np.random.default_rng((seed, SPLITS.index(split))), split)


def _read_source(data: str, options: Mapping[str, Any], digest: str | None = None) -> Data:
    if not Path(data).exists():
        close = close_to(data, data_sets.NAMES) or near_name(Path(data))
        raise ValueError(
            f"there is no data set {data!r}, and no file or folder{close}: choose a path, or a name of "
            f"{', '.join(data_sets.NAMES)}"
        )
    found = data_sets.open(data, **options)
    if digest is not None and found.digest != digest:
        raise ValueError(
            f"the values in {data} have changed since the run was trained: name the file to use by --data, or train "
            "again"
        )
    return found


def opened(
    data: str, reading: Mapping[str, Any], data_dir: str | None = None, num_data: int | None = None
) -> tuple[str, dict[str, Any], Data]:
    """Training data, as `points` returns them, after the arguments with which `points` reads them again.

    These are the name of a data set or an absolute path, and all reading options, including those that the file
    determined.

    Raises:
        ValueError: ``reading`` has digests, and a file has changed.
    """
    if data in data_sets.NAMES:
        return data, dict(reading), points(data, "train", reading, data_dir, num_data)
    test = reading.get("test")
    kept = {name: value for name, value in reading.items() if name not in ("test", "digests")}
    before = reading.get("digests", {})
    found = _read_source(data, kept, before.get("train"))
    if found.columns is not None:
        kept["columns"] = list(found.columns)
    if found.classes is not None:
        kept["classes"] = list(found.classes)
    if found.kinds is not None:
        kept["kinds"] = {name: [*kind] for name, kind in found.kinds.items()}
    if Path(data).is_dir():
        channels, *kept["size"] = found.event_shape
        kept["gray"] = channels == 1
    digests = {"train": found.digest}
    if test is not None:
        digests["test"] = _read_source(test, kept, before.get("test")).digest
        kept["test"] = str(Path(test).resolve())
    kept["digests"] = digests
    return str(Path(data).resolve()), kept, _split_of(found, "train", test is None, num_data)


@contextlib.contextmanager
def reserved(folder: Path, *, force: bool = False, resume: bool = False) -> Iterator[None]:
    """Reserve ``folder`` for a run, as its only writer, before the training and not after it.

    If the body raises and leaves no state to resume from, a folder that was made for it is removed.

    Raises:
        FileExistsError: the folder is not empty, and neither ``force`` nor, for a training, ``resume`` is set.
        BlockingIOError: another process writes in the folder.
    """
    found = folder.exists()
    files.refuse_file(folder, "a run is")
    try:
        with files.only_writer(folder):
            stored = (folder / checkpoint.STATE).is_file()
            if not force and any(folder.iterdir()) and not (resume and stored):
                remedy = f"continue it with dgm train --resume {folder}, " if stored else "choose another --out, "
                what = "holds a training that was interrupted" if stored else "exists and is not empty"
                raise FileExistsError(f"{folder} {what}: {remedy}or overwrite it with --force")
            yield
    except BaseException:
        if not found and not (folder / checkpoint.STATE).is_file():
            for name in (METRICS, CURVES):
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty, because another process has written in it
                folder.rmdir()
        raise


def train(
    folder: str | os.PathLike[str],
    model: str,
    data: str,
    swaps: Mapping[str, Any],
    options: TrainingOptions | None = None,
    *,
    labeled: bool = False,
    data_dir: str | None = None,
    reading: Mapping[str, Any] | None = None,
    num_data: int | None = None,
    objective: str | None = None,
    num_labels: int | None = None,
    mutate: float | None = None,
    force: bool = False,
    resume: bool = False,
    trackers: Sequence[Tracker] = (),
    progress: bool = True,
) -> tuple[Program, Record, History]:
    """Build, train and store a run, as `dgm train` does.

    If several processes train together, each calls this, and the first one writes. During the training its state is
    stored in the folder, as by `dgm.fit`.

    Args:
        folder: folder of the run.
        model: a name for `dgm.build`.
        data: a name for `dgm.data.load`, or a path for `dgm.data.open`.
        swaps: parts for `dgm.build`, by name.
        options: options of the training.
        labeled: whether to train a generative classifier.
        data_dir: folder of the files of a named data set.
        reading: options for reading a file, as for `points`.
        num_data: number of training data; default all.
        objective: name of the objective.
        num_labels: number of data that keep their label (`Data.keep_labels`), for the objective "semi-supervised".
        mutate: probability with which each feature of a training batch is replaced by noise (`corruptions.mutate`).
        force: whether to overwrite the folder.
        resume: whether to continue a training in the folder, if there is one; a complete run is returned unchanged.
        trackers: as for `dgm.fit`.
        progress: whether to show a bar with the loss.

    Returns:
        The trained program, its record, and the history of the training.

    Raises:
        FileExistsError: the folder is not empty, and ``force`` is not set.
        ValueError, TypeError: a name is unknown, or an option does not fit; nothing has been written.
    """
    check_path(folder, "folder")
    check_type(swaps, Mapping, "swaps", "a mapping of names to parts")
    check_type(options, TrainingOptions | None, "options", "a dgm.TrainingOptions or None")
    options = options or TrainingOptions()
    check_type(data, str, "data", "the name of a data set or a path")
    data, reading, seen = opened(data, reading or {}, data_dir, num_data)
    about = {
        "model": model, "data": data, "swaps": dict(swaps), "options": vars(options), "labeled": labeled,
        "data_dir": data_dir, "reading": reading, "num_data": num_data, "objective": objective,
        "num_labels": num_labels, "mutate": mutate,
    }  # fmt: skip
    if num_labels is not None:
        if not labeled:
            raise ValueError("num_labels is for labeled=True (--labeled), with the objective 'semi-supervised'")
        seen = seen.keep_labels(num_labels, options.seed)
    augment = None
    if mutate is not None:
        if seen.levels is None:
            raise ValueError(f"mutate replaces integers, but {data!r} has reals: choose another data set")
        check_number(mutate, "mutate", at_least=0, at_most=1)
        augment = functools.partial(corruptions.mutate, rate=mutate, levels=seen.levels)
    with seeded(options.seed, torch.device("cpu")):
        program = build(model, seen, labeled=labeled, **swaps)
    processes = process_group()
    path = Path(folder)

    def record(history: History) -> Record:
        return record_of(
            model, data, history, data_dir, **swaps, labeled=labeled, objective=objective, num_data=num_data,
            num_labels=num_labels, mutate=mutate, processes=processes.world_size if processes.world_size > 1 else None,
            training=options, reading=reading or None,
        )  # fmt: skip

    if resume and not force and (path / RECORD).is_file() and not (path / checkpoint.STATE).is_file():
        return _complete_run(path, record(History()))
    advice = f"resume with {'the same torchrun, and ' if processes.world_size > 1 else ''}dgm train --resume {path}"
    states = States(path, about, advice)
    with reserved(path, force=force, resume=resume) if processes.writes else contextlib.nullcontext():
        if processes.writes and not resume:
            states.remove()
        processes.wait()
        try:
            history = fit(
                program, seen, objective, augment=augment, resume=states, trackers=trackers, progress=progress,
                **vars(options),
            )  # fmt: skip
        except Exception as error:
            if processes.writes and (isinstance(error, NonFiniteLossError) or not states.steps):
                states.remove()  # resuming would end in the same error
            raise
        written = record(history)
        if processes.writes:
            write_files(path, program, written)
            states.remove()
    return program, written, history


def resume(
    folder: str | os.PathLike[str],
    device: str | None = None,
    *,
    trackers: Sequence[Tracker] = (),
    progress: bool = True,
) -> tuple[Program, Record, History]:
    """Continue the training that `train` started in ``folder``, with its options; a complete run is returned unchanged.

    Args:
        folder: folder of the run.
        device: device to train on, instead of the original one.
        trackers: as for `dgm.fit`.
        progress: whether to show a bar with the loss.

    Raises:
        FileNotFoundError: the folder holds no training.
        CheckpointError: the state of the training is damaged.
    """
    check_path(folder, "folder")
    header = read_header(Path(folder))
    if header is None:
        if not (Path(folder) / RECORD).is_file():
            raise FileNotFoundError(f"{folder} holds no training to resume: start one with dgm train --out {folder}")
        return _complete_run(Path(folder), None)
    try:
        about = old_names.renamed(header["about"], old_names.OPTIONS)
        options = TrainingOptions(**about.pop("options"))
    except (TypeError, ValueError, LookupError) as error:
        raise CheckpointError(
            f"{folder} holds a training that dgm train did not start ({error}): resume it from the code that did"
        ) from error
    if device is not None:
        options = replace(options, device=device)
    return train(folder, **about, options=options, resume=True, trackers=trackers, progress=progress)


def _complete_run(folder: Path, wanted: Record | None) -> tuple[Program, Record, History]:
    """The run in the folder, which must have the same options."""
    program, record = read(folder)
    changed = [] if wanted is None else changes(record.options, wanted.options)
    if changed:
        raise FileExistsError(f"{folder} holds a run with other options ({'; '.join(changed)}): choose another --out")
    return program, record, History.from_dict(record.history)


def write(folder: str | os.PathLike[str], program: Program, record: Record) -> None:
    """Store a run in ``folder``, replacing an earlier one.

    Raises:
        BlockingIOError: another process writes in the folder.
    """
    with files.only_writer(Path(folder)):
        write_files(Path(folder), program, record)


def write_files(folder: Path, program: Program, record: Record) -> None:
    """Write the files of a run, for the `only_writer` of the folder."""
    header, weights = checkpoint.pack(program, {RECORD: asdict(record)})
    checkpoint.write_packed(folder, header, weights)
    write_json(folder / RECORD, asdict(record) | {"weights": header["weights"]["sha256"]})


def read(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> tuple[Program, Record]:
    """The program and the record that `write` stored in ``folder``.

    Raises:
        FileNotFoundError: the folder holds no run.
        CheckpointError: the program cannot be read.
        ValueError: the record is damaged.
    """
    check_path(folder, "folder")
    path = Path(folder) / RECORD
    if not path.is_file():
        empty = not path.parent.exists() or (path.parent.is_dir() and not any(path.parent.iterdir()))
        remedy = f"train one with dgm train MODEL --out {folder}" if empty else "choose the folder of a run"
        raise FileNotFoundError(f"{folder} holds no run, because it has no {RECORD}: {remedy}")
    remedy = "train the run again"
    found = read_json(path, KINDS, remedy)
    program, stored = checkpoint.load_with_extra(folder, device)
    copy = stored["extra"].get(RECORD) if isinstance(stored["extra"], dict) else None
    if copy is not None and found.get("weights") != stored["weights"]:  # the record of another run in this folder
        found = copy
    check_record(found, folder, remedy)
    found["options"] = old_names.renamed(found["options"], old_names.OPTIONS)
    return program, Record(**{name: found[name] for name in KINDS})


def inputs(data: str, program: Program, data_dir: str | None = None, reading: Mapping[str, Any] | None = None) -> Data:
    """The test split of a data set, or all of a file, as inputs of ``program``.

    Args:
        data: name of the data set, or path of the file.
        program: the program that the data must fit.
        data_dir: folder of the data set's files.
        reading: options for reading the run's own file. Labels are read if the file has them.

    Raises:
        ValueError, TypeError: the file holds no numbers, or the data do not fit the program.
    """
    check_type(data, str, "data", "the path of a file or the name of a data set")
    check_program(program)
    if data in data_sets.NAMES:
        found = data_sets.load(data, "test", data_dir=data_dir)
        if program.variable == "x":
            as_data(program, found)
        return found
    found = _read_source(data, _reading_options_for(Path(data), reading or {}, program))
    shape = program.event_shape if program.variable == "x" else program.given_shape or found.event_shape
    if len(found.event_shape) == len(shape) - 1 and len(shape) == 3 and shape[0] == 1:  # images without their channel
        found = found.replaced(x=found.x.unsqueeze(1))
    if found.event_shape != torch.Size(shape):
        size = (len(found), *found.event_shape)
        raise ValueError(f"{data} has shape {size}, but the run takes (N, *{tuple(shape)})")
    seen = found.excerpt
    if program.variable == "x" and seen.mask is None:
        _, given, _ = program.arguments(seen.to(program_device(program)))
        program.check(seen.x.to(program_device(program)), given)
    return found


def _reading_options_for(path: Path, reading: Mapping[str, Any], program: Program) -> dict[str, Any]:
    """The options of the run's own file that apply to another file."""
    wanted = {"levels": program.levels if program.variable == "x" else None, **reading}
    if path.is_dir():
        names: tuple[str, ...] = ("levels", "size", "gray", "crop", "classes")
    elif path.suffix in sources.TABLES:
        names = ("levels", "columns", "label", "given", "classes", "kinds")
    else:
        names = ("levels", "label", "given", "classes") if path.suffix == ".npz" else ("levels",)
    found = {name: wanted[name] for name in names if wanted.get(name) is not None}
    if path.suffix in sources.TABLES and "label" in found and found["label"] not in sources.columns_of(path):
        del found["label"]
    return found


def write_array(path: Path, x: torch.Tensor) -> None:
    """``x`` as a .npy file, which `inputs` reads."""
    content = io.BytesIO()
    np.save(content, x.numpy())
    files.write_file(path, content.getvalue())


def write_alike(stem: Path, x: torch.Tensor, record: Record, levels: int | None, **more: Any) -> Path:
    """Write ``x`` in the format of the training data: a table, a folder of images, or an array.

    Args:
        stem: the path without its suffix.
        x: ``(N, *event_shape)``.
        record: record of the run.
        levels: number of levels of x; None for reals.
        more: further columns of a table, which come first.

    Returns:
        The path written.
    """
    names = record.reading.get("columns")  # a record made outside of the library may lack them
    if names is not None and Path(record.data).suffix in sources.TABLES:
        path = stem.with_suffix(".csv")
        texts = [
            _in_words(column, record.words.get(name))
            for name, column in zip(names, x.reshape(-1, len(names)).T, strict=True)
        ]
        rows = [dict(zip(names, row, strict=True)) for row in zip(*texts, strict=True)]
        firsts = [dict(zip(more, values, strict=True)) for values in zip(*more.values(), strict=True)] or [{}] * len(
            rows
        )
        files.write_text(path, as_csv([first | row for first, row in zip(firsts, rows, strict=True)]))
        return path
    if "gray" in record.reading and levels is not None:
        stem.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(x.reshape(-1, *x.shape[-3:])):
            files.write_file(stem / f"{i:05}.png", sources.png(image.cpu().numpy(), levels))
        return stem
    write_array(stem.with_suffix(".npy"), x)
    return stem.with_suffix(".npy")


def _in_words(column: torch.Tensor, words: Sequence[str] | None) -> list[str]:
    """A column in its original form: words, or numbers with the digits of float32."""
    if words is not None:
        return [words[int(code)] for code in column.tolist()]
    return [f"{value:.7g}" if column.is_floating_point() else str(value) for value in column.tolist()]


def record_of(
    model: str,
    data: str,
    history: History,
    data_dir: str | None = None,
    training: TrainingOptions | None = None,
    **options: Any,
) -> Record:
    """A record without the options that are None; training options are complete, so that they can be read back."""
    chosen = {name: value for name, value in options.items() if value is not None}
    return Record(model, data, data_dir, chosen | (training.recipe() if training else {}), history.as_dict())


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON to ``path``, which is replaced in one step."""
    files.write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, kinds: Mapping[str, Kind], remedy: str) -> dict[str, Any]:
    """The object that `write_json` stored at ``path``.

    Args:
        kinds: types of its required entries, by name; a mapping for an object in it.
        remedy: what to do about a damaged file, for the message.

    Raises:
        ValueError: the file is damaged: it is no JSON object, or an entry is missing or has another type.
    """
    try:
        content = files.parsed_json(path)
        _check_kinds(content, kinds, "it")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    return content


def check_record(content: Any, where: str | os.PathLike[str], remedy: str) -> None:
    """Raise ValueError unless the content of a ``run.json`` has the form of a `Record`."""
    try:
        _check_kinds(content, KINDS, "it")
        _check_reading(content["options"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"the record in {where} is damaged ({error}): {remedy}") from error


def _check_reading(options: dict[str, Any]) -> None:
    """Raise unless the options of a record have the form that `opened` gives to its reading."""
    _check_kinds({"reading": {}} | options, {"reading": dict}, "options")
    reading = options.get("reading", {})
    _check_kinds(reading, {name: kind for name, kind in READING.items() if name in reading}, "reading")
    for name, kind in reading.get("kinds", {}).items():
        if not (isinstance(kind, list) and kind):
            raise TypeError(f"the kind of {name!a} is {kind!a}")


def _check_kinds(content: Any, kinds: Mapping[str, Kind], where: str) -> None:
    if not isinstance(content, dict):
        raise TypeError(f"{where} is a {type(content).__name__}")
    for name, kind in kinds.items():
        if name not in content:
            raise TypeError(f"{where} lacks {name!r}")
        if isinstance(kind, Mapping):
            _check_kinds(content[name], kind, name)
        elif not isinstance(content[name], kind):
            raise TypeError(f"{name} is a {type(content[name]).__name__}")
        elif isinstance(content[name], str) and not content[name].isprintable():
            raise ValueError(f"{name} is {content[name]!a}")
