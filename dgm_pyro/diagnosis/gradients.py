"""Checks of the learning of a pair: finite values, parameters and their registration, bounds, and gradients."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from dgm_pyro.diagnosis.findings import Finding
from dgm_pyro.diagnosis.statements import data_supports, guide_supports
from dgm_pyro.diagnosis.supports import in_words, kind_of_support
from dgm_pyro.diagnosis.visit import Site, Visit
from dgm_pyro.posterior import tensors_held

__all__ = ["bounds", "evidence", "finite", "noise", "parameters", "store"]


def finite(visit: Visit) -> Iterator[Finding]:
    """Log-probabilities and gradients that are NaN or infinite."""
    for name, parameter in visit.registered.values():
        if not torch.isfinite(parameter).all():
            yield Finding("error", "finite", name.replace("$$$", "."), "the parameter holds NaN or infinite values",
                          "start from new values: pyro.clear_param_store(), or rebuild the module")  # fmt: skip
    outside = {finding.where for check in (data_supports, guide_supports) for finding in check(visit)
               if finding.severity == "error"}  # fmt: skip
    for role, site in visit.sites:
        if site.log_prob is not None and not torch.isfinite(site.log_prob).all() and site.name not in outside:
            what = "NaN" if site.log_prob.isnan().any() else "infinite"
            yield Finding("error", "finite", site.name, f"the {role}'s log-probability is {what}",
                          "check its parameters: a scale of zero, an overflow of exp")  # fmt: skip
    for key, site_name in visit.culprits.items():
        name = visit.name_of(visit.leaves[key])
        yield Finding("error", "finite", site_name, f"its gradient for {name} is NaN or infinite",
                      "avoid sqrt(0), log(0) and 0 / 0, also in branches that torch.where discards")  # fmt: skip


def parameters(visit: Visit) -> Iterator[Finding]:
    """Parameters on which the loss does not depend, and tensors on which it depends but that nothing trains."""
    if any(site.trouble is not None for _, site in visit.sites):
        return
    doubled = _collisions(visit)
    trained = visit.guide is not None or any(site.observed for site in visit.model.values())
    for key, (name, tensor) in visit.registered.items() if trained else ():
        shown = name.replace("$$$", ".")
        if name in doubled or not tensor.requires_grad:
            continue
        if key not in visit.leaves:
            yield Finding("warning", "parameters", shown, "the loss for these arguments does not depend on it",
                          "use it in a distribution of the model or the guide, or remove it, unless other "
                          "arguments use it")  # fmt: skip
        elif key not in visit.moved:
            yield Finding("warning", "parameters", shown, "its gradient is exactly zero in every draw",
                          "check for a mask, a detach() or a saturation, or freeze it")  # fmt: skip
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for key, leaf in visit.leaves.items():
        # Parameters in the store that no handler sees are hidden from the optimizer on purpose.
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
                          f"the loss depends on {len(leaves)} of its parameters, but no pyro.module registers them: "
                          "SVI would never train it",
                          f"call pyro.module({root!r}, {root}) in the model or the guide; to keep it as it is, "
                          "requires_grad_(False)")  # fmt: skip
        else:
            known = any(id(leaf) in visit.named for leaf in leaves)  # else a statement makes a new one each time
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
                          "give each module its own name in pyro.module(name, module)")  # fmt: skip
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
    """Scales and probabilities that a gradient step may move out of their support."""
    latents = {site.value.grad_fn: site for site in visit.model.values() if not site.observed}
    found: set[str] = set()
    for role, site in visit.sites:
        for argument, constraint, value in _bounded_arguments(site.fn):
            for source in _linear_ancestors(value, latents):
                name = source.name if isinstance(source, Site) else visit.name_of(source)
                of_module = "." in name or (isinstance(source, nn.Parameter) and id(source) in visit.named)
                where = site.name if of_module else name
                if where in found:
                    continue
                found.add(where)
                yield Finding("warning", "bounds", where,
                              f"nothing keeps the {argument} of {site.name!r} in the {role} within "
                              f"{in_words(constraint)}: {name} may have any value",
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


# Autograd's operations that map the reals to the reals, linearly.
_LINEAR = {
    "Add", "Sub", "Neg", "Expand", "View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Select", "Slice",
    "Index", "IndexSelect", "Gather", "Embedding", "T", "Transpose", "Permute", "Split", "Clone", "ToCopy", "Sum",
    "Mean", "Cat", "Stack", "Mul", "Div", "Mm", "Bmm", "Mv", "Dot", "Addmm", "Convolution",
}  # fmt: skip


_PRODUCTS = {"Mul", "Mm", "Bmm", "Mv", "Dot", "Addmm", "Convolution"}


def _linear_ancestors(value: Tensor, latents: dict[Any, Site]) -> list[Any]:
    """The leaves, and the latents on the reals, of which ``value`` is a linear function."""
    found: dict[Any, set[Any]] = {}
    things: dict[int, Any] = {id(value): value}

    def sources(node: Any, depth: int = 0) -> set[int]:
        if node is None or depth > 50:
            return set()
        if node in latents:
            things[id(latents[node])] = latents[node]
            return {id(latents[node])} if kind_of_support(latents[node].fn) == "Real" else set()
        if hasattr(node, "variable"):
            things[id(node.variable)] = node.variable
            return {id(node.variable)}
        if node not in found:
            kind = re.sub(r"Backward\d*$", "", type(node).__name__)
            inputs = [sources(parent, depth + 1) for parent, _ in node.next_functions] if kind in _LINEAR else []
            if kind == "Div":
                inputs = inputs[:1]
            # A square is positive, so of a product only what is in one factor counts.
            found[node] = {
                key
                for one in inputs
                for key in one
                if kind not in _PRODUCTS or sum(key in other for other in inputs) == 1
            }
        return found[node]

    return [things[key] for key in (sources(value.grad_fn) if value.grad_fn is not None else {id(value)})]


def noise(visit: Visit) -> Iterator[Finding]:
    """Random numbers drawn outside of `pyro.sample`, and draws without the gradient that they claim."""
    for role, name in visit.random:
        yield Finding("warning", "noise", name,
                      f"its density in the {role} changes while every site keeps its value: random numbers are drawn "
                      "outside pyro.sample, and no density includes them",
                      "draw them by pyro.sample, or once before the call")  # fmt: skip
    for name, q in (visit.guide or {}).items():
        learned = any(tensor.requires_grad for tensor in tensors_held(q.fn))
        if not q.observed and q.fn.has_rsample and learned and not q.value.requires_grad:
            yield Finding("error", "noise", name,
                          "its distribution claims has_rsample, but its draw has no gradient: the loss has neither "
                          "the pathwise nor the score-function gradient",
                          "draw it with rsample and outside torch.no_grad(), or set has_rsample = False")  # fmt: skip


def evidence(visit: Visit) -> Iterator[Finding]:
    """Latents on which no observation depends, or depends without a gradient."""
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
                          "use it in the likelihood, or leave it out")  # fmt: skip
        elif _cut_off(visit, name):
            yield Finding("warning", "evidence", name, "the sites that depend on it give it no gradient",
                          "check for detach(), rounding, an index or a Python number between them")  # fmt: skip


def _cut_off(visit: Visit, name: str) -> bool:
    """Whether a reparameterized latent gets no gradient from any site of the model that depends on it."""
    z, q = visit.model[name].value, (visit.guide or {}).get(name)
    if q is None or not q.fn.has_rsample or not z.requires_grad:
        return False
    stated = [visit.model[site].log_prob for site, factor in visit.reads.items() if name in factor.parents]
    terms = [term for term in stated if term is not None and term.any()]  # an indicator has no gradient to give
    total = sum(term.sum() for term in terms if term.requires_grad)
    if not isinstance(total, Tensor):
        return bool(terms)
    return torch.autograd.grad(total, z, retain_graph=True, allow_unused=True)[0] is None
