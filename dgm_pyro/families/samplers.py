r"""Samplers: the step of a diffusion from x_t at one time to x_s at the next, less noisy time.

A sampler is a callable ``(x, t, s, denoise, carried) -> (x_s, carried)``. A `Time` has the noise level
:math:`\alpha, \sigma`; ``denoise(x, t)`` predicts x_0 by one network call; ``carried`` is a value that the sampler
keeps for its next step, None at the first step. With :math:`\hat x_0` from the denoiser, the noise in x_t is
:math:`\hat\epsilon = (x_t - \alpha_t \hat x_0) / \sigma_t`, and with the ratio of the signal-to-noise ratios,

.. math::
    r = \frac{\alpha_t / \sigma_t}{\alpha_s / \sigma_s} \in (0, 1), \qquad
    q(x_s \mid x_t, x_0) = N\big(\alpha_s x_0 + \sigma_s r \epsilon,\ \sigma_s^2 (1 - r^2)\big).

The deterministic samplers follow the probability-flow ODE (Song et al. 2021b). In :math:`y = x / \alpha` and
:math:`\tau = \log(\sigma / \alpha)` it is :math:`dy / d\tau = y - \hat x_0(\alpha y)`.

Every chain ends in p(x_0 | x), the denoiser's prediction at the last time: in a draw if the sampler ``draws_last``,
else in the mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dgm_pyro.checks import check_number

__all__ = [
    "DDIM",
    "Ancestral",
    "DPMSolver",
    "Heun",
    "Sampler",
    "Spacing",
    "Time",
    "karras",
    "quadratic",
    "run_sampler",
    "uniform",
]

Scale = float | Tensor
"""A float, or a tensor without dimensions."""


class Time(NamedTuple):
    """A time of a chain and its noise level: x_t = alpha x_0 + sigma noise; log_snr = 2 log(alpha / sigma)."""

    t: Any
    alpha: Scale
    sigma: Scale
    log_snr: Scale


Denoise = Callable[[Tensor, Time], Any]
"""``denoise(x, t)`` makes a `dgm_pyro.families.diffusion.Denoised`: ``x0`` and ``variance`` in the shape of x."""


class Sampler(Protocol):
    """One step of a chain: x at time t, ``(*batch, *event_shape)``, to x at the less noisy s; see the module."""

    def __call__(self, x: Tensor, t: Time, s: Time, denoise: Denoise, carried: Any) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class Ancestral:
    """Draw from the model's own p(x_s | x_t), which includes the variance of x_0 around x_0_hat (Bao et al. 2022)."""

    draws_last = True

    def __call__(self, x: Tensor, t: Time, s: Time, denoise: Denoise, carried: Any) -> tuple[Tensor, Any]:
        denoised = denoise(x, t)
        r = ratio(t, s)
        mean = s.alpha * (1 - r**2) * denoised.x0 + (s.sigma * r / t.sigma) * x
        variance = s.sigma**2 * (1 - r**2) + (s.alpha * (1 - r**2)) ** 2 * denoised.variance
        return mean + variance**0.5 * torch.randn_like(x), None


@dataclass(frozen=True)
class DDIM:
    """Keep part of the noise in x_t and replace the rest: eta = 0 keeps all of it, eta = 1 replaces as much as q does.

    At eta = 0 this is the first-order solver of the probability-flow ODE. At eta = 1 it is the ancestral sampler of Ho
    et al. 2020, which treats x_0_hat as exact; `Ancestral` adds its variance.

    Args:
        eta: share of new noise, in [0, 1].

    Raises:
        ValueError: ``eta`` lies outside of [0, 1].

    Source: Song et al. 2021 (arXiv 2010.02502), equations 12 and 16.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        check_number(self.eta, "eta", at_least=0, at_most=1)

    def __call__(self, x: Tensor, t: Time, s: Time, denoise: Denoise, carried: Any) -> tuple[Tensor, Any]:
        x0 = denoise(x, t).x0
        anew = self.eta**2 * (1 - ratio(t, s) ** 2)
        kept = s.sigma * (1 - anew) ** 0.5 / t.sigma
        x_s = (s.alpha - kept * t.alpha) * x0 + kept * x
        return x_s if self.eta == 0 else x_s + (s.sigma * anew**0.5) * torch.randn_like(x), None


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++(2M): extrapolates x_0_hat from the last two steps. Second order, one network call per step.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2.
    """

    def __call__(self, x: Tensor, t: Time, s: Time, denoise: Denoise, carried: Any) -> tuple[Tensor, Any]:
        x0 = denoise(x, t).x0
        estimate = x0
        if carried is not None:
            x0_before, before = carried
            estimate = torch.lerp(x0_before, x0, 1 + _half_log_snr_step(t, s) / _half_log_snr_step(before, t) / 2)
        return (s.sigma / t.sigma) * x + (s.alpha * (1 - ratio(t, s))) * estimate, (x0, t)


@dataclass(frozen=True)
class Heun:
    """Heun's rule for the probability-flow ODE in sigma / alpha. Second order, two network calls per step.

    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1.
    """

    def __call__(self, x: Tensor, t: Time, s: Time, denoise: Denoise, carried: Any) -> tuple[Tensor, Any]:
        noise_t, noise_s = t.sigma / t.alpha, s.sigma / s.alpha
        y = x / t.alpha
        slope = (y - denoise(x, t).x0) / noise_t
        ahead = y + (noise_s - noise_t) * slope
        slope_ahead = (ahead - denoise(s.alpha * ahead, s).x0) / noise_s
        return s.alpha * (y + (noise_s - noise_t) / 2 * (slope + slope_ahead)), None


SAMPLERS: dict[str, Sampler] = {"ancestral": Ancestral(), "ddim": DDIM(), "dpm++": DPMSolver(), "heun": Heun()}


def ratio(t: Time, s: Time) -> Scale:
    """r of the module's docstring: below 1 where s is less noisy than t."""
    return (t.alpha * s.sigma) / (t.sigma * s.alpha)


def _half_log_snr_step(t: Time, s: Time) -> Scale:
    return (s.log_snr - t.log_snr) / 2


def sampler_named(sampler: str | Sampler) -> Sampler:
    """The sampler of a name, or the callable itself.

    Raises:
        ValueError: there is no sampler of that name.
        TypeError: ``sampler`` is neither a name nor a callable.

    >>> sampler_named("ddim")
    DDIM(eta=0.0)
    """
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, or a Sampler, got {sampler!r}")
        return SAMPLERS[sampler]
    if not callable(sampler) or isinstance(sampler, type):
        raise TypeError(
            f"sampler must be a name or a callable (x, t, s, denoise, carried) -> (x_s, carried), got {sampler!r}"
        )
    return sampler


def run_sampler(sampler: Sampler, x: Tensor, times: Sequence[Time], denoise: Denoise) -> Tensor:
    """Run x from the first of ``times`` through all of them to the last; ``(*batch, *event_shape)``."""
    carried = None
    for t, s in itertools.pairwise(times):
        x, carried = sampler(x, t, s, denoise, carried)
    return x


# -- which times -------------------------------------------------------------------------------------------------------

Spacing = Callable[[int, Tensor], Tensor]
"""``spacing(num_steps, noise)``: the places of the steps, falling from ``len(noise) - 1`` to 0.

``noise`` is log(sigma / alpha) at evenly spaced times, rising; a place between two entries interpolates them linearly.
A single step is at the noisiest place.
"""

KARRAS_RHO = 7.0


def uniform(num_steps: int, noise: Tensor) -> Tensor:
    """Evenly spaced in time."""
    return torch.linspace(len(noise) - 1, 0, num_steps, dtype=noise.dtype, device=noise.device)


def quadratic(num_steps: int, noise: Tensor) -> Tensor:
    """Evenly spaced in the square root of time, so denser at little noise (Song et al. 2021, appendix D.2)."""
    return uniform(num_steps, noise) ** 2 / max(1, len(noise) - 1)


def karras(num_steps: int, noise: Tensor) -> Tensor:
    """Evenly spaced in (sigma / alpha)^(1/7), so densest at little noise (Karras et al. 2022, equation 5)."""
    if len(noise) == 1:
        return uniform(num_steps, noise)
    ends = (noise[[-1, 0]] / KARRAS_RHO).exp()
    wanted = KARRAS_RHO * torch.lerp(ends[0], ends[1], 1 - uniform(num_steps, noise[:2])).log()
    # The ends are exact to the last bit, so their places are too; a single step is the noisiest.
    wanted[-1], wanted[0] = noise[0], noise[-1]
    above = torch.searchsorted(noise, wanted).clamp(1, len(noise) - 1)
    below = above - 1
    return (below + (wanted - noise[below]) / (noise[above] - noise[below])).clamp(0, len(noise) - 1)


SPACINGS: dict[str, Spacing] = {"uniform": uniform, "quadratic": quadratic, "karras": karras}


def spacing_named(spacing: str | Spacing) -> Spacing:
    """The spacing of a name, or the callable itself.

    Raises:
        ValueError: there is no spacing of that name.
        TypeError: ``spacing`` is neither a name nor a callable.
    """
    if isinstance(spacing, str):
        if spacing not in SPACINGS:
            raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, or a Spacing, got {spacing!r}")
        return SPACINGS[spacing]
    if not callable(spacing):
        raise TypeError(f"spacing must be a name or a callable (num_steps, noise) -> places, got {spacing!r}")
    return spacing
