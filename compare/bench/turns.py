"""Time calls that take turns, so that a slow moment of the machine meets all of them."""

import statistics
import time
from collections.abc import Callable, Sequence


def median_milliseconds(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median time of each call in ms, after a first turn that is not counted."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, milliseconds in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            if turn:
                milliseconds.append(1000 * (time.perf_counter() - begin))
    return [statistics.median(each) for each in times]
