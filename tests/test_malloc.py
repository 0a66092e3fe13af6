"""Memory that a process keeps: counted in the pages that the system hands out."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dgm_pyro import cli, jobs, malloc

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")

PAGES = """
import resource, sys
from dgm_pyro.malloc import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import torch
torch.set_num_threads(1)
x = torch.zeros(2**24)  # 64 MiB

def operations():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        for size in (2**24, 2**21):
            (x[:size] + 1).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(operations(), operations())  # at first the process has no memory to keep
"""


SETTINGS = ("MALLOC_", "GLIBC_TUNABLES")


def pages(keep):
    command = [sys.executable, "-c", PAGES, keep]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.split()[1])


@glibc
def test_freed_memory_is_used_again():
    """Ten times 72 MiB in pages of 4 KiB are 184,320 pages. Huge pages are rarely on for all memory."""
    kept, returned = pages("keep"), pages("return")
    assert kept < returned / 10


@glibc
@pytest.mark.parametrize("variable", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_environment_says_about_malloc_holds(monkeypatch, variable):
    monkeypatch.setenv(variable, "glibc.malloc.arena_max=2" if variable == "GLIBC_TUNABLES" else "2")
    monkeypatch.setattr(malloc.ctypes, "CDLL", None)  # so that a call would fail
    assert not malloc.keep_freed_memory()


def test_there_may_be_another_malloc(monkeypatch):
    for name in [name for name in os.environ if name.startswith(SETTINGS)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *_: 1))
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert malloc.keep_freed_memory()
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("", ""))
    assert not malloc.keep_freed_memory()


def test_the_command_and_its_tasks_keep_it(monkeypatch, tmp_path):
    called = []
    for module in (cli, jobs):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: called.append(1))
    assert cli.main(["--version"]) == 0
    assert called == [1]
    handlers = {each: jobs.signal.getsignal(each) for each in jobs.OTHER}
    try:
        assert jobs._run_uninterrupted(lambda: 5, (), os.getppid(), tmp_path / "stop") == (True, 5)
    finally:
        for each, handler in handlers.items():
            jobs.signal.signal(each, handler)
    assert called == [1, 1]
