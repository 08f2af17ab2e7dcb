"""The report describes the processor and tells its leaking products from our bugs."""

import pytest

from compare.checks import CHECKS
from compare.commands import checks
from compare.proof import cases, tolerances
from compare.proof.cases import Trial
from compare.proof.rounding_bound import PRECISIONS
from compare.report.machine import machine
from compare.runners.products import leaking_dtypes

from ..modules.products import LeakingProducts, unseen
from ..support import sections_of


def trial(implementation: str) -> Trial:
    (closed,) = [each for each in cases.fixed_trials() if each.closed]
    return closed._replace(
        config=type(closed.config)(**{**closed.config.arguments, "implementation": implementation})
    )


def test_the_probe_sees_a_leak() -> None:
    before = leaking_dtypes()
    with unseen(LeakingProducts()):
        assert leaking_dtypes() == sorted({*before, "bfloat16"})


@pytest.mark.parametrize("implementation", ["auto", "fused"])
def test_a_leaking_processor_changes_no_output(implementation: str) -> None:
    with unseen(LeakingProducts()):
        findings = list(CHECKS["outputs"]("torch", trial(implementation), "cpu"))
    assert len(findings) == 2 * len(PRECISIONS), "outputs and their dtypes"
    assert all(finding.held for finding in findings)


@pytest.mark.slow
def test_the_check_tells_torchs_fault_from_ours() -> None:
    with unseen(LeakingProducts()):
        *others, last = sorted(
            CHECKS["outputs"]("torch", trial("reference"), "cpu"),
            key=lambda finding: not finding.held,
        )
        sections = sections_of(checks.sections(["outputs"], "cpu"))
    assert all(finding.held for finding in others)
    assert not last.held
    assert last.check == "outputs in bfloat16"
    assert "this processor's bfloat16 product leaks" in str(last)
    assert f"{tolerances.LEAKING.format(dtype='bfloat16')}." in sections[0].blocks
    assert all(check.held for check in sections[0].checks)


def test_the_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    description = machine()
    assert {"processor", "cores", "features", "system"} <= description.keys()
    assert all(description.values())
    assert description["ATEN_CPU_CAPABILITY"] == "avx2"
