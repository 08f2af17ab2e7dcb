"""A port's report as a section of a printed report or a page."""

from pathlib import Path

from ..files.printable import all_readable
from ..report.machine import report_here
from ..report.model import Block, Curves, Section, Table
from ..report.verdicts import settle
from .report import EQUAL, Divergence, PortReport

_SMALLEST = 1e-17  # a logarithmic axis has no 0


def section_of(report: PortReport, name: str) -> Section:
    """Return the report as a section."""
    checks = dict.fromkeys(finding.check for finding in report.findings)
    verdicts = [
        verdict
        for check in checks
        for verdict in settle([one for one in report.findings if one.check == check], check)
    ]
    blocks: list[Block] = [report.verdict]
    if report.divergence:
        parted = report.divergence
        blocks.append(f"The {parted.what} part first here. {parted.hint}")
        rows = [
            (side, f"{Path(source.file).name}:{source.line}", source.code, source.operation)
            for side, sources in (
                ("torch", report.divergence.torch_source),
                ("Flax", report.divergence.flax_source),
            )
            for source in sources
        ]
        blocks.append(Table(("side", "line", "code", "operation"), rows))
        blocks += [f"Equal before: {line}" for line in parted.last_equal]
        blocks += _steps(parted)
    if report.adequacy:
        blocks.append(report.adequacy.verdict)
        blocks += [f"Not noticed: {line}" for line in report.adequacy.lines]
    blocks += [f"Note: {note}" for note in report.notes]
    return Section(f"Port: {name}", blocks, verdicts, list(report.findings), report.as_json())


def _steps(parted: Divergence) -> list[Block]:
    """Return the lines of both runs side by side, and how far they lie apart."""
    if not parted.steps:
        return []
    rows = [
        (
            f"{number} {'=' if step.is_equal else '≠'}",
            f"{step.torch.line}: {step.torch.code}",
            f"{step.flax.line}: {step.flax.code}" if step.flax else "",
        )
        for number, step in parted.steps_near
    ]
    known = [(n, step.error) for n, step in enumerate(parted.steps, 1) if step.error is not None]
    differing = [number for number, error in known if error > EQUAL]
    return [
        "The lines of both runs side by side, about the first whose values differ (≠):",
        Table(("step", "torch", "Flax"), rows),
        Curves(
            "Differences",
            "step",
            "of the largest entry",
            [number for number, _ in known],
            {"float64": [max(error, _SMALLEST) for _, error in known]},
            differing[:1],
        ),
    ]


def page_of(report: PortReport, name: str) -> str:
    """Return the report as an HTML page that needs no network.

    Raises:
        ImportError: jinja2 or matplotlib is missing.
    """
    from ..report.html import html

    made = report_here(name)
    made.sections.append(all_readable(section_of(report, name)))
    return html(made)
