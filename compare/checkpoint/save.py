"""Save the state of either implementation."""

import errno
import sys
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from torch import Tensor

from ..conversion.convert import StateDict, linen_to_torch, nnx_to_torch
from ..conversion.errors import ConversionError, shown
from ..conversion.mapping import LINEN, NNX, StateMapping, slashed
from ..conversion.state_kinds import entries, flax_side, same_memory, torch_kinds
from ..conversion.tensors import Untransferable, dense, tensor_to_numpy, to_host
from .errors import CheckpointError
from .formats import Format, exists, format_of
from .tensors import Tensors, spec_of, tensors_of
from .transforms import relaid

Source = torch.nn.Module | nnx.Module | Mapping[str, Any]
_MEND = "of other modules than the attention classes give mapping=compare.match(module, template)"


def save_checkpoint(
    path: str | PathLike[str], source: Source, *, mapping: StateMapping | None = None
) -> Path:
    """Save parameters and buffers in the format that the suffix names, atomically, with a checksum of each.

    If anything fails, what was at `path` before is still there. Of the attention classes the file
    does not depend on the framework or the device that the state came from.

    Args:
        path: the file, or the folder for Orbax. Its parent must exist.
        source: a torch module or state dict, Linen variables, or an NNX model.
        mapping: how torch and Flax names pair, as `compare.match` found it: needed where the format
            is the other framework's. It is kept in the file. The attention classes need none.

    Returns:
        The path.

    Raises:
        CheckpointError: the path cannot be written, or the state not be stored in this format.
    """
    path = Path(path)
    chosen = format_of(path)
    target = writable(path, chosen)
    try:
        write(path, target, chosen, _tensors(path, source, mapping, chosen))
    except (
        TypeError,
        RecursionError,
    ) as error:  # of leaves that are no arrays, and of dicts without end
        mend = "give a torch or NNX module, a state dict or Linen variables"
        raise CheckpointError(path, shown(error).removeprefix("template "), mend=mend) from error
    except ConversionError as error:
        raise CheckpointError(
            path,
            f"the state cannot be stored in this format:\n{error.mismatch}",
            error.mismatch,
            mend=_MEND,
        ) from error
    return path


def writable(path: Path, chosen: Format) -> Path:
    """Return what is to be written: a link stays a link, and what it points to is replaced.

    Raises:
        CheckpointError: no folder to write into, or something else is there.
    """
    exists(path)
    target = path.resolve()
    if not target.parent.is_dir():
        raise CheckpointError(path, f"the folder {target.parent} does not exist; make it first")
    if target.exists() and not (target.is_dir() if chosen.is_folder else target.is_file()):
        wanted = "a folder" if chosen.is_folder else "a regular file"
        raise CheckpointError(
            path, f"is something else than {wanted}, which this format writes: choose another name"
        )
    return target


def write(path: Path, target: Path, chosen: Format, tensors: Tensors) -> None:
    """Write the tensors at `target`, which the user calls `path`.

    Raises:
        CheckpointError: they could not be written.
    """
    handled = sys.exception()
    try:
        chosen.write(target, tensors)
    except CheckpointError as error:
        raise error if error.path != str(target) else _renamed(error, path, target) from error
    except (
        Exception
    ) as raised:  # each library raises its own types on a full disk or a read-only folder
        reason = _behind(raised, handled)
        if not isinstance(reason, Exception):
            raise reason from None
        size = sum(spec.nbytes for spec in tensors.specs.values())
        raise CheckpointError(
            path,
            f"could not be written ({shown(reason)}); what was there before is unchanged",
            mend=_mend(reason, size),
        ) from raised


def _behind(error: BaseException, handled: BaseException | None) -> BaseException:
    """Return the system's error or the interrupt that a library has put another error in the place of, if it has.

    What was being `handled` before is not its cause.
    """
    chain = [error]
    before = error.__cause__ or error.__context__
    while before is not None and before not in (handled, *chain):
        chain.append(before)
        before = before.__cause__ or before.__context__
    return next(
        (
            found
            for found in chain
            if isinstance(found, OSError) or not isinstance(found, Exception)
        ),
        error,
    )


def _mend(reason: Exception, size: int) -> str:
    if isinstance(reason, UnicodeError):
        return "rename the entry: its name is no text"
    if isinstance(reason, OSError) and reason.errno == errno.ENAMETOOLONG:
        return "choose a shorter name: the temporary one beside it is 18 characters longer"
    return f"make room for {size:,} bytes and some more, or choose another place"


def _renamed(error: CheckpointError, path: Path, target: Path) -> CheckpointError:
    """Return the error with the user's name for the path."""
    if str(path) == str(target):
        return error
    return CheckpointError(
        path,
        error.reason,
        error.mismatch,
        key=error.key,
        expected=error.expected,
        found=error.found,
        mend=error.mend,
    )


def _tensors(path: Path, source: Source, mapping: StateMapping | None, chosen: Format) -> Tensors:
    """Return the source's state, laid out as the format has it."""
    if isinstance(source, nnx.State):
        raise CheckpointError(
            path, "an nnx.State does not say which module it is of; give the NNX model"
        )
    nested = isinstance(source, Mapping) and any(
        isinstance(value, Mapping) for value in source.values()
    )
    if isinstance(source, nnx.Module) or nested:
        held = _from_flax(path, source, mapping, chosen)
    else:
        held = _from_torch(path, source, mapping)
    if held.layout in chosen.layouts:
        return held
    try:
        return relaid(path, held, held.mapping or LINEN)
    except CheckpointError as error:
        raise (
            error if mapping else CheckpointError(path, error.reason, error.mismatch, mend=_MEND)
        ) from error


def _from_torch(path: Path, source: Any, mapping: StateMapping | None) -> Tensors:
    tensors = source.state_dict() if isinstance(source, torch.nn.Module) else source
    if not isinstance(tensors, Mapping) or not tensors:
        raise CheckpointError(
            path,
            f"there is no state in a {type(source).__name__}; give a torch or NNX module, "
            "a state dict or Linen variables",
        )
    kinds = torch_kinds(source) if isinstance(source, torch.nn.Module) else {}
    return _torch_held(path, tensors, kinds, mapping)


def _torch_held(
    path: Path, tensors: Mapping[Any, Any], kinds: Mapping[str, str], mapping: StateMapping | None
) -> Tensors:
    attention = mapping is None and tensors.keys() <= LINEN.by_key.keys()
    if attention:
        kinds = {**{key: rows[0].kind for key, rows in LINEN.by_key.items()}, **kinds}
    arrays, aliases = {}, {}
    seen: dict[Any, str] = {}
    for key, value in tensors.items():
        array = _plain(path, key, value)
        memory = same_memory(value)
        first = key if memory is None else seen.setdefault(memory, key)
        if first != key:
            aliases[(key,)] = (first,)
        else:
            arrays[(key,)] = array
    table = LINEN if attention else mapping
    return tensors_of(
        "torch", arrays, {(key,): kind for key, kind in kinds.items()}, aliases, table
    )


def _plain(path: Path, key: Any, value: Any) -> np.ndarray:
    if not isinstance(key, str):
        raise CheckpointError(
            path, f"the key {key!r} is a {type(key).__name__}; a state dict has names"
        )
    if not isinstance(value, Tensor):
        raise CheckpointError(
            path, f"{key} is a {type(value).__name__}; expected a tensor", key=key
        )
    try:
        array = tensor_to_numpy(dense(value))
        spec_of(array)
    except ValueError as error:  # Untransferable among them
        raise CheckpointError(path, f"{key}: {error}", key=key) from error
    return array


def _from_flax(path: Path, source: Any, mapping: StateMapping | None, chosen: Format) -> Tensors:
    side = flax_side(source)
    table = NNX if side.kind == "nnx" else LINEN
    required = {row.path for row in table.rows if row.required}
    attention = mapping is None and required <= side.leaves.keys() <= table.by_path.keys()
    to_torch = attention or mapping is not None or "linen" not in chosen.layouts
    if to_torch and (attention or "torch" in chosen.layouts):
        convert: Any = nnx_to_torch if side.kind == "nnx" else linen_to_torch
        state: StateDict = convert(source, mapping=mapping)
        return _torch_held(path, state, {}, mapping)
    arrays = {key: _host(path, key, leaf) for key, leaf in side.leaves.items()}
    tied = {held.path: held.first for held in entries(source) if held.first is not None}
    aliases = {key: first for key, first in tied.items() if first in arrays}
    return tensors_of(side.kind, arrays, side.kinds, aliases, mapping)


def _host(path: Path, key: tuple[Any, ...], leaf: Any) -> np.ndarray:
    name = slashed(key)
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise CheckpointError(
            path, f"{shown(name)}: is a {type(leaf).__name__}, not an array of values", key=name
        )
    try:
        array = to_host(leaf)
        spec_of(array)
    except (Untransferable, ValueError) as error:
        raise CheckpointError(path, f"{shown(name)}: {error}", key=name) from error
    return array
