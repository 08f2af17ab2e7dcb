"""Keep the memory of large modules low."""

import ctypes
from contextlib import suppress

LARGE = 1 << 24  # entries of a state: what is kept of such a module is kept in short


def give_back() -> None:
    """Give memory that was freed back to the system, if the C library kept it, as glibc does."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
