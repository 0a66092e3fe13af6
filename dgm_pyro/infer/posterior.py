r"""The posterior of any program as a density: log p(latents) and log p(x | latents) at given latents.

.. math::
    \log p(z \mid x) = \log p(z) + \log p(x \mid z) - \log p(x)

Annealed importance sampling, HMC and NUTS work in unconstrained space: a site with a support such as the positive reals
or the unit cube is the image of a real u, and the density of u has the factor :math:`|dz / du|`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from dgm_pyro.families.autoregressive import AutoregressiveDistribution
from dgm_pyro.families.distributions import features_of
from dgm_pyro.posterior import Posterior
from dgm_pyro.program import (
    Program,
    batch_plates,
    check_program,
    isolated,
    latent_sites,
    log_prob_sum,
    sample_sites,
)

__all__ = ["Coordinates", "log_joint"]


def check_target(program: Any, x: Any, argument: str = "x") -> None:
    """Raise unless ``program`` is a `Program`, or a `Posterior`, which has its own data."""
    if isinstance(program, Posterior):
        if x is not None:
            raise TypeError(f"{argument} was passed, but a Posterior has its own data: leave it out")
        return
    check_program(program)
    if x is None:
        raise TypeError(f"this {type(program).__name__} needs data: pass {argument}, (B, *event_shape)")


def with_latent_chains(program: Program) -> Program:
    """``program`` with its latent chains written out one site per step; a chain without latents stays one site."""
    unrolled = program.unroll()
    same = program.latents(program.variable) is not None and (
        program.latents(program.variable) == unrolled.latents(program.variable)
    )
    return program if same else unrolled


def log_joint(
    program: Program,
    x: Tensor | None,
    latents: Mapping[str, Tensor],
    given: Any = None,
    *,
    batch: Sequence[int],
    observed: Mapping[str, Tensor] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(latents | given) and log p(x | latents, given) in nats, each of shape ``batch``.

    Args:
        program: a program whose chains are already in the form to be stated; see `with_latent_chains`.
        x: ``(B, *event_shape)``.
        latents: the value of every latent site, ``(*batch, *site_shape)``.
        batch: batch shape, such as ``(K, B)``.
        observed: further observed sites, such as labels, which belong to the second term.
        mask: True where x is observed, ``(B, *event_shape)``; the second term then has these features alone.

    Raises:
        ValueError: there is a mask, but p(x | latents) of the masked features alone has no closed form.
    """
    trace = joint_trace(program, x, latents, given, batch=batch, observed=observed)
    likelihood = [name for name in sample_sites(trace) if name not in latents]
    if mask is None:
        log_likelihood = log_prob_sum(trace, batch, likelihood)
    else:
        if program.variable not in likelihood:
            raise ValueError(
                f"this {type(program).__name__} states x at several sites, which cannot be masked: observe all of x"
            )
        site: Any = trace.nodes[program.variable]
        likelihood.remove(program.variable)
        seen = _sum_event(feature_log_prob(site["fn"], site["value"], mask).expand(*batch, *mask.shape[1:]), batch)
        log_likelihood = log_prob_sum(trace, batch, likelihood, like=seen) + seen
    return log_prob_sum(trace, batch, latents, like=log_likelihood), log_likelihood


def feature_log_prob(distribution: Any, x: Tensor, mask: Tensor) -> Tensor:
    """log p of each observed feature given the observed ones before it, 0 elsewhere, ``(*batch, *event_shape)``.

    Raises:
        ValueError: a missing feature comes before an observed one in the order of a chain.
    """
    if isinstance(distribution, AutoregressiveDistribution):
        p, order = distribution.program, torch.tensor(distribution.program.order, device=mask.device)
        seen = mask.flatten(1)[:, order]
        if not bool((seen[:, 1:] <= seen[:, :-1]).all()):
            raise ValueError(
                "the likelihood is autoregressive, and in its order a missing feature comes before an observed one, so "
                "the missing one would have to be summed out given the latents: observe a prefix of the order"
            )
        terms = p.factors.univariate(p.raw_parameters(x, distribution.given)).log_prob(x)
    else:
        terms = features_of(distribution).log_prob(x)
    return torch.where(mask, terms, torch.zeros_like(terms))


def joint_trace(
    program: Program,
    x: Tensor | None,
    latents: Mapping[str, Tensor] | None = None,
    given: Any = None,
    *,
    batch: Sequence[int],
    observed: Mapping[str, Tensor] | None = None,
) -> poutine.Trace:
    """The trace of the model at ``latents``; other sites, x included, are drawn. Its ``_RETURN`` holds x."""
    data = {**(latents or {}), **(observed or {})}
    with isolated(), poutine.trace() as traced, poutine.condition(data=data), batch_plates(batch):
        value = program.joint(program.variable, x, given)
    traced.trace.add_node("_RETURN", name="_RETURN", type="return", value=value)
    return traced.trace


def guide_trace_at(
    program: Program,
    x: Tensor,
    latents: Mapping[str, Tensor] | None = None,
    given: Any = None,
    *,
    batch: Sequence[int],
    observed: Mapping[str, Tensor] | None = None,
) -> poutine.Trace:
    """The trace of the guide at ``latents``; latents that are left out are drawn from it."""
    data = {**(latents or {}), **(observed or {})}
    with isolated(), poutine.trace() as traced, poutine.condition(data=data), batch_plates(batch):
        program.posterior(program.variable, x, given)
    for name in observed or {}:
        if name in traced.trace.nodes:
            traced.trace.remove_node(name)
    return traced.trace


class Coordinates:
    """One real vector u for all latents of a trace, ``(*batch, D)``.

    Args:
        trace: trace of a model or a guide with unobserved latents, for their supports and shapes.
        batch: batch shape.

    Raises:
        ValueError: a latent is discrete, or there are no latents.
    """

    def __init__(self, trace: poutine.Trace, batch: Sequence[int]):
        self.batch = tuple(batch)
        self.names = latent_sites(trace)
        if not self.names:
            raise ValueError("the program has no latents to infer: its density is exact, use program.log_prob(x)")
        nodes: Any = trace.nodes
        discrete = [name for name in self.names if nodes[name]["fn"].support.is_discrete]
        if discrete:
            raise ValueError(
                f"the latents {', '.join(map(repr, discrete))} are discrete, but this method needs gradients: "
                "observe them (observed={...}), sum them out, or use dgm.evaluate(program, data, num_particles=K)"
            )
        self.transforms = {name: biject_to(nodes[name]["fn"].support) for name in self.names}
        self.shapes = {
            name: self.transforms[name].inv(nodes[name]["value"]).shape[len(self.batch) :] for name in self.names
        }

    def flatten(self, latents: Mapping[str, Tensor]) -> Tensor:
        """u of ``latents``, ``(*batch, D)``."""
        parts = [
            self.transforms[name].inv(latents[name]).expand(*self.batch, *self.shapes[name]).reshape(*self.batch, -1)
            for name in self.names
        ]
        return torch.cat(parts, -1)

    def unflatten(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The latents at u, and log |d latents / du|, ``batch``."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        latents, log_det = {}, u.new_zeros(self.batch)
        for name, part in zip(self.names, u.split(sizes, -1), strict=True):
            real = part.reshape(*self.batch, *self.shapes[name])
            latents[name] = self.transforms[name](real)
            log_det = log_det + _sum_event(self.transforms[name].log_abs_det_jacobian(real, latents[name]), self.batch)
        return latents, log_det


def _sum_event(value: Tensor, batch: Sequence[int]) -> Tensor:
    return value.reshape(*batch, -1).sum(-1)
