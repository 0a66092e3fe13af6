r"""Standardization: a program of standardized data as a program of data in the user's units.

Networks and densities start at scale 1 around 0. With :math:`u = (x - a) / b` and a density p(u) at that scale, the
density of x is

.. math::
    \log p(x) = \log p(u) - \sum_i \log b_i,

so evidence, scores and samples are in the units of x, and programs with different standardizations can be compared.

A real ``given`` may have units of its own: ``given_shift`` and ``given_scale`` standardize it. No density is one of
``given``, so there is no Jacobian.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from dgm_pyro.checks import Shape
from dgm_pyro.data import Data
from dgm_pyro.factors import Formula
from dgm_pyro.families.transforms import CachedTransform, line_of
from dgm_pyro.networks.standardize import Standardize, in_units, standard
from dgm_pyro.program import (
    Program,
    alone,
    check_program,
    is_pair,
    map_given,
    support_of,
    unwrapped,
)
from dgm_pyro.registry import register

__all__ = ["Standardized"]

Numbers = Tensor | float | Sequence[float]


@register
class Standardized(Program):
    """A program of u = (x - shift) / scale as a program of x, whose density is in the units of x.

    Latents, codes and the sites of an unrolled chain are those of the program within; only x changes its units.
    Data in float64 may be far from zero, because they are shifted in their own precision. Data in float32 have seven
    digits: at 1e6 they are already multiples of 1/16.

    Args:
        program: p(u), or p(u | given).
        shift, scale: shift and scale of x, broadcast to its event_shape; both None where only ``given`` is
            standardized.
        given_shift, given_scale: shift and scale of ``given``, broadcast to its given_shape.

    Raises:
        ValueError, TypeError: the program has no density on reals, or shapes do not fit.

    >>> import torch, dgm_pyro as dgm
    >>> program = dgm.Standardized(dgm.Normal(2), shift=[100.0, 0.0], scale=[10.0, 0.1])
    >>> normal = torch.distributions.Normal(torch.tensor([100.0, 0.0]), torch.tensor([10.0, 0.1]))
    >>> x = torch.tensor([[95.0, 0.3]])
    >>> torch.allclose(program.log_prob(x), normal.log_prob(x).sum(-1))
    True
    """

    any_precision = True

    def __init__(
        self,
        program: Program,
        shift: Numbers | None = None,
        scale: Numbers | None = None,
        *,
        given_shift: Numbers | None = None,
        given_scale: Numbers | None = None,
    ):
        super().__init__()
        check_program(program)
        self.program = program
        self.event_shape, self.levels, self.variable = program.event_shape, program.levels, program.variable
        self.conditional, self.given_shape = program.conditional, program.given_shape
        self.num_classes, self.tractable = program.num_classes, program.tractable
        self.units = _standardize_layer("", shift, scale, program.event_shape, "the program's event_shape")
        self.given_units = None
        if self.units is not None and program.measure != "density":
            raise TypeError(
                f"program must have a density on reals, but this {type(program).__name__} is a mass, and integers have "
                "no other units: leave out shift and scale"
            )
        if given_shift is not None or given_scale is not None:
            read = program.given_shape
            if read is None or is_pair(read) or program.num_classes is not None:
                raise ValueError(
                    f"given_shift and given_scale need a single real given, but this {type(program).__name__} has "
                    f"given_shape {read} and num_classes {program.num_classes}: leave them out"
                )
            self.given_units = _standardize_layer("given_", given_shift, given_scale, read, "the program's given_shape")
        elif self.units is None:
            raise ValueError("nothing is standardized: pass shift and scale, or given_shift and given_scale")

    def standard(self, x: Tensor) -> Tensor:
        """u = (x - shift) / scale."""
        u: Tensor = x if self.units is None else self.units(x)
        return u

    def in_units(self, u: Tensor) -> Tensor:
        """x = shift + scale * u."""
        return u if self.units is None else in_units(u, self.units.shift, self.units.scale)

    def log_volume(self, mask: Tensor | None = None) -> Tensor | float:
        """log |dx / du| in nats; with a ``mask``, ``(B, *event_shape)``, that of its True features alone, ``(B,)``."""
        if self.units is None:
            return 0.0
        logs = self.units.scale.log().expand(self.event_shape)
        return logs.sum() if mask is None else torch.where(mask, logs, 0.0).flatten(1).sum(1)

    def standard_given(self, given: Any) -> Any:
        return given if self.given_units is None else map_given(self.given_units, given)

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        given = self.standard_given(given)
        if self.units is None:
            return self.program.joint(name, value, given)
        shift, scale = (value.expand(self.event_shape) for value in (self.units.shift, self.units.scale))
        to_units = _ToUnits(shift, scale, len(self.event_shape))
        u = None if value is None else to_units.inv(value)
        with _InUnits(name, to_units, self.program.feature_sites(name)):
            u = self.program.joint(name, u, given)
        return to_units(u)

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        self.program.posterior(name, self.standard(value), self.standard_given(given))

    def latents(self, name: str) -> tuple[str, ...] | None:
        return self.program.latents(name)

    def feature_sites(self, name: str) -> dict[str, int]:
        return self.program.feature_sites(name)

    def unroll(self) -> Standardized:
        return self._with_program(self.program.unroll())

    def unroll_latents(self) -> Standardized:
        return self._with_program(self.program.unroll_latents())

    def _with_program(self, program: Program) -> Standardized:
        return self if program is self.__dict__["_modules"]["program"] else self.replaced(program=program)

    def arguments(self, data: Data) -> tuple[Tensor, Any, dict[str, Tensor]]:
        return self.program.arguments(data)

    def support_given(self, given: Any = None, batch_size: int = 1) -> constraints.Constraint | None:
        support = self.program.support_given(self.standard_given(given), batch_size)
        return support if support is None else moved(support, self.in_units)

    @torch.no_grad()
    def sample(self, num_samples: int = 1, given: Any = None, **options: Any) -> Tensor:
        """Draw x in its units, ``(num_samples, *event_shape)``; further options go to the program's own `sample`."""
        with alone():
            given = self.check_draws(num_samples, given)
            return self.in_units(self.program.sample(num_samples, self.standard_given(given), **options))

    def ode_log_prob(self, x: Tensor, given: Any = None, **options: Any) -> Tensor:
        """`ContinuousDiffusion.ode_log_prob` of the program within, in nats, with x in its units."""
        self.check(x, given)
        program: Any = self.program
        log_prob: Tensor = program.ode_log_prob(self.standard(x), self.standard_given(given), **options)
        return log_prob - self.log_volume()

    def formula(self, given: Any = None) -> Formula:
        return replace(super().formula(given), name=f"Standardized {type(core_of(self)).__name__}")

    def codes(self) -> dict[str, Program]:
        return self.program.codes()

    def code_named(self, site: str | None = None) -> str:
        return self.program.code_named(site)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "program" or name.startswith("_") or not hasattr(self.program, name):
                raise
            raise AttributeError(
                f"Standardized has no {name!r}, but the program within has one, in standardized units: use "
                f".program.{name}, or build with standardize=False"
            ) from None

    def _encode(self, x: Tensor, given: Any, site: str, draw: bool, num_samples: int) -> Tensor:
        return self.program._encode(self.standard(x), self.standard_given(given), site, draw, num_samples)

    def _decode(self, z: Tensor, given: Any, site: str, draw: bool) -> Tensor:
        return self.in_units(self.program._decode(z, self.standard_given(given), site, draw))

    @property
    def takes_missing(self) -> bool:
        return self.program.takes_missing

    def placeholder(self) -> Tensor:
        return self.in_units(self.program.placeholder())

    def completions(self, by: Any, x: Tensor, mask: Tensor, given: Any = None) -> tuple[Tensor, Tensor]:
        drawn, log_weights = self.program.completions(by, self.standard(x), mask, self.standard_given(given))
        return self.in_units(drawn), log_weights - self.log_volume(mask)


def core_of(program: Program) -> Program:
    """The program within a `Standardized`; any other program itself."""
    return core_of(program.program) if isinstance(program, Standardized) else program


class _InUnits(Messenger):
    """Turns the site ``name`` of u into a site of x; the statements around it still get u.

    Args:
        features: flat index of each feature with a site of its own, by site; the site of x is then deterministic.
    """

    def __init__(self, name: str, to_units: _ToUnits, features: dict[str, int]):
        super().__init__()
        self.units = {name: to_units} | {site: to_units.of_feature(i) for site, i in features.items()}

    def _pyro_sample(self, msg: Any) -> None:
        to_units = self.units.get(msg["name"])
        if to_units is None:
            return
        msg["value"] = None if msg["value"] is None else to_units(msg["value"])
        if msg["infer"].get("_deterministic"):
            msg["fn"] = dist.Delta(msg["value"], event_dim=msg["fn"].event_dim).mask(False)
        else:
            to_units.follow(support_of(msg["fn"]))
            msg["fn"] = dist.TransformedDistribution(msg["fn"], [to_units])

    def _pyro_post_sample(self, msg: Any) -> None:
        # The innermost handler comes last, after those that record the value.
        if msg["name"] in self.units:
            msg["value"] = self.units[msg["name"]].inv(msg["value"])


class _ToUnits(CachedTransform):
    """u to x = shift + scale * u.

    Args:
        shift, scale: shift and scale of x, of its shape.
        dims: number of event dimensions; 0 for a distribution of single features.
    """

    def __init__(self, shift: Tensor, scale: Tensor, dims: int):
        self.shift, self.scale, self.dims = shift, scale, dims
        super().__init__(*(constraints.independent(constraints.real, dims),) * 2)

    def of_feature(self, i: int) -> _ToUnits:
        return _ToUnits(self.shift.flatten()[i], self.scale.flatten()[i], 0)

    def of_features(self) -> _ToUnits:
        """The same map for single features. `features_of` and `formula` look for it: the features stay independent."""
        return _ToUnits(self.shift, self.scale, 0)

    def follow(self, support: constraints.Constraint | None) -> None:
        """Take the support of u as the domain."""
        line = None if support is None else moved(support, lambda bound: in_units(bound, self.shift, self.scale))
        if support is not None and line is not None:
            self.domain, self.codomain = support, constraints.independent(line, self.dims)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return in_units(u, self.shift, self.scale), self._volume(u)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return standard(x, self.shift, self.scale), -self._volume(x)

    def _volume(self, value: Tensor) -> Tensor:
        logs = self.scale.log()
        return (
            logs.sum((*range(-self.dims, 0),)).expand(value.shape[: -self.dims]) if self.dims else logs.expand_as(value)
        )


def in_units_of(u: dist.TorchDistribution, shift: Tensor, scale: Tensor) -> dist.TorchDistribution:
    """The distribution of single features shift + scale * u."""
    transform = _ToUnits(shift, scale, 0)
    transform.follow(support_of(u))
    return dist.TransformedDistribution(u, [transform])


def moved(support: constraints.Constraint, to_units: Callable[[Any], Tensor]) -> constraints.Constraint | None:
    """The support of a feature of x, from that of u; None where it has no bounds to move."""
    line = copy.copy(unwrapped(support))
    bounds = [name for name in ("lower_bound", "upper_bound") if hasattr(line, name)]
    for name in bounds:
        setattr(line, name, to_units(getattr(line, name)))
    return line if bounds or line_of(line) == "real" else None


def _standardize_layer(
    prefix: str, shift: Numbers | None, scale: Numbers | None, shape: Shape, owner: str
) -> Standardize | None:
    """The layer of the arguments whose names start with ``prefix``; None where they are None."""
    if shift is None and scale is None:
        return None
    if shift is None or scale is None:
        raise ValueError(f"{prefix}shift and {prefix}scale go together: pass both or neither")
    try:
        units = Standardize(shift, scale)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{prefix}{error}") from error
    for name, value in (("shift", units.shift), ("scale", units.scale)):
        sizes = tuple(value.shape)
        whole = (1,) * (len(shape) - len(sizes)) + sizes
        if len(whole) > len(shape) or any(a not in (1, b) for a, b in zip(whole, shape, strict=True)):
            raise ValueError(f"{prefix}{name} has shape {sizes}, but {owner} is {tuple(shape)}: pass one per feature")
    return units
