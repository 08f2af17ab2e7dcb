"""The errors and warnings of reading and writing checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

from ..conversion.errors import Mismatch
from ..files.errors import FileError
from ..files.printable import shown


class CheckpointError(FileError, ValueError):
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


@contextmanager
def naming(path: str | PathLike[str]) -> Iterator[None]:
    """Turn errors of files within the block into a CheckpointError of the checkpoint at `path`."""
    try:
        yield
    except CheckpointError:
        raise
    except FileError as error:
        raise CheckpointError.of(error, path) from error
    except OSError as error:
        raise CheckpointError(path, f"could not be read ({shown(error)})") from error


class UnverifiedCheckpoint(UserWarning):
    """A checkpoint without a manifest was read, so its values could not be checked."""
