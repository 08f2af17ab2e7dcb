"""The one door out: every file and folder is written here, and replaced in one step.

What is new is written into a temporary folder beside its place, flushed to the disk, checked, and
exchanged with what is there. A reader sees either the whole old file or the whole new one, and an
open file stays readable after it is replaced. A folder is read file by file, so the old folder may
disappear during a read: `compare.open_checkpoint` notices this and starts again.

Each process locks its temporary folders and writes a token into them. A killed process loses its
locks, so the next save of the same path recognizes by the token what was left behind, and removes
it. Nothing else is removed.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import sys
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, BinaryIO, NamedTuple

from .errors import FileError
from .memory import Budget
from .page_cache import flushing, forget
from .printable import shown
from .reading import State, identity, read_file, state_of

_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_OWNER = "owner"


def accept(_: Path) -> None:
    """Accept whatever is there."""


def refuse(_: Path) -> bool:
    """Refuse to replace whatever came meanwhile."""
    return False


class Rules(NamedTuple):
    """What must hold before something new takes the place of something old.

    Attributes:
        check: called with what is new; it raises if that must not be installed.
        require_own: called with the old folder; it raises if that holds what must not be removed.
        may_replace: called with what another program put there meanwhile; whether it is replaced.
    """

    check: Callable[[Path], object] = accept
    require_own: Callable[[Path], object] = accept
    may_replace: Callable[[Path], bool] = refuse


NO_RULES = Rules()


def resolved(path: Path) -> Path:
    """Return the path without links.

    Raises:
        FileError: a link leads to itself.
    """
    try:
        return path.resolve()
    except RuntimeError as error:  # so does Python 3.11
        raise FileError(
            path,
            "is a link that leads to itself",
            expected="a file or folder, or a name that is free",
            found="a loop of links",
            mend="remove the link, or choose another name",
            is_usage=True,
        ) from error


def require_apart(target: Path, inputs: Iterable[Path], name: Path | None = None) -> None:
    """Raise FileError if writing the target would change an input, under whatever name.

    Args:
        target: what is to be written.
        inputs: the files and folders that the command reads.
        name: the target as the user named it, for the message.
    """
    name = target if name is None else name
    place, own = resolved(target), identity(target)
    around = {identity(parent) for parent in place.parents} - {None}
    for source in inputs:
        source_identity = identity(source)
        if source_identity is None:
            continue
        if source_identity == own:
            raise _touches(name, "is", source)
        if source_identity in around:
            raise _touches(name, "lies in", source)
        if own is not None and own in map(identity, source.resolve().parents):
            raise _touches(name, "contains", source)


def _touches(target: Path, how: str, source: Path) -> FileError:
    return FileError(
        target,
        f"{how} what is read, {shown(source)}",
        expected="a place apart from it",
        found="the same place",
        mend="write to another place, then rename",
        is_usage=True,
    )


def require_distinct(targets: Iterable[Path]) -> None:
    """Raise FileError if two targets are one place, or one lies in the other."""
    seen: dict[Any, Path] = {}
    for target in targets:
        place = resolved(target)
        # Many file systems do not distinguish upper and lower case, or the forms of an accent.
        name = unicodedata.normalize("NFC", place.name).casefold()
        key = identity(place.parent) or place.parent, name
        if key in seen:
            raise FileError(
                target,
                f"is written already, as {shown(seen[key])}",
                expected="a name of its own",
                found="the same place",
                mend="choose another name",
                is_usage=True,
            )
        for other in seen.values():
            if other.resolve() in place.parents or place in other.resolve().parents:
                raise FileError(
                    target,
                    f"and {shown(other)} lie in each other",
                    expected="places apart",
                    found="one inside the other",
                    mend="choose another name",
                    is_usage=True,
                )
        seen[key] = target


def write_text(path: Path, text: str) -> None:
    """Write a text file. A pipe, a device or the output of this process is written to as it is.

    Raises:
        FileError: another program created or changed the file meanwhile.
        OSError: it cannot be written.
    """
    data = text.encode()
    status = path.stat() if path.exists() else None
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            if status is not None and os.path.samestat(status, os.fstat(stream.fileno())):
                stream.flush()
                with os.fdopen(os.dup(stream.fileno()), "wb") as same:
                    same.write(data)
                return
    if status is not None and not (S_ISREG(status.st_mode) or S_ISDIR(status.st_mode)):
        with path.open("wb") as stream_:
            stream_.write(data)
        return
    with atomic_file(resolved(path)) as stream_:
        stream_.write(data)


@contextmanager
def atomic_file(path: Path, rules: Rules = NO_RULES) -> Iterator[BinaryIO]:
    """Open a new file, and put it in the place of `path` when the block succeeds.

    The new file gets the permissions of the old one. If the block raises, `path` is unchanged.

    Args:
        path: the file. It is replaced itself, even if it is a link.
        rules: what must hold before it is replaced.

    Raises:
        FileError: it is a folder; or another program created or changed the file meanwhile; its
            version stays.
    """
    if path.is_dir() and not path.is_symlink():
        raise FileError(
            path,
            "is a folder",
            expected="the name of a file",
            found="a folder",
            mend="name a file in it",
            is_usage=True,
        )
    sweep(path)
    forget(path)
    before = _state(path)
    with _temporary(path) as folder, (folder / "new").open("x+b") as stream:
        new = folder / "new"
        if path.exists():
            new.chmod(path.stat().st_mode & 0o7777)
        with flushing(stream.fileno()):
            yield stream
        stream.flush()
        _while_syncing([new], lambda: rules.check(new))
        _install(new, path, before, rules)
        _fsync(path.parent)


@contextmanager
def atomic_folder(path: Path, rules: Rules = NO_RULES) -> Iterator[Path]:
    """Make a new folder, and put it in the place of `path` when the block succeeds.

    The old folder stays in the page cache, because a reader may still be going through its files.

    Args:
        path: the folder.
        rules: what must hold before it is replaced. `require_own` is called now, and again with the
            old folder after the exchange, which is undone if it raises.

    Raises:
        FileError: another program created or replaced the folder meanwhile; its version stays.
    """
    sweep(path)
    before = _own_state(path, rules)
    with _temporary(path) as outer:
        # Orbax replaces the folder that it is given. The lock stays on the outer folder.
        folder = outer / "new"
        folder.mkdir()
        yield folder
        _while_syncing([*folder.rglob("*"), folder], lambda: rules.check(folder))
        _install(folder, path, before, rules)
        _fsync(path.parent)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Make and lock a temporary folder beside `path`; remove what is left at the end."""
    while True:
        token = uuid.uuid4().hex[:12]
        folder = path.with_name(f".{path.name}.{token}.tmp")
        try:
            folder.mkdir(mode=0o700)
            with suppress(_SweptError), _locked(folder):
                try:
                    (folder / _OWNER).write_text(_claim(token), encoding="ascii")
                    yield folder
                    return
                finally:
                    _remove(folder)
        finally:  # Ctrl-C may come before the lock is taken
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a temporary folder, the token last, so that a killed removal can be finished."""
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.name != _OWNER:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        (folder / _OWNER).unlink(missing_ok=True)
        folder.rmdir()


def _claim(token: str) -> str:
    return f"attention-parity {token}\n"


def sweep(path: Path) -> None:
    """Remove the temporary folders of killed processes that were writing `path`."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"([0-9a-f]{12})\.tmp")
    for entry in list(path.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match and entry.is_dir() and not entry.is_symlink():
            with suppress(OSError, _SweptError), _locked(entry, fcntl.LOCK_NB):
                if _is_ours(entry, match[1]):
                    _remove(entry)


def _is_ours(folder: Path, token: str) -> bool:
    """Return whether the folder has the token of its name inside, or nothing at all."""
    owner = folder / _OWNER
    others = [entry.name for entry in folder.iterdir() if entry.name != _OWNER]
    try:
        claim = read_file(owner, Budget(1000), limit=100)
    except FileNotFoundError:
        return not others
    except (OSError, FileError):
        return False
    was_killed_at_once = not claim and not others
    return not owner.is_symlink() and (was_killed_at_once or claim == _claim(token).encode())


class _SweptError(Exception):
    """Another writer removed the temporary folder before it was locked."""


@contextmanager
def _locked(path: Path, flag: int = 0) -> Iterator[None]:
    """Lock a folder; with LOCK_NB raise OSError if another process holds the lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except FileNotFoundError as error:
        raise _SweptError from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flag)
        if not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino:
            raise _SweptError
        yield
    finally:
        os.close(descriptor)


def _while_syncing(paths: Iterable[Path], work: Callable[[], object]) -> None:
    """Flush files and folders to the disk, and do the work meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        synced = pool.submit(_fsync, *paths)
        work()
        synced.result()


def _fsync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _state(path: Path) -> State | None:
    try:
        return state_of(path.lstat())
    except FileNotFoundError:
        return None


def _own_state(path: Path, rules: Rules) -> State | None:
    """Return the state of the old folder, after what it holds was looked at.

    A folder that another process exchanges meanwhile loses its files one by one, so what is wrong
    with it counts only if it is still there.
    """
    while (before := _state(path)) is not None:
        try:
            rules.require_own(path)
        except (FileError, OSError):
            if _state(path) == before:
                raise
        else:
            break
    return before


def _install(new: Path, path: Path, before: State | None, rules: Rules) -> None:
    """Move `new` to `path`, and what is there to `new`.

    Raises:
        FileError: what is there is not what was there before; it stays.
    """
    for _ in range(100):
        if before is None:
            try:
                return _move(new, path)
            except FileExistsError:
                if not rules.may_replace(path):
                    raise _came_meanwhile(path) from None
        try:
            _exchange(new, path)
        except FileNotFoundError:  # the old one was removed meanwhile
            before = None
            continue
        try:
            if before is not None and _state(new) != before and not rules.may_replace(new):
                raise _came_meanwhile(path)
            rules.require_own(new)
        except BaseException:
            _exchange(new, path)
            raise
        return None
    raise FileError(
        path,
        "keeps appearing and disappearing",
        expected="a place that no other program uses",
        found="another file each time",
        mend="see which program removes it",
    )


def _came_meanwhile(path: Path) -> FileError:
    return FileError(
        path,
        "was created or changed by another program meanwhile; that version stays",
        expected="what was there before",
        found="another version",
        mend="look at it, then write again",
    )


def _move(new: Path, path: Path) -> None:
    """Move `new` to `path`, where nothing may be.

    Raises:
        FileExistsError: something is there.
    """
    if _rename(new, path, _RENAME_NOREPLACE):
        return
    if os.path.lexists(path):  # the file system cannot do it in one step
        raise FileExistsError(path)
    new.rename(path)


def _exchange(new: Path, path: Path) -> None:
    """Swap the two, in one step on Linux; elsewhere for an instant neither is at `path`."""
    if _rename(new, path, _RENAME_EXCHANGE):
        return
    old = new.with_name(f"{new.name}.old")
    path.rename(old)
    new.rename(path)
    old.rename(new)


def _rename(new: Path, path: Path, flag: int) -> bool:
    """Rename with a flag of Linux; return False if the system or the file system cannot.

    Raises:
        OSError: the rename failed for another reason.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(path), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(path))
