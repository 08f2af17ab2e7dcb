"""The errors and warnings of reading and writing checkpoints."""

from os import PathLike, fspath

from ..conversion.errors import Mismatch, shown


class CheckpointError(ValueError):
    """A checkpoint could not be written or read.

    Attributes:
        path: the file or folder.
        reason: what is wrong.
        key: the name of the entry that is wrong, if it is one entry.
        expected: what was expected, in words.
        found: what was found, in words.
        mend: what to do about it.
        mismatch: the entries that differ, if the file was read but does not fit the target.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        reason: str,
        mismatch: Mismatch | None = None,
        *,
        key: str = "",
        expected: str = "",
        found: str = "",
        mend: str = "",
    ) -> None:
        self.path = fspath(path)
        self.reason = reason
        self.mismatch = mismatch if mismatch is not None else Mismatch()
        self.key, self.expected, self.found, self.mend = key, expected, found, mend
        parts = [f"expected {expected}" if expected else "", f"found {found}" if found else ""]
        message = "; ".join([f"{shown(self.path)}: {reason}", *(part for part in parts if part)])
        super().__init__(message + (f": {mend}" if mend else ""))


class UnverifiedCheckpoint(UserWarning):
    """A checkpoint without a manifest was read, so its values could not be checked."""
