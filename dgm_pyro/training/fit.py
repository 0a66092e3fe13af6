"""Fitting a program to data: stochastic gradient ascent on an objective, reproducible and recoverable."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import pyro
import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor, nn
from torch.distributions import constraints
from tqdm import tqdm

from dgm_pyro.checks import check_path, check_type, suggesting, warn
from dgm_pyro.data import Batches, Data
from dgm_pyro.evaluation import as_data, evaluating, find_device
from dgm_pyro.families.columns import Columns
from dgm_pyro.families.missing import observed_part
from dgm_pyro.families.standardized import core_of
from dgm_pyro.files import only_writer
from dgm_pyro.networks import ActNorm, Codebook, Standardize
from dgm_pyro.networks.mlp import products_in
from dgm_pyro.objectives import ELBO, Objective, VariationalBound, at_progress, chosen
from dgm_pyro.program import Program, alone, check_program, differentiating, seeded
from dgm_pyro.training import adversarial as adversarial  # which adds the names of its objectives
from dgm_pyro.training.compilation import Sums, why_eager
from dgm_pyro.training.cuda_graph import (
    RECORDING_DEVICES,
    CudaGraph,
    is_fused_adam,
    make_capturable,
    portable,
    set_lr,
    undo_capturable,
)
from dgm_pyro.training.distributed import ProcessGroup, process_group
from dgm_pyro.training.optimizers import OptimizerFactory, SchedulerFactory, optimizer_of, scheduler_of
from dgm_pyro.training.options import TrainingOptions, changes, documented
from dgm_pyro.training.states import States
from dgm_pyro.training.step import PyroObjective, Step

__all__ = ["Epoch", "History", "NonFiniteLossError", "Tracker", "Training", "fit"]

# compile="auto": the number of steps from which compiling saves more time than it takes, with a warm compiler cache.
COMPILE_FROM = 5_000
# On devices other than the CPU, the number of steps between checks for non-finite values, which wait for the device.
WATCH_EVERY = 50
# `fit` warns of a feature whose mean is this many standard deviations from 0, or whose spread is this large.
FAR, WIDE = 100, 1000


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient became NaN or infinite.

    Attributes:
        site: the sample site, or the parameter, where it appeared first.
        epoch, step: epoch and step, from 1; steps count over the whole run.
        restored_epoch: the epoch whose weights the program now has; 0 for its initial weights.
    """

    def __init__(self, what: str, site: str, epoch: int, step: int, restored_epoch: int):
        self.site, self.epoch, self.step, self.restored_epoch = site, epoch, step, restored_epoch
        state = f"epoch {restored_epoch}" if restored_epoch else "before training"
        super().__init__(
            f"{what} at site {site!r}, epoch {epoch}, step {step}; the program has the weights of {state} again: "
            "lower lr, standardize the data if they are large, or check the site"
        )


@dataclass
class Epoch:
    """One pass over the data, or the steps between two validations; losses are negative bounds in nats per datum.

    ``reconstruction`` and ``kl`` hold the mean terms per site; ``validation`` is the loss on the validation data.
    """

    epoch: int
    loss: float
    reconstruction: dict[str, float]
    kl: dict[str, float]
    validation: float | None
    seconds: float


@dataclass
class History:
    """The record of a training by `fit`.

    Attributes:
        epochs: the `Epoch` of each epoch.
        best_epoch: the epoch whose weights the program has now.
        seconds: wall-clock time of the training.
        stopped_early: whether ``early_stopping`` ended the training.
        out_of_time: whether ``minutes`` ended the training.
        compiled: whether its steps were compiled.
        cuda_graph: whether each step was launched as one CUDA graph.
        skipped: number of steps that ``skip_norm`` left out.
        unit: unit of the losses: nats per datum, unless the objective is neither a likelihood nor a bound on one.
        validation_unit: unit of the validation losses, for which games use another objective.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0
    stopped_early: bool = False
    out_of_time: bool = False
    compiled: bool = False
    cuda_graph: bool = False
    skipped: int = 0
    unit: str = "nats per datum"
    validation_unit: str = "nats per datum"

    @property
    def best_loss(self) -> float:
        """The lowest validation loss so far, in `validation_unit`; infinite where there is none."""
        return min((each.validation for each in self.epochs if each.validation is not None), default=math.inf)

    @property
    def losses(self) -> list[float]:
        """Training loss per epoch, in `unit`."""
        return [epoch.loss for epoch in self.epochs]

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> History:
        """The history from the result of `as_dict`."""
        return cls(**{**content, "epochs": [Epoch(**each) for each in content["epochs"]]})


class Tracker(Protocol):
    """Receives the events of a training, in process 0: to write a log, draw curves or call a service."""

    def on_start(self, training: Training) -> None:
        """Called before the first step, also of a resumed training: ``training.history`` has the epochs so far."""

    def on_epoch(self, epoch: Epoch) -> None:
        """Called after each epoch."""

    def on_end(self, history: History) -> None:
        """Called when the training has ended, also by an error or an interrupt."""


class Training:
    """A training that can be advanced epoch by epoch, stored and resumed: `dgm.fit` is a loop over it.

    Its arguments and its `state_dict` determine the remaining steps, bit for bit on a CPU, if the program keeps its
    state in parameters and buffers, and if objective and ``augment`` draw random numbers from torch alone.

    Args:
        program: the program to train, in place; it moves to the device.
        data: as for `dgm.fit`.
        objective: as for `dgm.fit`.
        options: training options.
        validation: validation data, instead of the fraction in the options.
        augment: a function that is applied to each training batch of x.
        optimizer, lr_schedule: functions from parameters to a torch optimizer, and from an optimizer to a scheduler,
            instead of those in the options.

    Attributes:
        history: the history of the epochs so far.
        taken: number of steps so far.
        finished: whether all steps have been taken, or early stopping or the time limit has ended the training.

    Raises:
        ValueError, TypeError: an argument does not fit; nothing has been changed.

    The training is a context. When it is left, even by an error, the program has the best weights and is in evaluation
    mode:

    >>> import torch, dgm_pyro as dgm
    >>> options = dgm.TrainingOptions(epochs=4, validation=None)
    >>> program = dgm.Normal(2, learned=True)
    >>> with dgm.Training(program, torch.ones(64, 2), options=options) as training:
    ...     for _ in range(2):
    ...         epoch = training.advance()
    ...     state = training.state_dict()  # torch.save writes it, and torch.load(weights_only=True) reads it
    >>> again = dgm.Training(dgm.Normal(2, learned=True), torch.ones(64, 2), options=options)
    >>> again.load_state_dict(state)
    >>> with again:
    ...     while not again.finished:
    ...         epoch = again.advance()
    >>> len(again.history.epochs)
    4
    """

    def __init__(
        self,
        program: Program,
        data: Data | Tensor,
        objective: Objective | PyroELBO | str | None = None,
        options: TrainingOptions | None = None,
        *,
        validation: Data | Tensor | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_schedule: SchedulerFactory | None = None,
    ):
        check_program(program)
        check_type(options, TrainingOptions | None, "options", "a dgm.TrainingOptions or None")
        for name, function in (("augment", augment), ("optimizer", optimizer), ("lr_schedule", lr_schedule)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function or None, got {type(function).__name__}")
        options = options or TrainingOptions()
        train = as_data(program, data, missing=True)
        _check_scale(program, train.excerpt)
        if train.excerpt.mask is not None and not train.excerpt.mask.any():
            raise ValueError(f"every value of {train.name} is missing: there is nothing to learn from")
        maximize: Any = PyroObjective(objective) if isinstance(objective, PyroELBO) else chosen(objective)
        held_out = None if validation is None else as_data(program, validation, "validation", missing=True)
        if held_out is None and options.validation is not None:
            train, held_out = _split_validation(train, options.validation, options.seed)
        incomplete = next((part for part in (train, held_out) if part is not None and part.misses), train)
        if incomplete.misses and hasattr(maximize, "unit"):
            raise ValueError(
                f"{incomplete.name} misses features, but {maximize} needs complete rows: use a bound such as 'iwae'"
            )
        for part in (train, held_out):
            _check_labels(program, None if part is None else part.excerpt, maximize)
        if options.early_stopping is not None and held_out is None:
            raise ValueError("early_stopping needs validation data: pass validation=0.1, or a Data")
        self.device = find_device(options.device)
        trainable = {name: p for name, p in program.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(f"this {type(program).__name__} has no parameters that require a gradient")
        if options.accumulate > 1 and (isinstance(maximize, PyroObjective) or hasattr(maximize, "update")):
            raise ValueError(f"accumulate must be 1 for {maximize!r}, which takes its own steps")
        self.processes = process_group()
        self.steps_per_epoch = self.processes.batches(len(train), options.batch_size, options.drop_last)
        self.steps = options.gradient_steps or options.epochs * self.steps_per_epoch
        self.optimizer = optimizer_of(options, trainable.values(), optimizer)
        # What the optimizer updates: some of the program's parameters, and perhaps others, such as an objective's.
        names = {id(p): name for name, p in trainable.items()}
        updated = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.parameters = {names.get(id(p), f"parameter {i} of the optimizer"): p for i, p in enumerate(updated)}
        if not self.parameters.keys() & trainable.keys():
            raise ValueError(
                f"optimizer updates no parameter of this {type(program).__name__}: make it of the parameters that the "
                "function is given"
            )
        self.others = sorted(self.parameters.keys() - trainable.keys())
        if self.others and options.compile is True:
            raise ValueError(
                "a compiled step has no gradient for what is no parameter of the program, but the optimizer updates "
                f"{', '.join(self.others)}: make these parameters of the program, or use compile=False"
            )
        if self.others and self.processes.world_size > 1:
            raise ValueError(
                "several processes average the gradients of the program's parameters alone, but the optimizer updates "
                f"{', '.join(self.others)}: make these parameters of the program, or train in one process"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = float(group["lr"])  # it may be the caller's tensor
        self.lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.scheduler = scheduler_of(options, self.optimizer, lr_schedule)
        # The step of a whole batch as one CUDA graph, once there is one.
        self.graph: CudaGraph | None = None

        self.program, self.objective, self.options, self.augment = program, maximize, options, augment
        program.to(self.device)
        if options.precision == "bf16" and self.device.type == "cpu":
            _check_bf16()
            # Their convolutions in bf16 are faster in this layout: benchmarks/precision.py.
            for module in program.modules():
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.processes.agree([*program.parameters(), *program.buffers()])
        self.data = train.to(self.device)
        # The program that scores batches: the program itself, or `Observed`.
        self.scored = observed_part(program, incomplete)
        self.held_out = held_out
        self.average = None if options.ema is None else _Average(program, options.ema)
        self.step = Step(maximize, self.scored, options.precision)
        # Also what the optimizer does not update: its gradients would add up.
        self._differentiated = [*{id(p): p for p in (*program.parameters(), *self.parameters.values())}.values()]
        self.watch = _FirstNonFinite(program.variable, self.parameters, self.device)
        self.codebooks = [module for module in program.modules() if isinstance(module, Codebook)]
        self._forget_encodings()  # left by a training that ended in an error
        self.shuffling = torch.Generator().manual_seed(options.seed)
        unit = getattr(maximize, "unit", History.unit)
        judged_by = getattr(getattr(maximize, "validation", maximize), "unit", History.unit)
        self.history = History(unit=unit, validation_unit=judged_by)
        # The weights of the best and of the last epoch, as they were validated; at first, the initial weights.
        self.best = self.last = _cloned_state(program)
        made = {"the objective": maximize, "the optimizer": optimizer, "the scheduler": lr_schedule}
        self._recipe = {
            **options.recipe(),
            **{name: re.sub(r" at 0x[0-9a-f]+", "", repr(thing)) for name, thing in made.items()},
            "the number of training data": len(train),
        }
        self.taken = 0
        self._totals = _Totals()
        self._batches: Batches = ()
        self._order = self.shuffling.get_state()  # the state from which the order of the epoch was drawn
        self._between_steps = True
        self._random: dict[str, Tensor] = {}
        self._store: Any = {"params": {}, "constraints": {}}
        with self._own_random_state():
            if hasattr(maximize, "prepare"):
                maximize.prepare(program)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        # Also after an interrupt, the best weights are kept.
        self._between_steps, self.graph = False, None  # which holds much of the device's memory
        self.program.load_state_dict(self.last if isinstance(error, NonFiniteLossError) else self.best)
        self.program.eval()
        if self.scheduler is None:  # the optimizer may be the caller's
            undo_capturable(self.optimizer)
            for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
                group["lr"] = lr

    @property
    def finished(self) -> bool:
        return self.taken >= self.steps or self.history.stopped_early or self.history.out_of_time

    def advance(self, pause: Callable[[], bool] | None = None) -> Epoch | None:
        """Train for an epoch or ``validate_every`` steps, validate, and keep the weights if they are the best.

        Args:
            pause: called after every step (every 50 in several processes). If it returns true, the epoch is paused:
                `state_dict` may be called, and the next call of `advance` continues the epoch.

        Returns:
            The epoch; None if it was paused.

        Raises:
            RuntimeError: the training is finished, a step was interrupted, or the context has been left.
            NonFiniteLossError: the loss or a gradient is not finite; the message names site and step. When the context
                is left, the program gets its last good weights.
            CompilationError: the options have ``compile=True``, and a statement of the program cannot be compiled.
        """
        self._require_between_steps()
        if self.finished:
            raise RuntimeError(f"the training is finished after {self.taken} steps: make a Training with more epochs")
        self._between_steps = False
        start, history = time.perf_counter(), self.history
        number, before, patience = len(history.epochs) + 1, history.seconds, self.options.early_stopping
        loss = None
        with self._own_random_state():
            with products_in("tf32") if self.options.precision == "tf32" else contextlib.nullcontext():
                paused = self._train(number, pause or (lambda: False), start)
            if not paused:
                self.processes.agree(self.program.buffers())  # running means have seen other data in each process
                with contextlib.nullcontext() if self.average is None else self.average.swapped_in():
                    loss = None if self.held_out is None else self._validate(number)
                    self.last = _cloned_state(self.program)
        history.seconds = before + time.perf_counter() - start
        if not paused:
            if loss is None or loss < history.best_loss:
                self.best, history.best_epoch = self.last, number
            history.epochs.append(self._totals.epoch(number, loss, history.seconds, self.processes))
            history.stopped_early = patience is not None and number - history.best_epoch >= patience
            self._totals = _Totals()
        self._between_steps = True
        return None if paused else history.epochs[-1]

    def state_dict(self) -> dict[str, Any]:
        """The state of the training, as tensors and plain Python; call it between two calls of `advance`.

        As usual in torch, its tensors are those of the training: store or copy them before the training advances. If
        several processes train together, each has its own state.

        Raises:
            RuntimeError: a step was interrupted, or the context has been left.
        """
        self._require_between_steps()
        return self._local_state()

    def _local_state(self) -> dict[str, Any]:
        return {
            "recipe": self._recipe | {"the digest of the data": self._digest},
            "taken": self.taken,
            "totals": self._totals.state_dict(),
            "program": self.program.state_dict(),
            "best": self.best,
            "optimizer": portable(self.optimizer.state_dict()),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "objective": self.objective.state_dict() if hasattr(self.objective, "state_dict") else None,
            "order": self._order if self.taken % self.steps_per_epoch else self.shuffling.get_state(),
            "random": self._random,
            "params": self._params(),
            "history": self.history.as_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the ``state`` of a training; the device may differ.

        Raises:
            ValueError: that training had other options, another objective, other data or other weights; or a part of
                its state is missing. Nothing has been changed.
        """
        check_type(state, dict, "state", "a dict from state_dict")
        own = self._local_state()
        missing = [part for part in own if part not in state]
        if missing:
            raise ValueError(f"state has no {', '.join(map(repr, missing))}: pass the result of state_dict()")
        changed = changes(state["recipe"], own["recipe"])
        if changed:
            raise ValueError(
                f"state belongs to another training ({'; '.join(changed)}): make this one with the same arguments"
            )
        for part in ("program", "best"):
            changed = changes(_dtypes_and_shapes(state[part]), _dtypes_and_shapes(self.last)) or sorted(
                state[part].keys() - self.last.keys()
            )
            if changed:
                raise ValueError(
                    f"state belongs to another program (in {part!r}, {'; '.join(changed)}): build the same program"
                )
        sizes = [[len(group["params"]) for group in each["optimizer"]["param_groups"]] for each in (state, own)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"state belongs to an optimizer with groups of {sizes[0]} parameters, but this one has groups of "
                f"{sizes[1]}: make the same optimizer"
            )
        state = copy.deepcopy(state)  # two trainings must not share its tensors
        self.program.load_state_dict(state["program"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.graph = None  # the optimizer has other tensors now
        if self.step.prepared and self._why_not_recorded() is None:
            self._make_graph()
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.taken = state["taken"]
        self._totals = _Totals(**state["totals"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if state["objective"] is not None:
            self.objective.load_state_dict(state["objective"])
        self._order, self._batches = state["order"].cpu(), ()
        self.shuffling.set_state(self._order)
        self._random = state["random"]
        self._store = {"params": state["params"], "constraints": dict.fromkeys(state["params"], constraints.real)}
        self.history = History.from_dict(state["history"])
        with contextlib.nullcontext() if self.average is None else self.average.swapped_in():
            self.last = _cloned_state(self.program)
        self._between_steps = True

    def _require_between_steps(self) -> None:
        if not self._between_steps:
            raise RuntimeError(
                "the training is not between two steps: a step was interrupted, or the training's context was left; "
                "load an earlier state"
            )

    @functools.cached_property
    def _digest(self) -> str:
        """A hash of the training and validation data, so that a state with other data of the same size is refused."""
        return "-".join(part.digest for part in (self.data, self.held_out) if part is not None)

    def _params(self) -> dict[str, Tensor]:
        """Tensors that Pyro added to the param store: its moving averages of costs."""
        own, kinds = {*map(id, self.program.parameters())}, self._store["constraints"]
        return {
            name: value
            for name, value in self._store["params"].items()
            if id(value) not in own and kinds[name] is constraints.real
        }

    @contextlib.contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Swap in the training's own random state and param store, and turn Pyro's validation off."""
        with (
            differentiating("a training"),
            seeded(self.options.seed + self.processes.rank, self.device),
            pyro.validation_enabled(False),
            pyro.get_param_store().scope(self._store),
        ):
            on_cuda = self.device.type == "cuda"
            if "cpu" in self._random:
                torch.default_generator.set_state(self._random["cpu"].cpu())
            if on_cuda and "cuda" in self._random:
                torch.cuda.set_rng_state(self._random["cuda"].cpu(), self.device)
            yield
            self._random = {"cpu": torch.default_generator.get_state()}
            if on_cuda:
                self._random["cuda"] = torch.cuda.get_rng_state(self.device)

    def _train(self, epoch: int, pause: Callable[[], bool], start: float) -> bool:
        """Take the remaining steps of an epoch; return whether it was paused before its end."""
        options, processes = self.options, self.processes
        watch, paused = self.watch, False
        watch.start(self.taken)
        self.program.train()
        end = min(epoch * (options.validate_every or self.steps_per_epoch), self.steps)
        while self.taken < end and not paused and not self.history.out_of_time:
            step, rows = self.taken + 1, self._next_rows()
            # In one process the first step is not compiled, because some layers initialize from their first batch.
            if not self.step.prepared and (step > 1 or processes.world_size > 1):
                self._prepare_step(rows, first=step == 1)
            if self.scheduler is None:
                for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
                    set_lr(group, lr * self._lr_factor(step))
            if self.graph is not None and len(rows) == options.batch_size:
                sums = self.graph(self._batch_arguments(rows), self.step.weights(self._elapsed(step)))
                self._note_graph()
                skipped = False
            else:
                self._forget_gradients()
                sums = self._gradient(step, rows)
                norm = self._norm(sums)
                skipped = options.skip_norm is not None and bool(norm > options.skip_norm)
                if not skipped:
                    self._update(norm)
            if self.device.type == "cpu" or step % WATCH_EVERY == 0 or step == end:
                watch.check(epoch, processes)
            if skipped:
                self.history.skipped += 1
                self._forget_encodings()
            else:
                self._move_codebooks()
            if self.scheduler is not None:
                self.scheduler.step()
            if self.average is not None:
                self.average.update()
            self._totals.add(len(rows), sums)
            self.taken = step
            if processes.world_size == 1 or step % WATCH_EVERY == 0 or step == end:
                late = options.minutes is not None and self._seconds_since(start) >= 60 * options.minutes
                paused, self.history.out_of_time = processes.any(pause() and step < end, late, device=self.device)
        watch.check(epoch, processes)
        return paused and not self.history.out_of_time

    def _prepare_step(self, rows: Tensor, *, first: bool) -> None:
        """Compile the step, join with the other processes, and prepare its recording."""
        options = self.options
        compiling = options.compile is True or (self.steps >= COMPILE_FROM and options.compile)
        why_not = self._why_not_recorded()
        whole = rows if len(rows) == options.batch_size else self._batches[0]
        self.step.prepare(
            functools.partial(self._batch_arguments, whole),
            self.processes,
            False if self.others else compiling,
            first=first,
            parts=options.accumulate,
            # Inductor's own CUDA graphs are untested with the hooks of several processes.
            cuda_graphs=why_not is not None and self.processes.world_size == 1,
        )
        self.history.compiled, self.history.cuda_graph = self.step.compiled, False
        self._forget_encodings()  # the example batch was no step
        if why_not is None:
            self._make_graph()
        elif self.device.type in RECORDING_DEVICES and options.compile is True:
            warn(f"the step is no CUDA graph: {why_not}")

    def _make_graph(self) -> None:
        make_capturable(self.optimizer, self.device)
        self.graph = CudaGraph(self._whole_step)

    def _why_not_recorded(self) -> str | None:
        """Why a step cannot be a graph of device operations, as far as is known before the first step."""
        options, objective = self.options, self.objective
        ours = type(objective).__module__.startswith("dgm_pyro.") or is_dataclass(objective)
        reasons = {
            "it is not on a CUDA device": self.device.type not in RECORDING_DEVICES,
            "compile is False": options.compile is False,
            "several processes train": self.processes.world_size > 1,
            "accumulate is more than 1": options.accumulate > 1,
            "skip_norm looks at the gradient": options.skip_norm is not None,
            "the scheduler is torch's": self.scheduler is not None,
            "the objective is Pyro's": self.step.terms is None,
            "a codebook follows its data outside of the gradient": bool(self.codebooks),
            "the optimizer is no fused Adam or AdamW": not is_fused_adam(self.optimizer),
            "the objective is your own, and may count its calls: try compile=True": not ours
            and options.compile is not True,
        }
        for reason, holds in reasons.items():
            if holds:
                return reason
        eager = why_eager(objective)
        return None if eager is None else f"the objective {eager}"

    def _whole_step(self, batch: tuple[Any, ...], weights: dict[str, Tensor]) -> Sums:
        """Loss, gradient and update of a whole batch."""
        self._forget_gradients()
        sums = self.step(batch, weights, whole=True)
        self._update(self._norm(sums))
        return sums

    def _note_graph(self) -> None:
        assert self.graph is not None
        self.history.cuda_graph = self.graph.recorded
        if self.graph.refused is not None:
            if self.options.compile is True:
                warn(f"the step is no CUDA graph: {self.graph.refused}")
            self.graph = None

    def _forget_gradients(self) -> None:
        for p in self._differentiated:
            p.grad = None

    def _norm(self, sums: Sums) -> Tensor:
        """The norm of the gradient; watch it, those of the parameters, and the sums."""
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norms = torch._foreach_norm([*gradients.values()]) if gradients else ()
        total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self.device)
        named = dict(zip(gradients, norms, strict=True)) | {"": total}
        self.watch.see(sums, named, on_host=self._reads_values)
        return total

    def _update(self, norm: Tensor) -> None:
        """Take a step of the optimizer by the gradient of this norm, scaled down to the largest norm."""
        optimizer: Any = self.optimizer
        largest = self.options.clip_norm
        if largest is None or (self._reads_values and bool(norm + 1e-6 <= largest)):
            optimizer.step()
            return
        excess = ((norm + 1e-6) / largest).clamp(min=1)
        if is_fused_adam(optimizer) and excess.dtype == torch.float32:
            optimizer.grad_scale = excess  # which divides each gradient in the pass that reads it
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale  # the optimizer may be the caller's
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if gradients:
            torch._foreach_div_(gradients, excess)
        optimizer.step()

    @property
    def _reads_values(self) -> bool:
        """Whether reading the value of a tensor costs nothing, as on a CPU outside of a recorded step."""
        return self.device.type == "cpu" and self.graph is None

    def _elapsed(self, step: int) -> float:
        """The share of training that is over before ``step``, from 0 to 1."""
        return (step - 1) / max(1, self.steps - 1)

    def _seconds_since(self, start: float) -> float:
        return self.history.seconds + time.perf_counter() - start

    def _next_rows(self) -> Tensor:
        """The data of the next step."""
        place = self.taken % self.steps_per_epoch
        if place == 0:
            self._order = self.shuffling.get_state()
        if place == 0 or not self._batches:
            self._batches = self.data.shuffled(self.options.batch_size, self.shuffling, self.processes.share)
        return self._batches[place]

    def _gradient(self, step: int, rows: Tensor) -> Sums:
        """Add the gradient of a batch to the parameters; return its sums."""
        options, processes = self.options, self.processes
        share = processes.share(rows)
        parts = share.tensor_split(min(options.accumulate, len(share)))
        weights, whole = self.step.weights(self._elapsed(step)), len(rows) == options.batch_size
        found = []
        for part in parts:
            batch, weight = self._batch_arguments(part), len(part) / len(share)
            if hasattr(self.objective, "update"):
                self.objective.update(self.program, *batch[:2], self.optimizer.param_groups[0]["lr"])
            alike = whole and len(part) == len(parts[0])
            found.append(self.step(batch, weights, processes.weight(rows) * weight, alike))
        if len(found) == 1:
            return found[0]
        return {
            kind: {site: torch.stack([each[kind][site] for each in found]).sum(0) for site in terms}
            for kind, terms in found[0].items()
        }

    def _move_codebooks(self) -> None:
        """Update the codebooks by the encodings of all processes in this step."""
        for codebook in self.codebooks:
            self.processes.total(codebook.seen)
            self.processes.agree([codebook.fresh])
            codebook.follow()

    def _forget_encodings(self) -> None:
        for codebook in self.codebooks:
            codebook.forget()

    def _lr_factor(self, step: int) -> float:
        """The learning rate of a step as a share of ``lr``, with warm-up and schedule."""
        falls = self.options.lr_schedule == "cosine"
        falling = 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps)) if falls else 1.0
        return min(1.0, step / max(1, self.steps // 50)) * falling

    def _batch_arguments(self, rows: Tensor) -> tuple[Tensor, Any, dict[str, Tensor]]:
        batch = self.data[rows]
        return self.scored.arguments(batch if self.augment is None else batch.replaced(x=self.augment(batch.x)))

    def _validate(self, epoch: int) -> float:
        """The validation loss, with the same draws each time, so that epochs are comparable.

        The batches are distributed over the processes, and each process has its own draws. For a Pyro objective, whose
        loss has its own backward pass, it is the plain ELBO.
        """
        program, processes, data = self.scored, self.processes, self.held_out
        assert data is not None
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        objective = at_progress(getattr(self.objective, "validation", self.objective), 1.0)
        if isinstance(objective, PyroObjective):
            objective = ELBO()
        # Larger batches than in training, because no graph is kept; but particles take as much memory as data.
        draws = getattr(objective, "num_particles", getattr(objective, "num_samples", 1))
        size = max(self.options.batch_size, 4 * self.options.batch_size // draws)
        starts = range(0, len(data), size)[processes.rank :: processes.world_size]
        with evaluating(program), seeded(self.options.seed + processes.rank, self.device), torch.no_grad():
            for batch in data.taken(slice(start, start + size) for start in starts):
                value, given, observed = program.arguments(batch.to(self.device))
                total -= objective(program, value, given, observed).value.double().sum()
        summed = processes.total(total).item()  # the only wait for the device
        if not math.isfinite(summed):
            raise NonFiniteLossError(
                "the validation loss is not finite", program.variable, epoch, self.taken, epoch - 1
            )
        return summed / len(data)


@documented
@suggesting
@alone()
@differentiating("fit")
def fit(
    program: Program,
    data: Data | Tensor,
    objective: Objective | PyroELBO | str | None = None,
    *,
    epochs: int = 50,
    gradient_steps: int | None = None,
    minutes: float | None = None,
    batch_size: int = 64,
    accumulate: int = 1,
    drop_last: bool = False,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    lr_schedule: str | SchedulerFactory = "cosine",
    optimizer: str | OptimizerFactory = "AdamW",
    clip_norm: float | None = 10.0,
    skip_norm: float | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    validation: Data | Tensor | float | None = 0.1,
    validate_every: int | None = None,
    early_stopping: int | None = None,
    ema: float | None = None,
    compile: bool | str = "auto",
    checkpoint_minutes: float = 5.0,
    precision: str = "float32",
    augment: Callable[[Tensor], Tensor] | None = None,
    resume: str | os.PathLike[str] | States | Mapping[str, Any] | None = None,
    trackers: Sequence[Tracker] = (),
    progress: bool = True,
) -> History:
    """Train ``program`` in place, on minibatches; the weights with the best validation loss are kept.

    A last batch of one datum is left out, because BatchNorm cannot compute its scale; after shuffling it is another
    datum in each epoch. If ``validation`` is None, the last weights are kept. Compilation takes tens of seconds, makes
    each step faster, and does not change the random numbers; see `dgm.compile`. "auto" compiles trainings of 5,000
    steps or more, and continues uncompiled, with a warning, where a program cannot be compiled. On a GPU a step is also
    recorded and replayed as one CUDA graph, which runs no Python; ``compile=False`` turns this off.

    For data that miss features (`Data.mask`), the observed part is fitted; "iwae" for a VAE is then the MIWAE bound.

    Args:
        program: the program to train; it ends in evaluation mode.
        data: a `Data`, or a tensor ``(N, *event_shape)``.
        objective: an objective of dgm_pyro, its name ("iwae", or "iwae:50" with its argument), or an instance of a Pyro
            ELBO; default `ELBO`.
        {options}
        augment: a function that is applied to each training batch of x.
        resume: a folder, in which the state of the training is stored every ``checkpoint_minutes``, at its best epochs,
            at its end, and before SIGINT or SIGTERM ends it. If the folder has a state, the training continues from it,
            and ends with the same bits as without the interruption (on a CPU). Or the result of `Training.state_dict`.
        trackers: objects that receive the events of the training; see `Tracker`.
        progress: whether to show a bar with the loss.

    `TrainingOptions` describes the other arguments. ``validation`` may also be the validation data. ``optimizer`` may
    also be a function from parameters to a torch optimizer, and ``lr_schedule`` a function from the optimizer to a
    torch scheduler, which takes a step after each step of the training.

    Returns:
        The `History`.

    Warns:
        UserWarning: a real feature has a mean more than a hundred standard deviations from 0, or a standard deviation
            above a thousand, and neither a `Standardized` nor an `ActNorm` rescales it; or the processor is slow in
            ``precision="bf16"``.

    Raises:
        NonFiniteLossError: the loss or a gradient is not finite; the message names site and step. The last good weights
            are restored.
        ValueError, TypeError: an argument does not fit; nothing has been changed.
        CompilationError: ``compile`` is True, and a statement of the program cannot be compiled.
        CheckpointError: the state in the folder is damaged.
        BlockingIOError: another process trains in the folder.
        KeyboardInterrupt: an interrupt arrived; the program has the best weights so far, and is in evaluation mode.
    """
    for name, made in (("optimizer", optimizer), ("lr_schedule", lr_schedule)):
        if not isinstance(made, str) and not callable(made):
            raise TypeError(f"{name} must be a name or a function that makes one, got {made!r}")
    check_type(trackers, Sequence, "trackers", "a sequence of trackers")
    for tracker in trackers:
        if not all(hasattr(tracker, name) for name in ("on_start", "on_epoch", "on_end")):
            raise TypeError(f"trackers must have on_start, on_epoch and on_end, got {type(tracker).__name__}")
    held_out = None if validation is None or isinstance(validation, float) else validation
    options = TrainingOptions(
        epochs=epochs, gradient_steps=gradient_steps, minutes=minutes, batch_size=batch_size, accumulate=accumulate,
        drop_last=drop_last,
        lr=lr, weight_decay=weight_decay, lr_schedule=lr_schedule if isinstance(lr_schedule, str) else "constant",
        optimizer=optimizer if isinstance(optimizer, str) else "AdamW", clip_norm=clip_norm,
        skip_norm=skip_norm, seed=seed,
        device=str(device) if isinstance(device, torch.device) else device,
        validation=validation if isinstance(validation, float) else None, validate_every=validate_every,
        early_stopping=early_stopping, ema=ema, compile=compile, checkpoint_minutes=checkpoint_minutes,
        precision=precision,
    )  # fmt: skip
    training = Training(
        program,
        data,
        objective,
        options,
        validation=held_out,
        augment=augment,
        optimizer=None if isinstance(optimizer, str) else optimizer,
        lr_schedule=None if isinstance(lr_schedule, str) else lr_schedule,
    )
    with contextlib.ExitStack() as stack:
        states = _resume_states(training, resume, stack)
        stack.enter_context(training)
        if states is not None:
            stack.enter_context(states.of(training))
        _run_epochs(training, states, trackers if training.processes.writes else (), progress)
    return training.history


def _resume_states(training: Training, resume: Any, stack: contextlib.ExitStack) -> States | None:
    """Continue from the state that ``resume`` names; return the `States` of a folder, to store further states in."""
    if resume is None:
        return None
    if isinstance(resume, Mapping):
        training.load_state_dict(dict(resume))
        return None
    states = resume
    if not isinstance(resume, States):
        check_path(resume, "resume")
        states = States(Path(resume))
        if training.processes.writes:
            stack.enter_context(only_writer(states.folder))
        training.processes.wait()
    state = states.read()
    if state is not None:
        training.load_state_dict(state)
    return states


def _run_epochs(training: Training, states: States | None, trackers: Sequence[Tracker], progress: bool) -> None:
    """Train for all remaining epochs."""
    options, done = training.options, training.taken
    unit, total = ("epoch", options.epochs) if options.gradient_steps is None else ("step", training.steps)
    if options.validate_every is not None:
        unit, total = "step", training.steps
    with tqdm(
        total=total,
        initial=len(training.history.epochs) if unit == "epoch" else done,
        desc=f"fit {type(core_of(training.program)).__name__}",
        unit=unit,
        disable=not (progress and training.processes.writes),
    ) as bar:
        try:
            for tracker in trackers:
                tracker.on_start(training)
            while not training.finished:
                epoch = training.advance(None if states is None else states.pause)
                if epoch is not None:
                    bar.set_postfix_str(_epoch_line(training.history), refresh=False)
                    bar.update(1 if unit == "epoch" else training.taken - done)
                    done = training.taken
                    for tracker in trackers:
                        tracker.on_epoch(epoch)
                if states is not None:
                    states.look(epoch)
        finally:
            for tracker in trackers:
                tracker.on_end(training.history)


class _FirstNonFinite:
    """Records on the device the first step whose loss or gradient was not finite, and these values."""

    def __init__(self, variable: str, names: Iterable[str], device: torch.device):
        self.variable, self.names = variable, [*names, ""]
        self.sites: list[str] = []
        self.values: Tensor | None = None
        self.now, self.step = torch.zeros(2, dtype=torch.long, device=device)

    def start(self, taken: int) -> None:
        """Reset, after ``taken`` steps."""
        self.now.fill_(taken)
        self.step.zero_()

    def see(self, sums: Sums, norms: dict[str, Tensor], *, on_host: bool) -> None:
        """Check one more step. Its tensors are updated in place, because a CUDA graph writes to them.

        Args:
            on_host: whether it costs nothing to read a value now. Without that, every step is recorded on the device.
        """
        self.now += 1
        total = norms[""]
        # The first step is always recorded, because all processes report values when a step of one was not finite.
        if on_host and self.values is not None and bool((total + sums["value"][""] + sums["loss"][""]).isfinite()):
            return
        terms = {**sums["reconstruction"], **sums["kl"]}
        self.sites = [*terms]
        losses = torch.stack([*terms.values(), sums["value"][""], sums["loss"][""].detach().double()])
        none = torch.zeros_like(total)  # the norm of a parameter without a gradient
        values = torch.cat([losses, torch.stack([norms.get(name, none) for name in self.names]).double()])
        if self.values is None:
            self.values = torch.zeros_like(values)
        found = self.step > 0
        self.values.copy_(torch.where(found, self.values, values))
        self.step.copy_(torch.where(found | torch.isfinite(values).all(), self.step, self.now))

    def check(self, epoch: int, processes: ProcessGroup) -> None:
        """Raise a `NonFiniteLossError` if a step was not finite; in every process, or the others would wait."""
        step = processes.earliest(self.step)
        if step == 0 or self.values is None:
            return
        values = processes.total(self.values).tolist()  # not finite if the value of any process is not
        losses, norms = values[: len(self.sites) + 2], values[len(self.sites) + 2 :]
        if not all(map(math.isfinite, losses)):
            broken = [site for site, value in zip(self.sites, losses, strict=False) if not math.isfinite(value)]
            what, site = "the loss is not finite", (broken or [self.variable])[0]
        else:
            what = "the gradient is not finite"
            site = max(
                zip(self.names, norms, strict=True), key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1]
            )[0]
        raise NonFiniteLossError(what, site, epoch, int(step), epoch - 1)


class _Totals:
    """Sums over an epoch, on the device; only the end of the epoch waits for them."""

    def __init__(self, count: int = 0, keys: Iterable[Sequence[str]] = (), sums: Sequence[Tensor] = ()):
        self.count = count
        self.keys = [(kind, site) for kind, site in keys]
        self.sums = [*sums]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "keys": [[*key] for key in self.keys], "sums": self.sums}

    def add(self, count: int, sums: Sums) -> None:
        self.count += count
        terms = {(kind, site): term for kind in ("value", "reconstruction", "kl") for site, term in sums[kind].items()}
        if not self.sums:
            self.keys, self.sums = [*terms], [term.clone() for term in terms.values()]
        else:
            torch._foreach_add_(self.sums, [*terms.values()])

    def epoch(self, epoch: int, validation: float | None, seconds: float, processes: ProcessGroup) -> Epoch:
        totals = processes.total(torch.stack(self.sums))
        means = dict(zip(self.keys, (totals / self.count).tolist(), strict=True))
        reconstruction = {site: mean for (kind, site), mean in means.items() if kind == "reconstruction"}
        kl = {site: mean for (kind, site), mean in means.items() if kind == "kl"}
        return Epoch(epoch, -means["value", ""], reconstruction, kl, validation, seconds)


class _Average:
    """An exponential moving average of the parameters. Its decay warms up, so that the initial weights fade."""

    def __init__(self, program: Program, decay: float):
        self.live = [p for p in program.parameters() if p.requires_grad]
        self.mean = [p.detach().clone() for p in self.live]
        self.decay, self.count = decay, 0

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = [mean.to(live.device) for mean, live in zip(state["mean"], self.live, strict=True)]
        self.count = state["count"]

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        self._swap_weights()
        try:
            yield
        finally:
            self._swap_weights()

    @torch.no_grad()
    def _swap_weights(self) -> None:
        for live, mean in zip(self.live, self.mean, strict=True):
            kept = live.detach().clone()
            live.copy_(mean)
            mean.copy_(kept)


def _split_validation(data: Data, fraction: float, seed: int) -> tuple[Data, Data]:
    if not 0 < round(fraction * len(data)) < len(data):
        raise ValueError(
            f"validation={fraction} of {len(data)} data leaves one part empty: pass validation=None to train on all "
            "of them, another fraction, or validation data"
        )
    return data.split(fraction, seed=seed)


def _check_scale(program: Program, data: Data) -> None:
    """Warn of reals that are far from 0 or have a large spread, because networks and densities start at scale 1."""
    scaled = any(isinstance(module, ActNorm | Standardize | Columns) for module in program.modules())
    if scaled or not data.x.is_floating_point():
        return
    spread, mean = torch.std_mean(data.x.flatten(1), 0, correction=0)
    near = (mean.abs() <= FAR * spread.clamp_min(1)) & (spread <= WIDE)
    if not near.all():
        i = int(near.int().argmin())
        warn(
            f"feature {i} of the data has mean {mean[i]:.4g} and standard deviation {spread[i]:.4g}, but training "
            "starts from scale 1 around 0: train dgm.Standardized(program, x.mean(0), x.std(0)), and drop constant "
            "features"
        )


def _check_bf16() -> None:
    """Warn of a processor without bf16 instructions, on which networks in bf16 are several times as slow."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if found.get("architecture") == "x86_64" and not (found.get("amx_bf16") or found.get("avx512_bf16")):
        warn(
            "precision is 'bf16', but this processor has no instructions for bf16 (amx_bf16 or avx512_bf16), so steps "
            "take several times as long: use precision='float32'"
        )


def _check_labels(program: Program, data: Data | None, objective: Objective) -> None:
    if data is None or not isinstance(objective, VariationalBound | PyroObjective):
        return
    for site, labels in program.arguments(data)[2].items():
        if (labels < 0).any():
            raise ValueError(
                f"{data.name} has unknown labels (-1), which an ELBO cannot observe at {site!r}: use objective="
                "'semi-supervised' and a classifier, or drop those data"
            )


def _dtypes_and_shapes(weights: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{value.dtype} {tuple(value.shape)}" for name, value in weights.items()}


def _cloned_state(program: Program) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in program.state_dict().items()}


def _epoch_line(history: History) -> str:
    epoch = history.epochs[-1]
    text = f"loss {epoch.loss:.3f} {history.unit.removesuffix(' per datum')}"
    if epoch.validation is None:
        return text
    other = f" {history.validation_unit}" if history.validation_unit != history.unit else ""
    return text + f", validation {epoch.validation:.3f}{other}"
