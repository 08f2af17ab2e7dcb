"""The Orbax format: a folder like `StandardCheckpointer`'s, with a manifest in its metadata."""

import asyncio
import json
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from copy import copy
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ...conversion.mapping import KeyPath, dotted, slashed, words
from ...files.memory import Budget
from ...files.printable import shown
from ...files.reading import Snapshot, parse_json, read_file
from ...files.writing import NO_RULES, Rules, atomic_folder
from ..blocks import BATCH_BYTES, in_batches
from ..errors import CheckpointError
from ..manifest import KEY, Manifest, checksum, in_manifests_order, linen_or_nnx, manifest_of
from ..reader import Fetched, Reader
from ..tensors import Spec, Tensors, checked, whole
from .msgpack import tree_of
from .parts import Part, Select, flax_part, require_none

_METADATA = "_CHECKPOINT_METADATA"
# The files and folders that Orbax itself writes into the folder of a checkpoint.
_OWN_FILES = re.compile(
    r"_METADATA|_CHECKPOINT_METADATA|_sharding|commit_success\.txt|array_metadatas/process_\d+"
    r"|(ocdbt\.process_\d+/)?(manifest\.ocdbt|d/[0-9a-f]{32})"
)
_OWN_FOLDERS = re.compile(r"array_metadatas|ocdbt\.process_\d+|(ocdbt\.process_\d+/)?d")
_MAX_FILES = 1_000_000
_BYTES_PER_JSON_BYTE = 50
# The types known to Orbax that a tree of arrays may contain.
_READABLE = (int, float, np.number, np.ndarray, jax.Array, str)
# TensorStore keeps several copies of a chunk in memory while it packs it.
_CHUNK_BYTES = 8 << 20
_SLICE_BYTES = 16 << 20


class Pending:
    """A leaf whose values are read only when it is written."""

    def __init__(self, key: KeyPath, tensors: Tensors) -> None:
        self.key, self.tensors, self.spec = key, tensors, tensors.specs[key]
        self.shape, self.dtype, self.nbytes = self.spec.shape, self.spec.numpy, self.spec.nbytes
        self.size, self.ndim = int(np.prod(self.shape)), len(self.shape)
        self.checksum = ""

    def take_checksum(self, array: np.ndarray) -> None:
        """Compute and keep the checksum of the values."""
        self.checksum = checksum([array], self.spec)


def open_(path: Path, budget: Budget, select: Select = ()) -> Reader:
    """Open the folder. Arrays are read into host memory on demand, whatever device they were on.

    Raises:
        CheckpointError: the folder is not a finished Orbax checkpoint, contains a link, names a
            place outside itself, does not contain a tree of arrays, or has no such part.
        FileError: its metadata does not fit the budget.
    """
    if not is_orbax(path):
        raise CheckpointError(
            path,
            "is not a finished Orbax checkpoint (it has no _METADATA)",
            expected="a finished Orbax checkpoint",
            found="no _METADATA",
            mend=_checkpoint_inside(path) or "take another copy",
        )
    snapshot = Snapshot.of([path, *_plain_files(path)])
    _require_names_inside(path, budget)
    manifest = _manifest(path, budget)
    with _reported(path), _reader() as checkpointer:
        metadata = _in_a_thread(checkpointer.metadata, path.absolute()).item_metadata
        if metadata is None:  # Orbax only logs the reason
            raise _broken(path, "an array in it cannot be opened")
        part = _part(path, metadata.tree, manifest, select)
        specs = {
            key: checked(tuple(leaf.shape), np.dtype(leaf.dtype).name)
            for key, (_, leaf) in part.leaves.items()
        }
        for key, (_, leaf) in part.leaves.items():
            _require_small_chunks(path, key, specs[key], leaf)
    names = {words(key): place for key, (place, _) in part.leaves.items()}
    aliases: dict[KeyPath, KeyPath] = {}
    if manifest is not None:
        specs, aliases = in_manifests_order(path, specs, manifest), dict(manifest.aliases)
    layout = manifest.layout if manifest else linen_or_nnx(specs)
    return OrbaxReader(
        metadata.tree,
        names,
        path,
        layout,
        specs,
        manifest,
        aliases,
        budget=budget,
        snapshot=snapshot,
        left_out=part.left_out,
    )


def _part(path: Path, tree: Any, manifest: Manifest | None, select: Select) -> Part:
    """Return the selected leaves of the tree, of which lists may be nodes."""

    def is_array(leaf: Any) -> bool:
        return hasattr(leaf, "shape") and hasattr(leaf, "dtype")

    if manifest is None:
        return flax_part(path, _as_dicts(tree), select, is_array, lambda leaf: type(leaf).__name__)
    require_none(path, select, "the folder holds only state, as `save_checkpoint` writes it")
    return Part({key: (key, leaf) for key, leaf in flatten_dict(tree).items()}, ())


def _as_dicts(tree: Any) -> Any:
    """Return nested dicts and lists as nested dicts; the positions of a list are names."""
    if isinstance(tree, dict):
        return {name: _as_dicts(child) for name, child in tree.items()}
    if isinstance(tree, list | tuple):
        return {str(index): _as_dicts(child) for index, child in enumerate(tree)}
    return tree


class OrbaxReader(Reader):
    """An open Orbax folder.

    Args:
        tree: its tree.
        names: the path in the tree of each path, as strings.
    """

    format = "orbax"

    def __init__(
        self, tree: Any, names: dict[tuple[str, ...], KeyPath], *header: Any, **more: Any
    ) -> None:
        super().__init__(*header, **more)
        self._names = names
        # Orbax restores a part of a list only in the place of the whole tree.
        self._tree = None if _is_of_dicts(tree) else tree

    def _fetch(self, paths: list[KeyPath]) -> Fetched:
        arrays = _restore(self.path, self._tree, [self._names[words(path)] for path in paths])
        pairs = list(zip(paths, arrays, strict=True))
        checked_pairs = in_batches(pairs, _nbytes, lambda pair: self.check(*pair))
        yield from ((pair[0], array) for pair, array in checked_pairs)


def write(path: Path, tensors: Tensors, rules: Rules = NO_RULES) -> None:
    """Write the tree, and replace an old Orbax folder. Each array is read when it is written.

    Raises:
        CheckpointError: Orbax cannot store an array, or the folder is not an Orbax checkpoint.
    """
    import orbax.checkpoint as ocp

    if empty := [shown(slashed(key)) for key, spec in tensors.specs.items() if not spec.nbytes]:
        raise CheckpointError(
            path,
            f"Orbax cannot store arrays without elements: {', '.join(empty)}",
            key=empty[0],
            expected="arrays with elements",
            found="arrays without elements",
            mend="leave them out, or save as .msgpack",
        )
    if len({dotted(key) for key in tensors.specs}) != len(tensors.specs):
        raise CheckpointError(
            path,
            "Orbax joins names with dots, and two names would be the same",
            expected="names that differ when joined",
            found="two names that are then the same",
            mend="rename one, or save as .msgpack",
        )
    leaves = {key: Pending(key, tensors) for key in tensors.specs}
    rules = rules._replace(require_own=partial(_require_own, path))
    with atomic_folder(path, rules) as folder:
        handlers = (jax.Array, ocp.type_handlers.ArrayHandler()), (Pending, _pending_handler())
        with _checkpointer(*handlers) as checkpointer:
            tree = tree_of(path, leaves)
            chunk_bytes = None if tensors.in_memory else _CHUNK_BYTES
            save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), tree)
            args = ocp.args.PyTreeSave(tree, save_args=save_args)
            _in_a_thread(checkpointer.save, folder.absolute(), args=args, force=True)
        manifest = manifest_of(tensors).with_checksums(
            {key: leaf.checksum for key, leaf in leaves.items()}
        )
        content = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
        content["custom_metadata"] = {KEY: manifest.dumps()}
        (folder / _METADATA).write_text(json.dumps(content), encoding="utf-8")


def _require_own(path: Path, folder: Path) -> None:
    """Raise CheckpointError if the folder holds more than what Orbax writes."""
    if not is_orbax(folder):
        raise CheckpointError(
            path,
            "is a folder that Orbax did not write; it was not changed",
            expected="an Orbax checkpoint, or nothing",
            found="another folder",
            mend="choose another name",
            is_usage=True,
        )
    for entry in folder.rglob("*"):
        name = entry.relative_to(folder).as_posix()
        is_plain = not entry.is_symlink() and (entry.is_file() or entry.is_dir())
        if not is_plain or not (_OWN_FOLDERS if entry.is_dir() else _OWN_FILES).fullmatch(name):
            raise CheckpointError(
                path,
                f"holds {shown(name)} beside an Orbax checkpoint; it was not changed",
                expected="an Orbax checkpoint alone",
                found=shown(name),
                mend="choose another name",
                is_usage=True,
            )


def is_orbax(path: Path) -> bool:
    """Return whether the folder is a finished Orbax checkpoint."""
    return (path / "_METADATA").is_file()


def _checkpoint_inside(path: Path) -> str:
    """Return advice to name the checkpoint inside the folder, or an empty string.

    The folder may contain a safetensors file, or be one of Orbax's `CheckpointManager`.
    """
    inner = [file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/_METADATA")]
    files = sorted(path.glob("*.safetensors"))
    if len(files) > 1:
        return f"give one of its files, as {shown(files[0])}"
    last = max([*files, *inner], key=lambda entry: (len(str(entry)), entry), default=None)
    return f"give {shown(last)}" if last else ""


def _plain_files(path: Path) -> list[Path]:
    """Return the files in the folder.

    Raises:
        CheckpointError: the folder contains a link, which could lead out of it, or something that
            is neither a file nor a folder.
    """
    files = []
    for entry in path.rglob("*"):
        if entry.is_symlink():
            raise CheckpointError(
                path,
                f"holds a link, {shown(entry.relative_to(path))}",
                key=shown(entry.name),
                expected="files and folders",
                found="a link",
                mend="copy the folder with what its links point to (cp -rL)",
            )
        if entry.is_file():
            files.append(entry)
        elif not entry.is_dir():
            raise CheckpointError(
                path,
                f"holds {shown(entry.name)}, which is neither a file nor a folder",
                key=shown(entry.name),
                expected="files and folders",
                found="a pipe or a device",
                mend="do not use this checkpoint: take another copy",
            )
        if len(files) > _MAX_FILES:
            raise CheckpointError(
                path,
                f"holds more than {_MAX_FILES:,} files",
                expected=f"at most {_MAX_FILES:,}",
                found="more",
                mend="name the folder of one checkpoint",
            )
    return files


def _require_names_inside(path: Path, budget: Budget) -> None:
    """Raise CheckpointError if the metadata names an array in a place outside the folder.

    Without OCDBT, Orbax joins the names of an array with dots and reads the folder of that name.
    """
    for file in (*path.glob("*.json"), *path.glob("_*"), *path.glob("array_metadatas/*")):
        if file.is_file():  # Orbax reads these files whole, as JSON
            budget.require(file.stat().st_size * _BYTES_PER_JSON_BYTE, file, shown(file.name))
    try:
        content = parse_json(read_file(path / "_METADATA", budget), path, budget, "its _METADATA")
        if content.get("use_ocdbt") is True:
            return
        names = [
            ".".join(str(step["key"]) for step in entry["key_metadata"])
            for entry in content["tree_metadata"].values()
        ]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise _broken(path, f"_METADATA: {shown(error)}") from error
    for name in names:
        if name.startswith("/") or "\0" in name or {"..", "."} & {*name.split("/")}:
            raise CheckpointError(
                path,
                f"names an array outside its folder, {shown(name)}",
                key=name,
                expected="names within the folder",
                found=shown(name),
                mend="do not use this checkpoint: take another copy",
            )


def _require_small_chunks(path: Path, key: KeyPath, spec: Spec, leaf: Any) -> None:
    """Raise CheckpointError if a chunk is far larger than its array: it is read as a whole."""
    chunk = getattr(leaf.storage, "chunk_shape", None) or ()
    nbytes = prod(chunk) * spec.numpy.itemsize
    if nbytes > max(16 * spec.nbytes, _SLICE_BYTES):
        name = slashed(key)
        raise CheckpointError(
            path,
            f"{shown(name)} lies in chunks larger than itself",
            key=name,
            expected=f"at most {spec.nbytes:,} bytes",
            found=f"{nbytes:,} bytes",
            mend="the file is hostile: take another copy",
        )


def _manifest(path: Path, budget: Budget) -> Manifest | None:
    try:
        raw = read_file(path / _METADATA, budget)
        content = parse_json(raw, path, budget, _METADATA).get("custom_metadata") or {}
        return Manifest.loads(content[KEY], path, budget) if KEY in content else None
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, TypeError) as error:
        raise _broken(path, f"{_METADATA}: {shown(error)}") from error


def _restore(path: Path, tree: Any, keys: Sequence[KeyPath]) -> list[np.ndarray]:
    """Return the arrays. The tree is needed if it has nodes other than dicts."""
    import orbax.checkpoint as ocp

    is_partial = tree is None
    wanted = unflatten_dict({key: 0 for key in keys}) if is_partial else _wanted(tree, {*keys}, ())
    to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    with _reported(path), _reader() as checkpointer:
        args = ocp.args.PyTreeRestore(
            item=wanted, restore_args=to_numpy, partial_restore=is_partial
        )
        restored = _in_a_thread(checkpointer.restore, path.absolute(), args=args)
    arrays = flatten_dict(_as_dicts(restored))
    return [np.asarray(arrays[key]) for key in keys]


def _is_of_dicts(tree: Any) -> bool:
    """Return whether all nodes are dicts."""
    if isinstance(tree, dict):
        return all(map(_is_of_dicts, tree.values()))
    return tree is not None and not isinstance(tree, list | tuple)


def _wanted(tree: Any, keys: set[KeyPath], path: KeyPath) -> Any:
    """Return the tree with 0 at the keys, and what tells Orbax to read nothing at other leaves."""
    if isinstance(tree, dict):
        return {name: _wanted(child, keys, (*path, name)) for name, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [_wanted(child, keys, (*path, str(index))) for index, child in enumerate(tree)]
    if tree is None:
        return None
    return 0 if path in keys else ...  # Orbax's PLACEHOLDER


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn every error of Orbax and TensorStore into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # they share no error class
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise _broken(path, shown(reason)) from error


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError.broken(path, "a whole Orbax checkpoint", reason)


def _in_a_thread(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the call in a thread and return its result.

    After Ctrl-C it still waits until Orbax has finished, before the caller releases the folder. An
    executor would not wait for a thread whose start was interrupted.
    """
    outcome: Future[Any] = Future()

    def work() -> None:
        if outcome.set_running_or_notify_cancel():
            try:
                outcome.set_result(call(*args, **kwargs))
            except BaseException as error:
                outcome.set_exception(error)

    try:
        threading.Thread(target=work).start()
        return outcome.result()
    finally:
        if not outcome.cancel():
            wait([outcome])


@contextmanager
def _reader() -> Iterator[Any]:
    """Yield a checkpointer that waits for all of its reads, even if one of them fails."""
    from orbax.checkpoint import type_handlers

    handlers = (
        (value_type, _waiting(type_handlers.get_type_handler(value_type)))
        for value_type in _READABLE
    )
    with _checkpointer(*handlers) as checkpointer:
        yield checkpointer


@contextmanager
def _checkpointer(*handlers: tuple[Any, Any]) -> Iterator[Any]:
    import orbax.checkpoint as ocp

    registry = ocp.type_handlers.create_type_handler_registry(*handlers)
    # Compression hardly makes weights smaller, and takes longer than writing them.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        yield checkpointer


def _waiting(handler: Any) -> Any:
    """Return a handler that reads like the given one, but raises only after all reads have ended.

    It also refuses every array of which a part is missing, whatever the metadata says: otherwise
    TensorStore would invent its values.

    Orbax closes its event loop as soon as one read fails. TensorStore would then report "Event loop
    is closed" for each of the other reads.
    """
    waiting, metadata, deserialize = copy(handler), handler.metadata, handler.deserialize

    async def metadata_of_each(infos: Sequence[Any]) -> list[Any]:
        results = await _all([metadata([info]) for info in infos])
        return [result for (result,) in results]

    async def deserialize_each(
        infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        infos = [copy(info) for info in infos]
        for info in infos:
            info.raise_array_data_missing_error = True
        single_args = [None] * len(infos) if args is None else [[arg] for arg in args]
        results = await _all(
            [deserialize([info], arg) for info, arg in zip(infos, single_args, strict=True)]
        )
        return [result for (result,) in results]

    waiting.metadata, waiting.deserialize = metadata_of_each, deserialize_each
    return waiting


async def _all(jobs: Sequence[Awaitable[Any]]) -> list[Any]:
    """Return the result of each job, or raise the first error after all have ended."""
    results = await asyncio.gather(*jobs, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _batches(
    leaves: Sequence[tuple[Pending, Any, Any]],
) -> Iterator[list[tuple[Pending, Any, Any]]]:
    """Yield the leaves in batches of bounded size, or in one batch if they are in memory."""
    batch: list[tuple[Pending, Any, Any]] = []
    size = 0
    for leaf in leaves:
        pending = leaf[0]
        if batch and not pending.tensors.in_memory and size + pending.nbytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(leaf)
        size += pending.nbytes
    if batch:
        yield batch


def _nbytes(pair: tuple[KeyPath, np.ndarray]) -> int:
    return pair[1].nbytes


def _pending_handler() -> Any:
    import orbax.checkpoint as ocp
    import tensorstore as ts

    class PendingHandler(ocp.type_handlers.NumpyHandler):
        """Writes leaves as NumPy arrays, in batches, so that few arrays are in memory at once."""

        def __init__(self) -> None:
            super().__init__()
            self._deepcopy_host_arrays = False  # no argument before Orbax 0.12.5
            self._failed: list[Exception] = []

        async def serialize(
            self, values: Sequence[Any], infos: Sequence[Any], args: Any = None
        ) -> Sequence[Any]:
            args = args or [ocp.SaveArgs()] * len(values)
            for batch in _batches(list(zip(values, infos, args, strict=True))):
                await self._write(*zip(*batch, strict=True))
            return []

        async def _write(
            self, leaves: Sequence[Pending], infos: Sequence[Any], args: Sequence[Any]
        ) -> None:
            """Read and write the leaves and compute their checksums; then release the arrays."""
            arrays = await _all(
                [asyncio.to_thread(whole, leaf.tensors, leaf.key) for leaf in leaves]
            )
            written = await super().serialize(arrays, infos, args)
            sums = [
                asyncio.to_thread(leaf.take_checksum, array)
                for leaf, array in zip(leaves, arrays, strict=True)
            ]
            await _all([*(asyncio.to_thread(future.result) for future in written), *sums])
            if self._failed:
                raise self._failed[0]

        async def _open_and_write(
            self, value: np.ndarray, tspec: dict[str, Any], ts_context: Any
        ) -> None:
            """Write an array. An error is raised when all arrays of the batch have ended.

            Orbax closes its event loop as soon as one write fails. The other writes would go on,
            and make the temporary folder anew after it has been removed.
            """
            try:
                array = await ts.open(tspec, create=True, open=True, context=ts_context)
                await self._write_slices(array, value)
            except Exception as error:
                self._failed.append(error)

        async def _write_slices(self, array: Any, value: np.ndarray) -> None:
            """Write slice by slice: TensorStore keeps all packed chunks of a write in memory."""
            if not value.ndim:
                await array.write(value)
                return
            chunk = int((array.chunk_layout.write_chunk.shape or [1])[0] or 1)
            rows = max(1, _SLICE_BYTES * len(value) // value.nbytes // chunk) * chunk
            for begin in range(0, len(value), rows):
                end = min(begin + rows, len(value))  # TensorStore does not clip
                await array[begin:end].write(value[begin:end])

    return PendingHandler()
