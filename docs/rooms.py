"""The rooms of the package and who imports whom, as docs/pictures/rooms.svg; `make docs` draws it anew.

A room is a file or a folder of dgm_pyro. `FLOORS` states the direction: a room imports from lower floors alone, which
tests/test_rooms.py holds. An arrow is left out where two others lead the same way.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "dgm_pyro"
PICTURE = DOCS / "pictures" / "rooms.svg"

# From the top; each room with what it holds.
FLOORS: tuple[dict[str, str], ...] = (
    {"cli": "the command line"},
    {"api": "the names dgm.*"},
    {"experiments": "runs, sweeps, commands, the tour"},
    {"training": "fit, compile, processes", "uses": "anomalies, labels, codes"},
    {"infer": "AIS, SMC, NUTS, gaps"},
    {"diagnosis": "dgm.doctor"},
    {"checkpoint": "save and load", "evaluation": "Evidence", "catalog": "names to programs"},
    {"families": "the programs", "objectives": "ELBO, IWAE, ..."},
    {"posterior": "a Pyro model with data"},
    {"program": "joint, posterior"},
    {"networks": "tensors to tensors", "noise": "noise of a datum", "data": "data sets"},
    {
        "registry": "classes by name",
        "factors": "what a program prints",
        "image_sets": "glyphs, patches",
        "published": "CIFAR-10, SVHN, ...",
        "jobs": "tasks in several processes",
    },
    {
        "checks": "what arguments must be",
        "files": "whole files, one writer",
        "results": "tables and what holds them",
        "sources": "reading of files",
    },
    {"old_names": "of older files", "guesses": "of other libraries", "malloc": "freed memory is kept"},
)


def room_of(module: str) -> str:
    """``dgm_pyro.infer.ais`` is in the room infer; the package itself counts as its names, api."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] not in ("__init__", "__main__") else "api"


def imports_of(file: Path) -> Iterator[str]:
    """The modules of the package that a file imports anywhere, by their full names."""
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    modules |= {name.removesuffix(".__init__") for name in modules}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from inner & modules or {node.module}


def arrows() -> dict[str, set[str]]:
    """The rooms that each room imports from."""
    found = defaultdict(set)
    for file in PACKAGE.rglob("*.py"):
        if file.parent == PACKAGE and file.stem in ("__init__", "__main__"):
            continue
        here = room_of(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts))
        found[here] |= {room_of(module) for module in imports_of(file)} - {here}
    return dict(found)


def reachable(room: str, down: dict[str, set[str]]) -> set[str]:
    below = down.get(room, set())
    return below.union(*(reachable(other, down) for other in below))


def drawn(down: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that no path of two others replaces."""
    return sorted(
        (room, other)
        for room, below in down.items()
        for other in below
        if not any(other in reachable(between, down) for between in below - {other})
    )


WIDTH, HEIGHT, ROW, PAGE = 190, 40, 76, 760


def svg() -> str:
    places = {
        room: ((PAGE * (i + 0.5)) / len(floor), 10 + ROW * level)
        for level, floor in enumerate(FLOORS)
        for i, room in enumerate(floor)
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PAGE} {ROW * len(FLOORS) - 15}" '
        'font-family="sans-serif" text-anchor="middle">',
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#1f5f99"/></marker></defs>',
        f'<rect width="{PAGE}" height="{ROW * len(FLOORS) - 15}" fill="white"/>',
    ]
    for room, other in drawn(arrows()):
        (x0, y0), (x1, y1) = places[room], places[other]
        y0, bend = y0 + HEIGHT, (y1 - y0 - HEIGHT) / 2
        # An arrow over several floors swings out, around the rooms between.
        out = (100 if x1 <= x0 and x0 < PAGE else -100) * (y1 - y0 > ROW)
        curve = f"C{x0 + out:.0f},{y0 + bend:.0f} {x1 + out:.0f},{y1 - bend:.0f} {x1:.0f},{y1:.0f}"
        parts.append(
            f'<path d="M{x0:.0f},{y0:.0f} {curve}" fill="none" stroke="#1f5f99" marker-end="url(#head)">'
            f"<title>{room} imports {other}</title></path>"
        )
    for floor in FLOORS:
        for room, holds in floor.items():
            x, y = places[room]
            parts.append(
                f'<rect x="{x - WIDTH / 2:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#eaf2fa" '
                'stroke="#1f5f99"/>'
                f'<text x="{x:.0f}" y="{y + 17:.0f}" font-size="14" font-weight="bold">{room}</text>'
                f'<text x="{x:.0f}" y="{y + 33:.0f}" font-size="12" fill="#444">{holds}</text>'
            )
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(svg())
