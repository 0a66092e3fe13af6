"""MADE on the small binary data sets: -log p(x) of the test split in nats, exact; weights chosen on the valid split.

    DGM_DATA=folder python benchmarks/binary_sets.py mushrooms nltcs --orders 8

One hidden layer of 500 with dropout, in its natural order of the features; with ``--orders K``, K random ones, and
their mixture p(x) = (1/K) sum_k p_k(x). One thread; seconds are processor time.
"""

from __future__ import annotations

import argparse
import time

import torch

import dgm_pyro as dgm
from dgm_pyro.evaluation import standard_error
from dgm_pyro.networks import MADE
from dgm_pyro.program import log_mean_exp

SETS = ("mushrooms", "nltcs", "plants", "dna", "nips")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=["mushrooms"], choices=SETS, metavar="SET", help=", ".join(SETS))
    parser.add_argument("--orders", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--data-dir", default=None, help="default: the environment variable DGM_DATA")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| set | train / valid / test | bits | one order | mixture | seconds |\n|---|--:|--:|--:|--:|--:|")
    for name in arguments.sets:
        train, valid, test = (
            dgm.data.load(name, split, data_dir=arguments.data_dir) for split in ("train", "valid", "test")
        )
        start, size, each = time.process_time(), train.event_shape.numel(), []
        for seed in range(arguments.orders):
            torch.manual_seed(seed)
            order = torch.randperm(size).tolist() if arguments.orders > 1 else "natural"
            network = MADE((size,), 1, (500,), order=order, dropout=arguments.dropout, levels=2, activation="relu")
            program = dgm.Autoregressive(dgm.Bernoulli((size,), network))
            dgm.fit(
                program, train, epochs=arguments.epochs, lr=arguments.lr, weight_decay=arguments.weight_decay,
                lr_schedule="constant", validation=valid, early_stopping=20, seed=seed, progress=False,
            )  # fmt: skip
            each.append(dgm.evaluate(program, test).values)
        single, mixture = -torch.stack(each).mean(0), -log_mean_exp(torch.stack(each))
        cells = [f"{nats.mean():.2f} +- {standard_error(nats):.2f}" for nats in (single, mixture)]
        seconds, sizes = time.process_time() - start, " / ".join(str(len(part)) for part in (train, valid, test))
        print(f"| {name} | {sizes} | {size} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
