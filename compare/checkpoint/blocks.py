"""Arrays in blocks of bounded size, and work on several of them at once."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

BLOCK_BYTES = 8 << 20
# A part of a transposed array that a processor's cache holds, if its columns are not so narrow that
# each line of memory would be fetched for a few of its bytes.
_PART_BYTES, _COLUMNS_BYTES = 1 << 20, 256
# What may be in memory at once beyond a single tensor that is larger.
BATCH_BYTES = 64 << 20
WORKERS = min(4, os.cpu_count() or 1)
_CARRIERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}

Item = TypeVar("Item")
Result = TypeVar("Result")


def blocks(array: np.ndarray, *, alone: bool = False) -> Iterator[np.ndarray]:
    """Yield the array's bytes, native and in C order, however it lies in memory, without copying it whole.

    Args:
        array: of any strides.
        alone: nothing else is worked on meanwhile, so that the next blocks may be made in other
            threads.
    """
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view(np.uint8)
        yield from (
            flat[begin : begin + BLOCK_BYTES] for begin in range(0, flat.nbytes, BLOCK_BYTES)
        )
        return
    made = ahead(_parts(array), contiguous) if alone else map(contiguous, _parts(array))
    yield from (part.reshape(-1).view(np.uint8) for part in made)


def contiguous(array: np.ndarray) -> np.ndarray:
    """Return the array in C order.

    Part after part of a transposed matrix is first gathered as it lies in memory, then transposed
    by torch: four times as fast as NumPy, whose copy jumps from row to row.
    """
    if array.flags.c_contiguous or any(stride < 0 for stride in array.strides):
        return np.asarray(array, order="C")  # which leaves a 0-d array one
    carrier: np.ndarray = array.view(_CARRIERS[array.dtype.itemsize])
    found = torch.from_numpy(np.empty(array.size, carrier.dtype))
    at = 0
    for part in _parts(carrier):
        found[at : at + part.size].view(part.shape).copy_(
            torch.from_numpy(np.array(part, order="K"))
        )
        at += part.size
    return found.numpy().view(array.dtype).reshape(array.shape)


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the array in parts, one behind the other."""
    each = array.nbytes // len(array)
    rows = max(_PART_BYTES // each, min(_COLUMNS_BYTES // array.itemsize, BLOCK_BYTES // each))
    if rows:
        yield from (array[begin : begin + rows] for begin in range(0, len(array), rows))
    else:
        for part in array:
            yield from _parts(part)


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
) -> Generator[tuple[Item, Result], None, None]:
    """Yield each item with the result of its work, in order, small ones several at a time, large ones alone."""
    pending: deque[tuple[Item, Future[Result]]] = deque()
    size = 0
    with ThreadPoolExecutor(WORKERS) as pool:
        for item in items:
            while pending and size + nbytes(item) > BATCH_BYTES:
                yield (done := _first(pending))
                size -= nbytes(done[0])
            pending.append((item, pool.submit(work, item)))
            size += nbytes(item)
        while pending:
            yield _first(pending)


def _first(pending: deque[tuple[Item, Future[Result]]]) -> tuple[Item, Result]:
    item, future = pending.popleft()
    return item, future.result()
