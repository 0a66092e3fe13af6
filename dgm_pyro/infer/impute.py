r"""Missing features: draws of the unobserved part of x given the rest.

.. math::
    p(x_{\text{mis}} \mid x_{\text{obs}}) \propto p(x_{\text{mis}}, x_{\text{obs}})

Every method makes K weighted draws, whose mean weight is an unbiased estimate of :math:`p(x_{\text{obs}})`. The
returned draws are chosen among these in proportion to the weights. The method depends on the program:

=================================  ================================================================================
independent features               exact
`Autoregressive`                   exact where the observed features come first in the order, else SMC over features
`AnyOrder`                         exact: the observed features come first; in one order, importance weights
`Diffusion`                        SMC over times, with a look-ahead at the observed features
`VAE`, any prior                   annealing of the latents to p(z | x_obs), then p(x_mis | z); for discrete latents,
                                   importance weights of draws from the prior
`Flow`, other densities on reals   annealing of the missing features
`Dequantized`                      annealing of the point in the cells of the observed and the range of the missing
`Labeled`                          any of these for every y, weighted by p(y)
=================================  ================================================================================

Methods that are not exact converge as the number of particles or temperatures grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from dgm_pyro.checks import as_shape, check_count, check_seed, check_tensor, check_type, generator, suggesting
from dgm_pyro.evaluation import evaluating
from dgm_pyro.families.anyorder import AnyOrderDistribution, InOrder
from dgm_pyro.families.autoregressive import Autoregressive, AutoregressiveDistribution
from dgm_pyro.families.dequantized import Dequantized
from dgm_pyro.families.diffusion import Denoising
from dgm_pyro.families.distributions import features_of
from dgm_pyro.infer.ais import HMC, AnnealingPath, ToPosterior, temperatures
from dgm_pyro.infer.posterior import joint_trace, log_joint, with_latent_chains
from dgm_pyro.infer.smc import Features, Times, propagate, systematic, take
from dgm_pyro.program import (
    Conditional,
    Program,
    batch_plates,
    check_program,
    hidden,
    latent_sites,
    parameter_of,
    seeded,
)

__all__ = ["REGIONS", "Imputer", "hide", "impute"]

Weighted = tuple[Tensor, Tensor]  # x, (K, B, *event_shape), and log weights, (K, B)

PARTICLES, DISCRETE = 64, 4096
"""Default numbers of particles per datum: in general, and for draws from a discrete prior."""


@suggesting
def impute(
    program: Program,
    x: Tensor,
    mask: Tensor,
    num_samples: int = 1,
    given: Any = None,
    *,
    num_particles: int | None = None,
    num_temperatures: int = 100,
    num_leapfrog: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Draw the missing features of x given the observed ones.

    Args:
        program: p(x).
        x: ``(B, *event_shape)``; missing features are never read, and may be NaN.
        mask: bool, True where observed, ``event_shape`` or ``(B, *event_shape)``.
        num_samples: S, draws for each datum. They are chosen by systematic resampling: one particle is returned twice
            only if its weight is above 1 / S.
        given: ``(B, *given_shape)`` for a conditional program.
        num_particles: weighted draws among which these are chosen; default 64, or 4096 where discrete latents are
            drawn from the prior, and at least ``4 * num_samples``. More are more accurate, at a higher cost.
        num_temperatures, num_leapfrog: options of the annealing, see `ais`.
        seed: seed of all draws; the global random state does not change.
        progress: whether to show a bar.

    Returns:
        ``(S, B, *event_shape)`` of x's dtype, with the observed features unchanged.

    Raises:
        ValueError, TypeError: the mask does not fit, or there is no method for this program and this mask.

    >>> import torch, dgm_pyro as dgm
    >>> program = dgm.Autoregressive(dgm.Bernoulli(3, dgm.networks.MADE(3, 1, hidden=(8,))))
    >>> x = torch.tensor([[1, 0, 0]])
    >>> dgm.infer.impute(program, x, torch.tensor([True, False, False]), num_samples=5)[:, 0, 0]
    tensor([1, 1, 1, 1, 1])
    """
    check_program(program)
    check_count(num_samples, "num_samples")
    if program.variable != "x":
        raise ValueError(f"this {type(program).__name__} is a model of labels: it has no x to impute")
    check_tensor(x, program.event_shape, "x", "the program's event_shape")
    mask = _checked_mask(mask, x)
    known = torch.where(mask, x, program.placeholder().to(x.dtype))
    program.check(known, given)
    imputer = Imputer(num_samples, num_particles, num_temperatures, num_leapfrog, progress)
    with evaluating(program), seeded(seed, x.device), torch.no_grad():
        drawn, log_weights = program.completions(imputer, known, mask, given)
        chosen = systematic(log_weights, num_samples)
        shuffled = torch.rand(chosen.shape, dtype=log_weights.dtype, device=x.device).argsort(0)
        chosen = chosen.gather(0, shuffled)  # otherwise equal draws would be neighbors
        drawn = drawn[chosen, torch.arange(len(x), device=x.device)]
    return torch.where(mask, x, drawn.to(x.dtype))


def _checked_mask(mask: Tensor, x: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a tensor of bool, True where x is observed, got {kind}: use mask.bool()")
    if mask.shape not in (x.shape, x.shape[1:]):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, but x has {tuple(x.shape)}: pass {tuple(x.shape[1:])}, one mask for "
            f"all data, or {tuple(x.shape)}"
        )
    return mask.to(x.device).expand_as(x)


REGIONS = ("left", "right", "top", "bottom", "center", "random:SHARE")
"""Names of the regions that `hide` knows."""


def hide(region: str, event_shape: Sequence[int], seed: int = 0) -> Tensor:
    """A mask for `impute` that is False in a region: bool, of ``event_shape``.

    Args:
        region: "left", "right", "top" or "bottom" hides half of an image (..., H, W), "center" the middle half of its
            rows and columns, and "random:0.5" this share of the features. Data without rows have only "left", "right"
            and "random".
        event_shape: shape of one x.
        seed: seed of the random region.

    Raises:
        ValueError: there is no such region.

    >>> hide("left", (1, 2, 4))
    tensor([[[False, False,  True,  True],
             [False, False,  True,  True]]])
    """
    shape = as_shape(event_shape)
    check_type(region, str, "region", f"one of {', '.join(REGIONS)}")
    name, _, share = region.partition(":")
    check_seed(seed)
    if name == "random":
        try:
            wanted = float(share)
        except ValueError:
            wanted = -1.0
        if not 0 < wanted <= 1:
            raise ValueError(f"a random region needs the share of features to hide, such as random:0.5, got {region!r}")
        order = torch.rand(shape.numel(), generator=generator(seed)).argsort().argsort()
        return (order >= round(wanted * shape.numel())).reshape(shape)
    if region not in REGIONS[:-1]:
        raise ValueError(f"region (--region) must be one of {', '.join(REGIONS)}, got {region!r}")
    if len(shape) < 2 and name not in ("left", "right"):
        raise ValueError(
            f"region {region!r} needs images, but x has event_shape {tuple(shape)}: use left, right or random"
        )
    mask = torch.ones(shape, dtype=torch.bool)
    height, width = (1, *shape)[-2:]
    rows, columns = slice(None), slice(None)
    if name in ("left", "right"):
        columns = slice(width // 2) if name == "left" else slice(width - width // 2, None)
    elif name in ("top", "bottom"):
        rows = slice(height // 2) if name == "top" else slice(height - height // 2, None)
    else:
        rows, columns = (slice(size // 4, size - size // 4) for size in (height, width))
    mask.reshape(-1, height, width)[:, rows, columns] = False
    return mask


class Imputer:
    """Methods for weighted draws of missing features; a program chooses one in `Program.completions`."""

    def __init__(
        self, num_samples: int, num_particles: int | None, num_temperatures: int, num_leapfrog: int, progress: bool
    ):
        self.num_samples, self.progress = num_samples, progress
        self.num_particles = None if num_particles is None else check_count(num_particles, "num_particles")
        self.betas, self.transition = temperatures(num_temperatures), HMC(check_count(num_leapfrog, "num_leapfrog"))

    def count(self, default: int) -> int:
        return self.num_particles or max(default, 4 * self.num_samples)

    def over_features(self, program: Autoregressive, x: Tensor, mask: Tensor, given: Any) -> Weighted:
        return self.chain(Features(program, x, mask, given), len(x))

    def in_order(self, program: InOrder, x: Tensor, mask: Tensor, given: Any) -> Weighted:
        """Each missing feature given those before it, weighted by the observed features given those before them."""
        keys = program.keys.expand(self.count(PARTICLES), *x.shape)
        return AnyOrderDistribution(program.program, keys, None, given).completed(x, mask, observed_first=False)

    def over_times(self, program: Denoising, x: Tensor, mask: Tensor, given: Any) -> Weighted:
        times = Times(program, x, mask, given)
        times.tune(max(2, self.count(PARTICLES) // 8), self.progress)
        return self.chain(times, len(x))

    def over_cells(self, program: Dequantized, x: Tensor, mask: Tensor, given: Any) -> Weighted:
        return self.annealed(_PathOfCells(program, x, mask, given, self.count(PARTICLES)))

    def chain(self, stepper: Features | Times, num_data: int) -> Weighted:
        # Without a step the weights are equal, and the draws are exact.
        num_particles = self.count(PARTICLES) if len(stepper) else self.num_samples
        population = propagate(stepper, num_particles, num_data, progress=self.progress)
        # Features after the last observed one are drawn only for the particles that are kept.
        kept = take(population.state, systematic(population.log_weights, self.num_samples))
        return stepper.finish(kept), population.log_evidence.expand(self.num_samples, num_data)

    def annealed(self, annealing_path: _PathOfCells | _PathOfReals) -> Weighted:
        step_sizes = annealing_path.adapt(self.betas, self.transition, 0.65, self.progress)
        u, log_weights, _ = annealing_path.anneal(
            annealing_path.start(), self.betas, step_sizes, self.transition, self.progress
        )
        return annealing_path.features(u), log_weights

    def of_distribution(self, program: Conditional, x: Tensor, mask: Tensor, given: Any) -> Weighted:
        distribution = program(given)
        batch = (self.count(self.num_samples), len(x))
        try:
            features = features_of(distribution)
        except ValueError:
            if program.levels is not None:
                raise ValueError(
                    f"there is no method to impute with {type(program).__name__}: its features are integers that "
                    "depend on one another, and it is no chain over them"
                ) from None
            return self.annealed(_PathOfReals(program, x, mask, given, self.count(PARTICLES)))
        log_prob = torch.where(mask, features.log_prob(x), 0.0).reshape(len(x), -1).sum(-1)
        return distribution.expand(batch).sample(), log_prob.expand(batch)

    def over_latents(self, program: Program, x: Tensor, mask: Tensor, given: Any) -> Weighted:
        """z ~ p(z | x_obs), then x_mis ~ p(x_mis | z)."""
        program = with_latent_chains(program)
        trace: Any = joint_trace(program, x, given=given, batch=(1, len(x)))
        own = [name for name in latent_sites(trace) if name.startswith(f"{program.variable}_")]
        if own:
            raise ValueError(
                f"there is no method to impute with this {type(program).__name__}: its likelihood has latents of its "
                f"own, {', '.join(own)}, that depend on x: use a likelihood without latents"
            )
        if any(trace.nodes[name]["fn"].support.is_discrete for name in latent_sites(trace)):
            batch = (self.count(DISCRETE), len(x))
            trace = joint_trace(program, x, given=given, batch=batch)
            latents = {name: trace.nodes[name]["value"] for name in latent_sites(trace)}
            _, log_weights = log_joint(program, x, latents, given, batch=batch, mask=mask)
        else:
            path = ToPosterior(program, x, given, self.count(PARTICLES), "prior", {}, mask)
            batch = path.batch
            step_sizes = path.adapt(self.betas, self.transition, 0.65, self.progress)
            u, log_weights, _ = path.anneal(path.start(), self.betas, step_sizes, self.transition, self.progress)
            latents, _ = path.coordinates.unflatten(u)
        known = _DrawMissing(program.variable, x, mask)
        with hidden(), known, poutine.condition(data=latents), batch_plates(batch):
            drawn = program.joint(program.variable, None, given)
        return drawn, log_weights


class _DrawMissing(poutine.messenger.Messenger):
    """Draws the missing features of an autoregressive site, given observed features that come first in its order."""

    def __init__(self, name: str, x: Tensor, mask: Tensor):
        super().__init__()
        self.name, self.x, self.mask = name, x, mask

    def _pyro_sample(self, message: Any) -> None:
        fn = message["fn"]
        if message["name"] != self.name or not isinstance(fn, AutoregressiveDistribution):
            return
        x, mask = self.x.flatten(1), self.mask.flatten(1)

        def draw(i: int, p_i: Any) -> Tensor:
            feature = fn.program.order[i - 1]
            return torch.where(mask[:, feature], x[:, feature], p_i.sample())

        message["value"], message["done"] = fn.program.chain(draw, fn.batch_shape, fn.given), True


class _PathOfReals(AnnealingPath):
    """The path from Normals to p(x), in unconstrained coordinates.

    The Normals are fitted to the program's own draws of each missing feature. The coordinates of observed features
    move too, but have no meaning.
    """

    def __init__(self, program: Conditional, x: Tensor, mask: Tensor, given: Any, num_chains: int):
        self.program, self.x, self.mask, self.given, self.batch = program, x, mask, given, (num_chains, len(x))
        support: Any = program(given).support
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        if support.is_discrete or support.event_dim > 0:
            raise ValueError(f"there is no method to impute with {type(program).__name__}: its support is {support}")
        self.transform = biject_to(support)
        draws = self.transform.inv(program(given).expand((256, len(x))).sample())
        self.initial = torch.distributions.Normal(draws.mean(0), 1.5 * draws.std(0) + 1e-6)

    def start(self) -> Tensor:
        start: Tensor = self.initial.sample((self.batch[0],)).reshape(*self.batch, -1)
        return start

    def features(self, u: Tensor) -> Tensor:
        return torch.where(self.mask, self.x, self.transform(u.reshape(*self.batch, *self.x.shape[1:])))

    def densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        u = u.reshape(*self.batch, *self.x.shape[1:])
        value = self.transform(u)
        start = self._missing(self.initial.log_prob(u))
        log_det = self._missing(self.transform.log_abs_det_jacobian(u, value))
        log_p = self.program.exact_log_prob(torch.where(self.mask, self.x, value), self.given)
        return start, log_p + log_det - start

    def _missing(self, terms: Tensor) -> Tensor:
        return torch.where(self.mask, torch.zeros_like(terms), terms).reshape(*self.batch, -1).sum(-1)


class _PathOfCells(AnnealingPath):
    """The path to p(v) from the uniform on the observed features' cells and the missing ones' unit interval."""

    def __init__(self, program: Dequantized, x: Tensor, mask: Tensor, given: Any, num_chains: int):
        if not program.flow.tractable:
            raise ValueError(
                f"there is no method to impute with a Dequantized {type(program.flow).__name__}: its p(v) is not "
                "exact. Dequantize a dgm.Flow"
            )
        self.program, self.given, self.batch = program, given, (num_chains, len(x))
        place = x.to(parameter_of(program).dtype)
        self.low = torch.where(mask, place / program.levels, torch.zeros_like(place))
        self.width = torch.where(mask, torch.full_like(place, 1 / program.levels), torch.ones_like(place))

    def start(self) -> Tensor:
        eps = torch.finfo(self.low.dtype).eps
        within = torch.rand(*self.batch, *self.low.shape[1:], dtype=self.low.dtype, device=self.low.device)
        return within.clamp(eps, 1 - eps).logit().reshape(*self.batch, -1)

    def features(self, u: Tensor) -> Tensor:
        v = self._point_in_cells(u)
        return (v * self.program.levels).floor().clamp(0, self.program.levels - 1).long()

    def densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        # u has the logistic density, that of the logit of a uniform position within the cell.
        start = (torch.nn.functional.logsigmoid(u) + torch.nn.functional.logsigmoid(-u)).sum(-1)
        volume = self.width.log().reshape(self.batch[1], -1).sum(-1)
        return start, self.program.flow.exact_log_prob(self._point_in_cells(u), self.given) + volume

    def _point_in_cells(self, u: Tensor) -> Tensor:
        return self.low + self.width * u.reshape(*self.batch, *self.low.shape[1:]).sigmoid()
