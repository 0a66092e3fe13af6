r"""Is the guide right? Simulation-based calibration, active units, and which latents have collapsed.

Draw z from the prior and x from the likelihood: then z is a draw from p(z | x). If q(z | x) is that posterior, the rank
of every :math:`z_i` among L draws of q is uniform on 0 .. L. A histogram of the ranks shows how q errs: a U says that q
is too narrow, a hump that it is too wide, a slope that it is shifted.

A latent has *collapsed* if q(z_i | x) is the prior for every x: its KL is zero and its mean does not move with x. It is
*active* if :math:`\mathrm{Var}_x\, E_q[z_i] > 0.01`.

Sources: Talts et al. 2018 (arXiv 1804.06788); Burda et al. 2016 (arXiv 1509.00519, section 5.2) for active units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence
from tqdm import tqdm

from dgm_pyro.checks import check_choice, check_count, check_counts
from dgm_pyro.data import Data
from dgm_pyro.diagnosis import Finding
from dgm_pyro.evaluation import as_data, evaluating, particles_at_once, program_device
from dgm_pyro.families.distributions import features_of, finite_mean
from dgm_pyro.infer.posterior import guide_trace_at, joint_trace
from dgm_pyro.program import Program, check_program, latent_sites, rows_of, seeded
from dgm_pyro.results import Result, Table

NUM_SAMPLES = 32
ACTIVE = 0.01
COLLAPSED = 0.01
SIGNIFICANT = 0.01


@dataclass(frozen=True)
class Calibration:
    """The result of `sbc`.

    Attributes:
        ranks: by latent site, of every simulation and dimension, ``(N, D)``: integers 0 .. num_posterior_samples.
        num_posterior_samples: L.
        bins: of the histograms; it divides L + 1.
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

    @property
    def p_value(self) -> float:
        """One p-value for all dimensions of all sites: the smallest times their number (Bonferroni)."""
        every = torch.cat([self.p_values(site) for site in self.ranks])
        return min(1.0, float(every.min()) * len(every))

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {
            "p_value": self.p_value,
            "p_values": {site: self.p_values(site).tolist() for site in self.ranks},
            "num_samples": len(next(iter(self.ranks.values()))),
            "num_posterior_samples": self.num_posterior_samples,
        }


def sbc(
    program: Program,
    given: Any = None,
    *,
    num_samples: int = 500,
    num_posterior_samples: int = 99,
    bins: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Simulation-based calibration of the program's guide against its own model.

    Args:
        program: with latents that the guide draws; left as it was.
        given: ``(num_samples, *given_shape)`` for a conditional program, or one row for all.
        num_samples: how many pairs (z, x) to simulate; every bin should expect 5 of them at least.
        num_posterior_samples: L, draws of the guide to rank each true z among.
        bins: must divide L + 1, for equal expected counts in all bins.
        seed: the global random state is left as it was.
        progress: whether to show a bar.

    Raises:
        ValueError: there are no latents to rank, or a count does not fit.

    >>> import torch, dgm_pyro as dgm
    >>> vae = dgm.VAE(
    ...     dgm.Normal(1), dgm.Normal(2, torch.nn.Linear(1, 4)), dgm.Normal(1, torch.nn.Linear(2, 2)))
    >>> dgm.infer.sbc(vae, num_samples=100).ranks["z"].shape
    torch.Size([100, 1])
    """
    check_program(program)
    check_counts(num_samples=num_samples, num_posterior_samples=num_posterior_samples, bins=bins)
    given = program.check_draws(num_samples, given)
    if (num_posterior_samples + 1) % bins or bins < 2:
        raise ValueError(
            f"bins must be at least 2 and divide num_posterior_samples + 1 = {num_posterior_samples + 1}, got {bins}"
        )
    where = program_device(program)
    with evaluating(program), seeded(seed, where), torch.no_grad():
        cut = _parts(program, num_samples)
        with tqdm(
            total=len(cut) * num_posterior_samples, desc="rank", unit="draw", disable=not progress, leave=False
        ) as bar:
            parts = [
                _guesses_below(program, rows_of(given, rows), size, num_posterior_samples, bar.update)
                for rows, size in cut
            ]
        below = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
        # Ties, of discrete latents, put z anywhere among its equals.
        ranks = {name: less + (torch.rand(less.shape) * (equal + 1)).long() for name, (less, equal) in below.items()}
    if not ranks:
        raise ValueError(f"the guide of this {type(program).__name__} draws no latents: there is nothing to calibrate")
    return Calibration(ranks, num_posterior_samples, bins)


def _parts(program: Program, total: int) -> list[tuple[slice, int]]:
    """``total`` data in parts that go through the networks at once, and the size of each: memory is flat in them."""
    most = particles_at_once(program, 1)
    return [(slice(start, start + most), min(most, total - start)) for start in range(0, total, most)]


def _guesses_below(
    program: Program, given: Any, size: int, num_posterior_samples: int, advance: Callable[[], Any]
) -> dict[str, Tensor]:
    """Number of draws of the guide each simulated z is above, and how many it equals, ``(2, B, D)``."""
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
        """Dimensions that say nothing about x, ``(D,)``."""
        return ~self.active if self.kl is None else ~self.active & (self.kl < COLLAPSED)

    def __str__(self) -> str:
        total = "" if self.kl is None else f", KL {float(self.kl.sum()):.2f} nats"
        return f"{int(self.active.sum())} of {len(self.active)} dimensions active{total}"


def units(
    program: Program, data: Any, *, num_samples: int = NUM_SAMPLES, seed: int = 0, progress: bool = False
) -> dict[str, Units]:
    """Active units and the KL of every latent dimension, by site.

    The noise of a diffusion and the place of an integer within its cell are no codes of x, and not among them. Data go
    through in parts, here as in `sbc`, so that the memory of the networks' activations does not grow with their number.

    Args:
        data: a `Data`, or a tensor ``(N, *event_shape)``; at least two of them.
        num_samples: draws of the guide per datum, for E_q[z]; the KL is in closed form where there is one.
        seed: the global random state is left as it was.
        progress: whether to show a bar.

    Raises:
        ValueError, TypeError: the data do not fit, or the guide draws no codes of x.
    """
    found = _units(program, data, num_samples, seed, progress)
    if not found:
        raise ValueError(f"the guide of this {type(program).__name__} has no latent variables to measure")
    return found


def _units(program: Program, data: Any, num_samples: int, seed: int, progress: bool) -> dict[str, Units]:
    points = as_data(program, data)
    check_count(num_samples, "num_samples")
    if len(points) < 2:
        raise ValueError("active units need at least two data: their means must be compared")
    where = program_device(program)
    points = points.to(where)
    with evaluating(program), seeded(seed, where), torch.no_grad():
        cut = _parts(program, len(points))
        with tqdm(total=len(cut) * num_samples, desc="units", unit="draw", disable=not progress, leave=False) as bar:
            parts = [_moments(program, points[rows], num_samples, bar.update) for rows, _ in cut]
    found = {}
    for name in parts[0]:
        means, squares, divergences = zip(*(part[name] for part in parts), strict=True)
        mean, known = torch.cat(means), [each for each in divergences if each is not None]
        # The mean of a few draws varies even where E_q[z] does not: by their own variance, divided by their number.
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
            mean = _mean(q.nodes[name]).reshape(len(x), -1).double().cpu()
            kl = _elementwise_kl(q.nodes[name], p.nodes[name])
            first, second, third = sums.get(name, (0, 0, 0))
            third = None if kl is None or third is None else third + kl.sum(0).cpu() / num_samples
            sums[name] = first + mean / num_samples, second + mean**2 / num_samples, third
        advance()
    return sums


def _is_code(site: Any) -> bool:
    """Whether the site is a code of x: not the noise of a diffusion, nor the place of an integer within its cell."""
    others = ("is_noising", "is_dequantizing")
    return site["value"].dim() - site["fn"].event_dim == 1 and not any(site["infer"].get(mark) for mark in others)


def _mean(site: Any) -> Tensor:
    """E_q[z] given the latents before z, or the draw itself where the mean has no closed form."""
    mean, value = finite_mean(site["fn"]), site["value"]
    return value if mean is None else mean.expand(value.shape)


def _elementwise_kl(q: Any, p: Any) -> Tensor | None:
    """KL of every dimension, ``(B, D)``; sampled if not in closed form, None if q or p does not factorize."""
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
    """What `check` found: calibration, units by site, and findings with a remedy."""

    calibration: Calibration
    units: dict[str, Units]
    findings: tuple[Finding, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether there is no error; there may be warnings."""
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


def check(
    program: Program,
    data: Any,
    *,
    given: Any = None,
    num_samples: int = 500,
    num_posterior_samples: int = 99,
    bins: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> Checks:
    """`sbc` and `units` together, with a warning for each thing that is wrong.

    Args: as those of `sbc` and `units`.
    """
    calibration = sbc(
        program,
        given,
        num_samples=num_samples,
        num_posterior_samples=num_posterior_samples,
        bins=bins,
        seed=seed,
        progress=progress,
    )
    found = _units(program, data, NUM_SAMPLES, seed, progress)
    return Checks(calibration, found, (*collapse(found), *miscalibration(calibration)))


def collapse(found: dict[str, Units]) -> list[Finding]:
    """A warning for every site with dimensions that have collapsed."""
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


def miscalibration(calibration: Calibration) -> list[Finding]:
    """A warning for every site whose ranks are not uniform, with the shape of its histograms in words."""
    findings = []
    for site, ranks in calibration.ranks.items():
        p_value = min(1.0, float(calibration.p_values(site).min()) * ranks.shape[1])
        if p_value >= SIGNIFICANT:
            continue
        # Of uniform ranks u in [0, 1]: the variance of u is 1/12, its mean 1/2.
        u = (ranks.double() + 0.5) / (calibration.num_posterior_samples + 1)
        spread, shift = float(u.var(0).mean() * 12), float((u.mean(0) - 0.5).abs().max())
        width = "too narrow" if spread > 1 else "too wide"
        shape = "shifted" if 12 * shift**2 > abs(spread - 1) else width
        remedy = (
            "a richer encoder (dgm list), or one that is trained for longer, p fixed"
            if shape == "too narrow"
            else "longer training"
        )
        findings.append(
            Finding(
                "warning",
                "calibration",
                site,
                f"q is {shape}: ranks are not uniform (p = {p_value:.2g}, the largest shift of a mean {shift:.2f})",
                f"try {remedy}; dgm gaps says which",
            )
        )
    return findings
