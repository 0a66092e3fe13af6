"""Samples of a class-conditional diffusion of images, beside the training images nearest to them.

    python benchmarks/image_samples.py --train train.npz --steps 20000
    python benchmarks/image_samples.py --train train.npz --draw --guidance 2 --picture samples.png

The file holds ``x``, ``(N, C, H, W)``, integers of 8 bits, and the classes ``y``, ``(N,)``. The diffusion is in
continuous time, and its U-Net reads patches, so a step is fast. The objective ``edm`` suits samples. The training is in
``bench/``, from which a killed run goes on; ``--draw`` draws from it again. The classes are drawn from p(y).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from image_bits import images
from latent_diffusion import nearest

import dgm_pyro as dgm
from dgm_pyro.malloc import keep_freed_memory
from dgm_pyro.networks import DenoisingUNet
from dgm_pyro.networks.mlp import to_unit


def images_of_classes(path: str) -> dgm.Data:
    return dataclasses.replace(images(path), y=torch.from_numpy(np.load(path)["y"].astype(np.int64)))


def diffusion_of(data: dgm.Data, channels: tuple[int, ...], patch_size: int) -> dgm.Labeled:
    classes = int(data.y.max()) + 1
    denoiser = DenoisingUNet(
        data.event_shape,
        channels,
        num_classes=classes,
        dropout=0.1,
        max_frequency=30.0,
        heads=4,
        patch_size=patch_size,
    )
    scale = float(to_unit(data.x, data.levels).std())
    diffusion = dgm.ContinuousDiffusion(
        data.event_shape, denoiser, levels=data.levels, predict="edm", sigma_data=scale, label_dropout=0.1
    )
    return dgm.Labeled(dgm.Categorical((), classes, learned=True), diffusion)


def draw(path: Path, program: dgm.Labeled, train: dgm.Data, rows: int, guidance: float, num_steps: int) -> None:
    """Rows of ten samples, each above its nearest training images."""
    start = time.process_time()
    x = program.sample(10 * rows, guidance=guidance, sampler="heun", num_steps=num_steps, spacing="karras")
    print({"samples": len(x), "seconds": round(time.process_time() - start)})
    shown = {}
    for number, part in enumerate(x.split(10), 1):
        shown |= {f"samples {number}": part, f"nearest to {number}": nearest(part, train.x)}
    figure = dgm.plots.images(
        torch.cat([*shown.values()]), levels=256, num_columns=10, row_labels=[*shown], title="Samples are not selected"
    )
    dgm.plots.write_picture(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="an .npz file")
    parser.add_argument("--steps", type=int, default=20_000, help="of the training, of 32 images (default: 20000)")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 256], help="default: 64 128 256")
    parser.add_argument("--patch-size", type=int, default=2, help="default: 2")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 0.001)")
    parser.add_argument("--draw", action="store_true", help="draw from a trained program, in place of training")
    parser.add_argument("--guidance", type=float, default=1.0, help="strength, 0 for none (default: 1)")
    parser.add_argument("--num-steps", type=int, default=40, help="of Heun's sampler (default: 40)")
    parser.add_argument("--rows", type=int, default=4, help="of ten samples (default: 4)")
    parser.add_argument("--picture", type=Path, default=Path("samples.png"), metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    train = images_of_classes(options.train)
    folder = Path("bench") / f"image_samples_{train.name}_{options.seed}"
    if not options.draw:
        torch.manual_seed(options.seed)
        program = diffusion_of(train, tuple(options.channels), options.patch_size)

        start = time.process_time()
        dgm.fit(
            program,
            train,
            "edm",
            gradient_steps=options.steps,
            batch_size=32,
            lr=options.lr,
            ema=0.999,
            seed=options.seed,
            compile=True,
            precision="bf16",
            validation=None,
            resume=folder / "training",
            progress=False,
        )
        dgm.save(program, folder)
        parameters = sum(p.numel() for p in program.parameters())
        print({"seconds": round(time.process_time() - start), "parameters": parameters})
    torch.manual_seed(options.seed)
    draw(options.picture, dgm.load(folder), train, options.rows, options.guidance, options.num_steps)


if __name__ == "__main__":
    main()
