"""Optimizers and learning-rate schedules: classes of torch by name, or functions that make one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dgm_pyro.checks import check_choice
from dgm_pyro.training.options import LR_SCHEDULES, TrainingOptions, call_of

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


def optimizer_of(
    options: TrainingOptions, parameters: Iterable[nn.Parameter], factory: OptimizerFactory | None = None
) -> Optimizer:
    """The optimizer of the factory or the options; it gets ``lr`` and ``weight_decay`` if its class takes them.

    Raises:
        ValueError: there is no such class, or it does not take these options.
        TypeError: the factory returns something else.
    """
    if factory is not None:
        return _check_made(factory(parameters), Optimizer, "optimizer")
    name, given = call_of(options.optimizer, "optimizer")
    cls = _class_by_name(torch.optim, name, Optimizer, "optimizer")
    if inspect.signature(cls.step).parameters["closure"].default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer {name!r} evaluates the loss several times per step: choose another, such as 'AdamW'"
        )
    given = {"lr": options.lr, **given}
    if "weight_decay" in inspect.signature(cls).parameters:
        given = {"weight_decay": options.weight_decay, **given}
    elif options.weight_decay:
        raise ValueError(f"weight_decay is {options.weight_decay}, but {name} has none: leave it out")
    if name == "AdamW":
        given = {"fused": True, **given}
    return _construct(cls, parameters, given, options.optimizer, "optimizer")


def scheduler_of(
    options: TrainingOptions, optimizer: Optimizer, factory: SchedulerFactory | None = None
) -> LRScheduler | None:
    """The scheduler of the factory or the options; None for "cosine" and "constant". Raises as `optimizer_of`."""
    if factory is not None:
        return _check_made(factory(optimizer), LRScheduler, "lr_schedule")
    if options.lr_schedule in LR_SCHEDULES:
        return None
    name, given = call_of(options.lr_schedule, "lr_schedule")
    cls = _class_by_name(torch.optim.lr_scheduler, name, LRScheduler, "lr_schedule", *LR_SCHEDULES)
    return _check_made(
        _construct(cls, optimizer, given, options.lr_schedule, "lr_schedule"), LRScheduler, "lr_schedule"
    )


def _class_by_name(module: Any, name: str, kind: type, argument: str, *others: str) -> Any:
    names = {each for each, cls in vars(module).items() if inspect.isclass(cls) and issubclass(cls, kind)}
    names -= {kind.__name__, "_LRScheduler", "ReduceLROnPlateau"}
    if name not in names:
        check_choice(name, [*others, *sorted(names)], argument)
    return getattr(module, name)


def _construct(cls: Any, first: Any, given: dict[str, Any], text: str, argument: str) -> Any:
    try:
        return cls(first, **given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{argument} {text!r} cannot be made: {error}") from error


def _check_made(thing: Any, kind: type, argument: str) -> Any:
    if not isinstance(thing, kind) or isinstance(thing, ReduceLROnPlateau):
        raise TypeError(
            f"{argument} must make a torch {kind.__name__} that steps without a metric, got {type(thing).__name__}"
        )
    return thing
