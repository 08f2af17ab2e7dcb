"""Whether dropout is active, or somebody looks at it."""

from flax import nnx

_CALL = nnx.Dropout.__call__


def dropping(dropout: nnx.Module) -> nnx.Module | None:
    """Return `dropout`, or None if it is idle and nobody looks at it.

    `nnx.capture` replaces the methods of the classes that it looks at.
    """
    is_idle = isinstance(dropout, nnx.Dropout) and (dropout.deterministic or dropout.rate == 0)
    is_plain = type(dropout) is nnx.Dropout and nnx.Dropout.__call__ is _CALL
    return None if is_idle and is_plain else dropout
