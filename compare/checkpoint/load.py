"""Load a checkpoint into a torch or Flax model: validate everything, then assign."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

from ..conversion.apply_mapping import flax_from_torch
from ..conversion.arguments import require_flags, require_rules
from ..conversion.convert import StateDict, Variables
from ..conversion.errors import ConversionError, next_step
from ..conversion.layers import KnownState
from ..conversion.mapping import (
    LINEN,
    NNX,
    KeyPath,
    Policy,
    StateMapping,
    require_mapping,
    slashed,
)
from ..conversion.match import match
from ..conversion.policies import allowing, decided, require_policy
from ..conversion.state_kinds import FlaxSide, flax_side, specs_side, torch_kinds
from ..conversion.tensors import is_uninitialized, numpy_to_tensor, tensor_to_numpy
from ..conversion.trees import is_nested
from ..conversion.wrappers import without_prefix, without_wrapper
from ..dtypes import FLOATING, numpy_dtype
from ..files.memory import collector_paused
from ..files.printable import kind_of, shown
from ..files.reading import Snapshot, as_path
from ..files.warn import warn
from ..frameworks import nnx, torch
from .errors import CheckpointError, UnverifiedCheckpoint
from .formats import open_checkpoint
from .formats.parts import collections_alone
from .formats.shards import index_in
from .load_flax import flax_leaves, install
from .load_torch import assignment, fill_torch, named_by_hooks, require_fit
from .manifest import is_cast
from .reader import Reader
from .tensors import Tensors, whole
from .transforms import cast_array, relaid

Module = TypeVar("Module", bound=torch.nn.Module | nnx.Module)
Result = TypeVar("Result")
_MAX_TRIES = 20
_MATCH = "compare.match(module, template)"


@overload
def load_checkpoint(
    path: str | PathLike[str],
    target: Module,
    *,
    mapping: StateMapping | None = None,
    policy: Mapping[str, Policy] | None = None,
    select: str | Sequence[str] = (),
    prefix: str = "",
    layouts: Mapping[str, str] | None = None,
    cast: bool = False,
    memory: int | None = None,
) -> Module: ...
@overload
def load_checkpoint(
    path: str | PathLike[str],
    target: Mapping[str, Any],
    *,
    mapping: StateMapping | None = None,
    policy: Mapping[str, Policy] | None = None,
    select: str | Sequence[str] = (),
    prefix: str = "",
    layouts: Mapping[str, str] | None = None,
    cast: bool = False,
    memory: int | None = None,
) -> Variables: ...
def load_checkpoint(
    path: str | PathLike[str],
    target: Any,
    *,
    mapping: StateMapping | None = None,
    policy: Mapping[str, Policy] | None = None,
    select: str | Sequence[str] = (),
    prefix: str = "",
    layouts: Mapping[str, str] | None = None,
    cast: bool = False,
    memory: int | None = None,
) -> Any:
    """Load parameters and buffers that `save_checkpoint`, or the format's own library, wrote.

    A torch or NNX module is filled in place, after everything was validated, and returned. For
    Linen, pass variables or their `jax.eval_shape`; new variables are returned. torch modules keep
    their device and dtype; Flax gets the dtypes of the file.

    Args:
        path: the file or folder.
        target: the model or variables to load into.
        mapping: how torch and Flax names pair. Default: the mapping in the file, or else what
            `compare.match` finds.
        policy: patterns of names to what happens if one side lacks the entry. `ignore`: the target
            keeps its own value, and a value of the file is dropped. `verify`: the same, but only if
            the value follows from its shape: the standard causal mask, zeros of integers, or a
            table of positions, sinusoids, rotary frequencies or relative positions.
        select: the part of the file that holds the state, if a training program wrote more: names
            joined by slashes, or several for Flax, as ("params", "batch_stats").
        prefix: what the names of a torch file begin with and the target's do not: "module." for a
            file of DataParallel. One that ends with "_orig_mod." or the name of a wrapper of FSDP
            takes those names off wherever they stand.
        layouts: how tensors of a torch file are laid out, as `compare.match` takes them, for a file
            that does not say of which layers they are.
        cast: whether floating values may be cast to the target's dtype, and int32 to torch's int64.
            The running statistics of a norm are cast like parameters. Another buffer, which may be
            a mask, keeps its values: in Flax it keeps the dtype of the file, and in torch it is
            refused if a value would change.
        memory: the most bytes that what is read and held at once may take. Default: the memory that
            is free.

    Raises:
        CheckpointError: the file does not exist, is not of this format, needs more memory, or has
            other values than were saved; or entries do not fit the target: they are missing,
            unexpected, of another shape, or (for torch) of another dtype. The target is unchanged.

    Warns:
        UnverifiedCheckpoint: the file has no manifest, so its values could not be checked.
    """
    if not isinstance(target, torch.nn.Module | nnx.Module | Mapping) or isinstance(
        target, nnx.State
    ):
        raise TypeError(
            f"target is {kind_of(target)}; expected a torch or NNX module, or Linen variables"
        )
    is_module = isinstance(target, nnx.Module)  # nnx.Dict is a mapping too
    if isinstance(target, Mapping) and not is_module and target and not is_nested(target):
        raise TypeError(
            "target is a flat dict; "
            "expected Linen variables, or a torch module instead of its state dict"
        )
    require_mapping(mapping)
    require_rules(prefix, policy=policy, layouts=layouts)
    require_flags(cast=cast)
    for pattern, value in (policy or {}).items():
        require_policy(pattern, value)

    def prepare(stored: Reader) -> Callable[[], Any]:
        if prefix:
            _require_prefix(stored, prefix, mapping)
        if layouts:
            _require_asked(stored, target, mapping)
        try:
            if isinstance(target, torch.nn.Module):
                return _into_torch(stored, target, mapping, policy or {}, prefix, cast)
            if stored.layout == "torch":
                return _torch_into_flax(
                    stored, target, mapping, policy or {}, prefix, layouts or {}, cast
                )
            return _flax_into_flax(stored, target, policy or {}, cast)
        except ConversionError as error:
            reason = "does not fit the target; nothing was loaded"
            is_torch = isinstance(target, torch.nn.Module)
            mend = next_step(
                error.mismatch,
                is_torch=is_torch,
                is_relaid=is_torch and stored.layout != "torch",
            )
            if way := collections_alone(stored):
                mend += f"; or {way}"
            raise CheckpointError.unfit(path, reason, error.mismatch, mend) from error

    with collector_paused():
        assign = steady(path, prepare, memory, select=select)
    try:
        made = assign()
    except ConversionError as error:
        raise CheckpointError.unfit(path, "was not loaded", error.mismatch) from error
    return target if isinstance(target, torch.nn.Module) else made  # a wrapper is filled within


def read_checkpoint(
    path: str | PathLike[str],
    *,
    mapping: StateMapping | None = None,
    select: str | Sequence[str] = (),
    memory: int | None = None,
) -> StateDict:
    """Return the content of a checkpoint as a torch state dict on the CPU.

    Args:
        path: the file or folder.
        mapping: how torch and Flax names pair, for a file in Flax's layout without a mapping in its
            manifest. The attention classes need none.
        select: the part of the file that holds the state, if a training program wrote more: names
            joined by slashes, or several for Flax, as ("params", "batch_stats").
        memory: the most bytes that what is read and held at once may take. Default: the memory that
            is free.

    Raises:
        CheckpointError: the path does not exist, or is not a checkpoint of the format that its
            suffix selects, or it needs more memory.
    """

    def read(stored: Reader) -> StateDict:
        if stored.layout == "torch":
            return _state(stored.read(), stored.aliases)
        table = mapping or stored.mapping or (LINEN if stored.layout == "linen" else NNX)
        try:
            table = stored.spell(table)
            return _whole_state(stored, relaid(stored.path, stored.tensors(), table))
        except CheckpointError as error:
            if not error.mismatch or mapping or stored.mapping:
                raise
            reason = "does not contain the variables of the attention classes"
            mend = f"pass mapping={_MATCH}"
            raise CheckpointError.unfit(path, reason, error.mismatch, mend) from error

    return steady(path, read, memory, select=select)


def steady(
    path: str | PathLike[str],
    work: Callable[[Reader], Result],
    memory: int | None = None,
    *,
    select: str | Sequence[str] = (),
    is_settled: bool = False,
) -> Result:
    """Open the checkpoint and do the work; start again if the checkpoint was changed meanwhile.

    So the work sees the old checkpoint or the new one, never a mixture.

    Args:
        path: the file or folder.
        work: what to do with the open checkpoint.
        memory: the most bytes that what is read and held at once may take.
        select: the part of the file.
        is_settled: whether the work itself calls `require_current` before its result counts.

    Raises:
        CheckpointError: opening or the work failed, or the checkpoint was changed too often.
    """
    for _ in range(_MAX_TRIES):
        before = _snapshot(as_path(path))
        try:
            with open_checkpoint(path, memory, select=select) as stored:
                result = work(stored)
                if not is_settled:
                    stored.require_current()
                unverified = not stored.checked
        except CheckpointError:
            if before.is_current():
                raise
            continue
        if is_settled or before.is_current():
            if unverified:
                warn(
                    f"{shown(path)} has no manifest, so it is not known whether its values are "
                    "those that were saved",
                    UnverifiedCheckpoint,
                )
            return result
    raise CheckpointError(
        path,
        f"was replaced {_MAX_TRIES} times while it was read",
        expected="one checkpoint for as long as it is read",
        found=f"{_MAX_TRIES} others",
        mend="read it when nothing writes to it",
    )


def _snapshot(path: Path) -> Snapshot:
    """Return the state of the checkpoint; of a folder, that of the files written last."""
    try:
        parts = [path, path / "_METADATA", index_in(path) or path] if path.is_dir() else [path]
    except (OSError, ValueError, RuntimeError):
        parts = [path]
    return Snapshot.of(parts)


def _require_asked(stored: Reader, target: Any, mapping: StateMapping | None) -> None:
    """Raise CheckpointError if layouts would have no effect."""
    if mapping is not None or stored.layout != "torch" or isinstance(target, torch.nn.Module):
        raise CheckpointError(
            stored.path,
            "layouts has no effect beside a mapping, and where the layout does not change",
            expected="no layouts",
            found="layouts",
            mend="leave it out",
            is_usage=True,
        )


def _require_fitting(
    stored: Reader,
    target: Iterable[str],
    policy: Mapping[str, Policy],
    table: StateMapping | None = None,
) -> None:
    """Raise CheckpointError if a policy is for a name that neither side has."""
    if not policy:
        return
    names = {*map(slashed, stored.specs), *map(slashed, stored.aliases), *target}
    if table is not None:
        names.update(table.by_key, map(slashed, table.by_path), table.left_keys())
    unfitting = {
        pattern
        for pattern in policy
        if not any(decided(name, {pattern: "ignore"}) for name in names)
    }
    if unfitting:
        pattern = min(unfitting)
        raise CheckpointError(
            stored.path,
            f"neither it nor the target has a name that fits policy {shown(pattern)}",
            key=pattern,
            expected="names or patterns of what one side lacks",
            found=f"policy={{{pattern!r}: {policy[pattern]!r}}}",
            mend="leave it out, or correct the name",
            is_usage=True,
        )


def _require_prefix(stored: Reader, prefix: str, mapping: StateMapping | None) -> None:
    """Raise CheckpointError if a prefix has no effect, or makes one name of two."""
    names = [str(key[0]) for key in (*stored.specs, *stored.aliases)]
    bare: dict[str, str] = {}
    both = [
        (name, other)
        for name in names
        if (other := bare.setdefault(without_prefix(name, prefix), name)) != name
    ]
    if both and mapping is None and stored.layout == "torch":
        name, other = min(both)
        raise CheckpointError(
            stored.path,
            f"has {shown(name)} and {shown(other)}, which would be one",
            key=name,
            expected="names that differ without the prefix",
            found="two names that are then the same",
            mend=f"leave one out, or pass mapping={_MATCH}",
            is_usage=True,
        )
    if mapping is not None or stored.layout != "torch":
        reason = "prefix has no effect beside a mapping, and for a file in Flax's layout"
    elif all(without_prefix(name, prefix) == name for name in names):
        reason = f"no name in it has {prefix!r}"
    else:
        return
    raise CheckpointError(
        stored.path,
        reason,
        expected="no prefix",
        found=f"prefix={prefix!r}",
        mend="leave it out",
        is_usage=True,
    )


class _Named(NamedTuple):
    """A tensor of a file whose values are not read yet. Tied names have the same `memory`."""

    shape: tuple[int, ...]
    dtype: str
    memory: Any
    kind: str


def named(stored: Reader) -> KnownState:
    """Return the torch names in the file, including tied names, with their declared shapes."""
    first_names = {key: key for key in stored.specs} | dict(stored.aliases)
    tensors = {
        key[0]: _Named(*stored.specs[first], first, stored.kinds.get(first, "unknown"))
        for key, first in first_names.items()
    }
    return KnownState(tensors, stored.layers)


def _into_torch(
    stored: Reader,
    module: torch.nn.Module,
    mapping: StateMapping | None,
    policy: Mapping[str, Policy],
    prefix: str,
    cast: bool,
) -> Callable[[], torch.nn.Module]:
    stored.mapped = True  # the values are copied into the module
    if stored.layout == "torch":
        if policy:
            _require_fitting(stored, module.state_dict(keep_vars=True), policy)
        tensors = stored.tensors()
    else:
        table = mapping or _stored_mapping(stored, stored.layout)
        module = without_wrapper(module, table.by_key if table else ())
        if table:
            keys = [
                key for key, value in module.state_dict().items() if not is_uninitialized(value)
            ]
            _require_fitting(stored, keys, policy, table)
            table = allowing(stored.spell(table), keys, stored.specs, policy)
        try:
            table = table or match(module, side_of(stored), policy=policy)
        except ConversionError as error:  # it takes the file for the target
            raise ConversionError(error.mismatch.turned) from error
        tensors = relaid(stored.path, stored.tensors(), table)
    left = tensors.mapping.left_policies() if tensors.mapping else {}
    first_names = {key: key for key in tensors.specs} | dict(tensors.aliases)
    names = {key: without_prefix(str(key[0]), prefix) for key in first_names}
    hooked = named_by_hooks(
        module, {names[key]: tensors.specs[first] for key, first in first_names.items()}
    )
    names = {key: hooked.get(name, name) for key, name in names.items()}
    specs = {names[key]: tensors.specs[first] for key, first in first_names.items()}
    kinds = {names[key]: tensors.kinds.get(first, "unknown") for key, first in first_names.items()}
    dropped = require_fit(module, specs, kinds, policy, left, cast)
    if stored.layout == "torch":
        read = _state(stored.read(), stored.aliases)
        state = {names[(key,)]: tensor for key, tensor in read.items()}
    else:
        state = _whole_state(stored, tensors)
    state = {key: tensor for key, tensor in state.items() if key not in dropped}
    if cast:
        module_state, module_kinds = module.state_dict(), torch_kinds(module)
        for key in list(state):
            kept = state[key]
            state[key] = _cast(stored.path, key, kept, module_state[key].dtype)
            if "buffer" in (kinds.get(key), module_kinds.get(key)):
                _require_unchanged(stored.path, key, kept, state[key], module_state[key])
    return fill_torch(module, state)


def _torch_into_flax(
    stored: Reader,
    target: Any,
    mapping: StateMapping | None,
    policy: Mapping[str, Policy],
    prefix: str,
    layouts: Mapping[str, str],
    cast: bool,
) -> Callable[[], Any]:
    side, names = flax_side(target), named(stored)
    table = mapping or (None if prefix or layouts else _stored_mapping(stored, side.kind))
    if table:
        _require_fitting(stored, map(slashed, side.leaves), policy, table)
    table = (
        allowing(table, names, side.leaves, policy)
        if table
        else match(names, side, policy=policy, prefix=prefix, layouts=layouts)
    )
    # This checks names and shapes; no values are read from a file that does not fit.
    relaid(stored.path, stored.tensors(), table)
    state = _state(stored.read(), stored.aliases)
    if cast:
        for key in [key for key in table.by_key if key in state]:
            path = table.by_key[key][0].path
            dtype = np.dtype(side.leaves[path].dtype).name
            if is_cast(path, side.kinds[path]) and dtype in FLOATING:
                state[key] = _cast(stored.path, key, state[key], getattr(torch, dtype))
    arrays, mismatch = flax_from_torch(state, side.leaves, table, copy=True)
    if mismatch:
        raise ConversionError(mismatch)
    return lambda: install(target, arrays)


def _flax_into_flax(
    stored: Reader, target: Any, policy: Mapping[str, Policy], cast: bool
) -> Callable[[], Any]:
    side = flax_side(target)
    _require_fitting(stored, map(slashed, side.leaves), policy)
    leaves = flax_leaves(stored, side, policy, cast)
    return lambda: install(target, leaves)


def _cast(path: Path, key: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a floating tensor in another floating dtype.

    Raises:
        CheckpointError: a finite number would become infinite.
    """
    if not tensor.is_floating_point() or not dtype.is_floating_point:
        return tensor
    array = tensor_to_numpy(tensor)
    return numpy_to_tensor(
        cast_array(path, key, array, numpy_dtype(str(dtype).removeprefix("torch.")))
    )


def _stored_mapping(stored: Reader, kind: str) -> StateMapping | None:
    """Return the mapping in the file, if it is for this kind of Flax model."""
    return stored.mapping if stored.mapping and stored.mapping.flax == kind else None


def side_of(stored: Reader) -> FlaxSide:
    """Return a file in Flax's layout as the Flax side of `compare.match`."""
    return specs_side("linen" if stored.layout == "linen" else "nnx", stored.specs, stored.kinds)


def _state(
    arrays: Iterable[tuple[KeyPath, np.ndarray]], aliases: Mapping[KeyPath, KeyPath]
) -> StateDict:
    """Return the arrays as a state dict in which tied names share one tensor."""
    state = {str(key[0]): numpy_to_tensor(_owned(array)) for key, array in arrays}
    return state | {str(key[0]): state[str(first[0])] for key, first in aliases.items()}


def _whole_state(stored: Reader, tensors: Tensors) -> StateDict:
    """Read all tensors. All of them are held, and the copies of one."""
    stored.require_room(stored.specs, copied=True)
    total = sum(spec.nbytes for spec in tensors.specs.values())
    stored.require_copies(tensors, held=total)
    return _state(((key, whole(tensors, key)) for key in tensors.specs), tensors.aliases)


def _owned(array: np.ndarray) -> np.ndarray:
    return (
        array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")
    )


def _require_unchanged(
    path: Path, key: str, before: torch.Tensor, after: torch.Tensor, own: torch.Tensor
) -> None:
    """Raise CheckpointError if a cast changed a value of a buffer.

    A mask blocks where it is not 0, and a small number may become 0 in a narrower dtype.
    """
    if after is before:
        return
    was, becomes = before.double(), after.double()
    differs = (was != becomes) & ~(was.isnan() & becomes.isnan())
    if bool(differs.any()):
        raise CheckpointError(
            path,
            f"{shown(key)} is a buffer, and {int(differs.sum())} of its values would change",
            key=key,
            expected=f"values that {after.dtype} has",
            found=f"{was[differs][0]:.3g}",
            mend=f"keep its dtype: `{assignment(key, own, f'to({before.dtype})')}` first",
        )
