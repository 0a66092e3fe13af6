"""Training on a file that is larger than memory: the peak of memory, and the speed beside that of data in memory.

    python benchmarks/larger_than_memory.py [--gigabytes 20] [--steps 4000] [--quick]

The file is sparse: it has that size, and takes no room on the disk. Both trainings are `dgm train vae` in a process of
their own, with equal numbers of validation data; the one in memory has a file of 400 MB. The peak is that of resident
memory, in which the disk's cache does not count. Processor time counts the thread that reads; where a core is free for
it, the speed is that of the steps alone.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

FEATURES, IN_MEMORY, HELD_OUT = 784, 2**17, 2**12


def sparse(path: Path, rows: int) -> None:
    np.lib.format.open_memmap(path, "w+", np.float32, (rows, FEATURES))


def train(path: str, out: str, steps: str) -> None:
    """What a process does: train, and print its processor time in seconds and its peak of memory in GB."""
    import warnings

    from dgm_pyro import cli
    from dgm_pyro.experiments import runs  # noqa: F401

    warnings.simplefilter("ignore")  # of features that are constant
    rows, start = np.load(path, mmap_mode="r").shape[0], time.process_time()
    command = ["train", "vae", "--data", path, "--likelihood", "normal-shared", "--gradient-steps", steps, "--out", out]
    command += ["--validation", str(HELD_OUT / rows), "--no-compile", "--device", "cpu"]
    if cli.main(command):
        raise SystemExit(1)
    print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)


def measured(folder: Path, path: Path, steps: int) -> tuple[float, float, float]:
    """Steps per second, steps per second of processor time, and the peak of memory in GB."""
    out = folder / path.stem
    command = [sys.executable, __file__, "--train", str(path), str(out), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    processor, peak = map(float, done.stdout.splitlines()[-1].split())
    return steps / json.loads((out / "run.json").read_text())["history"]["seconds"], steps / processor, peak


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
        return
    if options.quick:
        options.gigabytes, options.steps, options.repeats = 2, 500, 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = {"in memory": IN_MEMORY, "by rows": int(options.gigabytes * 1e9 / 4 / FEATURES)}
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in sizes}
        for _ in range(options.repeats):  # in turn, as the machine may have other work
            for name, rows in sizes.items():
                path = folder / f"{name.replace(' ', '-')}-{len(found[name])}.npy"
                sparse(path, rows)
                found[name].append(measured(folder, path, options.steps))
                path.unlink()
    best = {name: [max(each) for each in zip(*numbers, strict=True)] for name, numbers in found.items()}
    best["ratio"] = [a / b for a, b in zip(best["by rows"], best["in memory"], strict=True)]
    print("| data | GB | steps per second | steps per second of processor | peak of memory, GB |")
    print("|---|---:|---:|---:|---:|")
    for name, numbers in best.items():
        size = f"{sizes[name] * FEATURES * 4 / 1e9:.1f}" if name in sizes else ""
        print(f"| {name} | {size} | {' | '.join(f'{number:.2f}' for number in numbers)} |")


if __name__ == "__main__":
    main()
