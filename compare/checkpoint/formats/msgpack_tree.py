"""Read the names of a msgpack file, and where its arrays lie; the arrays are skipped.

The library would build the whole file in memory, with 70 bytes for each byte of a hostile one.
Source: https://github.com/msgpack/msgpack/blob/master/spec.md, and `flax.serialization`, which
writes an array as an extension entry: shape, dtype and bytes.
"""

import struct
from typing import Any, NamedTuple

import msgpack

from ...files.memory import Budget
from ...files.printable import shown
from ...files.reading import InputFile
from ..tensors import Spec, checked

CHUNKED = "__msgpack_chunked_array__"
_MAX_DEPTH = 500
_MAX_HEAD = 1024  # dtype and shape take fewer bytes
_WINDOW = 1 << 16
_MAX_LENGTHS = 8
_BYTES_PER_ENTRY = 400
_NDARRAY, _SCALAR = 1, 3  # the extension types of flax.serialization
# Entries of a fixed size: the number of bytes after the first.
_NUMBERS = {0xCA: ("float", 4), 0xCB: ("float", 8)}
_INTEGERS = dict(
    zip(range(0xCC, 0xD4), (">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True)
)
# Entries with a length: the number of bytes of the length.
_STRINGS, _BINARIES = {0xD9: 1, 0xDA: 2, 0xDB: 4}, {0xC4: 1, 0xC5: 2, 0xC6: 4}
_LISTS, _MAPS = {0xDC: 2, 0xDD: 4}, {0xDE: 2, 0xDF: 4}
_EXTENSIONS, _FIXED_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}, {0xD4 + n: 1 << n for n in range(5)}


class Array(NamedTuple):
    """An array in the file: its spec, and the first byte and size of each of its chunks."""

    spec: Spec
    chunks: tuple[tuple[int, int], ...]


class Other(NamedTuple):
    """An entry that is not an array, by the name of its Python type."""

    what: str


class ListError(ValueError):
    """There is a list, which Flax never writes. `path` says where."""

    def __init__(self, path: tuple[Any, ...]) -> None:
        super().__init__("a list")
        self.path = path


class _Open(NamedTuple):
    """A map that is being read; `remaining` counts its keys and values."""

    entries: dict[Any, Any]
    remaining: list[int]
    key: list[Any]


_EMPTY: dict[Any, Any] = {}  # one for all: a hostile file may have millions


class TreeReader:
    """Reads one file.

    Args:
        file: the file.
        budget: the limit of what is read and held.
        text_name: the name of a text, at the top or beside the chunks of an array.

    Attributes:
        texts: the texts of that name that lay beside chunks.
    """

    def __init__(self, file: InputFile, budget: Budget, text_name: str) -> None:
        self._file, self._budget, self._text_name = file, budget, text_name
        self.texts: list[Any] = []
        self._position = 0
        self._window, self._window_begin = b"", 0
        self._entries = 0
        self._heads: dict[bytes, Spec] = {}
        self._head_lengths: set[int] = set()

    def read(self) -> Any:
        """Return nested dicts of arrays; the text of `text_name` at the top is one of the values.

        Raises:
            ListError: it has a list.
            ValueError: the file is not msgpack, is nested too deeply, has a name twice or a name
                that is neither text nor a number.
            EOFError: it ends too early.
            FileError: its names do not fit the budget.
        """
        opened: list[_Open] = []
        while True:
            value = self._value(opened)
            if isinstance(value, _Open):
                if len(opened) >= _MAX_DEPTH:
                    raise ValueError("nested too deeply")
                opened.append(value)
                continue
            while opened:
                self._add(opened[-1], value)
                if opened[-1].remaining[0]:
                    break
                value = self._closed(opened.pop())
            if not opened:
                if self._position != self._file.size:
                    raise ValueError(f"it goes on after byte {self._position:,}")
                return value

    def _add(self, parent: _Open, value: Any) -> None:
        """Put a key or a value into the map that is being read."""
        parent.remaining[0] -= 1
        if not parent.key:
            if type(value) not in (str, int):
                kind = value.what if isinstance(value, Other) else type(value).__name__
                raise ValueError(f"a name is a {kind}; expected text or a number")
            if value in parent.entries:
                raise ValueError(f"the name {shown(value)} occurs twice")
            parent.key.append(value)
            return
        parent.entries[parent.key.pop()] = value

    def _closed(self, value: _Open) -> Any:
        """Return what a map has become: Flax writes a large array as a map of chunks."""
        if CHUNKED not in value.entries:
            return value.entries
        if self._text_name in value.entries:
            self.texts.append(value.entries.pop(self._text_name))
        return _joined(value.entries)

    def _value(self, opened: list[_Open]) -> Any:
        """Return the next entry: a map or list that begins, a number, a name, an array or other."""
        self._entries += 1
        if self._entries % 1024 == 0:
            size = 1024 * (_BYTES_PER_ENTRY + 8 * len(opened))
            self._budget.hold(size, self._file.path, "its names")
        parent = opened[-1] if opened else None
        is_key = parent is not None and not parent.key
        is_text = parent is not None and parent.key == [self._text_name]
        is_text = is_text and (len(opened) == 1 or CHUNKED in opened[-1].entries)
        first = self._take(1)[0]
        if first <= 0x7F or first >= 0xE0:
            return first if first <= 0x7F else first - 256
        if first <= 0x8F:
            return self._begun(2 * (first & 0x0F))
        if first <= 0x9F or first in _LISTS:
            self._require(first & 0x0F if first <= 0x9F else self._length(_LISTS[first]))
            raise ListError(tuple(name for one in opened for name in one.key))
        if first <= 0xBF:
            return self._text(first & 0x1F, is_key or is_text)
        if first in _MAPS:
            return self._begun(2 * self._length(_MAPS[first]))
        if first in _STRINGS:
            return self._text(self._length(_STRINGS[first]), is_key or is_text)
        if first in _INTEGERS:
            pattern = _INTEGERS[first]
            return struct.unpack(pattern, self._take(struct.calcsize(pattern)))[0]
        if first in _EXTENSIONS or first in _FIXED_EXTENSIONS:
            names = sum(len(name) for one in opened for name in one.key if isinstance(name, str))
            self._budget.hold(8 * names, self._file.path, "its names")  # each leaf has the path
            is_fixed = first in _FIXED_EXTENSIONS
            return self._array(
                _FIXED_EXTENSIONS[first] if is_fixed else self._length(_EXTENSIONS[first])
            )
        return self._other(first)

    def _other(self, first: int) -> Any:
        if first in (0xC2, 0xC3):
            return Other("bool")
        if first == 0xC0:
            return Other("NoneType")
        if first in _NUMBERS:
            what, nbytes = _NUMBERS[first]
            self._skip(nbytes)
            return Other(what)
        if first in _BINARIES:
            self._skip(self._length(_BINARIES[first]))
            return Other("bytes")
        raise ValueError(f"the byte {first:#x}, which msgpack does not use")

    def _begun(self, remaining: int) -> Any:
        self._require(remaining)
        return _Open({}, [remaining], []) if remaining else _EMPTY

    def _require(self, remaining: int) -> None:
        """Raise EOFError if the file is too short for so many entries."""
        if remaining > self._file.size - self._position:
            raise EOFError("it ends within a map or list")

    def _text(self, nbytes: int, is_wanted: bool) -> Any:
        """Return the text if it is a name or wanted; skip it if not."""
        if not is_wanted:
            self._skip(nbytes)
            return Other("str")
        self._budget.hold(4 * nbytes, self._file.path, "a text")
        return self._take(nbytes).decode()

    def _array(self, nbytes: int) -> Array:
        """Return the array of an extension entry, after checking its declared size."""
        kind = self._take(1)[0]
        if kind not in (_NDARRAY, _SCALAR):
            raise ValueError(f"an entry of the extension type {kind}")
        begin = self._position
        raw = self._take(min(nbytes, _MAX_HEAD))
        spec, at = self._head(raw)
        width = _BINARIES.get(raw[at]) if at < len(raw) else None
        if width is None:
            raise ValueError(f"an array {spec.dtype} {spec.shape} that is not followed by bytes")
        size = int.from_bytes(raw[at + 1 : at + 1 + width], "big")
        if size != spec.nbytes or at + 1 + width + size != nbytes:
            raise ValueError(f"an array {spec.dtype} {spec.shape} in {size} bytes")
        self._position = begin
        self._skip(nbytes)
        return Array(spec, ((begin + at + 1 + width, size),))

    def _head(self, raw: bytes) -> tuple[Spec, int]:
        """Return the shape and dtype at the beginning of an array, and where they end.

        Most arrays of a file begin as others do, so what was unpacked is kept.
        """
        for length in self._head_lengths:
            if (spec := self._heads.get(raw[:length])) is not None:
                return spec, length
        head = msgpack.Unpacker(raw=True, max_buffer_size=_MAX_HEAD)
        head.feed(raw)
        try:
            parts, shape, name = head.read_array_header(), head.unpack(), head.unpack()
            spec = checked(list(shape), name.decode())
        except (TypeError, AttributeError, msgpack.exceptions.UnpackException) as error:
            raise ValueError(
                f"an array without shape and dtype ({type(error).__name__})"
            ) from error
        if parts != 3:
            raise ValueError(f"an array {spec.dtype} {spec.shape} in {parts} parts")
        length = head.tell()
        if len(self._head_lengths) < _MAX_LENGTHS or length in self._head_lengths:
            self._head_lengths.add(length)
            self._heads[raw[:length]] = spec
        return spec, length

    def _length(self, width: int) -> int:
        return int.from_bytes(self._take(width), "big")

    def _take(self, nbytes: int) -> bytes:
        """Return the next bytes."""
        at = self._position - self._window_begin
        if not 0 <= at <= len(self._window) - nbytes:
            self._window = self._file.read(max(nbytes, _WINDOW), self._position)
            self._window_begin, at = self._position, 0
            if len(self._window) < nbytes:
                raise EOFError("it ends too early")
        self._position += nbytes
        return self._window[at : at + nbytes]

    def _skip(self, nbytes: int) -> None:
        if nbytes > self._file.size - self._position:
            raise EOFError("it ends too early")
        self._position += nbytes


def _joined(parts: dict[Any, Any]) -> Array:
    """Return an array that Flax wrote in chunks, because an entry holds less than 4 GiB."""
    try:
        shape = [parts["shape"][str(axis)] for axis in range(len(parts["shape"]))]
        chunks = [parts["chunks"][str(index)] for index in range(len(parts["chunks"]))]
        dtype = chunks[0].spec.dtype
        places = tuple(place for chunk in chunks for place in chunk.chunks)
        dtypes = {chunk.spec.dtype for chunk in chunks}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError("an array in chunks, some of which are missing") from error
    spec, nbytes = checked(shape, dtype), sum(size for _, size in places)
    if nbytes != spec.nbytes or len(dtypes) > 1 or parts.keys() != {CHUNKED, "shape", "chunks"}:
        raise ValueError(f"an array {spec.dtype} {spec.shape} in {nbytes} bytes")
    return Array(spec, places)
