"""When dropout is at work."""

from flax import nnx


def dropping(dropout: nnx.Module) -> nnx.Module | None:
    """Return the module, or None where it would hand the weights on as they are."""
    return (
        None
        if type(dropout) is nnx.Dropout and (dropout.deterministic or dropout.rate == 0)
        else dropout
    )
