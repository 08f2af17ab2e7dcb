"""Whether dropout is active."""

from flax import nnx


def dropping(dropout: nnx.Module) -> nnx.Module | None:
    """Return `dropout`, or None if it would leave the weights unchanged."""
    return (
        None
        if type(dropout) is nnx.Dropout and (dropout.deterministic or dropout.rate == 0)
        else dropout
    )
