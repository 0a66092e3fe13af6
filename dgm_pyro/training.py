"""Fitting a program to data: stochastic gradient ascent on an objective, reproducible and recoverable."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor
from tqdm import tqdm

from dgm_pyro.data import Data
from dgm_pyro.evaluation import as_data, evaluating, find_device, seeded
from dgm_pyro.objectives import BOUNDS, ELBO, Bound, Objective, objective_named
from dgm_pyro.program import Program, check_count

GRADIENT_NORM = 10.0


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
            "lower lr, or look at the data and the site"
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
    """What happened in `fit`.

    Attributes:
        epochs: one `Epoch` each.
        best_epoch: the epoch whose weights the program has now.
        seconds: wall-clock time of the training.
        stopped_early: whether `early_stopping` ended it.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0
    stopped_early: bool = False

    @property
    def losses(self) -> list[float]:
        """Training loss per epoch, in nats per datum."""
        return [epoch.loss for epoch in self.epochs]

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return asdict(self)


def fit(
    program: Program,
    data: Data | Tensor,
    objective: Objective | PyroELBO | str | None = None,
    *,
    epochs: int = 50,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    seed: int = 0,
    device: str | torch.device = "auto",
    validation: Data | Tensor | float | None = 0.1,
    early_stopping: int | None = None,
    ema: float | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    progress: bool = True,
) -> History:
    """Train ``program`` in place, by AdamW on minibatches; the best validated weights are kept.

    Args:
        program: what to train; it ends in evaluation mode.
        data: a `Data`, or a tensor ``(N, *event_shape)``.
        objective: an objective of ours, its name ("iwae", or "iwae:50" with its argument), or any Pyro ELBO instance;
            default `ELBO`.
        epochs: passes over the data.
        batch_size: data per step.
        lr: learning rate; warmed up over the first 2 % of the steps.
        weight_decay: AdamW's, decoupled.
        schedule: "cosine" (lr falls to zero) or "constant".
        seed: of shuffling, validation split and latents. Same seed, same machine: the same result, bit for bit on CPU.
        device: "auto" (CUDA if there is one), or a torch device.
        validation: data to validate the objective on after each epoch, or the fraction of ``data`` to hold out for it,
            or None to train on everything and keep the last weights.
        early_stopping: stop after this many epochs without a better validation loss.
        ema: decay of an exponential moving average of the weights, which is then what is validated and kept.
        augment: applied to each training batch of x.
        progress: whether to show a bar with the loss in nats per datum.

    Returns:
        The `History`.

    Raises:
        NonFiniteLossError: names site and step; the last good weights are restored.
        ValueError, TypeError: an argument does not fit; nothing has been changed.
        KeyboardInterrupt: as it came; the program has the best weights so far, and is in evaluation mode.
    """
    settings = {"epochs": epochs, "batch_size": batch_size}
    for name, count in settings.items():
        check_count(count, name)
    _check_options(lr, weight_decay, schedule, early_stopping, ema)
    train = as_data(program, data)
    maximise = _objective(objective)
    train, held_out = _validation(program, train, validation, seed)
    for part in (train, held_out):
        _check_labels(program, part, maximise)
    if early_stopping is not None and held_out is None:
        raise ValueError("early_stopping needs validation data: pass validation=0.1, or a Data")
    where = find_device(device)
    parameters = {name: p for name, p in program.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"this {type(program).__name__} has no parameters that require a gradient")

    program.to(where)
    x, y = train.x.to(where), None if train.y is None else train.y.to(where)
    steps_per_epoch = math.ceil(len(x) / batch_size)
    steps = epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(program.parameters(), lr=lr, weight_decay=weight_decay)
    warm_up = max(1, steps // 50)

    def rate(step: int) -> float:
        falling = 0.5 * (1 + math.cos(math.pi * step / steps)) if schedule == "cosine" else 1.0
        return min(1.0, (step + 1) / warm_up) * falling

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    history = History()
    initial = _state(program)
    best, best_loss = initial, math.inf
    last, last_epoch = initial, 0
    averaged = None if ema is None else _Average(program, ema)
    start = time.perf_counter()
    try:
        with (
            seeded(seed, where),
            pyro.validation_enabled(False),
            pyro.get_param_store().scope(),
            tqdm(total=epochs, desc=f"fit {type(program).__name__}", unit="epoch", disable=not progress) as bar,
        ):
            for epoch in range(1, epochs + 1):
                program.train()
                totals = _Totals()
                order = torch.randperm(len(x), device="cpu").to(where)
                for step, rows in enumerate(order.split(batch_size), start=(epoch - 1) * steps_per_epoch + 1):
                    batch = x[rows] if augment is None else augment(x[rows])
                    arguments = program.arguments(batch, None if y is None else y[rows])
                    optimizer.zero_grad(set_to_none=True)
                    bound = _backward(_at(maximise, (step - 1) / max(1, steps - 1)), program, *arguments)
                    if not torch.isfinite(bound.value.detach().sum()):
                        site = _first_non_finite(bound, program, *arguments)
                        raise NonFiniteLossError("the loss is not finite", site, epoch, step, last_epoch)
                    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
                    norm = torch.nn.utils.get_total_norm(gradients.values())
                    if not torch.isfinite(norm):
                        site = max(gradients, key=lambda name: _size(gradients[name]))
                        raise NonFiniteLossError("the gradient is not finite", site, epoch, step, last_epoch)
                    torch.nn.utils.clip_grads_with_norm_(parameters.values(), GRADIENT_NORM, norm)
                    optimizer.step()
                    scheduler.step()
                    if averaged is not None:
                        averaged.update()
                    totals.add(bound)
                with contextlib.nullcontext() if averaged is None else averaged.swapped_in():
                    loss = None
                    if held_out is not None:
                        loss = _validate(_at(maximise, 1.0), program, held_out, batch_size, seed, where)
                        if not math.isfinite(loss):
                            what, site = "the validation loss is not finite", program.variable
                            raise NonFiniteLossError(what, site, epoch, step, last_epoch)
                    last, last_epoch = _state(program), epoch
                history.epochs.append(totals.epoch(epoch, loss, time.perf_counter() - start))
                if loss is None or loss < best_loss:
                    best, best_loss, history.best_epoch = last, loss if loss is not None else best_loss, epoch
                bar.set_postfix_str(_describe(history.epochs[-1]), refresh=False)
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


def _size(gradient: Tensor) -> float:
    """The largest entry; infinite if there is a NaN."""
    return gradient.abs().nan_to_num(nan=math.inf).max().item()


def _objective(objective: Objective | PyroELBO | str | None) -> Objective:
    if objective is None:
        return ELBO()
    if isinstance(objective, str):
        return objective_named(objective)
    if isinstance(objective, PyroELBO):
        return _PyroObjective(objective)
    if not callable(objective):
        raise TypeError(f"objective must be callable, a name, or a Pyro ELBO, got {type(objective).__name__}")
    return objective


def _at(objective: Objective, progress: float) -> Objective:
    """The objective to use at this progress of training, in [0, 1], if it says that it changes."""
    at = getattr(objective, "at", None)
    return objective if at is None else at(progress)


class _PyroObjective:
    """A Pyro ELBO as one of our objectives: it brings its own backward pass, so the surrogate stays unused."""

    def __init__(self, objective: PyroELBO):
        # A used ELBO object remembers the plate nesting of the pair it was used on.
        self.objective: Any = copy.copy(objective)
        self.objective.max_plate_nesting = math.inf

    def __call__(
        self, program: Program, x: Tensor, given: Any = None, observed: dict[str, Tensor] | None = None
    ) -> Bound:
        model, guide = [poutine.condition(view, data=observed or {}) for view in (program.model, program.guide)]
        guide = poutine.block(guide, hide=list(observed or {}))
        if isinstance(self.objective, TraceEnum_ELBO):
            guide = config_enumerate(guide)
        loss = self.objective.loss_and_grads(model, guide, x, given)
        # Pyro sums over the data. Its gradient is scaled, not the model: RenyiELBO is no bound under poutine.scale.
        for parameter in program.parameters():
            if parameter.grad is not None:
                parameter.grad /= len(x)
        value = -torch.as_tensor(loss[0] if isinstance(loss, tuple) else loss) / len(x)
        return Bound(value.expand(len(x)), value.expand(len(x)))


def _backward(objective: Objective, program: Program, x: Tensor, given: Any, observed: dict[str, Tensor]) -> Bound:
    bound = objective(program, x, given, observed)
    if not isinstance(objective, _PyroObjective):
        (-bound.surrogate.mean()).backward()
    return bound


@torch.no_grad()
def _first_non_finite(bound: Bound, program: Program, *arguments: Any) -> str:
    """The site to blame; an objective without terms per site is asked again as an ELBO."""
    for suspect in (bound, ELBO()(program, *arguments)):
        for site, term in {**suspect.reconstruction, **suspect.kl}.items():
            if not torch.isfinite(term).all():
                return site
    return program.variable


class _Totals:
    """Sums over an epoch, on the device, so that only its end waits for them."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[tuple[str, str], Tensor] = {}

    def add(self, bound: Bound) -> None:
        self.count += len(bound.value)
        terms = {("loss", ""): -bound.value}
        terms |= {("reconstruction", site): term for site, term in bound.reconstruction.items()}
        terms |= {("kl", site): term for site, term in bound.kl.items()}
        for key, term in terms.items():
            total = term.detach().double().sum() * (len(bound.value) / term.numel())
            self.sums[key] = self.sums[key] + total if key in self.sums else total

    def epoch(self, epoch: int, validation: float | None, seconds: float) -> Epoch:
        means = {key: (total / self.count).item() for key, total in self.sums.items()}
        reconstruction = {site: mean for (kind, site), mean in means.items() if kind == "reconstruction"}
        kl = {site: mean for (kind, site), mean in means.items() if kind == "kl"}
        return Epoch(epoch, means["loss", ""], reconstruction, kl, validation, seconds)


class _Average:
    """An exponential moving average of the parameters, its decay warmed up so that the start is forgotten."""

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
    objective: Objective, program: Program, data: Data, batch_size: int, seed: int, device: torch.device
) -> float:
    """Mean loss with the same draws every time, so that epochs are compared on equal terms.

    Of a Pyro objective, whose loss brings its backward pass along, the plain ELBO.
    """
    total = 0.0
    if isinstance(objective, _PyroObjective):
        objective = ELBO()
    # Larger batches than in training, as no graph is kept; but particles take the room of data.
    size = max(batch_size, 4 * batch_size // getattr(objective, "num_particles", 1))
    with evaluating(program), seeded(seed, device), torch.no_grad():
        for start in range(0, len(data.x), size):
            rows = slice(start, start + size)
            y = None if data.y is None else data.y[rows].to(device)
            value, given, observed = program.arguments(data.x[rows].to(device), y)
            total -= objective(program, value, given, observed).value.double().sum().item()
    return total / len(data.x)


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
        if len(train.x) < 2:
            raise ValueError("one datum cannot be split: pass validation=None, or validation data")
        return train.split(validation, seed=seed)
    return train, as_data(program, validation, "validation")


def _check_labels(program: Program, data: Data | None, objective: Objective) -> None:
    if data is None or not isinstance(objective, (*BOUNDS, _PyroObjective)):
        return
    for site, labels in program.arguments(data.x, data.y)[2].items():
        if (labels < 0).any():
            raise ValueError(
                f"{data.name} has unknown labels (-1), which no ELBO can observe at {site!r}: use objective="
                "'semi-supervised' and a classifier, or drop those data"
            )


def _check_options(
    lr: float, weight_decay: float, schedule: str, early_stopping: int | None, ema: float | None
) -> None:
    if not (isinstance(lr, (int, float)) and math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be a positive number, got {lr!r}")
    if not (isinstance(weight_decay, (int, float)) and math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be a number of at least 0, got {weight_decay!r}")
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"schedule must be 'cosine' or 'constant', got {schedule!r}")
    if early_stopping is not None:
        check_count(early_stopping, "early_stopping")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"ema must be a decay between 0 and 1, got {ema!r}")


def _state(program: Program) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in program.state_dict().items()}


def _restore(program: Program, state: dict[str, Tensor]) -> None:
    program.load_state_dict(state)
    program.eval()


def _describe(epoch: Epoch) -> str:
    text = f"loss {epoch.loss:.3f} nats"
    return text if epoch.validation is None else text + f", validation {epoch.validation:.3f}"
