r"""Columns of mixed kinds: a table's reals, amounts, counts and categories, each with its own distribution.

Given what the network is given, the columns are independent,

.. math::
    p(x \mid c) = \prod_i p_i(x_i \mid c),

where :math:`p_i` is a mass for integers and categories and a density for reals. So p(x) is a mass times a density, and
`Evidence.measure` says which columns are which. On their own, the columns are independent: a reference without any
dependence. In the likelihood of a VAE they depend on each other through z. In `Autoregressive`, with a
`networks.ColumnMADE`, each depends on the columns before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from dgm_pyro.checks import Shape, as_reals, check_count, check_number, check_type
from dgm_pyro.families.conditionals import (
    Beta,
    Categorical,
    DiscretizedLogistic,
    IndependentConditional,
    LogNormal,
    MixtureOfNormals,
    NegativeBinomial,
    Network,
)
from dgm_pyro.families.standardized import in_units_of, moved
from dgm_pyro.networks.standardize import in_units
from dgm_pyro.program import unwrapped
from dgm_pyro.registry import register

__all__ = ["Columns", "ColumnsDistribution"]

COMPONENTS = 3
KINDS = (
    "'real', 'positive', 'count', ('bounded', low, high), ('integer', low, high), ('category', number), "
    "('ordinal', number), or a conditional of event_shape ()"
)


@register
class Columns(IndependentConditional):
    """Independent columns, each of its own kind. P is the largest number of parameters that a column has.

    ====================== ===================================================================================
    ``"real"``              a mixture of 3 Normals
    ``"positive"``          log-normal
    ``("bounded", 0, 1)``   Beta, between the two numbers
    ``("integer", 0, 99)``  a mixture of 3 discretized logistics on the integers from the first to the last
    ``"count"``             negative binomial
    ``("category", 5)``     categorical, codes 0 .. 4 without an order
    ``("ordinal", 5)``      a mixture of 3 discretized logistics on the codes 0 .. 4
    a conditional           of event_shape (), such as ``dgm.StudentT(())``: its distribution
    ====================== ===================================================================================

    Args:
        columns: the kind of each column, by name, in the order of x.
        network: maps ``given`` to ``(B, P, D)`` or flat; or a function that takes the output size P * D and returns
            such a network.
        shift, scale: ``(D,)``, used by three kinds. A real column is shift + scale * u, and a positive one scale * u,
            with a u that starts at scale 1. A positive column starts with its median at the shift, and a count with
            its mean there, where the shift is positive.
        learned, parameters, given_shape: as `Normal`.

    Raises:
        ValueError, TypeError: the kind of a column is not one of these, or shapes do not fit.

    >>> import torch, dgm_pyro as dgm
    >>> table = dgm.Columns({"height": "real", "visits": "count", "city": ("category", 3)}, learned=True)
    >>> table.measure
    'mass of features 1-2, density of the others'
    >>> table.sample(4).shape
    torch.Size([4, 3])
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        columns: Mapping[str, Any],
        network: Network | None = None,
        *,
        shift: Tensor | Sequence[float] | None = None,
        scale: Tensor | Sequence[float] | None = None,
        learned: bool = False,
        parameters: Tensor | None = None,
        given_shape: Shape | None = None,
    ):
        check_type(columns, Mapping, "columns", "a mapping of names to kinds")
        if not columns:
            raise ValueError("columns is empty: name at least one")
        parts, units = zip(*(_conditional_of_column(name, kind) for name, kind in columns.items()), strict=True)
        per_feature = max(part.num_parameters for part in parts)
        start, (shifts, scales) = _padded(parts, per_feature), _shift_and_scale(shift, scale, units, columns)
        if shift is not None:  # which is many steps away, where the scale is small beside it
            place = as_reals(shift, "shift").to(start) / scales.to(start)
            amount = torch.tensor([isinstance(part, LogNormal | NegativeBinomial) for part in parts])
            start[0] = torch.where(amount & (place > 0), place.clamp_min(1e-6).log(), start[0])
        options: Any = {"learned": learned, "parameters": parameters, "given_shape": given_shape}
        if network is None and parameters is None:
            options["parameters"] = start
        super().__init__(len(columns), per_feature, network, **options)
        if network is not None:
            self.register_buffer("start", start, persistent=False)
        self.names, self.parts = tuple(columns), torch.nn.ModuleList(parts)
        self.register_buffer("shift", shifts)
        self.register_buffer("scale", scales)
        self.supports = [
            _support_of_column(*column) for column in zip(parts, shifts.tolist(), scales.tolist(), strict=True)
        ]

    @property
    def categories(self) -> list[int | None]:
        """Number of values of each column that is a category without an order; None for other columns."""
        return [part.levels if isinstance(part, Categorical) else None for part in self.parts]

    @property
    def amounts(self) -> list[int]:
        """Indices of the columns with a lower bound and no upper one: their values span orders of magnitude."""
        low, high = "lower_bound", "upper_bound"
        return [i for i, line in enumerate(self.supports) if hasattr(line, low) and not hasattr(line, high)]

    def initial(self) -> Tensor:
        return _padded(self.parts, self.num_parameters)

    def of_feature(self, raw: Tensor, feature: int) -> TorchDistribution:
        part: Any = self.parts[feature]
        u = part.univariate(raw[..., : part.num_parameters])
        return in_units_of(u, self.shift[feature], self.scale[feature])

    def placeholder(self) -> Tensor:
        """The placeholder of each column in its units: the shift of a real column, the scale of a positive one."""
        parts: Any = self.parts
        return in_units(torch.stack([part.placeholder() for part in parts]), self.shift, self.scale)

    def univariate(self, raw: Tensor) -> ColumnsDistribution:
        parts = [self.of_feature(row, i) for i, row in enumerate(raw.unbind(-2))]
        return ColumnsDistribution(parts, constraints.stack(self.supports, -1))


class ColumnsDistribution(TorchDistribution):
    """Independent features of different distributions, ``(*batch, D)``.

    Args:
        parts: the distribution of each feature, of batch shape ``batch``.
        line: their supports, as one constraint on the last dimension.
    """

    arg_constraints: ClassVar = {}

    def __init__(
        self, parts: Sequence[TorchDistribution], line: constraints.Constraint, validate_args: bool | None = None
    ):
        self.parts, self.line = parts, line
        self.has_rsample = all(part.has_rsample for part in parts)
        super().__init__(torch.Size((*parts[0].batch_shape, len(parts))), validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return self.line

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ColumnsDistribution:
        return ColumnsDistribution([part.expand(batch_shape[:-1]) for part in self.parts], self.line)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._stacked(lambda i, part: part.log_prob(value[..., i]))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        if not self.has_rsample:
            raise NotImplementedError("some columns have no rsample: use sample")
        return self._stacked(lambda i, part: part.rsample(torch.Size(sample_shape)))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._stacked(lambda i, part: part.sample(torch.Size(sample_shape)))

    def _stacked(self, of_part: Callable[[int, TorchDistribution], Tensor]) -> Tensor:
        values = [of_part(i, part) for i, part in enumerate(self.parts)]
        dtype = next((value.dtype for value in values if value.is_floating_point()), values[0].dtype)
        return torch.stack([value.to(dtype) for value in values], -1)


def _conditional_of_column(name: str, kind: Any) -> tuple[IndependentConditional, tuple[float, float] | None]:
    """A conditional of one feature, and the shift and scale that its kind fixes; None where the data give them."""
    if isinstance(kind, IndependentConditional):
        if kind.event_shape != () or kind.conditional or any(True for _ in kind.parameters()):
            raise ValueError(
                f"columns[{name!r}] must be a conditional of event_shape () without parameters of its own, such as "
                "dgm.StudentT(())"
            )
        return kind, None
    label, *values = kind if isinstance(kind, tuple) else (kind,)
    argument = f"columns[{name!r}]"
    made: Any = None
    if label in ("bounded", "integer") and len(values) == 2:
        low = check_number(values[0], argument)
        high = check_number(values[1], argument, above=low)
        if label == "bounded":
            made = Beta(()), (low, high - low)
        else:
            count = check_count(high - low + 1, argument, at_least=2)
            made = DiscretizedLogistic((), count, COMPONENTS), (low, 1.0)
    elif label in ("category", "ordinal") and len(values) == 1:
        count = check_count(values[0], argument, at_least=2)
        made = Categorical((), count) if label == "category" else DiscretizedLogistic((), count, COMPONENTS)
        made = made, (0.0, 1.0)
    elif label == "count" and not values:
        made = NegativeBinomial(()), (0.0, 1.0)
    elif label in ("real", "positive") and not values:
        made = (MixtureOfNormals((), COMPONENTS) if label == "real" else LogNormal(())), None
    if made is None:
        raise ValueError(f"{argument} must be one of {KINDS}, got {kind!r}")
    found: tuple[IndependentConditional, tuple[float, float] | None] = made
    return found


def _padded(parts: Any, per_feature: int) -> Tensor:
    """Raw parameters of the standard members, ``(P, D)``, padded with zeros for columns that have fewer."""
    columns = [torch.nn.functional.pad(part.initial(), (0, per_feature - part.num_parameters)) for part in parts]
    return torch.stack(columns, -1)


def _shift_and_scale(
    shift: Any, scale: Any, units: Sequence[tuple[float, float] | None], columns: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Shift and scale of all columns."""
    return _filled_in(shift, units, "shift", columns), _filled_in(scale, units, "scale", columns)


def _filled_in(
    given: Any, units: Sequence[tuple[float, float] | None], argument: str, columns: Mapping[str, Any]
) -> Tensor:
    """The shifts or the scales of all columns: those that kinds fix, and for the others ``given``."""
    i, default = (0, 0.0) if argument == "shift" else (1, 1.0)
    values = as_reals([default] * len(units) if given is None else given, argument, positive=argument == "scale")
    if tuple(values.shape) != (len(units),):
        raise ValueError(f"{argument} has shape {tuple(values.shape)}, but there are {len(units)} columns")
    fixed = [float(value) if unit is None else unit[i] for value, unit in zip(values, units, strict=True)]
    if argument == "shift":  # the zero of a positive number is fixed
        fixed = [0.0 if kind == "positive" else value for value, kind in zip(fixed, columns.values(), strict=True)]
    dtype = values.dtype if argument == "shift" else torch.get_default_dtype()
    return torch.tensor(fixed, dtype=dtype)


def _support_of_column(part: IndependentConditional, shift: float, scale: float) -> constraints.Constraint:
    """The support of a column, whose bounds are numbers: those of a likelihood hold for any latents."""
    line = unwrapped(part.univariate(part.initial()).support)
    found = moved(line, lambda bound: shift + scale * bound)
    return line if found is None else found
