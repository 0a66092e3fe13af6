"""The modules and tensors that a model and a guide hold, their names, and their values before a run."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import pyro
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@contextlib.contextmanager
def unchanged(callables: Sequence[Any]) -> Iterator[None]:
    """Restore all that runs of the callables change: tensors, gradients, contents of modules, random states."""
    tensors = [
        (tensor, tensor.detach().clone(), tensor.grad if tensor.is_leaf else None, tensor.requires_grad)
        for tensor in _changeable_tensors(callables)
        if not is_lazy(tensor)
    ]
    tables = [table for module in modules_held(callables) for table in (vars(module), *vars(module).values())]
    held = [(table, dict(table)) for table in tables if isinstance(table, dict)]
    python, numpys = random.getstate(), numpy.random.get_state()
    for tensor, _, gradient, _ in tensors:
        if gradient is not None:
            tensor.grad = None
    try:
        yield
    finally:
        for table, entries in held:
            table.clear()
            table.update(entries)
        for tensor, value, gradient, trainable in tensors:
            with torch.no_grad():
                tensor.copy_(value)
            if tensor.is_leaf:
                tensor.requires_grad_(trainable).grad = gradient
        random.setstate(python)
        numpy.random.set_state(numpys)


def named_tensors(callables: Sequence[Any]) -> tuple[dict[int, tuple[str, Tensor]], set[int]]:
    """Names of the tensors with gradients that the callables can reach, and the ids of those they own."""
    named: dict[int, tuple[str, Tensor]] = {}
    own: set[int] = set()
    for path, thing in _reachable_tensors(callables):
        if isinstance(thing, nn.Module):
            for name, parameter in thing.named_parameters():
                if parameter.requires_grad:
                    named.setdefault(id(parameter), (f"{path}.{name}" if path else name, parameter))
        elif isinstance(thing, Tensor) and thing.requires_grad:
            named.setdefault(id(thing), (path, thing))
    for each in callables:
        if isinstance(each, nn.Module):
            own |= {id(parameter) for parameter in each.parameters()}
    return named, own


def _changeable_tensors(callables: Sequence[Any]) -> list[Tensor]:
    """Parameters, buffers and leaf tensors that a visit could change."""
    found = {id(thing): thing for _, thing in _reachable_tensors(callables) if isinstance(thing, Tensor)}
    for module in modules_held(callables):
        found |= {id(tensor): tensor for tensor in (*module.parameters(False), *module.buffers(False))}
    found |= {id(tensor): tensor for tensor in pyro.get_param_store().get_state()["params"].values()}
    return list(found.values())


def modules_held(callables: Sequence[Any]) -> list[nn.Module]:
    reachable = [thing for _, thing in _reachable_tensors(callables) if isinstance(thing, nn.Module)]
    return list(dict.fromkeys(module for thing in reachable for module in thing.modules()))


def _reachable_tensors(callables: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Modules and leaf tensors, with a name, that callables hold, close over, or read from their globals."""
    pending: list[tuple[str, Any, int]] = [("", each, 0) for each in callables if each is not None]
    seen: set[int] = set()
    while pending:
        path, thing, depth = pending.pop()
        if id(thing) in seen or depth > 4:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module) or (isinstance(thing, Tensor) and thing.is_leaf):
            yield path, thing
        elif isinstance(thing, functools.partial):
            held = [thing.func, *thing.args, *thing.keywords.values()]
            pending += [(path, each, depth + 1) for each in held]
        elif isinstance(thing, types.MethodType):
            pending += [("", thing.__self__, depth + 1), (path, thing.__func__, depth + 1)]
        elif isinstance(thing, types.FunctionType):
            if thing.__module__ and thing.__module__.split(".")[0] in ("torch", "pyro"):
                continue
            names, cells = thing.__code__.co_freevars, thing.__closure__ or ()
            for name, cell in zip(names, cells, strict=True):
                with contextlib.suppress(ValueError):  # an empty cell
                    pending.append((name, cell.cell_contents, depth + 1))
            reads = set(thing.__code__.co_names)
            pending += [(name, thing.__globals__[name], depth + 1) for name in reads if name in thing.__globals__]
        elif isinstance(thing, list | tuple):
            pending += [(f"{path}[{i}]", each, depth + 1) for i, each in enumerate(thing[:64])]
        elif isinstance(thing, dict):
            items = itertools.islice(thing.items(), 64)
            pending += [(f"{path}[{key!r}]", each, depth + 1) for key, each in items]
        elif hasattr(thing, "__dict__") and not isinstance(thing, type | types.ModuleType):
            held_by = getattr(thing, "__dict__", {})
            pending += [(f"{path}.{name}".lstrip("."), each, depth + 1) for name, each in list(held_by.items())[:64]]
