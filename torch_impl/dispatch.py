"""Attention that obeys a stored mask: by the formula, or by the fastest kernel that does the same."""

from collections.abc import Callable
from typing import Literal, get_args

from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from .attention import reference_attention
from .closed_rows import closed_rows, find_closed, guarded_attention
from .fused import fused_attention, kernel_layout
from .validation import check_covered

Implementation = Literal["reference", "fused", "auto"]
IMPLEMENTATIONS = get_args(Implementation)
FEWEST_TOKENS = 128  # with fewer, "auto" takes the formula, which is as fast


def masked_attention(
    queries: Float[Tensor, "*batch tokens head_dim"],
    keys: Float[Tensor, "*batch tokens head_dim"],
    values: Float[Tensor, "*batch tokens head_dim"],
    mask: Shaped[Tensor, "context_length context_length"],
    dropout: Callable[[Tensor], Tensor] | None = None,
    implementation: Implementation = "auto",
) -> Float[Tensor, "*batch tokens head_dim"]:
    """Mix the values by softmax(queries @ keys.T / sqrt(head_dim)) over the keys that the mask leaves open.

    Args:
        queries: any leading dimensions, such as (batch, heads, tokens, head_dim).
        keys: as the queries.
        values: as the queries.
        mask: any nonzero entry [i, j] keeps token i from looking at token j; its first tokens are
            used.
        dropout: applied to the weights, which only the formula has: with it, the formula is used.
        implementation: "reference" is the formula, `reference_attention`, word for word; "fused" is
            `fused_attention`, the same function by other kernels; "auto" is "fused" where that is
            faster. Except in "reference", no row that is NaN because of the mask is an operand of a
            product (see `closed_rows`).

    Raises:
        ValueError: an implementation of another name, or a mask that is smaller than the tokens are
            many.
    """
    return attend(queries, keys, values, mask, dropout, implementation)[0]


def attend(
    queries: Float[Tensor, "*batch tokens head_dim"],
    keys: Float[Tensor, "*batch tokens head_dim"],
    values: Float[Tensor, "*batch tokens head_dim"],
    mask: Shaped[Tensor, "context_length context_length"],
    dropout: Callable[[Tensor], Tensor] | None,
    implementation: Implementation,
) -> tuple[Float[Tensor, "*batch tokens head_dim"], Bool[Tensor, "tokens 1"] | None]:
    """Return what `masked_attention` returns, and its closed rows, which no further product should multiply.

    The closed rows are None if the mask has none, and for "reference".
    """
    num_tokens = queries.shape[-2]
    check_implementation(implementation)
    check_covered(mask.shape, num_tokens)
    dropouts = () if dropout is None else (dropout,)
    if implementation == "reference":
        return reference_attention(queries, keys, values, mask, *dropouts), None
    if dropout is None and (implementation == "fused" or num_tokens >= FEWEST_TOKENS):
        layout = kernel_layout(queries, keys, values, mask)
        if layout is not None:
            closed = find_closed(mask[:num_tokens, :num_tokens]) if layout.closed_rows else None
            return fused_attention(queries, keys, values, mask, layout), closed
    closed = closed_rows(mask, num_tokens, queries.dtype)
    return guarded_attention(queries, keys, values, mask, closed, *dropouts), closed


def check_implementation(implementation: str) -> None:
    """Raise ValueError unless there is an implementation of that name."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; expected one of {IMPLEMENTATIONS}")


def dropping(dropout: nn.Module) -> nn.Module | None:
    """Return the module, or None where it would hand the weights on as they are, seen by no hook."""
    hooked = dropout._forward_hooks or dropout._forward_pre_hooks
    idle = type(dropout) is nn.Dropout and not (dropout.training and dropout.p > 0)
    return None if idle and not hooked else dropout
