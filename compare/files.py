"""Write beside the target, flush to the disk, rename: there is the old or the new, whole.

A file that is open stays readable as it was. A folder is read file by file, so a reader that began
with the old one may find it gone: `compare.open_checkpoint` notices and begins again.

Each temporary name is locked by the process that writes it. A process that was killed holds no
lock, so the next save of the same path can tell what it left behind, and removes it.
"""

import ctypes
import fcntl
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_FLUSH_SECONDS, _FLUSH_BYTES = 0.05, 1 << 20


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file in the folder of `path` that becomes `path` when the block succeeds.

    The new file gets the old one's permissions. If the block raises, the temporary file is removed
    and `path` is as it was.
    """
    sweep(path)
    forget(path)
    with (
        _own(path, lambda temporary: temporary.touch(exist_ok=False)) as temporary,
        temporary.open("r+b") as stream,
    ):
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o7777)
        with _flushing(stream.fileno()):
            yield stream
        stream.flush()
        os.fsync(stream.fileno())
        temporary.replace(path)
        _fsync(path.parent)


@contextmanager
def _flushing(descriptor: int) -> Iterator[None]:
    """Begin to send to the disk what is written while more is being written, so that little is left for the end."""
    send = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux; elsewhere all is left
    done = threading.Event()
    own = os.dup(descriptor)  # Ctrl-C may close the caller's before the thread has ended

    def flush() -> None:
        with os.fdopen(own):
            # A file without a name was given up.
            while send and not done.wait(_FLUSH_SECONDS) and (status := os.fstat(own)).st_nlink:
                # Without the end: who appends would wait for the page that he is in the middle of.
                if begun := status.st_size // _FLUSH_BYTES * _FLUSH_BYTES:
                    send(own, ctypes.c_int64(0), ctypes.c_int64(begun), _SYNC_FILE_RANGE_WRITE)

    thread = threading.Thread(target=flush)
    try:
        thread.start()
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` that becomes `path` when the block succeeds.

    An old folder is exchanged for the new one in a single step where the system can (Linux,
    renameat2); elsewhere there is an instant between two renames when neither is there. The old one
    stays in the system's cache: who reads it meanwhile goes from file to file, and is not to be
    slowed down.
    """
    sweep(path)
    with _own(path, Path.mkdir) as temporary:
        # Within the locked folder, for Orbax puts another one, without the lock, in the place of
        # what it is given.
        folder = temporary / "new"
        folder.mkdir()
        yield folder
        for inner, _, files in os.walk(folder):
            for name in files:
                _fsync(Path(inner, name))
            _fsync(Path(inner))
        _install(folder, path)
        _fsync(path.parent)


@contextmanager
def _own(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Make a temporary file or folder beside `path` and hold its lock; what is left of it at the end is removed."""
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            make(temporary)
            with suppress(_SweptError), _locked(temporary):
                try:
                    yield temporary
                    return
                finally:
                    _remove(temporary)
        finally:  # Ctrl-C may come before the lock is taken
            _remove(temporary)


def sweep(path: Path) -> None:
    """Remove what killed processes left behind of earlier tries to write `path`."""
    ours = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{12}\.tmp")
    for left in [entry for entry in path.parent.iterdir() if ours.fullmatch(entry.name)]:
        with suppress(OSError, _SweptError), _locked(left, fcntl.LOCK_NB):
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class _SweptError(Exception):
    """Another writer has removed the file before it was locked."""


@contextmanager
def _locked(path: Path, flag: int = 0) -> Iterator[None]:
    """Hold the lock of a file or folder; with LOCK_NB raise OSError if another process holds it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError as error:
        raise _SweptError from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flag)
        if not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino:
            raise _SweptError
        yield
    finally:
        os.close(descriptor)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _install(new: Path, path: Path) -> None:
    """Put the folder at `path`; what was there is then at `new`. Another writer may come between."""
    for _ in range(100):
        if path.exists():
            _exchange(new, path)
            return
        with suppress(OSError):  # another writer was first: exchange with its folder
            new.rename(path)
            return
    raise OSError(f"{path} comes and goes; is another process removing it?")


def _exchange(new: Path, path: Path) -> None:
    """Swap the two folders, so that `new` holds what was at `path`."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if (
        renameat2
        and renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(path), _RENAME_EXCHANGE)
        == 0
    ):
        return
    old = new.with_name(f"{new.name}.old")
    path.rename(old)
    new.rename(path)
    old.rename(new)


def forget(path: Path) -> None:
    """Ask for a file or folder to be dropped; what is not yet on the disk stays.

    What is to be replaced leaves room so for the new. A virtual machine would have to ask its host
    for that room, which can take longer than the writing.
    """
    _advise(path, "POSIX_FADV_DONTNEED")


def read_ahead(path: Path) -> None:
    """Ask for a whole file at once; what is mapped would come in small pieces, a tenth slower."""
    _advise(path, "POSIX_FADV_WILLNEED")


def _advise(path: Path, advice: str) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):  # they may be gone, or not be ours to read
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, getattr(os, advice))
