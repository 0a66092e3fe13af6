r"""Bijections x = f(z), of which normalizing flows are stacks.

.. math::
    \log p(x) = \log p(z) + \log \left| \det \frac{\partial z}{\partial x} \right|, \qquad z = f^{-1}(x)

A `Bijection` acts on vectors: ``forward`` maps z to x, ``inverse`` maps x to z, and each returns the log-determinant of
its own map, so the two have opposite signs. There are three kinds:

- `Univariate` maps, monotone functions of one variable with P raw parameters: `Affine`, `RationalQuadraticSpline`;
- bijections that apply a univariate map to single features, with parameters that are free or from ``given``
  (`Elementwise`), from other features (`Coupling`), or from the features before (`MaskedAutoregressive`);
- fixed and linear bijections between them: `Permutation`, `LULinear`, `ActNorm`, and `NormalCDF` or `Sigmoid` at the
  end of flows on the unit cube.

`Inverse` swaps the two directions. So RealNVP is `Coupling` with `Affine`, NSF is `Coupling` or `MaskedAutoregressive`
with `RationalQuadraticSpline`, MAF is `MaskedAutoregressive` with `Affine`, and IAF is the inverse of MAF.

Univariate maps are defined from x to z, the direction of training: scoring evaluates them, and sampling inverts them.
With zero parameters they are the identity.

Sources: Dinh et al. 2017 (RealNVP, arXiv 1605.08803); Papamakarios et al. 2017 (MAF, arXiv 1705.07057); Kingma et al.
2016 (IAF, arXiv 1606.04934); Durkan et al. 2019 (NSF, arXiv 1906.04032); Kingma and Dhariwal 2018 (Glow, arXiv
1807.03039).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_pyro.checks import check_choice, check_count, check_finite, check_number, check_tensor, check_type, is_integer
from dgm_pyro.networks.caches import cache_maker
from dgm_pyro.networks.mlp import apply_network
from dgm_pyro.registry import register

__all__ = [
    "ActNorm",
    "Affine",
    "Bijection",
    "Contraction",
    "Coupling",
    "Elementwise",
    "Inverse",
    "LULinear",
    "MaskedAutoregressive",
    "NormalCDF",
    "Permutation",
    "RationalQuadraticSpline",
    "Sigmoid",
    "Univariate",
]

# -- univariate maps -------------------------------------------------------------------------------------------------


class Univariate(nn.Module):
    """A monotone map of one variable with ``num_parameters`` raw parameters; with zeros it is the identity.

    Attributes:
        num_parameters: P.
        unit: whether it maps the unit interval onto itself, instead of the real line.
    """

    num_parameters: int
    unit: bool = False

    def inverse(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """x to z, and log dz/dx, (N, D) each, for ``x`` (N, D) and ``raw`` (N, P, D) or (P, D)."""
        raise NotImplementedError

    def forward(self, z: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """z to x, and log dx/dz; shapes as in `inverse`."""
        raise NotImplementedError


@register
class Affine(Univariate):
    r"""z = (x - t) exp(-s). P = 2: shift t, and a raw r that makes :math:`s = r / (1 + |r| / b)`.

    Args:
        bound: b; the log-scale s lies in (-b, b), for any output of a network.
    """

    num_parameters = 2

    def __init__(self, bound: float = 5.0):
        super().__init__()
        check_number(bound, "bound", above=0)
        self.bound = bound

    def _shift_and_log_scale(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw_scale = raw.unbind(-2)
        return shift, bounded(raw_scale, self.bound)

    def inverse(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._shift_and_log_scale(raw)
        return (x - shift) * torch.exp(-log_scale), (-log_scale).expand_as(x)

    def forward(self, z: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._shift_and_log_scale(raw)
        return z * torch.exp(log_scale) + shift, log_scale.expand_as(z)


@register
class Contraction(Affine):
    r"""An `Affine` map of the box (-R, R) into itself: x = t + (1 - |t| / R) exp(-s) z, |t| < T, 0 <= s < b.

    A standard Normal z leaves the box of R = 4 with probability 6e-5, and so does x, for any output of a network.

    Args:
        radius: R.
        largest_shift: T, below R.
        bound: b.
    """

    def __init__(self, radius: float = 4.0, largest_shift: float = 2.5, bound: float = 1.5):
        super().__init__(bound)
        check_number(radius, "radius", above=0)
        if not check_number(largest_shift, "largest_shift", above=0) < radius:
            raise ValueError(f"largest_shift must be less than radius, got {largest_shift} and {radius}")
        self.radius, self.largest_shift = radius, largest_shift

    def _shift_and_log_scale(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        raw_shift, raw_scale = raw.unbind(-2)
        shift = bounded(raw_shift, self.largest_shift)
        return shift, torch.log1p(-shift.abs() / self.radius) - bounded(raw_scale, self.bound).abs()


def bounded(raw: Tensor, bound: float) -> Tensor:
    """A function that is close to ``raw`` near 0 and stays within (-bound, bound)."""
    return raw / (1 + raw.abs() / bound)


@register
class RationalQuadraticSpline(Univariate):
    r"""A monotone spline of rational quadratics that maps a box onto itself, and lines beyond (Durkan et al. 2019).

    In a bin of width w, height h and slope s = h / w, with derivatives :math:`d_0, d_1` at its ends, t in [0, 1] the
    place in it, and :math:`c = s + (d_0 + d_1 - 2 s)\, t (1 - t)`:

    .. math::
        z = z_0 + \frac{h}{c} \left( s t^2 + d_0\, t (1 - t) \right), \qquad
        \frac{dz}{dx} = \frac{s^2}{c^2} \left( d_1 t^2 + 2 s\, t (1 - t) + d_0 (1 - t)^2 \right)

    and from z to x, t is the root of a quadratic. Value and derivative are continuous everywhere.

    Positions are measured from the nearer end of the box, with full precision there. In the middle, the rounding error
    in single precision is relative to the box, so among bins as narrow as `SMALLEST` a log-slope may be off by 0.01.

    Args:
        bins: number of bins.
        low, high: ends of the box. With (0, 1), the map is from the unit interval onto itself.
        tails: "identity" beyond the box, P = 3 bins - 1 (widths, heights, inner derivatives); or "linear", with two
            more parameters for the outer derivatives, P = 3 bins + 1.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    SMALLEST = 1e-3  # a bin, as a part of the box, and a derivative (Durkan et al. 2019, their code)

    def __init__(self, bins: int = 8, low: float = -5.0, high: float = 5.0, tails: str = "identity"):
        super().__init__()
        if not is_integer(bins) or not 2 <= bins <= 500:
            raise ValueError(f"bins must be an int from 2 to 500, got {bins!r}")
        check_number(low, "low")
        check_number(high, "high")
        if not low < high:
            raise ValueError(f"low must be less than high, got low={low!r} and high={high!r}")
        check_choice(tails, ("identity", "linear"), "tails")
        self.bins, self.low, self.high, self.tails = bins, float(low), float(high), tails
        self.size = self.high - self.low
        self.num_parameters = 3 * bins - 1 if tails == "identity" else 3 * bins + 1
        self.unit = (low, high) == (0, 1)

    def inverse(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        place, raw, back = self._from_nearer_end(x, raw)
        inside = place.clamp_min(0)
        w, h, x0, z0, d0, d1 = self._bin_parameters(inside, raw, axis=0)
        s, t = h / w, ((inside - x0) / w).clamp(0, 1)
        z = z0 + h * (s * t.square() + d0 * t * (1 - t)) / _spline_denominator(s, t, d0, d1)
        log_slope = _log_slope(s, t, d0, d1)
        return back(z + log_slope.exp() * (place - inside)), log_slope

    def forward(self, z: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        place, raw, back = self._from_nearer_end(z, raw)
        inside = place.clamp_min(0)
        w, h, x0, z0, d0, d1 = self._bin_parameters(inside, raw, axis=1)
        s, q = h / w, ((inside - z0) / h).clamp(0, 1)
        # The quadratic formula would cancel in single precision. Here g + r > 0 is its divisor minus 2 s q, and
        # r^2 - g^2 = 4 s^2 q (1 - q) gives it where g and r would cancel.
        g, product = d0 * (1 - q) - d1 * q, 4 * s.square() * q * (1 - q)
        r = (g.square() + product).sqrt()
        rest = torch.where(g < 0, product / (r + g.abs()), g + r)
        t = 2 * s * q / (2 * s * q + rest)
        log_slope = -_log_slope(s, t, d0, d1)
        return back(x0 + w * t + log_slope.exp() * (place - inside)), log_slope

    def _from_nearer_end(self, value: Tensor, raw: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """The distance to the nearer end of the box, relative to the box, the spline from that end, and the map back.

        From the other end, a narrow bin near this one would be known only up to the rounding error of the box.
        """
        above = value > (self.low + self.high) / 2
        place = torch.where(above, self.high - value, value - self.low) / self.size
        parts = raw.split((self.bins, self.bins, self.num_parameters - 2 * self.bins), -2)
        raw = torch.where(above.unsqueeze(-2), torch.cat([part.flip(-2) for part in parts], -2), raw)
        return place, raw, lambda y: torch.where(above, self.high - self.size * y, self.low + self.size * y)

    def _bin_parameters(self, inside: Tensor, raw: Tensor, axis: int) -> tuple[Tensor, ...]:
        """w, h, x0, z0, d0, d1 of the bins that hold ``inside``, along x (axis 0) or z (axis 1)."""
        raw_sizes, raw_derivatives = raw.split((2 * self.bins, self.num_parameters - 2 * self.bins), -2)
        sizes = torch.softmax(raw_sizes.unflatten(-2, (2, self.bins)), -2)
        sizes = sizes * (1 - self.bins * self.SMALLEST) + self.SMALLEST
        # Bins are picked by sums with 0-1 masks, which fuse when compiled and, unlike a gather, need no scatter in the
        # backward pass.
        edges = sizes[..., axis, :-1, :].cumsum(-2)
        past = (inside.unsqueeze(-2) >= edges).to(raw.dtype)
        before = F.pad(past, (0, 0, 0, 1))
        here = F.pad(past, (0, 0, 1, 0), value=1.0) - before
        w, h = (sizes * here.unsqueeze(-3)).sum(-2).unbind(-2)
        x0, z0 = (sizes * before.unsqueeze(-3)).sum(-2).unbind(-2)
        if self.tails == "identity":
            raw_derivatives = F.pad(raw_derivatives, (0, 0, 1, 1))  # derivative 1
        ends = torch.stack([(raw_derivatives[..., i : i + self.bins, :] * here).sum(-2) for i in (0, 1)])
        d0, d1 = F.softplus(ends + math.log(math.expm1(1 - self.SMALLEST))) + self.SMALLEST
        return w, h, x0, z0, d0, d1


def _spline_denominator(s: Tensor, t: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    return s * (1 - 2 * t * (1 - t)) + (d0 + d1) * t * (1 - t)


def _log_slope(s: Tensor, t: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    top = d1 * t.square() + 2 * s * t * (1 - t) + d0 * (1 - t).square()
    return 2 * (s / _spline_denominator(s, t, d0, d1)).log() + top.log()


# -- bijections ------------------------------------------------------------------------------------------------------


class Bijection(nn.Module):
    """An invertible map x = f(z) of vectors.

    To write one, define `forward` and `inverse`, and set the attributes that apply:

    Attributes:
        num_features: D; None if any number is allowed.
        given_shape: shape of one ``given``, ``()`` for class labels; None if the map takes none.
        num_classes: number of classes, where ``given`` is a label; None where it is not.
        domain, codomain: the set of z and of x in each feature: "real" (the real line) or "unit" (the unit interval);
            "any" for both if the map works on either set and stays in it.
    """

    num_features: int | None = None
    given_shape: torch.Size | None = None
    num_classes: int | None = None
    domain: str = "real"
    codomain: str = "real"

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z, (N, D), to x = f(z), (N, D), and log|det dx/dz|, (N,). ``given`` is (N, *given_shape)."""
        raise NotImplementedError

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, (N, D), to z, (N, D), and log|det dz/dx|, (N,). ``given`` is (N, *given_shape)."""
        raise NotImplementedError

    def initialize(self, x: Tensor) -> None:
        """Initialize from the data ``x``, (N, D), any part that needs it, such as `ActNorm`."""


@register
class Inverse(Bijection):
    """The inverse of another bijection, whose z is this x. ``Inverse(MaskedAutoregressive(...))`` is IAF."""

    def __init__(self, bijection: Bijection):
        super().__init__()
        check_type(bijection, Bijection, "bijection", "a Bijection of dgm_pyro.networks")
        self.bijection = bijection
        self.num_features, self.num_classes = bijection.num_features, bijection.num_classes
        self.given_shape = bijection.given_shape
        self.domain, self.codomain = bijection.codomain, bijection.domain

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(z, given)

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection(x, given)


@register
class Elementwise(Bijection):
    """A univariate map of each feature, with free parameters or with parameters from ``given``.

    Args:
        num_features: D.
        univariate: the map.
        network: maps ``given`` to ``(N, P, D)`` or flat ``(N, P * D)``; without one the parameters are free.
    """

    def __init__(self, num_features: int, univariate: Univariate, network: nn.Module | None = None):
        super().__init__()
        check_count(num_features, "num_features")
        _check_univariate(univariate)
        self.num_features, self.univariate, self.network = num_features, univariate, network
        self.domain = self.codomain = "unit" if univariate.unit else "real"
        if network is None:
            self.raw = nn.Parameter(torch.zeros(univariate.num_parameters, num_features))
        else:
            self.given_shape = torch.Size(_declared(network, "in_shape", "the shape of one given"))
            self.num_classes = getattr(network, "num_classes", None)

    def _raw_parameters(self, value: Tensor, given: Tensor | None) -> Tensor:
        if self.network is None:
            return self.raw
        return _parameters_of(self.network, (given,), value.shape[0], self.univariate, value.shape[-1])

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_slope = self.univariate(z, self._raw_parameters(z, given))
        return x, log_slope.sum(-1)

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_slope = self.univariate.inverse(x, self._raw_parameters(x, given))
        return z, log_slope.sum(-1)


@register
class Coupling(Bijection):
    r"""Some features pass unchanged, and determine the map of the others (Dinh et al. 2017, section 3.2).

    .. math::
        x_A = z_A, \qquad x_B = u(z_B; \mathrm{network}(z_A))

    The Jacobian is triangular, so its log-determinant is the sum of those of u.

    Args:
        passes: D booleans, True for the features A; some must be True and some False.
        univariate: u.
        network: maps ``(N, |A|)``, or ``(N, *in_shape)`` with that number of features, to ``(N, P, |B|)`` or any shape
            with that number of values in that order; if it has a ``given_shape``, it is called with ``given`` too.
    """

    passing: Tensor
    moving: Tensor
    places: Tensor

    def __init__(self, passes: Sequence[bool], univariate: Univariate, network: nn.Module):
        super().__init__()
        _check_univariate(univariate)
        booleans = isinstance(passes, Sequence) and all(isinstance(each, bool) for each in passes)
        if not booleans or all(passes) or not any(passes):
            raise ValueError(f"passes must be a sequence of booleans, some True and some False, got {passes!r}")
        mask = torch.tensor(passes)
        self.num_features, self.univariate, self.network = len(mask), univariate, network
        self.domain = self.codomain = "unit" if univariate.unit else "real"
        self.given_shape, self.num_classes = _second_input(network)
        passing, moving = mask.nonzero().squeeze(-1), (~mask).nonzero().squeeze(-1)
        self.register_buffer("passing", passing, persistent=False)
        self.register_buffer("moving", moving, persistent=False)
        self.register_buffer("places", torch.cat((passing, moving)).argsort(), persistent=False)

    def _move_features(self, value: Tensor, given: Tensor | None, univariate: Any) -> tuple[Tensor, Tensor]:
        a, b = value.index_select(-1, self.passing), value.index_select(-1, self.moving)
        seen = a.reshape(-1, *getattr(self.network, "in_shape", a.shape[1:]))
        inputs = (seen,) if self.given_shape is None else (seen, given)
        b, log_slope = univariate(b, _parameters_of(self.network, inputs, b.shape[0], self.univariate, b.shape[-1]))
        return torch.cat((a, b), -1).index_select(-1, self.places), log_slope.sum(-1)

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move_features(z, given, self.univariate)

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._move_features(x, given, self.univariate.inverse)


@register
class MaskedAutoregressive(Bijection):
    r"""A map of each feature that depends on the features of x before it (Papamakarios et al. 2017, section 3.1).

    .. math::
        x_i = u(z_i; \mathrm{network}(x_{<i}))

    From x to z, all features are mapped at once. From z to x, they are mapped one after another, at the cost of one
    pass for a network with a `cache`, and of D passes for any other. With `Inverse` it is the other way around:
    sampling takes one call, as a VAE's encoder needs.

    Args:
        univariate: u.
        network: a `MADE` with P parameters per feature, or any network with its ``in_shape`` and ``order``; if it has a
            ``given_shape``, it is called with ``given`` too.
    """

    def __init__(self, univariate: Univariate, network: nn.Module):
        super().__init__()
        _check_univariate(univariate)
        self.univariate, self.network = univariate, network
        self.in_shape = torch.Size(_declared(network, "in_shape", "the shape of one x"))
        self.order = tuple(_declared(network, "order", "the indices of the features, first to last"))
        self.num_features = self.in_shape.numel()
        self.domain = self.codomain = "unit" if univariate.unit else "real"
        self.given_shape, self.num_classes = _second_input(network)

    def _raw_parameters(self, x: Tensor, given: Tensor | None) -> Tensor:
        image = x.reshape(-1, *self.in_shape)
        inputs = (image,) if self.given_shape is None else (image, given)
        return _parameters_of(self.network, inputs, x.shape[0], self.univariate, x.shape[-1])

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_slope = self.univariate.inverse(x, self._raw_parameters(x, given))
        return z, log_slope.sum(-1)

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        make = cache_maker(self.network)
        cache = None if make is None else make(z.shape[0], *(() if self.given_shape is None else (given,)))
        x, log_det, last = torch.zeros_like(z), z.new_zeros(z.shape[0]), None
        places = torch.arange(z.shape[-1], device=z.device)
        for i in self.order:
            one = slice(i, i + 1)
            raw = None if cache is None else cache.step(last).unsqueeze(-1)
            if raw is None or raw.shape[1] != self.univariate.num_parameters:  # raises if the number does not fit
                raw = self._raw_parameters(x, given)[..., one]
            x_i, log_slope = self.univariate(z[:, one], raw)
            x, log_det, last = torch.where(places == i, x_i, x), log_det + log_slope.squeeze(-1), x_i.squeeze(-1)
        return x, log_det


@register
class Permutation(Bijection):
    """A permutation of the features, x_i = z_{order_i}.

    Args:
        order: the D indices, each once.
    """

    domain = codomain = "any"
    order: Tensor
    back: Tensor

    def __init__(self, order: Sequence[int]):
        super().__init__()
        integers = isinstance(order, Sequence) and all(map(is_integer, order))
        if not integers or sorted(order) != list(range(len(order))):
            raise ValueError(f"order must hold each index 0 .. D - 1 once, got {order!r}")
        indices = torch.tensor(order)
        self.num_features = len(indices)
        self.register_buffer("order", indices, persistent=False)
        self.register_buffer("back", indices.argsort(), persistent=False)

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.index_select(-1, self.order), z.new_zeros(z.shape[0])

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.back), x.new_zeros(x.shape[0])


@register
class LULinear(Bijection):
    r"""z = L U x + b, L unit lower and U upper triangular: a learned linear map, initially the identity.

    The log-determinant is the sum of the log-diagonal of U (Kingma and Dhariwal 2018, section 3.2).

    Args:
        num_features: D.
    """

    def __init__(self, num_features: int):
        super().__init__()
        check_count(num_features, "num_features")
        self.num_features = num_features
        # L below the diagonal, its logarithm on it, U above it.
        self.weight = nn.Parameter(torch.zeros(num_features, num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def _factors(self) -> tuple[Tensor, Tensor, Tensor]:
        log_diagonal = self.weight.diagonal()
        lower = self.weight.tril(-1) + torch.eye(len(self.weight), dtype=self.weight.dtype, device=self.weight.device)
        return lower, self.weight.triu(1) + log_diagonal.exp().diag_embed(), log_diagonal.sum()

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper, log_det = self._factors()
        return F.linear(x, lower @ upper, self.bias), log_det.expand(x.shape[0])

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper, log_det = self._factors()
        columns = torch.linalg.solve_triangular(lower, (z - self.bias).mT, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, columns, upper=True).mT, -log_det.expand(z.shape[0])


@register
class ActNorm(Bijection):
    r"""z = (x - location) / scale, initialized so that the features of z have mean 0 and variance 1.

    It is the identity until `initialize`, which `inverse` calls on its first batch of more than one x in training mode
    with gradients enabled. After that, location and scale are ordinary parameters. Evaluation never initializes, and
    neither does an exported or compiled pass: run an eager pass or `initialize` first, also before making replicas that
    must start from the same values. The buffer ``initialized`` keeps the state in checkpoints.

    Source: Kingma and Dhariwal 2018, section 3.1.

    Args:
        num_features: D.
    """

    SMALLEST = 1e-4  # scale, for features that hardly vary in the first batch
    initialized: Tensor

    def __init__(self, num_features: int):
        super().__init__()
        check_count(num_features, "num_features")
        self.num_features = num_features
        self.location = nn.Parameter(torch.zeros(num_features))
        self.log_scale = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("initialized", torch.tensor(False))
        self._waiting = True  # `initialized` for the host, which must not wait for the device at each step

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._waiting = not bool(self.initialized)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set location and scale to those of ``x``, (N, D), N > 1; a feature that is constant in x keeps scale 1.

        Raises:
            ValueError: there is a single x, which has no scale, or a value is not finite.
        """
        check_tensor(x, (self.num_features,), "x", "the shape of the features")
        if len(x) < 2:
            raise ValueError("x has a single datum, which has no scale for ActNorm: initialize with at least two data")
        check_finite(x, "x")
        constant = (x == x[0]).all(0)
        self.location.copy_(x.mean(0))
        self.log_scale.copy_(torch.where(constant, 1.0, x.std(0).clamp_min(self.SMALLEST)).log())
        self.initialized.fill_(True)
        self._waiting = False

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        training = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if self._waiting and training and x.shape[0] > 1:
            self.initialize(x)
        return (x - self.location) * torch.exp(-self.log_scale), -self.log_scale.sum().expand(x.shape[0])

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * self.log_scale.exp() + self.location, self.log_scale.sum().expand(z.shape[0])


@register
class Sigmoid(Bijection):
    r"""x = 1 / (1 + exp(-z)): the real line to the unit interval, the last part of a flow on a cube.

    Both maps keep x inside the open interval by its rounding error, so no x of the closed cube has an infinite score.
    """

    codomain = "unit"

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _clamp_inside(torch.sigmoid(z)), (F.logsigmoid(z) + F.logsigmoid(-z)).sum(-1)

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = _clamp_inside(x)
        log_x, log_rest = x.log(), torch.log1p(-x)
        return log_x - log_rest, -(log_x + log_rest).sum(-1)


@register
class NormalCDF(Bijection):
    r"""x = Phi(z), the standard Normal distribution function: N(0, 1) becomes the uniform on the unit interval.

    A flow that ends in this map is uniform on the cube as long as the rest is the identity, and no x of the cube is far
    in the tails of z. Both maps keep x inside the open interval, as for `Sigmoid`.
    """

    codomain = "unit"

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _clamp_inside(torch.special.ndtr(z)), _log_normal(z)

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = torch.special.ndtri(_clamp_inside(x))
        return z, -_log_normal(z)


def _check_univariate(univariate: Any) -> None:
    check_type(univariate, Univariate, "univariate", "a Univariate of dgm_pyro.networks, such as Affine()")


def _log_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)


def _clamp_inside(x: Tensor) -> Tensor:
    eps = torch.finfo(x.dtype).eps
    return x.clamp(eps, 1 - eps)


def _parameters_of(
    network: nn.Module, inputs: tuple[Any, ...], count: int, univariate: Univariate, num_features: int
) -> Tensor:
    """The network's raw parameters, (N, P, D).

    Raises:
        ValueError: the network's output has another size.
    """
    raw = apply_network(network, *inputs)
    p = univariate.num_parameters
    if raw.shape[0] != count or raw.numel() != count * p * num_features:
        raise ValueError(
            f"the network of a bijection returned shape {tuple(raw.shape)} for a batch of {count}, but "
            f"{type(univariate).__name__} on {num_features} features needs {(count, p, num_features)} or "
            f"{(count, p * num_features)}"
        )
    return raw.reshape(count, p, num_features)


def _second_input(network: nn.Module) -> tuple[torch.Size | None, int | None]:
    """The shape of ``given`` and its number of classes, for a network whose first input is x."""
    check_type(network, nn.Module, "network", "a torch.nn.Module")
    shape = getattr(network, "given_shape", None)
    return (None, None) if shape is None else (torch.Size(shape), getattr(network, "num_classes", None))


def _declared(network: nn.Module, attribute: str, meaning: str) -> Any:
    if not hasattr(network, attribute):
        raise ValueError(
            f"the network {type(network).__name__} must have {attribute}, {meaning}: use a network of dgm_pyro"
        )
    return getattr(network, attribute)
