"""The file formats, and the suffixes that select them."""

import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from ...files.memory import Budget, collector_paused
from ...files.printable import shown
from ...files.reading import as_path
from ...files.writing import Rules
from ..errors import CheckpointError, naming
from ..reader import Reader
from ..tensors import Tensors
from . import foreign, msgpack, orbax, safetensors, shards, torch_zip
from .parts import as_select, require_none

HUB_FILES = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
_LEGACY_FLAX = re.compile(r"checkpoint_\d+")  # of flax.training.checkpoints


class Format(NamedTuple):
    """How to read and write one format.

    Attributes:
        suffixes: the suffixes of its files or folders.
        package: the package that must be installed.
        is_folder: whether a checkpoint is a folder.
        layouts: the layouts that it can hold: torch names, or Flax paths.
        write: writes tensors to a path, by the rules of what may be replaced.
        open: opens a path for reading: all of it, or a part with `select`.
        holds_all: whether all tensors are in memory at once while it is written.
    """

    suffixes: tuple[str, ...]
    package: str
    is_folder: bool
    layouts: tuple[str, ...]
    write: Callable[[Path, Tensors, Rules], None]
    open: Callable[..., Reader]
    holds_all: bool = False


FORMATS = {
    "torch": Format(
        (".pth", ".pt", ".bin", ".ckpt", ".pth.tar"),
        "torch",
        False,
        ("torch",),
        torch_zip.write,
        torch_zip.open_,
        True,
    ),
    "safetensors": Format(
        (".safetensors",),
        "numpy",
        False,
        ("torch", "linen", "nnx"),
        safetensors.write,
        safetensors.open_,
    ),
    "msgpack": Format((".msgpack",), "flax", False, ("linen", "nnx"), msgpack.write, msgpack.open_),
    "orbax": Format(
        (".orbax", ""), "orbax.checkpoint", True, ("linen", "nnx"), orbax.write, orbax.open_
    ),
}

KNOWN = [suffix for chosen in FORMATS.values() for suffix in chosen.suffixes if suffix]
FILE_SUFFIXES = [
    suffix for chosen in FORMATS.values() if not chosen.is_folder for suffix in chosen.suffixes
]


def format_of(path: str | PathLike[str]) -> Format:
    """Return the format that the path's suffix selects.

    Raises:
        CheckpointError: the suffix is unknown, or the package of the format is not installed.
    """
    if (filename := Path(path).name.lower()) in KNOWN:
        raise CheckpointError(
            path,
            "is a suffix without a name",
            expected="a name before the suffix",
            found="no name",
            mend=f"say {'state' + filename!r}",
            is_usage=True,
        )
    suffix = next((known for known in KNOWN if filename.endswith(known)), Path(path).suffix.lower())
    for name, chosen in FORMATS.items():
        if suffix in chosen.suffixes:
            _require_package(path, name, chosen.package)
            return chosen
    raise _unknown_suffix(path, suffix, KNOWN)


def _only_file_of_hub(folder: Path) -> Path | None:
    """Return the file with the weights in a folder that is laid out as on the Hugging Face Hub.

    Raises:
        CheckpointError: there are several, or it is a link out of the folder.
    """
    files = [folder / name for name in HUB_FILES if (folder / name).is_file()]
    if len(files) > 1:
        listed = ", ".join(file.name for file in files)
        raise CheckpointError(
            folder,
            f"holds {len(files)} checkpoints: {listed}",
            expected="one checkpoint",
            found=listed,
            mend=f"give one, as {shown(files[0])}",
            is_usage=True,
        )
    for file in files:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                folder,
                f"has a link out of it, which is not followed: {file.name}",
                expected="the file itself",
                found="a link",
                mend=f"give {shown(file.resolve())}, or download the model with local_dir=",
                is_usage=True,
            )
    return files[0] if files else None


def _unknown_suffix(
    path: str | PathLike[str], suffix: str, known: Sequence[str]
) -> CheckpointError:
    return CheckpointError(
        path,
        f"unknown suffix {suffix!r}",
        expected=f"one of {', '.join(known)}",
        found=repr(suffix),
        mend=f"name it with one of {', '.join(known)}",
        is_usage=True,
    )


def _require_package(path: str | PathLike[str], name: str, package: str) -> None:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise CheckpointError(
            path,
            f"the {name} format needs {package}, which is not installed",
            expected=package,
            found="no such package",
            mend="pip install 'attention-parity[all]'",
            is_usage=True,
        )


def open_checkpoint(
    path: str | PathLike[str], memory: int | None = None, *, select: str | Sequence[str] = ()
) -> Reader:
    """Open a checkpoint of any format. Names and shapes are read now, values on demand.

    Use it in a `with` block. A folder without a suffix is an Orbax checkpoint, shards with an
    index, or laid out as on the Hugging Face Hub with one file of weights.

    Args:
        path: the file or folder.
        memory: the most bytes that what is read and held at once may take. Default: the memory that
            is free.
        select: the part of the file that holds the state, if a training program wrote more: names
            joined by slashes, or several for Flax, as ("params", "batch_stats").

    Raises:
        CheckpointError: the path does not exist, is not a checkpoint of the format that its suffix
            selects, has no such part, or needs more memory.
    """
    path, budget, parts = as_path(path), Budget(memory), as_select(select)
    if not exists(path):
        raise CheckpointError(
            path,
            "no such file or folder",
            expected="a checkpoint",
            found="nothing",
            mend="check the name, or save the checkpoint first",
            is_usage=True,
        )
    if path.is_file():
        foreign.require_own(path)
    if shards.index_in(path) is not None:
        require_none(path, parts, "shards hold only state")
        return _opened(path, shards.open_, budget)
    if path.is_dir():
        shards.require_one_index(path)
        if file := _only_file_of_hub(path):
            return open_checkpoint(file, memory, select=select)
    is_legacy = path.is_file() and _LEGACY_FLAX.fullmatch(path.name)
    if path.is_file() and not is_legacy and not path.suffix and path.name.lower() not in KNOWN:
        raise _unknown_suffix(path, "", FILE_SUFFIXES)
    chosen = FORMATS["msgpack"] if is_legacy else format_of(path)
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(
            path,
            "is not a regular file",
            expected="a regular file or a folder",
            found="a pipe or a device",
            mend="copy its content to a file",
            is_usage=True,
        )
    if chosen.is_folder and not path.is_dir():
        raise CheckpointError(
            path,
            "is a file; an Orbax checkpoint is a folder",
            expected="a folder",
            found="a file",
            mend="name the folder",
            is_usage=True,
        )
    if not chosen.is_folder and not path.is_file():
        raise CheckpointError(
            path,
            "is not a regular file",
            expected="a regular file",
            found="a folder",
            mend="name an Orbax folder without a suffix or with .orbax",
            is_usage=True,
        )
    if not chosen.is_folder and not path.stat().st_size:
        raise CheckpointError(
            path, "is empty", expected="tensors", found="0 bytes", mend="take another copy"
        )
    if chosen is FORMATS["safetensors"]:
        require_none(
            path, parts, "its names are not nested", "pass prefix= for what they begin with"
        )
        return _opened(path, safetensors.open_, budget)
    return _opened(path, partial(chosen.open, select=parts), budget)


def exists(path: Path) -> bool:
    """Return whether the path exists.

    Raises:
        CheckpointError: the path is invalid: the name is too long, or links form a cycle.
    """
    try:
        path.resolve(strict=True)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            path,
            f"is not a valid path ({error})",
            expected="a valid path",
            found=str(error),
            mend="choose another name",
            is_usage=True,
        ) from error
    return True


def _opened(path: Path, open_: Callable[[Path, Budget], Reader], budget: Budget) -> Reader:
    with naming(path), collector_paused():
        return open_(path, budget)
