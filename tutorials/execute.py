"""Run the chapters, percent scripts named 00-....py and so on, and write each as a notebook with its outputs beside it.

A new chapter is a new script; nothing else needs to know of it. ``python tutorials/execute.py 00`` runs those whose
name starts with 00. A chapter that stops, at a claim of its text that is not so or at anything else, keeps the notebook
it had; the others run all the same, and the exit status tells. With DGM_QUICK=1 in the environment the chapters train
for moments only, and are not held to their claims.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

CHAPTERS = Path(__file__).parent


def main(names: Sequence[str] = (), chapters: Path = CHAPTERS) -> None:
    """Run the chapters whose names start with one of ``names``, or all; exit with what stopped those that did."""
    stopped = []
    for script in sorted(chapters.glob("[0-9]*.py")):
        if not names or script.name.startswith(tuple(names)):
            start = time.monotonic()
            try:
                execute(script, script.with_suffix(".ipynb"))
            except CellExecutionError as error:
                print(f"{script.stem}: {error}", file=sys.stderr, flush=True)
                stopped.append(f"{script.stem}: {error.ename}: {error.evalue}")
            else:
                print(f"{script.stem}: {time.monotonic() - start:.0f} s", flush=True)
    if stopped:
        sys.exit("\n".join(stopped))


def execute(script: Path, notebook: Path) -> None:
    """Run ``script`` in a fresh kernel, from its own folder, and write it with its outputs to ``notebook``."""
    content = jupytext.read(script)
    os.environ.pop("MPLBACKEND", None)  # else the kernel would not show pictures inline
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # Pyro imports tqdm's widgets, which no chapter uses
    folder = {"metadata": {"path": str(script.parent)}}
    NotebookClient(content, timeout=None, kernel_name="python3", coalesce_streams=True, resources=folder).execute()
    clean(content)
    jupytext.write(content, notebook)


def clean(content: NotebookNode) -> None:
    """Leave out what differs between runs and between machines, so that a notebook changes when its chapter does."""
    content.metadata = NotebookNode(
        jupytext={"formats": "ipynb,py:percent"},
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for i, cell in enumerate(content.cells):
        cell.id = f"cell-{i}"
        cell.metadata = NotebookNode()


if __name__ == "__main__":
    main(sys.argv[1:])
