"""Cost of per-datum noise: evidence with it, and with torch's generator instead.

python benchmarks/noise_of_a_datum.py [--quick] [--device cuda] [--json FILE]
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from unittest import mock

import torch
from timing import Benchmark, main

import dgm_pyro as dgm
from dgm_pyro import noise


def shared(evaluate: Callable[[], object]) -> Callable[[], object]:
    """``evaluate`` with the noise of the call, not of its data."""

    def run() -> object:
        with mock.patch.object(noise, "per_datum", return_value=contextlib.nullcontext()):
            return evaluate()

    return run


def run(bench: Benchmark) -> None:
    digits = dgm.data.load("digits", "test", num_data=60 if bench.quick else 360)
    binary = dgm.data.load("digits-binary", "test", num_data=60 if bench.quick else 360)
    cases = {
        "VAE, 8 draws of the ELBO": (dgm.build("vae", binary), binary, {}),
        "VAE, 50 particles": (dgm.build("vae", binary), binary, {"num_particles": 50}),
        "spline flow of integers, 16 particles": (dgm.build("nsf", digits), digits, {"num_particles": 16}),
        "diffusion, 8 draws of the ELBO": (dgm.build("diffusion", digits), digits, {}),
    }
    for name, (program, data, options) in cases.items():
        program.to(bench.device)

        def own(program: dgm.Program = program, data: dgm.Data = data, options: dict = options) -> object:
            return dgm.evaluate(program, data, **options)

        with torch.no_grad():
            bench.compare(name, {"each datum's own": own, "the call's": shared(own)}, reference="the call's")


if __name__ == "__main__":
    main(run, __doc__)
