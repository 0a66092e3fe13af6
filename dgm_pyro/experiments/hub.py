"""Runs on the Hugging Face hub: a repository holds a run, and a model card made from its record.

    dgm push runs/vae-digits alice/vae-digits
    dgm pull alice/vae-digits
    dgm sample runs/vae-digits

A pushed run has the files of a run, written again. For a training file of your own, it has the file's name, digest,
names of columns and classes, and words of categories, but not its path. A pulled run is read like any checkpoint, which
runs no code, and no other file of the repository is fetched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dgm_pyro.checkpoint as checkpoint
from dgm_pyro.checks import check_path, check_type, warn
from dgm_pyro.evaluation import Evidence, evaluate
from dgm_pyro.experiments import runs
from dgm_pyro.families.implicit import Implicit
from dgm_pyro.families.standardized import core_of
from dgm_pyro.files import write_text
from dgm_pyro.program import Program
from dgm_pyro.results import Table
from dgm_pyro.training.fit import History

__all__ = ["pull", "push"]

FILES = (runs.RECORD, checkpoint.HEADER, "weights-*.safetensors")
"""The files that are fetched from a repository."""


def push(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    num_particles: int = 1,
    data_dir: str | None = None,
    progress: bool = False,
    api: Any = None,
) -> str:
    """Store a run in a repository of the hub, which is created if needed, in one commit.

    Its model card has the evidence of the test data. A warning says if they are missing or have changed.

    Args:
        folder: folder of the run.
        repo: name of the repository, "user/name".
        private: whether a new repository is private.
        num_particles, progress: options of `dgm.evaluate`.
        data_dir: folder of the data set's files.
        api: a `huggingface_hub.HfApi` with its own token and endpoint; default those of ``hf auth login`` and of the
            environment.

    Returns:
        The address of the repository.

    Raises:
        FileNotFoundError, ValueError: ``folder`` holds no run, or a damaged one.
        ImportError: huggingface_hub is not installed.
        OSError: the hub cannot be reached, or refuses.
    """
    check_path(folder, "folder")
    check_type(repo, str, "repo", "the name of a repository, 'user/name'")
    program, record = runs.read(folder)
    evidence = _test_evidence(program, record, num_particles, data_dir, progress)
    public = _without_paths(record)
    with tempfile.TemporaryDirectory() as scratch:
        runs.write(scratch, program, public)
        curves = (Path(folder) / runs.CURVES).is_file()
        if curves:
            shutil.copy(Path(folder) / runs.CURVES, scratch)
        write_text(Path(scratch) / "README.md", card(program, public, evidence, repo, curves))
        with _hub_api(api) as hub:
            address = hub.create_repo(repo, private=private, exist_ok=True)
            hub.upload_folder(
                repo_id=repo, folder_path=scratch, commit_message=f"dgm push: {public}", delete_patterns=[FILES[-1]]
            )
    return str(address)


def pull(
    repo: str,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    force: bool = False,
    api: Any = None,
) -> tuple[Program, runs.Record]:
    """Fetch the run in a repository of the hub into the folder ``out``.

    Args:
        repo: name of the repository, "user/name".
        out: folder of the run.
        revision: branch, tag or commit; default the newest.
        force: whether to overwrite ``out``.
        api: as for `push`.

    Returns:
        The program and the record of the run.

    Raises:
        FileExistsError: ``out`` is not empty, and ``force`` is not set.
        CheckpointError, FileNotFoundError, ValueError: the repository holds no run, or a damaged one; nothing has been
            written.
        ImportError, OSError: as for `push`.
    """
    check_type(repo, str, "repo", "the name of a repository, 'user/name'")
    check_path(out, "out")
    with runs.reserved(Path(out), force=force), tempfile.TemporaryDirectory() as scratch:
        with _hub_api(api) as hub:
            hub.snapshot_download(repo, revision=revision, local_dir=scratch, allow_patterns=[*FILES])
        try:
            program, record = runs.read(scratch)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{repo} holds no run of dgm_pyro: it has no {runs.RECORD}") from error
        except ValueError as error:
            raise checkpoint.CheckpointError(
                f"the run in {repo} is damaged: pull it again, or push it again ({error})"
            ) from error
        runs.write_files(Path(out), program, record)
    return program, record


@contextlib.contextmanager
def _hub_api(api: Any) -> Iterator[Any]:
    """The hub's API, with all errors of its transport turned into an OSError."""
    if api is None:
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ImportError("the hub needs huggingface_hub: pip install 'dgm_pyro[hub]'") from error
        api = HfApi()
    try:
        yield api
    except (OSError, ValueError, TypeError):
        raise
    except Exception as error:  # of httpx
        raise ConnectionError(f"the hub does not answer, try again later: {error}") from error


def _without_paths(record: runs.Record) -> runs.Record:
    """The record without the paths of files."""
    reading = dict(record.reading)
    if "test" in reading:
        reading["test"] = Path(reading["test"]).name
    options = record.options | ({"reading": reading} if reading else {})
    return replace(record, data=Path(record.data).name, data_dir=None, options=options)


def _test_evidence(
    program: Program, record: runs.Record, num_particles: int, data_dir: str | None, progress: bool
) -> Evidence | None:
    """The evidence of the test data; None for a program without a density, or where the data are missing."""
    if isinstance(core_of(program), Implicit):
        return None
    try:
        points = record.points("test", data_dir)
    except (FileNotFoundError, ValueError) as error:
        warn(f"the model card has no evidence: {error}")
        return None
    return evaluate(program, points, num_particles=num_particles, progress=progress)


def card(program: Program, record: runs.Record, evidence: Evidence | None, repo: str, curves: bool) -> str:
    """The model card of a run, in markdown; with a picture of the learning ``curves``, if there is one."""
    history, formula = History.from_dict(record.history), program.formula()
    digests = {f"digest of the {split} data": digest for split, digest in record.reading.get("digests", {}).items()}
    if evidence is not None:
        of = "log p(x)" if program.variable == "x" else "log p(y | x)"
        digests |= {f"{of} of the {len(evidence.values)} test data": str(evidence), "their digest": evidence.digest}
    facts = {
        "model": record.model,
        "data": record.data,
        **digests,
        "training": f"{len(history.epochs)} epochs, {history.seconds:.0f} s",
        "epoch of the weights": str(history.best_epoch),
        **{name: str(value) for name, value in record.options.items() if name != "reading"},
    }
    name = repo.rpartition("/")[2]
    picture = f"\n![learning curves]({runs.CURVES})\n" if curves else ""
    return f"""---
library_name: dgm_pyro
tags: [pyro, generative-model, {type(core_of(program)).__name__.lower()}]
---

# {name}: {record}

    {formula.p}
{f"    {formula.q}" if formula.q else ""}

The run of a deep generative model, written by `dgm push`. Reading it runs no code:

    pip install 'dgm_pyro[hub]'
    dgm pull {repo} --out runs/{name}
    dgm sample runs/{name}

{Table(["", ""], [[*fact] for fact in facts.items()]).markdown()}
{picture}"""
