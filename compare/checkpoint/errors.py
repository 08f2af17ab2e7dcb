"""What reading and writing checkpoints raises."""

from os import PathLike, fspath

from ..conversion.errors import Mismatch, shown


class CheckpointError(ValueError):
    """A checkpoint could not be written or read.

    Attributes:
        path: the file or folder.
        key: the entry, if one is to blame.
        expected: what should be there, in words.
        found: what is.
        mend: the next step.
        mismatch: the lists, where the file was read but does not fit the target.
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
    """A checkpoint without a manifest was read: whether its values are those that were saved is not known."""
