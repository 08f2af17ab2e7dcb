"""An open checkpoint: names and shapes are known, values are read and checked on demand."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..conversion.errors import shown
from ..conversion.mapping import KeyPath, StateMapping, slashed
from .blocks import in_batches
from .errors import CheckpointError
from .manifest import Algorithm, Manifest, checksum, start
from .tensors import FileLayout, Spec, Tensors

PART_BYTES = 1 << 20  # smaller than a processor's cache


Fetched = Generator[tuple[KeyPath, np.ndarray], None, None]
# The values of a tensor, and their checksum if it was computed while they were read.
ArrayAndChecksum = tuple[np.ndarray, str | None]


class Reader:
    """An open file or folder. A subclass reads one format.

    Attributes:
        path: the file or folder, as the user named it.
        format: the name of the format.
        layout: the framework whose names and shapes it has, from the manifest, or else guessed from
            the names.
        specs: shape and dtype by path, in the order of the manifest, or else of the file.
        manifest: the manifest. None if the file has none; then values cannot be checked.
        aliases: further names of tensors, each with the first name.
        mapped: set it to True if the values are copied anyway; large tensors are then mapped.
    """

    format: ClassVar[str]

    def __init__(
        self,
        path: Path,
        layout: FileLayout,
        specs: Mapping[KeyPath, Spec],
        manifest: Manifest | None,
        aliases: Mapping[KeyPath, KeyPath] | None = None,
    ) -> None:
        self.path = path
        self.layout: FileLayout = layout
        self.specs = specs
        self.manifest = manifest
        self.aliases = aliases or {}
        self.mapped = False
        self._is_closed = False
        self._reading: set[Fetched] = set()

    def read_tensor(self, path: KeyPath) -> ArrayAndChecksum:
        """Return the values of one tensor, and their checksum if it was computed meanwhile."""
        raise NotImplementedError

    def close(self) -> None:
        """Release open files and memory."""

    @property
    def kinds(self) -> Mapping[KeyPath, str]:
        """The kind of state of each tensor, if there is a manifest."""
        if self.manifest is not None:
            return {path: record.kind for path, record in self.manifest.records.items()}
        return {}

    @property
    def mapping(self) -> StateMapping | None:
        """How torch and Flax names pair, if the manifest says so."""
        return self.manifest.mapping if self.manifest is not None else None

    @property
    def algorithm(self) -> Algorithm | None:
        """The algorithm of the checksums, if there are any."""
        return self.manifest.algorithm if self.manifest is not None else None

    @property
    def checked(self) -> bool:
        """Whether every tensor is checked when it is read."""
        return self.manifest is not None

    def tensors(self) -> Tensors:
        """Return the tensors for writing to another checkpoint. Values are read on demand."""

        def pieces(path: KeyPath) -> Iterable[np.ndarray]:
            return [array for _, array in self.read([path])]

        return Tensors(self.layout, self.specs, pieces, self.kinds, self.aliases, self.mapping)

    def spell(self, mapping: StateMapping) -> StateMapping:
        """Rename the paths to those of the mapping, and return the mapping.

        Positions in an NNX list are integers, but strings in a file that Flax's own library wrote.
        """
        if self.manifest is None and self.layout != "torch":
            paths = (*mapping.by_path, *(item.path for item in mapping.left if item.path))
            spelled = {tuple(map(str, path)): path for path in paths}
            self.specs = {
                spelled.get(tuple(map(str, path)), path): spec for path, spec in self.specs.items()
            }
        return mapping

    def read(self, paths: Iterable[KeyPath] | None = None) -> Iterator[tuple[KeyPath, np.ndarray]]:
        """Yield the tensors in order, each checked against its checksum.

        Raises:
            CheckpointError: a tensor is larger than memory, or has other values than were saved.
            ValueError: the checkpoint was closed before all of them were read.
        """
        wanted = list(self.specs if paths is None else paths)
        room = available_bytes()
        for path in wanted:
            self._require_room(path, room)
        if self._is_closed:
            raise ValueError("the checkpoint is closed")
        fetched = self._fetch(wanted)
        self._reading.add(fetched)
        remaining = len(wanted)
        try:
            for path, array in fetched:
                remaining -= 1
                yield path, array
        finally:
            fetched.close()
            self._reading.discard(fetched)
        if remaining:
            raise ValueError("the checkpoint is closed")

    def _fetch(self, paths: list[KeyPath]) -> Fetched:
        """Yield the checked tensors in order; several are read at a time."""

        def read_and_check(path: KeyPath) -> np.ndarray:
            return self.check(path, *self.read_tensor(path))

        return in_batches(paths, lambda path: self.specs[path].nbytes, read_and_check)

    def check(self, path: KeyPath, array: np.ndarray, digest: str | None = None) -> np.ndarray:
        """Return the array after checking its values.

        Args:
            path: the path of the tensor.
            array: its values.
            digest: their checksum, if it was computed while they were read.

        Raises:
            CheckpointError: the values are not those that were saved.
        """
        name = slashed(path)
        if array.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
            raise CheckpointError(
                self.path,
                f"{shown(name)} is bool and contains bytes other than 0 and 1",
                key=name,
                expected="0 and 1",
                found=str(int(array.view(np.uint8).max())),
                mend="the file is damaged: take another copy",
            )
        if self.manifest is None:
            return array
        expected, algorithm = self.manifest.records[path].checksum, self.manifest.algorithm
        digest = digest or checksum([array], self.specs[path], algorithm)
        if digest != expected:
            raise CheckpointError(
                self.path,
                f"the values of {shown(name)} are not those that were saved",
                key=name,
                expected=f"{algorithm} {expected[:12]}",
                found=digest[:12],
                mend="the file is damaged: take another copy",
            )
        return array

    def _require_room(self, path: KeyPath, room: int) -> None:
        size = self.specs[path].nbytes
        if size > room:
            name = slashed(path)
            raise CheckpointError(
                self.path,
                f"{shown(name)} declares more than fits into memory",
                key=name,
                expected=f"at most {room:,} bytes",
                found=f"{size:,} bytes of shape {self.specs[path].shape}",
                mend="the file is hostile, or this machine has too little memory",
            )

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: Any) -> None:
        # Stop all reads: their descriptors may soon belong to other files.
        for fetched in self._reading:
            fetched.close()
        self._reading.clear()
        self._is_closed = True
        self.close()


def read_in_parts(
    spec: Spec, fill: Callable[[int, np.ndarray], None], algorithm: Algorithm | None
) -> tuple[np.ndarray, str | None]:
    """Return a new array and its checksum, computed while each part is in the processor's cache.

    Args:
        spec: the spec of the array.
        fill: copies the file's bytes from an offset into a part of the array.
        algorithm: the algorithm of the checksum, or None for no checksum.
    """
    array = np.empty(spec.shape, spec.numpy)
    flat = array.reshape(-1).view(np.uint8)
    digest = start(spec, algorithm) if algorithm else None
    for begin in range(0, flat.nbytes, PART_BYTES):
        part = flat[begin : begin + PART_BYTES]
        fill(begin, part)
        if digest:
            digest.update(part)
    return array, digest.hexdigest() if digest else None


def available_bytes() -> int:
    """Return the available memory in bytes."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**62
