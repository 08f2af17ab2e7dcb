"""The fused path under every kind of layout, any strides, and each choice of gradients."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import torch_impl
from torch_impl import mask_layout

from ..support import sum_of_squares
from .test_fused import HEADS, TORCH_TOKENS, in_torch, judge, judge_gradients, torch_gradients

SEEDS = (0, 1)
KINDS = ("causal", "open", "strips", "strips, closed", "wide", "wide, closed")


def mask_of(kind: str, seed: int) -> np.ndarray:
    """Draw a mask of this kind of layout; the strips of a closed one have a row without keys."""
    random = np.random.default_rng(seed)
    positions = np.arange(TORCH_TOKENS)
    behind = positions[:, None] - positions
    if kind.startswith("strips"):
        mask = (behind < 0) | (behind > random.integers(1, 60))
    elif kind.startswith("wide"):
        mask = random.random((TORCH_TOKENS, TORCH_TOKENS)) < 0.3
        mask[positions, positions] = False
    else:
        mask = behind < 0 if kind == "causal" else np.zeros(behind.shape, bool)
    if kind.endswith("closed"):
        mask[random.choice(TORCH_TOKENS, 4, replace=False)] = True
    drawn = mask.astype(np.float32) * np.float32(random.choice([1.0, -2.0, 1e-42, np.nan]))
    drawn = np.where(mask, drawn, np.float32(0))
    layout = mask_layout.examine(torch.from_numpy(drawn)).layout(TORCH_TOKENS)
    assert layout.kind == kind.partition(",")[0]
    assert (layout.closed is not None) == kind.endswith("closed")
    return drawn


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_of_each_kind(kind: str, seed: int) -> None:
    heads, mask = HEADS[:, :, :TORCH_TOKENS], mask_of(kind, seed)
    judge(in_torch(heads[:3], mask, implementation="fused"), heads[:3], mask)
    judge_gradients(torch_gradients(heads, mask), heads, mask)


def _gaps(array: torch.Tensor) -> torch.Tensor:
    wide = torch.randn(*array.shape[:-1], 2 * array.shape[-1], dtype=array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def _overlapping(array: torch.Tensor) -> torch.Tensor:
    """Rows that share most of their memory: each begins one number after the one before."""
    heads, tokens, width = array.shape
    flat = array.flatten()[: heads * tokens + width].clone()
    return flat.as_strided((heads, tokens, width), (tokens, 1, 1))


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda array: array.contiguous(),
    "transposed": lambda array: array.mT.contiguous().mT,
    "gaps": _gaps,
    "one head for all": lambda array: array[:1].expand_as(array),
    "one token for all": lambda array: array[:, :1].expand_as(array),
    "overlapping": _overlapping,
    "channels last": lambda array: array.transpose(0, 1).contiguous().transpose(0, 1),
    "from behind": lambda array: array.flip(1).contiguous().flip(1),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("kind", ["causal", "strips, closed", "wide, closed", "wide"])
def test_heads_of_any_strides(kind: str, name: str) -> None:
    mask = torch.from_numpy(mask_of(kind, 0))
    heads = [VIEWS[name](torch.from_numpy(array)) for array in HEADS[:3, :, :TORCH_TOKENS]]
    plain = np.stack([tensor.contiguous().numpy() for tensor in heads])
    queries, keys, values = heads
    outputs = torch_impl.masked_attention(queries, keys, values, mask, implementation="fused")
    judge(outputs.numpy(), plain, mask.numpy())
    # The same bits do not depend on strides in the backward pass either, up to rounding.
    cotangent = VIEWS[name](torch.from_numpy(HEADS[3, :, :TORCH_TOKENS]))
    with_four = np.concatenate([plain, cotangent.contiguous().numpy()[None]])
    leaves = [tensor.detach().requires_grad_() for tensor in heads]
    queries, keys, values = leaves
    outputs = torch_impl.masked_attention(queries, keys, values, mask, implementation="fused")
    gradients = torch.autograd.grad(outputs, leaves, cotangent)
    judge_gradients([gradient.numpy() for gradient in gradients], with_four, mask.numpy())


CHOICES = [choice for choice in product((False, True), repeat=3) if any(choice)]


@pytest.mark.parametrize(
    "needed", CHOICES, ids=lambda needed: "".join("nq"[int(x)] for x in needed)
)
@pytest.mark.parametrize("kind", ["causal", "strips", "wide"])
def test_derivatives_of_some_inputs_only(kind: str, needed: tuple[bool, ...]) -> None:
    """First and second derivatives where only some of queries, keys and values need one."""
    mask = torch.from_numpy(mask_of(kind, 1))
    cotangent = torch.from_numpy(HEADS[3, :, :TORCH_TOKENS])

    def derivatives(attend: Callable[..., torch.Tensor], **options: Any) -> list[torch.Tensor]:
        heads = [
            torch.tensor(array, requires_grad=is_needed)
            for array, is_needed in zip(HEADS[:3, :, :TORCH_TOKENS], needed, strict=True)
        ]
        leaves = [tensor for tensor in heads if tensor.requires_grad]
        outputs = attend(*heads, mask, **options)
        first = torch.autograd.grad(outputs, leaves, cotangent, create_graph=True)
        if not any(gradient.requires_grad for gradient in first):
            return [*first]  # the outputs are linear in the values
        second = torch.autograd.grad(sum_of_squares(first), leaves, allow_unused=True)
        zeros = [torch.zeros_like(leaf) for leaf in leaves]
        return [
            *first,
            *(zero if one is None else one for one, zero in zip(second, zeros, strict=True)),
        ]

    ours = derivatives(torch_impl.masked_attention, implementation="fused")
    formula = derivatives(torch_impl.reference_attention)
    for found, expected in zip(ours, formula, strict=True):
        found, expected = found.detach(), expected.detach()
        scale = float(expected.abs().max())
        # Both sides sum at most 2 * TORCH_TOKENS products, each with a few roundings.
        limit = 16 * TORCH_TOKENS * 2.0**-53 * max(scale, 1.0)
        assert float((found - expected).abs().max()) <= limit


@pytest.mark.parametrize("implementation", ["auto", "fused", "reference"])
@pytest.mark.parametrize("tokens", [5, 127, 128, 256])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_without_values(tokens: int, implementation: Any) -> None:
    """On the meta device, with fake tensors, and exported: only shapes are known."""
    for make in (torch_impl.CausalAttentionWithBuffer, torch_impl.CausalMultiHeadAttention):
        heads = (2,) if make is torch_impl.CausalMultiHeadAttention else ()

        def build(make: Any = make, heads: tuple[int, ...] = heads) -> torch.nn.Module:
            module = make(8, 8, 256, 0.0, *heads, implementation=implementation)
            return module.eval()

        outputs = build().to("meta")(torch.empty(2, tokens, 8, device="meta"))
        assert outputs.is_meta and outputs.shape == (2, tokens, 8)
        with torch._subclasses.fake_tensor.FakeTensorMode():
            assert build()(torch.empty(2, tokens, 8)).shape == (2, tokens, 8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_exported_module_obeys_its_mask() -> None:
    module = torch_impl.CausalAttentionWithBuffer(8, 8, 256, 0.0).eval()
    inputs = torch.randn(2, 130, 8)
    exported: Any = torch.export.export(module, (inputs,)).module()
    with torch.no_grad():
        for target in (module, exported):
            target.mask[5] = 1.0
            target.mask[7, 9] = 0.0
        found, expected = exported(inputs), module(inputs)
    assert torch.equal(found.isnan(), expected.isnan())
    limit = 130 * 2.0**-24 * float(expected.nan_to_num().abs().max())
    assert float((found - expected).nan_to_num().abs().max()) <= limit
