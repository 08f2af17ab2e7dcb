"""Causal attention in NumPy float64: a third implementation, against which the others are judged."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Stages(NamedTuple):
    """Every intermediate of the formula, in order."""

    queries: np.ndarray  # (..., tokens, head_dim), as keys, values and context
    keys: np.ndarray
    values: np.ndarray
    scores: np.ndarray  # (..., tokens, tokens), scaled, -inf where blocked
    weights: np.ndarray  # (..., tokens, tokens), after dropout
    context: np.ndarray


def attention_stages(
    inputs: np.ndarray,
    state: Mapping[str, np.ndarray],
    mask: np.ndarray,
    keep: np.ndarray | None = None,
    dropout: float = 0.0,
) -> Stages:
    """Return the stages of masked attention in float64.

    Args:
        inputs: (batch, tokens, input_embedding_dim).
        state: `W_query.weight` (out, in), `W_query.bias` if there is one, likewise key and value.
        mask: (context_length, context_length); nonzero blocks.
        keep: (batch, tokens, tokens), True where dropout keeps the weight; None for no dropout.
        dropout: the probability that `keep` was drawn with: kept weights are divided by 1 - dropout.
    """
    queries, keys, values = (_project(inputs, state, name) for name in ("W_query", "W_key", "W_value"))
    return masked_attention(queries, keys, values, mask, keep, dropout)


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
        dropout: the probability that `keep` was drawn with: kept weights are divided by 1 - dropout.
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
    with np.errstate(invalid="ignore"):  # a row blocked everywhere is -inf - -inf: NaN, as in the formula
        exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)
