r"""What `dgm.fit` maximises: small callables ``objective(program, x, given=None, observed=None) -> Bound``.

They are computed from the traces of the program's statements. For latents z and data x,

.. math::
    \log p(x) \ge E_{q(z \mid x)}[\log p(x, z) - \log q(z \mid x)]
    = E_q[\log p(x \mid z)] - KL(q(z \mid x) \,\|\, p(z)).

A KL is taken in closed form wherever there is one and the order of the statements allows it, and by sampling
otherwise. Latents that cannot be reparameterised get the score-function gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from dgm_pyro.program import Program, check_count, latent_sites, site_sum, traces


@dataclass
class Bound:
    """A lower bound on log p(x), per datum, in nats.

    Attributes:
        value: the bound's estimate, of shape ``batch``.
        surrogate: equal to ``value``, but its gradient estimates that of the expected ``value``.
        reconstruction: log-likelihood of the data, per site.
        kl: divergence of the guide from the prior and other costs, per site; value = sum(reconstruction) - sum(kl)
            for an ELBO.
        score: log q of the latents that cannot be reparameterised, if any.
    """

    value: Tensor
    surrogate: Tensor
    reconstruction: dict[str, Tensor] = field(default_factory=dict)
    kl: dict[str, Tensor] = field(default_factory=dict)
    score: Tensor | None = None


class Objective(Protocol):
    """What `dgm.fit` maximises; write your own as any callable of this form."""

    def __call__(
        self, program: Program, x: Tensor, given: Any = None, observed: dict[str, Tensor] | None = None
    ) -> Bound: ...


class ELBO:
    """The evidence lower bound; the exact log p(x) for a tractable program.

    Args:
        num_particles: draws from the guide per datum, averaged.
        analytic_kl: whether to use closed forms of KL(q || p).

    Source: Jordan et al. 1999; Ranganath et al. 2014 (score function); Kingma and Welling 2014 (pathwise).
    """

    def __init__(self, num_particles: int = 1, *, analytic_kl: bool = True):
        self.num_particles = check_count(num_particles, "num_particles")
        self.analytic_kl = analytic_kl

    def __repr__(self) -> str:
        return f"ELBO(num_particles={self.num_particles}, analytic_kl={self.analytic_kl})"

    def __call__(
        self, program: Program, x: Tensor, given: Any = None, observed: dict[str, Tensor] | None = None
    ) -> Bound:
        if program.tractable and not observed:
            exact = program.exact_log_prob(x, given)
            return Bound(exact, exact, {program.variable: exact})
        if self.num_particles == 1:
            return elbo(program, x, given, observed=observed, analytic_kl=self.analytic_kl)
        batch = (self.num_particles, x.shape[0])
        return _mean(elbo(program, x, given, observed=observed, batch=batch, analytic_kl=self.analytic_kl))


class IWAE:
    """The importance-weighted bound, log (1/K) sum_k p(x, z_k) / q(z_k | x) (Burda et al. 2016, eq. 8).

    Chains are unrolled.

    Args:
        num_particles: K; at 1 it is the ELBO with sampled KL.
    """

    def __init__(self, num_particles: int = 8):
        self.num_particles = check_count(num_particles, "num_particles")

    def __repr__(self) -> str:
        return f"IWAE(num_particles={self.num_particles})"

    def __call__(
        self, program: Program, x: Tensor, given: Any = None, observed: dict[str, Tensor] | None = None
    ) -> Bound:
        batch = (self.num_particles, x.shape[0])
        weights = elbo(program.unroll(), x, given, observed=observed, batch=batch, analytic_kl=False)
        value = weights.value.logsumexp(0) - math.log(self.num_particles)
        surrogate = value if weights.score is None else value + _nothing(weights.score.sum(0)) * value.detach()
        terms = _mean(weights)
        return Bound(value, surrogate, terms.reconstruction, terms.kl)


class SemiSupervised:
    """For a `Labelled` program with a classifier, on data whose label is -1 where it is unknown.

    A labelled datum contributes the bound on log p(x, y) and ``weight`` times log q(y | x); an unlabelled one the
    bound with y enumerated, sum_y q(y | x) [bound(x, y) - log q(y | x)].

    Args:
        weight: of the classification term (alpha in the source).
        analytic_kl: whether to use closed forms of KL(q || p).

    Source: Kingma et al. 2014 (arXiv 1406.5298), equations 6 to 9.
    """

    def __init__(self, weight: float = 1.0, *, analytic_kl: bool = True):
        self.weight, self.analytic_kl = weight, analytic_kl

    def __repr__(self) -> str:
        return f"SemiSupervised(weight={self.weight})"

    def __call__(
        self, program: Program, x: Tensor, given: Any = None, observed: dict[str, Tensor] | None = None
    ) -> Bound:
        classifier, label = getattr(program, "classifier", None), getattr(program, "label", "y")
        if classifier is None:
            raise ValueError(
                f"SemiSupervised needs a Labelled program with a classifier q(y | x), got {type(program).__name__}"
            )
        y = (observed or {}).get(label, torch.full((x.shape[0],), -1, device=x.device))
        log_q = classifier(x).logits.log_softmax(-1)
        known, unknown = (y >= 0).nonzero().squeeze(-1), (y < 0).nonzero().squeeze(-1)
        value, surrogate = torch.zeros_like(log_q[:, 0]), torch.zeros_like(log_q[:, 0])
        if len(known) > 0:
            bound = elbo(program, x[known], observed={label: y[known]}, analytic_kl=self.analytic_kl)
            hint = self.weight * log_q[known].gather(-1, y[known].unsqueeze(-1)).squeeze(-1)
            value = value.index_add(0, known, bound.value + hint)
            surrogate = surrogate.index_add(0, known, bound.surrogate + hint)
        if len(unknown) > 0:
            bound = self.enumerated(program, x[unknown], log_q[unknown])
            value = value.index_add(0, unknown, bound.value)
            surrogate = surrogate.index_add(0, unknown, bound.surrogate)
        return Bound(value, surrogate, {program.variable: value})

    def enumerated(self, program: Program, x: Tensor, log_q: Tensor) -> Bound:
        """The bound with every label tried, weighted by q(y | x)."""
        batch = (log_q.shape[-1], x.shape[0])
        every = torch.arange(batch[0], device=x.device).unsqueeze(-1).expand(batch)
        inner = elbo(
            program,
            x.expand(batch[0], *x.shape),
            observed={getattr(program, "label", "y"): every},
            batch=batch,
            analytic_kl=self.analytic_kl,
        )
        q = log_q.T.exp()
        return Bound((q * (inner.value - log_q.T)).sum(0), (q * (inner.surrogate - log_q.T)).sum(0))


OBJECTIVES = {"elbo": ELBO, "iwae": IWAE, "semi-supervised": SemiSupervised}


def elbo(
    program: Program,
    x: Tensor,
    given: Any = None,
    *,
    observed: dict[str, Tensor] | None = None,
    batch: Sequence[int] | None = None,
    analytic_kl: bool = True,
) -> Bound:
    """One draw of the ELBO for each element of ``batch``, with its terms per site.

    Args:
        x: ``(B, *event_shape)``, or with the further dimensions of ``batch``.
        batch: shape of the result, such as ``(K, B)``; default ``(B,)``.
    """
    batch = (x.shape[0],) if batch is None else batch
    model, guide = traces(program, x, given, batch=batch, observed=observed)
    before_p, before_q = latent_sites(model), latent_sites(guide)
    reconstruction: dict[str, Tensor] = {}
    kl: dict[str, Tensor] = {}
    score: Tensor | None = None
    for name, site in model.nodes.items():
        if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
            continue
        if name not in before_q:
            log_p = site_sum(_log_prob(site), batch)
            if is_cost(name):
                kl[name] = -log_p
            else:
                reconstruction[name] = log_p
            continue
        # The closed form holds the model's earlier latents fixed, so the guide must have drawn them earlier too.
        ordered = set(before_p[: before_p.index(name)]) <= set(before_q[: before_q.index(name)])
        q: Any = guide.nodes[name]
        divergence = _closed_form(q, site) if analytic_kl and ordered else None
        if divergence is None:
            divergence = _log_prob(q) - _log_prob(site)
        kl[name] = site_sum(divergence, batch)
        if not q["fn"].has_rsample:
            log_q = site_sum(_log_prob(q), batch)
            if log_q.requires_grad:
                score = log_q + (0 if score is None else score)
    value = sum(reconstruction.values(), torch.zeros(())) - sum(kl.values(), torch.zeros(()))
    surrogate = value if score is None else value + _nothing(score) * value.detach()
    return Bound(value, surrogate, reconstruction, kl, score)


def is_cost(site: str) -> bool:
    """Whether an observed site states a divergence, by the naming convention of factors."""
    return site.endswith("_kl")


def _log_prob(site: Any) -> Tensor:
    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])


def _nothing(score: Tensor) -> Tensor:
    """Zero, with the gradient of ``score``: so a surrogate has the bound's value, and may be weighted like it."""
    return score - score.detach()


def _closed_form(q: Any, p: Any) -> Tensor | None:
    try:
        return scale_and_mask(kl_divergence(q["fn"], p["fn"]), q["scale"], q["mask"])
    except NotImplementedError:
        return None


def _mean(bound: Bound) -> Bound:
    return Bound(
        bound.value.mean(0),
        bound.surrogate.mean(0),
        {name: term.mean(0) for name, term in bound.reconstruction.items()},
        {name: term.mean(0) for name, term in bound.kl.items()},
    )
