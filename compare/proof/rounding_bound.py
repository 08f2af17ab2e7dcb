r"""A bound on how far rounding can move an output of masked attention from its exact value.

The bound is a priori and elementwise. Every operation rounds its result to the working dtype, with
unit roundoff u. Sums of products are accumulated with unit roundoff v. For float32 and float64, v
is u. For the half precisions, v is that of float32, in which their products are exact. With
gamma_n(v) = n v / (1 - n v), a sum of n terms in any order, fused or not, has an error of at most
gamma_n(v) times the sum of the absolute terms (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., sections 3.1 and 3.4). A sum of n products followed by k roundings therefore
has an error of at most

    r(n, k) = (1 + gamma_n(v)) (1 + gamma_k(u)) - 1

times the sum of the absolute products, plus f(k) = k s + n s_v. The latter covers results below the
smallest normal number s (s_v in the accumulation), which may be flushed to zero. E(x) bounds the
error of x. The lengths are d inputs, h head_dim and n tokens.

    queries   E(q) = r(d, 2) (|x| |W|^T + |b|) + f(2)
              The roundings are those of the product and of the bias. Keys and values are alike.
    factor    E(q) = |c| E(q) + gamma_4(u) |c| (|q| + E(q)) + f(1), if scale is c / sqrt(h)
    scores    E(s) = |q| E(k)^T + E(q) (|k| + E(k))^T
                     + r(h, 1) (|q| + E(q)) (|k| + E(k))^T + f(1)
    scaled    E(t) = (E(s) + gamma_4(u) (|s| + E(s))) / sqrt(h) + f(2)
              The roundings are those of the root, the reciprocal and the product.
    softmax   E(p)_j = p_j (e^{theta_j + max theta} (1 + phi) / (1 - phi) (1 + r(2n, 6)) - 1) + f(3)
              The computed exponent is t_j - max + eta_j with
              |eta_j| <= E(t)_j + u |t_j - max| =: theta_j. `exp` errs by phi = 2 u EXP_ULPS, the
              sum of positive terms by r(n, 1), and the quotient by two roundings. E(p)_j is also
              at most 1 + r(2n, 6) + f(3), because no weight exceeds 1 + r(2n, 6).
    dropout   E(w) = keep ((E(p) + gamma_3(u) (p + E(p))) / (1 - rate) + f(2))
    context   E(c) = w E(v) + E(w) (|v| + E(v)) + r(n, 1) (w + E(w)) (|v| + E(v)) + f(1)
    out_proj  E(o) = E(c) |W|^T + r(d, 2) ((|c| + E(c)) |W|^T + |b|) + f(2)
              The roundings are those of the product and of the bias. d is the width of all heads.

A softmax that is computed tile by tile multiplies its partial results by an exponential at each of
T tiles. The growth of each weight, and that of the sum, then includes T times an error of phi, and
gamma_3T(u). Its queries are scaled before the product, so E(s) has r(h, 4).

The bound assumes finite inputs, no overflow (`overflow` names the stage where one may occur), and
an `exp` that is accurate to EXP_ULPS.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .reference import Stages, attention_stages, merge_heads, query_factor, split_all

# Measured on the CPU with 8e6 arguments from -80 to 0: torch errs by 0.57 ulps, XLA by 1.01 in
# float32 and 1.69 in float64. CUDA documents 2 ulps for expf. 4 is the next power of two above all.
EXP_ULPS = 4

# A second limit for float64 outputs, relative to the largest output. A mistake of 0.01 % in any
# factor exceeds it by nine orders of magnitude. The rounding errors measured at the sizes of
# `compare.proof.cases` (3e-16) are two and a half orders below it.
FLOAT64_RELATIVE = 1e-13

# Every tile or strip of a fused path has at least this many keys, except the last.
SMALLEST_TILE = 128


class Precision(NamedTuple):
    """How a dtype rounds.

    Attributes:
        roundoff: the unit roundoff u.
        accumulated: the unit roundoff v of sums of products.
        smallest: the smallest normal number.
        largest: the largest finite number.
    """

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

# TF32 rounds both operands of a product to 11 bits. One rounding of twice the size covers both.
# Everything else is float32.
TF32 = Precision(2.0**-10, _FLOAT32.roundoff, _FLOAT32.smallest, _FLOAT32.largest)


def stage_bounds(
    inputs: np.ndarray,
    state: Mapping[str, np.ndarray],
    mask: np.ndarray,
    precision: Precision,
    keep: np.ndarray | None = None,
    dropout: float = 0.0,
    num_heads: int | None = None,
    scale: float | None = None,
    tiles: int = 0,
    inputs_k: np.ndarray | None = None,
    inputs_v: np.ndarray | None = None,
) -> Stages:
    """Return, for each entry of every stage, the largest |computed - exact| that rounding explains.

    Blocked scores have a bound of 0. In rows that are blocked everywhere, the bound is NaN, like
    the output.

    Args:
        inputs: as for `attention_stages`.
        state: as for `attention_stages`.
        mask: as for `attention_stages`.
        precision: how the implementation rounds.
        keep: as for `attention_stages`.
        dropout: as for `attention_stages`.
        num_heads: as for `attention_stages`.
        scale: as for `attention_stages`.
        tiles: the largest number of tiles in which the implementation computes its softmax; 0 if
            it computes each row at once.
        inputs_k: as for `attention_stages`.
        inputs_v: as for `attention_stages`.
    """
    inputs_k = inputs if inputs_k is None else inputs_k
    inputs_v = inputs_k if inputs_v is None else inputs_v
    stages = attention_stages(inputs, state, mask, None, 0.0, num_heads, scale, inputs_k, inputs_v)
    projected = [
        _projection(array, state, name, precision)
        for array, name in ((inputs, "W_query"), (inputs_k, "W_key"), (inputs_v, "W_value"))
    ]
    queries, keys, values = split_all(*stages[:3], num_heads)
    e_queries, e_keys, e_values = split_all(projected[0], projected[1], projected[2], num_heads)
    if scale is not None:
        factor = query_factor(scale, queries.shape[-1])
        e_queries = _scaled(queries, e_queries, factor, precision)
        queries = queries * factor
    exact = Stages(queries, keys, values, stages.scores, stages.weights, stages.context)
    bounds = attention_bounds(exact, (e_queries, e_keys, e_values), precision, keep, dropout, tiles)
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
    """Return the bounds of attention without the projections.

    Args:
        stages: the exact stages of `masked_attention`, computed without dropout.
        errors: the bounds of queries, keys and values; 0 for those that are exact.
        precision: as for `stage_bounds`.
        keep: as for `stage_bounds`.
        dropout: as for `stage_bounds`.
        tiles: as for `stage_bounds`.
    """
    u = precision.roundoff
    queries, keys, values = stages[:3]
    e_queries, e_keys, e_values = (
        np.broadcast_to(error, array.shape) for error, array in zip(errors, stages[:3], strict=True)
    )
    num_tokens, head_dim = keys.shape[-2:]

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

    weights = stages.weights
    e_weights = _softmax(scaled, e_scaled, opened, weights, precision, tiles)
    if keep is not None:
        e_weights = (e_weights + gamma(3, u) * (weights + e_weights)) / (1.0 - dropout)
        e_weights = e_weights + _flushed(0, 2, precision)
        e_weights = np.where(keep, e_weights, 0.0)
        weights = np.where(keep, weights, 0.0) / (1.0 - dropout)
    values = np.abs(values) + e_values
    e_context = weights @ e_values + e_weights @ values
    e_context = e_context + _relative(num_tokens, 1, precision) * (weights + e_weights) @ values
    e_context = e_context + _flushed(num_tokens, 1, precision)
    return Stages(e_queries, e_keys, e_values, e_scaled, e_weights, e_context)


def overflow(
    inputs: np.ndarray,
    state: Mapping[str, np.ndarray],
    mask: np.ndarray,
    precision: Precision,
    num_heads: int | None = None,
    scale: float | None = None,
) -> str | None:
    """Return which stage may leave the dtype's range, where the bound does not hold; else None.

    Scores are computed before they are divided by sqrt(head_dim), also at blocked positions.
    """
    stages = attention_stages(inputs, state, mask, num_heads=num_heads, scale=scale)
    bounds = stage_bounds(inputs, state, mask, precision, num_heads=num_heads, scale=scale)
    queries, keys, _ = split_all(stages.queries, stages.keys, stages.values, num_heads)
    # A kernel multiplies the queries, the formula the scores.
    factor = max(1.0, abs(query_factor(scale, queries.shape[-1])))
    scores = factor * np.abs(queries) @ np.abs(keys).swapaxes(-1, -2)
    magnitudes = {
        name: np.abs(getattr(stages, name)) + getattr(bounds, name)
        for name in ("queries", "keys", "values")
    }
    magnitudes["scores"] = scores
    for name, magnitude in magnitudes.items():
        largest = magnitude.max(initial=0.0)
        if not largest <= precision.largest:
            return f"{name} may reach {largest:.3g}; the dtype holds up to {precision.largest:.3g}"
    return None


def most_tiles(num_tokens: int) -> int:
    """Return the largest number of tiles of a fused softmax over this many tokens."""
    return -(-num_tokens // SMALLEST_TILE)


def _scaled(
    array: np.ndarray, error: np.ndarray, factor: float, precision: Precision
) -> np.ndarray:
    """Return the error of the array times a factor that was itself computed with 3 roundings."""
    grown = abs(factor) * (np.abs(array) + error)
    return abs(factor) * error + gamma(4, precision.roundoff) * grown + _flushed(0, 1, precision)


def gamma(n: int, u: float) -> float:
    """Return the error bound of n roundings of unit roundoff u, relative to the absolute terms."""
    return n * u / (1.0 - n * u)


def _relative(n: int, k: int, precision: Precision) -> float:
    """Return r(n, k), for a sum of n products in the accumulator and k roundings to the dtype."""
    return (1.0 + gamma(n, precision.accumulated)) * (1.0 + gamma(k, precision.roundoff)) - 1.0


def _flushed(n: int, k: int, precision: Precision) -> float:
    """Return f(k), the error from flushing to zero in a sum of n products and k roundings."""
    accumulated = min(precision.smallest, _FLOAT32.smallest)
    return k * precision.smallest + n * accumulated


def _projection(
    inputs: np.ndarray,
    state: Mapping[str, np.ndarray],
    name: str,
    precision: Precision,
    e_inputs: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Return the bound of a linear layer, given the bound of its inputs."""
    weight = np.abs(state[f"{name}.weight"].astype(np.float64)).T
    e_inputs = np.broadcast_to(e_inputs, inputs.shape)
    absolute = (np.abs(inputs.astype(np.float64)) + e_inputs) @ weight
    bias = state.get(f"{name}.bias")
    absolute = absolute if bias is None else absolute + np.abs(bias.astype(np.float64))
    width = inputs.shape[-1]
    rounding = _relative(width, 2, precision) * absolute + _flushed(width, 2, precision)
    return e_inputs @ weight + rounding


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
    # No weight, exact or computed, exceeds 1 + summed. From a growth of 30 on, only that is used.
    bound = np.where(growth < 30.0, weights * np.expm1(np.minimum(growth, 30.0)), np.inf)
    return np.where(
        opened, np.minimum(bound, 1.0 + summed) + _flushed(0, 3, precision), 0.0 * weights
    )
