"""What is known of a stored tensor before it is read."""

from math import prod
from typing import NamedTuple

import numpy as np

from ..dtypes import DTYPES, numpy_dtype

# No array may have more bytes, empty ones by their other axes included.
_MOST = 2**62


class Spec(NamedTuple):
    """Shape and dtype of one tensor, in the layout of its file."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """How many bytes its values take."""
        return prod(self.shape) * self.numpy.itemsize

    @property
    def numpy(self) -> np.dtype:
        """The dtype."""
        return numpy_dtype(self.dtype)


def spec_of(array: np.ndarray) -> Spec:
    """Return the spec of an array.

    Raises:
        ValueError: a dtype that no checkpoint holds.
    """
    return checked(tuple(map(int, array.shape)), array.dtype.newbyteorder("=").name)


def checked(shape: object, dtype: object) -> Spec:
    """Return the spec that a file declares.

    Raises:
        ValueError: a dtype that no checkpoint holds, or a shape that no array has.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is none of {', '.join(DTYPES)}")
    if not isinstance(shape, list | tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape {shape} is no list of sizes")
    if len(shape) > 32 or prod(size for size in shape if size) * numpy_dtype(str(dtype)).itemsize > _MOST:
        raise ValueError(f"shape {list(shape)} is more than any array has")
    return Spec(tuple(shape), str(dtype))
