"""Arrays in blocks of bounded size, and work on several of them at once."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

BLOCK_BYTES = 8 << 20
# What may be in memory at once beyond a single tensor that is larger.
BATCH_BYTES = 64 << 20
WORKERS = min(4, os.cpu_count() or 1)

Item = TypeVar("Item")
Result = TypeVar("Result")


def blocks(array: np.ndarray) -> Iterator[memoryview]:
    """Yield the array's bytes in C order, however it lies in memory, without copying it whole."""
    if array.nbytes <= BLOCK_BYTES or array.flags.c_contiguous or array.ndim == 0:
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for begin in range(0, flat.nbytes, BLOCK_BYTES):
            yield flat[begin : begin + BLOCK_BYTES].data
        return
    rows = max(1, BLOCK_BYTES * len(array) // array.nbytes)
    for begin in range(0, len(array), rows):
        part = array[begin : begin + rows]
        yield from blocks(part if len(part) > 1 else part[0])


def in_batches(
    items: Iterable[Item], nbytes: Callable[[Item], int], work: Callable[[Item], Result]
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with the result of its work, small ones several at a time, large ones alone."""
    with ThreadPoolExecutor(WORKERS) as pool:
        batch: list[Item] = []
        size = 0
        for item in items:
            if batch and size + nbytes(item) > BATCH_BYTES:
                yield from zip(batch, pool.map(work, batch), strict=True)
                batch, size = [], 0
            batch.append(item)
            size += nbytes(item)
        yield from zip(batch, pool.map(work, batch), strict=True)
