"""The tracker of a run: a log and learning curves in its folder."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from dgm_pyro.experiments import plots
from dgm_pyro.experiments.runs import CURVES, METRICS
from dgm_pyro.files import write_text
from dgm_pyro.training.fit import Epoch, History, Training

__all__ = ["RunFiles"]

EVERY = 10.0
"""Fewest seconds between two drawings of the curves."""


class RunFiles:
    """Writes ``metrics.jsonl``, a line per epoch, and ``learning-curves.png``, at most once in `EVERY` seconds.

    Args:
        folder: folder of the files.
        title: title of the curves.

    >>> import tempfile, torch, dgm_pyro as dgm
    >>> from dgm_pyro.experiments.trackers import RunFiles
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     program, x = dgm.Normal(2, learned=True), torch.randn(64, 2)
    ...     _ = dgm.fit(program, x, epochs=3, trackers=[RunFiles(folder)], progress=False)
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['learning-curves.png', 'metrics.jsonl']
    """

    def __init__(self, folder: str | Path, title: str = ""):
        self.folder, self.title, self.drawn = Path(folder), title, time.monotonic()
        self.started = False

    def on_start(self, training: Training) -> None:
        """Write all epochs so far again: after a kill, the file may have more of them than the state."""
        self.started, self.history = True, training.history
        write_text(self.folder / METRICS, "".join(map(_json_line, training.history.epochs)))

    def on_epoch(self, epoch: Epoch) -> None:
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(_json_line(epoch))
        if time.monotonic() - self.drawn >= EVERY:
            self._draw_curves(self.history)

    def on_end(self, history: History) -> None:
        if history.epochs:
            self._draw_curves(history)

    def _draw_curves(self, history: History) -> None:
        count = len(history.epochs)
        title = f"{self.title}: {count} epoch{'s' * (count != 1)}" if self.title else ""
        plots.write_picture(self.folder / CURVES, plots.learning_curves(history, title=title))
        self.drawn = time.monotonic()


def _json_line(epoch: Epoch) -> str:
    return json.dumps(asdict(epoch), allow_nan=False) + "\n"
