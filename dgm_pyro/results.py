"""Results of functions, as text, HTML and plain Python, and their tables."""

from __future__ import annotations

import csv
import html
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Result", "Table", "as_csv", "element_name", "with_error"]


@dataclass(frozen=True)
class Table:
    """A header, and rows with one cell per column; columns of numbers are right-aligned.

    >>> print(Table(["run", "nats"], [["a", "-9.5"], ["b", "-10.25"]]))
    run    nats
    a      -9.5
    b    -10.25
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            placed = (
                cell.rjust(width) if numeric else cell.ljust(width)
                for cell, width, numeric in zip(cells, widths, self._numeric, strict=True)
            )
            return "  ".join(placed).rstrip()

        return "\n".join(map(line, (self.header, *self.rows)))

    @property
    def _numeric(self) -> list[bool]:
        """Whether each column holds only numbers and empty cells."""
        columns = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.header)
        return [all(cell[:1] in "<>+-.0123456789" for cell in column) for column in columns]

    def markdown(self) -> str:
        """The table in markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(part.replace("|", "\\|") for part in line) + " |" for line in lines)

    def html(self) -> str:
        """The table in HTML."""

        def line(cells: Sequence[str], tag: str) -> str:
            sides = ("right" if numeric else "left" for numeric in self._numeric)
            placed = (
                f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
                for cell, side in zip(cells, sides, strict=True)
            )
            return "<tr>" + "".join(placed) + "</tr>"

        body = "".join(line(row, "td") for row in self.rows)
        return f"<table><thead>{line(self.header, 'th')}</thead><tbody>{body}</tbody></table>"


class Result(ABC):
    """The result of a function: `print` shows it as text, a notebook as HTML, and `as_dict` is for JSON."""

    @abstractmethod
    def parts(self) -> Sequence[str | Table]:
        """The texts and tables to show, from top to bottom."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """The numbers as plain Python, for JSON."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.parts()))

    def _repr_html_(self) -> str:
        return "".join(
            part.html() if isinstance(part, Table) else f"<p>{html.escape(part)}</p>" for part in self.parts()
        )


def with_error(mean: float, error: float, digits: int) -> str:
    """A mean and its standard error; "-" where there is no mean."""
    if mean != mean:
        return "-"
    return f"{mean:.{digits}f}" + ("" if error != error else f" +- {error:.{digits}f}")


def element_name(site: str, place: Sequence[int]) -> str:
    """The name of an element of a latent, such as ``theta[2]``."""
    return site + (f"[{', '.join(map(str, place))}]" if place else "")


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV, with a column for each name that any record has."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
