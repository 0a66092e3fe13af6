r"""Implicit models: p(x) as the distribution of a function of simple noise.

.. math::
    z \sim p(z), \qquad x = G(z), \qquad P(x \in A) = P(z \in G^{-1}(A)).

The right side, the *pushforward* of p(z), is all that is defined. A density needs more: a flow has one because its map
is invertible, and the change of variables applies. A generator may map many z to one x, and when z has fewer dimensions
than x, all of p(x) lies on a surface of volume zero, where no density exists. So an implicit model can be sampled but
not scored. It is trained by comparing samples, with the objectives of `adversarial`.

Source: Diggle and Gratton 1984; Mohamed and Lakshminarayanan 2016 (arXiv 1610.03483).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import pyro
import torch
from torch import Tensor, nn

from dgm_pyro.checks import (
    as_shape,
    check_dense,
    check_finite,
    check_name,
    check_network_options,
    check_number,
    check_tensor,
    check_type,
)
from dgm_pyro.families.conditionals import check_levels, inverse_softplus, positive
from dgm_pyro.families.vae import VAE
from dgm_pyro.networks.mlp import shape_read_by
from dgm_pyro.program import (
    Conditional,
    IntractableError,
    Program,
    call_network,
    check_program,
    declare_given,
    is_pair,
    require_distinct,
)
from dgm_pyro.registry import register

__all__ = ["Around", "Implicit", "mode_coverage", "noisy", "parzen"]


@register
class Implicit(Program):
    """z from the prior, and x = generator(z): samples without a density.

    `sample`, `Predictive` and `poutine` work as for every program; observing x raises an `IntractableError`. Train it
    with ``dgm.fit(program, data, "gan")``, or another objective of `adversarial`.

    Args:
        event_shape: shape of one x.
        prior: p(z), any program.
        generator: maps z to x, ``(B, *event_shape)`` or flat ``(B, numel)``. One that reads a second input,
            ``generator(z, given)`` with a ``given_shape``, makes the model conditional on it (a class label, a
            vector); so does a conditional prior.
        levels: x takes the integers 0 .. levels - 1: the generator's outputs go through a sigmoid, are scaled to that
            range and rounded. The gradient ignores the rounding (straight-through).
        latent_name: the name of z.

    Raises:
        TypeError, ValueError: a part is not a module or a program, or the shapes do not fit.

    >>> import torch, dgm_pyro as dgm
    >>> program = dgm.Implicit(5, dgm.Normal(2), torch.nn.Linear(2, 5))
    >>> program.sample(3).shape
    torch.Size([3, 5])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        prior: Program,
        generator: nn.Module,
        *,
        levels: int | None = None,
        latent_name: str = "z",
    ):
        super().__init__()
        check_program(prior, "prior")
        if not isinstance(generator, nn.Module):
            raise TypeError(f"the generator must be a torch.nn.Module, got {type(generator).__name__}")
        check_name(latent_name, "latent_name")
        self.prior, self.generator, self.latent_name = prior, generator, latent_name
        self.levels = None if levels is None else check_levels(levels)
        self.event_shape = as_shape(event_shape)
        self.reads = shape_read_by(generator)
        pair = is_pair(self.reads)
        reads: Any = self.reads
        z_shape = reads[0] if pair else reads
        if z_shape is not None and tuple(z_shape) != tuple(prior.event_shape):
            raise ValueError(
                f"the generator reads z of shape {tuple(z_shape)}, but the prior's event_shape is "
                f"{tuple(prior.event_shape)}: build both for one"
            )
        self.conditional = prior.conditional or pair
        self.given_shape = reads[1] if pair else prior.given_shape
        if pair and prior.conditional:
            declare_given(prior, self.given_shape or torch.Size(), "prior", "this Implicit's given_shape")
        labels = [getattr(part, "num_classes", None) for part in ((generator,) if pair else ()) + (prior,)]
        self.num_classes = next((number for number in labels if number is not None), None)
        sites = prior.latents(latent_name)
        if sites is not None:
            require_distinct((self.variable, latent_name, *sites), "this Implicit")

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        if value is not None:
            self._refuse_density()
        z = self.prior.joint(self.latent_name, given=given if self.prior.conditional else None)
        generated = self.generate(z, given)
        stated = pyro.deterministic(name, generated, event_dim=len(self.event_shape))
        if stated is not generated:  # poutine.condition put data in its place, whose density was not scored
            self._refuse_density()
        return stated

    def generate(self, z: Tensor, given: Any = None) -> Tensor:
        """x = G(z), ``(*batch, *event_shape)``, for z ``(*batch, *prior.event_shape)``.

        Raises:
            ValueError: the generator's output does not fit the event shape.
        """
        check_dense(z, "z")
        pair = is_pair(self.reads)
        shape = self.reads if self.reads is not None else self.prior.event_shape
        batch, x = call_network(self.generator, (z, given) if pair else z, shape)
        if x.shape[:1] != (math.prod(batch),) or x[0].numel() != self.event_shape.numel():
            raise ValueError(
                f"the generator returned shape {tuple(x.shape)} for a batch of {math.prod(batch)}, but event_shape "
                f"{tuple(self.event_shape)} needs {(math.prod(batch), *self.event_shape)}"
            )
        x = x.reshape(*batch, *self.event_shape)
        return x if self.levels is None else _round_straight_through((self.levels - 1) * x.sigmoid())

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        self._refuse_density()

    def latents(self, name: str) -> tuple[str, ...] | None:
        above = self.prior.latents(self.latent_name)
        return None if above is None else (self.latent_name, *above)

    def log_prob(self, x: Tensor, given: Any = None) -> Tensor:
        """Raises an `IntractableError`: there is no density."""
        self._refuse_density()

    def log_weights(self, x: Tensor, given: Any = None, num_particles: int = 1) -> Tensor:
        """Raises an `IntractableError`: there is no density, and so no bound on it."""
        self._refuse_density()

    def _refuse_density(self) -> NoReturn:
        raise IntractableError(
            "an Implicit has no density: x = generator(z) is a function of z, and the generator need not be "
            "invertible, so neither log p(x) nor a bound on it exists. Draw with program.sample(n) or Predictive; "
            "train with dgm.fit(program, data, 'gan') (or 'wgan-gp', 'f-gan:kl', 'energy', 'mmd'); judge samples "
            "with dgm.quality; or add noise, dgm.implicit.noisy(program, scale), and evaluate that program"
        )


def _round_straight_through(x: Tensor) -> Tensor:
    """The nearest integer, with the gradient of ``x``."""
    return x.round().detach() + (x - x.detach())


# -- evidence: the model of x plus noise -------------------------------------------------------------------------------


@register
class Around(Conditional):
    """p(x | z): a Normal with a single scale about the generator's output.

    Args:
        event_shape: shape of one x.
        generator: as for `Implicit`.
        scale: initial standard deviation; it is a parameter.
        levels: number of levels of the generator's output, which is scaled to [-1, 1] here, without rounding.
    """

    conditional = True

    def __init__(
        self, event_shape: int | Sequence[int], generator: nn.Module, scale: float = 0.1, levels: int | None = None
    ):
        super().__init__()
        check_type(generator, nn.Module, "generator", "a torch.nn.Module")
        check_number(scale, "scale", above=0)
        check_network_options(levels=levels)
        self.generator, self.event_shape, self.of_levels = generator, as_shape(event_shape), levels
        self.given_shape = shape_read_by(generator)
        self.num_classes = getattr(generator, "num_classes", None)
        self.raw_scale = nn.Parameter(torch.tensor(inverse_softplus(scale)))

    def forward(self, given: Any = None) -> pyro.distributions.TorchDistribution:
        batch, x = call_network(self.generator, given, self.given_shape)
        x = x.reshape(*batch, *self.event_shape)
        x = x if self.of_levels is None else 2 * x.sigmoid() - 1
        return pyro.distributions.Normal(x, positive(self.raw_scale)).to_event(len(self.event_shape))


def noisy(program: Implicit, scale: float) -> VAE:
    """p(z) N(x; G(z), scale^2): a model with a density, made of an implicit model and Normal noise.

    It has no encoder: evaluate it with ``dgm.infer.ais``. The evidence is that of *this* model, and depends on
    ``scale`` as much as on the generator: as scale goes to 0, log p(x) goes to minus infinity for every datum that is
    not exactly an output. Compare models at one scale, or each at its best scale on validation data.

    Args:
        program: the implicit model, whose parts are shared, not copied. If it has ``levels``, x is scaled to [-1, 1].
        scale: standard deviation of the noise, in units of x.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: Wu et al. 2017 (arXiv 1611.04273), section 3.
    """
    check_type(program, Implicit, "program", "a dgm.Implicit")
    return VAE(
        program.prior, Around(program.event_shape, program.generator, scale, program.levels), None, program.latent_name
    )


@torch.no_grad()
def parzen(samples: Tensor, x: Tensor, scale: float) -> Tensor:
    """Log density at x of a Parzen window: Normals of standard deviation ``scale`` at ``samples``; nats, ``(B,)``.

    In expectation this is a lower bound of the evidence of `noisy`. In many dimensions it is far below, because it
    needs a sample near every datum. It can rank a model that memorizes its data above a perfect one (Theis et al. 2016,
    arXiv 1511.01844, section 3.2), so report it next to other measures, never alone.

    Args:
        samples: ``(N, *event_shape)``.
        x: ``(B, *event_shape)``.
        scale: standard deviation, chosen on validation data.

    Raises:
        ValueError: the shapes do not fit, or the scale is not positive.
    """
    check_finite(samples, "samples")
    check_tensor(x, samples.shape[1:], "x", "the shape of a sample")
    check_finite(x, "x")
    check_number(scale, "scale", above=0)
    flat, dims = samples.flatten(1).double(), samples[0].numel()
    rows = [torch.cdist(part, flat).square() for part in x.flatten(1).double().split(256)]
    kernel = torch.cat([(-square / (2 * scale**2)).logsumexp(1) for square in rows])
    return kernel - math.log(len(flat)) - dims * (math.log(scale) + 0.5 * math.log(2 * math.pi))


# -- judging samples ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def mode_coverage(x: Tensor, centers: Tensor, scale: float) -> tuple[int, float]:
    """Number of modes of a mixture of isotropic Normals that samples cover, and the share of samples near a mode.

    A sample is near a mode if it is within 3 standard deviations of the center, as is 98.9 % of the mass of a Normal in
    two dimensions. A mode is covered if at least a fifth of its expected samples are near it.

    Args:
        x: samples, ``(N, D)``.
        centers: centers of the modes, which are equally likely, ``(K, D)``.
        scale: standard deviation of each mode.

    Returns:
        The number of covered modes, and the share of samples near any mode.

    Source: Srivastava et al. 2017 (arXiv 1705.07761), section 4.1, where one sample covers a mode.
    """
    check_finite(centers, "centers")
    check_tensor(x, centers.shape[1:], "x", "the shape of a center")
    check_finite(x, "x")
    check_number(scale, "scale", above=0)
    distance, nearest = torch.cdist(x, centers.to(x)).min(1)
    near = distance < 3 * scale
    counts = torch.bincount(nearest[near], minlength=len(centers))
    return int((counts >= len(x) / len(centers) / 5).sum()), near.double().mean().item()
