"""The lower bounds of the dependencies are what `make lowest` installs and tests."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def versions(path, pattern):
    return {name: version.rstrip(".0") for name, version in re.findall(pattern, (ROOT / path).read_text(), re.M)}


def test_the_lowest_versions_are_the_lower_bounds():
    bounds = versions("pyproject.toml", r'"([\w-]+)>=([\d.]+)"')
    lowest = versions("constraints-lowest.txt", r"^([\w-]+)==([\d.]+)$")
    assert lowest.pop("torch") == "2.13"  # see there
    assert {name: bounds[name] for name in lowest} == lowest
    needed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S).group(1)
    assert set(re.findall(r'"([\w-]+)>=', needed)) == {*lowest, "torch"} - {"pytest", "pytest-xdist", "hypothesis"}
