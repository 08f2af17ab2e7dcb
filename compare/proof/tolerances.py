"""Tolerances other than the forward rounding bound, and how each limit is derived."""

import numpy as np
from scipy.special import gammaincinv

from .rounding_bound import PRECISIONS
from .running_error import Bounded

OUTPUT = (
    "the elementwise rounding bound of this dtype plus that of the reference "
    "(compare/proof/rounding_bound.py)"
)
LEAKING = (
    "this processor's {dtype} product leaks: a NaN row spreads to other rows, which is a defect "
    "of torch (oneDNN issue 5717)"
)
BITS = "exact equality of the bits"
NAMES = "exact equality of the names"
GRADIENT = (
    "the running error bound of the written-out gradient, once for each side "
    "(compare/proof/running_error.py)"
)
FUSED_GRADIENT = (
    "twice the running error bound of the written-out gradient for each side, because the weights "
    "are computed from the logarithm of their sum (compare/proof/running_error.py)"
)
LOW_GRADIENT = (
    "the running error bound of the written-out gradient in float64, times the roundoff of the "
    "dtype over that of float64: the bound is linear in the roundoff (compare/proof/"
    "running_error.py)"
)
HESSIAN = (
    "twice the running error bound for each side, because the terms may be grouped differently "
    "(compare/proof/running_error.py)"
)
FUSED_HESSIAN = (
    "four times the running error bound for each side: twice because the terms are regrouped, and "
    "twice because the weights are computed from the logarithm of their sum "
    "(compare/proof/running_error.py)"
)
ROUNDED_ONCE = "the rounding bound of float32, and one rounding of the result to this dtype"
TWICE = "twice the rounding bound, because both sides may differ from the exact value by that much"
TWO_RUNS = "the number of roundings of both sides, times the largest term (compare/checks/heads.py)"
BINOMIAL = (
    "the exact two-sided binomial limit, which a correct dropout exceeds once in 10^10 counts"
)
SCALE = "the three roundings of 1 / (1 - rate) and of the product with it"
TRAINING = (
    "the running error bound of each step, propagated by the training itself "
    "(compare/proof/reference_training.py)"
)

# The probability that a correct dropout fails, for each count.
FALSE_ALARM = 1e-10
# The number of random-sign runs that estimate the spread of a training run, and the probability
# that the estimate is too low.
TRAINING_SAMPLES, UNDERESTIMATED = 16, 1e-9


def both_sides(bounded: Bounded) -> np.ndarray:
    """Return the largest difference between two float64 computations of the same terms."""
    return 2.0 * bounded.error


def in_dtype(bounded: Bounded, dtype: str) -> np.ndarray:
    """Return the largest error of a computation of these terms in another dtype, to first order."""
    return bounded.error * (PRECISIONS[dtype].roundoff / PRECISIONS["float64"].roundoff)


def regrouped(bounded: Bounded) -> np.ndarray:
    """Return the largest difference if the two computations may also group the terms differently.

    For example, reverse over reverse instead of forward over reverse differentiation.
    """
    return 2.0 * both_sides(bounded)


def binomial_distance(count: int, total: int, probability: float) -> tuple[float, float, float]:
    """Return the count, its expectation, and the largest distance between them that is allowed.

    The limit is the exact binomial quantile on the count's side of the expectation.
    """
    from scipy.stats import binom  # half a second, which few commands need

    lower, upper = binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], total, probability)
    expected = total * probability
    return float(count), expected, float(upper - expected if count > expected else expected - lower)


def dropout_scale() -> float:
    """Return the largest distance of a kept weight times (1 - rate) from 1, in float32."""
    return 3.0 * PRECISIONS["float32"].roundoff


def worst_case(samples: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return a limit for the worst sum of n bounded errors, from sums with random signs.

    To first order, a run deviates by sum(a_i e_i) with |e_i| <= r_i. With random signs the
    deviation is sum(+-a_i r_i), and its mean square is sum((a_i r_i)^2). By Cauchy-Schwarz, the
    worst case sum(|a_i r_i|) is at most sqrt(n) times the root of that mean square. The root is
    estimated from the samples. The estimate follows a chi-square law; the factor used here makes it
    too low less than once in 10^9.

    Args:
        samples: (samples, ...), the deviations under random signs.
        errors: the number n of errors that have accumulated, broadcast against the other axes.
    """
    count = len(samples)
    quantile = 2.0 * gammaincinv(count / 2.0, UNDERESTIMATED)
    root = np.sqrt((samples**2).mean(axis=0) * count / quantile)
    return np.sqrt(errors) * root
