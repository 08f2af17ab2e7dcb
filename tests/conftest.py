"""Strict numeric modes, the `device` fixture, and the tested versions in the header."""

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec

import jax
import pytest
import torch

from compare.report.machine import machine, versions
from compare.runners.compile_cache import compilation_cache
from compare.runners.run import missing_cuda

if find_spec("hypothesis"):
    from hypothesis import settings

    # Every run uses the same examples. `--hypothesis-profile=wide` draws many new ones each time.
    settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=40)
    settings.register_profile("wide", max_examples=2000, deadline=None)
    settings.load_profile("fixed")

# The processes of the suite share compiled programs: XLA takes half of the time of a check.
_cache = compilation_cache()
_cache.__enter__()

# The same holds for Inductor, whose own cache does not record the instruction set of its programs.
_inductor = tempfile.TemporaryDirectory(
    prefix="attention-parity-inductor-", ignore_cleanup_errors=True
)
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _inductor.name)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU the default is TF32


def pytest_addoption(parser: pytest.Parser) -> None:
    if not find_spec("pytest_timeout"):
        # Otherwise the `timeout` setting in pyproject.toml would be an error.
        parser.addini("timeout", "see pytest-timeout")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timeout(seconds): see pytest-timeout")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Use up to four cores if pytest-xdist is installed; `-n 0` uses this process alone."""
    is_worker = hasattr(config, "workerinput")
    if not config.pluginmanager.hasplugin("xdist") or is_worker or config.option.usepdb:
        return
    if config.option.numprocesses is None:
        config.option.numprocesses = min(4, os.cpu_count() or 1)
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test, so that no worker waits for it at the end."""
    items.sort(key=lambda item: item.name != "test_the_main_job")


def pytest_report_header() -> str:
    packages = ", ".join(f"{name} {number}" for name, number in versions().items())
    processor = ", ".join(machine().values())
    cuda = missing_cuda() or "seen by both frameworks"
    return f"attention-parity: {packages}; CUDA: {cuda}; {processor}"


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """In both frameworks, with the promotions that Flax's own layers need."""
    torch.set_default_dtype(torch.float64)
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that both frameworks see; a skip names the framework that lacks it."""
    if request.param == "cuda" and (missing := missing_cuda()):
        pytest.skip(missing)
    return request.param
