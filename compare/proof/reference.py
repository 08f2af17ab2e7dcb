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
    scale: float | None = None,
    inputs_k: np.ndarray | None = None,
    inputs_v: np.ndarray | None = None,
) -> Stages:
    """Return the stages of masked attention in float64.

    Args:
        inputs: (batch, queries, input_embedding_dim).
        state: `W_query.weight` (out, in), `W_query.bias` if there is one; the same for `W_key` and
            `W_value`.
        mask: (context_length, context_length); nonzero blocks. With more than two axes, it
            broadcasts to the weights.
        keep: (batch, tokens, tokens), True where dropout keeps the weight; None for no dropout.
        dropout: the probability that `keep` was drawn with; kept weights are divided by
            1 - dropout.
        num_heads: the argument of `CausalMultiHeadAttention`; the state then has `out_proj`, and
            `keep` is (batch, heads, tokens, tokens). None for the classes with a single head.
        scale: the factor of the scores; None is 1 / sqrt(head_dim).
        inputs_k: what the keys are projected from, (batch, tokens, input_embedding_dim); None is
            `inputs`.
        inputs_v: what the values are projected from; None is `inputs_k`.
    """
    inputs_k = inputs if inputs_k is None else inputs_k
    inputs_v = inputs_k if inputs_v is None else inputs_v
    queries, keys, values = (
        _project(array, state, name)
        for array, name in ((inputs, "W_query"), (inputs_k, "W_key"), (inputs_v, "W_value"))
    )
    split = split_all(queries, keys, values, num_heads)
    scaled = split[0] * query_factor(scale, split[0].shape[-1])
    stages = masked_attention(scaled, split[1], split[2], mask, keep, dropout)
    context = (
        stages.context
        if num_heads is None
        else _project(merge_heads(stages.context), state, "out_proj")
    )
    return Stages(queries, keys, values, stages.scores, stages.weights, context)


def query_factor(scale: float | None, head_dim: int) -> float:
    """Return the factor of the queries that makes `scale` of the scores' 1 / sqrt(head_dim)."""
    return 1.0 if scale is None else scale * head_dim**0.5


def split_all(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, num_heads: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split queries, keys and values into heads; a head of keys is repeated for its queries."""
    if num_heads is None:
        return queries, keys, values
    copies = queries.shape[-1] // keys.shape[-1]
    heads = split_heads(queries, num_heads)
    kv_heads = [split_heads(array, num_heads // copies) for array in (keys, values)]
    return heads, kv_heads[0].repeat(copies, axis=-3), kv_heads[1].repeat(copies, axis=-3)


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
        mask: (context_length, context_length); nonzero blocks. With more than two axes, it
            broadcasts to (..., queries, tokens).
        keep: (..., queries, tokens), True where dropout keeps the weight; None for no dropout.
        dropout: the probability that `keep` was drawn with; kept weights are divided by
            1 - dropout.
    """
    num_tokens, head_dim = keys.shape[-2:]
    if mask.ndim == 2:
        mask = mask[num_tokens - queries.shape[-2] : num_tokens, :num_tokens]
    scores = queries @ keys.swapaxes(-1, -2) / np.sqrt(head_dim)
    scores = np.where(mask != 0, -np.inf, scores)
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
