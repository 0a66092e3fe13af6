"""What is imported is declared, and what pyproject.toml calls the lowest versions is what `make lowest` installs."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = dict(line.split(">=") for line in PROJECT["dependencies"])
EXTRAS = PROJECT["optional-dependencies"]
OPTIONAL = dict(line.split(">=") for name in ("data", "arviz", "cluster", "hub") for line in EXTRAS[name])
TEST = RUNTIME | dict(line.split(">=") for line in EXTRAS["test"])


def pins(name):
    return dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / name).read_text(), re.MULTILINE))


def test_the_lowest_versions_are_the_lower_bounds():
    lowest = pins("constraints-lowest.txt")
    assert lowest.pop("torch") == pins("constraints.txt")["torch"]
    bounds = {name: bound for name, bound in TEST.items() if name != "torch"}
    assert {name: release(pin) for name, pin in lowest.items()} == {name: release(b) for name, b in bounds.items()}


def test_the_tests_take_every_extra_at_its_own_bound():
    assert OPTIONAL.items() <= TEST.items()


def release(version):
    """1.26 is 1.26.0."""
    return re.sub(r"(\.0)+$", "", version)


@pytest.mark.parametrize(("folder", "declared"), [("dgm_pyro", RUNTIME | OPTIONAL), ("tests", TEST)])
def test_what_is_imported_is_declared(folder, declared):
    files = list((ROOT / folder).rglob("*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    modules = {name.split(".")[0] for name in names}
    foreign = modules - sys.stdlib_module_names - {file.stem for file in files} - {"dgm_pyro"}
    packages = packages_distributions()
    assert {packages[module][0].lower() for module in foreign} <= declared.keys()
