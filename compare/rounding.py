r"""How far rounding alone may carry an output of masked attention from the exact value.

The bound is a priori and elementwise. With unit roundoff u and gamma_n = n u / (1 - n u), a sum of n
products in any order, fused or not, errs by at most gamma_n times the sum of the absolute products
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1). E(x) bounds the error
of x; lengths: d inputs, h head_dim, n tokens.

    queries  E(q) = gamma_{d+1} (|x| |W|^T + |b|); keys and values alike
    scores   E(s) = |q| E(k)^T + E(q) |k|^T + E(q) E(k)^T + gamma_h (|q| + E(q)) (|k| + E(k))^T
    scaled   E(t) = (E(s) + gamma_4 (|s| + E(s))) / sqrt(h)    rounded root, its reciprocal, the product
    softmax  the computed exponent is t_j - max + eta_j, |eta_j| <= E(t)_j + u |t_j - max| =: theta_j; exp errs
             by phi = 2 u EXP_ULPS; the sum of n positive terms by gamma_n, the quotient by two roundings:
             E(p)_j = p_j (e^{theta_j + max theta} (1 + phi) / (1 - phi) (1 + gamma_{2n+4}) - 1)
    dropout  E(w) = keep (E(p) + gamma_3 (p + E(p))) / (1 - rate)
    context  E(c) = w E(v) + E(w) (|v| + E(v)) + gamma_n (w + E(w)) (|v| + E(v))

Hypotheses: finite inputs, no overflow, no underflow that matters, and `exp` within EXP_ULPS.
"""

from collections.abc import Mapping

import numpy as np

from .reference import attention_stages

# Measured on 8e6 arguments from -80 to 0, CPU: torch 0.57, XLA 1.01 (float32) and 1.69 (float64) ulps;
# CUDA's expf is documented at 2. The next power of two above all of them.
EXP_ULPS = 4

# Beside the bound, a ceiling for float64, relative to the largest output: a slip of 0.01 % in any factor is nine
# orders above it, the rounding seen at the sizes of `compare.cases` (3e-16) two and a half below.
FLOAT64_RELATIVE = 1e-13

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24}


def context_bound(
    inputs: np.ndarray,
    state: Mapping[str, np.ndarray],
    mask: np.ndarray,
    unit_roundoff: float,
    keep: np.ndarray | None = None,
    dropout: float = 0.0,
) -> np.ndarray:
    """Return the largest |computed - exact| that rounding explains, for each entry of the output.

    Arguments are those of `attention_stages`. Rows blocked everywhere have a bound of NaN.
    """
    u = unit_roundoff
    stages = attention_stages(inputs, state, mask)
    num_tokens, head_dim = stages.queries.shape[-2:]
    e_queries, e_keys, e_values = (_projection(inputs, state, name, u) for name in ("W_query", "W_key", "W_value"))

    queries, keys, values = np.abs(stages.queries), np.abs(stages.keys), np.abs(stages.values)
    transposed, e_transposed = keys.swapaxes(-1, -2), e_keys.swapaxes(-1, -2)
    e_scores = queries @ e_transposed + e_queries @ (transposed + e_transposed)
    e_scores = e_scores + _gamma(head_dim, u) * (queries + e_queries) @ (transposed + e_transposed)
    opened = np.isfinite(stages.scores)
    scaled = np.where(opened, stages.scores, 0.0)
    e_scaled = e_scores / np.sqrt(head_dim) + _gamma(4, u) * (np.abs(scaled) + e_scores / np.sqrt(head_dim))

    weights, e_weights = stages.weights, _softmax(scaled, e_scaled, opened, stages.weights, u)
    if keep is not None:
        e_weights = np.where(keep, e_weights + _gamma(3, u) * (weights + e_weights), 0.0) / (1.0 - dropout)
        weights = np.where(keep, weights, 0.0) / (1.0 - dropout)
    whole = weights + e_weights
    return weights @ e_values + (e_weights + _gamma(num_tokens, u) * whole) @ (values + e_values)


def _gamma(n: int, u: float) -> float:
    return n * u / (1.0 - n * u)


def _projection(inputs: np.ndarray, state: Mapping[str, np.ndarray], name: str, u: float) -> np.ndarray:
    absolute = np.abs(inputs.astype(np.float64)) @ np.abs(state[f"{name}.weight"].astype(np.float64)).T
    bias = state.get(f"{name}.bias")
    absolute = absolute if bias is None else absolute + np.abs(bias.astype(np.float64))
    return _gamma(inputs.shape[-1] + 1, u) * absolute


def _softmax(scaled: np.ndarray, e_scaled: np.ndarray, opened: np.ndarray, weights: np.ndarray, u: float) -> np.ndarray:
    e_scaled = np.where(opened, e_scaled, 0.0)
    e_max = e_scaled.max(axis=-1, keepdims=True, initial=0.0)
    top = np.where(opened, scaled, -np.inf).max(axis=-1, keepdims=True, initial=-np.inf)
    distance = np.where(opened, np.where(np.isfinite(top), top, 0.0) - scaled, 0.0) + e_scaled + e_max
    theta = np.where(opened, e_scaled + u * distance, 0.0)
    phi = 2.0 * u * EXP_ULPS
    growth = theta + theta.max(axis=-1, keepdims=True, initial=0.0) + np.log1p(phi) - np.log1p(-phi)
    return weights * np.expm1(growth + np.log1p(_gamma(2 * scaled.shape[-1] + 4, u)))
