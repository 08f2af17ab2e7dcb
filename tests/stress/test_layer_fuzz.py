"""Drawn pairs of layers are refused or equal; a silent difference would be seen."""

from pathlib import Path
from typing import Any

import pytest

from compare.conversion.errors import ConversionError
from compare.conversion.match import match
from compare.stress import layer_fuzz
from compare.stress.layer_fuzz import Counts, judge
from compare.stress.layer_pairs import FAMILIES

GOOD = {"refused", "equal", "warned"}


QUICK = ("linear and one-point convolutions",)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.again) for name in FAMILIES],
)
@pytest.mark.usefixtures("float64_by_default")
def test_no_pair_differs_silently(family: str, tmp_path: Path) -> None:
    verdicts = [judge(number, family, tmp_path) for number in range(12)]
    assert not [verdict for verdict in verdicts if verdict.outcome not in GOOD]
    assert any(verdict.outcome == "equal" for verdict in verdicts), verdicts


@pytest.mark.parametrize(
    "family",
    [
        "activations",
        *(
            pytest.param(name, marks=pytest.mark.again)
            for name in ("convolutions", "norms", "attention")
        ),
    ],
)
@pytest.mark.usefixtures("float64_by_default")
def test_a_difference_that_is_let_through_is_seen(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(*arguments: Any, **options: Any) -> Any:
        try:
            return match(*arguments, **options)
        except ConversionError:
            return match(*arguments, **options, policy={"layer.*": "ignore"})

    monkeypatch.setattr(layer_fuzz, "match", careless)
    monkeypatch.setattr(layer_fuzz, "_NNX", (layer_fuzz.by_mapping,))
    verdicts = [judge(number, family, tmp_path) for number in range(30)]
    bad = [verdict.outcome for verdict in verdicts if verdict.outcome not in GOOD]
    assert any("outputs" in outcome for outcome in bad), verdicts


def test_what_is_bad_is_shown_with_its_number() -> None:
    counts = {family: Counts() for family in FAMILIES}
    counts["norms"].outcomes["bad"] += 1
    counts["norms"].bad[7] = "by_mapping: LayerNorm: outputs differs by 1"
    section = layer_fuzz._section(1, 0, counts)
    assert "Pair 7: by_mapping: LayerNorm: outputs differs by 1" in section.blocks
    assert [check.held for check in section.checks] == [False]


@pytest.mark.again
def test_the_command_judges_in_processes() -> None:
    *progress, section = layer_fuzz.sections(8)
    assert progress[-1] == "8 of 8 pairs, 0 bad"
    assert section.checks[0].held  # type: ignore[union-attr]
