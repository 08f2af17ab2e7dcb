"""Which file name means which format."""

import importlib.util
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from ..errors import CheckpointError
from ..reader import Reader
from ..tensors import Tensors
from . import msgpack, orbax, safetensors, shards, torch_zip


class Format(NamedTuple):
    """How to write and read one format; `package` is what has to be installed for it.

    `layouts` are those that it can hold: torch's names, or Flax's paths.
    """

    suffixes: tuple[str, ...]
    package: str
    is_folder: bool
    layouts: tuple[str, ...]
    write: Callable[[Path, Tensors], None]
    open: Callable[[Path], Reader]


FORMATS = {
    "torch": Format(
        (".pth", ".pt", ".bin"), "torch", False, ("torch",), torch_zip.write, torch_zip.open_
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

KNOWN = [suffix for known in FORMATS.values() for suffix in known.suffixes if suffix]


def format_of(path: str | PathLike[str]) -> Format:
    """Return the format that the path's suffix names.

    Raises:
        CheckpointError: an unknown suffix, or a format whose package is not installed.
    """
    if (alone := Path(path).name.lower()) in KNOWN:
        raise CheckpointError(path, f"is a suffix without a name; say {'state' + alone!r}")
    suffix = Path(path).suffix.lower()
    for name, found in FORMATS.items():
        if suffix in found.suffixes:
            _require(path, name, found.package)
            return found
    raise CheckpointError(
        path, f"unknown suffix {suffix!r}; name it with one of {', '.join(KNOWN)}"
    )


def _require(path: str | PathLike[str], name: str, package: str) -> None:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise CheckpointError(
            path,
            f"the {name} format needs {package}, which is not installed: pip install 'attention-parity[all]'",
        )


def open_checkpoint(path: str | PathLike[str]) -> Reader:
    """Open a checkpoint of any format: what it holds is known, and read when asked for.

    Use it in a `with` block. A folder without suffix is an Orbax checkpoint, or shards with an
    index.

    Raises:
        CheckpointError: no such file, or not a file of the format that its suffix names.
    """
    path = Path(path)
    if not exists(path):
        raise CheckpointError(path, "no such file or folder")
    if shards.index_in(path) is not None:
        return _opened(path, shards.open_)
    chosen = format_of(path)
    if chosen.is_folder and not path.is_dir():
        raise CheckpointError(path, "is a file; an Orbax checkpoint is a folder")
    if not chosen.is_folder and not path.is_file():
        raise CheckpointError(
            path, "is no regular file; an Orbax folder is named without suffix or with .orbax"
        )
    if not chosen.is_folder and not path.stat().st_size:
        raise CheckpointError(path, "is empty", mend="take another copy")
    return _opened(path, chosen.open)


def exists(path: Path) -> bool:
    """Tell whether something is there.

    Raises:
        CheckpointError: nothing can be there: the name is too long, or links lead round in a
            circle.
    """
    try:
        path.resolve(strict=True)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            path, f"cannot be a path ({error})", mend="choose another name"
        ) from error
    return True


def _opened(path: Path, open_: Callable[[Path], Reader]) -> Reader:
    try:
        return open_(path)
    except OSError as error:
        raise CheckpointError(path, f"could not be read ({error})") from error
