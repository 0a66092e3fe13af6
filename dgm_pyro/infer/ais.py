r"""Annealed importance sampling: log p(x) by a path of densities from a tractable one to the posterior.

.. math::
    f_\beta(z) = f_0(z)^{1 - \beta}\, p(x, z)^{\beta}, \qquad 0 = \beta_0 < \beta_1 < \dots < \beta_T = 1

with :math:`f_0` the prior p(z) or the guide q(z | x). A chain starts at :math:`z_0 \sim f_0`. For t = 1 .. T it first
multiplies its weight w by :math:`f_{\beta_t}(z_{t-1}) / f_{\beta_{t-1}}(z_{t-1})`, then moves by a transition that
leaves :math:`f_{\beta_t}` invariant (here Hamiltonian Monte Carlo). Then E[w] = p(x) exactly, even if the chain mixes
badly. The log of the mean of K weights is on average below log p(x).

If the chain runs backwards from an exact posterior sample, the weights have the mean 1 / p(x) and bound log p(x) from
above. Such a sample is known for data that the program itself simulates: z, x ~ p(z, x). The two bounds together are
bidirectional Monte Carlo. Their distance bounds the error of the estimate.

The path is valid only if no transition depends on the chain's own past. Step sizes are therefore adapted in a
preliminary run, on separate chains, and then fixed.

Sources: Neal 2001 (Annealed importance sampling); Grosse, Ghahramani and Adams 2015 (arXiv 1511.02543); Grosse, Ancha
and Roy 2016 (arXiv 1606.02275); Wu, Burda, Salakhutdinov and Grosse 2017 (arXiv 1611.04273).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import dgm_pyro.noise as noise
from dgm_pyro.checks import check_choice, check_count, check_number, suggesting
from dgm_pyro.evaluation import evaluating, program_device
from dgm_pyro.families.autoguide import over_reals
from dgm_pyro.infer.draws import Draws, resampled
from dgm_pyro.infer.posterior import (
    Coordinates,
    check_target,
    guide_trace_at,
    joint_trace,
    log_joint,
    with_latent_chains,
)
from dgm_pyro.posterior import Posterior
from dgm_pyro.program import Program, check_program, differentiating, latent_sites, log_mean_exp, log_prob_sum, seeded

__all__ = ["HMC", "Annealed", "AnnealingPath", "Sandwich", "Transition", "ais", "bidirectional"]

Density = Callable[[Tensor], Tensor]
Transition = Callable[[Tensor, Tensor, Density], tuple[Tensor, Tensor]]

ADAPTATION_RATE = 0.2


@dataclass(frozen=True)
class HMC:
    """One Hamiltonian trajectory and a Metropolis test, for all chains of all data at once.

    Step sizes are jittered by up to a fifth, so that no trajectory is a full period of the dynamics.

    Attributes:
        num_leapfrog: steps per trajectory; each costs one gradient.
    """

    num_leapfrog: int = 8

    def __post_init__(self) -> None:
        check_count(self.num_leapfrog, "num_leapfrog")

    def __call__(self, u: Tensor, step: Tensor, density: Density) -> tuple[Tensor, Tensor]:
        """Move u, ``(K, B, D)``, with step sizes ``(B,)``, leaving ``exp(density(u))`` invariant, ``(K, B)``.

        Returns:
            The new u, and the probability with which each move was accepted, ``(K, B)``.
        """
        with noise.drawing(u.shape[:-1]):
            size = (step * torch.empty_like(u[..., 0]).uniform_(0.8, 1.2)).unsqueeze(-1)
            start, level = torch.randn_like(u), torch.rand_like(u[..., 0])
        before, gradient = _with_gradient(density, u)
        momentum, place, after = start, u, before
        for _ in range(self.num_leapfrog):
            momentum = momentum + size / 2 * gradient
            place = place + size * momentum
            after, gradient = _with_gradient(density, place)
            momentum = momentum + size / 2 * gradient
        energy = after - before - 0.5 * (momentum**2 - start**2).sum(-1)
        # A trajectory with non-finite values is rejected.
        probability = torch.where(energy.isfinite(), energy.clamp(max=0).exp(), torch.zeros_like(energy))
        accepted = level < probability
        return torch.where(accepted.unsqueeze(-1), place, u), probability


def _with_gradient(density: Density, u: Tensor) -> tuple[Tensor, Tensor]:
    with differentiating("HMC"):
        u = u.detach().requires_grad_()
        value = density(u)
        (gradient,) = torch.autograd.grad(value.sum(), u)
    return value.detach(), gradient


@dataclass(frozen=True)
class Annealed(Draws):
    """The result of `ais`. For a `Posterior`, which is a single datum, the dimension B is left out.

    Attributes:
        log_evidence: log-mean-exp of the weights over the chains, in nats, ``(B,)``: on average below log p(x).
        log_weights: log weight of each chain in nats, ``(K, B)``; the mean weight is an unbiased estimate of p(x).
        acceptance: mean acceptance probability of the moves, ``(B,)``.
        latents: the ends of the chains, by site, ``(K, B, *site_shape)``; with log_weights, draws from the posterior.
        posterior: the `Posterior` that was sampled; None for a `Program`.
    """

    log_evidence: Tensor
    log_weights: Tensor
    acceptance: Tensor
    latents: dict[str, Tensor]
    posterior: Posterior | None = None

    def _vectors(self, posterior: Posterior) -> Tensor:
        with torch.no_grad():
            return posterior.unconstrain(self.latents)[resampled(self.log_weights)].unsqueeze(0)


@dataclass(frozen=True)
class Sandwich:
    """The result of `bidirectional`: on average, lower <= log p(x) <= upper.

    Attributes:
        x: the simulated data, ``(B, *event_shape)``; for a `Posterior`, by observed site.
        lower, upper: bounds on log p(x) in nats, ``(B,)``.
        acceptance: mean acceptance probability of the moves, ``(B,)``.
    """

    x: Tensor | dict[str, Tensor]
    lower: Tensor
    upper: Tensor
    acceptance: Tensor


@suggesting
def ais(
    program: Program | Posterior,
    x: Tensor | None = None,
    given: Any = None,
    *,
    num_chains: int = 8,
    num_temperatures: int = 300,
    num_leapfrog: int = 8,
    initial: Any = "prior",
    temperature_schedule: str = "sigmoid",
    transition: Transition | None = None,
    target_acceptance: float = 0.65,
    observed: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Annealed:
    """Estimate log p(x | given) by annealed importance sampling, with all chains of all data at once.

    The cost is about ``1.25 * num_temperatures * (num_leapfrog + 2)`` gradients of log p(x, z) on ``num_chains * B``
    rows, a fifth of them in the preliminary run.

    Args:
        program: a `Posterior`; or a `Program` with continuous latents, log p(x, z) differentiable in them, whose
            diffusions are unrolled.
        x: ``(B, *event_shape)``, the data of a `Program`; a `Posterior` has its own.
        given: ``(B, *given_shape)`` for a conditional program.
        num_chains: K, independent chains per datum.
        num_temperatures: T. The bound tightens as it grows.
        num_leapfrog: steps of each Hamiltonian trajectory.
        initial: start of the path: "prior"; or "guide", which shortens the path where the guide is good, and which
            cannot leave the guide's support. For a `Posterior`, pass the fitted guide itself, from `dgm.guides.auto` or
            another `AutoContinuous`; it works for an improper prior too.
        temperature_schedule: "sigmoid" (slow at both ends; Grosse et al. 2015, section 5) or "linear" temperatures.
        transition: a function like `HMC`, the default, that moves u with step sizes and leaves a density invariant.
        target_acceptance: acceptance to which the preliminary run adapts the step sizes, one for each datum and
            temperature.
        observed: further observed sites, such as ``{"y": labels}`` of a `Labeled`.
        seed: seed of the noise, which belongs to each datum (`noise.per_datum`), so a bound does not depend on the
            other data. Your own transition keeps this property if it draws inside `noise.drawing`. The global random
            state does not change.
        progress: whether to show bars.

    Raises:
        ValueError: a latent is discrete, x has density 0 at the initial draws, or an argument does not fit.

    >>> import torch, dgm_pyro as dgm
    >>> vae = dgm.VAE(
    ...     dgm.Normal(1), dgm.Normal(2, torch.nn.Linear(1, 4)), dgm.Normal(1, torch.nn.Linear(2, 2)))
    >>> dgm.infer.ais(vae, torch.zeros(3, 2), num_temperatures=10).log_weights.shape
    torch.Size([8, 3])
    """
    check_target(program, x)
    _check_annealing(transition, target_acceptance)
    with annealing(program, x, given, num_chains, initial, observed or {}, seed) as path:
        betas = temperatures(num_temperatures, temperature_schedule)
        transition = transition or HMC(num_leapfrog)
        step_sizes = path.adapt(betas, transition, target_acceptance, progress)
        u, log_weights, acceptance = path.anneal(path.start(), betas, step_sizes, transition, progress)
        latents = path.latents(u)
    if isinstance(program, Posterior):
        log_weights, acceptance = log_weights.squeeze(1), acceptance.squeeze(0)
        latents = {name: value.squeeze(1) for name, value in latents.items()}
    posterior = program if isinstance(program, Posterior) else None
    return Annealed(log_mean_exp(log_weights), log_weights, acceptance, latents, posterior)


@contextlib.contextmanager
def annealing(
    program: Program | Posterior,
    x: Any,
    given: Any,
    num_chains: int,
    initial: Any,
    observed: Mapping[str, Tensor],
    seed: int,
) -> Iterator[AnnealingPath]:
    """The path to the posterior, in a context with evaluation mode and with noise that belongs to each datum.

    Raises:
        ValueError: log p(x) is exact, or as for `ais`.
    """
    if isinstance(program, Posterior):
        with seeded(seed, program.device), torch.no_grad():
            yield FromPosterior(program, num_chains, initial)
        return
    program.check(x, given)
    if program.tractable:
        raise ValueError(f"log p(x) of this {type(program).__name__} is exact: use program.log_prob(x)")
    with evaluating(program), seeded(seed, x.device), noise.per_datum(x, seed), torch.no_grad():
        yield ToPosterior(program, x, given, num_chains, initial, observed)


@suggesting
def bidirectional(
    program: Program | Posterior,
    num_data: int,
    given: Any = None,
    *,
    num_chains: int = 8,
    num_temperatures: int = 300,
    num_leapfrog: int = 8,
    initial: str = "prior",
    temperature_schedule: str = "sigmoid",
    transition: Transition | None = None,
    target_acceptance: float = 0.65,
    seed: int = 0,
    progress: bool = False,
) -> Sandwich:
    """Bound log p(x) from both sides, by forward and reverse annealing on data that the program simulates.

    The latents of the simulated data are exact posterior samples, in which the reverse chains start. The cost is twice
    that of `ais`.

    Args:
        program, given, ...: as for `ais`; ``given`` has ``num_data`` rows, or one for all. For a `Posterior`, the model
            simulates new values of its observed sites.
        num_data: number of data to simulate; for a `Posterior`, the number of data sets, in turn.

    Raises:
        ValueError: as for `ais`.

    >>> import torch, dgm_pyro as dgm
    >>> vae = dgm.VAE(
    ...     dgm.Normal(1), dgm.Normal(2, torch.nn.Linear(1, 4)), dgm.Normal(1, torch.nn.Linear(2, 2)))
    >>> sandwich = dgm.infer.bidirectional(vae, 64, num_temperatures=50)
    >>> bool(sandwich.lower.mean() < sandwich.upper.mean())
    True
    """
    check_count(num_data, "num_data")
    _check_annealing(transition, target_acceptance)
    betas = temperatures(num_temperatures, temperature_schedule)
    transition = transition or HMC(num_leapfrog)

    def both(path: AnnealingPath, exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The two bounds and the mean acceptance, ``(B,)``, with ``exact`` draws from the posterior, ``(K, B, D)``."""
        step_sizes = path.adapt(betas, transition, target_acceptance, progress)
        _, forward, there = path.anneal(path.start(), betas, step_sizes, transition, progress)
        _, backward, back = path.anneal(exact, betas, step_sizes, transition, progress, reverse=True)
        return log_mean_exp(forward), -log_mean_exp(backward), (there + back) / 2

    if isinstance(program, Posterior):
        found, data = list[tuple[Tensor, Tensor, Tensor]](), list[dict[str, Tensor]]()
        for i in range(num_data):
            posterior, values, u = program.simulated((seed + i) % 2**64)
            with annealing(posterior, None, None, num_chains, initial, {}, (seed + i) % 2**64) as path:
                found.append(both(path, u.expand(*path.batch, posterior.D)))
            data.append(values)
        lower, upper, acceptance = (torch.cat(part) for part in zip(*found, strict=True))
        return Sandwich({name: torch.stack([each[name] for each in data]) for name in data[0]},
                        lower, upper, acceptance)  # fmt: skip
    check_program(program)
    given = program.check_draws(num_data, given)
    with evaluating(program), seeded(seed, program_device(program)), torch.no_grad():
        trace = joint_trace(with_latent_chains(program), None, given=given, batch=(num_data,))
        nodes: Any = trace.nodes
        x: Tensor = nodes["_RETURN"]["value"]
        path = ToPosterior(program, x, given, num_chains, initial, {})
        exact = {name: nodes[name]["value"].expand(path.batch[0], *nodes[name]["value"].shape)
                 for name in path.coordinates.names}  # fmt: skip
        lower, upper, acceptance = both(path, path.coordinates.flatten(exact))
    return Sandwich(x, lower, upper, acceptance)


def _check_annealing(transition: Any, target_acceptance: Any) -> None:
    check_number(target_acceptance, "target_acceptance", above=0, at_most=1)
    if transition is not None and not callable(transition):
        raise TypeError(f"transition must be callable, such as infer.HMC(), or None, got {type(transition).__name__}")


def temperatures(num_temperatures: int, temperature_schedule: str = "sigmoid") -> Tensor:
    """beta_0 = 0 .. beta_T = 1, ``(T + 1,)``: evenly spaced, or evenly on the logistic curve over [-4, 4]."""
    check_count(num_temperatures, "num_temperatures")
    even = torch.linspace(0, 1, num_temperatures + 1)
    check_choice(temperature_schedule, ("sigmoid", "linear"), "temperature_schedule")
    if temperature_schedule == "linear":
        return even
    curve = (8 * even - 4).sigmoid()
    return (curve - curve[0]) / (curve[-1] - curve[0])


class AnnealingPath:
    """Densities f_beta of u, ``(K, B, D)``, from a tractable one at beta = 0 to another at beta = 1.

    Subclasses define ``batch`` = (K, B), `start`, `densities` and `latents`.
    """

    batch: tuple[int, int]

    def start(self) -> Tensor:
        """u ~ f_0, ``(K, B, D)``."""
        raise NotImplementedError

    def densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log f_0(u), normalized, and log f_1(u) - log f_0(u), in nats, ``(K, B)``."""
        raise NotImplementedError

    def latents(self, u: Tensor) -> dict[str, Tensor]:
        """The latents at u, by site, ``(K, B, *site_shape)``."""
        raise NotImplementedError

    def require_finite(self, u: Tensor, source: str, remedy: str) -> None:
        """Raise a ValueError if the path cannot start at ``u``, draws from ``source``."""
        if not bool(self.densities(u)[1].isfinite().all()):
            raise ValueError(
                f"log p(x | latents) is not finite at draws from the {source}, so there is no path to the "
                f"posterior: {remedy}"
            )

    def at(self, beta: Tensor) -> Density:
        """log f_beta."""

        def density(u: Tensor) -> Tensor:
            start, ratio = self.densities(u)
            return start + beta * ratio

        return density

    def anneal(
        self,
        u: Tensor,
        betas: Tensor,
        step_sizes: Tensor,
        transition: Transition,
        progress: bool = False,
        reverse: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run chains from u along the path: their ends, log weights ``(K, B)``, mean acceptance ``(B,)``."""
        order = range(len(betas) - 1, 0, -1) if reverse else range(1, len(betas))
        log_weights, acceptance = u.new_zeros(self.batch), u.new_zeros(self.batch[1])
        for t in tqdm(order, desc="anneal", unit="temperature", disable=not progress, leave=False):
            change = betas[t] - betas[t - 1]
            if not reverse:
                log_weights = log_weights + change * self.densities(u)[1]
            u, accepted = transition(u, step_sizes[t], self.at(betas[t]))
            if reverse:
                log_weights = log_weights - change * self.densities(u)[1]
            acceptance = acceptance + accepted.mean(0) / len(order)
        return u, log_weights, acceptance

    def adapt(self, betas: Tensor, transition: Transition, target_acceptance: float, progress: bool = False) -> Tensor:
        """Step sizes for each temperature and datum, ``(T + 1, B)``, from chains that are then discarded.

        The chains visit a quarter of the temperatures, at least 20; in between, log step sizes are interpolated.
        """
        coarse = torch.linspace(0, len(betas) - 1, max(20, len(betas) // 4), dtype=torch.float64)
        u = self.start()
        log_step = u.new_full((self.batch[1],), -0.25 * math.log(u.shape[-1]))
        logs = []
        places = [0.0] * 10 + coarse.tolist()
        for place in tqdm(places, desc="adapt", unit="temperature", disable=not progress, leave=False):
            u, accepted = transition(u, log_step.exp(), self.at(betas[round(place)]))
            log_step = log_step + ADAPTATION_RATE * (accepted.mean(0) - target_acceptance)
            logs.append(log_step)
        return _interpolate(torch.stack(logs[10:]), len(betas)).exp()


class ToPosterior(AnnealingPath):
    """The path from the prior or the guide to p(x, latents), as densities of unconstrained coordinates."""

    def __init__(
        self,
        program: Program,
        x: Tensor,
        given: Any,
        num_chains: int,
        initial: str,
        observed: Mapping[str, Tensor],
        mask: Tensor | None = None,
    ):
        check_choice(initial, ("prior", "guide"), "initial")
        self.program, self.x, self.given, self.observed = with_latent_chains(program), x, given, observed
        self.mask = mask
        self.batch = (check_count(num_chains, "num_chains"), len(x))
        self.from_guide = initial == "guide"
        self.coordinates = Coordinates(self._initial(), self.batch)

    def latents(self, u: Tensor) -> dict[str, Tensor]:
        return self.coordinates.unflatten(u)[0]

    def _initial(self, latents: Mapping[str, Tensor] | None = None) -> Any:
        statements = guide_trace_at if self.from_guide else joint_trace
        return statements(self.program, self.x, latents, self.given, batch=self.batch, observed=self.observed)

    def start(self) -> Tensor:
        """u_0 ~ f_0, ``(K, B, D)``.

        Raises:
            ValueError: x has density 0 at such draws.
        """
        trace = self._initial()
        latents = {name: trace.nodes[name]["value"] for name in latent_sites(trace)}
        u = self.coordinates.flatten(latents)
        self.require_finite(u, *(("guide", "check x") if self.from_guide else ("prior", "use initial='guide'")))
        return u

    def densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log f_0(u) and log f_1(u) - log f_0(u), ``(K, B)``."""
        latents, log_det = self.coordinates.unflatten(u)
        log_prior, log_likelihood = log_joint(
            self.program, self.x, latents, self.given, batch=self.batch, observed=self.observed, mask=self.mask
        )
        if not self.from_guide:
            return log_prior + log_det, log_likelihood
        log_q = log_prob_sum(self._initial(latents), self.batch)
        return log_q + log_det, log_prior + log_likelihood - log_q


class FromPosterior(AnnealingPath):
    """The path from the prior of a `Posterior`, or from a distribution of u, to its joint density; B is 1."""

    def __init__(self, posterior: Posterior, num_chains: int, initial: Any):
        self.posterior, self.batch = posterior, (check_count(num_chains, "num_chains"), 1)
        self.q = None if isinstance(initial, str) and initial == "prior" else over_reals(initial, posterior, "initial")
        if self.q is None:
            posterior.require_proper("annealing cannot start there")

    def start(self) -> Tensor:
        if self.q is not None:
            u: Tensor = self.q.sample(torch.Size(self.batch))
            self.require_finite(u, "guide", "fit it first, or start from another")
            return u
        u = self.posterior.prior(self.batch[0], seed=int(torch.randint(2**31, ()))).unsqueeze(1)
        self.require_finite(u, "prior", "fit a guide, dgm.guides.auto(model, 'fullrank'), and use initial=guide")
        return u

    def densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        log_prior, log_likelihood = self.posterior.densities(u)
        if self.q is None:
            return log_prior, log_likelihood
        log_q = self.q.log_prob(u)
        return log_q, log_prior + log_likelihood - log_q

    def latents(self, u: Tensor) -> dict[str, Tensor]:
        return self.posterior.constrain(u)


def _interpolate(values: Tensor, size: int) -> Tensor:
    return torch.nn.functional.interpolate(values.T.unsqueeze(0), size, mode="linear", align_corners=True)[0].T
