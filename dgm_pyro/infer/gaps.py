r"""The inference gap, log p(x) - ELBO, split into the approximation gap and the amortization gap.

.. math::
    \log p(x) - L[q_\phi] =
    \underbrace{\log p(x) - \max_{q \in \mathcal Q} L[q]}_{\text{approximation gap}} +
    \underbrace{\max_{q \in \mathcal Q} L[q] - L[q_\phi]}_{\text{amortization gap}}

with L the ELBO of one datum, :math:`q_\phi` the encoder's distribution for it, and Q the encoder's family. The best q
is found by gradient ascent from the encoder's own q. If the encoder outputs the parameters of a distribution, these are
optimized, for all data at once. Any other encoder, such as a flow, is copied for each datum and trained on it alone.

The estimate of log p(x) is the highest of several lower bounds, on average over the data: annealed importance sampling,
importance weights with many particles of the encoder's q and of the best q, and the ELBOs themselves. A bound replaces
an earlier one only if it is clearly higher. All are on average below log p(x), so the approximation gap may be larger
than reported, but not smaller. (The highest bound for each single datum would be too high, because it selects noise.)
The best q is the better of the start and the end of the ascent.

A guide of a `Posterior` has one data set and is not amortized. The second gap is then the *optimization* gap: the gain
of the same guide by further gradient steps.

Source: Cremer, Li and Duvenaud 2018 (Inference suboptimality in variational autoencoders, arXiv 1801.03558).
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from pyro import poutine
from torch import Tensor, nn
from tqdm import tqdm

import dgm_pyro.noise as noise
from dgm_pyro.checks import check_count, check_counts, check_dense
from dgm_pyro.evaluation import evaluating, importance_bound, log_mean_weight, standard_error
from dgm_pyro.families.autoguide import OverReals, weigh
from dgm_pyro.families.conditionals import IndependentConditional
from dgm_pyro.families.standardized import Standardized
from dgm_pyro.families.vae import VAE
from dgm_pyro.infer.ais import ais
from dgm_pyro.infer.compare import train_guide
from dgm_pyro.infer.posterior import check_target
from dgm_pyro.objectives import elbo
from dgm_pyro.posterior import Posterior
from dgm_pyro.program import (
    Program,
    differentiating,
    is_pair,
    rows_of,
    seeded,
    unchecked,
)
from dgm_pyro.results import Result, Table, with_error

__all__ = ["Gaps", "GuideGaps", "best_elbo", "gaps"]

DRAWS_PER_STEP = 8
LEARNING_RATE = 0.05
FINE_TUNING_RATE = 0.003


@dataclass(frozen=True)
class Gaps(Result):
    """log p(x) and the two bounds below it, per datum, in nats.

    Attributes:
        log_evidence: the best available lower bound on log p(x), ``(B,)``.
        best: the ELBO of the best q of the family, ``(B,)``.
        elbo: the ELBO of the encoder's q, ``(B,)``.
        kind: kind of log_evidence, such as "ais-300", "iwae-1000", "iwae-1000 of the best q" or "best ELBO"; "given"
            if the caller passed it.
        x: the data.
    """

    log_evidence: Tensor
    best: Tensor
    elbo: Tensor
    kind: str
    x: Tensor

    @property
    def approximation(self) -> Tensor:
        """The loss due to the guide's family, in nats, ``(B,)``."""
        return self.log_evidence - self.best

    @property
    def amortization(self) -> Tensor:
        """The loss due to the encoder compared with the best member of its family, in nats, ``(B,)``."""
        return self.best - self.elbo

    @property
    def total(self) -> Tensor:
        return self.log_evidence - self.elbo

    def means(self) -> dict[str, tuple[float, float]]:
        """Mean over the data of each quantity, and its standard error, in nats."""
        named = {
            "log p(x)": self.log_evidence,
            "best ELBO": self.best,
            "ELBO": self.elbo,
            "approximation gap": self.approximation,
            "amortization gap": self.amortization,
            "gap": self.total,
        }
        return {name: (float(v.mean()), standard_error(v)) for name, v in named.items()}

    def worst(self, num_data: int) -> Tensor:
        """Indices of the data with the lowest log p(x), the worst first."""
        return self.log_evidence.argsort()[: check_count(num_data, "num_data")]

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        means = {
            name: {"mean": mean, "stderr": None if math.isnan(error) else error}
            for name, (mean, error) in self.means().items()
        }
        return {"kind": self.kind, "num_data": len(self.elbo), **means}

    def parts(self) -> list[str | Table]:
        rows = [[name, with_error(mean, error, 3)] for name, (mean, error) in self.means().items()]
        return [Table(["mean over the data", "nats"], rows),
                f"{len(self.elbo)} data; log p(x) is a lower bound: {self.kind}"]  # fmt: skip


@dataclass(frozen=True)
class GuideGaps(Result):
    """log p(y) and the two bounds below it for a guide of a `Posterior`, in nats, each with its standard error.

    Attributes:
        log_evidence: the best available lower bound on log p(y).
        best: the ELBO of the guide after further gradient steps.
        elbo: the ELBO of the guide.
        kind: kind of log_evidence, as for `Gaps`.
    """

    log_evidence: tuple[float, float]
    best: tuple[float, float]
    elbo: tuple[float, float]
    kind: str

    @property
    def approximation(self) -> tuple[float, float]:
        """The loss due to the guide's family, in nats."""
        return _independent_difference(self.log_evidence, self.best)

    @property
    def optimization(self) -> tuple[float, float]:
        """The gain of further gradient steps, in nats."""
        return _independent_difference(self.best, self.elbo)

    @property
    def total(self) -> tuple[float, float]:
        return _independent_difference(self.log_evidence, self.elbo)

    def _named_values(self) -> dict[str, tuple[float, float]]:
        return {"log p(y)": self.log_evidence, "best ELBO": self.best, "ELBO": self.elbo,
                "approximation gap": self.approximation, "optimization gap": self.optimization,
                "gap": self.total}  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {"kind": self.kind, **{name: {"mean": mean, "stderr": error if math.isfinite(error) else None}
                                      for name, (mean, error) in self._named_values().items()}}  # fmt: skip

    def parts(self) -> list[str | Table]:
        rows = [[name, with_error(mean, error, 3)] for name, (mean, error) in self._named_values().items()]
        return [
            Table(["all data together", "nats"], rows),
            f"log p(y) is a lower bound: {self.kind}",
            "a guide of one data set is not amortized, so there is no amortization gap",
        ]


def _independent_difference(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] - b[0], math.hypot(a[1], b[1])


@overload
def gaps(program: Posterior, x: None = None, given: None = None, *, guide: Any, **options: Any) -> GuideGaps: ...
@overload
def gaps(program: Program, x: Tensor, given: Any = None, **options: Any) -> Gaps: ...
def gaps(  # type: ignore[misc]
    program: Program | Posterior,
    x: Tensor | None = None,
    given: Any = None,
    *,
    guide: Any = None,
    num_particles: int = 1000,
    num_temperatures: int = 100,
    num_chains: int = 8,
    gradient_steps: int = 400,
    num_samples: int = 256,
    log_evidence: Tensor | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Gaps | GuideGaps:
    """Split log p(x) - ELBO into the approximation gap of the guide's family and the amortization gap.

    Args:
        program: a `VAE`, or a `Posterior`; it does not change.
        x: ``(B, *event_shape)``, the data of a VAE; a `Posterior` has its own.
        given: ``(B, *given_shape)`` for a conditional VAE.
        guide: a fitted guide for a `Posterior`, as for `psis`; it does not change. A guide without parameters counts as
            the best of its family. A function must have no parameters, because it does not own those in the param
            store.
        num_particles: particles of the importance-weighted bound on log p(x).
        num_temperatures, num_chains: temperatures and chains of annealed importance sampling, see `ais`; 0 temperatures
            leave it out, which is necessary if a latent is discrete.
        gradient_steps: steps of gradient ascent on q.
        num_samples: draws per datum in each ELBO that is reported.
        log_evidence: log p(x) in nats, ``(B,)``, instead of an estimate with this guide, for a fair comparison of
            guides of the same p. For a `Posterior`, a tensor with one number.
        seed: seed of all draws; the global random state does not change.
        progress: whether to show bars.

    Returns:
        `Gaps` for a VAE, `GuideGaps` for a `Posterior`.

    Raises:
        TypeError: the program is not a VAE, so it has no encoder whose family can be searched.
        ValueError: shapes or values do not fit, or a latent is discrete and ``num_temperatures`` is not 0.
    """
    check_target(program, x)
    check_counts(
        num_particles=num_particles, num_chains=num_chains, gradient_steps=gradient_steps, num_samples=num_samples
    )
    check_count(num_temperatures, "num_temperatures", at_least=0)
    if log_evidence is not None:
        check_dense(log_evidence, "log_evidence")
    if isinstance(program, Posterior):
        return _guide_gaps(program, guide, num_particles, num_temperatures, num_chains, gradient_steps, num_samples,
                         log_evidence, seed, progress)  # fmt: skip
    if guide is not None:
        raise TypeError(f"this {type(program).__name__} has a guide of its own: leave guide out")
    assert x is not None  # `check_target` has asked
    if isinstance(program, Standardized):
        program.check(x, given)
        volume = program.log_volume()
        found = gaps(
            program.program, program.standard(x), program.standard_given(given), num_particles=num_particles,
            num_temperatures=num_temperatures, num_chains=num_chains, gradient_steps=gradient_steps,
            num_samples=num_samples, log_evidence=None if log_evidence is None else log_evidence + volume, seed=seed,
            progress=progress,
        )  # fmt: skip
        nats = {name: getattr(found, name) - volume for name in ("log_evidence", "best", "elbo")}
        return replace(found, **nats, x=x.cpu())
    if not isinstance(program, VAE) or program.encoder is None:
        raise TypeError(f"program must be a VAE with an encoder, got {type(program).__name__}")
    program.check(x, given)
    if log_evidence is not None and log_evidence.shape != (len(x),):
        raise ValueError(
            f"log_evidence has shape {tuple(log_evidence.shape)}, but x has {len(x)} rows: pass one number per datum"
        )

    def own_noise() -> contextlib.AbstractContextManager[Any]:
        return noise.per_datum(x, seed)

    bounds = dict[str, Tensor]()
    with evaluating(program), seeded(seed, x.device):
        with own_noise():
            amortized = _mean_elbo(program, x, given, num_samples, progress)
        best, weighted = _bounds_of_best_q(
            program, x, given, gradient_steps, num_samples, seed, progress, num_particles
        )
        if log_evidence is None:
            with own_noise():
                bounds[f"iwae-{num_particles}"] = _importance_bound(program, x, given, num_particles, progress)
            bounds[f"iwae-{num_particles} of the best q"] = weighted
            if num_temperatures:
                bounds[f"ais-{num_temperatures}"] = ais(
                    program, x, given, num_chains=num_chains, num_temperatures=num_temperatures, seed=seed,
                    progress=progress).log_evidence  # fmt: skip
    best = _highest({"ascent": best, "encoder": amortized})[1]
    kind, evidence = ("given", log_evidence) if log_evidence is not None else _highest(bounds | {"best ELBO": best})
    return Gaps(evidence.cpu().double(), best.cpu().double(), amortized.cpu().double(), kind, x.cpu())


def _guide_gaps(
    posterior: Posterior,
    guide: Any,
    num_particles: int,
    num_temperatures: int,
    num_chains: int,
    gradient_steps: int,
    num_samples: int,
    log_evidence: Tensor | None,
    seed: int,
    progress: bool,
) -> GuideGaps:
    if log_evidence is not None and log_evidence.numel() != 1:
        raise ValueError(
            f"log_evidence has shape {tuple(log_evidence.shape)}, but a Posterior has one evidence: pass one number"
        )
    if callable(guide) and not isinstance(guide, OverReals | nn.Module):
        with seeded(seed, posterior.device), torch.no_grad(), poutine.block(), poutine.trace(param_only=True) as traced:
            guide(*posterior.args, **posterior.kwargs)
        if stored := ", ".join(traced.trace.param_nodes):
            raise TypeError(
                f"guide is a function with the parameters {stored} in the param store: make it a PyroModule that holds "
                "them"
            )

    def weights(size: int) -> Tensor:
        with seeded(seed, posterior.device), unchecked(), torch.no_grad():
            return weigh(posterior, guide, size)[1].double()

    kind, many = f"iwae-{num_particles}", weights(num_particles)
    ours = _mean_and_stderr(weights(num_samples))
    best, bounds = ours, {kind: log_mean_weight(many)}
    with _restoring(guide) as module:
        if module is not None:
            train_guide(posterior, module, gradient_steps=gradient_steps, seed=seed, progress=progress)
            best = max(ours, _mean_and_stderr(weights(num_samples)))
            bounds[f"{kind} of the best q"] = log_mean_weight(weights(num_particles))
    if log_evidence is not None:
        return GuideGaps((float(log_evidence), 0.0), best, ours, "given")
    from_guide = isinstance(guide, OverReals)
    if num_temperatures and (from_guide or not posterior.improper):
        annealed = ais(posterior, num_chains=num_chains, num_temperatures=num_temperatures,
                       initial=guide if posterior.improper else "prior", seed=seed, progress=progress)  # fmt: skip
        bounds[f"ais-{num_temperatures}"] = log_mean_weight(annealed.log_weights.double())
    kind, evidence = next(iter(bounds.items()))
    for name, bound in [*bounds.items(), ("best ELBO", best)]:
        more, error = _independent_difference(bound, evidence)
        if more > 2 * error:  # otherwise it may be higher by noise alone
            kind, evidence = name, bound
    return GuideGaps(evidence, best, ours, kind)


@contextlib.contextmanager
def _restoring(guide: Any) -> Iterator[nn.Module | None]:
    """``guide`` if it has parameters, whose values are restored at the end; else None."""
    parameters = [*guide.parameters()] if isinstance(guide, nn.Module) else []
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield guide if parameters else None
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None


def _mean_and_stderr(log_weights: Tensor) -> tuple[float, float]:
    return float(log_weights.mean()), standard_error(log_weights)


def _highest(bounds: dict[str, Tensor]) -> tuple[str, Tensor]:
    """The highest bound on average, and its name; a later bound replaces an earlier one only if it is clearly higher.

    Otherwise the choice among bounds that differ by noise alone would be biased upwards.
    """
    (name, best), *others = bounds.items()
    for other, bound in others:
        more = (bound - best).double()
        if more.mean() > (2 * standard_error(more) if len(more) > 1 else 0):
            name, best = other, bound
    return name, best


def best_elbo(
    program: VAE,
    x: Tensor,
    given: Any = None,
    *,
    gradient_steps: int = 400,
    num_samples: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """The ELBO of the best q in the encoder's family for each datum, in nats, ``(B,)``: see `gaps`.

    Copies of the parameters are optimized, even of frozen ones. An encoder without parameters counts as the best of its
    family.

    Args: as for `gaps`.

    Raises:
        ValueError, TypeError: as for `gaps`.
    """
    return _bounds_of_best_q(program, x, given, gradient_steps, num_samples, seed, progress)[0]


def _bounds_of_best_q(
    program: VAE,
    x: Tensor,
    given: Any,
    gradient_steps: int,
    num_samples: int,
    seed: int,
    progress: bool,
    num_particles: int = 1,
) -> tuple[Tensor, Tensor]:
    """The ELBO of the best q, and the importance-weighted bound by it, ``(B,)`` each."""
    encoder = program.encoder
    free = isinstance(encoder, IndependentConditional) and encoder.network is not None
    plain = free and not program.prior.latents(program.latent_name)
    rate = LEARNING_RATE if plain else FINE_TUNING_RATE
    # The outputs of an encoder are optimized for all data at once, its weights for each datum alone.
    size = len(x) if plain or not _with_own_guide(program)[1] else 1
    found = []
    with tqdm(
        total=gradient_steps * (len(x) // size), desc="best q", unit="step", disable=not progress, leave=False
    ) as bar:
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            row, own = x[rows], rows_of(given, rows)
            local, parameters = _with_local_q(program, row, own) if plain else _with_own_guide(program)
            with noise.per_datum(row, seed):
                if parameters:
                    _ascend(local, row, own, parameters, gradient_steps, rate, bar.update)
                shown = progress and size == len(x)  # with one datum at a time, the bar over the data is enough
                bounds = (
                    _mean_elbo(local, row, own, num_samples, shown),
                    _importance_bound(local, row, own, num_particles, shown),
                )
            found.append(torch.stack(bounds))
    best, weighted = torch.cat(found, -1)
    return best, weighted


def _ascend(
    program: Program,
    x: Tensor,
    given: Any,
    parameters: Sequence[Tensor],
    gradient_steps: int,
    lr: float,
    advance: Callable[[int], Any],
) -> None:
    """Maximize the ELBO over ``parameters``, with all others fixed."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, gradient_steps)
    with differentiating("gaps"):
        for _ in range(gradient_steps):
            bound = elbo(program, x, given, batch=(DRAWS_PER_STEP, len(x)))
            loss = -bound.surrogate.mean(0).sum()
            gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            advance(1)


def _importance_bound(program: Program, x: Tensor, given: Any, num_particles: int, progress: bool) -> Tensor:
    total = num_particles * len(x)
    kind = f"iwae-{num_particles}"
    with tqdm(total=total, desc=kind, unit="particle", unit_scale=True, disable=not progress, leave=False) as bar:
        return importance_bound(program, x, given, num_particles, bar.update)


@torch.no_grad()
def _mean_elbo(program: Program, x: Tensor, given: Any, num_samples: int, progress: bool) -> Tensor:
    chunks = [min(32, num_samples - done) for done in range(0, num_samples, 32)]
    shown = tqdm(chunks, desc="ELBO", unit="32 draws", disable=not progress, leave=False)
    sums = [elbo(program, x, given, batch=(chunk, len(x))).value.sum(0) for chunk in shown]
    return torch.stack(sums).sum(0) / num_samples


def _with_local_q(program: VAE, x: Tensor, given: Any) -> tuple[VAE, list[Tensor]]:
    """The same p, with the encoder's output for each datum as free parameters."""
    encoder: Any = copy.copy(program.encoder)
    read = (x, given) if is_pair(encoder.given_shape) else x
    with torch.no_grad():
        raw = encoder.raw_parameters(read).clone().requires_grad_()
    encoder._modules = {}
    encoder.raw_parameters = lambda _: raw
    return program.replaced(encoder=encoder), [raw]


def _with_own_guide(program: VAE) -> tuple[VAE, list[Tensor]]:
    """The same p with a copy of every encoder, and the parameters of the copies that do not belong to p too."""
    generative = {id(p) for part in (program.prior, program.likelihood) for p in _generative_parameters(part)}
    encoder: Any = copy.deepcopy(program.encoder)
    originals = dict(program.encoder.named_parameters()) if program.encoder is not None else {}
    parameters: list[Tensor] = [
        parameter.requires_grad_()  # a copy, even if the original is frozen
        for name, parameter in encoder.named_parameters()
        if id(originals[name]) not in generative or not _is_hierarchy(program)
    ]
    twin = program.replaced(encoder=encoder)
    if isinstance(program.prior, VAE) and program.prior.encoder is not None:
        twin.prior, above = _with_own_guide(program.prior)
        parameters += above
    return twin, parameters


def _is_hierarchy(program: VAE) -> bool:
    return bool(program.prior.latents(program.latent_name))


def _generative_parameters(part: Program) -> list[nn.Parameter]:
    if isinstance(part, VAE):
        return _generative_parameters(part.prior) + _generative_parameters(part.likelihood)
    return list(part.parameters())
