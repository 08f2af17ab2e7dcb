"""Whether dropout is active, or somebody looks at it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import nnx
from jax import Array

_CALL = nnx.Dropout.__call__


def dropping(
    dropout: Any, deterministic: bool | None = None, rngs: nnx.Rngs | nnx.RngStream | None = None
) -> Callable[[Array], Array] | None:
    """Return `dropout` with the arguments of the call, or None if it is idle and unobserved.

    `nnx.capture` replaces the methods of the classes that it looks at.
    """
    is_plain = type(dropout) is nnx.Dropout and nnx.Dropout.__call__ is _CALL
    is_off = deterministic or (deterministic is None and is_plain and dropout.deterministic)
    if is_plain and (is_off or dropout.rate == 0):
        return None
    options = {"deterministic": deterministic, "rngs": rngs}
    given = {name: value for name, value in options.items() if value is not None}
    return partial(dropout, **given) if given else dropout
