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
    """
    path = Path(path)
    chosen = format_of(path)
    target = path.resolve()  # a link stays a link, and what it points to is replaced
    if not target.parent.is_dir():
        raise CheckpointError(path, f"the folder {target.parent} does not exist; make it first")
    if target.exists() and not (target.is_dir() if chosen.is_folder else target.is_file()):
        wanted = "a folder" if chosen.is_folder else "a regular file"
        raise CheckpointError(path, f"is something else than {wanted}, which this format writes: choose another name")
    try:
        chosen.write(target, _state(path, source))
    except CheckpointError:
        raise
    except ConversionError as error:
        raise CheckpointError(
            path, f"the state cannot be stored in this format:\n{error.mismatch}", error.mismatch
        ) from error
    except Exception as error:  # each library raises its own types on a full disk or a read-only folder
        raise CheckpointError(path, f"could not be written ({error}); what was there before is unchanged") from error
    return path


def _state(path: Path, source: torch.nn.Module | nnx.Module | Mapping[str, Any]) -> StateDict:
    """Return the source's state as contiguous CPU tensors under torch's names."""
    if isinstance(source, nnx.Module):
        return nnx_to_torch(source)
    if isinstance(source, nnx.State):
        raise CheckpointError(path, "an nnx.State does not say which module it is of; give the NNX model")
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


def _plain(path: Path, key: Any, value: Any) -> Tensor:
    if not isinstance(key, str):
        raise CheckpointError(path, f"the key {key!r} is a {type(key).__name__}; a state dict has names")
    if not isinstance(value, Tensor):
        raise CheckpointError(path, f"{key} is a {type(value).__name__}; expected a tensor")
    try:
        # A clone, for a view would take its whole storage along.
        return dense(value).cpu().clone(memory_format=torch.contiguous_format)
    except Untransferable as error:
        raise CheckpointError(path, f"{key}: {error}") from error
