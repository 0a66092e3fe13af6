"""From which resolution on convolutions pay: VAEs of glyphs, of an MLP and of convolutions, at several resolutions.

    python benchmarks/image_sizes.py [--quick]

Both VAEs have 16 latents and take the same steps on the same images; validation loss in bits per dimension, the lower
the better, with its standard error over the images. `networks.sizes.CONVOLUTIONS_FROM` is chosen by this table.
"""

import argparse
import time

import numpy as np
import torch

import dgm_pyro as dgm
from dgm_pyro import image_sets
from dgm_pyro.networks import MLP, ConvDecoder, ConvEncoder

LATENT_SIZE, LEVELS = 16, 16


def glyphs(size: int, num_data: int, seed: int) -> dgm.Data:
    x, _ = image_sets.glyphs(np.random.default_rng(seed), num_data, num_classes=36, size=size)
    return dgm.Data(torch.from_numpy(x) // (256 // LEVELS), levels=LEVELS, name=f"glyphs of {size}")


def vae(size: int, convolutions: bool) -> dgm.VAE:
    shape = (1, size, size)
    if convolutions:
        reader = ConvEncoder(shape, 2 * LATENT_SIZE, (32, 64), levels=LEVELS)
        return dgm.VAE(
            dgm.Normal(LATENT_SIZE),
            dgm.DiscretizedLogistic(shape, LEVELS, 5, ConvDecoder((LATENT_SIZE,), shape, 15, (32, 64))),
            dgm.Normal(LATENT_SIZE, reader),
        )
    return dgm.VAE(
        dgm.Normal(LATENT_SIZE),
        dgm.DiscretizedLogistic(shape, LEVELS, 5, MLP((LATENT_SIZE,), 15 * size**2, (256, 256))),
        dgm.Normal(LATENT_SIZE, MLP(shape, 2 * LATENT_SIZE, (256, 256), levels=LEVELS)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two resolutions, few steps")
    parser.add_argument("--sizes", type=int, nargs="+", default=(8, 12, 16, 28))
    parser.add_argument("--gradient-steps", type=int, default=1200)
    options = parser.parse_args()
    sizes, steps = ((8, 16), 20) if options.quick else (options.sizes, options.gradient_steps)
    for size in sizes:
        train, valid = glyphs(size, 200 if options.quick else 10_000, 0), glyphs(size, 200, 1)
        for convolutions in (False, True):
            torch.manual_seed(0)
            program, start = vae(size, convolutions), time.perf_counter()
            dgm.fit(program, train, gradient_steps=steps, batch_size=64, lr=2e-3, validation=None, progress=False)
            evidence = dgm.evaluate(program, valid)
            print(
                f"{size}x{size} {'convolutions' if convolutions else 'MLP':<12} {evidence.bits_per_dim:.3f} +- "
                f"{evidence.stderr:.3f} bits/dim, {sum(p.numel() for p in program.parameters()):,} parameters, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
