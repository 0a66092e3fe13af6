r"""Dequantization: a density on the unit cube as a model of integers.

Integers have no density. `Dequantized` models them by a flow on the unit cube: the integer x of L levels is a function
of a point v of the cube, :math:`x = \lfloor L v \rfloor`. So P(x) is the integral of p(v) over a cell. Any density
q(u | x) of the position u within the cell gives a lower bound:

.. math::
    \log P(x) \ge E_{q(u \mid x)} \left[ \log p\!\left(\frac{x + u}{L}\right) - \log q(u \mid x) \right] - D \log L

In floating-point numbers this holds only for a q whose draws stay apart. Draws that are closer to an edge of the cell
than the rounding error are one number, which a flow may give any density. For 256 levels in single precision, that is
3e-5 of the cell. `dequantizer` bounds the density of q, so that its draws are as close with probability 6e-5 at most.
Cells of more than 2,048 levels in single precision need the uniform q.

Sources: Theis et al. 2016 (arXiv 1511.01844, section 3.1) and Ho et al. 2019 (Flow++, arXiv 1902.00275, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from dgm_pyro.checks import as_shape
from dgm_pyro.families.conditionals import Uniform, check_levels
from dgm_pyro.families.flow import Flow, refuse_beta, start_near_zero
from dgm_pyro.families.transforms import (
    CachedTransform,
    line_of,
)
from dgm_pyro.networks.bijections import Contraction, Elementwise, NormalCDF
from dgm_pyro.networks.mlp import MLP
from dgm_pyro.program import (
    Conditional,
    Program,
    check_program,
    declare_given,
    guide_trace,
    is_pair,
    parameter_of,
    unwrapped,
)
from dgm_pyro.registry import register

__all__ = ["Dequantized", "Floor", "dequantizer"]

FINEST = 2**-12
"""Largest rounding error of a place in the unit interval, relative to a cell, for a q other than the uniform one."""


@register
class Dequantized(Program):
    r"""A density on the unit cube as a model of integers: x = floor(levels * v), v ~ flow.

    v is a latent, named after x with ``_continuous``. The guide states it as v = (x + u) / levels with u ~ q(u | x),
    the position within the cell of x. A uniform q is uniform dequantization; a flexible q is variational
    dequantization, which makes the bound tighter. Within rounding error, an edge belongs to both of its cells.

    Args:
        flow: p(v), a program with a density on the unit cube, such as ``Flow(event_shape, [..., NormalCDF()])``.
        levels: x takes the integers 0 .. levels - 1.
        guide: q(u | x), a conditional on the unit cube; `Uniform` if None. A conditional guide is given x, or
            (x, given) if its ``given_shape`` is a pair.

    Raises:
        ValueError: ``flow`` or ``guide`` does not live on the unit cube, or shapes do not fit.
        TypeError: ``flow`` has no density, or ``guide`` is a `Beta`.

    >>> import torch, dgm_pyro as dgm
    >>> program = dgm.Dequantized(dgm.Flow(2, [dgm.networks.NormalCDF()]), levels=4)
    >>> program.sample(5).dtype, program.latents("x")
    (torch.int64, ('x_continuous',))
    """

    levels: int

    def __init__(self, flow: Program, levels: int, guide: Conditional | None = None):
        super().__init__()
        check_program(flow, "flow")
        if flow.measure != "density":
            raise TypeError(f"flow must be a Program with a density, such as dgm.Flow, got {type(flow).__name__}")
        guide = Uniform(flow.event_shape) if guide is None else guide
        if not isinstance(guide, Conditional):
            raise TypeError(f"guide must be a dgm_pyro.Conditional or None, got {type(guide).__name__}")
        refuse_beta(guide, "guide")
        if guide.event_shape != flow.event_shape:
            raise ValueError(
                f"the guide's event_shape is {tuple(guide.event_shape)}, but the flow's is {tuple(flow.event_shape)}: "
                "both must be that of x"
            )
        _require_unit_cube(flow, "flow")
        _require_unit_cube(guide, "guide")
        self.flow, self.dequantizer, self.levels = flow, guide, check_levels(levels)
        self.event_shape, self.conditional = flow.event_shape, flow.conditional
        self.given_shape, self.num_classes = flow.given_shape, flow.num_classes
        if guide.conditional:
            shape = (self.event_shape, self.given_shape) if is_pair(guide.given_shape) else self.event_shape
            declare_given(guide, shape, "guide", "x, of shape")

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        v = self.flow.joint(_continuous(name), given=given)
        return pyro.sample(name, Floor(v, self.levels).to_event(len(self.event_shape)), obs=value)

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        within = self.dequantizer(self._guide_input(value, given))
        batch = value.shape[: value.dim() - len(self.event_shape)]
        within = within.expand(torch.broadcast_shapes(within.batch_shape, batch))
        into = _IntoCell(value.to(parameter_of(self).dtype), self.levels, self.event_shape)
        marked: Any = {"is_dequantizing": True}  # no code of x
        v = pyro.sample(_continuous(name), dist.TransformedDistribution(within, [into]), infer=marked)
        self.flow.posterior(_continuous(name), v, given)

    def _guide_input(self, value: Tensor, given: Any) -> Any:
        if not self.dequantizer.conditional:
            return None
        return (value, given) if is_pair(self.dequantizer.given_shape) else value

    def latents(self, name: str) -> tuple[str, ...] | None:
        below = self.flow.latents(_continuous(name))
        return None if below is None else (_continuous(name), *below)

    def codes(self) -> dict[str, Program]:
        return self.flow.codes()

    def _encode(self, x: Tensor, given: Any, site: str, draw: bool, num_samples: int) -> Tensor:
        """The code of the middle of x's cell, or of a draw from q within it."""
        if draw:
            trace: Any = guide_trace(self, x, given)
            v = trace.nodes[_continuous(self.variable)]["value"]
        else:
            v = (x.to(parameter_of(self).dtype) + 0.5) / self.levels
        return self.flow.encode(v, given, site=site, draw=draw, num_samples=num_samples)

    def _decode(self, z: Tensor, given: Any, site: str, draw: bool) -> Tensor:
        """The integer of the cell that z is mapped to."""
        return Floor(self.flow.decode(z, given, site=site, draw=draw), self.levels).sample()

    def completions(self, by: Any, x: Tensor, mask: Tensor, given: Any = None) -> tuple[Tensor, Tensor]:
        return by.over_cells(self, x, mask, given)

    def unroll(self) -> Dequantized:
        """The same program with the chains among the flow's latents unrolled; v stays one site, as in the guide."""
        if self.flow.latents(self.variable) == ():
            return self
        return self.replaced(flow=self.flow.unroll_latents())


def _continuous(name: str) -> str:
    return f"{name}_continuous"


def _require_unit_cube(program: Program, role: str) -> None:
    """Raise if ``program`` is known to have mass outside of the unit cube."""
    if isinstance(program, Flow):
        outside = not program.on_unit_cube
    elif isinstance(program, Conditional) and not program.conditional:
        outside = line_of(unwrapped(program().support)) != "unit"
    else:
        outside = False  # its support is not known without a given
    if outside:
        raise ValueError(
            f"the {role} of Dequantized must live on the unit cube, but this {type(program).__name__} does not: end it "
            "in networks.NormalCDF(), as in Flow(event_shape, [..., NormalCDF()]) or realnvp(event_shape, "
            "unit_cube=True)"
        )


class _IntoCell(CachedTransform):
    """v = (x + u) / levels: a position u in the unit cube to a position in the cell of x."""

    def __init__(self, x: Tensor, levels: int, shape: torch.Size):
        cell = constraints.interval(x / levels, (x + 1) / levels)
        super().__init__(*(constraints.independent(line, len(shape)) for line in (constraints.unit_interval, cell)))
        self.x, self.levels, self.shape = x, levels, shape

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        v = (self.x + u) / self.levels
        return v, self._log_volume(v)

    def inverse(self, v: Tensor) -> tuple[Tensor, Tensor]:
        u = (v * self.levels - self.x).clamp(0, 1)
        return u, -self._log_volume(u)

    def _log_volume(self, place: Tensor) -> Tensor:
        batch = place.shape[: place.dim() - len(self.shape)]
        return place.new_full(batch, -self.shape.numel() * math.log(self.levels))

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        return torch.broadcast_shapes(shape, self.x.shape)

    inverse_shape = forward_shape


class Floor(dist.TorchDistribution):
    """All mass on the integer floor(levels * v), for v in [0, 1]; v = 1 gives the last integer.

    Args:
        v: reals; those outside of [0, 1] give the nearest integer.
        levels: the integers are 0 .. levels - 1.
    """

    arg_constraints: ClassVar = {"v": constraints.real}
    has_rsample = False

    def __init__(self, v: Tensor, levels: int, validate_args: bool | None = None):
        self.v, self.levels = v, levels
        super().__init__(v.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: Sequence[int], _instance: Floor | None = None) -> Floor:
        new = self._get_checked_instance(Floor, _instance)
        new.v, new.levels = self.v.expand(tuple(batch_shape)), self.levels
        super(Floor, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """0 where ``value`` is the integer, else -inf; within rounding error of an edge, 0 for both neighbors."""
        if self._validate_args:
            self._validate_sample(value)
        place = self.v * self.levels
        value = value.to(place.dtype)
        slack = 4 * self.levels * torch.finfo(place.dtype).eps
        above = (place >= value - slack) | (value == 0)
        below = (place <= value + 1 + slack) | (value == self.levels - 1)
        return torch.where(above & below, 0.0, -math.inf).to(place.dtype)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Integers of dtype int64, ``sample_shape + batch_shape``."""
        integers = (self.v * self.levels).floor().clamp(0, self.levels - 1).long()
        return integers.expand(self._extended_shape(torch.Size(sample_shape)))


def dequantizer(event_shape: int | Sequence[int], levels: int, *, hidden: Sequence[int] = (128,)) -> Flow:
    """q(u | x) for variational dequantization: u = Phi(n), with an independent Normal n given x for each feature.

    A `Contraction` keeps n within (-4, 4), where u and 1 - u are at least 3e-5, but for 6e-5 of the draws.

    Args:
        event_shape: shape of one x.
        levels: x takes the integers 0 .. levels - 1.
        hidden: widths of the hidden layers.

    Raises:
        ValueError: ``levels`` are too many for torch's default dtype.

    >>> import dgm_pyro as dgm
    >>> program = dgm.Dequantized(dgm.flow.nsf(4, unit_cube=True), levels=17, guide=dequantizer(4, levels=17))
    >>> program.log_weights(torch.zeros(2, 4, dtype=torch.long), num_particles=3).shape
    torch.Size([3, 2])
    """
    shape = as_shape(event_shape)
    network = MLP(shape, 2 * shape.numel(), hidden, levels=check_resolution(levels))
    return contracted(shape, network, network.rest[-1])


def contracted(shape: torch.Size, network: nn.Module, last: nn.Module) -> Flow:
    """The q(u | x) whose parameters ``network`` gives, ``(B, 2, *shape)`` or flat; ``last`` is its last layer."""
    start_near_zero(last)
    return Flow(shape, [Elementwise(shape.numel(), Contraction(), network), NormalCDF()])


def check_resolution(levels: int) -> int:
    """``levels``, if the default dtype resolves the cells of so many well enough for a q other than the uniform one."""
    if resolves(check_levels(levels)):
        return levels
    raise ValueError(
        f"levels is {levels}, but with more than {int(FINEST / torch.finfo(torch.get_default_dtype()).eps)} levels the "
        f"draws of a dequantizer in {torch.get_default_dtype()} would round to few numbers: use the uniform one, "
        "Dequantized(flow, levels), or torch.set_default_dtype(torch.float64)"
    )


def resolves(levels: int) -> bool:
    return levels * torch.finfo(torch.get_default_dtype()).eps <= FINEST
