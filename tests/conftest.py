"""Strict modes, the device fixture, and the versions under test in the header."""

import jax
import pytest
from hypothesis import settings

from compare.__main__ import versions
from compare.run import missing_cuda

# The same examples at every run; `--hypothesis-profile=wide` draws many more, other ones each time.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("wide", max_examples=2000, deadline=None)
settings.load_profile("fixed")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU the default is TF32


def pytest_report_header() -> str:
    found = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"attention-parity: {found}; CUDA: {missing_cuda() or 'seen by both frameworks'}"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that both frameworks see; a skip names the framework that lacks it."""
    if request.param == "cuda" and (missing := missing_cuda()):
        pytest.skip(missing)
    return request.param
