"""Save the state of a torch or Flax model."""

import errno
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..conversion.convert import StateDict, linen_to_torch, nnx_to_torch
from ..conversion.errors import ConversionError
from ..conversion.layer_facts import facts_of
from ..conversion.mapping import LINEN, NNX, StateMapping, require_mapping, slashed
from ..conversion.state_kinds import FlaxSide, entries, flax_side, same_memory, torch_kinds
from ..conversion.tensors import Untransferable, dense, tensor_to_numpy, to_host
from ..conversion.trees import is_nested
from ..conversion.wrappers import without_wrapper
from ..files.errors import FileError
from ..files.memory import Budget
from ..files.printable import kind_of, shown
from ..files.reading import as_path
from ..files.writing import Rules
from ..frameworks import Tensor, jax, nnx, torch
from .errors import CheckpointError
from .formats import Format, exists, format_of
from .manifest import COLLECTIONS
from .tensors import Tensors, spec_of, tensors_of
from .transforms import relaid

Source = torch.nn.Module | nnx.Module | Mapping[str, Any]
_LAYER_LEAVES = ("kernel", "embedding", "scale", "bias")
_MEND = "for modules other than the attention classes, pass mapping=compare.match(module, template)"


def save_checkpoint(
    path: str | PathLike[str], source: Source, *, mapping: StateMapping | None = None
) -> Path:
    """Save parameters and buffers atomically, in the format that the suffix selects.

    The file has a checksum of each tensor. If anything fails, the previous checkpoint at `path` is
    unchanged. For the attention classes, a file does not depend on the framework or the device
    that the state came from; an Orbax folder has times and names of its own.

    Args:
        path: the file, or the folder for Orbax. Its parent must exist.
        source: a torch module or state dict, Linen variables, or an NNX model.
        mapping: how torch and Flax names pair, from `compare.match`. It is needed if the format is
            the other framework's, and is stored in the file. The attention classes need none.

    Returns:
        The path.

    Raises:
        CheckpointError: the path cannot be written, or the format cannot store the state.
    """
    require_mapping(mapping)
    path = as_path(path)
    chosen = format_of(path)
    target = writable(path, chosen)
    try:
        write(path, target, chosen, _tensors(path, source, mapping, chosen))
    except (TypeError, RecursionError) as error:  # leaves that are not arrays, endless dicts
        mend = "give a torch or NNX module, a state dict or Linen variables"
        reason = shown(error).removeprefix("template ")
        expected = "names and arrays"
        raise CheckpointError(path, reason, expected=expected, found=reason, mend=mend) from error
    except ConversionError as error:
        reason = "the state cannot be stored in this format"
        raise CheckpointError.unfit(path, reason, error.mismatch, _MEND) from error
    return path


def writable(path: Path, chosen: Format) -> Path:
    """Return the path to write to. A link is kept, and the file that it points to is replaced.

    Raises:
        CheckpointError: the folder does not exist, or the path is not of the format's file type.
    """
    exists(path)
    target = path.resolve()
    require_folder(path, target.parent)
    if target.exists() and not (target.is_dir() if chosen.is_folder else target.is_file()):
        wanted = "a folder" if chosen.is_folder else "a regular file"
        raise CheckpointError(
            path,
            f"is not {wanted}, which this format writes",
            expected=wanted,
            found="something else",
            mend="choose another name",
            is_usage=True,
        )
    return target


def require_folder(path: Path, folder: Path) -> None:
    """Raise CheckpointError unless the folder exists in which `path` is to be written."""
    if not folder.is_dir():
        raise CheckpointError(
            path,
            f"the folder {shown(folder)} does not exist",
            expected="a folder to write to",
            found="no folder",
            mend="make it first",
            is_usage=True,
        )


def write(
    path: Path,
    target: Path,
    chosen: Format,
    tensors: Tensors,
    before: Callable[[], None] | None = None,
) -> None:
    """Write the tensors to `target`; errors name it as the user did, by `path`.

    What was written is opened before it takes the place of an old checkpoint, so that nothing is
    replaced by what cannot be read.

    Args:
        path: the path in errors.
        target: the path to write to.
        chosen: the format.
        tensors: what to write.
        before: called before the new checkpoint takes its place; it may raise.

    Raises:
        CheckpointError: the tensors could not be written.
    """
    handled = sys.exception()

    def check(new: Path) -> None:
        _require_readable(path, chosen, tensors, new)
        if before is not None:
            before()

    def is_saved(other: Path) -> bool:
        """Return whether another save put this there: then the last one wins."""
        try:
            with chosen.open(other, Budget()) as stored:
                return stored.checked
        except (FileError, OSError):
            return False

    try:
        chosen.write(target, tensors, Rules(check, may_replace=is_saved))
    except FileError as error:
        if isinstance(error, CheckpointError) and error.path != str(target):
            raise
        raise CheckpointError.of(error, path) from error
    except Exception as error:  # on a full disk, each library raises its own types
        reason = _root_cause(error, handled)
        if not isinstance(reason, Exception):
            raise reason from None
        size = sum(spec.nbytes for spec in tensors.specs.values())
        raise CheckpointError(
            path,
            f"could not be written ({shown(reason)}); what was there before is unchanged",
            expected="a file that can be written",
            found=shown(reason),
            mend=_mend(reason, size),
        ) from error


def _root_cause(error: BaseException, handled: BaseException | None) -> BaseException:
    """Return the system error or interrupt that caused the error, or else the error itself.

    An exception that was being `handled` before the write is not a cause.
    """
    chain = [error]
    cause = error.__cause__ or error.__context__
    while cause is not None and cause not in (handled, *chain):
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return next(
        (
            cause
            for cause in chain
            if isinstance(cause, OSError) or not isinstance(cause, Exception)
        ),
        error,
    )


def _mend(reason: Exception, size: int) -> str:
    if isinstance(reason, UnicodeError):
        return "rename the entry: its name is not valid text"
    if isinstance(reason, OSError) and reason.errno == errno.ENAMETOOLONG:
        return "choose a shorter name: the temporary name is 18 characters longer"
    return f"make room for {size:,} bytes and a little more, or choose another folder"


def _require_readable(path: Path, chosen: Format, tensors: Tensors, new: Path) -> None:
    """Raise CheckpointError unless the new file can be opened, and holds these tensors."""
    try:
        with chosen.open(new, Budget()) as stored:
            if dict(stored.specs) != dict(tensors.specs):
                raise CheckpointError(
                    path,
                    "it would hold other names or shapes",
                    expected=f"{len(tensors.specs):,} tensors",
                    found=f"{len(stored.specs):,}, not all as they were given",
                    mend="use simpler names, or another format",
                )
    except FileError as error:
        raise CheckpointError(
            path,
            f"could not be read again, and was not written: {error.reason}",
            key=error.key,
            expected=error.expected,
            found=error.found,
            mend="use simpler names, fewer tensors, or another format",
        ) from error


def _tensors(path: Path, source: Source, mapping: StateMapping | None, chosen: Format) -> Tensors:
    """Return the source's state in a layout that the format can hold."""
    if isinstance(source, nnx.State):
        raise CheckpointError(
            path,
            "an nnx.State does not say which module it belongs to",
            expected="an NNX model",
            found="an nnx.State",
            mend="give the NNX model",
        )
    if isinstance(source, nnx.Module) or (isinstance(source, Mapping) and is_nested(source)):
        tensors = _from_flax(path, source, mapping, chosen)
    else:
        tensors = _from_torch(path, source, mapping)
    if tensors.layout in chosen.layouts:
        return tensors
    if tensors.mapping is None and not {(key,) for key in LINEN.by_key} & tensors.specs.keys():
        raise _unpaired(path)
    try:
        return relaid(path, tensors, tensors.mapping or LINEN)
    except CheckpointError as error:
        if mapping:
            raise
        if not error.mismatch:
            raise
        reason = "the state does not fit the names of the attention classes"
        raise CheckpointError.unfit(path, reason, error.mismatch, _MEND) from error


def _unpaired(path: Path) -> CheckpointError:
    return CheckpointError(
        path,
        "stores the other framework's layout, and nothing says how the names pair",
        expected="a mapping, or the names of the attention classes",
        found="neither",
        is_usage=True,
        mend="pass mapping=compare.match(module, template)",
    )


def _from_torch(path: Path, source: Any, mapping: StateMapping | None) -> Tensors:
    if isinstance(source, torch.nn.Module) and mapping is not None:
        source = without_wrapper(source, mapping.by_key)
    tensors = source.state_dict() if isinstance(source, torch.nn.Module) else source
    if not isinstance(tensors, Mapping) or not tensors:
        raise CheckpointError(
            path,
            f"there is no state in {kind_of(source)}",
            expected="state",
            found=kind_of(source),
            mend="give a torch or NNX module, a state dict or Linen variables"
            + (', as {"params": state.params}' if hasattr(source, "params") else ""),
        )
    if not isinstance(source, torch.nn.Module):
        return _torch_tensors(path, tensors, {}, mapping)
    of_state = _torch_tensors(path, tensors, torch_kinds(source), mapping)
    is_attention = of_state.mapping is LINEN  # whose file is the same from every framework
    return of_state if is_attention else replace(of_state, layers=facts_of(source))


def _torch_tensors(
    path: Path, tensors: Mapping[Any, Any], kinds: Mapping[str, str], mapping: StateMapping | None
) -> Tensors:
    is_attention = mapping is None and tensors.keys() <= LINEN.by_key.keys()
    if is_attention:
        kinds = {key: rows[0].kind for key, rows in LINEN.by_key.items()} | dict(kinds)
    arrays, aliases = {}, {}
    seen: dict[Any, str] = {}
    for key, value in tensors.items():
        array = _host_tensor(path, key, value)
        memory = same_memory(value)
        first = key if memory is None else seen.setdefault(memory, key)
        if first != key:
            aliases[(key,)] = (first,)
        else:
            arrays[(key,)] = array
    table = LINEN if is_attention else mapping
    return tensors_of(
        "torch", arrays, {(key,): kind for key, kind in kinds.items()}, aliases, table
    )


def _host_tensor(path: Path, key: Any, value: Any) -> np.ndarray:
    if not isinstance(key, str):
        raise CheckpointError(
            path,
            f"the key {shown(repr(key))} is {kind_of(key)}; a state dict has names",
            key=shown(repr(key)),
            expected="a name",
            found=type(key).__name__,
            mend=f"write {shown(str(key))!r}",
        )
    if not isinstance(value, Tensor):
        raise CheckpointError(
            path,
            f"{shown(key)} is {kind_of(value)}; expected a tensor",
            key=key,
            expected="a tensor",
            found=kind_of(value),
            mend="give a state dict of tensors only",
        )
    try:
        array = tensor_to_numpy(dense(value))
        spec_of(array)
    except ValueError as error:  # includes Untransferable
        raise _unstorable(path, key, error) from error
    return array


def _from_flax(path: Path, source: Any, mapping: StateMapping | None, chosen: Format) -> Tensors:
    side = flax_side(source)
    table = NNX if side.kind == "nnx" else LINEN
    required = {row.path for row in table.rows if row.required}
    is_attention = mapping is None and required <= side.leaves.keys() <= table.by_path.keys()
    to_torch = is_attention or mapping is not None or "linen" not in chosen.layouts
    if to_torch and (is_attention or "torch" in chosen.layouts):
        if mapping is None and not side.leaves.keys() & table.by_path.keys():
            raise _unpaired(path)
        convert: Any = nnx_to_torch if side.kind == "nnx" else linen_to_torch
        state: StateDict = convert(source, mapping=mapping)
        return _torch_tensors(path, state, {}, mapping)
    if (
        side.kind == "linen"
        and side.leaves
        and not {*COLLECTIONS} & {key[0] for key in side.leaves}
    ):
        _require_no_layers(path, side)
    arrays = {key: _host_leaf(path, key, leaf) for key, leaf in side.leaves.items()}
    tied = {entry.path: entry.first for entry in entries(source) if entry.first is not None}
    aliases = {key: first for key, first in tied.items() if first in arrays}
    return tensors_of(side.kind, arrays, side.kinds, aliases, mapping)


def _require_no_layers(path: Path, side: FlaxSide) -> None:
    """Raise CheckpointError if variables without a known collection look like params alone."""
    name = next((slashed(key) for key in side.leaves if key[-1] in _LAYER_LEAVES), None)
    if name is not None:
        raise CheckpointError(
            path,
            f"{shown(name)} is in no collection: these are params alone",
            key=name,
            expected='all variables, {"params": ...}',
            found=f"the collection {shown(name.partition('/')[0])}",
            mend='save {"params": params}',
        )


def _host_leaf(path: Path, key: tuple[Any, ...], leaf: Any) -> np.ndarray:
    name = slashed(key)
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise CheckpointError(
            path,
            f"{shown(name)}: is {kind_of(leaf)}, not an array of values",
            key=name,
            expected="an array of values",
            found=kind_of(leaf),
            mend="give variables with values, as model.init returns them",
        )
    try:
        array = to_host(leaf)
        spec_of(array)
    except (Untransferable, ValueError) as error:
        raise _unstorable(path, name, error) from error
    return array


def _unstorable(path: Path, key: str, error: ValueError) -> CheckpointError:
    return CheckpointError(
        path,
        f"{shown(key)}: {error}",
        key=key,
        expected="a dense tensor of a dtype that checkpoints support",
        found=str(error),
        mend="convert it, or leave it out of the state",
    )
