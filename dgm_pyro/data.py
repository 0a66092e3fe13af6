"""Data sets: tensors with their number of levels, which decides whether a result is a mass or a density.

`load` returns a data set by its name. Integers stay integers in ``x``, because a mass on integers and a density on
reals have different units. Images are ``(C, H, W)``, points ``(D,)``.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

import dgm_pyro.image_sets as image_sets
import dgm_pyro.published as published
import dgm_pyro.sources as sources
from dgm_pyro.checks import (
    INTEGERS,
    as_shape,
    check_count,
    check_dense,
    check_finite,
    check_labels,
    check_number,
    check_path,
    check_range,
    check_seed,
    check_type,
    close_to,
    find_device,
    generator,
    is_finite,
    is_integer,
    near_name,
    suggesting,
)
from dgm_pyro.guesses import MODULES, absent

__all__ = ["NAMES", "Batches", "Data", "StoredData", "load", "open"]


class Batches(Protocol):
    """The positions of the data of each batch of an epoch."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Tensor: ...


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Data x, optionally with labels y, further variables ``given``, and a mask of the observed features.

    Args:
        x: ``(N, *event_shape)``: integers 0 .. levels - 1 of an integer dtype, or finite reals.
        y: integer labels 0 .. num_classes - 1, ``(N,)``, stored as int64; -1 marks an unknown label; None without
            labels.
        levels: number of integers that a feature takes; None for reals.
        name: name of the data in reports.
        num_classes: number of classes; by default the largest label plus one, and y must hold a 0.
        given: finite reals that p(x | given) is conditioned on, ``(N, *given_shape)``.
        mask: True where a feature was observed, of the shape of x. Where it is False, x may hold any value, even NaN,
            and is set to 0.
        columns, given_columns: names of the features of x, and of given, where they are columns of a table.
        classes: names of the labels.
        kinds: kinds of the columns of a mixed table, from which `dgm.build` makes a `dgm.Columns`. The kind of a
            category or an ordinal includes its words, and x holds their indices.

    `torch.utils.data.DataLoader` makes batches of it: x alone, or tuples of x and those of y, given and mask that there
    are, in this order.

    Raises:
        TypeError: an argument is not a tensor, or its dtype contradicts ``levels``.
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
    kinds: dict[str, sources.Kind] | None = field(default=None, kw_only=True)

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
        check_type(self.kinds, dict | None, "kinds", "a dict of columns to kinds or None")
        if self.kinds is not None and tuple(self.kinds) != self.columns:
            raise ValueError(
                f"kinds names {', '.join(self.kinds)}, but columns is {self.columns}: give every column a kind"
            )
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
                f"num_classes={classes} if there are no data of the classes below {lowest}"
            )
        if self.num_classes is not None:
            check_count(self.num_classes, "num_classes")
        if self.classes is not None and classes > len(self.classes):
            raise ValueError(
                f"y holds the label {classes - 1}, but classes has {len(self.classes)} names: name every class"
            )
        if self.num_classes is not None and self.num_classes < classes:
            raise ValueError(
                f"y holds the label {classes - 1}, but num_classes is {self.num_classes}: pass at least {classes}"
            )
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
        """Those of the tensors x, y, given and mask that are not None, by name."""
        tensors = {"x": self.x, "y": self.y, "given": self.given, "mask": self.mask}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def excerpt(self) -> Data:
        """The data in memory: all of them, or an evenly spaced sample of `StoredData`."""
        return self

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
        """The subset at ``index``: a slice, a list, or a tensor of positions or booleans; an int gives one datum."""
        if isinstance(index, int):
            index = [index]
        try:
            return self.replaced(**{name: tensor[index] for name, tensor in self.parts.items()})
        except (IndexError, TypeError) as error:  # an IndexError, as it ends a loop over the data
            raise IndexError(f"index {index!r} does not fit {self!r}: {error}") from error

    def __getitems__(self, rows: Sequence[int]) -> Sequence[Tensor | tuple[Tensor, ...]]:
        """The data at ``rows``, one by one, for a DataLoader of torch."""
        tensors = [tensor[rows] for tensor in self.parts.values()]
        return list(tensors[0]) if len(tensors) == 1 else list(zip(*tensors, strict=True))

    def split(self, fraction: float, seed: int = 0) -> tuple[Data, Data]:
        """Two disjoint random parts, the second with ``fraction`` of the data: ``train, valid = data.split(0.1)``.

        Raises:
            ValueError: ``fraction`` leaves one part empty.
        """
        first, second = _split_rows(len(self), fraction, seed)
        return self[first.to(self.x.device)], self[second.to(self.x.device)]

    def shuffled(
        self, batch_size: int, random: torch.Generator, share: Callable[[Tensor], Tensor] = lambda rows: rows
    ) -> Batches:
        """The positions of the data of each batch of an epoch, in random order.

        Args:
            share: from the positions of a batch, those whose data will be taken; `StoredData` reads these ahead.
        """
        return torch.randperm(len(self), generator=random).to(self.x.device).split(batch_size)

    def taken(self, parts: Iterable[slice]) -> Iterator[Data]:
        """``self[part]`` for each of the parts; `StoredData` reads the next part while one is used."""
        return (self[part] for part in parts)

    def keep_labels(self, num_labels: int, seed: int = 0) -> Data:
        """The same data with ``num_labels`` labels, equally many per class, and -1 for the rest.

        If ``num_labels`` is not a multiple of `num_classes`, random classes keep one more. For semi-supervised
        learning.

        Raises:
            ValueError: there are no labels, or a class has fewer labels than it would keep.
        """
        if self.y is None or self.num_classes is None:
            raise ValueError(f"{self!r} has no labels to keep: pass y, Data(x, y)")
        check_count(num_labels, "num_labels")
        random = generator(seed)
        ranks = torch.randperm(self.num_classes, generator=random).tolist()
        y = torch.full_like(self.y, -1)
        for label, rank in enumerate(ranks):
            share = num_labels // self.num_classes + (rank < num_labels % self.num_classes)
            rows = (self.y == label).nonzero()[:, 0]
            if share > len(rows):
                raise ValueError(
                    f"num_labels is {num_labels}, which keeps {share} labels of class {label}, but {self.name} has "
                    f"{len(rows)}: keep fewer"
                )
            y[rows[torch.randperm(len(rows), generator=random)[:share]]] = label
        return self.replaced(y=y)

    def to(self, device: str | torch.device) -> Data:
        """The same data on ``device``."""
        where = device if isinstance(device, torch.device) else find_device(device)
        return self.replaced(**{name: tensor.to(where) for name, tensor in self.parts.items()})

    def replaced(self, **parts: Tensor) -> Data:
        """A copy with other tensors for some of `parts`; not checked, because parts of checked data need no check."""
        if not len(parts.get("x", self.x)):
            raise ValueError(f"the subset of {self!r} is empty")
        copied = copy.copy(self)
        vars(copied).update(parts)
        return copied

    def __repr__(self) -> str:
        values = "" if self.levels is None else f" of {self.levels} levels"
        seen = self.excerpt
        labels = "" if seen.y is None else f", y of {self.num_classes} classes"
        given = "" if seen.given is None else f", given {tuple(seen.given.shape[1:])}"
        missing = "" if seen.mask is None else f", {1 - seen.mask.double().mean():.1%} missing"
        shape, dtype = (len(self), *self.event_shape), str(seen.x.dtype).removeprefix("torch.")
        return f"{type(self).__name__}({self.name!r}, x={shape} {dtype}{values}{labels}{given}{missing})"


Data.__init__ = suggesting(Data.__init__)  # type: ignore[method-assign]  # written by the dataclass


WINDOW, BLOCK = 2**27, 2**21
"""Bytes that `StoredData` shuffles at once, and bytes of each block of them."""

GRAINS = 2**23
"""Above this number of data, a split takes groups of neighbors: an index per datum would fill the memory."""

EXCERPT, LEAST = 2**20, 256
"""Most numbers, and fewest data, in an evenly spaced sample."""


Near = tuple[Tensor, Data]
"""Ascending positions in a source, and the data there."""


def _in_memory(name: str) -> Any:
    def part(self: StoredData) -> None:
        if name not in self.excerpt.parts:
            return
        raise TypeError(
            f"{self.name} is read by rows, but this needs all of its {len(self)} data in memory: take some of them, "
            "data[:10_000] (--num-data)"
        )

    return property(part)


class StoredData(Data):
    """Data that are read by rows, when they are needed, because they are larger than memory: see `open`.

    An index gives a `Data` in memory, whose values are checked then. Units, support and digest are taken from
    `excerpt`, an evenly spaced sample of a million numbers. Data of more than 128 MiB are shuffled by windows of that
    size: a window has 64 random blocks of 2 MiB, whose data come in random order. The parts of `split` are `StoredData`
    too.
    """

    x, y, given, mask = map(_in_memory, ("x", "y", "given", "mask"))

    _source: sources.Stored
    _codes: _Codes | None  # of its labels; None where they are codes themselves
    _device: torch.device
    _misses: bool | None  # unknown before the excerpt was read
    _near: Near | None  # what was read ahead
    _bytes: int  # of a datum
    _count: int
    _grains: Tensor | None  # groups of data that the parts of a split are made of
    _grain: int  # data in a group

    def __init__(self, source: sources.Stored, levels: int | None, name: str, classes: tuple[str, ...] | None):
        if len(source) == 0:
            raise ValueError(f"{name} is empty: it holds no rows")
        first = source.read(np.arange(1))
        names, number = None if first.label is None else classes or source.classes, None
        codes = None if source.label_values is None else _Codes.of(source.label_values, names)
        if codes is not None:
            names, number = codes.names, codes.count
        levels = levels or _levels_of(first)
        vars(self).update(
            levels=levels, name=name, classes=names, num_classes=number if names is None else len(names), _codes=codes,
            columns=source.columns, given_columns=source.given_columns,
            _source=source, _device=torch.device("cpu"), _misses=None, _near=None,
            _bytes=_x_and_mask(first.x, levels, [0])[0].nbytes, _count=len(source), _grains=None,
            _grain=-(-len(source) // GRAINS),
        )  # fmt: skip
        vars(self).update(num_classes=self.excerpt.num_classes, _misses=self.excerpt.mask is not None)

    @functools.cached_property
    def excerpt(self) -> Data:  # type: ignore[override]
        """An evenly spaced sample in memory; the start of a stream."""
        number = min(len(self), max(LEAST, EXCERPT * 4 // self._bytes))
        return self[torch.arange(number) if self._source.ordered else torch.linspace(0, len(self) - 1, number).long()]

    @property
    def event_shape(self) -> torch.Size:
        return self.excerpt.event_shape

    @property
    def misses(self) -> bool:
        return bool(self._misses)

    @property
    def digest(self) -> str:
        """A hash of the number of data and of `excerpt`: reading all values would take too long."""
        return hashlib.sha256(f"{len(self)} {self.excerpt.digest}".encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Data:
        index = [index] if isinstance(index, int) else index
        try:
            rows = self._source_rows(self._positions(index))
        except (IndexError, TypeError) as error:
            raise IndexError(f"index {index!r} does not fit {self!r}: {error}") from error
        if self._near is None or not _holds_rows(self._near[0], rows):
            near = rows.unique()
            return _pick_rows(self._checked_data(near.numpy(), self._source.read(near.numpy())), rows).to(self._device)
        return _pick_rows(self._near, rows).to(self._device)

    def _positions(self, index: Any) -> Tensor:
        if isinstance(index, slice):
            return torch.arange(*index.indices(len(self)))
        positions = torch.as_tensor(index).cpu()
        if positions.dtype == torch.bool:
            return positions.nonzero()[:, 0]
        if not ((-len(self) <= positions) & (positions < len(self))).all():
            raise IndexError(f"there are {len(self)} data")
        return positions % len(self)

    def __getitems__(self, rows: Sequence[int]) -> Sequence[Tensor | tuple[Tensor, ...]]:
        found = self[list(rows)]
        return found.__getitems__(range(len(found)))

    def split(self, fraction: float, seed: int = 0) -> tuple[Data, Data]:
        if self._source.ordered:
            raise ValueError(f"{self.name} is a stream, which cannot be split at random: pass validation data of its "
                             "own, or None")  # fmt: skip
        grains = torch.arange(-(-self._count // self._grain)) if self._grains is None else self._grains
        first, second = _split_rows(len(grains), fraction, seed)
        return self._data_of_grains(grains[first]), self._data_of_grains(grains[second])

    def _data_of_grains(self, grains: Tensor) -> StoredData:
        """The data of these groups, in the order of the source; few data keep any order, which is as fast."""
        count, end = len(grains) * self._grain, self._grain * (int(grains.max()) + 1)
        count -= max(0, end - len(self._source))  # the last group may have fewer
        if self._grain > 1 or count * self._bytes > WINDOW:
            grains = grains.sort().values
        return self._copy_with(_grains=grains, _count=count)

    def to(self, device: str | torch.device) -> StoredData:
        return self._copy_with(_device=device if isinstance(device, torch.device) else find_device(device))

    def alike(self, sample: Data) -> StoredData:
        """These data with the levels of ``sample``."""
        return self._copy_with(levels=sample.levels)

    def _copy_with(self, **attributes: Any) -> StoredData:
        found = copy.copy(self)
        vars(found).pop("excerpt", None)
        vars(found).update(attributes)
        return found

    def shuffled(
        self, batch_size: int, random: torch.Generator, share: Callable[[Tensor], Tensor] = lambda rows: rows
    ) -> Batches:
        return _Epoch(self, batch_size, random, share)

    def taken(self, parts: Iterable[slice]) -> Iterator[Data]:
        positions = [torch.arange(*part.indices(len(self))) for part in parts]
        for part, near in zip(positions, self._read_ahead(positions), strict=True):
            yield _pick_rows(near, self._source_rows(part)).to(self._device)

    def _source_rows(self, positions: Tensor) -> Tensor:
        """Positions in the source."""
        if self._grains is None:
            return positions
        return self._grains[positions // self._grain] * self._grain + positions % self._grain

    def _read_ahead(self, parts: Iterable[Tensor], random: torch.Generator | None = None) -> Iterator[Near]:
        return self._source.ahead(
            (self._source_rows(part).unique().numpy() for part in parts), self._checked_data, random
        )

    def _checked_data(self, rows: np.ndarray, found: sources.Arrays) -> Near:
        """The data that were read, checked."""
        y = None
        if found.label is not None:
            y = torch.from_numpy(found.label) if self._codes is None else self._codes(found.label, rows)
        data = _data_of(found, y, self.levels, self.name, self.classes, self.num_classes, rows)
        if self._misses is False and data.mask is not None:
            row = rows[int((~data.mask).flatten(1).any(1).nonzero()[0])]
            raise ValueError(f"row {row} of {self.name} misses a value, but none of the {len(self.excerpt)} rows that "
                             "were sampled first does: fill it in, or leave the row out")  # fmt: skip
        if self._misses and data.mask is None:
            data = data.replaced(mask=torch.ones_like(data.x, dtype=torch.bool))
        return torch.from_numpy(rows), data


def _holds_rows(near: Tensor, rows: Tensor) -> bool:
    return bool((near[torch.searchsorted(near, rows).clamp(max=len(near) - 1)] == rows).all())


def _pick_rows(near: Near, rows: Tensor) -> Data:
    return near[1][torch.searchsorted(near[0], rows)]


class _Epoch:
    """The positions of the batches of an epoch, window by window. The next window is read while one is used."""

    def __init__(self, data: StoredData, batch_size: int, random: torch.Generator, share: Callable[[Tensor], Tensor]):
        source, size = data._source, data._bytes
        self.data, self.batch_size, self.share = data, batch_size, share
        self.window = max(1, WINDOW // size // batch_size) if source.blocks else 1  # in batches
        self.count, self.at = len(data), -1
        self.random = torch.Generator()  # for the workers, apart from the one of the order
        self.random.set_state(random.get_state())
        self.reading: Iterator[Near] = iter(())
        self.order: Tensor | _Blocks
        if source.ordered:
            self.order = torch.arange(self.count)
        elif source.blocks and self.count > self.window * batch_size:
            self.order = _Blocks(self.count, max(1, BLOCK // size), self.window * batch_size, random)
        else:
            self.order = torch.randperm(self.count, generator=random)

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __getitem__(self, place: int) -> Tensor:
        if place >= len(self):
            raise IndexError(place)
        number, place = divmod(place, self.window)
        if number != self.at:
            if number != self.at + 1 or number == 0:
                windows = range(number, -(-len(self) // self.window))
                parts = (torch.cat([*map(self.share, self._batches(i))]) for i in windows)
                self.reading = self.data._read_ahead(parts, self.random)
            self.at, self.batches = number, self._batches(number)
            vars(self.data)["_near"] = next(self.reading)
        return self.batches[place]

    def _batches(self, number: int) -> Sequence[Tensor]:
        size = self.window * self.batch_size
        return self.order[number * size : (number + 1) * size].split(self.batch_size)


class _Blocks:
    """A random order of ``count`` numbers: blocks in random order, then shuffled within each window of blocks."""

    def __init__(self, count: int, block: int, window: int, random: torch.Generator):
        self.starts = block * torch.randperm(-(-count // block), generator=random)
        self.sizes = (count - self.starts).clamp(max=block)
        self.ends = self.sizes.cumsum(0)
        self.seeds = torch.randint(2**62, (-(-count // window),), generator=random).tolist()
        self.window = window

    def __getitem__(self, window: slice) -> Tensor:
        stop = min(window.stop, int(self.ends[-1]))
        first, last = torch.searchsorted(self.ends, torch.tensor([window.start, stop - 1]), right=True).tolist()
        rows = torch.cat([self.starts[i] + torch.arange(int(self.sizes[i])) for i in range(first, last + 1)])
        rows = rows[window.start - int(self.ends[first] - self.sizes[first]) :][: stop - window.start]
        random = generator(self.seeds[window.start // self.window])
        return rows[torch.randperm(len(rows), generator=random)]


def _split_rows(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    check_number(fraction, "fraction")
    held_out = round(fraction * count) if 0 < fraction < 1 else 0
    if not 0 < held_out < count:
        raise ValueError(
            f"fraction must be between 0 and 1 and leave data on both sides, got {fraction} for {count} data"
        )
    order = torch.randperm(count, generator=generator(seed))
    return order[held_out:], order[:held_out]


def _check_x(x: Tensor, levels: int | None) -> None:
    if x.dim() < 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but data are (N, *event_shape): for a single feature use x[:, None]"
        )
    if x.numel() == 0:
        raise ValueError(f"x is empty: it has shape {tuple(x.shape)}")
    if levels is None:
        if not x.is_floating_point():
            raise TypeError(f"x has dtype {x.dtype}: pass levels=... for integers, or x.float() if the values are real")
        check_finite(x, "x", missing=True)
        check_range(x, "x")
        return
    check_count(levels, "levels", at_least=2)
    if x.dtype not in INTEGERS:
        raise TypeError(
            f"x has dtype {x.dtype}, but levels={levels} needs integers: use x.long(), or leave levels out for reals"
        )
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= levels:
        raise ValueError(f"x holds values from {low} to {high}, but levels={levels} allows 0 .. {levels - 1}")


def _check_y(y: Any, num_data: int) -> None:
    check_labels(y, "y", num_data)
    if int(y.min()) < -1:
        raise ValueError(f"y holds the label {int(y.min())}: labels count from 0, and -1 stands for an unknown one")


def _check_mask(mask: Any, x: Tensor) -> None:
    check_dense(mask, "mask")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}: use mask.bool(), True where a feature was observed")
    if mask.shape != x.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, but x has {tuple(x.shape)}: pass one truth value per "
                         "feature")  # fmt: skip
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device}, but x is on {x.device}: use mask.to({str(x.device)!r})")


def _check_given(given: Any, num_data: int) -> None:
    check_dense(given, "given")
    if given.shape[:1] != (num_data,):
        raise ValueError(f"given has shape {tuple(given.shape)}, but x has {num_data} rows: pass one row per datum")
    if not given.is_floating_point():
        raise TypeError(
            f"given has dtype {given.dtype}: use given.float() if the values are real; a class label is y, Data(x, y)"
        )
    check_finite(given, "given")
    check_range(given, "given")


def _check_names(names: Any, argument: str, shape: Sequence[int]) -> None:
    if names is None:
        return
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} must be a tuple of strings, got {names!r}")
    if (len(names),) != tuple(shape):
        raise ValueError(
            f"{argument} has {len(names)} names, but there are {math.prod(shape)} features, of shape {tuple(shape)}"
        )


@suggesting
def open(
    source: Any,
    *,
    label: Any = None,
    given: Any = None,
    columns: Sequence[str] | None = None,
    levels: int | None = None,
    size: int | tuple[int, int] | None = None,
    gray: bool | None = None,
    crop: int | None = None,
    kinds: Mapping[str, Any] | str | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    in_memory: bool | None = None,
    num_workers: int = 0,
) -> Data:
    """Read your own data: a file, a folder of images, an array, a frame or a dataset.

    - ``.csv``, ``.tsv``, ``.parquet`` and pandas frames: each column is a feature, in its own units. An empty cell is a
      missing feature.
    - ``.npy``, ``.npz`` and arrays ``(N, ...)``: NaN is a missing feature. From an ``.npz`` file, the arrays ``x``,
      ``y`` and ``given`` are read, or its only array.
    - A folder of images, or a folder with one folder of images per class, whose name is the label.
    - A `torch.utils.data.Dataset` of x, or of pairs of x and a label, such as torchvision's; a Hugging Face dataset.

    Integers are read as reals unless ``levels`` is passed. Images of bytes have 256 levels; channels-last images,
    ``(N, H, W, C)``, are transposed to ``(N, C, H, W)``.

    Data are read into memory, unless they have more than 1 GiB and are a ``.npy``, ``.parquet`` or uncompressed
    ``.npz`` file, a folder of images or a dataset of torch: then the result is a `StoredData`. The result for a
    `torch.utils.data.IterableDataset`, which must have a length, is always a `StoredData`.

    Args:
        source: the file, folder, array, frame or dataset.
        label: column of a table, or name of an array in an ``.npz`` file, that holds the labels: integers from 0, or
            any values, which then become `Data.classes`. For an array or a ``.npy`` file, the labels themselves.
        given: column or columns to condition on, or the name of an array; for an array or a ``.npy`` file, the values
            themselves.
        columns: columns of a table to read as x; default all other columns.
        levels: number of integers that a feature takes; images of bytes are rounded down to this number of levels.
        size: (height, width), or one number for both, to which the images of a folder are cropped and scaled.
        gray: whether to read the images of a folder as gray; default if all of them are gray.
        crop: height and width of the centered square that is scaled to ``size``, for a folder of images; default the
            largest crop with the aspect ratio of ``size``.
        kinds: kinds of the columns of a mixed table, by name, as for `dgm.Columns`: "real", "positive", "count",
            ("bounded", low, high), "integer" or ("integer", low, high), and "category" or "ordinal", whose words may
            follow in their order; by default that of an ordered pandas categorical, else sorted. With "auto", and for
            columns left out: text is a category, whole numbers are counts (integers if some are negative), and other
            numbers are reals.
        classes: names of the labels in the order of their numbers; default sorted.
        name: name of the data in reports; default the name of the file.
        in_memory: whether to read all data into memory; default if they have at most 1 GiB.
        num_workers: number of processes that read a dataset of torch, or decode images, for a `StoredData`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, TypeError: a value, a row or an image cannot be read; the message names file, row and column.
        ImportError: pandas, pyarrow or Pillow is missing.

    >>> import numpy as np, dgm_pyro as dgm
    >>> dgm.data.open(np.array([[1.5, 2.0], [np.nan, 3.0]]), name="mine")
    Data('mine', x=(2, 2) float32, 25.0% missing)
    """
    check_type(in_memory, bool | None, "in_memory", "True, False or None")
    check_count(num_workers, "num_workers", at_least=0)
    if crop is not None:
        check_count(crop, "crop")
    if levels is not None:
        check_count(levels, "levels", at_least=2)
    if size is not None and len(as_shape(size, "size")) != (1 if is_integer(size) else 2):
        raise ValueError(f"size must be a number for height and width, or a pair of them, got {size!r}")
    choice = sources.Choice(label, given, columns, levels, size, gray, crop, kinds)
    if isinstance(source, str | os.PathLike):
        check_path(source, "source")
        path = Path(source).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}{near_name(path)}")
        name = path.stem if name is None else name
    name = "data" if name is None else name
    stored = sources.stored(source, choice, in_memory, num_workers)
    if stored is not None:
        return StoredData(stored, levels, name, None if classes is None else tuple(classes))
    found = sources.arrays_of(source, choice)
    levels = _levels_of(found) if levels is None else levels
    if found.label is None:
        return _data_of(found, None, levels, name, None, None)
    codes = _Codes.of(found.label, found.classes if classes is None else tuple(classes))
    return _data_of(found, codes(found.label, range(len(found.label))), levels, name, codes.names, codes.count)


def _levels_of(found: sources.Arrays) -> int | None:
    """The number of levels that the source declares; images of bytes have 256."""
    return found.levels or (256 if found.x.dtype == np.uint8 and found.x.ndim == 4 else None)


def _data_of(
    found: sources.Arrays,
    y: Tensor | None,
    levels: int | None,
    name: str,
    classes: tuple[str, ...] | None,
    num_classes: int | None,
    rows: Sequence[int] | np.ndarray | None = None,
) -> Data:
    """The arrays that were read, as `Data`.

    Args:
        rows: row numbers in the source, for messages; default from 0.
    """
    x, mask = _x_and_mask(found.x, levels, range(len(found.x)) if rows is None else rows)
    if found.given is not None:
        check_range(torch.from_numpy(found.given), "given", rows)
    return Data(
        x,
        y,
        levels,
        name,
        num_classes,
        given=None if found.given is None else torch.tensor(found.given, dtype=torch.get_default_dtype()),
        mask=mask,
        columns=found.columns,
        given_columns=found.given_columns,
        classes=classes,
        kinds=found.kinds,
    )


def _x_and_mask(
    values: np.ndarray, levels: int | None, rows: Sequence[int] | np.ndarray
) -> tuple[Tensor, Tensor | None]:
    """x, and a mask of its observed features; None if nothing is missing."""
    mask = None
    if values.dtype.kind == "f" and not (levels is None and is_finite(torch.from_numpy(values))):
        missing = np.isnan(values)
        bad = np.isinf(values) if levels is None else ~missing & (values != np.round(values))
        if bad.any():
            row, *place = np.argwhere(bad)[0].tolist()
            what = values[(row, *place)]
            raise ValueError(
                f"row {rows[row]} of the data holds {what:.4g} in feature "
                f"{place[0] if len(place) == 1 else tuple(place)}, "
                + ("which is infinite: correct it" if levels is None else f"but levels={levels} needs integers")
            )
        mask = torch.from_numpy(~missing) if missing.any() else None
        values = values if levels is None else np.nan_to_num(values)
    if levels is None:
        if values.dtype == np.float64:
            check_range(torch.from_numpy(values), "x", rows)
        return torch.as_tensor(values, dtype=torch.get_default_dtype()).contiguous(), mask
    if values.dtype != np.uint8:
        values = values.astype(np.int64)
    whole = torch.as_tensor(values).contiguous()
    small = levels <= 256 and 0 <= int(whole.min()) <= int(whole.max()) < 256
    return whole.to(torch.uint8 if small else torch.int64), mask


LARGEST_CODE = 10**5
"""Whole labels from here on count as identifiers, such as customer numbers, not as codes 0 .. N of classes."""


@dataclass(frozen=True)
class _Codes:
    """The numbering of labels.

    Attributes:
        names: names of the classes, in the order of their numbers; None where labels are integers from 0 without names.
        count: number of classes.
        whole: whether all labels are whole numbers, whose names are those of integers.
        as_they_are: whether labels are the numbers of the classes.
    """

    names: tuple[str, ...] | None
    count: int
    whole: bool
    as_they_are: bool

    @classmethod
    def of(cls, labels: np.ndarray, names: tuple[str, ...] | None) -> _Codes:
        """The numbering for labels whose values are all among ``labels``."""
        if labels.ndim != 1:
            raise ValueError(f"label has shape {labels.shape}: pass one label per datum, ({len(labels)},)")
        if names is not None and len(set(names)) < len(names):
            raise ValueError(f"classes must be different names, got {', '.join(names)}")
        values = labels[_is_known(labels)].tolist()
        if not values:
            raise ValueError("label is missing in every row: leave it out (--label), or choose another column")
        if any(isinstance(value, float) and math.isinf(value) for value in values):
            raise ValueError("label holds an infinite value: correct it, or choose another column (--label)")
        whole = all(isinstance(value, int | float) and value == int(value) for value in values)
        numbers = [int(value) for value in values] if whole else []
        if whole and min(numbers) in (0, -1) and max(numbers) < (LARGEST_CODE if names is None else len(names)):
            return cls(names, max(numbers) + 1 if names is None else len(names), whole, as_they_are=True)
        if names is None:
            names = tuple(map(str, sorted(set(numbers)))) if whole else tuple(sorted({str(value) for value in values}))
        return cls(names, len(names), whole, as_they_are=False)

    def __call__(self, labels: np.ndarray, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Labels as integers, -1 where one is missing.

        Args:
            rows: row numbers in the source, for messages.
        """
        known = _is_known(labels)
        values = labels[known].tolist()
        if self.as_they_are:
            found = [int(value) for value in values]
        else:
            texts = [str(int(value) if self.whole else value) for value in values]
            codes = {name: code for code, name in enumerate(self.names or ())}
            foreign = next((i for i, text in enumerate(texts) if text not in codes), None)
            if foreign is not None:
                row, text = rows[int(np.flatnonzero(known)[foreign])], texts[foreign]
                raise ValueError(f"row {row} has the label {text!r}, which is none of the classes {', '.join(codes)}")
            found = [codes[text] for text in texts]
        y = torch.full((len(labels),), -1)
        y[torch.from_numpy(known)] = torch.tensor(found, dtype=torch.long)
        return y


def _is_known(labels: np.ndarray) -> np.ndarray:
    return np.array([label is not None and label == label for label in labels.tolist()], dtype=bool)


@suggesting
def load(
    name: str,
    split: str = "train",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    num_data: int | None = None,
    seed: int = 0,
) -> Data:
    """Load the data set ``name``, one of `NAMES`.

    Args:
        name: "digits" and "digits-binary" come with scikit-learn; "moons", "rings", "checkerboard" and "pinwheel" are
            generated, as are "glyphs" and "patches" of several kinds; other data sets are read from ``data_dir``.
        split: "train" or "test"; also "valid" for generated sets, and for sets published with one.
        data_dir: the folder that holds ``mnist/``, ``MNIST/raw/``, ``cifar-10-batches-py/`` and so on; default the
            environment variable ``DGM_DATA``.
        num_data: number of data. Default 5000 for generated points, 20,000 for generated images; for other sets, the
            size of a random subset, default all.
        seed: seed of the generated data, or of the random subset. Splits differ under one seed.

    Raises:
        ValueError: the name or split is unknown, ``num_data`` is out of range, or a file is damaged or another one.
        FileNotFoundError: the files are not there; the message lists the paths that were tried.
    """
    if not isinstance(name, str) or name not in _SETS:
        raise ValueError(f"there is no data set {name!r}{close_to(name, NAMES)}: choose a name of {', '.join(NAMES)}")
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


if not TYPE_CHECKING:  # a checker of types would take any name for one of ours

    def __getattr__(name: str) -> Any:
        data_set = name.removeprefix("load_").replace("_", "-")
        remedy = f"dgm.data.load({data_set!r})" if data_set in NAMES else MODULES["data"].get(name)
        raise absent("dgm_pyro.data", name, remedy)


def subset(data: Data, num_data: int | None, random: np.random.Generator, split: str) -> Data:
    """A random subset of the data; all of them if ``num_data`` is None."""
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


def _drawn_images(
    description: str, draw: Callable[..., image_sets.Images], levels: int = 256, **options: Any
) -> _DataSet:
    rounded = np.round(np.arange(256) * (levels - 1) / 255).astype(np.uint8)

    def make(name: str, split: str, data_dir: Any, random: np.random.Generator, num_data: int | None) -> Data:
        where = {"split": split} if draw is image_sets.patches else {}
        x, y = draw(random, num_data or 20_000, **options, **where)
        labels = None if y is None else torch.from_numpy(y)
        return Data(
            torch.from_numpy(rounded[x]), labels, levels=levels, name=name, num_classes=options.get("num_classes")
        )

    return _DataSet(description, ("train", "valid", "test"), make)


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


def _find_files(name: str, data_dir: Any, folders: tuple[str, ...], files: tuple[str, ...]) -> Path:
    places = " or ".join(f"{folder}/" for folder in folders)
    remedy = f"pass data_dir (--data-dir), or set DGM_DATA, to the folder that holds {places}"
    root = data_dir or os.environ.get("DGM_DATA")
    if not root:
        raise FileNotFoundError(f"{name} is read from files, but no folder is set: {remedy}")
    paths = [Path(root).expanduser() / folder / file for folder in folders for file in files]
    for path in paths:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name} was not found, looked for {', '.join(map(str, paths))}: {remedy}")


def _check_sum(path: Path, name: str, algorithm: str, digest: str, expected: str) -> None:
    if digest != expected:
        raise ValueError(
            f"{path} has the {algorithm} checksum {digest}, but {name} has {expected}: the file is damaged or belongs "
            "to another data set, copy it again"
        )


def _read_idx(path: Path, name: str, dims: int, checksum: str) -> np.ndarray:
    """The array of an idx file of bytes: 0, 0, 8, dims, the sizes as big-endian uint32, then the values."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            content = file.read(LARGEST + 1)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is truncated or is no gzip file ({error}): copy it again") from error
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
        path = _find_files(name, data_dir, folders, (file, f"{file}.gz"))
        return torch.from_numpy(_read_idx(path, name, dims, CHECKSUMS[name][file]))

    return Data(part("images", 3).unsqueeze(1), part("labels", 1), levels=256, name=name, num_classes=10)


def _packed_bits(name: str, split: str, data_dir: Any, folder: str, event_shape: tuple[int, ...]) -> Data:
    path = _find_files(name, data_dir, (folder,), (f"{split}.npz",))
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            size = archive.zip.getinfo("packed.npy").file_size
            if size > LARGEST:
                raise ValueError(f"it holds {size:,} bytes, more than {name} has")
            packed = archive["packed"]
    except sources.UNREADABLE as error:
        raise ValueError(
            f"{path} is truncated or is no npz file with an array 'packed' ({error}): copy it again"
        ) from error
    _check_sum(path, name, "sha256", hashlib.sha256(packed.tobytes()).hexdigest(), CHECKSUMS[name][split])
    bits = np.unpackbits(packed, axis=1, count=math.prod(event_shape))
    return Data(torch.from_numpy(bits).reshape(-1, *event_shape), levels=2, name=name)


def _data_of_images(images: published.Images, name: str, classes: tuple[str, ...] | int) -> Data:
    number, names = (classes, None) if isinstance(classes, int) else (len(classes), classes)
    x, y = map(torch.from_numpy, images)
    return Data(x, y, levels=256, name=name, num_classes=number, classes=names)


def _cifar_10(name: str, split: str, data_dir: Any) -> Data:
    batches = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    folders = ("cifar-10-batches-py", "cifar-10-batches-bin")
    paths = [_find_files(name, data_dir, folders, (batch, f"{batch}.bin")) for batch in batches]
    return _data_of_images(published.cifar_10(paths), name, published.CIFAR_10)


def _svhn(name: str, split: str, data_dir: Any) -> Data:
    return _data_of_images(
        published.svhn(_find_files(name, data_dir, ("svhn", "SVHN"), (f"{split}_32x32.mat",))), name, 10
    )


def _imagenet(size: int) -> _DataSet:
    def make(name: str, split: str, data_dir: Any, random: np.random.Generator, num_data: int | None) -> Data:
        parts = [f"Imagenet{size}_train_npz", *(f"Imagenet{size}_train_part{part}_npz" for part in (1, 2))]
        files = [f"train_data_batch_{i}.npz" for i in range(1, 11)]
        if split == "test":
            parts, files = [f"Imagenet{size}_val_npz"], ["val_data.npz"]
        paths = [_find_files(name, data_dir, tuple(parts), (file,)) for file in files]
        return _data_of_images(published.imagenet(paths, size, num_data, random), name, 1000)

    described = (
        f"{size}x{size} photographs in color, 1000 classes; its validation images are the test split; from files"
    )
    return _DataSet(described, ("train", "test"), make)


def _celeba(name: str, split: str, data_dir: Any) -> Data:
    listed = _find_files(name, data_dir, ("celeba", "CelebA"), ("list_eval_partition.txt",))
    number = ("train", "valid", "test").index(split)
    lines = [line.split() for line in listed.read_text().splitlines() if line.strip()]
    files = [listed.parent / "img_align_celeba" / line[0] for line in lines if line[1:] == [str(number)]]
    if not files:
        raise ValueError(f"{listed} names no image of the {split} split: copy it again")
    x = sources.pictures(files, sources.Choice(size=64, gray=False, crop=148))
    return Data(torch.from_numpy(x), levels=256, name=name)


# -- names -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DataSet:
    description: str
    splits: tuple[str, ...]
    make: Callable[[str, str, Any, np.random.Generator, int | None], Data]


def _generated_points(
    description: str, draw: Callable[[np.random.Generator, int], Points], num_classes: int
) -> _DataSet:
    def make(name: str, split: str, data_dir: Any, random: np.random.Generator, num_data: int | None) -> Data:
        points, y = draw(random, num_data or 5000)
        x = torch.as_tensor(points, dtype=torch.get_default_dtype())
        return Data(x, torch.as_tensor(y), name=name, num_classes=num_classes)

    return _DataSet(f"2-D points: {description}", ("train", "valid", "test"), make)


def _files_set(description: str, splits: tuple[str, ...], read: Callable[[str, str, Any], Data]) -> _DataSet:
    def make(name: str, split: str, data_dir: Any, random: np.random.Generator, num_data: int | None) -> Data:
        return subset(read(name, split, data_dir), num_data, random, split)

    return _DataSet(description, splits, make)


def _binary_images_set(description: str, folder: str, *event_shape: int) -> _DataSet:
    read = functools.partial(_packed_bits, folder=folder, event_shape=event_shape)
    return _files_set(f"{description}; from files", ("train", "valid", "test"), read)


def _idx_set(description: str, *folders: str) -> _DataSet:
    read = functools.partial(_idx_images, folders=folders)
    return _files_set(f"{description}; from files", ("train", "test"), read)


_SETS: dict[str, _DataSet] = {
    "digits": _files_set("8x8 digits, integers 0 .. 16, 10 classes", ("train", "test"), _digits),
    "digits-binary": _files_set(
        "the same digits as bits: 1 where the integer is at least 8", ("train", "test"), _digits
    ),
    "moons": _generated_points("two interleaved half circles", _moons, 2),
    "rings": _generated_points("three concentric circles", _rings, 3),
    "checkerboard": _generated_points("uniform on the 8 dark squares of a 4x4 board, entropy log 32", _checkerboard, 8),
    "pinwheel": _generated_points("five bent arms", _pinwheel, 5),
    "glyphs": _drawn_images("28x28 digits and capitals, 36 classes", image_sets.glyphs, num_classes=36, size=28),
    "glyphs-62": _drawn_images("28x28 digits, capitals and small letters", image_sets.glyphs, num_classes=62, size=28),
    "glyphs-digits": _drawn_images(
        "28x28 digits in 17 levels, 10 classes", image_sets.glyphs, levels=17, num_classes=10, size=28
    ),
    "glyphs-color": _drawn_images(
        "32x32 glyphs in color, 36 classes", image_sets.glyphs, num_classes=36, size=32, color=True
    ),
    "patches-8": _drawn_images("8x8 patches of two photographs in color", image_sets.patches, size=8),
    "patches-16": _drawn_images("16x16 patches of the same", image_sets.patches, size=16),
    "patches-32": _drawn_images("32x32 patches of the same", image_sets.patches, size=32),
    "mnist": _idx_set("28x28 digits, integers 0 .. 255, 10 classes", "mnist", "MNIST/raw"),
    "fashion-mnist": _idx_set("28x28 clothes, integers 0 .. 255, 10 classes", "fashion-mnist", "FashionMNIST/raw"),
    "cifar-10": _files_set("32x32 photographs in color, 10 classes; from files", ("train", "test"), _cifar_10),
    "svhn": _files_set("32x32 house numbers in color, 10 classes; from files", ("train", "test"), _svhn),
    "imagenet32": _imagenet(32),
    "imagenet64": _imagenet(64),
    "celeba": _files_set("64x64 faces in color; from files", ("train", "valid", "test"), _celeba),
    "binarized-mnist": _binary_images_set("28x28 digits as bits, Larochelle's split", "binarized-mnist", 1, 28, 28),
    "nltcs": _binary_images_set("16 bits: disabilities in a survey of the elderly", "binary/nltcs", 16),
    "plants": _binary_images_set("69 bits: regions where a plant grows", "binary/plants", 69),
    "mushrooms": _binary_images_set("112 bits: features of mushrooms", "binary/mushrooms", 112),
    "dna": _binary_images_set("180 bits: splice junctions", "binary/dna", 180),
    "nips": _binary_images_set("500 bits: words in papers", "binary/nips", 500),
}

NAMES: dict[str, str] = {name: each.description for name, each in _SETS.items()}
