"""Bugs that were thought up without a look at the catalogue, each with a check that sees it."""

import pytest

from compare.checks import CHECKS
from compare.commands.checks import sections
from compare.commands.mutants import judge
from compare.mutants import Mutant, planted
from compare.proof.cases import Framework
from compare.report.model import Section

ATTENTION = {"torch": "torch_impl.attention", "linen": "flax_impl.attention"}
LAYER = {"torch": "torch_impl.causal_attention", "linen": "flax_impl.linen.causal_attention"}
SCORES = r"scores = queries @ keys\.mT"

# check, framework, module, pattern, replacement
BUGS: dict[str, tuple[str, Framework, str, str, str]] = {
    "dropout in eval above one half": (
        *("modes", "torch", LAYER["torch"], r"dropout = dropping\(self\.dropout\)"),
        "dropout = dropping(self.dropout) if self.dropout.p <= 0.5 else "
        "(lambda weights: nn.functional.dropout(weights, self.dropout.p))",
    ),
    "the same pattern at every call": (
        *("modes", "torch", LAYER["torch"], r"dropout = dropping\(self\.dropout\)"),
        "import torch; torch.manual_seed(0); dropout = dropping(self.dropout)",
    ),
    "an edited mask ignored in training": (
        *("modes", "torch", LAYER["torch"], r"self\.mask, dropout"),
        "(causal_mask(self.context_length) if self.training else self.mask), dropout",
    ),
    "a gradient doubled in float16 alone": (
        *("dtypes", "torch", "torch_impl.fused", r"grads = flash_backward\(\n"),
        "grads = (lambda *a: tuple(x * (1 + (x.dtype == torch.float16)) "
        "for x in flash_backward(*a)))(\n",
    ),
    "float32 returned for bfloat16": (
        *("dtypes", "torch", ATTENTION["torch"], r"return (dropout\(weights\) @ values)"),
        r"return (\1).float() if values.dtype == torch.bfloat16 else \1",
    ),
    "float32 returned for bfloat16 in Flax": (
        *("dtypes", "linen", ATTENTION["linen"], r"return (dropout\(weights\) @ values)"),
        r"return (\1).astype('f4') if values.dtype == jnp.bfloat16 else \1",
    ),
    "wrong beyond 64 tokens": (
        *("sizes", "torch", ATTENTION["torch"], SCORES),
        "scores = queries @ keys.mT * (1.01 if num_tokens > 64 else 1)",
    ),
    "wrong beyond 128 tokens in Flax": (
        *("sizes", "linen", ATTENTION["linen"], SCORES),
        "scores = queries @ keys.mT * (1.01 if num_tokens > 128 else 1)",
    ),
    "the scale of at most 64": (
        *("sizes", "torch", ATTENTION["torch"], r"head_dim\*\*0\.5", "min(head_dim, 64)**0.5"),
    ),
    "heads mixed up if there are many": (
        *("sizes", "torch", "torch_impl.fused"),
        r"rows = slice\(strip\.start, strip\.stop\)\n    scale",
        "rows = slice(strip.start, strip.stop)\n"
        "    keys = keys.roll(1, 0) if len(keys) > 16 else keys\n    scale",
    ),
    "NaN opens": (
        *("stages", "torch", ATTENTION["torch"], r"\.bool\(\)", ".nan_to_num(0).bool()"),
    ),
    "NaN opens in Flax": (
        *("stages", "linen", ATTENTION["linen"], r"return bits << 1 != 0"),
        "return (bits << 1 != 0) & ~jnp.isnan(mask)",
    ),
}


@pytest.mark.parametrize("name", BUGS)
@pytest.mark.slow
def test_its_check_sees_it(name: str) -> None:
    check, framework, module, pattern, replacement = BUGS[name]
    mutant = Mutant(name, framework, module, ((pattern, replacement),))
    verdict = judge(mutant, [check], first=True)
    assert verdict.caught_by == [check] and not verdict.errors


def test_a_crash_is_the_finding_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other row is still reported."""
    raised = (r"scores = queries @ keys\.mT", "raise RuntimeError('as planted')")
    with planted(ATTENTION["torch"], [raised]):
        *_, section = sections(["outputs"], "cpu")
    assert isinstance(section, Section)
    held = {check.implementation: check.held for check in section.checks}
    assert held == {"PyTorch": False, "Flax Linen": True, "Flax NNX": True}
    (torch_row,) = [check for check in section.checks if not check.held]
    assert "raised RuntimeError: as planted" in torch_row.measured
    assert torch_row.count == "0/6", "one finding for each trial"


def test_every_check_is_one_of_the_bugs_or_of_the_catalogue() -> None:
    assert {bug[0] for bug in BUGS.values()} <= {*CHECKS}
