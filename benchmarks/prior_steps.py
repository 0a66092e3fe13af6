"""A training step of a VAE with each prior of `dgm.build`, beside that with a standard Normal.

    python benchmarks/prior_steps.py [--quick] [--json FILE]

The data are binary digits, 64 per step; z has 16 features. A step is the ELBO, its gradient and a fused Adam update,
not compiled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import Benchmark, main

import dgm_pyro as dgm
from dgm_pyro.catalog import PRIORS


def step_of(program: dgm.Program, x: torch.Tensor) -> Callable[[], None]:
    elbo, optimizer = dgm.ELBO(), torch.optim.Adam(program.parameters(), 1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (-elbo(program, x).value.mean()).backward()
        optimizer.step()

    return step


def run(bench: Benchmark) -> None:
    digits = dgm.data.load("digits-binary").to(bench.device)
    steps = {prior: step_of(dgm.build("vae", digits, prior=prior).to(bench.device), digits.x[:64]) for prior in PRIORS}
    bench.compare("a training step, by prior", steps, reference="normal", in_a_row=5)


if __name__ == "__main__":
    main(run, __doc__)
