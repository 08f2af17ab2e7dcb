"""Scaled dot-product attention that obeys a stored mask: the reference mathematics."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def causal_mask(context_length: int) -> Float[Tensor, "context_length context_length"]:
    """Return the float32 mask with 1 above the diagonal: token i may not look at token j > i."""
    return torch.triu(torch.ones(context_length, context_length, dtype=torch.float32), diagonal=1)


def reference_attention(
    queries: Float[Tensor, "*batch tokens head_dim"],
    keys: Float[Tensor, "*batch tokens head_dim"],
    values: Float[Tensor, "*batch tokens head_dim"],
    mask: Shaped[Tensor, "context_length context_length"],
    dropout: Callable[[Tensor], Tensor] = lambda weights: weights,
) -> Float[Tensor, "*batch tokens head_dim"]:
    """Mix the values by softmax(queries @ keys.T / sqrt(head_dim)) over the keys left open.

    Any nonzero entry of the mask blocks, whatever its dtype. A row that is blocked everywhere gives
    NaN, and a NaN or inf in a blocked value still reaches every row, through 0 * NaN.

    On a processor whose bfloat16 products leak (see `closed_rows`) the NaN of a blocked row may
    reach the row before it: this is the formula word for word, and says what torch says.

    Source: Vaswani et al., "Attention Is All You Need", section 3.2.1.
    """
    num_tokens, head_dim = queries.shape[-2:]
    blocked = mask[:num_tokens, :num_tokens].bool()  # (tokens, tokens)
    scores = queries @ keys.mT  # (..., tokens, tokens)
    scores = scores.masked_fill(blocked, -torch.inf)
    weights = torch.softmax(scores / head_dim**0.5, dim=-1)  # (..., tokens, tokens)
    return dropout(weights) @ values  # (..., tokens, head_dim)
