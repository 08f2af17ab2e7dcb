"""How much memory reading may take: what it would take is counted before it is taken."""

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

from .errors import FileError

_CGROUP = Path("/sys/fs/cgroup")
_UNKNOWN = 2**62


class Budget:
    """A limit in bytes for the sum of what is read and held.

    Args:
        limit: the limit. Default: the memory that is free now.

    Raises:
        TypeError: the limit is no whole number.
        ValueError: the limit is negative.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, Integral)):
            raise TypeError(f"memory is {limit!r}; expected a whole number of bytes, or None")
        if limit is not None and limit < 0:
            raise ValueError(f"memory is {limit}; expected a number of bytes, 0 or more")
        self.limit = available_bytes() if limit is None else limit
        self.held = 0

    def require(self, nbytes: int, path: str | PathLike[str], what: str, **details: Any) -> None:
        """Raise FileError if so many more bytes do not fit.

        Args:
            nbytes: how many more bytes are needed.
            path: the file or folder, for the message.
            what: what needs them, for the message.
            details: more arguments for `FileError`.
        """
        if nbytes > self.limit - self.held:
            raise FileError(
                path,
                f"more memory is needed for {what} than is allowed",
                expected=f"at most {max(self.limit - self.held, 0):,} bytes",
                found=f"{nbytes:,} bytes",
                mend="the file is hostile, or allow more with --memory (memory= in Python)",
                **details,
            )

    def hold(self, nbytes: int, path: str | PathLike[str], what: str) -> None:
        """Count so many bytes as held.

        Raises:
            FileError: they do not fit.
        """
        self.require(nbytes, path, what)
        self.held += nbytes


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector while many names are built, which it would go through again.

    With 100,000 names it takes as long as everything else.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def available_bytes() -> int:
    """Return the memory that this process may still take: of the machine, its group and limits."""
    return max(0, min(_free_on_the_machine(), _left_in_the_group(), _left_of_the_limit()))


def _free_on_the_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return _UNKNOWN


def _left_in_the_group() -> int:
    """Return what the container may still take, if it has a limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return _UNKNOWN
        statistics = (_CGROUP / "memory.stat").read_text(encoding="ascii").split()
        cached = int(statistics[statistics.index("inactive_file") + 1])
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        return int(limit) - used + cached
    except (OSError, ValueError, IndexError):
        return _UNKNOWN


def _left_of_the_limit() -> int:
    """Return what RLIMIT_AS leaves."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return _UNKNOWN
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return _UNKNOWN
    return limit - pages * resource.getpagesize()
