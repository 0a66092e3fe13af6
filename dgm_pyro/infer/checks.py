r"""Checks of a guide: simulation-based calibration, active units, and posterior collapse.

Draw z from the prior and x from the likelihood: then z is a draw from p(z | x). If q(z | x) is that posterior, the rank
of every :math:`z_i` among L draws of q is uniform on 0 .. L. The histogram of the ranks shows the error of q: a U means
that q is too narrow, a hump that it is too wide, and a slope that it is shifted.

A latent has *collapsed* if q(z_i | x) is the prior for every x: its KL is zero and its mean does not move with x. It is
*active* if :math:`\mathrm{Var}_x\, E_q[z_i] > 0.01`.

The ranks give three tests. Their histogram is flat only if q is the posterior. The share of z within the central
interval of q is its *coverage*. And if q is neither too high nor too low, the ranks are symmetric about the middle,
even where q is too narrow. The *VSBC* test checks this symmetry alone, by the distance between the distributions of u,
a rank as a share of L, and of 1 - u.

A `Posterior` has one data set, so each simulation needs a new fit, by a guide or by NUTS. This calibrates the method.

Sources: Talts et al. 2018 (arXiv 1804.06788); Yao et al. 2018 (Yes, but did it work?, arXiv 1802.02538), for VSBC;
Butler 1969 (A test for symmetry using the sample distribution function), for its p-value; Burda et al. 2016 (arXiv
1509.00519, section 5.2) for active units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor
from torch.distributions import kl_divergence
from tqdm import tqdm

from dgm_pyro.checks import check_choice, check_count, check_counts, check_number, check_seed, suggesting
from dgm_pyro.data import Data
from dgm_pyro.diagnosis import Finding
from dgm_pyro.evaluation import POSTERIOR_ROWS, as_data, evaluating, particles_at_once, program_device
from dgm_pyro.families.autoguide import OverReals, over_reals, weigh
from dgm_pyro.families.distributions import features_of, finite_mean
from dgm_pyro.infer.compare import fitted, is_choice
from dgm_pyro.infer.mcmc import nuts
from dgm_pyro.infer.parallel import run_fits
from dgm_pyro.infer.posterior import check_target, guide_trace_at, joint_trace
from dgm_pyro.posterior import Posterior
from dgm_pyro.program import Program, check_program, latent_sites, rows_of, seeded, unchecked
from dgm_pyro.results import Result, Table

__all__ = ["Calibration", "Checks", "Units", "check", "sbc", "units"]

NUM_SAMPLES = 32
ACTIVE = 0.01
COLLAPSED = 0.01
SIGNIFICANT = 0.01


@dataclass(frozen=True)
class Calibration(Result):
    """The result of `sbc`.

    Attributes:
        ranks: ranks in each simulation and dimension, by latent site, ``(N, D)``: integers 0 .. num_posterior_samples.
        num_posterior_samples: L, the number of draws of q in each simulation.
        bins: number of bins of the histograms, a divisor of L + 1.
    """

    ranks: dict[str, Tensor]
    num_posterior_samples: int
    bins: int

    def histogram(self, site: str) -> Tensor:
        """Counts of the ranks, ``(D, bins)``."""
        check_choice(site, self.ranks, "site")
        width = (self.num_posterior_samples + 1) // self.bins
        bins = torch.nn.functional.one_hot(self.ranks[site] // width, self.bins)
        return bins.sum(0)

    def p_values(self, site: str) -> Tensor:
        """p-value of a chi-square test of uniformity for each dimension, ``(D,)``."""
        counts = self.histogram(site).double()
        expected = counts.sum(-1, keepdim=True) / self.bins
        statistic = ((counts - expected) ** 2 / expected).sum(-1)
        half = torch.tensor((self.bins - 1) / 2, dtype=torch.double)
        p_values: Tensor = torch.special.gammaincc(half, statistic / 2)
        return p_values

    def shares(self, site: str) -> Tensor:
        """Ranks as shares of the draws, between 0 and 1, at the middle of their cells, ``(N, D)``."""
        check_choice(site, self.ranks, "site")
        return (self.ranks[site].double() + 0.5) / (self.num_posterior_samples + 1)

    def symmetry_p_values(self, site: str) -> Tensor:
        """p-value of VSBC, a test that the ranks are symmetric, for each dimension, ``(D,)``.

        With the ranks sorted by their distance from the middle, the largest first, the sums of their signs are a random
        walk. Its largest distance from 0 is the distance of the two distribution functions.
        """
        check_choice(site, self.ranks, "site")
        offset = 2 * self.ranks[site] - self.num_posterior_samples
        signs = offset.gather(0, offset.abs().argsort(dim=0, descending=True, stable=True)).sign()
        distance = signs.cumsum(0).abs().amax(0) / math.sqrt(len(signs))
        # P(max |Brownian motion on [0, 1]| > distance)
        odd = 2 * torch.arange(50, dtype=torch.double).unsqueeze(-1) + 1
        terms = (-((odd * math.pi / distance) ** 2) / 8).exp() / odd
        terms[1::2] *= -1
        return (1 - 4 / math.pi * terms.sum(0)).clamp(0, 1)

    def coverage(self, site: str, level: float = 0.9) -> Tensor:
        """The share of simulations whose z lies in the central interval of q with mass ``level``, ``(D,)``.

        An interval that ends between two ranks includes a fraction of the next rank.
        """
        check_number(level, "level", above=0, at_most=1)
        half = (self.num_posterior_samples + 1) * (self.shares(site) - 0.5).abs() - 0.5
        return (level * (self.num_posterior_samples + 1) / 2 - half).clamp(0, 1).mean(0)

    @property
    def p_value(self) -> float:
        """A p-value for all dimensions of all sites: the smallest times their number (Bonferroni)."""
        every = torch.cat([self.p_values(site) for site in self.ranks])
        return min(1.0, float(every.min()) * len(every))

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {
            "p_value": self.p_value,
            "p_values": {site: self.p_values(site).tolist() for site in self.ranks},
            "symmetry_p_values": {site: self.symmetry_p_values(site).tolist() for site in self.ranks},
            "coverage": {site: self.coverage(site).tolist() for site in self.ranks},
            "num_samples": len(next(iter(self.ranks.values()))),
            "num_posterior_samples": self.num_posterior_samples,
        }

    def parts(self) -> list[str | Table]:
        rows = []
        for site in self.ranks:
            columns = (self.p_values(site), self.symmetry_p_values(site), self.coverage(site, 0.5), self.coverage(site))
            for i, (p, symmetry, half, most) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
                rows.append([f"{site}[{i}]", f"{p:.2g}", f"{symmetry:.2g}", f"{half:.2f}", f"{most:.2f}"])
        size = len(next(iter(self.ranks.values())))
        return [
            Table(["latent", "p of uniform", "p of symmetric", "50 % covers", "90 % covers"], rows),
            f"{size} simulations, {self.num_posterior_samples} draws of q for each; uniform ranks of all: p = "
            f"{self.p_value:.3g}",
            *map(str, miscalibration(self)),
        ]


@suggesting
def sbc(
    program: Program | Posterior,
    given: Any = None,
    *,
    method: Any = None,
    num_samples: int = 500,
    num_posterior_samples: int = 99,
    bins: int = 20,
    gradient_steps: int = 300,
    jobs: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Simulation-based calibration of a program's guide against its own model, or of a method for a `Posterior`.

    Args:
        program: a program whose guide draws latents; it does not change. Or a `Posterior`, whose model simulates data
            from its prior. Each simulation is then fitted, so start with 100 of them and ``bins=10``.
        given: ``(num_samples, *given_shape)`` for a conditional program, or one row for all.
        method: for a `Posterior`: a guide that `dgm.guides.auto` knows, by name or class; "nuts"; or a function from a
            `Posterior` to its fitted guide, or to draws of u, ``(num_posterior_samples, D)``.
        num_samples: number of simulated pairs (z, x); every bin should expect at least 5 of them.
        num_posterior_samples: L, draws of the guide among which each true z is ranked.
        bins: number of bins, a divisor of L + 1, so that all bins have equal expected counts.
        gradient_steps: gradient steps of each fit of a guide to a `Posterior`.
        jobs: number of processes that fit the simulations of a `Posterior`. Default that of `joblib.parallel_config`,
            or 1. With its backend "dask", the fits run on that cluster.
        seed: seed of all draws; the global random state does not change.
        progress: whether to show a bar.

    Raises:
        ValueError: there are no latents to rank, a count does not fit, or the prior of a `Posterior` cannot be drawn.
        TypeError: the model or the method cannot be sent to another process, or an argument does not fit.

    >>> import torch, dgm_pyro as dgm
    >>> vae = dgm.VAE(
    ...     dgm.Normal(1), dgm.Normal(2, torch.nn.Linear(1, 4)), dgm.Normal(1, torch.nn.Linear(2, 2)))
    >>> dgm.infer.sbc(vae, num_samples=100).ranks["z"].shape
    torch.Size([100, 1])
    """
    check_counts(num_samples=num_samples, num_posterior_samples=num_posterior_samples, bins=bins,
                 gradient_steps=gradient_steps)  # fmt: skip
    check_seed(seed)
    if (num_posterior_samples + 1) % bins or bins < 2:
        raise ValueError(
            f"bins must be at least 2 and divide num_posterior_samples + 1 = {num_posterior_samples + 1}, got {bins}"
        )
    if isinstance(program, Posterior):
        if given is not None:
            raise TypeError("given was passed, but a Posterior has its own arguments: leave it out")
        return _ranks_of_fits(
            program, method, num_samples, num_posterior_samples, bins, gradient_steps, jobs, seed, progress
        )[0]
    check_program(program)
    if method is not None:
        raise TypeError(f"this {type(program).__name__} has a guide of its own: leave method out")
    if jobs is not None:
        raise TypeError(f"this {type(program).__name__} draws all simulations at once, in this process: leave jobs out")
    given = program.check_draws(num_samples, given)
    where = program_device(program)
    with evaluating(program), seeded(seed, where), torch.no_grad():
        cut = _parts_at_once(program, num_samples)
        with tqdm(
            total=len(cut) * num_posterior_samples, desc="rank", unit="draw", disable=not progress, leave=False
        ) as bar:
            parts = [
                _draws_below(program, rows_of(given, rows), size, num_posterior_samples, bar.update)
                for rows, size in cut
            ]
        below = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
        ranks = {name: _with_ties_split(less, equal) for name, (less, equal) in below.items()}
    if not ranks:
        raise ValueError(f"the guide of this {type(program).__name__} draws no latents: there is nothing to calibrate")
    return Calibration(ranks, num_posterior_samples, bins)


def _ranks_of_fits(
    posterior: Posterior,
    method: Any,
    num_samples: int,
    num_posterior_samples: int,
    bins: int,
    gradient_steps: int,
    jobs: int | None,
    seed: int,
    progress: bool,
) -> tuple[Calibration, dict[str, Units]]:
    """The ranks of latents and `pyro.deterministic` sites in simulations, and the `Units` of the latents."""
    draw = _sampler_of_method(method, num_posterior_samples, gradient_steps)
    tasks = [(posterior, draw, num_posterior_samples, (seed + i) % 2**64) for i in range(num_samples)]
    pairs = run_fits(_fit_simulated, tasks, jobs, what="calibrate", unit="fit", progress=progress)
    truth, u = (torch.stack(part) for part in zip(*pairs, strict=True))
    ranks = dict[str, list[Tensor]]()
    with torch.no_grad(), seeded(seed, posterior.device):
        for rows in torch.arange(num_samples).split(max(1, POSTERIOR_ROWS // num_posterior_samples)):
            z, guesses = (posterior.constrain(value[rows], deterministic=True) for value in (truth, u))
            for site, value in z.items():
                less, equal = (of(guesses[site], value.unsqueeze(1)).sum(1) for of in (torch.lt, torch.eq))
                ranks.setdefault(site, []).append(_with_ties_split(less, equal).reshape(len(rows), -1).cpu())
    calibration = Calibration({site: torch.cat(each) for site, each in ranks.items()}, num_posterior_samples, bins)
    if num_samples < 2:
        return calibration, {}
    moved = u.mean(1).var(0) - u.var(1).mean(0) / num_posterior_samples
    shares = posterior.by_latent((moved / truth.var(0)).cpu())
    return calibration, {site: Units(part, None) for site, part in shares.items()}


def _fit_simulated(
    posterior: Posterior, draw: Callable[[Posterior, int], Any], num_posterior_samples: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The u from which data were simulated, ``(D,)``, and draws from their posterior, ``(L, D)``."""
    simulated, _, truth = posterior.simulated(seed)
    u, wanted = draw(simulated, seed), (num_posterior_samples, posterior.D)
    if not isinstance(u, Tensor) or u.shape != wanted:
        shape = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
        raise ValueError(f"method returned {shape}: it must return a fitted guide, or draws of u, {wanted}")
    return truth, u


def _with_ties_split(less: Tensor, equal: Tensor) -> Tensor:
    """Ranks of a value above ``less`` draws and equal to ``equal`` draws, with such ties broken at random."""
    return less + (torch.rand(less.shape).to(less.device) * (equal + 1)).long()


def _sampler_of_method(method: Any, num_samples: int, gradient_steps: int) -> Callable[[Posterior, int], Any]:
    """A function of a posterior and a seed that draws ``num_samples`` vectors u."""
    if isinstance(method, str) and method == "nuts":
        # Every fourth draw of four chains, because ranks need nearly independent draws.
        length = 4 * math.ceil(num_samples / 4)

        def by_nuts(posterior: Posterior, seed: int) -> Tensor:
            return nuts(posterior, num_samples=length, warmup=300, seed=seed).u[:, ::4].flatten(0, 1)[:num_samples]

        return by_nuts
    if isinstance(method, AutoGuide):
        raise TypeError(
            "method is a guide for one data set, but each simulation has another: pass the guide's name or its class"
        )
    if not is_choice(method) and not callable(method):
        raise TypeError(
            "method must be a guide that dgm.guides.auto knows, 'nuts', or a function from a Posterior to a guide or "
            f"draws of u, got {type(method).__name__}"
        )

    def by_guide(posterior: Posterior, seed: int) -> Any:
        if is_choice(method):
            guide, *_ = fitted(posterior, method, seed=seed, gradient_steps=gradient_steps)
        else:
            with seeded(seed, posterior.device):
                guide = method(posterior)
        if isinstance(guide, Tensor):
            return guide
        with seeded(seed, posterior.device), unchecked(), torch.no_grad():
            if isinstance(guide, OverReals):
                return over_reals(guide, posterior, "method").sample((num_samples,))
            return weigh(posterior, guide, num_samples)[0]

    return by_guide


def _parts_at_once(program: Program, total: int) -> list[tuple[slice, int]]:
    """``total`` data in parts that go through the networks at once, and the size of each part, to limit memory."""
    most = particles_at_once(program, 1)
    return [(slice(start, start + most), min(most, total - start)) for start in range(0, total, most)]


def _draws_below(
    program: Program, given: Any, size: int, num_posterior_samples: int, advance: Callable[[], Any]
) -> dict[str, Tensor]:
    """Number of draws of the guide below each simulated z, and number equal to it, ``(2, B, D)``."""
    truth: Any = joint_trace(program, None, given=given, batch=(size,))
    x = truth.nodes["_RETURN"]["value"]
    below: dict[str, Tensor] = {}
    for _ in range(num_posterior_samples):
        drawn: Any = guide_trace_at(program, x, given=given, batch=(size,))
        for name in latent_sites(drawn):
            if name not in truth.nodes or drawn.nodes[name]["infer"].get("is_noising"):
                continue
            values = (trace.nodes[name]["value"] for trace in (truth, drawn))
            z, guess = (value.reshape(size, -1).double() for value in values)
            below[name] = below.get(name, 0) + torch.stack([guess < z, guess == z]).long().cpu()
        advance()
    return below


@dataclass(frozen=True)
class Units:
    """The dimensions of one latent site.

    Attributes:
        variance: Var_x E_q[z_i], ``(D,)``.
        kl: E_x KL(q(z_i | x) || p(z_i)) in nats, ``(D,)``; None where q or p does not factorize over dimensions.
    """

    variance: Tensor
    kl: Tensor | None

    @property
    def active(self) -> Tensor:
        return self.variance > ACTIVE

    @property
    def collapsed(self) -> Tensor:
        """Whether each dimension is independent of x, ``(D,)``."""
        return ~self.active if self.kl is None else ~self.active & (self.kl < COLLAPSED)

    def __str__(self) -> str:
        total = "" if self.kl is None else f", KL {float(self.kl.sum()):.2f} nats"
        return f"{int(self.active.sum())} of {len(self.active)} dimensions active{total}"


def units(
    program: Program, data: Any, *, num_samples: int = NUM_SAMPLES, seed: int = 0, progress: bool = False
) -> dict[str, Units]:
    """Active units and the KL of every latent dimension, by site.

    Sites that are no code of x, such as the noise of a diffusion and the position of an integer within its cell, are
    left out. The data are processed in parts, as in `sbc`, so that memory does not grow with their number.

    Args:
        program: a program whose guide draws latents.
        data: a `Data`, or a tensor ``(N, *event_shape)``; at least two data.
        num_samples: draws of the guide per datum for E_q[z]. The KL is in closed form where there is one.
        seed: seed of all draws; the global random state does not change.
        progress: whether to show a bar.

    Returns:
        The `Units` of each latent site.

    Raises:
        ValueError, TypeError: the data do not fit, or the guide draws no code of x.
    """
    found = _units_of_sites(program, data, num_samples, seed, progress)
    if not found:
        raise ValueError(f"the guide of this {type(program).__name__} has no latent variables to measure")
    return found


def _units_of_sites(program: Program, data: Any, num_samples: int, seed: int, progress: bool) -> dict[str, Units]:
    points = as_data(program, data)
    check_count(num_samples, "num_samples")
    if len(points) < 2:
        raise ValueError(f"active units compare the means of data, so data must have at least two, got {len(data)}")
    where = program_device(program)
    points = points.to(where)
    with evaluating(program), seeded(seed, where), torch.no_grad():
        cut = _parts_at_once(program, len(points))
        with tqdm(total=len(cut) * num_samples, desc="units", unit="draw", disable=not progress, leave=False) as bar:
            parts = [_moments(program, points[rows], num_samples, bar.update) for rows, _ in cut]
    found = {}
    for name in parts[0]:
        means, squares, divergences = zip(*(part[name] for part in parts), strict=True)
        mean, known = torch.cat(means), [each for each in divergences if each is not None]
        # The mean of a few draws varies even where E_q[z] does not, by their variance divided by their number.
        noise = (torch.cat(squares) - mean**2).mean(0) / max(1, num_samples - 1)
        found[name] = Units(mean.var(0) - noise, torch.stack(known).sum(0) / len(points) if known else None)
    return found


def _moments(
    program: Program, data: Data, num_samples: int, advance: Callable[[], Any]
) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """Means over draws, by code: of E_q[z] and its square, ``(B, D)``, and of the KL summed over data, ``(D,)``."""
    x, given, _ = program.arguments(data)
    sums: dict[str, tuple[Any, Any, Any]] = {}
    for _ in range(num_samples):
        q: Any = guide_trace_at(program, x, given=given, batch=(len(x),))
        latents = {name: q.nodes[name]["value"] for name in latent_sites(q)}
        p: Any = joint_trace(program, x, latents, given, batch=(len(x),))
        for name in latents:
            if name not in p.nodes or not _is_code(q.nodes[name]):
                continue
            mean = _posterior_mean(q.nodes[name]).reshape(len(x), -1).double().cpu()
            kl = _elementwise_kl(q.nodes[name], p.nodes[name])
            first, second, third = sums.get(name, (0, 0, 0))
            third = None if kl is None or third is None else third + kl.sum(0).cpu() / num_samples
            sums[name] = first + mean / num_samples, second + mean**2 / num_samples, third
        advance()
    return sums


def _is_code(site: Any) -> bool:
    """Whether the site is a code of x, unlike the noise of a diffusion or the position of an integer in its cell."""
    others = ("is_noising", "is_dequantizing")
    return site["value"].dim() - site["fn"].event_dim == 1 and not any(site["infer"].get(mark) for mark in others)


def _posterior_mean(site: Any) -> Tensor:
    """E_q[z] given the latents before z, or the draw itself where the mean has no closed form."""
    mean, value = finite_mean(site["fn"]), site["value"]
    return value if mean is None else mean.expand(value.shape)


def _elementwise_kl(q: Any, p: Any) -> Tensor | None:
    """KL of every dimension, ``(B, D)``, sampled where it has no closed form; None if q or p does not factorize."""
    try:
        bases = [features_of(site["fn"]) for site in (q, p)]
    except ValueError:
        return None
    try:
        kl = kl_divergence(bases[0], bases[1])
    except NotImplementedError:
        kl = bases[0].log_prob(q["value"]) - bases[1].log_prob(q["value"])
    return kl.expand(q["value"].shape).reshape(len(q["value"]), -1).double()


@dataclass(frozen=True)
class Checks(Result):
    """The result of `check`: calibration, units by site, and findings, each with a remedy."""

    calibration: Calibration
    units: dict[str, Units]
    findings: tuple[Finding, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether there are no errors; there may be warnings."""
        return not any(finding.severity == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {
            "calibration": self.calibration.as_dict(),
            "units": {
                site: {
                    "active": int(each.active.sum()),
                    "dimensions": len(each.variance),
                    "variance": each.variance.tolist(),
                    "kl": None if each.kl is None else each.kl.tolist(),
                }
                for site, each in self.units.items()
            },
            "findings": [vars(finding) for finding in self.findings],
        }

    def parts(self) -> list[str | Table]:
        parts: list[str | Table] = [f"calibration: p = {self.calibration.p_value:.3g} (uniform ranks are expected)"]
        parts += [f"{site}: {each}" for site, each in self.units.items()]
        if self.units:
            parts.append(f"active: the mean of q(z | x) moves with x, by a variance above {ACTIVE:g}")
        return [*parts, *map(str, self.findings)]


@suggesting
def check(
    program: Program | Posterior,
    data: Any = None,
    *,
    given: Any = None,
    method: Any = None,
    num_samples: int = 500,
    num_posterior_samples: int = 99,
    bins: int = 20,
    gradient_steps: int = 300,
    jobs: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Checks:
    """Run `sbc` and `units`, with a warning for each problem found.

    For a `Posterior`, a unit is an element of u. The variance of its posterior mean over simulated data is given as a
    share of the prior variance; it is 0 for an element that no data determine.

    Args: as for `sbc` and `units`; a `Posterior` takes no ``data``.

    Raises:
        ValueError, TypeError: as for `sbc` and `units`.
    """
    check_target(program, data, "data")
    if isinstance(program, Posterior):
        check_counts(num_samples=num_samples, num_posterior_samples=num_posterior_samples, bins=bins,
                     gradient_steps=gradient_steps)  # fmt: skip
        calibration, found = _ranks_of_fits(
            program, method, num_samples, num_posterior_samples, bins, gradient_steps, jobs, seed, progress
        )
        return Checks(calibration, found, (*undetermined(found), *miscalibration(calibration)))
    calibration = sbc(
        program,
        given,
        method=method,
        num_samples=num_samples,
        num_posterior_samples=num_posterior_samples,
        bins=bins,
        gradient_steps=gradient_steps,
        jobs=jobs,
        seed=seed,
        progress=progress,
    )
    found = _units_of_sites(program, data, NUM_SAMPLES, seed, progress)
    return Checks(calibration, found, (*collapse(found), *miscalibration(calibration)))


def collapse(found: dict[str, Units]) -> list[Finding]:
    """A warning for each site with collapsed dimensions."""
    findings = []
    for site, each in found.items():
        dead, size = int(each.collapsed.sum()), len(each.variance)
        if dead:
            findings.append(
                Finding(
                    "error" if dead == size else "warning",
                    "collapse",
                    site,
                    f"posterior collapse: {dead} of {size} dimensions say nothing about x"
                    + ("" if each.kl is None else f": inactive, and a KL below {COLLAPSED:g} nats"),
                    "train with free bits or an annealed KL, use a weaker likelihood, or fewer latents",
                )
            )
    return findings


def undetermined(found: dict[str, Units]) -> list[Finding]:
    """A warning for each latent of a `Posterior` whose posterior mean does not depend on the data."""
    return [
        Finding(
            "warning",
            "identification",
            site,
            f"for {int(each.collapsed.sum())} of {len(each.variance)} elements, the posterior mean is that of the "
            "prior for any data",
            "state an informative prior, use more data, or remove the latent from the model",
        )
        for site, each in found.items()
        if bool(each.collapsed.any())
    ]


def miscalibration(calibration: Calibration) -> list[Finding]:
    """A warning for each site whose ranks are not uniform, with the shape of its histograms in words."""
    findings = []
    for site, ranks in calibration.ranks.items():
        p_value = min(1.0, float(calibration.p_values(site).min()) * ranks.shape[1])
        if p_value >= SIGNIFICANT:
            continue
        # For uniform ranks u in [0, 1], the variance of u is 1/12 and its mean 1/2.
        u = calibration.shares(site)
        spread, shift = float(u.var(0).mean() * 12), float((u.mean(0) - 0.5).abs().max())
        width = "too narrow" if spread > 1 else "too wide"
        shape = "shifted" if 12 * shift**2 > abs(spread - 1) else width
        remedy = (
            "a richer guide (dgm list), or longer training of the guide with p fixed"
            if shape == "too narrow"
            else "longer training"
        )
        findings.append(
            Finding(
                "warning",
                "calibration",
                site,
                f"q is {shape}: ranks are not uniform (p = {p_value:.2g}, largest shift of a mean {shift:.2f})",
                f"try {remedy}; dgm gaps says which",
            )
        )
    return findings
