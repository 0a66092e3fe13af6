r"""Normalizing flows: p(x) by a change of variables.

.. math::
    x = f(z), \quad z \sim p(z): \qquad
    \log p(x) = \log p(z) + \log \left| \det \frac{\partial z}{\partial x} \right|, \qquad z = f^{-1}(x)

with f a stack of bijections, :math:`f = f_n \circ \dots \circ f_1`, whose log-determinants add up. A `Flow` is a
conditional like any other: a prior, an encoder, a likelihood, or the whole model. `realnvp`, `maf`, `iaf`, `nsf` and
`nsf_autoregressive` build the stacks that have names; `Flow` takes any other.

Sources: Rezende and Mohamed 2015 (arXiv 1505.05770); Papamakarios et al. 2021 (arXiv 1912.02762).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions.transforms import ComposeTransform, Transform

from dgm_pyro.checks import (
    Shape,
    as_given_shape,
    as_shape,
    check_count,
    check_finite,
    check_sizes,
    check_tensor,
    check_type,
)
from dgm_pyro.families.conditionals import Beta, Normal
from dgm_pyro.families.transforms import (
    LINES,
    MEANINGS,
    REMEDIES,
    BijectionTransform,
    Given,
    PyroTransform,
    line_of,
    loose_tensors,
    modules_of,
    require_invertible,
)
from dgm_pyro.networks.bijections import (
    Affine,
    Bijection,
    Coupling,
    Inverse,
    MaskedAutoregressive,
    NormalCDF,
    RationalQuadraticSpline,
    Univariate,
)
from dgm_pyro.networks.masked import MADE
from dgm_pyro.networks.mlp import MLP, shape_read_by
from dgm_pyro.program import Conditional, Program, call_network, check_program, unwrapped
from dgm_pyro.registry import register

__all__ = ["Flow", "iaf", "maf", "nsf", "nsf_autoregressive", "realnvp"]

Part = Bijection | Transform | dist.ConditionalTransform


@register
class Flow(Conditional):
    """The distribution of x = f(z), z ~ base, with f a stack of bijections.

    Each call of `forward` builds the transforms from the current parameters. A transform caches its last z and x, so
    scoring a tensor that the same distribution has drawn needs no inverse, and no cached value outlives its parameters.

    z has the shape of x, unless a torch transform such as ``ReshapeTransform`` changes it.

    Args:
        event_shape: shape of one x.
        transforms: from z to x. Bijections act on x flattened to a vector. Pyro's transforms act on the last dimensions
            as Pyro documents them; conditional ones get ``given`` unchanged.
        base: p(z), any conditional on reals; N(0, I) if None. It may depend on ``given`` too.
        embedding: a network of ``given``; the bijections are then given its output, ``(N, F)``.
        given_shape: shape of one ``given``, if no network declares it.

    Raises:
        TypeError: a transform is neither a bijection of dgm_pyro.networks nor one of Pyro's transforms.
        ValueError: a transform cannot be inverted, has parameters that no module holds, or receives values outside of
            its domain; or shapes or givens do not fit.

    >>> import torch, dgm_pyro as dgm
    >>> from dgm_pyro.networks import Affine, Coupling
    >>> flow = dgm.Flow(2, [Coupling((True, False), Affine(), torch.nn.Linear(1, 2))])
    >>> z = torch.zeros(5, 2)
    >>> x = flow.forward_map(z)
    >>> torch.allclose(flow.inverse_map(x), z, atol=1e-6)
    True
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        transforms: Sequence[Part],
        base: Conditional | None = None,
        *,
        embedding: nn.Module | None = None,
        given_shape: Shape | None = None,
    ):
        super().__init__()
        self.event_shape = as_shape(event_shape)
        check_type(transforms, Sequence, "transforms", "a sequence of bijections and transforms")
        self.transforms = tuple(transforms)
        for i, part in enumerate(self.transforms):
            if not isinstance(part, Bijection | Transform | dist.ConditionalTransform):
                raise TypeError(
                    f"transforms[{i}] must be a bijection of dgm_pyro.networks or a transform of Pyro, got "
                    f"{type(part).__name__}"
                )
        if base is None:
            plain = [part for part in self.transforms if isinstance(part, Transform)]
            base = Normal(ComposeTransform(plain).inverse_shape(self.event_shape))
        check_program(base, "base")
        if not isinstance(base, Conditional) or base.measure != "density":
            raise ValueError(
                f"base must be a Conditional with a density on reals, such as dgm.Normal, got {type(base).__name__}"
            )
        check_type(embedding, nn.Module | None, "embedding", "a torch.nn.Module or None")
        self.base, self.embedding = base, embedding
        self.parts = nn.ModuleList(module for part in self.transforms for module in modules_of(part))
        self._check_transforms()
        self._declare_given(None if given_shape is None else as_given_shape(given_shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Flow:
        """Apply `to`, `double` and so on to each tensor, including those that no module holds."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for part in self.transforms:
            for owner, name in loose_tensors(part):
                vars(owner)[name] = fn(vars(owner)[name])
        return self

    @property
    def on_unit_cube(self) -> bool:
        """Whether every feature of x lies in the unit interval."""
        return line_of(self.lines[-1]) == "unit"

    def forward(self, given: Any = None) -> dist.TransformedDistribution:
        if self.base.conditional and self.base.given_shape is None:
            self.base.given_shape = self.given_shape
        base = self.base(given if self.base.conditional else None)
        embedded = self._embed(given)
        if embedded is not None:
            base = base.expand(torch.broadcast_shapes(base.batch_shape, embedded.batch))
        return dist.TransformedDistribution(
            base, [self._bound_transform(i, given, embedded) for i in range(len(self.transforms))]
        )

    def _bound_transform(self, i: int, given: Any, embedded: Given | None) -> Transform:
        """The i-th transform, bound to ``given``."""
        part = self.transforms[i]
        if isinstance(part, Bijection):
            takes = part.given_shape is not None
            return BijectionTransform(
                part, embedded if takes else None, self.shapes[i], self.lines[i], self.lines[i + 1]
            )
        if isinstance(part, Transform):
            return PyroTransform(part)
        return PyroTransform(part.condition(given), given.shape[:-1])

    def forward_map(self, z: Tensor, given: Any = None) -> Tensor:
        """x = f(z): ``(B, *event_shape)`` from z, ``(B, *base.event_shape)``.

        Raises:
            ValueError: a shape does not fit.
        """
        self._check_z(z, given)
        for transform in self(given).transforms:
            z = transform(z)
        return z

    def inverse_map(self, x: Tensor, given: Any = None) -> Tensor:
        """z = f^-1(x), ``(B, *event_shape)``: the latent representation of x.

        Raises:
            ValueError: a shape does not fit.
        """
        self.check(x, given)
        for transform in reversed(self(given).transforms):
            x = transform.inv(x)
        return x

    def codes(self) -> dict[str, Program]:
        return {"z": self.base}

    def _encode(self, x: Tensor, given: Any, site: str, draw: bool, num_samples: int) -> Tensor:
        """z = f^-1(x), which is deterministic."""
        return self.inverse_map(x, given)

    def _decode(self, z: Tensor, given: Any, site: str, draw: bool) -> Tensor:
        """x = f(z), which is deterministic."""
        return self.forward_map(z, given)

    def log_abs_det_jacobian(self, z: Tensor, x: Tensor, given: Any = None) -> Tensor:
        """log |det dx/dz| of f at z, in nats, ``(B,)``, with ``x = forward_map(z)``.

        ``log_prob(x) == base.log_prob(z) - log_abs_det_jacobian(z, x)``: where f expands space, the density falls.

        Raises:
            ValueError: a shape does not fit.
        """
        self._check_z(z, given)
        self.check(x, given)
        log_det = ComposeTransform(self(given).transforms).log_abs_det_jacobian(z, x)
        return log_det.reshape(len(z), -1).sum(-1)

    @torch.no_grad()
    def initialize(self, x: Tensor, given: Any = None) -> None:
        """Initialize every `ActNorm` from the data ``x``, ``(B, *event_shape)``, as the first training step does."""
        self.check(x, given)
        for part, transform in zip(reversed(self.transforms), reversed(self(given).transforms), strict=True):
            if isinstance(part, Bijection):
                part.initialize(x.flatten(1))
            x = transform.inv(x)

    def _check_z(self, z: Tensor, given: Any) -> None:
        check_tensor(z, self.base.event_shape, "z", "the event_shape of the flow's base")
        check_finite(z, "z")
        self.check_given(given, len(z))

    def _check_transforms(self) -> None:
        """Follow the shape and the support of the features through the transforms, and check that they fit."""
        shape = self.base.event_shape
        line = constraints.real if self.base.conditional else unwrapped(self.base().support)
        self.shapes, self.lines = [shape], [line]
        for i, part in enumerate(self.transforms):
            owner = f"transforms[{i}], {type(part).__name__},"
            if isinstance(part, Bijection):
                if part.num_features not in (None, shape.numel()):
                    raise ValueError(
                        f"{owner} has {part.num_features} features, but gets {tuple(shape)}: {shape.numel()}"
                    )
                if part.domain not in ("any", line_of(line)):
                    raise ValueError(f"{owner} maps {MEANINGS[part.domain]}, but gets {line}: {REMEDIES[part.domain]}")
                line = line if part.codomain == "any" else LINES[part.codomain]
            else:
                require_invertible(part, shape, owner)
                if isinstance(part, Transform):
                    shape, line = torch.Size(part.forward_shape(shape)), unwrapped(part.codomain)
            self.shapes.append(shape)
            self.lines.append(line)
        if shape != self.event_shape:
            raise ValueError(
                f"the transforms take the base's event_shape {tuple(self.base.event_shape)} to {tuple(shape)}, but "
                f"event_shape is {tuple(self.event_shape)}"
            )

    def _declare_given(self, given_shape: Shape | None) -> None:
        """Find what ``given`` is from those who read it, and check that they agree."""
        taking = [part for part in self.parts if isinstance(part, Bijection) and part.given_shape is not None]
        shapes = {part.given_shape for part in taking if part.given_shape is not None}
        if len(shapes) > 1:
            raise ValueError(
                f"the bijections take given of different shapes, {sorted(shapes)}: build them for one shape"
            )
        self.embedded_shape = next(iter(shapes), None)
        if self.embedding is not None and not taking:
            raise ValueError("embedding is a network, but no bijection takes its output: build them with a given_shape")
        readers: list[Any] = [self.embedding] if self.embedding is not None else taking
        given_shape = None if given_shape is None else as_given_shape(given_shape)
        found = [given_shape, self.embedded_shape if self.embedding is None else shape_read_by(self.embedding)]
        if self.base.conditional:
            readers, found = [*readers, self.base], [*found, self.base.given_shape]
        distinct = {_as_tuple(shape) for shape in found if shape is not None}
        if len(distinct) > 1:
            raise ValueError(
                f"the parts of this flow take given of different shapes, {sorted(distinct)}: build them for one shape"
            )
        self.conditional = bool(readers) or any(isinstance(p, dist.ConditionalTransform) for p in self.transforms)
        self.given_shape = next((shape for shape in found if shape is not None), None)
        self.num_classes = next((n for n in (getattr(r, "num_classes", None) for r in readers) if n is not None), None)

    def _embed(self, given: Any) -> Given | None:
        if self.embedded_shape is None:
            return None
        if self.embedding is None:
            shape = self.embedded_shape
            if given.shape[given.dim() - len(shape) :] != shape:
                raise ValueError(f"given has shape {tuple(given.shape)}, but the flow expects (B, *{tuple(shape)})")
            return Given(given, given.shape[: given.dim() - len(shape)], shape)
        batch, features = call_network(self.embedding, given, self.given_shape)
        if features.shape[1:] != self.embedded_shape:
            raise ValueError(
                f"the embedding network returned shape {tuple(features.shape)}, but the bijections take a given of "
                f"shape {tuple(self.embedded_shape)}"
            )
        return Given(features.reshape(*batch, *self.embedded_shape), batch, self.embedded_shape)


# -- Pyro's transforms -------------------------------------------------------------------------------------------------


def _as_tuple(shape: Shape) -> tuple[Any, ...]:
    return tuple(_as_tuple(part) if isinstance(part, tuple) else part for part in shape)


# -- integers ----------------------------------------------------------------------------------------------------------


# -- stacks that have names --------------------------------------------------------------------------------------------


def realnvp(
    event_shape: int | Sequence[int],
    *,
    layers: int = 8,
    hidden: Sequence[int] = (128, 128),
    given_shape: Sequence[int] | None = None,
    given_levels: int | None = None,
    num_classes: int | None = None,
    unit_cube: bool = False,
) -> Flow:
    """RealNVP: affine couplings of alternating halves of a checkerboard (Dinh et al. 2017, arXiv 1605.08803).

    Args:
        event_shape: shape of one x, of at least two features.
        layers: number of couplings.
        hidden: widths of the hidden layers of each coupling's network.
        given_shape: shape of one ``given``, for a conditional flow; a network with one hidden layer embeds it for all
            couplings.
        given_levels: ``given`` takes the integers 0 .. given_levels - 1.
        num_classes: number of classes, where ``given`` is a label.
        unit_cube: whether x lies in the unit cube, as `Dequantized` needs.

    Raises:
        ValueError: x has a single feature.

    >>> realnvp(2).sample(5).shape
    torch.Size([5, 2])
    """
    return _coupled(event_shape, Affine(), layers, hidden, (given_shape, given_levels, num_classes), unit_cube)


def nsf(
    event_shape: int | Sequence[int],
    *,
    layers: int = 4,
    hidden: Sequence[int] = (128, 128),
    bins: int = 8,
    given_shape: Sequence[int] | None = None,
    given_levels: int | None = None,
    num_classes: int | None = None,
    unit_cube: bool = False,
) -> Flow:
    """Neural spline flow: couplings of rational-quadratic splines (Durkan et al. 2019, arXiv 1906.04032).

    The splines act on values within (-5, 5) and leave others unchanged: standardize data of another scale, or add an
    `ActNorm`.

    Args: as `realnvp`, and ``bins``, the number of bins of each spline.
    """
    spline = RationalQuadraticSpline(bins)
    return _coupled(event_shape, spline, layers, hidden, (given_shape, given_levels, num_classes), unit_cube)


def maf(
    event_shape: int | Sequence[int],
    *,
    layers: int = 5,
    hidden: Sequence[int] = (256, 256),
    dropout: float = 0.0,
    given_shape: Sequence[int] | None = None,
    given_levels: int | None = None,
    num_classes: int | None = None,
    unit_cube: bool = False,
) -> Flow:
    """MAF: affine maps given the features before, in alternating order (Papamakarios et al. 2017, arXiv 1705.07057).

    Scoring takes one call of each network. Sampling takes D small steps, with as much work in total.

    Args: as `realnvp`, and ``dropout``, the share of hidden units dropped in training. Each call then drops others, so
        the two directions are inverses of each other only in evaluation mode.
    """
    reads = (given_shape, given_levels, num_classes)
    return _autoregressive(event_shape, Affine(), layers, hidden, dropout, reads, unit_cube)


def nsf_autoregressive(
    event_shape: int | Sequence[int],
    *,
    layers: int = 2,
    hidden: Sequence[int] = (256, 256),
    bins: int = 8,
    dropout: float = 0.0,
    given_shape: Sequence[int] | None = None,
    given_levels: int | None = None,
    num_classes: int | None = None,
    unit_cube: bool = False,
) -> Flow:
    """Autoregressive neural spline flow: `maf` with rational-quadratic splines (Durkan et al. 2019, arXiv 1906.04032).

    Args: as `maf`, and ``bins``, the number of bins of each spline.
    """
    reads = (given_shape, given_levels, num_classes)
    return _autoregressive(event_shape, RationalQuadraticSpline(bins), layers, hidden, dropout, reads, unit_cube)


def iaf(
    event_shape: int | Sequence[int],
    *,
    layers: int = 2,
    hidden: Sequence[int] = (64, 64),
    given_shape: Sequence[int] | None = None,
    given_levels: int | None = None,
    num_classes: int | None = None,
    unit_cube: bool = False,
) -> Flow:
    """IAF: the inverse of MAF, for encoders. It samples, and scores its own samples, in one call of each network.

    Scoring other values takes D small steps, with as much work in total. Source: Kingma et al. 2016 (arXiv 1606.04934).

    Args: as `realnvp`.
    """
    reads = (given_shape, given_levels, num_classes)
    return _autoregressive(event_shape, Affine(), layers, hidden, 0.0, reads, unit_cube, turn=Inverse)


GivenArguments = tuple[Sequence[int] | None, int | None, int | None]


def _coupled(
    event_shape: int | Sequence[int],
    univariate: Univariate,
    layers: int,
    hidden: Sequence[int],
    reads: GivenArguments,
    unit_cube: bool,
) -> Flow:
    shape = as_shape(event_shape)
    if shape.numel() < 2:
        raise ValueError("couplings need at least two features: use maf or nsf_autoregressive for one")
    embedding, features = embedding_of(reads, hidden)
    colors = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij")).sum(0).flatten() % 2
    parts: list[Bijection] = []
    for i in range(check_count(layers, "layers")):
        passes = tuple((colors == i % 2).tolist())
        moving = passes.count(False)
        network = MLP((len(passes) - moving,), univariate.num_parameters * moving, hidden, given_shape=features)
        start_near_zero(network.rest[-1])
        parts.append(Coupling(passes, univariate, network))
    return Flow(shape, [*parts, *end_of(unit_cube)], embedding=embedding)


def _autoregressive(
    event_shape: int | Sequence[int],
    univariate: Univariate,
    layers: int,
    hidden: Sequence[int],
    dropout: float,
    reads: GivenArguments,
    unit_cube: bool,
    turn: Callable[[Bijection], Bijection] = lambda bijection: bijection,
) -> Flow:
    shape = as_shape(event_shape)
    embedding, features = embedding_of(reads, hidden)
    parts: list[Bijection] = []
    for i in range(check_count(layers, "layers")):
        order = tuple(range(shape.numel()))[:: -1 if i % 2 else 1]
        network = MADE(
            shape.numel(), univariate.num_parameters, hidden, order=order, given_shape=features, dropout=dropout
        )
        start_near_zero(network.last, network.direct)
        parts.append(turn(MaskedAutoregressive(univariate, network)))
    return Flow(shape, [*parts, *end_of(unit_cube)], embedding=embedding)


def embedding_of(reads: GivenArguments, hidden: Sequence[int]) -> tuple[MLP | None, tuple[int] | None]:
    """A network of ``given`` for all bijections of a stack, and the shape of its output."""
    given_shape, levels, num_classes = reads
    if levels is not None:
        check_count(levels, "given_levels", at_least=2)
    if given_shape is None and num_classes is None:
        return None, None
    check_sizes(hidden=hidden)
    width = as_shape(hidden)[-1]
    return MLP(
        () if given_shape is None else as_shape(given_shape, "given_shape"),
        width,
        (width,),
        levels=levels,
        num_classes=num_classes,
    ), (width,)


def refuse_beta(guide: Program | None, role: str) -> None:
    """Raise if ``guide`` is a `Beta`: the q of a variable whose p is a flow on the unit cube."""
    if isinstance(guide, Beta):
        raise TypeError(
            f"the {role} must not be a Beta where the prior is a flow: its draws near 0 or 1 are one number, to which "
            "the flow may give any density. Use a Flow that ends in networks.NormalCDF(), or, for integers, "
            "dequantized.dequantizer"
        )


@torch.no_grad()
def start_near_zero(*layers: nn.Module) -> None:
    """Start a stack near the identity: on the 17-level digits, 1.94 bits per dimension instead of 2.01.

    Not exactly zero, because the layers before these would then get no gradient in the first step.
    """
    for layer in layers:
        for parameter in layer.parameters():
            parameter.mul_(0.01)


def end_of(unit_cube: bool) -> list[Bijection]:
    return [NormalCDF()] if unit_cube else []
