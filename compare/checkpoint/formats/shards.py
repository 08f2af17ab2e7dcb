"""Safetensors in several files with an index, in the layout of Hugging Face.

Source: https://huggingface.co/docs/huggingface_hub/package_reference/serialization.
"""

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ...conversion.errors import shown
from ...conversion.mapping import KeyPath, slashed
from ...files import atomic_file, atomic_folder
from ..errors import CheckpointError
from ..manifest import KEY, Manifest, manifest_of, no_name_twice
from ..reader import Reader
from ..tensors import Spec, Tensors
from . import safetensors
from .safetensors import Header, SafetensorsReader, read_header

INDEX = ".safetensors.index.json"
_MAX_INDEX_BYTES = 256 << 20


def index_in(path: Path) -> Path | None:
    """Return the path if it is an index, or the only index in the folder, or None."""
    if path.name.endswith(INDEX):
        return path
    indexes = sorted(path.glob(f"*{INDEX}")) if path.is_dir() else []
    return indexes[0] if len(indexes) == 1 else None


def open_(path: Path) -> Reader:
    """Open the index and the shards. Only their headers are read now.

    Raises:
        CheckpointError: a shard is missing, damaged or outside the folder, or a tensor is not in
            the shard that the index names.
    """
    index = index_in(path)
    if index is None:
        raise CheckpointError(path, f"does not contain an index of shards (one file *{INDEX})")
    weight_map, manifest = _index(path, index)
    specs: dict[str, Spec] = {}
    locations: dict[str, tuple[int, int]] = {}
    metadata: dict[str, str] = {}
    with ExitStack() as opened:
        for name in dict.fromkeys(weight_map.values()):
            shard = _shard(path, index.parent, name)
            descriptor = os.open(shard, os.O_RDONLY)
            opened.callback(os.close, descriptor)
            header = read_header(shard, descriptor)
            for key, spec in header.specs.items():
                if weight_map.get(key) != name:
                    expected = shown(weight_map.get(key, "no file"))
                    raise CheckpointError(
                        path,
                        f"{shown(key)} is in {shown(name)}",
                        key=key,
                        found=f"{shown(name)}",
                        expected=f"{expected}, as the index says",
                        mend="take the index and all shards from one place",
                    )
                specs[key], locations[key] = spec, (descriptor, header.begins[key])
            metadata |= {
                key: value for key, value in header.metadata.items() if key not in (KEY, "format")
            }
        if absent := [key for key in weight_map if key not in specs]:
            raise CheckpointError(
                path,
                f"{shown(absent[0])} is not in {shown(weight_map[absent[0]])}, "
                "although the index says so",
                key=absent[0],
                mend="take the index and all shards from one place",
            )
        if manifest is not None:
            metadata[KEY] = manifest
        header = Header({key: specs[key] for key in weight_map}, {}, metadata)
        reader = ShardsReader(path, header, locations)
        reader.on_close = opened.pop_all().close
    return reader


class ShardsReader(SafetensorsReader):
    """Several open safetensors files with their index."""

    format = "sharded"


def write(path: Path, tensors: Tensors, shard_bytes: int) -> None:
    """Write shards of at most `shard_bytes`, and their index. A larger tensor gets its own shard.

    Raises:
        CheckpointError: the folder exists and contains other files.
    """
    index = index_in(path) if path.exists() else None
    own_names = {index.name, *_index(path, index)[0].values()} if index else set()
    if path.exists() and (
        others := [entry.name for entry in path.iterdir() if entry.name not in own_names]
    ):
        raise CheckpointError(
            path, f"holds {shown(others[0])}; it was not changed", mend="choose another name"
        )
    shards = _split(tensors, shard_bytes)
    sums: dict[KeyPath, str] = {}
    weight_map: dict[str, str] = {}
    with atomic_folder(path) as folder:
        for number, keys in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            safetensors.write(folder / name, _shard_of(tensors, keys))
            with safetensors.open_(folder / name) as written:
                assert written.manifest is not None
                sums |= {key: record.checksum for key, record in written.manifest.records.items()}
            weight_map |= {slashed(key): name for key in keys}
        total = sum(spec.nbytes for spec in tensors.specs.values())
        manifest = manifest_of(tensors).with_checksums(sums)
        content = {
            "metadata": {"total_size": total, KEY: manifest.dumps()},
            "weight_map": weight_map,
        }
        with atomic_file(folder / f"model{INDEX}") as stream:
            stream.write(json.dumps(content, indent=1).encode())


def _shard_of(tensors: Tensors, keys: list[KeyPath]) -> Tensors:
    """Return the tensors of one shard."""
    specs = {key: tensors.specs[key] for key in keys}
    aliases = {key: first for key, first in tensors.aliases.items() if first in specs}
    return replace(tensors, specs=specs, aliases=aliases, mapping=None)


def _split(tensors: Tensors, shard_bytes: int) -> list[list[KeyPath]]:
    shards: list[list[KeyPath]] = [[]]
    size = 0
    for key, spec in tensors.specs.items():
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += spec.nbytes
    return shards


def _index(path: Path, index: Path) -> tuple[dict[str, str], str | None]:
    """Return the file of each tensor, and the text of the manifest, from the index."""
    if not index.is_file() or (index.is_symlink() and path.is_dir()):
        raise _broken(path, f"{shown(index.name)} is not a regular file")
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise _broken(path, f"more than {_MAX_INDEX_BYTES:,} bytes")
    try:
        content = json.loads(index.read_bytes(), object_pairs_hook=no_name_twice)
        weight_map, metadata = content["weight_map"], content.get("metadata") or {}
        manifest = metadata.get(KEY)
        if not all(isinstance(name, str) for name in (*weight_map, *weight_map.values())):
            raise ValueError("a file name that is not a string")
        if manifest is not None:
            Manifest.loads(manifest)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise _broken(path, shown(error) if str(error) else type(error).__name__) from error
    return dict(weight_map), manifest


def _shard(path: Path, folder: Path, name: str) -> Path:
    """Return the path of the shard.

    Raises:
        CheckpointError: it is not a regular file in the folder of the index.
    """
    shard = folder / name
    if Path(name).name != name or "\\" in name or shard.is_symlink():
        raise CheckpointError(
            path,
            f"its index names {shown(name)}",
            found=shown(name),
            expected="a file beside the index",
            mend="copy the shards, not links to them, beside the index",
        )
    if not shard.is_file():
        raise CheckpointError(
            path, f"the shard {shown(name)} is missing", mend="take the index and all shards"
        )
    return shard


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        path, f"not a whole index of shards ({reason})", mend="take another copy"
    )
