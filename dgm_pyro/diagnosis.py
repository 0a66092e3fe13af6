r"""Preflight: what is wrong with a model and a guide, before an hour of training shows it.

`doctor` traces the guide, replays the model on its latents, and looks at the two traces, at the loss

.. math::
    \hat L = \sum_s \log p_s - \sum_s \log q_s + \Big(\sum_{s \in S} \log q_s\Big) \, \mathrm{stop}(\hat L),

with S the latents that cannot be reparameterized, and at its gradient. Then Pyro's own loss runs once under validation,
and what it raises or warns about is reported where no check has named an error. It takes any Pyro pair, ours or yours.
Each check is a function from a `Visit` to findings; `CHECKS` is the list of them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import itertools
import math
import os
import random
import re
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO as PyroELBO
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import ComposeTransform, Transform
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from dgm_pyro.evaluation import as_data, program_device
from dgm_pyro.factors import Factor, factors_of
from dgm_pyro.posterior import middle_of, tensors_held
from dgm_pyro.program import Program, alone, differentiating, is_pair, sample_sites, seeded
from dgm_pyro.results import Result, Table

__all__ = ["CHECKS", "Diagnosis", "Finding", "Site", "Visit", "doctor"]

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
        leaves: by id, every tensor that the loss has a gradient for; moved: ids of those whose gradient is not zero.
        culprits: by id of a leaf, the site whose gradient for it is not finite.
        held: by name in the param store, the tensors it holds (unconstrained).
        registered: by id, the parameters that SVI would train; named: names of tensors found by looking.
        own: ids of parameters of a model or guide that is an `nn.Module` itself.
        stored: ids of all tensors in the param store, those included that no handler may see.
        random: names of the sites, "model" or "guide", whose density changes while every site keeps its value.
        reads: by site of the model, the factor that names the sites it reads; empty if that could not be found out.
        said: what Pyro raised or warned about, when its loss ran under validation.
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
    moved: set[int] = field(default_factory=set)
    culprits: dict[int, str] = field(default_factory=dict)
    stored: set[int] = field(default_factory=set)
    random: list[tuple[str, str]] = field(default_factory=list)
    reads: dict[str, Factor] = field(default_factory=dict)
    said: list[Exception | Warning] = field(default_factory=list)
    loss: Any = None

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


def doctor(model: Any, guide: Any = None, *args: Any, loss: Any = None, **kwargs: Any) -> Diagnosis:
    """Look for what is wrong with a model and a guide; nothing of theirs is changed.

    Args:
        model: a Pyro model; or a `Program`, which brings its own guide: then call ``doctor(program, data)``.
        guide: a Pyro guide, or None for a model alone (as for MCMC). After a `Program`: a `Data`, a tensor, or None for
            samples of the program.
        args, kwargs: what the model and the guide are called with.
        loss: the ELBO object you mean to use, or a function ``loss(model, guide, *args, **kwargs)``, as for `SVI`. It
            runs once under Pyro's validation. Default: the one of Pyro's that the sites ask for (`TraceEnum_ELBO` where
            one is enumerated, `TraceGraph_ELBO` where one has a baseline, else `Trace_ELBO`).

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


def _program(program: Program, data: Any, loss: Any) -> Diagnosis:
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
                return Diagnosis((Finding("error", "data", program.variable, in_one_line(error), _remedy(error)),))
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


# What Pyro says, or a part of it, and what to do.
_FIXES = {
    "Multiple sample sites named": "give each site a name of its own: in a loop, f'x_{i}'",
    "collide at dim": "give each plate a dim of its own, as in dim=-2",
    "duplicate plate": "enter each plate once, and give nested plates names of their own",
    "need to use TraceEnum_ELBO": "use TraceEnum_ELBO(max_plate_nesting=...), or take infer={'enumerate': ...} away",
    "no sample sites configured for enumeration": "use Trace_ELBO, or mark a site with infer={'enumerate': 'parallel'}",
    "sequential enumeration": "use infer={'enumerate': 'parallel'}, or enumerate the site in the guide",
    "vars in model but not guide": "sample it in the guide, or enumerate it with TraceEnum_ELBO",
    "plate statements in guide but not model": "state that plate in the model, too, or leave it out",
    "has_rsample": "say has_rsample=True if the factor comes from a reparameterized draw, has_rsample=False otherwise",
    "mean field restriction": "state the guide's latents in the order of the model, or use Trace_ELBO",
    "fully reparameterized": "use Trace_ELBO, which draws what has no closed form",
    "auxiliary vars in the model": "take is_auxiliary away: the model has the site",
    "max_plate_nesting": "make the loss with max_plate_nesting= the number of nested plates",
    "requires_grad=False": "call module.eval(), which tells Pyro that it is frozen on purpose",
}
_PYRO = os.path.dirname(pyro.__file__) + os.sep


def _fix(text: str, otherwise: str) -> str:
    return next((fix for part, fix in _FIXES.items() if part in text), otherwise)


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


class _Proper(Messenger):
    """An improper prior cannot be drawn: a model alone gets the middle of its support."""

    def _pyro_sample(self, message: Any) -> None:
        if message["value"] is None and isinstance(_base(message["fn"]), dist.ImproperUniform):
            message["value"] = middle_of(message)[0]


@alone()
def _diagnose(model: Any, guide: Any, args: Any, kwargs: Any, loss: Any) -> Diagnosis:
    named, own = _tensors_of((model, guide))
    arguments = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    place = next((tensor.device for tensor in arguments), torch.device("cpu"))
    mixed = list(_device_mix(arguments, [tensor for _, tensor in named.values()]))
    if mixed:  # nothing would run
        return _sorted(mixed, None)
    store = pyro.get_param_store()
    stored: Any = store.get_state()
    state: Any = {name: dict(table) for name, table in stored.items()}
    modules = [part for part in (model, guide) if isinstance(part, nn.Module)]
    frozen = [named for part in modules for named in part.named_parameters() if not named[1].requires_grad]
    with (
        _as_it_was((model, guide)),
        store.scope(state),
        seeded(0, place),
        pyro.validation_enabled(False),
        differentiating("doctor"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # those of Pyro are heard when its loss runs
        run = functools.partial(_visit, model, guide, args, kwargs)
        try:
            visit = run()
        except _Raised as raised:
            said: list[Exception | Warning] = []
            if loss is not None and guide is not None:
                with heard(said, _PYRO), pyro.validation_enabled(True):
                    _run(loss, model, guide, args, kwargs)
            if loss is None or guide is None or said:
                return _sorted([raised.finding], None)
            # Its statements count on the dimensions of particles or of enumerated values.
            what = f"it runs under the loss alone, so that nothing else was looked at; without, {raised.finding.what}"
            return _sorted([dataclasses.replace(raised.finding, severity="note", what=what)], None)
        visit.named, visit.own, visit.loss = named, own, loss
        visit.before, visit.arguments = dict(state["params"]), arguments
        if not any(site.trouble for _, site in visit.sites):
            _differentiate(visit)
            with contextlib.suppress(Exception):  # another draw than those that ran, by the user's code
                visit.reads = {f.site: f for f in factors_of(functools.partial(model, *args, **kwargs))[0]}
            _draw_again(visit, run)
            if guide is not None:
                _run_loss(visit, model, guide, args, kwargs)
            with contextlib.suppress(Exception):
                visit.random = list(_random_sites(model, guide, args, kwargs))
        findings = [finding for check in CHECKS for finding in check(visit)]
        findings += [
            Finding("error", "frozen", name, "it has requires_grad=False, but Pyro sets it to True and trains it",
                    "make it a buffer, by register_buffer")
            for name, tensor in frozen if tensor.requires_grad
        ]  # fmt: skip
        if not any(finding.severity == "error" for finding in findings):
            findings += map(functools.partial(_words, visit), visit.said)
    return _sorted(findings, visit)


@contextlib.contextmanager
def _as_it_was(callables: Sequence[Any]) -> Iterator[None]:
    """Whatever runs of the callables change is put back: tensors, gradients, what modules hold, random states."""
    tensors = [
        (tensor, tensor.detach().clone(), tensor.grad if tensor.is_leaf else None, tensor.requires_grad)
        for tensor in _everything(callables)
        if not is_lazy(tensor)
    ]
    tables = [table for module in _modules(callables) for table in (vars(module), *vars(module).values())]
    held = [(table, dict(table)) for table in tables if isinstance(table, dict)]
    python, numpys = random.getstate(), numpy.random.get_state()
    for tensor, _, gradient, _ in tensors:
        if gradient is not None:
            tensor.grad = None
    try:
        yield
    finally:
        for table, entries in held:
            table.clear()
            table.update(entries)
        for tensor, value, gradient, trainable in tensors:
            with torch.no_grad():
                tensor.copy_(value)
            if tensor.is_leaf:
                tensor.requires_grad_(trainable).grad = gradient
        random.setstate(python)
        numpy.random.set_state(numpys)


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
    with watch, _Proper():
        guided = None
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
    visit.stored = set(map(id, parameters.values()))
    visit.held = {name: parameters[name] for name in watch.params if name in parameters}
    visit.registered = {id(parameter): (name, parameter) for name, parameter in visit.held.items()}
    return visit


def _draw_again(visit: Visit, run: Callable[[], Visit]) -> None:
    """Further draws move what the first did not; the last one has other parameters, as weights may start at zero."""
    still = [(leaf, leaf.data) for leaf in visit.leaves.values()]
    for draw in range(DRAWS):
        if draw == DRAWS - 1:
            for leaf, value in still:  # not in place, which would undo the graph of the first run
                leaf.data = value + JITTER * torch.randn_like(value)
        try:
            latest = run()
        except _Raised:
            break
        if any(site.trouble for _, site in latest.sites):
            break
        _differentiate(latest)
        visit.leaves |= latest.leaves
        visit.moved |= latest.moved
    for leaf, value in still:
        leaf.data = value


def _random_sites(model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[tuple[str, str]]:
    """The sites, "model" or "guide", whose density changes while every site keeps its value; layers of torch evaluate,
    as dropout is no mistake."""
    for module in _modules((model, guide)):
        module.training &= not type(module).__module__.startswith("torch.nn")

    def run(guided: poutine.Trace, modeled: poutine.Trace | None) -> tuple[poutine.Trace, poutine.Trace]:
        if guide is not None:
            guided = poutine.trace(poutine.replay(guide, trace=guided)).get_trace(*args, **kwargs)
        return guided, poutine.trace(poutine.replay(model, trace=modeled or guided)).get_trace(*args, **kwargs)

    with torch.no_grad(), _Proper():
        first = run(poutine.Trace(), None)
        for role, one, again in zip(("guide", "model"), first, run(*first), strict=True):
            before = _sites(one)
            for name, site in _sites(again).items():
                if name in before and not _same(site.log_prob, before[name].log_prob):
                    yield role, name


def _run_loss(visit: Visit, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
    """Run the loss under Pyro's validation: what Pyro says, and which parameters the gradient reaches."""
    with heard(visit.said, _PYRO), pyro.validation_enabled(True):
        _run(visit.loss or _loss_for(visit), model, guide, args, kwargs)
    for _, tensor in (*visit.registered.values(), *visit.named.values()):
        if tensor.grad is not None:
            visit.leaves[id(tensor)] = tensor
            if tensor.grad.ne(0).any():
                visit.moved.add(id(tensor))


def _run(of_pair: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
    loss: Any = copy.copy(of_pair)  # it remembers the nesting of the first pair that it sees
    if hasattr(loss, "loss_and_grads"):
        loss.loss_and_grads(model, guide, *args, **kwargs)
    elif (value := loss(model, guide, *args, **kwargs)).requires_grad:
        value.backward()


def _loss_for(visit: Visit) -> PyroELBO:
    """The loss that the sites ask for."""
    infer = [site.infer for _, site in visit.sites]
    if any(each.get("enumerate") for each in infer):
        return TraceEnum_ELBO()
    return TraceGraph_ELBO() if any("baseline" in each for each in infer) else Trace_ELBO()


@contextlib.contextmanager
def heard(said: list[Exception | Warning], files: str | tuple[str, ...]) -> Iterator[None]:
    """What is raised, and what code in ``files`` warns about, is appended to ``said``; other warnings pass.

    Args:
        files: how the paths begin.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        raised = []
        try:
            yield
        except Exception as error:  # it may be anything: the code is the user's
            raised.append(error)
    for warning in caught:
        if warning.filename.startswith(files) and isinstance(warning.message, Warning):
            said.append(warning.message)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    said += raised


def _words(visit: Visit, said: Exception | Warning) -> Finding:
    """What Pyro raised or warned about, as a finding."""
    text, loss = in_one_line(said), type(visit.loss or _loss_for(visit)).__name__
    site = re.search(r"site \W*(\w+)", text)
    severity, verb = ("warning", "warns") if isinstance(said, Warning) else ("error", f"raises {type(said).__name__}")
    fix = _fix(text, "mend what Pyro names: training meets it too")
    return Finding(severity, "pyro", site[1] if site else loss, f"{loss} {verb}: {text}", fix)


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
        text = in_one_line(error)
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
                    else _fix(text, f"call the {role} once with the same arguments, and follow the traceback"))
        ) from error  # fmt: skip


def without_table(error: BaseException) -> str:
    """What an error says, without the table of shapes that Pyro adds."""
    return str(error).split("Trace Shapes:")[0].strip()


def in_one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    text = " ".join(without_table(error).split())
    if isinstance(error, KeyError) and not text:
        text = "a key is missing"
    return text if len(text) <= 300 else text[:297] + "..."


def _remedy(error: BaseException) -> str:
    """The remedy in one of our own messages: what follows the colon."""
    return in_one_line(error).rpartition(": ")[2]


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
        if gradient.ne(0).any():  # NaN is not 0
            visit.moved.add(id(leaf))
        if torch.isfinite(gradient).all():
            continue
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
    found = {id(thing): thing for _, thing in _reachable(callables) if isinstance(thing, Tensor)}
    for module in _modules(callables):
        found |= {id(tensor): tensor for tensor in (*module.parameters(False), *module.buffers(False))}
    found |= {id(tensor): tensor for tensor in pyro.get_param_store().get_state()["params"].values()}
    return list(found.values())


def _modules(callables: Sequence[Any]) -> list[nn.Module]:
    reachable = [thing for _, thing in _reachable(callables) if isinstance(thing, nn.Module)]
    return list(dict.fromkeys(module for thing in reachable for module in thing.modules()))


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
    for role, site in visit.sites:
        if site.enumerated and not (site.observed or site.fn.has_enumerate_support or "num_samples" in site.infer):
            yield Finding("error", "partners", site.name,
                          f"the {role} enumerates it, but {type(_base(site.fn)).__name__} has no finite list of values",
                          "draw it in the guide, or use a distribution such as Categorical")  # fmt: skip
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
        elif (
            _fixed(q.fn)
            and not isinstance(_base(q.fn), dist.Delta)
            and not isinstance(_base(p.fn), dist.ImproperUniform)
            and _outside(q.fn, _draws(p.fn))
        ):
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
                          f"{tuple(site.fn.event_shape)}, cannot score a value of shape {shape}: "
                          f"{in_one_line(site.trouble)}",
                          "make the value's last dimensions the event shape, the others those of plates")  # fmt: skip


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
                # Right of a plate Pyro takes it for dependent, and sums it as ever.
                outermost = any(dim < min(declared, default=0) for dim in extra)
                yield Finding("error" if outermost else "warning", "plates", site.name,
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
    """Whether two scales or log-probabilities, of which either may be None, are equal to rounding."""
    if a is None or b is None:
        return a is b
    ours, theirs = (torch.as_tensor(each).detach().double() for each in (a, b))
    return bool(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True))


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
    trained = visit.guide is not None or any(site.observed for site in visit.model.values())
    for key, (name, tensor) in visit.registered.items() if trained else ():
        shown = name.replace("$$$", ".")
        if name in doubled or not tensor.requires_grad:
            continue
        if key not in visit.leaves:
            yield Finding("warning", "parameters", shown, "the loss of these arguments does not reach it",
                          "use it in a distribution of the model or the guide, or remove it, unless other "
                          "arguments use it")  # fmt: skip
        elif key not in visit.moved:
            yield Finding("warning", "parameters", shown, "its gradient is exactly zero in every draw",
                          "see whether a mask, a detach() or a saturation cuts it off, or freeze it")  # fmt: skip
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for key, leaf in visit.leaves.items():
        # What the store holds but no handler sees has been hidden from the optimizer on purpose.
        if key in visit.stored or key in visit.registered or any(leaf is argument for argument in visit.arguments):
            continue
        if any(leaf is tensor for name in doubled for tensor in visit.params[name]):
            continue
        name = visit.name_of(leaf)
        root = name.split(".")[0] if key in visit.named else name
        groups.setdefault((root, key in visit.own), []).append(leaf)
    for (root, own), leaves in groups.items():
        if own:
            yield Finding("note", "parameters", root,
                          "Trace_ELBO()(model, guide) trains it, but SVI would not: no pyro.module registers it",
                          "for SVI, call pyro.module(name, self) in the model's forward")  # fmt: skip
        elif isinstance(leaves[0], nn.Parameter) and id(leaves[0]) in visit.named:
            yield Finding("error", "parameters", root,
                          f"{len(leaves)} of its parameters shape the loss, but no pyro.module registers them: "
                          "SVI would never train it",
                          f"call pyro.module({root!r}, {root}) in the model or the guide; to keep it as it is, "
                          "requires_grad_(False)")  # fmt: skip
        else:
            known = any(id(leaf) in visit.named for leaf in leaves)  # else a statement makes it anew each time
            yield Finding("error" if known else "warning", "parameters", root,
                          "it has a gradient, but is not a pyro.param: SVI ignores it",
                          "make it one with pyro.param(name, value), or detach() it")  # fmt: skip


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


def bounds(visit: Visit) -> Iterator[Finding]:
    """Scales and probabilities that a gradient step may move out of their range."""
    latents = {site.value.grad_fn: site for site in visit.model.values() if not site.observed}
    found: set[str] = set()
    for role, site in visit.sites:
        for argument, constraint, value in _bounded_arguments(site.fn):
            for source in _free(value, latents):
                name = source.name if isinstance(source, Site) else visit.name_of(source)
                of_module = "." in name or (isinstance(source, nn.Parameter) and id(source) in visit.named)
                where = site.name if of_module else name
                if where in found:
                    continue
                found.add(where)
                yield Finding("warning", "bounds", where,
                              f"nothing keeps the {argument} of {site.name!r} in the {role} within "
                              f"{_described(constraint)}: {name} may have any value",
                              _bounded_fix(constraint, source, of_module))  # fmt: skip


def _bounded_fix(constraint: Any, source: Any, of_module: bool) -> str:
    if isinstance(source, Site):
        return "state that latent with a positive prior, such as LogNormal, or map it by exp or sigmoid"
    if of_module:
        return "map the network's output by softplus or exp, by sigmoid or softmax, or pass it as logits"
    kind = {"Interval": "unit_interval", "Simplex": "simplex"}.get(type(constraint).__name__.strip("_"), "positive")
    return f"pyro.param(name, value, constraint=constraints.{kind})"


def _bounded_arguments(fn: Any) -> Iterator[tuple[str, Any, Tensor]]:
    """Arguments of a distribution, and of those in it, that must lie in an interval or on the simplex."""
    for name, part in list(vars(fn).items()):
        if isinstance(part, torch.distributions.Distribution):
            yield from _bounded_arguments(part)
        constraint = fn.arg_constraints.get(name) if isinstance(fn.arg_constraints, dict) else None
        bounded = constraint is constraints.simplex or hasattr(constraint, "lower_bound")
        if isinstance(part, Tensor) and part.requires_grad and bounded:
            yield name, constraint, part


# Of autograd: operations by which a real input makes a real output.
_LINEAR = {
    "Add", "Sub", "Neg", "Expand", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Select", "Slice",
    "Index", "IndexSelect", "Gather", "Embedding", "T", "Transpose", "Permute", "Split", "Clone", "ToCopy", "Sum",
    "Mean", "Cat", "Stack", "Mul", "Div", "Mm", "Bmm", "Mv", "Dot", "Addmm", "Convolution",
}  # fmt: skip
_PRODUCTS = {"Mul", "Mm", "Bmm", "Mv", "Dot", "Addmm", "Convolution"}


def _free(value: Tensor, latents: dict[Any, Site]) -> list[Any]:
    """The leaves, and the latents on the reals, that linear operations alone lead to ``value`` from."""
    found: dict[Any, set[Any]] = {}
    things: dict[int, Any] = {id(value): value}

    def sources(node: Any, depth: int = 0) -> set[int]:
        if node is None or depth > 50:
            return set()
        if node in latents:
            things[id(latents[node])] = latents[node]
            return {id(latents[node])} if _kind(latents[node].fn) == "Real" else set()
        if hasattr(node, "variable"):
            things[id(node.variable)] = node.variable
            return {id(node.variable)}
        if node not in found:
            kind = re.sub(r"Backward\d*$", "", type(node).__name__)
            inputs = [sources(parent, depth + 1) for parent, _ in node.next_functions] if kind in _LINEAR else []
            if kind == "Div":
                inputs = inputs[:1]
            # A square is positive: of a product, what is in one factor alone.
            found[node] = {
                key
                for one in inputs
                for key in one
                if kind not in _PRODUCTS or sum(key in other for other in inputs) == 1
            }
        return found[node]

    return [things[key] for key in (sources(value.grad_fn) if value.grad_fn is not None else {id(value)})]


def noise(visit: Visit) -> Iterator[Finding]:
    """Random numbers that no `pyro.sample` draws, and draws that hide their gradient."""
    for role, name in visit.random:
        yield Finding("warning", "noise", name,
                      f"its density in the {role} changes while every site keeps its value: random numbers are drawn "
                      "outside pyro.sample, so that no density counts them",
                      "draw them by pyro.sample, or once before the call")  # fmt: skip
    for name, q in (visit.guide or {}).items():
        learned = any(tensor.requires_grad for tensor in tensors_held(q.fn))
        if not q.observed and q.fn.has_rsample and learned and not q.value.requires_grad:
            yield Finding("error", "noise", name,
                          "its distribution claims has_rsample, but its draw has no gradient: the loss takes neither "
                          "the pathwise nor the score-function gradient",
                          "draw it with rsample and outside torch.no_grad(), or set has_rsample = False")  # fmt: skip


def evidence(visit: Visit) -> Iterator[Finding]:
    """Latents that no observation reads, or reads without a gradient."""
    read = {site for site, factor in visit.reads.items() if factor.kind in ("data", "factor", "estimate")}
    if not read:
        return
    for site in reversed(visit.reads):
        if site in read:
            read |= set(visit.reads[site].parents)
    for name, p in visit.model.items():
        if p.observed or name not in visit.reads or f"{name.removesuffix('_unobserved')}_observed" in visit.model:
            continue
        if name not in read:
            yield Finding("warning", "evidence", name, "no observation depends on it: its posterior is its prior",
                          "let the likelihood read it, or leave it out")  # fmt: skip
        elif _cut_off(visit, name):
            yield Finding("warning", "evidence", name, "what depends on it gives it no gradient",
                          "see whether detach(), rounding, an index or a Python number cuts it off")  # fmt: skip


def _cut_off(visit: Visit, name: str) -> bool:
    """Whether a reparameterized latent gets no gradient from any site of the model that reads it."""
    z, q = visit.model[name].value, (visit.guide or {}).get(name)
    if q is None or not q.fn.has_rsample or not z.requires_grad:
        return False
    stated = [visit.model[site].log_prob for site, factor in visit.reads.items() if name in factor.parents]
    terms = [term for term in stated if term is not None and term.any()]  # an indicator has no gradient to give
    total = sum(term.sum() for term in terms if term.requires_grad)
    if not isinstance(total, Tensor):
        return bool(terms)
    return torch.autograd.grad(total, z, retain_graph=True, allow_unused=True)[0] is None


CHECKS: list[Check] = [
    dtypes, partners, guide_supports, data_supports, shapes, plates, nesting, inverses, finite, parameters, store,
    bounds, noise, evidence,
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
    return _described(_constraint(fn))


def _described(support: Any) -> str:
    kind = type(support).__name__.strip("_")
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
