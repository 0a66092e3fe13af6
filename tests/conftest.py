"""What every test stands on: seeds, no display, no GPU tests where there is no GPU, and the mark ``slow``.

A test is slow, and left out of ``make quick``, for one of two reasons:

- ``tests/durations.json`` names it, or a fixture that it shares with other tests: that took more than `SLOW` seconds
  when ``make durations`` last ran all tests;
- it is one of more than `MANY` cases of one test, such as the programs of the registry. One case in `KEPT` is not slow,
  and different tests keep different ones, so that every program stays under some tests.

A test marked ``nightly`` is slow, too. It takes long and holds what a shorter one holds of a smaller or a like program.
Or it is every second of the cases of one test, where these are more than `MANY`, or more than `FEW` of them take long.
Different tests leave out different halves here, too, and every case runs at night.

The limits are such that the rest takes less than two minutes on two cores.
"""

import json
import os
import random
import signal
import tempfile
import warnings
from pathlib import Path
from zlib import crc32

# Tests run one to a core: threads that wait for one another there cost several times what they save. Set before torch
# is loaded, and inherited by the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Likewise the processes that Inductor would start to compile in, each of which loads torch first.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Inductor keeps machine code between runs, and does not ask whether it was made for other instructions.
if "ATEN_CPU_CAPABILITY" in os.environ:
    CACHE = Path(tempfile.gettempdir()) / f"inductor-{os.getuid()}-{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))

import matplotlib
import numpy as np
import pyro
import pytest
import torch
from hypothesis import HealthCheck, settings

matplotlib.use("Agg")

# A slow machine must not fail a test, a failure must come back on the next run, and the fixtures here keep no state
# between the examples of one test.
settings.register_profile(
    "dgm_pyro",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("dgm_pyro")


DURATIONS = Path(__file__).parent / "durations.json"
SLOW = 0.15  # seconds of processor time, which other work on the machine does not change
LONG = 5.0
NIGHTLY = "nightly: `make test ARGS=--all` runs it"
MANY, KEPT, FEW = 30, 4, 5
STARTED = pytest.StashKey[float]()
SHARED = pytest.StashKey[
    dict[str, float]
]()  # seconds of the fixtures that were set up for this test and for later ones


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked nightly, too")
    parser.addoption("--record-durations", action="store_true", help="measure all tests, and write durations.json")


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        return
    if config.getoption("record_durations"):
        config.pluginmanager.register(Recorder())
    if getattr(config.option, "numprocesses", None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import arviz  # noqa: F401  # its first import on a day writes a file, which fails in two processes at once


def pytest_collection_modifyitems(items):
    """Long tests first, or one would be left for one core at the end; tests that share a fixture stay together."""
    seconds = json.loads(DURATIONS.read_text())
    tests = {}
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.slow)
        else:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, cases in tests.items():
        kept = crc32(name.encode()) % KEPT
        measured = sum(item.nodeid in seconds for item in cases)
        for i, item in enumerate(cases):
            takes_long, one_of_many = item.nodeid in seconds, len(cases) > MANY and i % KEPT != kept
            if takes_long or one_of_many or any(each in seconds for each in shared_fixtures(item)):
                item.add_marker(pytest.mark.slow)
            by_night = (takes_long and measured > FEW) or one_of_many
            if by_night and i % 2 != kept % 2 and not item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.nightly)
    # A fixture of a module is made again when tests of another module have run in between.
    items.sort(key=lambda item: max(seconds.get(name, 0.0) for name in {item.nodeid, *shared_fixtures(item)}) < LONG)


def shared_fixtures(item):
    """The names, in durations.json, of the fixtures that the test shares with others."""
    definitions = item._fixtureinfo.name2fixturedefs.values() if hasattr(item, "_fixtureinfo") else ()
    return {name_of(found) for *_, found in definitions if found.scope != "function"}


def name_of(fixture):
    return f"{fixture.baseid}::{fixture.argname}"


def processor_time():
    """Seconds that this process, and those that it waited for, have computed."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    item.stash[STARTED] = processor_time()
    item.stash[SHARED] = {}
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """A fixture that tests share is charged to all of them, not to the one that happens to run first."""
    if fixturedef.scope == "function":
        return (yield)
    start, shared = processor_time(), request._pyfuncitem.stash[SHARED]
    within = sum(shared.values())
    try:
        return (yield)
    finally:  # less the time of fixtures that this one asked for
        shared[name_of(fixturedef)] = processor_time() - start - (sum(shared.values()) - within)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "teardown":
        shared = item.stash[SHARED]
        own = processor_time() - item.stash[STARTED] - sum(shared.values())
        report.user_properties.append(("seconds", {item.nodeid: own, **shared}))
    return report


class Recorder:
    """Writes the durations of tests and shared fixtures, in whatever process. Tests that are skipped keep theirs."""

    def __init__(self):
        self.seconds, self.skipped, self.before = {}, {}, json.loads(DURATIONS.read_text())

    def pytest_runtest_logreport(self, report):
        if report.skipped and report.nodeid in self.before:
            self.skipped[report.nodeid] = self.before[report.nodeid]
        measured = dict(report.user_properties)  # a worker that crashed has measured nothing
        if report.when == "teardown" and "seconds" in measured:
            self.seconds |= measured["seconds"]

    def pytest_sessionfinish(self):
        found = sorted((self.seconds | self.skipped).items())
        slow = {name: round(seconds, 1) for name, seconds in found if seconds > SLOW}
        DURATIONS.write_text(json.dumps(slow, indent=0, ensure_ascii=False) + "\n")


def pytest_runtest_setup(item):
    if item.get_closest_marker("nightly") and not item.config.getoption("all"):
        pytest.skip(NIGHTLY)
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_terminal_summary(terminalreporter):
    """What a green suite has not checked: a test says so by a property named "unchecked"."""
    left_out = sum(NIGHTLY in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if left_out:
        terminalreporter.write_line(f"NOT CHECKED: {left_out} tests marked nightly; `make test ARGS=--all` runs them")
    properties = [pair for report in terminalreporter.stats.get("passed", []) for pair in report.user_properties]
    for unchecked in sorted({value for name, value in properties if name == "unchecked"}):
        terminalreporter.write_line(f"NOT CHECKED: {unchecked}")


@pytest.fixture(autouse=True, scope="session")
def interrupts():
    """SIGINT as in a terminal: a shell starts its background jobs with it ignored, and this may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def fresh_start():
    """Equal seeds and an empty param store, so that a test's outcome does not depend on those before it."""
    # Not pyro.set_rng_seed: torch.manual_seed keeps the stack for each kind of device that is not there.
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    pyro.clear_param_store()


@pytest.fixture
def float64():
    """Double precision by default, for identities that hold to rounding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(before)
