"""Conditional density estimation by name: y = sin t + noise, in units of their own, against the analytic density.

    python benchmarks/conditional_density.py [--models pixels,nsf] [--epochs 20]

"pixels" given t is a mixture-density network, "vae" a conditional VAE. Numbers are nats per datum of 4,000 test data,
less those of the density that made them.
"""

import argparse
import math
import time

import torch
from torch import Tensor
from torch.distributions import Normal

import dgm_pyro as dgm

NOISE, UNIT = 0.1, 1000.0


def pairs(seed: int, size: int = 4000) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    t = 6 * torch.rand(size, 1, generator=random) - 3
    return t, torch.sin(t) + NOISE * torch.randn(size, 1, generator=random)


def in_units(t: Tensor, y: Tensor) -> dgm.Data:
    """The same in other units: t in days of a year, say, y far from 0 and large."""
    return dgm.Data(UNIT * y + 10 * UNIT, given=50 * t + 300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="pixels,made,realnvp,maf,nsf,vae,diffusion,diffusion-continuous")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    train, test = pairs(0), pairs(1)
    exact = Normal(test[0].sin(), NOISE).log_prob(test[1]).mean().item() - math.log(UNIT)
    print(f"analytic {exact:.3f} nats\n\n| model | kind | nats - analytic | seconds |\n|---|---|---|---|")
    for name in options.models.split(","):
        start, data = time.perf_counter(), in_units(*train)
        torch.manual_seed(0)
        program = dgm.build(name, data)
        dgm.fit(program, data, epochs=options.epochs, lr=2e-3, batch_size=128, progress=False)
        evidence = dgm.evaluate(program, in_units(*test), num_samples=64)
        print(
            f"| {name} | {evidence.kind} | {evidence.nats - exact:+.4f} | {time.perf_counter() - start:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
