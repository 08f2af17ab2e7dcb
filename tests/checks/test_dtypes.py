"""Show that the small problems of the dtype check can tell a wrong gradient from a rounded one."""

import numpy as np
import pytest

from compare.checks.dtypes import DTYPES, PROBLEMS, TOKENS, problems
from compare.checks.gradients import exact_derivatives
from compare.proof import tolerances
from compare.proof.cases import Config, draw


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "config", "seed"), PROBLEMS)
def test_every_gradient_is_three_times_its_limit(
    name: str, config: Config, seed: int, dtype: str
) -> None:
    trial = draw(config, TOKENS, np.random.default_rng(seed), batch=1).rounded(dtype)
    _, wide = problems(trial, dtype)
    for weight, exact in exact_derivatives(wide).items():
        if weight == "W_key.bias":  # its gradient is 0: softmax does not change with it
            continue
        limit = tolerances.in_dtype(exact.value, dtype)
        assert np.max(np.abs(exact.value.value) / limit) > 3, f"{name}, {weight}"
