"""One run of a pair: the sites of its guide and model, its parameters, and the gradient of its loss."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from dgm_pyro.diagnosis.findings import Finding
from dgm_pyro.diagnosis.messages import fix_for, in_one_line
from dgm_pyro.diagnosis.reach import modules_held
from dgm_pyro.diagnosis.supports import base_of
from dgm_pyro.factors import Factor
from dgm_pyro.posterior import middle_of
from dgm_pyro.program import sample_sites

__all__ = ["Site", "Visit"]

DRAWS = 3
JITTER = 0.1


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
        drawn_apart: names of those whose part of the data only the guide draws.
        params: by name in the param store, the tensors passed to `pyro.param` statements.
        before: the param store before the run.
        leaves: by id, every tensor for which the loss has a gradient; moved: ids of those whose gradient is not zero.
        culprits: by id of a leaf, the site whose gradient for it is not finite.
        held: by name in the param store, the tensors in it (unconstrained).
        registered: by id, the parameters that SVI would train; named: names of tensors that the pair can reach.
        own: ids of parameters of a model or guide that is itself an `nn.Module`.
        stored: ids of all tensors in the param store, including those that are hidden from handlers.
        random: names of the sites, and "model" or "guide", whose density changes while every site keeps its value.
        reads: by site of the model, the factor with its parents; empty if these could not be determined.
        said: errors and warnings of Pyro's loss under validation.
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


class _NotedParams(Messenger):
    """Records the tensors of `pyro.param` statements, and the plates with a subsample of their data."""

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


class _MiddleForImproper(Messenger):
    """Sets improper priors, which cannot be drawn, to the middle of their support, for a model without a guide."""

    def _pyro_sample(self, message: Any) -> None:
        if message["value"] is None and isinstance(base_of(message["fn"]), dist.ImproperUniform):
            message["value"] = middle_of(message)[0]


class PairFailed(Exception):
    def __init__(self, finding: Finding):
        super().__init__()
        self.finding = finding


def visit_of(model: Any, guide: Any, args: Any, kwargs: Any) -> Visit:
    watch = _NotedParams()
    with watch, _MiddleForImproper():
        guided = None
        if guide is not None:
            with _errors_as_findings("guide"):
                guided = poutine.trace(guide).get_trace(*args, **kwargs)
            model = poutine.replay(model, trace=guided)
        by_guide, watch.subsampled = watch.subsampled, {}
        with _errors_as_findings("model"):
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
            # A copy of values from outside, because transforms return cached values without inverting.
            value = site.value.clone() if site.observed else site.value
            site.log_prob = scale_and_mask(site.fn.log_prob(value), site.scale, site.mask)
        except Exception as error:  # any error of the distribution becomes the finding
            site.trouble = error
        sites[name] = site
    return sites


@contextlib.contextmanager
def _errors_as_findings(role: str) -> Iterator[None]:
    """Turn errors of a pair into findings."""
    try:
        yield
    except Exception as error:  # it may be anything: the code is the user's
        text = in_one_line(error)
        broken = re.search(r"Shape mismatch inside plate\('(.+)'\) at site (.+) dim (-?\d+), (\d+) vs (\d+)", text)
        if broken:
            plate, site, dim, size, found = broken.groups()
            raise PairFailed(
                Finding(
                    "error", "plates", site,
                    f"the {role} has size {found} at dim {dim}, where plate {plate!r} has {size}",
                    "add .to_event(1) if that dimension belongs to one event; otherwise make the plate that long",
                )
            ) from error  # fmt: skip
        mixed = re.search(r"dtype|scalar type|same device|devices", text) is not None
        raise PairFailed(
            Finding("error", "dtype" if mixed else "run", role, f"it raises {type(error).__name__}: {text}",
                    "convert parameters and arguments to one dtype and device, such as x.float()" if mixed
                    else fix_for(text, f"call the {role} once with the same arguments, and follow the traceback"))
        ) from error  # fmt: skip


def same_to_rounding(a: Any, b: Any) -> bool:
    """Whether two scales or log-probabilities, each of which may be None, are equal up to rounding."""
    if a is None or b is None:
        return a is b
    ours, theirs = (torch.as_tensor(each).detach().double() for each in (a, b))
    return bool(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True))


def differentiate(visit: Visit) -> None:
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
    """Every leaf tensor for which the loss has a gradient."""
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


def draw_again(visit: Visit, run: Callable[[], Visit]) -> None:
    """Draw again, for gradients that were zero by chance; the last time with other parameters, which may start at 0."""
    still = [(leaf, leaf.data) for leaf in visit.leaves.values()]
    for draw in range(DRAWS):
        if draw == DRAWS - 1:
            for leaf, value in still:  # not in place, which would undo the graph of the first run
                leaf.data = value + JITTER * torch.randn_like(value)
        try:
            latest = run()
        except PairFailed:
            break
        if any(site.trouble for _, site in latest.sites):
            break
        differentiate(latest)
        visit.leaves |= latest.leaves
        visit.moved |= latest.moved
    for leaf, value in still:
        leaf.data = value


def random_sites(model: Any, guide: Any, args: Any, kwargs: Any) -> Iterator[tuple[str, str]]:
    """The sites, with "model" or "guide", whose density changes while every site keeps its value. Layers of torch are
    in evaluation mode, because dropout is no mistake."""
    for module in modules_held((model, guide)):
        module.training &= not type(module).__module__.startswith("torch.nn")

    def run(guided: poutine.Trace, modeled: poutine.Trace | None) -> tuple[poutine.Trace, poutine.Trace]:
        if guide is not None:
            guided = poutine.trace(poutine.replay(guide, trace=guided)).get_trace(*args, **kwargs)
        return guided, poutine.trace(poutine.replay(model, trace=modeled or guided)).get_trace(*args, **kwargs)

    with torch.no_grad(), _MiddleForImproper():
        first = run(poutine.Trace(), None)
        for role, one, again in zip(("guide", "model"), first, run(*first), strict=True):
            before = _sites(one)
            for name, site in _sites(again).items():
                if name in before and not same_to_rounding(site.log_prob, before[name].log_prob):
                    yield role, name
