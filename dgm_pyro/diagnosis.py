r"""Preflight: what is wrong with a model and a guide, before an hour of training shows it.

`doctor` traces the guide, replays the model on its latents, and looks at the two traces, at the loss

.. math::
    \hat L = \sum_s \log p_s - \sum_s \log q_s + \Big(\sum_{s \in S} \log q_s\Big) \, \mathrm{stop}(\hat L),

with S the latents that cannot be reparameterized, and at its gradient. It takes any Pyro pair, ours or yours. Each
check is a function from a `Visit` to findings; `CHECKS` is the list of them.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import itertools
import math
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO as PyroELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import ComposeTransform, Transform

from dgm_pyro.evaluation import as_data, program_device
from dgm_pyro.program import Program, alone, differentiating, is_pair, sample_sites, seeded
from dgm_pyro.results import Result, Table

SEVERITIES = ("error", "warning", "note")
DRAWS = 3
JITTER = 0.1
SUPPORT_DRAWS = 200
ROUND_TRIP = 1e-2
JACOBIAN_FEATURES = 32


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: "error" (the result would be wrong), "warning" (it may be), "note" (good to know).
        check: which check found it.
        where: the site, the parameter or the plate.
        what, fix: one line each.
    """

    severity: str
    check: str
    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.what}\n  fix: {self.fix}"


@dataclass(frozen=True)
class Diagnosis(Result):
    """All findings, the worst first."""

    findings: tuple[Finding, ...]
    sites: tuple[str, ...] = ()
    num_parameters: int = 0

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether there is no error; there may be warnings."""
        return not self.errors

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def parts(self) -> list[str | Table]:
        counts = ", ".join(
            f"{n} {severity}{'s' * (n != 1)}"
            for severity in SEVERITIES
            if (n := sum(finding.severity == severity for finding in self.findings))
        )
        looked = f"{len(self.sites)} sites, {self.num_parameters} parameters"
        return [*map(str, self.findings), f"{counts or 'nothing found'} ({looked})"]


@dataclass
class Site:
    """One sample site of a trace, with its scaled log-probability (None if it could not be computed)."""

    name: str
    fn: Any
    value: Tensor
    observed: bool
    plates: tuple[Any, ...]
    scale: Any
    mask: Any
    infer: dict[str, Any]
    log_prob: Tensor | None = None
    trouble: Exception | None = None

    @property
    def enumerated(self) -> bool:
        return self.infer.get("enumerate") is not None


@dataclass
class Visit:
    """The traces of one run of the guide, and of the model replayed on it.

    Attributes:
        model, guide: their sites by name; guide is None if there is no guide.
        subsampled: plates smaller than their data, by name: (size, subsample size).
        drawn_apart: those of them whose part of the data the guide alone draws.
        params: by name in the param store, the tensors that `pyro.param` statements brought along.
        before: the param store as it was.
        leaves: by id, every tensor that the loss has a gradient for; gradients: by id.
        held: by name in the param store, the tensors it holds (unconstrained).
        registered: by id, the parameters that SVI would train; named: names of tensors found by looking.
        own: ids of parameters of a model or guide that is an `nn.Module` itself.
    """

    model: dict[str, Site]
    guide: dict[str, Site] | None
    subsampled: dict[str, tuple[int, int]]
    drawn_apart: set[str]
    params: dict[str, list[Tensor]]
    before: dict[str, Tensor]
    arguments: list[Tensor]
    held: dict[str, Tensor] = field(default_factory=dict)
    registered: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    named: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    leaves: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    moved: set[int] = field(default_factory=set)
    culprits: dict[int, str] = field(default_factory=dict)
    loss: PyroELBO | None = None

    @property
    def sites(self) -> Iterator[tuple[str, Site]]:
        """("model" or "guide", site), the model's first."""
        for site in self.model.values():
            yield "model", site
        for site in (self.guide or {}).values():
            yield "guide", site

    def name_of(self, parameter: Tensor) -> str:
        for table in (self.registered, self.named):
            if id(parameter) in table:
                return table[id(parameter)][0].replace("$$$", ".")
        return f"a tensor of shape {tuple(parameter.shape)}"


Check = Callable[[Visit], Iterator[Finding]]


def doctor(model: Any, guide: Any = None, *args: Any, loss: PyroELBO | None = None, **kwargs: Any) -> Diagnosis:
    """Look for what is wrong with a model and a guide; nothing of theirs is changed.

    Args:
        model: a Pyro model; or a `Program`, which brings its own guide: then call ``doctor(program, data)``.
        guide: a Pyro guide, or None for a model alone (as for MCMC). After a `Program`: a `Data`, a tensor, or None for
            samples of the program.
        args, kwargs: what the model and the guide are called with.
        loss: the ELBO object you mean to use, to have its plate nesting looked at.

    Returns:
        A `Diagnosis`; ``diagnosis.ok`` says whether there is no error.

    >>> import pyro, torch, pyro.distributions as dist, dgm_pyro as dgm
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     pyro.sample("zz", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))
    >>> print(dgm.doctor(model, guide, torch.zeros(5)).errors[0])
    error: zz: the guide samples it, but the model does not
      fix: did you mean 'z'? Otherwise sample it in the model, or mark it infer={'is_auxiliary': True}
    """
    if isinstance(model, Program):
        if args or kwargs:
            raise ValueError(
                "a Program is called as doctor(program, data): pass labels in a dgm.Data(x, y), and other variables in "
                "a dgm.Data(x, given=...)"
            )
        return _program(model, guide, loss)
    if not callable(model) or not (guide is None or callable(guide)):
        raise TypeError(
            f"model and guide must be callable, got {type(model).__name__} and {type(guide).__name__}: "
            "doctor(model, guide, *args)"
        )
    return _diagnose(model, guide, args, kwargs, loss)


def _program(program: Program, data: Any, loss: PyroELBO | None) -> Diagnosis:
    modes = [(module, module.training) for module in program.modules()]
    for module, _ in modes:
        module.training = isinstance(module, Program)  # the statements of training, but no dropout and no batch norm
    try:
        if data is None:
            value, given = _example(program)
        else:
            try:
                points = as_data(program, data)
            except (ValueError, TypeError) as error:
                return Diagnosis((Finding("error", "data", program.variable, _line(error), _remedy(error)),))
            value, given, _ = program.arguments(points[:64].to(program_device(program)))
        return _diagnose(program.model, program.guide, (value, given), {}, loss)
    finally:
        for module, training in modes:
            module.training = training


def _example(program: Program) -> tuple[Tensor, Any]:
    """Eight draws from the program itself, with some ``given``."""
    where = program_device(program)
    given = None
    with seeded(0, where):
        if program.conditional:
            if program.given_shape is None:
                raise ValueError(f"this {type(program).__name__} leaves its given_shape open: pass data")
            shapes: Any = program.given_shape if is_pair(program.given_shape) else (program.given_shape,)
            parts = tuple(
                torch.randint(program.num_classes, (8,), device=where)
                if tuple(shape) == () and program.num_classes
                else torch.randn(8, *shape, device=where)
                for shape in shapes
            )
            given = parts if is_pair(program.given_shape) else parts[0]
        return program.sample(8, given), given


# -- the visit ---------------------------------------------------------------------------------------------------------


class _Watch(Messenger):
    """Notes what every `pyro.param` statement brings along, and which plates take a part of their data."""

    def __init__(self) -> None:
        super().__init__()
        self.params: dict[str, list[Tensor]] = {}
        self.subsampled: dict[str, tuple[int, int]] = {}

    def _pyro_param(self, message: Any) -> None:
        initial = message["args"][1] if len(message["args"]) > 1 else None  # the name comes first
        seen = self.params.setdefault(message["name"], [])
        if isinstance(initial, Tensor) and not any(initial is other for other in seen):
            seen.append(initial)

    def _pyro_sample(self, message: Any) -> None:
        fn = message["fn"]
        if type(fn).__name__ == "_Subsample" and fn.subsample_size is not None and fn.subsample_size < fn.size:
            self.subsampled[message["name"]] = (fn.size, fn.subsample_size)


@alone()
def _diagnose(model: Any, guide: Any, args: Any, kwargs: Any, loss: PyroELBO | None) -> Diagnosis:
    named, own = _tensors_of((model, guide))
    arguments = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
    arguments += [part for group in args if isinstance(group, tuple) for part in group if isinstance(part, Tensor)]
    place = next((tensor.device for tensor in arguments), torch.device("cpu"))
    store = pyro.get_param_store()
    before = dict(store.get_state()["params"])
    mixed = list(_device_mix(arguments, [tensor for _, tensor in named.values()]))
    if mixed:  # nothing would run
        return _sorted(mixed, None)
    kept = [(tensor, tensor.detach().clone()) for tensor in _everything((model, guide))]
    still: list[tuple[Tensor, Tensor]] = []
    modules = [part for part in (model, guide) if isinstance(part, nn.Module)]
    frozen = [named for part in modules for named in part.named_parameters() if not named[1].requires_grad]
    state: Any = {"params": before, "constraints": dict(store.get_state()["constraints"])}
    visit = None
    try:
        with (
            store.scope(state),
            seeded(0, place),
            pyro.validation_enabled(False),
            differentiating("doctor"),
        ):
            for draw in range(DRAWS + 1):
                if draw == DRAWS and visit is not None:
                    # A zero gradient may be due to weights that start at zero.
                    still = [(leaf, leaf.detach().clone()) for leaf in visit.leaves.values()]
                    _jitter(visit)
                try:
                    latest = _visit(model, guide, args, kwargs)
                except _Raised as raised:
                    if visit is None:
                        return _sorted([raised.finding], None)
                    break
                latest.named, latest.own, latest.loss = named, own, loss
                latest.before, latest.arguments = before, arguments
                if any(site.trouble is not None for _, site in latest.sites):
                    visit = visit or latest
                    break
                _differentiate(latest)
                if visit is None:
                    visit = latest
                else:
                    visit.leaves |= latest.leaves
                    visit.moved |= latest.moved
            assert visit is not None
            _put_back(still)
            findings = [finding for check in CHECKS for finding in check(visit)]
            findings += [
                Finding("error", "frozen", name, "it has requires_grad=False, but Pyro sets it to True and trains it",
                        "make it a buffer, by register_buffer")
                for name, tensor in frozen if tensor.requires_grad
            ]  # fmt: skip
    finally:
        _put_back(kept)
        for _, tensor in frozen:
            tensor.requires_grad_(False)
    return _sorted(findings, visit)


@torch.no_grad()
def _put_back(kept: Sequence[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in kept:
        tensor.copy_(value)


def _sorted(findings: Sequence[Finding], visit: Visit | None) -> Diagnosis:
    ordered = sorted(dict.fromkeys(findings), key=lambda finding: SEVERITIES.index(finding.severity))
    if visit is None:
        return Diagnosis(tuple(ordered))
    sites = tuple(dict.fromkeys(site.name for _, site in visit.sites))
    count = sum(parameter.numel() for _, parameter in visit.registered.values())
    return Diagnosis(tuple(ordered), sites, count)


class _Raised(Exception):
    def __init__(self, finding: Finding):
        super().__init__()
        self.finding = finding


def _visit(model: Any, guide: Any, args: Any, kwargs: Any) -> Visit:
    watch = _Watch()
    guided: poutine.Trace | None = None
    with watch:
        if guide is not None:
            with _reported("guide"):
                guided = poutine.trace(guide).get_trace(*args, **kwargs)
            model = poutine.replay(model, trace=guided)
        by_guide, watch.subsampled = watch.subsampled, {}
        with _reported("model"):
            modeled = poutine.trace(model).get_trace(*args, **kwargs)
    visit = Visit(
        model=_sites(modeled),
        guide=None if guided is None else _sites(guided),
        subsampled=by_guide | watch.subsampled,
        drawn_apart=by_guide.keys() - watch.subsampled.keys(),
        params=watch.params,
        before={},
        arguments=[],
    )
    parameters = pyro.get_param_store().get_state()["params"]
    visit.held = {name: parameters[name] for name in watch.params if name in parameters}
    visit.registered = {id(parameter): (name, parameter) for name, parameter in visit.held.items()}
    return visit


def _sites(trace: poutine.Trace) -> dict[str, Site]:
    sites = {}
    for name in sample_sites(trace):
        node: Any = trace.nodes[name]
        site = Site(
            name, node["fn"], node["value"], node["is_observed"],
            tuple(frame for frame in node["cond_indep_stack"] if frame.vectorized),
            node["scale"], node["mask"], dict(node["infer"] or {}),
        )  # fmt: skip
        try:
            # A copy of what comes from outside: transforms find what they have just mapped without inverting it.
            value = site.value.clone() if site.observed else site.value
            site.log_prob = scale_and_mask(site.fn.log_prob(value), site.scale, site.mask)
        except Exception as error:  # whatever the distribution raises is the finding
            site.trouble = error
        sites[name] = site
    return sites


@contextlib.contextmanager
def _reported(role: str) -> Iterator[None]:
    """Turn what a pair raises into a finding."""
    try:
        yield
    except Exception as error:  # it may be anything: the code is the user's
        text = _line(error)
        broken = re.search(r"Shape mismatch inside plate\('(.+)'\) at site (.+) dim (-?\d+), (\d+) vs (\d+)", text)
        if broken:
            plate, site, dim, size, found = broken.groups()
            raise _Raised(
                Finding(
                    "error", "plates", site,
                    f"the {role} has size {found} at dim {dim}, where plate {plate!r} has {size}",
                    "add .to_event(1) if that dimension belongs to one event; otherwise make the plate that long",
                )
            ) from error  # fmt: skip
        mixed = re.search(r"dtype|scalar type|same device|devices", text) is not None
        raise _Raised(
            Finding("error", "dtype" if mixed else "run", role, f"it raises {type(error).__name__}: {text}",
                    "bring parameters and arguments to one dtype and device, such as x.float()" if mixed
                    else f"call the {role} once with the same arguments, and follow the traceback")
        ) from error  # fmt: skip


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) and not text:
        text = "a key is missing"
    return text if len(text) <= 300 else text[:297] + "..."


def _remedy(error: BaseException) -> str:
    """The remedy in one of our own messages: what follows the colon."""
    return _line(error).rpartition(": ")[2]


def _differentiate(visit: Visit) -> None:
    terms = [(site.name, +1, site.log_prob) for role, site in visit.sites if role == "model"]
    terms += [(site.name, -1, site.log_prob) for role, site in visit.sites if role == "guide"]
    parts = [(name, sign * term.sum()) for name, sign, term in terms if term is not None]
    if not parts:
        return
    value = torch.stack([part for _, part in parts]).sum()
    scores = [
        site.log_prob.sum()
        for site in (visit.guide or {}).values()
        if site.log_prob is not None and not site.fn.has_rsample and site.log_prob.requires_grad
    ]
    surrogate = value + sum(scores, torch.zeros_like(value)) * value.detach().nan_to_num(1.0, 1.0, 1.0)
    visit.leaves = _leaves(surrogate)
    leaves = list(visit.leaves.values())
    if not leaves:
        return
    gradients = torch.autograd.grad(surrogate, leaves, retain_graph=True, allow_unused=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if gradient is None:
            continue
        visit.gradients[id(leaf)] = gradient
        if torch.isfinite(gradient).all():
            if gradient.ne(0).any():
                visit.moved.add(id(leaf))
            continue
        visit.moved.add(id(leaf))
        for name, part in parts:
            if part.requires_grad:
                own = torch.autograd.grad(part, leaf, retain_graph=True, allow_unused=True)[0]
                if own is not None and not torch.isfinite(own).all():
                    visit.culprits.setdefault(id(leaf), name)


def _leaves(loss: Tensor) -> dict[int, Tensor]:
    """Every tensor that the loss has a gradient for."""
    seen, found = set(), {}
    pending = [loss.grad_fn] if loss.grad_fn is not None else []
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        pending.extend(parent for parent, _ in node.next_functions)
    return found


@torch.no_grad()
def _jitter(visit: Visit) -> None:
    for leaf in visit.leaves.values():
        leaf.add_(JITTER * torch.randn_like(leaf))


def _tensors_of(callables: Sequence[Any]) -> tuple[dict[int, tuple[str, Tensor]], set[int]]:
    """Names of the tensors with gradients that the callables can see, and which are a callable's own."""
    named: dict[int, tuple[str, Tensor]] = {}
    own: set[int] = set()
    for path, thing in _reachable(callables):
        if isinstance(thing, nn.Module):
            for name, parameter in thing.named_parameters():
                if parameter.requires_grad:
                    named.setdefault(id(parameter), (f"{path}.{name}" if path else name, parameter))
        elif isinstance(thing, Tensor) and thing.requires_grad:
            named.setdefault(id(thing), (path, thing))
    for each in callables:
        if isinstance(each, nn.Module):
            own |= {id(parameter) for parameter in each.parameters()}
    return named, own


def _everything(callables: Sequence[Any]) -> list[Tensor]:
    """Parameters, buffers and leaves that a visit could change."""
    found: dict[int, Tensor] = {}
    for _, thing in _reachable(callables):
        tensors = [*thing.parameters(), *thing.buffers()] if isinstance(thing, nn.Module) else [thing]
        found |= {id(tensor): tensor for tensor in tensors}
    found |= {id(tensor): tensor for tensor in pyro.get_param_store().get_state()["params"].values()}
    return list(found.values())


def _reachable(callables: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Modules and leaf tensors, with a name, that callables hold, close over, or read from their globals."""
    pending: list[tuple[str, Any, int]] = [("", each, 0) for each in callables if each is not None]
    seen: set[int] = set()
    while pending:
        path, thing, depth = pending.pop()
        if id(thing) in seen or depth > 4:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module) or (isinstance(thing, Tensor) and thing.is_leaf):
            yield path, thing
        elif isinstance(thing, functools.partial):
            held = [thing.func, *thing.args, *thing.keywords.values()]
            pending += [(path, each, depth + 1) for each in held]
        elif isinstance(thing, types.MethodType):
            pending += [("", thing.__self__, depth + 1), (path, thing.__func__, depth + 1)]
        elif isinstance(thing, types.FunctionType):
            if thing.__module__ and thing.__module__.split(".")[0] in ("torch", "pyro"):
                continue
            names, cells = thing.__code__.co_freevars, thing.__closure__ or ()
            for name, cell in zip(names, cells, strict=True):
                with contextlib.suppress(ValueError):  # an empty cell
                    pending.append((name, cell.cell_contents, depth + 1))
            reads = set(thing.__code__.co_names)
            pending += [(name, thing.__globals__[name], depth + 1) for name in reads if name in thing.__globals__]
        elif isinstance(thing, list | tuple):
            pending += [(f"{path}[{i}]", each, depth + 1) for i, each in enumerate(thing[:64])]
        elif isinstance(thing, dict):
            items = itertools.islice(thing.items(), 64)
            pending += [(f"{path}[{key!r}]", each, depth + 1) for key, each in items]
        elif hasattr(thing, "__dict__") and not isinstance(thing, type | types.ModuleType):
            held_by = getattr(thing, "__dict__", {})
            pending += [(f"{path}.{name}".lstrip("."), each, depth + 1) for name, each in list(held_by.items())[:64]]


# -- the checks --------------------------------------------------------------------------------------------------------


def _device_mix(arguments: Sequence[Tensor], parameters: Sequence[Tensor]) -> Iterator[Finding]:
    devices = {str(tensor.device) for tensor in (*arguments, *parameters)}
    if len(devices) > 1:
        yield Finding("error", "device", "arguments and parameters", f"they are on {', '.join(sorted(devices))}",
                      f"move all to one device, such as model.to({min(devices)!r})")  # fmt: skip


def dtypes(visit: Visit) -> Iterator[Finding]:
    """Parameters and data of two precisions: torch promotes some operations and refuses others."""
    found: dict[torch.dtype, str] = {}
    for _, (name, tensor) in visit.registered.items():
        if tensor.is_floating_point():
            found.setdefault(tensor.dtype, name.replace("$$$", "."))
    for name, tensor in ((f"argument {i}", tensor) for i, tensor in enumerate(visit.arguments)):
        if tensor.is_floating_point():
            found.setdefault(tensor.dtype, name)
    if len(found) > 1:
        parts = ", ".join(f"{name} is {dtype}" for dtype, name in found.items())
        yield Finding("warning", "dtype", next(reversed(found.values())), parts,
                      "bring all to one dtype, such as x.to(torch.float32)")  # fmt: skip


def partners(visit: Visit) -> Iterator[Finding]:
    """Sites that only the model or only the guide has."""
    if visit.guide is None:
        return
    latent = [site.name for site in visit.model.values() if not site.observed]
    guided = [site.name for site in visit.guide.values() if not site.observed]
    for name in guided:
        if name in latent or visit.guide[name].infer.get("is_auxiliary"):
            continue
        if name in visit.model:
            yield Finding("error", "partners", name, "the guide samples it, but the model observes it",
                          "leave it out of the guide: what is observed needs no guide")  # fmt: skip
            continue
        close = difflib.get_close_matches(name, latent, 1, 0.5)
        hint = f"did you mean {close[0]!r}? Otherwise " if close else ""
        yield Finding("error", "partners", name, "the guide samples it, but the model does not",
                      hint + "sample it in the model, or mark it infer={'is_auxiliary': True}")  # fmt: skip
    for name in latent:
        if name in guided or visit.model[name].enumerated:
            continue
        yield Finding("error", "partners", name, "the model samples it, but the guide does not",
                      f"add pyro.sample({name!r}, ...) to the guide, or enumerate it with "
                      "infer={'enumerate': 'parallel'} and TraceEnum_ELBO")  # fmt: skip


def guide_supports(visit: Visit) -> Iterator[Finding]:
    """Draws of the guide that are impossible under the model, and values of the model that the guide cannot reach."""
    for name, q in (visit.guide or {}).items():
        p = visit.model.get(name)
        if p is None or p.observed:
            continue
        if q.fn.event_dim != p.fn.event_dim:
            yield Finding("error", "supports", name,
                          f"the guide has {q.fn.event_dim} event dimensions, the model {p.fn.event_dim}",
                          f"use .to_event({max(q.fn.event_dim, p.fn.event_dim)}) in both")  # fmt: skip
            continue
        if _outside(p.fn, _draws(q.fn)):
            yield Finding("error", "supports", name,
                          f"the guide draws values outside the model's support, {_support(p.fn)}",
                          f"use a guide on {_support(p.fn)}, such as {_suggestion(p.fn)}")  # fmt: skip
        elif _fixed(q.fn) and _outside(q.fn, _draws(p.fn)) and not isinstance(_base(q.fn), dist.Delta):
            yield Finding("warning", "supports", name,
                          f"the guide covers only {_support(q.fn)}, the model {_support(p.fn)}",
                          "use a guide with the model's support, or the bound stays loose")  # fmt: skip


def _fixed(fn: Any) -> bool:
    """Whether its support has bounds, the same for every element; bounds that differ were computed from the data."""
    support = _constraint(fn)
    bounds = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    return any(bound is not None for bound in bounds) and all(
        bound is None or len(torch.as_tensor(bound).unique()) == 1 for bound in bounds
    )


def data_supports(visit: Visit) -> Iterator[Finding]:
    """Data that the model calls impossible."""
    for site in visit.model.values():
        value = site.value
        if not site.observed or not isinstance(value, Tensor) or value.numel() == 0:
            continue
        if value.is_floating_point() and not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            yield Finding("error", "data", site.name, f"{count} of its observed values are NaN or infinite",
                          "clean the data, or mask those entries with poutine.mask")  # fmt: skip
        elif _outside(site.fn, value):
            low, high = value.min().item(), value.max().item()
            yield Finding("error", "data", site.name,
                          f"data from {low:.4g} to {high:.4g} are outside the support, {_support(site.fn)}",
                          _data_fix(site.fn, low, high))  # fmt: skip


def _data_fix(fn: Any, low: float, high: float) -> str:
    base = _base(fn)
    if isinstance(base, dist.Bernoulli):
        return "binarize the data, or use a Categorical or DiscretizedLogistic for levels, a Normal for reals"
    if _kind(fn) in ("GreaterThan", "GreaterThanEq"):
        return "use a likelihood on the reals, such as Normal, or transform the data"
    if _kind(fn) == "IntegerInterval":
        return f"use a likelihood with at least {int(high) + 1} levels, and integers from 0"
    return "use a likelihood whose support holds the data, or rescale them"


def shapes(visit: Visit) -> Iterator[Finding]:
    """Distributions that cannot score their values: a transform without an inverse, or shapes that do not fit."""
    impossible = {finding.where for finding in data_supports(visit)}
    for role, site in visit.sites:
        if site.trouble is None or site.name in impossible:
            continue
        one_way, odd = _one_way(site.fn), _odd_plate(site)
        if odd is not None:
            size = site.value.shape[odd.dim - site.fn.event_dim]
            yield Finding("error", "plates", site.name,
                          f"the {role} has {size} values where plate {odd.name!r} has {odd.size}",
                          "make the plate as long as the data, or take the plate's part of them: x[rows]")  # fmt: skip
        elif one_way:
            yield Finding("error", "transforms", site.name,
                          f"{one_way} has no inverse, so it cannot score values from outside",
                          "use a transform with one, such as AffineCoupling or Spline")  # fmt: skip
        else:
            shape = tuple(site.value.shape) if isinstance(site.value, Tensor) else ()
            yield Finding("error", "shapes", site.name,
                          f"the {role}'s distribution, batch {tuple(site.fn.batch_shape)} and event "
                          f"{tuple(site.fn.event_shape)}, cannot score a value of shape {shape}: {_line(site.trouble)}",
                          "make the value's last dimensions the event shape, and the others the plates'")  # fmt: skip


def _odd_plate(site: Site) -> Any:
    """The plate whose size the value contradicts, if there is one."""
    for frame in site.plates:
        dim = frame.dim - site.fn.event_dim
        if frame.size == -1 or not isinstance(site.value, Tensor) or site.value.dim() < -dim:
            continue
        if site.value.shape[dim] not in (1, frame.size):
            return frame
    return None


def plates(visit: Visit) -> Iterator[Finding]:
    """Batch dimensions that no plate declares, and plates that model and guide do not share."""
    stated = {frame.name for site in visit.model.values() for frame in site.plates}
    for name in sorted(visit.drawn_apart & stated):
        size, part = visit.subsampled[name]
        yield Finding("error", "plates", name,
                      f"the guide draws {part} of {size} data by itself, while the model gets their indices: latents "
                      "and data are of different rows",
                      "let the model draw them too, subsample_size=, or pass the guide the same plate, by "
                      "create_plates=")  # fmt: skip
    for role, site in visit.sites:
        if site.log_prob is None:
            continue
        declared = {frame.dim: frame for frame in site.plates}
        shape = site.log_prob.shape
        extra = [dim for dim in range(-len(shape), 0) if shape[dim] > 1 and dim not in declared]
        # A plate without a size has -1, and takes any.
        wrong = [dim for dim, frame in declared.items() if len(shape) >= -dim and shape[dim] not in (1, frame.size)]
        wrong = [dim for dim in wrong if declared[dim].size != -1]
        if extra:
            sizes = [shape[dim] for dim in extra]
            parts = [name for name, (_, part) in visit.subsampled.items() if part in sizes]
            where = f"dim {', '.join(map(str, extra))} of size {', '.join(map(str, sizes))}"
            if parts:
                size, part = visit.subsampled[parts[0]]
                yield Finding("error", "plates", site.name,
                              f"the {role} states {part} of the {size} data of plate {parts[0]!r} outside that plate, "
                              "so they are not scaled up",
                              f"move the statement into with pyro.plate({parts[0]!r}, ...)")  # fmt: skip
            else:
                yield Finding("error", "plates", site.name,
                              f"the {role} has a batch dimension that no plate declares ({where})",
                              f"add .to_event({len(extra)}) if it belongs to one event, or "
                              f"with pyro.plate('data', {sizes[-1]}): if its elements are independent")  # fmt: skip
        for dim in wrong:
            yield Finding("error", "plates", site.name,
                          f"the {role} has size {shape[dim]} at dim {dim}, where plate {declared[dim].name!r} has "
                          f"{declared[dim].size}",
                          "make the plate as long as the data, or add .to_event(1)")  # fmt: skip
    for name, q in (visit.guide or {}).items():
        p = visit.model.get(name)
        if p is None:
            continue
        if p.fn.event_shape != q.fn.event_shape:
            yield Finding("error", "shapes", name,
                          f"one value has the shape {tuple(p.fn.event_shape)} in the model, but "
                          f"{tuple(q.fn.event_shape)} in the guide", "give both the same shape")  # fmt: skip
        ours, theirs = ({frame.name for frame in site.plates} for site in (p, q))
        for plate in sorted(ours ^ theirs):
            has, lacks = ("model", "guide") if plate in ours else ("guide", "model")
            yield Finding("error", "plates", name, f"it is inside plate {plate!r} in the {has}, but not in the {lacks}",
                          f"state it inside the same plate in the {lacks}")  # fmt: skip
        if ours == theirs and not _same(p.scale, q.scale):
            yield Finding("warning", "plates", name, "its scale differs between the model and the guide",
                          "scale both, or neither: their ratio is the KL")  # fmt: skip


def _same(a: Any, b: Any) -> bool:
    return bool(torch.allclose(torch.as_tensor(a, dtype=torch.double), torch.as_tensor(b, dtype=torch.double)))


def nesting(visit: Visit) -> Iterator[Finding]:
    """An ELBO object that remembers fewer plates than the pair has."""
    kept = getattr(visit.loss, "max_plate_nesting", math.inf)
    needed = max((-frame.dim for _, site in visit.sites for frame in site.plates), default=0)
    if kept < needed:
        yield Finding("error", "nesting", type(visit.loss).__name__,
                      f"it has max_plate_nesting={kept}, but the pair nests {needed} plates",
                      "make a new ELBO object for each pair: it remembers the nesting of the first")  # fmt: skip


def inverses(visit: Visit) -> Iterator[Finding]:
    """Flows whose inverse does not undo them, or whose log-determinant is not that of their Jacobian."""
    seen: set[str] = set()
    for _, site in visit.sites:
        flow = _base(site.fn)
        if not isinstance(flow, dist.TransformedDistribution) or site.trouble or site.name in seen:
            continue
        transform: Any = ComposeTransform(list(flow.transforms))
        if not transform.bijective or _one_way(site.fn):
            continue
        seen.add(site.name)
        z = flow.base_dist.sample().detach()
        with torch.no_grad():
            x = transform(z).clone()
            back = transform.inv(x).clone()
            # Where a sigmoid saturates, z cannot be found again, but x can.
            gap = min(_gap(back, z), _gap(transform(back), x))
        if not gap <= ROUND_TRIP:
            yield Finding("error", "inverses", site.name, f"the round trip z to x and back is off by {gap:.2g}",
                          "make its inverse undo its forward; if float64 helps, it is rounding")  # fmt: skip
            continue
        claimed, true = _log_determinants(transform, z)
        if true is not None and not torch.allclose(claimed, true, atol=1e-2, rtol=1e-2):
            worst = (claimed - true).abs().max()
            yield Finding("error", "inverses", site.name,
                          f"its log-determinant is {worst:.2g} nats off that of its Jacobian",
                          "correct log_abs_det_jacobian: the density does not integrate to 1")  # fmt: skip


def _gap(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / (1 + b.abs().max())).nan_to_num(math.inf).item()


def _log_determinants(transform: Any, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """Claimed and true log|det dx/dz| per event; no truth for shapes that change, or for many features."""
    event = transform.domain.event_dim
    z = z.clone().requires_grad_()
    x = transform(z)
    claimed = transform.log_abs_det_jacobian(z, x).detach()
    features = math.prod(z.shape[z.dim() - event :])
    if x.shape != z.shape or features > JACOBIAN_FEATURES or not x.requires_grad:
        return claimed, None
    flat = x.reshape(*x.shape[: x.dim() - event], features)
    rows = [torch.autograd.grad(flat[..., i].sum(), z, retain_graph=True)[0] for i in range(features)]
    jacobian = torch.stack([row.reshape(flat.shape) for row in rows], -2)
    true = torch.linalg.slogdet(jacobian)[1]
    return claimed, true if true.shape == claimed.shape and torch.isfinite(true).all() else None


def finite(visit: Visit) -> Iterator[Finding]:
    """Log-probabilities and gradients that are NaN or infinite."""
    for name, parameter in visit.registered.values():
        if not torch.isfinite(parameter).all():
            yield Finding("error", "finite", name.replace("$$$", "."), "the parameter holds NaN or infinite values",
                          "start from fresh values: pyro.clear_param_store(), or rebuild the module")  # fmt: skip
    outside = {finding.where for check in (data_supports, guide_supports) for finding in check(visit)
               if finding.severity == "error"}  # fmt: skip
    for role, site in visit.sites:
        if site.log_prob is not None and not torch.isfinite(site.log_prob).all() and site.name not in outside:
            what = "NaN" if site.log_prob.isnan().any() else "infinite"
            yield Finding("error", "finite", site.name, f"the {role}'s log-probability is {what}",
                          "look at its parameters: a scale of zero, an overflow of exp")  # fmt: skip
    for key, site_name in visit.culprits.items():
        name = visit.name_of(visit.leaves[key])
        yield Finding("error", "finite", site_name, f"its gradient for {name} is NaN or infinite",
                      "avoid sqrt(0), log(0) and 0 / 0, also in branches that torch.where discards")  # fmt: skip


def parameters(visit: Visit) -> Iterator[Finding]:
    """Parameters that the loss does not reach, and tensors that it reaches but nothing trains."""
    if any(site.trouble is not None for _, site in visit.sites):
        return
    doubled = _collisions(visit)
    for key, (name, tensor) in visit.registered.items():
        shown = name.replace("$$$", ".")
        if name in doubled or not tensor.requires_grad:
            continue
        if key not in visit.leaves:
            yield Finding("error", "parameters", shown, "no loss reaches it: it would never train",
                          "use it in a distribution of the model or the guide, or remove it")  # fmt: skip
        elif key not in visit.moved:
            yield Finding("warning", "parameters", shown, "its gradient is exactly zero in every draw",
                          "see whether a mask, a detach() or a saturation cuts it off, or freeze it")  # fmt: skip
    silent = [leaf for key, leaf in visit.leaves.items() if key not in visit.registered]
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for leaf in silent:
        if any(leaf is tensor for name in doubled for tensor in visit.params[name]) or _is_argument(leaf, visit):
            continue
        name = visit.name_of(leaf)
        root = name.split(".")[0] if id(leaf) in visit.named else name
        groups.setdefault((root, id(leaf) in visit.own), []).append(leaf)
    for (root, own), leaves in groups.items():
        if own:
            yield Finding("note", "parameters", root,
                          "Trace_ELBO()(model, guide) trains it, but SVI would not: no pyro.module registers it",
                          "for SVI, call pyro.module(name, self) in the model's forward")  # fmt: skip
        elif isinstance(leaves[0], nn.Parameter) and id(leaves[0]) in visit.named:
            yield Finding("error", "parameters", root,
                          f"{len(leaves)} of its parameters shape the loss, but no pyro.module registers them: "
                          "SVI would never train it",
                          f"call pyro.module({root!r}, {root}) in the model or the guide")  # fmt: skip
        else:
            yield Finding("error", "parameters", root, "it has a gradient, but is not a pyro.param: SVI ignores it",
                          "make it one with pyro.param(name, value), or detach() it")  # fmt: skip


def _is_argument(leaf: Tensor, visit: Visit) -> bool:
    return any(leaf is argument for argument in visit.arguments)


def _collisions(visit: Visit) -> list[str]:
    """Names in the param store that stand for two parameters."""
    return [
        name
        for name, tensors in visit.params.items()
        if sum(isinstance(tensor, nn.Parameter) for tensor in tensors) > 1
        or any(isinstance(tensor, nn.Parameter) and visit.held.get(name) is not tensor for tensor in tensors)
    ]


def store(visit: Visit) -> Iterator[Finding]:
    """Names of the param store that belong to another module."""
    modules: dict[str, tuple[bool, list[str]]] = {}
    for name in _collisions(visit):
        twice = sum(isinstance(tensor, nn.Parameter) for tensor in visit.params[name]) > 1
        root = name.split("$$$")[0]
        modules.setdefault(root, (twice, []))[1].append(name)
    for root, (twice, names) in modules.items():
        if twice:
            yield Finding("error", "store", root, f"two modules are registered under this name ({names[0]}): "
                          "the second one never trains",
                          "give each module a name of its own in pyro.module(name, module)")  # fmt: skip
        else:
            yield Finding("error", "store", root,
                          "the param store holds the parameters of another instance under this name, so this one would "
                          "not train",
                          "call pyro.clear_param_store() first, or register under another name")  # fmt: skip
    for name, tensors in visit.params.items():
        kept = visit.held.get(name)
        if name in visit.before and kept is not None and tensors and not isinstance(tensors[0], nn.Parameter):
            shape = pyro.param(name).shape
            if shape != tensors[0].shape:
                yield Finding("error", "store", name,
                              f"the param store holds shape {tuple(shape)} under this name, but its initial value has "
                              f"{tuple(tensors[0].shape)}",
                              "call pyro.clear_param_store() first: the store keeps the old value")  # fmt: skip


CHECKS: list[Check] = [
    dtypes, partners, guide_supports, data_supports, shapes, plates, nesting, inverses, finite, parameters, store,
]  # fmt: skip


# -- supports ----------------------------------------------------------------------------------------------------------


def _base(fn: Any) -> Any:
    """A distribution without its `to_event` and masks."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def _constraint(fn: Any) -> Any:
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        return None
    while isinstance(support, type(constraints.independent(constraints.real, 1))):
        support = support.base_constraint
    return support


def _kind(fn: Any) -> str:
    return type(_constraint(fn)).__name__.strip("_")


def _support(fn: Any) -> str:
    """Its support in words."""
    support = _constraint(fn)
    kind = _kind(fn)
    names = {"GreaterThan": "the positive reals", "GreaterThanEq": "the non-negative reals", "Real": "the reals",
             "Boolean": "{0, 1}", "Simplex": "the simplex"}  # fmt: skip
    if kind in ("GreaterThan", "GreaterThanEq") and not _same_number(getattr(support, "lower_bound", 0), 0):
        return str(support)
    if kind == "IntegerInterval":
        return f"the integers {_number(support.lower_bound)} .. {_number(support.upper_bound)}"
    if kind in ("Interval", "HalfOpenInterval"):
        return f"the interval from {_number(support.lower_bound)} to {_number(support.upper_bound)}"
    return names.get(kind, kind)


def _number(bound: Any) -> str:
    numbers = torch.as_tensor(bound).flatten().unique()
    return f"{numbers[0].item():g}" if len(numbers) == 1 else "its bounds"


def _same_number(bound: Any, value: float) -> bool:
    return bool((torch.as_tensor(bound) == value).all())


def _suggestion(fn: Any) -> str:
    kind = _kind(fn)
    return {"GreaterThan": "LogNormal or Gamma", "GreaterThanEq": "LogNormal or Gamma", "Interval": "Beta",
            "Boolean": "Bernoulli", "IntegerInterval": "Categorical", "Simplex": "Dirichlet"}.get(
        kind, "one of the model's family")  # fmt: skip


@torch.no_grad()
def _draws(fn: Any) -> Tensor:
    with poutine.block():
        return fn.sample((SUPPORT_DRAWS,))


@torch.no_grad()
def _outside(fn: Any, value: Tensor) -> bool:
    """Whether any of ``value`` is outside the support; False where the distribution does not say, or shapes differ."""
    support = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        support = fn.support
    if support is None or not isinstance(value, Tensor):
        return False
    try:
        return not bool(support.check(value).all())
    except (RuntimeError, NotImplementedError):
        return False


def _one_way(fn: Any) -> str:
    """The first transform that cannot be inverted, by name; empty if all can."""
    flow = _base(fn)
    if not isinstance(flow, torch.distributions.TransformedDistribution):
        return ""
    z = flow.base_dist.sample()
    for transform in flow.transforms:
        with torch.no_grad():
            x = transform(z)
            try:
                if not transform.bijective:
                    raise NotImplementedError
                transform.inv(x.clone())
            except (KeyError, NotImplementedError):
                return _transform_name(transform)
            z = x
    return ""


def _transform_name(transform: Transform) -> str:
    return type(transform).__name__


# -- the command line's targets ----------------------------------------------------------------------------------------


def pair_from(target: str, arguments: str = "data") -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    """The pair that ``FILE.py:MODEL,GUIDE`` or ``MODULE:MODEL,GUIDE`` names, and what to call it with.

    Args:
        target: without ``,GUIDE`` it is a model alone, or a `Program`.
        arguments: a name in the same file: a value, or a function without arguments that returns one. A tuple holds
            the positional arguments, a dict the named ones; without such a name the pair is called with none.

    Returns:
        model, guide, args, kwargs.

    Raises:
        ValueError: the target names nothing that is there.
    """
    source, _, names = target.rpartition(":")
    model_name, _, guide_name = names.partition(",")
    if not source or not model_name:
        raise ValueError(f"{target!r} must be FILE.py:MODEL,GUIDE or MODULE:MODEL,GUIDE")
    module = _module(source)

    def get(name: str) -> Any:
        thing: Any = module
        for part in name.strip().split("."):
            if not hasattr(thing, part):
                close = difflib.get_close_matches(part, dir(thing), 1)
                hint = f": did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"{source} has no {name!r}{hint}")
            thing = getattr(thing, part)
        return thing

    model, guide = get(model_name), get(guide_name) if guide_name else None
    value = get(arguments) if arguments != "data" or hasattr(module, "data") else ()
    if callable(value) and not isinstance(value, Tensor):
        with _users(f"{arguments}() of {source}", "when it is called without arguments"):
            value = value()
    if isinstance(value, dict):
        return model, guide, (), value
    return model, guide, value if isinstance(value, tuple) else (value,), {}


def _module(source: str) -> types.ModuleType:
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except (Exception, SystemExit) as error:
            raise ValueError(f"cannot import {source}: {_line(error)}") from error
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"there is no file {source}")
    spec = importlib.util.spec_from_file_location(f"dgm_doctor_{path.stem}", path)  # random.py must not become random
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where data classes look for it
    sys.path.insert(0, str(path.parent.resolve()))  # so that the file may import its neighbors
    try:
        with _users(source, "when it is loaded"):
            spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


@contextlib.contextmanager
def _users(code: str, when: str) -> Iterator[None]:
    """Whatever ``code``, which is the user's, raises or exits with, is an error in one line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(f"{code} raises {type(error).__name__} {when}: {_line(error)}") from error
