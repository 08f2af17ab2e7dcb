"""The error of reading and writing files."""

from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from .printable import readable, shown


class FileError(Exception):
    """A file or folder cannot be read or written safely.

    The message has the reason, and what was expected and found if the reason does not say so. A
    reason of several lines says so, and so does that of wrong usage.

    Attributes:
        path: the file or folder.
        reason: what is wrong.
        key: the name of the entry that is wrong, as it is in the file, or else the name of the file
            or folder.
        expected: what was expected, in words.
        found: what was found, in words.
        mend: the next step.
        is_usage: whether the caller asked for something that makes no sense, whatever the file
            holds. A command then ends with 2, and otherwise with 1.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        reason: str,
        *,
        expected: str,
        found: str,
        mend: str,
        key: str = "",
        is_usage: bool = False,
    ) -> None:
        self.path = fspath(path)
        self.reason = reason
        self.key = key or Path(self.path).name or self.path
        self.expected, self.found, self.mend = expected, found, mend
        self.is_usage = is_usage
        details = [("expected", expected), ("found", found)]
        is_said = is_usage or "\n" in reason
        parts = [f"{name} {text}" for name, text in details if not is_said and text not in reason]
        separator = "\n" if "\n" in reason else ": "
        message = "; ".join([f"{shown(self.path)}: {reason}", *parts])
        super().__init__(readable(f"{message}{separator}{mend}"))

    @property
    def details(self) -> dict[str, Any]:
        """The arguments by name with which an error of the same file is made."""
        names = ("expected", "found", "mend", "key", "is_usage")
        return {name: getattr(self, name) for name in names}

    def __reduce__(self) -> tuple[Any, ...]:
        """Let the error pass from one process to another, as those of a pool do."""
        return partial(type(self), self.path, self.reason, **self.details), (), self.__dict__
