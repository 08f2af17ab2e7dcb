"""JAX's settings for a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import jax
import numpy as np


@contextmanager
def jax_on(
    device: str, dtype: Any = np.float32, matmul: Literal["highest", "default"] = "highest"
) -> Iterator[None]:
    """Run JAX on the device: x64 is on for float64, and by default matrix products avoid TF32."""
    x64 = np.dtype(dtype) == np.float64
    with (
        jax.enable_x64(x64),
        jax.default_matmul_precision(matmul),
        jax.default_device(jax.devices(device)[0]),
    ):
        yield
