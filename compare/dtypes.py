"""The dtypes that both frameworks know, by the names of NumPy and `ml_dtypes`."""

from functools import cache

import ml_dtypes
import numpy as np

FLOATS = ("float64", "float32", "float16", "bfloat16")
FLOAT8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
FLOATING = (*FLOATS, *FLOAT8)
DTYPES = (*FLOATING, *INTEGERS, "bool", "complex64", "complex128")


def is_extended(name: str) -> bool:
    """Return whether NumPy lacks the dtype, so that `ml_dtypes` provides it."""
    return name.startswith(("bfloat16", "float8_"))


@cache
def numpy_dtype(name: str) -> np.dtype:
    """Return the NumPy dtype of that name, from `ml_dtypes` where NumPy has none."""
    return np.dtype(getattr(ml_dtypes, name) if is_extended(name) else name)
