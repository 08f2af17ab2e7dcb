"""Attention that obeys a stored mask: by the formula, or tile by tile without what the mask closes."""

from collections.abc import Callable
from typing import Literal, get_args

from jax import Array
from jaxtyping import Float, Shaped

from .attention import reference_attention
from .fused import fused_attention
from .validation import check_covered

Implementation = Literal["reference", "fused", "auto"]
FEWEST_TOKENS = 768  # with fewer, "auto" takes the formula, which is as fast


def masked_attention(
    queries: Float[Array, "*batch tokens head_dim"],
    keys: Float[Array, "*batch tokens head_dim"],
    values: Float[Array, "*batch tokens head_dim"],
    mask: Shaped[Array, "context_length context_length"],
    dropout: Callable[[Array], Array] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "*batch tokens head_dim"]:
    """Mix the values by softmax(queries @ keys.T / sqrt(head_dim)) over the keys that the mask leaves open.

    Args:
        queries: any leading dimensions, such as (batch, heads, tokens, head_dim).
        keys: as the queries.
        values: as the queries.
        mask: any nonzero entry [i, j] keeps token i from looking at token j; its first tokens are
            used.
        dropout: applied to the weights, which only the formula has: with it, the formula is used.
        implementation: "reference" is the formula, `reference_attention`; "fused" is
            `fused_attention`, the same function by other steps; "auto" is "fused" where that is
            faster.

    Raises:
        ValueError: an implementation of another name, or a mask that is smaller than the tokens are
            many.
    """
    check_implementation(implementation)
    check_covered(mask.shape, queries.shape[-2])
    if dropout is not None:
        return reference_attention(queries, keys, values, mask, dropout)
    if implementation == "fused" or (
        implementation == "auto" and queries.shape[-2] >= FEWEST_TOKENS
    ):
        return fused_attention(queries, keys, values, mask)
    return reference_attention(queries, keys, values, mask)


def check_implementation(implementation: str) -> None:
    """Raise ValueError unless there is an implementation of that name."""
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation is {implementation!r}; expected one of {get_args(Implementation)}"
        )
