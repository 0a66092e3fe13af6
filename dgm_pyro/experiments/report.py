"""Reports: one HTML file that includes its pictures, for phones and desktops, light and dark.

The parts are plain data, so any results can become a report:

>>> from dgm_pyro.experiments import report
>>> table = report.PageTable([report.Column("program", "what was trained")], [[report.TableCell("VAE")]])
>>> page = report.render(report.Report("A title", "What it shows.", table))
>>> "<!doctype html>" in page, "https://" in page
(True, False)
"""

from __future__ import annotations

import base64
import functools
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

import dgm_pyro.results as results
from dgm_pyro.experiments import plots
from dgm_pyro.files import write_file, write_text

__all__ = ["Column", "PageTable", "Picture", "Report", "Section", "TableCell", "picture", "render", "write"]


@dataclass(frozen=True)
class Picture:
    """A picture in both themes, as PNG bytes; ``alt`` describes it for those who cannot see it."""

    name: str
    alt: str
    light: bytes
    dark: bytes
    caption: str = ""

    @property
    def sources(self) -> dict[str, str]:
        """Both themes as data URIs."""
        return {theme: _data_uri(content) for theme, content in (("light", self.light), ("dark", self.dark))}

    def save(self, folder: Path) -> Path:
        """Write the light theme to ``folder/name.png``."""
        path = folder / f"{self.name}.png"
        write_file(path, self.light)
        return path


@dataclass(frozen=True)
class Column:
    """A column, and the meaning of its numbers in plain language."""

    name: str
    meaning: str
    numeric: bool = False


@dataclass(frozen=True)
class TableCell:
    """A value as text; ``strong`` for the best of its column, ``note`` in small print after it."""

    text: str
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class PageTable:
    """Columns, and rows with one cell per column; the first cell names its row. ``muted`` rows are references."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[TableCell]]
    muted: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {i} has {len(row)} cells, but there are {len(self.columns)} columns: pass one per column"
                )

    def as_text(self) -> str:
        """The table for the terminal."""
        rows = [[" ".join(part for part in (cell.text, cell.note) if part) for cell in row] for row in self.rows]
        return str(results.Table([column.name for column in self.columns], rows))


@dataclass(frozen=True)
class Section:
    """A heading with text, pictures, and parts of the same kind. ``formula`` and ``paragraphs`` may be Markup."""

    title: str
    anchor: str
    formula: Markup | str = ""
    paragraphs: Sequence[Markup | str] = ()
    pictures: Sequence[Picture] = ()
    parts: Sequence[Section] = ()

    def all_pictures(self) -> list[Picture]:
        """Its own pictures, and those of its parts."""
        return [*self.pictures, *(picture for part in self.parts for picture in part.all_pictures())]


@dataclass(frozen=True)
class Report:
    """A page: a title, a lead of one or two sentences, a table, sections, and facts about the run."""

    title: str
    lead: str
    table: PageTable
    sections: Sequence[Section] = ()
    warnings: Sequence[str] = ()
    facts: dict[str, str] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)


def picture(name: str, draw: Callable[[], Figure], alt: str, caption: str = "") -> Picture:
    """Draw a figure in both themes.

    Args:
        name: stem of its file.
        draw: a function that makes the figure with `dgm_pyro.experiments.plots`; called once for each theme.
    """
    pngs = {}
    for theme in plots.THEMES:
        with plots.theme(theme):
            content = io.BytesIO()
            draw().savefig(content, format="png", metadata={"Software": None})
        pngs[theme] = content.getvalue()
    return Picture(name, alt, pngs["light"], pngs["dark"], caption)


@functools.cache
def environment() -> jinja2.Environment:
    """The jinja2 environment with the templates of the package."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("dgm_pyro"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(report: Report) -> str:
    """The page as HTML, without references to other files or addresses."""
    return environment().get_template("report.html.j2").render(report=report, themes=plots.THEMES)


def write(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the HTML of `render` to a file, which is replaced in one step."""
    write_text(Path(path), render(report))


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
