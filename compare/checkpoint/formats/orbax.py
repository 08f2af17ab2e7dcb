"""The Orbax format: a folder of Flax variables, as `StandardCheckpointer` writes it; the manifest is its metadata."""

import asyncio
import json
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ...conversion.errors import shown
from ...conversion.mapping import KeyPath, dotted, slashed
from ...files import atomic_folder
from ..blocks import BATCH_BYTES, in_batches
from ..errors import CheckpointError
from ..manifest import KEY, Manifest, checksum, in_manifests_order, linen_or_nnx, manifest_of
from ..reader import Fetched, Reader
from ..tensors import Tensors, checked, whole
from .msgpack import tree_of

_METADATA = "_CHECKPOINT_METADATA"
# What Orbax itself puts into the folder of a checkpoint.
_OWN = re.compile(
    r"_METADATA|_CHECKPOINT_METADATA|_sharding|array_metadatas|d|manifest\.ocdbt|ocdbt\.process_\d+|commit_success\.txt"
)
_MOST_FILES = 1_000_000
# Of the types that Orbax knows, those that a tree of arrays may hold.
_READABLE = (int, float, np.number, np.ndarray, jax.Array, str)
# TensorStore holds a chunk several times while it packs it.
_CHUNK_BYTES = 8 << 20
_SLICE_BYTES = 16 << 20


class Pending:
    """A leaf that is read only when its turn comes to be written."""

    def __init__(self, key: KeyPath, tensors: Tensors) -> None:
        self.key, self.tensors, self.spec = key, tensors, tensors.specs[key]
        self.shape, self.dtype, self.nbytes = self.spec.shape, self.spec.numpy, self.spec.nbytes
        self.size, self.ndim = int(np.prod(self.shape)), len(self.shape)
        self.checksum = ""

    def take_checksum(self, array: np.ndarray) -> None:
        """Remember the checksum of the values."""
        self.checksum = checksum([array], self.spec)


def open_(path: Path) -> Reader:
    """Open the folder; arrays are read into host memory as they are asked for, whatever device they were on.

    Raises:
        CheckpointError: no finished Orbax folder, a link in it, or no tree of arrays.
    """
    if not is_orbax(path):
        raise CheckpointError(
            path,
            "is not a finished Orbax checkpoint (it has no _METADATA)",
            mend=_within(path) or "take another copy",
        )
    _require_plain(path)
    manifest = _manifest(path)
    with _reported(path), _reader() as checkpointer:
        metadata = _in_a_thread(checkpointer.metadata, path.absolute()).item_metadata
        if metadata is None:  # Orbax logs why, and goes on
            raise CheckpointError(
                path,
                "not a whole Orbax checkpoint (an array in it cannot be opened)",
                mend="take another copy",
            )
        saved = flatten_dict(metadata.tree)
        specs = {
            key: checked(tuple(leaf.shape), np.dtype(leaf.dtype).name)
            for key, leaf in saved.items()
        }
    if (
        manifest is None and specs and all(key[-1] == "value" for key in specs)
    ):  # an nnx.State, as Orbax has it
        names = {tuple(map(str, key[:-1])): key for key in specs}
        specs = {key[:-1]: spec for key, spec in specs.items()}
    else:
        names = {tuple(map(str, key)): key for key in specs}
    aliases: dict[KeyPath, KeyPath] = {}
    if manifest is not None:
        specs, aliases = in_manifests_order(path, specs, manifest), dict(manifest.aliases)
    layout = manifest.layout if manifest else linen_or_nnx(specs)
    return OrbaxReader(names, path, layout, specs, manifest, aliases)


class OrbaxReader(Reader):
    """An Orbax folder. `names` has the path that Orbax uses, by the words of each path."""

    format = "orbax"

    def __init__(self, names: dict[tuple[str, ...], KeyPath], *header: Any) -> None:
        super().__init__(*header)
        self._names = names

    def _fetch(self, paths: list[KeyPath]) -> Fetched:
        arrays = _restore(self.path, [self._names[tuple(map(str, path))] for path in paths])
        pairs = list(zip(paths, arrays, strict=True))
        checked_pairs = in_batches(pairs, _nbytes, lambda pair: self.check(*pair))
        yield from ((pair[0], array) for pair, array in checked_pairs)


def write(path: Path, tensors: Tensors) -> None:
    """Write the tree in place of an old Orbax folder if there is one, each array read as its turn comes.

    Raises:
        CheckpointError: an array that Orbax cannot store; a folder of another kind.
    """
    import orbax.checkpoint as ocp

    if empty := [shown(slashed(key)) for key, spec in tensors.specs.items() if not spec.nbytes]:
        raise CheckpointError(
            path, f"Orbax cannot store arrays without elements: {', '.join(empty)}"
        )
    if path.exists() and not is_orbax(path):
        raise CheckpointError(
            path, "is a folder that Orbax did not write; it was left alone: choose another name"
        )
    if path.exists() and (
        strange := sorted(entry.name for entry in path.iterdir() if not _OWN.fullmatch(entry.name))
    ):
        raise CheckpointError(
            path,
            f"holds {', '.join(strange)} beside an Orbax checkpoint; it was left alone: choose another name",
        )
    if len({dotted(key) for key in tensors.specs}) != len(tensors.specs):
        raise CheckpointError(
            path,
            "Orbax joins names by dots, and two of these would be one",
            mend="rename one, or save as .msgpack",
        )
    leaves = {key: Pending(key, tensors) for key in tensors.specs}
    with atomic_folder(path) as folder:
        handlers = (jax.Array, ocp.type_handlers.ArrayHandler()), (Pending, _pending_handler())
        with _checkpointer(*handlers) as checkpointer:
            tree = tree_of(path, leaves)
            chunk_bytes = None if tensors.in_memory else _CHUNK_BYTES
            save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), tree)
            args = ocp.args.PyTreeSave(tree, save_args=save_args)
            _in_a_thread(
                checkpointer.save,
                folder.absolute(),
                args=args,
                force=True,
                custom_metadata={KEY: ""},
            )
        manifest = manifest_of(tensors).with_checksums(
            {key: leaf.checksum for key, leaf in leaves.items()}
        )
        content = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
        content["custom_metadata"] = {KEY: manifest.dumps()}
        (folder / _METADATA).write_text(json.dumps(content), encoding="utf-8")


def is_orbax(path: Path) -> bool:
    """Tell whether it is the folder of a finished checkpoint."""
    return (path / "_METADATA").is_file()


def _within(path: Path) -> str:
    """Say which checkpoint the folder holds, if it is one of a file or of Orbax's manager."""
    inner = [found.parent for depth in ("*", "*/*") for found in path.glob(f"{depth}/_METADATA")]
    found = max(
        [*path.glob("*.safetensors"), *inner],
        key=lambda entry: (len(str(entry)), entry),
        default=None,
    )
    return f"give {shown(found)}" if found else ""


def _require_plain(path: Path) -> None:
    """Raise CheckpointError if anything in the folder is a link, which could lead out of it."""
    for count, entry in enumerate(path.rglob("*")):
        if entry.is_symlink():
            raise CheckpointError(
                path,
                f"holds a link, {shown(entry.relative_to(path))}",
                key=shown(entry.name),
                mend="copy the folder with what its links point to (cp -rL)",
            )
        if not entry.is_file() and not entry.is_dir():
            raise CheckpointError(
                path, f"holds {shown(entry.name)}, which is neither file nor folder"
            )
        if count > _MOST_FILES:
            raise CheckpointError(path, f"holds more than {_MOST_FILES:,} files")


def _manifest(path: Path) -> Manifest | None:
    try:
        content = json.loads((path / _METADATA).read_bytes()).get("custom_metadata") or {}
        return Manifest.loads(content[KEY]) if KEY in content else None
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(
            path, f"not a whole Orbax checkpoint ({_METADATA}: {shown(error)})"
        ) from error


def _restore(path: Path, keys: Sequence[KeyPath]) -> list[np.ndarray]:
    import orbax.checkpoint as ocp

    wanted = unflatten_dict({key: 0 for key in keys})
    to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    with _reported(path), _reader() as checkpointer:
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=to_numpy, partial_restore=True)
        found = flatten_dict(_in_a_thread(checkpointer.restore, path.absolute(), args=args))
    return [np.asarray(found[key]) for key in keys]


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn whatever Orbax and TensorStore raise into one error."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # they share no error class
        why = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            path, f"not a whole Orbax checkpoint ({shown(why)})", mend="take another copy"
        ) from error


def _in_a_thread(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what the call returns; after Ctrl-C Orbax still ends what it has begun, before the folder is let go.

    An executor would not wait for a thread whose start was interrupted.
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
    """Yield a checkpointer that waits for every read it has started, also when one of them fails."""
    from orbax.checkpoint import type_handlers

    handlers = ((kind, _waiting(type_handlers.get_type_handler(kind))) for kind in _READABLE)
    with _checkpointer(*handlers) as checkpointer:
        yield checkpointer


@contextmanager
def _checkpointer(*handlers: tuple[Any, Any]) -> Iterator[Any]:
    import orbax.checkpoint as ocp

    registry = ocp.type_handlers.create_type_handler_registry(*handlers)
    # Weights hardly become smaller by packing, and packing takes longer than writing.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        yield checkpointer


def _waiting(handler: Any) -> Any:
    """Return a handler that reads as the given one does, and raises only when all of its reads have ended.

    Orbax closes its event loop as soon as one read fails; TensorStore would then report "Event loop
    is closed" for each of the others.
    """
    waiting, metadata, deserialize = copy(handler), handler.metadata, handler.deserialize

    async def each_metadata(infos: Sequence[Any]) -> list[Any]:
        return [one for (one,) in await _all([metadata([info]) for info in infos])]

    async def deserialize_each(
        infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        single = [None] * len(infos) if args is None else [[arg] for arg in args]
        return [
            one
            for (one,) in await _all(
                [deserialize([info], arg) for info, arg in zip(infos, single, strict=True)]
            )
        ]

    waiting.metadata, waiting.deserialize = each_metadata, deserialize_each
    return waiting


async def _all(jobs: Sequence[Awaitable[Any]]) -> list[Any]:
    """Return the result of each job, or raise the first error once all have ended."""
    results = await asyncio.gather(*jobs, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def _batches(
    leaves: Sequence[tuple[Pending, Any, Any]],
) -> Iterator[list[tuple[Pending, Any, Any]]]:
    """Yield the leaves in as many turns as memory asks for: at once, if all of them are in memory."""
    batch: list[tuple[Pending, Any, Any]] = []
    for leaf in leaves:
        held = leaf[0].tensors.in_memory
        if (
            batch
            and not held
            and sum(other[0].nbytes for other in batch) + leaf[0].nbytes > BATCH_BYTES
        ):
            yield batch
            batch = []
        batch.append(leaf)
    if batch:
        yield batch


def _nbytes(pair: tuple[KeyPath, np.ndarray]) -> int:
    return pair[1].nbytes


def _pending_handler() -> Any:
    import orbax.checkpoint as ocp
    import tensorstore as ts

    class PendingHandler(ocp.type_handlers.NumpyHandler):
        """Writes leaves as NumPy arrays: few at a time, if they are read from a file, so that few are in memory."""

        def __init__(self) -> None:
            super().__init__(deepcopy_host_arrays=False)

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
            """Read, write and take the checksums; the arrays are gone before the next ones are read."""
            arrays = await _all(
                [asyncio.to_thread(whole, leaf.tensors, leaf.key) for leaf in leaves]
            )
            written = await super().serialize(arrays, infos, args)
            sums = [
                asyncio.to_thread(leaf.take_checksum, array)
                for leaf, array in zip(leaves, arrays, strict=True)
            ]
            await _all([*(asyncio.to_thread(future.result) for future in written), *sums])

        async def _open_and_write(
            self, value: np.ndarray, tspec: dict[str, Any], ts_context: Any
        ) -> None:
            """Write slice by slice: of a whole array TensorStore would hold every packed chunk at once."""
            array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            if not value.ndim:
                await array.write(value)
                return
            chunk = int((array.chunk_layout.write_chunk.shape or [1])[0] or 1)
            rows = max(1, _SLICE_BYTES * len(value) // value.nbytes // chunk) * chunk
            for begin in range(0, len(value), rows):
                end = min(begin + rows, len(value))  # TensorStore does not clip
                await array[begin:end].write(value[begin:end])

    return PendingHandler()
