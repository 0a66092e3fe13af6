"""Tasks in several processes: they end with their parent, and an interrupt of it lets each store what it has."""

import ast
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import joblib
import pytest

import dgm_pyro as dgm
from dgm_pyro import jobs

PLACES = {"PYTHONPATH": str(Path(dgm.__file__).parent.parent)}
# Three tasks for two processes. Each works until it hears a signal, then takes its time to store what it has.
PARENT = """
import os, sys, time
import dgm_pyro.jobs as jobs  # without torch
def task(name):
    heard = []
    with jobs.noted(heard.append):
        open(f"begun-{name}", "w").write(str(os.getpid()))
        while not heard:
            time.sleep(0.01)
        time.sleep(0.3)
        open(f"stored-{name}", "w").close()
    raise jobs.Interrupted("stored", 1)
try:
    print([*jobs.in_parallel(task, [(name,) for name in "012"], 2)])
except jobs.Interrupted as error:
    sys.exit(error.status)
"""


def is_running(process):
    state = Path(f"/proc/{process}/stat")  # Z: it has ended, and nobody has waited for it yet
    return state.is_file() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_one_job_is_this_process_and_an_error_is_its_own():
    tasks = [(1, 2), (3,)]
    assert [*jobs.in_parallel(lambda *each: (os.getpid(), each), tasks)] == [(os.getpid(), each) for each in tasks]
    with pytest.raises(ZeroDivisionError):
        [*jobs.in_parallel(lambda x: 1 / x, [(0,)])]


def test_another_backend_of_joblib_runs_the_tasks():
    with joblib.parallel_config("threading", n_jobs=2):
        assert sorted(jobs.in_parallel(abs, [(-1,), (-2,), (-3,)])) == [1, 2, 3]


@pytest.mark.parametrize("given", [None, "3"])
def test_processes_share_the_cores_where_nothing_else_is_said(monkeypatch, given):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    [threads] = {*jobs.in_parallel(os.getenv, [("OMP_NUM_THREADS",)] * 2, 2)}
    assert threads == (given or str(max(1, joblib.cpu_count() // 2)))


@pytest.mark.parametrize("how", ["kill", "interrupt", "interrupt all", "terminate all"])
def test_however_the_parent_ends_its_tasks_store_what_they_have_and_end(tmp_path, how):
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, "parent.py"]
    number = signal.SIGTERM if how == "terminate all" else signal.SIGINT
    begun = [tmp_path / f"begun-{name}" for name in "01"]
    options = {"env": os.environ | PLACES, "stderr": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen(command, cwd=tmp_path, **options) as parent:
        try:
            wait_until(lambda: all(path.is_file() and path.read_text() for path in begun))
            if how == "kill":
                parent.kill()
            elif how == "interrupt":
                parent.send_signal(number)
            else:  # as a terminal does, and a queue
                os.killpg(parent.pid, number)
            assert parent.wait() == (-signal.SIGKILL if how == "kill" else 128 + number)
            wait_until(lambda: not any(is_running(path.read_text()) for path in begun))
        finally:
            parent.kill()
    assert sorted(path.name for path in tmp_path.glob("[bs]*-?")) == ["begun-0", "begun-1", "stored-0", "stored-1"]


# -- on a cluster ------------------------------------------------------------------------------------------------------


class Ray(joblib.parallel.ThreadingBackend):
    """In the place of Ray's backend, which yields nothing before all tasks have ended."""

    supports_return_generator = False


def test_a_cluster_is_named_and_joined(monkeypatch):
    joined = []
    register = types.SimpleNamespace(register_ray=lambda: joblib.register_parallel_backend("ray", Ray))
    for name, module in {"ray": types.SimpleNamespace(init=joined.append), "ray.util.joblib": register}.items():
        monkeypatch.setitem(sys.modules, name, module)
    with jobs.on_cluster("ray", "ray://head:10001"):
        assert sorted(jobs.in_parallel(abs, [(-1,), (-2,)])) == [1, 2]
    assert joined == ["ray://head:10001"]
    with jobs.on_cluster(None):
        assert [*jobs.in_parallel(abs, [(-1,)])] == [1]


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (("slurm",), ValueError, "backend must be one of dask, ray, got 'slurm'"),
    ((None, "tcp://head:8786"), ValueError, "there is no backend: choose backend='dask' or 'ray'"),
    (("ray",), ImportError, "backend='ray' needs a package that is missing: pip install ray"),
    (("dask",), ImportError, "backend='dask' needs a package that is missing: pip install 'dgm_pyro"),
])  # fmt: skip
def test_a_cluster_that_cannot_be_had_is_one_line(monkeypatch, arguments, error, message):
    for name in ("ray", "distributed"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(error) as it, jobs.on_cluster(*arguments):
        pass
    assert message in str(it.value)


# In a process of its own: the lost worker, and what Dask says about it, are no part of this one.
CLUSTER = """
import os, signal, sys, threading, time
from pathlib import Path
import distributed
import dgm_pyro as dgm
import dgm_pyro.jobs as jobs
from dgm_pyro.experiments import sweep

def kill_one(client, folder):
    \"\"\"A worker, when both have a state to resume from.\"\"\"
    while len([*folder.glob("cells/*/state.json")]) < 2:
        time.sleep(0.01)
    [worker, _] = client.run(os.getpid).values()
    os.kill(worker, signal.SIGKILL)

if __name__ == "__main__":
    training = dgm.TrainingOptions(epochs=40, device="cpu", validation=None, checkpoint_minutes=1e-9)
    options = sweep.Options("made", "moons", num_data=64, num_particles=1, training=training)
    alone = sweep.sweep("alone", options, seeds=2, progress=False)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client, jobs.on_cluster("dask", cluster.scheduler_address):
            killing = threading.Thread(target=kill_one, args=(client, Path("there")))
            killing.start()
            there = sweep.sweep("there", options, seeds=2, progress=False)
            killing.join()
    print([[cell["nats"] for cell in each.rows[0].cells] for each in (alone, there)])
    print(there.failed)
"""


@pytest.mark.nightly
def test_a_cluster_that_loses_a_worker_finishes_the_sweep_with_the_same_numbers(tmp_path):
    pytest.importorskip("distributed")
    (tmp_path / "cluster.py").write_text(CLUSTER)
    command = [sys.executable, "cluster.py"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | PLACES, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    numbers, failed = done.stdout.splitlines()
    alone, there = ast.literal_eval(numbers)
    assert alone == there
    assert failed == "0"


def test_where_tasks_run_by_default():
    assert jobs.in_this_process()
    with joblib.parallel_config("loky", n_jobs=2):
        assert not jobs.in_this_process()
    with joblib.parallel_config("threading", n_jobs=1):
        assert not jobs.in_this_process()
    with joblib.parallel_config("loky", n_jobs=1):
        assert jobs.in_this_process()
