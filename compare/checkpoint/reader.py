"""An opened checkpoint: what it holds is known, and read when asked for, each tensor checked."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..conversion.errors import shown
from ..conversion.mapping import KeyPath, StateMapping, slashed
from .blocks import in_batches
from .errors import CheckpointError
from .manifest import Algorithm, Manifest, checksum, start
from .tensors import FileLayout, Spec

PART_BYTES = 1 << 20  # less than a processor's cache


@dataclass
class Stored:
    """An opened file or folder.

    Attributes:
        path: where it is, as the user named it.
        format: its name.
        layout: by the manifest, or as the names look.
        specs: by path, in the order of the manifest, or of the file.
        manifest: None if the file has none: then nothing can be checked.
        fetch: reads tensors, several at once.
        close: gives back what is open.
        mapped: whether large torch and safetensors files may be read in place, by who copies the
            values.
    """

    path: Path
    format: str
    layout: FileLayout
    specs: Mapping[KeyPath, Spec]
    manifest: Manifest | None
    fetch: Callable[[list[KeyPath]], "Fetched"] = lambda _: _closed()
    aliases: Mapping[KeyPath, KeyPath] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None
    mapped: bool = False
    _reading: "set[Fetched]" = field(default_factory=set)

    @property
    def kinds(self) -> Mapping[KeyPath, str]:
        """The kinds that the manifest declares, or Linen's collections."""
        if self.manifest is not None:
            return {path: record.kind for path, record in self.manifest.records.items()}
        return {}

    @property
    def mapping(self) -> StateMapping | None:
        """How torch and Flax names pair, if the manifest says it."""
        return self.manifest.mapping if self.manifest is not None else None

    @property
    def algorithm(self) -> Algorithm | None:
        """How the checksums were taken, if there are any."""
        return self.manifest.algorithm if self.manifest is not None else None

    @property
    def checked(self) -> bool:
        """Whether every tensor is checked when it is read."""
        return self.manifest is not None

    def spell(self, table: StateMapping) -> StateMapping:
        """Take over how the table spells the steps of a path, and return it.

        In a list of NNX they are numbers, of which a file that only Flax's own library wrote makes
        words.
        """
        if self.manifest is None and self.layout != "torch":
            places = (*table.by_path, *(item.path for item in table.left if item.path))
            spelled = {tuple(map(str, path)): path for path in places}
            self.specs = {
                spelled.get(tuple(map(str, path)), path): spec for path, spec in self.specs.items()
            }
        return table

    def pieces(self, path: KeyPath) -> Iterable[np.ndarray]:
        """Return the tensor, whole."""
        return [array for _, array in self.read([path])]

    def read(self, paths: Iterable[KeyPath] | None = None) -> Iterator[tuple[KeyPath, np.ndarray]]:
        """Yield tensors in turn, each checked against its checksum.

        Raises:
            CheckpointError: more than fits into memory, or other values than were saved.
            ValueError: the checkpoint was closed before all of them were read.
        """
        wanted = list(self.specs if paths is None else paths)
        room = available_bytes()
        for path in wanted:
            self._require_room(path, room)
        fetched = self.fetch(wanted)
        self._reading.add(fetched)
        left = len(wanted)
        try:
            for found in fetched:
                left -= 1
                yield found
        finally:
            fetched.close()
            self._reading.discard(fetched)
        if left:
            raise ValueError("the checkpoint is closed")

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

    def __enter__(self) -> "Stored":
        return self

    def __exit__(self, *_: Any) -> None:
        for (
            fetched
        ) in self._reading:  # else they would go on with a descriptor that is soon another file's
            fetched.close()
        self._reading.clear()
        self.close()
        self.fetch = lambda _: (
            _closed()
        )  # the old one knows this object: both, and the file's values, would stay


Fetched = Generator[tuple[KeyPath, np.ndarray], None, None]


def _closed() -> Fetched:
    yield from ()


def fetch_each(
    stored: Stored, one: Callable[[KeyPath], tuple[np.ndarray, str | None]]
) -> Callable[[list[KeyPath]], Fetched]:
    """Return a `fetch` that reads and checks the tensors one by one, several at a time.

    `one` returns the array, and its checksum if it was taken on the way.
    """

    def work(path: KeyPath) -> np.ndarray:
        return stored.check(path, *one(path))

    return lambda paths: in_batches(paths, lambda path: stored.specs[path].nbytes, work)


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
