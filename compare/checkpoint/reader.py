"""An open checkpoint: names and shapes are known, values are read and checked on demand."""

import mmap
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..conversion.layer_facts import LAYER_BYTES, layers_from
from ..conversion.mapping import KeyPath, StateMapping, slashed, words
from ..conversion.state_kinds import linen_kind
from ..files.memory import Budget
from ..files.printable import shown
from ..files.reading import InputFile, Snapshot
from ..frameworks import nn
from .blocks import BLOCK_BYTES, WORKERS, blocks, in_batches
from .errors import CheckpointError, naming
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
        kinds: the kind of state of each tensor, if there is a manifest or a Linen collection.
        budget: the limit of what is read and held.
        snapshot: the files that it consists of, and their states when they were opened.
        left_out: names of what the file holds beside the state.
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
        *,
        budget: Budget,
        snapshot: Snapshot,
        left_out: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.layout: FileLayout = layout
        self.specs = specs
        self.manifest = manifest
        self.aliases = aliases or {}
        records = manifest.records if manifest is not None else {}
        self.kinds: dict[KeyPath, str] = {path: record.kind for path, record in records.items()}
        if manifest is None and layout == "linen":  # the collections say it
            self.kinds = {path: linen_kind(path) for path in specs}
        self.budget = budget
        self.snapshot = snapshot
        self.left_out = left_out
        self.mapped = False
        self._is_closed = False
        self._reading: set[Fetched] = set()

    def read_tensor(self, path: KeyPath) -> ArrayAndChecksum:
        """Return the values of one tensor, and their checksum if it was computed meanwhile."""
        raise NotImplementedError

    def close(self) -> None:
        """Release open files and memory."""

    @property
    def mapping(self) -> StateMapping | None:
        """How torch and Flax names pair, if the manifest says so."""
        return self.manifest.mapping if self.manifest is not None else None

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The torch layers of the state, without tensors, if the manifest says what they are."""
        if self.manifest is None:
            return {}
        nbytes = LAYER_BYTES * len(self.manifest.layers)
        with naming(self.path):
            self.budget.require(nbytes, self.path, "the layers that its manifest describes")
        return layers_from(self.manifest.layers)

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

        layers = self.manifest.layers if self.manifest is not None else {}
        return Tensors(
            self.layout, self.specs, pieces, self.kinds, self.aliases, self.mapping, layers
        )

    def spell(self, mapping: StateMapping) -> StateMapping:
        """Rename the paths to those of the mapping, and return the mapping.

        Positions in an NNX list are integers, but strings in a file that Flax's own library wrote.

        Raises:
            CheckpointError: the masks that the mapping makes again do not fit the budget.
        """
        if self.layout != "torch" and mapping.refills:
            refills = mapping.refills.values()
            nbytes = sum(Spec(refill.shape, refill.dtype).nbytes for refill in refills)
            with naming(self.path):
                self.budget.require(nbytes, self.path, "the masks that its mapping describes")
        if self.manifest is None and self.layout != "torch":
            paths = (*mapping.by_path, *(item.path for item in mapping.left if item.path))
            spelled = {words(path): path for path in paths}
            self.specs = {spelled.get(words(path), path): spec for path, spec in self.specs.items()}
        return mapping

    def read(self, paths: Iterable[KeyPath] | None = None) -> Iterator[tuple[KeyPath, np.ndarray]]:
        """Yield the tensors in order, each checked against its checksum.

        Raises:
            CheckpointError: the tensors together do not fit the budget, or one has other values
                than were saved.
            ValueError: the checkpoint was closed before all of them were read.
        """
        wanted = list(self.specs if paths is None else paths)
        self.require_room(wanted)
        self._require_open()
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
            with naming(self.path):
                return self.check(path, *self.read_tensor(path))

        if len(paths) == 1:  # starting a thread takes longer than reading a small tensor
            yield paths[0], read_and_check(paths[0])
            return
        yield from in_batches(paths, lambda path: self.specs[path].nbytes, read_and_check)

    def check(self, path: KeyPath, array: np.ndarray, digest: str | None = None) -> np.ndarray:
        """Return the array after checking its values.

        Args:
            path: the path of the tensor.
            array: its values.
            digest: their checksum, if it was computed while they were read.

        Raises:
            CheckpointError: the values are not those that were saved.
        """
        self._require_bool(path, array)
        if self.manifest is None:
            return array
        digest = digest or checksum([array], self.specs[path], self.manifest.algorithm)
        self.require_checksum(path, digest)
        return array

    def require_checksum(self, path: KeyPath, digest: str) -> None:
        """Raise CheckpointError if this is not the checksum of the values that were saved."""
        assert self.manifest is not None
        expected, algorithm = self.manifest.records[path].checksum, self.manifest.algorithm
        if digest != expected:
            name = slashed(path)
            raise CheckpointError(
                self.path,
                f"the values of {shown(name)} are not those that were saved",
                key=name,
                expected=f"{algorithm} {expected[:12]}",
                found=digest[:12],
                mend="the file is damaged: take another copy",
            )

    def _require_bool(self, path: KeyPath, array: np.ndarray) -> None:
        if array.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
            name = slashed(path)
            raise CheckpointError(
                self.path,
                f"{shown(name)} is bool and contains bytes other than 0 and 1",
                key=name,
                expected="0 and 1",
                found=str(int(array.view(np.uint8).max())),
                mend="the file is damaged: take another copy",
            )

    def parts(self, path: KeyPath) -> Iterator[np.ndarray]:
        """Yield one tensor in consecutive flat parts, and check its values at the end.

        A part takes a few MB where the format allows it.

        Raises:
            CheckpointError: the tensor has other values than were saved.
        """
        for _, array in self.read([path]):
            for block in blocks(array):
                yield block.view(array.dtype)

    def require_current(self) -> None:
        """Raise CheckpointError if a file of the checkpoint was replaced or written to."""
        if not self.snapshot.is_current():
            raise CheckpointError(
                self.path,
                "was changed while it was read",
                expected="the files that were opened",
                found="others, or other content",
                mend="read it when nothing writes to it",
            )

    def require_room(self, paths: Iterable[KeyPath], *, copied: bool = False) -> None:
        """Raise CheckpointError if these tensors together do not fit the budget.

        Args:
            paths: the paths of the tensors.
            copied: whether mapped tensors are copied, so that they take memory too.
        """
        sizes = {
            path: self.specs[path].nbytes if copied else self._held_bytes(path) for path in paths
        }
        if not sizes:
            return
        largest = max(sizes, key=lambda path: sizes[path] + self._extra_bytes(path))
        what = f"{shown(slashed(largest))} ({self.specs[largest].shape})"
        what += f" and {len(sizes) - 1:,} more" if len(sizes) > 1 else ""
        with naming(self.path):
            nbytes = sum(sizes.values()) + WORKERS * self._extra_bytes(largest)
            self.budget.require(nbytes, self.path, what, key=slashed(largest))

    def require_copies(self, tensors: Tensors, *, held: int = 0) -> None:
        """Raise CheckpointError if one tensor and its copies do not fit beside `held` bytes."""
        if tensors.copies > 1 or held:
            with naming(self.path):
                what = "a tensor and its copies in another layout or dtype"
                self.budget.require(held + tensors.largest_bytes, self.path, what)

    def _held_bytes(self, path: KeyPath) -> int:
        """Return how much memory the values take that `read` yields."""
        return self.specs[path].nbytes

    def _extra_bytes(self, path: KeyPath) -> int:
        """Return how much more memory is taken while the tensor is read."""
        return 0

    def _require_open(self) -> None:
        if self._is_closed:
            raise ValueError("the checkpoint is closed")

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: Any) -> None:
        # Stop all reads: their descriptors may soon belong to other files.
        for fetched in self._reading:
            fetched.close()
        self._reading.clear()
        self._is_closed = True
        self.close()


class Location(NamedTuple):
    """Where the bytes of a tensor are: the file, and the offset of the first byte."""

    file: InputFile
    begin: int


class FileReader(Reader):
    """An open checkpoint whose tensors lie in C order in files, uncompressed."""

    def __init__(self, locations: Mapping[KeyPath, Location], *header: Any, **more: Any) -> None:
        super().__init__(*header, **more)
        self._locations = locations
        self._files = list(dict.fromkeys(location.file for location in locations.values()))

    def location(self, path: KeyPath) -> Location:
        """Return where the tensor lies."""
        return self._locations[words(path)]

    def read_tensor(self, path: KeyPath) -> ArrayAndChecksum:
        """Read one tensor into new memory, or map a large one if `mapped` allows it.

        If a mapped file is cut, the process ends, as with the libraries' own readers. A program
        that saves by renaming never cuts a file.
        """
        spec = self.specs[path]
        if self._is_mapped(path):
            return _mapped(*self.location(path), spec), None
        array = np.empty(spec.shape, spec.numpy)
        flat = array.reshape(-1).view(np.uint8)
        digest = start(spec, self.algorithm) if self.algorithm else None
        for offset in range(0, flat.nbytes, PART_BYTES):
            part = flat[offset : offset + PART_BYTES]
            self.fill(path, part.data, offset)
            if digest:  # while the part is in the processor's cache
                digest.update(part)
        return array, digest.hexdigest() if digest else None

    def fill(self, path: KeyPath, part: memoryview, offset: int) -> None:
        """Fill the memory with the bytes of one tensor from an offset."""
        file, begin = self.location(path)
        file.fill(part, begin + offset)

    def parts(self, path: KeyPath) -> Iterator[np.ndarray]:
        """Yield one tensor in consecutive flat parts of a few MB, and check it at the end."""
        self._require_open()
        spec = self.specs[path]
        if spec.nbytes <= BLOCK_BYTES:
            with naming(self.path):
                yield self.check(path, *self.read_tensor(path)).reshape(-1)
            return
        digest = start(spec, self.algorithm) if self.algorithm else None
        for offset in range(0, spec.nbytes, BLOCK_BYTES):
            part = np.empty(min(BLOCK_BYTES, spec.nbytes - offset), np.uint8)
            with naming(self.path):
                self.fill(path, part.data, offset)
            self._require_bool(path, part.view(spec.numpy))
            if digest:
                digest.update(part)
            yield part.view(spec.numpy)
        if digest:
            self.require_checksum(path, digest.hexdigest())

    def _is_mapped(self, path: KeyPath) -> bool:
        spec, (_, begin) = self.specs[path], self.location(path)
        is_aligned = begin % spec.numpy.itemsize == 0
        return self.mapped and spec.nbytes >= PART_BYTES and is_aligned

    def _held_bytes(self, path: KeyPath) -> int:
        return 0 if self._is_mapped(path) else super()._held_bytes(path)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _mapped(file: InputFile, begin: int, spec: Spec) -> np.ndarray:
    """Return the values in the page cache; a part of them is copied when it is written to.

    Raises:
        FileError: the file has become shorter.
    """
    offset = begin % mmap.ALLOCATIONGRANULARITY
    with file.descriptor() as descriptor:
        file.require_length(begin + spec.nbytes)
        memory = mmap.mmap(
            descriptor, offset + spec.nbytes, access=mmap.ACCESS_COPY, offset=begin - offset
        )
    array = np.frombuffer(memory, np.uint8, offset=offset)
    return array.view(spec.numpy).reshape(spec.shape)
