"""Check the example ports, right and wrong ones, and count how often the true lines are named."""

from collections.abc import Iterator

from ..ports.right_ports import RightPort, drawn
from ..ports.wrong_ports import EXAMPLES, Named, WrongPort, judged, reported, wrong_ports
from ..report.model import Cell, Check, Section, Table
from .port import report_of


def sections(every: int = 1, right: int = 0) -> Iterator[Section | str]:
    """Yield progress messages, then a section on the right ports and one on the wrong ones.

    Args:
        every: take each wrong port of so many.
        right: how many right ports are drawn, besides the examples.
    """
    ports = [RightPort(example, [], 0) for example in EXAMPLES] + [drawn(n) for n in range(right)]
    alarms = []
    for number, port in enumerate(ports, 1):
        yield f"right port {number} of {len(ports)}: {port}"
        report = reported(port.example, port.text(), report_of)
        alarms += [] if report.held else [str(port)]
    measured = f"{len(alarms)} false alarms of {len(ports)}"
    check = Check("right ports hold", "all", not alarms, measured, "none")
    yield Section("Right ports", [measured, *alarms], [check])
    bugs = wrong_ports()[::every]
    results: list[tuple[WrongPort, Named]] = []
    for bug in bugs:
        yield f"{len(results) + 1} of {len(bugs)}: {bug.name}"
        results.append((bug, judged(bug, report_of)))
    yield _section(results)


def _section(results: list[tuple[WrongPort, Named]]) -> Section:
    rows: list[list[Cell]] = []
    for example in (*EXAMPLES, "all"):
        named = [one for bug, one in results if example in (bug.example, "all")]
        if named:
            rows.append(
                [
                    example,
                    len(named),
                    sum(one.is_detected for one in named),
                    sum(one.flax is not None for one in named),
                    sum(one.torch is not None for one in named),
                    sum(one.flax == 0 for one in named),
                    sum(one.torch == 0 for one in named),
                    sum(bool(one.hint) for one in named),
                ]
            )
    columns = ["example", "wrong ports", "seen", "Flax line", "torch line"]
    columns += ["Flax line first", "torch line first", "with a hint"]
    missed = [f"{bug.example}: {bug.name}" for bug, one in results if not one.is_detected]
    measured = f"{len(missed)} missed" + (f": {', '.join(missed)}" if missed else "")
    check = Check("wrong ports seen", "all", not missed, measured, "none")
    unnamed = [
        f"{bug.example}: {bug.name}"
        for bug, one in results
        if one.is_detected and None in (one.flax, one.torch)
    ]
    said = [f"A true line is not among the three of its side: {'; '.join(unnamed)}."]
    return Section("Wrong ports", [Table(columns, rows), *(said if unnamed else [])], [check])
