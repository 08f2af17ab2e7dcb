"""The errors and warnings of reading and writing checkpoints."""

from os import PathLike
from typing import Any

from ..conversion.errors import Mismatch
from ..files.errors import FileError


class CheckpointError(FileError):
    """A checkpoint could not be written or read.

    Attributes:
        mismatch: the entries that differ, if the file was read but does not fit the target.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        reason: str,
        mismatch: Mismatch | None = None,
        **details: Any,
    ) -> None:
        self.mismatch = mismatch if mismatch is not None else Mismatch()
        super().__init__(path, reason, **details)

    @classmethod
    def of(cls, error: FileError, path: str | PathLike[str] | None = None) -> "CheckpointError":
        """Return the error of a file as the error of the checkpoint at `path`."""
        return cls(
            error.path if path is None else path,
            error.reason,
            key=error.key,
            expected=error.expected,
            found=error.found,
            mend=error.mend,
        )


class UnverifiedCheckpoint(UserWarning):
    """A checkpoint without a manifest was read, so its values could not be checked."""
