r"""A Pyro model with data as a density on :math:`R^D`.

The latents z of a model have supports, such as the positive reals, the simplex or ordered vectors. Each is the image of
a real vector by a bijection, and all of these make one vector u with

.. math::
    \log p(u, y) = \log p(y \mid z(u)) + \log p(z(u)) + \log \left| \det \frac{\partial z}{\partial u} \right| .

A `Posterior` computes these terms, in nats, for any number of u at once. `torch.func.vmap` maps one run of the model
over them; a model that cannot be mapped runs once for each u. The model needs no changes: its plates, handlers, masks,
`pyro.factor` and `PyroModule` have the meaning that they have in Pyro's own traces. Discrete latents are summed out,
as by `TraceEnum_ELBO`.

Sources: Kucukelbir et al. 2017 (Automatic differentiation variational inference, arXiv 1603.00788); Obermeyer et al.
2019 (Tensor variable elimination, arXiv 1902.03210), for the sums.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, ImproperUniform, MaskedDistribution, Unit
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.einsum import torch_log
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to, constraints
from torch.fx.experimental.proxy_tensor import make_fx

from dgm_pyro.checks import check_count, check_dense, check_number, check_seed, check_type
from dgm_pyro.program import (
    OF_PYRO,
    Program,
    differentiating,
    latent_sites,
    let_pickle,
    sample_sites,
    seeded,
    unchecked,
)

__all__ = ["Posterior"]

PROBES = 3

# -- bijections that torch lacks ---------------------------------------------------------------------------------------


class CholeskyFactor(Transform):
    r"""A real vector to a lower triangular L with a positive diagonal, or to :math:`L L^\top`.

    .. math::
        \left| \frac{\partial L}{\partial u} \right| = \prod_i L_{ii}, \qquad
        \left| \frac{\partial L L^\top}{\partial L} \right| = 2^n \prod_{i=1}^n L_{ii}^{n - i + 1}

    Args:
        squared: whether the image is :math:`L L^\top`.
    """

    domain = constraints.real_vector
    bijective = True

    def __init__(self, squared: bool):
        super().__init__()
        self.squared = squared

    @property
    def codomain(self) -> Any:  # type: ignore[override]
        return constraints.positive_definite if self.squared else constraints.lower_cholesky

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CholeskyFactor) and other.squared == self.squared

    __hash__ = Transform.__hash__

    def forward_shape(self, shape: Any) -> torch.Size:
        size = (math.isqrt(8 * shape[-1] + 1) - 1) // 2
        return torch.Size((*shape[:-1], size, size))

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))

    def _call(self, u: Tensor) -> Tensor:
        size = self.forward_shape(u.shape)[-1]
        # Entry (i, j) of the lower triangle is u at i (i + 1) / 2 + j: a gather, because vmap maps no assignment.
        row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        place = (row * (row + 1) // 2 + column.minimum(row)).flatten().to(u.device)
        entries = u.index_select(-1, place).unflatten(-1, (size, size))
        factor = entries.tril(-1) + torch.diag_embed(entries.diagonal(dim1=-2, dim2=-1).exp())
        return factor @ factor.mT if self.squared else factor

    def _inverse(self, value: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(value) if self.squared else value
        entries = factor.tril(-1) + torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1).log())
        row, column = torch.tril_indices(*value.shape[-2:], device=value.device)
        return entries[..., row, column]

    def log_abs_det_jacobian(self, u: Tensor, value: Tensor) -> Tensor:
        size = value.shape[-1]
        steps = torch.arange(1, size + 1, device=u.device)
        logs = u.index_select(-1, steps * (steps + 1) // 2 - 1)
        if not self.squared:
            return logs.sum(-1)
        return ((size + 2 - steps) * logs).sum(-1) + size * math.log(2)


biject_to.register(constraints.positive_definite, lambda _: CholeskyFactor(squared=True))
biject_to.register(constraints.lower_cholesky, lambda _: CholeskyFactor(squared=False))


def bijection_of(site: Any) -> Transform:
    """The map from reals to the support of a site, which may depend on the sites before it.

    Raises:
        ValueError: there is no such map; the message names the site.
    """
    try:
        transform: Transform = biject_to(site["fn"].support)
    except NotImplementedError as error:
        raise ValueError(
            f"the latent {site['name']!r} has the support {site['fn'].support}, but torch has no bijection from the "
            "reals to it: state it by a transform of real latents, or observe it"
        ) from error
    return transform


def middle_of(site: Any) -> tuple[Tensor, Tensor]:
    """The value of a site at the zeros of its unconstrained space, and these zeros; nothing is drawn."""
    transform = bijection_of(site)
    like = next((value for value in tensors_held(site["fn"]) if value.is_floating_point()), torch.zeros(()))
    real = like.new_zeros(transform.inverse_shape(site["fn"].shape()))
    return transform(real), real


# -- the density -------------------------------------------------------------------------------------------------------


class Posterior:
    """The posterior of any Pyro model with data, as a density of a real vector u.

    Data are the values that the model observes, by ``obs=`` or by `pyro.condition`. A plate with a subsample keeps the
    subsample that is drawn here; its sites are scaled as usual. Elements of a latent that a mask removes from the
    density, such as those of a site with ``obs_mask``, are not in u.

    Args:
        model: a Pyro callable.
        args, kwargs: its arguments.

    Attributes:
        names: names of the latents in u, in the order stated.
        shapes: shapes of their values, by name.
        D: the size of u.
        enumerated: names of the discrete latents, which are summed out.
        subsamples: indices of the plates with a subsample, by name.
        improper: names of the latents whose prior is not normalized and cannot be drawn.
        observed: the data, by observed site; without factors and deterministic sites.
        measure: measure of p(y): "density", "mass", or which observed sites have which.
        mapped: whether `torch.func.vmap` maps the model; else it runs once for each u.

    Raises:
        TypeError: ``model`` is no Pyro model, or takes other arguments.
        ValueError: there are no latents, a discrete latent has no finite support, or the density of the same u differs
            from run to run.

    >>> import torch, pyro, pyro.distributions as dist, dgm_pyro as dgm
    >>> def model(y):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Normal(loc, scale), obs=y)
    >>> posterior = dgm.Posterior(model, torch.randn(5))
    >>> posterior
    Posterior(loc, scale: 2 reals)
    >>> posterior.log_joint(torch.zeros(7, 2)).shape
    torch.Size([7])
    """

    def __init__(self, model: Callable[..., Any], *args: Any, **kwargs: Any):
        check_model(model)
        self.model, self.args, self.kwargs = model, args, kwargs
        with seeded(0, _device_of(args, kwargs)), unchecked(), torch.no_grad():
            start = _MiddleOfSupports()
            try:
                trace = self._trace_model(start)
            except TypeError:
                _check_arguments(model, args, kwargs)
                raise
            nodes: Any = trace.nodes
            self.nesting = max((-frame.dim for name in sample_sites(trace) for frame in nodes[name]["cond_indep_stack"]
                                if frame.vectorized), default=0)  # fmt: skip
            self.subsamples = start.indices
            latents = latent_sites(trace)
            self.enumerated = tuple(name for name in latents if nodes[name]["fn"].support.is_discrete)
            self.names = tuple(name for name in latents if name not in self.enumerated)
            self._require_inference(latents, nodes)
            self.improper = tuple(name for name in latents if not _is_normalized(nodes[name]))
            self.observed = {name: nodes[name]["value"] for name in sample_sites(trace) if _is_data(nodes[name])}
            self.measure = _measure_of({name: nodes[name]["fn"].support.is_discrete for name in self.observed})
            self.shapes = {name: nodes[name]["value"].shape for name in self.names}
            self._reals = {name: start.reals[name].shape for name in self.names}
            self._start = torch.cat([start.reals[name].flatten() for name in self.names])
            self._kept: Tensor | None = None
            self._kept = self._in_density(nodes)
            self.D = len(self._start) if self._kept is None else len(self._kept)
            self.mapped = self._can_be_mapped()

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self.model, torch.nn.Module):
            let_pickle(self.model.parameters())
        return dict(self.__dict__)

    @property
    def device(self) -> torch.device:
        return self._start.device

    def __repr__(self) -> str:
        summed = f"; {', '.join(self.enumerated)} summed out" if self.enumerated else ""
        return f"Posterior({', '.join(self.names)}: {self.D} reals{summed})"

    # -- densities ---------------------------------------------------------------------------------------------------

    def log_joint(self, u: Tensor) -> Tensor:
        """log p(u, y) in nats, ``batch``, for ``u`` of shape ``(*batch, D)``."""
        log_prior, log_likelihood = self.densities(u)
        return log_prior + log_likelihood

    def log_prior(self, u: Tensor) -> Tensor:
        """log p(u) in nats, ``batch``, including the Jacobian; up to a constant for an improper prior."""
        return self.densities(u)[0]

    def log_likelihood(self, u: Tensor) -> Tensor:
        """log p(y | u) in nats, ``batch``, summed over all observed sites and factors."""
        return self.densities(u)[1]

    def densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """`log_prior` and `log_likelihood` of ``u`` from one run of the model.

        Where a matrix has no factorization, the density is 0: `log_prior` is -inf.
        """
        self._check_vector(u)
        try:
            return self._map_vectors(self._log_prior_and_likelihood, u)  # type: ignore[no-any-return]
        except torch.linalg.LinAlgError:
            if u.dim() == 1:
                zero = 0 * u.sum()
                return zero - math.inf, zero
            halves = [self.densities(half) for half in (u.tensor_split(2) if len(u) > 1 else u)]
            prior, likelihood = (
                torch.cat([each.reshape(-1, *u.shape[1:-1]) for each in parts]) for parts in zip(*halves, strict=True)
            )
            return prior, likelihood

    def compiled(self, batch_size: int, fuse: bool = False) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """`log_joint` and its gradient for ``batch_size`` vectors, as tensor operations without Pyro's handlers.

        One run of the model is recorded, with the current values of parameters and data. A model that cannot be mapped
        or recorded, such as one that branches on the value of a latent, runs through its handlers.

        Args:
            batch_size: number of vectors.
            fuse: whether `torch.compile` fuses the operations. Compilation takes about ten seconds and makes a small
                model about ten times as fast.

        Returns:
            A function of u, ``(batch_size, D)``, that returns values, ``(batch_size,)``, and gradients, shaped as u.
            Where the density is NaN, or a matrix has no factorization, the density is 0 and so is the gradient.
        """
        check_count(batch_size, "batch_size")

        def with_gradient(u: Tensor) -> tuple[Tensor, Tensor]:
            return self._map_vectors(torch.func.grad_and_value(self._log_joint), u)[::-1]  # type: ignore[no-any-return]

        def with_handlers(u: Tensor) -> tuple[Tensor, Tensor]:
            with differentiating("a gradient"):
                u = u.detach().requires_grad_()
                value = self.log_joint(u)
                (gradient,) = torch.autograd.grad(value.sum(), u)
            return _without_nan(value.detach(), gradient)

        if not self.mapped:
            return with_handlers
        u = self.initial(batch_size, seed=0)
        # A distribution that was expanded while validation was on keeps validating, which reads values.
        unvalidated = mock.patch.object(torch.distributions.Distribution, "_validate_sample")
        try:
            with seeded(0, u.device), unchecked(), unvalidated, torch.no_grad():
                recorded = make_fx(with_gradient)(u)
        except Exception:
            return with_handlers
        recorded.graph.eliminate_dead_code()
        recorded.recompile()
        evaluate = torch.compile(recorded) if fuse else recorded

        def run(u: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                try:
                    return _without_nan(*evaluate(u))
                except torch.linalg.LinAlgError:
                    if (u == u[0]).all():
                        return u.new_full((batch_size,), -math.inf), torch.zeros_like(u)
                    each = [run(row.expand_as(u)) for row in u]
                    return torch.stack([value[0] for value, _ in each]), torch.stack([slope[0] for _, slope in each])

        return run

    def log_abs_det_jacobian(self, u: Tensor) -> Tensor:
        """log |dz / du| in nats, ``batch``; `log_prior` contains it."""
        self._check_vector(u)

        def log_det(u: Tensor) -> Tensor:
            at = _LatentsAt(self, u)
            self._trace_model(at)
            return at.log_det

        return self._map_vectors(log_det, u)  # type: ignore[no-any-return]

    # -- values ------------------------------------------------------------------------------------------------------

    def constrain(self, u: Tensor, deterministic: bool = False) -> dict[str, Tensor]:
        """The latents at ``u``, ``(*batch, D)``, by name, ``(*batch, *shape)``.

        Args:
            deterministic: whether to return the sites of `pyro.deterministic` too.
        """
        self._check_vector(u)

        def values(u: Tensor) -> dict[str, Tensor]:
            trace = self._trace_model(_LatentsAt(self, u))
            nodes: Any = trace.nodes
            stated = [name for name in nodes if deterministic and _is_deterministic(nodes[name])]
            return {name: nodes[name]["value"] for name in [*self.names, *stated]}

        return self._map_vectors(values, u)  # type: ignore[no-any-return]

    def by_latent(self, u: Tensor) -> dict[str, Tensor]:
        """The unconstrained elements of ``u``, ``(*batch, D)``, by latent, ``(*batch, size)``."""
        self._check_vector(u)
        sizes = [shape.numel() for shape in self._reals.values()]
        if self._kept is not None:
            inside = torch.zeros(sum(sizes), dtype=torch.bool, device=self.device).index_fill(0, self._kept, True)
            sizes = [int(part.sum()) for part in inside.split(sizes)]
        return dict(zip(self.names, u.split(sizes, -1), strict=True))

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The u of latents with these ``values``, ``(*batch, D)``: the inverse of `constrain`.

        Args:
            values: values by name, ``(*batch, *shape)``; names that are not in `names` are not read.

        Raises:
            ValueError: a latent is missing, or has another shape.
        """
        check_type(values, Mapping, "values", "a mapping of the latents' names to tensors")
        missing = [name for name in self.names if name not in values]
        if missing:
            raise ValueError(f"values has no {', '.join(map(repr, missing))}: it must have {', '.join(self.names)}")
        first = values[self.names[0]]
        batch = first.shape[: first.dim() - len(self.shapes[self.names[0]])]
        for name, shape in self.shapes.items():
            if values[name].shape != (*batch, *shape):
                raise ValueError(
                    f"values[{name!r}] has shape {tuple(values[name].shape)}, but the latent has shape "
                    f"{tuple(shape)}: pass {(*batch, *shape)}"
                )

        def real(values: dict[str, Tensor]) -> Tensor:
            inverse = _RealsOfValues(self, values)
            self._trace_model(inverse)
            u = torch.cat([inverse.reals[name].flatten() for name in self.names])
            return u if self._kept is None else u[self._kept]

        return self._map_vectors(real, {name: values[name] for name in self.names}, batch)  # type: ignore[no-any-return]

    def initial(self, num_samples: int, radius: float = 2.0, seed: int = 0) -> Tensor:
        """Initial points, ``(num_samples, D)``: uniform within ``radius`` of the middle of each support.

        Nothing is drawn from the prior, which may be improper. Points at which the density is not finite are drawn
        again, at most a hundred times.

        Raises:
            ValueError: no such point was found.
        """
        check_count(num_samples, "num_samples")
        check_number(radius, "radius", above=0)
        check_seed(seed)
        start = self._start if self._kept is None else self._start[self._kept]
        with seeded(seed, self.device), torch.no_grad():
            u = start.expand(num_samples, self.D).clone()
            poor = torch.ones(num_samples, dtype=torch.bool, device=u.device)
            for _ in range(100):
                drawn = start + radius * (2 * torch.rand_like(u) - 1)
                u = torch.where(poor.unsqueeze(-1), drawn, u)
                poor = ~self.log_joint(u).isfinite()
                if not bool(poor.any()):
                    return u
        raise ValueError(
            f"the density of {self!r} is not finite within {radius} of the middle of the supports: check the data, and "
            "whether the likelihood is positive there"
        )

    def prior(self, num_samples: int, seed: int = 0) -> Tensor:
        """Draws of u from the prior, ``(num_samples, D)``.

        Raises:
            ValueError: the prior of a latent cannot be drawn; the message names the latent.
        """
        check_count(num_samples, "num_samples")
        self.require_proper("its prior cannot be drawn")
        with seeded(seed, self.device), unchecked(), torch.no_grad():
            draws = []
            for _ in range(num_samples):
                nodes: Any = self._trace_model(Indices(self.subsamples)).nodes
                draws.append({name: nodes[name]["value"] for name in self.names})
            return self.unconstrain({name: torch.stack([draw[name] for draw in draws]) for name in self.names})

    def simulated(self, seed: int = 0) -> tuple[Posterior, dict[str, Tensor], Tensor]:
        """Simulate data: their `Posterior`, their values by observed site, and the u that they come from, ``(D,)``.

        Raises:
            ValueError: the prior or a factor cannot be drawn.
        """
        self.require_proper("no data can be simulated")
        with seeded(seed, self.device), unchecked(), torch.no_grad():
            draws = _SimulateObserved(self.subsamples)
            nodes: Any = self._trace_model(draws).nodes
            data = {name: nodes[name]["value"] for name in draws.drawn}
            values = {name: nodes[name]["value"] for name in self.names}
        other = copy.copy(self)  # all that differs are the data
        other.model, other.observed = poutine.condition(self.model, data=data), data
        return other, data, other.unconstrain(values)

    def predict(self, u: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """Draw data given ``u``, ``(*batch, D)``: values by observed site, ``(*batch, *shape)``.

        Raises:
            ValueError: the model has discrete latents, which are summed out, or a factor, which cannot be drawn.
        """
        self._check_vector(u)
        check_seed(seed)
        if self.enumerated:
            raise ValueError(
                f"the discrete latents {', '.join(self.enumerated)} are summed out, so data cannot be predicted from "
                "u: draw them by pyro.infer.infer_discrete, or state the sum as a mixture"
            )

        def values(u: Tensor) -> dict[str, Tensor]:
            draws = _SimulateObserved(self.subsamples)
            nodes: Any = self._trace_model(draws, _LatentsAt(self, u)).nodes
            return {name: nodes[name]["value"] for name in draws.drawn}

        with seeded(seed, self.device), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            try:
                return self._map_vectors(values, u)  # type: ignore[no-any-return]
            except (RuntimeError, UserWarning):  # some distributions cannot be drawn under vmap, as a binomial
                one_by_one = copy.copy(self)
                one_by_one.mapped = False
                return one_by_one._map_vectors(values, u)  # type: ignore[no-any-return]

    def pointwise(self, u: Tensor) -> dict[str, Tensor]:
        """log p of each datum given ``u``, ``(*batch, D)``, in nats: by observed site, ``(*batch, *plates)``.

        A scale is left out, because it is not part of a single datum's density; masked data have 0.

        Raises:
            ValueError: the model has discrete latents, which are summed out over all data at once.
        """
        self._check_vector(u)
        if self.enumerated:
            raise ValueError(
                f"the discrete latents {', '.join(self.enumerated)} are summed out over all data at once: for the "
                "density of each datum, state the sum as a mixture, such as dist.MixtureSameFamily"
            )

        def values(u: Tensor) -> dict[str, Tensor]:
            trace = self._trace_model(_LatentsAt(self, u))
            trace.compute_log_prob()
            nodes: Any = trace.nodes
            return {name: _masked(nodes[name]["unscaled_log_prob"], nodes[name]["mask"]) for name in self.observed}

        return self._map_vectors(values, u)  # type: ignore[no-any-return]

    def require_proper(self, what: str) -> None:
        """Raise a ValueError if the prior is improper; ``what`` is its consequence, for the message."""
        if self.improper:
            raise ValueError(
                f"the prior of {', '.join(map(repr, self.improper))} is not a normalized distribution (it is improper, "
                f"masked or scaled), so {what}: use dgm.infer.nuts, or dgm.infer.psis with a guide, or state a proper "
                "prior"
            )

    # -- runs --------------------------------------------------------------------------------------------------------

    def _trace_model(self, *handlers: Messenger) -> poutine.Trace:
        # Plates around this call are not those of the model: their names and dimensions are free.
        free: Any = mock.patch.object(_DIM_ALLOCATOR, "_stack", [])
        with free, poutine.block(), poutine.trace() as traced, contextlib.ExitStack() as stack:
            for handler in handlers:
                stack.enter_context(handler)
            self.model(*self.args, **self.kwargs)
        return traced.trace

    def _log_prior_and_likelihood(self, u: Tensor) -> tuple[Tensor, Tensor]:
        at = _LatentsAt(self, u)
        if self.enumerated:
            # The enumerating handler is the outer one, because it acts on the sites that ours has marked.
            trace = self._trace_model(_MappableEnumeration(first_available_dim=-1 - self.nesting), at)
            log_joint = self._sum_out_enumerated(trace)
            prior = trace.copy()
            for name in sample_sites(trace):
                if trace.nodes[name]["is_observed"]:
                    prior.remove_node(name)
            log_prior = self._sum_out_enumerated(prior)
            return log_prior + at.log_det, log_joint - log_prior
        trace = self._trace_model(at)
        trace.compute_log_prob()
        nodes: Any = trace.nodes
        zero = u.new_zeros(())
        terms = {name: nodes[name]["log_prob_sum"] for name in sample_sites(trace)}
        log_prior = sum((terms[name] for name in self.names), zero)
        log_likelihood = sum((term for name, term in terms.items() if name not in self.names), zero)
        return log_prior + at.log_det, log_likelihood

    def _sum_out_enumerated(self, trace: poutine.Trace) -> Tensor:
        evaluator = TraceEinsumEvaluator(trace, has_enumerable_sites=True, max_plate_nesting=self.nesting)
        with mock.patch.object(torch_log, "safe_log", _log_with_finite_gradient):  # theirs cannot be mapped
            total: Tensor = evaluator.log_prob(trace)
        return total

    def _log_joint(self, u: Tensor) -> Tensor:
        log_prior, log_likelihood = self._log_prior_and_likelihood(u)
        return log_prior + log_likelihood

    def _map_vectors(self, function: Callable[[Any], Any], values: Any, batch: torch.Size | None = None) -> Any:
        """``function`` of each of a batch of vectors, or of trees of tensors with ``batch`` dimensions."""
        leaves = torch.utils._pytree.tree_leaves(values)
        batch = leaves[0].shape[:-1] if batch is None else batch
        with unchecked():
            if not batch:
                return function(values)
            flat = torch.utils._pytree.tree_map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(batch) :]), values)
            if getattr(self, "mapped", False):
                found = torch.func.vmap(function, randomness="different")(flat)
            else:
                rows = [torch.utils._pytree.tree_map(lambda leaf, i=i: leaf[i], flat) for i in range(batch.numel())]
                each = [function(row) for row in rows]
                found = torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *each)
            return torch.utils._pytree.tree_map(lambda part: part.reshape(*batch, *part.shape[1:]), found)

    def _check_vector(self, u: Tensor) -> None:
        check_dense(u, "u")
        if u.dim() == 0 or u.shape[-1] != self.D:
            raise ValueError(f"u has shape {tuple(u.shape)}, but {self!r} takes (*batch, {self.D})")

    # -- properties from a first run ---------------------------------------------------------------------------------

    def _require_inference(self, latents: list[str], nodes: Any) -> None:
        if not self.names:
            summed = f", and its discrete latents {', '.join(latents)} can be summed out" if latents else ""
            raise ValueError(f"the model has no continuous latents{summed}: there is no posterior to explore")
        for name in self.enumerated:
            kind = type(nodes[name]["fn"]).__name__
            if not nodes[name]["fn"].has_enumerate_support:
                raise ValueError(
                    f"the latent {name!r} is discrete, and a {kind} has no finite support to sum over: observe it, or "
                    "state the sum in the model by pyro.factor"
                )

    def _in_density(self, nodes: Any) -> Tensor | None:
        """Indices of u on which the density depends; None for all.

        The density does not depend on a masked element of a latent, unless another site is stated given it.
        """
        masked = [name for name in self.names if nodes[name]["mask"] is not None]
        if not masked:
            return None
        sizes = [shape.numel() for shape in self._reals.values()]
        with torch.enable_grad():
            u = (self._start + 0.1 * torch.rand_like(self._start)).requires_grad_()
            at = _LatentsAt(self, u)
            log_joint = self._log_joint_without_jacobian(at)
            (gradient,) = torch.autograd.grad(log_joint, u, allow_unused=True)
        free = torch.cat([torch.full((size,), name in masked) for name, size in zip(self.names, sizes, strict=True)])
        kept = (~free.to(u.device) | (gradient != 0)).nonzero().squeeze(-1)
        if len(kept) == 0:
            raise ValueError("a mask removes every latent from the density: there is no posterior to explore")
        return None if len(kept) == len(u) else kept

    def _log_joint_without_jacobian(self, at: _LatentsAt) -> Tensor:
        trace = self._trace_model(_MappableEnumeration(first_available_dim=-1 - self.nesting), at)
        log_joint: Any = self._sum_out_enumerated(trace) if self.enumerated else trace.log_prob_sum()
        return log_joint  # type: ignore[no-any-return]

    def _can_be_mapped(self) -> bool:
        """Whether the mapped model has the same densities as single runs of it.

        Raises:
            ValueError: the density of one u differs from run to run.
        """
        start = self._start if self._kept is None else self._start[self._kept]
        u = start + 0.1 * torch.rand(PROBES, self.D, dtype=start.dtype, device=start.device)
        self.mapped = False
        one_by_one, again = self.log_joint(u), self.log_joint(u)
        if not torch.equal(one_by_one.nan_to_num(), again.nan_to_num()):
            raise ValueError(
                "the density of the same latents differs from run to run: the model draws random numbers outside of "
                "its sample sites, or a handler hides a site; state them by pyro.sample"
            )
        self.mapped = True
        try:
            together = self.log_joint(u)
        except Exception:
            return False
        return torch.allclose(together, one_by_one, rtol=1e-4, atol=1e-5, equal_nan=True)


def check_posterior(posterior: Any) -> None:
    """Raise a TypeError unless ``posterior`` is a `Posterior`."""
    remedy = "a dgm.Posterior, dgm.Posterior(model, *args) of a Pyro model and its data"
    check_type(posterior, Posterior, "posterior", remedy)


def check_model(model: Any, argument: str = "model") -> None:
    """Raise unless ``model`` is a Pyro callable that may be wrapped in a `Posterior`."""
    kind = type(model).__name__
    if isinstance(model, Distribution):
        raise TypeError(
            f"{argument} is the distribution {kind}: state it in a model, a function that calls "
            "pyro.sample(name, distribution)"
        )
    if isinstance(model, Program):
        raise TypeError(
            f"{argument} is a {kind}, a program: pass it to dgm.infer itself, with its data, such as "
            "dgm.infer.ais(program, x), or pass its Pyro model, program.model"
        )
    if isinstance(model, Posterior):
        raise TypeError(f"{argument} is a Posterior already: pass it to dgm.infer, or pass its model here")
    if isinstance(model, tuple):
        raise TypeError(
            f"{argument} is a tuple: pass the model alone, dgm.Posterior(model, *args), and its guide to dgm.infer.psis"
        )
    if isinstance(model, pyro.infer.autoguide.AutoGuide):
        raise TypeError(f"{argument} is a guide, {kind}: pass its model")
    if isinstance(model, OF_PYRO):
        raise TypeError(f"{argument} is an object of {kind}, which runs a model: pass the model alone")
    if isinstance(model, type):
        raise TypeError(f"{argument} is the class {model.__name__}: pass a model, such as an instance of it")
    if not callable(model):
        raise TypeError(
            f"{argument} must be a Pyro model, a callable with sample sites, got {kind}: pass the function or "
            "PyroModule that calls pyro.sample, and its arguments after it"
        )


def _check_arguments(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise unless ``model`` can be called with these arguments."""
    try:
        signature = inspect.signature(getattr(model, "forward", model))
    except ValueError:  # some builtins have none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"args do not fit the model, which takes {signature}: {error}; pass the model's arguments after the model "
            "(--data)"
        ) from error


# -- handlers ----------------------------------------------------------------------------------------------------------


class Indices(Messenger):
    """Gives the plates the subsamples ``indices``."""

    def __init__(self, indices: dict[str, Tensor]):
        super().__init__()
        self.indices = indices

    def _pyro_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":
            msg["value"] = self.indices[msg["name"]]
        elif not msg["is_observed"]:  # a value here is an initial one, as from InitMessenger
            self._visit_latent(msg)

    def _visit_latent(self, msg: Any) -> None:
        """Do nothing: the latent is drawn."""


class _MiddleOfSupports(Indices):
    """Sets latents to the middle of their supports; draws subsamples and records them."""

    def __init__(self) -> None:
        super().__init__({})
        self.reals: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":
            self.indices[msg["name"]] = msg["value"]

    def _pyro_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ != "_Subsample":
            super()._pyro_sample(msg)

    def _visit_latent(self, msg: Any) -> None:
        if msg["fn"].support.is_discrete:
            return
        msg["value"], self.reals[msg["name"]] = middle_of(msg)


class _LatentsAt(Indices):
    """Sets latents to those of one u, ``(D,)``, and sums log |dz / du|."""

    def __init__(self, posterior: Posterior, u: Tensor):
        super().__init__(posterior.subsamples)
        kept, shapes = posterior._kept, posterior._reals
        if kept is not None:
            u = posterior._start.index_copy(0, kept, u)
        parts = u.split([shape.numel() for shape in shapes.values()])
        self.reals = {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        self.enumerated, self.log_det = posterior.enumerated, u.new_zeros(())
        self.in_density = _masks_by_latent(kept, shapes)

    def _visit_latent(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.enumerated:
            msg["infer"] = {**msg["infer"], "enumerate": "parallel"}
            return
        if name not in self.reals:
            raise ValueError(f"the model samples {name!r} in some runs and not in others: state it in all of them")
        transform, real = bijection_of(msg), self.reals[name]
        msg["value"] = transform(real)
        if _ends_in_zero(msg["fn"].support):
            # At 0, to which exp rounds, a Gamma of shape below 1 has the density infinity.
            msg["value"] = msg["value"].clamp_min(torch.finfo(real.dtype).tiny)
        log_det = transform.log_abs_det_jacobian(real, msg["value"])
        if name in self.in_density:  # a part of the latent is in u, elementwise
            log_det = torch.where(self.in_density[name], log_det, torch.zeros_like(log_det))
        # The support of a scaled site is not scaled: u has each latent once.
        self.log_det = self.log_det + log_det.sum()


class _RealsOfValues(Indices):
    """Sets latents to given values, and collects their unconstrained reals."""

    def __init__(self, posterior: Posterior, values: Mapping[str, Tensor]):
        super().__init__(posterior.subsamples)
        self.values, self.reals = values, dict[str, Tensor]()

    def _visit_latent(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            self.reals[msg["name"]] = bijection_of(msg).inv(msg["value"])


class _SimulateObserved(Indices):
    """Draws observed sites, but not deterministic ones, which `pyro.poutine.uncondition` would draw too."""

    def __init__(self, indices: dict[str, Tensor]):
        super().__init__(indices)
        self.drawn: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not _is_deterministic(msg):
            if isinstance(_base_of(msg["fn"]), Unit):
                raise ValueError(
                    f"the factor {msg['name']!r} is no distribution, so no data can be simulated: state it by "
                    "pyro.sample(..., obs=...)"
                )
            msg["value"], msg["is_observed"] = None, False
            self.drawn.append(msg["name"])
        super()._pyro_sample(msg)


class _MappableEnumeration(EnumMessenger):
    """Pyro's enumeration, without its reading of a value's shape, which `torch.func.vmap` refuses."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if value is not None:
            msg["value"] = torch.empty(()).expand(value.shape)
        super()._pyro_post_sample(msg)
        msg["value"] = value


def _ends_in_zero(support: Any) -> bool:
    """Whether the support is that of positive or nonnegative reals."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support in (constraints.positive, constraints.nonnegative)


def _log_with_finite_gradient(x: Tensor) -> Tensor:
    """log x with a finite gradient at 0."""
    return torch.where(x > 0, x.clamp_min(torch.finfo(x.dtype).tiny).log(), -math.inf)


def _without_nan(value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return value.nan_to_num(-math.inf, math.inf, -math.inf), gradient.nan_to_num(0.0, 0.0, 0.0)


def _masks_by_latent(kept: Tensor | None, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """By latent that is partly in u, a mask that is True for the elements in u."""
    if kept is None:
        return {}
    sizes = [shape.numel() for shape in shapes.values()]
    inside = torch.zeros(sum(sizes), dtype=torch.bool, device=kept.device).index_fill(0, kept, True)
    parts = {name: part.reshape(shapes[name]) for name, part in zip(shapes, inside.split(sizes), strict=True)}
    return {name: part for name, part in parts.items() if not bool(part.all())}


def _is_deterministic(site: Any) -> bool:
    return site["type"] == "sample" and isinstance(_base_of(site["fn"]), Delta)


def _masked(terms: Tensor, mask: Any) -> Tensor:
    return terms if mask is None else torch.where(torch.as_tensor(mask), terms, torch.zeros_like(terms))


def _is_data(site: Any) -> bool:
    """Whether a site is observed, and neither deterministic nor a factor."""
    return site["is_observed"] and not _is_deterministic(site) and not isinstance(_base_of(site["fn"]), Unit)


def _measure_of(discrete: Mapping[str, bool]) -> str:
    if len(kinds := set(discrete.values())) < 2:
        return "mass" if True in kinds else "density"
    masses, densities = (", ".join(name for name, each in discrete.items() if each is kind) for kind in (True, False))
    return f"mass of {masses}, density of {densities}"


def _is_normalized(site: Any) -> bool:
    """Whether a latent's term in the density is the density that it is drawn from."""
    base, scale = _base_of(site["fn"], masked=False), site["scale"]
    scaled = isinstance(scale, Tensor) or scale != 1
    return not (isinstance(base, ImproperUniform | MaskedDistribution) or site["mask"] is not None or scaled)


def _base_of(distribution: Any, masked: bool = True) -> Any:
    """The innermost distribution within wrappers such as `Independent`.

    Args:
        masked: whether to unwrap masks too.
    """
    while hasattr(distribution, "base_dist") and (masked or not isinstance(distribution, MaskedDistribution)):
        distribution = distribution.base_dist
    return distribution


def tensors_held(value: Any) -> Iterator[Tensor]:
    """Tensors that a distribution holds."""
    for part in vars(value).values():
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, Distribution):
            yield from tensors_held(part)


def _device_of(*arguments: Any) -> torch.device:
    tensors = (leaf for leaf in torch.utils._pytree.tree_leaves(arguments) if isinstance(leaf, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
