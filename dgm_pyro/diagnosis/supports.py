"""Supports of distributions in words, values outside of them, and transforms without an inverse."""

from __future__ import annotations

import contextlib
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

SUPPORT_DRAWS = 200


def base_of(fn: Any) -> Any:
    """The distribution within `to_event` and masks."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def constraint_of(fn: Any) -> Any:
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        return None
    while isinstance(support, type(constraints.independent(constraints.real, 1))):
        support = support.base_constraint
    return support


def kind_of_support(fn: Any) -> str:
    return type(constraint_of(fn)).__name__.strip("_")


def support_in_words(fn: Any) -> str:
    """The support of a distribution in words."""
    return in_words(constraint_of(fn))


def in_words(support: Any) -> str:
    kind = type(support).__name__.strip("_")
    names = {"GreaterThan": "the positive reals", "GreaterThanEq": "the non-negative reals", "Real": "the reals",
             "Boolean": "{0, 1}", "Simplex": "the simplex"}  # fmt: skip
    if kind in ("GreaterThan", "GreaterThanEq") and not _same_number(getattr(support, "lower_bound", 0), 0):
        return str(support)
    if kind == "IntegerInterval":
        return f"the integers {_bound_as_text(support.lower_bound)} .. {_bound_as_text(support.upper_bound)}"
    if kind in ("Interval", "HalfOpenInterval"):
        return f"the interval from {_bound_as_text(support.lower_bound)} to {_bound_as_text(support.upper_bound)}"
    return names.get(kind, kind)


def _bound_as_text(bound: Any) -> str:
    numbers = torch.as_tensor(bound).flatten().unique()
    return f"{numbers[0].item():g}" if len(numbers) == 1 else "its bounds"


def _same_number(bound: Any, value: float) -> bool:
    return bool((torch.as_tensor(bound) == value).all())


def suggestion(fn: Any) -> str:
    kind = kind_of_support(fn)
    return {"GreaterThan": "LogNormal or Gamma", "GreaterThanEq": "LogNormal or Gamma", "Interval": "Beta",
            "Boolean": "Bernoulli", "IntegerInterval": "Categorical", "Simplex": "Dirichlet"}.get(
        kind, "one of the model's family")  # fmt: skip


@torch.no_grad()
def draws_of(fn: Any) -> Tensor:
    with poutine.block():
        return fn.sample((SUPPORT_DRAWS,))


@torch.no_grad()
def outside(fn: Any, value: Tensor) -> bool:
    """Whether any of ``value`` is outside the support; False if the distribution declares none, or shapes differ."""
    support = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        support = fn.support
    if support is None or not isinstance(value, Tensor):
        return False
    try:
        return not bool(support.check(value).all())
    except (RuntimeError, NotImplementedError):
        return False


def non_invertible(fn: Any) -> str:
    """The name of the first transform without an inverse; empty if all have one."""
    flow = base_of(fn)
    if not isinstance(flow, torch.distributions.TransformedDistribution):
        return ""
    z = flow.base_dist.sample()
    for transform in flow.transforms:
        with torch.no_grad():
            x = transform(z)
            try:
                if not transform.bijective:
                    raise NotImplementedError
                transform.inv(x.clone())
            except (KeyError, NotImplementedError):
                return _transform_name(transform)
            z = x
    return ""


def _transform_name(transform: Transform) -> str:
    return type(transform).__name__
