"""Safetensors or torch files with an index, in the layout of Hugging Face.

Source: https://huggingface.co/docs/huggingface_hub/package_reference/serialization.
"""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...conversion.mapping import KeyPath, slashed
from ...files.errors import FileError
from ...files.memory import Budget
from ...files.printable import shown
from ...files.reading import InputFile, Snapshot, parse_json, read_file
from ...files.writing import NO_RULES, Rules, atomic_file, atomic_folder
from ..errors import CheckpointError
from ..manifest import KEY, Manifest, manifest_of
from ..reader import Reader
from ..tensors import Tensors, with_copies
from . import safetensors, torch_shards
from .safetensors import Header, SafetensorsReader, read_header

INDEX = ".safetensors.index.json"
# Of a variant too: model.safetensors.index.fp16.json.
_ANY_INDEX = re.compile(r".+\.(safetensors|bin)\.index(\.[\w-]+)?\.json")
_SHARD = re.compile(r".+-\d+-of-\d+\..+")
# So many shards stay open; of more, each is opened when it is read.
_MAX_OPEN = 128
_OWN_NAME = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")


def index_in(path: Path) -> Path | None:
    """Return the path if it is an index, or the only index in the folder, or None."""
    if _ANY_INDEX.fullmatch(path.name) and not path.is_dir():
        return path
    indexes = _indexes(path)
    return indexes[0] if len(indexes) == 1 else None


def _indexes(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _ANY_INDEX.fullmatch(path.name))


def require_one_index(folder: Path) -> None:
    """Raise CheckpointError for a folder with several indexes, or with shards and none."""
    indexes = _indexes(folder)
    if len(indexes) > 1:
        listed = ", ".join(shown(index.name) for index in indexes)
        raise CheckpointError(
            folder,
            f"holds {len(indexes)} checkpoints in shards: {listed}",
            expected="one index of shards",
            found=listed,
            mend=f"give one, as {shown(indexes[0])}",
            is_usage=True,
        )
    names = [path.name for path in sorted(folder.iterdir()) if _SHARD.fullmatch(path.name)]
    if not indexes and names:
        raise CheckpointError(
            folder,
            f"holds shards, as {shown(names[0])}, but no index, which says what is in each",
            expected="an index, as model.safetensors.index.json",
            found="none",
            mend="take the index from where the shards are from",
        )


def open_(path: Path, budget: Budget) -> Reader:
    """Open the index and the shards. Only their headers are read now.

    Raises:
        CheckpointError: a shard is missing, damaged or outside the folder, or a tensor is not in
            the shard that the index names.
        FileError: the index or the headers do not fit the budget.
    """
    index = index_in(path)
    if index is None:
        raise CheckpointError(
            path,
            "does not contain one index of shards",
            expected="one index of shards",
            found="none, or several",
            mend="take the index and all shards from one place",
        )
    index_state = Snapshot.of([index]).states
    weight_map, manifest = _index(path, index, budget)
    names = list(dict.fromkeys(weight_map.values()))
    if ".bin.index" in index.name:
        return torch_shards.open_(
            path,
            [_shard(path, index.parent, name) for name in names],
            weight_map,
            budget,
            index_state,
        )
    merged = Header({}, {}, {})
    with ExitStack() as opened:
        files = {}
        for name in names:
            shard = _shard(path, index.parent, name)
            file = InputFile(shard, keep_open=len(names) <= _MAX_OPEN)
            opened.callback(file.close)
            files[shard] = file.state
            _merge(path, merged, read_header(file, budget), name, weight_map)
        for key in weight_map:
            if key not in merged.specs:
                raise torch_shards.elsewhere(path, key, weight_map[key], "other tensors")
        if manifest is not None:
            merged.metadata[KEY] = manifest
        header = merged._replace(specs={key: merged.specs[key] for key in weight_map})
        reader = ShardsReader(path, header, budget, Snapshot({**index_state, **files}))
        opened.pop_all()
    return reader


def _merge(
    path: Path, merged: Header, header: Header, name: str, weight_map: Mapping[str, str]
) -> None:
    """Add the header of one shard.

    Raises:
        CheckpointError: the index names another shard for one of its tensors.
    """
    for key, spec in header.specs.items():
        if weight_map.get(key) != name:
            raise torch_shards.elsewhere(path, key, weight_map.get(key, "no file"), name)
        merged.specs[key], merged.locations[key] = spec, header.locations[key]
    merged.metadata.update(
        {key: value for key, value in header.metadata.items() if key not in (KEY, "format")}
    )


def files_in(path: Path) -> list[Path]:
    """Return the index at the path and the files that it names; nothing if it is no index."""
    index = index_in(path)
    if index is None:
        return []
    try:
        weight_map, _ = _index(path, index, Budget())
    except (FileError, OSError):
        return [index]
    return [index, *(index.parent / name for name in dict.fromkeys(weight_map.values()))]


class ShardsReader(SafetensorsReader):
    """Several open safetensors files with their index."""

    format = "sharded"


def write(path: Path, tensors: Tensors, rules: Rules = NO_RULES, *, shard_bytes: int) -> None:
    """Write shards of at most `shard_bytes`, and their index. A larger tensor gets its own shard.

    Raises:
        CheckpointError: the folder exists and contains other files.
    """
    tensors = with_copies(tensors)
    shards = _split(tensors, shard_bytes)
    sums: dict[KeyPath, str] = {}
    weight_map: dict[str, str] = {}
    rules = rules._replace(require_own=partial(_require_own, path))
    with atomic_folder(path, rules) as folder:
        for number, keys in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            safetensors.write(folder / name, _shard_of(tensors, keys))
            with safetensors.open_(folder / name, Budget()) as written:
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


def _require_own(path: Path, folder: Path) -> None:
    """Raise CheckpointError if the folder holds more than an index and shards of this program.

    What an index names is not proof enough: it may name whatever lies beside it.
    """
    index = index_in(folder)
    own_names: set[str] = set()
    if index is not None:
        weight_map, manifest = _index(path, index, Budget())
        names = [name for name in weight_map.values() if _OWN_NAME.fullmatch(name)]
        own_names = {index.name, *names} if manifest is not None else set()
    for entry in folder.iterdir():
        if entry.name not in own_names or entry.is_symlink() or not entry.is_file():
            raise CheckpointError(
                path,
                f"holds {shown(entry.name)}; it was not changed",
                expected="an index and shards of this program",
                found=shown(entry.name),
                mend="choose another name",
                is_usage=True,
            )


def _shard_of(tensors: Tensors, keys: list[KeyPath]) -> Tensors:
    """Return the tensors of one shard."""
    specs = {key: tensors.specs[key] for key in keys}
    aliases = {
        key: first
        for key, first in tensors.aliases.items()
        if first in specs and (key in specs or key not in tensors.specs)
    }
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


def _index(path: Path, index: Path, budget: Budget) -> tuple[dict[str, str], str | None]:
    """Return the file of each tensor, and the text of the manifest, from the index."""
    if not index.is_file() or (index.is_symlink() and path.is_dir()):
        raise _broken(path, f"{shown(index.name)} is not a regular file")
    try:
        content = parse_json(read_file(index, budget), path, budget, "its index")
        weight_map, metadata = content["weight_map"], content.get("metadata") or {}
        manifest = metadata.get(KEY)
        if not all(isinstance(name, str) for name in (*weight_map, *weight_map.values())):
            raise ValueError("a file name that is not a string")
        if manifest is not None:
            Manifest.loads(manifest, path, budget)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
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
            path,
            f"the shard {shown(name)} is missing",
            key=shown(name),
            expected="every file that the index names",
            found="no such file",
            mend="take the index and all shards",
        )
    return shard


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError.broken(path, "a whole index of shards", reason)
