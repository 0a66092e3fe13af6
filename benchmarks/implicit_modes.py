"""Modes covered by implicit models: a ring of 8 and a grid of 25 Normals, one row per objective.

    python benchmarks/implicit_modes.py [--quick] [--seeds 3] [--picture FILE] [--only NAME,...]

Each model is a network of two hidden layers on a two-dimensional Normal, trained on 8,000 points by one core. A sample
is near a mode within three standard deviations of its center (98.9 % of the data are); a mode is covered if it has at
least a fifth of the samples that it should have. Mean and standard error over the seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dgm_pyro as dgm
from dgm_pyro.families.implicit import mode_coverage
from dgm_pyro.networks import MLP
from dgm_pyro.training.adversarial import squared_distance

SAMPLES = 5000


@dataclass(frozen=True)
class Modes:
    """Equally likely round Normals of the plane."""

    centers: Tensor
    scale: float

    def draw(self, num: int, seed: int) -> Tensor:
        noise = torch.randn(num, 2, generator=torch.Generator().manual_seed(seed))
        return self.centers[torch.arange(num) % len(self.centers)] + self.scale * noise


ANGLES = torch.arange(8) * math.pi / 4
LINE = torch.arange(-2.0, 3.0)
SETS = {
    "ring": Modes(2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.1),
    "grid": Modes(torch.cartesian_prod(LINE, LINE), 0.1),
}


def critic() -> MLP:
    return MLP((2,), 1, (128, 128), activation="relu")


# How each objective is made, and what `dgm.fit` is told.
RECIPES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "gan": (lambda: dgm.Adversarial("gan", critic(), r1=0.003, critic_lr=0.5), {"epochs": 100, "lr": 4e-3}),
    "wgan-gp": (
        lambda: dgm.Adversarial("wasserstein", critic(), r1=0, gradient_penalty=1.0, critic_steps=3),
        {"epochs": 30, "lr": 2e-3},
    ),
    "f-gan:kl": (lambda: dgm.Adversarial("kl", critic(), r1=0.003, critic_lr=0.5), {"epochs": 60, "lr": 2e-3}),
    "energy": (dgm.adversarial.energy, {"epochs": 40, "lr": 1e-2}),
    "mmd": (dgm.adversarial.mmd, {"epochs": 40, "lr": 1e-2}),
}
# Three times as many modes take the game longer, and a lighter hand on the critic's slopes between them.
ON_GRID = RECIPES | {
    "gan": (lambda: dgm.Adversarial("gan", critic(), r1=0.0005, critic_lr=0.5), {"epochs": 400, "lr": 4e-3})
}


def run(which: str, name: str, seed: int, quick: bool) -> tuple[dict[str, float], Tensor]:
    modes, (make, options) = SETS[which], (ON_GRID if which == "grid" else RECIPES)[name]
    torch.manual_seed(seed)
    program = dgm.Implicit(2, dgm.Normal(2), MLP((2,), 2, (128, 128), activation="tanh"))
    settings = options | {"ema": 0.99, "validation": None, "batch_size": 256, "seed": seed, "progress": False}
    if quick:
        settings["epochs"] = 1
    start = time.process_time()
    dgm.fit(program, modes.draw(8000, seed), make(), **settings)
    seconds = time.process_time() - start
    torch.manual_seed(seed)
    x = program.sample(SAMPLES)
    covered, near = mode_coverage(x, modes.centers, modes.scale)
    distance = squared_distance(x, modes.draw(SAMPLES, 1000 + seed))
    return {"modes": covered, "near": 100 * near, "energy": 1000 * distance, "seconds": seconds}, x


def picture(drawn: dict[tuple[str, str], Tensor], path: str) -> None:
    from matplotlib.figure import Figure

    from dgm_pyro import plots

    names = list(dict.fromkeys(name for _, name in drawn))
    sets = list(dict.fromkeys(which for which, _ in drawn))
    with plots.theme("light") as theme:
        figure = Figure(figsize=(2 * len(names), 2.2 * len(sets)), layout="constrained", dpi=120)
        panels = figure.subplots(len(sets), len(names), squeeze=False)
        for row, which in zip(panels, sets, strict=True):
            for axes, name in zip(row, names, strict=True):
                axes.scatter(*drawn[which, name][:2000].T.numpy(), s=1, linewidths=0, color=theme.series[0])
                axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[], title=name)
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch each, to see that it runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", help="where to write the samples of the first seed")
    parser.add_argument("--only", default=",".join(RECIPES))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    drawn: dict[tuple[str, str], Tensor] = {}
    for which, modes in SETS.items():
        print(f"\n| {which} of {len(modes.centers)} | modes | near a mode, % | energy distance x 1000 | core seconds |")
        print("|---|--:|--:|--:|--:|", flush=True)
        for name in chosen.only.split(","):
            rows = []
            for seed in range(chosen.seeds):
                row, x = run(which, name, seed, chosen.quick)
                rows.append(row)
                drawn.setdefault((which, name), x)
            cells = []
            for key, digits in (("modes", 1), ("near", 1), ("energy", 1), ("seconds", 0)):
                values = [row[key] for row in rows]
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 and key != "seconds" else None
                spread = "" if error is None else f" +- {error:.{digits}f}"
                cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    if chosen.picture:
        picture(drawn, chosen.picture)


if __name__ == "__main__":
    main()
