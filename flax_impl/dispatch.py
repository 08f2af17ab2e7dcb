"""Attention with a stored mask, by the reference formula or tile by tile."""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from jax import Array
from jaxtyping import Float, Shaped

from .attention import for_each_head, is_nonzero, reference_attention
from .fused import fused_attention, kernels_take
from .validation import check_covered, check_scale, check_shapes

Implementation = Literal["reference", "fused", "auto"]
MIN_FUSED_TOKENS = 768  # with fewer, "auto" uses the formula, which is as fast


def masked_attention(
    queries: Float[Array, "*batch queries head_dim"],
    keys: Float[Array, "*keys_batch tokens head_dim"],
    values: Float[Array, "*keys_batch tokens value_dim"],
    mask: Shaped[Array, "*mask_batch context_length context_length"],
    dropout: Callable[[Array], Array] | None = None,
    implementation: Implementation = "auto",
    scale: float | None = None,
) -> Float[Array, "*batch queries value_dim"]:
    """Return softmax(scale * queries @ keys.T) @ values over the unblocked keys.

    Args:
        queries: any leading dimensions, such as (batch, heads, queries, head_dim). If there are
            fewer queries than keys, they are the last tokens, as with a cache of keys.
        keys: like the queries; the leading dimensions broadcast. In (batch, heads, ...), each head
            of keys may be that of several consecutive heads of queries.
        values: like the keys; the last dimension may be another one.
        mask: any nonzero entry [i, j] blocks token i from attending to token j. Only the first
            `tokens` columns are used, and the rows of the queries. With more than two axes it is
            for these queries and keys: it broadcasts to (*batch, queries, tokens), and the formula
            is used.
        dropout: applied to the attention weights. Only the formula has them, so with dropout
            the formula is used.
        implementation: "reference" is the plain formula, `reference_attention`. "fused" is
            `fused_attention`, which computes the same function tile by tile. "auto" is "fused"
            where that is faster on a CPU.
        scale: the factor of the scores; None is 1 / sqrt(head_dim). In the fused path, the queries
            are multiplied instead; in float16 that might overflow, so there the formula is used.

    Raises:
        ValueError: an unknown implementation, a scale that is not a finite number, a mask smaller
            than (tokens, tokens), or shapes that do not fit together.
    """
    if min(queries.ndim, keys.ndim, values.ndim) < 2:
        check_shapes(queries.shape, keys.shape, values.shape)
    check_implementation(implementation)
    check_scale(scale)
    check_covered(mask.shape, queries.shape, keys.shape)
    if isinstance(mask, np.ndarray):  # before JAX narrows it to 32 bits
        mask = is_nonzero(mask)
    if dropout is not None:
        return reference_attention(queries, keys, values, mask, dropout, scale)
    if queries.shape != keys.shape or values.shape[:-2] != keys.shape[:-2]:
        keys, values = for_each_head(queries, keys), for_each_head(queries, values)
    is_possible = implementation != "reference" and mask.ndim == 2
    is_possible = is_possible and (scale is None or queries.dtype.name != "float16")
    is_possible = is_possible and kernels_take(queries, keys, values)
    if is_possible and (implementation == "fused" or queries.shape[-2] >= MIN_FUSED_TOKENS):
        if scale is not None:
            queries = queries * (float(scale) * queries.shape[-1] ** 0.5)
        return fused_attention(queries, keys, values, mask)
    return reference_attention(queries, keys, values, mask, scale=scale)


def check_implementation(implementation: str) -> None:
    """Raise ValueError unless the implementation is known."""
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation is {implementation!r}; expected one of {get_args(Implementation)}"
        )
