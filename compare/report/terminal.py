"""Print findings: tables and matrices that fit 80 columns, with color only on a terminal."""

from itertools import zip_longest

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from .model import VERDICTS, Cell, Check, Curves, Grid, Histogram, Panels, Report, Section, Table

_STYLES = {"held": "green", "FAILED": "bold red", "not run": "yellow"}


def print_section(console: Console, section: Section) -> None:
    """Print one section, its failed checks spelled out."""
    _print_heading(console, section.title)
    for block in section.blocks:
        match block:
            case str():
                console.print(escape(block))
            case Table():
                _print_table(console, block)
            case Panels():
                _print_panels(console, block)
            case Curves(log_x=True):
                console.print(escape(f"{block.title}: drawn in the HTML."))
            case Curves():
                _print_table(console, _marked(block), block.title)
            case Histogram():
                _print_table(console, _counted(block), block.title)
            case Grid():
                console.print(escape(f"{block.title}: {len(block.rows)} rows, in the JSON and the HTML."))
    for check in section.checks:
        if check.held is False:
            _print_check(console, check)
    console.print()


def _print_heading(console: Console, title: str) -> None:
    """Print the title with a rule, or alone if it is longer than a line: a rule would cut it off."""
    if len(title) + 2 < console.width:
        console.rule(f"[bold]{escape(title)}", align="left")
    else:
        console.print(f"[bold]{escape(title)}")


def print_summary(console: Console, report: Report) -> None:
    """Print every check as a row, every implementation as a column, and the verdict."""
    rows = [
        [
            name,
            *(
                f"{VERDICTS[found[place].held]} {found[place].count}" if place in found else ""
                for place in report.places
            ),
        ]
        for name, found in report.by_name.items()
    ]
    _print_heading(console, "Summary")
    _print_table(console, Table(["check", *report.places], rows))
    for check in report.checks:
        if not check.held:
            _print_check(console, check)
    verdict = "[bold green]Everything held" if report.held else "[bold red]NOT everything held"
    console.print(f"{verdict}[/]: {', '.join(f'{count} {name}' for name, count in report.counts.items())}.")


def _print_check(console: Console, check: Check) -> None:
    verdict = VERDICTS[check.held]
    line = f"{check.name} ({check.implementation}): {check.measured}; expected {check.expected}"
    console.print(f"[{_STYLES[verdict]}]{verdict}[/] {escape(line)}")


def _marked(curves: Curves) -> Table:
    places = [(x, curves.x.index(x)) for x in curves.marked]
    rows: list[list[Cell]] = [[f"{x:g}", *(values[i] for values in curves.series.values())] for x, i in places]
    return Table([curves.x_label, *curves.series], rows)


def _counted(histogram: Histogram) -> Table:
    edges = histogram.edges
    rows = [
        [f"{low:.3g} to {high:.3g}", *counts]
        for low, high, *counts in zip(edges[:-1], edges[1:], *histogram.counts.values(), strict=True)
    ]
    return Table([histogram.x_label, *histogram.counts], rows)


def _print_table(console: Console, table: Table, title: str | None = None) -> None:
    rich = RichTable(
        box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title and escape(title), title_justify="left"
    )
    for index, column in enumerate(table.columns):
        numeric = any(isinstance(row[index], int | float) for row in table.rows)
        rich.add_column(escape(column), justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        rich.add_row(*(_cell(cell) for cell in row))
    console.print(rich)


def cell_text(cell: Cell) -> str:
    """Return a table's cell as it is shown."""
    match cell:
        case None:
            return "-"
        case bool():
            return "yes" if cell else "no"
        case float():
            return f"{cell:.2g}"
        case _:
            return str(cell).rstrip()


def _cell(cell: Cell) -> str:
    text = cell_text(cell)
    if not isinstance(cell, str):
        return text
    style = next((style for verdict, style in _STYLES.items() if text.startswith(verdict)), "default")
    return f"[{style}]{escape(text)}[/]"


def _print_panels(console: Console, panels: Panels) -> None:
    """Print the matrices side by side."""
    blocks = {
        name: [" ".join(f"{entry:{_width(panels)}.{panels.decimals}f}" for entry in row) for row in matrix]
        for name, matrix in panels.matrices.items()
    }
    widths = [max(len(name), *(len(line) for line in lines)) for name, lines in blocks.items()]
    console.print(f"[italic]{escape(panels.title)}")
    console.print("  ".join(f"{name:{width}}" for name, width in zip(blocks, widths, strict=True)).rstrip())
    for lines in zip_longest(*blocks.values(), fillvalue=""):
        padded = (f"{line:{width}}" for line, width in zip(lines, widths, strict=True))
        console.print("  ".join(padded).rstrip())
    console.print()


def _width(panels: Panels) -> int:
    return panels.decimals + 3 if panels.decimals else 1
