r"""Comparison of guides: several guides, fitted to one posterior, against reference draws.

For each guide: its ELBO; the evidence by its importance weights, with k-hat and the effective sample size; the error of
its means, in standard deviations of the reference, and of its standard deviations; and two distances between the
draws, in coordinates in which the reference has mean 0 and variance 1. The *sliced Wasserstein* distance is the mean
over directions of the distance of two sorted projections. The *maximum mean discrepancy* is

.. math::
    \mathrm{MMD}^2 = E\, k(u, u') + E\, k(v, v') - 2\, E\, k(u, v), \qquad k(u, v) = e^{-|u - v|^2 / (2 D)} .

Both are computed on batches of draws, whose spread gives the error. The distances between two halves of the reference
are the floor, which a perfect guide would have.

Forward annealing, from the prior to the posterior, bounds log p(y) from below. Reverse annealing bounds it from above
if it starts from exact draws of the posterior. Draws of NUTS are not exact, so for the observed data the second number
is an estimate. For data that the model simulates, the latents that they come from are an exact draw. There both bounds
hold, and their distance bounds the error of annealing on such data.

Sources: Bonneel et al. 2015 (sliced Wasserstein); Gretton et al. 2012 (MMD); Grosse, Ancha and Roy 2016 (arXiv
1606.02275) for annealing back, from draws of a chain and on simulated data.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuide, AutoLaplaceApproximation
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.nn import PyroModule
from torch import Tensor
from tqdm import tqdm

from dgm_pyro.checks import check_count, check_counts, check_number, check_seed, check_type, suggesting
from dgm_pyro.evaluation import log_mean_weight, squared_mmd, standard_error
from dgm_pyro.families.autoguide import PARTICLES, STEPS, AutoConditional, GuidedPosterior, Stacked
from dgm_pyro.families.guides import Fitted, auto
from dgm_pyro.infer.ais import HMC, Sandwich, annealing, bidirectional, temperatures
from dgm_pyro.infer.draws import Draws
from dgm_pyro.infer.mcmc import Chains, nuts
from dgm_pyro.infer.parallel import run_fits
from dgm_pyro.infer.psis import Weighted, psis
from dgm_pyro.jobs import in_this_process
from dgm_pyro.objectives import ELBO, IWAE, chosen
from dgm_pyro.posterior import Posterior, check_posterior
from dgm_pyro.program import Conditional, differentiating, seeded, unchecked
from dgm_pyro.results import Result, Table, element_name, with_error

__all__ = ["GuideComparison", "GuideRow", "compare", "train_guide"]

NUM_PARTICLES = 32
NUM_CHAINS = 16
BATCH = 500
LARGEST_NORM = 100.0
"""Largest norm of a guide's gradient; larger ones are clipped."""
DIRECTIONS = 100
CLOSE_MEAN, CLOSE_SD = 0.1, 0.1
"""A guide is close to the reference if no mean differs by more sds, and no sd by a larger share."""


@dataclass(frozen=True)
class GuideRow:
    """One guide of a `GuideComparison`.

    Attributes:
        name: name of the guide.
        guide: the fitted guide.
        weighted: its draws, their weights and k-hat.
        mean_errors: |mean - reference mean| / reference sd, by latent, of its shape.
        sd_ratios: sd / reference sd, by latent.
        wasserstein, mmd: distances to the reference, each with its standard error.
        seconds: duration of the fit.
        evaluations: number of evaluations of the model's density in the fit.
        restarts: number of fits, of which the best was kept.
        start: number of the fit that was kept, from 0.
    """

    name: str
    guide: Any
    weighted: Weighted
    mean_errors: dict[str, Tensor]
    sd_ratios: dict[str, Tensor]
    wasserstein: tuple[float, float]
    mmd: tuple[float, float]
    seconds: float
    evaluations: int
    restarts: int = 1
    start: int = 0

    @property
    def mean_error(self) -> tuple[float, str]:
        """The largest of `mean_errors`, and its latent."""
        site, place = _largest_place(self.mean_errors)
        return float(self.mean_errors[site][place]), element_name(site, place)

    @property
    def sd_ratio(self) -> tuple[float, str]:
        """The most extreme of `sd_ratios`, as a factor, and its latent."""
        site, place = _largest_place({name: ratio.log().abs() for name, ratio in self.sd_ratios.items()})
        return float(self.sd_ratios[site][place]), element_name(site, place)

    @property
    def close(self) -> bool:
        """Whether means and sds are close to those of the reference."""
        return self.mean_error[0] < CLOSE_MEAN and abs(self.sd_ratio[0] - 1) < CLOSE_SD

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        found: dict[str, Any] = {"guide": self.name, **self.weighted.as_dict()}
        if self.mean_errors:
            found |= {
                "mean_error": self.mean_error[0],
                "sd_ratio": self.sd_ratio[0],
                "wasserstein": self.wasserstein[0],
                "wasserstein_stderr": self.wasserstein[1],
                "mmd": self.mmd[0],
                "mmd_stderr": self.mmd[1],
                "close": self.close,
            }
        return found | {"seconds": self.seconds, "evaluations": self.evaluations, "restarts": self.restarts,
                        "start": self.start}  # fmt: skip


@dataclass(frozen=True)
class GuideComparison(Result):
    """The result of `compare`: a row for each guide.

    Attributes:
        posterior: the `Posterior` that was approximated.
        rows: the guides, in the order given.
        failures: error messages of the guides that could not be fitted, by name.
        reference: reference draws of u, ``(N, D)``; None without a reference.
        chains: the chains of the reference, if `nuts` drew it.
        floor: the distances between halves of the reference, Wasserstein and MMD.
        sandwich: log p(y) by forward and reverse annealing, in nats. The first is a stochastic lower bound; the second,
            from reference draws, is a stochastic upper bound if these are exact, and else an estimate. None without a
            reference, or if the prior is improper.
        sandwich_errors: standard errors of the two.
        simulated: stochastic bounds on both sides for data sets that the model simulates; None if it cannot.
    """

    posterior: Posterior
    rows: tuple[GuideRow, ...]
    failures: dict[str, str]
    reference: Tensor | None
    chains: Chains | None
    floor: tuple[float, float]
    sandwich: tuple[float, float] | None
    sandwich_errors: tuple[float, float] = (math.nan, math.nan)
    simulated: Sandwich | None = None

    def __getitem__(self, name: str) -> GuideRow:
        return next(row for row in self.rows if row.name == name)

    def draws(self) -> Draws | None:
        """The reference's chains, or otherwise the draws of the guide with the lowest k-hat; None without a guide."""
        rows = sorted(self.rows, key=lambda row: float(row.weighted.k_hat))
        return self.chains or (rows[0].weighted if rows else None)

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {
            "posterior": repr(self.posterior),
            "guides": [row.as_dict() for row in self.rows],
            "failures": self.failures,
            "floor": None if self.reference is None else {"wasserstein": self.floor[0], "mmd": self.floor[1]},
            "sandwich": None if self.sandwich is None else list(self.sandwich),
            "sandwich_errors": None if self.sandwich is None else list(self.sandwich_errors),
            "simulated": None if self.simulated is None else {
                "lower": self.simulated.lower.tolist(), "upper": self.simulated.upper.tolist()},
            "chains": None if self.chains is None else self.chains.worst() | {"seconds": self.chains.seconds},
        }  # fmt: skip

    def parts(self) -> list[str | Table]:
        header = ["guide", "ELBO", "log evidence", "ESS", "k-hat"]
        compared = ["mean error", "sd ratio", "Wasserstein", "MMD"] if self.reference is not None else []
        several = ["best start"] if any(row.restarts > 1 for row in self.rows) else []
        rows = []
        for row in self.rows:
            w = row.weighted
            cells = [row.name, f"{w.elbo:.3f}", with_error(float(w.log_evidence), float(w.stderr), 3),
                     f"{w.effective_size:.0f}", f"{w.k_hat:.2f}"]  # fmt: skip
            if compared:
                cells += [f"{row.mean_error[0]:.3f}", f"{row.sd_ratio[0]:.3f}",
                          with_error(*row.wasserstein, 3), with_error(*row.mmd, 3)]  # fmt: skip
            cells += [f"{row.start + 1} of {row.restarts}"] if several else []
            rows.append([*cells, f"{row.seconds:.1f}", f"{row.evaluations}"])
        parts: list[str | Table] = [Table([*header, *compared, *several, "seconds", "evaluations"], rows)]
        if self.reference is not None:
            parts.append(
                f"{len(self.reference)} reference draws; between their halves: Wasserstein {self.floor[0]:.3f}, MMD "
                f"{self.floor[1]:.3f}"
            )
        if self.chains is not None:
            parts.append(f"reference by NUTS: {self.chains.summary()}")
        if self.sandwich is not None:
            lower, back = (with_error(*each, 3) for each in zip(self.sandwich, self.sandwich_errors, strict=True))
            if_exact = "a stochastic upper bound if these are exact"
            kind = if_exact if self.chains is None else "an estimate, no bound: draws of NUTS are not exact"
            parts += [
                f"log evidence by annealing from the prior: {lower} (a stochastic lower bound)",
                f"log evidence by reverse annealing from reference draws: {back} ({kind})",
            ]
        if self.simulated is not None:
            apart = self.simulated.upper - self.simulated.lower
            more = "; more temperatures bring them closer (num_temperatures, --num-temperatures)"
            parts.append(
                f"annealing both ways on {len(apart)} data sets simulated by the model: the stochastic lower and upper "
                f"bounds are {with_error(float(apart.mean()), standard_error(apart), 3)} nats apart"
                f"{more if apart.mean() > 1 else ''}"
            )
        return [*parts, *self.verdict()]

    def verdict(self) -> list[str]:
        """The conclusions about each guide, in words."""
        lines = [f"{name}: could not be fitted: {why}" for name, why in self.failures.items()]
        if self.chains is not None and (doubts := self.chains.faults()):
            lines.append(f"the reference is not reliable: {', '.join(doubts)}; see the diagnostics of dgm.infer.nuts")
        for row in self.rows:
            k_hat, threshold = float(row.weighted.k_hat), row.weighted.threshold
            if row.weighted.reliable:
                weights = f"its weights are reliable (k-hat {k_hat:.2f})"
            else:
                weights = f"it misses a part of the posterior (k-hat {k_hat:.2f}, above {threshold:.2f})"
            if self.reference is None:
                lines.append(f"{row.name}: {weights}")
                continue
            (error, off), (ratio, wide) = row.mean_error, row.sd_ratio
            faults = []
            if error >= CLOSE_MEAN:
                faults.append(f"the mean of {off} is off by {error:.2f} sd")
            if abs(ratio - 1) >= CLOSE_SD:
                faults.append(f"the sd of {wide} is {ratio:.2f} of the reference's")
            lines.append(f"{row.name}: {' and '.join(faults) or 'close to the reference'}; {weights}")
        return lines


def _largest_place(values: Mapping[str, Tensor]) -> tuple[str, tuple[int, ...]]:
    """The name and the index of the largest element."""
    name = max(values, key=lambda name: float(values[name].max()))
    place = torch.unravel_index(values[name].argmax(), values[name].shape)
    return name, tuple(int(i) for i in place)


@suggesting
def train_guide(
    posterior: Posterior,
    guide: Any,
    *,
    objective: Any = None,
    gradient_steps: int = 1000,
    num_particles: int = NUM_PARTICLES,
    lr: float = 0.01,
    restarts: int = 1,
    jobs: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Fit a guide to a posterior, in place.

    Args:
        posterior: the posterior to approximate.
        guide: a guide of `dgm.guides.auto`, or any guide of Pyro. A guide that is a density of all latents together can
            maximize any objective, with the recorded density. Others maximize Pyro's ELBO, through its handlers.
        objective: as for `dgm.fit`, such as ``dgm.IWAE(32)``; default the ELBO of ``num_particles`` draws.
        gradient_steps: steps of Adam; the learning rate falls to zero along a cosine.
        num_particles: draws per step.
        lr: initial learning rate.
        restarts: number of fits, of which the one with the highest mean objective over its last tenth is kept. The
            first starts at the best of several points, each other one at a random point. The guide must be one of
            `dgm.guides.auto` that has never been called; its attribute ``start`` then is the number of the fit that was
            kept, from 0. A q that was passed as an object is copied for each fit.
        jobs: number of processes that run the restarts; with 1, they run in turn. By default all fits take their steps
            at once in this process, under `torch.func.vmap`, if the objective is an ELBO or an IWAE bound and q allows
            it; otherwise the number of `joblib.parallel_config`. With its backend "dask", they run on that cluster.
        seed: seed of all draws; the global random state does not change.
        progress: whether to show a bar.

    Returns:
        The value of the objective at each step, in nats.

    Raises:
        ValueError: the guide can only maximize Pyro's ELBO, or an argument does not fit.
        TypeError: the model or the guide cannot be sent to another process.
    """
    check_posterior(posterior)
    check_type(guide, torch.nn.Module, "guide", "a guide with parameters, as of dgm.guides.auto")
    check_counts(gradient_steps=gradient_steps, num_particles=num_particles, restarts=restarts)
    check_counts(jobs=1 if jobs is None else jobs)
    check_number(lr, "lr", above=0)
    chosen(objective)
    if restarts > 1:
        return _best_fit(posterior, guide, restarts, seed, jobs, progress, objective=objective,
                         gradient_steps=gradient_steps, num_particles=num_particles, lr=lr)  # fmt: skip
    steps = tqdm(range(gradient_steps), desc="fit", unit="step", disable=not progress, leave=False)
    with seeded(seed, posterior.device), unchecked(), differentiating("fit"):
        if isinstance(guide, AutoContinuous) and not isinstance(guide, AutoLaplaceApproximation):
            return _fit_density(posterior, guide, objective, steps, num_particles, lr)
        if objective is not None:
            raise ValueError(f"this {type(guide).__name__} can only be fitted by Pyro's ELBO: leave objective out")
        return _fit_sites(posterior, guide, steps, num_particles, lr)


def _best_fit(
    posterior: Posterior, guide: Any, restarts: int, seed: int, jobs: int | None, progress: bool, **options: Any
) -> list[float]:
    if not isinstance(guide, AutoConditional) or guide.prototype_trace is not None:
        raise ValueError(
            f"restarts is {restarts}, which needs a guide of dgm.guides.auto that has never been called: make a new "
            "guide, or pass restarts=1"
        )
    fits = None
    if jobs is None and in_this_process():
        fits = _fits_at_once(posterior, guide, restarts, seed, progress, **options)
    if fits is None:
        tasks = [(posterior, guide, start, seed, options) for start in range(restarts)]
        fits = run_fits(_fit_from, tasks, jobs, what="restarts", unit="fit", progress=progress)
    best = max(range(restarts), key=lambda start: _last_tenth(fits[start][0]))
    values: list[float] = fits[best][0]
    if guide.prototype_trace is None:  # the fits ran in other processes
        _set_up(posterior, guide, best, seed)
    guide.start = best
    guide.load_state_dict(fits[best][1])
    return values


def _fits_at_once(
    posterior: Posterior,
    guide: AutoConditional,
    restarts: int,
    seed: int,
    progress: bool,
    *,
    objective: Any,
    gradient_steps: int,
    num_particles: int,
    lr: float,
) -> list[tuple[list[float], dict[str, Tensor]]] | None:
    """The results of `_fit_from` for all starts, from fits that take their steps at once; None if q forbids it."""
    maximize = ELBO(num_particles) if objective is None else chosen(objective)
    if type(maximize) not in (ELBO, IWAE) or maximize.leave_one_out:
        return None
    guides = []
    with seeded(seed, posterior.device), unchecked(), differentiating("fit"):
        for start in range(restarts):
            _set_up(posterior, guide, start, seed)
            guides.append((guide.q, guide.loc, guide.factor))
            if start == 0 and not _can_be_stacked(guides):
                return None
        stacked = Stacked(guides)
        draws = maximize.num_samples if isinstance(maximize, ELBO) else maximize.num_particles
        program, x = GuidedPosterior(posterior, stacked, draws * restarts), guides[0][1].new_zeros(restarts)
        steps = tqdm(range(gradient_steps), desc="restarts", unit="step", disable=not progress, leave=False)
        values = _ascend(lambda: maximize(program, x), [*stacked.parameters()], steps, lr, _step_each)
    stacked.unstack()
    found = []
    for each, (q, loc, factor) in zip(torch.stack(values, 1).tolist(), guides, strict=True):
        guide.q, guide.loc, guide.factor = q, loc, factor
        found.append((each, {name: value.clone() for name, value in guide.state_dict().items()}))
    return found


def _can_be_stacked(guides: list[tuple[Conditional, Tensor, Tensor]]) -> bool:
    """Whether `torch.func.vmap` can map q, which may read values or define its own gradient."""
    try:
        Stacked(guides).get_posterior().rsample((2,))
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def _ascend(
    bound: Callable[[], Any],
    parameters: list[Tensor],
    steps: Any,
    lr: float,
    step: Callable[[torch.optim.Optimizer, list[Tensor]], None],
) -> list[Tensor]:
    """The values of a bound as Adam maximizes it, ``(B,)`` each; the learning rate falls to zero on a cosine."""
    optimizer = torch.optim.Adam(parameters, lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    values = []
    for _ in steps:
        optimizer.zero_grad()
        found = bound()
        (-found.surrogate.sum()).backward()
        step(optimizer, parameters)
        decay.step()
        values.append(found.value.detach())
    return values


def _step(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    """A step on the clipped gradient; none where it is not finite."""
    torch.nn.utils.clip_grad_norm_(parameters, LARGEST_NORM, error_if_nonfinite=False)
    if all(p.grad is None or bool(p.grad.isfinite().all()) for p in parameters):
        optimizer.step()


def _step_each(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
    """`_step` for stacked fits: a fit whose gradient is not finite does not move."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(
        [gradient.reshape(len(gradient), gradient[0].numel()).norm(dim=1) for gradient in gradients]
    ).norm(dim=0)
    still = ~norms.isfinite()
    before = [p.detach()[still] for p in parameters]
    for gradient in gradients:
        share = (LARGEST_NORM / (norms + 1e-6)).clamp(max=1).reshape(-1, *(1,) * (gradient.dim() - 1))
        gradient.mul_(share)[still] = 0
    optimizer.step()
    with torch.no_grad():
        for p, value in zip(parameters, before, strict=True):
            p[still] = value


def _fit_from(
    posterior: Posterior, guide: Any, start: int, seed: int, options: dict[str, Any]
) -> tuple[list[float], dict[str, Tensor]]:
    """One of the fits: the objective at each step, and the state of the guide."""
    _set_up(posterior, guide, start, seed)
    values = train_guide(posterior, guide, seed=(seed + start) % 2**64, **options)
    return values, {name: value.clone() for name, value in guide.state_dict().items()}


def _set_up(posterior: Posterior, guide: AutoConditional, start: int, seed: int) -> None:
    guide.start = start
    with seeded((seed + start) % 2**64, posterior.device):
        guide._setup_prototype(*posterior.args, **posterior.kwargs)
    guide.q = copy.deepcopy(guide.q)  # every fit starts from a q that was passed as an object


def _last_tenth(values: list[float]) -> float:
    """The mean over the last tenth of the steps; minus infinity for a fit that ended in NaN."""
    last = values[-max(1, len(values) // 10) :]
    mean = sum(last) / len(last)
    return -math.inf if math.isnan(mean) else mean


def _fit_density(
    posterior: Posterior, guide: AutoContinuous, objective: Any, steps: Any, num_particles: int, lr: float
) -> list[float]:
    if guide.prototype_trace is None:
        guide(*posterior.args, **posterior.kwargs)
    program, x = GuidedPosterior(posterior, guide, num_particles), torch.zeros(1, device=posterior.device)
    program.log_weights(x)  # some guides of Pyro make their parameters at the first draw
    maximize = chosen("elbo" if objective is None else objective)
    maximize = type(maximize)(num_particles) if objective is None else maximize
    values = _ascend(lambda: maximize(program, x), [*guide.parameters()], steps, lr, _step)
    return torch.stack(values).mean(1).tolist()


def _fit_sites(posterior: Posterior, guide: Any, steps: Any, num_particles: int, lr: float) -> list[float]:
    elbo: Any = (TraceEnum_ELBO if posterior.enumerated else Trace_ELBO)(num_particles=max(1, num_particles // 8))
    model = pyro.infer.config_enumerate(posterior.model) if posterior.enumerated else posterior.model
    guide(*posterior.args, **posterior.kwargs)  # it makes its parameters
    optimizer = torch.optim.Adam(guide.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    values = []
    for _ in steps:
        optimizer.zero_grad()
        loss = elbo.differentiable_loss(model, guide, *posterior.args, **posterior.kwargs)
        loss.backward()
        optimizer.step()
        decay.step()
        values.append(-float(loss.detach()))
    return values


OF_SEVERAL = ("realnvp", "nsf", "mixture")
"""Families of `dgm.guides.auto` that need two latents."""


def default_guides(posterior: Posterior) -> tuple[str, ...]:
    """Names of the guides that `compare` fits by default; couplings need two latents."""
    return ("meanfield", "fullrank", "realnvp", "nsf") if posterior.D > 1 else ("meanfield", "planar")


@suggesting
def compare(
    model: Callable[..., Any] | Posterior,
    *args: Any,
    guides: Sequence[Any] | None = None,
    reference: Any = "nuts",
    objective: Any = None,
    gradient_steps: int = 1000,
    num_particles: int = NUM_PARTICLES,
    lr: float = 0.01,
    restarts: int = 1,
    num_samples: int = 4000,
    num_temperatures: int = 100,
    num_data: int = 4,
    jobs: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> GuideComparison:
    """Fit several guides to the posterior of a Pyro model, and compare them with a reference.

    Args:
        model: a Pyro model, called with ``args``; or a `Posterior`, for a model with named arguments.
        guides: names and classes that `dgm.guides.auto` knows, conditionals, or guides. An AutoGuide that has never
            been called is fitted; any other guide is used without fitting it. Default: meanfield, fullrank, realnvp
            and nsf; for one latent, meanfield and planar.
        reference: "nuts" to draw four chains; draws by latent, ``(N, *site_shape)``; or None.
        objective, gradient_steps, num_particles, lr: options of `train_guide`.
        restarts: fits of each guide, of which the best is kept, as in `train_guide`; a guide that is not one of
            `dgm.guides.auto` has one.
        num_samples: draws of each guide, and of the reference by NUTS.
        num_temperatures: number of temperatures of annealing, forward from the prior and in reverse from the reference;
            0 leaves it out, and it is left out for an improper prior. Forward annealing gives a stochastic lower bound.
            Reverse annealing gives a stochastic upper bound if the reference draws are exact; those of NUTS are not.
        num_data: number of data sets that the model simulates, for which both directions give stochastic bounds. 0
            leaves them out, and they are left out for a model that cannot simulate data.
        jobs: number of processes that run the restarts, as in `train_guide`.
        seed: seed of all draws; the global random state does not change.
        progress: whether to show bars.

    Raises:
        TypeError, ValueError: ``model`` is no Pyro model, or a guide or another argument does not fit.

    >>> import torch, pyro, pyro.distributions as dist, dgm_pyro as dgm
    >>> def model(y):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    >>> table = dgm.infer.compare(model, torch.tensor(1.0), guides=["fullrank"], reference=None, gradient_steps=50)
    >>> table["fullrank"].close if table.reference is not None else table["fullrank"].weighted.k_hat < 0.7
    tensor(True)
    """
    if isinstance(model, Posterior) and args:
        raise TypeError("a Posterior has its data already: leave out the arguments after it; guides=[...] is by name")
    posterior = model if isinstance(model, Posterior) else Posterior(model, *args)
    if guides is None:
        guides = default_guides(posterior)
    check_count(num_samples, "num_samples", at_least=100)
    check_count(num_temperatures, "num_temperatures", at_least=0)
    check_count(num_data, "num_data", at_least=0)
    check_counts(restarts=restarts, jobs=1 if jobs is None else jobs)
    check_seed(seed)
    chosen(objective)
    if isinstance(guides, str) or not isinstance(guides, Sequence) or not guides:
        raise TypeError(f"guides must be a list of guides, such as ['meanfield', 'nsf'], got {guides!r}")
    for guide in guides:
        if is_choice(guide):
            auto(posterior.model, guide)  # reports an unknown name before the chains are drawn
        if posterior.D == 1 and guide in OF_SEVERAL:
            raise ValueError(f"guide {guide!r} needs two latents, but the model has one: use meanfield or planar")
    chains, draws = _reference_draws(posterior, reference, num_samples, seed, progress)
    options: Any = {"objective": objective, "gradient_steps": gradient_steps, "num_particles": num_particles, "lr": lr,
                    "restarts": restarts, "jobs": jobs}  # fmt: skip
    rows, failures = list[GuideRow](), dict[str, str]()
    for guide in guides:
        try:
            rows.append(_guide_row(posterior, guide, draws, num_samples, seed, progress, options))
        except RuntimeError as error:  # such as a matrix without a factorization: other guides are still fitted
            failures[name_of(guide)] = str(error).split("\n")[0]
    floor = (0.0, 0.0)
    if draws is not None:
        with seeded(seed, posterior.device):
            mixed = draws[torch.randperm(len(draws), device=draws.device)]
            floor = tuple(value for value, _ in _distances(mixed[::2], mixed[1::2]))  # type: ignore[assignment]
    sandwich, errors, simulated = None, (math.nan, math.nan), None
    if num_temperatures and not posterior.improper:
        with contextlib.suppress(ValueError):  # the data are impossible at draws from the prior
            if draws is not None:
                sandwich, errors = _anneal_both_ways(posterior, draws, num_temperatures, seed, progress)
        with contextlib.suppress(ValueError):  # the model cannot simulate data
            if num_data:
                simulated = bidirectional(posterior, num_data, num_chains=NUM_CHAINS,
                                          num_temperatures=num_temperatures, seed=seed, progress=progress)  # fmt: skip
    return GuideComparison(posterior, tuple(rows), failures, draws, chains, floor, sandwich, errors, simulated)


def _reference_draws(
    posterior: Posterior, reference: Any, num_samples: int, seed: int, progress: bool
) -> tuple[Chains | None, Tensor | None]:
    if reference is None:
        return None, None
    if isinstance(reference, str) and reference == "nuts":
        chains = nuts(posterior, num_samples=math.ceil(num_samples / 4), warmup=500, seed=seed, progress=progress)
        return chains, chains.u.flatten(0, 1).to(posterior.device)
    if not isinstance(reference, Mapping):
        raise TypeError(
            f"reference must be 'nuts', draws of the latents by name, or None, got {type(reference).__name__}"
        )
    with torch.no_grad():
        return None, posterior.unconstrain(reference)


def _guide_row(
    posterior: Posterior,
    guide: Any,
    draws: Tensor | None,
    num_samples: int,
    seed: int,
    progress: bool,
    options: dict[str, Any],
) -> GuideRow:
    name, began = name_of(guide), time.perf_counter()
    guide, evaluations, restarts = fitted(posterior, guide, seed=seed, progress=progress, **options)
    kept = (restarts, guide.start if restarts > 1 else 0)
    seconds = time.perf_counter() - began
    weighted = psis(posterior, guide=guide, num_particles=num_samples, seed=seed)
    if draws is None:
        return GuideRow(name, guide, weighted, {}, {}, (math.nan, math.nan), (math.nan, math.nan), seconds, evaluations,
                        *kept)  # fmt: skip
    with torch.no_grad(), seeded(seed, posterior.device):
        ours, theirs = posterior.constrain(weighted.u), posterior.constrain(draws)  # type: ignore[arg-type]
        scales = {site: value.std(0) for site, value in theirs.items()}
        errors = {site: (ours[site].mean(0) - theirs[site].mean(0)).abs() / scales[site] for site in ours}
        ratios = {site: ours[site].std(0) / scales[site] for site in ours}
        wasserstein, mmd = _distances(weighted.u, draws)  # type: ignore[arg-type]
    return GuideRow(name, guide, weighted, errors, ratios, wasserstein, mmd, seconds, evaluations, *kept)


def fitted(
    posterior: Posterior, guide: Any, *, restarts: int = 1, seed: int = 0, progress: bool = False, **options: Any
) -> tuple[Any, int, int]:
    """The fitted guide for a name or an AutoGuide that has never been called; any other guide without fitting it.

    Args:
        restarts: number of fits of a guide of `dgm.guides.auto`; other guides have one.
        options: options of `train_guide`.

    Returns:
        The guide, the number of evaluations of the model's density, and the number of fits.
    """
    made, evaluations = is_choice(guide), 0
    with _keeping_parameters(posterior.model, made):
        if made:
            guide = auto(posterior.model, guide)
        new = isinstance(guide, AutoGuide) and guide.prototype_trace is None
        restarts = restarts if new and isinstance(guide, AutoConditional) else 1
        if new:
            values = train_guide(posterior, guide, restarts=restarts, seed=seed, progress=progress, **options)
            evaluations = len(values) * options.get("num_particles", NUM_PARTICLES)
            evaluations += 2 * STEPS * PARTICLES if isinstance(guide, AutoConditional) else 0
            if isinstance(guide, AutoLaplaceApproximation):
                guide = guide.laplace_approximation(*posterior.args, **posterior.kwargs)
    guide = Fitted(guide) if made and not isinstance(guide, AutoContinuous) else guide
    return guide, evaluations * restarts, restarts


@contextlib.contextmanager
def _keeping_parameters(model: Any, local: bool) -> Iterator[None]:
    """Let guides made here hold their parameters themselves: in the param store, equal names would share them."""
    context: Any = model._pyro_context if local and isinstance(model, PyroModule) else None
    lacking = context is not None and not hasattr(context, "param_state")
    if lacking:  # Pyro makes it only in modules that are built while parameters are local
        context.param_state = {"params": {}, "constraints": {}}
    try:
        with pyro.settings.context(module_local_params=local):
            yield
    finally:
        if lacking:
            del context.param_state


def is_choice(guide: Any) -> bool:
    """Whether ``guide`` is a choice for `dgm.guides.auto`, and not a guide itself."""
    return isinstance(guide, str | Conditional) or (isinstance(guide, type) and issubclass(guide, AutoGuide))


def name_of(guide: Any) -> str:
    """The name of a guide in the table."""
    return guide if isinstance(guide, str) else getattr(guide, "__name__", type(guide).__name__)


def _distances(u: Tensor, reference: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """Sliced Wasserstein distance and MMD, each a mean over batches with its standard error."""
    center, scale = reference.mean(0), reference.std(0)
    directions = torch.nn.functional.normalize(
        torch.randn(u.shape[1], DIRECTIONS, dtype=u.dtype, device=u.device), dim=0
    )
    number = max(2, min(len(u), len(reference)) // BATCH)
    size = min(len(u), len(reference)) // number
    found = []
    for i in torch.randperm(number):
        a, b = ((value[i * size : (i + 1) * size] - center) / scale for value in (u, reference))
        sliced = ((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean()
        found.append(torch.stack([sliced, squared_mmd(a, b, _gaussian)]))
    each = torch.stack(found).double()
    means, errors = each.mean(0), each.std(0) / math.sqrt(number)
    mmd = float(means[1].clamp_min(0).sqrt())
    return (float(means[0]), float(errors[0])), (mmd, float(errors[1]) / max(2 * mmd, float(errors[1]) ** 0.5))


def _gaussian(x: Tensor, y: Tensor) -> Tensor:
    """The Gaussian kernel of every pair, with a width that grows with the number of dimensions."""
    return (-torch.cdist(x, y).square() / (2 * x.shape[1])).exp()


def _anneal_both_ways(
    posterior: Posterior, draws: Tensor, num_temperatures: int, seed: int, progress: bool, num_chains: int = NUM_CHAINS
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The log evidence by forward annealing and by reverse annealing from reference draws; their standard errors.

    Raises:
        ValueError: the data have density 0 at draws from the prior.
    """
    betas, transition, num_chains = temperatures(num_temperatures), HMC(), min(num_chains, len(draws))
    with annealing(posterior, None, None, num_chains, "prior", {}, seed) as path:
        step_sizes = path.adapt(betas, transition, 0.65, progress)
        _, forward, _ = path.anneal(path.start(), betas, step_sizes, transition, progress)
        chosen_draws = draws[torch.randperm(len(draws), device=draws.device)[:num_chains]].unsqueeze(1)
        _, backward, _ = path.anneal(chosen_draws, betas, step_sizes, transition, progress, reverse=True)
    (lower, error), (inverse, other) = log_mean_weight(forward.squeeze(1)), log_mean_weight(backward.squeeze(1))
    return (lower, -inverse), (error, other)
