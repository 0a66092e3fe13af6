"""Every model by name for images of 1x28x28, 3x32x32 and 3x64x64: parameters, time and memory of a training step.

    python benchmarks/image_models.py [--quick] [--threads N] [--json FILE]

Images of 256 levels, noise, in batches of 4, on a CPU; each cell in a process of its own. A step is one of `dgm.fit`,
uncompiled: loss, gradient, AdamW. Its time is processor time per image, the median of up to 4 steps; other work on the
machine adds little to it. The memory is what the process holds at most, less what it held before it built the program.
Cells above the budget of `dgm.build` are refused, as they are there.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from timing import Benchmark, main

import dgm_pyro as dgm
from dgm_pyro.catalog import MODELS, TooLargeError

SHAPES = ((1, 28, 28), (3, 32, 32), (3, 64, 64))
BATCH = 4
MIB = 2**20 if sys.platform == "darwin" else 2**10


class Clock:
    """A tracker: processor time of each epoch, which is one step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_start(self, training: Any) -> None:
        self.at.append(time.process_time())

    def on_epoch(self, epoch: Any) -> None:
        self.at.append(time.process_time())

    def on_end(self, history: Any) -> None:
        pass

    @property
    def steps(self) -> list[float]:
        return [after - before for before, after in zip(self.at, self.at[1:], strict=False)]


def cell(name: str, shape: tuple[int, ...], steps: int) -> dict[str, Any]:
    """Parameters, seconds per image and MiB of one model at one shape."""
    data = dgm.Data(
        torch.randint(256, (BATCH, *shape), dtype=torch.uint8), torch.arange(BATCH) % 2, levels=256, name="noise"
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        program = dgm.build(name, data)
    except TooLargeError as error:
        return {"parameters": error.num_parameters, "refused": True}
    clock = Clock()
    objective = "gan" if name == "implicit" else None
    dgm.fit(program, data, objective, epochs=steps, batch_size=BATCH, minutes=0.25, validation=None, trackers=[clock],
            compile=False, progress=False)  # fmt: skip
    # The first step sets up; where there is only that one, it is long enough.
    return {
        "parameters": sum(parameter.numel() for parameter in program.parameters()),
        "seconds": statistics.median(clock.steps[1:] or clock.steps) / BATCH,
        "mebibytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / MIB,
    }


def shown(found: dict[str, Any]) -> str:
    size = f"{found['parameters'] / 1e6:.2f} M" if found["parameters"] < 1e8 else f"{found['parameters'] / 1e6:,.0f} M"
    if "refused" in found:
        return f"{size}, refused"
    return f"{size}, {1e3 * found['seconds']:,.0f} ms, {found['mebibytes']:,.0f} MiB"


def run(bench: Benchmark) -> None:
    names, shapes, steps = (("vae", "implicit"), SHAPES[:1], 1) if bench.quick else (tuple(MODELS), SHAPES, 4)
    table: dict[str, dict[str, Any]] = {}
    for name in names:
        table[name] = {}
        for shape in shapes:
            command = [sys.executable, __file__, "--cell", name, "x".join(map(str, shape)), str(steps)]
            command.append(str(torch.get_num_threads()))
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            table[name]["x".join(map(str, shape))] = json.loads(done.stdout)
            print(name, shape, shown(table[name]["x".join(map(str, shape))]), file=sys.stderr, flush=True)
    bench.add(
        f"Parameters, processor time per image and memory of a step, batches of {BATCH}",
        [["model", *next(iter(table.values()))], *([name, *map(shown, row.values())] for name, row in table.items())],
        cells=table,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cell"]:
        model, at, count, threads = sys.argv[2:]
        torch.set_num_threads(int(threads))
        torch.manual_seed(0)
        print(json.dumps(cell(model, tuple(map(int, at.split("x"))), int(count))))
    else:
        main(run, __doc__)
