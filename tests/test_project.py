"""What surrounds the package: the wheel and the source distribution, and files that repeat what pyproject.toml says."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dgm_pyro"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))


def run(*command, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The source distribution, unpacked: what the wheel is built from, as by `python -m build`."""
    folder = tmp_path_factory.mktemp("sdist")
    checkout = folder / "checkout"
    shutil.copytree(PACKAGE, checkout / "dgm_pyro", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", checkout / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile"):
        shutil.copy(ROOT / file, checkout)
    run("-c", f"import setuptools.build_meta as build; build.build_sdist({str(folder)!r})", cwd=checkout)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run("-m", "pip", "wheel", *options, "-w", folder, sources, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def files_of(folder):
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if path.suffix != ".pyc"}


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {f"dgm_pyro/{name}" for name in files_of(PACKAGE)}


def test_the_source_distribution_holds_no_tests(sources):
    assert files_of(sources / "dgm_pyro") == files_of(PACKAGE)
    assert not (sources / "tests").exists()


def test_the_wheel_runs_without_the_checkout(wheel, tmp_path):
    """Where the checkout is neither the folder nor on the path. That `dgm tour` runs there too is for the workflow."""
    site = tmp_path / "site"
    options = ["--no-deps", "--no-index", "--disable-pip-version-check"]
    run("-m", "pip", "install", *options, "--target", site, wheel, cwd=tmp_path)
    where = run("-c", "import dgm_pyro; print(dgm_pyro.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(where.strip()).is_relative_to(site)
    assert "Usage" in run("-m", "dgm_pyro", "--help", cwd=tmp_path, PYTHONPATH=str(site))
    recipe = ("vae", "--data", "digits-binary", "--num-data", "100", "--epochs", "1", "--out", "vae")
    run("-m", "dgm_pyro", "train", *recipe, cwd=tmp_path, PYTHONPATH=str(site))
    run("-m", "dgm_pyro", "sample", "vae", "-n", "4", cwd=tmp_path, PYTHONPATH=str(site))


# -- files that repeat what pyproject.toml says ------------------------------------------------------------------------


def test_every_python_from_the_lowest_on_is_named():
    lowest = int(re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])[1])
    assert [f"3.{minor}" for minor in range(lowest, lowest + len(PYTHONS))] == PYTHONS


def test_the_workflows_run_the_oldest_and_the_newest_python():
    matrix = lambda name: re.findall(r'"(3\.\d+)"', re.search(r"python: (\[.*?\])", workflow(name))[1])  # noqa: E731
    assert matrix("test") == [PYTHONS[0], PYTHONS[-1]]
    assert matrix("nightly") == PYTHONS


def test_the_workflows_call_commands_that_exist():
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for file in (*(ROOT / ".github" / "workflows").iterdir(), ROOT / ".readthedocs.yaml", ROOT / "CONTRIBUTING.md"):
        called = re.findall(r"(?:run: |- |`|\n)make ([a-z ]+)", file.read_text())
        assert called
        assert set(" ".join(called).split()) <= targets, file.name


def test_the_citation_is_of_this_version():
    citation = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def workflow(name):
    return (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()
