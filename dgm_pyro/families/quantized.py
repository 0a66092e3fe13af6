r"""Vector quantization: latents that are vectors of a codebook, one at each place of a grid, as in a VQ-VAE.

An encoder network gives an encoding h_i(x) in R^D for each place i of a grid, and q puts all mass on the nearest codes:

.. math::
    k_i(x) = \arg\min_k \|h_i(x) - e_k\|, \qquad z_i = e_{k_i}, \qquad
    p(z) = p(k_1) \prod_{i > 1} p(k_i \mid k_{<i}).

`VectorQuantizer` is this q(z | x), and `Embedded` is this p(z): a program of integers whose draws are looked up in the
same `networks.Codebook`. A `VAE` of the two is a VQ-VAE whose prior is learned jointly. q is deterministic, so the
ELBO is

.. math::
    \log p(x) = \log \sum_z p(z)\, p(x \mid z) \ge \log p(z(x)) + \log p(x \mid z(x)):

minus a code length in nats: the length of the grid's code plus that of x given the grid. This is the value of every
objective, and `dgm.evaluate` reports it. Training follows a gradient that differs in three respects:

- The likelihood's gradient passes straight through to h, see `networks.codebook`.
- The codebook has no gradient. Its vectors are running means of the encodings.
- A commitment loss, :math:`\beta \sum_i \|h_i - \mathrm{sg}(z_i)\|^2`, keeps encodings near their codes. It is not a
  term of the bound, so it enters as log q(z | x) = c - sg(c), whose value is 0 and whose gradient is that of the loss.

The prior does not affect the choice of codes: given the codes, it is fitted by maximum likelihood, as in a second
stage of training. The encoder minimizes -log p(x | z) alone, and the sizes of the codebook and of the grid limit
-log p(z).

Source: van den Oord et al. 2017 (arXiv 1711.00937), equations 1 to 3; Razavi et al. 2019 (arXiv 1906.00446).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl

from dgm_pyro.checks import check_number, check_type
from dgm_pyro.families.autoregressive import Autoregressive
from dgm_pyro.families.conditionals import Categorical, IndependentConditional, Network
from dgm_pyro.families.onehot import OverIntegers
from dgm_pyro.networks.codebook import Codebook
from dgm_pyro.program import Shape
from dgm_pyro.registry import register

__all__ = ["Embedded", "EmbeddedDistribution", "PointMass", "VectorQuantizer"]


@register
class Embedded(OverIntegers):
    """The code vectors of a program of integers, ``(D, *event_shape)``: the prior p(z) of a VQ-VAE.

    Args:
        program: a `Categorical`, or an `Autoregressive` model of Categorical features, with as many levels as there are
            codes.
        codebook: the codebook with the vectors.

    Raises:
        TypeError: the program is neither, or ``codebook`` is not a `networks.Codebook`.
        ValueError: the numbers of levels and codes differ.

    >>> import torch, dgm_pyro as dgm
    >>> codebook = dgm.networks.Codebook(num_codes=4, num_features=3)
    >>> prior = Embedded(dgm.Categorical((2, 2), 4), codebook)
    >>> z = prior.sample(5)
    >>> z.shape, prior.log_prob(z).exp()[0]  # 4 codes at each of 4 places
    (torch.Size([5, 3, 2, 2]), tensor(0.0039))
    """

    def __init__(self, program: Categorical | Autoregressive, codebook: Codebook):
        super().__init__(program)
        check_type(codebook, Codebook, "codebook", "a dgm.networks.Codebook")
        if program.levels != codebook.num_codes:
            raise ValueError(
                f"program has {program.levels} levels, but codebook has {codebook.num_codes} codes: give both the same "
                "number"
            )
        self.codebook = codebook
        self.event_shape = torch.Size((codebook.num_features, *program.event_shape))

    def forward(self, given: Any = None) -> EmbeddedDistribution:
        return EmbeddedDistribution(self._integers(given), self.codebook)


class EmbeddedDistribution(TorchDistribution):
    """The distribution that `Embedded` returns: a mass on the code vectors.

    Args:
        codes: the distribution of the integers.
        codebook: the codebook with their vectors.
    """

    arg_constraints: ClassVar = {}

    def __init__(self, codes: Any, codebook: Codebook, validate_args: bool | None = None):
        self.codes, self.codebook = codes, codebook
        shape = torch.Size((codebook.num_features, *codes.event_shape))
        super().__init__(codes.batch_shape, shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return _CodebookVectors(self.codebook, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: EmbeddedDistribution | None = None) -> EmbeddedDistribution:
        new = self._get_checked_instance(EmbeddedDistribution, _instance)
        new.codes, new.codebook = self.codes.expand(batch_shape), self.codebook
        super(EmbeddedDistribution, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(k) of the codes k whose vectors make up z, in nats; minus infinity if z has any other vector."""
        if self._validate_args:
            self._validate_sample(value)
        distance, k = self.codebook.distances(_vectors_last(value, self.event_shape)).min(-1)
        inside = (distance == 0).flatten(1 - len(self.event_shape)).all(-1) if self.codes.event_shape else distance == 0
        log_prob = self.codes.log_prob(k)
        return torch.where(inside, log_prob, -torch.inf)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Code vectors, ``(*sample_shape, *batch, D, *places)``."""
        k = self.codes.sample(torch.Size(sample_shape))
        return F.embedding(k.long(), self.codebook.vectors).movedim(-1, -len(self.event_shape))


class _CodebookVectors(constraints.Constraint):
    """Vectors of a codebook, at each of the places."""

    is_discrete = True

    def __init__(self, codebook: Codebook, event_dim: int):
        self.codebook, self._event_dim = codebook, event_dim
        super().__init__()

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        return self._event_dim

    def check(self, value: Tensor) -> Tensor:
        distance = self.codebook.distances(value.movedim(-self._event_dim, -1)).amin(-1)
        return (distance == 0).reshape(*value.shape[: value.dim() - self._event_dim], -1).all(-1)


def _vectors_last(z: Tensor, event_shape: torch.Size) -> Tensor:
    """z with the vectors as its last dimension."""
    return z.movedim(-len(event_shape), -1)


@register
class VectorQuantizer(IndependentConditional):
    """q(z | x) of a VQ-VAE: all mass on the code vectors nearest to the network's encoding of x.

    Args:
        event_shape: shape of z, ``(D, *places)``, such as ``(D, H, W)`` for a grid.
        network: maps x to encodings ``(B, 1, D, *places)``, or flat.
        codebook: a codebook of vectors of D features, shared with the prior.
        commitment: beta, the weight of the commitment loss in the gradient, in nats per squared distance.
        given_shape: shape of x, for a network without an `in_shape`.

    Raises:
        TypeError: there is no network, or ``codebook`` is not a `networks.Codebook`.
        ValueError: the first dimension of ``event_shape`` is not the D of the codebook.

    >>> import torch, dgm_pyro as dgm
    >>> codebook = dgm.networks.Codebook(num_codes=4, num_features=3)
    >>> q = VectorQuantizer((3, 2, 2), dgm.networks.ConvNet((1, 4, 4), (3, 2, 2), 1, width=8), codebook)
    >>> q.sample(5, given=torch.zeros(5, 1, 4, 4)).shape
    torch.Size([5, 3, 2, 2])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        network: Network,
        codebook: Codebook,
        *,
        commitment: float = 0.25,
        given_shape: Shape | None = None,
    ):
        check_type(codebook, Codebook, "codebook", "a dgm.networks.Codebook")
        if network is None:
            raise TypeError("network is None, but a network must encode x: pass one")
        super().__init__(event_shape, 1, network, given_shape=given_shape)
        if self.event_shape[:1] != (codebook.num_features,):
            raise ValueError(
                f"event_shape is {tuple(self.event_shape)}, but codebook has {codebook.num_features} features: "
                f"it must be ({codebook.num_features}, *places)"
            )
        self.codebook, self.commitment = codebook, check_number(commitment, "commitment", at_least=0)

    def distribution(self, raw: Tensor) -> PointMass:
        event_dim = len(self.event_shape)
        h = _vectors_last(raw.squeeze(-1 - event_dim), self.event_shape)
        z = self.codebook(h)
        cost = self.commitment * (h - z.detach()).square().flatten(-event_dim).sum(-1)
        return PointMass(z.movedim(-1, -event_dim), cost - cost.detach(), event_dim=event_dim)


class PointMass(dist.Delta):
    """The distribution of `VectorQuantizer`: mass 1 at z, and a log q with the gradient of the commitment loss."""


@register_kl(PointMass, EmbeddedDistribution)
def _kl(q: PointMass, p: EmbeddedDistribution) -> Tensor:
    return q.log_density - p.log_prob(q.v)
