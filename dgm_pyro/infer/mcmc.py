r"""Markov chain Monte Carlo: draws from a posterior by the No-U-Turn sampler.

From a point u with a momentum :math:`p \sim N(0, M)`, leapfrog steps of

.. math::
    \dot u = M^{-1} p, \qquad \dot p = \nabla \log p(u, y), \qquad
    H(u, p) = -\log p(u, y) + \tfrac{1}{2} p^\top M^{-1} p

double a trajectory forwards or backwards until it turns around. The next draw is one of its points, drawn in proportion
to :math:`e^{-H}`. During the warm-up, dual averaging adapts the step size to the acceptance rate, and the diagonal of
:math:`M^{-1}` is set to the variances of the draws, in windows of growing length.

The chains are independent, and each has its own tree. But the density and its gradient are evaluated for all chains in
one call of tensor operations without Pyro's handlers (`Posterior.compiled`), so four chains cost little more than one.

Sources: Hoffman and Gelman 2014 (arXiv 1111.4246); Betancourt 2017 (arXiv 1701.02434), appendix A, for the multinomial
draws and the turns between subtrees; Carpenter et al. 2017 (Stan), for the windows; Vehtari et al. 2021 (arXiv
1903.08008) for R-hat and the effective sample sizes, which ArviZ computes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from dgm_pyro.checks import check_counts, check_number, check_seed, suggesting
from dgm_pyro.evaluation import evaluating
from dgm_pyro.infer.draws import Draws, find_arviz
from dgm_pyro.infer.posterior import Coordinates, check_target, joint_trace, with_latent_chains
from dgm_pyro.posterior import Posterior
from dgm_pyro.program import Program, batch_plates, differentiating, seeded
from dgm_pyro.results import Result, Table, element_name

__all__ = ["Chains", "nuts"]

Array = np.ndarray[Any, np.dtype[np.float64]]
Walk = Generator[Array | None, tuple[float, Array], Any]
DIVERGENT = 1000.0  # an error of H beyond which a trajectory counts as divergent (Stan)
MAX_R_HAT, MIN_ESS, MIN_BFMI = 1.01, 100, 0.3  # the effective size is per chain (Vehtari et al.; Stan)


@dataclass(frozen=True)
class Chains(Result, Draws):
    """The result of `nuts`; ``chains[name]`` has the draws of a latent from all chains, ``(C * S, *site_shape)``.

    Attributes:
        samples: draws of each latent and each `pyro.deterministic` site, ``(C, S, *site_shape)``.
        u: the same draws as unconstrained vectors, ``(C, S, D)``.
        diverging: whether each trajectory diverged, because the density is too steep for the step size, ``(C, S)``.
        tree_depth: number of doublings of each trajectory, ``(C, S)``.
        energy: H, in nats, ``(C, S)``.
        step_size: step size of each chain, ``(C,)``.
        evaluations: number of evaluations of the density and its gradient in all chains, including the warm-up.
        seconds: duration of the sampling.
        posterior: the `Posterior` that was drawn from; None for a `Program`.
    """

    samples: dict[str, Tensor]
    u: Tensor
    diverging: Tensor
    tree_depth: Tensor
    energy: Tensor
    step_size: Tensor
    evaluations: int
    seconds: float
    posterior: Posterior | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.samples[name].flatten(0, 1)

    def _vectors(self, posterior: Posterior) -> Tensor:
        return self.u.to(posterior.device)

    def _statistics(self) -> dict[str, Tensor]:
        return {"diverging": self.diverging, "tree_depth": self.tree_depth, "energy": self.energy}

    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """By name and site: mean, sd, and ArviZ's r_hat, ess_bulk, ess_tail, each of the site's shape."""
        arviz = find_arviz()
        data = {name: value.numpy() for name, value in self.samples.items()}
        values = arviz.convert_to_dataset(data)
        found = {
            "mean": {name: value.mean((0, 1)) for name, value in self.samples.items()},
            "sd": {name: value.flatten(0, 1).std(0) for name, value in self.samples.items()},
        }
        measures = {"ess_bulk": arviz.ess(values, method="bulk"), "ess_tail": arviz.ess(values, method="tail"),
                    "r_hat": arviz.rhat(values)}  # fmt: skip
        for name, measured in measures.items():
            found[name] = {site: torch.as_tensor(np.asarray(measured[site])) for site in self.samples}
        return found

    @property
    def bfmi(self) -> Tensor:
        """The energy Bayesian fraction of missing information of each chain, ``(C,)``; chains below 0.3 mix badly."""
        steps = self.energy.diff(dim=-1).square().mean(-1)
        return steps / self.energy.var(-1)

    def worst(self) -> dict[str, Any]:
        """The worst diagnostics over latents and chains: r_hat, ess_bulk, divergences and bfmi.

        Sites of `pyro.deterministic` are left out, because they may be constant. Without ArviZ, r_hat and ess_bulk are
        None.
        """
        found: dict[str, Any] = {"r_hat": None, "ess_bulk": None}
        names = self.samples if self.posterior is None else self.posterior.names
        with contextlib.suppress(ImportError):
            measured = self.diagnostics()
            # Not Python's max and min, which drop the NaN of a chain that does not move.
            found["r_hat"] = float(torch.stack([measured["r_hat"][name].max() for name in names]).max())
            found["ess_bulk"] = float(torch.stack([measured["ess_bulk"][name].min() for name in names]).min())
        return found | {"divergences": int(self.diverging.sum()), "bfmi": float(self.bfmi.min())}

    def faults(self) -> list[str]:
        """Why the draws are not reliable, in words; empty if all diagnostics are good."""
        worst, ess = self.worst(), MIN_ESS * len(self.u)
        found = []
        if worst["r_hat"] is not None and not worst["r_hat"] <= MAX_R_HAT:
            found.append(f"R-hat is {worst['r_hat']:.3f}, above {MAX_R_HAT}")
        if worst["ess_bulk"] is not None and not worst["ess_bulk"] >= ess:
            found.append(f"the bulk ESS is {worst['ess_bulk']:.0f}, below {ess}")
        if worst["divergences"]:
            found.append(f"divergent trajectories: {worst['divergences']}")
        if not worst["bfmi"] >= MIN_BFMI:
            found.append(f"E-BFMI is {worst['bfmi']:.2f}, below {MIN_BFMI}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {
            **{
                name: {site: value.tolist() for site, value in sites.items()}
                for name, sites in self.diagnostics().items()
            },
            "num_chains": len(self.u),
            "num_samples": self.u.shape[1],
            "divergences": int(self.diverging.sum()),
            "bfmi": self.bfmi.tolist(),
            "max_tree_depth": int(self.tree_depth.max()),
            "step_size": self.step_size.tolist(),
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }

    def parts(self) -> list[str | Table]:
        found, rows = self.diagnostics(), []
        for site, mean in found["mean"].items():
            for index in np.ndindex(*mean.shape):
                name = element_name(site, index)
                numbers = [float(found[measure][site][index]) for measure in ("mean", "sd", "ess_bulk", "ess_tail")]
                row = [f"{numbers[0]:.3f}", f"{numbers[1]:.3f}", f"{numbers[2]:.0f}", f"{numbers[3]:.0f}"]
                rows.append([name, *row, f"{float(found['r_hat'][site][index]):.3f}"])
        return [Table(["latent", "mean", "sd", "bulk ESS", "tail ESS", "R-hat"], rows), self.summary()]

    def summary(self) -> str:
        """`worst` and the cost, in one line."""
        worst, (chains, size) = self.worst(), self.u.shape[:2]
        mixing = "" if worst["r_hat"] is None else (
            f"R-hat at most {worst['r_hat']:.3f}, bulk ESS at least {worst['ess_bulk']:.0f}, ")  # fmt: skip
        return (
            f"{chains} chains of {size} draws, {worst['divergences']} divergences, {mixing}E-BFMI at least "
            f"{worst['bfmi']:.2f}, {self.evaluations} gradients, {self.seconds:.1f} s"
        )


@suggesting
def nuts(
    program: Program | Posterior,
    x: Tensor | None = None,
    num_samples: int = 500,
    warmup: int = 300,
    given: Any = None,
    *,
    num_chains: int = 4,
    observed: Mapping[str, Tensor] | None = None,
    max_tree_depth: int = 8,
    target_acceptance: float = 0.8,
    compile: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Chains:
    """Draw from p(latents | x, given) with the No-U-Turn sampler.

    The cost is up to ``2 ** max_tree_depth`` gradients per draw. It is meant for a `Posterior`, or for a `Program` with
    tens of data and tens of latents.

    Args:
        program: a `Posterior`; or a `Program` with continuous latents, whose diffusions are unrolled.
        x: ``(B, *event_shape)``, the data of a `Program`; a `Posterior` has its own.
        num_samples: S, draws of each chain after the warm-up.
        warmup: draws of each chain that are discarded while step size and mass matrix are adapted.
        given: ``(B, *given_shape)`` for a conditional program.
        num_chains: C; at least 2 for an R-hat.
        observed: further observed sites, such as labels.
        max_tree_depth: longest trajectory, as a power of two.
        target_acceptance: acceptance rate to which the step size is adapted; raise it if trajectories diverge.
        compile: whether `torch.compile` fuses the density, which takes about ten seconds before the first draw and pays
            off for many draws: see `Posterior.compiled`.
        seed: seed of all draws; the global random state does not change.
        progress: whether to show a bar.

    Raises:
        ValueError: a latent is discrete, there are no latents, or an argument does not fit.

    >>> import torch, pyro, pyro.distributions as dist, dgm_pyro as dgm
    >>> def model(y):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(loc, 1.0).expand([len(y)]).to_event(1), obs=y)
    >>> dgm.infer.nuts(dgm.Posterior(model, torch.ones(3)), num_samples=20, warmup=20)["loc"].shape
    torch.Size([80])
    """
    check_target(program, x)
    check_counts(num_samples=num_samples, warmup=warmup, num_chains=num_chains, max_tree_depth=max_tree_depth)
    check_number(target_acceptance, "target_acceptance", above=0, at_most=1)
    check_seed(seed)
    options: Any = (num_samples, warmup, num_chains, max_tree_depth, target_acceptance, compile, seed, progress)
    if isinstance(program, Posterior):
        return _sample_chains(program, *options)
    program.check(x, given)
    with evaluating(program), seeded(seed, x.device), differentiating("nuts"):  # type: ignore[union-attr]
        return replace(_sample_chains(_posterior_of(program, x, given, observed or {}), *options), posterior=None)


def _posterior_of(program: Program, x: Any, given: Any, observed: Mapping[str, Tensor]) -> Posterior:
    """The joint posterior of the latents of all data."""
    chain, batch = with_latent_chains(program), (len(x),)
    with torch.no_grad():  # raises if the latents do not fit
        Coordinates(joint_trace(chain, x, given=given, batch=batch, observed=observed), batch)

    def model() -> None:
        with poutine.condition(data=dict(observed)), batch_plates(batch):
            chain.joint(chain.variable, x, given)

    return Posterior(model)


def _sample_chains(
    posterior: Posterior,
    num_samples: int,
    warmup: int,
    num_chains: int,
    max_tree_depth: int,
    target_acceptance: float,
    compile: bool,
    seed: int,
    progress: bool,
) -> Chains:
    began = time.perf_counter()
    try:
        start = posterior.initial(num_chains, seed=seed)
    except ValueError as error:
        raise ValueError(f"NUTS found no latents with a positive density of the data: {error}") from error
    walks = [
        _chain_coroutine(
            place, num_samples, warmup, max_tree_depth, target_acceptance, np.random.default_rng([seed, chain])
        )
        for chain, place in enumerate(start.double().cpu().numpy())
    ]
    with tqdm(total=(num_samples + warmup) * num_chains, desc="nuts", unit="draw", disable=not progress) as bar:
        ends, evaluations = _walk_together(walks, posterior.compiled(num_chains, compile), start, bar.update)
    u, energy, diverging, depth, step = (torch.as_tensor(np.stack(part)) for part in zip(*ends, strict=True))
    u = u.to(start)
    with torch.no_grad():
        samples = {name: value.cpu() for name, value in posterior.constrain(u, deterministic=True).items()}
    seconds = time.perf_counter() - began
    return Chains(samples, u.cpu(), diverging, depth, energy, step, evaluations, seconds, posterior)


def _walk_together(
    walks: Sequence[Walk],
    density: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    advance: Callable[[int], Any],
) -> tuple[list[Any], int]:
    """Run the chains with joint evaluations of the density; the result of each, and the number of evaluations."""
    first: list[Any] = [next(walk) for walk in walks]
    places, ends, evaluations = np.stack(first), dict[int, Any](), 0
    while len(ends) < len(walks):
        value, gradient = density(torch.as_tensor(places).to(start))
        values, gradients = value.double().cpu().tolist(), gradient.double().cpu().numpy()
        evaluations += len(walks) - len(ends)
        for i, walk in enumerate(walks):
            if i in ends:
                continue
            try:
                place = walk.send((values[i], gradients[i]))
                if place is None:  # a draw is complete
                    advance(1)
                    place = next(walk)
                places[i] = place
            except StopIteration as end:
                ends[i] = end.value
    return [ends[i] for i in range(len(walks))], evaluations


# -- one chain ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    u: Array
    p: Array
    value: float
    gradient: Array


@dataclass(frozen=True)
class _Tree:
    """A trajectory: its ends in the order of time, and the point drawn from it."""

    first: _Point
    last: _Point
    drawn: _Point
    log_weight: float  # log of the sum of e^(H_0 - H) over all points
    momentum: Array  # the sum over all points
    acceptance: float  # the sum over all points
    size: int
    turning: bool = False
    diverging: bool = False

    @property
    def over(self) -> bool:
        return self.turning or self.diverging


@dataclass
class _Metric:
    step: float
    variance: Array  # the diagonal of the inverse of M

    def turns(self, momentum: Array, first: Array, last: Array) -> bool:
        velocity = self.variance * momentum
        return bool(velocity @ first <= 0 or velocity @ last <= 0)

    def level(self, value: float, p: Array) -> float:
        """-H."""
        return value - 0.5 * float(p @ (self.variance * p))


def _chain_coroutine(
    u: Array, num_samples: int, warmup: int, max_tree_depth: int, target: float, random: np.random.Generator
) -> Walk:
    """A chain as a coroutine: it yields points and receives the density and its gradient there; None ends a draw."""
    metric = _Metric(1.0, np.ones_like(u))
    value, gradient = yield u
    adaptation = _DualAveraging(target)
    metric.step = yield from _first_step(u, value, gradient, metric, random)
    adaptation.restart(metric.step)
    windows, seen = _windows(warmup), list[Array]()
    draws, energies, divergences, depths = [], [], [], []
    for i in range(warmup + num_samples):
        p = random.standard_normal(len(u)) / np.sqrt(metric.variance)
        point = _Point(u, p, value, gradient)
        level = metric.level(value, p)
        tree, depth = _Tree(point, point, point, 0.0, p, 0.0, 0), 0
        while depth < max_tree_depth and not tree.over:
            forwards = bool(random.random() < 0.5)
            more = yield from _grow(tree.last if forwards else tree.first, forwards, depth, metric, level, random)
            tree, depth = _join(tree, more, forwards, metric, random, biased=True), depth + 1
        u, value, gradient = tree.drawn.u, tree.drawn.value, tree.drawn.gradient
        acceptance = tree.acceptance / tree.size
        if i < warmup:
            metric.step = adaptation.update(acceptance)
            if windows and windows[0][0] <= i:
                seen.append(u)
            if windows and i + 1 == windows[0][1]:
                windows.pop(0)
                metric.variance = _regularized(np.stack(seen))
                seen.clear()
                metric.step = yield from _first_step(u, value, gradient, metric, random)
                adaptation.restart(metric.step)
            if i + 1 == warmup:
                metric.step = adaptation.final
        else:
            draws.append(u)
            energies.append(-metric.level(value, tree.drawn.p))
            divergences.append(tree.diverging)
            depths.append(depth)
        yield None
    return np.stack(draws), np.array(energies), np.array(divergences), np.array(depths), metric.step


def _leapfrog(point: _Point, step: float, metric: _Metric) -> Walk:
    half = point.p + step / 2 * point.gradient
    u = point.u + step * metric.variance * half
    value, gradient = yield u
    return _Point(u, half + step / 2 * gradient, value, gradient)


def _grow(
    point: _Point, forwards: bool, depth: int, metric: _Metric, level: float, random: np.random.Generator
) -> Walk:
    """A trajectory of 2 ** depth points that continues from ``point``."""
    if depth == 0:
        new = yield from _leapfrog(point, metric.step if forwards else -metric.step, metric)
        gain = metric.level(new.value, new.p) - level
        if not math.isfinite(gain):  # a divergent point is not used
            return _Tree(point, point, point, -math.inf, point.p, 0.0, 1, diverging=True)
        return _Tree(new, new, new, gain, new.p, math.exp(min(0.0, gain)), 1, diverging=gain < -DIVERGENT)
    near = yield from _grow(point, forwards, depth - 1, metric, level, random)
    if near.over:
        return near
    far = yield from _grow(near.last if forwards else near.first, forwards, depth - 1, metric, level, random)
    return _join(near, far, forwards, metric, random)


def _join(
    near: _Tree, far: _Tree, forwards: bool, metric: _Metric, random: np.random.Generator, biased: bool = False
) -> _Tree:
    """Join two trajectories. The draw of the result is one of theirs, by weight; ``biased`` prefers the far one.

    If the far trajectory turns or diverges, the whole ends, and no point of the far one is drawn.
    """
    acceptance, size = near.acceptance + far.acceptance, near.size + far.size
    before, after = (near, far) if forwards else (far, near)
    total = float(np.logaddexp(near.log_weight, far.log_weight))
    odds = far.log_weight - (near.log_weight if biased else total)
    moved = not far.over and random.random() < math.exp(min(0.0, odds))
    momentum = near.momentum + far.momentum
    turning = (
        far.turning
        or metric.turns(momentum, before.first.p, after.last.p)
        or metric.turns(before.momentum + after.first.p, before.first.p, after.first.p)
        or metric.turns(after.momentum + before.last.p, before.last.p, after.last.p)
    )
    drawn = far.drawn if moved else near.drawn
    return _Tree(before.first, after.last, drawn, total, momentum, acceptance, size, turning, far.diverging)


# -- the warm-up -------------------------------------------------------------------------------------------------------


def _first_step(u: Array, value: float, gradient: Array, metric: _Metric, random: np.random.Generator) -> Walk:
    """A step size at which about 80 % of single steps are accepted, found by doubling or halving."""
    step, direction = metric.step, 0
    for _ in range(50):
        p = random.standard_normal(len(u)) / np.sqrt(metric.variance)
        new = yield from _leapfrog(_Point(u, p, value, gradient), step, metric)
        gain = metric.level(new.value, new.p) - metric.level(value, p)
        longer = 1 if gain > math.log(0.8) else -1
        if direction not in (0, longer):
            break
        direction = longer
        step *= 2.0**direction
    return step


class _DualAveraging:
    """Step sizes that bring the mean acceptance to a target (Hoffman and Gelman 2014, algorithm 6)."""

    def __init__(self, target: float):
        self.target = target

    def restart(self, step: float) -> None:
        self.center, self.error, self.mean, self.count = math.log(10 * step), 0.0, 0.0, 0

    def update(self, acceptance: float) -> float:
        self.count += 1
        share = 1 / (self.count + 10)
        self.error = (1 - share) * self.error + share * (self.target - acceptance)
        log_step = self.center - math.sqrt(self.count) / 0.05 * self.error
        weight = self.count**-0.75
        self.mean = weight * log_step + (1 - weight) * self.mean
        return math.exp(log_step)

    @property
    def final(self) -> float:
        return math.exp(self.mean)


def _windows(warmup: int) -> list[tuple[int, int]]:
    """Start and end of the windows in which variances are estimated: 25 draws, 50, 100, ..., as in Stan.

    They leave out the first 15 % and the last 10 % of the warm-up, in which only the step size adapts.
    """
    first, last, size = min(75, int(0.15 * warmup)), warmup - min(50, int(0.1 * warmup)), 25
    windows, start = list[tuple[int, int]](), first
    while start + size <= last:
        end = last if start + 3 * size > last else start + size
        windows.append((start, end))
        start, size = end, 2 * size
    return windows


def _regularized(draws: Array) -> Array:
    """Variances, shrunk a little towards 1e-3, as in Stan."""
    size = len(draws)
    variance: Array = size / (size + 5) * draws.var(0, ddof=1) + 1e-3 * 5 / (size + 5)
    return variance
