r"""Planar and Sylvester flows: a step in a few directions, whose size is a squashed linear function of z.

.. math::
    \text{planar:} \quad x = z + u \tanh(w^\top z + b), \qquad
    \det \frac{dx}{dz} = 1 + w^\top u\, \tanh'(w^\top z + b)

.. math::
    \text{Sylvester:} \quad x = z + Q R \tanh(\tilde R Q^\top z + b), \qquad
    \det \frac{dx}{dz} = \prod_i \left( 1 + R_{ii} \tilde R_{ii} \tanh'(\cdot)_i \right)

with Q orthogonal, a product of Householder reflections, and R and R~ upper triangular. Both are meant for posteriors
whose parameters come from a network of the datum: drawing z and scoring the draw takes one pass. They are monotone in
the coordinates that matter if :math:`w^\top u > -1` and :math:`R_{ii} \tilde R_{ii} > -1`, which holds for any raw
parameters. So other points can be scored too: their z is the root of scalar equations, found by bisection, one for a
planar map and D in turn for a Sylvester map. A last Newton step carries the gradient (implicit function theorem).

Sources: Rezende and Mohamed 2015 (arXiv 1505.05770, equations 10 to 12 and appendix A); van den Berg et al. 2018
(Sylvester normalizing flows, arXiv 1803.05649, equations 7, 9 and 16).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_pyro.checks import as_shape, check_count
from dgm_pyro.networks.bijections import Bijection
from dgm_pyro.networks.mlp import InputEmbedding, apply_network
from dgm_pyro.registry import register

__all__ = ["Planar", "Sylvester"]

SLOPE = 0.999  # instead of 1, so that rounding cannot make a determinant zero


class _Amortized(Bijection):
    """A bijection with one vector of raw parameters: free, or a linear function of ``given``."""

    def __init__(self, num_features: int, num_parameters: int, given_shape: Sequence[int] | None):
        super().__init__()
        self.num_features = num_features
        if given_shape is None:
            self.raw = nn.Parameter(torch.randn(num_parameters) / math.sqrt(num_features))
        else:
            self.given_shape = as_shape(given_shape, "given_shape")
            self.network = InputEmbedding(self.given_shape, None, num_parameters)

    def _raw_parameters(self, value: Tensor, given: Tensor | None) -> Tensor:
        raw = self.raw if given is None else apply_network(self.network, given)
        return raw.expand(value.shape[0], raw.shape[-1])


@register
class Planar(_Amortized):
    r"""x = z + u tanh(w . z + b). 2 D + 1 raw parameters: w, a raw u, b; with a raw u of zero it is the identity.

    Args:
        num_features: D.
        given_shape: shape of one ``given``, of which the parameters are a linear function; without one they are free.

    >>> bijection = Planar(3)
    >>> z = torch.randn(5, 3)
    >>> torch.allclose(bijection.inverse(bijection(z)[0])[0], z, atol=1e-4)
    True
    """

    def __init__(self, num_features: int, *, given_shape: Sequence[int] | None = None):
        check_count(num_features, "num_features")
        super().__init__(num_features, 2 * num_features + 1, given_shape)

    def _terms(self, value: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w, u, b and w . u, the last above -1."""
        w, u, b = self._raw_parameters(value, given).split((value.shape[-1], value.shape[-1], 1), -1)
        inner = (w * u).sum(-1, keepdim=True)
        along = SLOPE * (F.softplus(inner + math.log(math.expm1(1))) - 1)  # 0 at 0
        u = u + (along - inner) * w / w.square().sum(-1, keepdim=True).clamp_min(1e-12)
        return w, u, b, along

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        w, u, b, along = self._terms(z, given)
        step = ((w * z).sum(-1, keepdim=True) + b).tanh()
        return z + u * step, torch.log1p(along * (1 - step.square())).squeeze(-1)

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        w, u, b, along = self._terms(x, given)
        zero, one = torch.zeros_like(b), torch.ones_like(b)
        place = _solve(along, one, zero, (w * x).sum(-1, keepdim=True) + b)
        return x - u * place.tanh(), -torch.log1p(along * (1 - place.tanh().square())).squeeze(-1)


@register
class Sylvester(_Amortized):
    r"""x = z + Q R tanh(R~ Q' z + b), Q a product of Householder reflections, R and R~ upper triangular.

    D (D + 1) + D + H D raw parameters: R and R~ row by row, their diagonals squashed by tanh, b, and H vectors.

    Args:
        num_features: D.
        reflections: H; 0 makes Q the identity.
        given_shape: as `Planar`.

    >>> bijection = Sylvester(3)
    >>> z = torch.randn(5, 3)
    >>> torch.allclose(bijection.inverse(bijection(z)[0])[0], z, atol=1e-4)
    True
    """

    upper: Tensor

    def __init__(self, num_features: int, reflections: int = 4, *, given_shape: Sequence[int] | None = None):
        check_count(num_features, "num_features")
        check_count(reflections, "reflections", at_least=0)
        triangle = num_features * (num_features + 1) // 2
        super().__init__(num_features, 2 * triangle + (1 + reflections) * num_features, given_shape)
        self.reflections, self.triangle = reflections, triangle
        rows, columns = torch.triu_indices(num_features, num_features)
        self.register_buffer("upper", rows * num_features + columns, persistent=False)

    def _terms(self, value: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """R and R~, (N, D, D), b, (N, D), and the vectors, (N, H, D)."""
        size, triangle = value.shape[-1], self.triangle
        raw = self._raw_parameters(value, given)
        first, second, b, v = raw.split((triangle, triangle, size, self.reflections * size), -1)
        return self._triangular(first), self._triangular(second), b, v.unflatten(-1, (self.reflections, size))

    def _triangular(self, flat: Tensor) -> Tensor:
        size = self.num_features or 0
        blank = flat.new_zeros(flat.shape[0], size * size)
        matrix = blank.index_copy(-1, self.upper, flat).unflatten(-1, (size, size))
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        return matrix + torch.diag_embed(SLOPE * diagonal.tanh() - diagonal)

    def forward(self, z: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r, s, b, v = self._terms(z, given)
        step = ((s @ reflect(z, v.flip(-2)).unsqueeze(-1)).squeeze(-1) + b).tanh()
        return z + reflect((r @ step.unsqueeze(-1)).squeeze(-1), v), self._log_det(r, s, step)

    def inverse(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r, s, b, v = self._terms(x, given)
        turned = reflect(x, v.flip(-2))
        places: list[Tensor] = []  # of Q'z, from the last coordinate to the first
        steps: list[Tensor] = []
        for i in reversed(range(x.shape[-1])):
            later = slice(i + 1, None)
            known = torch.stack(places[::-1], -1) if places else turned[:, later]
            pushed = torch.stack(steps[::-1], -1) if steps else turned[:, later]
            offset = (s[:, i, later] * known).sum(-1) + b[:, i]
            target = turned[:, i] - (r[:, i, later] * pushed).sum(-1)
            places.append(_solve(r[:, i, i], s[:, i, i], offset, target))
            steps.append((s[:, i, i] * places[-1] + offset).tanh())
        z, step = torch.stack(places[::-1], -1), torch.stack(steps[::-1], -1)
        return reflect(z, v), -self._log_det(r, s, step)

    def _log_det(self, r: Tensor, s: Tensor, step: Tensor) -> Tensor:
        product = r.diagonal(dim1=-2, dim2=-1) * s.diagonal(dim1=-2, dim2=-1)
        return torch.log1p(product * (1 - step.square())).sum(-1)


def reflect(z: Tensor, v: Tensor) -> Tensor:
    """Q z, with Q the product of the reflections at the vectors ``v``, (N, H, D); in reverse order, this is Q' z."""
    for direction in reversed(v.unbind(-2)):
        scale = 2 / direction.square().sum(-1, keepdim=True).clamp_min(1e-12)
        z = z - scale * (direction * z).sum(-1, keepdim=True) * direction
    return z


def _solve(r: Tensor, s: Tensor, c: Tensor, target: Tensor, steps: int = 60) -> Tensor:
    """The root a of a + r tanh(s a + c) = target, elementwise, for r s > -1; differentiable in all arguments."""
    with torch.no_grad():
        low, high = target - r.abs(), target + r.abs()
        for _ in range(steps):
            middle = (low + high) / 2
            above = middle + r * (s * middle + c).tanh() > target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        middle = (low + high) / 2
    step = (s * middle + c).tanh()
    return middle - (middle + r * step - target) / (1 + r * s * (1 - step.square()))
