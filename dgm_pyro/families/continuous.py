r"""Diffusion in continuous time: a bound that no number of steps loosens, a schedule that is learned, a likelihood.

Time runs from 0, almost without noise, to 1, almost pure noise, and the log signal-to-noise ratio
:math:`\lambda(t) = \log \alpha_t^2 / \sigma_t^2` falls linearly between two ends. As the number
of steps goes to infinity the sum over time in the bound of `dgm_pyro.families.diffusion` becomes an integral,

.. math::
    \log p(x) \ge E_q\Big[\log p(x \mid x_{t=0}) - KL(q(x_{t=1} \mid x) \| p(x_{t=1}))
    - \tfrac12 \int_0^1 (-\lambda'(t))\, e^{\lambda(t)}\, \|x - \hat x(x_t, t)\|^2\, dt\Big].

*Which times.* The integral does not change if t = t(u) for an increasing map of [0, 1] onto itself: u is uniform, and
the slope dt/du is the weight of a time. So a learned noise schedule is a learned density of times, :math:`1 / t'(u)`.
It cannot change the bound, only the variance of its estimate, :math:`E[(t'(u)\, L(t(u)))^2]` with L the integrand. The
schedule minimizes this second moment, at fixed times and with L held constant, where only the density depends on it.
The two ends do enter the bound, and learn from it.

*The exact density.* The marginals of the noising are those of an ordinary differential equation too. In
:math:`y = x_t / \alpha_t` and :math:`\tau = -\lambda / 2` it is

.. math::
    \frac{dy}{d\tau} = y - \hat x, \qquad
    \frac{d}{d\tau} \log p_\tau(y) = -\operatorname{tr}\Big(1 - \frac{\partial \hat x}{\partial y}\Big),

a flow from x = y at t = 0 to noise: log p(x) is exact up to the solver's tolerance. It is the density of y at t = 0 in
the deterministic samplers, before their last step to the denoiser's mean, when y still has noise of scale
:math:`e^{-\lambda(0) / 2}`. The ancestral chain on the same network is a different model with another density.

Source: Kingma et al. 2021 (VDM, arXiv 2107.00630), sections 4 and 5, appendix I; Song et al. 2021 (arXiv 2011.13456),
section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from dgm_pyro.checks import check_count, check_number
from dgm_pyro.families.conditionals import positive
from dgm_pyro.families.diffusion import Denoised, Denoising, Even, ReverseChain, noising
from dgm_pyro.families.ode import solve
from dgm_pyro.families.samplers import Spacing, Time
from dgm_pyro.program import differentiating, weighting
from dgm_pyro.registry import register

__all__ = ["ContinuousDiffusion", "LogSNR"]


@register
class LogSNR(nn.Module):
    r"""The log signal-to-noise ratio, falling linearly in t from ``highest`` to ``lowest``; and the density of times.

    Args:
        highest, lowest: the ends. Reals are modeled down to noise of scale exp(-highest / 2).
        learned_ends: whether the ends are learned, by the bound.
        num_units: number of hidden units of the monotone network u -> t, whose weights are positive; with 0, t = u.

    Raises:
        ValueError: ``highest`` is not above ``lowest``.
    """

    highest: Tensor
    raw_width: Tensor

    def __init__(self, highest: float = 10.0, lowest: float = -6.0, *, learned_ends: bool = False, num_units: int = 0):
        super().__init__()
        check_number(highest, "highest")
        check_number(lowest, "lowest")
        if not highest > lowest:
            raise ValueError(f"highest must be a number above lowest, got highest={highest}, lowest={lowest}")
        check_count(num_units, "num_units", at_least=0)
        self.num_units = num_units
        width = torch.tensor(highest - lowest, dtype=torch.float64)
        raw_width = (width + (-(-width).expm1()).log()).to(torch.get_default_dtype())
        for name, value in (("highest", torch.tensor(float(highest))), ("raw_width", raw_width)):
            if learned_ends:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
        if num_units > 0:
            # u -> a line plus sigmoids about evenly spread centers, all increasing: nearly a line at first.
            self.centers = nn.Parameter(torch.linspace(0, 1, num_units))
            self.raw_steepness = nn.Parameter(torch.full((num_units,), float(num_units)))
            self.raw_heights = nn.Parameter(torch.full((num_units,), math.log(math.expm1(0.5 / num_units))))

    @property
    def width(self) -> Tensor:
        """Total decrease of the log signal-to-noise ratio."""
        return nn.functional.softplus(self.raw_width)

    def forward(self, t: Tensor) -> Tensor:
        """The log signal-to-noise ratio at t in [0, 1]."""
        return self.highest - self.width * t

    def spread(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """t(u) and its slope dt/du, for u in [0, 1]."""
        if self.num_units == 0:
            return u, torch.ones_like(u)
        heights, steepness = nn.functional.softplus(self.raw_heights), nn.functional.softplus(self.raw_steepness)
        start, end = (
            self._line_plus_sigmoids(x, heights, steepness) for x in (torch.zeros_like(u), torch.ones_like(u))
        )
        here = torch.sigmoid(steepness * (u.unsqueeze(-1) - self.centers))
        slope = 0.5 + (heights * steepness * here * (1 - here)).sum(-1)
        return (self._line_plus_sigmoids(u, heights, steepness) - start) / (end - start), slope / (end - start)

    def _line_plus_sigmoids(self, u: Tensor, heights: Tensor, steepness: Tensor) -> Tensor:
        return 0.5 * u + (heights * torch.sigmoid(steepness * (u.unsqueeze(-1) - self.centers))).sum(-1)

    def log_density(self, u: Tensor) -> Tensor:
        """Log density of times at t(u), ``(*batch,)``, with the gradient that it has at a fixed t.

        When the map changes, a fixed t belongs to another u: by the implicit function theorem, du = -dt(u) / t'(u).
        """
        t, slope = self.spread(u)
        moved = u - (t - t.detach()) / slope.detach()
        return -self.spread(moved)[1].log()


def learned() -> LogSNR:
    """A `LogSNR` whose ends and density of times are both learned."""
    return LogSNR(learned_ends=True, num_units=16)


CONTINUOUS_SCHEDULES = {"linear": LogSNR, "learned": learned}


@register
class ContinuousDiffusion(Denoising):
    r"""A diffusion in continuous time, in its plated form: one time for each datum and step of training.

    Args:
        event_shape: shape of one x.
        denoiser: ``network(x_t, t)`` or ``network(x_t, t, given)``, as for `Diffusion`. The log signal-to-noise ratio
            is linear in t, from its highest value at 0 to its lowest at 1.
        noise_schedule: a `LogSNR`, or "linear" (fixed), or "learned".
        num_steps: T of the chain that `unroll` writes out and that `sample` takes by default; training has no steps.
        predict, levels, label_dropout, sigma_data: as in `Diffusion`.

    Sites of ``joint("x")``: ``x``, ``x_first`` (x at t = 0), ``x_time`` (u), ``x_t``, and the factors
    ``x_likelihood``, ``x_T_kl``, ``x_kl``; in training, with a learned density of times, ``x_schedule_kl``, whose value
    is zero and whose gradient is that density's.

    Samplers may stop at any times, and take any number of steps.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        denoiser: nn.Module,
        noise_schedule: LogSNR | str = "linear",
        *,
        num_steps: int = 100,
        predict: str = "v",
        levels: int | None = None,
        label_dropout: float = 0.0,
        sigma_data: float | None = None,
    ):
        super().__init__(event_shape, denoiser, predict, levels, label_dropout, sigma_data)
        if isinstance(noise_schedule, str):
            if noise_schedule not in CONTINUOUS_SCHEDULES:
                names = ", ".join(CONTINUOUS_SCHEDULES)
                raise ValueError(f"noise_schedule must be a LogSNR or one of {names}, got {noise_schedule!r}")
            noise_schedule = CONTINUOUS_SCHEDULES[noise_schedule]()
        if not isinstance(noise_schedule, LogSNR):
            raise TypeError(f"noise_schedule must be a LogSNR or a name, got {type(noise_schedule).__name__}")
        if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 2:
            raise ValueError(
                f"num_steps must be an int of at least 2, because both ends of time are steps, got {num_steps!r}"
            )
        self.noise_schedule, self.num_steps = noise_schedule, num_steps
        if predict != "levels":
            # sqrt(v) per feature at t = 0: at first, what it is for Normal data of variance sigma_data^2.
            with torch.no_grad():
                _, _, start = self.preconditioning(torch.zeros((), dtype=noise_schedule.highest.dtype))
            start = start if levels is None else start.clamp_min(1 / (levels - 1))
            self.raw_scale = nn.Parameter(start.expm1().log().expand(self.event_shape).clone())

    # -- the pieces of the equations: t in [0, 1], or as an integer in 1 .. T one of the times of the chain ------------

    def _continuous_time(self, t: Tensor) -> Tensor:
        return t if t.is_floating_point() else (t - 1).to(self.noise_schedule.highest.dtype) / (self.num_steps - 1)

    def noise_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = self._broadcast_with_x(_held_in_weighting(self.noise_schedule(self._continuous_time(t))))
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()

    def clock(self, t: Tensor) -> Tensor:
        return self._continuous_time(t)

    def denoised_variance(self, t: Tensor) -> Tensor:
        """v at t = 0; zero elsewhere, because v has no effect in the limit of infinitely many steps."""
        v = positive(self.raw_scale) ** 2
        return torch.where(self._broadcast_with_x(self._continuous_time(t) == 0), v, torch.zeros_like(v))

    def posterior_variance(self, t: Tensor) -> Tensor:
        """v at t = 0; elsewhere the larger of v and the variance for Normal data of variance sigma_data^2."""
        v, (_, _, scale) = positive(self.raw_scale) ** 2, self.preconditioning(t)
        return torch.where(self._broadcast_with_x(self._continuous_time(t) == 0), v, torch.maximum(v, scale**2))

    def zeros(self, *batch: int) -> Tensor:
        return self.noise_schedule.highest.new_zeros((*batch, *self.event_shape))

    def step_back(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (alpha, sigma), (_, sigma_t) = self.noise_at(t - 1), self.noise_at(t)
        r2 = (-self.noise_schedule.width / (self.num_steps - 1)).exp()  # every step of the chain falls by as much
        return alpha * (1 - r2), sigma * r2.sqrt() / sigma_t, sigma * (1 - r2).sqrt()

    def times(self, num_steps: int, spacing: Spacing) -> list[Time]:
        ends = torch.tensor([0.0, 1.0], device=self.noise_schedule.highest.device, dtype=torch.float64)
        places = spacing(num_steps, -self.noise_schedule(ends) / 2).to(ends)
        log_snr = self.noise_schedule(places)
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        told = places.to(self.noise_schedule.highest.dtype)
        return [Time(*level) for level in zip(told, alpha, sigma, log_snr, strict=True)]

    # -- the statements ----------------------------------------------------------------------------------------------

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        x = pyro.sample(name, ReverseChain(self, given), obs=value)
        x0 = self.clean(x)
        pyro.factor(f"{name}_T_kl", -self.prior_kl(x0))
        first, u, t, slope, x_t = self._noising(name, x0)
        zero, given = torch.zeros_like(t), self._drop_labels(given, x_t)
        log_snr, width = _held_in_weighting(self.noise_schedule(t)), _held_in_weighting(self.noise_schedule.width)
        if weighting() is None:
            at_first, at_t = self._denoise_both((first, zero), (x_t, t), given)
        else:
            at_t = self._weigh_errors(name, x0, self.denoise(x_t, t, given), (log_snr, width.expand_as(t)), slope)
            at_first = self.denoise(first, zero, given).held()  # in a call of its own, which needs no gradient
        pyro.factor(f"{name}_likelihood", self.likelihood(at_first).log_prob(x))
        loss = 0.5 * width * slope * log_snr.exp() * self._sum_features((x0 - at_t.x0) ** 2)
        pyro.factor(f"{name}_kl", -loss)
        if self.training and self.noise_schedule.num_units > 0 and weighting() is None:
            square = loss.detach() ** 2
            descended = -square / square.mean() * self.noise_schedule.log_density(u)
            pyro.factor(f"{name}_schedule_kl", descended.detach() - descended)
        return x

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        self._noising(name, self.clean(value))

    def latents(self, name: str) -> tuple[str, ...]:
        return f"{name}_first", f"{name}_time", f"{name}_t"

    def _noising(self, name: str, x0: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """State x at t = 0, a time and x at that time; x_first, u, t, dt/du, x_t."""
        start = x0.new_zeros(x0.shape[: x0.dim() - len(self.event_shape)])
        first = noising(f"{name}_first", self.noised(x0, start))
        u = noising(f"{name}_time", Even(self.noise_schedule.highest))
        t, slope = (value.detach() for value in self.noise_schedule.spread(u))
        return first, u, t, slope, noising(f"{name}_t", self.noised(x0, t))

    def _denoise_both(
        self, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], given: Any
    ) -> tuple[Denoised, Denoised]:
        """`denoise` of two pairs (x, t), in one call of the network."""
        batches = [x.shape[: x.dim() - len(self.event_shape)] for x, _ in (one, other)]
        if self.given_shape is not None:
            batches.append(given.shape[: given.dim() - len(self.given_shape)])
        batch = torch.broadcast_shapes(*batches, one[1].shape, other[1].shape)
        x = torch.stack([x.expand(*batch, *self.event_shape) for x, _ in (one, other)])
        denoised = self.denoise(x, torch.stack([t.expand(batch) for _, t in (one, other)]), given)
        logits = (None, None) if denoised.logits is None else denoised.logits
        first, second = zip(denoised.x0, denoised.variance.expand_as(denoised.x0), logits, strict=True)
        return Denoised(*first), Denoised(*second)

    # -- the likelihood of the flow ----------------------------------------------------------------------------------

    @torch.no_grad()
    def ode_log_prob(
        self, x: Tensor, given: Any = None, *, probes: int | None = None, tolerance: float = 1e-5
    ) -> Tensor:
        """log p(x) in nats under the probability-flow ODE, exact up to the solver's tolerance.

        The density is that of the flow at t = 0, where noise of scale ``exp(-noise_schedule.highest / 2)`` remains
        (0.007 by default). The samplers' last step, to the denoiser's mean, removes this noise and is not part of the
        density. So the samplers' draws have less spread than this density, where the noise is not small compared with
        the data.

        Args:
            x: ``(B, *event_shape)``, reals.
            given: ``(B, *given_shape)`` for a conditional program.
            probes: None for the exact divergence, which costs a backward pass per feature; else that many random
                directions per datum to estimate it (Hutchinson 1989).
            tolerance: largest relative error of a step of the solver.

        Returns:
            ``(B,)``; with probes ``(probes, B)``, unbiased estimates: their mean over the rows is the estimate, and
            their standard deviation over the root of ``probes`` its standard error.

        Raises:
            ValueError: the program is a mass on integers, which has no flow; or x does not fit.
            RuntimeError: the solver needs too many steps.
        """
        if self.levels is not None:
            raise ValueError(
                f"ode_log_prob is a density on reals, but this program is a mass on the integers 0 .. "
                f"{self.levels - 1}: use dgm.evaluate for its bound, or train one on x + torch.rand_like(x)"
            )
        if probes is not None:
            check_count(probes, "probes")
        check_number(tolerance, "tolerance", above=0)
        self.check(x, given)
        size, dims = len(x), self.event_shape.numel()
        if probes is None:
            directions = torch.eye(dims, dtype=x.dtype, device=x.device).unsqueeze(1).expand(dims, size, dims)
        else:
            directions = 2.0 * torch.randint(2, (probes, size, dims), device=x.device).to(x.dtype) - 1

        highest, width = (float(value) for value in (self.noise_schedule.highest, self.noise_schedule.width))

        def slope(tau: Tensor, state: Tensor) -> Tensor:
            t = (highest + 2 * tau) / width
            alpha, _ = self.noise_at(t)
            with differentiating("ode_log_prob"):
                y = state[:, :dims].reshape(x.shape).requires_grad_()
                x0 = self.denoise(alpha * y, t, given).x0.reshape(size, dims)
            rows = torch.autograd.grad(x0, y, directions, is_grads_batched=True)[0].reshape(-1, size, dims)
            traces = (rows * directions).sum(-1)
            traces = traces.sum(0, keepdim=True) if probes is None else traces
            return torch.cat([state[:, :dims] - x0.detach(), dims - traces.T], 1)

        start = torch.cat([x.reshape(size, dims), x.new_zeros(size, 1 if probes is None else probes)], 1)
        end = solve(slope, start, -highest / 2, (width - highest) / 2, tolerance=tolerance)
        alpha = torch.sigmoid(self.noise_schedule.highest - self.noise_schedule.width).sqrt()
        prior = dist.Normal(0.0, 1.0).log_prob(alpha * end[:, :dims]).sum(-1) + dims * alpha.log()
        log_prob = prior + end[:, dims:].T
        return log_prob[0] if probes is None else log_prob


def _held_in_weighting(level: Tensor) -> Tensor:
    """A noise level, constant within `weighting_errors`: learned ends could lower the error by removing the noise."""
    return level if weighting() is None else level.detach()
