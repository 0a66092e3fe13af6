"""Runs: one folder with a trained program (a checkpoint) and, in ``run.json``, how it came about.

``dgm.load`` reads the program alone from the same folder. ``run.json`` names the digest of the weights that it is the
record of, and ``program.json``, which is replaced in one step, holds a copy of it: whoever reads while another writes,
or after a writer was killed, reads one run.
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
import dgm_pyro.data as data
import dgm_pyro.files as files
import dgm_pyro.old_names as old_names
from dgm_pyro.catalog import build
from dgm_pyro.checkpoint import CheckpointError
from dgm_pyro.checks import INTEGERS, check_number, check_path, check_type
from dgm_pyro.evaluation import as_data, program_device
from dgm_pyro.program import Program, check_program, seeded
from dgm_pyro.training.distributed import process_group
from dgm_pyro.training.fit import History, NonFiniteLossError, Tracker, fit
from dgm_pyro.training.options import TrainingOptions, changes
from dgm_pyro.training.states import States, read_header
from dgm_pyro.uses import corruptions

RECORD = "run.json"
TRACKED = ("metrics.jsonl", "learning-curves.png")

Kind = type | types.UnionType | Mapping[str, type | types.UnionType]

KINDS: dict[str, Kind] = {
    "model": str, "data": str, "data_dir": str | None, "options": dict, "history": {"seconds": int | float}
}  # fmt: skip
"""Fields of a record."""


@dataclass(frozen=True)
class Record:
    """The record of how a program was made.

    Attributes:
        model: the name given to `dgm.build`.
        data: the name given to `dgm.data.load`; data_dir: the folder that it read.
        options: of the model and of the training, by name.
        history: that of the training, as plain Python.
    """

    model: str
    data: str
    data_dir: str | None
    options: dict[str, Any]
    history: dict[str, Any]


@contextlib.contextmanager
def reserved(folder: Path, *, force: bool = False, resume: bool = False) -> Iterator[None]:
    """Write a run in ``folder``, as its only writer: before an hour of training, not after.

    Where that raises, and leaves no state to go on from, a folder that was made for it is removed.

    Raises:
        FileExistsError: something is there, and neither ``force`` nor, if it is a training, ``resume`` is set.
        BlockingIOError: another process writes there.
    """
    found = folder.exists()
    if found and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, but a run is a folder: choose another --out")
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
            for name in TRACKED:
                (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it is not empty: somebody else has written there
                folder.rmdir()
        raise


def train(
    folder: str | os.PathLike[str],
    model: str,
    data_name: str,
    swaps: Mapping[str, Any],
    options: TrainingOptions | None = None,
    *,
    labeled: bool = False,
    data_dir: str | None = None,
    num_data: int | None = None,
    objective: str | None = None,
    num_labels: int | None = None,
    mutate: float | None = None,
    force: bool = False,
    resume: bool = False,
    trackers: Sequence[Tracker] = (),
    progress: bool = True,
) -> tuple[Program, Record, History]:
    """Build, train and store a run; what `dgm train` does.

    Where several processes train together, each calls this, and the first writes. While it trains, its state is stored
    in the folder, as `dgm.fit` does.

    Args:
        swaps: of `dgm.build`, by name.
        options: of the training.
        num_labels: how many data keep their label (`Data.keep_labels`), for objective "semi-supervised".
        mutate: the probability with which each feature of a training batch is replaced by noise (`corruptions.mutate`).
        force: overwrite what is in the folder.
        resume: continue the training in the folder, if there is one; a run that is complete is returned as it is.
        trackers: as for `dgm.fit`.
        progress: whether to show a bar with the loss.

    Returns:
        The trained program, what was written about it, and the history of the training.

    Raises:
        FileExistsError: something is in the folder, and ``force`` is not set.
        ValueError, TypeError: an unknown name, or an option that does not fit; nothing has been written.
    """
    check_path(folder, "folder")
    check_type(swaps, Mapping, "swaps", "a mapping of names to parts")
    check_type(options, TrainingOptions | None, "options", "a dgm.TrainingOptions or None")
    options = options or TrainingOptions()
    about = {
        "model": model, "data_name": data_name, "swaps": dict(swaps), "options": vars(options), "labeled": labeled,
        "data_dir": data_dir, "num_data": num_data, "objective": objective, "num_labels": num_labels, "mutate": mutate,
    }  # fmt: skip
    points = data.load(data_name, data_dir=data_dir, num_data=num_data)
    if num_labels is not None:
        if not labeled:
            raise ValueError("num_labels is for labeled=True (--labeled), with the objective 'semi-supervised'")
        points = points.keep_labels(num_labels, options.seed)
    augment = None
    if mutate is not None:
        if points.levels is None:
            raise ValueError(f"mutate replaces integers, but {data_name!r} has reals: choose another data set")
        check_number(mutate, "mutate", at_least=0, at_most=1)
        augment = functools.partial(corruptions.mutate, rate=mutate, levels=points.levels)
    with seeded(options.seed, torch.device("cpu")):
        program = build(model, points, labeled=labeled, **swaps)
    processes = process_group()
    path = Path(folder)

    def record(history: History) -> Record:
        return record_of(
            model, data_name, history, data_dir, **swaps, labeled=labeled, objective=objective, num_data=num_data,
            num_labels=num_labels, mutate=mutate, processes=processes.size if processes.size > 1 else None,
            training=options,
        )  # fmt: skip

    if resume and not force and (path / RECORD).is_file() and not (path / checkpoint.STATE).is_file():
        return _complete(path, record(History()))
    advice = f"go on with {'the same torchrun, and ' if processes.size > 1 else ''}dgm train --resume {path}"
    states = States(path, about, advice)
    with reserved(path, force=force, resume=resume) if processes.writes else contextlib.nullcontext():
        if processes.writes and not resume:
            states.remove()
        processes.wait()
        try:
            history = fit(
                program, points, objective, augment=augment, resume=states, trackers=trackers, progress=progress,
                **vars(options),
            )  # fmt: skip
        except Exception as error:
            if processes.writes and (isinstance(error, NonFiniteLossError) or not states.steps):
                states.remove()  # which would lead there again
            raise
        written = record(history)
        if processes.writes:
            _write(path, program, written)
            states.remove()
    return program, written, history


def resume(
    folder: str | os.PathLike[str],
    device: str | None = None,
    *,
    trackers: Sequence[Tracker] = (),
    progress: bool = True,
) -> tuple[Program, Record, History]:
    """Continue the training that `train` began in ``folder``, with its options; a complete run is returned as it is.

    Args:
        device: in the place of the one that it began on.

    Raises:
        FileNotFoundError: there is no training.
        CheckpointError: its state is damaged.
    """
    check_path(folder, "folder")
    header = read_header(Path(folder))
    if header is None:
        if not (Path(folder) / RECORD).is_file():
            raise FileNotFoundError(f"{folder} holds no training to resume: begin one with dgm train --out {folder}")
        return _complete(Path(folder), None)
    try:
        about = dict(header["about"])
        options = TrainingOptions(**about.pop("options"))
    except (TypeError, ValueError, LookupError) as error:
        raise CheckpointError(f"{folder} holds a training that dgm train did not begin ({error})") from error
    if device is not None:
        options = replace(options, device=device)
    return train(folder, **about, options=options, resume=True, trackers=trackers, progress=progress)


def _complete(folder: Path, wanted: Record | None) -> tuple[Program, Record, History]:
    """The run in the folder, which must be of the same options."""
    program, record = read(folder)
    changed = [] if wanted is None else changes(record.options, wanted.options)
    if changed:
        raise FileExistsError(f"{folder} holds a run with other options ({'; '.join(changed)}): choose another --out")
    return program, record, History.from_dict(record.history)


def write(folder: str | os.PathLike[str], program: Program, record: Record) -> None:
    """Store a run in ``folder``, in the place of an earlier one.

    Raises:
        BlockingIOError: another process writes there.
    """
    with files.only_writer(Path(folder)):
        _write(Path(folder), program, record)


def _write(folder: Path, program: Program, record: Record) -> None:
    header, weights = checkpoint.pack(program, {RECORD: asdict(record)})
    checkpoint.write_packed(folder, header, weights)
    write_json(folder / RECORD, asdict(record) | {"weights": header["weights"]["sha256"]})


def read(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> tuple[Program, Record]:
    """The program and the record that `write` stored in ``folder``.

    Raises:
        FileNotFoundError: there is no run.
        CheckpointError: its program cannot be read.
        ValueError: its record is damaged.
    """
    check_path(folder, "folder")
    path = Path(folder) / RECORD
    if not path.is_file():
        empty = not path.parent.exists() or (path.parent.is_dir() and not any(path.parent.iterdir()))
        remedy = f"train one with dgm train --out {folder}" if empty else "choose the folder of a run"
        raise FileNotFoundError(f"{folder} holds no run, it has no {RECORD}: {remedy}")
    found = read_json(path, KINDS, "train the run again")
    program, stored = checkpoint.load_with_extra(folder, device)
    copy = stored["extra"].get(RECORD) if isinstance(stored["extra"], dict) else None
    if copy is not None and found.get("weights") != stored["weights"]:  # it is of the run before or after
        found = copy
        _check_kinds(found, KINDS, RECORD)
    found["options"] = old_names.renamed(found["options"], old_names.OPTIONS)
    return program, Record(**{name: found[name] for name in KINDS})


def inputs(source: str, program: Program, data_dir: str | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The x, with labels if there are any, of a .npy file or of a data set's test split.

    Args:
        source: path of the file, or name of the data set.
        program: what they must fit.
        data_dir: folder of the data set's files.

    Raises:
        ValueError, TypeError: the file holds no numbers, or the data do not fit the program.
    """
    check_type(source, str, "source", "the path of a .npy file or the name of a data set")
    check_program(program)
    if not source.endswith(".npy"):
        points = data.load(source, "test", data_dir=data_dir)
        if program.variable == "x":
            as_data(program, points)
        return points.x, points.y
    try:
        array = np.lib.format.open_memmap(Path(source), mode="r")  # takes no memory for what the header promises
    except ValueError as error:
        raise ValueError(f"{source} is no array ({error}): write one with numpy.save") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{source} holds {array.dtype}: save numbers")
    # torch reads neither foreign byte orders nor floats of more than 64 bits.
    native = np.dtype(np.float64) if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
    x = torch.from_numpy(array.astype(native, order="C"))
    shape = program.event_shape if program.variable == "x" else program.given_shape or x.shape[1:]
    if x.dim() == len(shape) and len(shape) == 3 and shape[0] == 1:  # images without their channel
        x = x.unsqueeze(1)
    if x.is_floating_point():
        x = x.to(torch.get_default_dtype())
    elif x.dtype not in INTEGERS:
        x = x.long()
    if tuple(x.shape[1:]) != tuple(shape) or not len(x):
        raise ValueError(f"{source} has shape {tuple(array.shape)}, but the run takes (N, *{tuple(shape)})")
    if program.variable == "x":
        program.check(x.to(program_device(program)))
    return x, None


def write_array(path: Path, x: torch.Tensor) -> None:
    """``x`` as a .npy file, which `inputs` reads."""
    content = io.BytesIO()
    np.save(content, x.numpy())
    files.write_file(path, content.getvalue())


def record_of(
    model: str,
    data: str,
    history: History,
    data_dir: str | None = None,
    training: TrainingOptions | None = None,
    **options: Any,
) -> Record:
    """A record, less the options that were left at None; those of the training are kept whole, to be read back."""
    chosen = {name: value for name, value in options.items() if value is not None}
    return Record(model, data, data_dir, chosen | (training.recipe() if training else {}), history.as_dict())


def write_json(path: Path, content: Any) -> None:
    """All of ``content`` at ``path``, or the file that was there before."""
    files.write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, kinds: Mapping[str, Kind], remedy: str) -> dict[str, Any]:
    """The object that `write_json` stored at ``path``.

    Args:
        kinds: what it must hold, by name; a mapping for an object in it.
        remedy: what to do about a damaged file.

    Raises:
        ValueError: the file is damaged: no JSON, no object, or something in it is missing or of another kind.
    """
    try:
        content = files.parsed_json(path)
        _check_kinds(content, kinds, "it")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error
    return content


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
