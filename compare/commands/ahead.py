"""A second process that works on later parts of a command while the first one works on the earlier parts."""

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
    """The second process: it takes jobs in the order of `ahead` while this process takes them from the beginning.

    Until `close`, torch computes in one thread in both: two would wait for the same cores by
    spinning.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        context = multiprocessing.get_context(
            "spawn"
        )  # a fork would inherit the frameworks' threads
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
        """Return what the second process found, waiting for it; None if the caller has to do the job itself.

        That is if the second process has not begun with it, or failed: then the caller meets the
        error itself.
        """
        index = next(index for index, other in enumerate(self._jobs) if other is job)
        if _claim(self._claimed, index):
            return None
        try:
            while index not in self._received:
                other, sections = self._results.recv()
                self._received[other] = sections
        except (EOFError, OSError):
            return None
        return self._received.pop(index)

    def close(self) -> None:
        """End the second process, whatever it does."""
        self._process.terminate()
        self._process.join()
        self._results.close()
        torch.set_num_threads(self._threads)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let a process that is started here compute in one thread, unless the user has set how many."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def _claim(claimed: Any, index: int) -> bool:
    """Return whether nobody has claimed the job before."""
    with claimed.get_lock():
        is_free = not claimed[index]
        claimed[index] = True
        return is_free


def _work(jobs: Sequence[Job], claimed: Any, results: Connection) -> None:
    """Do jobs and send their sections; after an error the process ends without sending them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the first process
    ahead = sorted((job.ahead, index) for index, job in enumerate(jobs) if job.ahead is not None)
    for _, index in ahead:
        job = jobs[index]
        if _claim(claimed, index):
            try:
                found = list(job.sections())
            except Exception:
                return
            results.send((index, [section for section in found if isinstance(section, Section)]))
