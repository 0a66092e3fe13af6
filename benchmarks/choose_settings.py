"""Choose the tours' settings by validation data alone; the test split is never read.

    python benchmarks/choose_settings.py --out bench/settings.jsonl [PROGRAM ...]
    python benchmarks/choose_settings.py --images --out bench/image-settings.jsonl [PROGRAM ...]

Each candidate trains on nine tenths of the tour's training digits, and is scored on the other tenth as the tour scores
test digits: bits per dimension of p(x), exact or the tour's own bound. The discriminative classifier has no p(x), and
is scored by -log p(y | x) in nats. Every result is a line of JSON; a candidate whose line is there is not run again.
What is printed is the best candidate of those within ``--seconds``, and how far the others are behind it on the same
digits. Seconds are processor time of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dgm_pyro as dgm
from dgm_pyro.catalog import conditional_for
from dgm_pyro.experiments.tour.results import at_all_times
from dgm_pyro.experiments.tour.stops import DIGITS, IMAGES, Plan, Stop
from dgm_pyro.networks import MADE
from dgm_pyro.program import seeded

Settings = dict[str, Any]

# What the candidates of a program share, and what each has of its own: options of `fit`; "dropout" of all layers that
# have it; "hidden" widths of a MADE, residual if they are several. The tour gives the programs, not their recipes.
CANDIDATES: dict[str, tuple[Settings, Sequence[Settings]]] = {
    "made": (
        {"lr": 3e-3, "weight_decay": 0.01},
        (
            {"hidden": (256, 256, 256), "dropout": 0.2, "epochs": 50},
            {"hidden": (256, 256, 256), "dropout": 0.4, "epochs": 100},
            {"hidden": (512,), "dropout": 0.5, "epochs": 100},
            {"hidden": (1000,), "dropout": 0.5, "epochs": 60},
        ),
    ),
    "vae": (
        {"lr": 2e-3, "weight_decay": 0.01, "ema": 0.99, "epochs": 60},
        (
            {},
            {"weight_decay": 0.3},
            {"weight_decay": 1.0},
            {"epochs": 120},
            {"objective": "annealed"},
            {"objective": "annealed", "epochs": 120},
        ),
    ),
    "vae-flow": (
        {"lr": 2e-3, "weight_decay": 0.01, "ema": 0.99, "epochs": 60},
        ({}, {"weight_decay": 1.0}, {"objective": "annealed"}, {"objective": "annealed", "epochs": 120}),
    ),
    "flow": (
        {"lr": 2e-3, "weight_decay": 0.1, "epochs": 30},
        ({}, {"epochs": 60}, {"epochs": 60, "weight_decay": 1.0, "ema": 0.99}),
    ),
    "generative-classifier": (
        {"lr": 3e-3, "weight_decay": 0.01},
        (
            {"hidden": (256, 256, 256), "dropout": 0.2, "epochs": 30},
            {"hidden": (256, 256, 256), "dropout": 0.4, "epochs": 60},
            {"hidden": (512,), "dropout": 0.5, "epochs": 60},
        ),
    ),
    "discriminative-classifier": (
        {"lr": 1e-3, "weight_decay": 0.01, "epochs": 40},
        (
            {"dropout": 0.0},
            {"dropout": 0.3},
            {"dropout": 0.5},
            {"dropout": 0.5, "weight_decay": 1.0, "epochs": 80},
        ),
    ),
    "pixelcnn": (
        {"lr": 6e-3, "weight_decay": 0.01, "epochs": 20},
        ({}, {"batch_size": 32, "lr": 3e-3}, {"epochs": 30}, {"epochs": 40}),
    ),
    "diffusion": (
        {"lr": 2e-3, "weight_decay": 0.01, "ema": 0.995, "epochs": 50},
        ({}, {"lr": 4e-3}, {"epochs": 100}),
    ),
}

# Of the tour of images.
IMAGE_CANDIDATES: dict[str, tuple[Settings, Sequence[Settings]]] = {
    "flow": (
        {"weight_decay": 0.01, "batch_size": 16, "ema": 0.98, "epochs": 2},
        ({"lr": 1e-3}, {"lr": 2e-3}, {"lr": 3e-3}),
    ),
    "diffusion": (
        {"weight_decay": 0.01, "batch_size": 16, "ema": 0.99, "epochs": 4},
        ({"lr": 2e-3}, {"lr": 5e-3}),
    ),
}


def program_of(stop: Stop, data: dgm.Data, hidden: Sequence[int] | None, dropout: float | None) -> dgm.Program:
    """The tour's program, or a MADE of the widths ``hidden``; dropout is set after it is built."""
    if hidden is None:
        program = stop.make(data)
    else:
        classes = data.num_classes if stop.family == "labeled" else None
        options = {"residual": len(hidden) > 1, "levels": data.levels, "num_classes": classes, "dropout": 0.1}
        made = dgm.Autoregressive(conditional_for(data, lambda p: MADE(data.event_shape, p, hidden, **options)))
        program = made if classes is None else dgm.Labeled(dgm.Categorical((), classes, learned=True), made)
    layers = [module for module in program.modules() if isinstance(module, nn.Dropout)]
    if dropout is not None:
        if not layers:
            raise ValueError(f"{stop.title} has no layer of dropout to set to {dropout}")
        for layer in layers:
            layer.p = dropout
    return program


def score(stop: Stop, program: dgm.Program, data: dgm.Data) -> Tensor:
    """Per datum, lower is better: bits per dimension, or nats of the label."""
    if program.variable == "x":
        with at_all_times(program):
            evidence = dgm.evaluate(program, data, **stop.ask)
        return -evidence.values / (evidence.num_dims * torch.log(torch.tensor(2.0)))
    with torch.no_grad():
        return -program.log_prob(data.y, data.x)


def tried(plan: Plan, stop: Stop, shared: Settings, settings: Settings, seed: int) -> dict[str, Any]:
    train, valid = dgm.data.load(plan.data, "train", num_data=plan.sizes[0]).split(0.1, seed=seed)
    options = shared | settings
    hidden, dropout = options.pop("hidden", None), options.pop("dropout", None)
    with seeded(seed, torch.device("cpu")):
        program = program_of(stop, train, hidden, dropout)
    start = time.process_time()
    history = dgm.fit(program, train, validation=valid, seed=seed, progress=False, **options)
    seconds = time.process_time() - start
    scores = score(stop, program, valid)
    return {
        "program": stop.name,
        "settings": settings,
        "seed": seed,
        "score": scores.mean().item(),
        "scores": scores.tolist(),
        "seconds": round(seconds, 1),
        "best_epoch": history.best_epoch,
        "epochs": len(history.epochs),
    }


def records_in(path: Path) -> list[dict[str, Any]]:
    """Results that an earlier call appended."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def table(records: Sequence[dict[str, Any]], limit: float) -> Iterator[str]:
    yield "| program | settings of its own | validation score | behind the choice | best epoch | seconds |"
    yield "|---|---|--:|--:|--:|--:|"
    for name in dict.fromkeys(record["program"] for record in records):
        rows = sorted((record for record in records if record["program"] == name), key=lambda record: record["score"])
        choice = next((row for row in rows if row["seconds"] <= limit), rows[0])
        for row in rows:
            behind = torch.tensor(row["scores"]) - torch.tensor(choice["scores"])
            error = dgm.evaluation.standard_error(behind)
            difference = "**choice**" if row is choice else f"{behind.mean():.3f} ± {error:.3f}"
            settings = ", ".join(f"{key} {value}" for key, value in row["settings"].items()) or "none"
            yield (
                f"| {name} | {settings} | {row['score']:.3f} | {difference} "
                f"| {row['best_epoch']} of {row['epochs']} | {row['seconds']:.0f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(CANDIDATES)}; default all")
    parser.add_argument("--images", action="store_true", help="those of dgm tour --images")
    parser.add_argument("--out", type=Path, default=Path("bench/settings.jsonl"))
    parser.add_argument("--seconds", type=float, default=100, help="the most that a program of the tour may take")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = records_in(arguments.out)
    plan, candidates = (IMAGES, IMAGE_CANDIDATES) if arguments.images else (DIGITS, CANDIDATES)
    stops = {stop.name: stop for stop in plan.stops}
    for name in arguments.programs or candidates:
        shared, own = candidates[name]
        for settings in own:
            plain = json.loads(json.dumps(settings))
            if any((r["program"], r["settings"], r["seed"]) == (name, plain, arguments.seed) for r in records):
                continue
            records.append(tried(plan, stops[name], shared, settings, arguments.seed))
            append(arguments.out, records[-1])
    print("\n".join(table(records, arguments.seconds)))


if __name__ == "__main__":
    main()
