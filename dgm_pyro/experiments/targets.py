"""A model and a guide in a user's file: the targets of ``dgm doctor`` and ``dgm infer``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from dgm_pyro.checks import close_to, near_name
from dgm_pyro.diagnosis.messages import in_one_line
from dgm_pyro.jobs import send_by_value

__all__ = ["pair_from"]


def pair_from(target: str, arguments: str = "data") -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    """The pair that ``FILE.py:MODEL,GUIDE`` or ``MODULE:MODEL,GUIDE`` names, and its arguments.

    Args:
        target: without ``,GUIDE``, a model alone or a `Program`.
        arguments: a name in the same file: a value, or a function without arguments that returns one. A tuple holds
            the positional arguments, and a dict the named ones. Without such a name, the pair has no arguments.

    Returns:
        model, guide, args, kwargs.

    Raises:
        ValueError: the file or a name in it does not exist, or the user's code raises an error or exits.
    """
    source, _, names = target.rpartition(":")
    model_name, _, guide_name = names.partition(",")
    if not source or not model_name:
        raise ValueError(f"{target!r} must be FILE.py:MODEL or MODULE:MODEL, and ,GUIDE where there is one")
    module = _import_source(source)

    def get(name: str) -> Any:
        thing: Any = module
        for part in name.strip().split("."):
            if not hasattr(thing, part):
                raise ValueError(f"{source} has no {name!r}{close_to(part, dir(thing))}")
            thing = getattr(thing, part)
        return thing

    model, guide = get(model_name), get(guide_name) if guide_name else None
    value = get(arguments) if arguments != "data" or hasattr(module, "data") else ()
    if callable(value) and not isinstance(value, Tensor):
        with _errors_of_user_code(f"{arguments}() of {source}", "when it is called without arguments"):
            value = value()
    if isinstance(value, dict):
        return model, guide, (), value
    return model, guide, value if isinstance(value, tuple) else (value,), {}


def _import_source(source: str) -> types.ModuleType:
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except (Exception, SystemExit) as error:
            raise ValueError(f"cannot import {source}: {in_one_line(error)}") from error
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"there is no file {source}{near_name(path)}")
    spec = importlib.util.spec_from_file_location(f"dgm_doctor_{path.stem}", path)  # random.py must not become random
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where data classes look for it
    sys.path.insert(0, str(path.parent.resolve()))  # lets the file import its neighbors
    try:
        with _errors_of_user_code(source, "when it is loaded"):
            spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    send_by_value(module)
    return module


@contextlib.contextmanager
def _errors_of_user_code(code: str, when: str) -> Iterator[None]:
    """Turn errors and exits of the user's ``code`` into an error in one line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(f"{code} raises {type(error).__name__} {when}: {in_one_line(error)}") from error
