"""Advise the system which files to keep in memory."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SYNC_FILE_RANGE_WRITE = 2
_FLUSH_SECONDS, _FLUSH_BYTES = 0.05, 1 << 20


@contextmanager
def flushing(descriptor: int) -> Iterator[None]:
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
