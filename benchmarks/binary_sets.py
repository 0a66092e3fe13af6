"""MADE on the small binary data sets: -log p(x) of the test split in nats, exact; weights chosen on the valid split.

    DGM_DATA=folder python benchmarks/binary_sets.py mushrooms nltcs

The residual MADE of `dgm.build`, 3 layers of 256, in one order of the features. One thread; seconds are processor time.
"""

from __future__ import annotations

import argparse
import time

import torch

import dgm_pyro as dgm
from dgm_pyro.networks import MADE

SETS = ("mushrooms", "nltcs", "plants", "dna", "nips")


def made(data: dgm.Data, dropout: float) -> dgm.Program:
    network = MADE(data.event_shape, 1, (256, 256, 256), residual=True, dropout=dropout, levels=2)
    return dgm.Autoregressive(dgm.Bernoulli(data.event_shape, network))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=["mushrooms"], choices=SETS, metavar="SET", help=", ".join(SETS))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--data-dir", default=None, help="default: the environment variable DGM_DATA")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.sets:
        train, valid, test = (
            dgm.data.load(name, split, data_dir=arguments.data_dir) for split in ("train", "valid", "test")
        )
        for seed in range(arguments.seeds):
            start = time.process_time()
            torch.manual_seed(seed)
            program = made(train, arguments.dropout)
            history = dgm.fit(
                program, train, epochs=arguments.epochs, lr=2e-3, weight_decay=0.1, validation=valid, seed=seed,
                early_stopping=15, progress=False,
            )  # fmt: skip
            found = dgm.evaluate(program, test)
            print(
                f"{name} ({len(train)} / {len(valid)} / {len(test)}, {train.event_shape.numel()} bits), seed {seed}: "
                f"{-found.nats:.3f} +- {found.nats_stderr:.3f} nats, epoch {history.best_epoch} of "
                f"{len(history.epochs)}, {time.process_time() - start:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
