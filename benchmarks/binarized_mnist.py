"""Statically binarized MNIST: train a recipe, then log p(x) of its 10,000 test images, exactly or by IWAE-5000.

    DGM_DATA=folder python benchmarks/binarized_mnist.py elbo
    DGM_DATA=folder python benchmarks/binarized_mnist.py elbo iwae conv-flow --out runs/mnist
    DGM_DATA=folder python benchmarks/binarized_mnist.py pixelcnn vdvae --device cuda --num-particles 1000

A recipe is stored as a run that ``dgm sample``, ``dgm evaluate`` and ``dgm gaps`` open. It trains on 50,000 images and
keeps the weights that validate best on 10,000 others; or, where its options were chosen so before, on all 60,000 to the
end. One thread, so that the processor time is what a training took, without the processes of the compiler.
`small-pixelcnn` and `pixelvae` are for a CPU with AMX, `pixelcnn` and `vdvae` are for a GPU; ``--epochs`` shortens a
training.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dgm_pyro as dgm
from dgm_pyro import flow
from dgm_pyro.experiments import runs
from dgm_pyro.malloc import keep_freed_memory
from dgm_pyro.networks import MLP, ConvDecoder, ConvEncoder, EmbeddedGiven, PixelCNN

DATA = "binarized-mnist"
SHAPE = (1, 28, 28)
LATENT = 50


@dataclass
class Recipe:
    """A program and how it is trained.

    Attributes:
        start: names the recipe whose run it goes on from.
        all_data: train on the validation images too.
    """

    program: Callable[[], dgm.Program]
    objective: str
    epochs: int
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    all_data: bool = False


def mlp(prior: Callable[[], dgm.Program]) -> Callable[[], dgm.Program]:
    """784-200-200-50 and back, with two hidden layers of 200 on either side."""
    return lambda: dgm.VAE(
        prior(),
        dgm.Bernoulli(SHAPE, MLP((LATENT,), 784, (200, 200))),
        dgm.Normal(LATENT, MLP(SHAPE, 2 * LATENT, (200, 200), levels=2)),
    )


def narrow() -> dgm.Program:
    """`mlp` with N(0, I), whose encoder starts far from the prior: narrow, with means that differ between images.

    Where it starts about as wide as the prior, the KL switches latents off before the likelihood has learned to use
    them: of the 50, 13 stay in use, against 17.
    """
    network = MLP(SHAPE, 2 * LATENT, (200, 200), levels=2)
    last: Any = network.rest[-1]
    with torch.no_grad():
        last.weight[:LATENT] *= 3.0
        last.weight[LATENT:] *= 0.1
    likelihood = dgm.Bernoulli(SHAPE, MLP((LATENT,), 784, (200, 200)))
    return dgm.VAE(normal(), likelihood, dgm.Normal(LATENT, network, initial_scale=0.05))


def convolutional(prior: Callable[[], dgm.Program]) -> Callable[[], dgm.Program]:
    return lambda: dgm.VAE(
        prior(),
        dgm.Bernoulli(SHAPE, ConvDecoder((LATENT,), SHAPE, channels=(16, 32))),
        dgm.Normal(LATENT, ConvEncoder(SHAPE, 2 * LATENT, channels=(16, 32), levels=2)),
    )


def normal() -> dgm.Program:
    return dgm.Normal(LATENT)


def realnvp() -> dgm.Program:
    return flow.realnvp((LATENT,), layers=6, hidden=(128, 128))


def pixelcnn() -> dgm.Program:
    return dgm.Autoregressive(dgm.Bernoulli(SHAPE, PixelCNN(SHAPE, 1, 96, 15, levels=2, dropout=0.3)))


def small_pixelcnn() -> dgm.Program:
    """6 layers of 64 channels, to train in an hour on one core."""
    return dgm.Autoregressive(dgm.Bernoulli(SHAPE, PixelCNN(SHAPE, 1, 64, 6, 5, levels=2)))


def pixelvae() -> dgm.Program:
    """A pixel depends on 16 maps of z, and on the pixels before it at a distance of up to 7."""
    maps = (16, *SHAPE[1:])
    pixels = PixelCNN(SHAPE, 1, 32, 3, 5, given_shape=maps, levels=2)
    return dgm.VAE(
        realnvp(),
        dgm.Autoregressive(dgm.Bernoulli(SHAPE, EmbeddedGiven(pixels, ConvDecoder((LATENT,), maps)))),
        dgm.Normal(LATENT, ConvEncoder(SHAPE, 2 * LATENT, levels=2)),
    )


def vdvae() -> dgm.Program:
    """The hierarchy that `dgm.build` makes for images of this shape."""
    return dgm.build("vdvae", dgm.Data(torch.zeros(50_000, *SHAPE, dtype=torch.uint8), levels=2))


ON_GPU = {"batch_size": 128, "compile": True, "precision": "bf16", "ema": 0.9995, "validate_every": 2000}
RECIPES = {
    "elbo": Recipe(narrow, "elbo", 300, {"ema": 0.9995, "weight_decay": 0.03}, all_data=True),
    "iwae": Recipe(narrow, "iwae:50", 10, {"lr": 5e-4}, start="elbo", all_data=True),
    "conv-flow": Recipe(convolutional(realnvp), "annealed", 50),
    "small-pixelcnn": Recipe(
        small_pixelcnn,
        "elbo",
        6,
        {"batch_size": 50, "compile": True, "precision": "bf16", "lr": 2e-3, "validate_every": 2000},
    ),
    "pixelvae": Recipe(pixelvae, "annealed", 8, {"compile": True, "precision": "bf16", "lr": 2e-3}),
    "pixelcnn": Recipe(pixelcnn, "elbo", 150, ON_GPU | {"lr": 2e-3}),
    "vdvae": Recipe(vdvae, "elbo", 100, ON_GPU),
}


def train(name: str, recipe: Recipe, arguments: argparse.Namespace) -> None:
    out, data_dir, seed = arguments.out, arguments.data_dir, arguments.seed
    data, validation = (dgm.data.load(DATA, split, data_dir=data_dir) for split in ("train", "valid"))
    if recipe.all_data:
        data, validation = dgm.Data(torch.cat([data.x, validation.x]), levels=2, name=DATA), None
    minutes = 0.0
    torch.manual_seed(seed)
    program = recipe.program()
    if recipe.start is not None:
        program, record = runs.read(out / recipe.start)
        minutes = record.options["minutes"]
    options = {"batch_size": 100, "lr": 1e-3, "ema": 0.999, "device": arguments.device} | recipe.options
    options["epochs"] = arguments.epochs or recipe.epochs
    clock = time.process_time if torch.device(arguments.device).type == "cpu" else time.perf_counter
    start = clock()
    history = dgm.fit(program, data, recipe.objective, validation=validation, seed=seed, **options)
    minutes += (clock() - start) / 60
    record = runs.record_of(
        name,
        DATA,
        history,
        data_dir,
        objective=recipe.objective,
        start=recipe.start,
        seed=seed,
        minutes=minutes,
        **options,
    )
    runs.write(out / name, program, record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", choices=RECIPES, metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--out", type=Path, default=Path("runs/binarized-mnist"), help="folder for the runs")
    parser.add_argument("--data-dir", default=None, help="default: the environment variable DGM_DATA")
    parser.add_argument("--num-particles", type=int, default=5000)
    parser.add_argument("--num-data", type=int, default=None, help="use only this many test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu, or a CUDA device (default: cpu)")
    parser.add_argument("--epochs", type=int, default=None, help="in place of the recipe's")
    parser.add_argument("--evaluate-only", action="store_true", help="of runs that are there already")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    test = dgm.data.load(DATA, "test", data_dir=arguments.data_dir, num_data=arguments.num_data)
    for name in arguments.recipes:
        if not arguments.evaluate_only:
            train(name, RECIPES[name], arguments)
        program, record = runs.read(arguments.out / name)
        program.to(arguments.device)
        found = {"exact" if program.tractable else "elbo": dgm.evaluate(program, test, progress=True)}
        if not program.tractable:
            found["iwae"] = dgm.evaluate(program, test, num_particles=arguments.num_particles, progress=True)
        numbers = {"recipe": name, "minutes": record.options["minutes"]}
        numbers |= {kind: evidence.as_dict() for kind, evidence in found.items()}
        (arguments.out / name / "evidence.json").write_text(json.dumps(numbers, indent=1))
        told = ", ".join(f"{-each.nats:.2f} +- {each.nats_stderr:.2f} ({each.kind})" for each in found.values())
        where = "one core" if arguments.device == "cpu" else arguments.device
        print(
            f"{name}: trained in {numbers['minutes']:.1f} minutes of {where}; -log p(x) in nats, at most where it is "
            f"a bound, {len(test)} test images: {told}",
            flush=True,
        )


if __name__ == "__main__":
    main()
