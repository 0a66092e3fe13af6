"""What every test stands on: seeds, no display, and no GPU tests where there is no GPU."""

import os

# Tests run one to a core: threads that wait for one another there cost several times what they save. Set before torch
# is loaded, and inherited by the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Likewise the processes that Inductor would start to compile in, each of which loads torch first.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import matplotlib
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


def pytest_collection_modifyitems(items):
    """Slow tests first, so that none of them is left for one core at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_terminal_summary(terminalreporter):
    """What a green suite has not checked: a test says so by a property named "unchecked"."""
    properties = [pair for report in terminalreporter.stats.get("passed", []) for pair in report.user_properties]
    for unchecked in sorted({value for name, value in properties if name == "unchecked"}):
        terminalreporter.write_line(f"NOT CHECKED: {unchecked}")


@pytest.fixture(autouse=True)
def fresh_start():
    """Equal seeds and an empty param store, so that a test's outcome does not depend on those before it."""
    pyro.set_rng_seed(0)  # torch's, numpy's and Python's
    pyro.clear_param_store()


@pytest.fixture
def float64():
    """Double precision by default, for identities that hold to rounding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(before)
