"""From many findings to a table that fits a screen and a verdict for each check."""

from collections.abc import Iterable, Sequence

import numpy as np

from ..proof.agreement import Finding
from ..proof.cases import FRAMEWORKS, TITLES
from .model import Cell, Check, Table


def ratio_table(findings: Sequence[Finding]) -> Table:
    """Return a row for each check: how many comparisons, the worst error/limit of each implementation, and where."""
    rows: list[list[Cell]] = []
    for name in dict.fromkeys(finding.check for finding in findings):
        mine = [finding for finding in findings if finding.check == name]
        by_place = {
            place: [finding for finding in mine if finding.implementation == place]
            for place in FRAMEWORKS
        }
        ratios = [worst_of(found).agreement.ratio if found else None for found in by_place.values()]
        worst = worst_of(mine)
        rows.append([name, len(mine), *ratios, worst.case if worst.agreement.ratio else ""])
    return Table(["check", "tried", *FRAMEWORKS, "worst in"], rows)


def settle(findings: Sequence[Finding], name: str) -> list[Check]:
    """Return a verdict for each implementation on all findings of one check.

    Raises:
        ValueError: nothing was compared.
    """
    if not findings:
        raise ValueError(f"{name}: nothing was compared")
    checks = []
    for place in dict.fromkeys(finding.implementation for finding in findings):
        mine = [finding for finding in findings if finding.implementation == place]
        held = sum(finding.held for finding in mine)
        worst = worst_of(mine)
        measured = (
            f"worst error/limit {worst.agreement.ratio:.2g}" if held == len(mine) else str(worst)
        )
        checks.append(
            Check(
                name,
                TITLES[place],
                held == len(mine),
                measured,
                "at most 1 everywhere",
                f"{held}/{len(mine)}",
            )
        )
    return checks


def worst_of(findings: Iterable[Finding]) -> Finding:
    """Return the finding that lies farthest beyond its limit; a NaN ratio counts as infinite."""
    return max(
        findings,
        key=lambda found: np.inf if np.isnan(found.agreement.ratio) else found.agreement.ratio,
    )
