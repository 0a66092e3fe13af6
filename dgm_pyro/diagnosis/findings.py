"""The report of `dgm.doctor`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dgm_pyro.results import Result, Table

__all__ = ["Diagnosis", "Finding"]

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """A problem found.

    Attributes:
        severity: "error" (the result would be wrong), "warning" (it may be wrong), "note" (for information).
        check: name of the check that found it.
        where: the site, parameter or plate.
        what, fix: the problem and its remedy, one line each.
    """

    severity: str
    check: str
    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.what}\n  fix: {self.fix}"


@dataclass(frozen=True)
class Diagnosis(Result):
    """All findings, the worst first."""

    findings: tuple[Finding, ...]
    sites: tuple[str, ...] = ()
    num_parameters: int = 0

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether there are no errors; there may be warnings."""
        return not self.errors

    def as_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def parts(self) -> list[str | Table]:
        counts = ", ".join(
            f"{n} {severity}{'s' * (n != 1)}"
            for severity in SEVERITIES
            if (n := sum(finding.severity == severity for finding in self.findings))
        )
        looked = f"{len(self.sites)} sites, {self.num_parameters} parameters"
        return [*map(str, self.findings), f"{counts or 'nothing found'} ({looked})"]
