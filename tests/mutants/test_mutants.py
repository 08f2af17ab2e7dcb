"""A check catches every planted bug, and planting one leaves nothing behind."""

import json
import re
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest

import flax_impl.attention
import torch_impl
from compare.commands import mutants
from compare.commands.mutants import QUICKEST_FIRST, judge
from compare.mutants import ARGUMENT_BUGS, MUTANTS, READERS, Mutant, planted
from compare.report.model import Table

from ..support import sections_of


def planted_here() -> list[Mutant]:
    """Every twelfth of our bugs, in each framework in turn; the record has all."""
    by_name: dict[str, list[Mutant]] = {}
    for mutant in MUTANTS:
        by_name.setdefault(mutant.name, []).append(mutant)
    drawn = list(by_name.values())[::12]
    return [of_name[index % len(of_name)] for index, of_name in enumerate(drawn)]


def seen_by() -> dict[str, str]:
    """The first check that caught each bug, according to the record."""
    record = json.loads(
        files("compare").joinpath("records/mutants-cpu.json").read_text(encoding="utf-8")
    )
    grid = next(
        block
        for block in record["sections"][-1]["blocks"]
        if "planted bugs and checks" in str(block).lower()
    )
    # A check has no number if it did not run because another had already caught the bug. The last
    # that ran caught it, by a number or by an exception.
    rows = {
        name: dict(zip(grid["columns"], row, strict=True)) for name, row in grid["rows"].items()
    }
    return {
        name: [check for check in QUICKEST_FIRST if row.get(check) is not None][-1]
        for name, row in rows.items()
    }


SEEN_BY = seen_by()


def test_every_pattern_matches_its_module() -> None:
    """A bug cannot be planted in a line that has changed; `planted` would refuse it too."""
    for mutant in (*MUTANTS, *ARGUMENT_BUGS, *READERS):
        source = Path(str(import_module(mutant.module).__file__)).read_text(encoding="utf-8")
        for pattern, replacement in mutant.changes:
            changed, count = re.subn(pattern, replacement, source)
            assert count and changed != source, f"{mutant.name}: {pattern}"
            source = changed


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(mutant, marks=pytest.mark.again if "mixed tiles" in mutant.name else ())
        for mutant in planted_here()
    ],
    ids=lambda mutant: f"{mutant.name}-{mutant.implementation}",
)
@pytest.mark.slow
def test_a_check_sees_it(mutant: Mutant) -> None:
    check = SEEN_BY[f"{mutant.name} ({mutant.implementation})"]
    assert judge(mutant, [check], first=True).caught_by == [check]


@pytest.mark.parametrize(
    "mutant",
    ARGUMENT_BUGS[::7],
    ids=lambda mutant: f"{mutant.name}-{mutant.implementation}",
)
@pytest.mark.slow
def test_a_check_sees_a_bug_in_an_argument(mutant: Mutant) -> None:
    assert judge(mutant, ["fresh", "stages", "arguments"], first=True).caught_by


@pytest.mark.parametrize("mutant", READERS[90::90], ids=lambda mutant: mutant.name)
@pytest.mark.slow
def test_a_check_sees_a_readers_bug(mutant: Mutant) -> None:
    assert judge(mutant, first=True).caught_by


def test_planting_is_undone_and_needs_a_place() -> None:
    module, function = torch_impl.CausalAttentionWithBuffer, flax_impl.attention.reference_attention
    with planted("flax_impl.attention", [("queries @", "keys @")]):
        assert flax_impl.dispatch.reference_attention is not function
        assert flax_impl.attention.reference_attention is not function
    with (
        pytest.raises(RuntimeError, match="as raised"),
        planted("torch_impl.causal_attention", [("inputs", "inputs")]),
    ):
        assert torch_impl.CausalAttentionWithBuffer is not module
        raise RuntimeError("as raised")
    assert torch_impl.CausalAttentionWithBuffer is module
    assert flax_impl.dispatch.reference_attention is function
    with (
        pytest.raises(ValueError, match="does not match 'no such line'"),
        planted("torch_impl.attention", [("no such line", "")]),
    ):
        raise AssertionError


@pytest.mark.slow
def test_the_table_names_what_was_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No check catches a change without effect, and the verdict says so."""
    harmless = Mutant("harmless", "torch", "torch_impl.attention", (("queries @", "queries  @"),))
    seen = next(mutant for mutant in MUTANTS if mutant.name == "no scale")
    monkeypatch.setattr(mutants, "MUTANTS", (harmless,))
    monkeypatch.setattr(mutants, "READERS", (seen._replace(by="reader"),))
    honest, planted_bugs = sections_of(mutants.sections(configurations=2, checks=["stages"]))
    assert [check.held for check in honest.checks] == [True]
    (verdict,) = planted_bugs.checks
    assert (verdict.held, verdict.measured, verdict.count) == (False, "missed: harmless", "1/2")
    rows = next(block.rows for block in planted_bugs.blocks if isinstance(block, Table))
    assert [(row[0], row[-1]) for row in rows] == [("harmless", "ours"), (seen.name, "reader")]
