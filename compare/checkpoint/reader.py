"""An opened checkpoint: its names and shapes are known, its values are read and checked on demand."""

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

PART_BYTES = 1 << 20  # less than a processor's cache


Fetched = Generator[tuple[KeyPath, np.ndarray], None, None]
# What a tensor's values are, and their checksum if it was taken while they were read.
ArrayAndChecksum = tuple[np.ndarray, str | None]


class Reader:
    """An opened file or folder. A subclass reads one format.

    Attributes:
        path: the file or folder, as the user named it.
        format: the name of the format.
        layout: which framework's names and shapes it has: as the manifest says, or as the names look.
        specs: shape and dtype by path, in the order of the manifest, or else of the file.
        manifest: None if the file has none; then nothing can be checked.
        aliases: further names of tensors, each with the first name.
        mapped: set it to let large tensors be read in place, if their values are copied anyway.
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
        """Return the values of one tensor, and their checksum if it was taken on the way."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what is open."""

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
        """Return what can be written into another checkpoint, each tensor read when asked for."""

        def pieces(path: KeyPath) -> Iterable[np.ndarray]:
            return [array for _, array in self.read([path])]

        return Tensors(self.layout, self.specs, pieces, self.kinds, self.aliases, self.mapping)

    def spell(self, mapping: StateMapping) -> StateMapping:
        """Adopt the mapping's spelling of paths, and return the mapping.

        Positions in an NNX list are integers; a file that Flax's own library wrote has strings.
        """
        if self.manifest is None and self.layout != "torch":
            paths = (*mapping.by_path, *(item.path for item in mapping.left if item.path))
            spelled = {tuple(map(str, path)): path for path in paths}
            self.specs = {
                spelled.get(tuple(map(str, path)), path): spec for path, spec in self.specs.items()
            }
        return mapping

    def read(self, paths: Iterable[KeyPath] | None = None) -> Iterator[tuple[KeyPath, np.ndarray]]:
        """Yield the tensors in turn, each checked against its checksum.

        Raises:
            CheckpointError: a tensor larger than memory, or values other than those saved.
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
        left = len(wanted)
        try:
            for path, array in fetched:
                left -= 1
                yield path, array
        finally:
            fetched.close()
            self._reading.discard(fetched)
        if left:
            raise ValueError("the checkpoint is closed")

    def _fetch(self, paths: list[KeyPath]) -> Fetched:
        """Yield the checked tensors in order, several of them read at a time."""

        def read_and_check(path: KeyPath) -> np.ndarray:
            return self.check(path, *self.read_tensor(path))

        return in_batches(paths, lambda path: self.specs[path].nbytes, read_and_check)

    def check(self, path: KeyPath, array: np.ndarray, found: str | None = None) -> np.ndarray:
        """Return the array, its values those that were saved; `found` is its checksum, if it was taken on the way.

        Raises:
            CheckpointError: they are not.
        """
        name = slashed(path)
        if array.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
            raise CheckpointError(
                self.path,
                f"{shown(name)} is bool and holds other bytes than 0 and 1",
                key=name,
                expected="0 and 1",
                found=str(int(array.view(np.uint8).max())),
                mend="it is damaged: take another copy",
            )
        if self.manifest is None:
            return array
        expected, algorithm = self.manifest.records[path].checksum, self.manifest.algorithm
        found = found or checksum([array], self.specs[path], algorithm)
        if found != expected:
            raise CheckpointError(
                self.path,
                f"the values of {shown(name)} are not those that were saved",
                key=name,
                expected=f"{algorithm} {expected[:12]}",
                found=found[:12],
                mend="it is damaged: take another copy",
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
                mend="the file is hostile, or this machine too small",
            )

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: Any) -> None:
        # A reading that went on would use a descriptor that soon belongs to another file.
        for fetched in self._reading:
            fetched.close()
        self._reading.clear()
        self._is_closed = True
        self.close()


def read_in_parts(
    spec: Spec, fill: Callable[[int, np.ndarray], None], algorithm: Algorithm | None
) -> tuple[np.ndarray, str | None]:
    """Return a new array, and its checksum, taken of each part while the processor has it at hand.

    Args:
        spec: of the array.
        fill: puts the file's bytes from an offset on into a part of the array.
        algorithm: of the checksum, if one is wanted.
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
    """Return how much memory a new array may take."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**62
