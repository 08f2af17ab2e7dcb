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
and then filled with NaN. The backward pass uses the layout of the forward pass, which has a copy of
the mask. On a CPU, and for strips on any device, second derivatives are those of the formula.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from .attention import causal_mask
from .closed_rows import guarded_attention
from .context import is_differentiated, is_transformed
from .finite import are_finite
from .mask_layout import Examined, MaskLayout, Strip, mask_layout, pack
from .private_api import HAS_KERNELS, flash, flash_backward, is_batched, softmax_backward

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what the kernels take

Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values


def kernel_layout(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> MaskLayout | None:
    """Return the layout of the mask, or None if the kernels may differ from the formula.

    They may differ for inputs or scores that may not be finite: the CPU's kernel gives a finite row
    for a query of NaN, and a NaN behind the mask reaches no row. The result is also None if torch
    lacks the kernels or if they do not take the tensors. The values of the tensors are read.
    """
    if not (kernels_take(queries, keys, values, mask) and are_finite(queries, keys, values)):
        return None
    return mask_layout(mask, queries.shape[-2])


def fused_attention(
    queries: Float[Tensor, "*batch tokens head_dim"],
    keys: Float[Tensor, "*batch tokens head_dim"],
    values: Float[Tensor, "*batch tokens head_dim"],
    layout: MaskLayout,
) -> Float[Tensor, "*batch tokens head_dim"]:
    """Compute `reference_attention` in memory that is linear in the number of tokens.

    Causal and open masks use the kernel of `scaled_dot_product_attention`. Other masks are computed
    one strip of queries at a time, without the keys that are blocked for the whole strip. `layout`
    is the result of `kernel_layout` for the same arguments.
    """
    needs_gradients = queries.device.type == "cpu" and is_differentiated(queries, keys, values)
    if layout.blocked is None and not needs_gradients:
        return _library_attention(queries, keys, values, layout)
    return _Fused.apply(queries, keys, values, layout)


def kernels_take(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> bool:
    """Return whether the kernels take tensors of these types, dtypes, devices and shapes."""
    return queries.shape == keys.shape and library_takes(queries, keys, values, mask)


def library_takes(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> bool:
    """Return the same of the library's kernel with a mask of pairs: it takes fewer queries."""
    tensors = (queries, keys, values, mask)
    return (
        HAS_KERNELS
        and all(
            type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
            for tensor in tensors
        )
        and all(tensor.device == queries.device and not tensor.is_meta for tensor in tensors)
        and queries.dtype == keys.dtype == values.dtype
        and queries.dtype in DTYPES
        and keys.shape == values.shape
        and queries.shape[:-2] == keys.shape[:-2]
        and queries.shape[-1] == keys.shape[-1]
        and queries.shape[-2] <= keys.shape[-2]
        and queries.numel() > 0
    )


def _four_dims(tensor: Tensor) -> Tensor:
    """Return the tensor as (batch, heads, tokens, head_dim), with a last dimension of stride 1."""
    tensor = tensor.flatten(0, -4) if tensor.ndim > 4 else tensor[(None,) * (4 - tensor.ndim)]
    return _rows_contiguous(tensor)


def _three_dims(tensor: Tensor) -> Tensor:
    """Return the tensor as (heads, tokens, head_dim), with a last dimension of stride 1."""
    return _rows_contiguous(tensor.reshape(-1, *tensor.shape[-2:]))


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor with a last dimension of stride 1: the CPU's kernels misread others."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Fused(torch.autograd.Function):
    """The kernels, and the formula's second derivatives."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, layout: MaskLayout
    ) -> Tensor:
        out, logsumexp = forward(queries, keys, values, layout)
        kept = () if logsumexp is None else (out, logsumexp)
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, *kept = ctx.saved_tensors
        heads = queries, keys, values
        if torch.is_grad_enabled() or is_transformed() or is_batched(grad):
            return *_reference_gradients(heads, ctx.layout, grad, ctx.needs_input_grad), None
        with torch.autocast(grad.device.type, enabled=False):
            return *gradients(heads, ctx.layout, grad, tuple(kept)), None


def forward(
    queries: Tensor, keys: Tensor, values: Tensor, layout: MaskLayout
) -> tuple[Float[Tensor, "*batch tokens head_dim"], Float[Tensor, "*batch tokens"] | None]:
    """Return the output, and the scores' logsumexp where the backward pass needs both."""
    shape = queries.shape
    if not keeps_logsumexp(queries, layout):
        if layout.blocked is None:
            return _library_attention(queries, keys, values, layout), None
        queries, keys, values = map(_three_dims, (queries, keys, values))
        return _strips(queries, keys, values, layout).reshape(shape), None
    if layout.blocked is None:
        heads = map(_four_dims, (queries, keys, values))
        out, logsumexp = flash(*heads, 0.0, layout.kind == "causal")
    else:
        queries, keys, values = map(_three_dims, (queries, keys, values))
        out, logsumexp = _wide_strips(queries, keys, values, layout)
    return out.reshape(shape), logsumexp.reshape(shape[:-1])


def keeps_logsumexp(queries: Tensor, layout: MaskLayout) -> bool:
    """Return whether `forward` returns the logsumexp, which only the CPU's kernel does."""
    return layout.kind != "strips" and queries.device.type == "cpu"


def _library_attention(
    queries: Tensor, keys: Tensor, values: Tensor, layout: MaskLayout
) -> Float[Tensor, "*batch tokens head_dim"]:
    shape, is_causal = queries.shape, layout.kind == "causal"
    queries, keys, values = map(_four_dims, (queries, keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=is_causal).reshape(shape)


def gradients(
    heads: Heads, layout: MaskLayout, grad: Tensor, kept: tuple[Tensor, ...] = ()
) -> Heads:
    """Return the gradients of queries, keys and values. `kept` is what `forward` returned."""
    shape = grad.shape
    if not kept:
        queries, keys, values, grad = map(_three_dims, (*heads, grad))
        strips = layout if layout.blocked is not None else _in_strips(layout, grad)
        grads = _strip_gradients(queries, keys, values, grad, strips)
    elif layout.blocked is None:
        queries, keys, values, grad, out = map(_four_dims, (*heads, grad, kept[0]))
        logsumexp = kept[1].reshape(queries.shape[:-1])
        is_causal = layout.kind == "causal"
        grads = flash_backward(
            grad.contiguous(), queries, keys, values, out, logsumexp, 0.0, is_causal
        )
    else:
        queries, keys, values, grad, out = map(_three_dims, (*heads, grad, kept[0]))
        logsumexp = kept[1].reshape(queries.shape[:-1])
        grads = _wide_strip_gradients(queries, keys, values, grad, out, logsumexp, layout)
    grad_queries, grad_keys, grad_values = (each.reshape(shape) for each in grads)
    return grad_queries, grad_keys, grad_values


def _strips(queries: Tensor, keys: Tensor, values: Tensor, layout: MaskLayout) -> Tensor:
    """Compute one strip of queries at a time. Inputs are (heads, tokens, head_dim)."""
    out = torch.full_like(queries, torch.nan)  # strips without keys stay NaN
    for strip in layout.strips:
        if strip.keys:
            weights, closed = _weights(queries, keys, layout, strip)
            context = weights @ _take(values, strip)
            out[:, strip.start : strip.stop] = _filled(context, closed, torch.nan)
    return out


def _weights(
    queries: Tensor, keys: Tensor, layout: MaskLayout, strip: Strip
) -> tuple[Float[Tensor, "heads strip keys"], Bool[Tensor, "strip 1"] | None]:
    """Return the attention weights of a strip, and its closed rows, whose weights are finite."""
    blocked, closed = _blocked_pairs(layout, strip)
    rows = slice(strip.start, strip.stop)
    scale = queries.shape[-1] ** -0.5
    unused = queries.new_empty(1)  # with beta=0
    scores = torch.baddbmm(unused, queries[:, rows], _take(keys, strip).mT, beta=0.0, alpha=scale)
    return torch.softmax(scores.add_(_bias(blocked, queries.dtype)), dim=-1), closed


def _strip_gradients(
    queries: Tensor, keys: Tensor, values: Tensor, grad: Tensor, layout: MaskLayout
) -> Heads:
    """Return the gradients of queries, keys and values; the weights are computed again."""
    scale = queries.shape[-1] ** -0.5
    scaled_queries = queries * scale
    grad_queries, grad_keys = torch.zeros_like(queries), torch.zeros_like(keys)
    grad_values = torch.zeros_like(values)
    for strip in layout.strips:
        if strip.keys:
            rows = slice(strip.start, strip.stop)
            weights, closed = _weights(queries, keys, layout, strip)
            strip_grad = _filled(grad[:, rows], closed, 0.0)
            grad_weights = strip_grad @ _take(values, strip).mT
            grad_scores = softmax_backward(grad_weights, weights, -1, weights.dtype)
            grad_queries[:, rows] = grad_scores @ _take(keys, strip)
            _add(grad_keys, strip, grad_scores.mT @ scaled_queries[:, rows])
            _add(grad_values, strip, weights.mT @ strip_grad)
    grad_queries.mul_(scale)
    if layout.closed is not None:  # in the formula, a closed row has NaN weights for every key
        grad_values.fill_(torch.nan)
    return grad_queries, grad_keys, grad_values


def _wide_strips(
    queries: Tensor, keys: Tensor, values: Tensor, layout: MaskLayout
) -> tuple[Tensor, Tensor]:
    """Compute like `_strips`, with the CPU's kernel, which is faster if few pairs are blocked."""
    out = torch.full_like(queries, torch.nan)  # strips without keys stay NaN
    logsumexp = queries.new_zeros(
        queries.shape[:2], dtype=torch.promote_types(queries.dtype, torch.float32)
    )
    for strip in layout.strips:
        if strip.keys:
            rows = slice(strip.start, strip.stop)
            blocked, closed = _blocked_pairs(layout, strip)
            strip_out, strip_logsumexp = flash(  # it takes (batch, heads, tokens, head_dim)
                queries[None, :, rows],
                _take(keys, strip)[None],
                _take(values, strip)[None],
                0.0,
                attn_mask=_bias(blocked, queries.dtype),
            )
            out[:, rows] = _filled(strip_out[0], closed, torch.nan)
            logsumexp[:, rows] = strip_logsumexp[0]
    return out, logsumexp


def _wide_strip_gradients(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    layout: MaskLayout,
) -> Heads:
    """Return the gradients of queries, keys and values."""
    grad_queries, grad_keys = torch.zeros_like(queries), torch.zeros_like(keys)
    grad_values = torch.zeros_like(values)
    for strip in layout.strips:
        if strip.keys:
            rows = slice(strip.start, strip.stop)
            blocked, closed = _blocked_pairs(layout, strip)
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
    if layout.closed is not None:  # in the formula, a closed row has NaN weights for every key
        grad_values.fill_(torch.nan)
    return grad_queries, grad_keys, grad_values


def _blocked_pairs(
    layout: MaskLayout, strip: Strip
) -> tuple[Bool[Tensor, "strip keys"], Bool[Tensor, "strip 1"] | None]:
    """Return the blocked pairs of a strip, and its closed rows (None if the mask has none).

    Closed rows count as open among the pairs, so that the kernels compute no NaN.
    """
    assert layout.blocked is not None
    rows = slice(strip.start, strip.stop)
    blocked = _take(layout.blocked[rows].mT, strip).mT
    if layout.closed is None:
        return blocked, None
    # The ranges of a strip have all keys that are open for some row of it.
    return blocked & ~layout.closed[rows], layout.closed[rows]


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


def _in_strips(layout: MaskLayout, rows: Tensor) -> MaskLayout:
    """Return the strips of a mask that is causal or open."""
    blocked = _mask_of(layout, rows).bool()
    size = len(blocked)
    return Examined(size, pack(blocked), 0, 0, blocked).layout(size)


def _mask_of(layout: MaskLayout, rows: Tensor) -> Shaped[Tensor, "tokens tokens"]:
    """Return a mask with this layout, a row for each of the rows and on their device."""
    if layout.blocked is not None:
        return layout.blocked
    mask = causal_mask(rows.shape[-2])
    return (mask if layout.kind == "causal" else torch.zeros_like(mask)).to(rows.device)


def _reference_gradients(
    heads: Heads, layout: MaskLayout, grad: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the formula, which can be differentiated again."""
    differentiated = [tensor for tensor, is_needed in zip(heads, needed, strict=False) if is_needed]
    mask = _mask_of(layout, grad)
    is_differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        out = guarded_attention(*heads, mask, layout.closed)
        gradients = iter(
            torch.autograd.grad(out, differentiated, grad, create_graph=is_differentiated)
        )
    return tuple(next(gradients) if is_needed else None for is_needed in needed[:3])
