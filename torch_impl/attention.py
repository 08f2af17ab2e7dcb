"""Scaled dot-product attention with a stored mask: the reference formula."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from .validation import check_shapes


def causal_mask(context_length: int) -> Float[Tensor, "context_length context_length"]:
    """Return the float32 mask with 1 above the diagonal: token i cannot attend to token j > i."""
    return torch.triu(torch.ones(context_length, context_length, dtype=torch.float32), diagonal=1)


def reference_attention(
    queries: Float[Tensor, "*batch queries head_dim"],
    keys: Float[Tensor, "*keys_batch tokens head_dim"],
    values: Float[Tensor, "*keys_batch tokens value_dim"],
    mask: Shaped[Tensor, "*mask_batch context_length context_length"],
    dropout: Callable[[Tensor], Tensor] = lambda weights: weights,
    scale: float | None = None,
) -> Float[Tensor, "*batch queries value_dim"]:
    """Return softmax(queries @ keys.T / sqrt(head_dim)) @ values over the unblocked keys.

    With a `scale`, the scores are multiplied by it instead.

    If there are fewer queries than keys, as with a cache of keys, they are the last tokens. A mask
    of more than two axes is (*batch, queries, keys), for these queries and keys.

    Any nonzero entry of the mask blocks, whatever its dtype. A row that blocks every key gives NaN.
    A NaN or inf in a blocked value still reaches every row, because 0 * NaN is NaN.

    On CPUs whose bfloat16 products leak (see `closed_rows`), the NaN of such a row may also reach
    the row before it. This function is the plain formula and does not guard against that.

    Source: Vaswani et al., "Attention Is All You Need", section 3.2.1.
    """
    if not queries.shape == keys.shape == values.shape:
        keys, values = for_each_head(queries, keys), for_each_head(queries, values)
        check_shapes(queries.shape, keys.shape, values.shape)
    num_queries, num_tokens, head_dim = queries.shape[-2], *keys.shape[-2:]
    blocked = blocked_pairs(mask, num_queries, num_tokens)  # (..., queries, tokens)
    scores = queries @ keys.mT  # (..., queries, tokens)
    scores = scores / head_dim**0.5 if scale is None else scores * float(scale)
    scores = scores.masked_fill(blocked, -torch.inf)
    weights = torch.softmax(scores, dim=-1)  # (..., queries, tokens)
    return dropout(weights) @ values  # (..., queries, value_dim)


def blocked_pairs(
    mask: Shaped[Tensor, "*batch context_length context_length"], num_queries: int, num_tokens: int
) -> Bool[Tensor, "*batch queries tokens"]:
    """Return which of the first `num_tokens` keys are blocked for each of the last queries."""
    if mask.ndim > 2:  # it is for these queries and keys
        return mask.bool()
    blocked = mask[:num_tokens, :num_tokens].bool()
    return blocked[num_tokens - num_queries :] if num_queries < num_tokens else blocked


def for_each_head(
    queries: Float[Tensor, "*batch queries head_dim"],
    keys: Float[Tensor, "*keys_batch tokens width"],
) -> Float[Tensor, "*batch tokens width"]:
    """Return the keys or values once for each head of the queries, (batch, heads, tokens, width).

    Consecutive heads of queries share one head of keys, as in grouped-query attention.

    Source: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", 2023.
    """
    if queries.ndim < 4 or keys.ndim < 4 or queries.shape[-3] == keys.shape[-3]:
        return keys
    groups, rest = divmod(queries.shape[-3], keys.shape[-3] or 1)
    return keys if rest or keys.shape[-3] == 1 else keys.repeat_interleave(groups, dim=-3)
