"""The attention of `reference_attention` by kernels that keep no (tokens, tokens) matrix, as the mask allows."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from .attention import causal_mask
from .closed_rows import closed_rows, find_closed, guarded_attention, is_traced
from .mask_layout import MaskLayout, Strip, mask_layout
from .private_api import HAS_KERNELS, flash, flash_backward, softmax_backward

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def kernel_layout(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> MaskLayout | None:
    """Return what the mask closes, or None where only the formula gives what the formula gives.

    That is for inputs whose scores may not be finite (the CPU's kernel gives a finite row for a
    query of NaN), in transforms of `torch.func`, forward-mode differentiation, tracing, autocast,
    and for subclasses of Tensor.
    """
    if not HAS_KERNELS:
        return None
    if not (_are_plain(queries, keys, values, mask) and _scores_are_finite(queries, keys)):
        return None
    return mask_layout(mask, queries.shape[-2])


def fused_attention(
    queries: Float[Tensor, "*batch tokens head_dim"],
    keys: Float[Tensor, "*batch tokens head_dim"],
    values: Float[Tensor, "*batch tokens head_dim"],
    mask: Shaped[Tensor, "context_length context_length"],
    layout: MaskLayout,
) -> Float[Tensor, "*batch tokens head_dim"]:
    """Return what `reference_attention` does, in memory that grows with the tokens and not with their square.

    A causal mask, and one that is open everywhere, takes the kernel of
    `scaled_dot_product_attention`. Any other is taken a strip of queries at a time, without the
    keys that are closed to all of the strip. A NaN or inf behind the mask may stay out of the rows
    that the formula's 0 * NaN brings it to. `layout` is what `kernel_layout` returns for the same
    arguments.
    """
    shape = queries.shape
    if layout.kind in ("strips", "wide"):
        attend = _WideStrips if layout.kind == "wide" and queries.device.type == "cpu" else _Strips
        queries, keys, values = (
            tensor.reshape(-1, *shape[-2:]) for tensor in (queries, keys, values)
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
    """Tell whether a kernel takes them, and whether the mask's entries can be looked at now."""
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


def _scores_are_finite(queries: Tensor, keys: Tensor) -> bool:
    """Tell whether no score can be inf or NaN: |q . k| <= head_dim max|q| max|k|."""
    # The fastest pass over a tensor that tells NaN and inf too.
    extremes = [extreme for tensor in (queries, keys) for extreme in torch.aminmax(tensor.detach())]
    of_queries, of_keys = torch.stack(extremes).view(2, 2).abs().amax(dim=1).tolist()
    largest = torch.finfo(torch.promote_types(queries.dtype, torch.float32)).max
    return queries.shape[-1] * of_queries * of_keys <= largest


def _four_dims(tensor: Tensor) -> Tensor:
    """Return (..., tokens, head_dim) as (batch, heads, tokens, head_dim), the last dimension without gaps."""
    tensor = tensor.flatten(0, -4) if tensor.ndim > 4 else tensor[(None,) * (4 - tensor.ndim)]
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Flash(torch.autograd.Function):
    """The CPU's flash attention, which unlike torch's own can be differentiated twice: by the reference."""

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
            return *_reference_gradients(
                (queries, keys, values), mask, grad, ctx.needs_input_grad
            ), None
        return *flash_backward(
            grad.contiguous(), queries, keys, values, out, logsumexp, 0.0, ctx.is_causal
        ), None


class _Strips(torch.autograd.Function):
    """Attention a strip of queries at a time, (heads, tokens, head_dim); for gradients, weights are computed again."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, layout: MaskLayout
    ) -> Tensor:
        ctx.save_for_backward(queries, keys, values, mask)
        ctx.layout = layout
        out = torch.full_like(queries, torch.nan)  # of the rows without a key
        for strip in layout.strips:
            if strip.keys:
                weights, closed = _weights(queries, keys, mask, layout, strip)
                context = weights @ _take(values, strip)
                out[:, strip.start : strip.stop] = _filled(context, closed, torch.nan)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, mask = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (
                *_reference_gradients((queries, keys, values), mask, grad, ctx.needs_input_grad),
                None,
                None,
            )
        return *_strip_gradients(queries, keys, values, mask, ctx.layout, grad), None, None


def _weights(
    queries: Tensor, keys: Tensor, mask: Tensor, layout: MaskLayout, strip: Strip
) -> tuple[Float[Tensor, "heads strip keys"], Bool[Tensor, "strip 1"] | None]:
    """Return the attention weights of one strip, and which of its rows are closed: those have finite weights."""
    blocked, closed = _opened(mask, layout, strip)
    at = slice(strip.start, strip.stop)
    scale = queries.shape[-1] ** -0.5
    unused = queries.new_empty(1)  # with beta=0
    scores = torch.baddbmm(unused, queries[:, at], _take(keys, strip).mT, beta=0.0, alpha=scale)
    return torch.softmax(scores.add_(_bias(blocked, queries.dtype)), dim=-1), closed


def _strip_gradients(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, layout: MaskLayout, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scale = queries.shape[-1] ** -0.5
    scaled = queries * scale
    grads = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for strip in layout.strips:
        if strip.keys:
            at = slice(strip.start, strip.stop)
            weights, closed = _weights(queries, keys, mask, layout, strip)
            strip_grad = _filled(grad[:, at], closed, 0.0)
            grad_weights = strip_grad @ _take(values, strip).mT
            grad_scores = softmax_backward(grad_weights, weights, -1, weights.dtype)
            grads[0][:, at] = grad_scores @ _take(keys, strip)
            _add(grads[1], strip, grad_scores.mT @ scaled[:, at])
            _add(grads[2], strip, weights.mT @ strip_grad)
    grads[0].mul_(scale)
    if layout.closed_rows:
        grads[2].fill_(
            torch.nan
        )  # as the formula's, whose weights of a closed row are NaN for every key
    return grads


class _WideStrips(torch.autograd.Function):
    """The same by the CPU's flash attention, which is faster where most of the keys are looked at."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, layout: MaskLayout
    ) -> Tensor:
        out = torch.full_like(queries, torch.nan)  # of the rows without a key
        logsumexp = queries.new_zeros(
            queries.shape[:2], dtype=torch.promote_types(queries.dtype, torch.float32)
        )
        for strip in layout.strips:
            if strip.keys:
                at = slice(strip.start, strip.stop)
                blocked, closed = _opened(mask, layout, strip)
                given = queries[:, at], _take(keys, strip), _take(values, strip)
                found = flash(
                    *(tensor[None] for tensor in given),
                    0.0,
                    attn_mask=_bias(blocked, queries.dtype),
                )
                out[:, at] = _filled(found[0][0], closed, torch.nan)
                logsumexp[:, at] = found[1][0]
        ctx.save_for_backward(queries, keys, values, mask, out, logsumexp)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, mask, out, logsumexp = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (
                *_reference_gradients((queries, keys, values), mask, grad, ctx.needs_input_grad),
                None,
                None,
            )
        grads = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for strip in ctx.layout.strips:
            if strip.keys:
                at = slice(strip.start, strip.stop)
                blocked, closed = _opened(mask, ctx.layout, strip)
                given = (
                    _filled(grad[:, at], closed, 0.0),
                    queries[:, at],
                    _take(keys, strip),
                    _take(values, strip),
                )
                known = _filled(out[:, at], closed, 0.0), logsumexp[:, at]
                found = flash_backward(
                    *(tensor[None] for tensor in (*given, *known)),
                    0.0,
                    False,
                    attn_mask=_bias(blocked, grad.dtype),
                )
                grads[0][:, at] = found[0][0]
                _add(grads[1], strip, found[1][0])
                _add(grads[2], strip, found[2][0])
        if ctx.layout.closed_rows:
            grads[2].fill_(torch.nan)
        return *grads, None, None


def _opened(
    mask: Tensor, layout: MaskLayout, strip: Strip
) -> tuple[Bool[Tensor, "strip keys"], Bool[Tensor, "strip 1"] | None]:
    """Return what is blocked to the strip, closed rows opened so that no NaN arises, and which these are, if any."""
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
    """Return the entries of the strip's keys, which are the dimension before the last."""
    parts = [tensor[..., start:stop, :] for start, stop in strip.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _add(total: Tensor, strip: Strip, part: Tensor) -> None:
    """Add what belongs to the strip's keys where these are."""
    sizes = [stop - start for start, stop in strip.keys]
    for (start, stop), piece in zip(strip.keys, part.split(sizes, dim=-2), strict=True):
        total[..., start:stop, :] += piece


def _reference_gradients(
    heads: tuple[Tensor, Tensor, Tensor], mask: Tensor, grad: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return gradients that can be differentiated again."""
    wanted = [tensor for tensor, is_needed in zip(heads, needed, strict=False) if is_needed]
    queries, keys, values = heads
    out = guarded_attention(
        queries, keys, values, mask, closed_rows(mask, queries.shape[-2], queries.dtype)
    )
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return tuple(next(found) if is_needed else None for is_needed in needed[:3])
