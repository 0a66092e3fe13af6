"""One step of a training: the loss of a batch and its gradient, eager or compiled, alone or with other processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from pyro.infer import TraceEnum_ELBO, TraceTailAdaptive_ELBO, config_enumerate
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from dgm_pyro.checks import warn
from dgm_pyro.diagnosis.messages import in_one_line
from dgm_pyro.networks.mlp import networks_in
from dgm_pyro.objectives import at_progress
from dgm_pyro.program import Program
from dgm_pyro.training.compilation import CompilationError, Sums, Terms, check_compilable, export, optimized
from dgm_pyro.training.distributed import ProcessGroup


class PyroObjective:
    """A Pyro ELBO in the place of an objective; it has its own backward pass."""

    def __init__(self, objective: PyroELBO):
        name = type(objective).__name__
        if name.startswith("Jit"):  # its trace fits the size of the first batch only
            plain = name.removeprefix("Jit")
            raise ValueError(
                f"objective {name} works for one batch size only: use {plain}, or dgm.ELBO() and compile=True"
            )
        if isinstance(objective, TraceTailAdaptive_ELBO):
            raise ValueError(f"objective {name} has a gradient but no value, which dgm.fit needs: use pyro.infer.SVI")
        # A used ELBO object keeps the plate nesting of the pair that it was used with.
        self.objective: Any = copy.copy(objective)
        self.objective.max_plate_nesting = math.inf

    def __repr__(self) -> str:
        return f"{type(self.objective).__name__}(num_particles={self.objective.num_particles})"

    def state_dict(self) -> dict[str, Any]:
        """The plate nesting, which the first step determines by a draw."""
        return {"max_plate_nesting": self.objective.max_plate_nesting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.max_plate_nesting = state["max_plate_nesting"]

    def sums(self, program: Program, x: Tensor, given: Any, observed: dict[str, Tensor]) -> Sums:
        """Sums as `Terms` returns them; the gradient is already in the parameters, and the loss has none."""
        model, guide = [poutine.condition(view, data=observed) for view in (program.model, program.guide)]
        guide = poutine.block(guide, hide=list(observed))
        if isinstance(self.objective, TraceEnum_ELBO):
            guide = config_enumerate(guide)
        loss = self.objective.loss_and_grads(model, guide, x, given)
        # Pyro sums over the data. Its gradient is scaled, not the model: RenyiELBO is no bound under poutine.scale.
        for parameter in program.parameters():
            if parameter.grad is not None:
                parameter.grad /= len(x)
        total = torch.as_tensor(loss[0] if isinstance(loss, tuple) else loss, dtype=torch.float64, device=x.device)
        return {"loss": {"": total / len(x)}, "value": {"": -total}, "reconstruction": {}, "kl": {}}


class Step:
    """The loss of a batch and its gradient: eager or compiled, alone or with other processes."""

    def __init__(self, objective: Any, program: Program, precision: str):
        self.program, self.objective, self.precision = program, objective, precision
        self.terms = None if isinstance(objective, PyroObjective) else Terms(program, objective)
        self.loss: Any = None if self.terms is None else _WholeOrPartBatch(self.terms)
        self.prepared = self.compiled = False

    def prepare(
        self,
        batch: Callable[[], Any],
        processes: ProcessGroup,
        compile: bool | str,
        *,
        first: bool,
        parts: int,
        cuda_graphs: bool,
    ) -> None:
        """Compile, and join with the other processes.

        Args:
            batch: a function that makes a whole batch, with random numbers apart from those of the training.
            first: whether no step has been taken yet.
            parts: number of parts in which a process computes its share.
            cuda_graphs: whether the loss and its gradient are replayed as CUDA graphs where possible.

        Raises:
            CompilationError, ValueError: the loss cannot be compiled, and ``compile`` is not "auto".
        """
        self.prepared = True
        if self.terms is None and (compile is True or processes.world_size > 1):
            raise ValueError(
                f"{type(self.objective.objective).__name__} has its own backward pass, which can be neither "
                "compiled nor shared among processes: use an objective of dgm, such as 'elbo'"
            )
        if hasattr(self.objective, "update"):
            if processes.world_size > 1:
                raise ValueError(
                    "an adversarial objective cannot train in several processes, because each would have its own "
                    "critic: use one process"
                )
            if compile is True:
                check_compilable(self.objective)  # raises with the reason
            return
        if self.terms is None or not (compile or processes.world_size > 1):
            return
        device = next(self.program.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            example = batch()
            share = pytree.tree_map_only(Tensor, lambda all: processes.share(all).tensor_split(parts)[0], example)
            if processes.world_size > 1 and first:
                with self._networks_in_precision():  # for layers that initialize from their first batch
                    self.terms(*example, self.terms.weights(0.0))
            if compile:
                try:
                    self.loss.whole = self._compile(self.terms, (*share, self.terms.weights(0.0)), cuda_graphs)
                    self.compiled = True
                except Exception as error:
                    if compile is True:
                        raise
                    warn(f"the training continues uncompiled: {error}")
        if processes.world_size > 1:
            # A graph that is the same at each step is checked once. One that picks rows may leave out parameters.
            static = not hasattr(self.objective, "eager_only")
            # `Training` synchronizes the processes at each epoch. Within an epoch buffers may differ, and a training
            # that is resumed there must keep them.
            self.loss = DistributedDataParallel(
                self.loss, init_sync=False, static_graph=static, find_unused_parameters=not static
            )
            self.loss.broadcast_buffers = False  # once per epoch is enough

    def _compile(self, terms: Terms, example: tuple[Any, ...], cuda_graphs: bool) -> Any:
        check_compilable(self.objective)
        with self._networks_in_precision():  # their precision is part of the graph
            whole = optimized(export(terms, example), cuda_graphs=cuda_graphs)
        before = [buffer.clone() for buffer in self.program.buffers()]
        try:
            whole(*example)["loss"][""].backward()  # compiles both passes now, so that their errors appear here
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise CompilationError(f"the step cannot be compiled: {in_one_line(error)}") from error
        self.program.zero_grad(set_to_none=True)
        for buffer, value in zip(self.program.buffers(), before, strict=True):
            buffer.copy_(value)
        return whole

    def weights(self, elapsed: float) -> dict[str, Tensor]:
        """The values of the objective's schedules when ``elapsed``, from 0 to 1, of training is over."""
        if self.terms is None:
            return {}
        if not self.terms.schedules:
            self.terms.objective = at_progress(self.objective, elapsed)
        return self.terms.weights(elapsed)

    def __call__(
        self, batch: tuple[Any, ...], weights: dict[str, Tensor], weight: float = 1.0, whole: bool = False
    ) -> Sums:
        """Add the gradient to the parameters; return the sums of `Terms`, with the loss as a constant.

        Args:
            weights: the result of the method `weights`.
            weight: weight of the loss in the gradient.
            whole: whether the batch has the size of the batch in `prepare`.
        """
        if self.terms is None:
            with self._networks_in_precision():
                return self.objective.sums(self.program, *batch)
        with self._networks_in_precision():
            sums = self.loss(whole, *batch, weights)
        loss = weight * sums["loss"][""]
        loss.backward()
        return {**sums, "loss": {"": loss.detach()}}

    def _networks_in_precision(self) -> Any:
        return networks_in(torch.bfloat16 if self.precision == "bf16" else None)


class _WholeOrPartBatch(nn.Module):
    """A loss for whole batches, which may be compiled for their size, and one for others, on the same weights."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.whole = self.other = loss

    def forward(self, whole: bool, *arguments: Any) -> Sums:
        return (self.whole if whole else self.other)(*arguments)
