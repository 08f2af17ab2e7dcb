"""Plant every bug, run every check: which one sees it, by how much, and how far that is from honest rounding."""

import json
import warnings
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from ..checks import CHECKS, ON_THEIR_OWN
from ..mutants import MUTANTS, Mutant, planted
from ..proof import cases
from ..proof.agreement import Finding
from ..proof.cases import FRAMEWORKS, TITLES, Framework
from ..report.model import Cell, Check, Grid, Section, Table
from ..report.verdicts import worst_of
from .bound import SHAPES


class Verdict(NamedTuple):
    """What the checks made of one mutant: the worst error/limit of each, and the errors that ended some."""

    mutant: Mutant
    ratios: dict[str, float]
    errors: dict[str, str]

    @property
    def caught_by(self) -> list[str]:
        """The checks that saw it."""
        return [
            check
            for check, ratio in self.ratios.items()
            if not ratio <= 1.0 or check in self.errors
        ]

    @property
    def margin(self) -> float:
        """The worst error/limit of all checks."""
        return max(self.ratios.values())


def sections(
    configurations: int = 1000, *, first: bool = False, recorded: bool = False
) -> Iterator[Section | str]:
    """Yield the configurations without a bug, then the mutants.

    Args:
        configurations: how many configurations without a bug to draw.
        first: stop at the first check that catches a mutant.
        recorded: yield what the recorded run found instead; it settles nothing about this run.
    """
    if recorded:
        yield _recorded()
        return
    honest = yield from _honest(configurations)
    verdicts = []
    for index, mutant in enumerate(MUTANTS):
        yield f"{index} of {len(MUTANTS)}: {mutant.name} in {TITLES[mutant.implementation]}"
        verdicts.append(judge(mutant, CHECKS, first=first))
    yield _section(verdicts, honest)


def judge(mutant: Mutant, names: Iterable[str] = tuple(CHECKS), *, first: bool = False) -> Verdict:
    """Run the named checks on the fixed trials with the mutant planted; `first` ends with what sees it first."""
    verdict = Verdict(mutant, {}, {})
    with planted(mutant.module, mutant.changes), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a wrong program divides by
        for name in names:
            verdict.ratios[name] = 0.0
            try:
                for finding in fixed_findings(name, mutant.implementation):
                    verdict.ratios[name] = max(verdict.ratios[name], worst([finding]))
                    if first and not verdict.ratios[name] <= 1.0:
                        break
            except Exception as error:  # whatever a wrong program raises
                verdict.errors[name] = f"{type(error).__name__}: {error}"
            if first and verdict.caught_by:
                break
    return verdict


def fixed_findings(check: str, framework: Framework) -> Iterator[Finding]:
    """Yield all findings of a check on the fixed cases."""
    for trial in cases.fixed_trials()[:1] if check in ON_THEIR_OWN else cases.fixed_trials():
        yield from CHECKS[check](framework, trial, "cpu")


def worst(findings: list[Finding]) -> float:
    """Return the largest error/limit; a NaN is infinite."""
    ratio = worst_of(findings).agreement.ratio
    return float("inf") if np.isnan(ratio) else ratio


def _honest(configurations: int) -> Generator[Section | str, None, float]:
    """Run the checks that depend on the configuration on drawn ones; return the largest error/limit of each."""
    random = np.random.default_rng(5)
    largest: dict[str, float] = {}
    alarms: list[Finding] = []
    compared = 0
    names: list[str] = [
        name for name in ("stages", "outputs", "causality", "gradients") if name in CHECKS
    ]
    for index in range(configurations):
        if index % 10 == 0:
            yield f"{index} of {configurations} honest configurations"
        trial = drawn(random)
        for framework in FRAMEWORKS:
            for name in names:
                findings = list(CHECKS[name](framework, trial, "cpu"))
                compared += len(findings)
                alarms += [finding for finding in findings if not finding.held]
                largest[name] = max(largest.get(name, 0.0), worst(findings) if findings else 0.0)
    for name in CHECKS:
        for framework in FRAMEWORKS:
            yield f"{name} on the fixed trials, honest"
            findings = list(fixed_findings(name, framework))
            compared += len(findings)
            alarms += [finding for finding in findings if not finding.held]
            largest[name] = max(largest.get(name, 0.0), worst(findings))
    rows: list[list[Cell]] = [[name, ratio] for name, ratio in largest.items()]
    yield Section(
        f"The unbroken code: {configurations} drawn configurations",
        [
            f"Sizes, weights, masks and dropout are drawn; {compared} comparisons. The largest error/limit of each "
            "check, the fixed trials included:",
            Table(["check", "largest error/limit"], rows),
        ],
        [
            Check(
                "no false alarm",
                "all",
                not alarms,
                f"{len(alarms)} false alarms" + "".join(map(str, alarms[:1])),
                "none",
            )
        ],
        alarms,
    )
    return max(largest.values())


def drawn(random: np.random.Generator) -> cases.Trial:
    """Draw a trial: one of few sizes, so that compiling does not take the time, and everything else."""
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
    return trial.masked("drawn mask", mask.astype(np.float32))


def _section(verdicts: list[Verdict], honest: float) -> Section:
    rows: list[list[Cell]] = []
    names = list(dict.fromkeys(verdict.mutant.name for verdict in verdicts))
    for name in names:
        mine = {
            verdict.mutant.implementation: verdict
            for verdict in verdicts
            if verdict.mutant.name == name
        }
        margins = [_shown(mine[place]) if place in mine else None for place in FRAMEWORKS]
        seen = list(
            dict.fromkeys(check for verdict in mine.values() for check in verdict.caught_by)
        )
        rows.append([name, *margins, ", ".join(seen)])
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
        f"{len(names)} planted bugs, {len(verdicts)} with each implementation that can have them",
        [
            "The worst error/limit of any check (inf: a bit, a name or a NaN where there should be none; error: the "
            "program does not run), and the checks that saw it:",
            Table(["bug", *FRAMEWORKS, "seen by"], rows),
            f"The largest honest error/limit is {honest:.2g}. The smallest of any planted bug is {smallest.margin:.3g} "
            f"({smallest.mutant.name}, {TITLES[smallest.mutant.implementation]}): "
            f"{smallest.margin / honest:.2g} times as large. "
            f"{len(verdicts) - len(missed) - len(measured)} were seen by an error alone.",
            Grid("Planted bugs and checks: error/limit", list(CHECKS), grid),
        ],
    )
    for place in FRAMEWORKS:
        mine_all = [verdict for verdict in verdicts if verdict.mutant.implementation == place]
        if not mine_all:
            continue
        lost = [verdict.mutant.name for verdict in missed if verdict.mutant.implementation == place]
        caught = len(mine_all) - len(lost)
        section.checks.append(
            Check(
                "planted bugs caught",
                TITLES[place],
                not lost,
                f"missed: {', '.join(lost)}" if lost else "all",
                "all",
                f"{caught}/{len(mine_all)}",
            )
        )
    return section


def _shown(verdict: Verdict) -> Cell:
    return "error" if verdict.errors and not verdict.margin > 1.0 else verdict.margin


def _recorded() -> Section:
    """Return the recorded run, with its date and versions."""
    record: dict[str, Any] = json.loads(
        files("compare").joinpath("records/mutants-cpu.json").read_text("utf-8")
    )
    *_, campaign = record["sections"]
    words = [block for block in campaign["blocks"] if isinstance(block, str)]
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
            f"`python -m {record['command']}` on {record['date'][:10]}, on the CPU, with {versions}; not run now.",
            words[-1],
            Grid(grid["title"], grid["columns"], rows),
        ],
    )
