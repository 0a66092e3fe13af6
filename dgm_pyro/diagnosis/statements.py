"""Checks of the statements of a pair: sites, supports, shapes, plates, transforms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import ComposeTransform

from dgm_pyro.checks import nearest_name
from dgm_pyro.diagnosis.findings import Finding
from dgm_pyro.diagnosis.messages import in_one_line
from dgm_pyro.diagnosis.supports import (
    base_of,
    constraint_of,
    draws_of,
    kind_of_support,
    non_invertible,
    outside,
    suggestion,
    support_in_words,
)
from dgm_pyro.diagnosis.visit import Site, Visit, same_to_rounding
from dgm_pyro.program import measure_of

__all__ = ["data_supports", "dtypes", "guide_supports", "inverses", "nesting", "partners", "plates", "shapes"]

ROUND_TRIP = 1e-2
JACOBIAN_FEATURES = 32


def device_mix(arguments: Sequence[Tensor], parameters: Sequence[Tensor]) -> Iterator[Finding]:
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
                      "convert all to one dtype, such as x.to(torch.float32)")  # fmt: skip


def partners(visit: Visit) -> Iterator[Finding]:
    """Sites that only the model or only the guide has."""
    if visit.guide is None:
        return
    for role, site in visit.sites:
        if site.enumerated and not (site.observed or site.fn.has_enumerate_support or "num_samples" in site.infer):
            yield Finding("error", "partners", site.name,
                          f"the {role} enumerates it, but {type(base_of(site.fn)).__name__} has no finite list of "
                          "values", "draw it in the guide, or use a distribution such as Categorical")  # fmt: skip
    latent = [site.name for site in visit.model.values() if not site.observed]
    guided = [site.name for site in visit.guide.values() if not site.observed]
    for name in guided:
        if name in latent or visit.guide[name].infer.get("is_auxiliary"):
            continue
        if name in visit.model:
            yield Finding("error", "partners", name, "the guide samples it, but the model observes it",
                          "leave it out of the guide: an observed site needs no guide")  # fmt: skip
            continue
        close = nearest_name(name, latent, 0.5)
        hint = "" if close is None else f"did you mean {close!r}? Otherwise "
        yield Finding("error", "partners", name, "the guide samples it, but the model does not",
                      hint + "sample it in the model, or mark it infer={'is_auxiliary': True}")  # fmt: skip
    for name in latent:
        if name in guided or visit.model[name].enumerated:
            continue
        yield Finding("error", "partners", name, "the model samples it, but the guide does not",
                      f"add pyro.sample({name!r}, ...) to the guide, or enumerate it with "
                      "infer={'enumerate': 'parallel'} and TraceEnum_ELBO")  # fmt: skip


def guide_supports(visit: Visit) -> Iterator[Finding]:
    """Draws of the guide with density 0 under the model, and values of the model with density 0 under the guide."""
    for name, q in (visit.guide or {}).items():
        p = visit.model.get(name)
        if p is None or p.observed:
            continue
        if q.fn.event_dim != p.fn.event_dim:
            yield Finding("error", "supports", name,
                          f"the guide has {q.fn.event_dim} event dimensions, but the model has {p.fn.event_dim}",
                          f"use .to_event({max(q.fn.event_dim, p.fn.event_dim)}) in both")  # fmt: skip
            continue
        of_q, of_p = measure_of(q.fn), measure_of(p.fn)
        if None not in (of_q, of_p) and of_q != of_p:
            yield Finding("error", "supports", name,
                          f"the guide gives it a {of_q}, but the model a {of_p}, so the ELBO is no bound on log p(x)",
                          f"use a guide on {support_in_words(p.fn)}, such as {suggestion(p.fn)}")  # fmt: skip
        elif outside(p.fn, draws_of(q.fn)):
            yield Finding("error", "supports", name,
                          f"the guide draws values outside the model's support, {support_in_words(p.fn)}",
                          f"use a guide on {support_in_words(p.fn)}, such as {suggestion(p.fn)}")  # fmt: skip
        elif (
            _has_fixed_bounds(q.fn)
            and not isinstance(base_of(q.fn), dist.Delta)
            and not isinstance(base_of(p.fn), dist.ImproperUniform)
            and outside(q.fn, draws_of(p.fn))
        ):
            yield Finding("warning", "supports", name,
                          f"the guide covers only {support_in_words(q.fn)}, but the model {support_in_words(p.fn)}",
                          "use a guide with the model's support, or the bound stays loose")  # fmt: skip


def _has_fixed_bounds(fn: Any) -> bool:
    """Whether the support has bounds that are equal for all elements; others were computed from the data."""
    support = constraint_of(fn)
    bounds = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    return any(bound is not None for bound in bounds) and all(
        bound is None or len(torch.as_tensor(bound).unique()) == 1 for bound in bounds
    )


def data_supports(visit: Visit) -> Iterator[Finding]:
    """Data with density 0 under the model."""
    for site in visit.model.values():
        value = site.value
        if not site.observed or not isinstance(value, Tensor) or value.numel() == 0:
            continue
        if value.is_floating_point() and not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            yield Finding("error", "data", site.name, f"{count} of its observed values are NaN or infinite",
                          "clean the data, or mask those entries with poutine.mask")  # fmt: skip
        elif outside(site.fn, value):
            low, high = value.min().item(), value.max().item()
            yield Finding("error", "data", site.name,
                          f"data from {low:.4g} to {high:.4g} are outside the support, {support_in_words(site.fn)}",
                          _data_fix(site.fn, low, high))  # fmt: skip


def _data_fix(fn: Any, low: float, high: float) -> str:
    base = base_of(fn)
    if isinstance(base, dist.Bernoulli):
        return "binarize the data, or use a Categorical or DiscretizedLogistic for levels, a Normal for reals"
    if kind_of_support(fn) in ("GreaterThan", "GreaterThanEq"):
        return "use a likelihood on the reals, such as Normal, or transform the data"
    if kind_of_support(fn) == "IntegerInterval":
        return f"use a likelihood with at least {int(high) + 1} levels, and integers from 0"
    return "use a likelihood whose support contains the data, or rescale them"


def shapes(visit: Visit) -> Iterator[Finding]:
    """Distributions that cannot score their values: a transform without an inverse, or shapes that do not fit."""
    impossible = {finding.where for finding in data_supports(visit)}
    for role, site in visit.sites:
        if site.trouble is None or site.name in impossible:
            continue
        one_way, odd = non_invertible(site.fn), _odd_plate(site)
        if odd is not None:
            size = site.value.shape[odd.dim - site.fn.event_dim]
            yield Finding("error", "plates", site.name,
                          f"the {role} has {size} values where plate {odd.name!r} has {odd.size}",
                          "make the plate as long as the data, or take the plate's part of them: x[rows]")  # fmt: skip
        elif one_way:
            yield Finding("error", "transforms", site.name,
                          f"{one_way} has no inverse, so it cannot score values that it has not drawn",
                          "use a transform with an inverse, such as AffineCoupling or Spline")  # fmt: skip
        else:
            shape = tuple(site.value.shape) if isinstance(site.value, Tensor) else ()
            yield Finding("error", "shapes", site.name,
                          f"the {role}'s distribution, batch {tuple(site.fn.batch_shape)} and event "
                          f"{tuple(site.fn.event_shape)}, cannot score a value of shape {shape}: "
                          f"{in_one_line(site.trouble)}",
                          "let the value's last dimensions be the event shape, the others those of plates")  # fmt: skip


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
                      f"the guide draws {part} of {size} data itself, but the model is given indices: latents "
                      "and data belong to different rows",
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
                # Right of a plate, Pyro treats it as dependent and sums over it.
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
        if ours == theirs and not same_to_rounding(p.scale, q.scale):
            yield Finding("warning", "plates", name, "its scale differs between the model and the guide",
                          "scale both, or neither: their ratio is the KL")  # fmt: skip


def nesting(visit: Visit) -> Iterator[Finding]:
    """An ELBO object from a pair with fewer nested plates."""
    kept = getattr(visit.loss, "max_plate_nesting", math.inf)
    needed = max((-frame.dim for _, site in visit.sites for frame in site.plates), default=0)
    if kept < needed:
        yield Finding("error", "nesting", type(visit.loss).__name__,
                      f"it has max_plate_nesting={kept}, but the pair nests {needed} plates",
                      "make a new ELBO object for each pair: it keeps the nesting of the first")  # fmt: skip


def inverses(visit: Visit) -> Iterator[Finding]:
    """Flows with a wrong inverse, or with a log-determinant that differs from that of their Jacobian."""
    seen: set[str] = set()
    for _, site in visit.sites:
        flow = base_of(site.fn)
        if not isinstance(flow, dist.TransformedDistribution) or site.trouble or site.name in seen:
            continue
        transform: Any = ComposeTransform(list(flow.transforms))
        if not transform.bijective or non_invertible(site.fn):
            continue
        seen.add(site.name)
        z = flow.base_dist.sample().detach()
        with torch.no_grad():
            x = transform(z).clone()
            back = transform.inv(x).clone()
            # Where a sigmoid saturates, z cannot be recovered, but x can.
            gap = min(_relative_difference(back, z), _relative_difference(transform(back), x))
        if not gap <= ROUND_TRIP:
            yield Finding("error", "inverses", site.name, f"the round trip z to x and back is off by {gap:.2g}",
                          "correct its inverse; if float64 helps, the cause is rounding")  # fmt: skip
            continue
        claimed, true = _log_determinants(transform, z)
        if true is not None and not torch.allclose(claimed, true, atol=1e-2, rtol=1e-2):
            worst = (claimed - true).abs().max()
            yield Finding("error", "inverses", site.name,
                          f"its log-determinant is {worst:.2g} nats off that of its Jacobian",
                          "correct log_abs_det_jacobian: the density does not integrate to 1")  # fmt: skip


def _relative_difference(a: Tensor, b: Tensor) -> float:
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
