"""Growth of cost with features D, diffusion steps T, particles K and the batch, and the exponents of the curves.

    python benchmarks/growth.py [--quick] [--device cuda] [--json FILE] [--picture FILE]

Networks keep their widths while the one quantity grows. A step is a loss and its gradient, not compiled. The exponent
is the slope of log(time) against log(size), by least squares over the sizes that cost at least twice as much as the
smallest one, because below that the fixed cost of a call shows; where fewer than three do, the curve is flat so far,
and all sizes count. On the CPU it is processor time, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from timing import Benchmark, compare, main
from torch import Tensor

import dgm_pyro as dgm
from dgm_pyro.experiments.plots import THEMES
from dgm_pyro.families.flow import nsf
from dgm_pyro.networks import MADE, MLP, DenoisingMLP

Make = Callable[[int, str], Callable[[], object]]


@dataclass
class Curve:
    """A quantity that grows, its sizes, a function that makes the case of one size, and the exponent in theory."""

    grows: str
    make: Make
    sizes: Sequence[int]
    expected: str
    times: list[float] = field(default_factory=list)

    def exponent(self) -> float:
        points = [(math.log(n), math.log(t)) for n, t in zip(self.sizes, self.times, strict=True)]
        above = [point for point in points if point[1] > points[0][1] + math.log(2)]
        x, y = (torch.tensor(values) for values in zip(*(above if len(above) >= 3 else points), strict=True))
        return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def step(program: dgm.Program, x: Tensor, objective: dgm.Objective | None = None) -> Callable[[], object]:
    objective = objective or dgm.ELBO()

    def run() -> None:
        program.zero_grad()
        (-objective(program, x).surrogate.mean()).backward()

    return run


def made(features: int, device: str) -> dgm.Program:
    return dgm.Autoregressive(dgm.Bernoulli(features, MADE(features, 1, (256,)))).to(device).eval()


def scoring(features: int, device: str) -> Callable[[], object]:
    program, x = made(features, device), torch.randint(2, (64, features), device=device)
    return torch.no_grad()(lambda: program.log_prob(x))


def naive_sampling(features: int, device: str) -> Callable[[], object]:
    program = made(features, device)

    @torch.no_grad()
    def draw() -> None:
        x = torch.zeros(64, features, device=device)
        for i in range(features):  # in a whole pass each
            x[:, i] = program.factors(x).sample()[:, i]

    return draw


def cached_sampling(features: int, device: str) -> Callable[[], object]:
    program = made(features, device)
    return lambda: program.sample(64)


def flow_step(features: int, device: str) -> Callable[[], object]:
    return step(nsf(features, layers=2, hidden=(128,)).to(device), torch.randn(64, features, device=device))


def vae(features: int, device: str) -> dgm.Program:
    return dgm.VAE(
        dgm.Normal(16),
        dgm.Bernoulli(features, MLP((16,), features, (128,))),
        dgm.Normal(16, MLP((features,), 32, (128,), levels=2)),
    ).to(device)


def vae_step(features: int, device: str) -> Callable[[], object]:
    return step(vae(features, device), torch.randint(2, (64, features), device=device))


def batch_step(batch: int, device: str) -> Callable[[], object]:
    return step(vae(256, device), torch.randint(2, (batch, 256), device=device))


def iwae_step(num_particles: int, device: str) -> Callable[[], object]:
    return step(vae(256, device), torch.randint(2, (16, 256), device=device), dgm.IWAE(num_particles))


def diffusion(steps: int, device: str) -> dgm.Program:
    return dgm.Diffusion(16, DenoisingMLP((16,), (128, 128)), num_steps=steps).to(device)


def plated_step(steps: int, device: str) -> Callable[[], object]:
    return step(diffusion(steps, device), torch.randn(128, 16, device=device))


def unrolled_step(steps: int, device: str) -> Callable[[], object]:
    return step(diffusion(steps, device).unroll(), torch.randn(128, 16, device=device))


def powers(first: int, last: int) -> list[int]:
    """Powers of two from ``first`` to ``last``."""
    return [2**i for i in range(int(math.log2(first)), int(math.log2(last)) + 1)]


# MADE connects every feature directly with every later one, by D^2 weights: that is its 2, and the 3 of D whole passes.
CURVES = {
    "autoregressive, log p(x)": Curve("features", scoring, powers(32, 4096), "2"),
    "autoregressive, naive sampling": Curve("features", naive_sampling, powers(16, 512), "3"),
    "autoregressive, cached sampling": Curve("features", cached_sampling, powers(16, 1024), "2"),
    "spline flow, step": Curve("features", flow_step, powers(32, 4096), "1"),
    "VAE, step": Curve("features", vae_step, powers(256, 32768), "1"),
    "diffusion, unrolled step": Curve("diffusion steps", unrolled_step, powers(2, 64), "1"),
    "diffusion, plated step": Curve("diffusion steps", plated_step, powers(8, 1024), "0"),
    "VAE, step of IWAE-K": Curve("particles", iwae_step, powers(16, 4096), "1"),
    "VAE, step of a batch": Curve("batch", batch_step, powers(64, 8192), "1"),
}


def measure(bench: Benchmark, curve: Curve) -> None:
    if bench.quick:
        curve.sizes = curve.sizes[:4]
    cases = {str(n): curve.make(n, bench.device) for n in curve.sizes}
    clock = time.process_time if bench.device == "cpu" else time.perf_counter
    times = compare(cases, warm_up=1, repeats=3 if bench.quick else 15, seconds=6, clock=clock)
    curve.times = [times.median(name) for name in cases]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def run(bench: Benchmark, picture: Path | None = None) -> None:
    torch.manual_seed(0)
    rows = [["", "grows", "from", "to", "ms", "to ms", "exponent", "allowed"]]
    for name, curve in CURVES.items():
        measure(bench, curve)
        sizes = [f"{curve.sizes[i]}" for i in (0, -1)]
        ends = [milliseconds(curve.times[i]) for i in (0, -1)]
        rows.append([name, curve.grows, *sizes, *ends, f"{curve.exponent():.2f}", curve.expected])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    numbers = {
        name: {"sizes": list(c.sizes), "seconds": c.times, "exponent": c.exponent()} for name, c in CURVES.items()
    }
    bench.add("Cost against size", rows, curves=numbers)
    if picture is not None:
        draw_picture(picture)


def draw_picture(path: Path) -> None:
    """Features in one panel, the rest in another, both axes logarithmic."""
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    with matplotlib.rc_context(THEMES["light"].rc):
        figure, axes = plt.subplots(2, 1, figsize=(4.3, 7.4), layout="constrained")
        for axis, features in zip(axes, (True, False), strict=True):
            for name, curve in CURVES.items():
                if (curve.grows == "features") == features:
                    label = f"{name} ({curve.exponent():.2f})"
                    axis.loglog(curve.sizes, [1e3 * t for t in curve.times], marker="o", markersize=3, label=label)
            axis.set_xlabel("features" if features else "diffusion steps, particles, or data of a batch")
            axis.set_ylabel("ms")
            axis.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
        figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--picture", type=Path, default=None)
    own, rest = parser.parse_known_args()
    main(lambda bench: run(bench, own.picture), __doc__, rest)
