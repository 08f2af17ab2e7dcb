"""Causal attention in NumPy float64: the reference for the three implementations."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Stages(NamedTuple):
    """Every intermediate result of the formula, in order.

    With several heads, scores and weights have a head axis after the batch.
    """

    queries: np.ndarray  # (..., tokens, width of all heads), like keys, values and context
    keys: np.ndarray
    values: np.ndarray
    scores: np.ndarray  # (..., tokens, tokens), scaled, -inf where blocked
    weights: np.ndarray  # (..., tokens, tokens), after dropout
    context: np.ndarray  # with heads, after `out_proj`


def attention_stages(
    inputs: np.ndarray,
    state: Mapping[str, np.ndarray],
    mask: np.ndarray,
    keep: np.ndarray | None = None,
    dropout: float = 0.0,
    num_heads: int | None = None,
) -> Stages:
    """Return the stages of masked attention in float64.

    Args:
        inputs: (batch, tokens, input_embedding_dim).
        state: `W_query.weight` (out, in), `W_query.bias` if there is one; the same for `W_key` and
            `W_value`.
        mask: (context_length, context_length); nonzero blocks.
        keep: (batch, tokens, tokens), True where dropout keeps the weight; None for no dropout.
        dropout: the probability that `keep` was drawn with; kept weights are divided by
            1 - dropout.
        num_heads: the argument of `CausalMultiHeadAttention`; the state then has `out_proj`, and
            `keep` is (batch, heads, tokens, tokens). None for the classes with a single head.
    """
    queries, keys, values = (
        _project(inputs, state, name) for name in ("W_query", "W_key", "W_value")
    )
    split = [split_heads(array, num_heads) for array in (queries, keys, values)]
    stages = masked_attention(split[0], split[1], split[2], mask, keep, dropout)
    context = (
        stages.context
        if num_heads is None
        else _project(merge_heads(stages.context), state, "out_proj")
    )
    return Stages(queries, keys, values, stages.scores, stages.weights, context)


def split_heads(array: np.ndarray, num_heads: int | None) -> np.ndarray:
    """Reshape (..., tokens, width) to (..., heads, tokens, head_dim).

    The array is returned unchanged if `num_heads` is None.
    """
    if num_heads is None:
        return array
    return array.reshape(*array.shape[:-1], num_heads, array.shape[-1] // num_heads).swapaxes(
        -2, -3
    )


def merge_heads(array: np.ndarray) -> np.ndarray:
    """Undo `split_heads`."""
    swapped = array.swapaxes(-2, -3)
    return swapped.reshape(*swapped.shape[:-2], swapped.shape[-2] * swapped.shape[-1])


def causal_mask(context_length: int) -> np.ndarray:
    """Return the causal mask, for a state without a mask: 1 above the diagonal, else 0."""
    return np.triu(np.ones((context_length, context_length)), k=1)


def masked_attention(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    keep: np.ndarray | None = None,
    dropout: float = 0.0,
) -> Stages:
    """Return the stages of masked attention in float64, for any leading dimensions.

    Args:
        queries: (..., queries, head_dim), float64: the last tokens, if there are fewer than keys.
        keys: (..., tokens, head_dim), float64.
        values: (..., tokens, value_dim), float64.
        mask: (context_length, context_length); nonzero blocks.
        keep: (..., queries, tokens), True where dropout keeps the weight; None for no dropout.
        dropout: the probability that `keep` was drawn with; kept weights are divided by
            1 - dropout.
    """
    num_tokens, head_dim = keys.shape[-2:]
    blocked = mask[num_tokens - queries.shape[-2] : num_tokens, :num_tokens] != 0
    scores = np.where(blocked, -np.inf, queries @ keys.swapaxes(-1, -2)) / np.sqrt(head_dim)
    weights = _softmax(scores)
    if keep is not None:
        weights = np.where(keep, weights / (1.0 - dropout), 0.0)
    return Stages(queries, keys, values, scores, weights, weights @ values)


def _project(inputs: np.ndarray, state: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    projected = inputs.astype(np.float64) @ state[f"{name}.weight"].astype(np.float64).T
    bias = state.get(f"{name}.bias")
    return projected if bias is None else projected + bias.astype(np.float64)


def _softmax(scores: np.ndarray) -> np.ndarray:
    # In a row that is blocked everywhere, -inf - -inf is NaN, as in the formula.
    with np.errstate(invalid="ignore"):
        exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)
