r"""Formulas: the joint and the guide of a program as products of factors, read off its statements.

A trace of the statements for one datum has a site per variable. The sites that its density reads are its *parents*, by
Pyro's tracking of provenance, so a VAE of ``joint`` and ``posterior`` is

.. math::
    p(z) \, p(x \mid z) \quad \text{and} \quad q(z \mid x).

As in `pyro.infer.inspect.get_dependencies`, a deterministic site has no density and is replaced by its own parents.
Unlike there, observed sites and conditioning arguments are parents too: a factor p(x_2 | x_1, c) reads both.
"""

from __future__ import annotations

import html
import inspect
import re
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

import pyro
import torch
from pyro import poutine
from pyro.distributions import (
    ExpandedDistribution,
    ImproperUniform,
    Independent,
    MaskedDistribution,
    TransformedDistribution,
    Unit,
)
from pyro.infer.autoguide import AutoGuide
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance, track_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["Factor", "Formula", "factors_of", "formula"]

# Functions that turn a tensor into a Python value, which has no provenance: every later statement may depend on it.
LEAVES_TENSORS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__")

# Longer chains of factors are written with dots.
WRITTEN_OUT = 3

_T = TypeVar("_T")

# A variable and the names of those that it is conditioned on.
Term = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class ChainRule(Sequence[Term]):
    """The terms p(x_i | x_<i, given). Each is made on access, because D terms hold D (D - 1) / 2 parents."""

    sites: tuple[str, ...]
    given: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sites)

    @overload
    def __getitem__(self, place: int, /) -> Term: ...
    @overload
    def __getitem__(self, place: slice, /) -> tuple[Term, ...]: ...
    def __getitem__(self, place: int | slice, /) -> Term | tuple[Term, ...]:
        if isinstance(place, slice):
            return tuple(self[i] for i in range(len(self))[place])
        return self.sites[place], (*self.sites[: range(len(self))[place]], *self.given)


def is_cost(site: str) -> bool:
    """Whether an observed site states a divergence, by the naming convention of factors."""
    return site.endswith("_kl")


@dataclass(frozen=True)
class Factor:
    """One site of a joint or a posterior.

    Attributes:
        site: name of the site.
        parents: the sites and arguments that its density reads; all sites before it, where these are not known.
        event_shape: shape of one value; None where it is not known.
        family: name of its distribution, without wrappers such as `Independent`; None where it is not known.
        kind: ``"latent"``, ``"data"``, ``"deterministic"``, ``"factor"`` for a `pyro.factor`, or ``"estimate"`` for a
            site of a bound's estimate, such as a time or a value at that time.
        chain: the factors of its density, where its distribution is a chain.
        base: whether its density is that of a base times a determinant.
    """

    site: str
    parents: tuple[str, ...]
    event_shape: torch.Size | None
    family: str | None
    kind: str
    chain: Sequence[Term] = ()
    base: bool = False

    @property
    def expands(self) -> bool:
        """Whether its density is itself a product."""
        return bool(self.chain) or self.base


@dataclass(frozen=True)
class Formula:
    """A joint and its posterior, as factors. It prints as text, and as LaTeX in a notebook.

    Attributes:
        name: name of the program or model.
        joint: the factors of p, in the order stated.
        posterior: the factors of q; None where there is no guide.
        num_parameters: number of learned numbers; None where it is not known.
    """

    name: str
    joint: tuple[Factor, ...]
    posterior: tuple[Factor, ...] | None = ()
    num_parameters: int | None = None

    @property
    def latents(self) -> tuple[str, ...]:
        """The latent sites of the joint."""
        return tuple(f.site for f in self.joint if f.kind == "latent" or (f.kind == "estimate" and f.family != "Unit"))

    @property
    def p(self) -> str:
        """The joint in one line."""
        return ", ".join(self._lines("p", _Text))

    @property
    def q(self) -> str:
        """The guide in one line; empty where there is none."""
        return ", ".join(self._lines("q", _Text))

    def __str__(self) -> str:
        size = "" if self.num_parameters is None else f", {self.num_parameters:,} parameters"
        joint, guide = (self._lines(density, _Text) for density in "pq")
        rows = [*zip(["joint"] + [""] * len(joint), joint, strict=False)]
        rows += zip(["guide"] + [""] * len(guide), guide, strict=False)
        sites = [(f.site, _kind_of_value(f)) for f in self.joint if f.kind in ("latent", "data")]
        rows += [
            (f"{run[0][0]} .. {run[-1][0]}" if len(run) > 1 else run[0][0], run[0][1])
            for run in _cut_into_runs(sites, _are_alike_neighbors)
        ]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join([self.name + size, *(f"  {name:{width}}  {text}" for name, text in rows)])

    def _repr_latex_(self) -> str:
        lines = [line for density in "pq" for line in self._lines(density, _Latex)]
        return r"$$\begin{gathered}" + r" \\ ".join(lines) + r"\end{gathered}$$"

    def html(self) -> str:
        """The factors as HTML without a stylesheet or script; names are escaped."""
        return "<br>".join(line for density in "pq" for line in self._lines(density, _Html))

    def _lines(self, density: str, writing: type[_Text]) -> list[str]:
        """The product of the factors of p or q, and a line for each factor that is itself a product."""
        style = writing(f.site for f in (*self.joint, *(self.posterior or ())))
        factors = [f for f in self.joint if f.kind != "estimate"] if density == "p" else self.posterior or ()
        if not factors:
            return []
        equations = [f"{style.factor(density, f)} = {self._expanded(density, f, style)}" for f in factors if f.expands]
        if len(factors) == len(equations) == 1:
            return equations
        product = dotted([f.site for f in factors], lambda i: style.factor(density, factors[i]), style.dots)
        return [product, *equations]

    def _expanded(self, density: str, factor: Factor, style: _Text) -> str:
        if factor.base:
            taken = {f.site for f in (*self.joint, *(self.posterior or ()))}
            u = next(letter for letter in ("u", "v", "w", "b") if letter not in taken)
            return f"{style.density(density, u, factor.parents)} {style.determinant(u, factor.site)}"
        sites = factor.chain.sites if isinstance(factor.chain, ChainRule) else [site for site, _ in factor.chain]
        within = [site for site in sites if site != factor.site]
        written = dotted(sites, lambda i: style.density(density, *factor.chain[i]), style.dots)
        return style.integral(written, within) if len(within) < len(sites) else written


def _kind_of_value(factor: Factor) -> str:
    return ", ".join(str(part) for part in (factor.family, tuple(factor.event_shape or ())) if part is not None)


def dotted(sites: Sequence[str], text: Callable[[int], str], dots: str) -> str:
    """The texts of the sites, joined. Dots shorten a long run such as x_1 .. x_64.

    Args:
        text: writes the site at a place; it is called only for the sites shown.
    """
    runs = _cut_into_runs(range(len(sites)), lambda i, j: _are_neighbors(sites[i], sites[j]))
    shown = (run if len(run) <= WRITTEN_OUT else [*run[:2], None, run[-1]] for run in runs)
    return " ".join(dots if i is None else text(i) for run in shown for i in run)


def _cut_into_runs(terms: Iterable[_T], goes_on: Callable[[_T, _T], bool]) -> list[list[_T]]:
    """``terms`` cut wherever ``goes_on`` is false for two neighbors."""
    runs: list[list[_T]] = []
    for term in terms:
        if runs and goes_on(runs[-1][-1], term):
            runs[-1].append(term)
        else:
            runs.append([term])
    return runs


def _chain_index(site: str) -> tuple[str, int] | None:
    found = re.fullmatch(r"(.+)_(\d+)", site)
    return (found[1], int(found[2])) if found else None


def _are_alike_neighbors(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether two (site, text) are neighbors in a chain with the same text."""
    return first[1] == second[1] and _are_neighbors(first[0], second[0])


def _are_neighbors(first: str, second: str) -> bool:
    a, b = _chain_index(first), _chain_index(second)
    return a is not None and b is not None and a[0] == b[0] and abs(a[1] - b[1]) == 1


class _Text:
    """Writes a formula of these sites as text."""

    dots = "..."
    bar = " | "
    differential = "d"

    def __init__(self, sites: Iterable[str]) -> None:
        numbered = sorted(filter(None, map(_chain_index, sites)))
        self.highest = dict(numbered)  # by stem

    def name(self, site: str) -> str:
        return site

    def all_beyond(self, stem: str, sign: str, number: int) -> str:
        return f"{stem}_{sign}{number}"

    def density(self, density: str, variable: str, parents: Sequence[str]) -> str:
        given = ", ".join(self._parents(parents))
        name = self.name(variable)
        return f"{density}({name}{self.bar}{given})" if given else f"{density}({name})"

    def factor(self, density: str, factor: Factor) -> str:
        variable, parents = self.name(factor.site), factor.parents
        if factor.kind == "deterministic":
            return f"[{variable} = f({', '.join(self._parents(parents))})]"
        if factor.kind == "factor":
            return f"f({', '.join(self._parents(parents))})"
        return self.density(density, factor.site, parents)

    def determinant(self, base: str, site: str) -> str:
        return f"|det {self.differential}{self.name(base)}/{self.differential}{self.name(site)}|"

    def integral(self, integrand: str, over: Sequence[str]) -> str:
        ends = [over[0], over[-1]] if len(over) > 2 else over
        return f"∫ {integrand} {f' {self.dots} '.join(f'd{self.name(name)}' for name in ends)}"

    def _parents(self, parents: Sequence[str]) -> list[str]:
        """Names of the parents, with x_1 .. x_i-1 written as x_<i, and z_i+1 .. z_L as z_>i."""
        runs: dict[str, set[int]] = {}
        for stem, number in filter(None, map(_chain_index, parents)):
            runs.setdefault(stem, set()).add(number)
        spans = {stem: (len(run), min(run), max(run)) for stem, run in runs.items()}
        names: list[str] = []
        for parent in parents:
            stem = (_chain_index(parent) or ("", 0))[0]
            count, first, last = spans.get(stem, (1, 0, 0))
            if count == 1 or count < last - first + 1:
                written = [self.name(parent)]
            elif last == self.highest.get(stem) and first > 1:
                written = [self.all_beyond(stem, ">", first - 1)]
            elif last == self.highest.get(stem):
                written = [self.name(f"{stem}_{first}"), *[self.dots] * (last > 2), self.name(f"{stem}_{last}")]
            elif first == 1:
                written = [self.all_beyond(stem, "<", last + 1)]
            else:
                written = [self.name(parent)]
            names += [name for name in written if name not in names]
        return names


class _Latex(_Text):
    dots = r"\cdots"
    bar = r" \mid "

    def name(self, site: str) -> str:
        stem, index = _letter_and_index(site)
        index = index if len(index) < 2 or index.isdecimal() else rf"\text{{{_escaped(index)}}}"
        stem = stem if len(stem) == 1 else rf"\mathit{{{_escaped(stem)}}}"
        return f"{stem}_{{{index}}}" if index else stem

    def all_beyond(self, stem: str, sign: str, number: int) -> str:
        return f"{self.name(stem)}_{{{sign}{number}}}"

    def determinant(self, base: str, site: str) -> str:
        return rf"\left|\det \frac{{\partial {base}}}{{\partial {self.name(site)}}}\right|"

    def integral(self, integrand: str, over: Sequence[str]) -> str:
        ends = [over[0], over[-1]] if len(over) > 2 else over
        return rf"\int {integrand} \, " + rf" {self.dots} ".join(f"d{self.name(name)}" for name in ends)


class _Html(_Text):
    dots = "…"
    differential = "∂"

    def name(self, site: str) -> str:
        stem, index = map(html.escape, _letter_and_index(site))
        return f"<i>{stem}</i>" + (f"<sub>{index}</sub>" if index else "")

    def all_beyond(self, stem: str, sign: str, number: int) -> str:
        return f"{self.name(stem)}<sub>{html.escape(sign)}{number}</sub>"


def _letter_and_index(site: str) -> tuple[str, str]:
    """The letter or word of a name such as x_1, x_continuous or z2, and its index."""
    found = re.fullmatch(r"([A-Za-z])(\d+)|([^_]*)_?(.*)", site)
    assert found is not None
    return (found[1], found[2]) if found[1] else (found[3], found[4])


def _escaped(name: str) -> str:
    return re.sub(r"[_%$#&{}]", r"\\\g<0>", name)


# -- reading statements ------------------------------------------------------------------------------------------------


class _Untouched(Messenger):
    """Reads parameters without putting anything into Pyro's param store."""

    def _pyro_param(self, msg: Any) -> None:
        name, initial = msg["args"][0], msg["args"][1] if len(msg["args"]) > 1 else None
        if initial is None or (name in pyro.get_param_store() and not isinstance(initial, nn.Parameter)):
            return
        msg["value"] = initial() if callable(initial) and not isinstance(initial, Tensor) else initial

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = detach_provenance(msg["value"])  # parameters are no parents


class _Blank(Messenger):
    """Replaces draws by blank values: a draw from a chain would run it, and an improper prior has none."""

    def _pyro_sample(self, msg: Any) -> None:
        base = _base_distribution(msg["fn"])
        if msg["value"] is None and hasattr(base, "blank"):
            msg["value"] = base.blank()
        elif msg["value"] is None and isinstance(base, ImproperUniform):
            transform = biject_to(msg["fn"].support)
            msg["value"] = transform(torch.zeros(transform.inverse_shape(msg["fn"].shape())))


class _Arguments(Messenger):
    """Records the argument that each observed site has as its value, and the names read as Python values before it."""

    def __init__(self, observes: dict[str, str], untracked: _Untracked) -> None:
        super().__init__()
        self.observes, self.sites = dict(observes), set[str]()
        self.untracked, self.read_before = untracked, dict[str, frozenset[str]]()

    def _pyro_sample(self, msg: Any) -> None:
        computed = type(msg["fn"]) is Unit or (msg["infer"] or {}).get("_deterministic")  # not data
        if msg["is_observed"] and isinstance(msg["value"], Tensor) and not computed:
            for name in get_provenance(msg["value"]) - self.sites:
                self.observes.setdefault(name, msg["name"])
        self.sites.add(msg["name"])
        self.read_before[msg["name"]] = self.untracked.as_python


class _Untracked(TorchFunctionMode):
    """Tracks what Pyro's provenance does not: tensors written in place, such as a cache, and tensors read as Python
    values.
    """

    def __init__(self) -> None:
        super().__init__()
        # By address; the storages themselves are kept so that no other takes it.
        self.storages: dict[int, tuple[torch.UntypedStorage, frozenset[str]]] = {}
        self.as_python: frozenset[str] = frozenset()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            self._note_storage(tensors[0], get_provenance(tensors[1:]))
        if name in LEAVES_TENSORS:
            self.as_python |= get_provenance(tensors)
        read: frozenset[str] = (
            frozenset().union(*map(self._names_in_storage, tensors)) if self.storages else frozenset()
        )
        return track_provenance(result, read) if read else result

    def _note_storage(self, tensor: Tensor, names: frozenset[str]) -> None:
        if names:
            storage = detach_provenance(tensor).untyped_storage()
            self.storages[storage._cdata] = storage, self._names_in_storage(tensor) | names

    def _names_in_storage(self, tensor: Tensor) -> frozenset[str]:
        storage = detach_provenance(tensor).untyped_storage()
        return self.storages.get(storage._cdata, (None, frozenset()))[1]


def marked(name: str, value: Any) -> Any:
    """``value``, marked with ``name`` as its provenance if it is a tensor."""
    return ProvenanceTensor(detach_provenance(value), frozenset({name})) if isinstance(value, Tensor) else value


def factors_of(
    statements: Callable[..., Any],
    *args: Any,
    latents: Collection[str] | None = None,
    observes: dict[str, str] | None = None,
    **kwargs: Any,
) -> tuple[tuple[Factor, ...], dict[str, str], dict[str, Any]]:
    """The factors of Pyro statements.

    Args:
        args, kwargs: arguments of ``statements``, with tensors `marked` by their names.
        latents: names of the latent sites; default the sites that are not observed.
        observes: the site at which each argument is observed, where other statements state it.

    Returns:
        The factors, the site at which each argument is observed, and the values of the sites.
    """
    untracked = _Untracked()
    arguments = _Arguments({} if observes is None else observes, untracked)
    with (
        torch.random.fork_rng(),
        torch.no_grad(),
        pyro.validation_enabled(False),
        poutine.block(),
        TrackProvenance(),
        _Untouched(),
        arguments,
        _Blank(),
        untracked,
        poutine.trace() as traced,
    ):
        statements(*args, **kwargs)
        sites: list[Any] = [
            site for site in traced.trace.nodes.values() if site["type"] == "sample" and not site_is_subsample(site)
        ]
        found: list[Factor] = []
        for site in sites:
            found.append(_factor_of_site(site, found, latents, arguments))
    values: Any = {site["name"]: detach_provenance(site["value"]) for site in sites}
    return tuple(found), arguments.observes, values


def _factor_of_site(
    site: Any, before: Sequence[Factor], latents: Collection[str] | None, arguments: _Arguments
) -> Factor:
    """The factor of a site, given the factors stated before it and the arguments."""
    name, fn, infer = site["name"], site["fn"], site["infer"] or {}
    base = _base_distribution(fn)
    family = type(base).__name__.removesuffix("Distribution")
    fixed = family == "Delta"
    is_chain = hasattr(base, "factors")
    # Factors of a bound may state the density of a chain, so what the chain is given counts too.
    read_by_it = (fn.log_prob(site["value"]), base.given if is_chain else None)
    names = get_provenance(site["value"] if fixed else read_by_it) | arguments.read_before[name]
    read = {arguments.observes.get(p, p) for p in names} - {name}
    order = [factor.site for factor in before]
    parents = (*(p for p in order if p in read), *sorted(read.difference(order)))
    estimates = {factor.site for factor in before if factor.kind == "estimate"}
    if infer.get("is_noising") or (family == "Unit" and (is_cost(name) or estimates & read)):
        kind = "estimate"
    elif fixed or family == "Unit":
        kind = "deterministic" if fixed else "factor"
    else:
        kind = "data" if (site["is_observed"] if latents is None else name not in latents) else "latent"
    chain = base.factors(name, parents) if is_chain else ()
    return Factor(name, parents, fn.event_shape, family, kind, chain, type(base) is TransformedDistribution)


def _base_distribution(distribution: Any) -> Any:
    """The distribution without wrappers that change shapes or units, such as `Independent`."""
    while isinstance(distribution, Independent | ExpandedDistribution | MaskedDistribution) or _only_units(
        distribution
    ):
        distribution = distribution.base_dist
    return distribution


def _only_units(distribution: Any) -> bool:
    return any(hasattr(transform, "of_features") for transform in getattr(distribution, "transforms", ()))


def formula(source: Any, *args: Any, **kwargs: Any) -> Formula:
    """The joint and the guide of a program, or of Pyro callables, as products of factors.

    Nothing is trained, registered or drawn from the caller's random state.

    Args:
        source: a `Program`; a Pyro model; or a pair of them, ``(model, guide)``.
        args, kwargs: arguments of the callables. A program needs none, except that one row of ``given`` may come first
            if its given_shape is left open.

    Raises:
        TypeError: ``source`` is none of these.
        ValueError: the guide is one of Pyro's AutoGuides, and has never been called.

    >>> import torch, dgm_pyro as dgm
    >>> vae = dgm.VAE(dgm.Normal(2), dgm.Normal(3, nn.Linear(2, 6)), dgm.Normal(2, nn.Linear(3, 4)))
    >>> print(formula(vae))
    VAE, 34 parameters
      joint  p(z) p(x | z)
      guide  q(z | x)
      z      Normal, (2,)
      x      Normal, (3,)
    """
    if isinstance(getattr(type(source), "formula", None), types.FunctionType):
        found: Formula = source.formula(*args, **kwargs)
        return found
    model, guide = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
    for role, part in (("source", model), ("the guide of source", guide)):
        if isinstance(part, type) or not (callable(part) or (part is None and role != "source")):
            raise TypeError(f"{role} must be a dgm.Program, a Pyro model, or a pair (model, guide), got {part!r}")
    if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
        raise ValueError(
            f"the guide of source, {type(guide).__name__}, makes its parameters in its first call: call it once, "
            "guide(...)"
        )
    signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    bound = signature.bind(*args, **kwargs)
    for name, value in bound.arguments.items():
        bound.arguments[name] = marked(name, value)
    name = getattr(model, "__name__", type(model).__name__)
    store = pyro.get_param_store()
    with store.scope(store.get_state()):  # a PyroModule writes to the store past all handlers
        joint, observes, _ = factors_of(model, *bound.args, **bound.kwargs)
        posterior = None
        if guide is not None:
            posterior, _, _ = factors_of(guide, *bound.args, observes=observes, **bound.kwargs)
    return Formula(name, joint, posterior)
