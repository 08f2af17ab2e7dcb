"""Causal attention in NumPy float64: a third implementation, against which the others are judged."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Stages(NamedTuple):
    """Every intermediate of the formula, in order; with heads, scores and weights have these after the batch."""

    queries: np.ndarray  # (..., tokens, width of all heads), as keys, values and context
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
        state: `W_query.weight` (out, in), `W_query.bias` if there is one, likewise key and value.
        mask: (context_length, context_length); nonzero blocks.
        keep: (batch, tokens, tokens), True where dropout keeps the weight; None for no dropout.
        dropout: the probability that `keep` was drawn with: kept weights are divided by 1 -
            dropout.
        num_heads: as of `CausalMultiHeadAttention`, with `out_proj` in the state and `keep` of
            every head; None for the classes with one head.
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
    """Return (..., tokens, width) as (..., heads, tokens, head_dim); as it is if there are no heads."""
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
    """Return the mask of a state that has none: 1 above the diagonal."""
    return np.triu(np.ones((context_length, context_length)), k=1)


def masked_attention(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    keep: np.ndarray | None = None,
    dropout: float = 0.0,
) -> Stages:
    """Return the stages of masked attention in float64, over any leading batch and head dimensions.

    Args:
        queries: (..., tokens, head_dim), float64.
        keys: likewise.
        values: likewise.
        mask: (context_length, context_length); nonzero blocks.
        keep: (..., tokens, tokens), True where dropout keeps the weight; None for no dropout.
        dropout: the probability that `keep` was drawn with: kept weights are divided by 1 -
            dropout.
    """
    num_tokens, head_dim = queries.shape[-2:]
    blocked = mask[:num_tokens, :num_tokens] != 0
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
    with np.errstate(
        invalid="ignore"
    ):  # a row blocked everywhere is -inf - -inf: NaN, as in the formula
        exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)
