"""A program that knows clothes finds digits more likely than clothes: the failure of raw likelihood, and its repairs.

    DGM_DATA=folder python benchmarks/fashion_against_mnist.py

A small PixelCNN on Fashion-MNIST, and a copy of it, trained on with a share of the pixels mutated (the background); and
an ensemble of VAEs, for the scores that need latents or several trainings. Then every score on test images of
Fashion-MNIST (normal) and of MNIST (anomalous). One thread, so that the processor time is what it took. A run that is
there already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import dgm_pyro as dgm
from dgm_pyro import anomaly, corruptions, plots
from dgm_pyro.experiments import runs
from dgm_pyro.networks import PixelCNN

SHAPE, LEVELS = (1, 28, 28), 256
MUTATED = 0.3
FALSE_ALARMS = 0.05


def pixelcnn() -> dgm.Program:
    network = PixelCNN(SHAPE, 15, width=16, layers=5, kernel_size=5, levels=LEVELS)
    return dgm.Autoregressive(dgm.DiscretizedLogistic(SHAPE, LEVELS, 5, network))


def train(folder: Path, model: str, program: dgm.Program, data: dgm.Data, rate: float, **options: Any) -> None:
    augment = (lambda x: corruptions.mutate(x, rate, LEVELS)) if rate else None
    start = time.process_time()
    history = dgm.fit(program, data, augment=augment, validation=None, device="cpu", **options)
    seconds = round(time.process_time() - start)
    runs.write(folder, program, runs.record_of(model, data.name, history, rate=rate, seconds=seconds, **options))


def read_all(arguments: argparse.Namespace) -> dict[str, dgm.Program]:
    """Every program by name, trained if its run is not there yet."""
    programs = {}

    def of_clothes() -> dgm.Program:
        return dgm.load(arguments.out / "clothes")

    def vae() -> dgm.Program:
        return dgm.build(
            "vae", dgm.data.load("fashion-mnist", data_dir=arguments.data_dir, num_data=64), hidden=(256, 256)
        )

    by_pixels, by_vae = {"batch_size": 32, "lr": 3e-3}, {"batch_size": 64, "lr": 1e-3}
    plan: dict[str, tuple[str, Callable[[], dgm.Program], int, float, dict[str, Any]]] = {
        "clothes": ("pixelcnn", pixelcnn, arguments.num_data, 0.0, {"epochs": arguments.epochs, **by_pixels})
    }
    if arguments.background_num:
        options = {"epochs": 1, **by_pixels}
        plan["background"] = ("pixelcnn", of_clothes, arguments.background_num, MUTATED, options)
    for i in range(arguments.vaes):
        plan[f"vae-{i}"] = ("vae", vae, arguments.num_data, 0.0, {"epochs": arguments.vae_epochs, **by_vae, "seed": i})
    for name, (model, make, num, rate, options) in plan.items():
        options = {"seed": arguments.seed} | options
        folder = arguments.out / name
        if not (folder / runs.RECORD).is_file():
            torch.manual_seed(options["seed"])
            data = dgm.data.load("fashion-mnist", data_dir=arguments.data_dir, num_data=num)
            train(folder, model, make(), data, rate, **options)
        programs[name], record = runs.read(folder)
        print(f"{name}: {record.options['seconds']} s of one core", flush=True)
    return programs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fashion"), help="folder for the runs")
    parser.add_argument("--data-dir", default=None, help="default: the environment variable DGM_DATA")
    parser.add_argument("--num-data", type=int, default=20000, help="training images")
    parser.add_argument("--num-test", type=int, default=2000, help="test images of each set")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--background-num", type=int, default=8000, help="images of its one epoch; 0 for none")
    parser.add_argument("--vaes", type=int, default=5, help="how many VAEs, of different seeds; 0 for none")
    parser.add_argument("--vae-epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    programs = read_all(arguments)
    sets = {
        name: dgm.data.load(name, "test", data_dir=arguments.data_dir, num_data=arguments.num_test, seed=1).x
        for name in ("fashion-mnist", "mnist")
    }
    start, half = time.process_time(), arguments.num_test // 2
    surprise = {
        program: {name: anomaly.NegativeLogLikelihood(programs[program])(x) for name, x in sets.items()}
        for program in ("clothes", "background")
        if program in programs
    }
    code = {
        kind: {name: math.log(2) * anomaly.code_bits(x, kind) for name, x in sets.items()}
        for kind in anomaly.COMPRESSORS
    }
    nats = surprise["clothes"]
    # What anomaly's scores give, put together here from the parts that they share.
    entropy = nats["fashion-mnist"][:half].mean()
    scores = {
        "-log p(x)": nats,
        "typicality": {name: (each - entropy).abs() for name, each in nats.items()},
        **{f"complexity, {kind}": {name: each - code[kind][name] for name, each in nats.items()} for kind in code},
        **{f"length of {kind} alone": {name: -each for name, each in code[kind].items()} for kind in code},
    }
    ensemble = [programs[f"vae-{i}"] for i in range(arguments.vaes)]
    by_latents: dict[str, anomaly.Score] = {}
    if ensemble:
        by_latents = {
            "VAE, -ELBO": anomaly.NegativeLogLikelihood(ensemble[0]),
            "VAE, posterior KL": anomaly.PosteriorKL(ensemble[0]),
        }
    if len(ensemble) > 1:
        by_latents[f"WAIC of {len(ensemble)} VAEs"] = anomaly.WAIC(ensemble)
    scores |= {name: {kind: score(x) for kind, x in sets.items()} for name, score in by_latents.items()}
    if "background" in programs:
        scores["likelihood ratio"] = {name: each - surprise["background"][name] for name, each in nats.items()}
    print(f"{arguments.num_test} test images of each set, scored in {time.process_time() - start:.0f} s of one core")
    print(f"{'score':<24}{'AUROC':>18}{'MNIST caught':>14}{'false alarms':>14}")
    table = {}
    for name, by_set in scores.items():
        reference, normal, anomalous = by_set["fashion-mnist"][:half], by_set["fashion-mnist"][half:], by_set["mnist"]
        detector = anomaly.Detector(lambda values: values).calibrate(reference, FALSE_ALARMS)
        found = anomaly.separation(normal, anomalous)
        caught, false = (detector.flag(values).double().mean().item() for values in (anomalous, normal))
        print(f"{name:<24}{found!s:>18}{caught:>14.3f}{false:>14.3f}")
        table[name] = {"auroc": found.auroc, "stderr": found.stderr, "caught": caught, "false_alarms": false}
    (arguments.out / "scores.json").write_text(json.dumps(table, indent=1))
    plots.score_histograms(
        {"clothes": -nats["fashion-mnist"], "digits": -nats["mnist"]}, title="log p(x) of a program of clothes"
    ).savefig(arguments.out / "likelihood.png")


if __name__ == "__main__":
    main()
