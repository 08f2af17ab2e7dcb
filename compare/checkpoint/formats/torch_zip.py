"""The torch zip format: a state dict of CPU tensors, read without running any pickled code.

Small files are read into memory; large ones are mapped by torch, so they must not be cut while they
are open.
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
# A view may show each stored entry more than once, but not without end.
_MOST_VIEWED = 16


def open_(path: Path) -> Reader:
    """Open the file; values are read as they are asked for, if it is large.

    Raises:
        CheckpointError: no torch file, or anything in it but a dict of tensors.
    """
    with path.open("rb") as stream:
        begin = stream.read(4)
    zipped = begin == b"PK\x03\x04"
    if not zipped and not re.match(rb"\x80[\x02-\x05]", begin):
        raise _broken(path, f"it begins with {begin!r}")
    manifest = _manifest(path) if zipped else None
    small = path.stat().st_size <= _SMALL_BYTES or not zipped
    state = _load(path, io.BytesIO(path.read_bytes()) if small else path, mapped=not small)
    specs, aliases = _specs(path, state)
    if manifest is not None:
        specs, aliases = _as_declared(
            path, state, specs | {key: specs[first] for key, first in aliases.items()}, manifest
        )
    return TorchZipReader(state, small, path, "torch", specs, manifest, aliases)


class TorchZipReader(Reader):
    """A torch file; the values of a large one are mapped until they are asked for."""

    format = "torch"

    def __init__(self, state: dict[str, Tensor], is_small: bool, *header: Any) -> None:
        super().__init__(*header)
        self._state, self._is_small = state, is_small

    def read_tensor(self, path: KeyPath) -> ArrayAndChecksum:
        """Return the values in memory of their own, or in place if `mapped` allows it."""
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
        """Let go of the tensors, and so of the mapped file."""
        self._state = {}


def write(path: Path, tensors: Tensors) -> None:
    """Write the state dict, then the manifest as one more record of the zip."""
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
        torch.save(state, stream)  # to a stream, so that the bytes do not depend on the file's name
        manifest = manifest_of(tensors).with_checksums(
            {key: found.result() for key, found in sums.items()}
        )
        with zipfile.ZipFile(stream, "a") as archive:
            root = archive.namelist()[0].split("/")[0]
            archive.writestr(zipfile.ZipInfo(f"{root}/{KEY}.json"), manifest.dumps())


def _manifest(path: Path) -> Manifest | None:
    """Read the manifest, after looking at what the zip declares.

    Raises:
        CheckpointError: no zip of stored records that fit into the file, or a broken manifest.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = [record.filename for record in records]
            if len(set(names)) != len(names):
                raise ValueError(f"the record {shown(Counter(names).most_common(1)[0][0])} twice")
            if packed := [
                record.filename for record in records if record.compress_type != zipfile.ZIP_STORED
            ]:
                raise ValueError(f"{shown(packed[0])} is compressed, which torch never does")
            if sum(record.file_size for record in records) > size:
                raise ValueError(f"its records declare more than the file's {size:,} bytes")
            ours = [
                record for record in records if record.filename.partition("/")[2] == f"{KEY}.json"
            ]
            return Manifest.loads(archive.read(ours[0])) if ours else None
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
            "holds more than a state dict of tensors, and was not run",
            expected="a state dict",
            mend="save `module.state_dict()`, where the file's maker is trusted",
        ) from error
    except Exception as error:  # torch's readers raise a dozen unrelated types on bad bytes
        raise _broken(path, shown(str(error).partition("\n")[0] or type(error).__name__)) from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(
            path, f"holds a {type(state).__name__}; expected a state dict, names to tensors"
        )
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                path,
                f"{shown(key)} is a {type(value).__name__}; expected a tensor",
                key=key,
                mend="save the state dict alone: `torch.save(module.state_dict(), path)`",
            )
    return dict(state)


def _specs(
    path: Path, state: Mapping[str, Tensor]
) -> tuple[dict[KeyPath, Spec], dict[KeyPath, KeyPath]]:
    """Return what each tensor is, tied names apart."""
    specs: dict[KeyPath, Spec] = {}
    aliases: dict[KeyPath, KeyPath] = {}
    seen: dict[Any, KeyPath] = {}
    for key, tensor in state.items():
        try:
            dense(tensor)
            spec = checked(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        except (Untransferable, ValueError) as error:
            raise CheckpointError(path, f"{shown(key)}: {error}", key=key) from error
        if spec.nbytes > _MOST_VIEWED * max(tensor.untyped_storage().nbytes(), 4096):
            raise CheckpointError(
                path,
                f"{shown(key)} shows its stored bytes again and again",
                key=key,
                expected=f"about {tensor.untyped_storage().nbytes():,} bytes",
                found=f"{spec.nbytes:,} bytes",
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
    """Return specs and tied names as the manifest has them.

    Raises:
        CheckpointError: they are not those of the file.
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
    own = {key: spec for key, spec in specs.items() if key not in manifest.aliases}
    return in_manifests_order(path, own, manifest), dict(manifest.aliases)


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(path, f"not a whole torch file ({why})", mend="take another copy")
