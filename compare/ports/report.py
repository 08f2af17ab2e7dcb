"""What a check of a port found, as data and as text."""

from dataclasses import asdict, dataclass, field
from html import escape
from itertools import zip_longest
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..proof.agreement import Finding

if TYPE_CHECKING:
    from .adequacy import Adequacy

_MAX_LISTED = 8
_STEPS_BEFORE, _STEPS_AFTER = 8, 8  # about the first that differs
EQUAL = 1e-9  # as values are compared: see fingerprints.py


@dataclass(frozen=True)
class SourceLine:
    """A line of somebody's module.

    Attributes:
        file: the path of the file.
        line: the number of the line.
        code: the text of the line.
        operation: what the framework ran there.
        module: the path of the module, dotted; "" for the module itself, or where it is not known.
    """

    file: str
    line: int
    code: str
    operation: str
    module: str = ""

    @property
    def place(self) -> str:
        """The name of the file and the number of the line."""
        return f"{Path(self.file).name}:{self.line}"

    def __str__(self) -> str:
        within = f", in {self.module}" if self.module else ""
        return f"{self.file}:{self.line}: {self.code}  ({self.operation}{within})"


@dataclass(frozen=True)
class Step:
    """A line of torch's run beside Flax's line for the same value.

    Attributes:
        torch: torch's line.
        flax: Flax's line; None if no value is like torch's.
        error: how far the values lie apart, relative to the largest entry; None if that is not
            known.
    """

    torch: SourceLine
    flax: SourceLine | None
    error: float | None

    @property
    def is_equal(self) -> bool:
        """Whether the values are the same, up to roundings of float64."""
        return self.error is not None and self.error <= EQUAL


@dataclass(frozen=True)
class Divergence:
    """Where the values part first.

    Attributes:
        what: what was followed: "outputs", "gradients" or "state".
        torch_source: torch's lines, the likeliest first, at most three.
        flax_source: Flax's lines, likewise.
        last_equal: the last values that both have, as the lines that made them.
        hint: how the values are related, if that was recognized.
        steps: the lines of both runs side by side.
    """

    what: str
    torch_source: tuple[SourceLine, ...] = ()
    flax_source: tuple[SourceLine, ...] = ()
    last_equal: tuple[str, ...] = ()
    hint: str = ""
    steps: tuple[Step, ...] = field(default=(), compare=False)

    @property
    def steps_near(self) -> tuple[tuple[int, Step], ...]:
        """The steps about the first whose values differ, with their numbers from 1."""
        numbered = tuple(enumerate(self.steps, 1))
        first = next((number for number, step in numbered if not step.is_equal), 1)
        return numbered[max(first - _STEPS_BEFORE - 1, 0) : first + _STEPS_AFTER]

    def __str__(self) -> str:
        lines = [f"The {self.what} part first here:"]
        for title, sources in (("torch", self.torch_source), ("Flax", self.flax_source)):
            lines += [f"  {title:5} {source}" for source in sources]
            if not sources:
                lines.append(f"  {title:5} no line of its own: look at what the other does there")
        lines += [f"  equal before: {line}" for line in self.last_equal]
        if self.hint:
            lines.append(f"  {self.hint}")
        return "\n".join(lines)


@dataclass(frozen=True)
class PortReport:
    """Whether a Flax module is the same function as a torch module.

    Attributes:
        findings: every comparison that was made.
        divergence: where the values part first, if they do.
        notes: what was not compared, and what the layers say differently.
        slip: the smallest relative slip of an output that would have been seen, in float64.
        ulps: the largest difference of an output, in units of the last place of its largest entry.
        adequacy: what these inputs would have noticed, if it was asked.
    """

    findings: tuple[Finding, ...]
    divergence: Divergence | None = None
    notes: tuple[str, ...] = ()
    slip: float = 0.0
    ulps: float = 0.0
    adequacy: "Adequacy | None" = None

    @property
    def held(self) -> bool:
        """Whether nothing differs."""
        return all(finding.held for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        return {
            "held": self.held,
            "divergence": None if self.divergence is None else asdict(self.divergence),
            "slip": self.slip,
            "ulps": self.ulps,
            "notes": list(self.notes),
            "adequacy": None if self.adequacy is None else self.adequacy.as_json(),
            "findings": [
                {
                    "check": finding.check,
                    "case": finding.case,
                    "held": finding.held,
                    "error_over_limit": _number(finding.agreement.ratio),
                    "why": finding.why,
                    "error": finding.error,
                }
                for finding in self.findings
            ],
        }

    @property
    def verdict(self) -> str:
        """The verdict and what it is worth, in two sentences."""
        count = len(self.findings)
        if self.held:
            return (
                f"The port is the same function: {count} comparisons hold. In float64 the outputs "
                f"differ by {self.ulps:.2g} units in the last place; a relative slip of "
                f"{self.slip:.1g} would have been seen."
            )
        failed = sum(not finding.held for finding in self.findings)
        return f"The port differs: {failed} of {count} comparisons do not hold."

    def _repr_html_(self) -> str:
        """Return the report as HTML, which a notebook shows: the lines of both sides abreast."""
        parts = [f"<p><b>{escape(self.verdict)}</b></p>"]
        if self.divergence:
            sides = (self.divergence.torch_source, self.divergence.flax_source)
            rows = [
                "".join(f"<td>{_cell(line)}</td>" for line in pair) for pair in zip_longest(*sides)
            ]
            head = f"<tr><th>torch: {self.divergence.what} part first</th><th>Flax</th></tr>"
            parts.append(f"<table>{head}{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
            parts.append(f"<p>{escape(self.divergence.hint)}</p>")
            rows = [_row(number, step) for number, step in self.divergence.steps_near]
            head = "<tr><th></th><th>torch</th><th>Flax</th><th>difference</th></tr>"
            parts.append(f"<table>{head}{''.join(rows)}</table>" if rows else "")
        failed = [finding for finding in self.findings if not finding.held]
        parts += [f"<p>{escape(_told(finding))}</p>" for finding in failed[:_MAX_LISTED]]
        if self.adequacy:
            parts.append(f"<pre>{escape(str(self.adequacy))}</pre>")
        return "".join([*parts, *(f"<p>Note: {escape(note)}</p>" for note in self.notes)])

    def __str__(self) -> str:
        failed = [finding for finding in self.findings if not finding.held]
        lines = [self.verdict, *(f"  {_told(finding)}" for finding in failed[:_MAX_LISTED])]
        if len(failed) > _MAX_LISTED:
            lines.append(f"  … and {len(failed) - _MAX_LISTED} more")
        if self.divergence:
            lines.append(str(self.divergence))
        if self.adequacy:
            lines.append(str(self.adequacy))
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def _cell(line: SourceLine | None) -> str:
    if line is None:
        return ""
    return f"{escape(line.file)}:{line.line}<br><code>{escape(line.code)}</code>"


def _row(number: int, step: Step) -> str:
    color = "#d8f0d8" if step.is_equal else "#f8d8d0"
    error = "" if step.error is None else f"{step.error:.1e}"
    cells = (str(number), _cell(step.torch), _cell(step.flax), error)
    return f'<tr style="background: {color}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _told(finding: Finding) -> str:
    what = finding.error or str(finding.agreement)
    return f"{finding.check}, {finding.case}: {what}"


def _number(ratio: float) -> float | None:
    return ratio if isfinite(ratio) else None
