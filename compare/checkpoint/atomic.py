"""Write beside the target, flush to the disk, rename: there is the old or the new, whole.

A file that is open stays readable as it was. A folder is read file by file, so a reader that began with the
old one may find it gone; it then fails with an error, and reads the new one when it tries again.
"""

import ctypes
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file in the folder of `path` that becomes `path` when the block succeeds.

    The new file gets the old one's permissions. If the block raises, the temporary file is removed and
    `path` is as it was.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as stream:
            if path.exists():
                temporary.chmod(path.stat().st_mode & 0o7777)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` that becomes `path` when the block succeeds.

    An old folder is exchanged for the new one in a single step where the system can (Linux,
    renameat2); elsewhere there is an instant between two renames when neither is there.
    """
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                _fsync(Path(folder, name))
            _fsync(Path(folder))
        if path.exists():
            _exchange(temporary, path)
        else:
            temporary.rename(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, path: Path) -> None:
    """Swap the two folders, so that `new` holds what was at `path`."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE) == 0:
        return
    old = _temporary(path)
    path.rename(old)
    new.rename(path)
    old.rename(new)
