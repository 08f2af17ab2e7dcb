"""Whether dropout is active."""

from collections.abc import Callable
from functools import partial

from flax import linen as nn
from jax import Array


def dropping(dropout: nn.Dropout, deterministic: bool) -> Callable[[Array], Array] | None:
    """Return `dropout` made active, or None if it would leave the weights unchanged."""
    return None if deterministic or dropout.rate == 0 else partial(dropout, deterministic=False)
