"""Fully blocked rows give NaN, as in the formula, but no product ever sees that NaN."""

import warnings
from typing import Any, get_args

import numpy as np
import pytest
import torch

import torch_impl
from torch_impl.closed_rows import _open_masks, closed_rows, guarded_projection
from torch_impl.dispatch import Implementation

from ..support import sum_of_squares
from .products import LeakingProducts, WatchedProducts, unseen

BFLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float32, torch.float64
# "auto" takes the formula for the short lengths and the kernels for the long ones. The last strip
# of 330 tokens is not whole.
TOKENS = (5, 61, 127, 128, 330)
MULTI_HEAD: dict[str, Any] = dict(
    input_embedding_dim=7, output_embedding_dim=9, context_length=400, dropout=0.0, num_heads=3
)


def closed_masks(tokens: int) -> dict[str, torch.Tensor]:
    """Masks with closed rows: one for each layout of the kernels, and one closed strip."""
    behind = torch.arange(tokens)[:, None] - torch.arange(tokens)
    rows = torch.arange(tokens) % 37 == 3
    masks = {
        "causal": behind < 0,
        "window": (behind < 0) | (behind > 20),
        "last row": behind < -tokens,
        "open": behind < -tokens,
        "all": behind >= -tokens,
    }
    for name in ("causal", "window", "open"):
        masks[name] = masks[name] | rows[:, None]
    masks["last row"][-1] = True
    masks["a strip"] = (behind < 0) | (torch.arange(tokens) // 64 == (tokens - 1) // 64)[:, None]
    return {name: mask.float() * -2.5 for name, mask in masks.items()}


# A plain run takes every second mask of the longer ones.
CASES = [
    pytest.param(tokens, name, marks=[pytest.mark.again] * (tokens > 127 and place % 2))
    for tokens in TOKENS
    for place, name in enumerate(closed_masks(5))
]


def drawn(tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    random = np.random.default_rng(tokens)
    return [torch.from_numpy(random.standard_normal((2, 2, tokens, 6))).to(dtype) for _ in range(4)]


def everything(
    heads: list[torch.Tensor], mask: torch.Tensor, dropout: Any, implementation: Any
) -> list[torch.Tensor]:
    """Outputs, gradients and second derivatives.

    The cotangent is NaN in closed rows, because a loss of NaN outputs is NaN.
    """
    torch.manual_seed(0)
    leaves = [tensor.clone().requires_grad_() for tensor in heads[:3]]
    queries, keys, values = leaves
    outputs = torch_impl.masked_attention(queries, keys, values, mask, dropout, implementation)
    cotangent = heads[3].masked_fill(outputs.isnan(), torch.nan)
    first = torch.autograd.grad(outputs, leaves, cotangent, retain_graph=True)
    again = torch.autograd.grad(outputs, leaves, cotangent, create_graph=True)
    second = torch.autograd.grad(sum_of_squares(again[:2]), leaves)
    return [tensor.detach() for tensor in (outputs, *first, *second)]


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether NaN stands in the same places and all other entries are close in float64."""
    return torch.allclose(left, right, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize(
    "dropout",
    [pytest.param(None, marks=pytest.mark.again), torch.nn.Dropout(0.2)],
    ids=["no dropout", "dropout"],
)
@pytest.mark.parametrize(("tokens", "name"), CASES)
@pytest.mark.slow
def test_no_product_sees_what_is_not_finite(tokens: int, name: str, dropout: Any) -> None:
    mask = closed_masks(tokens)[name]
    expected = everything(drawn(tokens, FLOAT64), mask, dropout, "reference")
    for dtype in (FLOAT64, FLOAT32, BFLOAT16):
        for implementation in ("auto", "fused"):
            with unseen(WatchedProducts()) as watched:
                found = everything(drawn(tokens, dtype), mask, dropout, implementation)
            assert watched.count >= 4
            assert not watched.not_finite
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one.isnan(), other.isnan())
                assert dtype != FLOAT64 or same(one, other)


def test_the_watch_sees_the_formulas_nan() -> None:
    with unseen(WatchedProducts()) as watched:
        everything(drawn(61, FLOAT64), closed_masks(61)["causal"], None, "reference")
    assert {name for name, _ in watched.not_finite} == {"bmm"}


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_leaking_product_reaches_no_other_row(tokens: int) -> None:
    mask = closed_masks(tokens)["causal"]
    heads = drawn(tokens, BFLOAT16)
    closed = (mask != 0).all(dim=1)
    for implementation in ("auto", "fused"):
        expected = everything(heads, mask, None, implementation)
        with unseen(LeakingProducts()):
            found = everything(heads, mask, None, implementation)
        assert all(
            torch.equal(one.nan_to_num(7), other.nan_to_num(7))
            for one, other in zip(found, expected, strict=True)
        )
        assert torch.equal(found[0].isnan().all(dim=-1), closed.expand(2, 2, tokens))
    queries, keys, values, _ = heads
    with unseen(LeakingProducts()):
        formula = torch_impl.reference_attention(queries, keys, values, mask)
    assert int(formula.isnan().all(dim=-1).sum()) > 4 * int(closed.sum()), (
        "the formula does not leak here, so this test could not fail"
    )


@pytest.mark.parametrize("tokens", TOKENS)
def test_heads_are_joined_without_it(tokens: int) -> None:
    """The product of `out_proj` sees no NaN either, and its gradients are the formula's."""
    mask = torch.zeros(400, 400)
    mask[:tokens, :tokens] = closed_masks(tokens)["causal"]
    inputs = torch.from_numpy(np.random.default_rng(0).standard_normal((2, tokens, 7)))
    found = {}
    for implementation in ("auto", "fused", "reference"):
        torch.manual_seed(0)
        module = torch_impl.CausalMultiHeadAttention(
            **MULTI_HEAD, implementation=implementation
        ).double()
        module.mask.copy_(mask)
        with unseen(WatchedProducts()) as watched:
            outputs = module(inputs)
        assert bool(watched.not_finite) is (implementation == "reference")
        gradients = torch.autograd.grad(outputs.sum(), list(module.parameters()))
        found[implementation] = [outputs.detach(), *gradients]
        if implementation != "reference":
            with unseen(LeakingProducts()):
                halves = module.bfloat16()(inputs.bfloat16())
            assert torch.equal(halves.isnan(), outputs.isnan())
    for implementation in ("auto", "fused"):
        assert all(
            same(one, other)
            for one, other in zip(found[implementation], found["reference"], strict=True)
        )


def test_a_projection_of_ones_own_is_called_as_it_is() -> None:
    module = torch_impl.CausalMultiHeadAttention(**MULTI_HEAD)
    module.out_proj = torch.nn.Sequential(module.out_proj, torch.nn.Identity())  # type: ignore[assignment]
    module.mask[2] = 1.0
    assert module(torch.ones(1, 5, 7)).isnan().all(dim=-1).tolist() == [
        [False, False, True, False, False]
    ]


def test_a_projection_that_is_not_square() -> None:
    linear = torch.nn.Linear(3, 5, dtype=FLOAT64)
    inputs = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 4, 3)))
    inputs[:, 1] = torch.nan
    closed = torch.tensor([[False], [True], [False], [False]])
    assert same(guarded_projection(linear, inputs, closed), linear(inputs))


def test_a_closed_row_whose_weights_are_dropped_adds_nothing() -> None:
    queries, keys, *_ = drawn(5, FLOAT64)
    values, mask = torch.zeros_like(keys), closed_masks(5)["causal"]
    outputs = torch_impl.masked_attention(queries, keys, values, mask, torch.zeros_like)
    assert torch.equal(outputs, values)


def test_under_transforms() -> None:
    """Transforms hide the values of the mask, so every mask then takes the same steps."""
    queries, keys, values, _ = drawn(61, FLOAT64)
    masks = torch.stack([closed_masks(61)["causal"], torch.triu(torch.ones(61, 61), 1)])
    reference, attend = torch_impl.reference_attention, torch_impl.masked_attention
    expected = torch.stack([reference(queries, keys, values, mask) for mask in masks])
    assert same(torch.vmap(lambda mask: attend(queries, keys, values, mask))(masks), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced: Any = torch.jit.trace(
            lambda queries, keys, values, mask: attend(queries, keys, values, mask),
            (queries, keys, values, masks[1]),
        )
    for mask, one in zip(masks, expected, strict=True):
        outputs = traced(queries, keys, values, mask)  # a trace takes head_dim's root in float32
        assert torch.allclose(outputs, one, rtol=1e-6, atol=1e-6, equal_nan=True)

    def loss(queries: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attend(queries, keys, values, mask).nan_to_num().sum()

    gradient = torch.func.grad(loss)(queries, masks[0])
    leaf = queries.clone().requires_grad_()
    formula = reference(leaf, keys, values, masks[0]).nan_to_num().sum()
    assert same(gradient, torch.autograd.grad(formula, leaf)[0])
    with torch.autocast("cpu", BFLOAT16), unseen(WatchedProducts()) as watched:
        halves = attend(queries.float(), keys.float(), values.float(), masks[0])
    assert not watched.not_finite
    assert halves.dtype == BFLOAT16
    assert torch.equal(halves.isnan(), expected[0].isnan())


def test_an_edit_that_closes_a_row_is_seen() -> None:
    mask = torch.triu(torch.ones(20, 20), 1)
    assert closed_rows(mask, 7, FLOAT32) is None
    assert closed_rows(mask, 7, FLOAT32) is None, "the cached result is different"
    mask[3] = 1.0
    assert closed_rows(mask, 3, FLOAT32) is None, "row 3 is closed, but 3 tokens do not use it"
    assert closed_rows(mask, 7, FLOAT32).nonzero().tolist() == [[3, 0]]  # type: ignore[union-attr]
    mask[3] = 0.0
    assert closed_rows(mask, 7, FLOAT32) is None
    mask.data[5] = 1.0  # this edit leaves the version counter as it was
    assert closed_rows(mask, 7, BFLOAT16).nonzero().tolist() == [[5, 0]]  # type: ignore[union-attr]
    with torch.inference_mode():
        inferred = mask.clone()
        assert closed_rows(inferred, 7, FLOAT32) is not None
        inferred[5] = 0.0
        assert closed_rows(inferred, 7, FLOAT32) is None


def test_a_mask_that_is_gone_is_forgotten() -> None:
    mask = torch.zeros(4, 4)
    closed_rows(mask, 4, FLOAT32)
    key = id(mask)
    assert key in _open_masks
    del mask
    assert key not in _open_masks


def test_without_tokens() -> None:
    empty = torch.zeros(2, 0, 4)
    for implementation in get_args(Implementation):
        outputs = torch_impl.masked_attention(
            empty, empty, empty, torch.zeros(5, 5), None, implementation
        )
        assert outputs.numel() == 0
