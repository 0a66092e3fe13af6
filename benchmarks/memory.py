"""Peak memory of the importance-weighted bound (IWAE-K), against K: it must stay flat.

    python benchmarks/memory.py [--quick] [--json FILE]

A VAE 784-400-50 on 256 random binary images, `dgm.evaluate` with K particles per datum, each K in a process of its own
that reports the most memory it ever held (its peak resident set). The first row is the same process without an
evaluation: Python, torch and the library.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
from timing import Benchmark, main

import dgm_pyro as dgm
from dgm_pyro.networks import MLP

LATENT = 50


def peak(num_particles: int, num_data: int) -> float:
    """Peak memory of this process, in MiB."""
    torch.manual_seed(0)
    vae = dgm.VAE(
        dgm.Normal(LATENT),
        dgm.Bernoulli(784, MLP((LATENT,), 784, (400,))),
        dgm.Normal(LATENT, MLP((784,), 2 * LATENT, (400,), levels=2)),
    )
    x = torch.randint(2, (num_data, 784))
    if num_particles:
        dgm.evaluate(vae, x, num_particles=num_particles)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run(bench: Benchmark) -> None:
    num_data = 16 if bench.quick else 256
    peaks = {}
    for num_particles in (0, 50, 500, 5000):
        command = [sys.executable, __file__, "--peak", str(num_particles), str(num_data), str(torch.get_num_threads())]
        peaks[num_particles] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    bench.add(
        f"Peak memory of IWAE-K, {num_data} data",
        [["K", "MiB", "above none"], *([str(k), f"{p:.0f}", f"{p - peaks[0]:.0f}"] for k, p in peaks.items())],
        mebibytes=peaks,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        particles, data, threads = map(int, sys.argv[2:])
        torch.set_num_threads(threads)
        print(peak(particles, data))
    else:
        main(run, __doc__)
