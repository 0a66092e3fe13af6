r"""A guide of any Pyro model: q(u) over the real vector of all latents, with any conditional on reals as q.

.. math::
    u = m + L z, \quad z \sim q(z): \qquad \log q(u) = \log q(z) - \log |\det L|

m and L come from a quick fit of a Normal to the posterior. Then z is approximately standard: splines act within their
box, a flow starts near the posterior, and one learning rate suits every model. m and L are fixed; q is learned.

The Normal is the Laplace approximation, refined by a mean-field fit in its coordinates. Where a mean-field fit from the
initial point has the better ELBO, as for a density without a maximum, that one is taken.

Source: Kucukelbir et al. 2017 (arXiv 1603.00788).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import Delta, TorchDistribution
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, biject_to, constraints
from torch.distributions import lowrank_multivariate_normal as lowrank_normals
from torch.distributions import multivariate_normal as multivariate_normals
from torch.distributions import normal as normals
from torch.func import functional_call, stack_module_state, vmap

from dgm_pyro.checks import check_count, check_type
from dgm_pyro.families.hierarchical import Hierarchical, groups_of
from dgm_pyro.posterior import Indices, Posterior, middle_of
from dgm_pyro.program import Conditional, Program, differentiating, latent_sites, measure_of, seeded

__all__ = ["AutoConditional", "GuidedPosterior", "normal_fit"]

STARTS = 32
STEPS = 300
PARTICLES = 8
LARGEST_HESSIAN = 200
QUANTILE_DRAWS = 10_000
"""Number of draws of q from which medians and quantiles are computed."""


class AutoConditional(AutoContinuous):
    """An AutoGuide of Pyro whose q is any `Conditional` on reals; `dgm.guides.auto` makes it.

    The first call sets it up: it fits the Normal, and makes q for the number of latents.

    Args:
        model: a Pyro model; its discrete latents are left to be summed out.
        make: a function from the number of latents D to q, a conditional of event_shape (D,) on all reals.
        whiten: whether L is lower triangular; else it is diagonal, for a q without covariances.
        init_loc_fn: one of Pyro's initialization strategies; default `init_to_middle`.
        plates: whether q follows the plates of the model: ``make`` then makes q of the global latents.
        covariates: data of the elements of each plate, by its name, ``(J, F)``, for a q that follows plates.

    Attributes:
        start: 0 to start at the best of several points; else the seed of the point to start at, for restarts.
    """

    start = 0

    def __init__(
        self,
        model: Callable[..., Any],
        make: Callable[[int], Conditional],
        whiten: bool = True,
        init_loc_fn: Callable[..., Any] | None = None,
        plates: bool = False,
        covariates: Mapping[str, Tensor] | None = None,
    ):
        super().__init__(model, init_loc_fn=init_loc_fn or init_to_middle)
        # Not `self.model`, which looks for a place to start in every run; in a tuple, so as to be no submodule.
        self._stated = (model,)
        self._make, self._whiten, self._enumerated = make, whiten, tuple[str, ...]()
        self._plates, self._covariates = plates, covariates

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's leaves the model out, and takes it from the guide that is pickled, too.
        return {**self.__dict__, "master": None}

    def _prototype_hide_fn(self, msg: Any) -> bool:
        hidden: bool = AutoContinuous._prototype_hide_fn(msg)
        return hidden or msg["name"] in self._enumerated

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        posterior = Posterior(self._stated[0], *args, **kwargs)
        self._enumerated = posterior.enumerated
        super()._setup_prototype(*args, **kwargs)
        if self.latent_dim != posterior.D:
            raise ValueError(
                f"a mask removes {self.latent_dim - posterior.D} elements of the latents from the density of the "
                "model, but this guide has a density of all latents: use pyro.infer.autoguide.AutoNormal, or "
                "dgm.infer.nuts(posterior)"
            )
        nodes: Any = self.prototype_trace.nodes  # type: ignore[union-attr]
        start = posterior.unconstrain({name: nodes[name]["value"] for name in posterior.names})
        place = posterior.initial(1, seed=self.start)[0] if self.start else _best_start(posterior, start)
        loc, factor = normal_fit(posterior, place, whiten=self._whiten)
        self.register_buffer("loc", loc)
        self.register_buffer("factor", factor)
        q: Any
        if self._plates:
            groups = groups_of(nodes, {name: posterior._reals[name] for name in posterior.names})
            q = Hierarchical(groups, self._make, self._covariates)
        else:
            q = self._make(self.latent_dim)
        check_type(q, Conditional, "q", "a dgm.Conditional on reals")
        if tuple(q.event_shape) != (self.latent_dim,) or q.conditional or q.measure == "mass":
            raise ValueError(
                f"q is a {type(q).__name__} of event_shape {tuple(q.event_shape)}, but the model has "
                f"{self.latent_dim} latent reals: pass a conditional on ({self.latent_dim},), without a given"
            )
        self.q = q.to(loc)

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """q(u), a distribution of event shape ``(D,)``."""
        return _placed(self.q(), self.loc, self.factor)

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each latent from `QUANTILE_DRAWS` draws, by name, ``(len(quantiles), *site_shape)``."""
        with seeded(0, self.loc.device), torch.no_grad():
            u = self.get_posterior(*args, **kwargs).sample((QUANTILE_DRAWS,))
            levels = torch.as_tensor(quantiles).to(u)
            found = {}
            nodes: Any = self.prototype_trace.nodes  # type: ignore[union-attr]
            sizes = [shape.numel() for shape in self._unconstrained_shapes.values()]
            for (name, shape), part in zip(self._unconstrained_shapes.items(), u.split(sizes, -1), strict=True):
                value = biject_to(nodes[name]["fn"].support)(part.reshape(-1, *shape))
                found[name] = value.quantile(levels, dim=0)
        return found

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each latent from `QUANTILE_DRAWS` draws, by name, ``site_shape``."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}


def init_to_middle(site: Any) -> Tensor:
    """Pyro's `init_to_median`, or the middle of the support where the prior is improper and cannot be drawn."""
    try:
        median: Tensor = init_to_median(site)
    except NotImplementedError:
        return middle_of(site)[0]
    return median


# -- the Normal to start from ------------------------------------------------------------------------------------------


def _best_start(posterior: Posterior, start: Tensor) -> Tensor:
    """``start``, or a point near the middle of the supports where the density is higher."""
    with torch.no_grad():
        places = torch.cat([start.unsqueeze(0), posterior.initial(STARTS)])
        return places[posterior.log_joint(places).nan_to_num(-math.inf).argmax()]


def normal_fit(posterior: Posterior, start: Tensor, whiten: bool = True) -> tuple[Tensor, Tensor]:
    """Location ``(D,)`` and lower triangular factor ``(D, D)`` of a Normal near the posterior.

    Args:
        start: where to begin, ``(D,)``.
        whiten: whether the factor has covariances; else it is diagonal.
    """
    density = posterior.compiled(PARTICLES)
    identity = torch.eye(posterior.D, dtype=start.dtype, device=start.device)
    with seeded(0, start.device):
        found = [_mean_field(density, start, identity)]
        laplace = _laplace(posterior, start)
        if laplace is not None:
            loc, factor = laplace
            if not whiten:
                factor = torch.diag(factor.square().sum(-1).sqrt())
            found.append(_mean_field(density, loc, factor))
    _, loc, factor = max(found, key=lambda each: each[0])
    return loc, factor


def _laplace(posterior: Posterior, start: Tensor) -> tuple[Tensor, Tensor] | None:
    """The maximum and a factor of the inverse of the negative Hessian there; None where there is no maximum."""
    if posterior.D > LARGEST_HESSIAN:
        return None
    with differentiating("a guide"):
        u = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([u], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = -posterior.log_joint(u)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        try:
            optimizer.step(closure)  # type: ignore[arg-type]
            hessian: Any = torch.autograd.functional.hessian(lambda u: -posterior.log_joint(u), u.detach())
        except (RuntimeError, ValueError):  # a matrix that has no factorization, say
            return None
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if not bool(u.isfinite().all()) or not bool(factor.isfinite().all()) or bool(failed):
        return None
    # H = R'R reversed: the inverse of H has the lower factor that the flipped Cholesky factor inverts to.
    flipped = torch.linalg.cholesky(hessian.flip(-1, -2)).flip(-1, -2)
    identity = torch.eye(posterior.D, dtype=u.dtype, device=u.device)
    return u.detach(), torch.linalg.solve_triangular(flipped, identity, upper=True).mT


def _mean_field(
    density: Callable[[Tensor], tuple[Tensor, Tensor]], loc: Tensor, factor: Tensor
) -> tuple[float, Tensor, Tensor]:
    """The best u = loc + factor (a + b e), e ~ N(0, I), by gradient ascent on the ELBO: its ELBO, location, factor."""
    a, log_b = torch.zeros_like(loc), torch.zeros_like(loc)
    optimizer = torch.optim.Adam([a, log_b], lr=0.1)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0.005)
    bounds, log_det = [], factor.diagonal().log().sum()
    for _ in range(STEPS):
        half = torch.randn(PARTICLES // 2, len(loc), dtype=loc.dtype, device=loc.device)
        noise = torch.cat([half, -half])
        value, gradient = density(loc + (a + log_b.exp() * noise) @ factor.mT)
        gradient = (gradient @ factor).nan_to_num(0.0, 0.0, 0.0)
        a.grad, log_b.grad = -gradient.mean(0), -((gradient * noise).mean(0) * log_b.exp() + 1)
        optimizer.step()
        decay.step()
        bounds.append(float(value.mean() + log_b.sum() + log_det))
    bound = sum(bounds[-50:]) / 50
    entropy = 0.5 * len(loc) * (1 + math.log(2 * math.pi))
    loc, factor = loc + factor @ a, factor * log_b.exp()
    usable = math.isfinite(bound) and bool(loc.isfinite().all()) and bool(factor.isfinite().all())
    return (bound + entropy if usable else -math.inf), loc, factor


OverReals = AutoContinuous | Conditional | Distribution
"""Types that are a density of u themselves; other guides state their sites one by one."""

# -- weights ----------------------------------------------------------------------------------------------------------


def _placed(q: Distribution, loc: Tensor, factor: Tensor) -> dist.TransformedDistribution:
    """The distribution of loc + factor z, with z drawn from q."""
    return dist.TransformedDistribution(q, [dist.transforms.LowerCholeskyAffine(loc, factor, cache_size=1)])


class _Placed(nn.Module):
    """Calls a function with the distribution of u, for `functional_call` to replace the parameters of q."""

    def __init__(self, q: Conditional):
        super().__init__()
        self.q = q

    def forward(self, function: Callable[..., Any], loc: Tensor, factor: Tensor, *inputs: Any) -> Any:
        return function(_placed(self.q(), loc, factor), *inputs)


class Stacked(nn.Module):
    """R guides of one posterior, each with its own parameters, as one guide of batch shape ``(R,)``.

    One call of q under `torch.func.vmap` replaces R calls.

    Args:
        guides: q, loc and factor of each `AutoConditional`; they differ only in the values of their tensors.
    """

    def __init__(self, guides: Sequence[tuple[Conditional, Tensor, Tensor]]):
        super().__init__()
        self.guides = tuple(_Placed(q) for q, _, _ in guides)  # in a tuple, so as to be no submodules
        stacked, buffers = stack_module_state([*self.guides])
        self.names = [*stacked]
        self.stacked = nn.ParameterList(nn.Parameter(each, each.requires_grad) for each in stacked.values())
        self.fixed, self.loc = buffers, torch.stack([loc for _, loc, _ in guides])
        self.factor = torch.stack([factor for _, _, factor in guides])

    def get_posterior(self, *args: Any, **kwargs: Any) -> StackedDistribution:
        """The distributions of u, of batch shape ``(R,)`` and event shape ``(D,)``."""
        return StackedDistribution(self)

    def for_each(self, function: Callable[..., Any], *inputs: Any, **dims: Any) -> Any:
        """``function(q(u), *inputs)`` for every guide; ``dims`` as for `torch.func.vmap`."""

        def one(parameters: Any, buffers: Any, *inputs: Any) -> Any:
            return functional_call(self.guides[0], (parameters, buffers), (function, *inputs))

        parameters = dict(zip(self.names, self.stacked, strict=True))
        dims["in_dims"] = (0, 0, 0, 0, *dims.pop("in_dims", ()))
        with _vectorized_draws():
            return vmap(one, randomness="different", **dims)(parameters, self.fixed, self.loc, self.factor, *inputs)

    def unstack(self) -> None:
        """Copy the stacked parameters back into each q."""
        with torch.no_grad():
            for i, guide in enumerate(self.guides):
                for parameter, stacked in zip(guide.parameters(), self.stacked, strict=True):
                    parameter.copy_(stacked[i])


class StackedDistribution(TorchDistribution):
    """The distributions that `Stacked` returns. A draw's density is computed with the draw, so nothing is inverted."""

    arg_constraints: ClassVar = {}
    has_rsample = True
    support = constraints.real_vector

    def __init__(self, stacked: Stacked, batch_shape: Sequence[int] | None = None):
        self.stacked, loc = stacked, stacked.loc
        self._drawn: tuple[Tensor, Tensor] | None = None
        super().__init__(torch.Size(batch_shape or loc.shape[:1]), loc.shape[1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> StackedDistribution:
        return StackedDistribution(self.stacked, batch_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """``(*sample_shape, *batch_shape, D)``; the last dimension of the batch is that of the guides."""

        def draw(q: Any) -> tuple[Tensor, Tensor]:
            u = q.rsample((*sample_shape, *self.batch_shape[:-1]))
            return u, q.log_prob(u)

        self._drawn = self.stacked.for_each(draw, out_dims=(-2, -1))
        return self._drawn[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(u) in nats, ``(..., R)``."""
        if self._drawn is not None and value is self._drawn[0]:
            return self._drawn[1]
        found: Tensor = self.stacked.for_each(lambda q, u: q.log_prob(u), value, in_dims=(-2,), out_dims=-1)
        return found


@contextlib.contextmanager
def _vectorized_draws() -> Iterator[None]:
    """Replace torch's draws of normal numbers into empty memory (2.11 to 2.13), which `vmap` refuses."""

    def normal(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    with contextlib.ExitStack() as stack:
        for module in (normals, multivariate_normals, lowrank_normals):
            stack.enter_context(mock.patch.object(module, "_standard_normal", normal))
        yield


def over_reals(q: Any, posterior: Posterior, argument: str) -> Any:
    """The distribution of u that a guide, a conditional or a distribution stands for.

    Raises:
        TypeError, ValueError: ``q`` is no distribution of u; the message says what to pass.
    """
    if isinstance(q, AutoContinuous):
        if q.prototype_trace is None:
            raise ValueError(
                f"{argument} is a guide that has never been called: fit it first, "
                "dgm.infer.train_guide(posterior, guide)"
            )
        q = q.get_posterior(*posterior.args, **posterior.kwargs)
    elif isinstance(q, Conditional):
        q = q()
    if not isinstance(q, Distribution):
        raise TypeError(
            f"{argument} must be 'prior', or a fitted guide that is a density of all latents together, such as "
            f"dgm.guides.auto(model, 'fullrank'), got {type(q).__name__}"
        )
    if q.batch_shape + q.event_shape != (posterior.D,):
        raise ValueError(
            f"{argument} is a distribution of shape {tuple(q.batch_shape + q.event_shape)}, but {posterior!r} has "
            f"shape ({posterior.D},): fit {argument} to the same model and data"
        )
    return Independent(q, 1) if q.batch_shape else q


def weigh(posterior: Posterior, guide: Any, num_particles: int) -> tuple[Tensor, Tensor]:
    """Draws of a guide as u, ``(K, D)``, and log p(u, y) - log q(u), ``(K,)``, in nats.

    Raises:
        TypeError, ValueError: the guide does not fit the posterior; the message says what to pass.
    """
    if isinstance(guide, OverReals):
        q = over_reals(guide, posterior, "guide")
        u = q.sample((num_particles,))
        return u, _nan_to_zero_density(posterior.log_joint(u) - q.log_prob(u))
    if guide is None:
        raise TypeError("a Posterior has no guide: pass guide=, such as a fitted dgm.guides.auto(model, 'nsf')")
    if not callable(guide):
        raise TypeError(f"guide must be a Pyro guide or a distribution of u, got {type(guide).__name__}")
    draws, densities = [], list[Any]()
    for _ in range(num_particles):
        with poutine.block(), poutine.trace() as traced, Indices(posterior.subsamples):
            guide(*posterior.args, **posterior.kwargs)
        nodes: Any = traced.trace.nodes
        stated = latent_sites(traced.trace)
        if all(isinstance(nodes[name]["fn"], Delta) for name in stated):
            raise ValueError(
                f"guide is a point ({type(guide).__name__}), which has no density: pass one that has, such as "
                "dgm.guides.auto(model, 'fullrank')"
            )
        draws.append({name: nodes[name]["value"] for name in stated if name in posterior.names})
        for name in draws[-1]:
            if measure_of(nodes[name]["fn"]) == "mass":
                raise ValueError(
                    f"the guide gives {name!r} a mass, but the model a density: their ratio is no importance weight. "
                    "Pass a guide of real values"
                )
        densities.append(traced.trace.log_prob_sum())
    u = posterior.unconstrain({name: torch.stack([draw[name] for draw in draws]) for name in draws[0]})
    # The guide is a density of z, and the joint one of u.
    return u, _nan_to_zero_density(posterior.log_joint(u) - posterior.log_abs_det_jacobian(u) - torch.stack(densities))


def _nan_to_zero_density(log_weights: Tensor) -> Tensor:
    """Log weights in which NaN, an undefined density of the model, counts as density 0."""
    return log_weights.nan_to_num(-math.inf, math.inf, -math.inf)


# -- as a program ------------------------------------------------------------------------------------------------------


class GuidedPosterior(Program):
    """A `Posterior` and its guide as a `Program` with one datum, which every objective takes.

    The posterior has its own data, so the x that is passed, ``(1,)``, is not read.

    Args:
        posterior: a `Posterior` with a density of u.
        guide: an `AutoContinuous` of the same model and data, set up; or `Stacked` guides, one per datum.
        num_particles: number of u that the recorded density takes at once; other numbers run Pyro's handlers.

    >>> import torch, pyro, pyro.distributions as dist, dgm_pyro as dgm
    >>> def model(y):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    >>> guide = dgm.guides.auto(model, "fullrank")
    >>> _ = guide(torch.tensor(1.0))
    >>> program = GuidedPosterior(dgm.Posterior(model, torch.tensor(1.0)), guide)
    >>> dgm.IWAE(8)(program, torch.zeros(1)).value.shape
    torch.Size([1])
    """

    event_shape = torch.Size()

    def __init__(self, posterior: Posterior, guide: AutoContinuous | Stacked, num_particles: int = 1):
        super().__init__()
        self.target, self.q = posterior, guide
        self.num_particles = check_count(num_particles, "num_particles")
        self._density = posterior.compiled(num_particles)

    def latents(self, name: str) -> tuple[str, ...]:
        return ("u",)

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        u = pyro.sample("u", dist.ImproperUniform(dist.constraints.real_vector, (), (self.target.D,)))
        batch = u.shape[:-1]
        if batch.numel() == self.num_particles:
            log_joint = _KnownGradient.apply(u.reshape(-1, self.target.D), self._density).reshape(batch)
        else:
            log_joint = self.target.log_joint(u)
        pyro.factor(name, log_joint)
        return u.new_zeros(batch)

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        pyro.sample("u", self.q.get_posterior(*self.target.args, **self.target.kwargs))


class _KnownGradient(torch.autograd.Function):
    """A density that computes its gradient together with its value."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, density: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        value, gradient = density(u.detach())
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return weight.unsqueeze(-1) * gradient, None
