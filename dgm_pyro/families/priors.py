r"""Priors that are mixtures over whole vectors.

.. math::
    p(z) = \sum_{k=1}^{K} \pi_k \, p_k(z)

`MixturePrior` has its own Normals, :math:`p_k = N(\mu_k, \mathrm{diag}\, \sigma_k^2)`. `VampPrior` uses the encoder:
for a given encoder, the prior with the best bound is the average of q(z | x) over the data, and
:math:`p_k(z) = q(z \mid u_k)` approximates this average with K learned pseudo-inputs u_k in place of the data.

Every other prior is a program already: a learned `Normal`, a `Flow`, an `Autoregressive` model, a `Diffusion`, another
`VAE`.

Source: Tomczak and Welling 2018 (VAE with a VampPrior, arXiv 1705.07120), section 2 and equation 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from dgm_pyro.checks import as_shape, check_count, check_finite
from dgm_pyro.families import distributions
from dgm_pyro.families.conditionals import check_levels, inverse_softplus, positive
from dgm_pyro.program import Conditional, check_no_distribution, declare_given, is_pair
from dgm_pyro.registry import register

__all__ = ["MixtureOfParts", "MixturePrior", "VampPrior"]


class MixtureOfParts(Conditional):
    """sum_k pi_k p_k(z) with free weights; subclasses give `parts`, the p_k as one distribution of batch shape (K,)."""

    def __init__(self, components: int):
        super().__init__()
        check_count(components, "components")
        self.logits = nn.Parameter(torch.zeros(components))

    def parts(self) -> dist.TorchDistribution:
        raise NotImplementedError

    def forward(self, given: Any = None) -> dist.TorchDistribution:
        return distributions.Mixture(dist.Categorical(logits=self.logits), self.parts())


@register
class MixturePrior(MixtureOfParts):
    """A mixture of diagonal Normals over whole vectors; `MixtureOfNormals` has one per feature instead.

    Args:
        event_shape: shape of one z.
        components: K. Their locations start as draws of N(0, I), their scales at 1.

    >>> MixturePrior(2, 5).log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    def __init__(self, event_shape: int | Sequence[int], components: int):
        super().__init__(components)
        self.event_shape = as_shape(event_shape)
        self.loc = nn.Parameter(torch.randn(components, *self.event_shape))
        self.raw_scale = nn.Parameter(torch.full((components, *self.event_shape), inverse_softplus(1.0)))

    def parts(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, positive(self.raw_scale)).to_event(len(self.event_shape))


@register
class VampPrior(MixtureOfParts):
    """sum_k pi_k q(z | u_k): the encoder at K learned pseudo-inputs. Give the VAE the same encoder object.

    Args:
        encoder: q(z | x), a conditional of x alone that can score any z.
        pseudo_inputs: initial u_k, ``(K, *x_shape)``, such as rows of the training data.
        levels: for data that are integers 0 .. levels - 1; the u_k are reals between 0 and levels - 1.

    Raises:
        TypeError, ValueError: the encoder is not a conditional of x alone, or the pseudo-inputs do not fit.

    >>> import dgm_pyro as dgm
    >>> encoder = dgm.Normal(2, nn.Linear(5, 4))
    >>> vae = dgm.VAE(VampPrior(encoder, torch.randn(7, 5)), dgm.Normal(5, nn.Linear(2, 10)), encoder)
    >>> vae.sample(3).shape
    torch.Size([3, 5])
    """

    def __init__(self, encoder: Conditional, pseudo_inputs: Tensor, levels: int | None = None):
        check_no_distribution(encoder, "encoder")
        if not isinstance(encoder, Conditional):
            raise TypeError(f"the encoder must be a Conditional such as dgm.Normal, got {type(encoder).__name__}")
        if not isinstance(pseudo_inputs, Tensor) or pseudo_inputs.dim() < 1:
            raise TypeError("pseudo_inputs must be a tensor (K, *x_shape), such as rows of the training data")
        check_finite(pseudo_inputs, "pseudo_inputs")
        if is_pair(encoder.given_shape):
            raise ValueError(
                "the encoder of a VampPrior is given a pseudo-input alone, but this encoder reads a label or given "
                "too: use another prior with these"
            )
        super().__init__(len(pseudo_inputs))
        self.event_shape, self.encoder = encoder.event_shape, encoder
        declare_given(encoder, pseudo_inputs.shape[1:], "encoder", "pseudo_inputs")
        self.top = None if levels is None else check_levels(levels) - 1
        start = pseudo_inputs.to(torch.get_default_dtype())
        # At its ends the sigmoid has no slope left.
        self.raw_inputs = nn.Parameter(start.clone() if self.top is None else (0.05 + 0.9 * start / self.top).logit())

    @property
    def pseudo_inputs(self) -> Tensor:
        """The u_k, ``(K, *x_shape)``."""
        return self.raw_inputs if self.top is None else self.top * self.raw_inputs.sigmoid()

    def parts(self) -> dist.TorchDistribution:
        return self.encoder(self.pseudo_inputs)
