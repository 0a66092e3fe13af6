"""A training step of a VAE with each prior of `dgm.build`, beside that with a standard Normal.

    python benchmarks/prior_steps.py [--quick] [--json FILE]

The data are binary digits, 64 per step; z has 16 features. A step is the ELBO, its gradient and a fused Adam update,
not compiled.
"""

from __future__ import annotations

from collections.abc import Callable

from timing import Benchmark, main
from training_step import steps_of

import dgm_pyro as dgm
from dgm_pyro.catalog import PRIORS


def run(bench: Benchmark) -> None:
    digits, elbo = dgm.data.load("digits-binary").to(bench.device), dgm.ELBO()

    def step(prior: str) -> Callable[..., None]:
        program = dgm.build("vae", digits, prior=prior).to(bench.device)
        return steps_of(lambda x: -elbo(program, x).surrogate.mean(), program, digits.x[:64])

    bench.compare("a training step, by prior", {prior: step(prior) for prior in PRIORS}, reference="normal", in_a_row=5)


if __name__ == "__main__":
    main(run, __doc__)
