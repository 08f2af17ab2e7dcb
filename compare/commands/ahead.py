"""A second process that runs later jobs of a command while the first process runs earlier ones."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..report.model import Section
from .jobs import Job


class Ahead:
    """The second process. It takes jobs in the order of `Job.ahead`, this process from the start.

    Until `close`, torch computes in one thread in both processes. With more, their threads would
    spin while waiting for the same cores.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        # A fork would inherit the frameworks' threads.
        context = multiprocessing.get_context("spawn")
        self._claimed = context.Array("b", len(jobs))
        self._results, sender = context.Pipe(duplex=False)
        self._received: dict[int, list[Section]] = {}
        self._process = context.Process(
            target=_work, args=(jobs, self._claimed, sender), daemon=True
        )
        with _one_thread():
            self._process.start()
        sender.close()
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def take(self, job: Job) -> list[Section] | None:
        """Wait for the second process and return the sections of the job, or None.

        None means that the caller has to do the job: the second process has not started it, or has
        failed. In the latter case the caller gets the same error.
        """
        index = next(index for index, candidate in enumerate(self._jobs) if candidate is job)
        if _claim(self._claimed, index):
            return None
        try:
            while index not in self._received:
                received, sections = self._results.recv()
                self._received[received] = sections
        except (EOFError, OSError):
            return None
        return self._received.pop(index)

    def close(self) -> None:
        """End the second process, even in the middle of a job."""
        self._process.terminate()
        self._process.join()
        self._results.close()
        torch.set_num_threads(self._threads)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let child processes compute in one thread, unless the user has set a number of threads."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def _claim(claimed: Any, index: int) -> bool:
    """Claim the job, and return whether it was still free."""
    with claimed.get_lock():
        is_free = not claimed[index]
        claimed[index] = True
        return is_free


def _work(jobs: Sequence[Job], claimed: Any, results: Connection) -> None:
    """Run jobs and send their sections. An error ends the process and sends nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    order = sorted((job.ahead, index) for index, job in enumerate(jobs) if job.ahead is not None)
    for _, index in order:
        job = jobs[index]
        if _claim(claimed, index):
            try:
                items = list(job.sections())
            except Exception:
                return
            results.send((index, [item for item in items if isinstance(item, Section)]))
