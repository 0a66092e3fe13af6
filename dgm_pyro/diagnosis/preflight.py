r"""Preflight checks of a model and a guide, before training.

`doctor` traces the guide, replays the model on its latents, and checks the two traces, the loss

.. math::
    \hat L = \sum_s \log p_s - \sum_s \log q_s + \Big(\sum_{s \in S} \log q_s\Big) \, \mathrm{stop}(\hat L),

with S the latents that cannot be reparameterized, and its gradient. Then Pyro's own loss runs once under validation.
Its errors and warnings are reported where no check has found an error. `doctor` takes any Pyro pair. Each check is a
function from a `Visit` to findings; `CHECKS` is the list of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dgm_pyro.diagnosis.findings import SEVERITIES, Diagnosis, Finding
from dgm_pyro.diagnosis.gradients import bounds, evidence, finite, noise, parameters, store
from dgm_pyro.diagnosis.loss import finding_of, run_loss, run_of_pair
from dgm_pyro.diagnosis.messages import PYRO, heard, in_one_line, remedy_in
from dgm_pyro.diagnosis.reach import named_tensors, unchanged
from dgm_pyro.diagnosis.statements import (
    data_supports,
    device_mix,
    dtypes,
    guide_supports,
    inverses,
    nesting,
    partners,
    plates,
    shapes,
)
from dgm_pyro.diagnosis.visit import Check, PairFailed, Visit, differentiate, draw_again, random_sites, visit_of
from dgm_pyro.evaluation import as_data, program_device
from dgm_pyro.factors import factors_of
from dgm_pyro.program import Program, alone, differentiating, is_pair, seeded

__all__ = ["CHECKS", "doctor"]

CHECKS: list[Check] = [
    dtypes, partners, guide_supports, data_supports, shapes, plates, nesting, inverses, finite, parameters, store,
    bounds, noise, evidence,
]  # fmt: skip


def doctor(model: Any, guide: Any = None, *args: Any, loss: Any = None, **kwargs: Any) -> Diagnosis:
    """Find mistakes in a model and a guide, without changing them.

    Args:
        model: a Pyro model; or a `Program`, which has its own guide: then call ``doctor(program, data)``.
        guide: a Pyro guide, or None for a model alone (as for MCMC). After a `Program`: a `Data`, a tensor, or None for
            samples of the program.
        args, kwargs: arguments of the model and the guide.
        loss: the ELBO object that you will use, or a function ``loss(model, guide, *args, **kwargs)``, as for `SVI`. It
            runs once under Pyro's validation. Default: the one of Pyro's that suits the sites (`TraceEnum_ELBO` if a
            site is enumerated, `TraceGraph_ELBO` if one has a baseline, else `Trace_ELBO`).

    Returns:
        A `Diagnosis`; ``diagnosis.ok`` is true if there are no errors.

    Raises:
        ValueError, TypeError: the arguments are not those of a pair or of a program with data.

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
        return _diagnose_program(model, guide, loss)
    if not callable(model) or not (guide is None or callable(guide)):
        raise TypeError(
            f"model and guide must be callable, got {type(model).__name__} and {type(guide).__name__}: "
            "doctor(model, guide, *args)"
        )
    return _diagnose(model, guide, args, kwargs, loss)


def _diagnose_program(program: Program, data: Any, loss: Any) -> Diagnosis:
    modes = [(module, module.training) for module in program.modules()]
    for module, _ in modes:
        module.training = isinstance(module, Program)  # the statements of training, but no dropout and no batch norm
    try:
        if data is None:
            value, given = _example_data(program)
        else:
            try:
                points = as_data(program, data)
            except (ValueError, TypeError) as error:
                return Diagnosis((Finding("error", "data", program.variable, in_one_line(error), remedy_in(error)),))
            value, given, _ = program.arguments(points[:64].to(program_device(program)))
        return _diagnose(program.model, program.guide, (value, given), {}, loss)
    finally:
        for module, training in modes:
            module.training = training


def _example_data(program: Program) -> tuple[Tensor, Any]:
    """Eight draws from the program itself, with an example ``given``."""
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


@alone()
def _diagnose(model: Any, guide: Any, args: Any, kwargs: Any, loss: Any) -> Diagnosis:
    named, own = named_tensors((model, guide))
    arguments = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    place = next((tensor.device for tensor in arguments), torch.device("cpu"))
    mixed = list(device_mix(arguments, [tensor for _, tensor in named.values()]))
    if mixed:  # nothing would run
        return _sorted_by_severity(mixed, None)
    store = pyro.get_param_store()
    stored: Any = store.get_state()
    state: Any = {name: dict(table) for name, table in stored.items()}
    modules = [part for part in (model, guide) if isinstance(part, nn.Module)]
    frozen = [named for part in modules for named in part.named_parameters() if not named[1].requires_grad]
    with (
        unchanged((model, guide)),
        store.scope(state),
        seeded(0, place),
        pyro.validation_enabled(False),
        differentiating("doctor"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # Pyro's own are recorded when its loss runs
        run = functools.partial(visit_of, model, guide, args, kwargs)
        try:
            visit = run()
        except PairFailed as raised:
            said: list[Exception | Warning] = []
            if loss is not None and guide is not None:
                with heard(said, PYRO), pyro.validation_enabled(True):
                    run_of_pair(loss, model, guide, args, kwargs)
            if loss is None or guide is None or said:
                return _sorted_by_severity([raised.finding], None)
            # Its statements need the dimensions of particles or of enumerated values.
            what = f"it runs only under the loss, so nothing else was checked; without the loss, {raised.finding.what}"
            return _sorted_by_severity([dataclasses.replace(raised.finding, severity="note", what=what)], None)
        visit.named, visit.own, visit.loss = named, own, loss
        visit.before, visit.arguments = dict(state["params"]), arguments
        if not any(site.trouble for _, site in visit.sites):
            differentiate(visit)
            with contextlib.suppress(Exception):  # another draw than those that ran, by the user's code
                visit.reads = {f.site: f for f in factors_of(functools.partial(model, *args, **kwargs))[0]}
            draw_again(visit, run)
            if guide is not None:
                run_loss(visit, model, guide, args, kwargs)
            with contextlib.suppress(Exception):
                visit.random = list(random_sites(model, guide, args, kwargs))
        findings = [finding for check in CHECKS for finding in check(visit)]
        findings += [
            Finding("error", "frozen", name, "it has requires_grad=False, but Pyro sets it to True and trains it",
                    "make it a buffer, with register_buffer")
            for name, tensor in frozen if tensor.requires_grad
        ]  # fmt: skip
        if not any(finding.severity == "error" for finding in findings):
            findings += map(functools.partial(finding_of, visit), visit.said)
    return _sorted_by_severity(findings, visit)


def _sorted_by_severity(findings: Sequence[Finding], visit: Visit | None) -> Diagnosis:
    ordered = sorted(dict.fromkeys(findings), key=lambda finding: SEVERITIES.index(finding.severity))
    if visit is None:
        return Diagnosis(tuple(ordered))
    sites = tuple(dict.fromkeys(site.name for _, site in visit.sites))
    count = sum(parameter.numel() for _, parameter in visit.registered.values())
    return Diagnosis(tuple(ordered), sites, count)
