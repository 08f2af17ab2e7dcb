"""Summarize findings: a table of the worst ratios, and a verdict for each check."""

from collections.abc import Iterable, Sequence

import numpy as np

from ..proof.agreement import Finding
from ..proof.cases import FRAMEWORKS, TITLES
from .model import Cell, Check, Table


def ratio_table(findings: Sequence[Finding]) -> Table:
    """Return a table with one row for each check.

    A row has the number of comparisons, the worst error/limit of each implementation, and the case
    of the worst one.
    """
    rows: list[list[Cell]] = []
    for name in dict.fromkeys(finding.check for finding in findings):
        of_check = [finding for finding in findings if finding.check == name]
        ratios: list[float | None] = []
        for framework in FRAMEWORKS:
            of_framework = [finding for finding in of_check if finding.implementation == framework]
            ratios.append(worst_of(of_framework).agreement.ratio if of_framework else None)
        worst = worst_of(of_check)
        rows.append([name, len(of_check), *ratios, worst.case if worst.agreement.ratio else ""])
    return Table(["check", "tried", *FRAMEWORKS, "worst in"], rows)


def settle(findings: Sequence[Finding], name: str) -> list[Check]:
    """Return one check for each implementation, from all findings of the check `name`.

    Raises:
        ValueError: there are no findings.
    """
    if not findings:
        raise ValueError(f"{name}: nothing was compared")
    checks = []
    for framework in dict.fromkeys(finding.implementation for finding in findings):
        of_framework = [finding for finding in findings if finding.implementation == framework]
        num_held = sum(finding.held for finding in of_framework)
        all_held = num_held == len(of_framework)
        worst = worst_of(of_framework)
        checks.append(
            Check(
                name,
                TITLES[framework],
                all_held,
                f"worst error/limit {worst.agreement.ratio:.2g}" if all_held else str(worst),
                "at most 1 everywhere",
                f"{num_held}/{len(of_framework)}",
            )
        )
    return checks


def worst_of(findings: Iterable[Finding]) -> Finding:
    """Return the finding with the largest error/limit; NaN counts as infinity."""

    def ratio(finding: Finding) -> float:
        return np.inf if np.isnan(finding.agreement.ratio) else finding.agreement.ratio

    return max(findings, key=ratio)
