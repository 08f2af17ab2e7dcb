"""Load a checkpoint into either implementation: validate everything, then assign."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from stat import S_ISDIR
from typing import Any, NamedTuple, TypeVar, get_args, overload

import jax
import numpy as np
import torch
from flax import nnx

from ..conversion.apply_mapping import flax_from_torch
from ..conversion.convert import StateDict, Variables
from ..conversion.errors import ConversionError, shown
from ..conversion.mapping import LINEN, NNX, KeyPath, Policy, StateMapping, slashed
from ..conversion.match import allowing, match
from ..conversion.state_kinds import FlaxSide, flax_side, specs_side
from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..dtypes import numpy_dtype
from .errors import CheckpointError, UnverifiedCheckpoint
from .formats import open_checkpoint
from .formats.shards import index_in
from .load_flax import flax_leaves, install
from .load_torch import fill_torch, require_fit
from .manifest import is_mask
from .reader import Reader
from .tensors import Tensors, whole
from .transforms import cast_array, relaid

Module = TypeVar("Module", bound=torch.nn.Module | nnx.Module)
Result = TypeVar("Result")
_TRIES = 20


@overload
def load_checkpoint(
    path: str | PathLike[str],
    target: Module,
    *,
    mapping: StateMapping | None = None,
    policy: Mapping[str, Policy] | None = None,
    cast: bool = False,
) -> Module: ...
@overload
def load_checkpoint(
    path: str | PathLike[str],
    target: Mapping[str, Any],
    *,
    mapping: StateMapping | None = None,
    policy: Mapping[str, Policy] | None = None,
    cast: bool = False,
) -> Variables: ...
def load_checkpoint(
    path: str | PathLike[str],
    target: Any,
    *,
    mapping: StateMapping | None = None,
    policy: Mapping[str, Policy] | None = None,
    cast: bool = False,
) -> Any:
    """Load parameters and buffers that `save_checkpoint`, or the format's own library, wrote.

    A torch or NNX module is filled in place, after everything was validated, and returned. For
    Linen give variables or their `jax.eval_shape`; new variables are returned. torch modules keep
    their device and dtype; Flax takes the dtypes of the file.

    Args:
        path: the file or folder.
        target: what to load into.
        mapping: how torch and Flax names pair; without, what the file says, or `compare.match`
            finds.
        policy: pattern of names to what may happen if one side lacks the entry: `ignore` (the
            target keeps its own, the file's is dropped), `verify` (only if it is the causal mask
            that anyone would recompute).
        cast: whether floating numbers may be cast to the target's dtype.

    Raises:
        CheckpointError: no such file, not a file of this format, other values than were saved, or
            entries that do not fit the target: missing, unexpected, of another shape, or (into
            torch) of another dtype. The target is as it was.

    Warns:
        UnverifiedCheckpoint: the file has no manifest, so nothing tells whether its values are
            those saved.
    """
    if not isinstance(target, torch.nn.Module | nnx.Module | Mapping) or isinstance(
        target, nnx.State
    ):
        raise TypeError(
            f"target is a {type(target).__name__}; expected a torch or NNX module, or Linen variables"
        )
    if (
        isinstance(target, Mapping)
        and target
        and not any(isinstance(inner, Mapping) for inner in target.values())
    ):
        raise TypeError(
            "target is a flat dict; expected Linen variables, or a torch module instead of its state dict"
        )
    if mapping is not None and not isinstance(mapping, StateMapping):
        raise TypeError(
            f"mapping is a {type(mapping).__name__}; expected what `compare.match` returns"
        )
    for pattern, decided in (policy or {}).items():
        if decided not in get_args(Policy):
            raise ValueError(
                f"policy {pattern}: there is no {decided!r}; there are {', '.join(get_args(Policy))}"
            )

    def prepare(stored: Reader) -> Callable[[], Any]:
        try:
            if isinstance(target, torch.nn.Module):
                return _into_torch(stored, target, mapping, policy or {}, cast)
            if stored.layout == "torch":
                return _torch_into_flax(stored, target, mapping, policy or {}, cast)
            return _flax_into_flax(stored, target, policy or {}, cast)
        except ConversionError as error:
            raise CheckpointError(
                path,
                f"does not fit the target; nothing was loaded:\n{error.mismatch}",
                error.mismatch,
            ) from error

    assign = steady(path, prepare)
    try:
        return assign()
    except ConversionError as error:
        raise CheckpointError(path, f"was not loaded:\n{error.mismatch}", error.mismatch) from error


def read_checkpoint(path: str | PathLike[str], *, mapping: StateMapping | None = None) -> StateDict:
    """Return what a checkpoint holds as a torch state dict on the CPU.

    Args:
        path: the file or folder.
        mapping: how torch and Flax names pair, for a file in Flax's layout that does not say it
            itself. The attention classes need none.

    Raises:
        CheckpointError: no such file, or not a file of the format that its suffix names.
    """

    def read(stored: Reader) -> StateDict:
        if stored.layout == "torch":
            return _state(stored.read(), stored.aliases)
        table = mapping or stored.mapping or (LINEN if stored.layout == "linen" else NNX)
        try:
            table = stored.spell(table)
            return _whole_state(relaid(stored.path, stored.tensors(), table))
        except CheckpointError as error:
            if not error.mismatch or mapping or stored.mapping:
                raise
            raise CheckpointError(
                path,
                f"holds no variables of the attention classes:\n{error.mismatch}",
                error.mismatch,
                mend="give mapping=compare.match(module, template)",
            ) from error

    return steady(path, read)


def steady(path: str | PathLike[str], work: Callable[[Reader], Result]) -> Result:
    """Open the checkpoint and do the work, again if it was replaced meanwhile: the old or the new, never both.

    Raises:
        CheckpointError: what opening or the work raise.
    """
    for _ in range(_TRIES):
        before = _identity(Path(path))
        try:
            with open_checkpoint(path) as stored:
                result = work(stored)
                unverified = not stored.checked
        except CheckpointError:
            if before == _identity(Path(path)):
                raise
            continue
        if before == _identity(Path(path)):
            if unverified:
                warnings.warn(
                    f"{path} has no manifest: whether its values are those that were saved is not known",
                    UnverifiedCheckpoint,
                    stacklevel=3,
                )
            return result
    raise CheckpointError(
        path, f"was replaced {_TRIES} times while it was read", mend="read it when it is at rest"
    )


def _identity(path: Path) -> list[tuple[int, ...]]:
    """Return what tells a checkpoint from another at the same path; a folder by what it was written with last."""
    try:
        index = index_in(path)
        parts = [path, path / "_METADATA", index or path] if path.is_dir() else [path]
        found = [part.stat() for part in parts if part.exists()]
    except (OSError, ValueError, RuntimeError):
        return []
    return [
        (stat.st_dev, stat.st_ino, 0 if S_ISDIR(stat.st_mode) else stat.st_mtime_ns)
        for stat in found
    ]


class _Named(NamedTuple):
    """A tensor of a file that is not read yet; names of one tensor have the memory in common."""

    shape: tuple[int, ...]
    dtype: str
    memory: Any
    kind: str


def named(stored: Reader) -> dict[str, _Named]:
    """Return the torch names of the file, tied ones among them, with the shapes that it declares."""
    homes = {key: key for key in stored.specs} | dict(stored.aliases)
    return {
        str(key[0]): _Named(*stored.specs[first], first, stored.kinds.get(first, "unknown"))
        for key, first in homes.items()
    }


def _into_torch(
    stored: Reader,
    module: torch.nn.Module,
    mapping: StateMapping | None,
    policy: Mapping[str, Policy],
    cast: bool,
) -> Callable[[], torch.nn.Module]:
    stored.mapped = True  # the values are copied into the module
    if stored.layout == "torch":
        tensors = stored.tensors()
    else:
        table = mapping or _own(stored, stored.layout)
        if table:
            table = allowing(stored.spell(table), (), stored.specs, policy)
        table = table or match(module, side_of(stored), policy=policy)
        tensors = relaid(stored.path, stored.tensors(), table)
    left = tensors.mapping.left_keys() if tensors.mapping else set()
    homes = {key: key for key in tensors.specs} | dict(tensors.aliases)
    specs = {str(key[0]): tensors.specs[first] for key, first in homes.items()}
    kinds = {str(key[0]): tensors.kinds.get(first, "unknown") for key, first in homes.items()}
    dropped = require_fit(module, specs, kinds, policy, left, cast)
    if stored.layout == "torch":
        state = _state(stored.read(), stored.aliases)
    else:
        state = _whole_state(tensors)
    state = {key: tensor for key, tensor in state.items() if key not in dropped}
    if cast:
        own = module.state_dict()
        for key in [key for key in state if key in own]:
            state[key] = _cast(stored.path, key, state[key], own[key].dtype)
    _require_masks(stored.path, tensors, state)
    return fill_torch(module, state)


def _torch_into_flax(
    stored: Reader,
    target: Any,
    mapping: StateMapping | None,
    policy: Mapping[str, Policy],
    cast: bool,
) -> Callable[[], Any]:
    side, names = flax_side(target), named(stored)
    table = mapping or _own(stored, side.kind)
    table = (
        allowing(table, names, side.leaves, policy) if table else match(names, side, policy=policy)
    )
    # Names and shapes first: nothing is read from a file that does not fit.
    relaid(stored.path, stored.tensors(), table)
    state = _state(stored.read(), stored.aliases)
    _require_masks(stored.path, stored.tensors(), state)
    for key, row in {
        key: rows[0] for key, rows in table.by_key.items() if cast and key in state
    }.items():
        state[key] = _cast(
            stored.path, key, state[key], getattr(torch, np.dtype(side.leaves[row.path].dtype).name)
        )
    arrays, mismatch = flax_from_torch(state, side.leaves, table, copy=True)
    if mismatch:
        raise ConversionError(mismatch)
    return lambda: install(target, arrays)


def _flax_into_flax(
    stored: Reader, target: Any, policy: Mapping[str, Policy], cast: bool
) -> Callable[[], Any]:
    side = flax_side(target)
    leaves = flax_leaves(stored, side, policy, cast)
    for path, array in leaves.items():
        _require_no_nan(stored.path, path, side.kinds[path], array)
    return lambda: install(target, leaves)


def _cast(path: Path, key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a floating tensor in another floating dtype.

    Raises:
        CheckpointError: a finite number that the dtype holds only as an infinite one.
    """
    if not tensor.is_floating_point() or not dtype.is_floating_point:
        return tensor
    array = tensor_to_numpy(tensor)
    return numpy_to_tensor(
        cast_array(path, key, array, numpy_dtype(str(dtype).removeprefix("torch.")))
    )


def _own(stored: Reader, kind: str) -> StateMapping | None:
    """Return the mapping that the file has for that kind of Flax model."""
    return stored.mapping if stored.mapping and stored.mapping.flax == kind else None


def side_of(stored: Reader) -> FlaxSide:
    """Return the Flax side that a file in Flax's layout is, for `compare.match`."""
    return specs_side("linen" if stored.layout == "linen" else "nnx", stored.specs, stored.kinds)


def _state(
    arrays: Iterable[tuple[KeyPath, np.ndarray]], aliases: Mapping[KeyPath, KeyPath]
) -> StateDict:
    """Return the arrays as a state dict, tied names as one tensor."""
    state = {str(key[0]): numpy_to_tensor(_owned(array)) for key, array in arrays}
    return state | {str(key[0]): state[str(first[0])] for key, first in aliases.items()}


def _whole_state(tensors: Tensors) -> StateDict:
    return _state(((key, whole(tensors, key)) for key in tensors.specs), tensors.aliases)


def _owned(array: np.ndarray) -> np.ndarray:
    return (
        array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")
    )


def _require_masks(path: Path, tensors: Tensors, state: StateDict) -> None:
    for key, tensor in state.items():
        kind = tensors.kinds.get((key,), "unknown")
        if tensor.is_floating_point() and is_mask((key,), kind) and bool(torch.isnan(tensor).any()):
            raise _nan(path, key, int(torch.isnan(tensor).sum()))


def _require_no_nan(path: Path, steps: KeyPath, kind: str, array: jax.Array) -> None:
    if is_mask(steps, kind) and array.dtype.kind not in "biu":
        is_nan = np.isnan(np.asarray(array).astype(np.complex128))
        if is_nan.any():
            raise _nan(path, slashed(steps), int(is_nan.sum()))


def _nan(path: Path, key: str, count: int) -> CheckpointError:
    return CheckpointError(
        path,
        f"{shown(key)} holds NaN, which blocks in one framework's arithmetic and spreads in another's",
        key=key,
        expected="numbers",
        found=f"{count} NaN",
        mend="write 0 where a mask is open, 1 where it blocks",
    )
