"""Fitting a program to data: stochastic gradient ascent on an objective, reproducible and recoverable."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from pyro.infer import TraceEnum_ELBO, TraceTailAdaptive_ELBO, config_enumerate
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from tqdm import tqdm

from dgm_pyro.checks import check_number, check_seed
from dgm_pyro.data import Data
from dgm_pyro.evaluation import as_data, evaluating, find_device
from dgm_pyro.networks import ActNorm
from dgm_pyro.networks.mlp import networks_in
from dgm_pyro.objectives import ELBO, Objective, VariationalBound, at_progress, chosen
from dgm_pyro.program import Program, alone, check_count, check_program, differentiating, seeded
from dgm_pyro.training.compilation import Sums, Terms, check_compilable, export, optimized
from dgm_pyro.training.distributed import ProcessGroup, process_group

GRADIENT_NORM = 10.0
# compile="auto": from so many steps on, compiling saves more than it takes if the compiler has seen the like before.
COMPILE_FROM = 5_000
PRECISIONS = ("float32", "bf16")
# On other devices than the CPU, how often to wait for the device and ask whether all is finite.
WATCH_EVERY = 50
# Before `fit` warns of it, a feature of the data may be so many standard deviations off 0, and have one so large.
FAR, WIDE = 100, 1000


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient became NaN or infinite.

    Attributes:
        site: the sample site, or the parameter, where it shows first.
        epoch, step: when; both count from 1, steps over the whole run.
        restored_epoch: the epoch whose weights the program now has; 0 for those it came with.
    """

    def __init__(self, what: str, site: str, epoch: int, step: int, restored_epoch: int):
        self.site, self.epoch, self.step, self.restored_epoch = site, epoch, step, restored_epoch
        state = f"epoch {restored_epoch}" if restored_epoch else "before training"
        super().__init__(
            f"{what} at site {site!r}, epoch {epoch}, step {step}; the program has the weights of {state} again: "
            "lower lr, standardize the data if they are large, or look at the site"
        )


@dataclass
class Epoch:
    """One pass over the data; losses are negative bounds in nats per datum.

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
        epochs: one `Epoch` each.
        best_epoch: the epoch whose weights the program has now.
        seconds: wall-clock time of the training.
        stopped_early: whether `early_stopping` ended it.
        compiled: whether its steps were compiled.
        unit: of the losses; other than nats per datum where the objective is no likelihood or bound on one.
        validation_unit: of the validation losses, which games measure by another objective.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0
    stopped_early: bool = False
    compiled: bool = False
    unit: str = "nats per datum"
    validation_unit: str = "nats per datum"

    @property
    def losses(self) -> list[float]:
        """Training loss per epoch, in `unit`."""
        return [epoch.loss for epoch in self.epochs]

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return asdict(self)


@alone()
@differentiating("fit")
def fit(
    program: Program,
    data: Data | Tensor,
    objective: Objective | PyroELBO | str | None = None,
    *,
    epochs: int = 50,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    lr_schedule: str = "cosine",
    seed: int = 0,
    device: str | torch.device = "auto",
    validation: Data | Tensor | float | None = 0.1,
    early_stopping: int | None = None,
    ema: float | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    compile: bool | str = "auto",
    precision: str = "float32",
    progress: bool = True,
) -> History:
    """Train ``program`` in place, by AdamW on minibatches; the best validated weights are kept.

    Args:
        program: what to train; it ends in evaluation mode.
        data: a `Data`, or a tensor ``(N, *event_shape)``.
        objective: an objective of ours, its name ("iwae", or "iwae:50" with its argument), or any Pyro ELBO instance;
            default `ELBO`.
        epochs: passes over the data.
        batch_size: data per step. A last batch of one datum is left out, as BatchNorm cannot take its scale; the
            shuffling leaves out another in the next epoch.
        lr: learning rate; warmed up over the first 2 % of the steps.
        weight_decay: AdamW's, decoupled.
        lr_schedule: "cosine" (lr falls to zero) or "constant".
        seed: of shuffling, validation split and latents. Same seed, same machine: the same result, bit for bit on CPU.
        device: "auto" (CUDA if there is one), or a torch device.
        validation: data to validate the objective on after each epoch, or the fraction of ``data`` to hold out for it,
            or None to train on everything and keep the last weights.
        early_stopping: stop after this many epochs without a better validation loss.
        ema: decay of an exponential moving average of the weights, which is then what is validated and kept.
        augment: applied to each training batch of x.
        compile: whether to compile the steps (see `dgm.compile`), which takes tens of seconds, and then makes each
            faster; the random numbers are the same. "auto" does it in trainings of 5,000 steps or more, and continues
            uncompiled, with a warning, where it cannot be done.
        precision: "float32" (rather, that of the program), or "bf16", in which the networks run under autocast.
        progress: whether to show a bar with the loss.

    Returns:
        The `History`.

    Warns:
        UserWarning: a feature of real data is a hundred standard deviations off 0, or has one of a thousand, and no
            `ActNorm` takes it to scale 1: standardize the data.

    Raises:
        NonFiniteLossError: names site and step; the last good weights are restored.
        ValueError, TypeError: an argument does not fit; nothing has been changed.
        CompilationError: ``compile`` is True, and a statement of the program cannot be compiled.
        KeyboardInterrupt: as it came; the program has the best weights so far, and is in evaluation mode.
    """
    check_program(program)
    settings = {"epochs": epochs, "batch_size": batch_size}
    for name, count in settings.items():
        check_count(count, name)
    check_options(lr, weight_decay, lr_schedule, early_stopping, ema, compile, precision)
    check_seed(seed)
    if augment is not None and not callable(augment):
        raise TypeError(f"augment must be a function of x or None, got {type(augment).__name__}")
    train = as_data(program, data)
    _check_scale(program, train)
    maximize: Any = _PyroObjective(objective) if isinstance(objective, PyroELBO) else chosen(objective)
    train, held_out = _validation(program, train, validation, seed)
    for part in (train, held_out):
        _check_labels(program, part, maximize)
    if early_stopping is not None and held_out is None:
        raise ValueError("early_stopping needs validation data: pass validation=0.1, or a Data")
    where = find_device(device)
    parameters = {name: p for name, p in program.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"this {type(program).__name__} has no parameters that require a gradient")

    processes = process_group()
    steps_per_epoch = processes.batches(len(train), batch_size)
    steps = epochs * steps_per_epoch

    program.to(where)
    processes.agree([*program.parameters(), *program.buffers()])
    x, y = train.x.to(where), None if train.y is None else train.y.to(where)
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=weight_decay, fused=True)
    warm_up = max(1, steps // 50)

    def rate(step: int) -> float:
        falling = 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)) if lr_schedule == "cosine" else 1.0
        return lr * min(1.0, step / warm_up) * falling

    def batch_of(rows: Tensor) -> tuple[Tensor, Any, dict[str, Tensor]]:
        batch = x[rows] if augment is None else augment(x[rows])
        return program.arguments(batch, None if y is None else y[rows])

    unit = getattr(maximize, "unit", History.unit)
    history = History(unit=unit, validation_unit=getattr(getattr(maximize, "validation", None), "unit", unit))
    initial = _state(program)
    best, best_loss = initial, math.inf
    last, last_epoch = initial, 0
    averaged = None if ema is None else _Average(program, ema)
    shuffling = torch.Generator().manual_seed(seed)
    compiling = compile is True or (steps >= COMPILE_FROM and compile)
    start = time.perf_counter()
    try:
        with (
            seeded(seed + processes.rank, where),
            pyro.validation_enabled(False),
            pyro.get_param_store().scope(),
            tqdm(
                total=epochs,
                desc=f"fit {type(program).__name__}",
                unit="epoch",
                disable=not (progress and processes.writes),
            ) as bar,
        ):
            program.train()
            step_of = _Step(maximize, program, precision)
            if hasattr(maximize, "prepare"):
                maximize.prepare(program)
            for epoch in range(1, epochs + 1):
                program.train()
                totals, watch = _Totals(), _Watch(program.variable)
                order = torch.randperm(len(x), generator=shuffling).to(where)
                batches = order.split(batch_size)[:steps_per_epoch]
                for step, rows in enumerate(batches, start=(epoch - 1) * steps_per_epoch + 1):
                    # Alone, the first step runs as it is written: some layers set themselves up by their first batch.
                    if step == (2 if processes.size == 1 else 1):
                        step_of.prepare(batch_of(batches[0]), processes, compiling)
                        history.compiled = step_of.compiled
                    optimizer.param_groups[0]["lr"] = rate(step)
                    optimizer.zero_grad(set_to_none=True)
                    weight, whole = processes.weight(rows), len(rows) == batch_size
                    batch = batch_of(processes.share(rows))
                    if hasattr(maximize, "update"):
                        maximize.update(program, *batch[:2], rate(step))
                    sums = step_of(batch, (step - 1) / max(1, steps - 1), weight, whole)
                    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
                    watch.see(step, sums, _clip(gradients))
                    if where.type == "cpu" or step % WATCH_EVERY == 0 or step == epoch * steps_per_epoch:
                        watch.check(epoch, last_epoch, processes)
                    optimizer.step()
                    if averaged is not None:
                        averaged.update()
                    totals.add(len(rows), sums)
                processes.agree(program.buffers())  # those that follow the data have followed other data in each
                with contextlib.nullcontext() if averaged is None else averaged.swapped_in():
                    loss = None
                    if held_out is not None:
                        measure = at_progress(getattr(maximize, "validation", maximize), 1.0)
                        loss = _validate(measure, program, held_out, batch_size, seed, where, processes)
                        if not math.isfinite(loss):
                            what, site = "the validation loss is not finite", program.variable
                            raise NonFiniteLossError(what, site, epoch, step, last_epoch)
                    last, last_epoch = _state(program), epoch
                history.epochs.append(totals.epoch(epoch, loss, time.perf_counter() - start, processes))
                if loss is None or loss < best_loss:
                    best, best_loss, history.best_epoch = last, loss if loss is not None else best_loss, epoch
                bar.set_postfix_str(_describe(history), refresh=False)
                bar.update()
                if early_stopping is not None and epoch - history.best_epoch >= early_stopping:
                    history.stopped_early = True
                    break
    except NonFiniteLossError:
        _restore(program, last)
        raise
    except BaseException:  # an interrupt too: what has been learned so far is not lost
        _restore(program, best)
        raise
    _restore(program, best)
    history.seconds = time.perf_counter() - start
    return history


class _PyroObjective:
    """A Pyro ELBO, to take the place of one of our objectives: it brings its own backward pass."""

    def __init__(self, objective: PyroELBO):
        name = type(objective).__name__
        if name.startswith("Jit"):  # what it traces is for the first batch's size only
            plain = name.removeprefix("Jit")
            raise ValueError(f"objective {name} is for one batch: use {plain}, or dgm.ELBO() and compile=True")
        if isinstance(objective, TraceTailAdaptive_ELBO):
            raise ValueError(f"objective {name} has a gradient but no value, which fit watches: use pyro.infer.SVI")
        # A used ELBO object remembers the plate nesting of the pair it was used on.
        self.objective: Any = copy.copy(objective)
        self.objective.max_plate_nesting = math.inf

    def sums(self, program: Program, x: Tensor, given: Any, observed: dict[str, Tensor]) -> Sums:
        """As `Terms`; the gradient is in the parameters already, and the loss has none."""
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


class _Step:
    """The loss of a batch and its gradient: eager or compiled, alone or with other processes."""

    def __init__(self, objective: Any, program: Program, precision: str):
        self.program, self.objective, self.precision = program, objective, precision
        self.terms = None if isinstance(objective, _PyroObjective) else Terms(program, objective)
        self.loss: Any = None if self.terms is None else _ByKind(self.terms)
        self.compiled = False

    def prepare(self, batch: tuple[Any, ...], processes: ProcessGroup, compile: bool | str) -> None:
        """Compile, and join with the other processes; ``batch`` is a whole one.

        Raises:
            CompilationError, ValueError: it cannot be, and ``compile`` is not "auto".
        """
        if self.terms is None and (compile is True or processes.size > 1):
            raise ValueError(
                f"{type(self.objective.objective).__name__} has its own backward pass, which can be neither "
                "compiled nor shared among processes: use an objective of dgm, such as 'elbo'"
            )
        if hasattr(self.objective, "update"):
            if processes.size > 1:
                raise ValueError("each process would have its own critic: use one process for an adversarial objective")
            if compile is True:
                check_compilable(self.objective)  # says why not
            return
        if self.terms is None or not (compile or processes.size > 1):
            return
        share = pytree.tree_map_only(Tensor, processes.share, batch)
        cuda = [batch[0].device] if batch[0].is_cuda else []
        with torch.random.fork_rng(devices=cuda):
            if processes.size > 1:
                with self._networks():  # what layers set up by their first batch, they set up alike
                    self.terms(*batch, self.terms.weights(0.0))
            if compile:
                try:
                    self.loss.whole = self._compile(self.terms, (*share, self.terms.weights(0.0)))
                    self.compiled = True
                except Exception as error:
                    if compile is True:
                        raise
                    # Past fit and its two decorators.
                    warnings.warn(f"the training continues uncompiled: {error}", stacklevel=5)
        if processes.size > 1:
            # A graph that is the same at each step is looked at once. One that picks rows may leave out parameters.
            static = not hasattr(self.objective, "eager_only")
            self.loss = DistributedDataParallel(self.loss, static_graph=static, find_unused_parameters=not static)
            self.loss.broadcast_buffers = False  # at each step; once an epoch is enough

    def _compile(self, terms: Terms, example: tuple[Any, ...]) -> Any:
        check_compilable(self.objective)
        with self._networks():  # their precision is part of the graph
            whole = optimized(export(terms, example))
        before = [buffer.clone() for buffer in self.program.buffers()]
        loss = whole(*example)["loss"][""]
        loss.backward()  # now, so that what fails fails here
        self.program.zero_grad(set_to_none=True)
        for buffer, value in zip(self.program.buffers(), before, strict=True):
            buffer.copy_(value)
        return whole

    def __call__(self, batch: tuple[Any, ...], progress: float, weight: float = 1.0, whole: bool = False) -> Sums:
        """Leave the gradient in the parameters; returns what `Terms` returns.

        Args:
            progress: of training, in [0, 1].
            weight: of the loss in the gradient.
            whole: whether the batch is as large as that of `prepare`.
        """
        if self.terms is None:
            with self._networks():
                return self.objective.sums(self.program, *batch)
        if not self.terms.schedules:
            self.terms.objective = at_progress(self.objective, progress)
        with self._networks():
            sums = self.loss(whole, *batch, self.terms.weights(progress))
        (weight * sums["loss"][""]).backward()
        return sums

    def _networks(self) -> Any:
        return networks_in(torch.bfloat16 if self.precision == "bf16" else None)


class _ByKind(nn.Module):
    """One loss for whole batches, which may be compiled for their size, and one for others; of the same parameters."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.whole = self.other = loss

    def forward(self, whole: bool, *arguments: Any) -> Sums:
        return (self.whole if whole else self.other)(*arguments)


class _Watch:
    """Records on the device when the loss or a gradient first was not finite, and its value."""

    def __init__(self, variable: str):
        self.variable = variable
        self.sites: list[str] = []
        self.names: list[str] = []
        self.values: Tensor | None = None
        self.step = torch.zeros((), dtype=torch.long)

    def see(self, step: int, sums: Sums, norms: dict[str, Tensor]) -> None:
        terms = {**sums["reconstruction"], **sums["kl"]}
        self.sites, self.names = [*terms], [*norms]
        losses = torch.stack([*terms.values(), sums["value"][""], sums["loss"][""].detach().double()])
        values = torch.cat([losses, torch.stack([*norms.values()]).double()])
        finite = torch.isfinite(values).all()
        if self.values is None:
            self.values, self.step = values, torch.where(finite, 0, step)
        else:
            self.values = torch.where(self.step > 0, self.values, values)
            self.step = torch.where((self.step > 0) | finite, self.step, step)

    def check(self, epoch: int, last_epoch: int, processes: ProcessGroup) -> None:
        """Raise a `NonFiniteLossError` if there was one; in every process, or the others would wait for one."""
        step = processes.earliest(self.step)
        if step == 0 or self.values is None:
            return
        values = processes.total(self.values).tolist()  # which is not finite where that of one process is not
        losses, norms = values[: len(self.sites) + 2], values[len(self.sites) + 2 :]
        if not all(map(math.isfinite, losses)):
            broken = [site for site, value in zip(self.sites, losses, strict=False) if not math.isfinite(value)]
            what, site = "the loss is not finite", (broken or [self.variable])[0]
        else:
            what = "the gradient is not finite"
            site = max(
                zip(self.names, norms, strict=True), key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1]
            )[0]
        raise NonFiniteLossError(what, site, epoch, int(step), last_epoch)


def _clip(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scale the gradients to a norm of at most `GRADIENT_NORM`; returns the norm that each had."""
    norms = torch._foreach_norm([*gradients.values()])
    total = torch.linalg.vector_norm(torch.stack(norms))
    torch._foreach_mul_([*gradients.values()], (GRADIENT_NORM / (total + 1e-6)).clamp(max=1))
    return dict(zip(gradients, norms, strict=True)) | {"": total}


class _Totals:
    """Sums over an epoch, on the device: only its end waits for them."""

    def __init__(self) -> None:
        self.count = 0
        self.keys: list[tuple[str, str]] = []
        self.sums: list[Tensor] = []

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
    """An exponential moving average of the parameters. Its decay is warmed up to forget the start."""

    def __init__(self, program: Program, decay: float):
        self.live = [p for p in program.parameters() if p.requires_grad]
        self.mean = [p.detach().clone() for p in self.live]
        self.decay, self.count = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for live, mean in zip(self.live, self.mean, strict=True):
            kept = live.detach().clone()
            live.copy_(mean)
            mean.copy_(kept)


def _validate(
    objective: Objective,
    program: Program,
    data: Data,
    batch_size: int,
    seed: int,
    device: torch.device,
    processes: ProcessGroup,
) -> float:
    """Mean loss with the same draws every time, which makes epochs comparable.

    The batches are distributed over the processes, and each process has its own draws. Of a Pyro objective, whose loss
    brings its backward pass along, the plain ELBO.
    """
    total = 0.0
    if isinstance(objective, _PyroObjective):
        objective = ELBO()
    # Larger batches than in training, as no graph is kept; but particles take the room of data.
    draws = getattr(objective, "num_particles", getattr(objective, "num_samples", 1))
    size = max(batch_size, 4 * batch_size // draws)
    starts = range(0, len(data.x), size)
    with evaluating(program), seeded(seed + processes.rank, device), torch.no_grad():
        for number in range(processes.rank, len(starts), processes.size):
            rows = slice(starts[number], starts[number] + size)
            y = None if data.y is None else data.y[rows].to(device)
            value, given, observed = program.arguments(data.x[rows].to(device), y)
            total -= objective(program, value, given, observed).value.double().sum().item()
    return processes.total(torch.tensor(total, dtype=torch.float64, device=device)).item() / len(data.x)


def _validation(
    program: Program, train: Data, validation: Data | Tensor | float | None, seed: int
) -> tuple[Data, Data | None]:
    if validation is None:
        return train, None
    if isinstance(validation, float):
        if not 0 < validation < 1:
            raise ValueError(
                f"validation must be a fraction between 0 and 1, a Data, a tensor or None, got {validation}"
            )
        if not 0 < round(validation * len(train)) < len(train):
            raise ValueError(
                f"validation={validation} of {len(train)} data leaves one side empty: pass validation=None to train on "
                "all of them, another fraction, or validation data"
            )
        return train.split(validation, seed=seed)
    return train, as_data(program, validation, "validation")


def _check_scale(program: Program, data: Data) -> None:
    """Warn of reals that are far from 0, or spread far: networks and densities start from scale 1."""
    if not data.x.is_floating_point() or any(isinstance(module, ActNorm) for module in program.modules()):
        return
    spread, mean = torch.std_mean(data.x.flatten(1), 0, correction=0)
    near = (mean.abs() <= FAR * spread.clamp_min(1)) & (spread <= WIDE)
    if not near.all():
        i = int(near.int().argmin())
        warnings.warn(
            f"feature {i} of the data has mean {mean[i]:.4g} and standard deviation {spread[i]:.4g}, but training "
            "starts from scale 1 around 0: standardize the data, (x - x.mean(0)) / x.std(0), without constant features",
            stacklevel=3,
        )


def _check_labels(program: Program, data: Data | None, objective: Objective) -> None:
    if data is None or not isinstance(objective, VariationalBound | _PyroObjective):
        return
    for site, labels in program.arguments(data.x, data.y)[2].items():
        if (labels < 0).any():
            raise ValueError(
                f"{data.name} has unknown labels (-1), which no ELBO can observe at {site!r}: use objective="
                "'semi-supervised' and a classifier, or drop those data"
            )


def check_options(
    lr: float,
    weight_decay: float,
    lr_schedule: str,
    early_stopping: int | None,
    ema: float | None,
    compile: bool | str,
    precision: str,
) -> None:
    """Raise a ValueError that names the argument of `fit` that does not fit."""
    check_number(lr, "lr", above=0)
    check_number(weight_decay, "weight_decay", at_least=0)
    if lr_schedule not in ("cosine", "constant"):
        raise ValueError(f"lr_schedule must be 'cosine' or 'constant', got {lr_schedule!r}")
    if early_stopping is not None:
        check_count(early_stopping, "early_stopping")
    if ema is not None:
        check_number(ema, "ema")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"ema must be a decay between 0 and 1, got {ema!r}")
    if not (isinstance(compile, bool) or compile == "auto"):
        raise ValueError(f"compile must be True, False or 'auto', got {compile!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def _state(program: Program) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in program.state_dict().items()}


def _restore(program: Program, state: dict[str, Tensor]) -> None:
    program.load_state_dict(state)
    program.eval()


def _describe(history: History) -> str:
    epoch = history.epochs[-1]
    text = f"loss {epoch.loss:.3f} {history.unit.removesuffix(' per datum')}"
    if epoch.validation is None:
        return text
    other = f" {history.validation_unit}" if history.validation_unit != history.unit else ""
    return text + f", validation {epoch.validation:.3f}{other}"
