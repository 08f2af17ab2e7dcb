"""Replace files and folders atomically: write a temporary one, flush it to the disk, rename it.

A reader sees either the whole old file or the whole new file, and an open file stays readable after
it is replaced. A folder is read file by file, so the old folder may disappear during a read:
`compare.open_checkpoint` notices this and starts again.

Each process locks its temporary files and folders. A killed process loses its locks, so the next
save of the same path recognizes what it left behind and removes it.
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
    """Open a temporary file beside `path`, and rename it to `path` when the block succeeds.

    The new file gets the permissions of the old one. If the block raises, the temporary file is
    removed and `path` is unchanged.
    """
    sweep(path)
    forget(path)
    with (
        _locked_temporary(path, lambda temporary: temporary.touch(exist_ok=False)) as temporary,
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
    """Start writing to the disk during the block, so that the final fsync has little left to do."""
    # Only Linux has sync_file_range. Elsewhere the final fsync does all the work.
    start_writing = getattr(ctypes.CDLL(None), "sync_file_range", None)
    done = threading.Event()
    duplicate = os.dup(descriptor)  # Ctrl-C may close `descriptor` before the thread has ended

    def flush() -> None:
        with os.fdopen(duplicate):
            while start_writing and not done.wait(_FLUSH_SECONDS):
                status = os.fstat(duplicate)
                if not status.st_nlink:  # the file was removed: the save has failed
                    break
                # Leave out the last, partial block: the writer would wait for a page in progress.
                if nbytes := status.st_size // _FLUSH_BYTES * _FLUSH_BYTES:
                    start_writing(
                        duplicate, ctypes.c_int64(0), ctypes.c_int64(nbytes), _SYNC_FILE_RANGE_WRITE
                    )

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
    """Make a temporary folder beside `path`, and rename it to `path` when the block succeeds.

    Linux exchanges the old and the new folder in one step (renameat2). Elsewhere two renames are
    needed, and for an instant between them neither folder is at `path`. The old folder stays in the
    page cache, because a reader may still be going through its files.
    """
    sweep(path)
    with _locked_temporary(path, Path.mkdir) as temporary:
        # Orbax replaces the folder that it is given with an unlocked one. So it gets a subfolder,
        # and the lock stays on the outer folder.
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
def _locked_temporary(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Make and lock a temporary file or folder beside `path`; remove what is left at the end."""
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
    """Remove the temporary files and folders of killed processes that were writing `path`."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{12}\.tmp")
    for leftover in [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]:
        with suppress(OSError, _SweptError), _locked(leftover, fcntl.LOCK_NB):
            _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class _SweptError(Exception):
    """Another writer removed the temporary file or folder before it was locked."""


@contextmanager
def _locked(path: Path, flag: int = 0) -> Iterator[None]:
    """Lock a file or folder; with LOCK_NB raise OSError if another process holds the lock."""
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
    """Move the folder `new` to `path`; an old folder at `path` is moved to `new`."""
    for _ in range(100):
        if path.exists():
            _exchange(new, path)
            return
        with suppress(OSError):  # another writer has just created `path`: exchange instead
            new.rename(path)
            return
    raise OSError(f"{path} keeps appearing and disappearing; is another process removing it?")


def _exchange(new: Path, path: Path) -> None:
    """Swap the two folders, so that the old folder is at `new`."""
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
    """Ask the system to drop a file or folder from the page cache; unwritten pages stay.

    This frees memory for the file that replaces it. A virtual machine would otherwise have to ask
    its host for memory, which can take longer than the writing.
    """
    _advise(path, "POSIX_FADV_DONTNEED")


def read_ahead(path: Path) -> None:
    """Ask the system to read a whole file ahead; a mapped file read on demand is a tenth slower."""
    _advise(path, "POSIX_FADV_WILLNEED")


def _advise(path: Path, advice: str) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):  # a file may have been removed, or may not be readable
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                with file.open("rb") as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, getattr(os, advice))
