"""Bits per dimension of images: families of one training budget beside independent features, PNG and WebP.

    python benchmarks/image_bits.py --train train.npz --test test.npz --models glow vdvae pixelcnn
    DGM_DATA=folder python benchmarks/image_bits.py --data mnist --num-test 1000 --minutes 2
    python benchmarks/image_bits.py --train train.npz --test test.npz --models pixelcnn --set stages=2 attention=1
    python benchmarks/image_bits.py --train train.npz --test test.npz --models --picture samples.png

The files hold ``x``, ``(N, C, H, W)``, integers of 8 bits. Every family trains for ``--steps`` steps, or for about
``--minutes`` minutes by the clock. ``--set`` passes parts of the models to `dgm.build`. With ``--validation``, a share
of the training images chooses the best weights. The bound of a `diffusion` is summed over all of its steps. The
reported seconds are processor time of one thread. Each model adds a line to ``bench/image_bits.jsonl``, and its program
to ``bench/``. ``--picture`` draws samples of these programs.
"""

from __future__ import annotations

import argparse
import copy
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import dgm_pyro as dgm
from dgm_pyro.experiments.tour.results import at_all_times
from dgm_pyro.malloc import keep_freed_memory
from dgm_pyro.training.fit import History
from dgm_pyro.training.options import value_of

STRETCH, STRETCHES = 5, 6  # steps, and how often, of the trial by which --minutes is turned into steps
VALIDATIONS = 5  # of a training, about


def part(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    return name, value_of(value)


def images(path: str) -> dgm.Data:
    return dgm.Data(torch.from_numpy(np.load(path)["x"]), levels=256, name=Path(path).stem)


def file_bits(data: dgm.Data, format: str, **options: object) -> torch.Tensor:
    """Bits per dimension of each image as a file of its own."""
    from PIL import Image

    def size(x: np.ndarray) -> int:
        Image.fromarray(x).save(file := io.BytesIO(), format, **options)
        return len(file.getvalue())

    pixels = data.x.permute(0, 2, 3, 1).squeeze(-1).numpy()
    return torch.tensor([8 * size(x) / x.size for x in pixels], dtype=torch.float64)


def histograms(train: dgm.Data, test: dgm.Data) -> torch.Tensor:
    """Bits per dimension of independent features, by their frequencies among the training data, each value 0.1 more."""
    counts = torch.zeros(256, train.event_shape.numel()).scatter_add_(
        0, train.x.flatten(1).long(), torch.ones(train.x.flatten(1).shape)
    )
    masses = (counts + 0.1) / (len(train) + 25.6)
    return -masses.gather(0, test.x.flatten(1).long()).double().log2().mean(1)


def steps_in(minutes: float, fit: Callable[[int, int], History]) -> int:
    """The number of steps that take ``minutes``, by a trial of ``fit(steps, validate_every)``."""
    ends = [epoch.seconds for epoch in fit(STRETCHES * STRETCH, STRETCH).epochs]
    a_step = statistics.median(b - a for a, b in itertools.pairwise(ends)) / STRETCH  # without what compiles
    return max(1, round(60 * minutes / a_step))


def trained(name: str, train: dgm.Data, test: dgm.Data, steps: int, options: argparse.Namespace) -> dict[str, object]:
    seed = options.seed
    torch.manual_seed(seed)
    parts = dict(options.set)
    program = dgm.build(name, train, **parts)

    def fit(program: dgm.Program, steps: int, every: int, validation: float | None = None) -> History:
        return dgm.fit(
            program,
            train,
            gradient_steps=steps,
            batch_size=options.batch_size,
            lr=options.lr,
            ema=options.ema,
            seed=seed,
            compile=options.compile,
            precision=options.precision,
            validation=validation,
            validate_every=every,
            progress=False,
        )

    if options.minutes is not None:
        steps = steps_in(options.minutes, lambda steps, every: fit(copy.deepcopy(program), steps, every))
    start = time.process_time()
    history = fit(program, steps, max(1, steps // VALIDATIONS), options.validation)
    seconds = time.process_time() - start
    with at_all_times(program):
        found = dgm.evaluate(program, test, num_particles=1, num_samples=options.num_samples, batch_size=32)
    words = ("image_bits", train.name, name, *(f"{part}={value}" for part, value in parts.items()))
    dgm.save(program, Path("bench") / "_".join((*words, options.precision, str(seed))))
    return {
        "model": name,
        **parts,
        "bits": found.bits_per_dim,
        "stderr": found.stderr,
        "kind": found.kind,
        "parameters": sum(p.numel() for p in program.parameters()),
        "seconds": round(seconds),
        "steps": steps,
        "validation": [epoch.validation for epoch in history.epochs],
        "precision": options.precision,
        "compile": options.compile,
        "seed": seed,
        "lr": options.lr,
        "batch_size": options.batch_size,
        "ema": options.ema,
        "num_samples": options.num_samples,
    }


def draw(path: Path, data: str, test: dgm.Data) -> None:
    """Draw test images, and ten samples of each program in ``bench/`` that was trained on this data set."""
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:10]
    rows = {"test images": test.x[some]}
    for folder in sorted(Path("bench").glob(f"image_bits_{data}_*")):
        torch.manual_seed(0)
        name = folder.name.removeprefix(f"image_bits_{data}_").rsplit("_", 2)[0].replace("_", ", ")
        rows[name] = dgm.load(folder).sample(10)
    figure = dgm.plots.images(
        torch.cat([*rows.values()]),
        levels=256,
        num_columns=10,
        row_labels=[*rows],
        title="Ten samples of each program, not selected",
    )
    dgm.plots.write_picture(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="an .npz file")
    parser.add_argument("--test", help="an .npz file")
    parser.add_argument("--data", help="a data set by name, in place of files")
    parser.add_argument("--num-test", type=int, help="how many of its test images, at random")
    parser.add_argument("--models", nargs="*", default=["glow", "vdvae", "pixelcnn"])
    parser.add_argument("--steps", type=int, nargs="+", default=[700], help="one number, or one for each model")
    parser.add_argument("--minutes", type=float, help="about how long each training takes, in place of --steps")
    parser.add_argument("--validation", type=float, help="share of the training images that chooses the best weights")
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "bf16"), help="of the networks in training"
    )
    parser.add_argument("--compile", action="store_true", help="compile the steps; --minutes leaves compilation out")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: 0.001)")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a step (default: 32)")
    parser.add_argument("--ema", type=float, default=0.98, help="decay of the average of the weights (default: 0.98)")
    parser.add_argument("--num-samples", type=int, default=4, help="draws of a bound for each test image (default: 4)")
    parser.add_argument("--set", type=part, nargs="+", default=[], metavar="PART=VALUE", help="parts of every model")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw samples of all programs in bench/")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    if options.data is None and (options.train is None or options.test is None):
        parser.error("pass --data, or --train and --test")
    if options.data is not None and (options.train is not None or options.test is not None):
        parser.error("pass --data, or --train and --test, not both")
    if options.data is None and options.num_test is not None:
        parser.error("--num-test is for --data")
    if len(options.steps) not in (1, len(options.models)):
        parser.error("--steps takes one number, or one for each model")
    if min(options.steps) < 1 or (options.minutes is not None and options.minutes <= 0):
        parser.error("--steps and --minutes must be positive")
    if options.data is None:
        train, test = images(options.train), images(options.test)
    else:
        train = dgm.data.load(options.data)
        test = dgm.data.load(options.data, "test", num_data=options.num_test)
    if train.levels != 256 or train.event_shape != test.event_shape:
        parser.error("both sets must have images of one shape and 256 levels")
    Path("bench").mkdir(exist_ok=True)

    def record(row: dict[str, object]) -> None:
        print(row, flush=True)
        with Path("bench/image_bits.jsonl").open("a") as file:
            file.write(json.dumps({"data": train.name} | row) + "\n")

    for model, bits in {
        "independent features": histograms(train, test),
        "PNG": file_bits(test, "png", optimize=True),
        "WebP": file_bits(test, "webp", lossless=True, quality=100, method=6),
    }.items():
        record({"model": model, "bits": bits.mean().item(), "stderr": (bits.std() / len(bits) ** 0.5).item()})
    for name in options.models:  # refuses a part that a model does not have before hours of training
        dgm.build(name, train, **dict(options.set))
    steps = options.steps * len(options.models) if len(options.steps) == 1 else options.steps
    for name, count in zip(options.models, steps, strict=True):
        record(trained(name, train, test, count, options))
    if options.picture is not None:
        draw(options.picture, train.name, test)


if __name__ == "__main__":
    main()
