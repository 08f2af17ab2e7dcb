"""Mechanical mutants: what is changed, what is drawn, which tests run, and what the verdict is."""

import ast
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compare.cli import app
from compare.commands import mechanical, mechanical_copies
from compare.commands.mechanical import ROOT, TEST_SECONDS, LinesOfTests, drawn, marks, python_files
from compare.mutants.mechanical import mechanical_mutants

from ..support import sections_of

SOURCE = '''
"""A module; 1 and 2 in it are no numbers."""
import os
LIMIT = 4

def attend(queries: "float 3", keys, scale=True):
    """Docstring 5."""
    if len(keys) > LIMIT and not scale:
        raise ValueError(f"{len(keys)} is more than {LIMIT + 1}")
    rows = queries[1:].contiguous()
    rows += matmul(rows, keys, axis=-1)
    return rows if scale else rows * 0.5
'''


def mutants() -> dict[str, str]:
    found = mechanical_mutants("a.py", SOURCE)
    return {mutant.name.removeprefix("a.py "): mutant.source() for mutant in found}


def test_every_kind_of_change_is_made() -> None:
    names = mutants()
    for name in (
        ": LIMIT = 4 -> (deleted)",
        ": 4 -> 5",
        ": 4 -> 3",
        "attend: True -> False",
        "attend: if len(keys) > LIMIT and (not scale): … -> (deleted)",
        "attend: if len(keys) > LIMIT and (not scale): … -> "
        "if not (len(keys) > LIMIT and (not scale)): …",
        "attend: len(keys) > LIMIT and (not scale) -> len(keys) > LIMIT or not scale",
        "attend: len(keys) > LIMIT and (not scale) -> len(keys) > LIMIT",
        "attend: len(keys) > LIMIT -> len(keys) >= LIMIT",
        "attend: not scale -> scale",
        "attend: raise ValueError(f'{len(keys)} is more than {LIMIT + 1}') -> (deleted)",
        "attend: queries[1:].contiguous() -> queries[1:]",
        "attend: 1: -> :",
        "attend: rows += matmul(rows, keys, axis=-1) -> (deleted)",
        "attend: matmul(rows, keys, axis=-1) -> matmul(keys, rows, axis=-1)",
        "attend: matmul(rows, keys, axis=-1) -> matmul(rows, keys)",
        "attend: -1 -> 1",
        "attend: rows if scale else rows * 0.5 -> rows",
        "attend: rows if scale else rows * 0.5 -> rows * 0.5",
        "attend: rows * 0.5 -> rows / 0.5",
        "attend: 0.5 -> 1.5",
        "attend: return rows if scale else rows * 0.5 -> (deleted)",
    ):
        assert name in names, name
    assert not any("Docstring" in name or "float 3" in name or "import" in name for name in names)


def test_each_mutant_is_another_program() -> None:
    original = ast.dump(ast.parse(SOURCE))
    for name, source in mutants().items():
        assert ast.dump(ast.parse(source)) != original, name
    assert ast.dump(ast.parse(ast.unparse(ast.parse(SOURCE)))) == original


def test_each_statement_is_drawn_before_any_is_drawn_again() -> None:
    everything = list(mechanical_mutants("a.py", SOURCE))
    statements = {mutant.lines for mutant in everything}
    few = drawn(everything, len(statements), 0)
    assert {mutant.lines for mutant in few} == statements
    assert drawn(everything, len(everything), 0) == everything
    assert few != drawn(everything, len(statements), 1)
    longer = list(mechanical_mutants("a.py", f"{SOURCE}\nmore = 3\n"))
    names = {mutant.name for mutant in drawn(longer, len(statements) + 1, 0)}
    assert {mutant.name for mutant in few} < names, "a statement elsewhere changed the draw"


def test_the_quick_tests_and_those_that_killed_come_first() -> None:
    mutant = next(mechanical_mutants("a.py", "x = 1\n\ny = 2\n"))
    tests = LinesOfTests()
    seconds = {"slow": 5.0, "quick": 1.0, "killer": 4.0, "endless": 2 * TEST_SECONDS, "other": 0.1}
    tests.add(
        {"seconds": seconds, "lines": {"a.py": {"1": ["slow", "quick", "killer", "endless"]}}}
    )
    tests.add({"seconds": {}, "lines": {"a.py": {"3": ["other"]}}})
    tests.kills["killer"] = 9
    assert tests.tests_of(mutant) == ["killer", "quick", "slow"]
    tests.lines["a.py"].pop(1)
    assert tests.tests_of(mutant) == ["other"], "what runs at import concerns each test of the file"


def test_each_mark_is_of_a_mutant_and_has_a_reason() -> None:
    reasons = marks()
    files = {name.split(" ", 1)[0] for name in reasons}
    names = {
        mutant.name
        for file in files
        for mutant in mechanical_mutants(file, (ROOT / file).read_text(encoding="utf-8"))
    }
    assert reasons.keys() <= names, "a marked line was changed: mark the new one"
    assert all(len(reason.split()) > 2 for reason in reasons.values())


@pytest.mark.slow
@pytest.mark.again
def test_a_run_names_what_survives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("coverage")
    file = Path("compare/conversion/suggest.py")
    before = (ROOT / file).read_bytes()
    monkeypatch.setattr(mechanical_copies, "WORKERS", 1)
    monkeypatch.setattr(mechanical, "test_folders", lambda _: ["tests/conversion/test_suggest.py"])
    everything = list(mechanical_mutants(str(file), before.decode()))
    monkeypatch.setattr(mechanical, "marks", lambda: {everything[0].name: "as a trial"})
    monkeypatch.setattr(mechanical, "drawn", lambda mutants, *_: [*mutants[:2], mutants[-1]])
    (section,) = sections_of(mechanical.sections([ROOT / file], draw=5))
    counts: Any = section.blocks[1]
    ((name, mutants, killed, marked, _),) = counts.rows
    assert (name, mutants, marked) == (str(file), 3, 1) and killed >= 2
    (check,) = section.checks
    assert check.implementation == "compare" and "killed although marked" in check.measured
    assert (ROOT / file).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mechanical", "--first"], "no effect beside --mechanical"),
        (["--mechanical", "--seed", "1"], "--seed has no effect without --draw"),
        (["--mechanical", "nowhere.py"], "no such file or folder"),
        (["--mechanical", "tests/support.py"], "is not in"),
        (["--mechanical", "compare/py.typed"], "is not a Python file"),
        (["torch_impl"], "need --mechanical"),
        (["--draw", "3"], "need --mechanical"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["mutants", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_folders_and_files_are_found_once() -> None:
    folder = ROOT / "torch_impl"
    files = python_files([folder, folder / "fused.py"])
    assert files.count("torch_impl/fused.py") == 1 and "torch_impl/dispatch.py" in files
