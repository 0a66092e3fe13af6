"""Data sets: tensors with their number of levels, which decides whether a result is a mass or a density.

`load` finds one by name. Integers stay integers in ``x``, because a mass on integers and a density on reals are numbers
of different units. Images are ``(1, H, W)``, points ``(D,)``.

>>> import dgm_pyro as dgm
>>> digits = dgm.data.load("digits")
>>> digits
Data('digits', x=(1437, 1, 8, 8) uint8 of 17 levels, y of 10 classes)
>>> train, valid = digits.split(0.1)
>>> len(train), len(valid), valid.measure
(1293, 144, 'mass')

Your own tensors: ``Data(x, y)`` for reals, ``Data(x, y, levels=2)`` for integers. `open` reads your own files.
"""

from __future__ import annotations

import copy
import functools
import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dgm_pyro.image_sets as image_sets
import dgm_pyro.sources as sources
from dgm_pyro.checks import (
    INTEGERS,
    check_count,
    check_dense,
    check_finite,
    check_labels,
    check_number,
    check_path,
    check_seed,
    find_device,
    generator,
)


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Data x, with labels y, other variables that are given, and a mask of what was observed, where there are any.

    Args:
        x: ``(N, *event_shape)``: integers 0 .. levels - 1 of an integer dtype, or finite reals.
        y: integer labels 0 .. num_classes - 1, ``(N,)``, kept as int64; -1 where one is unknown; None without labels.
        levels: how many integers a feature takes; None for reals.
        name: what reports call it.
        num_classes: how many labels there are; if left out, the largest in y and one more, and y must hold a 0.
        given: finite reals that p(x | given) is conditioned on, ``(N, *given_shape)``.
        mask: True where a feature was observed, of the shape of x. Where it is False, x may hold anything, NaN too, and
            is set to 0.
        columns, given_columns: names of the features of x, and of given, where they are columns of a table.
        classes: names of the labels.

    `torch.utils.data.DataLoader` makes batches of it: of x, or tuples of x and what else there is, in the order y,
    given, mask.

    Raises:
        TypeError: a tensor is none, or of a dtype that contradicts ``levels``.
        ValueError: a shape or a value does not fit; the message names it.

    >>> import torch, dgm_pyro as dgm
    >>> t = torch.rand(100, 1)
    >>> data = dgm.Data(torch.sin(t) + 0.1 * torch.randn(100, 1), given=t)
    >>> data
    Data('data', x=(100, 1) float32, given (1,))
    >>> program = dgm.Normal(1, lambda size: torch.nn.Linear(1, size))
    >>> history = dgm.fit(program, data, epochs=2, progress=False)  # of p(x | t)
    """

    x: Tensor
    y: Tensor | None = None
    levels: int | None = None
    name: str = "data"
    num_classes: int | None = None
    given: Tensor | None = field(default=None, kw_only=True)
    mask: Tensor | None = field(default=None, kw_only=True)
    columns: tuple[str, ...] | None = field(default=None, kw_only=True)
    given_columns: tuple[str, ...] | None = field(default=None, kw_only=True)
    classes: tuple[str, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_dense(self.x, "x")
        if self.mask is not None:
            _check_mask(self.mask, self.x)
            vars(self).update(x=self.x.masked_fill(~self.mask, 0))
        _check_x(self.x, self.levels)
        if self.given is not None:
            _check_given(self.given, len(self.x))
        _check_names(self.columns, "columns", self.x.shape[1:])
        _check_names(self.given_columns, "given_columns", () if self.given is None else self.given.shape[1:])
        _check_names(self.classes, "classes", (self.num_classes or len(self.classes or ()),))
        if self.y is None:
            if self.num_classes is not None:
                raise ValueError(f"num_classes is {self.num_classes}, but there are no labels y: pass both or neither")
            return
        _check_y(self.y, len(self.x))
        classes = int(self.y.max()) + 1
        if classes == 0 and self.num_classes is None:
            raise ValueError("y holds no known label: pass num_classes, or leave y out")
        lowest = int(self.y.masked_fill(self.y < 0, classes).min())
        if lowest > 0 and self.num_classes is None:
            raise ValueError(
                f"y holds labels from {lowest} to {classes - 1}, but labels count from 0: use y - {lowest}, or pass "
                f"num_classes={classes} if the classes below {lowest} only lack data"
            )
        if self.num_classes is not None:
            check_count(self.num_classes, "num_classes")
        if self.classes is not None and classes > len(self.classes):
            raise ValueError(f"y holds the label {classes - 1}, but classes has {len(self.classes)} names")
        if self.num_classes is not None and self.num_classes < classes:
            raise ValueError(f"y holds the label {classes - 1}, but num_classes is {self.num_classes}")
        vars(self).update(y=self.y.long(), num_classes=self.num_classes or classes)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one x."""
        return self.x.shape[1:]

    @property
    def measure(self) -> str:
        """``"mass"`` on integers or ``"density"`` on reals."""
        return "density" if self.levels is None else "mass"

    @property
    def misses(self) -> bool:
        """Whether features are missing."""
        return self.mask is not None and not bool(self.mask.all())

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that there are, by name: x, y, given, mask."""
        tensors = {"x": self.x, "y": self.y, "given": self.given, "mask": self.mask}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def digest(self) -> str:
        """A hash of all values in their order, 16 hexadecimal digits."""
        found = hashlib.sha256()
        for name, tensor in self.parts.items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {self.levels}".encode())
            found.update(tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Any) -> Data:
        """The subset at ``index``: a slice, a list, a tensor of positions or of booleans; an int gives one datum."""
        if isinstance(index, int):
            index = [index]
        try:
            return self.replaced(**{name: tensor[index] for name, tensor in self.parts.items()})
        except (IndexError, TypeError) as error:  # an IndexError, as it ends a loop over the data
            raise IndexError(f"index {index!r} does not fit {self!r}: {error}") from error

    def __getitems__(self, rows: Sequence[int]) -> Sequence[Tensor | tuple[Tensor, ...]]:
        """The data at ``rows`` one by one, as a DataLoader of torch reads them."""
        tensors = [tensor[rows] for tensor in self.parts.values()]
        return list(tensors[0]) if len(tensors) == 1 else list(zip(*tensors, strict=True))

    def split(self, fraction: float, seed: int = 0) -> tuple[Data, Data]:
        """Two disjoint random parts, the second with ``fraction`` of the data: ``train, valid = data.split(0.1)``.

        Raises:
            ValueError: ``fraction`` leaves one part empty.
        """
        check_number(fraction, "fraction")
        held_out = round(fraction * len(self)) if 0 < fraction < 1 else 0
        if not 0 < held_out < len(self):
            raise ValueError(
                f"fraction must be between 0 and 1 and leave data on both sides, got {fraction} for {len(self)} data"
            )
        order = torch.randperm(len(self), generator=generator(seed)).to(self.x.device)
        return self[order[held_out:]], self[order[:held_out]]

    def keep_labels(self, num_labels: int, seed: int = 0) -> Data:
        """The same data with ``num_labels`` labels, as many of each class as of any other, and -1 for the rest.

        If it is not a multiple of `num_classes`, random classes keep one more. For semi-supervised learning.

        Raises:
            ValueError: there are no labels, or a class has fewer than it would keep.
        """
        if self.y is None or self.num_classes is None:
            raise ValueError(f"{self!r} has no labels to keep")
        check_count(num_labels, "num_labels")
        random = generator(seed)
        ranks = torch.randperm(self.num_classes, generator=random).tolist()
        y = torch.full_like(self.y, -1)
        for label, rank in enumerate(ranks):
            share = num_labels // self.num_classes + (rank < num_labels % self.num_classes)
            rows = (self.y == label).nonzero()[:, 0]
            if share > len(rows):
                raise ValueError(
                    f"{num_labels} labels are {share} of class {label}, but {self.name} has {len(rows)} of it: "
                    "keep fewer"
                )
            y[rows[torch.randperm(len(rows), generator=random)[:share]]] = label
        return self.replaced(y=y)

    def to(self, device: str | torch.device) -> Data:
        """The same data on ``device``."""
        where = device if isinstance(device, torch.device) else find_device(device)
        return self.replaced(**{name: tensor.to(where) for name, tensor in self.parts.items()})

    def replaced(self, **parts: Tensor) -> Data:
        """A copy with other tensors for some of `parts`; unchecked, as parts of checked data need no second look."""
        if not len(parts.get("x", self.x)):
            raise ValueError(f"the subset of {self!r} is empty")
        copied = copy.copy(self)
        vars(copied).update(parts)
        return copied

    def __repr__(self) -> str:
        values = "" if self.levels is None else f" of {self.levels} levels"
        labels = "" if self.y is None else f", y of {self.num_classes} classes"
        given = "" if self.given is None else f", given {tuple(self.given.shape[1:])}"
        missing = "" if self.mask is None else f", {1 - self.mask.double().mean():.1%} missing"
        dtype = str(self.x.dtype).removeprefix("torch.")
        return f"Data({self.name!r}, x={tuple(self.x.shape)} {dtype}{values}{labels}{given}{missing})"


def _check_x(x: Tensor, levels: int | None) -> None:
    if x.dim() < 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but data are (N, *event_shape): for single features x[:, None]"
        )
    if x.numel() == 0:
        raise ValueError(f"x is empty: it has shape {tuple(x.shape)}")
    if levels is None:
        if not x.is_floating_point():
            raise TypeError(f"x has dtype {x.dtype}: pass levels=... for integers, or x.float() if the values are real")
        check_finite(x, "x")
        return
    check_count(levels, "levels", at_least=2)
    if x.dtype not in INTEGERS:
        raise TypeError(
            f"x has dtype {x.dtype}, but levels={levels} says integers: use x.long() if they are, or leave levels out"
        )
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= levels:
        raise ValueError(f"x holds values from {low} to {high}, but levels={levels} allows 0 .. {levels - 1}")


def _check_y(y: Any, size: int) -> None:
    check_labels(y, "y", size)
    if int(y.min()) < -1:
        raise ValueError(f"y holds the label {int(y.min())}: labels count from 0, and -1 stands for an unknown one")


def _check_mask(mask: Any, x: Tensor) -> None:
    check_dense(mask, "mask")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}: use mask.bool(), True where a feature was observed")
    if mask.shape != x.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, but x has {tuple(x.shape)}: say of each feature whether "
                         "it was observed")  # fmt: skip
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device}, but x on {x.device}: use mask.to({str(x.device)!r})")


def _check_given(given: Any, size: int) -> None:
    check_dense(given, "given")
    if given.shape[:1] != (size,):
        raise ValueError(f"given has shape {tuple(given.shape)}, but x has {size} rows: pass one row per datum")
    if not given.is_floating_point():
        raise TypeError(
            f"given has dtype {given.dtype}: use given.float() if the values are real; a class label is y, Data(x, y)"
        )
    check_finite(given, "given")


def _check_names(names: Any, argument: str, shape: Sequence[int]) -> None:
    if names is None:
        return
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} must be a tuple of strings, got {names!r}")
    if (len(names),) != tuple(shape):
        raise ValueError(f"{argument} has {len(names)} names, but there are {math.prod(shape)} of shape {tuple(shape)}")


def open(
    source: Any,
    *,
    label: Any = None,
    given: Any = None,
    columns: Sequence[str] | None = None,
    levels: int | None = None,
    size: int | tuple[int, int] | None = None,
    gray: bool | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Data:
    """Your own data: a file, a folder of images, an array, a frame or a dataset.

    - ``.csv``, ``.tsv``, ``.parquet`` and frames of pandas: each column is a feature, in its own units. An empty place
      is a missing feature.
    - ``.npy``, ``.npz`` and arrays ``(N, ...)``: NaN is a missing feature. Of an ``.npz`` file, the arrays ``x``, ``y``
      and ``given`` are read, or its only one.
    - A folder of images, or one folder of images for each class, whose name is the label.
    - A `torch.utils.data.Dataset` of x, or of pairs of x and a label, such as torchvision's; a Hugging Face dataset.

    Integers are reals unless ``levels`` says otherwise. Images of bytes have 256 levels; images whose channels come
    last, ``(N, H, W, C)``, are turned to ``(N, C, H, W)``. All is read into memory.

    Args:
        source: what to read.
        label: column of a table, or name of an array in an ``.npz`` file, that holds the labels: integers from 0, or
            any values, which are then `Data.classes`. For an array, the labels themselves.
        given: column or columns to condition on, or the name of an array; for an array, the values themselves.
        columns: columns of a table to read as x; by default all others.
        levels: how many integers a feature takes; images of bytes are rounded down to so many.
        size: (height, width), or one number for both, to crop and scale the images of a folder to.
        gray: whether the images of a folder are read as gray; by default where all are.
        classes: names of the labels in the order of their numbers; by default sorted.
        name: what reports call the data; by default the name of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, TypeError: a value, a row or an image cannot be read; the message names file, row and column.
        ImportError: pandas, pyarrow or Pillow is missing.

    >>> import numpy as np, dgm_pyro as dgm
    >>> dgm.data.open(np.array([[1.5, 2.0], [np.nan, 3.0]]), name="mine")
    Data('mine', x=(2, 2) float32, 25.0% missing)
    """
    choice = sources.Choice(label, given, columns, levels, size, gray)
    found = sources.arrays_of(source, choice)
    known = found.classes if classes is None else tuple(classes)
    y, names = (None, None) if found.label is None else _coded(found.label, known)
    if levels is None:
        levels = found.levels or (256 if found.x.dtype == np.uint8 and found.x.ndim == 4 else None)
    if name is None:
        name = Path(source).stem if isinstance(source, str | os.PathLike) else "data"
    mask = ~np.isnan(found.x)
    x = _as_x(found.x, levels)
    return Data(
        x,
        y,
        levels,
        name,
        None if names is None or y is None else len(names),
        given=None if found.given is None else torch.tensor(found.given, dtype=torch.get_default_dtype()),
        mask=None if mask.all() else torch.from_numpy(mask),
        columns=found.columns,
        given_columns=found.given_columns,
        classes=names,
    )


def _as_x(values: np.ndarray, levels: int | None) -> Tensor:
    if values.dtype.kind == "f":
        bad = np.isinf(values) if levels is None else ~np.isnan(values) & (values != np.round(values))
        if bad.any():
            row, *place = np.argwhere(bad)[0].tolist()
            what = values[(row, *place)]
            raise ValueError(
                f"row {row} of the data holds {what:.4g} in feature {place[0] if len(place) == 1 else tuple(place)}, "
                + ("which is infinite: correct it" if levels is None else f"but levels={levels} says integers")
            )
    if levels is None:
        return torch.tensor(values, dtype=torch.get_default_dtype())
    whole = torch.tensor(
        np.nan_to_num(values).astype(np.int64) if values.dtype.kind == "f" else values.astype(np.int64)
    )
    return whole.to(torch.uint8) if levels <= 256 and 0 <= int(whole.min()) <= int(whole.max()) < 256 else whole


def _coded(labels: np.ndarray, names: tuple[str, ...] | None) -> tuple[Tensor, tuple[str, ...] | None]:
    """Labels as integers, -1 where one is missing, and their names where they are no integers from 0."""
    known = np.array([label is not None and label == label for label in labels.tolist()])
    values = labels[known].tolist()
    whole = all(isinstance(value, int | float) and value == int(value) for value in values)
    numbers = [int(value) for value in values] if whole else []
    y = torch.full((len(labels),), -1)
    where = torch.from_numpy(known)
    if whole and values and min(numbers) in (0, -1) and (names is None or max(numbers) < len(names)):
        y[where] = torch.tensor(numbers)
        return y, names
    texts = [str(value) for value in (numbers if whole else values)]
    if names is None:
        names = tuple(map(str, sorted(set(numbers)))) if whole else tuple(sorted(set(texts)))
    codes = {name: code for code, name in enumerate(names)}
    foreign = next((i for i, text in enumerate(texts) if text not in codes), None)
    if foreign is not None:
        row = int(np.flatnonzero(known)[foreign])
        raise ValueError(f"row {row} has the label {texts[foreign]!r}, which is none of the classes {', '.join(names)}")
    y[where] = torch.tensor([codes[text] for text in texts], dtype=torch.long)
    return y, names


def load(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    num_data: int | None = None,
    seed: int = 0,
) -> Data:
    """The data set ``name``, one of `NAMES`.

    Args:
        name: "digits" and "digits-binary" come with scikit-learn; "moons", "rings", "checkerboard" and "pinwheel" are
            generated, as are "glyphs" and "patches" of several kinds; the others are read from ``data_dir``.
        split: "train" or "test"; also "valid" where the set is published with one, and for generated ones.
        data_dir: the folder that holds ``mnist/``, ``MNIST/raw/``, ``binary/`` and so on; by default the environment
            variable ``DGM_DATA``.
        num_data: how many data; of generated sets 5000 by default, or 20,000 if they are images; of the others, a
            random subset.
        seed: of the generated points, or of the random subset. Splits differ under one seed.

    Raises:
        ValueError: an unknown name or split, a ``num_data`` out of range, or a damaged or foreign file.
        FileNotFoundError: the files are not there; the message lists the paths looked for.
    """
    if not isinstance(name, str) or name not in _SETS:
        raise ValueError(f"there is no data set {name!r}: choose a name of {', '.join(NAMES)}")
    chosen = _SETS[name]
    if split not in chosen.splits:
        raise ValueError(f"{name} has no split {split!r}: choose one of {', '.join(chosen.splits)}")
    if num_data is not None:
        check_count(num_data, "num_data")
    if data_dir is not None:
        check_path(data_dir, "data_dir")
    # One stream per seed and split: no test point is a training point.
    random = np.random.default_rng((check_seed(seed), ("train", "valid", "test").index(split)))
    return chosen.make(name, split, data_dir, random, num_data)


def subset(data: Data, num_data: int | None, random: np.random.Generator, split: str) -> Data:
    """Random ones of the data; all where ``num_data`` is None."""
    if num_data is None:
        return data
    if num_data > len(data):
        raise ValueError(f"num_data is {num_data}, but {data.name} has {len(data)} data in its {split} split")
    return data[torch.as_tensor(random.permutation(len(data))[:num_data])]


# -- with scikit-learn -------------------------------------------------------------------------------------------------


def _digits(name: str, split: str, data_dir: Any) -> Data:
    # Imported here because it takes a second, and few commands need it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    x, y = (torch.as_tensor(part) for part in (parts[0::2] if split == "train" else parts[1::2]))
    x = x.to(torch.uint8).reshape(-1, 1, 8, 8)
    if name == "digits-binary":
        return Data((x >= 8).to(torch.uint8), y, levels=2, name=name, num_classes=10)
    return Data(x, y, levels=17, name=name, num_classes=10)


# -- generated, in the plane -------------------------------------------------------------------------------------------


Points = tuple[np.ndarray, np.ndarray]


def _moons(random: np.random.Generator, num_data: int) -> Points:
    y = random.integers(2, size=num_data)
    angle, sign = np.pi * random.random(num_data), 1 - 2 * y
    arcs = np.stack([sign * np.cos(angle) + y, sign * np.sin(angle) + y / 2], axis=1)
    return 2 * (arcs - (0.5, 0.25)) + 0.2 * random.standard_normal((num_data, 2)), y


def _rings(random: np.random.Generator, num_data: int) -> Points:
    y = random.integers(3, size=num_data)
    angle = 2 * np.pi * random.random(num_data)
    radius = y + 1 + 0.1 * random.standard_normal(num_data)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), y


def _checkerboard(random: np.random.Generator, num_data: int) -> Points:
    y = random.integers(8, size=num_data)
    column, row = y // 2, 2 * (y % 2) + (y // 2) % 2
    return 2 * (np.stack([column, row], axis=1) + random.random((num_data, 2))) - 4, y


def _pinwheel(random: np.random.Generator, num_data: int) -> Points:
    y = random.integers(5, size=num_data)
    along, across = 1 + 0.3 * random.standard_normal(num_data), 0.1 * random.standard_normal(num_data)
    angle = 2 * np.pi * y / 5 + 0.25 * np.exp(along)
    bent = [along * np.cos(angle) - across * np.sin(angle), along * np.sin(angle) + across * np.cos(angle)]
    return 2 * np.stack(bent, axis=1), y


# -- generated, images -------------------------------------------------------------------------------------------------


def _drawn(description: str, draw: Callable[..., image_sets.Images], **options: Any) -> _Set:
    def make(name: str, split: str, data_dir: Any, random: np.random.Generator, num_data: int | None) -> Data:
        where = {"split": split} if draw is image_sets.patches else {}
        x, y = draw(random, num_data or 20_000, **options, **where)
        labels = None if y is None else torch.from_numpy(y)
        return Data(torch.from_numpy(x), labels, levels=256, name=name, num_classes=options.get("num_classes"))

    return _Set(description, ("train", "valid", "test"), make)


# -- from files --------------------------------------------------------------------------------------------------------

LARGEST = 2**26
"""Bytes of the largest file, unpacked: small files unpack to any size."""

# md5 of the unpacked idx files, sha256 of the packed bits.
CHECKSUMS: dict[str, dict[str, str]] = {
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    "binarized-mnist": {
        "train": "727146c35424b019f3e350e1e69faa05644a0abaf787e3f4e1a9632220a13906",
        "valid": "a256ac44ae26be720fad8616a05ed6ecfd1619930d9a208379bb2a4405df5b6d",
        "test": "9fcd8da6f0fdf09b2ba30fe63a0bb784042a0de82563172530229b983e294ff2",
    },
    "nltcs": {
        "train": "443230cccd53650e3465d88ecc71c165a03b8ea93e0d5efc8a0adee9a8c3261b",
        "valid": "aa893aea35fc267dcd8c5ade1082667c9de65606aa1636a7bda7e10e9107542c",
        "test": "2e7f41a762856c5358655546177ed76633343496f93dd9519d14c8dd7a8290af",
    },
    "plants": {
        "train": "82b30416496b49b2b56e1f9762863de4068c16f509ae9b37019d03a04eff567e",
        "valid": "17543413286463289f89499e16081dc8851f5587c5a4f13428d85ed16343de8d",
        "test": "392a88032d7db8fba12cffb2cc9142af63cbf5e4af70967b84f419356ba5e771",
    },
    "mushrooms": {
        "train": "b9b5e3b85f7fc3a6a7b15951f2974a0bafa2b9528001bcb8740f7187f2d7ff2b",
        "valid": "c820fb1db5cc0918a66cac28324508eb29e73edabd540313c39bcf476757f5c4",
        "test": "de4f74441a3f07d6acc13aaa572e67e6e101551d99bee7d668c340e5ce720256",
    },
    "dna": {
        "train": "a79dc4e3cecb9b28cdaaa562146e0d1240b7a44e3a7a172cef1f7d1741b17987",
        "valid": "538d89e0bd167d6538d7ae17e30a26a3dd1540e3c7b950f14a55768a5ed21f00",
        "test": "1cf7544018e47407cf867662bf0d55f0de17b37d23cda5a74f445a97eecad8ce",
    },
    "nips": {
        "train": "9f49e87ac456779f4a7f7a652f5e02101391379d0357ed62e05a8f112ed4c215",
        "valid": "01dd37b289b5aaf5cdcd03559441e3b79b8f2a498a36584a3c87e86829391eca",
        "test": "82db8901acd317bae38bf70b88e95387d9c63e6ae8b0838111342f7b8c5867f0",
    },
}


def _find(name: str, data_dir: Any, folders: tuple[str, ...], files: tuple[str, ...]) -> Path:
    places = " or ".join(f"{folder}/" for folder in folders)
    remedy = f"pass data_dir (--data-dir), or set DGM_DATA, to the folder that holds {places}"
    root = data_dir or os.environ.get("DGM_DATA")
    if not root:
        raise FileNotFoundError(f"{name} is read from files, and no folder is set: {remedy}")
    paths = [Path(root).expanduser() / folder / file for folder in folders for file in files]
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name} was not found, looked for {', '.join(map(str, paths))}: {remedy}")


def _check_sum(path: Path, name: str, algorithm: str, digest: str, expected: str) -> None:
    if digest != expected:
        raise ValueError(
            f"{path} has the {algorithm} checksum {digest}, but {name} has {expected}: it is damaged or another data "
            "set, copy it again"
        )


def _read_idx(path: Path, name: str, dims: int, checksum: str) -> np.ndarray:
    """The array of an idx file of bytes: 0, 0, 8, dims, the sizes as big-endian uint32, then the values."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            content = file.read(LARGEST + 1)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is truncated or no gzip file ({error}): copy it again") from error
    if len(content) > LARGEST:
        raise ValueError(f"{path} holds more than {LARGEST:,} bytes, but {name} does not: it is another kind of file")
    magic, header = bytes((0, 0, 8, dims)), 4 + 4 * dims
    if content[:4] != magic:
        raise ValueError(
            f"{path} starts with the bytes {content[:4].hex()}, but the magic number of a {dims}-dimensional idx file "
            f"is {magic.hex()}: it is another kind of file"
        )
    shape = tuple(int(size) for size in np.frombuffer(content[4:header].ljust(4 * dims, b"\0"), ">u4"))
    if len(content) != header + math.prod(shape):
        raise ValueError(
            f"{path} is truncated: it has {len(content)} bytes, but its header announces {header + math.prod(shape)}"
        )
    _check_sum(path, name, "md5", hashlib.md5(content, usedforsecurity=False).hexdigest(), checksum)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _idx_images(name: str, split: str, data_dir: Any, folders: tuple[str, ...]) -> Data:
    def part(kind: str, dims: int) -> Tensor:
        file = f"{'train' if split == 'train' else 't10k'}-{kind}-idx{dims}-ubyte"
        path = _find(name, data_dir, folders, (file, f"{file}.gz"))
        return torch.from_numpy(_read_idx(path, name, dims, CHECKSUMS[name][file]))

    return Data(part("images", 3).unsqueeze(1), part("labels", 1), levels=256, name=name, num_classes=10)


def _packed_bits(name: str, split: str, data_dir: Any, folder: str, event_shape: tuple[int, ...]) -> Data:
    path = _find(name, data_dir, (folder,), (f"{split}.npz",))
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            size = archive.zip.getinfo("packed.npy").file_size
            if size > LARGEST:
                raise ValueError(f"it holds {size:,} bytes, more than {name} has")
            packed = archive["packed"]
    except sources.UNREADABLE as error:
        raise ValueError(
            f"{path} is truncated or no npz file with an array 'packed' ({error}): copy it again"
        ) from error
    _check_sum(path, name, "sha256", hashlib.sha256(packed.tobytes()).hexdigest(), CHECKSUMS[name][split])
    bits = np.unpackbits(packed, axis=1, count=math.prod(event_shape))
    return Data(torch.from_numpy(bits).reshape(-1, *event_shape), levels=2, name=name)


# -- names -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Set:
    description: str
    splits: tuple[str, ...]
    make: Callable[[str, str, Any, np.random.Generator, int | None], Data]


def _generated(description: str, draw: Callable[[np.random.Generator, int], Points], num_classes: int) -> _Set:
    def make(name: str, split: str, data_dir: Any, random: np.random.Generator, num_data: int | None) -> Data:
        points, y = draw(random, num_data or 5000)
        x = torch.as_tensor(points, dtype=torch.get_default_dtype())
        return Data(x, torch.as_tensor(y), name=name, num_classes=num_classes)

    return _Set(f"2-D points: {description}", ("train", "valid", "test"), make)


def _stored(description: str, splits: tuple[str, ...], read: Callable[[str, str, Any], Data]) -> _Set:
    def make(name: str, split: str, data_dir: Any, random: np.random.Generator, num_data: int | None) -> Data:
        return subset(read(name, split, data_dir), num_data, random, split)

    return _Set(description, splits, make)


def _bits(description: str, folder: str, *event_shape: int) -> _Set:
    read = functools.partial(_packed_bits, folder=folder, event_shape=event_shape)
    return _stored(f"{description}; from files", ("train", "valid", "test"), read)


def _idx(description: str, *folders: str) -> _Set:
    read = functools.partial(_idx_images, folders=folders)
    return _stored(f"{description}; from files", ("train", "test"), read)


_SETS: dict[str, _Set] = {
    "digits": _stored("8x8 digits, integers 0 .. 16, 10 classes", ("train", "test"), _digits),
    "digits-binary": _stored("the same digits as bits: 1 where the integer is at least 8", ("train", "test"), _digits),
    "moons": _generated("two interleaved half circles", _moons, 2),
    "rings": _generated("three concentric circles", _rings, 3),
    "checkerboard": _generated("uniform on the 8 dark squares of a 4x4 board, entropy log 32", _checkerboard, 8),
    "pinwheel": _generated("five bent arms", _pinwheel, 5),
    "glyphs": _drawn("28x28 digits and capitals, 36 classes", image_sets.glyphs, num_classes=36, size=28),
    "glyphs-62": _drawn("28x28 digits, capitals and small letters", image_sets.glyphs, num_classes=62, size=28),
    "glyphs-color": _drawn("32x32 glyphs in color, 36 classes", image_sets.glyphs, num_classes=36, size=32, color=True),
    "patches-8": _drawn("8x8 patches of two photographs in color", image_sets.patches, size=8),
    "patches-16": _drawn("16x16 patches of the same", image_sets.patches, size=16),
    "patches-32": _drawn("32x32 patches of the same", image_sets.patches, size=32),
    "mnist": _idx("28x28 digits, integers 0 .. 255, 10 classes", "mnist", "MNIST/raw"),
    "fashion-mnist": _idx("28x28 clothes, integers 0 .. 255, 10 classes", "fashion-mnist", "FashionMNIST/raw"),
    "binarized-mnist": _bits("28x28 digits as bits, Larochelle's split", "binarized-mnist", 1, 28, 28),
    "nltcs": _bits("16 bits: disabilities in a survey of the elderly", "binary/nltcs", 16),
    "plants": _bits("69 bits: regions where a plant grows", "binary/plants", 69),
    "mushrooms": _bits("112 bits: features of mushrooms", "binary/mushrooms", 112),
    "dna": _bits("180 bits: splice junctions", "binary/dna", 180),
    "nips": _bits("500 bits: words in papers", "binary/nips", 500),
}

NAMES: dict[str, str] = {name: each.description for name, each in _SETS.items()}
