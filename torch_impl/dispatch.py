"""Attention with a stored mask, by the reference formula or by fused kernels."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from .attention import blocked_pairs, for_each_head, reference_attention
from .autocast import lowered, without_autocast
from .closed_rows import closed_rows, find_closed, guarded_attention
from .context import is_surely_less, possible_path
from .finite import are_finite, finite_attention
from .fused import Heads, fused_attention, kernel_layout, kernels_take, library_takes
from .operator import operator_attention
from .private_api import has_global_hook
from .validation import check_covered, check_scale, check_shapes

Implementation = Literal["reference", "fused", "auto"]
IMPLEMENTATIONS = get_args(Implementation)
MIN_FUSED_TOKENS = 128  # with fewer, "auto" uses the formula, which is as fast


def masked_attention(
    queries: Float[Tensor, "*batch queries head_dim"],
    keys: Float[Tensor, "*keys_batch tokens head_dim"],
    values: Float[Tensor, "*keys_batch tokens value_dim"],
    mask: Shaped[Tensor, "*mask_batch context_length context_length"],
    dropout: Callable[[Tensor], Tensor] | None = None,
    implementation: Implementation = "auto",
    scale: float | None = None,
) -> Float[Tensor, "*batch queries value_dim"]:
    """Return softmax(scale * queries @ keys.T) @ values over the unblocked keys.

    Args:
        queries: any leading dimensions, such as (batch, heads, queries, head_dim). If there are
            fewer queries than keys, they are the last tokens, as with a cache of keys.
        keys: like the queries; the leading dimensions broadcast. In (batch, heads, ...), each head
            of keys may be that of several consecutive heads of queries.
        values: like the keys; the last dimension may be another one.
        mask: any nonzero entry [i, j] blocks token i from attending to token j. Only the first
            `tokens` columns are used, and the rows of the queries. With more than two axes it is
            for these queries and keys: it broadcasts to (*batch, queries, tokens).
        dropout: applied to the attention weights. Only the formula has them, so with dropout
            the formula is used.
        implementation: "reference" is the plain formula, `reference_attention`. "fused" is
            `fused_attention`, which computes the same function with other kernels. Where they do
            not apply (see `kernel_layout`), the formula is used. "auto" is "fused" where that is
            faster. Except with "reference", no row that is NaN because of the mask is an operand of
            a product in bfloat16 or float16 on the CPU (see `closed_rows`).
        scale: the factor of the scores; None is 1 / sqrt(head_dim). Before a kernel, the queries
            are multiplied instead; in float16 that might overflow, so there the formula is used.

    Raises:
        ValueError: an unknown implementation, a scale that is not a finite number, a mask smaller
            than (tokens, tokens), or shapes that do not fit together.
    """
    return attend(queries, keys, values, mask, dropout, implementation, scale)[0]


def attend(
    queries: Float[Tensor, "*batch queries head_dim"],
    keys: Float[Tensor, "*keys_batch tokens head_dim"],
    values: Float[Tensor, "*keys_batch tokens value_dim"],
    mask: Shaped[Tensor, "*mask_batch context_length context_length"],
    dropout: Callable[[Tensor], Tensor] | None,
    implementation: Implementation,
    scale: float | None = None,
) -> tuple[Float[Tensor, "*batch queries value_dim"], Bool[Tensor, "*mask_batch queries 1"] | None]:
    """Return the output of `masked_attention`, and the mask's closed rows.

    Later products should not multiply the closed rows. They are None if the mask has none, and for
    "reference".
    """
    if min(queries.ndim, keys.ndim, values.ndim) < 2:
        check_shapes(queries.shape, keys.shape, values.shape)
    check_implementation(implementation)
    check_scale(scale)
    check_covered(mask.shape, queries.shape, keys.shape)
    kept = _identity if dropout is None else dropout
    if implementation == "reference":
        return reference_attention(queries, keys, values, mask, kept, scale), None
    queries, keys, values = lowered(queries), lowered(keys), lowered(values)
    if queries.shape != keys.shape or values.shape[:-2] != keys.shape[:-2]:
        keys, values = for_each_head(queries, keys), for_each_head(queries, values)
    path = possible_path(queries)
    if implementation == "auto" and is_surely_less(queries.shape[-2], MIN_FUSED_TOKENS):
        path = "formula"
    if scale is not None and queries.dtype == torch.float16:
        path = "formula"
    if scale is not None and path != "formula":
        queries, scale = queries * (float(scale) * queries.shape[-1] ** 0.5), None
    if path != "formula":
        result = _without_the_formula((queries, keys, values), mask, dropout, path)
        if result is not None:
            return result
    if mask.ndim == 2 and queries.shape[-2] == keys.shape[-2]:
        closed = closed_rows(mask, keys.shape[-2], queries.dtype)
    else:
        closed = find_closed(blocked_pairs(mask, queries.shape[-2], keys.shape[-2]))
    return guarded_attention(queries, keys, values, mask, closed, kept, scale), closed


def _without_the_formula(
    heads: Heads,
    mask: Shaped[Tensor, "*mask_batch context_length context_length"],
    dropout: Callable[[Tensor], Tensor] | None,
    path: Literal["operator", "kernels"],
) -> tuple[Tensor, Tensor | None] | None:
    """Return what `attend` returns, or None where the formula is needed."""
    queries, keys, values = heads
    num_queries, num_tokens = queries.shape[-2], keys.shape[-2]
    is_square = mask.ndim == 2 and num_queries == num_tokens
    is_plain = dropout is None and is_square
    if path == "operator":
        if not (is_plain and kernels_take(queries, keys, values, mask)):
            return None
        closed = closed_rows(mask, num_tokens, queries.dtype)
        return operator_attention(queries, keys, values, mask), closed
    if is_plain:
        layout = kernel_layout(queries, keys, values, mask)
        if layout is None:
            return None
        with without_autocast(queries):
            return fused_attention(queries, keys, values, layout), layout.closed
    if not library_takes(queries, keys, values, mask):
        return None
    blocked = blocked_pairs(mask, num_queries, num_tokens)
    if find_closed(blocked).any() or not are_finite(queries, keys, values):
        return None
    return finite_attention(queries, keys, values, blocked, dropout), None


def _identity(weights: Tensor) -> Tensor:
    """Return the weights: no dropout."""
    return weights


def check_implementation(implementation: str) -> None:
    """Raise ValueError unless the implementation is known."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; expected one of {IMPLEMENTATIONS}")


def dropping(dropout: nn.Module) -> nn.Module | None:
    """Return `dropout`, or None if it would leave the weights unchanged and nobody looks at it."""
    is_identity = type(dropout) is nn.Dropout and not (dropout.training and dropout.p > 0)
    return None if is_identity and not _is_watched(dropout) else dropout


def _is_watched(module: nn.Module) -> bool:
    """Return whether the module has a hook, a global one or one of its own, or another forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or has_global_hook()
    )
