"""Training in several processes, which `torchrun` starts; each takes a share of every batch.

    torchrun --nproc-per-node=4 -m dgm_pyro train vae --data mnist --out runs/vae

`torch.nn.parallel.DistributedDataParallel` averages the gradients; this module divides the work. A batch of n data is
cut into shares of n_1 .. n_N. Process r weights the mean gradient of its share by N n_r / n. So the average over the
processes is (1/n) sum_r n_r g_r, the mean gradient of the batch, also where N does not divide n.
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

# The smallest share: a compiled loss has one graph for all numbers of data from here on.
SMALLEST_SHARE = 2
# The store at which `join` met the other processes; the first to fail leaves a message there.
_store: dist.Store | None = None


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a training, or this process alone.

    Attributes:
        rank: number of this process, from 0; process 0 writes files.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def batches(self, count: int, batch_size: int, drop_last: bool = False) -> int:
        """Number of batches in an epoch of ``count`` data; ``drop_last`` leaves out a smaller last one.

        A last batch with fewer than two data per process is always left out, because layers that compute the scale of
        a batch need two. After shuffling, these are other data in each epoch.

        Raises:
            ValueError: there are fewer than two data per process in every batch.
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
        """The part of a batch for this process."""
        return rows.tensor_split(self.world_size)[self.rank]

    def weight(self, rows: Tensor) -> float:
        """The weight of the mean loss of `share` with which the mean over processes is the mean of the batch."""
        return len(self.share(rows)) * self.world_size / len(rows)

    def total(self, values: Tensor) -> Tensor:
        """The sum of the processes' values, the same in all of them to the last bit."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def earliest(self, step: Tensor) -> Tensor:
        """The smallest positive value among the processes; 0 if there is none."""
        if self.world_size == 1:
            return step
        never = torch.iinfo(step.dtype).max
        step = torch.where(step > 0, step, never)
        dist.all_reduce(step, dist.ReduceOp.MIN)
        return torch.where(step < never, step, 0)

    def any(self, *flags: bool, device: torch.device) -> list[bool]:
        """For each of the flags, whether it is true in any process; the same result in all of them."""
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
        """Set each of the tensors to its values in process 0."""
        if self.world_size > 1:
            for tensor in tensors:
                values = tensor.detach().contiguous()
                dist.broadcast(values, 0)
                tensor.detach().copy_(values)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier()


def process_group() -> ProcessGroup:
    """The processes that train together, from `torch.distributed`."""
    if not dist.is_available() or not dist.is_initialized():
        return ProcessGroup()
    return ProcessGroup(dist.get_rank(), dist.get_world_size())


def was_started() -> bool:
    """Whether `torchrun`, or another launcher with the same variables, started this process."""
    return "LOCAL_RANK" in os.environ and dist.is_available()


def join(device: str = "auto") -> ProcessGroup:
    """Join the processes that `torchrun` started, if any; each takes the GPU of its own number, if there are GPUs.

    Args:
        device: device to train on. Afterwards, "auto" and "cuda" mean this process's own GPU.

    Raises:
        ValueError: there are fewer GPUs than processes, or ``device`` names one device for all processes.
    """
    global _store
    if not was_started() or dist.is_initialized():
        return process_group()
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        _take_gpu(device, int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # The strides of convolutions in dimensions of size 1, which do not matter.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    _store, rank, world_size = next(iter(dist.rendezvous("env://")))
    dist.init_process_group("nccl" if on_gpu else "gloo", store=_store, rank=rank, world_size=world_size)
    return process_group()


def _take_gpu(device: str, rank: int, world_size: int) -> None:
    count = torch.cuda.device_count()
    if world_size > 1 and device not in ("auto", "cuda"):
        raise ValueError(f"device must be 'auto', 'cuda' or 'cpu' for {world_size} processes, got {device!r}")
    if world_size > count:
        raise ValueError(
            f"{world_size} processes were started, but there are {count} GPUs: start one per GPU, or use device 'cpu'"
        )
    torch.cuda.set_device(rank % count)


def leave() -> None:
    """Close the connection that `join` opened, when all processes are here."""
    global _store
    if dist.is_available() and dist.is_initialized():
        process_group().wait()
        dist.destroy_process_group()
    _store = None


def is_first_to_fail() -> bool:
    """Whether this process is the one to report an error.

    That is the first process that failed, because the others fail while they wait for it. An error before they met,
    such as an unknown option, is the same in all processes, and process 0 reports it.
    """
    if not was_started():
        return True
    if _store is None:
        return os.environ.get("RANK", "0") == "0"
    return _store.add("failed", 1) == 1
