r"""The algebra: `pyro.sample` generalized from distributions to whole models.

A `Program` is a deep generative model written as Pyro statements. Three methods say what it is:

===========================================  ===================================================================
``program.joint("z")``                        the statements of p(z, latents), with sites named after ``"z"``
``program.joint("x", x, given=z)``            the same with x observed, conditioned on z: p(x, latents | z)
``program.posterior("x", x, given=z)``        the statements of q(latents | x, z)
===========================================  ===================================================================

Because `joint` takes the name of the variable it states, programs nest as distributions do: a prior, a likelihood, an
encoder and a whole model are all programs. `Program.model` and `Program.guide` are these statements inside the plate
of independent data, as ordinary Pyro callables for `SVI`, `Predictive`, `poutine`, `AutoNormal`, `NUTS`.

Shapes: data are ``(B, *event_shape)``. Inside particle or time plates a tensor may carry more batch dimensions on the
left, and the networks never see them: `call_network` folds them away.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import hashlib
import itertools
import math
import re
import reprlib
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeGuard, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, TorchDistribution
from pyro.infer import MCMC, SVI, Predictive
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.params import module_from_param_with_module_name, param_with_module_name, user_param_name
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import Distribution, constraints, transform_to
from torch.utils.weak import WeakTensorKeyDictionary

import dgm_pyro.factors as factors
import dgm_pyro.noise as noise
from dgm_pyro.checks import Shape, check_count, check_dense, check_finite, check_seed, check_tensor
from dgm_pyro.data import Data
from dgm_pyro.guesses import METHODS, absent
from dgm_pyro.networks.mlp import apply_network, eval_mode

__all__ = [
    "Conditional",
    "IntractableError",
    "NoGuideError",
    "Program",
    "call_network",
    "check_program",
    "isolated",
    "log_mean_exp",
    "log_prob_sum",
    "seeded",
    "traces",
]

# Rows checked against their support at once, where the support differs between rows.
ROWS = 256

# The plates around statements, from the right.
PLATES = ("data", "particles")


_Factors = tuple[factors.Factor, ...]


class IntractableError(RuntimeError):
    """The density of a program was requested, but it is an integral without a closed form."""


class NoGuideError(ValueError):
    """The guide was requested of a program that has none."""


# -- one thread at a time ----------------------------------------------------------------------------------------------

_lock = threading.RLock()
# The thread in which a view ran last, and the handlers around it.
_driver: tuple[int, weakref.WeakSet[Any]] = (0, weakref.WeakSet())


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keep other threads waiting: Pyro's handlers, its param store and torch's random state belong to the process."""
    with _lock:
        _require_own_handlers()
        yield


@contextlib.contextmanager
def _driven_alone() -> Iterator[None]:
    """Like `alone`, but raise instead of wait: handlers entered before already see the statements of other threads."""
    global _driver
    if not _lock.acquire(blocking=False):
        _refuse_threads()
    try:
        _require_own_handlers()
        _driver = threading.get_ident(), weakref.WeakSet(_PYRO_STACK)
        yield
    finally:
        _lock.release()


def _require_own_handlers() -> None:
    thread, handlers = _driver
    if thread != threading.get_ident() and any(handler in handlers for handler in _PYRO_STACK):
        _refuse_threads()


def _refuse_threads() -> None:
    raise RuntimeError(
        "another thread is running Pyro statements, and Pyro's handlers are global to the process: run program.model "
        "and program.guide (SVI, Predictive, MCMC) in one thread, or use several processes"
    )


@contextlib.contextmanager
def differentiating(what: str) -> Iterator[None]:
    """Enable gradients, even where the caller has disabled them.

    Raises:
        RuntimeError: under `torch.inference_mode`, where no tensor can have a gradient.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what} takes gradients, which no tensor made under torch.inference_mode() can have: call it outside, or "
            "under torch.no_grad()"
        )
    with torch.enable_grad():
        yield


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Like `alone`, without Pyro's validation of values, which `torch.func` cannot map."""
    with alone(), pyro.validation_enabled(False):
        yield


# -- programs ----------------------------------------------------------------------------------------------------------


OF_PYRO = (SVI, Predictive, MCMC)
"""Pyro's classes that run a model and are easily passed in its place."""

P = TypeVar("P", bound="Program")


class Program(nn.Module):
    """A deep generative model as Pyro statements.

    Subclass it with `joint`, and with `posterior` if there are latents. Declare:

    Attributes:
        event_shape: shape of one x.
        given_shape: shape of one ``given``; a tuple of shapes where ``given`` is a tuple; None if not conditional, or
            if it is left open (then ``given`` has exactly one batch dimension).
        conditional: whether `joint` takes a ``given``.
        levels: x takes the integers 0 .. levels - 1; None for reals, and for unbounded discrete values such as counts.
        num_classes: number of classes, where ``given`` is an integer label; None where it is not.
        tractable: whether p(x) has a closed form, which `log_prob` then computes.
        variable: the name under which `model` and `guide` state the data.
        any_precision: whether x and ``given`` may be of another precision than the parameters.
    """

    event_shape: torch.Size
    given_shape: Shape | None = None
    conditional: bool = False
    levels: int | None = None
    num_classes: int | None = None
    tractable: bool = False
    variable: str = "x"
    any_precision: bool = False

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in METHODS or hasattr(type(self), name):  # a property that has failed
                raise
            raise absent(type(self).__name__, name, METHODS[name]) from None

    def train(self: P, mode: bool = True) -> P:
        """Set training mode, as `torch.nn.Module.train` does; `dgm.fit` trains the program."""
        if not isinstance(mode, bool):
            raise TypeError(
                f"mode must be a bool, got {type(mode).__name__}: to train a program, use dgm.fit(program, data)"
            )
        return super().train(mode)

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        """State p(name, latents | given), observing ``value`` if there is one.

        Returns:
            ``value``, or a sample in its place, ``(B, *event_shape)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define joint(name, value=None, given=None)")

    def posterior(self, name: str, value: Tensor, given: Any = None) -> None:
        """State q(latents | value, given). The default has no latents."""

    def latents(self, name: str) -> tuple[str, ...] | None:
        """Names of the latent sites of ``joint(name)``; None if the program does not declare them."""
        return () if type(self).posterior is Program.posterior else None

    def feature_sites(self, name: str) -> dict[str, int]:
        """Flat index of each feature that ``joint(name)`` states at a site of its own, by site; else empty."""
        return {}

    def unroll(self) -> Program:
        """The same program, on the same parameters, with every chain written out one site per step."""
        return self

    def unroll_latents(self) -> Program:
        """Like `unroll`, for the chains among the latents alone: parts with an exact density stay in one piece."""
        return self if self.tractable else self.unroll()

    def replaced(self: P, **parts: Program | None) -> P:
        """A copy with other parts, such as ``vae.replaced(encoder=other)``, which shares all parts not replaced.

        Raises:
            ValueError, TypeError: the program has no part of that name, or the new part has another event_shape.
        """
        # From the dictionary, not by attribute: a tracer puts stand-ins there that a copy cannot share.
        modules = self.__dict__["_modules"]
        for name, part in parts.items():
            if name not in modules:
                raise ValueError(f"{type(self).__name__} has no part {name!r}: it has {', '.join(modules)}")
            if part is None:
                continue
            check_program(part, name)
            before = modules[name]
            if before is not None and part.event_shape != before.event_shape:
                raise ValueError(
                    f"{name} has event_shape {tuple(part.event_shape)}, but the part it replaces has "
                    f"{tuple(before.event_shape)}: build a new {type(self).__name__} of parts that fit"
                )
        twin = copy.copy(self)
        twin.__dict__["_modules"] = modules | parts
        if "_arguments" in self.__dict__:  # by which a checkpoint rebuilds it
            twin.__dict__["_arguments"] = self.__dict__["_arguments"] | parts
        return twin

    def arguments(self, data: Data) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """How data enter the statements: (value, given, further observed sites).

        Raises:
            ValueError: the program is conditional on labels or reals that the data do not have.
        """
        return data.x, (self._given_from(data) if self.conditional else None), {}

    def _given_from(self, data: Data) -> Any:
        """``given`` from the data: their y for each part that is a label, their own ``given`` for any other."""
        pair = is_pair(self.given_shape)
        shapes: Any = self.given_shape if pair else (self.given_shape,)
        # A shape that is left open may be that of labels.
        labels = [not shape and (self.num_classes is not None or data.given is None) for shape in shapes]
        parts = tuple(data.y if label else data.given for label in labels)
        if None in parts:
            lacking = "Data(x, y)" if labels[parts.index(None)] else "Data(x, given=...)"
            raise ValueError(
                f"this {type(self).__name__} is conditional: pass {lacking}, {self._describe_given()}, which "
                f"{data.name} does not have"
            )
        return parts if pair else parts[0]

    @property
    def measure(self) -> str:
        """``"mass"`` on discrete values or ``"density"`` on reals: numbers of different measure are not comparable.

        Where some features are discrete and others real, the text says which.
        """
        return self.measure_given(example_given(self))

    def measure_given(self, given: Any) -> str:
        """Like `measure`, for a program that leaves its given_shape open; ``given`` has at least one row."""
        if self.levels is not None:
            return "mass"
        if self.conditional and given is None:  # nothing to state x by
            return "density"
        support = self.support_given(rows_of(given, slice(1)))
        return "density" if support is None else _measure_of(unwrapped(support))

    def support_given(self, given: Any = None, batch_size: int = 1) -> constraints.Constraint | None:
        """The support of the distribution by which `joint` states x; None where it has none or depends on latents.

        Latents whose support has a transform from the reals are not drawn, because one draw may take a whole chain.

        Args:
            given: ``batch_size`` rows, for a conditional program.
            batch_size: number of rows of x, and of bounds that are tensors.
        """
        site = _DataSite(self.variable, parameter_of(self))
        with (
            seeded(0, site.like.device),
            eval_mode(self),
            torch.no_grad(),
            pyro.validation_enabled(False),
            hidden(),
            contextlib.suppress(_StatementReached),
            site,
            batch_plates((batch_size,)),
        ):
            self.joint(self.variable, given=given)
        return site.support

    @property
    def model(self) -> Model:
        """p as a Pyro callable ``model(x, given=None)``, an `nn.Module` over the program's parameters."""
        return Model(self)

    @property
    def guide(self) -> Guide:
        """q as a Pyro callable ``guide(x, given=None)``, an `nn.Module` over the program's parameters."""
        return Guide(self)

    @torch.no_grad()
    def sample(self, num_samples: int = 1, given: Any = None, **options: Any) -> Tensor:
        """Draw x from p(x), or from p(x | given) with one draw per row of ``given``.

        Args:
            num_samples: number of draws.
            given: ``(num_samples, *given_shape)``, or one row, ``(1, *given_shape)``, for all draws.
            options: options of the family, such as those of `Diffusion.sample`; most families have none.

        Returns:
            ``(num_samples, *event_shape)``.

        Raises:
            ValueError, TypeError: ``num_samples`` is no positive integer, ``given`` does not fit, or the family has no
                such option.
        """
        with alone():
            given = self.check_draws(num_samples, given, options)
            with hidden(), batch_plates((num_samples,)):
                return self.joint(self.variable, given=given)

    def log_prob(self, x: Tensor, given: Any = None) -> Tensor:
        """Exact log p(x | given) in nats, ``(B,)``.

        Args:
            x: ``(B, *event_shape)``.
            given: ``(B, *given_shape)`` for a conditional program.

        Raises:
            IntractableError: the program has latents that no sum or formula removes.
            ValueError: a shape, type or value does not fit; the message names it.
        """
        if not self.tractable:
            raise IntractableError(
                f"{type(self).__name__} has latent variables, so log p(x) has no closed form: use "
                "program.log_weights(x, num_particles=K), or dgm.evaluate(program, data, num_particles=K) for a bound"
            )
        self.check(x, given)
        return self.exact_log_prob(x, given)

    @unchecked()
    def exact_log_prob(self, x: Tensor, given: Any = None) -> Tensor:
        """log p(x | given) in nats, ``batch``, without the checks of `log_prob`; x is ``(*batch, *event_shape)``.

        The transforms of `torch.func`, such as `vmap`, can map it over x and over parameters.
        """
        batch = x.shape[: x.dim() - len(self.event_shape)]
        # No plates: the value has the whole batch, and a guide may call this inside plates of these names.
        with hidden(), poutine.trace() as traced:
            self.joint(self.variable, x, given)
        return log_prob_sum(traced.trace, batch)

    def log_weights(self, x: Tensor, given: Any = None, num_particles: int = 1) -> Tensor:
        """log p(x, z_k | given) - log q(z_k | x, given) for K draws from the guide, in nats, ``(K, B)``.

        In expectation, their mean over k is a lower bound of log p(x) (ELBO), and their log-mean-exp is a tighter one
        (IWAE, Burda et al. 2016, eq. 8). Chains among the latents are unrolled.

        Raises:
            ValueError: a shape, type or value does not fit; the message names it.
        """
        check_count(num_particles, "num_particles")
        with alone():
            self.check(x, given)
            batch = (num_particles, x.shape[0])
            model, guide = traces(self.unroll_latents(), x, given, batch=batch)
            log_joint = log_prob_sum(model, batch)
            return log_joint - log_prob_sum(guide, batch, like=log_joint)

    # -- missing features --------------------------------------------------------------------------------------------

    @property
    def takes_missing(self) -> bool:
        """Whether missing features of x can be left out: no observed feature depends on a missing one."""
        return False

    def placeholder(self) -> Tensor:
        """A value of the support, ``event_shape``, to put in for missing features: zero where the support has it."""
        given = example_given(self)
        known = given is not None or not self.conditional
        return inside(self.support_given(given) if known else None, parameter_of(self).new_zeros(self.event_shape))

    def completions(self, by: Any, x: Tensor, mask: Tensor, given: Any = None) -> tuple[Tensor, Tensor]:
        """Weighted draws of x that keep its observed features; `dgm.infer.impute` chooses among them.

        Args:
            by: a `dgm_pyro.infer.impute.Imputer`, which has a method for each kind of program.
            x: ``(B, *event_shape)``; any value of the support where a feature is missing.
            mask: True where x is observed, of the same shape.
            given: ``(B, *given_shape)`` for a conditional program.

        Returns:
            x, ``(K, B, *event_shape)``, and log weights, ``(K, B)``, whose mean exponential estimates p(x_obs).

        Raises:
            ValueError: there is no method for this program and this mask.
        """
        if self.tractable:
            raise ValueError(f"there is no method to impute with {type(self).__name__}: it has no latents")
        completed: tuple[Tensor, Tensor] = by.over_latents(self, x, mask, given)
        return completed

    # -- codes -------------------------------------------------------------------------------------------------------

    def codes(self) -> dict[str, Program]:
        """The prior p(z) of each latent code that `encode` and `decode` know, by site name; the nearest to x first.

        A family that has any defines `_encode` and `_decode`.
        """
        return {}

    def encode(
        self, x: Tensor, given: Any = None, *, site: str | None = None, draw: bool = False, num_samples: int = 16
    ) -> Tensor:
        """The latent code z of each x, differentiable where q(z | x) is reparameterized.

        Draws use the global random state. `dgm.representations.encode` works in batches, in evaluation mode, and with
        noise that belongs to each datum.

        Args:
            x: ``(B, *event_shape)``.
            given: ``(B, *given_shape)`` for a conditional program.
            site: a name in `codes`; default the first.
            draw: whether z is a draw from q(z | x) instead of its mean.
            num_samples: draws to average where the mean of q(z | x) has no closed form.

        Returns:
            ``(B, *z_shape)``; for a code of K classes their probabilities, ``(B, *z_shape, K)``, unless ``draw``.

        Raises:
            ValueError: the program has no latent code, or none of that name; or x does not fit.
        """
        site = self.code_named(site)
        check_count(num_samples, "num_samples")
        self.check(x, given)
        with alone():
            return self._encode(x, given, site, draw, num_samples)

    def decode(self, z: Tensor, given: Any = None, *, site: str | None = None, draw: bool = False) -> Tensor:
        """The x of each code: the mean of p(x | z), or a draw, also where the mean has no closed form.

        Args:
            z: ``(B, *z_shape)``; integers for a code of classes.
            given, site: as for `encode`.
            draw: whether x is a draw from p(x | z) instead of its mean.

        Returns:
            ``(B, *event_shape)``, in the units of x.

        Raises:
            ValueError: the program has no latent code, or none of that name; or z does not fit.
        """
        site = self.check_code(z, given, site)
        with alone():
            return self._decode(z, given, site, draw)

    def _encode(self, x: Tensor, given: Any, site: str, draw: bool, num_samples: int) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _encode(x, given, site, draw, num_samples)")

    def _decode(self, z: Tensor, given: Any, site: str, draw: bool) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _decode(z, given, site, draw)")

    def code_named(self, site: str | None = None) -> str:
        """``site``, or by default the first name in `codes`.

        Raises:
            ValueError: the program has no latent code, or none of that name.
        """
        names = tuple(self.codes())
        if not names:
            raise ValueError(f"this {type(self).__name__} has no latent code: use a VAE, a flow or a diffusion")
        if site is not None and site not in names:
            raise ValueError(f"site must be one of {', '.join(map(repr, names))}, got {site!r}")
        return site or names[0]

    def check_code(self, z: Any, given: Any = None, site: str | None = None) -> str:
        """Check a code z and its ``given``, as `check` does for x, and return the name of the code."""
        site = self.code_named(site)
        code = self.codes()[site]
        check_tensor(z, code.event_shape, "z", f"the shape of the code {site!r}")
        check_place(z, "z", self)
        if not z.is_floating_point() and code.measure == "density":
            raise TypeError(f"z has dtype {z.dtype}, but the code {site!r} is real: use z.float()")
        check_finite(z, "z")
        self.check_given(given, len(z))
        return site

    def formula(self, given: Any = None) -> factors.Formula:
        """The joint and the guide as products of factors, read off the statements, as `print` shows them.

        Args:
            given: ``(B, *given_shape)``, for a program that leaves its given_shape open; the first row is read.
                Without it, every site is shown as conditioned on all sites before it.

        Raises:
            ValueError: ``given`` does not fit.
        """
        if given is not None:
            given = map_given(lambda part: part[:1] if isinstance(part, Tensor) and part.dim() else part, given)
            self.check_given(given, 1)
        size = sum(p.numel() for p in self.parameters() if p.requires_grad)
        given = example_given(self) if given is None else given
        if self.conditional and given is None:
            found: tuple[_Factors, _Factors | None] = self._declared_factors()
        else:
            with eval_mode(self), alone(), hidden():
                found = self._stated_factors(self._with_provenance(given))
        return factors.Formula(type(self).__name__, *found, size)

    def _stated_factors(self, given: Any) -> tuple[_Factors, _Factors | None]:
        name = self.variable
        latents = self.latents(name)
        joint, _, values = factors.factors_of(self.joint, name, given=given, latents=latents)
        if latents is None:  # all but the data, then
            latents = tuple(factor.site for factor in joint if factor.site != name)
            joint, _, values = factors.factors_of(self.joint, name, given=given, latents=latents)
        x = factors.marked(name, values[name])
        try:
            posterior, _, _ = factors.factors_of(self.posterior, name, x, given, latents=latents)
        except (IntractableError, NotImplementedError, NoGuideError):
            posterior = None
        return joint, posterior

    def _declared_factors(self) -> tuple[_Factors, _Factors]:
        """By the chain rule, all that is known without the shape of ``given``."""
        before, latents = [self._given_names()[0]], self.latents(self.variable) or ()
        joint, posterior = [], []
        for i, site in enumerate(latents):
            joint.append(factors.Factor(site, (*latents[:i], *before), None, None, "latent"))
            posterior.append(factors.Factor(site, (*latents[:i], self.variable, *before), None, None, "latent"))
        joint.append(factors.Factor(self.variable, (*latents, *before), self.event_shape, None, "data"))
        return tuple(joint), tuple(posterior)

    def _with_provenance(self, given: Any) -> Any:
        """``given`` with the names of its parts."""
        names = iter(self._given_names(len(parts_of(given))))
        return map_given(lambda part: factors.marked(next(names), part), given)

    def _given_names(self, parts: int = 1) -> list[str]:
        """y for a label, x for what a classifier reads, c for any other context."""
        if self.variable != "x":
            return ["x"]
        shapes: Any = self.given_shape if is_pair(self.given_shape) else (self.given_shape,) * parts
        labels = [self.num_classes is not None and shape == () for shape in shapes]
        return ["y" if label else "c" if sum(labels) >= parts - 1 else f"c{i}" for i, label in enumerate(labels, 1)]

    def __str__(self) -> str:
        try:
            return str(self.formula())
        except Exception as error:  # a program that is half written can be looked at
            return f"{type(self).__name__}, whose statements fail: {type(error).__name__}: {error}"

    def _repr_latex_(self) -> str | None:
        with contextlib.suppress(Exception):  # as in __str__, which a notebook shows then
            return self.formula()._repr_latex_()
        return None

    def __getstate__(self) -> dict[str, Any]:
        let_pickle(self.parameters())
        return dict(self.__dict__)

    # -- checks ------------------------------------------------------------------------------------------------------

    def check(self, x: Any, given: Any = None, *, values: bool = True, support: bool | None = None) -> None:
        """Raise a ValueError or TypeError that says what is wrong with ``x`` or ``given``, and what to do.

        Args:
            values: whether to check values too, beyond shapes, dtypes and devices.
            support: whether x must also lie in the support of its distribution; default: Pyro's validation setting.
        """
        check_tensor(x, self.event_shape, "x", "the program's event_shape")
        check_place(x, "x", self, reals=self.levels is None and not self.any_precision)
        self.check_given(given, len(x), values=values)
        if not values:
            return
        if torch._C._functorch.is_batchedtensor(x):
            raise RuntimeError(
                "x is mapped by torch.func.vmap, under which values cannot be checked: map program.exact_log_prob, or "
                "call log_weights once, with all data, (B, *event_shape), and num_particles"
            )
        counts = not x.is_floating_point() and self.measure_given(given) == "mass"
        check_values(x, self.levels, type(self).__name__, counts=counts, missing=True)
        if pyro.settings.get("validate_distributions_pyro") if support is None else support:
            self._check_support(x, given)

    def _check_support(self, x: Tensor, given: Any) -> None:
        support, owner = self.support_given(rows_of(given, slice(1))), type(self).__name__
        if support is None or bounded_by_numbers(support):
            check_within(x, support, owner)
            return
        for start in range(0, len(x), ROWS):  # bounds that are parameters, or depend on given
            part = x[start : start + ROWS]
            support = self.support_given(rows_of(given, slice(start, start + ROWS)), len(part))
            check_within(part, support, owner, start)

    def check_given(self, given: Any, batch_size: int, *, values: bool = True) -> None:
        if not self.conditional:
            if given is not None:
                raise ValueError(
                    f"given was passed, but this {type(self).__name__} is not conditional: leave it out, or build a "
                    "program with labeled=True, or from data with a given"
                )
            return
        if given is None:
            raise ValueError(f"this {type(self).__name__} is conditional: pass given, {self._describe_given()}")
        shapes = shapes_of(self.given_shape, given)
        for part, shape in zip(parts_of(given), shapes, strict=True):
            if shape is None:
                check_dense(part, "given")
                if part.dim() == 0:
                    raise ValueError("given has shape (), but needs a batch dimension: pass one row per datum")
            else:
                check_tensor(part, shape, "given", "the program's given_shape")
            check_place(part, "given", self, reals=not self.any_precision)
            if len(part) != batch_size:
                raise ValueError(f"given has {len(part)} rows, but x has {batch_size}: pass one row per datum")
            if values and part.is_floating_point() and not torch.isfinite(part).all():
                raise ValueError("given holds NaN or infinite values: clean them or drop those rows")
            if values and self.num_classes is not None and part.dim() == 1:
                if part.is_floating_point():
                    raise TypeError(f"given holds class labels of dtype {part.dtype}: pass integers, given.long()")
                low, high = int(part.min()), int(part.max())
                if low < 0 or high >= self.num_classes:
                    raise ValueError(
                        f"given holds labels from {low} to {high}, but the program has {self.num_classes} classes: "
                        f"0 .. {self.num_classes - 1}"
                    )

    def check_draws(self, num_samples: Any, given: Any, options: Collection[str] = ()) -> Any:
        """Check the arguments of `sample`, and repeat a single row of ``given``.

        Args:
            options: names of further arguments, which are unknown.
        """
        if options:
            raise TypeError(
                f"sample of {type(self).__name__} takes no {', '.join(options)}: its arguments are num_samples and "
                "given, such as given=torch.tensor([1]) for a class; a diffusion takes sampler, num_steps, spacing and "
                "guidance, too" + ("; for a seed, call torch.manual_seed(seed) before" if "seed" in options else "")
            )
        if isinstance(num_samples, tuple):
            raise TypeError(f"num_samples must be an integer, got the shape {tuple(num_samples)}: use "
                            f"sample({math.prod(num_samples)})")  # fmt: skip
        check_count(num_samples, "num_samples")

        def repeated(part: Any) -> Any:
            single = isinstance(part, Tensor) and part.shape[:1] == (1,)
            return part.expand(num_samples, *part.shape[1:]) if single else part

        given = map_given(repeated, given)
        self.check_given(given, num_samples)
        return given

    def _describe_given(self) -> str:
        if self.num_classes is not None:
            return f"one integer label in 0 .. {self.num_classes - 1} per datum"
        if self.given_shape is None:
            return "one row per datum"
        if is_pair(self.given_shape):
            return "a tuple of tensors of shapes " + ", ".join(f"(B, *{tuple(shape)})" for shape in self.given_shape)
        return f"of shape (B, *{tuple(self.given_shape)})"


class Conditional(Program):
    """A program without latents: it builds one Pyro distribution.

    To write your own, set ``event_shape`` and return a distribution of that event shape from ``forward(given)``:

    >>> import torch, pyro.distributions as dist, dgm_pyro as dgm
    >>> class Laplace(dgm.Conditional):
    ...     def __init__(self, features):
    ...         super().__init__()
    ...         self.event_shape = torch.Size((features,))
    ...         self.loc = torch.nn.Parameter(torch.zeros(features))
    ...     def forward(self, given=None):
    ...         return dist.Laplace(self.loc, 1.0).to_event(1)
    >>> Laplace(2).sample(5).shape
    torch.Size([5, 2])
    """

    tractable = True

    def forward(self, given: Any = None) -> TorchDistribution:
        """The distribution of x given ``given``: event shape `event_shape`, batch shape that of ``given``."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(given=None)")

    def joint(self, name: str, value: Tensor | None = None, given: Any = None) -> Tensor:
        distribution = self(given)
        if distribution.event_shape != torch.Size(self.event_shape):
            raise ValueError(
                f"forward() of {type(self).__name__} returned a distribution of event_shape "
                f"{tuple(distribution.event_shape)}, but the program's event_shape is {tuple(self.event_shape)}: "
                "use .to_event(n) to make the last n dimensions one event"
            )
        return pyro.sample(name, distribution, obs=value)

    def completions(self, by: Any, x: Tensor, mask: Tensor, given: Any = None) -> tuple[Tensor, Tensor]:
        completed: tuple[Tensor, Tensor] = by.of_distribution(self, x, mask, given)
        return completed


# -- the views that Pyro sees ----------------------------------------------------------------------------------------

# The programs that have registered, and the name of each; and every tensor that a program has put in a param store.
_names: weakref.WeakKeyDictionary[Program, str] = weakref.WeakKeyDictionary()
_put: Any = WeakTensorKeyDictionary()
# Latents of programs that do not declare them, read off a trace of the model when the guide is first used.
_model_sites: weakref.WeakKeyDictionary[Program, list[str]] = weakref.WeakKeyDictionary()


def store_name(program: Program) -> str:
    """The name under which ``program`` registers in Pyro's param store now.

    Two modules under one name would silently share the first one's parameters. So the name has the class and a digest
    of names and shapes of the parameters, and a number where another live program of that name is in the store. It
    does not depend on earlier use, so a rebuilt program finds the states of its optimizer again.
    """
    store = dict(pyro.get_param_store().named_parameters())
    own = dict(program.named_parameters())
    known = _names.get(program)
    if known is not None and any(store.get(param_with_module_name(known, name)) is p for name, p in own.items()):
        return known
    shapes = repr([(name, tuple(p.shape)) for name, p in own.items()])
    stem = f"{type(program).__name__}_{hashlib.sha256(shapes.encode()).hexdigest()[:8]}"
    others = {id(p) for other in _names for p in other.parameters()} - {id(p) for p in own.values()}
    taken = {module_from_param_with_module_name(name) for name, tensor in store.items() if id(tensor) in others}
    every = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(2)))
    return next(name for name in every if name not in taken)


def register_parameters(program: Program) -> None:
    """Like `pyro.module`, without its warning about frozen parameters and its two ways to train a stale copy.

    Values that the user has put into the store, by its ``load`` or under the program's names, are copied into the
    program.

    Raises:
        ValueError: values that the user has put into the store do not fit the program.
    """
    store, name = pyro.get_param_store(), store_name(program)
    own = {param_with_module_name(name, key): p for key, p in program.named_parameters()}
    stored = dict(store.named_parameters())
    if not own.keys() & stored.keys():
        _require_no_misfits(program, stored)
    _names[program] = name
    for key, parameter in own.items():
        there = stored.get(key, parameter)
        if there is not parameter and there not in _put:
            _take_over(parameter, there, key)
        if not parameter.requires_grad:
            continue
        if there is not parameter:
            # Of another layout, such as channels_last, the store would keep a copy, and SVI would train the copy.
            layout = None if parameter.is_contiguous() else parameter.data
            if layout is not None:
                parameter.data = layout.contiguous()
            store[key] = parameter  # not deleted before: the store cannot delete both names of a tensor that has two
            if layout is not None:
                parameter.data = layout
        pyro.param(key, parameter)
        _put[parameter] = None
        let_pickle([parameter])


def _take_over(parameter: Tensor, value: Tensor, name: str) -> None:
    if value.shape != parameter.shape:
        raise ValueError(
            f"the param store holds {name!r} of shape {tuple(value.shape)}, but the program's has shape "
            f"{tuple(parameter.shape)}: store a value of that shape, or empty the store by pyro.clear_param_store()"
        )
    with torch.no_grad():
        parameter.copy_(value)
    _put[value] = None


def _require_no_misfits(program: Program, stored: dict[str, Tensor]) -> None:
    """Raise if the store has values for a program of this class with other parameters: they would go unused."""
    kind = type(program).__name__
    ours = re.compile(rf"{kind}_[0-9a-f]{{8}}(_\d+)?\$\$\$")
    brought = [name for name, tensor in stored.items() if ours.match(name) and tensor not in _put]
    if not brought:
        return
    here = {name: tuple(p.shape) for name, p in program.named_parameters()}
    there = {user_param_name(name): tuple(stored[name].shape) for name in brought}
    differing = next((name for name in {**there, **here} if here.get(name) != there.get(name)), None)
    if differing is not None:
        raise ValueError(
            f"the param store holds values of another {kind}: its {differing} has shape "
            f"{there.get(differing, 'none (no such parameter)')}, but here it has "
            f"{here.get(differing, 'none (no such parameter)')}: build the program as it was when they were saved, use "
            "the program that they belong to first, or empty the store by pyro.clear_param_store()"
        )


class _Reference(weakref.ref):  # type: ignore[type-arg]
    """The weak reference that Pyro puts on a parameter for SVI, but one that can be pickled (as None)."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def let_pickle(parameters: Iterable[Any]) -> None:
    """Make parameters picklable that were in Pyro's param store."""
    for parameter in parameters:
        if "unconstrained" in vars(parameter):
            parameter.unconstrained = _Reference(parameter)


class _StatementReached(Exception):
    """The statement that was looked for has been reached."""


class _DataSite(Messenger):
    """Runs statements up to that of the data, and notes its support.

    Args:
        variable: the name of the data.
        like: a tensor with the dtype and device of the latents before it.
    """

    def __init__(self, variable: str, like: Tensor) -> None:
        super().__init__()
        self.variable, self.like = variable, like
        self.support: constraints.Constraint | None = None
        self.after_latents = False

    def _pyro_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":
            return
        if msg["name"] == self.variable:
            support = None if msg["infer"].get("_deterministic") else support_of(msg["fn"])
            if support is not None and (bounded_by_numbers(support) or not self.after_latents):
                self.support = support
            raise _StatementReached
        if not msg["is_observed"]:
            self.after_latents = True
            msg["value"] = self._value_in_support(msg["fn"])

    def _value_in_support(self, distribution: Any) -> Tensor:
        """A value of the support."""
        try:
            transform = transform_to(distribution.support)
            shape = transform.inverse_shape(distribution.shape())
        except (AttributeError, NotImplementedError):
            point: Tensor = distribution.sample()
        else:
            point = transform(self.like.new_zeros(shape))
        return point


class _StatedSites(Messenger):
    """Records the sample sites under the names in the statements; handlers further out may rename them."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        self.nodes[msg["name"]] = msg


class _View(nn.Module):
    def __init__(self, program: Program):
        super().__init__()
        self.program = program

    def _enter(self, x: Tensor | int, given: Any) -> tuple[Tensor | None, int]:
        if isinstance(x, int):
            check_count(x, "the number of data")
            self.program.check_given(given, x, values=False)
            value, size = None, x
        else:
            values = pyro.settings.get("validate_distributions_pyro")
            # Pyro itself looks at the support, where it scores the statement.
            self.program.check(x, given, values=values, support=False)
            value, size = x, x.shape[0]
        register_parameters(self.program)
        return value, size


class Model(_View):
    """p(x, latents | given) inside the plate of independent data."""

    def forward(self, x: Tensor | int, given: Any = None) -> Tensor:
        """State the model of ``x``: data ``(B, *event_shape)``, or an int B to leave B data unobserved."""
        with _driven_alone():
            value, size = self._enter(x, given)
            with batch_plates((size,)):
                return self.program.joint(self.program.variable, value, given)


class Guide(_View):
    """q(latents | x, given) inside the plate of independent data."""

    def forward(self, x: Tensor, given: Any = None) -> None:
        """State the guide for the data ``x``, ``(B, *event_shape)``."""
        with _driven_alone():
            value, size = self._enter(x, given)
            if value is None:
                raise ValueError("the guide needs data: q(latents | x) is conditioned on x")
            with _StatedSites() as stated, batch_plates((size,)):
                self.program.posterior(self.program.variable, value, given)
            self._require_in_model(latent_sites(stated), value, given)

    def _require_in_model(self, guided: Sequence[str], x: Tensor, given: Any) -> None:
        """Raise if the guide has a site that the model lacks: Pyro would only warn, and train on a wrong bound."""
        program = self.program
        declared = program.latents(program.variable)
        if declared is not None:
            require_subset(guided, declared)
        elif not set(guided) <= set(_model_sites.get(program, ())):
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices=[x.device] if x.is_cuda else []),
                hidden(),
                _StatedSites() as stated,
                batch_plates((x.shape[0],)),
            ):
                program.joint(program.variable, x, given)
            require_subset(guided, latent_sites(stated))
            _model_sites[program] = latent_sites(stated)


# -- traces ------------------------------------------------------------------------------------------------------------


Weighting = Callable[[Tensor, Tensor], Tensor]
"""The weight of the error at a noise level, as a function of the log signal-to-noise ratio and of its fall."""

_weighting: contextvars.ContextVar[Weighting | None] = contextvars.ContextVar("weighting", default=None)


@contextlib.contextmanager
def weighting_errors(weight: Weighting) -> Iterator[None]:
    """Let diffusions state their weighted errors next to the bound, in which predictions are then constants."""
    token = _weighting.set(weight)
    try:
        yield
    finally:
        _weighting.reset(token)


def weighting() -> Weighting | None:
    """The weight that `weighting_errors` has set; None outside of it."""
    return _weighting.get()


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Hide the sites from handlers further out, and free the names and dimensions of the plates there."""
    taken, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        with poutine.block():
            yield
    finally:
        _DIM_ALLOCATOR._stack = taken


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """`hidden`; within `noise.per_datum` the sites are drawn by each datum's own noise."""
    with hidden(), noise.sites():
        yield


class _Reserved(Messenger):
    """Refuses the names of the batch's plates: Pyro would report duplicates of plates that the user never wrote."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in PLATES:
            kind = "plate" if type(msg["fn"]).__name__ == "_Subsample" else "site"
            raise ValueError(
                f"the statements have a {kind} {msg['name']!r}, but {_quoted(PLATES)} are the plates that dgm_pyro "
                f"puts around them: give the {kind} another name"
            )


@contextlib.contextmanager
def batch_plates(batch: Sequence[int]) -> Iterator[None]:
    """The plates of a batch shape: rightmost ``data``, left of it ``particles``, then unnamed further ones.

    Raises:
        ValueError: a site or plate inside has the name of one of them.
    """
    with contextlib.ExitStack() as stack:
        for i, size in enumerate(reversed(batch)):
            stack.enter_context(pyro.plate(PLATES[i] if i < len(PLATES) else f"batch_{i}", size, dim=-1 - i))
        stack.enter_context(_Reserved())
        yield


def traces(
    program: Program,
    x: Tensor,
    given: Any = None,
    *,
    batch: Sequence[int] | None = None,
    observed: dict[str, Tensor] | None = None,
) -> tuple[poutine.Trace, poutine.Trace]:
    """The model and guide traces of ``program`` at data ``x``, the model replayed on the guide's latents.

    Args:
        batch: batch shape of the log-probabilities, such as ``(K, B)`` for K particles; default ``(B,)``.
        observed: further sites and their values, such as labels; they are no longer latent.

    Raises:
        ValueError: the guide has a site that the model lacks, or the model has a latent without a guide site.
    """
    guide = guide_trace(program, x, given, batch=batch, observed=observed)
    return model_trace(program, x, given, guide, batch=batch, observed=observed), guide


def guide_trace(
    program: Program,
    x: Tensor,
    given: Any = None,
    *,
    batch: Sequence[int] | None = None,
    observed: dict[str, Tensor] | None = None,
    handler: contextlib.AbstractContextManager[Any] | None = None,
) -> poutine.Trace:
    """The guide's half of `traces`; ``handler`` may change what a site draws, before it is recorded."""
    observed = observed or {}
    batch = (x.shape[0],) if batch is None else batch
    with (
        isolated(),
        poutine.condition(data=observed),
        handler or contextlib.nullcontext(),
        poutine.trace() as guided,
        batch_plates(batch),
    ):
        declared = program.latents(program.variable)
        if declared is None or not set(declared) <= set(observed):
            program.posterior(program.variable, x, given)
    guide = guided.trace
    # An observed guide site is no latent: left in, it would count as part of q.
    for name in [name for name, site in guide.nodes.items() if site["type"] == "sample" and site["is_observed"]]:
        guide.remove_node(name)
    return guide


def model_trace(
    program: Program,
    x: Tensor,
    given: Any,
    guide: poutine.Trace,
    *,
    batch: Sequence[int] | None = None,
    observed: dict[str, Tensor] | None = None,
) -> poutine.Trace:
    """The model's half of `traces`: replayed on the latents in ``guide``."""
    batch = (x.shape[0],) if batch is None else batch
    with (
        isolated(),
        poutine.condition(data=observed or {}),
        poutine.trace() as modeled,
        poutine.replay(trace=guide),
        batch_plates(batch),
    ):
        program.joint(program.variable, x, given)
    model = modeled.trace
    require_subset(latent_sites(guide), latent_sites(model))
    for name in latent_sites(guide):
        q, p = (measure_of(trace.nodes[name]["fn"]) for trace in (guide, model))
        if None not in (q, p) and q != p:
            raise ValueError(
                f"the guide gives {name!r} a {q}, but the model a {p}: their ratio makes no bound on log p(x). Give "
                "both real values, or both discrete ones"
            )
    unguided = [name for name in latent_sites(model) if name not in guide.nodes]
    if unguided:
        raise ValueError(
            f"the model samples {_quoted(unguided)}, which the guide lacks: state each latent in posterior(), "
            f"which has {_quoted(latent_sites(guide)) or 'none'}"
        )
    return model


def sample_sites(trace: poutine.Trace | _StatedSites) -> list[str]:
    """Names of the sample sites, in the order stated; plates' own subsample sites are left out."""
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    ]


def latent_sites(trace: poutine.Trace | _StatedSites) -> list[str]:
    """Names of the unobserved sample sites, as `sample_sites`."""
    return [name for name in sample_sites(trace) if not trace.nodes[name]["is_observed"]]


def measure_of(fn: Any) -> str | None:
    """The measure of a distribution, as in `Program.measure`; None if it has no support, or is a point."""
    base = fn
    while hasattr(base, "base_dist"):
        base = base.base_dist
    if isinstance(base, Delta):
        return None
    with contextlib.suppress(NotImplementedError, AttributeError):
        return _measure_of(unwrapped(fn.support))
    return None


def require_subset(guide_names: Sequence[str], model_names: Sequence[str]) -> None:
    extra = [name for name in guide_names if name not in model_names]
    if extra:
        raise ValueError(
            f"the guide samples {_quoted(extra)}, which the model lacks; the model's latents are "
            f"{_quoted(model_names) or 'none'}: give both the same name"
        )


def require_distinct(names: Sequence[str], owner: str) -> None:
    """Raise if two latents of ``owner`` have one name."""
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(
            f"two latents of {owner} are named {_quoted(twice)}: give one of them another name, "
            "for example VAE(..., latent_name='z2')"
        )


def log_prob_sum(
    trace: poutine.Trace, batch: Sequence[int], names: Collection[str] | None = None, *, like: Tensor | None = None
) -> Tensor:
    """Sum the (scaled) log-probabilities of sites over everything but the batch dimensions; nats, ``batch``.

    Args:
        names: names of the sites to sum; default all.
        like: a tensor with the dtype and device of the zeros that are the sum over no site.
    """
    names = sample_sites(trace) if names is None else names
    wanted = frozenset(names)
    # All at once: a pass over the trace for each site would take time quadratic in the steps of a chain.
    trace.compute_log_prob(lambda name, _: name in wanted)
    terms = [site_sum(trace.nodes[name]["log_prob"], batch) for name in names]
    if not terms:
        return torch.zeros(tuple(batch)) if like is None else like.new_zeros(tuple(batch))
    return sum(terms[1:], terms[0])


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """The logarithm of the mean of K weights, ``(K, *batch)`` to ``batch``."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def site_sum(log_prob: Tensor, batch: Sequence[int]) -> Tensor:
    """Sum one site's log-probability over the plates left of the batch (such as time)."""
    if log_prob.dim() < len(batch):
        return log_prob.expand(tuple(batch))
    return log_prob.sum_to_size(*log_prob.shape[-len(batch) :]).expand(tuple(batch)) if batch else log_prob.sum()


# -- given, and the networks that read it ------------------------------------------------------------------------------


def parts_of(given: Any) -> tuple[Any, ...]:
    return given if isinstance(given, tuple) else (given,)


def map_given(function: Callable[[Any], Any], given: Any) -> Any:
    """``function`` of each part of ``given``, which stays a tensor, a tuple of them, or None."""
    if given is None:
        return None
    return tuple(map(function, given)) if isinstance(given, tuple) else function(given)


def rows_of(given: Any, rows: slice) -> Any:
    return map_given(lambda part: part[rows], given)


def is_pair(shape: Shape | None) -> TypeGuard[tuple[Sequence[int], ...]]:
    """Whether a given_shape is a tuple of shapes, for a tuple of givens."""
    return shape is not None and len(shape) > 0 and isinstance(shape[0], tuple)


def shapes_of(shape: Shape | None, given: Any) -> tuple[torch.Size | None, ...]:
    """One shape per part of ``given``; None where it is left open."""
    parts = parts_of(given)
    if shape is None:
        return (None,) * len(parts)
    shapes = tuple(torch.Size(s) for s in shape) if is_pair(shape) else (torch.Size(shape),)
    if len(shapes) != len(parts):
        raise ValueError(
            f"given has {len(parts)} part(s), but {len(shapes)} are expected, of shapes {tuple(map(tuple, shapes))}"
        )
    return shapes


def example_given(program: Program) -> Any:
    """Zeros to stand for one row of ``given``; None where there is no ``given``, or its shape is left open."""
    if not program.conditional or program.given_shape is None:
        return None
    like = parameter_of(program)

    def zeros(shape: Sequence[int]) -> Tensor:
        label = tuple(shape) == () and program.num_classes is not None
        return torch.zeros(1, *shape, dtype=torch.long if label else like.dtype, device=like.device)

    shape: Any = program.given_shape
    return tuple(map(zeros, shape)) if is_pair(shape) else zeros(shape)


def call_network(network: nn.Module, given: Any, shape: Shape | None) -> tuple[torch.Size, Tensor]:
    """Apply a network made for one batch dimension to ``given`` with any number of them.

    Returns:
        The batch shape, and the output with that shape folded into its first dimension, ``(N, ...)``.
    """
    parts = parts_of(given)
    shapes = [part.shape[1:] if s is None else s for part, s in zip(parts, shapes_of(shape, given), strict=True)]
    for part, s in zip(parts, shapes, strict=True):
        if part.shape[part.dim() - len(s) :] != s:
            raise ValueError(f"given has shape {tuple(part.shape)}, but the network expects (B, *{tuple(s)})")
    batch = torch.broadcast_shapes(*(part.shape[: part.dim() - len(s)] for part, s in zip(parts, shapes, strict=True)))
    folded = [part.expand((*batch, *s)).reshape(math.prod(batch), *s) for part, s in zip(parts, shapes, strict=True)]
    # An nn.Embedding takes no other integers, and data sets store labels as bytes.
    folded = [part.long() if part.dim() == 1 and part.dtype == torch.uint8 else part for part in folded]
    return batch, apply_network(network, *folded)


def declare_given(child: Program, shape: Shape, role: str, source: str) -> None:
    """Set the given_shape of ``child``, or raise if it was built for another one.

    Args:
        role: the child's role, for the message ("likelihood").
        source: the source of the given, for the message ("prior's event_shape").
    """
    if not child.conditional:
        raise ValueError(
            f"the {role} is given {source} {tuple(shape)}, but this {type(child).__name__} is not conditional: "
            "build it with a network"
        )
    if child.given_shape is None:
        child.given_shape = shape
    elif tuple(child.given_shape) != tuple(shape):
        raise ValueError(
            f"the {role} expects given_shape {tuple(child.given_shape)}, but it is given {source} {tuple(shape)}"
        )


def parameter_of(program: Program) -> Tensor:
    """A parameter of ``program``, or else a real buffer: it has the dtype and device of the computations."""
    tensors = itertools.chain(program.parameters(), program.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))


def check_program(program: Any, argument: str = "program") -> None:
    """Raise a TypeError unless ``program`` is a `Program`."""
    check_no_distribution(program, argument)
    if not isinstance(program, Program):
        got = f"the class {program.__name__}" if isinstance(program, type) else type(program).__name__
        remedy = _remedy_for(program) if argument == "program" else ""
        raise TypeError(f"{argument} must be a dgm.Program, got {got}{remedy}")


WRAPPED = "wrap a Pyro model with its data, dgm.Posterior(model, *args), for dgm.infer"


def _remedy_for(model: Any) -> str:
    """The end of an error message: what to pass instead of an object that is no program."""
    if isinstance(model, type) and issubclass(model, AutoGuide):
        return f": it is a guide's; use dgm.infer.compare(model, *args, guides=[{model.__name__}])"
    if isinstance(model, type):
        return ": make an object of it" + ("" if issubclass(model, Program) else f", and {WRAPPED}")
    if isinstance(model, AutoGuide):
        return ": it is a guide; wrap the model, dgm.Posterior(model, *args), and use dgm.infer.psis(posterior, guide)"
    if isinstance(model, tuple) and model and all(map(callable, model)):
        return (
            ": wrap the model of the pair, dgm.Posterior(model, *args), and use dgm.infer.psis(posterior, guide) or "
            "dgm.infer.compare(model, *args, guides=[guide])"
        )
    if type(model).__name__ == "Posterior":
        return (
            ": a Posterior has one data set and no encoder; dgm.infer has ais, bidirectional, smc, nuts, psis, gaps, "
            "sbc, check and compare for it"
        )
    if isinstance(model, OF_PYRO):
        return f": it runs a model; {WRAPPED}"
    if callable(model) and (isinstance(model, PyroModule) or not isinstance(model, nn.Module)):
        return f": {WRAPPED}"
    if isinstance(model, nn.Module):
        return ": a network states no density; make it that of a conditional, such as dgm.Normal(shape, network)"
    if isinstance(model, str):
        return ": dgm.build(name, data) makes a program, and dgm.load(path) reads one"
    if isinstance(model, Data) or hasattr(model, "shape"):
        return ": data come second, after the program"
    return f": pass a program, such as dgm.build('vae', data), or {WRAPPED}"


def check_no_distribution(value: Any, argument: str) -> None:
    """Raise if ``value`` is a distribution: several names are those of a distribution in Pyro and of a program here."""
    if isinstance(value, Distribution):
        raise TypeError(
            f"{argument} must be a dgm.Program, got the distribution {type(value).__name__}: use a program such as "
            "dgm.Normal(shape), or a dgm.Conditional whose forward() returns the distribution"
        )


def check_place(x: Tensor, argument: str, program: Program, *, reals: bool = True) -> None:
    """Raise unless ``x`` has the device of the program's parameters and, where it is real, their precision."""
    parameter = next(program.parameters(), None)
    if parameter is None:
        return
    if x.device != parameter.device:
        raise ValueError(
            f"{argument} is on {x.device}, but the program is on {parameter.device}: "
            f"use {argument}.to({str(parameter.device)!r})"
        )
    if reals and x.is_floating_point() and x.dtype != parameter.dtype:
        raise TypeError(
            f"{argument} has dtype {x.dtype}, but the program's parameters have {parameter.dtype}: "
            f"use {argument}.to({parameter.dtype})"
        )


def check_values(x: Tensor, levels: int | None, owner: str, *, counts: bool = False, missing: bool = False) -> None:
    """Raise unless the values of ``x`` can be outcomes: finite, and integers below ``levels`` where there are any.

    Args:
        counts: whether integers are allowed without levels.
        missing: as for `check_finite`.
    """
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"x has dtype {x.dtype}: use x.to(torch.uint8) for binary data, x.real for complex data")
    if x.is_floating_point():
        check_finite(x, "x", missing=missing)
    if levels is None:
        if not x.is_floating_point() and not counts:
            raise TypeError(
                f"x holds integers ({x.dtype}), but {owner} is a density on reals: wrap it in "
                "dgm.Dequantized(flow, levels=...), or call x.float() if the values really are real"
            )
        return
    if x.is_floating_point() and not torch.equal(x, x.round()):
        odd = float(x[x != x.round()][0])
        raise ValueError(
            f"x holds {odd:.4g}, but {owner} is a mass on the integers 0 .. {levels - 1}: pass the integers themselves"
        )
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= levels:
        remedy = " For gray levels use Categorical or DiscretizedLogistic, or binarize the data." if levels == 2 else ""
        raise ValueError(
            f"x holds values from {low} to {high}, but {owner} has {levels} levels, 0 .. {levels - 1}.{remedy}"
        )


# -- supports ----------------------------------------------------------------------------------------------------------


def support_of(distribution: Any) -> constraints.Constraint | None:
    """The support of a distribution; None where it declares none."""
    try:
        support: Any = distribution.support
    except (AttributeError, NotImplementedError):
        return None
    return None if constraints.is_dependent(support) else support


def unwrapped(constraint: Any) -> constraints.Constraint:
    """The constraint on a single feature, from a constraint on events of features."""
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    inner: constraints.Constraint = constraint
    return inner


def inside(support: constraints.Constraint | None, zeros: Tensor) -> Tensor:
    """Values of a support, of the shape of ``zeros``."""
    line: Any = None if support is None else unwrapped(support)
    if line is None:
        return zeros
    if isinstance(line, constraints.stack):
        return torch.stack([inside(each, zero) for each, zero in zip(line.cseq, zeros.unbind(-1), strict=True)], -1)
    if line.is_discrete:
        zeros = zeros + getattr(line, "lower_bound", 0)
    else:
        with contextlib.suppress(NotImplementedError):  # no transform leads to it
            zeros = transform_to(line)(zeros).to(zeros.dtype)
    return zeros


def _measure_of(line: Any) -> str:
    if not isinstance(line, constraints.stack):
        return "mass" if line.is_discrete else "density"
    discrete = [i for i, each in enumerate(line.cseq) if each.is_discrete]
    if len(discrete) in (0, len(line.cseq)):
        return "mass" if discrete else "density"
    runs = [list(run) for _, run in itertools.groupby(discrete, lambda i: i - discrete.index(i))]
    named = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"mass of features {named}, density of the others"


def bounded_by_numbers(constraint: constraints.Constraint) -> bool:
    """Whether no bound of a constraint is a tensor: then the constraint does not depend on parameters."""
    parts: Iterable[Any] = vars(constraint).values()
    parts = itertools.chain.from_iterable(part if isinstance(part, list) else [part] for part in parts)
    return all(
        bounded_by_numbers(p) if isinstance(p, constraints.Constraint) else not isinstance(p, Tensor) for p in parts
    )


def check_within(x: Tensor, support: constraints.Constraint | None, owner: str, first: int = 0) -> None:
    """Raise unless ``x``, the data from row ``first`` on, lie in ``support``; None allows every value."""
    if support is None:
        return
    here = copy.copy(unwrapped(support))
    bounds = {name: bound for name, bound in vars(here).items() if isinstance(bound, Tensor)}
    if any(bound.dim() > x.dim() for bound in bounds.values()):  # those of a mixture's components
        return
    wrong = ~here.check(x)
    if not wrong.any():
        return
    place = tuple(wrong.nonzero()[0].tolist())
    if isinstance(here, constraints.stack):
        here = here.cseq[place[-1]]
    for name, bound in bounds.items():
        setattr(here, name, bound.expand(wrong.shape)[place].item())
    value = x[place]
    shown = f"{value.item():.4g}" if value.dim() == 0 else reprlib.repr(value.tolist())
    raise ValueError(
        f"x holds {shown} in row {first + place[0]}, outside of the support of this {owner}, {here}: drop or rescale "
        "such data, or state x by a distribution whose support holds them"
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A separate random state on the CPU and on ``device``: seeded inside, the caller's untouched outside."""
    check_seed(seed)
    on_cuda = device.type == "cuda"
    with alone(), torch.random.fork_rng(devices=[device] if on_cuda else []):
        # Not torch.manual_seed, which seeds the generators of all devices.
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
