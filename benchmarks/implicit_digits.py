"""Implicit models of digits, judged by samples and by the evidence of the generator with noise.

    python benchmarks/implicit_digits.py [--quick] [--num-data 64] [--seed 0]

Each row is one training of one core on the 8x8 digits. Samples are compared with the test split: precision and recall
(k = 3) and the energy distance. For the evidence, noise of a few scales is added to the generator, x in [-1, 1]: by
annealed importance sampling, on `--num-data` test digits, with the gap of bidirectional Monte Carlo on as many data
that the model itself has made, which says how far AIS can be off; and by Parzen's estimate from 10,000 samples, on the
same digits. In nats per datum, standard errors over the digits. The last row has the training data in the place of
samples.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

import dgm_pyro as dgm
from dgm_pyro import implicit, quality
from dgm_pyro.evaluation import standard_error
from dgm_pyro.networks.mlp import to_unit
from dgm_pyro.training.adversarial import squared_distance

RECIPES: dict[str, dict[str, Any]] = {
    "gan:2": {"epochs": 100, "lr": 2e-3},
    "energy": {"epochs": 200, "lr": 5e-3},
}


def mean(values: Tensor) -> str:
    return f"{values.mean():.1f} +- {standard_error(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one epoch, few temperatures: to see that it runs")
    parser.add_argument("--num-data", type=int, default=64, help="how many test digits the evidence is of")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.2, 0.3, 0.4])
    parser.add_argument("--temperatures", type=int, default=500)
    parser.add_argument("--only", default=",".join(RECIPES), metavar="NAME,NAME,...")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    digits, test = dgm.data.load("digits"), dgm.data.load("digits", "test")
    assert digits.levels is not None
    unit = to_unit(test.x, digits.levels)
    few = unit[: chosen.num_data]
    print("| | precision | recall | energy distance x 1000 | core seconds |")
    print("|---|--:|--:|--:|--:|")
    programs: dict[str, dgm.Program] = {}
    for name in chosen.only.split(","):
        torch.manual_seed(chosen.seed)
        program = dgm.build("implicit", digits)
        start = time.process_time()
        options = RECIPES[name] | ({"epochs": 1} if chosen.quick else {})
        dgm.fit(program, digits, name, batch_size=128, ema=0.99, seed=chosen.seed, progress=False, **options)
        seconds = time.process_time() - start
        torch.manual_seed(chosen.seed)
        programs[name] = program
        compared(name, unit, to_unit(program.sample(len(unit)), digits.levels), f"{seconds:.0f}")
    stored = to_unit(digits.x, digits.levels)
    compared("the training data", unit, stored[torch.randperm(len(stored))[: len(unit)]], "")

    print(f"\n| on {len(few)} digits | scale | AIS | gap on its own data | Parzen |")
    print("|---|--:|--:|--:|--:|")
    for name, program in programs.items():
        torch.manual_seed(chosen.seed)
        drawn = to_unit(program.sample(10_000), digits.levels)
        for scale in chosen.scales:
            noisy = implicit.noisy(program, scale)
            temperatures = {"num_temperatures": 5 if chosen.quick else chosen.temperatures, "seed": chosen.seed}
            evidence = dgm.infer.ais(noisy, few, num_chains=16, **temperatures).log_evidence
            both = dgm.infer.bidirectional(noisy, len(few), num_chains=16, **temperatures)
            by_samples = implicit.parzen(drawn, few, scale)
            print(f"| {name} | {scale:g} | {mean(evidence)} | {mean(both.upper - both.lower)} | {mean(by_samples)} |",
                  flush=True)  # fmt: skip
    for scale in chosen.scales:
        print(f"| the training data | {scale:g} | | | {mean(implicit.parzen(stored, few, scale))} |")


def compared(name: str, real: Tensor, fake: Tensor, seconds: str) -> None:
    found = quality.sample_quality(real, fake, neighbors=3).values
    distance = 1000 * squared_distance(fake, real)
    print(f"| {name} | {found['precision']:.2f} | {found['recall']:.2f} | {distance:.0f} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
