r"""Compiled losses: a tracer runs the statements of a program once, and their tensor operations are compiled.

Pyro's handlers are Python code, at which `torch.compile` breaks its graphs. But the statements that run do not depend
on values, so one run records all of them. `torch.export` runs model and guide on symbolic tensors, through every
handler, and keeps only the tensor operations, which `torch.compile` then fuses. The graph reads the program's own
parameters, so training the graph trains the program.

One run cannot capture Python code that depends on values, such as ``if z.sum() > 0:``. Such code ends in a
`CompilationError` that quotes the line, and so do random numbers of Python or NumPy. Python numbers keep the values of
that run.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import linecache
import math
import os
import pickle
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy
import pyro
import torch
import torch.fx.config
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
    trace_elbo,
    trace_mean_field_elbo,
    traceenum_elbo,
    tracetmc_elbo,
)
from pyro.infer.util import Dice, get_dependent_plate_dims, torch_sum
from pyro.ops.special import _SafeLog
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dgm_pyro.diagnosis.messages import heard, without_table
from dgm_pyro.objectives import ELBO, IWAE, Bound, Objective, at_progress, chosen
from dgm_pyro.program import Program, alone, parameter_of, sample_sites
from dgm_pyro.training.lanes import join_lanes

__all__ = ["CompilationError", "Loss", "compile", "export", "optimized"]

# Packages whose frames in a traceback belong to no statement.
_LIBRARIES = (*(os.path.dirname(m.__file__ or "") + os.sep for m in (torch, pyro)), contextlib.__file__, __file__)

# Modules in which Pyro warns about a pair, and not about a single statement.
_CHECKS = tuple(os.path.join(os.path.dirname(pyro.__file__), part) for part in ("util.py", "infer"))

# The result of `Terms`: sums by kind and site.
Sums = dict[str, dict[str, Tensor]]


class CompilationError(RuntimeError):
    """A program or its objective cannot be compiled; the message quotes the statement."""


def compile(program: Program | tuple[Callable[..., Any], Callable[..., Any]], objective: Any = None) -> Loss | PairLoss:
    """The compiled loss of ``program`` under ``objective``, on the program's own parameters.

    Args:
        program: a `Program`; or any pair ``(model, guide)`` of Pyro callables.
        objective: an objective or its name, as for `dgm.fit`; default `ELBO`. For a pair it is an `ELBO`, an `IWAE`, or
            one of Pyro's ELBOs with a ``differentiable_loss``: `Trace_ELBO`, `TraceMeanField_ELBO`, `TraceEnum_ELBO`.

    Returns:
        For a program a `Loss`, ``loss(x, given=None)``; for a pair a `PairLoss`, called with the pair's arguments. The
        first call compiles it. Arguments of another kind compile it again, and so does a second number of data, then
        for every number. It does not follow later replacements of parts of the program: then call `compile` again.
        Parameters of an objective of your own get no gradient, unless they are parameters of the program.

    Raises:
        TypeError: ``program`` is neither, or the objective is a class.
        ValueError: the objective cannot be compiled, or there is no objective of that name.
        CompilationError: when called; the message quotes the statement that cannot be compiled.

    >>> import torch, dgm_pyro as dgm
    >>> program = dgm.Normal(2, learned=True)
    >>> loss = dgm.compile(program)
    >>> optimizer = torch.optim.Adam(loss.parameters())  # then loss(x).backward(), as usual
    """
    maximize = chosen(objective)
    if isinstance(program, Program):
        return Loss(program, maximize)
    if not (isinstance(program, tuple) and len(program) == 2 and all(callable(part) for part in program)):
        raise TypeError(f"program must be a dgm.Program or a pair (model, guide), got {type(program).__name__}")
    return PairLoss(*program, _pyro_elbo(maximize))


def _pyro_elbo(objective: Any) -> Any:
    """The ELBO of Pyro that a pair maximizes."""
    if isinstance(objective, ELBO) and objective.beta == 1.0 and not objective.leave_one_out:
        return (TraceMeanField_ELBO if objective.analytic_kl else Trace_ELBO)(objective.num_samples)
    if isinstance(objective, IWAE) and not objective.leave_one_out:
        return _ImportanceWeightedELBO(objective.num_particles)
    if isinstance(objective, PyroELBO) and hasattr(objective, "differentiable_loss"):
        return objective
    got = type(objective).__name__ if isinstance(objective, PyroELBO) else objective
    raise ValueError(
        "a pair (model, guide) is compiled with dgm.ELBO(), dgm.IWAE(), or an ELBO of Pyro that has a "
        f"differentiable_loss, got {got}: train it with pyro.infer.SVI, or compile it with "
        "dgm.ELBO(analytic_kl=False), whose score function has no baselines"
    )


class Loss(nn.Module):
    """The mean negative objective of a program's data, compiled, in nats per datum.

    Args:
        program: the program whose parameters it shares.
        objective: as for `dgm.fit`.
        backend: as for `torch.compile`; "eager" runs the exported graph without compiling it.

    Raises:
        ValueError: the objective cannot be compiled.
    """

    def __init__(self, program: Program, objective: Objective, backend: str = "inductor"):
        super().__init__()
        check_compilable(objective)
        self.terms, self.backend = Terms(program, objective), backend
        self.scalar = _LossAlone(self.terms)
        self._parts, self._leaves = [*self.terms.modules()], [*self.terms.parameters()]
        self._graphs: dict[Any, Callable[..., Any]] = {}

    def forward(
        self, x: Tensor, given: Any = None, observed: dict[str, Tensor] | None = None, elapsed: float = 1.0
    ) -> Tensor:
        """The loss of ``x``, a scalar.

        Args:
            x: ``(B, *event_shape)``.
            given: ``(B, *given_shape)`` for a conditional program.
            observed: values of further sites, such as labels.
            elapsed: the share of training that is over, from 0 to 1, for an objective with schedules.
        """
        arguments = (x, given, observed or {}, self.terms.weights(elapsed))
        leaves = [(leaf.dtype, leaf.device, leaf.requires_grad) for leaf in self._leaves]
        key = (_graph_key(arguments, 1), *[part.training for part in self._parts], *leaves)
        graph = self._graphs.get(key)
        if graph is None or len(x) == 1:
            self.terms.program.check(x, given, values=False)
            if len(x) == 1:  # one graph serves all other numbers of data
                return self.scalar(*arguments)
            graph = self._graphs[key] = optimized(export(self.scalar, arguments), self.backend)
        return graph(*arguments)


class PairLoss(nn.Module):
    """The negative ELBO of the data of any Pyro callables, compiled, in nats.

    Value and gradient are those of Pyro's loss. Its `parameters` are those that the callables state, which are known
    after the first call.

    Args:
        model, guide: Pyro callables of the same arguments.
        elbo: Pyro's loss: one with a ``differentiable_loss``.
        backend: as for `torch.compile`.
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], elbo: Any, backend: str = "inductor"):
        super().__init__()
        self.terms, self.backend = PairTerms(model, guide, elbo), backend
        self._parts = [*self.terms.modules()]
        self._names: dict[Any, list[str]] = {}  # names of the parameters, by kind of arguments
        self._graphs: dict[Any, Callable[..., Any]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss for the callables' arguments, a scalar.

        Numbers and strings among the arguments are constants of a graph, so other values compile another graph.

        Raises:
            TypeError: an argument is neither a tensor, a number, a string nor a list, tuple or dict of them.
            CompilationError: Pyro's ELBO raises an error or warns at the pair, or a statement cannot be compiled.
        """
        _check_arguments((args, kwargs))
        kind = (_graph_key((args, kwargs), 0), *[part.training for part in self._parts])
        stored = dict(pyro.get_param_store().named_parameters())
        if not set(self._names.get(kind, [""])) <= set(stored):  # the first call, or the store has been cleared
            self._names[kind] = self.terms.stated(args, kwargs)
            stored = dict(pyro.get_param_store().named_parameters())
        leaves = {name: stored[name] for name in self._names[kind]}
        key = (kind, _graph_key((leaves,), 0))
        if key not in self._graphs:
            example = (leaves, args, kwargs)
            self._graphs[key] = optimized(export(self.terms, example, dynamic=False), self.backend)
        return self._graphs[key](leaves, args, kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """The unconstrained parameters, by their names in the param store."""
        if not self._graphs:
            raise RuntimeError("the parameters of a Pyro pair are known only after it has run: call the loss first")
        stored = dict(pyro.get_param_store().named_parameters())
        names = dict.fromkeys(name for names in self._names.values() for name in names)
        yield from ((name, stored[name]) for name in names if name in stored)


# -- modules that are exported -----------------------------------------------------------------------------------------


class Terms(nn.Module):
    """The part of an objective that a training step needs, tensors in and tensors out.

    Args:
        program: the program, whose parameters are also those of this module.
        objective: as for `dgm.fit`.
    """

    def __init__(self, program: Program, objective: Objective):
        super().__init__()
        self.program, self.objective = program, objective
        self.schedules = _changing_fields(objective)

    def weights(self, elapsed: float) -> dict[str, Tensor]:
        """The values of the objective's schedules when ``elapsed``, from 0 to 1, of training is over.

        They are created on the program's device, where CUDA graphs need them, because a copy would wait for the device.
        """
        device = parameter_of(self.program).device if self.schedules else None
        return {
            name: torch.full((), float(schedule(elapsed)), dtype=torch.float64, device=device)
            for name, schedule in self.schedules.items()
        }

    def forward(self, x: Tensor, given: Any, observed: dict[str, Tensor], weights: dict[str, Tensor]) -> Sums:
        """The loss, and the values of a `Bound` summed over the batch.

        Returns:
            ``loss`` (key ``""``), the mean negative surrogate in nats per datum, for the gradient; and ``value`` (key
            ``""``), ``reconstruction`` and ``kl`` (by site), sums over the batch in float64, without gradients.
        """
        objective: Any = self.objective
        if weights:
            objective = dataclasses.replace(objective, **weights)
        bound = objective(self.program, x, given, observed)
        if not isinstance(bound, Bound):
            raise TypeError(
                f"an objective must return a dgm.objectives.Bound, but {objective!r} returned a {type(bound).__name__}"
            )

        def sums(terms: dict[str, Tensor]) -> dict[str, Tensor]:
            return {site: term.detach().double().mean() * x.shape[0] for site, term in terms.items()}

        return {
            "loss": {"": -bound.surrogate.mean()},
            "value": sums({"": bound.value}),
            "reconstruction": sums(bound.reconstruction),
            "kl": sums(bound.kl),
        }


class _LossAlone(nn.Module):
    """The loss of `Terms` alone: its graph has no unused sums."""

    def __init__(self, terms: Terms):
        super().__init__()
        self.terms = terms

    def forward(self, x: Tensor, given: Any, observed: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
        return self.terms(x, given, observed, weights)["loss"][""]


class PairTerms(nn.Module):
    """Pyro's loss of a pair as a function of the pair's parameters and arguments."""

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], elbo: Any):
        super().__init__()
        self.model, self.guide = model, guide
        self.elbo = copy.copy(elbo)  # it keeps the plate nesting of its first pair
        # A deterministic site in the guide has no density, but Pyro would require it in the model.
        self.densities = poutine.block(guide, hide_fn=_is_deterministic)
        self._names: set[str] = set()  # names of all statements

    def stated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
        """Names of the parameters that the callables state, found by running Pyro's loss once under validation.

        Raises:
            CompilationError: Pyro's loss raises an error or warns, or importance weights do not take a site.
        """
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_cuda = {tensor.device for tensor in tensors if tensor.is_cuda}
        said: list[Exception | Warning] = []
        validated = pyro.settings.context(validate_infer=True)
        with torch.no_grad(), torch.random.fork_rng(devices=[*on_cuda]), poutine.block():
            with _StatedNames() as statements, heard(said, _CHECKS), validated:
                self.elbo.loss(self.model, self.densities, *args, **kwargs)
            if said:
                raise CompilationError(_refusal_message(type(self.elbo).__name__, said[0]))
            if isinstance(self.elbo, _ImportanceWeightedELBO):
                self._check_weights(args, kwargs)
        self._names = {*statements.params, *statements.samples}
        return [*statements.params]

    def _check_weights(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise a CompilationError that names the first site for which importance weights make no bound."""
        guide = poutine.trace(self.densities).get_trace(*args, **kwargs)
        model = poutine.trace(poutine.replay(self.model, trace=guide)).get_trace(*args, **kwargs)
        for trace in (guide, model):
            nodes: dict[str, Any] = trace.nodes
            for name in sample_sites(trace):
                if trace is guide and not nodes[name]["fn"].has_rsample:
                    raise CompilationError(f"importance weights need {name!r} to be reparameterized: use dgm.ELBO")
                if (torch.as_tensor(nodes[name]["scale"]) != 1).any():
                    raise CompilationError(f"{name!r} is scaled, and importance weights make no bound: use dgm.ELBO")

    def forward(self, leaves: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        stored = dict(pyro.get_param_store().named_parameters())
        instead = _SubstitutedTensors({id(stored[name]): leaf for name, leaf in leaves.items()})
        with poutine.block(), _StatedNames() as statements, instead, _without_reading_values():
            loss = torch.as_tensor(self.elbo.differentiable_loss(self.model, self.densities, *args, **kwargs))
        for name in {*statements.params, *statements.samples} - self._names:
            raise CompilationError(
                f"{name!r} is stated in this run alone: the names of statements must not depend on values"
            )
        return loss


class _ImportanceWeightedELBO(RenyiELBO):
    """`RenyiELBO` at alpha 0, with a differentiable loss."""

    def __init__(self, num_particles: int):
        super().__init__(0.0, num_particles)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, with its gradient; where all sites are in one plate, each of its data has weights."""
        log_weights = []
        for p, q in self._get_traces(model, guide, args, kwargs):
            dims = get_dependent_plate_dims(p.nodes.values())
            log_p, log_q = (
                sum(torch_sum(trace.nodes[name]["log_prob"], dims) for name in sample_sites(trace)) for trace in (p, q)
            )
            log_weights.append(torch.as_tensor(log_p - log_q))
        return (math.log(self.num_particles) - torch.stack(log_weights).logsumexp(0)).sum()


class _StatedNames(Messenger):
    """The names of parameters and sample sites, in the order stated."""

    def __init__(self) -> None:
        super().__init__()
        self.params: dict[str, None] = {}
        self.samples: dict[str, None] = {}

    def _pyro_param(self, msg: Any) -> None:
        self.params[msg["name"]] = None

    def _pyro_sample(self, msg: Any) -> None:
        self.samples[msg["name"]] = None


@contextlib.contextmanager
def _without_reading_values() -> Iterator[None]:
    """Keep Pyro's losses from reading values of tensors, which they do to warn of NaN and to detach surrogates."""

    def detached(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    with contextlib.ExitStack() as stack:
        for module in (trace_elbo, trace_mean_field_elbo, traceenum_elbo, tracetmc_elbo):
            for name, instead in (("torch_item", detached), ("warn_if_nan", lambda value, *args: value)):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, instead))
        stack.enter_context(mock.patch.object(IndepMessenger, "__iter__", _iterate_by_numbers))
        yield


def _iterate_by_numbers(plate: Any, iterate: Callable[[Any], Iterator[Any]] = IndepMessenger.__iter__) -> Iterator[Any]:
    """Iterate over a sequential plate of all data by Python numbers, because site names are made of them."""
    if plate.subsample_size == plate.size:
        plate._indices = range(plate.size)
    return iterate(plate)


def _refusal_message(elbo: str, why: Any) -> str:
    remedy = "correct the pair"
    if elbo == "TraceMeanField_ELBO":
        remedy += ", or compile it with dgm.ELBO(analytic_kl=False)"
    said = " ".join(without_table(why).split())
    return f"Pyro's {elbo} does not take the pair: {said}: {remedy}"


def _is_deterministic(site: Any) -> bool:
    return site["infer"].get("_deterministic", False)  # type: ignore[no-any-return]


def _check_arguments(arguments: Any) -> None:
    for leaf in pytree.tree_leaves(arguments):
        if not (leaf is None or isinstance(leaf, (Tensor, bool, int, float, str))):
            raise TypeError(
                f"an argument of the pair holds a {type(leaf).__name__}, whose changes a graph would miss: pass "
                "tensors, numbers and strings, alone or in lists, tuples and dicts, or let model and guide close over "
                "it"
            )


class _SubstitutedTensors(TorchFunctionMode):
    """Substitutes tensors in the arguments of every function, matched by identity.

    The param store returns its own tensors, not the ones that replace them while a function is traced. And Pyro's sum
    over enumerated values checks whether some have probability 0, to leave these out: here nothing is left out.
    """

    def __init__(self, others: dict[int, Tensor]):
        super().__init__()
        self.others = others

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(lambda leaf: self.others.get(id(leaf), leaf), (args, kwargs or {}))
        if sys._getframe(1).f_code is Dice.compute_expectation.__code__:
            if function is Tensor.__bool__:
                return False
            if function is Tensor.masked_select:
                return torch.where(args[1], args[0], 0)
        return function(*args, **kwargs)


# -- exporting ---------------------------------------------------------------------------------------------------------


def check_compilable(objective: Any) -> None:
    """Raise a ValueError if ``objective`` cannot be a graph of tensor operations."""
    why = why_eager(objective)
    if why is not None:
        raise ValueError(f"{type(objective).__name__} cannot be compiled, because it {why}: use compile=False")


def why_eager(objective: Any) -> str | None:
    """Why ``objective`` cannot be a graph of tensor operations, as the end of "it ..."; None if it can."""
    if hasattr(objective, "eager_only"):
        return str(objective.eager_only)
    if not _follows_its_schedules(objective):
        return "changes during training other than by schedules in the fields of a dataclass"
    return None


def _follows_its_schedules(objective: Any) -> bool:
    """Whether an objective at any progress equals the objective with its fields replaced by the schedules' values."""
    if not hasattr(objective, "at"):
        return True
    if not dataclasses.is_dataclass(objective) or isinstance(objective, type):
        return False
    schedules = _changing_fields(objective)
    return all(
        dataclasses.replace(objective, **{name: schedule(elapsed) for name, schedule in schedules.items()})
        == at_progress(objective, elapsed)
        for elapsed in (0.0, 0.3, 1.0)
    )


def _changing_fields(objective: Any) -> dict[str, Callable[[float], float]]:
    changes = hasattr(objective, "at") and dataclasses.is_dataclass(objective)
    fields = dataclasses.fields(objective) if changes else ()
    values = {field.name: getattr(objective, field.name) for field in fields}
    return {name: value for name, value in values.items() if callable(value)}


def export(module: nn.Module, arguments: tuple[Any, ...], *, dynamic: bool = True) -> torch.fx.GraphModule:
    """The tensor operations of ``module`` as a module, on the same parameters.

    Args:
        arguments: example arguments, trees of tensors and None.
        dynamic: whether the first dimension of each tensor is a batch of any size of at least 2.

    Raises:
        CompilationError: a statement cannot be traced; the message quotes it.
    """
    batch = torch.export.Dim("batch", min=2)

    def dimensions(leaf: Any) -> Any:
        return {0: batch} if isinstance(leaf, Tensor) and leaf.dim() > 0 else None

    def alone_in_storage(leaf: Any) -> Any:  # torch makes a symbol of the size of a view's base
        return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

    arguments = pytree.tree_map(alone_in_storage, arguments)
    shapes = pytree.tree_map(dimensions, arguments) if dynamic else None
    store = pyro.get_param_store()
    printed = io.StringIO()  # torch prints the whole graph along with the error
    try:
        with (
            alone(),
            store.scope(store.get_state()),  # keeps traced parameters out of the store afterwards
            _no_validation(),
            only_torch_draws(),
            # Without the stack traces that no message of ours reads, tracing takes a seventh of the time.
            mock.patch.object(torch.fx.config, "do_not_emit_stack_traces", True, create=True),
            mock.patch.object(torch.autograd.Function, "apply", classmethod(_in_graph_form)),
            contextlib.redirect_stderr(printed),
        ):
            exported = torch.export.export(module, arguments, strict=False, dynamic_shapes=shapes)
        sys.stderr.write(printed.getvalue())
        device = next((leaf.device for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)), None)
        graph = exported.module(check_guards=False)
        for part in _graphs_in(graph):
            _fuse_normal_draws(part)
            _keep_bernoulli_draws(part)
            _move_constants(part, device)
            _make_modules_of_regions(part)
        for part in _graphs_in(graph):
            join_lanes(part)
            part.recompile()
        return graph
    except CompilationError as error:
        raise CompilationError(without_table(error)) from error
    except Exception as error:
        raise CompilationError(_failure_message(error)) from error


def _graphs_in(graph: torch.fx.GraphModule) -> list[torch.fx.GraphModule]:
    """``graph``, and the graphs of its regions, such as those under autocast."""
    return [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]


def _fuse_normal_draws(graph: torch.fx.GraphModule) -> None:
    """Replace ``torch.empty(...).normal_()`` by ``torch.randn``, with the same numbers.

    The compiler would make a kernel to fill the memory first.
    """
    aten = torch.ops.aten
    for node in graph.graph.find_nodes(op="call_function", target=aten.normal_.default):
        memory: Any = node.args[0]
        if len(node.args) > 1 or node.kwargs or memory.target is not aten.empty.memory_format or len(memory.users) > 1:
            continue
        with graph.graph.inserting_before(node):
            drawn = graph.graph.call_function(aten.randn.default, memory.args, memory.kwargs)
        drawn.meta = node.meta
        node.replace_all_uses_with(drawn)
        graph.graph.erase_node(node)
        graph.graph.erase_node(memory)


def _keep_bernoulli_draws(graph: torch.fx.GraphModule) -> None:
    """Replace ``torch.bernoulli(p)`` in float64 by ``torch.empty_like(p).bernoulli_(p)``, with the same numbers.

    The compiler would compare p to uniform numbers in float32, which are others.
    """
    aten = torch.ops.aten
    for node in graph.graph.find_nodes(op="call_function", target=aten.bernoulli.default):
        p: Any = node.args[0]
        if p.meta["val"].dtype != torch.float64:
            continue
        with graph.graph.inserting_before(node):
            order: dict[str, Any] = {"memory_format": torch.contiguous_format}  # in which torch.bernoulli draws
            memory = graph.graph.call_function(aten.empty_like.default, (p,), order)
            drawn = graph.graph.call_function(aten.bernoulli_.Tensor, (memory, p), node.kwargs)
        memory.meta = drawn.meta = node.meta
        node.replace_all_uses_with(drawn)
        graph.graph.erase_node(node)


def _move_constants(graph: torch.fx.GraphModule, device: torch.device | None) -> None:
    """Move scalar constants, such as ``torch.tensor(0.5)``, to the device of the arguments.

    A scalar on the CPU can be used on every device, but the compiler may expand it on the CPU.
    """
    aten, cpu = torch.ops.aten, torch.device("cpu")
    if device in (None, cpu):
        return
    for make in (aten.zeros.default, aten.ones.default, aten.full.default, aten.scalar_tensor.default):
        for node in graph.graph.find_nodes(op="call_function", target=make):
            if node.kwargs.get("device") == cpu and node.meta["val"].dim() == 0:
                node.update_kwarg("device", device)
                node.meta["val"] = node.meta["val"].to(device)
    for node in graph.graph.find_nodes(op="get_attr"):
        *path, name = node.target.split(".")
        owner: Any = graph.get_submodule(".".join(path))
        value = getattr(owner, name)
        if isinstance(value, Tensor) and value.device == cpu and value.dim() == 0 and not value.requires_grad:
            setattr(owner, name, value.to(device))
            node.meta["val"] = node.meta["val"].to(device)


class _Region(nn.Module):
    """A part of a graph within a context, such as autocast."""

    def __init__(self, context: Callable[[], contextlib.AbstractContextManager[Any]], part: nn.Module):
        super().__init__()
        self.context, self.part = context, part

    def forward(self, *args: Any) -> Any:
        with self.context():
            return self.part(*args)


def _make_modules_of_regions(graph: torch.fx.GraphModule) -> None:
    """Make modules of the parts that run under autocast or without gradients.

    `torch.export` makes special operators of them, which `torch.compile` refuses for a second number of data.
    """
    regions = torch.ops.higher_order
    contexts = {  # with the number of their arguments
        regions.wrap_with_autocast: (torch.autocast, 4),
        regions.wrap_with_set_grad_enabled: (torch.set_grad_enabled, 1),
    }
    for node in [node for node in graph.graph.nodes if node.target in contexts]:
        context, count = contexts[node.target]
        arguments: Any = node.args
        inner = arguments[count]
        name: Any = inner.target
        graph.set_submodule(name, _Region(functools.partial(context, *arguments[:count]), graph.get_submodule(name)))
        with graph.graph.inserting_before(node):
            called = graph.graph.call_module(name, arguments[count + 1 :])
        called.meta = node.meta
        node.replace_all_uses_with(called)
        graph.graph.erase_node(node)
        if not inner.users:
            graph.graph.erase_node(inner)


def _in_graph_form(function: type, *args: Any) -> Any:
    """Replace Pyro's safe log, and refuse other autograd functions: a graph would differentiate their forward pass."""
    if function is _SafeLog:
        (x,), fixed = args, args[0].detach()
        return fixed.log() + (x - fixed) / fixed.clamp(min=torch.finfo(x.dtype).eps)
    raise CompilationError(
        f"{function.__qualname__} is a torch.autograd.Function, whose backward pass a graph cannot hold: use "
        "operations that torch differentiates, or compile=False"
    )


@contextlib.contextmanager
def only_torch_draws() -> Iterator[None]:
    """Raise a CompilationError if Python's or NumPy's random numbers are drawn, which a graph would repeat."""
    python, numpys = random.getstate(), pickle.dumps(numpy.random.get_state())
    yield
    for state, before, name in (
        (random.getstate(), python, "Python's random"),
        (pickle.dumps(numpy.random.get_state()), numpys, "numpy.random"),
    ):
        if state != before:
            raise CompilationError(f"a number is drawn from {name}, which a graph would repeat: draw it with torch")


@contextlib.contextmanager
def _no_validation() -> Iterator[None]:
    """Turn validation of values off, also in existing distributions, which keep their setting."""
    of_values = torch.distributions.Distribution._validate_sample
    torch.distributions.Distribution._validate_sample = lambda self, value: None  # type: ignore[method-assign]
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        torch.distributions.Distribution._validate_sample = of_values  # type: ignore[method-assign]


class _Optimized(nn.Module):
    """An exported graph, called without the argument checks of an exported module."""

    def __init__(self, graph: nn.Module, call: Callable[..., Any]):
        super().__init__()
        self.graph, self.call = graph, call

    def forward(self, *args: Any) -> Any:
        return self.call(*args)


def optimized(graph: torch.fx.GraphModule, backend: str = "inductor", *, cuda_graphs: bool = True) -> nn.Module:
    """The exported ``graph``, compiled; it draws the same random numbers as uncompiled.

    Args:
        backend: as for `torch.compile`; "eager" does not compile the graph.
        cuda_graphs: whether its calls are replayed as CUDA graphs where possible.
    """
    if backend == "eager":
        return _Optimized(graph, graph.forward)
    # Its modules are the program's, and it reads their current parameters, so the check at each call is not needed.
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    if backend == "inductor":
        _keep_the_order_of_writes()
        _keep_draws_apart()
        _try_one_instruction_set()
        options["fallback_random"] = True
        options["triton.cudagraphs"] = cuda_graphs and any(p.is_cuda for p in graph.parameters())
        # One C++ file for all kernels, and one that calls them: g++ reads torch's headers twice, not for each kernel,
        # and no Python runs between the kernels.
        options["cpp_wrapper"] = options["cpp_wrapper_build_separate"] = _is_on_cpu(graph)
    return _Optimized(graph, torch.compile(graph.forward, backend=backend, fullgraph=True, options=options))


@functools.cache
def _keep_the_order_of_writes() -> None:
    """Mend torch's compiler for CPUs, which lets some kernels read a tensor before the last write to it.

    When torch 2.13 changes the loops of a kernel to fuse it with another, it forgets which write its reads come after.
    The gradients of indexing, `gather`, `sort`, `max` and `F.interpolate` are such writes: in bf16 they were 0.
    """
    from torch._inductor.scheduler import SchedulerNode

    recompute: Any = SchedulerNode.recompute_size_and_body

    @functools.wraps(recompute)
    def recompute_and_rename(self: Any, *args: Any, **kwargs: Any) -> None:
        recompute(self, *args, **kwargs)
        self.set_read_writes(self.read_writes.rename(self.mutation_renames))

    SchedulerNode.recompute_size_and_body = recompute_and_rename  # type: ignore[method-assign]
    config: Any = torch.compiler.config
    config.cache_key_tag += "order of writes"  # code that was compiled and stored before is not used


@functools.cache
def _keep_draws_apart() -> None:
    """Mend torch's compiler, which makes one draw of two calls of `randn_like` or `exponential_` with equal arguments.

    The pass that joins equal operations of a graph and its gradient excepts random ones, by a list of names. In torch
    2.13 the list lacks these and others.
    """
    from torch._functorch import compile_utils

    class RandomOperations:
        def __contains__(self, operation: Any) -> bool:
            overloads = operation.overloads() if isinstance(operation, torch._ops.OpOverloadPacket) else ()
            return any(torch.Tag.nondeterministic_seeded in getattr(operation, name).tags for name in overloads)

    compile_utils.rand_ops = RandomOperations()  # type: ignore[assignment]
    config: Any = torch.compiler.config
    config.cache_key_tag += "draws apart"


@functools.cache
def _try_one_instruction_set() -> None:
    """Let torch's compiler for CPUs take the first set of vector instructions that works, without trying the others.

    It compiles a program for each set that the processor has, which takes g++ seconds, and then takes the first.
    """
    from torch._inductor import config, cpu_vec_isa

    all_valid = cpu_vec_isa.valid_vec_isa_list

    @functools.cache
    def first_valid() -> list[Any]:
        if os.getenv("ATEN_CPU_CAPABILITY") or config.cpp.simdlen is not None:  # it takes another than the first
            return all_valid()
        for one in cpu_vec_isa.supported_vec_isa_list:
            with mock.patch.object(cpu_vec_isa, "supported_vec_isa_list", [one]):
                if found := all_valid.__wrapped__():
                    return found
        return []

    cpu_vec_isa.valid_vec_isa_list = first_valid


def _is_on_cpu(graph: torch.fx.GraphModule) -> bool:
    values = [node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder")]
    tensors = [t for t in (*graph.parameters(), *graph.buffers(), *values) if isinstance(t, Tensor)]
    return all(t.device.type == "cpu" for t in tensors)


def _graph_key(arguments: tuple[Any, ...], first: int) -> Any:
    """The key of a graph: the arguments' structure, and the shapes of their tensors from dimension ``first`` on."""

    def kind(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return type(leaf), leaf  # True == 1, but a program may distinguish them
        # A graph includes the autocast setting under which it was made.
        return leaf.shape[first:], leaf.dtype, leaf.device, torch.is_autocast_enabled(leaf.device.type)

    leaves, structure = pytree.tree_flatten(arguments)
    return structure, tuple(map(kind, leaves))


def _failure_message(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARIES)]
    reason = str(error).strip().split("\n")[0]
    if reason.startswith("Constraints violated"):
        return (
            "this cannot be compiled, because an operation fixes the number of data: write it for any number, such as "
            "by x.shape[0] or expand, or use compile=False"
        )
    if not frames:
        return f"this cannot be compiled: {reason}"
    frame = frames[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    if line.startswith("raise"):  # an error of the program itself
        return f"{reason} ({type(error).__name__} in {frame.name}, {frame.filename}:{frame.lineno})"
    return (
        f"{frame.filename}:{frame.lineno}, in {frame.name}, cannot be compiled: `{line}`. A compiled program must not "
        f"depend on values: use torch.where, or compile=False ({type(error).__name__}: {reason})"
    )
