"""Processor time with and without `dgm_pyro.malloc.keep_freed_memory`, which ``dgm`` calls for its processes.

    python benchmarks/freed_memory.py [--quick] [--json FILE]

Each case runs in a process of its own, three times in turn with and without. The system's share is the time in which
it clears pages. `dgm.evaluate` takes as many data at once as keep outputs below `LARGEST_OUTPUT`; two cases take 256.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from timing import Benchmark, main

import dgm_pyro as dgm
from dgm_pyro.malloc import keep_freed_memory
from dgm_pyro.networks import MLP

IMAGES = dgm.Data(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), levels=256, name="images")


def evaluation(model: str, calls: int, whole: bool = False) -> Callable[[], object]:
    if whole:
        dgm.evaluation.LARGEST_OUTPUT = 2**60
    program, x = dgm.build(model, IMAGES), torch.randint(256, (64, 1, 28, 28))
    return lambda: dgm.evaluate(program, x.repeat(calls, 1, 1, 1))


def training(model: str, calls: int) -> Callable[[], object]:
    program, x = dgm.build(model, IMAGES), torch.randint(256, (256, 1, 28, 28), dtype=torch.uint8)
    options = {"gradient_steps": calls, "batch_size": 64, "compile": False, "progress": False}
    return lambda: dgm.fit(program, dgm.Data(x, levels=256), **options)


def importance_weighted(calls: int) -> Callable[[], object]:
    program = dgm.VAE(
        dgm.Normal(50),
        dgm.Bernoulli(784, MLP((50,), 784, (400,))),
        dgm.Normal(50, MLP((784,), 100, (400,), levels=2)),
    )
    x = dgm.Data(torch.randint(2, (256, 784)), levels=2)
    options = {"gradient_steps": calls, "batch_size": 16, "compile": False, "progress": False}
    return lambda: dgm.fit(program, x, "iwae:1024", **options)


CASES: dict[str, tuple[Callable[[int], Callable[[], object]], int]] = {
    "evaluate a convolutional VAE": (lambda calls: evaluation("vae", calls), 4),
    "evaluate a convolutional VAE, 256 data at once": (lambda calls: evaluation("vae", calls, whole=True), 4),
    "evaluate a PixelCNN": (lambda calls: evaluation("pixelcnn", calls), 4),
    "evaluate a PixelCNN, 256 data at once": (lambda calls: evaluation("pixelcnn", calls, whole=True), 4),
    "train a convolutional VAE, batch 64": (lambda calls: training("vae", calls), 10),
    "train a U-Net, batch 64": (lambda calls: training("diffusion", calls), 4),
    "train an MLP VAE, IWAE-1024, batch 16": (importance_weighted, 4),
}


def seconds(name: str, keep: bool, calls: int) -> tuple[float, float]:
    """Processor time of a case in this process, and the system's part of it."""
    if keep and not keep_freed_memory():
        raise SystemExit("this system has no malloc that could keep memory, or its environment configures it")
    make, _ = CASES[name]
    torch.manual_seed(0)
    make(1)()
    run = make(calls)
    before = resource.getrusage(resource.RUSAGE_SELF)
    run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    return after.ru_utime - before.ru_utime + system, system


def run(bench: Benchmark) -> None:
    rows, found = [], {}
    for name, (_, calls) in CASES.items():
        times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for _ in range(1 if bench.quick else 3):
            for keep in times:
                command = [sys.executable, __file__, "--case", name, str(int(keep)), str(1 if bench.quick else calls)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                times[keep].append(tuple(json.loads(done.stdout)))
        without, kept = ([statistics.median(each) for each in zip(*times[keep], strict=True)] for keep in (False, True))
        rows.append([name, f"{without[0]:.1f} ({without[1]:.1f})", f"{kept[0]:.1f} ({kept[1]:.1f})"])
        rows[-1].append(f"{kept[0] / without[0]:.2f}")
        found[name] = {"without": without, "kept": kept}
    header = ["case", "without", "kept", "ratio"]
    bench.add("Processor time in seconds (of it, the system's), medians", [header, *rows], **found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        torch.set_num_threads(1)
        print(json.dumps(seconds(sys.argv[2], sys.argv[3] == "1", int(sys.argv[4]))))
    else:
        main(run, __doc__)
