"""The tour's programs on random splits of the digits, with the settings of `dgm_pyro.experiments.tour.stops`.

    python benchmarks/tour_splits.py --splits 5 --seeds 3 --out bench/splits.jsonl [PROGRAM ...]

All 1797 digits are split anew, 1437 to train on and 360 to test, as many as in the tour; a tenth of the former is held
out for validation. A seed sets the start, the order and the held-out part. Each run is a line of JSON, and is not run
again; with the splits in the outer loop, an interrupted study has whole splits. The mean is over all runs, and its
standard error is that over splits: runs on one split are first averaged over its seeds. The splits share digits, so
this error is a little too small.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from choose_settings import append, records_in, score

import dgm_pyro as dgm
from dgm_pyro.evaluation import standard_error
from dgm_pyro.experiments.tour.stops import STOPS, Stop
from dgm_pyro.program import seeded
from dgm_pyro.uses.classification import beliefs

TEST = 360


def digits() -> dgm.Data:
    parts = [dgm.data.load("digits", split) for split in ("train", "test")]
    x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])
    return dgm.Data(x, y, levels=parts[0].levels, name="digits", num_classes=parts[0].num_classes)


def measured(stop: Stop, split: int, seed: int) -> dict[str, Any]:
    whole = digits()
    train, test = whole.split(TEST / len(whole), seed=split)
    with seeded(seed, torch.device("cpu")):
        program = stop.make(train)
    start = time.process_time()
    if stop.recipe is not None:
        history = dgm.fit(program, train, seed=seed, progress=False, **stop.recipe)
    seconds = time.process_time() - start
    program.eval()
    accuracy = None
    if isinstance(program, (dgm.Labeled, dgm.Discriminative)):
        accuracy = (beliefs(program, test.x)[0].argmax(-1) == test.y).double().mean().item()
    return {
        "program": stop.name,
        "split": split,
        "seed": seed,
        "score": score(stop, program, test).mean().item(),
        "accuracy": accuracy,
        "seconds": round(seconds, 1),
        "best_epoch": None if stop.recipe is None else history.best_epoch,
    }


def mean_and_errors(values: dict[tuple[int, int], float]) -> str:
    """Mean ± its standard error over splits; the deviation between seeds of a split, if there are several."""
    each = [
        torch.tensor([value for (split, _), value in values.items() if split == one], dtype=torch.float64)
        for one in dict.fromkeys(split for split, _ in values)
    ]
    means = torch.stack([runs.mean() for runs in each])
    text = f"{means.mean():.3f}" if len(means) == 1 else f"{means.mean():.3f} ± {standard_error(means):.3f}"
    seeds = [runs.var() for runs in each if len(runs) > 1]
    return f"{text} | {torch.stack(seeds).mean().sqrt():.3f}" if seeds else f"{text} | "


def table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| program | bits/dim | between seeds | accuracy | between seeds | splits | runs | seconds each |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for stop in STOPS:
        rows = [record for record in records if record["program"] == stop.name]
        if not rows:
            continue
        score, accuracy = (
            mean_and_errors({(row["split"], row["seed"]): row[key] for row in rows})
            if all(row[key] is not None for row in rows)
            else " | "
            for key in ("score", "accuracy")
        )
        if stop.family == "discriminative":
            score = "no p(x) | "
        splits = len({row["split"] for row in rows})
        seconds = sum(row["seconds"] for row in rows) / len(rows)
        yield f"| {stop.title} | {score} | {accuracy} | {splits} | {len(rows)} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stop.name for stop in STOPS]
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(names)}; default all")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/splits.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = records_in(arguments.out)
    done = {(record["program"], record["split"], record["seed"]) for record in records}
    stops = [stop for stop in STOPS if stop.name in (arguments.programs or names)]
    for split, seed, stop in itertools.product(range(arguments.splits), range(arguments.seeds), stops):
        if (stop.name, split, seed) not in done:
            records.append(measured(stop, split, seed))
            append(arguments.out, records[-1])
    print("\n".join(table(records)))


if __name__ == "__main__":
    main()
