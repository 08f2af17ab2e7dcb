"""A port's report as a section of a printed report or a page."""

from pathlib import Path

from ..files.printable import all_readable
from ..report.machine import report_here
from ..report.model import Block, Section, Table
from ..report.verdicts import settle
from .report import PortReport


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
    if report.adequacy:
        blocks.append(report.adequacy.verdict)
        blocks += [f"Not noticed: {line}" for line in report.adequacy.lines]
    blocks += [f"Note: {note}" for note in report.notes]
    return Section(f"Port: {name}", blocks, verdicts, list(report.findings), report.as_json())


def page_of(report: PortReport, name: str) -> str:
    """Return the report as an HTML page that needs no network.

    Raises:
        ImportError: jinja2 or matplotlib is missing.
    """
    from ..report.html import html

    made = report_here(name)
    made.sections.append(all_readable(section_of(report, name)))
    return html(made)
