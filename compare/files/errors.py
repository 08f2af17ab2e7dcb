"""The error of reading and writing files."""

from os import PathLike, fspath

from .printable import shown


class FileError(Exception):
    """A file or folder cannot be read or written safely.

    Attributes:
        path: the file or folder.
        reason: what is wrong.
        key: the name of the entry that is wrong, if it is one entry.
        expected: what was expected, in words.
        found: what was found, in words.
        mend: what to do about it.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        reason: str,
        *,
        key: str = "",
        expected: str = "",
        found: str = "",
        mend: str = "",
    ) -> None:
        self.path = fspath(path)
        self.reason = reason
        self.key, self.expected, self.found, self.mend = key, expected, found, mend
        parts = [f"expected {expected}" if expected else "", f"found {found}" if found else ""]
        message = "; ".join([f"{shown(self.path)}: {reason}", *(part for part in parts if part)])
        super().__init__(message + (f": {mend}" if mend else ""))
