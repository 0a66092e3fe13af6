"""Files that are replaced atomically, and folders that one process writes at a time.

A file is written next to its place and moved there in one step. A reader, also after a kill at any moment, finds the
old file or the new one. The lock of a folder is released when its process ends, so nobody has to remove it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]

LARGEST_JSON = 2**28
"""Bytes, far more than in any JSON file that dgm_pyro writes."""

_TEMPORARY = re.compile(r"\..+\.(\d+)\.part")


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically: after a kill, the old file or the whole new one is there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8, as `write_file` does."""
    write_file(path, text.encode())


def parsed_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: the file is no JSON, or larger or more deeply nested than any that dgm_pyro writes.
    """
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"it has {path.stat().st_size:,} bytes")
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def refuse_file(folder: Path, what: str) -> None:
    """Raise FileExistsError if a file is where a folder is to be written, ``what`` being "a run is" or the like."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, but {what} a folder: choose another --out")


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder if needed and lock it against other writers; remove temporary files that killed ones left.

    Raises:
        BlockingIOError: another process is writing in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        for path in folder.glob(".*.part"):
            found = _TEMPORARY.fullmatch(path.name)
            if found and not _is_running(int(found[1])):
                path.unlink(missing_ok=True)
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise BlockingIOError(
            f"{folder} is being written by another process: wait until it ends, or choose another folder (--out)"
        ) from None
    except OSError:  # some network file systems lock no folders
        os.close(lock)
        return None
    return lock


def _is_running(process: int) -> bool:
    if process == os.getpid():  # an earlier process with the same number, as containers count from 1
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
