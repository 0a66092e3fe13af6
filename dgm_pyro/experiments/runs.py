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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dgm_pyro.checkpoint as checkpoint
import dgm_pyro.data as data
import dgm_pyro.files as files
import dgm_pyro.old_names as old_names
from dgm_pyro.catalog import build
from dgm_pyro.checks import INTEGERS, check_number, check_path, check_type
from dgm_pyro.evaluation import as_data, program_device
from dgm_pyro.program import Program, check_program, seeded
from dgm_pyro.training.distributed import process_group
from dgm_pyro.training.fit import History, fit
from dgm_pyro.training.options import TrainingOptions
from dgm_pyro.uses import corruptions

RECORD = "run.json"

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
def reserved(folder: Path, *, force: bool = False) -> Iterator[None]:
    """Write a run in ``folder``, as its only writer: before an hour of training, not after.

    Where that raises, a folder that was made for it is removed.

    Raises:
        FileExistsError: something is there, and ``force`` is not set.
        BlockingIOError: another process writes there.
    """
    found = folder.exists()
    if found and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, but a run is a folder: choose another --out")
    try:
        with files.only_writer(folder):
            if not force and any(folder.iterdir()):
                raise FileExistsError(
                    f"{folder} exists and is not empty: choose another --out, or overwrite it with --force"
                )
            yield
    except BaseException:
        if not found:
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
    progress: bool = True,
) -> tuple[Program, Record, History]:
    """Build, train and store a run; what `dgm train` does.

    Where several processes train together, each calls this, and the first writes.

    Args:
        swaps: of `dgm.build`, by name.
        options: of the training.
        num_labels: how many data keep their label (`Data.keep_labels`), for objective "semi-supervised".
        mutate: the probability with which each feature of a training batch is replaced by noise (`corruptions.mutate`).
        force: overwrite what is in the folder.
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
    with reserved(path, force=force) if processes.writes else contextlib.nullcontext():
        history = fit(program, points, objective, augment=augment, progress=progress, **vars(options))
        record = record_of(
            model, data_name, history, data_dir, **swaps, labeled=labeled, objective=objective, num_data=num_data,
            num_labels=num_labels, mutate=mutate, processes=processes.size if processes.size > 1 else None,
            training=options,
        )  # fmt: skip
        if processes.writes:
            _write(path, program, record)
    return program, record, history


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
