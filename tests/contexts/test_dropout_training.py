"""Training with dropout: the numbers of the formula, whatever is in the mask and the inputs."""

from typing import Any

import pytest
import torch

import torch_impl

from .torch_formula import LENGTHS, inputs, masks

attend: Any = torch_impl.masked_attention


@pytest.mark.parametrize("value", [1.0, torch.nan, torch.inf, 1e200])
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_bits_are_the_formulas(tokens: int, mask: str, value: float) -> None:
    found = []
    for implementation in ("auto", "fused", "reference"):
        heads: list[Any] = [inputs(tokens)[:, :, :4].clone() for _ in range(3)]
        heads[0][0, 3, 1] = value
        heads = [each.requires_grad_() for each in heads]
        torch.manual_seed(0)
        dropout = torch.nn.Dropout(0.3)
        outputs = attend(*heads, masks()[mask], dropout, implementation)
        found.append([outputs, *torch.autograd.grad(outputs.sum(), heads)])
    for theirs in found[:2]:
        for one, other in zip(theirs, found[2], strict=True):
            assert torch.equal(one.isnan(), other.isnan())
            # A closed row is left out of the products, which may change the order of their sums.
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)
            assert mask == "closed" or torch.equal(one.nan_to_num(), other.nan_to_num())


def test_a_row_that_is_closed_by_a_write_to_data_is_seen() -> None:
    mask = masks()["causal"]
    heads: list[Any] = [inputs(LENGTHS[1])[:, :, :4].clone().requires_grad_() for _ in range(3)]
    attend(*heads, mask, torch.nn.Dropout(0.3))
    mask.data[60] = 1.0
    outputs = attend(*heads, mask, torch.nn.Dropout(0.3))
    assert outputs[:, 60].isnan().all()
    grad_queries = torch.autograd.grad(outputs.nansum(), heads[0])[0]
    assert grad_queries.isfinite().all(), "as in the formula, which masks the gradients too"
