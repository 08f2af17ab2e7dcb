"""Warnings that name the line of the caller's own code."""

import sys
import warnings


def warn(message: str, category: type[Warning]) -> None:
    """Warn, and name the line of the first caller outside this package."""
    level, frame = 1, sys._getframe(0)
    package = __name__.partition(".")[0] + "."
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(package):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
