"""Imports run in one direction, as docs/rooms.py states it; and the picture is that of the imports."""

import importlib
import subprocess
import sys
from pathlib import Path

from scripts import load_script

import dgm_pyro as dgm

DOCS = Path(__file__).parent.parent / "docs"
rooms = load_script("docs/rooms.py")

FLOOR = {room: level for level, floor in enumerate(rooms.FLOORS) for room in floor}


def test_every_room_has_a_floor():
    package = {path.stem for path in rooms.PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(FLOOR) == package - {"__init__", "__main__"}


def test_imports_run_down():
    up = [
        f"{room} imports {other}"
        for room, below in rooms.arrows().items()
        for other in below
        if FLOOR[other] <= FLOOR[room]
    ]
    assert not up, f"{up}: docs/rooms.py states the direction"


def test_files_of_a_room_import_in_no_circle():
    imports = {}
    for path in rooms.PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(rooms.PACKAGE.parent).with_suffix("").parts)
        imports[module.removesuffix(".__init__")] = set(rooms.imports_of(path))
    while free := [module for module, below in imports.items() if not below & set(imports) - {module}]:
        for module in free:
            del imports[module]
    assert set(imports) <= {"dgm_pyro", "dgm_pyro.__main__"}


def test_what_counts_as_an_import(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        "import dgm_pyro.noise as noise\nimport torch\nfrom dgm_pyro.infer import ais, gaps\n"
        "def f():\n    from dgm_pyro.program import Program\n    from dgm_pyro.families import flow\n"
    )
    found = set(rooms.imports_of(file))
    assert found >= {"dgm_pyro.noise", "dgm_pyro.program", "dgm_pyro.families.flow"}
    assert {rooms.room_of(module) for module in found} == {"noise", "program", "families", "infer"}


def test_the_picture_is_that_of_the_imports():
    assert rooms.PICTURE.read_text() == rooms.svg(), "run `make docs`, or `python docs/rooms.py`"


def test_an_arrow_is_left_out_where_others_lead_the_same_way():
    assert rooms.drawn({"a": {"b", "c"}, "b": {"c"}}) == [("a", "b"), ("b", "c")]


def test_no_public_name_hides_behind_a_module():
    """`dgm.build` was a module as soon as somebody had imported `dgm_pyro.build`."""
    for path in rooms.PACKAGE.iterdir():
        if path.stem in dgm.__all__:
            assert getattr(dgm, path.stem) is importlib.import_module(f"dgm_pyro.{path.stem}")


def test_a_module_is_there_at_the_first_look():
    for first in ("training", "families"):
        command = [sys.executable, "-c", f"import dgm_pyro; print(dgm_pyro.{first}.__name__)"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout == f"dgm_pyro.{first}\n", done.stderr


def test_names_are_those_of_the_package():
    assert set(dir(dgm)) == set(dgm.__all__)
    assert len(set(dgm.__all__)) == len(dgm.__all__)
    assert all(getattr(dgm, name) is not None for name in dgm.__all__)
