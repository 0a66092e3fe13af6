"""Several processes at one training, each on its share of every batch: what `torchrun` starts.

    torchrun --nproc-per-node=4 -m dgm_pyro train vae --data mnist --out runs/vae

`torch.nn.parallel.DistributedDataParallel` averages the gradients; here is only who does what. A batch of n data is cut
into shares of n_1 .. n_N. Process r weights the mean gradient of its share by N n_r / n, and the average over the
processes is (1/n) sum_r n_r g_r: the mean gradient of the batch, whether N divides n or not.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["ProcessGroup", "join", "leave", "process_group"]

# Fewer data than these are no share: a compiled loss takes one graph for every number of data from here on.
SMALLEST_SHARE = 2
# What `join` met the others at; the first to fail leaves a word there.
_store: dist.Store | None = None


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a training; one alone, if there are no others.

    Attributes:
        rank: which one this is, from 0; the first one writes.
        world_size: how many there are.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def writes(self) -> bool:
        """Whether it is for this process to write files, and to say how the training goes."""
        return self.rank == 0

    def batches(self, count: int, batch_size: int, drop_last: bool = False) -> int:
        """Number of batches in an epoch of ``count`` data; the last smaller one may be left out.

        A last batch with less than two data per process is left out, as layers that take the scale of a batch need two:
        the shuffling leaves out others each time.

        Raises:
            ValueError: there are less than two data per process in every batch.
        """
        least = SMALLEST_SHARE * self.world_size
        if self.world_size > 1 and min(count, batch_size) < least:
            raise ValueError(
                f"a batch has {min(count, batch_size)} data, but {self.world_size} processes need at least {least}: "
                "use a larger batch_size, more data, or fewer processes"
            )
        full, rest = divmod(count, batch_size)
        return max(1, full + (rest >= least and not drop_last))

    def share(self, rows: Tensor) -> Tensor:
        """The part of a batch that is for this process."""
        return rows.tensor_split(self.world_size)[self.rank]

    def weight(self, rows: Tensor) -> float:
        """The factor of the mean loss of `share` that makes the mean over processes the mean of the batch."""
        return len(self.share(rows)) * self.world_size / len(rows)

    def total(self, values: Tensor) -> Tensor:
        """The sum of the processes' values, the same in all of them to the last bit."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def earliest(self, step: Tensor) -> Tensor:
        """The smallest positive value that a process has; 0 if none has one."""
        if self.world_size == 1:
            return step
        never = torch.iinfo(step.dtype).max
        step = torch.where(step > 0, step, never)
        dist.all_reduce(step, dist.ReduceOp.MIN)
        return torch.where(step < never, step, 0)

    def any(self, *flags: bool, device: torch.device) -> list[bool]:
        """Whether a process says so, for each of the flags; the same in all of them."""
        if self.world_size == 1:
            return [*flags]
        return (self.total(torch.tensor(flags, dtype=torch.long, device=device)) > 0).tolist()

    def digests(self, digest: bytes, device: torch.device) -> list[str]:
        """The digest of each process, in hexadecimal."""
        if self.world_size == 1:
            return [digest.hex()]
        own = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(device)
        every = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(every, own)
        return [bytes(each.tolist()).hex() for each in every]

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Give each of the tensors the values that it has in the first process."""
        if self.world_size > 1:
            for tensor in tensors:
                values = tensor.detach().contiguous()
                dist.broadcast(values, 0)
                tensor.detach().copy_(values)

    def wait(self) -> None:
        """Until all have come here."""
        if self.world_size > 1:
            dist.barrier()


def process_group() -> ProcessGroup:
    """The processes that train together, as `torch.distributed` was told."""
    if not dist.is_available() or not dist.is_initialized():
        return ProcessGroup()
    return ProcessGroup(dist.get_rank(), dist.get_world_size())


def was_started() -> bool:
    """Whether `torchrun`, or what sets the same variables, started this process."""
    return "LOCAL_RANK" in os.environ and dist.is_available()


def join(device: str = "auto") -> ProcessGroup:
    """Join the processes that `torchrun` started, if it did; each takes the GPU of its number, if there are any.

    Args:
        device: where they are to train. After this, "auto" and "cuda" are this process's own GPU.

    Raises:
        ValueError: there are fewer GPUs than processes, or ``device`` names one for all of them.
    """
    global _store
    if not was_started() or dist.is_initialized():
        return process_group()
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        _take_gpu(device, int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # Of convolutions: the strides of dimensions of size 1, which do not matter.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    _store, rank, world_size = next(iter(dist.rendezvous("env://")))
    dist.init_process_group("nccl" if on_gpu else "gloo", store=_store, rank=rank, world_size=world_size)
    return process_group()


def _take_gpu(device: str, rank: int, world_size: int) -> None:
    count = torch.cuda.device_count()
    if world_size > 1 and device not in ("auto", "cuda"):
        raise ValueError(f"device must be 'auto', 'cuda' or 'cpu' where {world_size} processes train, got {device!r}")
    if world_size > count:
        raise ValueError(
            f"{world_size} processes were started, but there are {count} GPUs: start one per GPU, or use device 'cpu'"
        )
    torch.cuda.set_device(rank % count)


def leave() -> None:
    """Close what `join` opened, when all have come here."""
    global _store
    if dist.is_available() and dist.is_initialized():
        process_group().wait()
        dist.destroy_process_group()
    _store = None


def is_first_to_fail() -> bool:
    """Whether it is for this process to say what went wrong, when something did.

    That is the first one that failed: the others fail because they wait for it. An error before they met, such as an
    unknown option, is the same in all of them, and the first process reports it.
    """
    if not was_started():
        return True
    if _store is None:
        return os.environ.get("RANK", "0") == "0"
    return _store.add("failed", 1) == 1
