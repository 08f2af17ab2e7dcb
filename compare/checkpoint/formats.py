"""Which file name means which format."""

import importlib.util
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from ..convert import StateDict
from ..errors import CheckpointError
from . import msgpack_file, orbax_folder, safetensors_file, torch_file


class Format(NamedTuple):
    """How to write and read one format; `package` is what has to be installed for it."""

    suffixes: tuple[str, ...]
    package: str
    is_folder: bool
    write: Callable[[Path, StateDict], None]
    read: Callable[[Path], StateDict]


FORMATS = {
    "torch": Format((".pth", ".pt"), "torch", False, torch_file.write, torch_file.read),
    "safetensors": Format((".safetensors",), "safetensors", False, safetensors_file.write, safetensors_file.read),
    "msgpack": Format((".msgpack",), "flax", False, msgpack_file.write, msgpack_file.read),
    "orbax": Format((".orbax", ""), "orbax.checkpoint", True, orbax_folder.write, orbax_folder.read),
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
    raise CheckpointError(path, f"unknown suffix {suffix!r}; name it with one of {', '.join(KNOWN)}")


def _require(path: str | PathLike[str], name: str, package: str) -> None:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise CheckpointError(
            path, f"the {name} format needs {package}, which is not installed: pip install 'attention-parity[all]'"
        )
