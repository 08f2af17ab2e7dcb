"""Plant every bug, run every check on it, and compare with the errors of the unmodified code."""

import json
import multiprocessing
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from ..checks import CHECKS, trials_of
from ..mutants import MUTANTS, READERS, Mutant, planted
from ..proof import cases
from ..proof.agreement import Finding
from ..proof.cases import FRAMEWORKS, TITLES, Framework
from ..report.model import Cell, Check, Grid, Section, Table
from ..report.verdicts import worst_of
from .bound import SHAPES

# The checks in the order in which they are asked about a bug, the quickest first.
QUICKEST_FIRST = (
    *("stages", "fresh", "causality", "modes", "outputs", "state", "dropout", "function"),
    *("gradients", "arguments", "determinism", "dtypes", "fused", "sizes", "training"),
)
PROCESSES = 2


class Verdict(NamedTuple):
    """The results of the checks on one mutant.

    Attributes:
        mutant: the planted bug.
        ratios: the worst error/limit of each check.
        errors: the exceptions that ended checks, by check.
    """

    mutant: Mutant
    ratios: dict[str, float]
    errors: dict[str, str]

    @property
    def caught_by(self) -> list[str]:
        """The checks that caught the mutant."""
        return [
            check
            for check, ratio in self.ratios.items()
            if not ratio <= 1.0 or check in self.errors
        ]

    @property
    def margin(self) -> float:
        """The largest error/limit of all checks."""
        return max(self.ratios.values())


def sections(
    configurations: int = 1000,
    *,
    first: bool = False,
    recorded: bool = False,
    checks: Sequence[str] = QUICKEST_FIRST,
) -> Iterator[Section | str]:
    """Yield progress messages, then a section on the unmodified code and one on the mutants.

    Args:
        configurations: the number of random configurations on which the unmodified code is run.
        first: stop at the first check that catches a mutant.
        recorded: yield a section with the recorded run instead, without any check.
        checks: the names of the checks to run.
    """
    if recorded:
        yield _recorded()
        return
    largest_without_bug = yield from _run_unmodified(configurations, checks)
    mutants, verdicts = (*MUTANTS, *READERS), []
    # A fork would inherit the frameworks' threads.
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        for verdict in pool.imap(partial(judge, names=checks, first=first), mutants):
            verdicts.append(verdict)
            yield f"{len(verdicts)} of {len(mutants)}: {verdict.mutant.name}"
    yield _section(verdicts, largest_without_bug)


def judge(mutant: Mutant, names: Iterable[str] = QUICKEST_FIRST, *, first: bool = False) -> Verdict:
    """Run the named checks on the fixed trials with the mutant planted.

    Args:
        mutant: the bug to plant.
        names: the checks to run.
        first: stop at the first check that catches the mutant.
    """
    verdict = Verdict(mutant, {}, {})
    with planted(mutant.module, mutant.changes), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mutant may divide by zero or overflow
        for name in names:
            verdict.ratios[name] = 0.0
            try:
                for finding in fixed_findings(name, mutant.implementation):
                    verdict.ratios[name] = max(verdict.ratios[name], worst([finding]))
                    if first and not verdict.ratios[name] <= 1.0:
                        break
            except Exception as error:  # a mutant may raise anything
                verdict.errors[name] = f"{type(error).__name__}: {error}"
            if first and verdict.caught_by:
                break
    return verdict


def fixed_findings(check: str, framework: Framework) -> Iterator[Finding]:
    """Yield all findings of a check on its trials."""
    for trial in trials_of(check):
        yield from CHECKS[check](framework, trial, "cpu")


def worst(findings: list[Finding]) -> float:
    """Return the largest error/limit; a NaN counts as infinite."""
    ratio = worst_of(findings).agreement.ratio
    return float("inf") if np.isnan(ratio) else ratio


def _run_unmodified(
    configurations: int, checks: Sequence[str]
) -> Generator[Section | str, None, float]:
    """Run the checks without a bug, and return the largest error/limit.

    The checks that depend on the configuration also run on random configurations.
    """
    random = np.random.default_rng(5)
    largest: dict[str, float] = {}
    false_alarms: list[Finding] = []
    compared = 0
    names = [name for name in ("stages", "outputs", "causality", "gradients") if name in checks]
    for index in range(configurations):
        if index % 10 == 0:
            yield f"{index} of {configurations} configurations without a bug"
        trial = draw_trial(random)
        for framework in FRAMEWORKS:
            for name in names:
                findings = list(CHECKS[name](framework, trial, "cpu"))
                compared += len(findings)
                false_alarms += [finding for finding in findings if not finding.held]
                largest[name] = max(largest.get(name, 0.0), worst(findings) if findings else 0.0)
    for name in checks:
        for framework in FRAMEWORKS:
            yield f"{name} on the fixed trials, without a bug"
            findings = list(fixed_findings(name, framework))
            compared += len(findings)
            false_alarms += [finding for finding in findings if not finding.held]
            largest[name] = max(largest.get(name, 0.0), worst(findings))
    rows: list[list[Cell]] = [[name, ratio] for name, ratio in largest.items()]
    yield Section(
        f"The unmodified code: {configurations} random configurations",
        [
            f"Random sizes, weights, masks and dropout patterns are drawn; {compared} comparisons. "
            "The table shows the largest error/limit of each check, including the fixed trials.",
            Table(["check", "largest error/limit"], rows),
        ],
        [
            Check(
                "no false alarm",
                "all",
                not false_alarms,
                f"{len(false_alarms)} false alarms" + "".join(map(str, false_alarms[:1])),
                "none",
            )
        ],
        false_alarms,
    )
    return max(largest.values())


def draw_trial(random: np.random.Generator) -> cases.Trial:
    """Draw a random trial. There are only a few sizes, to save compile time."""
    config, tokens = SHAPES[random.integers(len(SHAPES))]
    rate = float(random.choice([0.1, 0.4, 0.75]))
    trial = cases.draw(
        replace(config, dropout=rate), tokens, random, keep=bool(random.random() < 0.5)
    )
    if random.random() < 0.5:
        return trial
    size = config.context_length
    mask = np.where(
        random.random((size, size)) < random.random(), random.choice([1.0, -2.0, 1e-30]), 0.0
    )
    return trial.masked("random mask", mask.astype(np.float32))


def _section(verdicts: list[Verdict], largest_without_bug: float) -> Section:
    """Tabulate the verdicts, and check for each implementation that every bug was caught."""
    rows: list[list[Cell]] = []
    names = list(dict.fromkeys(verdict.mutant.name for verdict in verdicts))
    for name in names:
        by_framework = {
            verdict.mutant.implementation: verdict
            for verdict in verdicts
            if verdict.mutant.name == name
        }
        margins = [
            _margin_cell(by_framework[framework]) if framework in by_framework else None
            for framework in FRAMEWORKS
        ]
        caught_by = dict.fromkeys(
            check for verdict in by_framework.values() for check in verdict.caught_by
        )
        by = next(iter(by_framework.values())).mutant.by
        rows.append([name, *margins, ", ".join(caught_by), by])
    missed = [verdict for verdict in verdicts if not verdict.caught_by]
    measured = [verdict for verdict in verdicts if verdict.margin > 1.0]
    smallest = min(measured or verdicts, key=lambda verdict: verdict.margin)
    grid = {
        f"{verdict.mutant.name} ({verdict.mutant.implementation})": [
            verdict.ratios.get(check) for check in CHECKS
        ]
        for verdict in verdicts
    }
    section = Section(
        f"{len(names)} planted bugs, {len(verdicts)} counting each framework separately",
        [
            "The table shows the largest error/limit of any check, and the checks that caught the "
            "bug. inf: a bit, a name or a NaN is wrong. error: the program does not run. By: who "
            "thought the bug up, the authors of the checks (ours) or a reader who had not seen the "
            "catalog.",
            Table(["bug", *FRAMEWORKS, "seen by", "by"], rows),
            f"The largest error/limit without a bug is {largest_without_bug:.2g}. "
            f"The smallest of any planted bug is {smallest.margin:.3g} "
            f"({smallest.mutant.name}, {TITLES[smallest.mutant.implementation]}): "
            f"{smallest.margin / largest_without_bug:.2g} times as large. "
            f"{len(verdicts) - len(missed) - len(measured)} bugs were caught only by an exception.",
            Grid("Planted bugs and checks: error/limit", list(CHECKS), grid),
        ],
    )
    for framework in FRAMEWORKS:
        planted_here = [
            verdict for verdict in verdicts if verdict.mutant.implementation == framework
        ]
        if not planted_here:
            continue
        missed_here = [
            verdict.mutant.name for verdict in missed if verdict.mutant.implementation == framework
        ]
        caught = len(planted_here) - len(missed_here)
        section.checks.append(
            Check(
                "planted bugs caught",
                TITLES[framework],
                not missed_here,
                f"missed: {', '.join(missed_here)}" if missed_here else "all",
                "all",
                f"{caught}/{len(planted_here)}",
            )
        )
    return section


def _margin_cell(verdict: Verdict) -> Cell:
    return "error" if verdict.errors and not verdict.margin > 1.0 else verdict.margin


def _recorded() -> Section:
    """Return a section with the results, the date and the versions of the recorded run."""
    record: dict[str, Any] = json.loads(
        files("compare").joinpath("records/mutants-cpu.json").read_text("utf-8")
    )
    *_, campaign = record["sections"]
    texts = [block for block in campaign["blocks"] if isinstance(block, str)]
    (grid,) = [
        block
        for block in campaign["blocks"]
        if isinstance(block, dict) and isinstance(block["rows"], dict)
    ]
    rows = {
        name: [float(value) if value is not None else None for value in row]
        for name, row in grid["rows"].items()
    }
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return Section(
        f"Recorded: {campaign['title']}",
        [
            f"Recorded on {record['date'][:10]} by `python -m {record['command']}` on the CPU, "
            f"with {versions}. Not repeated now.",
            texts[-1],
            Grid(grid["title"], grid["columns"], rows),
        ],
    )
