"""Readers of users' data, as arrays: files of arrays and tables, folders of images, frames, datasets of torch.

`arrays_of` finds the kind of a source and reads its arrays; `dgm_pyro.data.open` interprets them. No pickle is read.
pandas reads tables and Pillow reads images; they are imported where they are needed.

`stored` opens a source that is larger than memory: a `Stored` source reads the rows that it is asked for.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import itertools
import math
import numbers
import os
import struct
import warnings
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

TABLES = (".csv", ".tsv", ".parquet")
BY_ROWS = (".npy", ".npz", ".parquet")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Names of the arrays in an .npz file, and of the columns of a Hugging Face dataset.
DATA_NAMES, LABEL_NAMES = ("x", "X", "data", "images", "image", "img"), ("y", "Y", "labels", "label")
UNREADABLE = (
    *(AttributeError, EOFError, LookupError, OSError, TypeError, ValueError),
    *(zipfile.BadZipFile, zlib.error),
)
"""Errors that numpy raises for a damaged .npz file."""

IN_MEMORY = 2**30
"""Sources with more bytes are read by rows, if their kind allows it."""

MOST_WORDS = 256
"""Most words of a category: a column of text with more is refused as one."""

GAP = 1024
"""Largest gap in bytes between two rows of a file that is read along instead of skipped."""

CHUNK = 2**20
"""Number of labels that are read together."""

Made = TypeVar("Made")
Kind = tuple[Any, ...]
"""The kind of a column: its name, and the words of a category or the two bounds of a bounded kind."""


@dataclass(frozen=True)
class Arrays:
    """The arrays that were read from a source.

    Attributes:
        x: ``(N, *event_shape)``.
        label: one label per datum, of any type; None without labels.
        given: ``(N, *given_shape)``.
        columns, given_columns: names of the columns of a table.
        classes: names of the labels, where the source has integers and names.
        levels: number of integers that a feature takes, where the source declares it, as images of bytes do.
        kinds: the kind of each column, with its words or bounds, where kinds were requested.
    """

    x: np.ndarray
    label: np.ndarray | None = None
    given: np.ndarray | None = None
    columns: tuple[str, ...] | None = None
    given_columns: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    levels: int | None = None
    kinds: dict[str, Kind] | None = None


@dataclass(frozen=True)
class Choice:
    """The choice of what to read from a source: options of `dgm_pyro.data.open`."""

    label: Any = None
    given: Any = None
    columns: Sequence[str] | None = None
    levels: int | None = None
    size: int | tuple[int, int] | None = None
    gray: bool | None = None
    crop: int | None = None
    kinds: Mapping[str, Any] | str | None = None

    def refuse(self, owner: str, *names: str) -> None:
        """Raise if an option is set that does not apply to ``owner``."""
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is not for {owner}: leave it out")


class Stored:
    """A source that is read by rows.

    Attributes:
        columns, given_columns, classes: as for `Arrays`.
        label_values: all values of the labels; None where labels are integers from 0, or there are none.
        blocks: whether neighboring rows are read faster than scattered ones.
        ordered: whether rows can only be read in the order of the source.
        num_workers: number of processes that read ahead; 0 for a thread.
    """

    columns: tuple[str, ...] | None = None
    given_columns: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    label_values: np.ndarray | None = None
    blocks = ordered = False
    num_workers = 0

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, rows: np.ndarray) -> Arrays:
        """The rows at the ascending positions ``rows``."""
        raise NotImplementedError

    def ahead(
        self, parts: Iterable[np.ndarray], make: Callable[[np.ndarray, Arrays], Made], random: torch.Generator | None
    ) -> Iterator[Made]:
        """``make`` of each of the parts; the next part is read while one is used.

        Args:
            random: generator that seeds the workers of a dataset with random items.
        """
        if self.num_workers:
            yield from _loader(_RowParts(self, make), self.num_workers, random, sampler=parts, batch_size=None)
            return
        with ThreadPoolExecutor(1) as pool:
            pending = deque[Future[Made]]()
            for rows in parts:
                pending.append(pool.submit(lambda rows=rows: make(rows, self.read(rows))))  # type: ignore[misc]
                if len(pending) > 1:
                    yield pending.popleft().result()
            if pending:
                yield pending.popleft().result()


def stored(source: Any, choice: Choice, in_memory: bool | None, num_workers: int) -> Stored | None:
    """The source as one that is read by rows; None if it is to be read into memory.

    Args:
        in_memory: whether to read it into memory; None if its size decides.
        num_workers: worker processes for a dataset of torch or a folder of images.
    """
    if in_memory:
        return None
    found: Stored | None = None
    path = Path(source).expanduser() if isinstance(source, str | os.PathLike) else None
    if path is not None and path.is_dir():
        choice.refuse(*OF_FOLDERS)
        folder = _Folder.of(path)
        if in_memory is False or len(folder.files) * _first_image(folder, choice).nbytes > IN_MEMORY:
            found = StoredImages(folder, choice, num_workers)
    elif path is not None and path.suffix in BY_ROWS and (in_memory is False or _size_of_file(path) > IN_MEMORY):
        choice.refuse(f"a {path.suffix} file", "size", "gray", "crop")
        choice.refuse(f"a {path.suffix} file that is read by rows (in_memory=True reads it as a whole)", "kinds")
        found = _stored_file(path, choice, in_memory is None)
    elif isinstance(source, IterableDataset):
        found = StoredStream(source, num_workers)
    elif _is_dataset(source) and (in_memory is False or _size_of(source) > IN_MEMORY):
        found = StoredDataset(source, num_workers)
    if isinstance(found, StoredDataset | StoredStream):
        choice.refuse(*OF_DATASETS)
    if found is None and in_memory is False:
        raise ValueError(
            f"in_memory=False is for {', '.join(BY_ROWS)} files, folders of images and torch datasets: leave it out"
        )
    return found


def _size_of_file(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def arrays_of(source: Any, choice: Choice) -> Arrays:
    """The arrays of a path, an array, a frame or a dataset."""
    if isinstance(source, str | os.PathLike):
        return _arrays_of_path(Path(source).expanduser(), choice)
    choice.refuse(f"a {type(source).__name__}", "size", "gray", "crop")
    if type(source).__module__.startswith("pandas"):
        return _arrays_of_frame(source.to_frame() if source.ndim == 1 else source, "the frame", choice, first=None)
    if hasattr(source, "column_names") and hasattr(source, "to_pandas"):
        return _arrays_of_hugging_face(source, choice)
    if isinstance(source, (dict, IterableDataset)):
        what = f"the parts {', '.join(map(str, source))}" if isinstance(source, dict) else "no length and no index"
        raise TypeError(
            f"source is a {type(source).__name__} with {what}: pass a path, an array, a frame or a dataset with a "
            "length"
        )
    if _is_dataset(source):
        return _arrays_of_dataset(source, choice)
    choice.refuse("an array", "columns", "kinds")
    return Arrays(_images_first(_checked_numbers(np.array(source), "source")), *_label_and_given(choice))


def _label_and_given(choice: Choice) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Labels and ``given`` for an array: both are arrays themselves."""
    label = None if choice.label is None else np.array(choice.label)  # copies: torch takes no array that is read-only
    return label, None if choice.given is None else _checked_numbers(np.array(choice.given), "given")


def _arrays_of_path(path: Path, choice: Choice) -> Arrays:
    if path.is_dir():
        choice.refuse(*OF_FOLDERS)
        return _arrays_of_folder(_Folder.of(path), choice)
    choice.refuse(f"a {path.suffix} file", "size", "gray", "crop")
    if path.suffix in TABLES:
        return _arrays_of_frame(_read_table(path), str(path), choice, first=None if path.suffix == ".parquet" else 2)
    choice.refuse(f"a {path.suffix} file", "columns", "kinds")
    if path.suffix == ".npy":
        _refuse_names(choice)
        return Arrays(
            _images_first(_checked_numbers(np.array(_mapped_array(path)), str(path))), *_label_and_given(choice)
        )
    if path.suffix == ".npz":
        return _arrays_of_archive(path, choice)
    kinds = ", ".join((".npy", ".npz", *TABLES))
    raise ValueError(f"{path} has an unknown kind: pass a file that ends in {kinds}, or a folder of images")


# -- arrays ------------------------------------------------------------------------------------------------------------


def _mapped_array(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")  # allocates nothing for the size that the header claims
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not an array ({error}): write one with numpy.save") from error


def _refuse_names(choice: Choice) -> None:
    """Raise if another array of a .npy file, which holds one array, is requested by name."""
    for role, named in {"label": choice.label, "given": choice.given}.items():
        if isinstance(named, str) or (role == "given" and np.asarray(named).dtype.kind == "U"):
            raise ValueError(
                f"{role} is {named!r}, but a .npy file holds one array: pass {role} as an array, or write both to an "
                f".npz file, numpy.savez(file, x=..., {'y' if role == 'label' else role}=...)"
            )


def _arrays_of_archive(path: Path, choice: Choice) -> Arrays:
    with _one_error_for_npz(path), np.load(path, allow_pickle=False) as archive:
        names = _array_names(archive.files, choice)
        parts = {role: archive[name] for role, name in names.items()}
    given = _checked_numbers(parts["given"], f"'given' in {path}") if "given" in parts else None
    x = _checked_numbers(parts["x"], f"{names['x']!r} in {path}")
    return Arrays(_images_first(x), label=parts.get("label"), given=given)


@contextlib.contextmanager
def _one_error_for_npz(path: Path) -> Iterator[None]:
    """Turn all errors from a damaged .npz file into one that names it."""
    try:
        yield
    except UNREADABLE as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise ValueError(f"{path} cannot be read as an .npz file of arrays: {reason}") from error


def _array_names(names: Sequence[str], choice: Choice) -> dict[str, str]:
    """Names of the arrays in an .npz file that serve as "x", and as "label" and "given" if there are such."""
    name = names[0] if len(names) == 1 else next((name for name in DATA_NAMES if name in names), None)
    if name is None:
        raise KeyError(f"it holds {', '.join(names)}: name the array of the data 'x'")
    found = next((each for each in LABEL_NAMES if each in names and each != name), None)
    condition = "given" if "given" in names else None
    wanted = {
        "x": name,
        "label": choice.label or found,
        "given": condition if choice.given is None else _as_names(choice.given)[0],
    }
    lacking = [key for key in wanted.values() if key is not None and key not in names]
    if lacking:
        raise KeyError(f"it holds {', '.join(names)}, but no {lacking[0]!r}")
    return {role: key for role, key in wanted.items() if key is not None}


def _checked_numbers(array: np.ndarray, origin: str) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{origin} has dtype {array.dtype}: pass an array of numbers")
    if not array.size or not array.ndim:
        raise ValueError(f"{origin} is empty: it has shape {array.shape}")
    # torch reads neither foreign byte orders nor floats of more than 64 bits.
    native = np.dtype(np.float64) if array.dtype.kind == "f" and array.itemsize > 8 else array.dtype.newbyteorder("=")
    return array.astype(native, order="C", copy=False)


def _images_first(x: np.ndarray) -> np.ndarray:
    """Rows of features, or images with their channels first."""
    if x.ndim == 1 or (x.dtype == np.uint8 and x.ndim == 3):
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3, 4) and x.shape[3] in (1, 3, 4):
        x = np.moveaxis(x, 3, 1)
    return x


# -- tables ------------------------------------------------------------------------------------------------------------


def _optional_import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name.split('.')[0]} is needed to read this: pip install 'dgm_pyro[data]'") from error


def _read_table(path: Path) -> Any:
    pandas = _optional_import("pandas")
    try:
        if path.suffix == ".parquet":
            return pandas.read_parquet(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pandas.errors.DtypeWarning)
            return pandas.read_csv(path, sep=_checked_separator(path), skipinitialspace=True)
    except (ValueError, OSError, csv.Error) as error:
        if isinstance(error, PermissionError) or str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} cannot be read as a table: {error}") from error


def columns_of(path: Path) -> tuple[str, ...]:
    """Names of the columns of a table."""
    return tuple(map(str, _read_table(path).columns))


def _checked_separator(path: Path) -> str:
    """The separator of a table; an error where a line has more or fewer values than the header."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = file.readline()
        separator = "\t" if path.suffix == ".tsv" else next((each for each in ",;\t" if each in header), ",")
        file.seek(0)
        lines = csv.reader(file, delimiter=separator, skipinitialspace=True)
        names = next(lines, [])
        if not names:
            raise ValueError(f"{path} is empty: its first line must name the columns")
        if all(_is_number(name) for name in names):
            raise ValueError(f"{path} has no header: its first line must name the columns, but holds {names[0]!r}")
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"{path} has two columns named {twice[0]!r}: rename one")
        for values in lines:
            if values and len(values) != len(names):
                raise ValueError(
                    f"{path}, line {lines.line_num}: there are {len(values)} values, but {len(names)} columns: correct "
                    "the line"
                )
    return separator


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _arrays_of_frame(frame: Any, origin: str, choice: Choice, first: int | None, part: bool = False) -> Arrays:
    """The columns of a frame.

    Args:
        first: line number of its first row in the file; None where rows have no lines.
        part: whether there are further rows, in which a column that is empty here may have values.
    """
    frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
    if not len(frame):
        raise ValueError(f"{origin} holds no rows")
    given = () if choice.given is None else _as_names(choice.given)
    label = () if choice.label is None else (choice.label,)
    others = [name for name in frame.columns if name not in (*given, *label)]
    columns = others if choice.columns is None else _as_names(choice.columns)
    for role, names in {"columns": columns, "given": given, "label": label}.items():
        for name in names:
            if name not in frame.columns:
                raise ValueError(f"{role} names {name!r}, but {origin} has the columns {', '.join(frame.columns)}")
    twice = [name for name, count in Counter([*columns, *given, *label]).items() if count > 1]
    if twice:
        raise ValueError(f"columns, given and label name {twice[0]!r} twice: leave one out")
    if not columns:
        raise ValueError(
            f"no columns of {origin} are left for x: it has {', '.join(frame.columns)}; name fewer as label and given"
        )

    empty = [name for name in [*columns, *given] if not part and frame[name].isna().all()]
    if empty:
        raise ValueError(f"column {empty[0]!r} of {origin} is empty: leave it out by columns (--columns)")

    def values(names: Sequence[str]) -> np.ndarray:
        return np.stack([_column(frame[name], name, origin, first) for name in names], axis=1)

    conditions = values(given) if given else None
    if conditions is not None and np.isnan(conditions).any():
        row, column = np.argwhere(np.isnan(conditions))[0]
        raise ValueError(
            f"{_line_of(origin, frame.index[row], first)}, column {given[column]!r} is empty, but a given must not "
            "miss values: fill it in"
        )
    kinds = None if choice.kinds is None else _kinds_of_columns(frame[[*columns]], choice, origin)
    x = (
        values(columns)
        if kinds is None
        else np.stack([_column_of_kind(frame[name], name, kind, origin, first) for name, kind in kinds.items()], axis=1)
    )
    return Arrays(
        x=x,
        label=_labels_of_column(frame[label[0]]) if label else None,
        given=conditions,
        columns=tuple(columns),
        given_columns=tuple(given) or None,
        kinds=kinds,
    )


def _kinds_of_columns(frame: Any, choice: Choice, origin: str) -> dict[str, Kind]:
    """The kind of each column, as requested or as guessed from its values, with its words or bounds."""
    choice.refuse("columns of mixed kinds", "levels")
    asked = {} if choice.kinds == "auto" else choice.kinds
    if not isinstance(asked, Mapping):
        raise TypeError(f"kinds must be 'auto' or a mapping of columns to kinds, got {asked!r}")
    foreign = [name for name in asked if name not in frame.columns]
    if foreign:
        raise ValueError(f"kinds names {foreign[0]!r}, but the data have the columns {', '.join(frame.columns)}")
    return {name: _kind_of_column(frame[name], name, asked.get(name), origin) for name in frame.columns}


def _kind_of_column(series: Any, name: str, asked: Any, origin: str) -> Kind:
    if not isinstance(asked, str | Sequence | None):
        raise TypeError(f"kinds[{name!r}] must be a kind, or a kind and its words or bounds, got {asked!r}")
    kind, *values = (asked,) if isinstance(asked, str) else asked or (_guess_kind(series),)
    wanted = KINDS.get(kind)
    if wanted is None:
        raise ValueError(f"kinds[{name!r}] must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind in WITH_WORDS:
        words = [str(word) for word in values] or _category_words(series)
        if len(set(words)) < len(words):
            raise ValueError(f"kinds[{name!r}] must have different words, got {', '.join(words)}")
        if not 2 <= len(words) <= MOST_WORDS:
            raise ValueError(
                f"column {name!r} of {origin} has {len(words)} different values, but a {kind} has 2 to {MOST_WORDS}: "
                "leave it out by columns (--columns), or choose another kind (--kinds)"
            )
        return kind, *words
    if kind == "integer" and not values:
        values = [series.min(), series.max()]
    try:
        bounds = [float(value) for value in values]
    except (TypeError, ValueError):
        bounds = []
    if len(bounds) != wanted or len(values) != wanted:
        example = f"{name}={kind}:0:1" if wanted else f"{name}={kind}"
        raise ValueError(
            f"kinds[{name!r}] is {kind}, which takes {wanted or 'no'} bounds, got {values}: write {example}"
        )
    if wanted and not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"kinds[{name!r}] must have finite bounds in ascending order, got {bounds}")
    return kind, *(int(bound) if kind == "integer" and bound == int(bound) else bound for bound in bounds)


WITH_WORDS = ("category", "ordinal")
"""Kinds of columns whose values are words; x holds their indices."""

KINDS = {"real": 0, "positive": 0, "count": 0, "bounded": 2, "integer": 2, "category": 0, "ordinal": 0}
"""Number of bounds of each kind of column."""


def _guess_kind(series: Any) -> str:
    """The kind of a column by its values: category (text, booleans), count or integer (whole numbers), or real."""
    pandas = _optional_import("pandas")
    if not pandas.api.types.is_numeric_dtype(series) or pandas.api.types.is_bool_dtype(series):
        return "category"
    known = series.dropna()
    # An integer column that misses values is read as one of floats.
    if pandas.api.types.is_integer_dtype(series) or (len(known) < len(series) and (known == known.round()).all()):
        return "count" if known.min() >= 0 else "integer"
    return "real"


def _category_word(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _category_words(series: Any) -> list[str]:
    if getattr(series.dtype, "ordered", False):
        return [_category_word(value) for value in series.cat.categories]
    known = series.dropna()
    return [
        _category_word(value)
        for value in sorted(set(known.tolist()), key=lambda value: (isinstance(value, str), value))
    ]


def _column_of_kind(series: Any, name: str, kind: Kind, origin: str, first: int | None) -> np.ndarray:
    """One column as doubles: the indices of words; NaN where it is empty."""
    label, *values = kind
    if label in WITH_WORDS:
        codes = {word: code for code, word in enumerate(values)}
        array = np.array([np.nan if empty else codes.get(_category_word(value), -1.0)
                          for value, empty in zip(series.tolist(), series.isna(), strict=True)])  # fmt: skip
        wrong, wanted = array == -1, f"none of its words {', '.join(values)}"
    else:
        array = _column(series, name, origin, first)
        low, high = values or (0.0 if label in ("positive", "count") else -np.inf, np.inf)
        closed = label in ("integer", "count")
        inside = (
            (low <= array) & (array <= high) & (array == array.round()) if closed else (low < array) & (array < high)
        )
        wrong, wanted = ~inside & ~np.isnan(array), f"outside of the kind {':'.join(map(str, kind))}"
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{_line_of(origin, series.index[row], first)}, column {name!r} holds {str(series.iloc[row])!r}, which is "
            f"{wanted}: correct it, or train with another kind (--kinds of dgm train)"
        )
    return array


def _labels_of_column(series: Any) -> np.ndarray:
    array: np.ndarray = series.astype(object).where(series.notna(), None).to_numpy()
    return array


def _as_names(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _line_of(origin: str, row: Any, first: int | None) -> str:
    return f"{origin}, row {row}" if first is None else f"{origin}, line {row + first}"


def _column(series: Any, name: str, origin: str, first: int | None) -> np.ndarray:
    """One column as doubles; NaN where it is empty."""
    pandas = _optional_import("pandas")
    if series.dtype.kind in "cmM":  # of complex numbers, durations and dates
        raise ValueError(
            f"column {name!r} of {origin} holds {series.dtype}: turn it into real numbers, or leave it out by columns "
            "(--columns)"
        )
    numbers = series if pandas.api.types.is_numeric_dtype(series) else pandas.to_numeric(series, errors="coerce")
    array: np.ndarray = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = np.isnan(array) & series.notna().to_numpy() | np.isinf(array)
    if wrong.any():
        row = int(wrong.argmax())
        what = "is infinite" if np.isinf(array[row]) else f"holds {str(series.iloc[row])!r}, which is not a number"
        raise ValueError(
            f"{_line_of(origin, series.index[row], first)}, column {name!r} {what}: correct it, leave the column out "
            "by columns (--columns), or read text as a category by kinds (--kinds auto); labels (--label) may be text"
        )
    return array


# -- images ------------------------------------------------------------------------------------------------------------


OF_FOLDERS = ("a folder of images", "label", "given", "columns", "kinds")
"""A kind of source, and the options that it refuses."""


@dataclass(frozen=True)
class _Folder:
    """Files of images, the names of their classes, and the class of each file; None without class folders."""

    files: list[Path]
    classes: tuple[str, ...]
    label: np.ndarray | None

    @classmethod
    def of(cls, folder: Path) -> _Folder:
        files = _images_in(folder)
        of_class = {each.name: _images_in(each) for each in sorted(folder.iterdir()) if each.is_dir()}
        of_class = {name: each for name, each in of_class.items() if each}
        if files and of_class:
            raise ValueError(
                f"{folder} holds both images and folders of images: keep one folder of images per class, or no folders"
            )
        if not files and not of_class:
            raise ValueError(
                f"{folder} holds no images: put files ({', '.join(IMAGES)}) into it, or into one folder per class"
            )
        if not of_class:
            return cls(files, (), None)
        label = np.repeat(np.array([*of_class]), [len(each) for each in of_class.values()])
        return cls([*itertools.chain.from_iterable(of_class.values())], tuple(of_class), label)


def image_files(folder: Path) -> list[str]:
    """The files of a folder of images in the order of the data, relative to it."""
    return [str(file.relative_to(folder)) for file in _Folder.of(folder).files]


def _arrays_of_folder(folder: _Folder, choice: Choice) -> Arrays:
    return _quantized_images(pictures(folder.files, choice), folder.label, choice)


def _quantized_images(x: np.ndarray, label: np.ndarray | None, choice: Choice) -> Arrays:
    """Images of bytes, rounded down to the chosen number of levels."""
    levels = 256 if choice.levels is None else choice.levels
    if levels > 256:
        raise ValueError(f"levels (--levels) is {levels}, but images of bytes have 256: choose no more")
    return Arrays((x.astype(np.int64) * levels // 256).astype(np.uint8), label, levels=levels)


def pictures(files: Sequence[Path], choice: Choice) -> np.ndarray:
    """Images of bytes ``(N, C, H, W)``."""
    if choice.gray is not None and choice.size is not None:  # one after the other, in the memory of the result
        each = (_pixels(_read_picture(file)[0], choice.gray, choice) for file in files)
        first = next(each)
        x = np.empty((len(files), *first.shape), np.uint8)
        for i, pixels in enumerate(itertools.chain([first], each)):
            x[i] = pixels
        return x
    opened = [_read_picture(file) for file in files]
    gray = all(mode == "L" for _, mode in opened) if choice.gray is None else choice.gray
    if choice.size is None and choice.crop is None:
        _check_sizes(files, [picture.size for picture, _ in opened])
    return np.stack([_pixels(picture, gray, choice) for picture, _ in opened])


def _check_sizes(files: Sequence[Path], sizes: Sequence[tuple[int, int]]) -> None:
    other = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        (width, height), (w, h) = sizes[0], sizes[other]
        raise ValueError(
            f"{files[0]} has {width} x {height} pixels, but {files[other]} has {w} x {h}: pass size (--size) to crop "
            "and scale all images to one size"
        )


def _images_in(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.suffix.lower() in IMAGES and each.is_file())


def _read_picture(file: Path) -> tuple[Any, str]:
    """An image of bytes, and its mode: gray ("L") or color ("RGB")."""
    with _open_picture(file) as image:
        image.load()
        kind = _kind_of(image)
        return image.convert(kind), kind


@contextlib.contextmanager
def _open_picture(file: Path) -> Iterator[Any]:
    """Open an image and read its header. All errors from a damaged file become one that names it."""
    images = _optional_import("PIL.Image")
    try:
        with warnings.catch_warnings(), images.open(file) as image:
            warnings.simplefilter("error", images.DecompressionBombWarning)
            yield image
    except (OSError, SyntaxError, ValueError, images.DecompressionBombError, images.DecompressionBombWarning) as error:
        raise ValueError(f"{file} cannot be read as an image ({error}): copy it again, or remove it") from error


def _kind_of(image: Any) -> str:
    """The mode of an image: gray ("L") or color ("RGB")."""
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        raise ValueError(f"it has pixels of mode {mode}, not bytes")
    return "L" if mode in ("1", "L", "LA") else "RGB"


def _pixels(picture: Any, gray: bool, choice: Choice) -> np.ndarray:
    """``(C, H, W)`` bytes, cropped around the center and scaled to the size that was chosen, (height, width)."""
    picture, size = picture.convert("L" if gray else "RGB"), choice.size
    if choice.crop is not None:
        left, top = ((side - choice.crop) // 2 for side in picture.size)
        if min(left, top) < 0:
            raise ValueError(
                f"crop is {choice.crop}, but an image has {picture.size[0]} x {picture.size[1]} pixels: pass a smaller "
                "crop (--crop)"
            )
        picture = picture.crop((left, top, left + choice.crop, top + choice.crop))
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        picture = _optional_import("PIL.ImageOps").fit(picture, (width, height))
    pixels = np.asarray(picture)
    return pixels[None] if gray else np.moveaxis(pixels, 2, 0)


def png(image: np.ndarray, levels: int) -> bytes:
    """The PNG file of an image ``(C, H, W)`` of integers 0 .. levels - 1."""
    file = io.BytesIO()
    pixels = (image.astype(np.int64) * 255 // (levels - 1)).astype(np.uint8)
    pixels = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2)
    _optional_import("PIL.Image").fromarray(pixels).save(file, "png")
    return file.getvalue()


# -- datasets ----------------------------------------------------------------------------------------------------------


def _arrays_of_hugging_face(source: Any, choice: Choice) -> Arrays:
    features = getattr(source, "features", None) or {}
    names = list(source.column_names)
    image = next((name for name in names if hasattr(source[0][name], "convert")), None)
    names_of = {name: getattr(features.get(name), "names", None) for name in names}
    if image is None:
        found = _arrays_of_frame(source.to_pandas(), "the dataset", choice, first=None)
        classes = names_of.get(choice.label)
    else:
        choice.refuse("a dataset of images", "given", "columns", "kinds")
        label = choice.label or next((name for name in LABEL_NAMES if name in names), None)
        rows = [source[i] for i in range(len(source))]
        stacked = _stack_rows([row[image] for row in rows])
        labels = None if label is None else np.array([row[label] for row in rows])
        found, classes = Arrays(_images_first(stacked), label=labels), names_of.get(label)
    return replace(found, classes=None if classes is None else tuple(classes))


def _arrays_of_dataset(source: Any, choice: Choice) -> Arrays:
    """A map-style `torch.utils.data.Dataset` of x or of pairs of x and a label, such as torchvision's."""
    choice.refuse(*OF_DATASETS)
    if not len(source):
        raise ValueError("source is empty: its length is 0")
    return _arrays_of_items([source[i] for i in range(len(source))], _classes_of(source))


OF_DATASETS = ("a torch Dataset, whose items have their labels", "label", "given", "columns", "kinds")
"""A kind of source, and the options that it refuses."""


def _is_dataset(source: Any) -> bool:
    return (
        all(hasattr(source, name) for name in ("__getitem__", "__len__"))
        and not any(hasattr(source, name) for name in ("__array__", "to_pandas"))
        and not isinstance(source, dict | str)
        and not type(source).__module__.startswith("pandas")
        and not _is_nested_numbers(source)
    )


def _is_nested_numbers(source: Any) -> bool:
    """Whether the source is an array written as lists: the first of them begins with a number."""
    first = source
    while isinstance(first, list | tuple) and first:
        first = first[0]
    return isinstance(source, list | tuple) and isinstance(first, numbers.Number)


def _size_of(dataset: Any) -> int:
    """Bytes of all data, if every datum has the size of the first."""
    return len(dataset) * _stack_rows([_x_and_label(dataset[0])[0]]).nbytes if len(dataset) else 0


def _classes_of(dataset: Any) -> tuple[str, ...] | None:
    classes = getattr(dataset, "classes", None)
    return None if classes is None else tuple(map(str, classes))


def _x_and_label(item: Any) -> tuple[Any, Any]:
    """x and the label of an item, None where it has none."""
    if not isinstance(item, tuple | list):
        return item, None
    return item[0], item[1] if len(item) > 1 else None


def _arrays_of_items(items: Sequence[Any], classes: tuple[str, ...] | None) -> Arrays:
    x, labels = zip(*map(_x_and_label, items), strict=True)
    label = None if labels[0] is None else np.array([int(each) for each in labels])
    return Arrays(_images_first(_stack_rows(x)), label=label, classes=classes)


def _stack_rows(rows: Sequence[Any]) -> np.ndarray:
    arrays = [np.asarray(row) for row in rows]
    if hasattr(rows[0], "convert"):  # Pillow's images have their channels last, whatever their shape suggests
        arrays = [array if array.ndim == 2 else np.moveaxis(array, 2, 0) for array in arrays]
    other = next((i for i, array in enumerate(arrays) if array.shape != arrays[0].shape), None)
    if other is not None:
        raise ValueError(
            f"datum 0 of source has shape {arrays[0].shape}, but datum {other} has {arrays[other].shape}: transform "
            "all to one shape"
        )
    return _checked_numbers(np.stack(arrays), "source")


# -- sources that are read by rows -------------------------------------------------------------------------------------


class _Rows:
    """The rows of an array that begins at ``offset`` of a file, indexed by ascending positions.

    They are read into new memory: the pages of a memory map would count as this process's memory.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], in_columns: bool, dtype: np.dtype, offset: int):
        if in_columns:
            raise ValueError(
                f"{path} is in Fortran order, so its rows are not contiguous: save numpy.ascontiguousarray of it"
            )
        self.path, self.shape, self.dtype, self.offset = path, shape, dtype, offset
        self.bytes = dtype.itemsize * math.prod(shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        x = np.empty((len(rows), *self.shape[1:]), self.dtype)
        cuts = np.flatnonzero(np.diff(rows) > 1 + GAP // self.bytes) + 1
        with self.path.open("rb") as file:
            for start, stop in itertools.pairwise([0, *cuts, len(rows)]):
                first, last = rows[start], rows[stop - 1]
                whole = last - first == stop - 1 - start
                span = x[start:stop] if whole else np.empty((last - first + 1, *self.shape[1:]), self.dtype)
                file.seek(self.offset + int(first) * self.bytes)
                if file.readinto(span.reshape(-1).view(np.uint8).data) < span.nbytes:
                    raise ValueError(f"{self.path} ends before its row {last}: it was truncated during reading")
                if not whole:
                    x[start:stop] = span[rows[start:stop] - first]
        return x

    def values(self) -> np.ndarray:
        """The distinct values.

        Raises:
            ValueError: rows have more than one value.
        """
        if len(self.shape) != 1:
            raise ValueError(f"the labels in {self.path} have shape {self.shape}: write one label per row")
        parts = [np.arange(start, min(start + CHUNK, len(self))) for start in range(0, len(self), CHUNK)]
        return np.unique(np.concatenate([np.unique(self[rows]) for rows in parts]))


def npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an array, from the header of its .npy file."""
    version = np.lib.format.read_magic(file)
    header: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    found: tuple[tuple[int, ...], bool, np.dtype] = header[version](file)
    return found


def _array_of_npz(path: Path, name: str) -> _Rows | None:
    """An array of an .npz file; None where it is compressed, so that its rows cannot be read one by one."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        file.seek(info.header_offset + 26)  # of the lengths of its name and of what else its header holds
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        header = npy_header(file)
        return _Rows(path, *header, file.tell())


def _stored_file(path: Path, choice: Choice, may_be_whole: bool) -> Stored | None:
    """A file that is read by rows; None for a compressed one, if it may be read as a whole."""
    if path.suffix == ".parquet":
        return StoredTable(path, choice)
    choice.refuse(f"a {path.suffix} file", "columns")
    if path.suffix == ".npy":
        _refuse_names(choice)
        mapped: Any = _mapped_array(path)
        in_columns = not mapped.flags.c_contiguous
        return StoredArray(
            _Rows(path, mapped.shape, in_columns, mapped.dtype, mapped.offset), *_label_and_given(choice)
        )
    with _one_error_for_npz(path):
        with zipfile.ZipFile(path) as archive:
            names = [each.removesuffix(".npy") for each in archive.namelist()]
        parts = {role: _array_of_npz(path, name) for role, name in _array_names(names, choice).items()}
    found: dict[str, _Rows] = {role: rows for role, rows in parts.items() if rows is not None}
    if len(found) == len(parts):
        return StoredArray(**found)
    if may_be_whole:
        return None
    raise ValueError(
        f"{path} is compressed, so it cannot be read by rows: write it by numpy.savez, or leave in_memory out"
    )


class StoredArray(Stored):
    """Rows of an array in a .npy or an uncompressed .npz file, with those of its labels and its given."""

    blocks = True

    def __init__(self, x: _Rows, label: _Rows | np.ndarray | None = None, given: _Rows | np.ndarray | None = None):
        self.x, self.label, self.given = x, label, given
        _checked_numbers(x[np.arange(min(1, len(x)))], str(x.path))
        for role, part in {"label": label, "given": given}.items():
            if part is not None and len(part) != len(x):
                raise ValueError(f"{role} has {len(part)} rows, but {x.path} has {len(x)}: pass one per row")
        self.label_values = label.values() if isinstance(label, _Rows) else label

    def __len__(self) -> int:
        return len(self.x)

    def read(self, rows: np.ndarray) -> Arrays:
        path = self.x.path
        return Arrays(
            _images_first(_checked_numbers(self.x[rows], str(path))),
            label=None if self.label is None else self.label[rows],
            given=None if self.given is None else _checked_numbers(self.given[rows], f"given of {path}"),
        )


class StoredTable(Stored):
    """A .parquet file, whose groups of rows are read one by one."""

    blocks = True

    def __init__(self, path: Path, choice: Choice):
        self.path, self.choice = path, choice
        try:
            self.file = _optional_import("pyarrow.parquet").ParquetFile(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a table: {error}") from error
        if not self.file.metadata.num_rows:
            raise ValueError(f"{path} holds no rows")
        groups = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.starts = np.cumsum([0, *groups])
        first = self.read(np.arange(1))
        self.columns, self.given_columns = first.columns, first.given_columns
        if choice.label is not None:
            values = [_labels_of_column(each.drop_duplicates()) for each in self._column(choice.label)]
            self.label_values = np.concatenate(values)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _column(self, name: str) -> Iterator[Any]:
        """One column, group by group."""
        for i in range(self.file.num_row_groups):
            yield self.file.read_row_group(i, columns=[name]).to_pandas()[name]

    def read(self, rows: np.ndarray) -> Arrays:
        groups = np.searchsorted(self.starts, rows, "right") - 1
        frames = [
            self.file.read_row_group(int(i)).to_pandas().iloc[rows[groups == i] - self.starts[i]]
            for i in np.unique(groups)
        ]
        frame = _optional_import("pandas").concat(frames).set_axis(rows)
        return _arrays_of_frame(frame, str(self.path), self.choice, first=None, part=True)


class StoredDataset(Stored):
    """A map-style `torch.utils.data.Dataset`, read by ``num_workers`` processes."""

    def __init__(self, dataset: Any, num_workers: int):
        if not len(dataset):
            raise ValueError("source is empty: its length is 0")
        self.dataset, self.num_workers, self.classes = dataset, num_workers, _classes_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, rows: np.ndarray) -> Arrays:
        return _arrays_of_items([self.dataset[int(row)] for row in rows], self.classes)

    def ahead(
        self,
        parts: Iterable[np.ndarray],
        make: Callable[[np.ndarray, Arrays], Made],
        random: torch.Generator | None,
    ) -> Iterator[Made]:
        if self.num_workers:
            return super().ahead(parts, make, random)
        return (make(rows, self.read(rows)) for rows in parts)  # in this thread: a dataset need not be thread-safe


class StoredImages(Stored):
    """A folder of images, whose files are decoded when their rows are read.

    A size or number of channels that is not chosen is read from the headers of all files.
    """

    def __init__(self, folder: _Folder, choice: Choice, num_workers: int):
        self.files, self.label, self.num_workers = folder.files, folder.label, num_workers
        self.classes = folder.classes or None
        self.label_values = None if folder.label is None else np.array(folder.classes)
        sizes, gray = [], choice.gray
        if gray is None or (choice.size is None and choice.crop is None):
            kinds = []
            for file in self.files:
                with _open_picture(file) as image:
                    sizes.append(image.size)
                    kinds.append(_kind_of(image))
            gray = all(kind == "L" for kind in kinds) if gray is None else gray
        if choice.size is None and choice.crop is None:
            _check_sizes(self.files, sizes)
        self.choice = replace(choice, gray=gray)
        self.shape = _first_image(folder, self.choice).shape

    def __len__(self) -> int:
        return len(self.files)

    def read(self, rows: np.ndarray) -> Arrays:
        files = [self.files[row] for row in rows]
        x = pictures(files, self.choice)
        if x.shape[1:] != self.shape:
            raise ValueError(f"{files[0]} has another size than when its folder was opened: open the folder again")
        return _quantized_images(x, None if self.label is None else self.label[rows], self.choice)


def _first_image(folder: _Folder, choice: Choice) -> np.ndarray:
    return pictures(folder.files[:1], choice)[0]  # type: ignore[no-any-return]


class _RowParts:
    """The dataset that a worker reads: its items are the parts, indexed by their rows."""

    def __init__(self, source: Stored, make: Callable[[np.ndarray, Arrays], Any]):
        self.source, self.make = source, make

    def __getitem__(self, rows: np.ndarray) -> Any:
        return self.make(rows, self.source.read(rows))


class StoredStream(Stored):
    """An `IterableDataset` with a length, read from its start in each epoch."""

    ordered = True

    def __init__(self, stream: Any, num_workers: int):
        if not hasattr(stream, "__len__"):
            raise TypeError(f"source is a {type(stream).__name__} without a length: give it a __len__, the number of "
                            "data in an epoch")  # fmt: skip
        self.stream, self.num_workers, self.classes = stream, num_workers, _classes_of(stream)

    def __len__(self) -> int:
        return len(self.stream)

    def read(self, rows: np.ndarray) -> Arrays:
        return next(self.ahead([rows], lambda rows, arrays: arrays, None))

    def ahead(
        self,
        parts: Iterable[np.ndarray],
        make: Callable[[np.ndarray, Arrays], Made],
        random: torch.Generator | None,
    ) -> Iterator[Made]:
        items, place = iter(self.stream), 0
        if self.num_workers:
            items = itertools.chain.from_iterable(_loader(self.stream, self.num_workers, random, batch_size=64))
        for rows in parts:
            taken: list[Any] = []
            for row in rows:
                taken.extend(itertools.islice(items, int(row) - place, int(row) - place + 1))
                place = int(row) + 1
            if len(taken) < len(rows):
                raise ValueError(
                    f"source ended before its datum {rows[-1]}, but its length is {len(self)}: correct its __len__"
                )
            yield make(rows, _arrays_of_items(taken, self.classes))


def _loader(dataset: Any, num_workers: int, random: torch.Generator | None, **options: Any) -> Any:
    """A DataLoader that does not change the global random state."""
    random = random or torch.Generator()
    return DataLoader(dataset, num_workers=num_workers, collate_fn=_identity, generator=random, **options)


def _identity(items: Any) -> Any:
    return items
