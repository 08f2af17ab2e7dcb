"""Print reports in 80 columns, with unbroken names, and with color only on a terminal."""

import os
import signal
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table as RichTable
from rich.text import Text

from .model import VERDICTS, Cell, Check, Curves, Grid, Histogram, Panels, Report, Section, Table

TEXT_WIDTH = 80
# A pipe has no width, so any table must fit.
_PIPE_WIDTH = 100_000
# A table of 100,000 rows takes a minute to lay out.
MAX_ROWS = 1000
# Break only between words, and change no character: the lines are looked up in the text.
_WHOLE_WORDS: Any = {
    "break_long_words": False,
    "break_on_hyphens": False,
    "expand_tabs": False,
    "replace_whitespace": False,
}
_STYLES = {"held": "green", "FAILED": "bold red", "not run": "yellow"}


class ReportConsole(Console):
    """A console that does not wrap lines in a pipe and does not fail when the pipe is closed."""

    def __init__(self, shows_all: bool = False) -> None:
        super().__init__(highlight=False)
        self.shows_all = shows_all
        self.is_pipe_closed = False
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = _PIPE_WIDTH

    def on_broken_pipe(self) -> None:
        """Stop printing, but let the command go on to write its files."""
        self.is_pipe_closed = self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def end_if_pipe_closed(self) -> None:
        """End by SIGPIPE, as other programs do, if the pipe was closed."""
        if self.is_pipe_closed:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGPIPE)


def print_header(console: Console, report: Report) -> None:
    """Print the versions and the machine."""
    _print_text(console, ", ".join(f"{name} {number}" for name, number in report.versions.items()))
    _print_text(console, "{processor}, {cores} cores, {features}".format_map(report.machine))


def print_section(console: Console, section: Section) -> None:
    """Print one section: its blocks, then its failed checks in full."""
    _print_heading(console, section.title)
    for block in section.blocks:
        match block:
            case str():
                _print_text(console, block)
            case Table():
                _print_table(console, block)
            case Panels():
                _print_panels(console, block)
            case Curves(log_x=True):
                _print_text(console, f"{block.title}: see the plot in the HTML report.")
            case Curves():
                _print_table(console, _curves_table(block), block.title)
            case Histogram():
                _print_table(console, _histogram_table(block), block.title)
            case Grid():
                _print_text(
                    console, f"{block.title}: {len(block.rows)} rows, see the JSON or HTML report."
                )
    for check in section.checks:
        if check.held is False:
            _print_check(console, check)
    console.print()


def _print_text(console: Console, content: str | Text) -> None:
    """Print text wrapped between words; a word longer than a line is not broken."""
    text = content if isinstance(content, Text) else Text(content)
    starts, end = [], 0
    width = min(TEXT_WIDTH, console.width)
    for paragraph in text.plain.splitlines():
        for line in textwrap.wrap(paragraph, width, **_WHOLE_WORDS) or [""]:
            starts.append(text.plain.index(line, end))
            end = starts[-1] + len(line)
    for part in text.divide(starts[1:]):
        part.rstrip()
        console.print(part, crop=False, no_wrap=True, overflow="ignore")


def _print_heading(console: Console, title: str) -> None:
    """Print the title with a rule, or without one if the rule would truncate it."""
    width = min(TEXT_WIDTH, console.width)
    if len(title) + 2 < width:
        console.print(Rule(f"[bold]{escape(title)}", align="left"), width=width)
    else:
        _print_text(console, Text(title, style="bold"))


def print_summary(console: Console, report: Report) -> None:
    """Print a table of checks by implementation, the checks that did not hold, and the verdict."""
    rows = []
    for name, checks in report.by_name.items():
        row = [name]
        for implementation in report.places:
            check = checks.get(implementation)
            row.append(f"{VERDICTS[check.held]} {check.count}" if check else "")
        rows.append(row)
    _print_heading(console, "Summary")
    _print_table(console, Table(["check", *report.places], rows))
    for check in report.checks:
        if not check.held:
            _print_check(console, check)
    verdict = "[bold green]Everything held" if report.held else "[bold red]NOT everything held"
    console.print(
        f"{verdict}[/]: {', '.join(f'{count} {name}' for name, count in report.counts.items())}."
    )


def _print_check(console: Console, check: Check) -> None:
    verdict = VERDICTS[check.held]
    line = f"{check.name} ({check.implementation}): {check.measured}; expected {check.expected}"
    _print_text(console, Text.assemble((verdict, _STYLES[verdict]), f" {line}"))


def _curves_table(curves: Curves) -> Table:
    rows: list[list[Cell]] = []
    for x in curves.marked:
        index = curves.x.index(x)
        rows.append([f"{x:g}", *(values[index] for values in curves.series.values())])
    return Table([curves.x_label, *curves.series], rows)


def _histogram_table(histogram: Histogram) -> Table:
    edges = histogram.edges
    rows = [
        [f"{low:.3g} to {high:.3g}", *counts]
        for low, high, *counts in zip(
            edges[:-1], edges[1:], *histogram.counts.values(), strict=True
        )
    ]
    return Table([histogram.x_label, *histogram.counts], rows)


def _print_table(console: Console, table: Table, title: str | None = None) -> None:
    rich = RichTable(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=title and escape(title),
        title_justify="left",
    )
    rows = table.rows if getattr(console, "shows_all", False) else table.rows[:MAX_ROWS]
    for index, column in enumerate(table.columns):
        cells = [row[index] for row in rows]
        texts = [cell_text(cell) for cell in [column, *cells]]
        longest = max(len(word) for text in texts for word in text.split() or [""])
        is_number = any(isinstance(cell, int | float) for cell in cells)
        rich.add_column(
            escape(column),
            justify="right" if is_number else "left",
            min_width=longest,
            no_wrap=longest == max(map(len, texts)),  # else Rich narrows it, and widens the table
            overflow="fold",
        )
    for row in rows:
        rich.add_row(*(_cell(cell) for cell in row))
    width = TEXT_WIDTH if console.width == _PIPE_WIDTH else console.width
    if console.measure(rich).maximum > width:
        rich.width = width
    console.print(rich, crop=False, no_wrap=True)
    if more := len(table.rows) - len(rows):
        console.print(f"… {more:,} more (--all)")


def number_text(number: float) -> str:
    """Return two significant digits, without an exponent for numbers up to a million."""
    text = f"{number:.2g}"
    return f"{float(text):,.0f}" if 10 <= abs(number) < 1e6 else text


def cell_text(cell: Cell) -> str:
    """Return a table cell as text."""
    match cell:
        case None:
            return "-"
        case bool():
            return "yes" if cell else "no"
        case float():
            return number_text(cell)
        case _:
            return str(cell).rstrip()


def _cell(cell: Cell) -> str:
    text = cell_text(cell)
    if not isinstance(cell, str):
        return text
    style = next(
        (style for verdict, style in _STYLES.items() if text.startswith(verdict)), "default"
    )
    return f"[{style}]{escape(text)}[/]"


def _print_panels(console: Console, panels: Panels) -> None:
    """Print the matrices side by side, as many as fit in a line, and the others below."""
    blocks = {name: _rows(matrix, panels.decimals) for name, matrix in panels.matrices.items()}
    widths = {name: max(len(name), *map(len, rows)) for name, rows in blocks.items()}
    console.print(f"[italic]{escape(panels.title)}")
    line: list[str] = []
    for name in blocks:
        if line and sum(widths[other] + 2 for other in line) + widths[name] > min(
            TEXT_WIDTH, console.width
        ):
            _print_beside(console, {other: blocks[other] for other in line}, widths)
            line = []
        line.append(name)
    _print_beside(console, {name: blocks[name] for name in line}, widths)
    console.print()


def _rows(matrix: Sequence[Sequence[float]], decimals: int) -> list[str]:
    """Return the rows as text, without decimals if all entries are whole numbers."""
    decimals = 0 if all(float(entry).is_integer() for row in matrix for entry in row) else decimals
    texts = [[f"{entry:.{decimals}f}" for entry in row] for row in matrix]
    width = max((len(text) for row in texts for text in row), default=0)
    return [" ".join(text.rjust(width) for text in row) for row in texts]


def _print_beside(
    console: Console, blocks: Mapping[str, list[str]], widths: Mapping[str, int]
) -> None:
    lines = [list(blocks), *zip_longest(*blocks.values(), fillvalue="")]
    for line in lines:
        padded = (f"{text:{widths[name]}}" for name, text in zip(blocks, line, strict=True))
        console.print("  ".join(padded).rstrip(), crop=False, no_wrap=True, overflow="ignore")
