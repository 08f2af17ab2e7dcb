"""Save the state of either implementation."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from flax import nnx
from torch import Tensor

from ..convert import StateDict, linen_to_torch, nnx_to_torch
from ..errors import CheckpointError, ConversionError
from ..transfer import Untransferable, dense
from .formats import format_of


def save_checkpoint(path: str | PathLike[str], source: torch.nn.Module | nnx.Module | Mapping[str, Any]) -> Path:
    """Save parameters and buffers in the format that the suffix names, atomically.

    The file does not depend on the framework or the device that the state came from. If anything
    fails, what was at `path` before is still there.

    Args:
        path: the file, or the folder for Orbax. Its parent must exist.
        source: a torch module or state dict, Linen variables, or an NNX model.

    Returns:
        The path.

    Raises:
        CheckpointError: the path cannot be written, or the state not be stored in this format.
        ConversionError: the state has entries that the format's layout has no place for.
    """
    path = Path(path)
    chosen = format_of(path)
    if not path.parent.is_dir():
        raise CheckpointError(path, f"the folder {path.parent} does not exist; make it first")
    if path.exists() and path.is_dir() != chosen.is_folder:
        found, wanted = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise CheckpointError(path, f"is {found}; this format writes {wanted}: choose another name")
    state = _state(path, source)
    try:
        chosen.write(path, state)
    except (CheckpointError, ConversionError):
        raise
    except Exception as error:  # each library raises its own types on a full disk or a read-only folder
        raise CheckpointError(path, f"could not be written ({error}); what was there before is unchanged") from error
    return path


def _state(path: Path, source: torch.nn.Module | nnx.Module | Mapping[str, Any]) -> StateDict:
    """Return the source's state as contiguous CPU tensors under torch's names."""
    if isinstance(source, nnx.Module):
        return nnx_to_torch(source)
    if isinstance(source, Mapping) and any(isinstance(value, Mapping) for value in source.values()):
        return linen_to_torch(source)
    tensors = source.state_dict() if isinstance(source, torch.nn.Module) else source
    if not isinstance(tensors, Mapping) or not tensors:
        raise CheckpointError(
            path,
            f"there is no state in a {type(source).__name__}; give a torch or NNX module, "
            "a state dict or Linen variables",
        )
    return {key: _plain(path, key, value) for key, value in tensors.items()}


def _plain(path: Path, key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise CheckpointError(path, f"{key} is a {type(value).__name__}; expected a tensor")
    try:
        return dense(value).cpu().clone(memory_format=torch.contiguous_format)
    except Untransferable as error:
        raise CheckpointError(path, f"{key}: {error}") from error
