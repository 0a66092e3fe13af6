"""Independent fits of a Pyro model in several processes, with the state of this process.

A new process has neither the default dtype nor the param store of its parent, so both are sent with each task.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from typing import Any

import pyro
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm import tqdm

from dgm_pyro.checks import check_count
from dgm_pyro.jobs import in_parallel
from dgm_pyro.program import let_pickle

__all__ = ["run_fits"]


def run_fits(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int | None,
    *,
    what: str,
    unit: str,
    progress: bool = False,
) -> list[Any]:
    """The results of ``function(*task)`` for all ``tasks``, in their order.

    Every task starts with the current param store; its own changes to it are discarded.

    Args:
        function: the function to call.
        tasks: its arguments in each call.
        jobs: number of processes, as for `dgm_pyro.jobs.in_parallel`.
        what: name of the bar.
        unit: unit that the bar counts.
        progress: whether to show the bar.

    Raises:
        TypeError: a task cannot be sent to another process.
        Interrupted: a signal arrived.
    """
    if jobs is not None:
        check_count(jobs, "jobs")
    state: Any = pyro.get_param_store().get_state()
    let_pickle(state["params"].values())
    numbered = [(function, task, i, torch.get_default_dtype(), state) for i, task in enumerate(tasks)]
    found = dict[int, Any]()
    try:
        with tqdm(total=len(numbered), desc=what, unit=unit, disable=not progress, leave=False) as bar:
            for i, result in in_parallel(_run_in_same_state, numbered, jobs):
                found[i] = result
                bar.update()
    except (pickle.PicklingError, BrokenExecutor) as error:
        if isinstance(error, TerminatedWorkerError):  # the worker was killed, for example out of memory
            raise
        [*_, why] = [line for line in str(error.__cause__ or error).splitlines() if line.strip('" ')]  # of a traceback
        raise TypeError(
            f"the model or one of its arguments cannot be sent to another process ({why}): use jobs=1"
        ) from error
    return [found[i] for i in range(len(numbered))]


def _run_in_same_state(
    function: Callable[..., Any], task: tuple[Any, ...], number: int, dtype: torch.dtype, state: Any
) -> tuple[int, Any]:
    """Run a task with the default dtype and the param store of the process that sent it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with pyro.get_param_store().scope(state):
            return number, function(*task)
    finally:
        torch.set_default_dtype(before)
