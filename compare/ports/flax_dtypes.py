"""Let Flax's layers work in the dtype of the state that they are given.

Some layers keep the dtype that their parameters had when they were built: recurrent cells make
their initial carry in it, and NNX's Embed returns it. A run in float64 would be one in float32.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import jax.numpy as jnp
from flax import linen, nnx


def working_dtype(leaves: Mapping[Any, Any]) -> Any:
    """Return the dtype of the floating leaves; float32 if there is none."""
    floats = [leaf.dtype for leaf in leaves.values() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.result_type(*floats) if floats else jnp.float32


def retype(model: nnx.Module, dtype: Any) -> None:
    """Set the dtype of the parameters of each layer of an NNX model, which keeps it for later."""
    for _, node in nnx.iter_graph(model):
        built = getattr(node, "param_dtype", None)
        if isinstance(node, nnx.Module) and built is not None:
            if isinstance(node, nnx.Embed) and node.dtype == built:
                node.dtype = dtype
            setattr(node, "param_dtype", dtype)  # noqa: B010  which no base class has


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
