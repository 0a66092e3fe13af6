"""Accuracy of the evidence of a VAE: bidirectional Monte Carlo, and IWAE against AIS, on binary digits.

    python benchmarks/evidence.py

For each composition: the sandwich lower <= log p(x) <= upper on data that the trained VAE itself has made, for a
growing number of temperatures, and on real test digits IWAE-5000 beside annealed importance sampling. All in nats per
datum.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import dgm_pyro as dgm

COMPOSITIONS: dict[str, dict[str, str]] = {
    "normal / meanfield": {},
    "flow / meanfield": {"prior": "flow"},
    "normal / iaf": {"encoder": "iaf"},
    "vae / ladder": {"prior": "vae", "encoder": "ladder"},
}


def mean(values: torch.Tensor) -> list[float]:
    """Mean over the data, and its standard error."""
    return [float(values.mean()), float(values.std() / len(values) ** 0.5)]


def measure(swaps: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    digits, test = dgm.data.load("digits-binary"), dgm.data.load("digits-binary", "test", num_data=arguments.num_data)
    torch.manual_seed(0)
    vae = dgm.build("vae", digits, **swaps)
    dgm.fit(vae, digits, "annealed", epochs=arguments.epochs, progress=False)
    numbers: dict[str, Any] = {"sandwich": {}}
    for temperatures in arguments.temperatures:
        start = time.perf_counter()
        both = dgm.infer.bidirectional(vae, arguments.num_data, num_temperatures=temperatures)
        numbers["sandwich"][temperatures] = {
            "lower": mean(both.lower),
            "upper": mean(both.upper),
            "gap": mean(both.upper - both.lower),
            "acceptance": float(both.acceptance.mean()),
            "seconds": time.perf_counter() - start,
        }
    iwae = dgm.evaluate(vae, test, num_particles=5000).values
    ais = dgm.infer.ais(vae, test.x, num_temperatures=max(arguments.temperatures)).log_evidence.double()
    numbers |= {"iwae-5000": mean(iwae), "ais": mean(ais), "ais - iwae": mean(ais - iwae)}
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--num-data", type=int, default=64, help="how many data")
    parser.add_argument("--temperatures", type=int, nargs="+", default=[30, 100, 300, 1000])
    parser.add_argument("--out", type=Path, default=Path("evidence.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    everything = {}
    for name, swaps in COMPOSITIONS.items():
        everything[name] = numbers = measure(swaps, arguments)
        for temperatures, row in numbers["sandwich"].items():
            print(
                f"{name:<20}{temperatures:>6} temperatures: {row['lower'][0]:8.3f} <= log p(x) <= "
                f"{row['upper'][0]:8.3f}   gap {row['gap'][0]:6.3f} +- {row['gap'][1]:.3f}   ({row['seconds']:.0f} s)",
                flush=True,
            )
        print(
            f"{name:<20}test digits: IWAE-5000 {numbers['iwae-5000'][0]:.3f}, AIS {numbers['ais'][0]:.3f}, "
            f"AIS - IWAE {numbers['ais - iwae'][0]:+.3f} +- {numbers['ais - iwae'][1]:.3f}",
            flush=True,
        )
        arguments.out.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
