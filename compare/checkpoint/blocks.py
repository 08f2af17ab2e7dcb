"""Arrays in blocks of bounded size, and work on several of them at once."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

BLOCK_BYTES = 8 << 20
# What may be in memory at once beyond a single tensor that is larger.
BATCH_BYTES = 64 << 20
WORKERS = min(4, os.cpu_count() or 1)
_CARRIERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}

Item = TypeVar("Item")
Result = TypeVar("Result")


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the array's bytes, native and in C order, however it lies in memory, without copying it whole."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.nbytes <= BLOCK_BYTES or array.flags.c_contiguous:
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        yield from (flat[begin : begin + BLOCK_BYTES] for begin in range(0, flat.nbytes, BLOCK_BYTES))
        return
    rows = BLOCK_BYTES * len(array) // array.nbytes
    if not rows:
        for part in array:
            yield from blocks(part)
        return
    begins = range(0, len(array), rows)
    yield from ahead(begins, lambda begin: contiguous(array[begin : begin + rows]).reshape(-1).view(np.uint8))


def contiguous(array: np.ndarray) -> np.ndarray:
    """Return the array in C order.

    A part of a transposed matrix is first gathered as it lies in memory, then transposed by torch: four times as
    fast as NumPy, whose copy jumps from row to row.
    """
    if array.flags.c_contiguous or any(stride < 0 for stride in array.strides):
        return np.asarray(array, order="C")  # which leaves a 0-d array one
    carrier: np.ndarray = np.array(array, order="K").view(_CARRIERS[array.dtype.itemsize])
    return torch.from_numpy(carrier).contiguous().numpy().view(array.dtype)


def ahead(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """Yield the results in order, some of the next already being worked on."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


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
