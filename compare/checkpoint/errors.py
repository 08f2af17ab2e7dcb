"""The errors and warnings of reading and writing checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

from ..conversion.errors import Mismatch, next_step
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
        *,
        expected: str,
        found: str,
        mend: str,
        key: str = "",
        is_usage: bool = False,
    ) -> None:
        self.mismatch = mismatch if mismatch is not None else Mismatch()
        super().__init__(
            path, reason, expected=expected, found=found, mend=mend, key=key, is_usage=is_usage
        )

    @classmethod
    def of(cls, error: FileError, path: str | PathLike[str] | None = None) -> "CheckpointError":
        """Return the error of a file as the error of the checkpoint at `path`."""
        return cls(
            error.path if path is None else path,
            error.reason,
            getattr(error, "mismatch", None),
            **error.details,
        )

    @classmethod
    def broken(cls, path: str | PathLike[str], what: str, reason: str) -> "CheckpointError":
        """Return the error of a file that is not `what` its name says."""
        return cls(
            path,
            f"not {what} ({reason})",
            expected=what,
            found=reason,
            mend="take another copy",
        )

    @classmethod
    def unfit(
        cls, path: str | PathLike[str], reason: str, mismatch: Mismatch, mend: str = ""
    ) -> "CheckpointError":
        """Return the error of a state that does not fit. The reason is followed by all entries.

        Args:
            path: the checkpoint.
            reason: what does not fit what.
            mismatch: the entries. The first one gives the key, what was expected and found.
            mend: the next step. Default: what is done about the first entry.
        """
        groups = mismatch.misshaped, mismatch.refused, mismatch.missing, mismatch.unexpected
        first = next(entry for group in groups for entry in group)
        found = first.reason or ("nothing" if first.found is None else str(first.found))
        expected = "no such entry" if first in mismatch.unexpected else "an entry that fits"
        return cls(
            path,
            f"{reason}:\n{mismatch}",
            mismatch,
            key=first.name,
            expected=str(first.expected) if first.expected is not None else expected,
            found=found,
            mend=mend or next_step(mismatch),
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
        raise CheckpointError(
            path,
            f"could not be read ({shown(error)})",
            expected="a file that can be read",
            found=shown(error),
            mend="see who may read it, and whether the disk is sound",
        ) from error


class UnverifiedCheckpoint(UserWarning):
    """A checkpoint without a manifest was read, so its values could not be checked."""
