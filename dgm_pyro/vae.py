r"""Variational autoencoders: p(x) as an integral over a latent z.

.. math::
    p(x) = \int p(x \mid z)\, p(z)\, dz, \qquad
    \log p(x) \ge E_{q(z \mid x)}[\log p(x \mid z)] - KL(q(z \mid x) \,\|\, p(z))

The three parts are programs, so that the named variants of the literature are compositions: a flow, autoregressive or
diffusion prior, a hierarchy (the prior is a VAE), PixelVAE (the likelihood is autoregressive), flow posteriors.

Source: Kingma and Welling 2014 (arXiv 1312.6114); Rezende, Mohamed and Wierstra 2014 (arXiv 1401.4082).
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from dgm_pyro.program import Program, declare_given, is_pair, require_distinct
from dgm_pyro.registry import register


@register
class VAE(Program):
    """p(z) p(x | z), and q(z | x).

    Any part may also be conditional on the VAE's own ``given`` (a class label y, say): the prior if it is conditional,
    the likelihood and the encoder if their ``given_shape`` is a pair, ``(z, y)`` and ``(x, y)``.

    Args:
        prior: p(z), any program.
        likelihood: p(x | z), any program conditional on z.
        encoder: q(z | x), any program without latents conditional on x.
        latent: the name of z; two levels of a hierarchy need two names.

    Raises:
        ValueError: the shapes of the parts do not fit, or two latents have one name.

    >>> import torch, dgm_pyro as dgm
    >>> vae = dgm.VAE(
    ...     prior=dgm.Normal(2),
    ...     likelihood=dgm.Normal(5, torch.nn.Linear(2, 10)),
    ...     encoder=dgm.Normal(2, torch.nn.Linear(5, 4)),
    ... )
    >>> vae.log_weights(torch.zeros(3, 5), num_particles=7).shape
    torch.Size([7, 3])
    """

    def __init__(self, prior: Program, likelihood: Program, encoder: Program, latent: str = "z"):
        super().__init__()
        for role, part in (("prior", prior), ("likelihood", likelihood), ("encoder", encoder)):
            if not isinstance(part, Program):
                raise TypeError(f"the {role} must be a dgm_pyro.Program, got {type(part).__name__}")
        if not isinstance(latent, str) or not latent:
            raise ValueError(f"latent must be the name of a site, a non-empty string, got {latent!r}")
        if encoder.latents(latent):
            raise ValueError(
                f"the encoder has latents of its own, {encoder.latents(latent)}: q(z | x) must be a program without any"
            )
        if encoder.event_shape != prior.event_shape:
            raise ValueError(
                f"the encoder's event_shape is {tuple(encoder.event_shape)}, but the prior's is "
                f"{tuple(prior.event_shape)}: both must be that of z"
            )
        self.prior, self.likelihood, self.encoder, self.latent = prior, likelihood, encoder, latent
        self.event_shape, self.levels = likelihood.event_shape, likelihood.levels
        context = next((s for s in (_context(likelihood), _context(encoder), prior.given_shape) if s is not None), None)
        self.conditional = prior.conditional or is_pair(likelihood.given_shape) or is_pair(encoder.given_shape)
        self.given_shape = context if self.conditional else None
        if self.given_shape is not None and prior.conditional:
            declare_given(prior, self.given_shape, "prior", "this VAE's given_shape")
        self.num_classes = self._common_num_classes()
        self._declare(likelihood, prior.event_shape, "likelihood", "the prior's event_shape")
        self._declare(encoder, self.event_shape, "encoder", "the likelihood's event_shape")
        sites = self.latents(self.variable)
        if sites is not None:
            require_distinct((self.variable, *sites), "this VAE")

    def _declare(self, part: Program, shape: Any, role: str, source: str) -> None:
        if is_pair(part.given_shape):
            shape = (shape, self.given_shape)
        declare_given(part, shape, role, source)

    def _common_num_classes(self) -> int | None:
        """How many labels the VAE's own given may take, by those of its parts that read it."""
        if not self.conditional or self.given_shape not in (None, ()):
            return None
        parts = {
            role: part.num_classes
            for role, part in (("prior", self.prior), ("likelihood", self.likelihood), ("encoder", self.encoder))
            if part.num_classes is not None and (role == "prior" or is_pair(part.given_shape))
        }
        if len(set(parts.values())) > 1:
            raise ValueError(f"num_classes differs between the parts of this VAE, {parts}: all read the same label")
        return next(iter(parts.values()), None)

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        z = self.prior.joint(self.latent, given=given if self.prior.conditional else None)
        return self.likelihood.joint(name, value, given=_with(z, given, self.likelihood))

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        z = self.encoder.joint(self.latent, given=_with(value, given, self.encoder))
        self.prior.posterior(self.latent, z, given if self.prior.conditional else None)
        self.likelihood.posterior(name, value, given=_with(z, given, self.likelihood))

    def latents(self, name: str) -> tuple[str, ...] | None:
        above, below = self.prior.latents(self.latent), self.likelihood.latents(name)
        return None if above is None or below is None else (self.latent, *above, *below)

    def unroll(self) -> VAE:
        """Unrolls the chains among the latents and in the likelihood; z itself stays one site, as in the encoder."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        if self.prior.latents(self.latent) != ():
            twin.prior = self.prior.unroll()
        twin.likelihood = self.likelihood.unroll()
        return twin


def _context(part: Program) -> Any:
    return part.given_shape[1] if part.given_shape is not None and is_pair(part.given_shape) else None


def _with(value: Tensor, given: Any, part: Program) -> Any:
    return (value, given) if is_pair(part.given_shape) else value
