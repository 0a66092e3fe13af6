"""Bits per dimension of glyphs: a VQ-VAE over a grid of codes beside a VAE, and how many of its codes it uses.

    python benchmarks/quantized_images.py [--models vq-vae vae] [--steps 350 1230] [--num-codes 256] [--seed 0]

2,700 glyphs of 28x28 pixels and 256 levels train each model in steps of 64 images; 300 others choose the best weights
and score them. Times are processor time of one thread. The perplexity of the codes is the exponential of the entropy of
their frequencies, 1 to the number of codes. A picture of each model goes to ``bench/``: images, their reconstructions,
and two rows of samples.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import dgm_pyro as dgm
from dgm_pyro import plots

SHOWN = 12


def usage(program: dgm.VAE, x: torch.Tensor) -> str:
    """How many of the codes are in use for x, and their perplexity."""
    codebook = program.encoder.codebook
    k = codebook.nearest(dgm.representations.encode(program, x).movedim(1, -1))
    shares = torch.bincount(k.flatten(), minlength=codebook.num_codes).double() / k.numel()
    return f", {int((shares > 0).sum())} codes used, perplexity {torch.special.entr(shares).sum().exp():.0f}"


def trained(name: str, steps: int, num_codes: int, seed: int) -> str:
    train, held_out = dgm.data.load("glyphs", num_data=3000).split(0.1, seed=0)
    torch.manual_seed(seed)
    program = dgm.build(name, train, num_codes=num_codes if name == "vq-vae" else None)
    start = time.process_time()
    dgm.fit(
        program, train, gradient_steps=steps, validation=held_out, validate_every=max(1, steps // 4), seed=seed,
        compile=False, progress=False,
    )  # fmt: skip
    seconds = time.process_time() - start
    found = dgm.evaluate(program, held_out)
    x = held_out.x[:SHOWN]
    decoded = dgm.representations.decode(program, dgm.representations.encode(program, x))
    shown = torch.cat([x, decoded.round().clamp(0, 255).to(x), program.sample(2 * SHOWN).to(x)])
    plots.write_picture(
        Path("bench") / f"quantized_images_{name}.png", plots.images(shown, levels=256, num_columns=SHOWN)
    )
    return (
        f"{name}: {found.bits_per_dim:.3f} +- {found.stderr:.3f} bits/dim ({found.kind}), KL {found.kl['z']:.0f} nats, "
        f"{sum(p.numel() for p in program.parameters()):,} parameters, {steps} steps in {seconds:.0f} s"
        + (usage(program, held_out.x) if name == "vq-vae" else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vq-vae", "vae"])
    parser.add_argument("--steps", type=int, nargs="+", default=[350, 1230], help="one number for each model")
    parser.add_argument("--num-codes", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, steps in zip(options.models, options.steps, strict=True):
        print(trained(name, steps, options.num_codes, options.seed), flush=True)


if __name__ == "__main__":
    main()
