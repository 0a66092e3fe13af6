"""Training on a file that is larger than memory: the peak of memory, and the speed beside that of data in memory.

    python benchmarks/larger_than_memory.py [--gigabytes 20] [--steps 4000] [--quick]

The file is sparse: it has that size, and takes no room on the disk. Both trainings are `dgm train vae` in a process of
their own, with equal numbers of validation data; the one in memory has a file of 400 MB. The peak is that of resident
memory, in which pages of the disk's cache do not count. A row without data says what the process takes before it reads.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

FEATURES, IN_MEMORY, HELD_OUT = 784, 2**17, 2**12


def sparse(path: Path, rows: int) -> None:
    np.lib.format.open_memmap(path, "w+", np.float32, (rows, FEATURES))


def train(path: str, out: str, steps: str) -> None:
    """What a process does: train, and print its peak of resident memory in GB and its processor time."""
    import warnings

    from dgm_pyro import cli

    warnings.simplefilter("ignore")  # of features that are constant
    rows = np.load(path, mmap_mode="r").shape[0]
    command = ["train", "vae", "--data", path, "--likelihood", "normal-shared", "--gradient-steps", steps, "--out", out]
    command += ["--validation", str(HELD_OUT / rows), "--no-compile", "--device", "cpu"]
    if cli.main(command):
        raise SystemExit(1)


def measured(folder: Path, path: Path, steps: int) -> tuple[float, float]:
    """Steps per second of processor time and the peak of memory in GB."""
    out = folder / path.stem
    command = [sys.executable, __file__, "--train", str(path), str(out), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    if done.returncode:
        raise SystemExit(done.stderr)
    peak = float(done.stdout.splitlines()[-1])
    return steps / json.loads((out / "run.json").read_text())["history"]["seconds"], peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="2 GB, 500 steps, once")
    parser.add_argument("--train", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(*options.train)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
        return
    if options.quick:
        options.gigabytes, options.steps, options.repeats = 2, 500, 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = {"in memory": IN_MEMORY, "by rows": int(options.gigabytes * 1e9 / 4 / FEATURES)}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sizes}
        for _ in range(options.repeats):  # in turn, as the machine may have other work
            for name, rows in sizes.items():
                path = folder / f"{name.replace(' ', '-')}-{len(found[name])}.npy"
                sparse(path, rows)
                found[name].append(measured(folder, path, options.steps))
                path.unlink()
        print("| data | GB | steps per second, best | peak of memory, GB |\n|---|---:|---:|---:|")
        for name, rows in sizes.items():
            speed, peak = (max(each) for each in zip(*found[name], strict=True))
            print(f"| {name} | {rows * FEATURES * 4 / 1e9:.1f} | {speed:.1f} | {peak:.2f} |")
        best = {name: max(speed for speed, _ in each) for name, each in found.items()}
        print(f"speed by rows: {best['by rows'] / best['in memory']:.1%} of that in memory")


if __name__ == "__main__":
    main()
