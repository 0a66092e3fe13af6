r"""Pareto-smoothed importance sampling: importance weights of draws of q, and whether they are reliable.

Draws :math:`z_k \sim q` with the weights :math:`w_k = p(z_k, y) / q(z_k)` represent the posterior, and the mean weight
is an unbiased estimate of the evidence p(y). Both depend on the largest weights. These follow a generalized Pareto
distribution, whose shape :math:`\hat k` determines the number of finite moments of the weights. Above
:math:`\min(1 - 1 / \log_{10} K, 0.7)` no practical number of draws is enough, because q misses a part of the posterior.
Below, the largest weights are replaced by the expected order statistics of the fitted distribution, which lowers the
variance.

Sources: Vehtari et al. 2024 (Pareto smoothed importance sampling, arXiv 1507.02646); Zhang and Stephens 2009, for the
fit; Yao et al. 2018 (Yes, but did it work?, arXiv 1802.02538), for the use on variational posteriors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dgm_pyro.noise as noise
from dgm_pyro.checks import check_count, check_dense, suggesting
from dgm_pyro.evaluation import evaluating, particles_at_once
from dgm_pyro.families.autoguide import weigh
from dgm_pyro.infer.draws import Draws, resampled
from dgm_pyro.infer.posterior import check_target
from dgm_pyro.posterior import Posterior
from dgm_pyro.program import Program, log_mean_exp, seeded, unchecked
from dgm_pyro.results import Result, Table, with_error

__all__ = ["Weighted", "psis", "smooth"]


@dataclass(frozen=True)
class Weighted(Result, Draws):
    """The result of `psis`: weighted draws of q. B is the number of data, which is left out for a `Posterior`.

    Attributes:
        log_weights: log p(z_k, y) - log q(z_k) in nats, ``(K, B)``; the mean weight is an unbiased estimate of p(y).
        smoothed: log of the smoothed weights, which sum to one, ``(K, B)``.
        k_hat: the shape of the tail, ``(B,)``.
        u: the draws as unconstrained vectors, ``(K, D)``, for a `Posterior`; else None.
        posterior: the `Posterior` that the guide approximates; None for a `Program`.
    """

    log_weights: Tensor
    smoothed: Tensor
    k_hat: Tensor
    u: Tensor | None = None
    posterior: Posterior | None = None

    def _vectors(self, posterior: Posterior) -> Tensor:
        assert self.u is not None
        return self.u[resampled(self.smoothed)].unsqueeze(0)

    @property
    def elbo(self) -> Tensor:
        """The mean log weight, in nats, ``(B,)``."""
        return self.log_weights.mean(0)

    @property
    def log_evidence(self) -> Tensor:
        """The log of the mean weight, in nats, ``(B,)``: on average below log p(y)."""
        return log_mean_exp(self.log_weights)

    @property
    def stderr(self) -> Tensor:
        """Standard error of `log_evidence`, ``(B,)``; too small where `k_hat` is above `threshold`."""
        weights = (self.log_weights - self.log_evidence).exp()
        return weights.std(0) / math.sqrt(len(weights))

    @property
    def effective_size(self) -> Tensor:
        """The effective sample size of the smoothed weights, ``(B,)``."""
        return 1 / (2 * self.smoothed).exp().sum(0)

    @property
    def threshold(self) -> float:
        """The k_hat up to which K weights are reliable (Vehtari et al. 2024, section 3.2)."""
        return min(1 - 1 / math.log10(len(self.log_weights)), 0.7)

    @property
    def reliable(self) -> Tensor:
        """Whether k_hat is below the threshold, ``(B,)``."""
        return self.k_hat < self.threshold

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        numbers = {"elbo": self.elbo, "log_evidence": self.log_evidence, "stderr": self.stderr, "k_hat": self.k_hat,
                   "effective_size": self.effective_size, "reliable": self.reliable}  # fmt: skip
        return {**{name: value.tolist() for name, value in numbers.items()}, "num_particles": len(self.log_weights),
                "threshold": self.threshold}  # fmt: skip

    def parts(self) -> list[str | Table]:
        size, columns = len(self.log_weights), [self.elbo, self.log_evidence, self.stderr, self.k_hat]
        rows = [
            [f"{elbo:.3f}", with_error(evidence, error, 3), f"{k_hat:.2f}", f"{effective:.0f}"]
            for elbo, evidence, error, k_hat, effective in zip(
                *(column.reshape(-1).tolist() for column in [*columns, self.effective_size]), strict=True
            )
        ]
        good, total = int(self.reliable.sum()), self.reliable.numel()
        verdict = "q can be corrected by its weights" if good == total else "q misses a part of the posterior"
        return [
            Table(["ELBO", "log evidence", "k-hat", "ESS"], rows),
            f"{size} draws; k-hat below {self.threshold:.2f} for {good} of {total}: {verdict}",
        ]


@suggesting
def psis(
    program: Program | Posterior,
    x: Any = None,
    given: Any = None,
    *,
    guide: Any = None,
    num_particles: int = 1000,
    seed: int = 0,
) -> Weighted:
    """Weigh draws of a guide, smooth the weights, and check by k-hat whether they are reliable.

    Args:
        program: a `Posterior`, with a ``guide``; or a `Program`, which has its own.
        x: ``(B, *event_shape)``, the data of a `Program`; a `Posterior` has its own.
        given: ``(B, *given_shape)`` for a conditional program.
        guide: the fitted guide to check: from `dgm.guides.auto`, any of Pyro's AutoGuides, a guide of your own, or a
            distribution of u, such as a `Conditional` on ``(D,)``.
        num_particles: K, at least 25.
        seed: seed of all draws; the global random state does not change.

    Raises:
        TypeError, ValueError: the guide does not fit the posterior, or an argument does not fit.

    >>> import torch, pyro, pyro.distributions as dist, dgm_pyro as dgm
    >>> def model(y):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    >>> exact = dist.Normal(torch.tensor([0.5]), 0.5 ** 0.5).to_event(1)
    >>> found = dgm.infer.psis(dgm.Posterior(model, torch.tensor(1.0)), guide=exact)
    >>> print(f"{found.log_evidence:.3f}")
    -1.516
    """
    check_target(program, x)
    check_count(num_particles, "num_particles", at_least=25)
    if isinstance(program, Posterior):
        with seeded(seed, program.device), unchecked(), torch.no_grad():
            u, log_weights = weigh(program, guide, num_particles)
        return Weighted(log_weights, *smooth(log_weights), u, program)
    if guide is not None:
        raise TypeError(f"this {type(program).__name__} has a guide of its own: leave guide out")
    program.check(x, given)
    if program.tractable:
        raise ValueError(f"log p(x) of this {type(program).__name__} is exact: use program.log_prob(x)")
    with evaluating(program), seeded(seed, x.device), noise.per_datum(x, seed), torch.no_grad():
        sizes = noise.chunks(num_particles, particles_at_once(program, len(x)))
        log_weights = torch.cat([program.log_weights(x, given, size) for _, size in sizes])
    return Weighted(log_weights, *smooth(log_weights))


def smooth(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto-smoothed log weights that sum to one, and k-hat.

    Args:
        log_weights: log weights in nats, ``(K, *batch)``, K at least 25.

    Returns:
        The log weights, ``(K, *batch)``, and k-hat, ``batch``, which is infinite where fewer than five weights differ.
    """
    check_dense(log_weights, "log_weights")
    flat = log_weights.double().reshape(len(log_weights), -1)
    each = [_smooth(column) for column in flat.unbind(1)]
    smoothed, k_hats = (torch.stack(part, -1) for part in zip(*each, strict=True))
    return smoothed.reshape(log_weights.shape).to(log_weights), k_hats.reshape(log_weights.shape[1:]).to(log_weights)


def _smooth(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    size = len(log_weights)
    log_weights = log_weights - log_weights.max()
    order = log_weights.argsort()
    num_tail = math.ceil(min(0.2 * size, 3 * math.sqrt(size)))
    cutoff = log_weights[order[-num_tail - 1]].clamp_min(math.log(torch.finfo(log_weights.dtype).tiny))
    tail = order[log_weights[order] > cutoff]
    k_hat = log_weights.new_tensor(math.inf)
    if len(tail) > 4:
        excess = log_weights[tail].exp() - cutoff.exp()
        k_hat, scale = _fit_pareto(excess)
        if bool(k_hat.isfinite()):
            p = (torch.arange(len(tail), dtype=excess.dtype, device=excess.device) + 0.5) / len(tail)
            quantiles = scale * torch.expm1(-k_hat * torch.log1p(-p)) / k_hat
            log_weights = log_weights.index_copy(0, tail, (quantiles + cutoff.exp()).log())
    # No smoothed weight exceeds the largest raw one.
    return log_weights.clamp_max(0).log_softmax(0), k_hat


def _fit_pareto(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale of a generalized Pareto distribution, by the mean of a quasi-posterior on a grid.

    The shape is shrunk towards 0.5 with the weight of ten more data.

    Args:
        excess: excesses over the threshold in ascending order, ``(n,)``.
    """
    n, grid = len(excess), 30 + int(math.sqrt(len(excess)))
    i = torch.arange(1, grid + 1, dtype=excess.dtype, device=excess.device)
    quartile = excess[int(n / 4 + 0.5) - 1]
    b = 1 / excess[-1] + (1 - (grid / (i - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-b.unsqueeze(-1) * excess).mean(-1)
    weight = (n * ((-b / k).log() - k - 1)).softmax(0)
    weight = torch.where(weight >= 10 * torch.finfo(excess.dtype).eps, weight, 0)
    b = (weight * b).sum() / weight.sum()
    k = torch.log1p(-b * excess).mean()
    return (n * k + 10 * 0.5) / (n + 10), -k / b
