"""What a command found out, as plain data: what is printed is exactly what the JSON holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `--help` answers without NumPy
    from ..proof.agreement import Finding

VERDICTS = {True: "held", False: "FAILED", None: "not run"}

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Check:
    """One claim about one implementation. `held` is None if it was not run; `measured` then says why.

    `count` is "held/tried" where the claim is about several things alike.
    """

    name: str
    implementation: str
    held: bool | None
    measured: str
    expected: str
    count: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under column heads."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Panels:
    """Matrices of the same thing, one for each implementation, to be shown side by side."""

    title: str
    matrices: Mapping[str, Sequence[Sequence[float]]]
    decimals: int = 0


@dataclass(frozen=True)
class Curves:
    """One value against another for each series, on a logarithmic scale, or on two; `marked` x are printed."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float]]
    marked: Sequence[float]
    log_x: bool = False


@dataclass(frozen=True)
class Histogram:
    """How many values of each series lie between one edge and the next; the edges grow by a constant factor."""

    title: str
    x_label: str
    edges: Sequence[float]
    counts: Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Grid:
    """A value for each row and column, None where there is none; above 1 is beyond the limit."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float | None]]


Block = str | Table | Panels | Curves | Histogram | Grid


@dataclass
class Section:
    """A heading, what is shown below it in order, the checks it settles, and every comparison behind them."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


@dataclass
class Report:
    """Everything one command found. `look`: it was to show something, and claims nothing unless it checks."""

    command: str
    date: str
    versions: dict[str, str]
    sections: list[Section] = field(default_factory=list)
    look: bool = False
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def checks(self) -> list[Check]:
        """The checks of all sections, each once where two parts settle the same one."""
        return list(dict.fromkeys(check for section in self.sections for check in section.checks))

    @property
    def places(self) -> list[str]:
        """The implementations that were checked, in order."""
        return list(dict.fromkeys(check.implementation for check in self.checks))

    @property
    def by_name(self) -> dict[str, dict[str, Check]]:
        """The checks by name, in order, then by implementation."""
        found: dict[str, dict[str, Check]] = {}
        for check in self.checks:
            found.setdefault(check.name, {})[check.implementation] = check
        return found

    @property
    def counts(self) -> dict[str, int]:
        """How many checks came to each verdict, in its word."""
        return {
            word: sum(check.held is held for check in self.checks)
            for held, word in VERDICTS.items()
        }

    @property
    def held(self) -> bool:
        """Whether something was checked and nothing failed."""
        results = [check.held for check in self.checks]
        return True in results and False not in results

    @property
    def claims(self) -> bool:
        """Whether there is a verdict to give."""
        return bool(self.checks) or not self.look

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values, with the verdict first; NaN and infinities, which JSON lacks, as words."""
        return _json({"held": self.held if self.claims else None, **asdict(self)})


def _json(value: Any) -> Any:
    match value:
        case dict():
            return {key: _json(item) for key, item in value.items()}
        case list() | tuple():
            return [_json(item) for item in value]
        case float() if not isfinite(value):
            return str(value)
        case _:
            return value
