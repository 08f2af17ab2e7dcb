"""Attention with kernels that keep no (tokens, tokens) matrix. The mask decides which kernel runs.

    causal, open    scaled_dot_product_attention; on a CPU with gradients its flash kernel, so that
                    second derivatives work. Kept for the backward pass: out, logsumexp.
    strips, and     for each strip of 64 queries (GPU: of 512 if wide):
    wide on a GPU       weights = softmax(queries @ keys.T / sqrt(head_dim) + bias)
                        out = weights @ values, where keys and values are the strip's ranges
                    Kept: nothing but the inputs; the backward pass computes the weights again.
    wide on a CPU   for each wide strip of 512 queries:
                        out, logsumexp = flash(queries, keys, values, bias)
                    Kept: out, logsumexp.

`bias` is -inf where the mask blocks and 0 elsewhere. Closed rows are computed as if they were open,
and then filled with NaN. On a CPU, and for strips on any device, second derivatives are those of
the formula.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from .attention import causal_mask
from .closed_rows import closed_rows, find_closed, guarded_attention, is_traced
from .mask_layout import MaskLayout, Strip, mask_layout
from .private_api import HAS_KERNELS, flash, flash_backward, softmax_backward

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what the kernels take


def kernel_layout(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> MaskLayout | None:
    """Return the layout of the mask, or None if the kernels may differ from the formula.

    They may differ for inputs or scores that may not be finite (the CPU's kernel gives a finite row
    for a query of NaN, and a NaN behind the mask reaches no row), in transforms of `torch.func`,
    forward-mode differentiation, tracing and autocast, and for subclasses of Tensor. The result is
    also None if torch lacks the kernels or if they do not take the tensors.
    """
    if not HAS_KERNELS:
        return None
    if not (_are_plain(queries, keys, values, mask) and _are_finite(queries, keys, values)):
        return None
    if mask.is_inference() and torch.is_grad_enabled():  # it cannot be kept for a backward pass
        return None
    return mask_layout(mask, queries.shape[-2])


def fused_attention(
    queries: Float[Tensor, "*batch tokens head_dim"],
    keys: Float[Tensor, "*batch tokens head_dim"],
    values: Float[Tensor, "*batch tokens head_dim"],
    mask: Shaped[Tensor, "context_length context_length"],
    layout: MaskLayout,
) -> Float[Tensor, "*batch tokens head_dim"]:
    """Compute `reference_attention` in memory that is linear in the number of tokens.

    Causal and open masks use the kernel of `scaled_dot_product_attention`. Other masks are computed
    one strip of queries at a time, without the keys that are blocked for the whole strip. `layout`
    is the result of `kernel_layout` for the same arguments.
    """
    shape = queries.shape
    if layout.kind in ("strips", "wide"):
        attend = _WideStrips if layout.kind == "wide" and queries.device.type == "cpu" else _Strips
        queries, keys, values = (
            _rows_contiguous(tensor.reshape(-1, *shape[-2:])) for tensor in (queries, keys, values)
        )
        return attend.apply(queries, keys, values, mask, layout).reshape(shape)
    queries, keys, values = (_four_dims(tensor) for tensor in (queries, keys, values))
    is_causal = layout.kind == "causal"
    is_differentiated = torch.is_grad_enabled() and (
        queries.requires_grad or keys.requires_grad or values.requires_grad
    )
    if queries.device.type == "cpu" and is_differentiated:
        return _Flash.apply(queries, keys, values, is_causal).reshape(shape)
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=is_causal).reshape(shape)


def _are_plain(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> bool:
    """Return whether the kernels take the tensors, and the mask's values can be read now."""
    tensors = (queries, keys, values, mask)
    return (
        not is_traced(queries)
        and all(
            type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
            for tensor in tensors
        )
        and all(tensor.device == queries.device and not tensor.is_meta for tensor in tensors)
        and queries.dtype == keys.dtype == values.dtype
        and queries.dtype in DTYPES
        and queries.shape == keys.shape == values.shape
        and queries.numel() > 0
    )


def _are_finite(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return whether no value and no score is inf or NaN: |q . k| <= head_dim max|q| max|k|."""
    # aminmax is the fastest single pass over a tensor that also propagates NaN and inf.
    tensors = map(_in_memory_order, (queries, keys, values))
    extremes = [extreme for tensor in tensors for extreme in torch.aminmax(tensor)]
    low, high, low_key, high_key, *of_values = torch.stack(extremes).tolist()
    max_score = queries.shape[-1] * max(-low, high) * max(-low_key, high_key)
    return all(map(math.isfinite, of_values)) and max_score <= torch.finfo(queries.dtype).max


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return the tensor with heads after tokens if they lie so, where one pass is much faster."""
    tensor = tensor.detach()
    is_turned = tensor.ndim > 2 and tensor.stride(-3) < tensor.stride(-2)
    return tensor.transpose(-3, -2) if is_turned else tensor


def _four_dims(tensor: Tensor) -> Tensor:
    """Return the tensor as (batch, heads, tokens, head_dim), with a last dimension of stride 1."""
    tensor = tensor.flatten(0, -4) if tensor.ndim > 4 else tensor[(None,) * (4 - tensor.ndim)]
    return _rows_contiguous(tensor)


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor with a last dimension of stride 1: the CPU's kernels misread others."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Flash(torch.autograd.Function):
    """The CPU's flash attention. Second derivatives, which torch's own lacks, use the formula."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, is_causal: bool) -> Tensor:
        out, logsumexp = flash(queries, keys, values, 0.0, is_causal)
        ctx.save_for_backward(queries, keys, values, out, logsumexp)
        ctx.is_causal = is_causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, out, logsumexp = ctx.saved_tensors
        if torch.is_grad_enabled():
            num_tokens = grad.shape[-2]
            mask = causal_mask(num_tokens) if ctx.is_causal else torch.zeros(num_tokens, num_tokens)
            grads = _reference_gradients((queries, keys, values), mask, grad, ctx.needs_input_grad)
        else:
            grads = flash_backward(
                grad.contiguous(), queries, keys, values, out, logsumexp, 0.0, ctx.is_causal
            )
        return *grads, None


class _Strips(torch.autograd.Function):
    """Attention one strip of queries at a time. Inputs are (heads, tokens, head_dim)."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, layout: MaskLayout
    ) -> Tensor:
        ctx.save_for_backward(queries, keys, values, mask)
        ctx.layout = layout
        out = torch.full_like(queries, torch.nan)  # strips without keys stay NaN
        for strip in layout.strips:
            if strip.keys:
                weights, closed = _weights(queries, keys, mask, layout, strip)
                context = weights @ _take(values, strip)
                out[:, strip.start : strip.stop] = _filled(context, closed, torch.nan)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, mask = ctx.saved_tensors
        grads: tuple[Tensor | None, ...]
        if torch.is_grad_enabled():
            grads = _reference_gradients((queries, keys, values), mask, grad, ctx.needs_input_grad)
        else:
            grads = _strip_gradients(queries, keys, values, mask, ctx.layout, grad)
        return *grads, None, None


def _weights(
    queries: Tensor, keys: Tensor, mask: Tensor, layout: MaskLayout, strip: Strip
) -> tuple[Float[Tensor, "heads strip keys"], Bool[Tensor, "strip 1"] | None]:
    """Return the attention weights of a strip, and its closed rows, whose weights are finite."""
    blocked, closed = _blocked_pairs(mask, layout, strip)
    rows = slice(strip.start, strip.stop)
    scale = queries.shape[-1] ** -0.5
    unused = queries.new_empty(1)  # with beta=0
    scores = torch.baddbmm(unused, queries[:, rows], _take(keys, strip).mT, beta=0.0, alpha=scale)
    return torch.softmax(scores.add_(_bias(blocked, queries.dtype)), dim=-1), closed


def _strip_gradients(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, layout: MaskLayout, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values; the weights are computed again."""
    scale = queries.shape[-1] ** -0.5
    scaled_queries = queries * scale
    grad_queries, grad_keys = torch.zeros_like(queries), torch.zeros_like(keys)
    grad_values = torch.zeros_like(values)
    for strip in layout.strips:
        if strip.keys:
            rows = slice(strip.start, strip.stop)
            weights, closed = _weights(queries, keys, mask, layout, strip)
            strip_grad = _filled(grad[:, rows], closed, 0.0)
            grad_weights = strip_grad @ _take(values, strip).mT
            grad_scores = softmax_backward(grad_weights, weights, -1, weights.dtype)
            grad_queries[:, rows] = grad_scores @ _take(keys, strip)
            _add(grad_keys, strip, grad_scores.mT @ scaled_queries[:, rows])
            _add(grad_values, strip, weights.mT @ strip_grad)
    grad_queries.mul_(scale)
    if layout.closed_rows:  # in the formula, a closed row has NaN weights for every key
        grad_values.fill_(torch.nan)
    return grad_queries, grad_keys, grad_values


class _WideStrips(torch.autograd.Function):
    """Like `_Strips`, with the CPU's flash attention, which is faster if few pairs are blocked."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, layout: MaskLayout
    ) -> Tensor:
        out = torch.full_like(queries, torch.nan)  # strips without keys stay NaN
        logsumexp = queries.new_zeros(
            queries.shape[:2], dtype=torch.promote_types(queries.dtype, torch.float32)
        )
        for strip in layout.strips:
            if strip.keys:
                rows = slice(strip.start, strip.stop)
                blocked, closed = _blocked_pairs(mask, layout, strip)
                strip_out, strip_logsumexp = flash(  # it takes (batch, heads, tokens, head_dim)
                    queries[None, :, rows],
                    _take(keys, strip)[None],
                    _take(values, strip)[None],
                    0.0,
                    attn_mask=_bias(blocked, queries.dtype),
                )
                out[:, rows] = _filled(strip_out[0], closed, torch.nan)
                logsumexp[:, rows] = strip_logsumexp[0]
        ctx.save_for_backward(queries, keys, values, mask, out, logsumexp)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, mask, out, logsumexp = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _reference_gradients((queries, keys, values), mask, grad, ctx.needs_input_grad)
            return *grads, None, None
        grad = _rows_contiguous(grad)
        grad_queries, grad_keys = torch.zeros_like(queries), torch.zeros_like(keys)
        grad_values = torch.zeros_like(values)
        for strip in ctx.layout.strips:
            if strip.keys:
                rows = slice(strip.start, strip.stop)
                blocked, closed = _blocked_pairs(mask, ctx.layout, strip)
                strip_grads = flash_backward(
                    _filled(grad[:, rows], closed, 0.0)[None],
                    queries[None, :, rows],
                    _take(keys, strip)[None],
                    _take(values, strip)[None],
                    _filled(out[:, rows], closed, 0.0)[None],
                    logsumexp[None, :, rows],
                    0.0,
                    False,
                    attn_mask=_bias(blocked, grad.dtype),
                )
                grad_queries[:, rows] = strip_grads[0][0]
                _add(grad_keys, strip, strip_grads[1][0])
                _add(grad_values, strip, strip_grads[2][0])
        if ctx.layout.closed_rows:  # in the formula, a closed row has NaN weights for every key
            grad_values.fill_(torch.nan)
        return grad_queries, grad_keys, grad_values, None, None


def _blocked_pairs(
    mask: Tensor, layout: MaskLayout, strip: Strip
) -> tuple[Bool[Tensor, "strip keys"], Bool[Tensor, "strip 1"] | None]:
    """Return the blocked pairs of a strip, and its closed rows (None if the mask has none).

    Closed rows count as open among the pairs, so that the kernels compute no NaN.
    """
    blocked = _take(mask[strip.start : strip.stop].mT, strip).mT.bool()
    if not layout.closed_rows:
        return blocked, None
    closed = find_closed(blocked)
    return blocked & ~closed, closed


def _filled(rows: Tensor, closed: Bool[Tensor, "strip 1"] | None, value: float) -> Tensor:
    return rows if closed is None else rows.masked_fill(closed, value)


def _bias(blocked: Bool[Tensor, "strip keys"], dtype: torch.dtype) -> Float[Tensor, "strip keys"]:
    return torch.zeros_like(blocked, dtype=dtype).masked_fill_(blocked, -torch.inf)


def _take(tensor: Tensor, strip: Strip) -> Tensor:
    """Return the part of the tensor at the strip's keys, along the dimension before the last."""
    parts = [tensor[..., start:stop, :] for start, stop in strip.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _add(total: Tensor, strip: Strip, part: Tensor) -> None:
    """Add `part` to `total` at the strip's keys: the inverse of `_take`."""
    sizes = [stop - start for start, stop in strip.keys]
    for (start, stop), piece in zip(strip.keys, part.split(sizes, dim=-2), strict=True):
        total[..., start:stop, :] += piece


def _reference_gradients(
    heads: tuple[Tensor, Tensor, Tensor], mask: Tensor, grad: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the formula, which can be differentiated again."""
    differentiated = [tensor for tensor, is_needed in zip(heads, needed, strict=False) if is_needed]
    queries, keys, values = heads
    out = guarded_attention(
        queries, keys, values, mask, closed_rows(mask, queries.shape[-2], queries.dtype)
    )
    gradients = iter(torch.autograd.grad(out, differentiated, grad, create_graph=True))
    return tuple(next(gradients) if is_needed else None for is_needed in needed[:3])
