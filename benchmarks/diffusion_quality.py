"""Quality against the number of steps, for each sampler of one diffusion of digits.

    python benchmarks/diffusion_quality.py --out runs/diffusion-digits [--seeds 5] [--json FILE] [--picture FILE]

Trains the diffusion into the folder, or takes the one that is there. Each cell draws as many digits as the test split
has and compares them with the test split, by two distances:

- energy: 2 E|X - Y| - E|X - X'| - E|Y - Y'| on pixels in [0, 1], zero for equal distributions;
- Frechet: between normal distributions fitted to features of a small classifier, which is trained here.

The floor is what as many digits of the train split score. Standard errors are over the seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from timing import aligned, machine
from torch import Tensor, nn

import dgm_pyro as dgm
from dgm_pyro import plots
from dgm_pyro.evaluation import evaluating, standard_error
from dgm_pyro.program import seeded

STEPS = (5, 10, 20, 50)
SAMPLERS = {
    "ancestral": {"sampler": "ancestral"},
    "ddim": {"sampler": "ddim"},
    "dpm++": {"sampler": "dpm++"},
    "dpm++, karras": {"sampler": "dpm++", "spacing": "karras"},
    "heun": {"sampler": "heun"},
}


def trained(folder: Path, data: dgm.Data) -> dgm.Diffusion:
    """The diffusion in ``folder``; if there is none, it is trained and put there."""
    if not folder.exists():
        program = dgm.build("diffusion", data)
        dgm.fit(program, data, epochs=50, lr=2e-3, weight_decay=0.01, ema=0.995, progress=False)
        dgm.save(program, folder)
    program = dgm.load(folder)
    if not isinstance(program, dgm.Diffusion):
        raise TypeError(f"{folder} holds a {type(program).__name__}: give another --out")
    return program


class Classifier(nn.Module):
    """Two layers of 64 features, which are compared, and the logits of 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 32), nn.SiLU())
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


def classifier(train: dgm.Data, test: dgm.Data) -> nn.Module:
    torch.manual_seed(0)
    network = Classifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    x, y = pixels(train.x), torch.as_tensor(train.y).long()
    for _ in range(100):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (network(pixels(test.x)).argmax(-1) == torch.as_tensor(test.y)).double().mean()
    print(f"the classifier's accuracy on the test split: {accuracy:.3f}")
    return network


def pixels(x: Tensor) -> Tensor:
    return x.float() / 16


def energy(x: Tensor, y: Tensor) -> float:
    """The energy distance, without bias."""
    x, y = x.flatten(1), y.flatten(1)
    within = sum(torch.pdist(part).mean() for part in (x, y))
    return float(2 * torch.cdist(x, y).mean() - within)


def frechet(x: Tensor, y: Tensor) -> float:
    """Between the normal distributions of the moments of x and y."""
    x, y = x.double(), y.double()
    a, b = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + a.trace() + b.trace() - 2 * root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/diffusion-digits"), help="where the diffusion is kept")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--picture", type=Path, default=None, help="a .png of distances against steps")
    options = parser.parse_args()
    torch.manual_seed(0)
    train, test = dgm.data.load("digits"), dgm.data.load("digits", "test")
    program = trained(options.out, train)
    network = classifier(train, test)
    size = len(test)

    def distances(x: Tensor) -> tuple[float, float]:
        with torch.no_grad():
            return energy(pixels(x), pixels(test.x)), frechet(
                network.features(pixels(x)), network.features(pixels(test.x))
            )

    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    floor = []
    start = time.perf_counter()
    for seed in range(options.seeds):
        with seeded(seed, torch.device("cpu")), evaluating(program):
            floor.append(distances(train.x[torch.randperm(len(train))[:size]]))
            for name, choice in SAMPLERS.items():
                for steps in STEPS:
                    x = program.sample(size, num_steps=steps, **choice)
                    found.setdefault((name, steps), []).append(distances(x))
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)

    tables = {}
    for i, (title, digits) in enumerate((("energy distance x 1000", 1), ("Frechet distance", 2))):
        scale = 1000 if i == 0 else 1

        def cell(values: list[tuple[float, float]], i: int = i, scale: int = scale, digits: int = digits) -> str:
            each = torch.tensor([value[i] * scale for value in values])
            return f"{each.mean():.{digits}f} +- {standard_error(each):.{digits}f}"

        rows = [["sampler", *(f"{steps} steps" for steps in STEPS)]]
        rows += [[name, *(cell(found[name, steps]) for steps in STEPS)] for name in SAMPLERS]
        print(f"\n{title}; floor (train split) {cell(floor)}\n\n{aligned(rows)}")
        tables[title] = {"floor": cell(floor), "rows": rows}
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "tables": tables}, indent=1) + "\n")
    if options.picture is not None:
        picture(found, floor, options.picture)


def picture(
    found: dict[tuple[str, int], list[tuple[float, float]]], floor: list[tuple[float, float]], path: Path
) -> None:
    figure = plots.Figure(figsize=(9, 3.6), layout="constrained")
    for i, (axes, title) in enumerate(zip(figure.subplots(1, 2), ("energy distance", "Frechet distance"), strict=True)):
        for name in SAMPLERS:
            each = [torch.tensor(found[name, steps])[:, i] for steps in STEPS]
            error = [standard_error(values) for values in each]
            axes.errorbar(STEPS, [float(values.mean()) for values in each], error, marker="o", capsize=2, label=name)
        axes.axhline(float(torch.tensor(floor)[:, i].mean()), color="gray", linestyle=":", label="train split")
        axes.set(xscale="log", xlabel="steps", title=title + " to the test split", xticks=STEPS, xticklabels=STEPS)
        axes.set_yscale("symlog" if i == 0 else "log", **({"linthresh": 0.01} if i == 0 else {}))
        axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
