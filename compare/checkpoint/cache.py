"""What the system keeps of files in memory: asked to drop or to fetch it, where a system can be asked (POSIX)."""

import os
from contextlib import suppress
from pathlib import Path


def forget(path: Path) -> None:
    """Ask for a file or folder to be dropped; what is not yet on the disk stays.

    What is to be replaced leaves room so for the new. A virtual machine would have to ask its host for that room,
    which can take longer than the writing.
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
