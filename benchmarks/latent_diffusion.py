"""The second stage of a latent diffusion: a diffusion as the prior of a trained VAE with a grid of latents.

    python benchmarks/image_bits.py --train train.npz --test test.npz --models vae --set grid=16,16 prior=flow
    python benchmarks/latent_diffusion.py bench/FOLDER --train train.npz --test test.npz --minutes 40

The first command trains the VAE and writes its program to ``FOLDER``. The second fits a diffusion in continuous time to
draws of z, and prints the bits per dimension of the test images with either prior. ``--picture`` draws samples of both,
and the training images nearest to those of the diffusion.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from image_bits import images, steps_in
from torch import Tensor

import dgm_pyro as dgm
from dgm_pyro.catalog import units_of
from dgm_pyro.malloc import keep_freed_memory
from dgm_pyro.networks import DenoisingUNet
from dgm_pyro.training.fit import History


def draws_of_z(vae: dgm.VAE, x: Tensor, each: int) -> Tensor:
    """``each`` draws of q(z | x) for every image."""
    return torch.cat([vae.encoder.sample(len(part), given=part) for part in x.repeat(each, 1, 1, 1).split(256)])


def diffusion_of(z: Tensor, width: int, objective: str) -> dgm.Standardized:
    """A diffusion of standardized z."""
    shape = z.shape[1:]
    denoiser = DenoisingUNet(shape, (width, 2 * width), dropout=0.1, heads=4, max_frequency=30.0)
    parts = {"noise_schedule": "learned"} if objective == "elbo" else {"predict": "edm", "sigma_data": 1.0}
    return dgm.Standardized(dgm.ContinuousDiffusion(shape, denoiser, **parts), *units_of(z))


def nearest(x: Tensor, among: Tensor) -> Tensor:
    """The image of ``among`` nearest to each of ``x``, by the distance of pixels."""
    return among[torch.cdist(x.flatten(1).double(), among.flatten(1).double()).argmin(1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vae", type=Path, help="folder of a VAE with a grid of latents")
    parser.add_argument("--train", required=True, help="an .npz file")
    parser.add_argument("--test", required=True, help="an .npz file")
    parser.add_argument("--minutes", type=float, default=40.0, help="about how long the training takes (default: 40)")
    parser.add_argument("--objective", default="elbo", choices=("elbo", "edm"), help="default: elbo")
    parser.add_argument("--width", type=int, default=96, help="channels of the U-Net (default: 96)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 0.001)")
    parser.add_argument("--draws", type=int, default=10, help="of z for each training image (default: 10)")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    train, test, vae = images(options.train), images(options.test), dgm.load(options.vae)
    torch.manual_seed(options.seed)
    order = torch.randperm(len(train))
    held_out, rest = order[: len(train) // 10], order[len(train) // 10 :]
    z, validation = draws_of_z(vae, train.x[rest], options.draws), draws_of_z(vae, train.x[held_out], 1)

    def fit(prior: dgm.Program, steps: int, every: int) -> History:
        return dgm.fit(
            prior,
            dgm.Data(z, name="z"),
            options.objective,
            gradient_steps=steps,
            batch_size=32,
            lr=options.lr,
            ema=0.999,
            seed=options.seed,
            compile=True,
            precision="bf16",
            validation=dgm.Data(validation, name="z"),
            validate_every=every,
            progress=False,
        )

    steps = steps_in(options.minutes, lambda *steps: fit(diffusion_of(z, options.width, options.objective), *steps))
    torch.manual_seed(options.seed)
    prior = diffusion_of(z, options.width, options.objective)
    start = time.process_time()
    history = fit(prior, steps, max(1, steps // 8))
    print(
        {
            "steps": steps,
            "seconds": round(time.process_time() - start),
            "parameters": sum(p.numel() for p in prior.parameters()),
            f"validation, {history.validation_unit}": [epoch.validation for epoch in history.epochs],
        }
    )
    latent = dgm.VAE(prior, vae.likelihood, vae.encoder)
    dgm.save(latent, Path("bench") / f"latent_diffusion_{options.objective}_{options.seed}")
    for name, program in {"the first stage's prior": vae, "the diffusion": latent}.items():
        print(name, dgm.evaluate(program, test, num_particles=1, num_samples=8, batch_size=32))
    if options.picture is not None:
        draw(options.picture, vae, latent, train, test)


def draw(path: Path, vae: dgm.VAE, latent: dgm.VAE, train: dgm.Data, test: dgm.Data) -> None:
    """Test images from their z, twenty samples with either prior, and the training images nearest to the samples."""
    torch.manual_seed(0)
    some = test.x[torch.randperm(len(test))[:10]]
    rows = {"test images": some, "from z ~ q(z | x)": vae.likelihood.sample(10, given=draws_of_z(vae, some, 1))}
    drawn = {
        "first prior": vae.prior.sample(20),
        "diffusion": latent.prior.sample(20, sampler="heun", num_steps=50, spacing="karras"),
    }
    for name, z in drawn.items():
        for number, part in enumerate(vae.likelihood.sample(20, given=z).split(10), 1):
            rows |= {f"{name}, {number}": part, f"nearest to {name}, {number}": nearest(part, train.x)}
    figure = dgm.plots.images(
        torch.cat([*rows.values()]), levels=256, num_columns=10, row_labels=[*rows], title="Samples are not selected"
    )
    dgm.plots.write_picture(path, figure)


if __name__ == "__main__":
    main()
