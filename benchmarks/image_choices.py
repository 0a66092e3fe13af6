"""Options of a diffusion, or of a PixelCNN, of images: each is trained for the same time.

    python benchmarks/image_choices.py diffusion [--quick] [--seconds N] [--data NAME] [--held-out N] [--cases NAME ...]
    python benchmarks/image_choices.py pixelcnn [--quick] [--seconds N] [--data NAME] [--held-out N] [--cases NAME ...]

Diffusions of T = 50 times, or PixelCNNs, are trained on the same images for so many seconds of processor time each,
which a busy machine does not shorten. The table has bits per dimension of validation images, the lower the better: the
bound of a diffusion, and the exact value of a PixelCNN. It has their standard error over the images, and the difference
from the first case, whose error is that of paired images. One seed: the difference between two trainings of one case is
not part of the errors.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import dgm_pyro as dgm
from dgm_pyro.networks import DenoisingUNet
from dgm_pyro.networks.sizes import image_sizes, is_large


def unet(data: dgm.Data, **options: object) -> dgm.Program:
    """The diffusion of "v", its U-Net with further options."""
    size: dict[str, object] = {"channels": (32, 64)}
    if is_large(data.event_shape):
        sizes = image_sizes(data.event_shape, len(data))
        size = {"channels": sizes.unet, "dropout": sizes.dropout}
    network: nn.Module = DenoisingUNet(data.event_shape, **size, **options)
    return dgm.Diffusion(data.event_shape, network, "log-snr", num_steps=50, subsample=2, levels=data.levels)


Case = tuple[Callable[[dgm.Data], dgm.Program], str]
diffusion, pixelcnn = partial(dgm.build, "diffusion"), partial(dgm.build, "pixelcnn")
CASES: dict[str, dict[str, Case]] = {
    "diffusion": {
        "v": (partial(diffusion, predict="v"), "elbo"),
        "edm": (partial(diffusion, predict="edm"), "elbo"),
        "simple": (partial(diffusion, predict="v"), "simple"),
        "min-snr": (partial(diffusion, predict="v"), "min-snr"),
        "edm, weight edm": (partial(diffusion, predict="edm"), "edm"),
        "dit": (partial(diffusion, network="dit", predict="v"), "elbo"),
        "attention": (partial(unet, heads=4), "elbo"),
        "fourier": (partial(unet, fourier=(6, 7)), "elbo"),
        "noise": (partial(diffusion, predict="noise"), "elbo"),
        "levels": (partial(diffusion, predict="levels"), "elbo"),
        "x0": (partial(diffusion, predict="x0"), "elbo"),
    },
    "pixelcnn": {
        "as built": (pixelcnn, "elbo"),
        "stages=2": (partial(pixelcnn, stages=2), "elbo"),
        "stages=3": (partial(pixelcnn, stages=3), "elbo"),
        "attention=1": (partial(pixelcnn, attention=1), "elbo"),
        "predictors=False": (partial(pixelcnn, predictors=False), "elbo"),
    },
}


def trained(
    make: Callable[[dgm.Data], dgm.Program], objective: str, data: dgm.Data, seconds: float
) -> tuple[dgm.Program, int]:
    """The program after so many seconds of processor time, and the steps that it took."""
    torch.manual_seed(0)
    options = dgm.TrainingOptions(epochs=10_000, batch_size=32, lr=1e-3, lr_schedule="constant", validation=None)
    program = make(data)
    with dgm.Training(program, data, objective, options=options) as training:
        training.advance(lambda: training.taken > 1)  # the second step records the graph of the others
        start = time.process_time()
        while time.process_time() - start < seconds:
            training.advance(lambda: time.process_time() - start > seconds)
        return copy.deepcopy(program), training.taken  # the weights of now, within an epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=CASES)
    parser.add_argument("--quick", action="store_true", help="two seconds a training, few images")
    parser.add_argument("--seconds", type=float, default=60.0, help="processor time of a training (default: 60)")
    parser.add_argument("--data", default="patches-16", help="name or file (default: patches-16)")
    parser.add_argument(
        "--held-out", type=int, metavar="N", help="validate on the last N images of the data (default: on test images)"
    )
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="default: all of the family")
    options = parser.parse_args()
    cases = CASES[options.family]
    for name in options.cases or ():
        if name not in cases:
            parser.error(f"--cases must be of {', '.join(cases)}, got {name}")
    torch.set_num_threads(1)
    seconds, number = (2.0, 20) if options.quick else (options.seconds, 200)
    data = dgm.data.open(options.data) if Path(options.data).exists() else dgm.data.load(options.data)
    if options.held_out:
        data, valid = data[: -options.held_out], data[-options.held_out :]
    else:
        valid = dgm.data.load(options.data, "test", num_data=number)
    first: dgm.Evidence | None = None
    for name in options.cases or cases:
        program, steps = trained(*cases[name], data, seconds)
        evidence = dgm.evaluate(program, valid, num_samples=8)
        first = first or evidence
        nats = first.values - evidence.values
        bits = nats / (data.event_shape.numel() * torch.tensor(2.0).log())
        print(
            f"{name:<16} {evidence.bits_per_dim:.3f} +- {evidence.stderr:.3f} bits/dim, "
            f"{bits.mean():+.3f} +- {bits.std() / len(bits) ** 0.5:.3f}, {steps} steps",
            flush=True,
        )


if __name__ == "__main__":
    main()
