"""The one door in: every file that is read by name is opened here.

Only regular files are opened, so that no pipe or device makes a command wait. Files that are read
piece by piece are looked at again at the end: a `Snapshot` says whether they are still the same.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

from .errors import FileError
from .memory import Budget
from .printable import kind_of, shown

# A Python object takes at most so many bytes for each opening bracket and comma of its JSON.
_BYTES_PER_OBJECT, _BYTES_PER_ITEM = 400, 100

Identity = tuple[int, int]  # the device and the inode
State = tuple[int, ...]


def as_path(path: Any) -> Path:
    """Return the path of a file, or raise TypeError for what names none."""
    try:
        return Path(path)
    except TypeError:
        raise TypeError(f"path is {kind_of(path)}; expected the name of a file or folder") from None


def open_regular(path: Path) -> int:
    """Open a regular file for reading without waiting, and return its descriptor.

    Raises:
        FileError: it is not a regular file.
        OSError: it cannot be opened.
    """
    if not S_ISREG(path.stat().st_mode):  # opening a device may already change something
        raise _not_regular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return descriptor


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a regular file for the block; see `open_regular`."""
    descriptor = open_regular(path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(descriptor: int, nbytes: int, offset: int) -> bytes:
    """Return at most `nbytes` bytes from an offset; fewer only at the end of the file."""
    parts: list[bytes] = []
    while nbytes and (part := os.pread(descriptor, min(nbytes, 1 << 30), offset)):
        parts.append(part)
        nbytes -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_file(path: Path, budget: Budget, limit: int | None = None) -> bytes:
    """Return the content of a regular file.

    Raises:
        FileError: it is not a regular file, is larger than the limit or does not fit the budget.
        OSError: it cannot be read.
    """
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if limit is not None and size > limit:
            raise FileError(
                path,
                "is too large",
                expected=f"at most {limit:,} bytes",
                found=f"{size:,}",
                mend="take another copy",
            )
        budget.require(size, path, "its content")
        return read_at(descriptor, size, 0)


def parse_json(raw: bytes | str, path: Path, budget: Budget, what: str) -> Any:
    """Return the value of a JSON text; `what` names it in errors.

    The memory that it takes is estimated from the number of brackets and commas, and held.

    Raises:
        FileError: the value does not fit the budget.
        ValueError: the text is not JSON, is nested too deeply, or has a name twice in an object.
    """
    text = raw.encode(errors="surrogatepass") if isinstance(raw, str) else raw
    objects, items = text.count(b"{") + text.count(b"["), text.count(b",") + text.count(b":")
    budget.hold(len(text) * 4 + objects * _BYTES_PER_OBJECT + items * _BYTES_PER_ITEM, path, what)
    try:
        return json.loads(raw, object_pairs_hook=no_name_twice, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def no_name_twice(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return the pairs of a JSON or msgpack object as a dict.

    Raises:
        ValueError: a name occurs twice. The libraries would silently take the last value.
    """
    entries = dict(pairs)
    if len(entries) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {shown(name)} occurs twice")
    return entries


def _no_constant(constant: str) -> Any:
    raise ValueError(f"the number {constant}")


def identity(path: Path) -> Identity | None:
    """Return what tells a file or folder from every other one; None if there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def state_of(status: os.stat_result) -> State:
    """Return numbers that change when a file is replaced or written to."""
    if S_ISDIR(status.st_mode):
        return status.st_dev, status.st_ino
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Snapshot:
    """The files and folders that were read, and their states at that time; None: not there."""

    states: dict[Path, State | None]

    @classmethod
    def of(cls, paths: Iterable[Path]) -> "Snapshot":
        """Return the states of the files and folders now."""
        return cls({path: _state_at(path) for path in paths})

    def is_current(self) -> bool:
        """Return whether every file and folder is still the same."""
        return all(_state_at(path) == state for path, state in self.states.items())


def _state_at(path: Path) -> State | None:
    try:
        return state_of(path.stat())
    except (OSError, ValueError):
        return None


def _not_regular(path: Path) -> FileError:
    return FileError(
        path,
        "is not a regular file",
        expected="a regular file",
        found="a folder, a pipe or a device",
        mend="copy its content to a file",
        is_usage=True,
    )


class InputFile:
    """A regular file that is read piece by piece, from several threads.

    Args:
        path: the file.
        keep_open: whether it stays open. If not, each read opens it again, and fails if it changed.

    Raises:
        FileError: it is not a regular file.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, *, keep_open: bool = True) -> None:
        self.path = path
        descriptor = open_regular(path)
        status = os.fstat(descriptor)
        self.state, self.size = state_of(status), status.st_size
        self._descriptor: int | None = descriptor
        if not keep_open:
            self.close()

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """The open file, for the block."""
        if self._descriptor is not None:
            yield self._descriptor
            return
        with opened(self.path) as descriptor:
            if state_of(os.fstat(descriptor)) != self.state:
                raise FileError(
                    self.path,
                    "was changed while it was read",
                    expected="the same file",
                    found="another one, or other content",
                    mend="read it again",
                )
            yield descriptor

    def read(self, nbytes: int, offset: int) -> bytes:
        """Return at most `nbytes` bytes from an offset; fewer only at the end of the file."""
        if self._descriptor is not None:
            return read_at(self._descriptor, nbytes, offset)
        with self.descriptor() as descriptor:
            return read_at(descriptor, nbytes, offset)

    def fill(self, part: memoryview, offset: int) -> None:
        """Fill the memory with the bytes from an offset.

        Raises:
            FileError: the file has become shorter.
        """
        with self.descriptor() as descriptor:
            while part.nbytes:
                done = os.preadv(descriptor, [part], offset)
                if not done:
                    raise self._cut(offset + part.nbytes)
                part, offset = part[done:], offset + done

    def require_length(self, nbytes: int) -> None:
        """Raise FileError if the file has become shorter than this."""
        with self.descriptor() as descriptor:
            if os.fstat(descriptor).st_size < nbytes:
                raise self._cut(nbytes)

    def _cut(self, nbytes: int) -> FileError:
        return FileError(
            self.path,
            "is not whole any more",
            expected=f"{nbytes:,} bytes",
            found="fewer: it was cut after it was opened",
            mend="take another copy",
        )

    @contextmanager
    def kept(self) -> Iterator["InputFile"]:
        """Close the file only if the block raises: what the block returns goes on reading it."""
        try:
            yield self
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. It may be read again afterwards."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
