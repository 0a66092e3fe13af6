r"""Diffusion models: p(x_0) as an integral over x_1 .. x_T; a fixed process adds noise, a learned one removes it.

The forward process is :math:`q(x_t \mid x_0) = N(\alpha_t x_0, \sigma_t^2)` with :math:`\alpha_t^2 + \sigma_t^2 = 1`.
The model runs backwards,

.. math::
    p(x_{0:T}) = p(x_T) \Big[\prod_{t=2}^{T} p(x_{t-1} \mid x_t)\Big]\, p(x_0 \mid x_1), \qquad
    p(x_{t-1} \mid x_t) = \int q(x_{t-1} \mid x_t, x_0)\, N(x_0; \hat x_0, v)\, dx_0,

where the network predicts :math:`\hat x_0` from x_t, and v is the variance of its error. Without v (Ho et al. 2020 have
v = 0) the reverse steps are too narrow, and the bound is loose unless there are very many steps (Bao et al. 2022,
theorem 1). The bound on log p(x_0) is a sum over time (Ho et al. 2020, eq. 5):

.. math::
    E_q\Big[\log p(x_0 \mid x_1) - KL(q(x_T \mid x_0) \| p(x_T))
    - \sum_{t=2}^{T} KL(q(x_{t-1} \mid x_t, x_0) \| p(x_{t-1} \mid x_t))\Big].

Two forms of one model, on the same parameters. *Plated* (`Diffusion`): a plate over time, subsampled, states the
sum. *Unrolled* (`Diffusion.unroll`): the definition, with one site per step, ``x_1 .. x_T``, each of which can be
conditioned.

*Preconditioning.* With ``predict="edm"`` the network F sees an input of unit variance, and its target has unit
variance, at every noise level. For data of variance :math:`s^2` (``sigma_data``), x_t has the variance
:math:`d_t^2 = \alpha_t^2 s^2 + \sigma_t^2`, and

.. math::
    \hat x_0 = c_{skip} x_t + c_{out} F(c_{in} x_t), \qquad
    c_{in} = \frac{1}{d_t}, \quad c_{skip} = \frac{\alpha_t s^2}{d_t^2}, \quad c_{out} = \frac{\sigma_t s}{d_t}.

Karras et al. (2022, table 1) write this for :math:`y = x_t / \alpha_t`, whose noise has the scale
:math:`\sigma_t / \alpha_t`: their c_out is the same, their c_skip and c_in are :math:`\alpha_t` times these. The
network receives :math:`c_{noise} = \tfrac14 \log (\sigma_t / \alpha_t)`, shifted and scaled to [0, 1]. For s = 1, F is
-v.

Source: Sohl-Dickstein et al. 2015 (arXiv 1503.03585); Ho, Jain and Abbeel 2020 (arXiv 2006.11239); Bao et al. 2022
(Analytic-DPM, arXiv 2201.06503); Karras et al. 2022 (EDM, arXiv 2206.00364).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import constraints, kl_divergence

import dgm_pyro.noise as noise
from dgm_pyro.checks import as_shape, check_choice, check_number
from dgm_pyro.factors import Term
from dgm_pyro.families import distributions
from dgm_pyro.families.conditionals import Normal, check_levels, positive
from dgm_pyro.families.samplers import Heun, Sampler, Spacing, Time, run_sampler, sampler_named, spacing_named
from dgm_pyro.networks.mlp import to_unit
from dgm_pyro.program import Program, call_network, weighting
from dgm_pyro.registry import register

__all__ = [
    "Denoised",
    "Denoising",
    "Diffusion",
    "ReverseChain",
    "Schedule",
    "UnrolledDiffusion",
    "cosine",
    "linear",
    "log_snr",
]


@register
class Schedule(nn.Module):
    r"""The noise schedule: :math:`\alpha_t, \sigma_t` for t = 0 .. T, with :math:`\alpha_t^2 + \sigma_t^2 = 1`.

    Args:
        alpha_bar: :math:`\bar\alpha_t = \alpha_t^2` for t = 1 .. T, strictly decreasing inside (0, 1): the
            signal-to-noise ratio falls.

    Attributes:
        alpha, sigma: signal and noise scale, ``(T + 1,)``, with alpha_0 = 1.
        log_snr: log of alpha^2 / sigma^2, ``(T + 1,)``; 0 at t = 0, where it is infinite.
        fall: T (SNR(t - 1) / SNR(t) - 1), the relative fall of the ratio per unit of t / T, ``(T + 1,)``; at t = 1 the
            value of t = 2, or 1 where T is 1.

    Raises:
        TypeError, ValueError: ``alpha_bar`` is no such sequence.
    """

    alpha: Tensor
    sigma: Tensor
    from_clean: Tensor
    from_noisy: Tensor
    spread: Tensor
    log_snr: Tensor
    fall: Tensor

    def __init__(self, alpha_bar: Tensor | Sequence[float]):
        super().__init__()
        try:
            bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"alpha_bar must be a tensor or a sequence of numbers, got {alpha_bar!r}") from error
        if bar.dim() != 1 or len(bar) == 0:
            raise ValueError(f"alpha_bar must be a non-empty sequence, got shape {tuple(bar.shape)}")
        if not bool(((bar > 0) & (bar < 1)).all()):
            raise ValueError("alpha_bar must lie strictly between 0 and 1 for t = 1 .. T")
        if not bool((bar[1:] < bar[:-1]).all()):
            first = int((bar[1:] >= bar[:-1]).nonzero()[0]) + 2
            raise ValueError(
                f"alpha_bar must fall at every step, for a falling signal-to-noise ratio, but it does not at t={first}"
            )
        self.num_steps = len(bar)
        # In double precision, for any precision of the program: samplers reckon with these, one time at a time.
        levels = torch.stack([bar.sqrt(), (1 - bar).sqrt(), bar.log() - (1 - bar).log()], 1)
        self.times = [Time(t, *level) for t, level in enumerate(levels.tolist(), 1)]
        log_snr = levels[:, 2]
        fall = self.num_steps * (-log_snr.diff()).expm1() if self.num_steps > 1 else torch.ones(1)
        self._constant("log_snr", _after_zero(log_snr))
        self._constant("fall", _after_zero(torch.cat([fall[:1], fall])[-self.num_steps :]))
        bar = torch.cat([bar.new_ones(1), bar])
        t = torch.arange(1, self.num_steps + 1)
        s = t - 1
        beta = 1 - bar[t] / bar[s]
        variance = beta * (1 - bar[s]) / (1 - bar[t])
        from_clean = bar[s].sqrt() * beta / (1 - bar[t])
        self._constant("alpha", bar.sqrt())
        self._constant("sigma", (1 - bar).sqrt())
        # q(x_{t-1} | x_t, x_0) = N(from_clean x_0 + from_noisy x_t, spread^2) for t >= 2 (Ho et al. 2020, eq. 7). There
        # is no such step from t = 1, where the spread would be 0; 1 keeps finite what is computed there and not used.
        variance[0] = 1
        self._constant("from_clean", _after_zero(from_clean))
        self._constant("from_noisy", _after_zero((bar[t] / bar[s]).sqrt() * (1 - bar[s]) / (1 - bar[t])))
        self._constant("spread", _after_zero(variance.sqrt()))

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.to(torch.get_default_dtype()), persistent=False)


def _after_zero(value: Tensor) -> Tensor:
    return torch.cat([value.new_zeros(1), value])


def linear(num_steps: int) -> Schedule:
    """Betas that rise linearly, 1e-4 to 0.02 at 1000 steps and in proportion otherwise (Ho et al. 2020, section 4)."""
    check_steps(num_steps)
    scale = 1000 / num_steps
    # Starts from the last step, which must reach noise, so that a single step does.
    beta = torch.linspace(0.02 * scale, 1e-4 * scale, num_steps, dtype=torch.float64).flip(0).clamp(max=0.999)
    return Schedule((1 - beta).cumprod(0))


def cosine(num_steps: int, offset: float = 0.008) -> Schedule:
    """A squared cosine for alpha_bar, betas at most 0.999 (Nichol and Dhariwal 2021, eq. 17)."""
    check_steps(num_steps)
    t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    curve = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    beta = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return Schedule((1 - beta).cumprod(0))


def log_snr(num_steps: int, highest: float = 6.0, lowest: float = -6.0) -> Schedule:
    """A log signal-to-noise ratio that falls linearly (Kingma et al. 2021, VDM, with fixed ends).

    For integers it spreads the bound evenly over time, so the estimate has far less variance than with a cosine.
    """
    check_steps(num_steps)
    return Schedule(torch.linspace(lowest, highest, num_steps, dtype=torch.float64).flip(0).sigmoid())


SCHEDULES = {"linear": linear, "cosine": cosine, "log-snr": log_snr}
# For importance-sampled times: the share drawn uniformly, and the decay of each time's running mean square.
EVEN_SHARE, MEMORY = 0.05, 0.98
PREDICTIONS = ("noise", "x0", "v", "edm", "levels")


def check_steps(num_steps: int) -> None:
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
        raise ValueError(f"num_steps must be a positive int, got {num_steps!r}")


def noising(name: str, fn: TorchDistribution) -> Tensor:
    """State a latent of the bound's estimate, such as a time or x at that time, which is no code of x."""
    marked: Any = {"is_noising": True}
    return pyro.sample(name, fn, infer=marked)


class Denoising(Program):
    """Base class of diffusions in discrete and in continuous time: the network's prediction, and the samplers.

    A subclass defines the `num_steps` times of its chain, their noise levels (`noise_at`), the time that the network
    receives (`clock`), the variance of its error (`denoised_variance`), and states its bound.

    Attributes:
        num_steps: T, the number of times of the chain.
    """

    num_steps: int
    grid: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int],
        denoiser: nn.Module,
        predict: str,
        levels: int | None,
        label_dropout: float,
        sigma_data: float | None,
    ):
        super().__init__()
        self.event_shape = as_shape(event_shape)
        if not isinstance(denoiser, nn.Module):
            raise TypeError(f"denoiser must be a torch.nn.Module, got {type(denoiser).__name__}")
        check_choice(predict, PREDICTIONS, "predict")
        if sigma_data is not None and predict != "edm":
            raise ValueError(f"sigma_data is for predict='edm' alone: leave it out for {predict!r}")
        usual = 0.5 if predict == "edm" else 1.0
        check_number(label_dropout, "label_dropout")
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout must be a probability below 1, got {label_dropout}")
        self.denoiser, self.predict = denoiser, predict
        self.sigma_data = usual if sigma_data is None else check_number(sigma_data, "sigma_data", above=0)
        self.levels = None if levels is None else check_levels(levels)
        self.label_dropout = label_dropout
        self.num_classes = getattr(denoiser, "num_classes", None)
        self.given_shape = getattr(denoiser, "given_shape", None)
        self.conditional = self.given_shape is not None
        if label_dropout > 0 and self.num_classes is None:
            raise ValueError("label_dropout needs a denoiser with num_classes: only labels can be hidden")
        if predict == "levels":
            if levels is None:
                raise ValueError("predict='levels' needs integer data: pass levels, or predict 'v' or 'edm'")
            self.register_buffer("grid", to_unit(torch.arange(levels), levels), persistent=False)

    # -- what a subclass says ----------------------------------------------------------------------------------------

    def noise_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, ``(*batch,)``, in a shape that broadcasts with x."""
        raise NotImplementedError

    def clock(self, t: Tensor) -> Tensor:
        """The time in [0, 1] that the network receives."""
        raise NotImplementedError

    def denoised_variance(self, t: Tensor) -> Tensor:
        """v, the variance of x_0 around the network's prediction from x_t; not used where it predicts levels."""
        raise NotImplementedError

    def posterior_variance(self, t: Tensor) -> Tensor:
        """An approximation of Var[x_0 | x_t], and v at the last time: for short chains and `completions` alone."""
        return self.denoised_variance(t)

    def times(self, num_steps: int, spacing: Spacing) -> list[Time]:
        """``num_steps`` times and their noise levels, from the noisiest to the last."""
        raise NotImplementedError

    def step_back(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and s of q(x_{t-1} | x_t, x_0) = N(a x_0 + b x_t, s^2) for t in 2 .. T, as `noise_at`."""
        raise NotImplementedError

    # -- the pieces of the equations -----------------------------------------------------------------------------------

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_in, c_skip and c_out at t, for data of standard deviation `sigma_data`; in the shapes of `noise_at`.

        c_out is also the standard deviation of x_0 given x_t, for Normal data.
        """
        alpha, sigma = self.noise_at(t)
        scale = ((alpha * self.sigma_data) ** 2 + sigma**2).sqrt()
        return 1 / scale, alpha * (self.sigma_data / scale) ** 2, sigma * (self.sigma_data / scale)

    def clean(self, x: Tensor) -> Tensor:
        """x as the chain's x_0: integers scaled to [-1, 1], reals as they are."""
        return to_unit(x, self.levels, self.zeros().dtype)

    def noised(self, x0: Tensor, t: Tensor) -> dist.TorchDistribution:
        """q(x_t | x_0), for x_0 ``(*batch, *event_shape)`` and t in 1 .. T, ``(*batch,)``."""
        alpha, sigma = self.noise_at(t)
        loc = alpha * x0
        return dist.Normal(loc, sigma.expand_as(loc)).to_event(len(self.event_shape))

    def reverse(self, x_t: Tensor, t: Tensor, x0: Tensor | Denoised) -> dist.TorchDistribution:
        """q(x_{t-1} | x_t, x_0) for t in 2 .. T; for a denoised x_0, the model's p(x_{t-1} | x_t)."""
        from_clean, from_noisy, scale = self.step_back(t)
        if isinstance(x0, Denoised):
            variance, x0 = x0.variance, x0.x0
            scale = (scale**2 + from_clean**2 * variance).sqrt()
        loc = from_clean * x0 + from_noisy * x_t
        return dist.Normal(loc, scale.expand_as(loc)).to_event(len(self.event_shape))

    def denoise(self, x_t: Tensor, t: Tensor, given: Any = None, guidance: float = 0.0) -> Denoised:
        """The network's prediction from x_t, ``(*batch, *event_shape)``, at t, ``(*batch,)``.

        Args:
            guidance: w in (1 + w) f(given) - w f(null), with f the network (Ho and Salimans 2021, eq. 6); both are
                computed in one call.
        """
        if guidance == 0.0:
            prediction = self._call_denoiser(x_t, t, given)
        else:
            both = torch.stack([given, torch.full_like(given, self._null_label())])
            both = both.reshape(2, *(1,) * (t.dim() - given.dim()), *given.shape)
            told, untold = self._call_denoiser(x_t.expand(2, *x_t.shape), t.expand(2, *t.shape), both)
            prediction = (1 + guidance) * told - guidance * untold
        alpha, sigma = self.noise_at(t)
        if self.predict == "levels":
            distance = (x_t.unsqueeze(-1) - alpha.unsqueeze(-1) * self.grid) / sigma.unsqueeze(-1)
            logits = prediction.movedim(-1 - len(self.event_shape), -1) - 0.5 * distance**2
            probabilities = logits.softmax(-1)
            mean = (probabilities * self.grid).sum(-1)
            return Denoised(mean, (probabilities * (self.grid - mean.unsqueeze(-1)) ** 2).sum(-1), logits)
        if self.predict == "noise":
            x0 = (x_t - sigma * prediction) / alpha
        elif self.predict == "v":
            x0 = alpha * x_t - sigma * prediction
        elif self.predict == "edm":
            _, c_skip, c_out = self.preconditioning(t)
            x0 = c_skip * x_t + c_out * prediction
        else:
            x0 = prediction
        return Denoised(x0, self.denoised_variance(t))

    def _call_denoiser(self, x_t: Tensor, t: Tensor, given: Any) -> Tensor:
        seen = self.preconditioning(t)[0] * x_t if self.predict == "edm" else x_t
        inputs: tuple[Any, ...] = (seen, self.clock(t).to(x_t.dtype))
        shapes: tuple[Any, ...] = (self.event_shape, torch.Size())
        if self.conditional:
            inputs, shapes = (*inputs, given), (*shapes, self.given_shape)
        batch, prediction = call_network(self.denoiser, inputs, shapes)
        shape = (self.levels, *self.event_shape) if self.predict == "levels" else tuple(self.event_shape)
        if tuple(prediction.shape[1:]) != shape:
            raise ValueError(
                f"the denoiser returned shape {tuple(prediction.shape)}, but to predict {self.predict!r} it must "
                f"return (B, *{shape})"
            )
        return prediction.reshape(*batch, *shape)

    def likelihood(self, denoised: Denoised) -> dist.TorchDistribution:
        """p(x_0 | x_1) around the denoised x_1; a mass on integers if there are `levels`."""
        event_dim = len(self.event_shape)
        if denoised.logits is not None:
            return dist.Categorical(logits=denoised.logits).to_event(event_dim)
        scale = denoised.variance.sqrt()
        if self.levels is not None:  # the logistic of scale 1 has the variance pi^2 / 3
            scale = scale * (math.sqrt(3) / math.pi)
            return distributions.DiscretizedLogistic(denoised.x0, scale, self.levels).to_event(event_dim)
        return dist.Normal(denoised.x0, scale).to_event(event_dim)

    def prior_kl(self, x0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)) in nats, ``(*batch,)``."""
        alpha, sigma = self.noise_at(self._one_time(self.num_steps, x0))
        kl = 0.5 * (sigma**2 + (alpha * x0) ** 2 - 1) - sigma.log()
        return self._sum_features(kl)

    def zeros(self, *batch: int) -> Tensor:
        """Zeros, ``(*batch, *event_shape)``, in the precision and on the device of the chain."""
        raise NotImplementedError

    def _weigh_errors(
        self, name: str, x0: Tensor, denoised: Denoised, level: tuple[Tensor, Tensor], share: Tensor | float
    ) -> Denoised:
        """The denoised x_0 to state the bound with; within `weighting_errors`, a constant.

        There the weighted error is a factor of its own, ``<name>_weighted_kl``. ``level`` is the log signal-to-noise
        ratio and its fall, ``(*batch,)`` each, and ``share`` the weight of a time in the mean over all times.
        """
        weight = weighting()
        if weight is None:
            return denoised
        if denoised.logits is not None:
            raise ValueError(
                "weighted errors need a predicted x_0, but this program predicts levels: build it with predict='v' or "
                "'edm', or train it by 'elbo'"
            )
        if hasattr(weight, "scaled_to"):
            weight = weight.scaled_to(self.sigma_data)
        log_snr, fall = level
        error = self._sum_features((x0 - denoised.x0) ** 2)
        pyro.factor(f"{name}_weighted_kl", -0.5 * share * weight(log_snr, fall) * fall * log_snr.exp() * error)
        return denoised.held()

    def _broadcast_with_x(self, value: Tensor) -> Tensor:
        """``(*batch,)`` in a shape that broadcasts with x."""
        return value.reshape((*value.shape, *(1,) * len(self.event_shape)))

    def _sum_features(self, value: Tensor) -> Tensor:
        return sum_rightmost(value, len(self.event_shape))

    def _null_label(self) -> int:
        if self.num_classes is None or self.label_dropout == 0:
            raise ValueError("guidance needs a denoiser with num_classes, trained with label_dropout")
        return self.num_classes

    def _drop_labels(self, given: Any, x: Tensor) -> Any:
        """``given`` with labels dropped at random in training mode; only for scoring x, never for drawing it."""
        if not self.training or self.label_dropout == 0:
            return given
        # Enumerated labels have no data dimension of their own yet.
        batch = torch.broadcast_shapes(given.shape, x.shape[: x.dim() - len(self.event_shape)])
        hidden = torch.rand(batch, device=given.device) < self.label_dropout
        return torch.where(hidden, self._null_label(), given)

    def unroll(self) -> UnrolledDiffusion:
        return UnrolledDiffusion(self)

    def completions(self, by: Any, x: Tensor, mask: Tensor, given: Any = None) -> tuple[Tensor, Tensor]:
        return by.over_times(self, x, mask, given)

    # -- codes: the two ends of the probability-flow ODE ---------------------------------------------------------------

    def codes(self) -> dict[str, Program]:
        return {"z": Normal(self.event_shape)}

    @torch.no_grad()
    def _encode(self, x: Tensor, given: Any, site: str, draw: bool, num_samples: int) -> Tensor:
        """The end of the probability-flow ODE that starts in x, by Heun's rule at all times. It is deterministic."""
        noisier = self._chosen_times(None, "uniform")[::-1]
        return run_sampler(Heun(), noisier[0].alpha * self.clean(x), noisier, self._denoiser(given))

    @torch.no_grad()
    def _decode(self, z: Tensor, given: Any, site: str, draw: bool) -> Tensor:
        """The mean of p(x_0 | x_1), or a draw, where x_1 is the start of the ODE that ends in z."""
        times, denoise = self._chosen_times(None, "uniform"), self._denoiser(given)
        found = self.likelihood(denoise(run_sampler(Heun(), z, times, denoise), times[-1]))
        return found.sample() if draw else distributions.mean_of(found, self.levels, z.device)

    # -- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        num_samples: int = 1,
        given: Any = None,
        *,
        sampler: str | Sampler = "ancestral",
        num_steps: int | None = None,
        spacing: str | Spacing = "uniform",
        guidance: float = 0.0,
        **options: Any,
    ) -> Tensor:
        """Draw x from p(x), or from p(x | given).

        Args:
            num_samples: number of draws.
            given: ``(num_samples, *given_shape)``, or one row, ``(1, *given_shape)``, for all draws.
            sampler: "ancestral" (the model itself), "ddim", "dpm++", "heun", or a `dgm_pyro.families.samplers.Sampler`.
            num_steps: number of the T times to stop at; default all.
            spacing: their spacing: "uniform", "quadratic", "karras", or a `dgm_pyro.families.samplers.Spacing`.
            guidance: strength w of classifier-free guidance; 0 is the model itself.
            options: not used; any other option is refused.

        Returns:
            ``(num_samples, *event_shape)``; int64 if there are `levels`.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        given = self.check_draws(num_samples, given, options)
        check_number(guidance, "guidance")
        return self.run_chain(torch.Size((num_samples,)), given, sampler, num_steps, spacing, guidance)

    def run_chain(
        self,
        batch: torch.Size,
        given: Any = None,
        sampler: str | Sampler = "ancestral",
        num_steps: int | None = None,
        spacing: str | Spacing = "uniform",
        guidance: float = 0.0,
    ) -> Tensor:
        """x_T ~ N(0, I), then backwards through ``num_steps`` of the times; ``(*batch, *event_shape)``."""
        step, times = sampler_named(sampler), self._chosen_times(num_steps, spacing)
        denoise = self._denoiser(given, guidance)
        x = run_sampler(step, torch.randn_like(self.zeros(*batch)), times, denoise)
        denoised = denoise(x, times[-1])
        if getattr(step, "draws_last", False):
            if denoised.logits is None:  # after a single step the last time is not t = 0, so its variance is not v
                denoised = Denoised(denoised.x0, self.posterior_variance(self._one_time(times[-1].t, x)))
            return self.likelihood(denoised).sample()
        if self.levels is None:
            return denoised.x0
        return ((denoised.x0 + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1).long()

    def _denoiser(self, given: Any, guidance: float = 0.0) -> Callable[[Tensor, Time], Denoised]:
        """`denoise` in the form that samplers call."""

        def denoise(x: Tensor, time: Time) -> Denoised:
            return self.denoise(x, self._one_time(time.t, x), given, guidance)

        return denoise

    def _one_time(self, t: Tensor | float, x: Tensor) -> Tensor:
        """t for all of x, ``(1, .., 1)`` in place of x's batch: what depends on t alone is computed once."""
        one = (1,) * (x.dim() - len(self.event_shape))
        return t.expand(one) if isinstance(t, Tensor) else torch.full(one, t, device=x.device)

    def _chosen_times(self, num_steps: int | None, spacing: str | Spacing) -> list[Time]:
        num_steps = self.num_steps if num_steps is None else num_steps
        check_steps(num_steps)
        return self.times(num_steps, spacing_named(spacing))


@register
class Diffusion(Denoising):
    r"""A diffusion model, in its plated form.

    The guide draws x_t ~ q(x_t | x_0) for a subsample of times; the model states the bound's terms there, and the
    plate scales them to the whole sum. Each datum has its own times: the subsample, shifted at random.

    Args:
        event_shape: shape of one x.
        denoiser: ``network(x_t, t / T)`` or ``network(x_t, t / T, given)``, to the shape of x. The times, ``(B,)``, may
            be one number, expanded: it must not write into them.
        noise_schedule: a `Schedule`, or one of "linear", "cosine", "log-snr".
        num_steps: T, for a schedule given by name.
        predict: what the network predicts: "noise", "x0", "v" = alpha noise - sigma x_0 (Salimans and Ho 2022), "edm"
            (preconditioned, Karras et al. 2022: see the module), or, for integers, "levels": logits of a prior over the
            levels of each feature, ``(B, levels, *event_shape)``, which Bayes' rule turns into p(x_0 | x_t) with the
            known noise; its mean is the denoised x_0, its variance v.
        levels: x takes the integers 0 .. levels - 1 (scaled to [-1, 1] for the chain), and p(x_0 | x_1) is a
            discretized logistic (with "levels", that Categorical), so that the bound is on a mass; None for reals,
            where p(x_0 | x_1) is Normal.
        subsample: number of times per datum in a training step.
        label_dropout: in training mode, the probability that a label is hidden, for classifier-free guidance.
        sigma_data: standard deviation of the data (for integers, after scaling) for the preconditioning of "edm", 0.5
            by default.
        importance: whether training draws times with large terms more often, with probabilities proportional to the
            running root mean square of each time's term, which is kept in a buffer. The terms are reweighted, so the
            bound does not change (Nichol and Dhariwal 2021, section 3.3).

    Sites of ``joint("x")``: ``x``, and in the plated form ``x_shift``, ``x_t`` and the factors ``x_likelihood``,
    ``x_kl``, ``x_T_kl``.

    The network is trained at the times 1 .. T only, so samplers stop at these: a spacing is rounded to them.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    mean_square: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int],
        denoiser: nn.Module,
        noise_schedule: Schedule | str = "cosine",
        *,
        num_steps: int = 100,
        predict: str = "v",
        levels: int | None = None,
        subsample: int = 1,
        label_dropout: float = 0.0,
        sigma_data: float | None = None,
        importance: bool = False,
    ):
        super().__init__(event_shape, denoiser, predict, levels, label_dropout, sigma_data)
        if isinstance(noise_schedule, str):
            if noise_schedule not in SCHEDULES:
                raise ValueError(
                    f"noise_schedule must be a Schedule or one of {', '.join(SCHEDULES)}, got {noise_schedule!r}"
                )
            noise_schedule = SCHEDULES[noise_schedule](num_steps)
        if not isinstance(noise_schedule, Schedule):
            raise TypeError(f"noise_schedule must be a Schedule or a name, got {type(noise_schedule).__name__}")
        num_steps = noise_schedule.num_steps
        if not isinstance(subsample, int) or isinstance(subsample, bool) or not 1 <= subsample <= num_steps:
            raise ValueError(f"subsample must be an int from 1 to the {num_steps} steps, got {subsample!r}")
        self.noise_schedule, self.subsample, self.num_steps = noise_schedule, subsample, num_steps
        self.importance = importance
        if importance:
            self.register_buffer("mean_square", torch.ones(self.num_steps))
        if predict != "levels":
            # sqrt(v) per time and feature: at first, what it is for Normal data of variance sigma_data^2.
            _, _, start = self.preconditioning(torch.arange(1, num_steps + 1))
            start = (start if levels is None else start.clamp_min(1 / (levels - 1))).expm1().log()
            self.raw_scale = nn.Parameter(start.expand(-1, *self.event_shape).clone())

    # -- the pieces of the equations -------------------------------------------------------------------------------

    def noise_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._level_at("alpha", t), self._level_at("sigma", t)

    def clock(self, t: Tensor) -> Tensor:
        if self.predict == "edm":  # c_noise, from 0 to 1
            fallen = self.noise_schedule.log_snr[1] - self.noise_schedule.log_snr
            return fallen[t] / fallen[-1] if self.num_steps > 1 else torch.zeros_like(fallen[t])
        return t.to(self.noise_schedule.alpha.dtype) / self.num_steps

    def denoised_variance(self, t: Tensor) -> Tensor:
        return positive(self.raw_scale[t - 1]) ** 2

    def zeros(self, *batch: int) -> Tensor:
        return self.noise_schedule.alpha.new_zeros((*batch, *self.event_shape))

    def step_back(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._level_at("from_clean", t), self._level_at("from_noisy", t), self._level_at("spread", t)

    def _level_at(self, name: str, t: Tensor) -> Tensor:
        return self._broadcast_with_x(getattr(self.noise_schedule, name)[t])

    def times(self, num_steps: int, spacing: Spacing) -> list[Time]:
        if num_steps > self.num_steps:
            raise ValueError(
                f"num_steps must be an int from 1 to the {self.num_steps} of the schedule, got {num_steps!r}"
            )
        every = self.noise_schedule.times
        noise = torch.tensor([-time.log_snr / 2 for time in every], dtype=torch.float64)
        chosen, limit = list[Time](), self.num_steps
        places = spacing(num_steps, noise).double().round().tolist()
        for place, left in zip(places, range(num_steps, 0, -1), strict=True):
            # Where a spacing is denser than the times are, neighbors are taken: no time twice.
            limit = max(left, min(int(place) + 1, limit))
            chosen.append(every[limit - 1])
            limit -= 1
        return chosen

    # -- the statements ----------------------------------------------------------------------------------------------

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        x = pyro.sample(name, ReverseChain(self, given), obs=value)
        x0 = self.clean(x)
        pyro.factor(f"{name}_T_kl", -self.prior_kl(x0))
        with self._noising(name, x0) as (t, weight, x_t):
            denoised = self.denoise(x_t, t, self._drop_labels(given, x_t))
            level = (self.noise_schedule.log_snr[t], self.noise_schedule.fall[t])
            denoised = self._weigh_errors(name, x0, denoised, level, weight / self.num_steps)
            kl = kl_divergence(self.reverse(x_t, t, x0), self.reverse(x_t, t, denoised))
            pyro.factor(f"{name}_kl", torch.where(t > 1, -weight * kl, torch.zeros_like(kl)))
            last = self.likelihood(denoised).log_prob(x)
            pyro.factor(f"{name}_likelihood", torch.where(t == 1, weight * last, torch.zeros_like(last)))
            if self.importance and self.training:
                self._remember(t, torch.where(t > 1, kl, last).detach())
        return x

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        x0 = self.clean(value)
        with self._noising(name, x0):
            pass

    def latents(self, name: str) -> tuple[str, ...]:
        return (f"{name}_t",) if self.subsample == self.num_steps else (f"{name}_shift", f"{name}_t")

    @contextlib.contextmanager
    def _noising(self, name: str, x0: Tensor) -> Iterator[tuple[Tensor, Tensor | float, Tensor]]:
        """Enter the plate over time and state x_t ~ q(x_t | x_0) there; yields t, the weight of its term, x_t."""
        shift: Any = 0
        drawn = self.subsample < self.num_steps
        if drawn:
            # One subsample of times for the whole batch would be noisy. Evenly spread and turned by a shift of each
            # datum's own, every time is as likely as before (systematic sampling).
            site = Even(self.mean_square) if self.importance else _Shift(self.num_steps, self.zeros())
            shift = noising(f"{name}_shift", site)
        spread = torch.arange(self.subsample, device=x0.device) * self.num_steps // self.subsample
        plate: Any = pyro.plate(f"{name}_time", self.num_steps, subsample=spread)
        with plate as indices:
            places = indices.reshape(-1, *(1,) * (-plate.dim - 1))
            weight: Tensor | float = 1.0
            if drawn and self.importance:
                probabilities = self.time_probabilities()
                comb = torch.arange(self.subsample, device=x0.device).reshape(places.shape).to(shift) / self.subsample
                t = torch.searchsorted(probabilities.cumsum(0), (comb + shift) % 1).clamp(max=self.num_steps - 1) + 1
                weight = 1 / (self.num_steps * probabilities[t - 1])
            else:
                t = (places + shift) % self.num_steps + 1
            batch = torch.broadcast_shapes(t.shape, x0.shape[: x0.dim() - len(self.event_shape)])
            t = t.expand(batch)
            yield t, weight, noising(f"{name}_t", self.noised(x0, t))

    def time_probabilities(self) -> Tensor:
        """Probability that a training step evaluates each of the times 1 .. T, ``(T,)``."""
        if not self.importance:
            return torch.full_like(self.noise_schedule.alpha[1:], 1 / self.num_steps)
        root = self.mean_square.sqrt()
        # A share of uniform times bounds the weights, and revisits times whose terms were small once.
        return (1 - EVEN_SHARE) * root / root.sum() + EVEN_SHARE / self.num_steps

    @torch.no_grad()
    def _remember(self, t: Tensor, term: Tensor) -> None:
        """Update each time's running mean square by the squares of ``term`` at that time."""
        t = t.expand(term.shape).reshape(-1) - 1
        seen = torch.zeros_like(self.mean_square).index_add(0, t, torch.ones_like(term).reshape(-1))
        squares = torch.zeros_like(self.mean_square).index_add(0, t, term.reshape(-1) ** 2)
        kept = MEMORY**seen
        self.mean_square.copy_(kept * self.mean_square + (1 - kept) * squares / seen.clamp_min(1))


@dataclass
class Denoised:
    """A denoiser's prediction from x_t: mean and variance of x_0; if it predicts levels, their logits, levels last."""

    x0: Tensor
    variance: Tensor
    logits: Tensor | None = None

    def held(self) -> Denoised:
        """The same prediction with a constant x_0; its variance keeps its gradient."""
        return Denoised(self.x0.detach(), self.variance)


def evenly(shape: torch.Size, like: Tensor) -> Tensor:
    """Numbers in [0, 1) of the dtype of ``like``, each uniform, together evenly spaced up to one random shift.

    Within `noise.per_datum`, each datum's particles are evenly spaced, with a random shift of their own.
    """
    own = noise.is_per_datum()
    teeth, shift = (shape[:-1], (*(1,) * (len(shape) - 1), *shape[-1:])) if own else (shape, ())
    count = math.prod(teeth)  # not numel(), which would fix the batch size in an export
    even = torch.arange(count, dtype=like.dtype, device=like.device) / max(1, count)
    even = even.reshape((*teeth, *(1,) * (len(shape) - len(teeth))))  # of tensors that track who reads what, too
    return (even + torch.rand(shift, dtype=like.dtype, device=like.device)) % 1


class Even(TorchDistribution):
    """Uniform on [0, 1) for each element, but evenly spread over the batch, particles of one datum first.

    Source: Kingma et al. 2021 (VDM), appendix I.1.
    """

    arg_constraints: ClassVar = {}
    has_rsample = False

    def __init__(self, like: Tensor, batch_shape: Sequence[int] = ()):
        self.like = like
        super().__init__(torch.Size(batch_shape), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.unit_interval

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Even:
        return Even(self.like, batch_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return evenly(self._extended_shape(torch.Size(sample_shape)), self.like)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.like.new_zeros(torch.broadcast_shapes(value.shape, self.batch_shape))


class _Shift(TorchDistribution):
    """Uniform on 0 .. num_steps - 1 for each element, but evenly spread over the batch, particles of one datum first.

    Source: Kingma et al. 2021 (VDM, arXiv 2107.00630), appendix I.1.
    """

    arg_constraints: ClassVar = {}
    has_rsample = False

    def __init__(self, num_steps: int, like: Tensor, batch_shape: Sequence[int] = ()):
        self.num_steps, self.like = num_steps, like
        super().__init__(torch.Size(batch_shape), validate_args=False)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.num_steps - 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _Shift:
        return _Shift(self.num_steps, self.like, batch_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        turned = evenly(self._extended_shape(torch.Size(sample_shape)), self.like)
        return (turned * self.num_steps).long().clamp(max=self.num_steps - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape, self.batch_shape)
        return self.like.new_full(shape, -math.log(self.num_steps))


class ReverseChain(TorchDistribution):
    """The x_0 of the reverse chain: `sample` runs the chain, and factors of the bound state the density."""

    arg_constraints: ClassVar = {}
    has_rsample = False

    def __init__(self, diffusion: Denoising, given: Any, batch_shape: Sequence[int] = ()):
        self.diffusion, self.given = diffusion, given
        super().__init__(torch.Size(batch_shape), diffusion.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        levels, event_dim = self.diffusion.levels, len(self.diffusion.event_shape)
        base = constraints.real if levels is None else constraints.integer_interval(0, levels - 1)
        return constraints.independent(base, event_dim)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ReverseChain:
        return ReverseChain(self.diffusion, self.given, batch_shape)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.diffusion.run_chain(torch.Size(sample_shape) + self.batch_shape, self.given)

    def factors(self, name: str, given: tuple[str, ...]) -> tuple[Term, ...]:
        """p(x_T) p(x_{T-1} | x_T, given) .. p(x | x_1, given): each variable and those that it is conditioned on."""
        names = [*(f"{name}_{t}" for t in range(self.diffusion.num_steps, 0, -1)), name]
        return ((names[0], ()), *((site, (above, *given)) for above, site in itertools.pairwise(names)))

    def blank(self) -> Tensor:
        return self.diffusion.zeros(*self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        batch = value.shape[: value.dim() - self.event_dim]
        return self.diffusion.zeros().new_zeros(torch.broadcast_shapes(batch, self.batch_shape))


@register
class UnrolledDiffusion(Program):
    """The definition: p(x_T) p(x_{T-1} | x_T) .. p(x_0 | x_1), one site per step, named ``x_T .. x_1`` and ``x``.

    The guide draws the same noising q(x_1 .. x_T | x_0) backwards, x_T first: each KL in time is analytic.

    Args:
        diffusion: the plated form, whose parameters it shares.
    """

    def __init__(self, diffusion: Denoising):
        super().__init__()
        self.diffusion = diffusion
        self.event_shape, self.levels = diffusion.event_shape, diffusion.levels
        self.conditional, self.given_shape = diffusion.conditional, diffusion.given_shape
        self.num_classes = diffusion.num_classes

    def support_given(self, given: Any = None, batch_size: int = 1) -> constraints.Constraint | None:
        return self.diffusion.support_given(given, batch_size)

    def completions(self, by: Any, x: Tensor, mask: Tensor, given: Any = None) -> tuple[Tensor, Tensor]:
        return self.diffusion.completions(by, x, mask, given)

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        p, num_steps = self.diffusion, self.diffusion.num_steps
        zero = p.zeros()
        x_t = pyro.sample(f"{name}_{num_steps}", dist.Normal(zero, 1.0).to_event(zero.dim()))
        given = p._drop_labels(given, x_t)
        for t in range(num_steps, 1, -1):
            time = p._one_time(t, x_t)
            x_t = pyro.sample(f"{name}_{t - 1}", p.reverse(x_t, time, p.denoise(x_t, time, given)))
        return pyro.sample(name, p.likelihood(p.denoise(x_t, p._one_time(1, x_t), given)), obs=value)

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        p, x0 = self.diffusion, self.diffusion.clean(value)
        x_t = pyro.sample(f"{name}_{p.num_steps}", p.noised(x0, p._one_time(p.num_steps, x0)))
        for t in range(p.num_steps, 1, -1):
            x_t = pyro.sample(f"{name}_{t - 1}", p.reverse(x_t, p._one_time(t, x_t), x0))

    def latents(self, name: str) -> tuple[str, ...]:
        return tuple(f"{name}_{t}" for t in range(self.diffusion.num_steps, 0, -1))
