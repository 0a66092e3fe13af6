"""Classifiers that can doubt, on what they were not trained for: corrupted, attacked and foreign images.

    python benchmarks/classification_with_doubt.py
    DGM_DATA=folder python benchmarks/classification_with_doubt.py --data mnist --num-data 10000 --num-test 1000 \\
        --classifiers discriminative,MADE,VAE,Bayesian --foreign fashion-mnist

A discriminative network; the same one with a posterior over its weights; and generative classifiers p(y) p(x | y) over
MADE and PixelCNN (exact), a VAE and a flow (IWAE bounds for each class) and a diffusion (its ELBO for each class). A
fifth of the training data sets the alarm on doubt: -log p(x) where there is one, else minus the highest p(y | x). One
thread; seconds are processor time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dgm_pyro as dgm
from dgm_pyro import corruptions
from dgm_pyro.uses.anomaly import Detector
from dgm_pyro.uses.classification import Bayesian, accuracy, beliefs, nll, reliability, risk_coverage

FALSE_ALARMS = 0.05
TRAINED: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "discriminative": ("classifier", False, {"epochs": 40, "lr": 1e-3, "weight_decay": 0.01}),
    "MADE": ("made", True, {"epochs": 30, "lr": 3e-3, "weight_decay": 0.01}),
    "PixelCNN": ("pixelcnn", True, {"epochs": 30, "lr": 3e-3, "weight_decay": 0.01}),
    "VAE": ("vae", True, {"epochs": 60, "lr": 2e-3, "weight_decay": 0.01}),
    "flow": ("realnvp", True, {"epochs": 40, "lr": 2e-3, "weight_decay": 0.01}),
    "diffusion": ("diffusion", True, {"epochs": 120, "lr": 2e-3, "weight_decay": 0.01, "ema": 0.99}),
}
BAYESIAN_SCALE = 2.0
PARTICLES = 16  # of the per-class bounds
ONE_DRAW = ("diffusion",)  # a draw is a whole chain
SHORT = ("accuracy", "confidence", "rejected", "accuracy_kept")

Answer = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def classifiers(data: dgm.Data, names: list[str], seed: int) -> dict[str, tuple[Answer, corruptions.Classifier]]:
    """Functions by name, from x to (p(y | x), log p(x) or None), and the function that an attack sees."""
    made: dict[str, tuple[Answer, corruptions.Classifier]] = {}
    for name in names:
        start = time.process_time()
        torch.manual_seed(seed)
        if name == "Bayesian":
            network = dgm.networks.MLP(data.event_shape, data.num_classes, (64,), levels=data.levels)
            bayesian = Bayesian(network, data, "normal", BAYESIAN_SCALE).fit(epochs=40, seed=seed)
            made[name] = (
                lambda x, b=bayesian: (b.class_probabilities(x), None),
                lambda x, b=bayesian: b.log_class_probabilities(x, num_samples=8),
            )
        else:
            model, labeled, options = TRAINED[name]
            program = dgm.build(model, data, labeled=labeled)
            dgm.fit(program, data, seed=seed, device="cpu", progress=False, **options)
            particles = 1 if name in ONE_DRAW else PARTICLES
            made[name] = (lambda x, p=program, k=particles: beliefs(p, x, num_particles=k), program)
        print(f"{name}: {time.process_time() - start:.0f} s", flush=True)
    return made


def seen(data: dgm.Data, seed: int) -> dict[str, Tensor]:
    """The test images as no classifier was shown them in training, by condition."""
    x, levels = data.x, data.levels
    assert levels is not None
    pixel = x.shape[-1] // 8
    return {
        "clean": x,
        **{f"noise {share:g}": corruptions.add_noise(x, share * levels, levels, seed) for share in (0.1, 0.25, 0.5)},
        "blur": corruptions.blur(x, float(pixel), levels),
        "rotated 30": corruptions.rotate(x, 30.0, levels),
        "rotated 90": corruptions.rotate(x, 90.0, levels),
        "shifted": corruptions.shift(x, 0, pixel),
        "inverted": (levels - 1 - x.long()).to(x.dtype),
        "shuffled pixels": corruptions.shuffle_pixels(x, seed),
    }


def against(p: Tensor, log_p: Tensor | None, rejected: Tensor, y: Tensor) -> dict[str, float | None]:
    """Metrics that need the true y."""
    right = p.argmax(-1) == y
    kept, found = right[~rejected], reliability(p, y)
    return {
        "accuracy": accuracy(p, y),
        "accuracy_kept": kept.double().mean().item() if len(kept) else None,
        "nll": nll(p.clamp_min(1e-30), y)[0],
        "ece": found.ece,
        "ece_stderr": found.stderr,
        "aurc_confidence": risk_coverage(right, -p.max(-1).values).area,
        "aurc_p_of_x": None if log_p is None else risk_coverage(right, -log_p).area,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--num-data", type=int, default=None, help="training data")
    parser.add_argument("--num-test", type=int, default=None)
    parser.add_argument("--foreign", default=None, help="a data set of the same shape: none of its images is a digit")
    parser.add_argument("--classifiers", default=",".join((*TRAINED, "Bayesian")), metavar="NAME,NAME,...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", default=None, help="default: the environment variable DGM_DATA")
    parser.add_argument("--out", type=Path, default=None, help="a .json file for all numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train = dgm.data.load(arguments.data, data_dir=arguments.data_dir, num_data=arguments.num_data)
    test = dgm.data.load(arguments.data, "test", data_dir=arguments.data_dir, num_data=arguments.num_test)
    y, levels = test.y, test.levels
    assert y is not None
    assert levels is not None
    train, reference = train.split(0.2, arguments.seed)
    foreign = None
    if arguments.foreign is not None:
        foreign = dgm.data.load(arguments.foreign, "test", data_dir=arguments.data_dir, num_data=len(test))
        if foreign.event_shape != test.event_shape:
            parser.error(f"--foreign: {tuple(foreign.event_shape)} does not fit {tuple(test.event_shape)}")
    epsilon = max(1, round(0.1 * levels))
    rows: list[dict[str, Any]] = []
    for name, (answer, attacked) in classifiers(train, arguments.classifiers.split(","), arguments.seed).items():
        start = time.process_time()

        def doubt(probabilities: Tensor, log_p: Tensor | None) -> Tensor:
            return -probabilities.max(-1).values if log_p is None else -log_p

        alarm = Detector(lambda scores: scores).calibrate(doubt(*answer(reference.x)), FALSE_ALARMS)
        conditions = seen(test, arguments.seed)
        conditions[f"FGSM {epsilon}"] = corruptions.fgsm(attacked, test.x, y, epsilon, levels)
        conditions[f"PGD {epsilon}"] = corruptions.pgd(attacked, test.x, y, epsilon, levels, gradient_steps=5)
        if foreign is not None:
            conditions[arguments.foreign] = foreign.x
        for condition, x in conditions.items():
            probabilities, log_p = answer(x)
            rejected = alarm.flag(doubt(probabilities, log_p))
            row = {
                "classifier": name,
                "condition": condition,
                "confidence": probabilities.max(-1).values.double().mean().item(),
                "rejected": rejected.double().mean().item(),
            }
            if condition != arguments.foreign:
                row |= against(probabilities, log_p, rejected, y)
            rows.append(row)
            numbers = (f"{column} {row[column]:.3f}" for column in SHORT if row.get(column) is not None)
            print(f"{name}, {condition}: {', '.join(numbers)} ({time.process_time() - start:.0f} s)", flush=True)
    print(f"{len(train)} {arguments.data} trained on, {len(reference)} for the alarm, {len(test)} tested\n")
    columns = (*SHORT, "ece", "nll", "aurc_confidence", "aurc_p_of_x")
    print(f"| condition | classifier | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    for row in sorted(rows, key=lambda row: list(dict.fromkeys(r["condition"] for r in rows)).index(row["condition"])):
        cells = ["" if row.get(column) is None else f"{row[column]:.3f}" for column in columns]
        print(f"| {row['condition']} | {row['classifier']} | {' | '.join(cells)} |")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
