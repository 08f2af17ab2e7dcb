"""The torch format: a state dict of CPU tensors, read without running any pickled code.

The records of a file are read from one directory that allows only one reading; see `zip_directory`.
The files of torch before 1.6, which are no zips, are read too.
"""

import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...conversion.mapping import KeyPath
from ...conversion.tensors import numpy_to_tensor
from ...dtypes import DTYPES
from ...files.memory import Budget
from ...files.page_cache import read_ahead
from ...files.printable import kind_of, shown
from ...files.reading import InputFile, Snapshot
from ...files.writing import NO_RULES, Rules, atomic_file
from ...frameworks import torch
from ..blocks import WORKERS, contiguous
from ..errors import CheckpointError
from ..manifest import KEY, Manifest, checksum, in_manifests_order, manifest_of
from ..reader import ArrayAndChecksum, Fetched, FileReader, Location, Reader
from ..tensors import Spec, Tensors, checked, whole
from .parts import Select, advice, inner, not_selected, require_none
from .torch_pickle import Opaque, Other, UnsafePickleError, View, build
from .zip_directory import CompressedError, Record, read_directory

# All tensors together may show so many times the bytes of all storages, and a little more.
_MAX_EXPANSION, _FREE_BYTES = 16, 1 << 20
# How a file of torch before 1.6 begins: the pickles of a magic number and of a version.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\x80\x02M\xe9\x03."
_STATE_DICT_ONLY = "save only the state dict: `torch.save(module.state_dict(), path)`"
_TENSORS_ONLY = (
    "save only the tensors of the state dict: "
    "{key: value for key, value in state.items() if isinstance(value, torch.Tensor)}"
)
_MESSAGES = {
    "meta": (
        "a meta tensor has no values",
        "materialize the module first (`to_empty`, then load), and save it again",
    ),
    "sparse": (
        "a sparse or quantized tensor",
        "convert it with `to_dense()` or `dequantize()`, and save it again",
    ),
    "nested": ("a nested tensor", "save its parts one by one"),
}


class TorchScriptError(ValueError):
    """The file is a TorchScript archive."""


class Content(NamedTuple):
    """What a torch file holds: the object, where the bytes of each storage are, and the manifest.

    `ranges` has the first byte and the number of bytes of each storage, by its key; `foreign` has
    the functions and classes that are no part of tensors.
    """

    state: Any
    ranges: Mapping[str, tuple[int, int]]
    manifest: Manifest | None
    foreign: tuple[str, ...]


def open_(path: Path, budget: Budget, select: Select = ()) -> Reader:
    """Open the file. Values are read on demand.

    Raises:
        CheckpointError: the file is not a torch file, does not contain a dict of tensors, or has no
            such part.
        FileError: what it contains does not fit the budget.
    """
    with InputFile(path).kept() as file:
        content = _content(file, budget)
        if content.manifest is not None:
            require_none(path, select, "the file holds only state, as `save_checkpoint` writes it")
        state, left_out = _selected(path, content, select)
        views = _views(path, state, content)
        specs, aliases = _specs(path, views)
        if content.manifest is not None:
            stored = specs | {key: specs[first] for key, first in aliases.items()}
            specs, aliases = _as_declared(path, views, stored, content.manifest)
        locations = {(key,): _location(file, view, content) for key, view in views.items()}
        return TorchReader(
            views,
            locations,
            path,
            "torch",
            specs,
            content.manifest,
            aliases,
            budget=budget,
            snapshot=Snapshot({path: file.state}),
            left_out=left_out,
        )


class TorchReader(FileReader):
    """An open torch file."""

    format = "torch"

    def __init__(self, views: Mapping[str, View], *header: Any, **more: Any) -> None:
        super().__init__(*header, **more)
        self._views = views

    def read_tensor(self, path: KeyPath) -> ArrayAndChecksum:
        """Read or map the values; those of a view with other strides are put into C order."""
        view, spec = self._views[path[0]], self.specs[path]
        if _is_plain(view):
            return super().read_tensor(path)
        span = _span(view)
        file, begin = self.location(path)
        flat = np.empty(span, spec.numpy)
        file.fill(flat.view(np.uint8).data, begin)
        strides = [stride * spec.numpy.itemsize for stride in view.strides]
        array = contiguous(np.lib.stride_tricks.as_strided(flat, view.shape, strides))
        array = np.conj(array) if view.is_conj else array
        return (np.negative(array) if view.is_neg else array), None

    def parts(self, path: KeyPath) -> Iterator[np.ndarray]:
        """Yield one tensor in consecutive flat parts, and check it at the end."""
        if _is_plain(self._views[path[0]]):
            return super().parts(path)
        return Reader.parts(self, path)

    def _is_mapped(self, path: KeyPath) -> bool:
        return _is_plain(self._views[path[0]]) and super()._is_mapped(path)

    def _extra_bytes(self, path: KeyPath) -> int:
        view = self._views[path[0]]
        return 0 if _is_plain(view) else _span(view) * self.specs[path].numpy.itemsize

    def _fetch(self, paths: list[KeyPath]) -> Fetched:
        if self.mapped:
            read_ahead(self.path)
        return super()._fetch(paths)


def write(path: Path, tensors: Tensors, rules: Rules = NO_RULES) -> None:
    """Write the state dict, then add the manifest as one more record of the zip."""
    with atomic_file(path, rules) as stream, ThreadPoolExecutor(WORKERS) as pool:
        arrays = {key: whole(tensors, key) for key in tensors.specs}
        state = {
            key[0]: numpy_to_tensor(np.require(array, requirements="W"))
            for key, array in arrays.items()
        }
        state |= {key[0]: state[first[0]] for key, first in tensors.aliases.items()}
        sums = {
            key: pool.submit(checksum, [array], tensors.specs[key]) for key, array in arrays.items()
        }
        torch.save(state, stream)  # a path would put its name into the file
        manifest = manifest_of(tensors).with_checksums(
            {key: future.result() for key, future in sums.items()}
        )
        with zipfile.ZipFile(stream, "a") as archive:
            root = archive.namelist()[0].split("/")[0]
            archive.writestr(zipfile.ZipInfo(f"{root}/{KEY}.json"), manifest.dumps())


def _content(file: InputFile, budget: Budget) -> Content:
    try:
        first_bytes = file.read(len(_LEGACY), 0)
        if first_bytes.startswith(b"PK\x03\x04"):
            return _zip_content(file, budget)
        if first_bytes == _LEGACY:
            return _legacy_content(file, budget)
        if first_bytes[:1] == b"\x80":
            raise UnsafePickleError("a pickle of another program")
    except TorchScriptError as error:
        raise CheckpointError(
            file.path,
            "is a TorchScript archive: a program with its state; it was not run",
            expected="a state dict",
            found="a TorchScript archive",
            mend="where you trust its origin, save its state: "
            "`torch.save(torch.jit.load(path).state_dict(), new_path)`",
        ) from error
    except UnsafePickleError as error:
        raise _unsafe(file.path, shown(error)) from error
    except (ValueError, EOFError) as error:
        raise _broken(file.path, shown(error)) from error
    raise _broken(file.path, f"it begins with {first_bytes[:4]!r}")


def _unsafe(path: Path, what: str, mend: str = "") -> CheckpointError:
    return CheckpointError(
        path,
        "contains more than a state dict of tensors; its code was not run",
        expected="a state dict",
        found=what,
        mend=mend or "load it where you trust its origin, and save only `module.state_dict()`",
    )


def _zip_content(file: InputFile, budget: Budget) -> Content:
    """Return the content of a zip: records named by what torch calls them."""
    try:
        directory = read_directory(file, budget)
    except CompressedError as error:
        if "/code/" in error.record:  # which torch compresses
            raise TorchScriptError(error.record) from error
        raise
    records = {name.partition("/")[2]: record for name, record in directory}
    roots = {name.partition("/")[0] for name, _ in directory}
    if len(roots) != 1:
        raise ValueError(f"its records lie in {len(roots)} folders")
    if "data.pkl" not in records:
        raise ValueError("it has no record data.pkl")
    if "constants.pkl" in records:
        raise TorchScriptError("constants.pkl")
    byteorder = _read(file, records["byteorder"], budget) if "byteorder" in records else b"little"
    if byteorder != b"little":
        raise ValueError(f"its byte order is {byteorder[:9].decode(errors='replace')}")
    manifest = None
    if f"{KEY}.json" in records:
        text = _read(file, records[f"{KEY}.json"], budget)
        manifest = Manifest.loads(text, file.path, budget)
    budget.require(5 * records["data.pkl"].nbytes, file.path, "its pickle")
    state, _, foreign = build(_read(file, records["data.pkl"], budget), file.path, budget)
    ranges = {
        name.removeprefix("data/"): (record.begin, record.nbytes)
        for name, record in records.items()
        if name.startswith("data/")
    }
    return Content(state, ranges, manifest, foreign)


def _read(file: InputFile, record: Record, budget: Budget) -> bytes:
    budget.require(record.nbytes, file.path, "one of its records")
    return file.read(record.nbytes, record.begin)


def _legacy_content(file: InputFile, budget: Budget) -> Content:
    """Return the content of a file before torch 1.6: five pickles, then each storage.

    Before its bytes each storage has the number of its elements, in eight bytes.
    """
    system, position, _ = _pickle_at(file, len(_LEGACY), budget)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its byte order is not little")
    state, position, foreign = _pickle_at(file, position, budget)
    keys, position, _ = _pickle_at(file, position, budget)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UnsafePickleError("a list of storages of another program")
    sizes = {view.storage.key: view.storage for view in _all_views(state)}
    ranges: dict[str, tuple[int, int]] = {}
    for key in keys:
        if key not in sizes:
            raise UnsafePickleError("a storage that no tensor shows")
        numel = int.from_bytes(file.read(8, position), "little")
        if numel != sizes[key].numel:
            raise ValueError(f"the storage {shown(key)} has {numel:,} elements")
        nbytes = numel * _itemsize(sizes[key].dtype)
        ranges[key] = position + 8, nbytes
        position += 8 + nbytes
    if position != file.size:
        raise ValueError(f"it has {file.size:,} bytes, and its storages end at {position:,}")
    return Content(state, ranges, None, foreign)


def _pickle_at(file: InputFile, begin: int, budget: Budget) -> tuple[Any, int, tuple[str, ...]]:
    """Return the object of the pickle at an offset, the offset after it, and what is foreign."""
    nbytes = 1 << 16
    while True:
        raw = file.read(nbytes, begin)
        try:
            value, length, foreign = build(raw, file.path, budget, may_go_on=True)
            return value, begin + length, foreign
        except EOFError:
            if begin + nbytes >= file.size:
                raise
            nbytes *= 4
            budget.require(5 * nbytes, file.path, "its pickle")


def _all_views(state: Any) -> Iterator[View]:
    """Yield the tensors in nested dicts, lists and tuples. Each of these is looked at once."""
    seen, opened = set(), [state]
    while opened:
        node = opened.pop()
        if type(node) is View:
            yield node
        elif type(node) in (dict, list, tuple) and id(node) not in seen:
            seen.add(id(node))
            opened += node.values() if type(node) is dict else node


def _selected(path: Path, content: Content, select: Select) -> tuple[Any, tuple[str, ...]]:
    """Return the part of the object that is selected, and the names of what is left out.

    Raises:
        CheckpointError: there is no such part, or nothing is selected and there is more than
            tensors and plain values.
    """
    state = content.state
    if not select:
        if content.foreign:
            raise _unsafe(path, shown(content.foreign[0]), advice(state, _is_state))
        return state, ()
    if len(select) > 1:
        require_none(path, select[1:], "a torch module has one state dict", "select one part")
    part = inner(path, state, select[0])
    return part, tuple(not_selected(state, select))


def _is_state(node: dict[Any, Any]) -> bool:
    return all(type(key) is str and type(value) is View for key, value in node.items())


def _views(path: Path, state: Any, content: Content) -> dict[str, View]:
    """Return the description of each tensor of the state.

    Raises:
        CheckpointError: the object is not a dict of tensors with plain values, or a storage is
            missing or shorter than its tensors.
    """
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(
            path,
            f"holds {_kind_of(state)}; expected a state dict: names and tensors",
            expected="a state dict: names and tensors",
            found=_kind_of(state),
            mend=advice(content.state, _is_state) or _STATE_DICT_ONLY,
        )
    for key, value in state.items():
        if isinstance(value, Other):
            raise _no_plain_tensor(path, key, value.what)
        if isinstance(value, Opaque):
            raise _unsafe(path, shown(value.what), advice(content.state, _is_state))
        if not isinstance(value, View):
            state_dict_only = advice(content.state, _is_state) or _STATE_DICT_ONLY
            raise CheckpointError(
                path,
                f"{shown(key)} is {kind_of(value)}; expected a tensor",
                key=key,
                expected="a tensor",
                found=kind_of(value),
                mend=_TENSORS_ONLY if key.endswith("_extra_state") else state_dict_only,
            )
        if value.dtype.startswith("q"):
            raise _no_plain_tensor(path, key, "sparse")
        if value.dtype in DTYPES:
            _require_stored(path, key, value, content)
    return dict(state)


def _kind_of(state: Any) -> str:
    return "a tensor" if isinstance(state, View) else kind_of(state)


def _no_plain_tensor(path: Path, key: str, what: str) -> CheckpointError:
    found, mend = _MESSAGES[what]
    return CheckpointError(
        path,
        f"{shown(key)}: {found}",
        key=key,
        expected="a dense tensor",
        found=found,
        mend=mend,
    )


def _require_stored(path: Path, key: str, view: View, content: Content) -> None:
    nbytes = view.storage.numel * _itemsize(view.storage.dtype)
    _, stored = content.ranges.get(view.storage.key, (0, -1))
    if stored != nbytes:
        found = f"{stored:,}" if stored >= 0 else "none"
        raise _broken(path, f"{shown(key)} needs a record of {nbytes:,} bytes, and has {found}")
    end = (view.offset + _span(view)) * _itemsize(view.dtype)
    if end > nbytes:
        raise _broken(path, f"{shown(key)} reaches beyond its storage of {nbytes:,} bytes")


def _location(file: InputFile, view: View, content: Content) -> Location:
    begin, _ = content.ranges[view.storage.key]
    return Location(file, begin + view.offset * _itemsize(view.dtype))


@cache
def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


def _span(view: View) -> int:
    """Return how many elements of the storage lie between the first and the last of the view."""
    if 0 in view.shape:
        return 0
    return 1 + sum(
        (size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True)
    )


def _is_plain(view: View) -> bool:
    """Return whether the values lie in the storage as they are, in C order."""
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size != 1 and stride != expected:
            return not _span(view)
        expected *= size
    return not (view.is_conj or view.is_neg)


def _specs(
    path: Path, views: Mapping[str, View]
) -> tuple[dict[KeyPath, Spec], dict[KeyPath, KeyPath]]:
    """Return the spec of each tensor, and the tied names."""
    specs: dict[KeyPath, Spec] = {}
    aliases: dict[KeyPath, KeyPath] = {}
    seen: dict[View, KeyPath] = {}
    storages = {view.storage.key: view.storage for view in views.values()}
    stored_bytes = sum(storage.numel * _itemsize(storage.dtype) for storage in storages.values())
    total = 0
    for key, view in views.items():
        try:
            spec = checked(view.shape, view.dtype)
        except ValueError as error:
            raise CheckpointError(
                path,
                f"{shown(key)}: {error}",
                key=key,
                expected="a dtype and shape that checkpoints support",
                found=str(error),
                mend="save it in another dtype",
            ) from error
        first = seen.setdefault(view, (key,)) if spec.nbytes else (key,)
        if first != (key,):
            aliases[(key,)] = first
            continue
        specs[(key,)] = spec
        total += spec.nbytes
        if total > _MAX_EXPANSION * stored_bytes + _FREE_BYTES:
            raise CheckpointError(
                path,
                f"{shown(key)} is an expanded view: with those before it, {stored_bytes:,} stored "
                f"bytes appear as {total:,} bytes",
                key=key,
                expected=f"at most {_MAX_EXPANSION} times the stored bytes",
                found=f"{total:,} bytes",
                mend="save `tensor.contiguous()`, or take another copy",
            )
    return specs, aliases


def _as_declared(
    path: Path, views: Mapping[str, View], specs: Mapping[KeyPath, Spec], manifest: Manifest
) -> tuple[dict[KeyPath, Spec], dict[KeyPath, KeyPath]]:
    """Return the specs and tied names as the manifest declares them.

    Raises:
        CheckpointError: the file has other specs or tied names.
    """
    for key, first in manifest.aliases.items():
        if (
            key not in specs
            or specs[key] != specs.get(first)
            or views[str(key[0])] != views[str(first[0])]
        ):
            raise CheckpointError(
                path,
                f"{shown(key[0])} is not tied to {shown(first[0])}, as its manifest declares",
                key=str(key[0]),
                expected="one tensor under both names",
                found="two",
                mend="the file was changed: take another copy",
            )
    stored = {key: spec for key, spec in specs.items() if key not in manifest.aliases}
    return in_manifests_order(path, stored, manifest), dict(manifest.aliases)


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError.broken(path, "a whole torch file", reason)
