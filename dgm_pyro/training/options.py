"""How to train: the options that `dgm.fit`, a run, a sweep, the command line and ``run.json`` share.

An option is written here alone: its name, type, meaning, default and check. `dgm.fit` repeats its name, for whoever
types it, and a test holds the two together. This module does without torch, so that ``dgm --help`` does too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

LR_SCHEDULES = ("cosine", "constant")
PRECISIONS = ("float32", "bf16")
Documented = TypeVar("Documented")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train, beyond the program, the data and the objective; all of it is plain Python.

    Args:
        {options}

    Raises:
        ValueError, TypeError: an option does not fit; the message names it.
    """

    epochs: Annotated[int, "Passes over the data."] = 50
    batch_size: Annotated[int, "Data per step."] = 64
    lr: Annotated[float, "Learning rate. It warms up over the first 2 % of the steps."] = 1e-3
    weight_decay: Annotated[float, "Decoupled weight decay, as in AdamW."] = 0.0
    lr_schedule: Annotated[str, "Learning-rate schedule: cosine (falls to zero) or constant."] = "cosine"
    seed: Annotated[int, "Seed of all random numbers. The same seed gives the same bits on the same CPU."] = 0
    device: Annotated[str, "Device: auto (CUDA if available), cpu, cuda or cuda:N."] = "auto"
    validation: Annotated[float | None, "Fraction of the data held out for validation."] = 0.1
    early_stopping: Annotated[int | None, "Stop after this many epochs without a better validation loss."] = None
    ema: Annotated[float | None, "Decay of the average of the weights, such as 0.99. The average is kept."] = None
    compile: Annotated[bool | str, "Compile the steps. Default: only in trainings of 5,000 steps or more."] = "auto"
    precision: Annotated[str, "float32 (the program as it is), or bf16 (its networks under autocast)."] = "float32"

    def __post_init__(self) -> None:
        from dgm_pyro.checks import (
            check_choice,
            check_count,
            check_number,
            check_seed,
            check_type,
        )  # which import torch

        check_count(self.epochs, "epochs")
        check_count(self.batch_size, "batch_size")
        check_number(self.lr, "lr", above=0)
        check_number(self.weight_decay, "weight_decay", at_least=0)
        check_choice(self.lr_schedule, LR_SCHEDULES, "lr_schedule")
        check_seed(self.seed)
        check_type(self.device, str, "device", "'auto', 'cpu', 'cuda' or 'cuda:N'")
        if self.validation is not None and not 0 < check_number(self.validation, "validation") < 1:
            raise ValueError(f"validation must be a fraction between 0 and 1, or None, got {self.validation}")
        if self.early_stopping is not None:
            check_count(self.early_stopping, "early_stopping")
        if self.ema is not None and not 0 < check_number(self.ema, "ema") < 1:
            raise ValueError(f"ema must be a decay between 0 and 1, got {self.ema!r}")
        if not (isinstance(self.compile, bool) or self.compile == "auto"):
            raise ValueError(f"compile must be True, False or 'auto', got {self.compile!r}")
        check_choice(self.precision, PRECISIONS, "precision")

    def recipe(self) -> dict[str, Any]:
        """What a record keeps, and a training that is continued must have in common: all but the device."""
        return {name: value for name, value in vars(self).items() if name != "device"}


def option_types() -> dict[str, tuple[Any, str]]:
    """Type and meaning of each option, by name."""
    hints = get_type_hints(TrainingOptions, include_extras=True)
    return {name: get_args(hint) for name, hint in hints.items()}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two recipes, in words; an error that refuses to continue the first by the second says it."""
    return [
        f"{name} was {before.get(name)!r} and is now {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]


def documented(thing: Documented) -> Documented:
    """``thing`` with every option in its docstring, in the place of ``{options}``."""
    lines = [f"{name}: {meaning}" for name, (_, meaning) in option_types().items()]
    thing.__doc__ = inspect.cleandoc(thing.__doc__ or "").replace("{options}", "\n    ".join(lines))
    return thing


documented(TrainingOptions)
