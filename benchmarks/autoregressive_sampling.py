"""Sampling 28x28 images: a pass of the network for every pixel against the cache, at several batch sizes.

A naive chain is 784 passes alike, whatever has been drawn, so where they would take long only the first few are timed
and multiplied; the column says how many. Cached chains are always timed whole. Both are walked by the loop of
``program.sample``, distributions included, in turn, and the median of three rounds counts.

    python benchmarks/autoregressive_sampling.py [--quick] [--device cuda] [--json FILE] [--picture FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timing import Benchmark, main

import dgm_pyro as dgm
from dgm_pyro.families import autoregressive
from dgm_pyro.networks import MADE, CausalTransformer, PixelCNN

SHAPE = (1, 28, 28)
PIXELS = 784
BATCHES = (1, 4, 16, 64, 256)

PROGRAMS: dict[str, tuple[Callable[[], dgm.Program], tuple[int, ...]]] = {
    "PixelCNN, bits: 8 gated layers of 32 channels": (
        lambda: dgm.Autoregressive(dgm.Bernoulli(SHAPE, PixelCNN(SHAPE, 1, 32, 8, levels=2))),
        BATCHES,
    ),
    "PixelCNN, 256 levels: 8 gated layers of 32 channels, 5 logistics": (
        lambda: dgm.Autoregressive(dgm.DiscretizedLogistic(SHAPE, 256, 5, PixelCNN(SHAPE, 15, 32, 8, levels=256))),
        (1, 64),
    ),
    "MADE, bits: 2 hidden layers of 1024": (
        lambda: dgm.Autoregressive(dgm.Bernoulli(SHAPE, MADE(SHAPE, 1, (1024, 1024), levels=2))),
        (1, 16, 256),
    ),
    "transformer, bits: 4 layers of width 128, 4 heads": (
        lambda: dgm.Autoregressive(dgm.Bernoulli(SHAPE, CausalTransformer(SHAPE, 1, 128, 4, 4, levels=2))),
        (1, 4),
    ),
}


class Stop(Exception):
    """Enough of a chain."""


def seconds(run: Callable[[], object], device: str) -> float:
    """Processor time where one thread does all the work, so that other programs do not count; else wall time."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


@torch.no_grad()
def chain(program: dgm.Program, batch: int, pixels: int, cached: bool) -> None:
    """The first ``pixels`` of a chain."""

    def draw(i: int, p_i: torch.distributions.Distribution) -> torch.Tensor:
        x_i = p_i.sample()
        if i == pixels < PIXELS:
            raise Stop
        return x_i

    make = autoregressive.cache_maker
    try:
        if not cached:
            autoregressive.cache_maker = lambda network: None
        program.chain(draw, (batch,))
    except Stop:
        pass
    finally:
        autoregressive.cache_maker = make


def naive_passes(program: dgm.Program, batch: int, device: str, budget: float) -> int:
    """Number of passes of the naive chain that fit into ``budget`` seconds, at least 2."""
    one = seconds(partial(chain, program, batch, 1, cached=False), device)
    return min(PIXELS, max(2, int(budget / one)))


def measure(bench: Benchmark, title: str, make: Callable[[], dgm.Program], batches: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    program = make().to(bench.device).eval()
    chain(program, 1, 8, cached=False)
    chain(program, 1, PIXELS, cached=True)
    rows = [["batch", "naive s", "passes timed", "cached s", "images/s cached", "naive / cached"]]
    numbers = []
    for batch in batches[:1] if bench.quick else batches:
        passes = naive_passes(program, batch, bench.device, 0.5 if bench.quick else 1.5)
        naive, cached = [], []
        for _ in range(1 if bench.quick else 3):
            slow = seconds(partial(chain, program, batch, passes, cached=False), bench.device)
            naive.append(slow * PIXELS / passes)
            cached.append(seconds(partial(chain, program, batch, PIXELS, cached=True), bench.device))
        slow, fast = statistics.median(naive), statistics.median(cached)
        rows.append(
            [
                str(batch),
                f"{slow:.3g}",
                "all" if passes == PIXELS else f"{passes} of {PIXELS}",
                f"{fast:.3g}",
                f"{batch / fast:.3g}",
                f"{slow / fast:.3g}",
            ]
        )
        numbers.append({"batch": batch, "naive": slow, "passes": passes, "cached": fast, "ratio": slow / fast})
    bench.add(title, rows, batches=numbers)


def run(bench: Benchmark, picture: Path | None) -> None:
    for title, (make, batches) in PROGRAMS.items():
        measure(bench, title, make, batches)
    if picture is not None:
        draw_picture(bench, picture)


def draw_picture(bench: Benchmark, path: Path) -> None:
    """Plot the speed-up against the batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for table in bench.tables:
        points = table["batches"]
        axes.loglog([p["batch"] for p in points], [p["ratio"] for p in points], "o-", label=table["title"], base=2)
    axes.set_yscale("log", base=10)
    axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    axes.set(xlabel="images drawn at once", ylabel="naive time / cached time")
    axes.legend(fontsize=7, frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--picture", type=Path)
    own, rest = parser.parse_known_args()
    main(partial(run, picture=own.picture), __doc__, rest)
