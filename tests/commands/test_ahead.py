"""A second process does some of the jobs; the first process does those that fail there."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from compare.cli import AHEAD, CHECKS
from compare.commands.ahead import Ahead
from compare.commands.jobs import Job
from compare.proof.remembered import MAX_RESULTS, remembered
from compare.report.model import Section
from compare.runners.compile_cache import compilation_cache


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@pytest.mark.slow
def test_jobs_are_done_once_by_either(threads: int) -> None:
    jobs = [
        Job("no_such_part"),
        Job("mutants", {"recorded": True}, ahead=2),
        Job("checks", {"names": ["dropout"]}, ahead=1),
    ]
    with closing(Ahead(jobs)) as second:
        assert torch.get_num_threads() == 1
        assert "OMP_NUM_THREADS" not in os.environ
        assert second.take(jobs[0]) is None, "this job is not for the second process"
        assert second._results.poll(120), "the second process has not done its first job"
        sections = second.take(jobs[2])
        assert sections is not None
        (section,) = sections
        assert isinstance(section, Section)
        assert [check.held for check in section.checks] == [True, True, True]
        process = second._process
    assert not process.is_alive()
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_what_fails_there_is_done_here() -> None:
    jobs = [Job("no_such_part", ahead=1), Job("mutants", {"recorded": True}, ahead=2)]
    with closing(Ahead(jobs)) as second:
        second._process.join(60)
        assert second.take(jobs[0]) is None
        assert second.take(jobs[1]) is None


def test_the_names_are_those_of_jobs() -> None:
    assert AHEAD.keys() <= {*CHECKS, "devices", "checkpoints"}
    assert sorted(AHEAD.values()) == list(range(1, 1 + len(AHEAD)))


def test_a_result_is_looked_up_by_content() -> None:
    calls = []

    @remembered
    def double(array: np.ndarray, names: dict[str, np.ndarray], scale: float = 2.0) -> np.ndarray:
        calls.append(scale)
        return scale * array

    ones = np.ones(3, np.float32)
    first = double(ones, {"a": ones[:2]})
    assert double(ones.copy(), {"a": np.ones(2, np.float32)}) is first
    others = [
        double(ones.astype(np.float64), {"a": ones}),
        double(ones, {"b": ones}),
        double(ones, {"a": 0 * ones}),
        double(ones, {"a": ones}, 3.0),
        double(ones[None], {"a": ones}),
        double(-ones, {"a": ones}),
    ]
    assert len(calls) == 1 + len(others)
    for number in range(MAX_RESULTS):
        double(ones * number, {})
    assert double(ones, {"a": ones[:2]}) is not first, "more than MAX_RESULTS results are kept"


def test_the_users_cache_is_honoured(tmp_path: Path) -> None:
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        with compilation_cache():
            assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path)
            assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)
        jax.config.update("jax_compilation_cache_dir", None)
        with compilation_cache():
            folder = Path(jax.config.values["jax_compilation_cache_dir"])
            assert folder.is_dir()
        assert not folder.exists()
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert tmp_path.is_dir()
