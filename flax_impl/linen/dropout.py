"""Whether dropout is active, or somebody looks at it."""

from collections.abc import Callable
from functools import partial
from typing import Any

from flax import linen as nn
from jax import Array


def dropping(dropout: nn.Dropout, deterministic: bool) -> Callable[[Array], Array] | None:
    """Return `dropout`, made active or idle, or None if it is idle and nobody looks at it."""
    is_idle = deterministic or dropout.rate == 0
    return None if is_idle and not _is_watched() else partial(dropout, deterministic=deterministic)


def _is_watched() -> bool:
    """Return whether `capture_intermediates`, `intercept_methods` or `tabulate` is at work.

    Flax 0.12 has no public question for it. Without an answer, the formula is right in each.
    """
    module: Any = nn.module
    context = getattr(module, "_context", None)
    interceptors = getattr(module, "_global_interceptor_stack", None)
    if context is None or interceptors is None:
        return True
    captures = context.capture_stack
    return bool(len(interceptors) or context.call_info_stack or (captures and captures[-1]))
