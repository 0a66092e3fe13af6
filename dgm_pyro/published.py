"""Images in the layouts that they are published in: CIFAR-10, SVHN, down-sampled ImageNet, CelebA.

Each function returns images of bytes ``(N, C, H, W)`` and labels from 0. `dgm.data.load` finds the files.

CIFAR-10 comes as pickles, which may name any function to call. Here they may name none: two classes of this module,
which hold bytes and a shape, replace numpy's arrays.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dgm_pyro.sources import UNREADABLE, npy_header

Images = tuple[np.ndarray, np.ndarray]

CIFAR_10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PIXELS = 3 * 32 * 32
LARGEST_BATCH = 2**26
"""Bytes of the largest file of CIFAR-10."""


def cifar_10(paths: Sequence[Path]) -> Images:
    """Batches of CIFAR-10, as pickles of Python or as binary files, ``.bin``.

    Raises:
        ValueError: a file is damaged, or is no such batch.
    """
    x, y = zip(*map(_cifar_batch, paths), strict=True)
    return np.concatenate(x), np.concatenate(y)


def _cifar_batch(path: Path) -> Images:
    try:
        if path.stat().st_size > LARGEST_BATCH:
            raise ValueError(f"it has more than {LARGEST_BATCH:,} bytes")
        pixels, labels = _rows_of_bytes(path) if path.suffix == ".bin" else _images_of_pickle(path)
        if pixels.shape != (len(labels), PIXELS) or not ((labels >= 0) & (labels < len(CIFAR_10))).all():
            raise ValueError(f"it has images of shape {pixels.shape} and {len(labels)} labels")
    except (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, TypeError, ValueError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise ValueError(f"{path} is not a batch of CIFAR-10 ({error}): copy it again") from error
    return pixels.reshape(-1, 3, 32, 32), labels


def _rows_of_bytes(path: Path) -> Images:
    rows = np.fromfile(path, np.uint8).reshape(-1, 1 + PIXELS)
    return rows[:, 1:], rows[:, 0].astype(np.int64)


def _images_of_pickle(path: Path) -> Images:
    with path.open("rb") as file:
        content = _Unpickler(file, encoding="bytes").load()
    found = {os.fsdecode(key): value for key, value in content.items()}  # bytes if Python 2 wrote them
    pixels = found["data"]
    return pixels.array() if isinstance(pixels, _Array) else np.array(pixels), np.array(found["labels"], np.int64)


class _Array:
    """Replaces a numpy array of bytes in a pickle."""

    def __init__(self, *_: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, in_columns, content = self.state
        if not isinstance(dtype, _Dtype) or dtype.name not in ("u1", b"u1") or not isinstance(content, bytes):
            raise ValueError("its images are not bytes")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if in_columns else "C").copy()


class _Dtype:
    """Replaces a numpy dtype in a pickle."""

    def __init__(self, name: Any, *_: Any):
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Ignore the byte order, which bytes do not have."""


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Decode bytes that Python 3 pickled in the protocol of Python 2."""
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, texts and arrays of bytes; it never calls a function that a file names."""

    KNOWN: ClassVar = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("_codecs", "encode"): _encode_latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if name == "_frombuffer":
            raise pickle.UnpicklingError(
                "its arrays are pickled by protocol 5, but published batches have protocol 2, and only protocols up "
                "to 4 are read"
            )
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, but a published batch does not")
        return self.KNOWN[module, name]


def svhn(path: Path) -> Images:
    """Cropped digits of SVHN, a ``.mat`` file with X ``(32, 32, 3, N)`` and y, in which 10 is the digit 0.

    Raises:
        ValueError: the file is damaged, or is no such file.
    """
    # Imported here because it is slow to import, and few commands need it.
    from scipy.io import loadmat, whosmat
    from scipy.io.matlab import MatReadError

    try:
        _check_compressed(path)
        shapes = {name: (shape, kind) for name, shape, kind in whosmat(path)}
        shape, kind = shapes["X"]
        if shape[:3] != (32, 32, 3) or kind != "uint8" or shapes["y"][0] != (shape[3], 1):
            raise ValueError(f"it holds {shapes}")
        content = loadmat(path, variable_names=["X", "y"])
        x, y = content["X"].transpose(3, 2, 0, 1), content["y"][:, 0].astype(np.float64)
        _check_labels(y, range(1, 11))
    except (*UNREADABLE, MatReadError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a file of SVHN ({error}): copy it again") from error
    return np.ascontiguousarray(x), y.astype(np.int64) % 10


def _check_compressed(path: Path) -> None:
    """Raise unless all variables are compressed, as published: scipy's reader crashes on others that are damaged."""
    with path.open("rb") as file:
        file.seek(128)  # a text and the version; then the kind of each element, its size in bytes, itself
        while kind := file.read(4):
            if int.from_bytes(kind, "little") != 15:
                raise ValueError("it has variables that are not compressed, and would not show damage")
            file.seek(int.from_bytes(file.read(4), "little"), os.SEEK_CUR)


def _check_labels(y: np.ndarray, known: range) -> None:
    """Raise unless all labels are among the known ones."""
    foreign = y[~np.isin(y, known)]
    if len(foreign):
        raise ValueError(f"it has the label {foreign[0]}, but labels are {known[0]} to {known[-1]}")


def imagenet(paths: Sequence[Path], size: int, num_data: int | None, random: np.random.Generator) -> Images:
    """Down-sampled ImageNet, ``.npz`` files with ``data`` ``(N, 3 * size * size)`` and ``labels`` from 1.

    Args:
        num_data: number of random images; all by default. Only these are kept in memory.

    Raises:
        ValueError: a file is damaged or is no such file, or ``num_data`` is larger than the number of images.
    """
    counts = [_num_images(path, size) for path in paths]
    starts = np.cumsum([0, *counts])
    total = int(starts[-1])
    if num_data is not None and num_data > total:
        raise ValueError(f"num_data is {num_data}, but there are {total} images")
    rows = np.arange(total) if num_data is None else np.sort(random.permutation(total)[:num_data])
    x, y = np.empty((len(rows), 3, size, size), np.uint8), np.empty(len(rows), np.int64)
    for path, start, stop in zip(paths, starts[:-1], starts[1:], strict=True):
        places = slice(*np.searchsorted(rows, [start, stop]))
        if places.start == places.stop:
            continue
        try:
            with np.load(path, allow_pickle=False) as archive:
                x[places] = archive["data"][rows[places] - start].reshape(-1, 3, size, size)
                labels = archive["labels"]
                _check_labels(labels, range(1, 1001))
                y[places] = labels[rows[places] - start]
        except UNREADABLE as error:
            raise ValueError(f"{path} is damaged ({error}): copy it again") from error
    return x, y - 1


def _num_images(path: Path, size: int) -> int:
    """Number of images in a file, from its header alone."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("data.npy") as file:
            shape, _, dtype = npy_header(file)
        if shape[1:] != (3 * size * size,) or dtype != np.uint8:
            raise ValueError(f"its data have shape {shape} and dtype {dtype}")
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a file of ImageNet at {size}x{size} ({error}): copy it again") from error
    return int(shape[0])
