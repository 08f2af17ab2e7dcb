"""Arrays in pieces: the same bytes for any memory layout, and never more at once than allowed."""

import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

from compare.checkpoint import blocks as module
from compare.checkpoint.blocks import blocks, contiguous, in_batches

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies

DTYPES = (
    "float32",
    ">f4",
    "float64",
    "float16",
    ml_dtypes.bfloat16,
    "bool",
    "int8",
    "complex64",
    "complex128",
)


@st.composite
def views(draw: Any) -> np.ndarray:
    """Return a view with axes in any order: reversed, with steps, or repeated."""
    dtype, shape = (
        np.dtype(draw(st.sampled_from(DTYPES))),
        draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)),
    )
    data = np.arange(int(np.prod(shape)) * dtype.itemsize) * 37 % (2 if dtype == np.bool_ else 251)
    array = data.astype(np.uint8).view(dtype).reshape(shape)
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    steps = draw(st.lists(st.sampled_from([1, 1, 2, -1]), min_size=array.ndim, max_size=array.ndim))
    array = array[tuple(slice(None, None, step) for step in steps)]
    return np.broadcast_to(array, (3, *array.shape)) if draw(st.booleans()) else array


@given(
    views(),
    st.sampled_from([16, 50, 1 << 20]),
    st.sampled_from([16, 256]),
    st.sampled_from([40, 8 << 20]),
)
def test_pieces_are_the_array_in_c_order(
    array: np.ndarray, part: int, columns: int, block: int
) -> None:
    expected = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))).tobytes()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "_PART_BYTES": part,
            "_COLUMNS_BYTES": columns,
            "BLOCK_BYTES": block,
        }.items():
            patch.setattr(module, name, value)
        for alone in (False, True):
            assert b"".join(block.tobytes() for block in blocks(array, alone=alone)) == expected
        copy = contiguous(array)
    assert (copy.dtype, copy.shape, copy.flags.c_contiguous) == (array.dtype, array.shape, True)
    assert copy.astype(copy.dtype.newbyteorder("=")).tobytes() == expected


@pytest.mark.parametrize(
    "shape", [(3000, 700), (700, 3000), (2, 3_000_000), (3_000_000, 2), (640, 3, 3, 1000)]
)
def test_a_large_matrix_comes_in_small_pieces(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape).T
    pieces = list(blocks(array))
    assert max(piece.nbytes for piece in pieces) <= module.BLOCK_BYTES < array.nbytes
    assert b"".join(piece.tobytes() for piece in pieces) == array.tobytes()


@given(st.lists(st.integers(0, 12), max_size=12))
def test_batches_keep_order_and_bound(sizes: list[int]) -> None:
    in_flight, most, lock = 0, 0, threading.Lock()

    def work(item: tuple[int, int]) -> int:
        nonlocal in_flight, most
        with lock:
            in_flight += item[1]
            most = max(most, in_flight)
        return item[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH_BYTES", 10)
        order = []
        for item, result in in_batches(enumerate(sizes), lambda item: item[1], work):
            order.append((item, result))
            with lock:
                in_flight -= item[1]
    assert order == [((index, size), index) for index, size in enumerate(sizes)]
    assert most <= max([10, *sizes])


def test_small_items_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORKERS", 2)
    together = threading.Barrier(2, timeout=20)

    def work(item: Any) -> None:
        together.wait()

    # Three items fit at once, and two threads work. In fixed batches of three, the third item of
    # each batch would wait alone at the barrier.
    assert len(list(in_batches(range(4), lambda item: module.BATCH_BYTES // 3, work))) == 4
