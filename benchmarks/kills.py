"""Trainings, sweeps and tours that are killed at random moments and resumed: what is lost, and what is mixed.

    make kills ARGS="--kills 50"

Each round forks a process that runs a command of `dgm`, kills it (SIGKILL) at a random moment, and looks at what is on
disk. Rounds resume until the command ends. Then its weights are compared with those of one that nobody killed, by the
digests in ``run.json``. While a process writes, this one reads the run beside it. A run that is read is *mixed* if its
program is not that of its record. A kill *loses* the seconds since the last state, cell or program was stored.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import dgm_pyro as dgm
from dgm_pyro import cli
from dgm_pyro.experiments import runs
from dgm_pyro.families.standardized import core_of

MINUTES = 0.01  # between two states
CLASSES = {"made": dgm.Autoregressive, "vae": dgm.VAE}
OPTIONS = f"--device cpu --seed 1 --checkpoint-minutes {MINUTES}"
COMMANDS = {
    "train": f"train vae --data digits --epochs 40 --ema 0.99 {OPTIONS} --out",
    "sweep": f"sweep vae --data digits-binary --prior normal,learned --epochs 12 --num-particles 8 "
    f"{OPTIONS.replace('--seed 1', '--seeds 2')} --out",
    "tour": "tour --quick --device cpu --out",
}
# What has been stored, by the time at which it was.
STORED = ("state.json", "run.json", "evaluation.json", "metrics.json", "sweep.json")


class Counts:
    """What has been seen."""

    def __init__(self) -> None:
        self.kills = self.reads = self.mixed = self.broken = self.differ = 0
        self.lost: list[float] = []

    def look(self, folder: Path) -> None:
        """Read every run in the folder."""
        for record in [*folder.glob("run.json"), *folder.glob("c*/*/run.json")]:
            try:
                program, found = runs.read(record.parent)
            except (ValueError, FileNotFoundError) as error:
                self.broken += 1
                print(f"  {record.parent}: {error}", file=sys.stderr)
                continue
            self.reads += 1
            self.mixed += found.model in CLASSES and not isinstance(core_of(program), CLASSES[found.model])


def started(command: list[str]) -> int:
    """The number of a process that runs the command."""
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = cli.main(command)
        if status:
            print(f"  {status}: dgm {' '.join(command)}", file=sys.stderr, flush=True)
        os._exit(status)
    return process


def last_stored(folder: Path, start: float) -> float:
    return max([start, *(path.stat().st_mtime for path in folder.rglob("*.json") if path.name in STORED)])


def killed(command: list[str], folder: Path, after: float, counts: Counts, read: bool) -> bool:
    """Run the command for so many seconds, then kill it; whether it had ended before."""
    start = time.time()
    process = started(command)
    while time.time() < start + after:
        if os.waitpid(process, os.WNOHANG) != (0, 0):
            return True
        if read:
            counts.look(folder)
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    now = time.time()
    os.waitpid(process, 0)
    counts.kills += 1
    counts.lost.append(now - last_stored(folder, start))
    counts.look(folder)
    print(f"  kill {counts.kills} after {after:.1f} s: {counts.lost[-1]:.1f} s lost", file=sys.stderr, flush=True)
    return False


def weights(folder: Path) -> dict[str, str]:
    """The digests of the weights of every run in a folder."""
    return {str(path.parent.relative_to(folder)): json.loads(path.read_text())["weights"]
            for path in folder.rglob("run.json")}  # fmt: skip


def run(name: str, kills: int, scratch: Path, moments: random.Random) -> Counts:
    counts, whole, folder = Counts(), scratch / f"{name}-whole", scratch / name
    command = COMMANDS[name].split()
    start = time.time()
    os.waitpid(started([*command, str(whole)]), 0)
    seconds = time.time() - start
    expected = weights(whole)
    while counts.kills < kills:
        shutil.rmtree(folder, ignore_errors=True)
        first = [*command, str(folder)]
        if name == "train":  # over an older run of another model
            os.waitpid(started(["train", "made", "--epochs", "1", "--device", "cpu", "--out", str(folder)]), 0)
            first.append("--force")
        again = first if name == "sweep" else [*command, str(folder), "--resume"]
        ended = killed(first, folder, moments.uniform(0.1, seconds / 2), counts, name == "train")
        while not ended:
            after = moments.uniform(0.1, seconds / 2) if counts.kills < kills else 10 * seconds
            begun = name != "train" or (folder / "state.json").is_file() or weights(folder) == expected
            ended = killed(again if begun else first, folder, after, counts, name == "train")
        counts.differ += weights(folder) != expected
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill and resume trainings, sweeps and tours.")
    parser.add_argument("--kills", type=int, default=50, help="number of kills of all commands together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", choices=COMMANDS, help="one of the commands")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [options.only] if options.only else [*COMMANDS]
    print("| command | kills | reads | mixed | unreadable | most seconds lost | other weights |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        # What takes seconds to import is imported here, once.
        for each in ("train made --epochs 1", "sweep made --data digits --epochs 1 --num-particles 1"):
            cli.main([*each.split(), "--device", "cpu", "--out", f"{scratch}/first-{each[:5]}"])
        for place, name in enumerate(names):
            share = options.kills * (place + 1) // len(names) - options.kills * place // len(names)
            found = run(name, share, Path(scratch), random.Random(options.seed))
            print(
                f"| `dgm {name}` | {found.kills} | {found.reads} | {found.mixed} | {found.broken} | "
                f"{max(found.lost):.1f} | {found.differ} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
