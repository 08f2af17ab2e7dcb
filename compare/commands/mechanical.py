"""Change the sources mechanically, one small change at a time, and run the tests on each."""

import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from ..mutants.mechanical import MechanicalMutant, mechanical_mutants
from ..report.model import Cell, Check, Section, Table
from ..subprocesses import ROOT, ChildError
from .mechanical_copies import WORKERS, Workers

MARKS = ROOT / "compare" / "mutants" / "equivalent.toml"
# The share of the mutants that must be killed or marked, by top-level folder.
SHARES = {"torch_impl": 1.0, "flax_impl": 1.0, "compare": 0.95}
# Folders of tests beside the one that mirrors a folder of compare.
MORE_TESTS = {"checkpoint": ("tests/hostile",)}
# How long the tests of one mutant may take.
TEST_SECONDS = 120.0
# A mutant that takes this much longer than its tests do without a change does not end.
MORE_SECONDS, TIMES = 60.0, 5.0


class Verdict(NamedTuple):
    """What the tests say about one mutant.

    Attributes:
        mutant: the change.
        killed_by: the test that fails; None if all pass.
        tests: the number of tests that run the changed statement.
        reason: why no test can fail, if it is marked so.
    """

    mutant: MechanicalMutant
    killed_by: str | None
    tests: int
    reason: str | None

    @property
    def is_settled(self) -> bool:
        """Whether a test fails, or the mutant is marked; not both."""
        return (self.killed_by is None) == (self.reason is not None)


@dataclass
class LinesOfTests:
    """Which tests run which lines of which file, and the seconds that each test takes."""

    lines: dict[str, dict[int, set[str]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)

    def add(self, answer: dict[str, Any]) -> None:
        """Add the answer of one measurement."""
        self.seconds |= answer["seconds"]
        for file, lines in answer["lines"].items():
            of_file = self.lines.setdefault(file, {})
            for line, tests in lines.items():
                of_file.setdefault(int(line), set()).update(tests)

    def _rarest(self, file: str) -> dict[str, int]:
        """Return for each test how many tests run the line of the file that the fewest run."""
        rarest: dict[str, int] = {}
        for tests in self.lines.get(file, {}).values():
            rarest |= {test: min(len(tests), rarest.get(test, len(tests))) for test in tests}
        return rarest

    def tests_of(self, mutant: MechanicalMutant) -> list[str]:
        """Return the tests that run the changed statement, the most promising first.

        These are quick, or killed before, or run a line of the file that few others run. What runs
        when the module is imported concerns all tests of the file. The tests stop at
        `TEST_SECONDS`: a mutant that later tests would kill counts as one that survived.
        """
        lines = self.lines.get(mutant.file, {})
        tests = set().union(*(lines.get(line, set()) for line in mutant.lines))
        if not tests:
            tests = set().union(*lines.values())
        rarest = self._rarest(mutant.file)
        ordered = sorted(
            tests,
            key=lambda test: (self.seconds[test] * rarest[test] / (1 + self.kills[test]), test),
        )
        ends = accumulate(self.seconds[test] for test in ordered)
        return [
            test
            for index, (test, end) in enumerate(zip(ordered, ends, strict=True))
            if end <= TEST_SECONDS or not index
        ]


def sections(
    files: Sequence[Path] = (), *, draw: int | None = None, seed: int = 0
) -> Iterator[Section | str]:
    """Yield the progress, then one section with every mutant that no test kills.

    Args:
        files: the files and folders to change; `torch_impl` and `flax_impl` if empty.
        draw: how many mutants to draw, of each statement in turn; all if None.
        seed: the random seed of the draw.

    Raises:
        ChildError: the tests fail without a change, or cannot run.
    """
    sources = python_files(files or [ROOT / "torch_impl", ROOT / "flax_impl"])
    mutants = [
        mutant
        for file in sources
        for mutant in mechanical_mutants(file, (ROOT / file).read_text(encoding="utf-8"))
    ]
    if draw is not None:
        mutants = drawn(mutants, draw, seed)
    verdicts: list[Verdict] = []
    with ExitStack() as stack:
        # On Ctrl-C the waiting requests are cancelled first, then the workers end, then the pool.
        pool = stack.enter_context(ThreadPoolExecutor(WORKERS))
        workers = Workers(stack)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        test_map = LinesOfTests()
        folders = test_folders(sources)
        yield f"which test runs which line: {', '.join(folders)}"
        measured = sorted({file.split("/")[0] for file in sources})
        request = {"measure": measured}
        for answer in pool.map(lambda tests: workers.ask({**request, "tests": [tests]}), folders):
            if answer.get("code") not in (0, 5):  # 5: no test in the folder
                failed = answer.get("failed") or ["pytest itself"]
                raise ChildError(
                    f"without a change these fail, mend them first: {', '.join(failed)}"
                )
            test_map.add(answer)
        reasons = marks()
        futures = [
            pool.submit(_judge, workers, test_map, reasons, mutant, mutant.source())
            for mutant in mutants
        ]
        for future in as_completed(futures):
            verdicts.append(future.result())
            survivors = sum(verdict.killed_by is None for verdict in verdicts)
            yield f"{len(verdicts)} of {len(mutants)} mutants, {survivors} survived"
    verdicts.sort(key=lambda verdict: (verdict.mutant.file, verdict.mutant.line))
    yield _section(verdicts, folders)


def drawn(mutants: Sequence[MechanicalMutant], number: int, seed: int) -> list[MechanicalMutant]:
    """Draw one mutant of each statement, then another one of each, until there are enough.

    The draw depends on the mutants' names alone: a change elsewhere draws no others here.
    """
    places = {mutant.name: crc32(f"{seed} {mutant.name}".encode()) for mutant in mutants}
    turns: Counter[tuple[str, range]] = Counter()
    by_turn = []
    for mutant in sorted(mutants, key=lambda mutant: (places[mutant.name], mutant.name)):
        statement = mutant.file, mutant.lines
        by_turn.append((turns[statement], places[mutant.name], mutant.name))
        turns[statement] += 1
    names = {name for *_, name in sorted(by_turn)[:number]}
    return [mutant for mutant in mutants if mutant.name in names]


def python_files(paths: Sequence[Path]) -> list[str]:
    """Return the Python files among and below the paths, relative to the repository's root."""
    files = {
        file.resolve().relative_to(ROOT).as_posix()
        for path in paths
        for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])
    }
    return sorted(files)


def test_folders(sources: Sequence[str]) -> list[str]:
    """Return the folders of tests that mirror the packages of the sources."""
    folders: set[str] = set()
    for source in sources:
        package, *rest = source.split("/")
        if package != "compare":
            folders |= {"tests/modules", "tests/checks", "tests/runners"}
        elif len(rest) > 1 and (ROOT / "tests" / rest[0]).is_dir():
            folders |= {f"tests/{rest[0]}", *MORE_TESTS.get(rest[0], ())}
        else:
            folders.add("tests/commands")
    return sorted(folders)


def marks() -> dict[str, str]:
    """Return the reasons why no test can kill certain mutants, by the mutants' names."""
    with MARKS.open("rb") as file:
        return {
            name: mark["reason"] for mark in tomllib.load(file)["mark"] for name in mark["mutants"]
        }


def _judge(
    workers: Workers,
    test_map: LinesOfTests,
    reasons: dict[str, str],
    mutant: MechanicalMutant,
    source: str,
) -> Verdict:
    """Run the tests of a mutant, whose file has this source, until one fails."""
    tests = test_map.tests_of(mutant)
    killed_by = None
    if tests:
        seconds = MORE_SECONDS + TIMES * sum(test_map.seconds[test] for test in tests)
        answer = workers.ask(
            {"file": mutant.file, "source": source, "tests": tests, "seconds": seconds}
        )
        killed_by = answer["killed_by"]
        if killed_by in test_map.seconds:
            test_map.kills[killed_by] += 1
    return Verdict(mutant, killed_by, len(tests), reasons.get(mutant.name))


def _section(verdicts: Sequence[Verdict], folders: Sequence[str]) -> Section:
    """Count the mutants of each file, list those that survived, and check each package's share."""
    counts: list[list[Cell]] = []
    for file in dict.fromkeys(verdict.mutant.file for verdict in verdicts):
        here = [verdict for verdict in verdicts if verdict.mutant.file == file]
        killed = sum(verdict.killed_by is not None for verdict in here)
        marked = sum(verdict.reason is not None for verdict in here)
        unsettled = sum(not verdict.is_settled for verdict in here)
        counts.append([file, len(here), killed, marked, unsettled])
    survivors: list[list[Cell]] = [
        [
            verdict.mutant.line,
            verdict.mutant.name,
            verdict.tests,
            verdict.reason or "",
        ]
        for verdict in verdicts
        if verdict.killed_by is None
    ]
    section = Section(
        f"{len(verdicts)} mechanical mutants",
        [
            "Each is one change: an operator, a number, a bound, an argument exchanged or left "
            "out, a statement deleted. Run on each are the tests of "
            f"{', '.join(folders)} that run the changed statement. A mutant is killed if one of "
            f"them fails within {TEST_SECONDS:.0f} s. One that computes the same, or only faster "
            "or slower, is marked in "
            "compare/mutants/equivalent.toml with the reason.",
            Table(["file", "mutants", "killed", "marked", "neither or both"], counts),
            "The mutants that no test killed:",
            Table(["line", "mutant", "tests", "reason"], survivors),
        ],
    )
    for package, share in SHARES.items():
        here = [verdict for verdict in verdicts if verdict.mutant.file.startswith(f"{package}/")]
        if here:
            settled = sum(verdict.is_settled for verdict in here)
            wrongly_marked = [
                verdict.mutant.name
                for verdict in here
                if verdict.reason is not None and verdict.killed_by is not None
            ]
            section.checks.append(
                Check(
                    "killed or marked",
                    package,
                    settled >= share * len(here) and not wrongly_marked,
                    f"killed although marked: {', '.join(wrongly_marked)}"
                    if wrongly_marked
                    else f"{settled / len(here):.1%}",
                    f"at least {share:.0%}",
                    f"{settled}/{len(here)}",
                )
            )
    return section
