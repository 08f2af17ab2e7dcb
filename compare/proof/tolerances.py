"""The limits that are no rounding bound of a forward pass, each with its reason; tests and checks take theirs here."""

import numpy as np
from scipy.stats import binom, chi2

from .rounding_bound import PRECISIONS
from .running_error import Bounded

OUTPUT = "the rounding bound of this dtype, entry by entry, plus the reference's (compare/proof/rounding_bound.py)"
LEAKING = "this processor's {dtype} product leaks: NaN of one row reaches another (torch's fault, oneDNN issue 5717)"
BITS = "none: the bits are the same"
NAMES = "none: the names are the same"
GRADIENT = "the running error bound of the written-out gradient, for both sides (compare/proof/running_error.py)"
FUSED_GRADIENT = "the same, and twice for weights that come from the logarithm of their sum (compare/proof/running_error.py)"
HESSIAN = "the running error bound, for both sides, and twice for terms grouped otherwise (compare/proof/running_error.py)"
TWICE = "twice the rounding bound: each side lies within it of the exact value"
BINOMIAL = "exact binomial limits, two-sided; an honest dropout passes but for one time in 10^10"
SCALE = "1 / (1 - rate) and the product with it: three roundings"
TRAINING = "each step's running error bound, carried on by the training itself (compare/proof/reference_training.py)"

# The chance that an honest dropout is accused, for each count.
FALSE_ALARM = 1e-10
# Random signs from which the spread of a training run is estimated, and the chance to underestimate
# it.
TRAINING_SAMPLES, UNDERESTIMATED = 16, 1e-9


def both_sides(bounded: Bounded) -> np.ndarray:
    """Return how far two float64 computations of the same terms may lie apart."""
    return 2.0 * bounded.error


def regrouped(bounded: Bounded) -> np.ndarray:
    """Return the same where the terms may be grouped otherwise: reverse over reverse against forward over reverse."""
    return 2.0 * both_sides(bounded)


def binomial_distance(count: int, total: int, probability: float) -> tuple[float, float, float]:
    """Return a count, what is expected, and the exact binomial limit on its side, as a distance from that."""
    lower, upper = binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], total, probability)
    expected = total * probability
    return float(count), expected, float(upper - expected if count > expected else expected - lower)


def dropout_scale() -> float:
    """Return how far a kept weight times (1 - rate) may lie from 1, in float32."""
    return 3.0 * PRECISIONS["float32"].roundoff


def worst_case(samples: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return a limit for a sum of that many errors, each within its bound, from sums of these bounds with random signs.

    To first order a run deviates by sum(a_i e_i), |e_i| <= r_i. With random signs that is sum(+-a_i
    r_i), whose mean square is sum((a_i r_i)^2); by Cauchy-Schwarz the worst case, sum(|a_i r_i|),
    is at most sqrt(n) times its root. The root is estimated from the samples; by their number's
    chi-square law it is underestimated by more than the factor used here less than once in 10^9.

    Args:
        samples: (samples, ...), the deviations under random signs.
        errors: how many errors have come together, broadcast against the rest.
    """
    count = len(samples)
    root = np.sqrt((samples**2).mean(axis=0) * count / chi2.ppf(UNDERESTIMATED, count))
    return np.sqrt(errors) * root
