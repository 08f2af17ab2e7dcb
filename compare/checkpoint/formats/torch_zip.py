"""The torch zip format: a state dict of CPU tensors, read without running any pickled code.

Small files are read into memory. Large files are mapped by torch, so they must not be cut while
they are open.
"""

import io
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...conversion.errors import shown
from ...conversion.mapping import KeyPath
from ...conversion.state_kinds import same_memory
from ...conversion.tensors import Untransferable, dense, numpy_to_tensor, tensor_to_numpy
from ...files import atomic_file, read_ahead
from ..blocks import WORKERS, contiguous
from ..errors import CheckpointError
from ..manifest import KEY, Manifest, checksum, in_manifests_order, manifest_of
from ..reader import ArrayAndChecksum, Fetched, Reader, read_in_parts
from ..tensors import Spec, Tensors, checked, whole

_SMALL_BYTES = 64 << 20
# The most times that a view may show each stored byte.
_MAX_EXPANSION = 16


def open_(path: Path) -> Reader:
    """Open the file. The values of a large file are read on demand.

    Raises:
        CheckpointError: the file is not a torch file, or does not contain a dict of tensors.
    """
    with path.open("rb") as stream:
        first_bytes = stream.read(4)
    is_zip = first_bytes == b"PK\x03\x04"
    if not is_zip and not re.match(rb"\x80[\x02-\x05]", first_bytes):
        raise _broken(path, f"it begins with {first_bytes!r}")
    manifest = _manifest(path) if is_zip else None
    is_small = path.stat().st_size <= _SMALL_BYTES or not is_zip
    state = _load(path, io.BytesIO(path.read_bytes()) if is_small else path, mapped=not is_small)
    specs, aliases = _specs(path, state)
    if manifest is not None:
        specs, aliases = _as_declared(
            path, state, specs | {key: specs[first] for key, first in aliases.items()}, manifest
        )
    return TorchZipReader(state, is_small, path, "torch", specs, manifest, aliases)


class TorchZipReader(Reader):
    """An open torch file. The values of a large file are mapped and read on demand."""

    format = "torch"

    def __init__(self, state: dict[str, Tensor], is_small: bool, *header: Any) -> None:
        super().__init__(*header)
        self._state, self._is_small = state, is_small

    def read_tensor(self, path: KeyPath) -> ArrayAndChecksum:
        """Return the values in new memory, or the mapped values if `mapped` allows it."""
        array = tensor_to_numpy(self._state[path[0]])
        if self._is_small or self.mapped or not array.flags.c_contiguous:
            return contiguous(array), None
        flat = array.reshape(-1).view(np.uint8)

        def fill(offset: int, part: np.ndarray) -> None:
            part[:] = flat[offset : offset + part.nbytes]

        return read_in_parts(self.specs[path], fill, self.algorithm)

    def _fetch(self, paths: list[KeyPath]) -> Fetched:
        if self.mapped and not self._is_small:
            read_ahead(self.path)
        return super()._fetch(paths)

    def close(self) -> None:
        """Release the tensors, and so the mapped file."""
        self._state = {}


def write(path: Path, tensors: Tensors) -> None:
    """Write the state dict, then add the manifest as one more record of the zip."""
    arrays = {key: whole(tensors, key) for key in tensors.specs}
    state = {
        str(key[0]): numpy_to_tensor(np.require(array, requirements="W"))
        for key, array in arrays.items()
    }
    state |= {str(key[0]): state[str(first[0])] for key, first in tensors.aliases.items()}
    with atomic_file(path) as stream, ThreadPoolExecutor(WORKERS) as pool:
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


def _manifest(path: Path) -> Manifest | None:
    """Check the directory of the zip, and return the manifest if there is one.

    Raises:
        CheckpointError: the file is not a zip, a record is compressed or larger than the file, or
            the manifest is invalid.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = [record.filename for record in records]
            if len(set(names)) != len(names):
                repeated = Counter(names).most_common(1)[0][0]
                raise ValueError(f"the record {shown(repeated)} occurs twice")
            if compressed := [
                record.filename for record in records if record.compress_type != zipfile.ZIP_STORED
            ]:
                raise ValueError(f"{shown(compressed[0])} is compressed; torch never compresses")
            if sum(record.file_size for record in records) > size:
                raise ValueError(f"its records declare more than the file's {size:,} bytes")
            manifests = [
                record for record in records if record.filename.partition("/")[2] == f"{KEY}.json"
            ]
            return Manifest.loads(archive.read(manifests[0])) if manifests else None
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        IndexError,
    ) as error:
        raise _broken(path, shown(error)) from error


def _load(path: Path, source: Any, *, mapped: bool) -> dict[str, Tensor]:
    try:
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RecursionError) as error:
        raise CheckpointError(
            path,
            "contains more than a state dict of tensors; its code was not run",
            expected="a state dict",
            mend="load it where you trust its origin, and save only `module.state_dict()`",
        ) from error
    except Exception as error:  # torch's readers raise a dozen unrelated types on bad bytes
        raise _broken(path, shown(str(error).partition("\n")[0] or type(error).__name__)) from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(
            path, f"holds a {type(state).__name__}; expected a state dict: names and tensors"
        )
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                path,
                f"{shown(key)} is a {type(value).__name__}; expected a tensor",
                key=key,
                mend="save only the state dict: `torch.save(module.state_dict(), path)`",
            )
    return dict(state)


def _specs(
    path: Path, state: Mapping[str, Tensor]
) -> tuple[dict[KeyPath, Spec], dict[KeyPath, KeyPath]]:
    """Return the spec of each tensor, and the tied names."""
    specs: dict[KeyPath, Spec] = {}
    aliases: dict[KeyPath, KeyPath] = {}
    seen: dict[Any, KeyPath] = {}
    for key, tensor in state.items():
        try:
            dense(tensor)
            spec = checked(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        except (Untransferable, ValueError) as error:
            raise CheckpointError(path, f"{shown(key)}: {error}", key=key) from error
        stored_bytes = tensor.untyped_storage().nbytes()
        if spec.nbytes > _MAX_EXPANSION * max(stored_bytes, 4096):
            raise CheckpointError(
                path,
                f"{shown(key)} is an expanded view: {stored_bytes:,} stored bytes "
                f"appear as {spec.nbytes:,} bytes",
                key=key,
                mend="save `tensor.contiguous()`, or take another copy",
            )
        memory = same_memory(tensor)
        first = (key,) if memory is None else seen.setdefault(memory, (key,))
        if first == (key,):
            specs[(key,)] = spec
        else:
            aliases[(key,)] = first
    return specs, aliases


def _as_declared(
    path: Path, state: Mapping[str, Tensor], specs: Mapping[KeyPath, Spec], manifest: Manifest
) -> tuple[dict[KeyPath, Spec], dict[KeyPath, KeyPath]]:
    """Return the specs and tied names as the manifest declares them.

    Raises:
        CheckpointError: the file has other specs or tied names.
    """
    for key, first in manifest.aliases.items():
        if (
            key not in specs
            or specs[key] != specs.get(first)
            or same_memory(state[str(key[0])]) != same_memory(state[str(first[0])])
        ):
            raise CheckpointError(
                path,
                f"{shown(key[0])} is not tied to {shown(first[0])}, as its manifest declares",
                key=str(key[0]),
                mend="the file was changed: take another copy",
            )
    stored = {key: spec for key, spec in specs.items() if key not in manifest.aliases}
    return in_manifests_order(path, stored, manifest), dict(manifest.aliases)


def _broken(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(path, f"not a whole torch file ({reason})", mend="take another copy")
