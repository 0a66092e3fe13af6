r"""Sequential Monte Carlo: weighted particles that follow a chain of densities, with resampling.

A chain of unnormalized densities :math:`\gamma_1(s_1), \gamma_2(s_{1:2}), \dots` ends in the target. Step i draws
:math:`s_i \sim r(s_i \mid s_{<i})` for every particle and multiplies its weight by

.. math::
    \frac{\gamma_i(s_{1:i})}{\gamma_{i-1}(s_{1:i-1})\, r(s_i \mid s_{<i})}.

If few particles have most of the weight, K particles are drawn in proportion to it and continue with equal weights. The
product of the mean weights before each such draw is an unbiased estimate of the last density's normalizer.

Two chains are those of a program. *Features* of an autoregressive model, in its order: missing features are drawn from
the model, and observed ones multiply the weight by :math:`p(x_i \mid x_{<i})`. *Times* of a diffusion, T to 1: observed
features are drawn from the noising guide :math:`q(x_{t-1} \mid x_t, x_0)`, missing ones from the model, and

.. math::
    \gamma_t(x_{t:T}) = q_t \left(\frac{p(x_{t:T})}{q_t}\right)^{a_t} \psi_t(x_t)^{b_t}, \qquad
    \psi_t(x_t) = p(x_0 \mid x_1)\big|_{\hat x_0(x_1) \to \hat x_0(x_t)}, \qquad a_1 = b_1 = 1,

where :math:`q_t` is the density of the draws so far. :math:`\psi_t` is a look-ahead: the likelihood of the data given
the denoiser's prediction from x_t, with the variance of its error. At t = 1 it is the likelihood itself, so the last
density is the model's, and twisting changes the variance but not the expectation. The powers are the least-squares
slopes of a particle's last log weight on the two logarithms, from a preliminary run. If these predict nothing, both
powers are 0 and cause no resampling.

A third chain is that of *temperatures*, for any program with continuous latents and for a `Posterior`: the densities of
`dgm_pyro.infer.ais`, with a Hamiltonian move at each temperature.

Sources: Doucet and Johansen 2009 (a tutorial); for twisting in diffusions, Wu et al. 2023 (arXiv 2306.17775), of which
this is the variant with the guide as the proposal of what is observed; Del Moral, Doucet and Jasra 2006, for
tempering.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

import dgm_pyro.noise as noise
from dgm_pyro.checks import check_count, check_counts, check_number, suggesting
from dgm_pyro.evaluation import evaluating
from dgm_pyro.families.autoregressive import Autoregressive, FeatureChain
from dgm_pyro.families.diffusion import Denoised, Denoising, UnrolledDiffusion
from dgm_pyro.families.distributions import features_of
from dgm_pyro.families.standardized import Standardized, core_of
from dgm_pyro.infer.ais import HMC, AnnealingPath, Transition, annealing, temperatures
from dgm_pyro.infer.draws import Draws, resampled
from dgm_pyro.infer.posterior import check_target
from dgm_pyro.posterior import Posterior
from dgm_pyro.program import Program, seeded

__all__ = ["Features", "Population", "Stepper", "Tempered", "Times", "propagate", "smc", "take"]

State = dict[str, Tensor]


class Stepper(Protocol):
    """A chain of densities. All tensors of a state are ``(K, B, ...)``; log weights are ``(K, B)``, in nats."""

    def __len__(self) -> int:
        """Number of steps after the start."""

    def start(self, batch: Sequence[int]) -> tuple[State, Tensor]:
        """The first state of ``batch`` = (K, B) particles, and its log weights."""

    def step(self, i: int, state: State) -> tuple[State, Tensor]:
        """The state after step i = 0, 1, ..., and the increments of the log weights."""


@dataclass(frozen=True)
class Population(Draws):
    """Weighted particles.

    Attributes:
        state: tensors by name, ``(K, B, ...)``.
        log_weights: ``(K, B)``, in nats; the mean weight is an unbiased estimate of the normalizer.
        log_evidence: log of the mean weight in nats, ``(B,)``: on average below the log normalizer.
        resampled: number of resamplings of each datum's particles, ``(B,)``.
        posterior: the `Posterior` that was drawn from; None for a `Program`.
    """

    state: State
    log_weights: Tensor
    resampled: Tensor
    posterior: Posterior | None = None

    def _vectors(self, posterior: Posterior) -> Tensor:
        with torch.no_grad():
            return posterior.unconstrain(self.state)[resampled(self.log_weights)].unsqueeze(0)

    @property
    def log_evidence(self) -> Tensor:
        return self.log_weights.logsumexp(0) - math.log(len(self.log_weights))


def propagate(
    stepper: Stepper, num_particles: int, num_data: int, *, threshold: float = 0.5, progress: bool = False
) -> Population:
    """Run ``stepper`` for ``num_particles`` of each of ``num_data`` data.

    Args:
        threshold: share of the particles; a datum's particles are resampled when their effective number is below it.
        progress: whether to show a bar.
    """
    check_counts(num_particles=num_particles, num_data=num_data)
    check_number(threshold, "threshold", at_least=0)
    batch = (num_particles, num_data)
    state, log_weights = stepper.start(batch)
    log_mean = log_weights.new_zeros(num_data)
    resampled = torch.zeros(num_data, dtype=torch.long, device=log_weights.device)
    for i in tqdm(range(len(stepper)), desc="propagate", unit="step", disable=not progress, leave=False):
        poor = effective_number(log_weights) < threshold * num_particles
        # Drawn at each step, because resampling of one datum must not change the noise of the others.
        chosen = systematic(log_weights, num_particles)
        if bool(poor.any()):
            same = torch.arange(num_particles, device=chosen.device).unsqueeze(-1).expand(batch)
            state = take(state, torch.where(poor, chosen, same))
            log_mean = log_mean + torch.where(poor, log_weights.logsumexp(0) - math.log(num_particles), 0.0)
            log_weights = torch.where(poor, 0.0, log_weights)
            resampled = resampled + poor
        state, more = stepper.step(i, state)
        log_weights = log_weights + more
    return Population(state, log_weights + log_mean, resampled)


def effective_number(log_weights: Tensor) -> Tensor:
    """The effective sample size, 1 / sum of squared normalized weights, between 1 and K, ``(B,)``."""
    return 1 / (2 * log_weights.log_softmax(0)).exp().sum(0)


def systematic(log_weights: Tensor, num_particles: int) -> Tensor:
    """Indices of ``num_particles`` particles, ``(num_particles, B)``.

    Each of the K is drawn ``num_particles`` times its normalized weight on average.

    One uniform draw places evenly spaced points on the cumulative weights. So a particle is drawn twice only if its
    weight is above 1 / num_particles, and always if it is above 2 / num_particles.
    """
    edges = log_weights.softmax(0).cumsum(0)
    with noise.drawing(edges.shape):
        comb = torch.arange(num_particles, device=edges.device).unsqueeze(-1) + torch.rand_like(edges[:1])
    places = comb / num_particles * edges[-1:]
    return torch.searchsorted(edges.T.contiguous(), places.T.contiguous()).T.clamp(max=len(edges) - 1)


def take(state: State, indices: Tensor) -> State:
    """The particles at ``indices``, ``(num_particles, B)``, of each datum."""
    data = torch.arange(indices.shape[1], device=indices.device)
    return {name: value[indices, data] for name, value in state.items()}


ACCEPTANCE = 0.65
"""Acceptance rate to which the moves of a tempered run are adapted."""

TUNING = 32
"""Smallest number of particles per datum in the preliminary run that sets the powers of the look-ahead."""

# -- the chains --------------------------------------------------------------------------------------------------------


class Features:
    """The features of an autoregressive model in its order, some of them observed.

    The steps go from the first feature that any datum misses to the last feature that any datum has; `finish` draws
    the features after it. Each step continues the previous one, because the network's cache of the particles is held
    here and not in a state. The "row" of a state is the index of each particle at the last step.

    Args:
        program: p(x).
        x: ``(B, *event_shape)``; missing features are never read.
        mask: True where observed, ``(B, *event_shape)``.
        given: ``(B, *given_shape)`` for a conditional program.
    """

    def __init__(self, program: Autoregressive, x: Tensor, mask: Tensor, given: Any = None):
        self.program, self.given = program, given
        order = torch.tensor(program.order, device=x.device)
        self.mask = mask.flatten(1)[:, order]
        self.x = torch.where(mask, x, torch.zeros_like(x))
        self.values = self.x.flatten(1)[:, order]
        partly, wholly = self.mask.any(0).nonzero(), self.mask.all(0)
        self.first = int(wholly.long().cumprod(0).sum())
        self.last = max(self.first, int(partly.max()) + 1 if len(partly) else 0)

    def __len__(self) -> int:
        return self.last - self.first

    def start(self, batch: Sequence[int]) -> tuple[State, Tensor]:
        raw = self.program.raw_parameters(self.x, self.given)
        log_prob = self.program.factors.univariate(raw).log_prob(self.x).flatten(1)
        before = log_prob[:, list(self.program.order[: self.first])].sum(-1)
        self.chain = FeatureChain(self.program, self.x.shape[:1], self.given)
        for value in self.values[:, : self.first].unbind(1):
            self.chain.skip(value)
        self.chain.take(torch.arange(len(self.x), device=self.x.device).expand(tuple(batch)))
        return self._state(self.x.expand(*batch, *self.x.shape[1:])), before.expand(tuple(batch))

    def step(self, i: int, state: State) -> tuple[State, Tensor]:
        place = self.first + i
        self._take_resampled(state)
        p_i = self.chain.next()
        seen, value = self.mask[:, place], self.values[:, place]
        log_prob, drawn = p_i.log_prob(value), p_i.sample()
        weight = torch.where(seen, log_prob, torch.zeros_like(log_prob))
        return self._put_feature(state, place + 1, torch.where(seen, value, drawn)), weight

    def finish(self, state: State) -> Tensor:
        """x with the features after the last observed one drawn, ``(*batch, *event_shape)``."""
        self._take_resampled(state)
        for i in range(self.last + 1, len(self.program.order) + 1):
            state = self._put_feature(state, i, self.chain.next().sample())
        return state["x"]

    def _state(self, x: Tensor) -> State:
        batch = x.shape[: x.dim() - len(self.program.event_shape)]
        self.row = torch.arange(batch.numel(), device=x.device).reshape(batch)
        return {"x": x, "row": self.row}

    def _put_feature(self, state: State, i: int, value: Tensor) -> State:
        self.chain.put(value)
        return self._state(self.program.place(state["x"], i, value))

    def _take_resampled(self, state: State) -> None:
        """Keep the particles that a resampling has chosen, if there was one."""
        if state["row"] is not self.row:  # not by values, because reading them would wait for the device at every step
            self.chain.take(state["row"])


class Times:
    """The times of a diffusion, T to 1, with x_0 partly or fully observed.

    Args:
        program: p(x), plated or unrolled.
        x: ``(B, *event_shape)``; missing features are never read.
        mask: True where observed, ``(B, *event_shape)``.
        given: ``(B, *given_shape)`` for a conditional program.
    """

    def __init__(self, program: Denoising | UnrolledDiffusion, x: Tensor, mask: Tensor, given: Any = None):
        self.program = program.diffusion if isinstance(program, UnrolledDiffusion) else program
        self.mask, self.given = mask, given
        self.x = torch.where(mask, x, torch.zeros_like(x))
        self.x0 = self.program.clean(self.x)
        self.powers = self.x0.new_ones(self.program.num_steps + 1, 2, 1)

    def tune(self, num_particles: int, progress: bool = False) -> None:
        """Set each datum's powers by a preliminary run with ``num_particles`` or at least `TUNING` particles."""
        num_particles = max(num_particles, TUNING)
        self.powers = self.x0.new_ones(self.program.num_steps + 1, 2, len(self.x))
        state, _ = self.start((num_particles, len(self.x)))
        states = [state]
        for i in tqdm(range(len(self)), desc="tune", unit="step", disable=not progress, leave=False):
            state, _ = self.step(i, state)
            states.append({name: state[name] for name in ("log_path", "log_psi")})
        last = state["log_path"] + state["log_psi"]
        target = (last - last.mean(0)).T.unsqueeze(-1).double()
        for i, each in enumerate(states[:-1]):
            known = torch.stack([each["log_path"], each["log_psi"]], -1)
            known = (known - known.mean(0)).transpose(0, 1).double()
            ridge = 1e-6 * torch.eye(2, dtype=known.dtype, device=known.device)
            slopes = torch.linalg.solve(known.mT @ known + ridge, known.mT @ target)
            self.powers[self.program.num_steps - i] = slopes.squeeze(-1).T.to(self.powers.dtype)

    def __len__(self) -> int:
        return self.program.num_steps - 1

    def start(self, batch: Sequence[int]) -> tuple[State, Tensor]:
        p = self.program
        zero = p.zeros(*batch)
        prior = torch.distributions.Normal(zero, 1.0)
        guide = features_of(p.noised(self.x0.expand_as(zero), self._times_of(zero, p.num_steps)))
        with noise.drawing(batch):
            x_t = torch.where(self.mask, guide.sample(), prior.sample())
        return self._state(x_t, p.num_steps, self._log_prob_observed(prior.log_prob(x_t) - guide.log_prob(x_t)))

    def step(self, i: int, state: State) -> tuple[State, Tensor]:
        p, x_t, t = self.program, state["x_t"], self.program.num_steps - i
        before = self._log_gamma(state, t)
        times = self._times_of(x_t, t)
        model = features_of(p.reverse(x_t, times, self._denoised(state)))
        guide = features_of(p.reverse(x_t, times, self.x0))
        with noise.drawing(x_t.shape[:2]):
            x_s = torch.where(self.mask, guide.sample(), model.sample())
        log_path = state["log_path"] + self._log_prob_observed(model.log_prob(x_s) - guide.log_prob(x_s))
        state, log_gamma = self._state(x_s, t - 1, log_path)
        return state, log_gamma - before

    def finish(self, state: State) -> Tensor:
        """x_0 with its missing features drawn from p(x_0 | x_1), ``(*batch, *event_shape)``."""
        return torch.where(self.mask, self.x, self.program.likelihood(self._denoised(state)).sample())

    def _state(self, x_t: Tensor, t: int, log_path: Tensor) -> tuple[State, Tensor]:
        times = self._times_of(x_t, t)
        denoised = self.program.denoise(x_t, times, self.given)
        ahead = denoised
        if denoised.logits is None:
            ahead = Denoised(denoised.x0, self.program.posterior_variance(times))
        log_psi = self._log_prob_observed(features_of(self.program.likelihood(ahead)).log_prob(self.x))
        state = {"x_t": x_t, "x0": denoised.x0, "variance": denoised.variance.expand_as(x_t)}
        state |= {"log_path": log_path, "log_psi": log_psi}
        if denoised.logits is not None:
            state["logits"] = denoised.logits
        return state, self._log_gamma(state, t)

    def _log_gamma(self, state: State, t: int) -> Tensor:
        a, b = self.powers[t]
        log_gamma: Tensor = a * state["log_path"] + b * state["log_psi"]
        return log_gamma

    def _denoised(self, state: State) -> Denoised:
        return Denoised(state["x0"], state["variance"], state.get("logits"))

    def _log_prob_observed(self, log_prob: Tensor) -> Tensor:
        return torch.where(self.mask, log_prob, torch.zeros_like(log_prob)).reshape(*log_prob.shape[:2], -1).sum(-1)

    def _times_of(self, x_t: Tensor, t: int) -> Tensor:
        return torch.full(x_t.shape[:2], t, device=x_t.device)


class Tempered:
    """The densities of an annealing path, one temperature after another, with a move at each.

    Args:
        annealing_path: path from a tractable density to the posterior.
        betas: inverse temperatures, 0 to 1, ``(T + 1,)``.
        step_sizes: step sizes of the moves, by temperature and datum, ``(T + 1, B)``.
        transition: as for `dgm_pyro.infer.ais.ais`.
    """

    def __init__(self, annealing_path: AnnealingPath, betas: Tensor, step_sizes: Tensor, transition: Transition):
        self.annealing_path, self.betas = annealing_path, betas
        self.step_sizes, self.transition = step_sizes, transition

    def __len__(self) -> int:
        return len(self.betas) - 1

    def start(self, batch: Sequence[int]) -> tuple[State, Tensor]:
        u = self.annealing_path.start()
        return {"u": u}, u.new_zeros(tuple(batch))

    def step(self, i: int, state: State) -> tuple[State, Tensor]:
        weight = (self.betas[i + 1] - self.betas[i]) * self.annealing_path.densities(state["u"])[1]
        u, _ = self.transition(state["u"], self.step_sizes[i + 1], self.annealing_path.at(self.betas[i + 1]))
        return {"u": u}, weight


@suggesting
@torch.no_grad()
def smc(
    program: Program | Posterior,
    x: Tensor | None = None,
    given: Any = None,
    *,
    num_particles: int = 64,
    threshold: float = 0.5,
    num_temperatures: int = 30,
    num_leapfrog: int = 8,
    initial: Any = "prior",
    observed: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Population:
    """Estimate log p(x | given) by sequential Monte Carlo: along the chain of a diffusion, else by tempering.

    A diffusion costs one pass of the denoiser per particle and time, like the importance-weighted bound with the same
    number of particles, plus an eighth, or 32 particles, for the preliminary run of each datum. Other programs, and a
    `Posterior`, are annealed as by `dgm.infer.ais`, with resampling. They cost about
    ``1.25 * num_temperatures * (num_leapfrog + 2)`` gradients per particle. The estimate for a datum does not depend on
    the other data.

    Args:
        program: a `Posterior`, or a `Program` with continuous latents.
        x: ``(B, *event_shape)``, the data of a `Program`; a `Posterior` has its own.
        given: ``(B, *given_shape)`` for a conditional program.
        num_particles: K. Memory grows with ``K * B``.
        threshold: resample when the effective number of particles falls below this share of K; 0 never resamples,
            which is importance sampling.
        num_temperatures, num_leapfrog, initial, observed: options of the annealing, as for `dgm.infer.ais`; not used
            for a diffusion.
        seed: seed of all draws; the global random state does not change.
        progress: whether to show bars.

    Returns:
        The particles; for tempering, their state has the latents by name. For a `Posterior`, the dimension B is left
        out.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    >>> import torch, dgm_pyro as dgm
    >>> program = dgm.Diffusion(2, dgm.networks.DenoisingMLP((2,), (8,)), num_steps=5)
    >>> dgm.infer.smc(program, torch.zeros(3, 2)).log_evidence.shape
    torch.Size([3])
    """
    check_target(program, x)
    if isinstance(program, Standardized) and isinstance(core_of(program), Denoising | UnrolledDiffusion):
        assert x is not None  # `check_target` has asked
        program.check(x, given)
        found = smc(
            program.program, program.standard(x), program.standard_given(given), num_particles=num_particles,
            threshold=threshold, seed=seed, progress=progress,
        )  # fmt: skip
        return replace(found, log_weights=found.log_weights - program.log_volume())
    check_count(num_particles, "num_particles")
    check_number(threshold, "threshold", at_least=0)
    if isinstance(program, Denoising | UnrolledDiffusion):
        return _along_times(program, x, given, num_particles, threshold, seed, progress)
    betas, transition = temperatures(num_temperatures), HMC(num_leapfrog)
    with annealing(program, x, given, num_particles, initial, observed or {}, seed) as path:
        step_sizes = path.adapt(betas, transition, ACCEPTANCE, progress)
        stepper = Tempered(path, betas, step_sizes, transition)
        found = propagate(stepper, *path.batch, threshold=threshold, progress=progress)
        latents = path.latents(found.state["u"])
    if not isinstance(program, Posterior):
        return Population(latents, found.log_weights, found.resampled)
    latents = {name: value.squeeze(1) for name, value in latents.items()}
    return Population(latents, found.log_weights.squeeze(1), found.resampled.squeeze(0), program)


def _along_times(
    program: Denoising | UnrolledDiffusion,
    x: Any,
    given: Any,
    num_particles: int,
    threshold: float,
    seed: int,
    progress: bool,
) -> Population:
    program.check(x, given)
    with evaluating(program), seeded(seed, x.device), noise.per_datum(x, seed):
        chain = Times(program, x, torch.ones_like(x, dtype=torch.bool), given)
        chain.tune(max(2, num_particles // 8), progress)
        return propagate(chain, num_particles, len(x), threshold=threshold, progress=progress)
