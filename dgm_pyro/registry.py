"""Names of the classes that a checkpoint may rebuild, and the constructor arguments of each object.

A checkpoint stores class names and constructor arguments, never code. ``register`` makes a class known to it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

import torch

import dgm_pyro.old_names as old_names
from dgm_pyro.checks import check_type

__all__ = ["arguments_of", "register"]

REGISTRY: dict[str, type] = {}

T = TypeVar("T", bound=type)


def register(cls: T) -> T:
    """Class decorator: checkpoints may name ``cls``, and its instances record their constructor arguments.

    With it, ``dgm.save`` and ``dgm.load`` can rebuild your own `Program` or network:

    >>> import torch, dgm_pyro as dgm
    >>> @dgm.register
    ... class Doubling(torch.nn.Module):
    ...     def __init__(self, features):
    ...         super().__init__()
    ...         self.features = features
    >>> dgm.registry.arguments_of(Doubling(3))
    {'features': 3}

    Raises:
        ValueError: another class is registered under the same name.
    """
    check_type(cls, type, "cls", "a class")
    other = REGISTRY.get(cls.__name__)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"the name {cls.__name__!r} is registered for {other.__module__}.{other.__qualname__}: rename your class"
        )
    REGISTRY[cls.__name__] = cls
    init = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(init)
    names = old_names.ARGUMENTS.get(cls.__name__, {})
    old = {name: now for name, now in names.items() if name not in signature.parameters}

    @functools.wraps(init)
    def recording_init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in old.keys() & kwargs.keys():
            raise TypeError(f"{cls.__name__} takes no {name}: it is {old[name]} now")
        # The outermost constructor runs first, so the arguments kept are those the user wrote.
        if "_arguments" not in self.__dict__:
            bound = signature.bind(self, *args, **kwargs)
            arguments = dict(list(bound.arguments.items())[1:])
            for parameter in signature.parameters.values():
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    arguments.update(arguments.pop(parameter.name, {}))
            self.__dict__["_arguments"] = arguments
        init(self, *args, **kwargs)

    cls.__init__ = recording_init  # type: ignore[misc]
    return cls


def arguments_of(module: torch.nn.Module) -> dict[str, Any]:
    """The constructor arguments of an instance of a registered class, by name.

    Raises:
        TypeError: the class is not registered.
    """
    cls = type(module)
    if REGISTRY.get(cls.__name__) is not cls:
        raise TypeError(
            f"{cls.__module__}.{cls.__qualname__} is not registered: put @dgm.register above the class, "
            "so that a checkpoint can name it"
        )
    return dict(module.__dict__["_arguments"])


def replace_argument(module: torch.nn.Module, given: Any, made: Any) -> None:
    """Record ``made`` instead of the constructor argument ``given``, a function that no checkpoint can store."""
    arguments = module.__dict__.get("_arguments", {})
    arguments.update({name: made for name, value in arguments.items() if value is given})
