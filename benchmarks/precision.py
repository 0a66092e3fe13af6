"""A training step of image models on a CPU, in float32 and in bf16, with and without the layout of channels last.

    python benchmarks/precision.py [--quick] [--threads N] [--json FILE]

Programs of `dgm.build` for 1x28x28 images of 256 levels, in batches of 32, uncompiled; the times are processor times.
`dgm.fit` takes channels last in bf16 on a CPU, and keeps the layout of the program in float32. Bf16 is fast on
processors with AMX, for which ``lscpu`` lists ``amx_bf16``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from timing import Benchmark, main

import dgm_pyro as dgm

BATCH = 32
MODELS = ("pixelcnn", "glow", "vae", "vdvae", "diffusion")


def step(name: str, precision: str, layout: torch.memory_format) -> Callable[[], object]:
    """A function of which each call is one training step: an epoch of one batch."""
    torch.manual_seed(0)
    data = dgm.Data(torch.randint(256, (BATCH, 1, 28, 28), dtype=torch.uint8), levels=256)
    program = dgm.build(name, data)
    options = dgm.TrainingOptions(epochs=10**6, batch_size=BATCH, validation=None, compile=False, precision=precision)
    training = dgm.Training(program, data, None, options)
    # In place of the layout that `Training` chose.
    for parameter in program.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return training.advance


def run(bench: Benchmark) -> None:
    for name in MODELS[:1] if bench.quick else MODELS:
        bench.compare(
            f"{name}: a step of {BATCH} images",
            {
                "float32": step(name, "float32", torch.contiguous_format),
                "float32, channels last": step(name, "float32", torch.channels_last),
                "bf16": step(name, "bf16", torch.contiguous_format),
                "bf16, channels last": step(name, "bf16", torch.channels_last),
            },
            reference="float32",
            warm_up=2,
            repeats=9,
            clock=time.process_time,
        )


if __name__ == "__main__":
    main(run, __doc__)
