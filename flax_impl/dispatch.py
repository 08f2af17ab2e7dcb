"""Attention with a stored mask, by the reference formula or tile by tile."""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from jax import Array
from jaxtyping import Float, Shaped

from .attention import is_nonzero, reference_attention
from .fused import fused_attention
from .validation import check_covered

Implementation = Literal["reference", "fused", "auto"]
MIN_FUSED_TOKENS = 768  # with fewer, "auto" uses the formula, which is as fast


def masked_attention(
    queries: Float[Array, "*batch tokens head_dim"],
    keys: Float[Array, "*batch tokens head_dim"],
    values: Float[Array, "*batch tokens head_dim"],
    mask: Shaped[Array, "context_length context_length"],
    dropout: Callable[[Array], Array] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "*batch tokens head_dim"]:
    """Return softmax(queries @ keys.T / sqrt(head_dim)) @ values over the unblocked keys.

    Args:
        queries: any leading dimensions, such as (batch, heads, tokens, head_dim).
        keys: like the queries.
        values: like the queries.
        mask: any nonzero entry [i, j] blocks token i from attending to token j. Only the first
            `tokens` rows and columns are used.
        dropout: applied to the attention weights. Only the formula has them, so with dropout
            the formula is used.
        implementation: "reference" is the plain formula, `reference_attention`. "fused" is
            `fused_attention`, which computes the same function tile by tile. "auto" is "fused"
            where that is faster on a CPU.

    Raises:
        ValueError: an unknown implementation, or a mask smaller than (tokens, tokens).
    """
    check_implementation(implementation)
    check_covered(mask.shape, queries.shape[-2])
    if isinstance(mask, np.ndarray):  # before JAX narrows it to 32 bits
        mask = is_nonzero(mask)
    if dropout is not None:
        return reference_attention(queries, keys, values, mask, dropout)
    if implementation == "fused" or (
        implementation == "auto" and queries.shape[-2] >= MIN_FUSED_TOKENS
    ):
        return fused_attention(queries, keys, values, mask)
    return reference_attention(queries, keys, values, mask)


def check_implementation(implementation: str) -> None:
    """Raise ValueError unless the implementation is known."""
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation is {implementation!r}; expected one of {get_args(Implementation)}"
        )
