"""Checks of arguments: each error names the argument, what it got and what to do.

They import neither programs nor Pyro, so every module can use them.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from dgm_pyro.guesses import ARGUMENTS, REMEDIES

Shape = torch.Size | tuple[Any, ...]
WITHIN = ("contextlib", "dgm_pyro", "torch")
"""Packages whose functions run between a user's call and a warning."""

READERS = "dgm.data.open(source) for arrays, frames and files, dgm.data.load(name) for named data sets"
"""How to make data of what is none, for messages."""

F = TypeVar("F", bound=Callable[..., Any])
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _got_no_int(value: Any) -> str:
    """The end of a message about an argument that is no int; numpy's and torch's integers look like one."""
    kind = type(value).__name__
    return f"got {value}, of type {kind}: use int(...) of it" if hasattr(value, "item") else f"got {value!r}"


def as_shape(shape: Any, argument: str = "event_shape") -> torch.Size:
    """An int or a sequence of positive ints as a torch.Size."""
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else (shape,)
    if not all(is_integer(size) and size > 0 for size in sizes):
        raise ValueError(f"{argument} must be a positive int or a tuple of them, {_got_no_int(shape)}")
    return torch.Size(sizes)


def as_given_shape(shape: Any) -> Shape:
    """The shape of one ``given`` as a torch.Size, or a tuple of shapes where ``given`` is a tuple."""
    if isinstance(shape, Sequence) and any(isinstance(part, Sequence) and not isinstance(part, str) for part in shape):
        return tuple(as_given_shape(part) for part in shape)
    return as_shape(shape, "given_shape")


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Raise unless each argument is a positive integer, or a sequence of at least one."""
    for argument, value in sizes.items():
        if as_shape(value, argument) == ():
            raise ValueError(f"{argument} must be a positive int or a tuple of them, got {value!r}")


def check_counts(**counts: Any) -> None:
    """Raise unless each argument is a positive integer."""
    for argument, count in counts.items():
        check_count(count, argument)


def check_count(count: Any, argument: str, at_least: int = 1) -> int:
    if not is_integer(count) or count < at_least:
        wanted = "a positive integer" if at_least == 1 else f"an int of at least {at_least}"
        raise ValueError(f"{argument} must be {wanted}, {_got_no_int(count)}")
    return count


def check_number(
    value: Any, argument: str, *, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf
) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (value >= at_least and above < value <= at_most):
        low = f" above {above}" if above > -math.inf else f" of at least {at_least}" if at_least > -math.inf else ""
        high = f" and at most {at_most}" if at_most < math.inf else ""
        kind = "number" if low or high else "finite number"
        raise ValueError(f"{argument} must be a {kind}{low}{high}, got {value!r}")
    return value


def check_seed(seed: Any) -> int:
    if not is_integer(seed):
        raise TypeError(f"seed must be an integer, {_got_no_int(seed)}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer of at least 0 and at most 64 bits, got {seed}")
    return seed


def generator(seed: Any) -> torch.Generator:
    """A generator on the CPU with this seed."""
    return torch.Generator().manual_seed(check_seed(seed))


def check_choice(value: Any, choices: Collection[str], argument: str, guesses: Mapping[str, str] | None = None) -> None:
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(choices)
        raise ValueError(f"{argument} must be one of {known}, got {value!r}{close_to(value, choices, guesses)}")


def close_to(name: Any, choices: Iterable[str], guesses: Mapping[str, str] | None = None) -> str:
    """The end of a message about an unknown name: the known name that was meant, or what to do.

    Args:
        guesses: names in use elsewhere, and for each a choice or what to do; for other names the spelling decides.
    """
    if not isinstance(name, str):
        return ""
    choices = list(choices)
    return _suggestion((guesses or {}).get(re.sub("[ _-]+", "-", name.lower())) or nearest_name(name, choices), choices)


def _suggestion(meant: str | None, choices: Collection[str]) -> str:
    if meant is None:
        return ""
    return f" (did you mean {meant!r}?)" if meant in choices else f": {meant}"


def suggesting(function: F) -> F:
    """``function``, with an error about an unknown argument that suggests the one that was meant."""
    names, called = inspect.signature(function).parameters, function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        for name in options:
            if name not in names:
                ours = next((each for each in ARGUMENTS.get(name, ()) if each in names), None)
                meant = REMEDIES.get(called, {}).get(name) or ours or nearest_name(name, names)
                raise TypeError(f"{called} takes no {name}{_suggestion(meant, names)}")
        return function(*args, **options)

    return cast(F, checked)


def warn(message: str) -> None:
    """Warn of the line outside of the package from which it was called."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in WITHIN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def nearest_name(name: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice with the closest spelling, in any case; None if no similarity, from 0 to 1, reaches ``cutoff``."""
    known = {choice.lower(): choice for choice in choices}
    return next((known[close] for close in difflib.get_close_matches(name.lower(), known, 1, cutoff)), None)


def near_name(path: Path) -> str:
    """The end of a message about a path that does not exist: the file next to it with the closest name."""
    beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    return close_to(path.name, beside)


def check_network_options(*, levels: Any = None, num_classes: Any = None, dropout: Any = 0.0) -> None:
    """Check the options that networks have in common."""
    if levels is not None:
        check_count(levels, "levels", at_least=2)
    if num_classes is not None:
        check_count(num_classes, "num_classes")
    check_number(dropout, "dropout", at_least=0, at_most=1)


def check_name(name: Any, argument: str) -> None:
    """Raise unless ``name`` may be that of a site."""
    if not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(
            f"{argument} must be the name of a site, a non-empty string of printable letters, got {name!r}"
        )


def check_type(value: Any, kind: Any, argument: str, wanted: str) -> None:
    """Raise a TypeError unless ``value`` is an instance of ``kind``.

    Args:
        wanted: description of the kind for the message ("a dgm.Program").
    """
    if not isinstance(value, kind):
        raise TypeError(f"{argument} must be {wanted}, got {type(value).__name__}")


def check_path(path: Any, argument: str) -> None:
    check_type(path, (str, os.PathLike), argument, "a path")
    if path == "":
        raise ValueError(f"{argument} is empty: name a path, or '.' for the current folder")


def check_dense(x: Any, argument: str) -> None:
    """Raise unless ``x`` is a dense tensor."""
    if not isinstance(x, Tensor):
        remedy = f"torch.as_tensor({argument})"
        if isinstance(getattr(x, "x", None), Tensor):  # Data
            remedy = f"{argument}.x"
        elif isinstance(x, int | float):
            remedy = f"torch.tensor([{x!r}]), one per datum"
        elif hasattr(x, "columns"):  # a frame, of which torch makes no tensor
            remedy = f"dgm.data.open({argument}).x"
        elif isinstance(x, str):
            remedy = f"dgm.data.load({x!r}).x or dgm.data.open({x!r}).x"
        raise TypeError(f"{argument} must be a torch.Tensor, got {type(x).__name__}: use {remedy}")
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{argument} is a tensor of layout {x.layout}: use {argument}.to_dense()")


def is_finite(x: Tensor) -> bool:
    """Whether no number is NaN or infinite. Their sum shows it without a copy, unless it overflows."""
    return bool(torch.isfinite(x.sum()) or torch.isfinite(x).all())


def check_finite(x: Any, argument: str, *, missing: bool = False) -> None:
    """Raise unless ``x`` is a tensor of numbers, none of them NaN or infinite.

    Args:
        missing: whether the message should mention NaN for missing values, which a `Data` can mark.
    """
    check_dense(x, argument)
    if not is_finite(x):
        masked = f"dgm.Data({argument}, mask=~{argument}.isnan())"
        raise ValueError(
            f"{argument} holds NaN or infinite values: clean them or drop those rows"
            + (f"; if NaN means missing, dgm.fit and dgm.evaluate take {masked}" if missing and x.isnan().any() else "")
        )


def check_range(x: Tensor, argument: str, rows: Sequence[int] | Any = None) -> None:
    """Raise if a finite double is beyond the range of the default dtype, in which networks compute.

    Args:
        rows: row numbers for the message; default from 0.
    """
    dtype = torch.get_default_dtype()
    largest = torch.finfo(dtype).max
    if x.dtype != torch.float64 or dtype == torch.float64 or not bool((x.abs() > largest).any()):
        return
    row, *_ = place = tuple((x.abs() > largest).nonzero()[0].tolist())
    name = str(dtype).removeprefix("torch.")
    raise ValueError(
        f"{argument} holds {x[place].item():.4g} in row {row if rows is None else rows[row]}, but networks compute in "
        f"{name}, whose largest number is {largest:.4g}: use other units or logarithms, or correct the value if it "
        "marks a missing one"
    )


def as_reals(value: Any, argument: str, *, positive: bool = False) -> Tensor:
    """A tensor, a number or a sequence of them as a tensor of finite reals; integers get the default dtype."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument} must be a tensor, a number or a sequence of them, got {value!r}") from error
    check_finite(tensor, argument)
    if positive and not bool((tensor > 0).all()):
        raise ValueError(f"{argument} must be positive, got {float(tensor.min()):.4g}: use 1 for a constant feature")
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def check_labels(y: Any, argument: str, num_data: int) -> None:
    """Raise unless ``y`` is one integer per datum."""
    check_dense(y, argument)
    if tuple(y.shape) != (num_data,):
        raise ValueError(
            f"{argument} has shape {tuple(y.shape)}, but x has {num_data} rows: pass one label per datum, ({num_data},)"
        )
    if y.dtype not in INTEGERS:
        raise TypeError(f"{argument} has dtype {y.dtype}: labels are integers, use {argument}.long()")


def check_tensor(x: Any, shape: Shape, argument: str, owner: str) -> None:
    """Raise unless ``x`` is a non-empty tensor of shape ``(B, *shape)``."""
    check_dense(x, argument)
    if x.dim() != len(shape) + 1 or x.shape[1:] != torch.Size(shape):
        expected = f"(B, *{tuple(shape)})" if shape else "(B,), one number per datum"
        raise ValueError(f"{argument} has shape {tuple(x.shape)}, but {owner} is {tuple(shape)}: pass {expected}")
    if len(x) == 0:
        raise ValueError(f"{argument} is empty: it has shape {tuple(x.shape)}")


def find_device(device: str | torch.device) -> torch.device:
    """The device named ``device``; "auto" is CUDA if there is a CUDA device, else the CPU.

    Raises:
        ValueError: torch does not know the device or does not find it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:
        found = None
    if found is None:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    try:
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # a backend that is not there fails in its own way
        raise ValueError(
            f"device {str(device)!r} was requested, but torch finds no {str(found).upper()} device: use device='cpu'"
        ) from error
    return found
