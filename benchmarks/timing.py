"""Timing side by side: cases that take turns within one run, compared by their medians.

    from timing import Benchmark, main

    def run(bench: Benchmark) -> None:
        bench.compare("a step", {"ours": step, "theirs": their_step}, reference="ours")

    if __name__ == "__main__":
        main(run, __doc__)

makes a script of ``python benchmarks/NAME.py [--quick] [--device cuda] [--threads N] [--json FILE]``. A machine that
slows down for a while slows all cases alike, because in each round every case has its turn; a median ignores the round
that something else interrupted. So ratios are worth more than milliseconds, and both more than a single run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Case = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds per call of every case, one for each of its turns."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def quartiles(self, name: str) -> tuple[float, float]:
        """The first and the third; with a single turn, that turn twice."""
        turns = self.seconds[name]
        if len(turns) == 1:
            return turns[0], turns[0]
        first, _, third = statistics.quantiles(turns, n=4, method="inclusive")
        return first, third

    def ratio(self, name: str, reference: str) -> float:
        """The median of ``name`` over that of ``reference``: above 1, ``name`` is slower."""
        return self.median(name) / self.median(reference)

    def as_dict(self, reference: str) -> dict[str, Any]:
        return {
            name: {
                "median": self.median(name),
                "quartiles": list(self.quartiles(name)),
                "ratio": self.ratio(name, reference),
                "turns": len(self.seconds[name]),
            }
            for name in self.seconds
        }

    def rows(self, reference: str) -> list[list[str]]:
        rows = [["", "median ms", "quartiles", f"x {reference}"]]
        for name in self.seconds:
            low, high = (f"{1e3 * q:.3g}" for q in self.quartiles(name))
            rows.append(
                [name, f"{1e3 * self.median(name):.3g}", f"{low} .. {high}", f"{self.ratio(name, reference):.2f}"]
            )
        return rows


def compare(
    cases: Mapping[str, Case],
    *,
    warm_up: int = 3,
    repeats: int = 50,
    in_a_row: int = 1,
    seconds: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Let the cases take turns, round after round, and time every turn; with CUDA in use, until the device is done.

    Args:
        cases: what to call, by name.
        warm_up: rounds that are not timed. Whatever is compiled is compiled there.
        repeats: timed rounds, at most.
        in_a_row: calls that a turn consists of; its time is their mean. More than one for what is called in a loop, as
            steps of training are: alone after the other cases, a call finds the caches full of their code and data.
        seconds: no further round starts after so long; one always does.
        clock: seconds that have passed since some fixed time.
    """
    if not cases or warm_up < 0 or repeats < 1 or in_a_row < 1:
        numbers = f"{len(cases)} cases, {warm_up=}, {repeats=} and {in_a_row=}"
        raise ValueError(f"compare needs a case, a round and a call, got {numbers}")
    for _ in range(warm_up):
        for case in cases.values():
            case()
    taken: dict[str, list[float]] = {name: [] for name in cases}
    first = clock()
    for _ in range(repeats):
        for name, case in cases.items():
            _synchronize()
            start = clock()
            for _ in range(in_a_row):
                case()
            _synchronize()
            taken[name].append((clock() - start) / in_a_row)
        if clock() - first > seconds:
            break
    return Times(taken)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a Markdown table whose columns line up; the first row is the heading."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    justified = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (justified[0], rule, *justified[1:]))


def machine(device: str = "cpu") -> dict[str, Any]:
    """The environment of a measurement: processor, threads, device, versions."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


class Benchmark:
    """The tables of one script: prints each one as it comes, and keeps it for the JSON file.

    Attributes:
        quick: measure less, only to see that the script works.
        device: where the cases run.
    """

    def __init__(self, *, quick: bool = False, device: str = "cpu"):
        self.quick, self.device = quick, device
        self.tables: list[dict[str, Any]] = []

    def compare(self, title: str, cases: Mapping[str, Case], *, reference: str, **options: Any) -> Times:
        """Compare the cases, with the options of `compare`, and add a table of ratios against ``reference``."""
        if reference not in cases:
            raise ValueError(f"reference must be one of the cases {', '.join(cases)}, got {reference!r}")
        if self.quick:
            options |= {"warm_up": 1, "repeats": 3, "in_a_row": 1}
        times = compare(cases, **options)
        self.add(title, times.rows(reference), reference=reference, cases=times.as_dict(reference))
        return times

    def add(self, title: str, rows: Sequence[Sequence[str]], **numbers: Any) -> None:
        """Print a table, heading first, and keep ``numbers``, or else its cells, for the JSON file."""
        print(f"\n{title}\n\n{aligned(rows)}", flush=True)
        self.tables.append({"title": title, **(numbers or {"rows": [list(row) for row in rows]})})

    def as_dict(self) -> dict[str, Any]:
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return {"date": date, "quick": self.quick, "machine": machine(self.device), "tables": self.tables}


def main(run: Callable[[Benchmark], None], description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run, print the tables and write the JSON file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure less, only to see that it works")
    parser.add_argument("--device", default="cpu", help="cpu, or a CUDA device (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default: 1)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the numbers there too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    bench = Benchmark(quick=options.quick, device=options.device)
    print(f"{Path(sys.argv[0]).stem}: " + ", ".join(f"{k} {v}" for k, v in machine(options.device).items()))
    run(bench)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(bench.as_dict(), indent=1) + "\n")
