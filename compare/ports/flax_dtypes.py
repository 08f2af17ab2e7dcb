"""Let Flax's layers work in the dtype of the state that they are given.

Some layers keep the dtype that their parameters had when they were built: recurrent cells make
their initial carry in it, and NNX's Embed returns it. A run in float64 would be one in float32.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
from flax import linen, nnx

from .values import frames_from, is_somebodys, lines_of_frames

# What every cast in JAX calls, and its module; neither is public, so that either may be gone.
_CONVERT, _CONVERTS = "_convert_element_type", "jax._src.lax.lax"
_JAX = f"{Path(jax.__file__).parent}/"
_WIDE = 8  # the bytes of float64


def working_dtype(leaves: Mapping[Any, Any]) -> Any:
    """Return the dtype of the floating leaves; float32 if there is none."""
    floats = [leaf.dtype for leaf in leaves.values() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.result_type(*floats) if floats else jnp.float32


def retype(model: nnx.Module, dtype: Any) -> list[str]:
    """Set the dtypes of each layer of an NNX model, which keeps them for later.

    Returns:
        The layers that computed in a narrower dtype than float64, if the dtype is float64.
    """
    widened = []
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module) and is_narrow(node, dtype):
            setattr(node, "dtype", dtype)  # noqa: B010  which no base class has
            widened.append(".".join(map(str, path)) or type(node).__name__)
        built = getattr(node, "param_dtype", None)
        if isinstance(node, nnx.Module) and built is not None:
            if isinstance(node, nnx.Embed) and node.dtype == built:
                node.dtype = dtype
            setattr(node, "param_dtype", dtype)  # noqa: B010
    return widened


def is_narrow(layer: Any, dtype: Any) -> bool:
    """Return whether a layer says that it computes in a narrower dtype than float64, the dtype."""
    said = getattr(layer, "dtype", None)
    try:
        return said is not None and jnp.dtype(dtype) == jnp.float64 and _is_narrow(said)
    except TypeError:  # what is called dtype is none
        return False


@contextmanager
def widened(dtype: Any, names: dict[str, None]) -> Iterator[None]:
    """Let Linen's layers compute in a dtype, if that is float64; add the names of those that do."""

    def widen(
        proceed: Any, args: Any, kwargs: Any, context: linen.module.InterceptorContext
    ) -> Any:
        layer = context.module
        if is_narrow(layer, dtype):
            object.__setattr__(layer, "dtype", dtype)  # of this call's copy of the layer
            names["/".join(layer.path) or type(layer).__name__] = None
        return proceed(*args, **kwargs)

    with linen.intercept_methods(widen):
        yield


@contextmanager
def widened_casts(lines: dict[str, None]) -> Iterator[None]:
    """Let casts to a narrower floating dtype be casts to float64, and add their lines.

    Casts within JAX and Flax stay: they know why. What is cast from float64 is marked by
    `reduce_precision` to float64's own precision. JAX keeps what it traced here, so that its caches
    must be cleared afterwards.
    """
    try:
        lax_module = import_module(_CONVERTS)
        original = getattr(lax_module, _CONVERT)
    except (ImportError, AttributeError):  # a cast is then a difference
        yield
        return

    def convert(operand: Any, new_dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if new_dtype is None or not _is_narrow(new_dtype):
            return original(operand, new_dtype, *args, **kwargs)
        frames = [one for one in frames_from(sys._getframe(1)) if not one[0].startswith(_JAX)]
        if not hasattr(operand, "dtype") or not frames or not is_somebodys(frames[0][0]):
            return original(operand, new_dtype, *args, **kwargs)
        if operand.dtype != jnp.float64:
            return original(operand, jnp.dtype(jnp.float64), *args, **kwargs)
        lines[lines_of_frames(frames, "astype", "")[0].place] = None
        return jax.lax.reduce_precision(operand, exponent_bits=11, mantissa_bits=52)

    with patch.object(lax_module, _CONVERT, convert):
        yield


def _is_narrow(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.dtype(dtype).itemsize < _WIDE


@contextmanager
def carries_in(dtype: Any) -> Iterator[None]:
    """Make the initial carries of Linen's recurrent cells in a dtype."""
    with ExitStack() as stack:
        for cell in linen.RNNCellBase.__subclasses__():
            original = cell.initialize_carry

            def initial(cell: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
                retyped = cell.clone(parent=None, param_dtype=dtype)
                return original(retyped, *args, **kwargs)

            if hasattr(cell, "param_dtype"):
                stack.enter_context(patch.object(cell, "initialize_carry", initial))
        yield
