"""An epoch of training by one process with two threads, and by two processes with one thread each.

    python benchmarks/data_parallel.py [--quick] [--json FILE]

The same batches either way, so that two processes take half of each. Two more processes wait while one trains, and it
waits for them: the ways take turns. With `--threads N`, one process has 2 N threads and each of two has N.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from timing import Benchmark, main
from torch import distributed
from torch import multiprocessing as mp

import dgm_pyro as dgm
from dgm_pyro.networks import MLP, ConvDecoder, ConvEncoder

BATCH = 256


def mlp() -> dgm.VAE:
    shape = (1, 28, 28)
    likelihood = dgm.Bernoulli(shape, MLP((50,), 784, (400,)))
    return dgm.VAE(dgm.Normal(50), likelihood, dgm.Normal(50, MLP(shape, 100, (400,), levels=2)))


def convolutional() -> dgm.VAE:
    shape = (1, 28, 28)
    likelihood = dgm.Bernoulli(shape, ConvDecoder((32,), shape, 1, (16, 32)))
    return dgm.VAE(dgm.Normal(32), likelihood, dgm.Normal(32, ConvEncoder(shape, 64, (16, 32), levels=2)))


PROGRAMS: dict[str, Callable[[], dgm.VAE]] = {"an MLP VAE 784-400-50": mlp, "a convolutional VAE": convolutional}


def epochs(batches: int) -> dict[str, Callable[[], object]]:
    """An epoch of each program, to be called by every process of a training."""
    torch.manual_seed(0)
    data = dgm.Data(torch.randint(2, (BATCH * batches, 1, 28, 28), dtype=torch.uint8), levels=2)

    def epoch(program: dgm.VAE) -> Callable[[], object]:
        options = {"batch_size": BATCH, "lr": 1e-5, "validation": None, "device": "cpu", "progress": False}
        return lambda: dgm.fit(program, data, epochs=1, **options)

    return {name: epoch(make()) for name, make in PROGRAMS.items()}


def member(rank: int, threads: int, batches: int, meeting: str, orders: Connection) -> None:
    """One of two processes: trains the programs that it is told to, until it is told None."""
    torch.set_num_threads(threads)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    known = epochs(batches)
    while (name := orders.recv()) is not None:
        known[name]()
        orders.send(None)
    distributed.destroy_process_group()


def run(bench: Benchmark) -> None:
    threads, batches = torch.get_num_threads(), 2 if bench.quick else 8
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(2)]
        meeting = (Path(folder) / "meeting").as_uri()
        team = [
            context.Process(target=member, args=(rank, threads, batches, meeting, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in team:
            process.start()
        alone = epochs(batches)
        for name, epoch in alone.items():

            def one(count: int, epoch: Callable[[], object] = epoch) -> Callable[[], None]:
                def call() -> None:
                    torch.set_num_threads(count)
                    epoch()

                return call

            def two(name: str = name) -> None:
                for ours, _ in pipes:
                    ours.send(name)
                for ours, _ in pipes:
                    ours.recv()

            cases = {
                f"1 process, {threads} thread(s)": one(threads),
                f"1 process, {2 * threads} threads": one(2 * threads),
                f"2 processes, {threads} thread(s) each": two,
            }
            bench.compare(
                f"{name}: {batches} steps of {BATCH} data", cases, reference=next(iter(cases)), repeats=20, warm_up=2
            )
        for ours, _ in pipes:
            ours.send(None)
        for process in team:
            process.join()
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main(run, __doc__)
