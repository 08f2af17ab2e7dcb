"""Every check holds for every implementation and device; a check of nothing is an error."""

from typing import Any

import numpy as np
import pytest

from compare.checks import CHECKS, trials_of
from compare.checks.causality import check_causality
from compare.checks.determinism import compiled_by_torch
from compare.checks.function import other_shapes
from compare.checks.stages import check_stages, first_differing_stage
from compare.commands.checks import sections
from compare.mutants import MUTANTS, Mutant, planted
from compare.proof import cases
from compare.proof.agreement import Agreement, Finding, agreement
from compare.proof.cases import FRAMEWORKS, Framework
from compare.report.model import Section
from compare.report.verdicts import settle
from compare.runners.attend import Attention

TRIALS = cases.fixed_trials()


@pytest.mark.parametrize(
    ("check", "trial"),
    [(check, trial) for check in CHECKS for trial in trials_of(check)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.again), pytest.param("cuda", marks=pytest.mark.gpu)],
    indirect=True,
)
@pytest.mark.slow
def test_it_holds(name: Framework, check: str, trial: cases.Trial, device: str) -> None:
    findings = list(CHECKS[check](name, trial, device))
    assert findings
    for finding in findings:
        assert finding.held, finding


@pytest.mark.slow
@pytest.mark.again
def test_torch_compile_computes_the_same(device: str) -> None:
    finding = compiled_by_torch(TRIALS[0], device)
    assert finding.held, finding


def catalogued(bug: str, name: Framework) -> Mutant:
    return next(mutant for mutant in MUTANTS if (mutant.name, mutant.implementation) == (bug, name))


@pytest.mark.parametrize(
    ("bug", "stage"),
    [
        ("keys and values swapped", "scores"),
        ("softmax over the queries", "weights"),
        ("keys for values", "context"),
    ],
)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_first_stage_that_parts_is_named(name: Framework, bug: str, stage: str) -> None:
    mutant = catalogued(bug, name)
    assert first_differing_stage(check_stages(name, TRIALS[0])) is None
    with planted(mutant.module, mutant.changes):
        assert first_differing_stage(check_stages(name, TRIALS[0])) == stage


@pytest.mark.parametrize(
    ("bug", "seen"),
    [
        ("fewer queries are the first tokens", {"fewer queries", "gradients of fewer queries"}),
        ("heads alternate between their keys", {"grouped heads"}),
    ],
)
@pytest.mark.parametrize("name", ["torch", pytest.param("linen", marks=pytest.mark.again)])
@pytest.mark.slow
def test_other_shapes_are_compared(name: Framework, bug: str, seen: set[str]) -> None:
    mutant = catalogued(bug, name)

    def finding(check: str, case: str, agreed: Agreement, why: str = "") -> Finding:
        return Finding(check, name, case, agreed, why)

    with planted(mutant.module, mutant.changes):
        findings = list(other_shapes(Attention(name, "cpu"), "fused", finding))
    assert {found.check for found in findings if not found.held} == seen


def test_a_failure_says_both_values_where_and_why() -> None:
    finding = Finding(
        "outputs",
        "torch",
        "a case",
        agreement(np.array([1.0, 2.5]), np.array([1.0, 2.0]), 0.25),
        "why",
    )
    assert str(finding) == (
        "outputs (torch), a case: found 2.5, expected 2.0 at (1,): error/limit 2, limit 0.25. "
        "The limit: why"
    )
    (check,) = settle([finding], "outputs")
    assert (check.held, check.count, check.measured) == (False, "0/1", str(finding))


def test_a_check_that_compared_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="gradients: nothing was compared"):
        settle([], "gradients")


def test_one_finding_beyond_its_limit_is_not_outvoted() -> None:
    good = list(check_causality("torch", TRIALS[0]))
    nan = agreement(np.array([np.nan]), np.array([1.0]), np.inf)
    for place in range(len(good) + 1):
        findings = [*good[:place], Finding("causality", "torch", "nan", nan, ""), *good[place:]]
        assert [check.held for check in settle(findings, "causality")] == [False]


@pytest.mark.slow
def test_sections_are_made_of_every_comparison() -> None:
    *_, section = sections(["causality"], "cpu")
    assert isinstance(section, Section)
    assert len(section.findings) == 3 * len(TRIALS) * 4
    assert [check.count for check in section.checks] == ["28/28"] * 3


def test_a_crash_is_the_finding_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other row is still reported."""
    raised = (r"scores = queries @ keys\.mT", "raise RuntimeError('as planted')")
    with planted("torch_impl.attention", [raised]):
        *_, section = sections(["outputs"], "cpu")
    assert isinstance(section, Section)
    held = {check.implementation: check.held for check in section.checks}
    assert held == {"PyTorch": False, "Flax Linen": True, "Flax NNX": True}
    (torch_row,) = [check for check in section.checks if not check.held]
    assert "raised RuntimeError: as planted" in torch_row.measured
    assert torch_row.count == "0/7", "one finding for each trial"


@pytest.mark.again
@pytest.mark.slow
def test_a_compiler_that_lacks_an_instruction_set_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import config
    from torch._inductor.cpp_builder import CppBuilder

    build, refused = CppBuilder.build, []

    def lacking(self: Any) -> Any:
        if config.cpp.vec_isa_ok:
            refused.append(self)
            raise RuntimeError("unrecognized option")
        return build(self)

    monkeypatch.setattr(CppBuilder, "build", lacking)
    finding = compiled_by_torch(TRIALS[0])
    assert finding.agreement.held and refused
