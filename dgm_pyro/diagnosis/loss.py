"""Pyro's own loss, run once under its validation, and its errors and warnings."""

from __future__ import annotations

import copy
import re
from typing import Any

import pyro
from pyro.infer import ELBO as PyroELBO
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

from dgm_pyro.diagnosis.findings import Finding
from dgm_pyro.diagnosis.messages import PYRO, fix_for, heard, in_one_line
from dgm_pyro.diagnosis.visit import Visit


def run_loss(visit: Visit, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
    """Run the loss under Pyro's validation; record errors, warnings and the parameters with a gradient."""
    with heard(visit.said, PYRO), pyro.validation_enabled(True):
        run_of_pair(visit.loss or _loss_for(visit), model, guide, args, kwargs)
    for _, tensor in (*visit.registered.values(), *visit.named.values()):
        if tensor.grad is not None:
            visit.leaves[id(tensor)] = tensor
            if tensor.grad.ne(0).any():
                visit.moved.add(id(tensor))


def run_of_pair(of_pair: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
    loss: Any = copy.copy(of_pair)  # it keeps the plate nesting of its first pair
    if hasattr(loss, "loss_and_grads"):
        loss.loss_and_grads(model, guide, *args, **kwargs)
    elif (value := loss(model, guide, *args, **kwargs)).requires_grad:
        value.backward()


def _loss_for(visit: Visit) -> PyroELBO:
    """The loss that suits the sites."""
    infer = [site.infer for _, site in visit.sites]
    if any(each.get("enumerate") for each in infer):
        return TraceEnum_ELBO()
    return TraceGraph_ELBO() if any("baseline" in each for each in infer) else Trace_ELBO()


def finding_of(visit: Visit, said: Exception | Warning) -> Finding:
    """A finding for an error or a warning of Pyro."""
    text, loss = in_one_line(said), type(visit.loss or _loss_for(visit)).__name__
    site = re.search(r"site \W*(\w+)", text)
    severity, verb = ("warning", "warns") if isinstance(said, Warning) else ("error", f"raises {type(said).__name__}")
    fix = fix_for(text, "correct what Pyro names: training would raise it too")
    return Finding(severity, "pyro", site[1] if site else loss, f"{loss} {verb}: {text}", fix)
