"""The site has every page and every module; building it, and reading it in a browser, is `make docs ARGS=--check`."""

import importlib
import inspect
import pkgutil
import re
import types
from pathlib import Path

import pytest

import dgm_pyro

DOCS = Path(__file__).parent.parent / "docs"
NO_REFERENCE = {
    "dgm_pyro.__main__",
    "dgm_pyro.api",  # whose names are documented where they are defined
    "dgm_pyro.cli",  # for who calls `dgm`, not for who imports
    *(
        f"dgm_pyro.{name}"
        for name in ("checks", "families.transforms", "files", "guesses", "old_names", "published", "sources")
    ),  # helpers
    *(f"dgm_pyro.diagnosis.{name}" for name in ("loss", "messages", "reach", "supports")),
    *(f"dgm_pyro.training.{name}" for name in ("cuda_graph", "lanes", "optimizers", "step")),
    *(f"dgm_pyro.experiments.tour.{name}" for name in ("comparison", "page", "results", "stops")),
    *(f"dgm_pyro.{name}" for name in ("experiments", "experiments.tour", "families", "training", "uses")),
}
PACKAGES = ("dgm_pyro.diagnosis", "dgm_pyro.infer", "dgm_pyro.networks")  # whose names are those of their modules
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```", re.DOTALL | re.MULTILINE)


def entries(page):
    lines = [line for tree in TOCTREE.findall(page.read_text()) for line in tree.splitlines()]
    return [line for line in lines if line and not line.startswith(":")]


def test_every_page_is_in_the_contents():
    in_docs, in_api = entries(DOCS / "index.md"), entries(DOCS / "api" / "index.md")
    assert sorted(in_docs) == sorted({"../tutorials/*", "api/index", *(p.stem for p in DOCS.glob("*.md"))} - {"index"})
    assert sorted(in_api) == sorted({p.stem for p in (DOCS / "api").glob("*.md")} - {"index"})


def documented_modules():
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    return re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE)


def test_every_module_is_in_the_reference():
    modules = {info.name for info in pkgutil.walk_packages(dgm_pyro.__path__, "dgm_pyro.")}
    private = {name for name in modules if name.rpartition(".")[2].startswith("_")}
    assert sorted(documented_modules()) == sorted(modules - private - NO_REFERENCE)


def test_the_reference_has_what_is_public_and_nothing_else():
    """Sphinx documents the names in a module's ``__all__``."""
    for name in documented_modules():
        module = importlib.import_module(name)
        listed = module.__all__
        assert len(set(listed)) == len(listed) > 0, name
        for each in listed:
            value = getattr(module, each)
            if isinstance(value, type | types.FunctionType):
                assert value.__module__ == name or name in PACKAGES, f"{name} lists {each} of {value.__module__}"
                assert inspect.getdoc(value), f"{name}.{each} has no docstring"


@pytest.mark.parametrize("package", ["dgm_pyro", *PACKAGES])
def test_what_a_package_exports_is_public_where_it_is_defined(package):
    modules = {name: importlib.import_module(name) for name in documented_modules()}
    exported = importlib.import_module(package)
    for name in exported.__all__:
        value = getattr(exported, name)
        if isinstance(value, type | types.FunctionType):
            assert name in modules[value.__module__].__all__, f"{name} is missing in {value.__module__}.__all__"


def test_links_of_the_reference_lead_somewhere():
    for page in (DOCS / "api").glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_what_the_interactive_page_loads_is_there():
    text = (DOCS / "interactive.md").read_text()
    loaded = re.findall(r'(?:src|href)="\.\./_static/([^"]+)"', text)
    assert loaded
    built = {"interactive/weights.js"}
    assert all((DOCS / "_static" / path).exists() for path in set(loaded) - built)
