r"""How far rounding alone may carry an output of masked attention from the exact value.

The bound is a priori and elementwise. Every operation rounds its result to the working dtype, unit
roundoff u; sums of products are accumulated with unit roundoff v, which is u for float32 and
float64 and that of float32 for the half precisions, whose products it holds exactly. With
gamma_n(v) = n v / (1 - n v), a sum of n terms in any order, fused or not, errs by at most
gamma_n(v) times the sum of the absolute terms (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., sections 3.1 and 3.4). So a sum of n products, and k roundings of it, err by

    r(n, k) = (1 + gamma_n(v)) (1 + gamma_k(u)) - 1

times the sum of the absolute products, plus f(k) = k s + n s_v where a rounding may flush to zero
what is below the smallest normal number s (s_v: that of the accumulation). E(x) bounds the error of
x; lengths: d inputs, h head_dim, n tokens.

    queries  E(q) = r(d, 2) (|x| |W|^T + |b|) + f(2); keys and values alike          product, bias
    scores   E(s) = |q| E(k)^T + E(q) (|k| + E(k))^T + r(h, 1) (|q| + E(q)) (|k| + E(k))^T + f(1)
    scaled   E(t) = (E(s) + gamma_4(u) (|s| + E(s))) / sqrt(h) + f(2)                 root,
    reciprocal, product softmax  the computed exponent is t_j - max + eta_j, |eta_j| <= E(t)_j + u
    |t_j - max| =: theta_j; exp errs by
             phi = 2 u EXP_ULPS; the sum of positive terms by r(n, 1), the quotient by two
             roundings, hence E(p)_j = p_j (e^{theta_j + max theta} (1 + phi) / (1 - phi) (1 + r(2n,
             6)) - 1) + f(3), and never above 1 + r(2n, 6) + f(3), which no weight exceeds
    dropout  E(w) = keep ((E(p) + gamma_3(u) (p + E(p))) / (1 - rate) + f(2))
    context  E(c) = w E(v) + E(w) (|v| + E(v)) + r(n, 1) (w + E(w)) (|v| + E(v)) + f(1)
    out_proj E(o) = E(c) |W|^T + r(d, 2) ((|c| + E(c)) |W|^T + |b|) + f(2)            product, bias;
    d: all heads

A softmax that goes from tile to tile multiplies what it has by an exponential at each of T tiles:
to the growth of each weight, and of the sum, come T times an error of phi and gamma_3T(u). Its
queries are scaled before the product: E(s) has r(h, 4).

Hypotheses: finite inputs, no overflow (`overflow` says where there may be one), and `exp` within
EXP_ULPS.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .reference import Stages, attention_stages, merge_heads, split_heads

# Measured on 8e6 arguments from -80 to 0, CPU: torch 0.57, XLA 1.01 (float32) and 1.69 (float64)
# ulps; CUDA's expf is documented at 2. The next power of two above all of them.
EXP_ULPS = 4

# Beside the bound, a ceiling for float64, relative to the largest output: a slip of 0.01 % in any
# factor is nine orders above it, the rounding seen at the sizes of `compare.proof.cases` (3e-16)
# two and a half below.
FLOAT64_RELATIVE = 1e-13

# No fused path has tiles or strips of fewer keys than this, but the last.
SMALLEST_TILE = 128


class Precision(NamedTuple):
    """How a dtype rounds: unit roundoff, that of its sums, smallest normal and largest finite number."""

    roundoff: float
    accumulated: float
    smallest: float
    largest: float


_FLOAT32 = Precision(2.0**-24, 2.0**-24, 2.0**-126, (2.0 - 2.0**-23) * 2.0**127)

PRECISIONS = {
    "float64": Precision(2.0**-53, 2.0**-53, 2.0**-1022, float(np.finfo(np.float64).max)),
    "float32": _FLOAT32,
    "bfloat16": Precision(
        2.0**-8, _FLOAT32.roundoff, _FLOAT32.smallest, (2.0 - 2.0**-7) * 2.0**127
    ),
    "float16": Precision(2.0**-11, _FLOAT32.roundoff, 2.0**-14, 65504.0),
}

# Both operands of a product are rounded to 11 bits, which one rounding of twice the size covers;
# the rest is float32.
TF32 = Precision(2.0**-10, _FLOAT32.roundoff, _FLOAT32.smallest, _FLOAT32.largest)


def stage_bounds(
    inputs: np.ndarray,
    state: Mapping[str, np.ndarray],
    mask: np.ndarray,
    precision: Precision,
    keep: np.ndarray | None = None,
    dropout: float = 0.0,
    num_heads: int | None = None,
    tiles: int = 0,
) -> Stages:
    """Return, for each entry of every stage, the largest |computed - exact| that rounding explains.

    Arguments are those of `attention_stages`, how the implementation rounds, and of how many tiles
    its softmax may be put together. Blocked scores have a bound of 0; rows blocked everywhere have,
    like their outputs, one of NaN.
    """
    stages = attention_stages(inputs, state, mask, num_heads=num_heads)
    projected = [
        _projection(inputs, state, name, precision) for name in ("W_query", "W_key", "W_value")
    ]
    queries, keys, values = (split_heads(array, num_heads) for array in stages[:3])
    e_queries, e_keys, e_values = (split_heads(array, num_heads) for array in projected)
    given = Stages(queries, keys, values, stages.scores, stages.weights, stages.context)
    bounds = attention_bounds(given, (e_queries, e_keys, e_values), precision, keep, dropout, tiles)
    e_context = bounds.context
    if num_heads is not None:
        weights = (
            stages.weights
            if keep is None
            else np.where(keep, stages.weights, 0.0) / (1.0 - dropout)
        )
        e_context = _projection(
            merge_heads(weights @ values), state, "out_proj", precision, merge_heads(e_context)
        )
    return Stages(
        projected[0], projected[1], projected[2], bounds.scores, bounds.weights, e_context
    )


def attention_bounds(
    stages: Stages,
    errors: tuple[np.ndarray | float, np.ndarray | float, np.ndarray | float],
    precision: Precision,
    keep: np.ndarray | None = None,
    dropout: float = 0.0,
    tiles: int = 0,
) -> Stages:
    """Return the bounds of attention alone, for the exact stages of `masked_attention` without dropout.

    `errors` come with queries, keys and values, 0 where these are exact. The rest is as for
    `stage_bounds`.
    """
    u = precision.roundoff
    queries, keys, values = stages[:3]
    e_queries, e_keys, e_values = (np.broadcast_to(error, queries.shape) for error in errors)
    num_tokens, head_dim = queries.shape[-2:]

    keys = np.abs(keys).swapaxes(-1, -2)
    e_transposed = e_keys.swapaxes(-1, -2)
    e_scores = np.abs(queries) @ e_transposed + e_queries @ (keys + e_transposed)
    queries = np.abs(queries) + e_queries
    products = 4 if tiles else 1  # queries may be scaled before the product
    e_scores = e_scores + _relative(head_dim, products, precision) * queries @ (keys + e_transposed)
    e_scores = e_scores + _flushed(head_dim, 1, precision)

    opened = np.isfinite(stages.scores)
    scaled = np.where(opened, stages.scores, 0.0)
    e_scaled = e_scores / np.sqrt(head_dim)
    e_scaled = e_scaled + gamma(4, u) * (np.abs(scaled) + e_scaled) + _flushed(0, 2, precision)
    e_scaled = np.where(opened, e_scaled, 0.0)

    weights, e_weights = (
        stages.weights,
        _softmax(scaled, e_scaled, opened, stages.weights, precision, tiles),
    )
    if keep is not None:
        e_weights = (e_weights + gamma(3, u) * (weights + e_weights)) / (1.0 - dropout) + _flushed(
            0, 2, precision
        )
        e_weights = np.where(keep, e_weights, 0.0)
        weights = np.where(keep, weights, 0.0) / (1.0 - dropout)
    reached = np.abs(values) + e_values
    e_context = weights @ e_values + e_weights @ reached
    e_context = e_context + _relative(num_tokens, 1, precision) * (weights + e_weights) @ reached
    e_context = e_context + _flushed(num_tokens, 1, precision)
    return Stages(e_queries, e_keys, e_values, e_scaled, e_weights, e_context)


def overflow(
    inputs: np.ndarray,
    state: Mapping[str, np.ndarray],
    mask: np.ndarray,
    precision: Precision,
    num_heads: int | None = None,
) -> str | None:
    """Say where the computation may leave the dtype's range, so that the bound means nothing; else nothing.

    Scores are formed before they are divided by sqrt(head_dim), for blocked positions too.
    """
    stages = attention_stages(inputs, state, mask, num_heads=num_heads)
    bounds = stage_bounds(inputs, state, mask, precision, num_heads=num_heads)
    queries, keys = (split_heads(np.abs(array), num_heads) for array in stages[:2])
    scores = queries @ keys.swapaxes(-1, -2)
    reached = {
        name: np.abs(getattr(stages, name)) + getattr(bounds, name)
        for name in ("queries", "keys", "values")
    }
    for name, magnitude in {**reached, "scores": scores}.items():
        largest = magnitude.max(initial=0.0)
        if not largest <= precision.largest:
            return f"{name} may reach {largest:.3g}; the dtype ends at {precision.largest:.3g}"
    return None


def most_tiles(num_tokens: int) -> int:
    """Return of how many tiles a fused softmax over so many tokens may be put together."""
    return -(-num_tokens // SMALLEST_TILE)


def gamma(n: int, u: float) -> float:
    """How far, relative to its absolute terms, n roundings of unit u may carry a result."""
    return n * u / (1.0 - n * u)


def _relative(n: int, k: int, precision: Precision) -> float:
    """r(n, k): a sum of n products in the accumulator, then k roundings to the dtype."""
    return (1.0 + gamma(n, precision.accumulated)) * (1.0 + gamma(k, precision.roundoff)) - 1.0


def _flushed(n: int, k: int, precision: Precision) -> float:
    """f(k): what flushing to zero may take from a sum of n products and k roundings."""
    accumulated = min(precision.smallest, _FLOAT32.smallest)
    return k * precision.smallest + n * accumulated


def _projection(
    inputs: np.ndarray,
    state: Mapping[str, np.ndarray],
    name: str,
    precision: Precision,
    inherited: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Return the bound of a linear layer, given that of its inputs."""
    weight = np.abs(state[f"{name}.weight"].astype(np.float64)).T
    arrived = np.broadcast_to(inherited, inputs.shape)
    absolute = (np.abs(inputs.astype(np.float64)) + arrived) @ weight
    bias = state.get(f"{name}.bias")
    absolute = absolute if bias is None else absolute + np.abs(bias.astype(np.float64))
    width = inputs.shape[-1]
    return (
        arrived @ weight + _relative(width, 2, precision) * absolute + _flushed(width, 2, precision)
    )


def _softmax(
    scaled: np.ndarray,
    e_scaled: np.ndarray,
    opened: np.ndarray,
    weights: np.ndarray,
    precision: Precision,
    tiles: int,
) -> np.ndarray:
    u = precision.roundoff
    e_max = e_scaled.max(axis=-1, keepdims=True, initial=0.0)
    top = np.where(opened, scaled, -np.inf).max(axis=-1, keepdims=True, initial=-np.inf)
    distance = (
        np.where(opened, np.where(np.isfinite(top), top, 0.0) - scaled, 0.0) + e_scaled + e_max
    )
    theta = np.where(opened, e_scaled + u * distance, 0.0)
    phi = 2.0 * u * EXP_ULPS
    growth = theta + theta.max(axis=-1, keepdims=True, initial=0.0) + np.log1p(phi) - np.log1p(-phi)
    summed = _relative(2 * scaled.shape[-1], 6, precision)
    growth = (
        growth + np.log1p(summed) + 2 * tiles * np.log1p(phi) + 2 * np.log1p(gamma(3 * tiles, u))
    )
    # No weight, exact or computed, is above 1 + summed; a growth this large says no more than that.
    told = np.where(growth < 30.0, weights * np.expm1(np.minimum(growth, 30.0)), weights + 1.0)
    return np.where(
        opened, np.minimum(told, 1.0 + summed) + _flushed(0, 3, precision), 0.0 * weights
    )
