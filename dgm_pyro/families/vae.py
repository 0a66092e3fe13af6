r"""Variational autoencoders: p(x) as an integral over a latent z.

.. math::
    p(x) = \int p(x \mid z)\, p(z)\, dz, \qquad
    \log p(x) \ge E_{q(z \mid x)}[\log p(x \mid z)] - KL(q(z \mid x) \,\|\, p(z))

The three parts are programs, so named variants of the literature are compositions: a flow, autoregressive or
diffusion prior; a hierarchy (the prior is a VAE); PixelVAE (the likelihood is autoregressive); flow posteriors.

A hierarchy p(z2) p(z | z2) p(x | z) has two kinds of guide. *Bottom-up*, q(z | x) q(z2 | z): the encoder states z, and
the prior, a VAE itself, states z2 by its own encoder. *Top-down*, q(z2 | x) q(z | z2, x): the encoder states both, as
`guides.TopDown` does, and the prior needs no encoder.

Source: Kingma and Welling 2014 (arXiv 1312.6114); Rezende, Mohamed and Wierstra 2014 (arXiv 1401.4082).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical

from dgm_pyro.checks import check_name
from dgm_pyro.families.distributions import features_of, finite_mean, mean_of
from dgm_pyro.families.flow import Flow, refuse_beta
from dgm_pyro.program import (
    Conditional,
    NoGuideError,
    Program,
    check_program,
    declare_given,
    guide_trace,
    is_pair,
    latent_sites,
    parameter_of,
    require_distinct,
)
from dgm_pyro.registry import register

__all__ = ["VAE"]


@register
class VAE(Program):
    """p(z) p(x | z), and q(z | x).

    Any part may also be conditional on the VAE's own ``given``, such as a class label y: the prior if it is
    conditional, the likelihood and the encoder if their ``given_shape`` is a pair, ``(z, y)`` and ``(x, y)``.

    Args:
        prior: p(z), any program.
        likelihood: p(x | z), any program conditional on z.
        encoder: q(z | x), any program conditional on x. Its latents are none, or exactly those of the prior, which it
            then states instead of the prior's own guide (`guides.TopDown`). None for a prior whose latents such an
            encoder states.
        latent_name: the name of z; two levels of a hierarchy need two names.

    Raises:
        ValueError: the shapes of the parts do not fit, two latents have one name, or the encoder and the prior do not
            state the same latents.

    >>> import torch, dgm_pyro as dgm
    >>> vae = dgm.VAE(
    ...     prior=dgm.Normal(2),
    ...     likelihood=dgm.Normal(5, torch.nn.Linear(2, 10)),
    ...     encoder=dgm.Normal(2, torch.nn.Linear(5, 4)),
    ... )
    >>> vae.log_weights(torch.zeros(3, 5), num_particles=7).shape
    torch.Size([7, 3])
    """

    # Or None; a checker that knew it would refuse `vae.encoder(x)` of every VAE.
    encoder: Program | Any

    def __init__(self, prior: Program, likelihood: Program, encoder: Program | None = None, latent_name: str = "z"):
        super().__init__()
        for role, part in (("prior", prior), ("likelihood", likelihood), ("encoder", encoder)):
            if role != "encoder" or part is not None:
                check_program(part, role)
        check_name(latent_name, "latent_name")
        if encoder is not None and encoder.event_shape != prior.event_shape:
            raise ValueError(
                f"the encoder's event_shape is {tuple(encoder.event_shape)}, but the prior's is "
                f"{tuple(prior.event_shape)}: both must be that of z"
            )
        if isinstance(prior, Flow) and prior.on_unit_cube:
            refuse_beta(encoder, "encoder")
        self.top_down = encoder is not None and encoder.latents(latent_name) != ()
        if encoder is not None and self.top_down:
            stated, needed = encoder.latents(latent_name), prior.latents(latent_name)
            if stated is None or needed is None or sorted(stated) != sorted(needed):
                raise ValueError(
                    f"the encoder has latents of its own, {stated}, but the prior has {needed}: use an encoder without "
                    "latents, or one with exactly those of the prior, such as guides.TopDown"
                )
        elif encoder is not None and isinstance(prior, VAE) and not prior.guided:
            raise ValueError(
                f"the prior's latents {prior.latents(latent_name)} have no guide: give the prior an encoder, or make "
                "this VAE's encoder a guides.TopDown"
            )
        self.prior, self.likelihood, self.encoder, self.latent_name = prior, likelihood, encoder, latent_name
        self.event_shape, self.levels = likelihood.event_shape, likelihood.levels
        readers = [part for part in (likelihood, encoder) if part is not None and is_pair(part.given_shape)]
        found = [*(_second_given_shape(part) for part in readers), prior.given_shape]
        given_shape = next((shape for shape in found if shape is not None), None)
        self.conditional = prior.conditional or bool(readers)
        self.given_shape = given_shape if self.conditional else None
        if self.given_shape is not None and prior.conditional:
            declare_given(prior, self.given_shape, "prior", "this VAE's given_shape")
        self.num_classes = self._common_num_classes()
        self._declare(likelihood, prior.event_shape, "likelihood", "the prior's event_shape")
        if encoder is not None:
            self._declare(encoder, self.event_shape, "encoder", "the likelihood's event_shape")
        sites = self.latents(self.variable)
        if sites is not None:
            require_distinct((self.variable, *sites), "this VAE")

    def _declare(self, part: Program, shape: Any, role: str, source: str) -> None:
        if is_pair(part.given_shape):
            shape = (shape, self.given_shape)
        declare_given(part, shape, role, source)

    def _common_num_classes(self) -> int | None:
        """Number of labels that the VAE's ``given`` may take, from the parts that read it."""
        if not self.conditional or self.given_shape not in (None, ()):
            return None
        parts = {
            role: part.num_classes
            for role, part in (("prior", self.prior), ("likelihood", self.likelihood), ("encoder", self.encoder))
            if part is not None and part.num_classes is not None and (role == "prior" or is_pair(part.given_shape))
        }
        if len(set(parts.values())) > 1:
            raise ValueError(
                f"num_classes differs between the parts of this VAE, {parts}, but all read the same label: build them "
                "for one number"
            )
        return next(iter(parts.values()), None)

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        z = self.prior.joint(self.latent_name, given=given if self.prior.conditional else None)
        return self.likelihood.joint(name, value, given=_joined_with_given(z, given, self.likelihood))

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        if self.encoder is None:
            raise NoGuideError("this VAE has no encoder, so it has no guide: build it with an encoder")
        z = self.encoder.joint(self.latent_name, given=_joined_with_given(value, given, self.encoder))
        if not self.top_down:
            self.prior.posterior(self.latent_name, z, given if self.prior.conditional else None)
        self.likelihood.posterior(name, value, given=_joined_with_given(z, given, self.likelihood))

    @property
    def guided(self) -> bool:
        """Whether every level has an encoder, so that `posterior` states all latents."""
        return self.encoder is not None and (self.top_down or not isinstance(self.prior, VAE) or self.prior.guided)

    def latents(self, name: str) -> tuple[str, ...] | None:
        above, below = self.prior.latents(self.latent_name), self.likelihood.latents(name)
        return None if above is None or below is None else (self.latent_name, *above, *below)

    @property
    def takes_missing(self) -> bool:
        return self.likelihood.takes_missing

    def placeholder(self) -> Tensor:
        return self.likelihood.placeholder()

    def codes(self) -> dict[str, Program]:
        return {self.latent_name: self.prior} | (self.prior.codes() if isinstance(self.prior, VAE) else {})

    def _encode(self, x: Tensor, given: Any, site: str, draw: bool, num_samples: int) -> Tensor:
        """E_q[z | x], averaged over ``num_samples`` draws of the latents that q states before z; or a draw."""
        levels, means = self.codes()[site].levels, list[Tensor]()
        while len(means) < num_samples:
            trace: Any = guide_trace(self, x, given)
            if site not in trace.nodes:
                raise ValueError(
                    f"the guide of this {type(self).__name__} does not state {site!r}: encode needs q(z | x)"
                )
            value, mean = trace.nodes[site]["value"], _closed_form_mean(trace.nodes[site]["fn"])
            if draw:
                return value
            if mean is not None and latent_sites(trace)[0] == site:
                return mean
            if mean is None:
                mean = value if levels in (None, 2) else F.one_hot(value.long(), levels).to(parameter_of(self).dtype)
            means.append(mean)
        return torch.stack(means).mean(0)

    def _decode(self, z: Tensor, given: Any, site: str, draw: bool) -> Tensor:
        """E_p[x | z], or a draw of x. The levels between are drawn with x, and also where they are discrete."""
        if site != self.latent_name:
            above = given if self.prior.conditional else None
            z = self.prior.decode(z, above, site=site, draw=draw or self.prior.levels is not None)
        seen = _joined_with_given(z, given, self.likelihood)
        if isinstance(self.likelihood, Conditional) and not draw:
            with contextlib.suppress(NotImplementedError, ValueError):  # no mean, or features depend on one another
                return mean_of(self.likelihood(seen), self.likelihood.levels, z.device)
        return self.likelihood.sample(len(z), seen)

    def unroll(self) -> VAE:
        """The same program with the chains in its parts unrolled; z itself stays one site, as in the encoder."""
        return self._with_chains("unroll")

    def unroll_latents(self) -> VAE:
        return self._with_chains("unroll_latents")

    def _with_chains(self, form: str) -> VAE:
        parts = self.__dict__["_modules"]  # not by attribute, as in `replaced`
        chains = {"prior": parts["prior"].unroll_latents(), "likelihood": getattr(parts["likelihood"], form)()}
        return self if all(chains[role] is parts[role] for role in chains) else self.replaced(**chains)


def _closed_form_mean(distribution: Any) -> Tensor | None:
    """The mean in closed form, for classes the mean of the one-hot code; None if there is none."""
    with contextlib.suppress(ValueError):
        feature = features_of(distribution)
        if isinstance(feature, Categorical):
            return feature.probs
    return finite_mean(distribution)


def _second_given_shape(part: Program) -> Any:
    return part.given_shape[1] if part.given_shape is not None else None


def _joined_with_given(value: Tensor, given: Any, part: Program) -> Any:
    return (value, given) if is_pair(part.given_shape) else value
