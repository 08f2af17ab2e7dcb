"""Scaled dot-product attention with a stored mask: the reference formula."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def causal_mask(context_length: int) -> Float[Tensor, "context_length context_length"]:
    """Return the float32 mask with 1 above the diagonal: token i cannot attend to token j > i."""
    return torch.triu(torch.ones(context_length, context_length, dtype=torch.float32), diagonal=1)


def reference_attention(
    queries: Float[Tensor, "*batch tokens head_dim"],
    keys: Float[Tensor, "*batch tokens head_dim"],
    values: Float[Tensor, "*batch tokens head_dim"],
    mask: Shaped[Tensor, "context_length context_length"],
    dropout: Callable[[Tensor], Tensor] = lambda weights: weights,
) -> Float[Tensor, "*batch tokens head_dim"]:
    """Return softmax(queries @ keys.T / sqrt(head_dim)) @ values over the unblocked keys.

    Any nonzero entry of the mask blocks, whatever its dtype. A row that blocks every key gives NaN.
    A NaN or inf in a blocked value still reaches every row, because 0 * NaN is NaN.

    On CPUs whose bfloat16 products leak (see `closed_rows`), the NaN of such a row may also reach
    the row before it. This function is the plain formula and does not guard against that.

    Source: Vaswani et al., "Attention Is All You Need", section 3.2.1.
    """
    num_tokens, head_dim = queries.shape[-2:]
    blocked = mask[:num_tokens, :num_tokens].bool()  # (tokens, tokens)
    scores = queries @ keys.mT  # (..., tokens, tokens)
    scores = scores.masked_fill(blocked, -torch.inf)
    weights = torch.softmax(scores / head_dim**0.5, dim=-1)  # (..., tokens, tokens)
    return dropout(weights) @ values  # (..., tokens, head_dim)
