"""Independent tasks in several processes, here or on a cluster, and the signals that end them.

joblib starts the processes, distributes the tasks and divides the cores; `joblib.parallel_config` chooses another
backend, such as "dask". For processes of this machine, two things are added: they end when their parent is killed, and
an interrupt of the parent gives each task time to store its state.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import joblib
from joblib.parallel import LokyBackend, SequentialBackend, get_active_backend

from dgm_pyro.files import write_text
from dgm_pyro.malloc import keep_freed_memory

__all__ = ["Interrupted", "in_parallel", "in_this_process", "noted", "on_cluster", "processes", "send_by_value"]

GRACE = 30
"""Seconds for a task to store its state after the parent of its process has ended."""
EVERY = 0.2
"""Seconds between two checks of the parent."""
AT_ONCE = 1.0
"""Seconds within which two signals of one kind count as one."""
OTHER = {signal.SIGINT: signal.SIGTERM, signal.SIGTERM: signal.SIGINT}


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM ended work whose state was stored; ``status`` is the exit status for the process."""

    def __init__(self, message: str, status: int):
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


@contextlib.contextmanager
def noted(note: Callable[[int], None]) -> Iterator[None]:
    """Call ``note`` on SIGINT or SIGTERM, and continue. A second signal has its usual effect.

    Signals within `AT_ONCE` count as one, because the command timeout signals both the process and its group.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, heard = {each: signal.getsignal(each) for each in OTHER}, dict[int, float]()

    def hear(number: int, frame: Any) -> None:
        now = time.monotonic()
        if now - heard.setdefault(number, now) <= AT_ONCE:
            note(number)
        else:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for each, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(each, hear)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def on_cluster(backend: str | None, address: str | None = None) -> Iterator[None]:
    """Run tasks on an existing cluster.

    Args:
        backend: "dask" or "ray"; None for processes of this machine.
        address: address of the scheduler; default the cluster that this process has joined.

    Raises:
        ValueError: the backend is unknown, or there is an address without a backend.
        ImportError: the backend is not installed.
        OSError: no scheduler answers at the address.
    """
    if backend is None:
        if address is not None:
            raise ValueError(f"address is {address!r}, but there is no backend: choose backend='dask' or 'ray'")
        yield
        return
    from dgm_pyro.checks import check_choice  # which imports torch

    check_choice(backend, ("dask", "ray"), "backend")
    try:
        package = importlib.import_module({"dask": "distributed", "ray": "ray"}[backend])
    except ModuleNotFoundError as error:
        remedy = {"dask": "pip install 'dgm_pyro[cluster]'", "ray": "pip install ray"}[backend]
        raise ImportError(f"backend={backend!r} needs a package that is missing: {remedy}") from error
    if backend == "ray":
        package.init(address)
        importlib.import_module("ray.util.joblib").register_ray()
    with joblib.parallel_config(backend, n_jobs=-1, **({"scheduler_host": address} if backend == "dask" else {})):
        yield


def processes(jobs: int | None = None) -> int:
    """Number of processes that `in_parallel` starts on this machine: 0 for one job and on a cluster."""
    found = int(joblib.effective_n_jobs(jobs))
    return found if found > 1 and isinstance(get_active_backend()[0], LokyBackend) else 0


def in_this_process() -> bool:
    """Whether `in_parallel` by default runs the tasks in this process, one after another."""
    return isinstance(get_active_backend()[0], LokyBackend | SequentialBackend) and processes() == 0


def in_parallel(
    function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], jobs: int | None = None
) -> Iterator[Any]:
    """Yield ``function(*task)`` for each of the ``tasks``, in the order in which they finish.

    Args:
        function: the function to call.
        tasks: its arguments in each call.
        jobs: number of processes; 1 is this process. Default that of `joblib.parallel_config`, or 1. A cluster
            schedules tasks itself.

    Raises:
        Interrupted: a signal arrived, and every task has stored its state.
    """
    as_they_end = "generator_unordered" if get_active_backend()[0].supports_return_generator else "list"
    parallel = joblib.Parallel(jobs, batch_size=1, return_as=as_they_end)
    if not processes(jobs):
        yield from parallel(joblib.delayed(function)(*task) for task in tasks)
        return
    with tempfile.TemporaryDirectory() as scratch:
        stop, heard = Path(scratch) / "stop", list[int]()

        def note(number: int) -> None:
            heard.append(number)
            write_text(stop, str(int(OTHER[signal.Signals(number)])))

        held = joblib.delayed(_run_uninterrupted)
        with noted(note):
            for ended, result in parallel(held(function, task, os.getpid(), stop) for task in tasks):
                if ended:
                    yield result
        if heard:
            raise Interrupted("interrupted", 128 + heard[0])


def send_by_value(module: types.ModuleType) -> None:
    """Send functions and classes of ``module`` by value, because other processes cannot import it."""
    for pickler in ("cloudpickle", "joblib.externals.cloudpickle"):  # since joblib 1.6, and before
        with contextlib.suppress(ImportError):
            importlib.import_module(pickler).register_pickle_by_value(module)


def _run_uninterrupted(
    function: Callable[..., Any], task: tuple[Any, ...], parent: int, stop: Path
) -> tuple[bool, Any]:
    """Run a task in a process of joblib: whether it finished, and its result.

    Between tasks the process ignores signals, because its death would end the other processes too.
    """
    if stop.exists():
        return False, None
    over = threading.Event()
    watch = threading.Thread(target=_watch_parent, args=(parent, stop, over), daemon=True)
    for each in OTHER:
        signal.signal(each, signal.default_int_handler)
    keep_freed_memory()
    try:
        watch.start()
        return True, function(*task)
    except KeyboardInterrupt:
        return False, None
    finally:
        for each in OTHER:
            signal.signal(each, signal.SIG_IGN)
        over.set()


def _watch_parent(parent: int, stop: Path, over: threading.Event) -> None:
    """End the task when the parent was killed or interrupted.

    A terminal sends SIGINT to all processes, and a queue SIGTERM. This sends the other signal, because a second signal
    of one kind would not wait for the state to be stored.
    """
    while not over.wait(EVERY):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
            over.wait(GRACE)
            os._exit(1)
        if stop.exists():
            os.kill(os.getpid(), int(stop.read_text()))
            return
