"""Split arrays into blocks of bounded size, and process several items at once."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ..frameworks import torch

BLOCK_BYTES = 8 << 20
# A part of a transposed array should fit into a processor's cache, but its columns must not be so
# narrow that a cache line is fetched for only a few of its bytes.
_PART_BYTES, _COLUMNS_BYTES = 1 << 20, 256
# The most that is in memory at once, unless a single tensor is larger.
BATCH_BYTES = 64 << 20
WORKERS = min(4, os.cpu_count() or 1)
_CARRIERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}

Item = TypeVar("Item")
Result = TypeVar("Result")


def blocks(array: np.ndarray, *, alone: bool = False) -> Iterator[np.ndarray]:
    """Yield the array's bytes in native byte order and C order, without copying the whole array.

    Args:
        array: an array with any strides.
        alone: True if nothing else runs meanwhile, so that other threads may prepare the next
            blocks.
    """
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view(np.uint8)
        yield from (
            flat[begin : begin + BLOCK_BYTES] for begin in range(0, flat.nbytes, BLOCK_BYTES)
        )
        return
    parts = ahead(_parts(array), contiguous) if alone else map(contiguous, _parts(array))
    yield from (part.reshape(-1).view(np.uint8) for part in parts)


def contiguous(array: np.ndarray) -> np.ndarray:
    """Return the array in C order.

    A transposed matrix is copied part by part. Each part is first copied in its memory order, then
    transposed by torch. This is four times as fast as NumPy, whose copy jumps from row to row.
    """
    if array.flags.c_contiguous or any(stride < 0 for stride in array.strides):
        return np.asarray(array, order="C")  # unlike ascontiguousarray, keeps 0-d arrays 0-d
    carrier: np.ndarray = array.view(_CARRIERS[array.dtype.itemsize])
    flat = torch.from_numpy(np.empty(array.size, carrier.dtype))
    begin = 0
    for part in _parts(carrier):
        flat[begin : begin + part.size].view(part.shape).copy_(
            torch.from_numpy(np.array(part, order="K"))
        )
        begin += part.size
    return flat.numpy().view(array.dtype).reshape(array.shape)


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the array in consecutive parts."""
    row_bytes = array.nbytes // len(array)
    wide_enough = min(_COLUMNS_BYTES // array.itemsize, BLOCK_BYTES // row_bytes)
    rows = max(_PART_BYTES // row_bytes, wide_enough)
    if rows:
        yield from (array[begin : begin + rows] for begin in range(0, len(array), rows))
    else:
        for part in array:
            yield from _parts(part)


def ahead(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """Yield the results in order, while other threads work on the next items."""
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
    """Yield each item with its result, in order. Small items run together, large items alone."""
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
