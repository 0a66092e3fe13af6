"""A training step as one CUDA graph, which the host launches at once instead of hundreds of operations."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.utils import _pytree as pytree

from dgm_pyro.training.compilation import only_torch_draws

# Calls before the recording, in which libraries choose their algorithms and the optimizer makes its state.
WARM_UP = 3
# Devices that can replay a recording.
RECORDING_DEVICES = {"cuda"}
# torch's warnings where the host waits for the device, and when these warnings are turned on.
WAITS, LOOKS = "called a synchronizing CUDA operation", "Synchronization debug mode is a prototype feature"


class CudaGraph:
    """A function of tensors that is recorded once, and then replayed.

    The first calls run the function itself. If the host waits for the device in one of them, as when a program reads a
    value, the function is never recorded.

    Args:
        function: a function of trees of tensors, with the same shapes in every call, to a tree of tensors. Anything
            else that it reads, such as a Python number, is a constant of the recording; tensors that it writes to are
            written to by every replay.

    Attributes:
        refused: why it cannot be recorded; None while it can.
        recorded: whether calls are replays.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function, self.warm_ups = function, 0
        self.refused: str | None = None
        self.recorded = False

    def __call__(self, *arguments: Any) -> Any:
        if self.refused is None and not self.recorded:
            if self.warm_ups < WARM_UP:
                self.warm_ups += 1
                return self.warm_up(arguments)
            self._record(arguments)
        if self.refused is not None:
            return self.function(*arguments)
        for held, leaf in zip(self.held, _tensor_leaves(arguments), strict=True):
            held.copy_(leaf)
        self.replay()
        return self.result

    def warm_up(self, arguments: tuple[Any, ...]) -> Any:
        """Call the function, and note whether it waits for the device."""
        if self.warm_ups == 1:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with torch.cuda.stream(self.stream):
                    result = self.function(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(self.stream)
        for each in said:
            if WAITS in str(each.message):
                self.refused = f"the host waits for the device in {each.filename}:{each.lineno}"
            elif LOOKS not in str(each.message):
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        return result

    def _record(self, arguments: tuple[Any, ...]) -> None:
        held = pytree.tree_map_only(Tensor, torch.clone, arguments)
        self.held = _tensor_leaves(held)
        drawn = torch.default_generator.get_state()
        try:
            with only_torch_draws():
                self.replay, self.result = self.record(held)
            if not torch.equal(torch.default_generator.get_state(), drawn):
                torch.default_generator.set_state(drawn)
                raise RuntimeError("a number is drawn on the CPU, which a graph would repeat: draw it on the device")
            self.recorded = True
        except Exception as error:
            self.refused = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"

    def record(self, arguments: tuple[Any, ...]) -> tuple[Callable[[], None], Any]:
        """A function that replays a call with ``arguments``, and the tensors that will hold its result."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Threads that read data may allocate memory in the meantime.
            with _no_garbage(), torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                result = self.function(*arguments)
        except Exception:  # a generator whose recording was interrupted could not draw again
            generator = torch.cuda.default_generators[self.stream.device.index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph.replay, result


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Turn garbage collection off: destroying a graph while another is recorded ends the recording."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _tensor_leaves(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def is_fused_adam(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` is an Adam whose step is one operation, which reads and writes only tensors."""
    return type(optimizer) in (Adam, AdamW) and all(group["fused"] for group in optimizer.param_groups)


def make_capturable(optimizer: Optimizer, device: torch.device) -> None:
    """Move the learning rates to the device, where a replay reads them."""
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        group["capturable"] = True


def undo_capturable(optimizer: Optimizer) -> None:
    """Undo `make_capturable`: learning rates are numbers, and steps are eager."""
    for group in optimizer.param_groups:
        group.update(_portable(group))


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Set the learning rate of a group of parameters, in place if it is a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def portable(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer with learning rates as numbers, for any device."""
    return {**state, "param_groups": [{**group, **_portable(group)} for group in state["param_groups"]]}


def _portable(group: dict[str, Any]) -> dict[str, Any]:
    """What `make_capturable` changes in a group, for eager steps on any device."""
    return {"lr": float(group["lr"]), "capturable": False} if isinstance(group["lr"], Tensor) else {}
