"""Queries, keys, values and masks for the checks of the function, and limits for its results."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..proof.agreement import Finding
from ..runners.attend import Heads

# The last of torch's strips is partial, and so is the last word of a packed mask.
TOKENS, HEAD_DIM = 200, 4
CLOSED_ROW = 70
MakeFinding = Callable[..., Finding]


def draw_heads(tokens: int, dtype: Any = np.float32) -> Heads:
    """Draw queries, keys and values, (1, tokens, HEAD_DIM)."""
    random = np.random.default_rng(1)
    return [random.standard_normal((1, tokens, HEAD_DIM)).astype(dtype) for _ in range(3)]


def patterns(*, closed: bool = True) -> dict[str, np.ndarray]:
    """Return which pairs are blocked, (TOKENS, TOKENS), by name, with closed rows or without.

    torch has a kernel for each of the first three if no row is closed.
    """
    positions = np.arange(TOKENS)
    causal = positions[:, None] < positions
    strips = causal | (positions[:, None] // 64 != positions // 64)
    wide = np.random.default_rng(5).random((TOKENS, TOKENS)) < 0.5
    blocked = {"causal": causal, "strips": strips, "wide": wide, "a strip closed": strips.copy()}
    if closed:
        for name in ("causal", "strips", "wide"):
            blocked[name][CLOSED_ROW] = True
        blocked["a strip closed"][64:128] = True  # all rows of one of torch's strips
    return blocked


def output_limit(heads: Heads) -> float:
    """Return a bound on the difference of two outputs, each a mean of values, in the heads' dtype.

    A score has a relative error of head_dim + 3 roundings, a weight twice that of its score and of
    the sum of the weights, and the output that of a sum of at most `tokens` products.
    """
    return float(2 * _roundings(heads) * np.finfo(heads[0].dtype).eps * np.abs(heads[2]).max())


def gradient_limit(heads: Heads, cotangent: np.ndarray) -> float:
    """Return a bound on the difference of two gradients of the same terms, in the heads' dtype.

    Each entry is a sum of at most `tokens` products, each a weight of at most 1, times the
    difference of two dot products of `cotangent` and values, times a key or query.
    """
    tokens, head_dim = heads[0].shape[-2:]
    queries, keys, values, incoming = (np.abs(array).max() for array in (*heads, cotangent))
    largest = 2 * head_dim**0.5 * incoming * values * max(queries, keys)
    roundings = 2 * (_roundings(heads) + tokens + 2 * head_dim + 6)
    return float(roundings * tokens * largest * np.finfo(heads[0].dtype).eps)


def _roundings(heads: Heads) -> float:
    """Return the relative error of an output, in roundings."""
    tokens, head_dim = heads[0].shape[-2:]
    queries, keys = (np.abs(array).max() for array in heads[:2])
    scores = head_dim**0.5 * queries * keys
    return float(2 * (head_dim + 3) * scores + 2 * tokens + 6)
