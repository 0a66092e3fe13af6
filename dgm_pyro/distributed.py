"""Several processes at one training, each on its share of every batch: what `torchrun` starts.

    torchrun --nproc-per-node=4 -m dgm_pyro train vae --data mnist --out runs/vae

`torch.nn.parallel.DistributedDataParallel` averages the gradients; here is only who does what.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Team:
    """The processes of a training; one alone, if there are no others.

    Attributes:
        rank: which one this is, from 0; the first one writes.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def batches(self, count: int, batch_size: int) -> int:
        """How many batches an epoch of ``count`` data has.

        A last batch with less than two data per process is left out: the shuffling leaves out others each time.
        """
        full, rest = divmod(count, batch_size)
        return full + (rest > 0 if self.size == 1 else rest >= 2 * self.size)

    def share(self, rows: Tensor) -> Tensor:
        """The part of a batch that is for this process."""
        return rows.tensor_split(self.size)[self.rank]

    def weight(self, rows: Tensor) -> float:
        """What to multiply the mean loss of `share` with, so that the processes' mean is that of the batch."""
        return len(self.share(rows)) * self.size / len(rows)

    def total(self, values: Tensor) -> Tensor:
        """The sum of the processes' values."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def earliest(self, step: Tensor) -> Tensor:
        """The smallest positive value that a process has; 0 if none has one."""
        if self.size == 1:
            return step
        never = torch.iinfo(step.dtype).max
        step = torch.where(step > 0, step, never)
        dist.all_reduce(step, dist.ReduceOp.MIN)
        return torch.where(step < never, step, 0)

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()


def team() -> Team:
    """The processes that train together, as `torch.distributed` was told."""
    if not dist.is_available() or not dist.is_initialized():
        return Team()
    return Team(dist.get_rank(), dist.get_world_size())


def join() -> Team:
    """Join the processes that `torchrun` started, if it did; each takes the GPU of its number, if there is one."""
    if "LOCAL_RANK" in os.environ and dist.is_available() and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return team()


def leave() -> None:
    """Close what `join` opened."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
