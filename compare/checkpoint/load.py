"""Load a checkpoint into either implementation: validate everything, then assign."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from flax import nnx
from torch import Tensor

from ..convert import StateDict, Variables, torch_to_linen, torch_to_nnx
from ..errors import CheckpointError, ConversionError, Entry, Mismatch
from ..transfer import Untransferable, dense
from .formats import format_of

Module = TypeVar("Module", bound=torch.nn.Module | nnx.Module)


@overload
def load_checkpoint(path: str | PathLike[str], target: Module) -> Module: ...
@overload
def load_checkpoint(path: str | PathLike[str], target: Mapping[str, Any]) -> Variables: ...
def load_checkpoint(path: str | PathLike[str], target: Any) -> Any:
    """Load parameters and buffers that `save_checkpoint`, or the format's own library, wrote.

    A torch or NNX module is filled in place, after everything was validated, and returned. For Linen
    give variables or their `jax.eval_shape`; new variables are returned. torch modules keep their
    device and dtype; Flax takes the dtypes of the file.

    Raises:
        CheckpointError: no such file, not a file of this format, or entries that do not fit the
            target: missing, unexpected, of another shape, or (into torch) of another dtype. The
            target is as it was.
    """
    if not isinstance(target, torch.nn.Module | nnx.Module | Mapping) or isinstance(target, nnx.State):
        raise TypeError(f"target is a {type(target).__name__}; expected a torch or NNX module, or Linen variables")
    state = read_checkpoint(path)
    try:
        if isinstance(target, torch.nn.Module):
            return _fill(target, state)
        if isinstance(target, nnx.Module):
            return torch_to_nnx(state, target)
        return torch_to_linen(state, target)
    except ConversionError as error:
        raise CheckpointError(
            path, f"does not fit the target; nothing was loaded:\n{error.mismatch}", error.mismatch
        ) from error


def read_checkpoint(path: str | PathLike[str]) -> StateDict:
    """Return what a checkpoint holds as a torch state dict on the CPU.

    Raises:
        CheckpointError: no such file, or not a file of the format that its suffix names.
    """
    path = Path(path)
    chosen = format_of(path)
    if not path.exists():
        raise CheckpointError(path, "no such file or folder")
    if chosen.is_folder and not path.is_dir():
        raise CheckpointError(path, "is a file; an Orbax checkpoint is a folder")
    if not chosen.is_folder and not path.is_file():
        raise CheckpointError(path, "is no regular file; an Orbax folder is named without suffix or with .orbax")
    if not chosen.is_folder and not path.stat().st_size:
        raise CheckpointError(path, "is empty")
    try:
        return chosen.read(path)
    except OSError as error:
        raise CheckpointError(path, f"could not be read ({error})") from error


def _fill(module: torch.nn.Module, state: StateDict) -> torch.nn.Module:
    """Load the state dict into the module, or raise ConversionError before touching it."""
    held = module.state_dict()
    wanted = {key: entry for key, entry in held.items() if isinstance(entry, Tensor)}
    missing = tuple(Entry(key, "the module's", expected=tuple(wanted[key].shape)) for key in wanted if key not in state)
    unexpected = tuple(Entry(key, "", tuple(state[key].shape)) for key in state if key not in wanted)
    misshaped = []
    refused = [
        Entry(key, "the module", reason=f"is a {type(entry).__name__} in the module; only tensors are stored")
        for key, entry in held.items()
        if key not in wanted
    ]
    for key in [key for key in wanted if key in state]:
        found, expected = state[key], wanted[key]
        if found.shape != expected.shape:
            misshaped.append(Entry(key, "the module", tuple(found.shape), tuple(expected.shape)))
        elif reason := _refusal(key, found, expected):
            refused.append(Entry(key, "the module", reason=reason))
    mismatch = Mismatch(missing, unexpected, tuple(misshaped), tuple(refused))
    if mismatch:
        raise ConversionError(mismatch)
    module.load_state_dict(state)
    return module


def _refusal(key: str, found: Tensor, expected: Tensor) -> str:
    """Say why the tensor cannot be copied into the module's as it is, or nothing."""
    try:
        dense(found)
    except Untransferable as error:
        return str(error)
    if expected.is_meta:
        return "the module is on the meta device: `to_empty(device=...)` first"
    if any(stride == 0 and size > 1 for stride, size in zip(expected.stride(), expected.shape, strict=True)):
        return f"the module's is expanded, many entries in one place: `module.{key} = module.{key}.clone()` first"
    if found.dtype == expected.dtype:
        return ""
    floating = found.dtype.is_floating_point and expected.dtype.is_floating_point
    mend = f"module.to({found.dtype})" if floating else f"module.{key} = module.{key}.to({found.dtype})"
    return f"is {found.dtype}; the module has {expected.dtype}: `{mend}` first"
