"""The limits of the dropout check catch a wrong rate."""

import numpy as np
import pytest

from compare.checks.dropout import SHAPES
from compare.proof.tolerances import binomial_distance

RATE = 0.3


@pytest.mark.parametrize(
    ("drawn_with", "held"), [(RATE, True), (RATE + 0.006, False), (RATE - 0.006, False)]
)
def test_a_rate_that_is_off_is_seen(drawn_with: float, held: bool) -> None:
    kept = np.random.default_rng(0).random(SHAPES["batch", "queries", "keys"]) >= drawn_with
    count, expected, limit = binomial_distance(int(kept.sum()), kept.size, 1 - RATE)
    assert (abs(count - expected) <= limit) is held
