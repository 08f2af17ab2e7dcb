"""When dropout is at work."""

from collections.abc import Callable
from functools import partial

from flax import linen as nn
from jax import Array


def dropping(dropout: nn.Dropout, deterministic: bool) -> Callable[[Array], Array] | None:
    """Return the module ready to drop, or None where it would hand the weights on as they are."""
    return None if deterministic or dropout.rate == 0 else partial(dropout, deterministic=False)
