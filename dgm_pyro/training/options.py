"""Training options, which `dgm.fit`, a run, a sweep, the command line and ``run.json`` share.

An option is defined here alone: its name, type, meaning, default and check. `dgm.fit` repeats the name in its
signature, and a test compares the two. This module does not import torch, so ``dgm --help`` does not either.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

__all__ = ["TrainingOptions"]

LR_SCHEDULES = ("cosine", "constant")
PRECISIONS = ("float32", "tf32", "bf16")
Documented = TypeVar("Documented")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of a training, apart from program, data and objective, as plain Python values.

    Args:
        {options}

    Raises:
        ValueError, TypeError: an option does not fit; the message names it.
    """

    epochs: Annotated[int, "Passes over the data."] = 50
    gradient_steps: Annotated[int | None, "Total number of steps, instead of epochs."] = None
    minutes: Annotated[float | None, "End after this many minutes of training, even if epochs or steps are left."] = (
        None
    )
    batch_size: Annotated[int, "Data per step."] = 64
    accumulate: Annotated[int, "Number of parts of a batch, computed in turn: the same step in less memory."] = 1
    drop_last: Annotated[bool, "Leave out the last batch of an epoch where it is smaller."] = False
    lr: Annotated[float, "Learning rate. It warms up over the first 2 % of the steps."] = 1e-3
    weight_decay: Annotated[float, "Decoupled weight decay, as in AdamW."] = 0.0
    lr_schedule: Annotated[
        str,
        "Learning-rate schedule: cosine (falls to zero), constant, or a class of torch.optim.lr_scheduler, which "
        "counts steps and has no warm-up, such as 'StepLR(step_size=1000)'.",
    ] = "cosine"
    optimizer: Annotated[str, "Class of torch.optim, with options if any, such as 'SGD(momentum=0.9)'."] = "AdamW"
    clip_norm: Annotated[float | None, "Largest norm of the gradient. Larger gradients are scaled down to it."] = 10.0
    skip_norm: Annotated[float | None, "Skip steps whose gradient has a larger norm than this, before clipping."] = None
    seed: Annotated[int, "Seed of all random numbers. The same seed gives the same bits on the same CPU."] = 0
    device: Annotated[str, "Device: auto (CUDA if available), cpu, cuda or cuda:N."] = "auto"
    validation: Annotated[float | None, "Fraction of the data held out for validation."] = 0.1
    validate_every: Annotated[int | None, "Steps between two validations. Default: one epoch."] = None
    early_stopping: Annotated[int | None, "Stop after this many validations without a better loss."] = None
    ema: Annotated[float | None, "Decay of an average of the weights, such as 0.99. The average is then kept."] = None
    compile: Annotated[
        bool | str,
        "Compile the steps. Default: in trainings of 5,000 steps or more. On a GPU, False also records no CUDA graph.",
    ] = "auto"
    checkpoint_minutes: Annotated[float, "Minutes between two stored states, from which training can resume."] = 5.0
    precision: Annotated[
        str,
        "float32 (the program's own), tf32 (for matrix products on a GPU), or bf16 (networks under autocast).",
    ] = "float32"

    def __post_init__(self) -> None:
        from dgm_pyro.checks import (
            check_choice,
            check_count,
            check_number,
            check_seed,
            check_type,
        )  # which import torch

        for name in ("epochs", "batch_size", "accumulate"):
            check_count(getattr(self, name), name)
        for name in ("gradient_steps", "validate_every", "early_stopping"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name)
        for name in ("lr", "minutes", "clip_norm", "skip_norm", "checkpoint_minutes"):
            if getattr(self, name) is not None or name in ("lr", "checkpoint_minutes"):
                check_number(getattr(self, name), name, above=0)
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate is {self.accumulate}, which must divide batch_size, {self.batch_size}")
        check_type(self.drop_last, bool, "drop_last", "True or False")
        check_number(self.weight_decay, "weight_decay", at_least=0)
        check_type(self.lr_schedule, str, "lr_schedule", "a string")
        if self.lr_schedule not in LR_SCHEDULES:
            call_of(self.lr_schedule, "lr_schedule")
        call_of(self.optimizer, "optimizer")
        check_seed(self.seed)
        check_type(self.device, str, "device", "'auto', 'cpu', 'cuda' or 'cuda:N'")
        if self.validation is not None and not 0 < check_number(self.validation, "validation") < 1:
            raise ValueError(f"validation must be a fraction between 0 and 1, or None, got {self.validation}")
        if self.ema is not None and not 0 < check_number(self.ema, "ema") < 1:
            raise ValueError(f"ema must be a decay between 0 and 1, got {self.ema!r}")
        if not (isinstance(self.compile, bool) or self.compile == "auto"):
            raise ValueError(f"compile must be True, False or 'auto', got {self.compile!r}")
        check_choice(self.precision, PRECISIONS, "precision")

    def recipe(self) -> dict[str, Any]:
        """The options on which results depend: a record stores them, and a resumed training must have the same."""
        return {name: value for name, value in vars(self).items() if name not in ("device", "checkpoint_minutes")}


def call_of(text: str, argument: str) -> tuple[str, dict[str, Any]]:
    """The name and the options in "SGD(momentum=0.9)"; "SGD" has no options.

    Raises:
        ValueError, TypeError: ``text`` is no such call with plain Python values.
    """
    wanted = f"{argument} must be the name of a class, or a call like 'SGD(momentum=0.9)', got {text!r}"
    if not isinstance(text, str):
        raise TypeError(wanted)
    try:
        call = ast.parse(text, mode="eval").body
        name, keywords = (call.func, call.keywords) if isinstance(call, ast.Call) and not call.args else (call, [])
        values = {str(each.arg): ast.literal_eval(each.value) for each in keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(wanted) from error
    if not isinstance(name, ast.Name):
        raise ValueError(wanted)
    return name.id, values


def value_of(text: str) -> Any:
    """The number, or sequence of numbers, that ``text`` writes; any other text is a name and stays."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text


def option_types() -> dict[str, tuple[Any, str]]:
    """Type and meaning of each option, by name."""
    hints = get_type_hints(TrainingOptions, include_extras=True)
    return {name: get_args(hint) for name, hint in hints.items()}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two recipes, in words, for the error that refuses to resume one as the other."""
    return [
        f"{name} was {before.get(name)!r} and is now {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]


def documented(thing: Documented) -> Documented:
    """``thing`` with all options in its docstring, in place of ``{options}``."""
    lines = [f"{name}: {meaning}" for name, (_, meaning) in option_types().items()]
    thing.__doc__ = inspect.cleandoc(thing.__doc__ or "").replace("{options}", "\n    ".join(lines))
    return thing


documented(TrainingOptions)
