r"""Objectives of `dgm.fit`: small callables ``objective(program, x, given=None, observed=None) -> Bound``.

They are computed from the traces of the program's statements. For latents z and data x,

.. math::
    \log p(x) \ge E_{q(z \mid x)}[\log p(x, z) - \log q(z \mid x)]
    = E_q[\log p(x \mid z)] - KL(q(z \mid x) \,\|\, p(z)).

A KL is taken in closed form wherever there is one and the order of the statements allows it, and by sampling
otherwise. Latents that cannot be reparameterized get the score-function gradient.

The importance-weighted bounds draw z_1 .. z_K and take, with the weights w_k = p(x, z_k) / q(z_k | x),

.. math::
    \log p(x) \ge E\Big[\log \frac{1}{K} \sum_k w_k\Big], \qquad
    \nabla \log \frac{1}{K} \sum_k w_k = \sum_k \bar w_k \nabla \log w_k, \quad \bar w_k = w_k / \sum_j w_j.

With z = T(noise, phi), the gradient of log w in phi has two parts: the *path* derivative, through z, and the *score*,
-d log q(z | x) / d phi at fixed z. `STL` and `DReG` keep only the path derivative, `RWS` only the score.

A diffusion's bound is an integral over noise levels lambda = log SNR. `DenoisingLoss` has another weight w in it,

.. math::
    -\frac12 \int w(\lambda)\, E_\epsilon \|\epsilon - \hat\epsilon(x_\lambda)\|^2\, d\lambda,

where w = 1 is the bound in continuous time (Kingma and Gao 2023, arXiv 2303.00848). Any other w is no bound on
log p(x).

For a tractable program there is nothing to bound: every `VariationalBound` is then the exact log p(x).
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints, kl_divergence

from dgm_pyro.checks import check_count, check_number, check_type, close_to
from dgm_pyro.factors import is_cost
from dgm_pyro.program import (
    Program,
    Weighting,
    batch_plates,
    guide_trace,
    hidden,
    latent_sites,
    log_mean_exp,
    model_trace,
    require_subset,
    sample_sites,
    site_sum,
    support_of,
    traces,
    unwrapped,
    weighting_errors,
)

__all__ = [
    "ELBO",
    "IWAE",
    "OBJECTIVES",
    "RWS",
    "STL",
    "Bound",
    "DReG",
    "DenoisingLoss",
    "EDMWeight",
    "Enumerate",
    "FreeBits",
    "HasFormula",
    "MinSNRWeight",
    "Objective",
    "SemiSupervised",
    "SimpleWeight",
    "VariationalBound",
    "WarmUp",
    "annealed",
    "beta",
    "edm",
    "elbo",
    "elbo_of_traces",
    "exact",
    "min_snr",
    "objective_named",
    "rloo",
    "simple",
    "vimco",
]


@dataclass
class Bound:
    """The value of an objective per datum: a lower bound on log p(x) in nats, unless the objective is no bound.

    Attributes:
        value: the estimate, of shape ``batch``.
        surrogate: equal to ``value``, with a gradient that estimates the gradient of the expected ``value``.
        reconstruction: log-likelihood of the data, per site, in nats.
        kl: KL of the guide from the prior and other costs, per site, in nats; for an ELBO,
            value = sum(reconstruction) - sum(kl).
        score: log q of the latents that cannot be reparameterized, if any.
    """

    value: Tensor
    surrogate: Tensor
    reconstruction: dict[str, Tensor] = field(default_factory=dict)
    kl: dict[str, Tensor] = field(default_factory=dict)
    score: Tensor | None = None


class Objective(Protocol):
    """What `dgm.fit` maximizes: any callable of this form.

    An objective may also have:

    - ``at(elapsed)``, if it changes during training: the objective to use at ``elapsed``, the share of training that is
      over. `dgm.fit` validates with ``at(1)``.
    - ``prepare(program)``, called once, and ``update(program, x, given, lr)``, called before each step, if it has a
      second player, as `adversarial.Adversarial` does.
    - ``validation``, the objective to validate with, if its own value does not measure quality.
    - ``state_dict()`` and ``load_state_dict(state)``, if it has a state, so that a stored `Training` can continue.
    """

    def __call__(
        self, program: Program, x: Tensor, given: Any = None, observed: dict[str, Tensor] | None = None
    ) -> Bound: ...


def at_progress(objective: Any, elapsed: float) -> Any:
    """The objective to use when ``elapsed``, from 0 to 1, of training is over, if it changes during training."""
    at = getattr(objective, "at", None)
    return objective if at is None else at(elapsed)


@dataclass(frozen=True)
class WarmUp:
    """A schedule that rises linearly from 0 to 1 over the first ``fraction`` of training, and then stays at 1."""

    fraction: float = 0.25

    def __post_init__(self) -> None:
        check_number(self.fraction, "fraction", above=0, at_most=1)

    def __call__(self, elapsed: float) -> float:
        return min(1.0, elapsed / self.fraction)


class HasFormula:
    """An objective with a formula, which a notebook shows."""

    @property
    def formula(self) -> str:
        """The value that is maximized for one datum, in LaTeX; sg(...) is a stop-gradient."""
        raise NotImplementedError

    def _repr_latex_(self) -> str:
        return f"$${self.formula}$$"


class VariationalBound(HasFormula):
    """An objective for programs with latents; for a tractable program it is the exact log p(x).

    Subclasses define `bound`.
    """

    def __call__(
        self, program: Program, x: Tensor, given: Any = None, observed: dict[str, Tensor] | None = None
    ) -> Bound:
        if program.tractable and not observed:
            return exact(program, x, given)
        return self.bound(program, x, given, observed)

    def bound(self, program: Program, x: Tensor, given: Any, observed: dict[str, Tensor] | None) -> Bound:
        """The bound for a program with latents, or with further sites ``observed``."""
        raise NotImplementedError


@dataclass(frozen=True)
class ELBO(VariationalBound):
    """The evidence lower bound; the exact log p(x) for a tractable program.

    Args:
        num_samples: draws from the guide per datum, averaged.
        analytic_kl: whether to use closed forms of KL(q || p).
        beta: weight of every KL: a number, or a schedule ``beta(elapsed)`` of the share of training that is over. With
            another weight than 1 the value is not the ELBO.
        leave_one_out: whether the score function of latents that cannot be reparameterized has the mean value of the
            other draws as its baseline: the same gradient in expectation, with less variance.

    Raises:
        ValueError: an argument does not fit; the message names it.

    Source: Jordan et al. 1999; Ranganath et al. 2014 (score function); Kingma and Welling 2014 (pathwise); Higgins et
    al. 2017 (beta); Bowman et al. 2016 (arXiv 1511.06349, warm-up); Kool et al. 2019 (leave-one-out).
    """

    num_samples: int = 1
    _: KW_ONLY
    analytic_kl: bool = True
    beta: float | Callable[[float], float] = 1.0
    leave_one_out: bool = False

    def __post_init__(self) -> None:
        _check_draws(self.num_samples, "num_samples", self.leave_one_out)
        if not callable(self.beta) and not isinstance(self.beta, Tensor):  # a tensor is how a compiled loss varies it
            check_number(self.beta, "beta", at_least=0)

    @property
    def formula(self) -> str:
        if self.beta == 1:
            return r"E_{q(z \mid x)} [\log p(x, z) - \log q(z \mid x)]"
        beta = r"\beta(t)" if callable(self.beta) else f"{self.beta:g}"
        return rf"E_{{q(z \mid x)}} [\log p(x \mid z)] - {beta} \, KL(q(z \mid x) \,\|\, p(z))"

    def at(self, elapsed: float) -> ELBO:
        """This objective with the weight of the schedule at ``elapsed``."""
        return replace(self, beta=self.beta(elapsed)) if callable(self.beta) else self

    def bound(self, program: Program, x: Tensor, given: Any, observed: dict[str, Tensor] | None) -> Bound:
        beta = self.beta(1.0) if callable(self.beta) else self.beta
        batch = (x.shape[0],) if self.num_samples == 1 else (self.num_samples, x.shape[0])
        bound = elbo(program, x, given, observed=observed, batch=batch, analytic_kl=self.analytic_kl, beta=beta)
        if self.leave_one_out and bound.score is not None:
            others = (bound.value.sum(0) - bound.value) / (self.num_samples - 1)
            bound.surrogate = bound.value + _zero_with_gradient(bound.score) * (bound.value - others).detach()
        return bound if self.num_samples == 1 else _mean_over_draws(bound)


@dataclass(frozen=True)
class FreeBits(VariationalBound):
    """The ELBO with a floor under the KL of each latent site, averaged over the batch: max(nats, KL) replaces KL.

    Below the floor there is no gain in switching a latent off. The sites of a hierarchy have a floor each if the guide
    draws them in the model's order (top-down). Otherwise their terms are no divergences on their own, and one floor
    applies to the divergence of all latents together.

    Args:
        nats: the floor in nats (lambda in the source).
        per_feature: whether each feature of a site has its own floor.

    Raises:
        ValueError: ``nats`` is negative; or, when called, ``per_feature`` without a KL per feature.

    Source: Kingma et al. 2016 (arXiv 1606.04934), equation 15.
    """

    nats: float = 2.0
    per_feature: bool = False

    def __post_init__(self) -> None:
        check_number(self.nats, "nats", at_least=0)

    @property
    def formula(self) -> str:
        sites = r"\sum_i \max" if self.per_feature else r"\max"
        i = "_i" if self.per_feature else ""
        return rf"E_{{q(z \mid x)}} [\log p(x \mid z)] - {sites}({self.nats:g}, KL(q(z{i} \mid x) \,\|\, p(z{i})))"

    def bound(self, program: Program, x: Tensor, given: Any, observed: dict[str, Tensor] | None) -> Bound:
        model, guide = traces(program, x, given, observed=observed)
        bound = elbo_of_traces(model, guide, (x.shape[0],))
        latents = latent_sites(guide)
        # A prior may state costs of its own latents, such as "z_likelihood": they are part of its divergence.
        data = [p for name, p in bound.reconstruction.items() if not name.startswith(tuple(f"{z}_" for z in latents))]
        log_likelihood = sum(data, torch.zeros_like(bound.value))
        apart = len(data) == len(bound.reconstruction) and bound.kl.keys() == set(latents)
        apart = apart and all(_guide_drew_earlier_latents(name, model, guide) for name in latents)
        if self.per_feature:
            by_feature = {name: _by_feature(guide.nodes[name], model.nodes[name]) for name in latents} if apart else {}
            if not apart or any(kl is None for kl in by_feature.values()):
                raise ValueError(
                    f"per_feature needs a divergence per feature: latents {latents} whose guide and prior have "
                    "independent features, with a closed form, drawn in the model's order; use per_feature=False"
                )
            floored = [_free_bits_kl(kl, self.nats).sum(-1) for kl in by_feature.values() if kl is not None]
        elif apart:
            floored = [_free_bits_kl(kl, self.nats) for kl in bound.kl.values()]
        else:
            floored = [_free_bits_kl(log_likelihood - bound.value, self.nats)]
        value = log_likelihood - sum(floored)
        surrogate = value if bound.score is None else value + _zero_with_gradient(bound.score) * value.detach()
        return Bound(value, surrogate, bound.reconstruction, bound.kl)


@dataclass(frozen=True)
class STL(VariationalBound):
    """Sticking the landing: the ELBO, with a gradient that leaves out the score of the guide.

    The score has mean zero, so the gradient is the same in expectation. Its variance vanishes where q(z | x) is the
    exact posterior. The guide runs twice, and must be able to score its draws.

    Args:
        num_samples: draws from the guide per datum, averaged.

    Source: Roeder, Wu and Duvenaud 2017 (arXiv 1703.09194), algorithm 1.
    """

    num_samples: int = 1

    def __post_init__(self) -> None:
        check_count(self.num_samples, "num_samples")

    @property
    def formula(self) -> str:
        return r"E_{q_\phi(z \mid x)} [\log p(x, z) - \log q_{\mathrm{sg}(\phi)}(z \mid x)]"

    def bound(self, program: Program, x: Tensor, given: Any, observed: dict[str, Tensor] | None) -> Bound:
        options: Any = {"batch": (self.num_samples, x.shape[0]), "observed": observed}
        guide = guide_trace(program, x, given, **options)
        log_q = _path_log_q(self, program, x, given, guide, **options)
        model = model_trace(program, x, given, guide, **options)
        return _mean_over_draws(elbo_of_traces(model, guide, options["batch"], analytic_kl=False, log_q=log_q))


@dataclass(frozen=True)
class IWAE(VariationalBound):
    """The importance-weighted bound, log (1/K) sum_k p(x, z_k) / q(z_k | x) (Burda et al. 2016, eq. 8).

    Chains among the latents are unrolled.

    Args:
        num_particles: K; for K = 1 it is the ELBO with sampled KL.
        leave_one_out: whether the score function of latents that cannot be reparameterized has a baseline: the bound
            with the draw's weight replaced by the geometric mean of the other weights (VIMCO).

    Source: Burda et al. 2016 (arXiv 1509.00519); Mnih and Rezende 2016 (arXiv 1602.06725), section 2.5.
    """

    num_particles: int = 8
    _: KW_ONLY
    leave_one_out: bool = False

    def __post_init__(self) -> None:
        _check_draws(self.num_particles, "num_particles", self.leave_one_out)

    @property
    def formula(self) -> str:
        return rf"E [\log {_mean_over(self.num_particles)} p(x, z_k) / q(z_k \mid x)]"

    def bound(self, program: Program, x: Tensor, given: Any, observed: dict[str, Tensor] | None) -> Bound:
        batch = (self.num_particles, x.shape[0])
        weights = elbo(program.unroll_latents(), x, given, observed=observed, batch=batch, analytic_kl=False)
        value = log_mean_exp(weights.value)
        surrogate = value
        if weights.score is not None:
            without = _without_each(weights.value) if self.leave_one_out else torch.zeros_like(weights.value)
            surrogate = value + (_zero_with_gradient(weights.score) * (value - without).detach()).sum(0)
        terms = _mean_over_draws(weights)
        return Bound(value, surrogate, terms.reconstruction, terms.kl)


@dataclass(frozen=True)
class DReG(VariationalBound):
    """The importance-weighted bound, with the doubly reparameterized gradient for the guide.

    The model's gradient is that of `IWAE`, weighted by w / sum w. Path derivatives through the latents are weighted by
    the square of that, and the guide's score is left out. The gradient is the same in expectation, but its
    signal-to-noise ratio no longer falls as K grows. The guide runs twice, and must be able to score its draws. Chains
    among the latents are unrolled.

    Args:
        num_particles: K.

    Source: Tucker et al. 2019 (arXiv 1810.04152), equation 8.
    """

    num_particles: int = 8
    eager_only: ClassVar[str] = "weights gradients by a hook in the backward pass"

    def __post_init__(self) -> None:
        check_count(self.num_particles, "num_particles")

    @property
    def formula(self) -> str:
        return (
            rf"E [\log {_mean_over(self.num_particles)} w_k], \quad w_k = p(x, z_k) / q_\phi(z_k \mid x), \quad "
            r"\nabla_\phi = E [\sum_k \bar w_k^2 \frac{\partial \log w_k}{\partial z_k} "
            r"\frac{\partial z_k}{\partial \phi}], \quad \bar w_k \propto w_k"
        )

    def bound(self, program: Program, x: Tensor, given: Any, observed: dict[str, Tensor] | None) -> Bound:
        program = program.unroll_latents()
        options: Any = {"batch": (self.num_particles, x.shape[0]), "observed": observed}
        guide = guide_trace(program, x, given, **options)
        shares: list[Tensor] = []
        for name in latent_sites(guide):
            # The guide itself continued with the unweighted draw, so no path is weighted twice.
            guide.nodes[name] = guide.nodes[name] | {"value": _weight_gradient(guide.nodes[name], shares)}
        log_q = _path_log_q(self, program, x, given, guide, **options)
        model = model_trace(program, x, given, guide, **options)
        weights = elbo_of_traces(model, guide, options["batch"], analytic_kl=False, log_q=log_q)
        shares.append(weights.value.softmax(0).detach())
        value = log_mean_exp(weights.value)
        terms = _mean_over_draws(weights)
        return Bound(value, value, terms.reconstruction, terms.kl)


@dataclass(frozen=True)
class RWS(VariationalBound):
    """Reweighted wake-sleep: importance weights for the model, maximum likelihood of weighted draws for the guide.

    The model ascends the importance-weighted bound. The guide ascends sum_k w_k log q(z_k | x) / sum_k w_k, which
    descends KL(p(z | x) || q(z | x)), the reverse of the KL of an ELBO (wake-phi). With ``sleep``, the guide also
    learns from samples x and z of the model (sleep-phi). Latents need not be reparameterized, so they may be discrete.
    Chains among the latents are unrolled.

    Args:
        num_particles: K.
        sleep: share of sleep-phi in the guide's gradient, in [0, 1]; the rest is wake-phi.

    Source: Bornschein and Bengio 2015 (arXiv 1406.2751), algorithm 1; Le et al. 2019 (arXiv 1805.10469).
    """

    num_particles: int = 8
    sleep: float = 0.0

    def __post_init__(self) -> None:
        check_count(self.num_particles, "num_particles")
        check_number(self.sleep, "sleep", at_least=0, at_most=1)

    @property
    def formula(self) -> str:
        wake = "" if self.sleep == 0 else f"{1 - self.sleep:g} \\, "
        asleep = "" if self.sleep == 0 else rf" + {self.sleep:g} \, E_{{p(x', z')}} [\log q(z' \mid x')]"
        return (
            rf"E [\sum_{{k=1}}^{{{self.num_particles}}} \mathrm{{sg}}(\bar w_k) "
            rf"(\log p(x, z_k) + {wake}\log q(z_k \mid x))]{asleep}, \quad \bar w_k \propto p(x, z_k) / q(z_k \mid x)"
        )

    def bound(self, program: Program, x: Tensor, given: Any, observed: dict[str, Tensor] | None) -> Bound:
        program = program.unroll_latents()
        options: Any = {"batch": (self.num_particles, x.shape[0]), "observed": observed}
        guide = guide_trace(program, x, given, handler=_Detached(), **options)
        model = model_trace(program, x, given, guide, **options)
        weights = elbo_of_traces(model, guide, options["batch"], analytic_kl=False, log_q=_log_q(guide))
        log_q = _sum_sites(_log_q(guide).values(), options["batch"], weights.value)
        log_p, shares = weights.value + log_q, weights.value.softmax(0).detach()
        value = log_mean_exp(weights.value).detach()
        surrogate = value + _zero_with_gradient((shares * (log_p + (1 - self.sleep) * log_q)).sum(0))
        if self.sleep > 0:
            surrogate = surrogate + self.sleep * _zero_with_gradient(_log_q_of_model_draw(program, x, given, observed))
        terms = _mean_over_draws(weights)
        return Bound(value, surrogate, terms.reconstruction, terms.kl)


@dataclass(frozen=True)
class Enumerate(VariationalBound):
    """The ELBO summed over all values of the discrete latents, so value and gradient are exact in these.

    All latents with finitely many values (Bernoulli, Categorical; for vectors, the product over their features) are
    summed over, weighted by q. Other latents are drawn once per combination, with reparameterization or the score
    function. Chains among the latents are unrolled.

    Args:
        max_outcomes: largest number of combinations. A network that reads all of these latents runs on one row per
            combination, times B if it also reads x.

    Raises:
        ValueError: when called, there are more combinations.
    """

    max_outcomes: int = 1024

    def __post_init__(self) -> None:
        check_count(self.max_outcomes, "max_outcomes")

    @property
    def formula(self) -> str:
        return r"\sum_z q(z \mid x) [\log p(x, z) - \log q(z \mid x)]"

    def bound(self, program: Program, x: Tensor, given: Any, observed: dict[str, Tensor] | None) -> Bound:
        program = program.unroll_latents()
        every = _EveryOutcome(self.max_outcomes, observed or {})
        guide = guide_trace(program, x, given, observed=observed, handler=every)
        model = model_trace(program, x, given, guide, observed=observed)
        if not every.sizes:
            return elbo_of_traces(model, guide, (x.shape[0],))
        batch = (*reversed(every.sizes.values()), x.shape[0])
        bound = elbo_of_traces(model, guide, batch, summed=every.sizes)
        q = _sum_sites([_log_q(guide)[name] for name in every.sizes], batch, bound.value).exp()
        return _map_terms(bound, lambda term: (q * term).flatten(0, -2).sum(0))


@dataclass(frozen=True)
class SemiSupervised(HasFormula):
    """The semi-supervised objective of a `Labeled` program with a classifier; unknown labels are -1.

    A labeled datum contributes the bound on log p(x, y) and ``weight`` times log q(y | x). An unlabeled datum
    contributes the bound with y summed out, sum_y q(y | x) [bound(x, y) - log q(y | x)].

    Args:
        weight: weight of the classification term (alpha in the source).
        analytic_kl: whether to use closed forms of KL(q || p).

    Raises:
        ValueError: ``weight`` is negative; or, when called, the program is not a `Labeled` with a classifier.

    Source: Kingma et al. 2014 (arXiv 1406.5298), equations 6 to 9.
    """

    weight: float = 1.0
    _: KW_ONLY
    analytic_kl: bool = True
    eager_only: ClassVar[str] = "picks rows by their labels"

    def __post_init__(self) -> None:
        check_number(self.weight, "weight", at_least=0)

    @property
    def formula(self) -> str:
        return (
            rf"L(x, y) + {self.weight:g} \log q(y \mid x) \quad \mathrm{{or}} \quad "
            r"\sum_y q(y \mid x) [L(x, y) - \log q(y \mid x)], \quad "
            r"L(x, y) = E_{q(z \mid x, y)} [\log p(x, y, z) - \log q(z \mid x, y)]"
        )

    def __call__(
        self, program: Program, x: Tensor, given: Any = None, observed: dict[str, Tensor] | None = None
    ) -> Bound:
        classifier = getattr(program, "classifier", None)
        if classifier is None:
            raise ValueError(
                f"SemiSupervised needs a Labeled program with a classifier q(y | x), got {type(program).__name__}"
            )
        label = getattr(program, "label_name", "y")
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
        """The bound summed over the labels, weighted by q(y | x)."""
        batch = (log_q.shape[-1], x.shape[0])
        every = torch.arange(batch[0], device=x.device).unsqueeze(-1).expand(batch)
        # x itself is not repeated: a network that reads x alone runs once, not once for every label.
        observed = {getattr(program, "label_name", "y"): every}
        inner = elbo(program, x, observed=observed, batch=batch, analytic_kl=self.analytic_kl)
        q = log_q.T.exp()
        return Bound((q * (inner.value - log_q.T)).sum(0), (q * (inner.surrogate - log_q.T)).sum(0))


@dataclass(frozen=True)
class SimpleWeight:
    """E |noise - predicted noise|^2 at uniform times (Ho et al. 2020, equation 14)."""

    formula: ClassVar[str] = r"-E_{t, \epsilon} [\|\epsilon - \hat\epsilon\|^2]"

    def __call__(self, log_snr: Tensor, fall: Tensor) -> Tensor:
        return 2 / fall


@dataclass(frozen=True)
class MinSNRWeight:
    """E min(SNR, gamma) |x_0 - predicted x_0|^2 at uniform times.

    Args:
        gamma: the largest weight; a very large gamma gives `SimpleWeight`.

    Source: Hang et al. 2023 (arXiv 2303.09556), section 3.4.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        check_number(self.gamma, "gamma", above=0)

    @property
    def formula(self) -> str:
        return rf"-E_{{t, \epsilon}} [\min(\mathrm{{SNR}}(t), {self.gamma:g}) \, \|x - \hat x\|^2]"

    def __call__(self, log_snr: Tensor, fall: Tensor) -> Tensor:
        return 2 / fall * (self.gamma * (-log_snr).exp()).clamp(max=1)


@dataclass(frozen=True)
class EDMWeight:
    """E |F - target|^2 of the network F of predict="edm", log(sigma / alpha) drawn from N(-1.2, 1.2^2).

    Args:
        sigma_data: standard deviation of the data. By default the program's, which is 1 unless it predicts "edm". The
            weight of the error of x_0 is the same for all predictions.

    Source: Karras et al. 2022 (arXiv 2206.00364), equation 8 and table 1.
    """

    sigma_data: float | None = None

    def __post_init__(self) -> None:
        if self.sigma_data is not None:
            check_number(self.sigma_data, "sigma_data", above=0)

    @property
    def formula(self) -> str:
        scale = r"\sigma_\mathrm{data}" if self.sigma_data is None else f"{self.sigma_data:g}"
        return rf"-E_{{\lambda \sim N(2.4, 2.4^2), \epsilon}} [(e^\lambda + {scale}^{{-2}}) \, \|x - \hat x\|^2]"

    def scaled_to(self, sigma_data: float) -> EDMWeight:
        """The weight for data of standard deviation ``sigma_data``, unless it already has one."""
        check_number(sigma_data, "sigma_data", above=0)
        return EDMWeight(sigma_data) if self.sigma_data is None else self

    def __call__(self, log_snr: Tensor, fall: Tensor) -> Tensor:
        if self.sigma_data is None:
            raise ValueError("sigma_data is None, that of the program: pass a number, or call scaled_to(sigma_data)")
        density = (-0.5 * ((log_snr - 2.4) / 2.4) ** 2).exp() / (2.4 * math.sqrt(2 * math.pi))
        return 2 * density * (1 + (-log_snr).exp() / self.sigma_data**2)


@dataclass(frozen=True)
class DenoisingLoss(VariationalBound):
    """The weighted squared error of a diffusion's denoiser, which is no bound on log p(x).

    The denoiser learns from this error alone. The variance v of its prediction enters only the bound, and learns from
    it with the prediction held constant (Nichol and Dhariwal 2021, section 3.1, for the variances of the steps). A
    learned noise schedule is held constant too. `dgm.fit` validates by the bound, and `dgm.evaluate` reports it. In
    discrete time, the integral over noise levels is a sum over the steps of the schedule.

    Args:
        weight: ``weight(log_snr, fall)``, the weight w, 1 in the bound, in the shape of its arguments: the log
            signal-to-noise ratio at a time, and the rate at which it falls: -d log_snr / dt in continuous time, and
            `Schedule.fall` in discrete time. If the weight has a method ``scaled_to``, it is called with the program's
            ``sigma_data`` first.

    Raises:
        TypeError: ``weight`` cannot be called.
        ValueError: when called, the program is no diffusion of x in its plated form, or predicts levels.
    """

    weight: Weighting = field(default_factory=SimpleWeight)
    unit: ClassVar[str] = "weighted squared error, no bound"

    def __post_init__(self) -> None:
        if not callable(self.weight):
            raise TypeError(f"weight must be callable, such as SimpleWeight(), got {self.weight!r}")

    @property
    def validation(self) -> ELBO:
        """The bound, which compares epochs."""
        return ELBO()

    @property
    def formula(self) -> str:
        by_hand = r"-\frac{1}{2} \int w(\lambda) \, E_\epsilon \|\epsilon - \hat\epsilon\|^2 \, d\lambda"
        return getattr(self.weight, "formula", by_hand) + r" \quad (\mathrm{no\ bound})"

    def bound(self, program: Program, x: Tensor, given: Any, observed: dict[str, Tensor] | None) -> Bound:
        with weighting_errors(self.weight):
            stated = elbo(program, x, given, observed=observed)
        site = f"{program.variable}_weighted_kl"
        error = stated.kl.get(site)
        if error is None:
            raise ValueError(
                f"{self} weights the error of a denoiser of {program.variable}, but {type(program).__name__} has none: "
                "use it for a Diffusion or a ContinuousDiffusion, and 'elbo' for other programs"
            )
        return Bound(-error, _zero_with_gradient(stated.surrogate) - error.detach(), {}, {site: error})


def simple() -> DenoisingLoss:
    """A diffusion's error in predicting the noise, at uniform times (Ho et al. 2020); no bound."""
    return DenoisingLoss(SimpleWeight())


def min_snr(gamma: float = 5.0) -> DenoisingLoss:
    """A diffusion's error in predicting the noise, with less weight at low noise (Hang et al. 2023); no bound."""
    return DenoisingLoss(MinSNRWeight(gamma))


def edm(sigma_data: float | None = None) -> DenoisingLoss:
    """A diffusion's error of the preconditioned network, mostly at medium noise (Karras et al. 2022); no bound."""
    return DenoisingLoss(EDMWeight(sigma_data))


def beta(weight: float = 4.0) -> ELBO:
    """The ELBO with a weighted KL: above 1 for simpler latents, below 1 for sharper samples (Higgins et al. 2017)."""
    check_number(weight, "weight", at_least=0)
    return ELBO(beta=weight)


def annealed(fraction: float = 0.25) -> ELBO:
    """The ELBO with a KL weight that rises from 0 to 1 over the first part of training (Bowman et al. 2016)."""
    return ELBO(beta=WarmUp(fraction))


def rloo(num_samples: int = 4) -> ELBO:
    """The ELBO with leave-one-out baselines for the score function, for discrete latents (Kool et al. 2019)."""
    return ELBO(num_samples, leave_one_out=True)


def vimco(num_particles: int = 8) -> IWAE:
    """IWAE with leave-one-out baselines for the score function, for discrete latents (Mnih and Rezende 2016)."""
    return IWAE(num_particles, leave_one_out=True)


# A value for the first parameter of each may follow its name: "iwae:50".
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "elbo": ELBO,
    "beta": beta,
    "annealed": annealed,
    "free-bits": FreeBits,
    "stl": STL,
    "iwae": IWAE,
    "dreg": DReG,
    "rws": RWS,
    "rloo": rloo,
    "vimco": vimco,
    "enumerate": Enumerate,
    "semi-supervised": SemiSupervised,
    "simple": simple,
    "min-snr": min_snr,
    "edm": edm,
}

# Those that compare samples with data, by name; `adversarial` fills it.
COMPARISONS: dict[str, Callable[..., Objective]] = {}


def chosen(objective: Any) -> Any:
    """The objective for the argument ``objective``: by its name, `ELBO` for None, or the callable itself.

    Raises:
        ValueError: there is no objective of that name.
        TypeError: ``objective`` is a class, or cannot be called.
    """
    if objective is None:
        return ELBO()
    if isinstance(objective, str):
        return objective_named(objective)
    if isinstance(objective, type):
        name = objective.__name__
        raise TypeError(f"objective is the class {name}: pass an instance, {name}()")
    if not callable(objective):
        raise TypeError(f"objective must be callable, a name, or a Pyro ELBO, got {type(objective).__name__}")
    return objective


def objective_named(text: str) -> Objective:
    """The objective of a name, with or without its first argument: "iwae", "iwae:50", "beta:4", "free-bits:0.5".

    Raises:
        ValueError: there is no objective of that name, or its argument does not fit.

    >>> objective_named("iwae:50")
    IWAE(num_particles=50, leave_one_out=False)
    """
    check_type(text, str, "text", "the name of an objective")
    name, colon, argument = text.partition(":")
    known = OBJECTIVES | COMPARISONS
    if name not in known:
        names = ", ".join(known)
        raise ValueError(
            f"objective must be one of {names}, alone or with its argument as in iwae:50, got {text!r}"
            f"{close_to(name, known)}"
        )
    make = known[name]
    if not colon:
        return make()
    first = next(iter(inspect.signature(make).parameters.values()), None)
    if first is None:
        raise ValueError(f"objective {text!r}: {name} takes no number, got {argument!r}: write {name}")
    kind = float if first.default is None else type(first.default)
    try:
        value = kind(argument)
    except ValueError:
        what = "an integer" if kind is int else "a number"
        raise ValueError(
            f"objective {text!r}: {first.name} must be {what}, got {argument!r}: write {name}:{first.default}"
        ) from None
    try:
        return make(value)
    except ValueError as error:
        raise ValueError(f"objective {text!r}: {error}") from error


def elbo(
    program: Program,
    x: Tensor,
    given: Any = None,
    *,
    observed: dict[str, Tensor] | None = None,
    batch: Sequence[int] | None = None,
    analytic_kl: bool = True,
    beta: float = 1.0,
) -> Bound:
    """One draw of the ELBO for each element of ``batch``, with its terms per site.

    Args:
        x: ``(B, *event_shape)``, or ``(*batch, *event_shape)``.
        given: ``(B, *given_shape)`` for a conditional program.
        observed: further sites and their values, such as labels.
        batch: shape of the result, such as ``(K, B)``; default ``(B,)``.
        analytic_kl: whether to use closed forms of KL(q || p).
        beta: weight of every KL.

    Returns:
        A `Bound` with values of shape ``batch``, in nats.
    """
    batch = (x.shape[0],) if batch is None else batch
    model, guide = traces(program, x, given, batch=batch, observed=observed)
    return elbo_of_traces(model, guide, batch, analytic_kl=analytic_kl, beta=beta)


def _check_draws(count: Any, argument: str, leave_one_out: bool) -> None:
    check_count(count, argument)
    if leave_one_out and count == 1:
        raise ValueError(
            f"{argument} must be at least 2 with leave_one_out, because the baseline is the mean of the other draws, "
            f"got {count}"
        )


def exact(program: Program, x: Tensor, given: Any = None) -> Bound:
    """log p(x) of a tractable program, in nats, as a `Bound`."""
    log_p = program.exact_log_prob(x, given)
    return Bound(log_p, log_p, {program.variable: log_p})


def elbo_of_traces(
    model: poutine.Trace,
    guide: poutine.Trace,
    batch: Sequence[int],
    *,
    analytic_kl: bool = True,
    beta: float = 1.0,
    log_q: dict[str, Tensor] | None = None,
    summed: Collection[str] = (),
) -> Bound:
    """The ELBO of a pair of traces.

    Args:
        log_q: log-probabilities to use for the guide's sites instead of its own; all KLs are then sampled.
        summed: sites of which the traces hold all values; they need no score function.
    """
    latents = latent_sites(guide)
    reconstruction: dict[str, Tensor] = {}
    kl: dict[str, Tensor] = {}
    score: Tensor | None = None
    for name in sample_sites(model):
        site: Any = model.nodes[name]
        if name not in latents:
            log_p = site_sum(site_log_prob(site), batch)
            if is_cost(name):
                kl[name] = -log_p
            else:
                reconstruction[name] = log_p
            continue
        q: Any = guide.nodes[name]
        closed = analytic_kl and name not in summed and _guide_drew_earlier_latents(name, model, guide)
        divergence = _closed_form(q, site) if closed else None
        if divergence is None:
            divergence = (site_log_prob(q) if log_q is None else log_q[name]) - site_log_prob(site)
        kl[name] = site_sum(divergence, batch)
        if log_q is None and name not in summed and not q["fn"].has_rsample:
            log_q_here = site_sum(site_log_prob(q), batch)
            if log_q_here.requires_grad:
                score = log_q_here + (0 if score is None else score)
    value: Any = sum(reconstruction.values()) - beta * sum(kl.values())
    surrogate = value if score is None else value + _zero_with_gradient(score) * value.detach()
    return Bound(value, surrogate, reconstruction, kl, score)


def _guide_drew_earlier_latents(name: str, model: poutine.Trace, guide: poutine.Trace) -> bool:
    """Whether the guide drew all latents before ``name`` that the model states before it.

    The closed form of a KL holds the model's earlier latents fixed, so the guide must have drawn them earlier too.
    """
    before_p, before_q = latent_sites(model), latent_sites(guide)
    return set(before_p[: before_p.index(name)]) <= set(before_q[: before_q.index(name)])


def site_log_prob(site: Any) -> Tensor:
    return _scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])


def _scale_and_mask(term: Tensor, scale: Any, mask: Any) -> Tensor:
    """``term`` with the scale and mask of its site. Pyro's own function reads values, so it cannot be compiled."""
    if not (isinstance(scale, numbers.Number) and scale == 1):
        term = term * scale
    if mask is None or mask is True:
        return term
    return torch.zeros_like(term) if mask is False else torch.where(mask, term, term.new_zeros(()))


def _log_q(guide: poutine.Trace) -> dict[str, Tensor]:
    return {name: site_log_prob(guide.nodes[name]) for name in latent_sites(guide)}


def _sum_sites(log_probs: Iterable[Tensor], batch: Sequence[int], like: Tensor) -> Tensor:
    return sum((site_sum(log_prob, batch) for log_prob in log_probs), torch.zeros_like(like))


def _zero_with_gradient(score: Tensor) -> Tensor:
    """Zero with the gradient of ``score``: added to a bound, it makes a surrogate of the same value."""
    return score - score.detach()


def _closed_form(q: Any, p: Any) -> Tensor | None:
    try:
        return _scale_and_mask(kl_divergence(q["fn"], p["fn"]), q["scale"], q["mask"])
    except NotImplementedError:
        return None


def _map_terms(bound: Bound, reduce: Callable[[Tensor], Tensor]) -> Bound:
    return Bound(
        reduce(bound.value),
        reduce(bound.surrogate),
        {name: reduce(term) for name, term in bound.reconstruction.items()},
        {name: reduce(term) for name, term in bound.kl.items()},
    )


def _mean_over_draws(bound: Bound) -> Bound:
    return _map_terms(bound, lambda term: term.mean(0))


# -- importance weights ------------------------------------------------------------------------------------------------


def _mean_over(num_particles: int) -> str:
    """The mean over k, in LaTeX."""
    return rf"\frac{{1}}{{{num_particles}}} \sum_{{k=1}}^{{{num_particles}}}"


def _without_each(log_w: Tensor) -> Tensor:
    """The log-mean-exp with each log w_k in turn replaced by the mean of the others, ``(K, B)``."""
    size = log_w.shape[0]
    others = (log_w.sum(0) - log_w) / (size - 1)
    own = torch.eye(size, dtype=torch.bool, device=log_w.device).unsqueeze(-1)
    return log_mean_exp(torch.where(own, others, log_w.unsqueeze(1)))


# -- path derivatives and scores alone ---------------------------------------------------------------------------------


class _GuideScore(nn.Module):
    """log q of the latents in a guide's trace, per site, scored by running the guide's statements again."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program

    def forward(self, x: Tensor, given: Any, guide: poutine.Trace, **options: Any) -> dict[str, Tensor]:
        # Scored here: a distribution may read the parameters only when it is asked for a probability.
        return _log_q(guide_trace(self.program, x, given, handler=poutine.replay(trace=guide), **options))


def _path_log_q(
    objective: Objective, program: Program, x: Tensor, given: Any, guide: poutine.Trace, **options: Any
) -> dict[str, Tensor]:
    """log q per site, differentiable in the latents of ``guide`` but not in the parameters.

    Raises:
        ValueError: a latent is not reparameterized, or the guide cannot score its draws.
    """
    for name in latent_sites(guide):
        site: Any = guide.nodes[name]
        if not site["fn"].has_rsample and site_log_prob(site).requires_grad:
            raise ValueError(
                f"{objective} needs gradients through the latents, but {name!r} ({_distribution_name(site)}) is not "
                "reparameterized: use the objective 'enumerate', 'vimco', 'rloo' or 'rws'"
            )
    parameters = {f"program.{name}": parameter.detach() for name, parameter in program.named_parameters()}
    before = None if torch.compiler.is_exporting() else _random_state(x.device)
    try:
        log_q = torch.func.functional_call(_GuideScore(program), parameters, (x, given, guide), options)
    except (NotImplementedError, KeyError) as error:
        names = ", ".join(repr(name) for name in latent_sites(guide))
        raise ValueError(
            f"{objective} scores the guide's draws of {names} a second time, but their distribution cannot ({error}): "
            "use another encoder, or the objective 'elbo' or 'iwae'"
        ) from error
    if before is not None and not torch.equal(before, _random_state(x.device)):
        raise ValueError(
            f"{objective} runs the guide twice, but the two runs differ: remove dropout from the encoder, or use the "
            "objective 'elbo' or 'iwae'"
        )
    return log_q


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _distribution_name(site: Any) -> str:
    return type(getattr(site["fn"], "base_dist", site["fn"])).__name__


def _weight_gradient(site: Any, shares: list[Tensor]) -> Tensor:
    """A draw whose gradient is weighted by ``shares[0]``, ``(K, B)``, which is known before the backward pass."""
    z: Tensor = site["value"]
    if not z.requires_grad:
        return z
    z = z.clone()
    z.register_hook(lambda gradient: gradient * shares[0].reshape(*shares[0].shape, *(1,) * (z.dim() - 2)))
    return z


class _Detached(Messenger):
    """Detaches draws, so the gradient of the guide's log-probabilities is the score."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


def _log_q_of_model_draw(program: Program, x: Tensor, given: Any, observed: dict[str, Tensor] | None) -> Tensor:
    """log q(z | x) of z and x that the model itself draws, ``(B,)``."""
    batch = (x.shape[0],)
    with (
        torch.no_grad(),
        hidden(),
        poutine.condition(data=observed or {}),
        poutine.trace() as dreamt,
        batch_plates(batch),
    ):
        dream = program.joint(program.variable, None, given)
    guide = guide_trace(program, dream, given, observed=observed, handler=poutine.replay(trace=dreamt.trace))
    require_subset(latent_sites(guide), latent_sites(dreamt.trace))
    return _sum_sites(_log_q(guide).values(), batch, torch.zeros(batch, device=x.device))


# -- every value -------------------------------------------------------------------------------------------------------


class _EveryOutcome(Messenger):
    """Puts all values of each finite latent along a batch dimension of its own, left of the data.

    Attributes:
        sizes: number of values per site, in the order stated; the n-th site has the n-th dimension left of the data.
    """

    def __init__(self, max_outcomes: int, observed: Collection[str]):
        super().__init__()
        self.max_outcomes, self.observed, self.sizes = max_outcomes, observed, dict[str, int]()

    def _pyro_sample(self, msg: Any) -> None:
        known = msg["is_observed"] or msg["name"] in self.observed
        values = None if known else _finite_support(msg["fn"])
        if values is None:
            return
        name, shape = msg["name"], msg["fn"].event_shape
        size = len(values) ** shape.numel()
        total = size * math.prod(self.sizes.values())
        if total > self.max_outcomes:
            raise ValueError(
                f"to enumerate {name!r}, {shape.numel()} feature(s) of {len(values)} values, takes {total} outcomes, "
                f"but max_outcomes is {self.max_outcomes}: raise it, or use the objective 'rloo', 'vimco' or 'rws'"
            )
        like = msg["fn"].sample()  # of the type and on the device that networks expect
        features = [torch.tensor(values, dtype=like.dtype, device=like.device)] * shape.numel()
        every = torch.cartesian_prod(*features)
        msg["value"] = every.reshape(size, *(1,) * (len(self.sizes) + 1), *shape)
        self.sizes[name] = size


def _finite_support(distribution: Any) -> range | None:
    """The values of one feature, or None unless they are the integers of a finite range."""
    support = unwrapped(support_of(distribution))
    if support is constraints.boolean:
        return range(2)
    if isinstance(support, constraints.integer_interval):
        return range(int(support.lower_bound), int(support.upper_bound) + 1)
    return None


# -- free bits ---------------------------------------------------------------------------------------------------------


def _free_bits_kl(kl: Tensor, nats: float) -> Tensor:
    """``kl`` where its mean over the batch exceeds ``nats``, else ``nats``: their mean is max(nats, mean kl)."""
    return torch.where(kl.mean(0) > nats, kl, nats)


def _by_feature(q: Any, p: Any) -> Tensor | None:
    """KL(q || p) of each feature, ``(B, features)``; None without independent features or a closed form."""
    parts = [site["fn"] for site in (q, p)]
    while all(isinstance(part, torch.distributions.Independent) for part in parts):
        parts = [part.base_dist for part in parts]
    if any(part.event_shape for part in parts):
        return None
    try:
        divergence = kl_divergence(*parts)
    except NotImplementedError:
        return None
    return _scale_and_mask(divergence.flatten(1).T, q["scale"], q["mask"]).T
