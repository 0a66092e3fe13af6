"""The state of a training in a folder, from which it continues after its process has ended for any reason.

``state-<digest>.safetensors`` holds the result of `Training.state_dict`: its tensors, and all other values as JSON. If
several processes train together, each writes one. ``state.json`` names them, and is replaced in one step when all are
there. Nothing is pickled, so reading a state runs no code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch

import dgm_pyro.checkpoint as checkpoint
from dgm_pyro.files import write_file
from dgm_pyro.jobs import Interrupted, noted
from dgm_pyro.training.distributed import process_group

__all__ = ["States"]

FORMAT = "dgm_pyro training"
FORMAT_VERSION = 1
SHARE = 20
"""The shortest time between two states stored for a best epoch, as a multiple of the time that storing takes."""


class States:
    """The states of a training in a folder that this process alone writes.

    Args:
        folder: an existing folder.
        about: plain Python values to store with the states, from which the training can be rebuilt.
        advice: how to continue after an interrupt, for the message.
    """

    def __init__(self, folder: Path, about: Any = None, advice: str = "give the same call again"):
        self.folder, self.about, self.advice = folder, about, advice
        self.training: Any = None
        self.minutes = 0.0
        self.stored, self.cost, self.steps = time.monotonic(), 0.0, 0
        self.signal: int | None = None

    def read(self) -> dict[str, Any] | None:
        """The state that this process stored; None where there is none.

        Raises:
            CheckpointError: the state is damaged.
            ValueError: the state belongs to another number of processes.
        """
        header, processes = read_header(self.folder), process_group()
        if header is None:
            return None
        parts = header["parts"]
        if len(parts) != processes.world_size:
            raise ValueError(
                f"{self.folder} holds a training in {len(parts)} processes, but this one has {processes.world_size}: "
                f"start {len(parts)} processes"
            )
        return _read_part(self.folder, parts[processes.rank])

    def write(self) -> None:
        """Store the state of the training."""
        start, processes = time.monotonic(), process_group()
        content = _packed_state(self.training.state_dict())
        digest = hashlib.sha256(content)
        write_file(self.folder / _part_name(digest.hexdigest()), content)
        digests = processes.digests(digest.digest(), self.training.device)
        if processes.writes:
            header = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "about": self.about,
                "steps": self.training.taken,
                "parts": [{"sha256": each} for each in digests],
            }
            checkpoint.write_named(self.folder, checkpoint.STATE, header, {})
        processes.wait()
        self.stored, self.steps = time.monotonic(), self.training.taken
        self.cost = self.stored - start

    def remove(self) -> None:
        """Remove the state, once the result of the training is stored."""
        (self.folder / checkpoint.STATE).unlink(missing_ok=True)
        checkpoint.remove_unnamed(self.folder)

    @contextlib.contextmanager
    def of(self, training: Any) -> Iterator[None]:
        """Store the state of a `Training`: now, every few minutes, at its best epochs, and before a signal ends it."""
        self.training, self.minutes, self.steps = training, training.options.checkpoint_minutes, training.taken
        if training.taken == 0:
            self.write()
        with noted(self._note_signal):
            yield

    def pause(self) -> bool:
        """Whether it is time to store a state."""
        return self.signal is not None or time.monotonic() - self.stored >= 60 * self.minutes

    def look(self, epoch: Any) -> None:
        """Store a state if one is due.

        Args:
            epoch: the `Epoch` that has ended, or None.

        Raises:
            Interrupted: a signal has arrived since the last call.
        """
        training = self.training
        best = epoch is not None and training.history.best_epoch == epoch.epoch
        waited = time.monotonic() - self.stored >= SHARE * self.cost
        write, interrupted = process_group().any(
            self.pause() or (best and waited) or training.finished, self.signal is not None, device=training.device
        )
        if write:
            self.write()
        if interrupted:
            message = f"interrupted after step {training.taken} of {training.steps}, which is stored: {self.advice}"
            raise Interrupted(message, 128 + (self.signal or signal.SIGTERM))

    def _note_signal(self, number: int) -> None:
        self.signal = number


def read_header(folder: Path) -> dict[str, Any] | None:
    """The header that `States` stored in the folder; None where there is none.

    Raises:
        CheckpointError: the header is damaged.
    """
    path = folder / checkpoint.STATE
    if not path.is_file():
        return None
    try:
        header = checkpoint.parsed_json(path)
        if header["format"] != FORMAT or header["format_version"] > FORMAT_VERSION:
            raise ValueError("another version of dgm_pyro wrote it")
        for part in header["parts"]:
            bytes.fromhex(part["sha256"])
    except (ValueError, TypeError, LookupError) as error:
        raise checkpoint.CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}): start the training again from the beginning"
        ) from error
    found: dict[str, Any] = header
    return found


def _part_name(digest: str) -> str:
    return f"state-{digest[:12]}.safetensors"


def _packed_state(state: dict[str, Any]) -> bytes:
    tree, tensors = checkpoint.encoded(_as_plain_dicts(state))
    return safetensors.torch.save(tensors, {"tree": json.dumps(tree, allow_nan=False)})


def _as_plain_dicts(tree: Any) -> Any:
    """``tree`` with plain dicts instead of torch's subclasses of dict."""
    if isinstance(tree, dict):
        return {name: _as_plain_dicts(value) for name, value in tree.items()}
    return [_as_plain_dicts(value) for value in tree] if isinstance(tree, list) else tree


def _read_part(folder: Path, part: dict[str, Any]) -> dict[str, Any]:
    path = folder / _part_name(part["sha256"])
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != part["sha256"]:
            raise ValueError("its sha256 is not the one in state.json")
        size = int.from_bytes(content[:8], "little")
        tree = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["tree"])
        found: dict[str, Any] = checkpoint.decoded(tree, checkpoint.safetensors_of(path, content))
        return found
    except (OSError, ArithmeticError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise checkpoint.CheckpointError(
            f"{path} is damaged ({error}): start the training again from the beginning"
        ) from error
