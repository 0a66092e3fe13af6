"""Samples of a diffusion of images that is conditional on the class, beside the nearest training images.

    python benchmarks/image_samples.py --train train.npz --minutes 100
    python benchmarks/image_samples.py --train train.npz --draw --guidance 1 --picture samples.png

The file holds ``x``, ``(N, C, H, W)``, integers of 8 bits, and the classes ``y``, ``(N,)``. The U-Net of a diffusion in
continuous time reads patches, so a step is fast; the objective is ``edm``, which suits samples. The training is written
to ``bench/``, from which a killed run goes on, and ``--draw`` draws without training. Samples are not selected.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from image_bits import steps_in
from latent_diffusion import nearest

import dgm_pyro as dgm
from dgm_pyro.malloc import keep_freed_memory
from dgm_pyro.networks import DenoisingUNet
from dgm_pyro.training.fit import History


def images_of_classes(path: str) -> dgm.Data:
    file = np.load(path)
    y = torch.from_numpy(file["y"].astype(np.int64))
    return dgm.Data(torch.from_numpy(file["x"]), y=y, levels=256, name=Path(path).stem)


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
    scale = float((data.x / 127.5).std())
    diffusion = dgm.ContinuousDiffusion(
        data.event_shape, denoiser, levels=256, predict="edm", sigma_data=scale, label_dropout=0.1
    )
    return dgm.Labeled(dgm.Categorical((), classes, learned=True), diffusion)


def draw(path: Path, program: dgm.Labeled, train: dgm.Data, rows: int, guidance: float, seed: int, steps: int) -> None:
    """Rows of ten samples of p(y) p(x | y), each above its nearest training images."""
    torch.manual_seed(seed)
    sampler = {"sampler": "heun", "num_steps": steps, "spacing": "karras"}
    start = time.process_time()
    x = program.sample(10 * rows, guidance=guidance, **sampler)
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
    parser.add_argument("--minutes", type=float, default=100.0, help="about how long the training takes (default: 100)")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 256], help="default: 64 128 256")
    parser.add_argument("--patch-size", type=int, default=2, help="default: 2")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 0.001)")
    parser.add_argument("--draw", action="store_true", help="draw from a trained program, in place of training")
    parser.add_argument("--guidance", type=float, default=1.0, help="strength w, 0 for none (default: 1)")
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

        def fit(program: dgm.Program, steps: int, every: int, resume: Path | None = None) -> History:
            return dgm.fit(
                program,
                train,
                "edm",
                gradient_steps=steps,
                batch_size=32,
                lr=options.lr,
                ema=0.999,
                seed=options.seed,
                compile=True,
                precision="bf16",
                validation=None,
                validate_every=every,
                resume=resume,
                progress=False,
            )

        trial = diffusion_of(train, tuple(options.channels), options.patch_size)
        steps = steps_in(options.minutes, lambda steps, every: fit(trial, steps, every))
        start = time.process_time()
        fit(program, steps, max(1, steps // 20), folder / "training")
        dgm.save(program, folder)
        print(
            {
                "steps": steps,
                "seconds": round(time.process_time() - start),
                "parameters": sum(p.numel() for p in program.parameters()),
                "passes over the images": round(32 * steps / len(train), 1),
            }
        )
    draw(options.picture, dgm.load(folder), train, options.rows, options.guidance, options.seed, options.num_steps)


if __name__ == "__main__":
    main()
