"""The file of a record: arrays by name in safetensors, and a head in JSON."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from ..dtypes import DTYPES, numpy_dtype
from ..files.errors import FileError
from ..files.memory import Budget
from ..files.printable import all_readable, kind_of, shown
from ..files.reading import opened, parse_json
from ..files.writing import atomic_file
from .errors import PortError

VERSION = 1
_KEY, _SUM = "attention-parity record", "attention-parity sha256"
# What the safetensors library takes of NumPy; arrays of other dtypes are stored as bytes.
_PLAIN = ("float64", "float32", "float16", "bool", "int64", "int32", "int16", "int8", "uint8")
_MAX_ENTRIES = 1 << 34  # of an array that is known by its shape alone


def write(
    path: Path, head: Mapping[str, Any], groups: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Write the file in one step.

    Args:
        path: where to write it.
        head: the head.
        groups: arrays by name, by how their names in the file begin.

    Raises:
        FileError: it cannot be written there.
    """
    stored, dtypes = {}, {}
    names = {start: list(arrays) for start, arrays in groups.items()}
    named = {start + key: groups[start][key] for start, keys in names.items() for key in keys}
    for name, array in named.items():
        if array.dtype.name in _PLAIN:
            stored[name] = np.ascontiguousarray(array).reshape(array.shape)
        else:
            dtypes[name] = [array.dtype.name, list(array.shape)]
            stored[name] = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
    try:
        text = json.dumps(
            {"version": VERSION, "dtypes": dtypes, "names": names, **head},
            allow_nan=False,
            default=_number,
        )
    except (TypeError, ValueError) as error:
        raise PortError(f"what the layers say cannot be recorded: {error}") from error
    metadata = {_KEY: text, _SUM: _checksum(text, stored)}
    with atomic_file(path) as stream:
        stream.write(save(stored, metadata=metadata))


def _number(value: Any) -> Any:
    """Return a number of NumPy or torch as one of Python."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{kind_of(value)} is no number")


def _checksum(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Return a checksum of the head and the arrays, against damage."""
    found = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        found.update(name.encode())
        found.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


class RecordFile:
    """A record that is read: its head, and its arrays when they are asked for.

    Args:
        path: the file.

    Attributes:
        head: the head, with all text made printable.

    Raises:
        PortError: it is no record.
        FileError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened(path):  # a regular file, or an error of ours
            pass
        with reading(path):
            self._file: Any = safetensors.safe_open(str(path), framework="numpy")
            metadata = self._file.metadata() or {}
            text, expected = metadata[_KEY], metadata[_SUM]
            names = set(self._file.keys())
            if _checksum(text, {name: self._file.get_tensor(name) for name in names}) != expected:
                raise ValueError("its checksum is another one: it was damaged")
            head = parse_json(text, path, Budget(), "its head")
            self._dtypes = dict(head["dtypes"])
            version = head["version"]
        if version != VERSION:
            raise PortError(
                f"{shown(path)} is a record of version {version!r}, and this program reads version "
                f"{VERSION}: record the module again"
            )
        self.head: dict[str, Any] = {**all_readable(head), "calls": head["calls"]}

    def array(self, name: str) -> np.ndarray:
        """Return an array.

        Raises:
            PortError: the file has none of that name, or its bytes do not fit its dtype.
        """
        with reading(self.path):
            stored: np.ndarray = self._file.get_tensor(name)
            if name not in self._dtypes:
                return stored
            dtype, shape = self._dtypes[name]
            if dtype not in DTYPES:
                raise ValueError(f"{name} has the dtype {dtype!r}")
            return np.frombuffer(stored.tobytes(), numpy_dtype(dtype)).reshape(tuple(shape))

    def named(self, start: str) -> dict[str, np.ndarray]:
        """Return the arrays whose names begin so, by what follows, in the order of the head."""
        return {name: self.array(start + name) for name in self.head["names"].get(start, [])}


def placeholder(shape: tuple[int, ...]) -> np.ndarray:
    """Return an array of NaN that takes no memory, for one of which only the shape is known."""
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"{shape} is no shape")
    if np.prod(shape, dtype=np.float64) > _MAX_ENTRIES:
        raise ValueError(f"an array of shape {shape} is too large")
    return np.broadcast_to(np.float64(np.nan), shape)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise PortError for whatever is wrong with what a record says."""
    try:
        yield
    except (FileError, PortError):
        raise
    except Exception as error:  # the library raises its own class, and a head may hold anything
        text = all_readable(str(error))[:200]
        raise PortError(
            f"{shown(path)} is no sound record ({type(error).__name__}: {text}): write it with "
            "compare.record"
        ) from error
