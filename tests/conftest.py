"""Strict modes, the device fixture, and the versions under test in the header."""

import os
import tempfile

import jax
import pytest
from hypothesis import settings

from compare.__main__ import versions
from compare.run import missing_cuda

# The same examples at every run; `--hypothesis-profile=wide` draws many more, other ones each time.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("wide", max_examples=2000, deadline=None)
settings.load_profile("fixed")

# What one process of the suite has compiled the others read: half of the time of a check is XLA's.
_compiled = tempfile.TemporaryDirectory(prefix="attention-parity-jax-", ignore_cleanup_errors=True)
for _name, _value in {
    "jax_compilation_cache_dir": _compiled.name,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)

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
