"""The results of a command as plain data: the terminal, the JSON and the HTML show the same."""

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
    """One claim about one implementation.

    `held` is None if the check was not run; `measured` then says why. `count` is "held/tried" where
    the check covers several cases.
    """

    name: str
    implementation: str
    held: bool | None
    measured: str
    expected: str
    count: str = ""


@dataclass(frozen=True)
class Table:
    """A table: rows and column headings."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Panels:
    """The same matrix from each implementation, shown side by side."""

    title: str
    matrices: Mapping[str, Sequence[Sequence[float]]]
    decimals: int = 0


@dataclass(frozen=True)
class ContestantStyle:
    """How to draw a contestant of a benchmark. `framework` is "torch" or "jax"."""

    framework: str
    is_ours: bool


@dataclass(frozen=True)
class Curves:
    """One y value for each x in each series.

    The y axis is logarithmic, and with `log_x` the x axis too. The terminal prints only the values
    at the `marked` x. `contestants` has the style of each series of a benchmark; it is empty if the
    series are named by implementation, as in "linen float32".
    """

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float]]
    marked: Sequence[float]
    log_x: bool = False
    contestants: Mapping[str, ContestantStyle] = field(default_factory=dict)


@dataclass(frozen=True)
class Histogram:
    """The number of values of each series between neighboring edges, on a logarithmic x axis."""

    title: str
    x_label: str
    edges: Sequence[float]
    counts: Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Grid:
    """One value for each row and column, or None; a value above 1 exceeds its limit."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float | None]]


Block = str | Table | Panels | Curves | Histogram | Grid


@dataclass
class Section:
    """A title, the blocks below it in order, its checks, and every finding behind the checks.

    `facts` stand at the top of the JSON report.
    """

    title: str
    blocks: list[Block] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """Everything that one command found.

    `look` is True for a command that only shows something: it has no verdict unless it has checks.
    """

    command: str
    date: str
    versions: dict[str, str]
    sections: list[Section] = field(default_factory=list)
    look: bool = False
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def checks(self) -> list[Check]:
        """The checks of all sections, without duplicates."""
        return list(dict.fromkeys(check for section in self.sections for check in section.checks))

    @property
    def places(self) -> list[str]:
        """The names of the checked implementations, in order."""
        return list(dict.fromkeys(check.implementation for check in self.checks))

    @property
    def by_name(self) -> dict[str, dict[str, Check]]:
        """The checks by name, then by implementation, both in order."""
        checks: dict[str, dict[str, Check]] = {}
        for check in self.checks:
            checks.setdefault(check.name, {})[check.implementation] = check
        return checks

    @property
    def counts(self) -> dict[str, int]:
        """The number of checks for each verdict."""
        return {
            word: sum(check.held is held for check in self.checks)
            for held, word in VERDICTS.items()
        }

    @property
    def held(self) -> bool:
        """Whether at least one check held and none failed."""
        results = [check.held for check in self.checks]
        return True in results and False not in results

    @property
    def claims(self) -> bool:
        """Whether the report has a verdict."""
        return bool(self.checks) or not self.look

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values, verdict first; NaN and infinities become strings."""
        content = {"held": self.held if self.claims else None, **asdict(self)}
        for section in content["sections"]:
            content |= section.pop("facts")
        return _json(content)


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
