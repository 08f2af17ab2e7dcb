"""Named tensors that can be written, and what is known of each before it is read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal, NamedTuple, Protocol

import numpy as np

from ..conversion.mapping import KeyPath, StateMapping
from ..dtypes import DTYPES, numpy_dtype
from .blocks import contiguous

FileLayout = Literal["torch", "linen", "nnx"]

# No array may have more bytes, empty ones by their other axes included.
_MOST = 2**62


class Spec(NamedTuple):
    """Shape and dtype of one tensor, in the layout of its file."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """How many bytes its values take."""
        return prod(self.shape) * self.numpy.itemsize

    @property
    def numpy(self) -> np.dtype:
        """The dtype."""
        return numpy_dtype(self.dtype)


def spec_of(array: np.ndarray) -> Spec:
    """Return the spec of an array.

    Raises:
        ValueError: a dtype that no checkpoint holds.
    """
    return checked(tuple(map(int, array.shape)), array.dtype.newbyteorder("=").name)


def checked(shape: object, dtype: object) -> Spec:
    """Return the spec that a file declares.

    Raises:
        ValueError: a dtype that no checkpoint holds, or a shape that no array has.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is none of {', '.join(DTYPES)}")
    if not isinstance(shape, list | tuple) or not all(
        type(size) is int and size >= 0 for size in shape
    ):
        raise ValueError(f"shape {shape} is no list of sizes")
    if (
        len(shape) > 32
        or prod(size for size in shape if size) * numpy_dtype(str(dtype)).itemsize > _MOST
    ):
        raise ValueError(f"shape {list(shape)} is more than any array has")
    return Spec(tuple(shape), str(dtype))


class Tensors(Protocol):
    """Named tensors that can be written: in memory, in a file, or in another layout than their file's.

    Attributes:
        layout: whose names and shapes these are.
        specs: shape and dtype by path. A torch name is a path of one step.
        kinds: what each is, as far as it is known.
        aliases: further names of tensors, to the first.
        mapping: how torch and Flax names pair, if that is known.
    """

    @property
    def layout(self) -> FileLayout: ...  # noqa: D102
    @property
    def specs(self) -> Mapping[KeyPath, Spec]: ...  # noqa: D102
    @property
    def kinds(self) -> Mapping[KeyPath, str]: ...  # noqa: D102
    @property
    def aliases(self) -> Mapping[KeyPath, KeyPath]: ...  # noqa: D102
    @property
    def mapping(self) -> StateMapping | None: ...  # noqa: D102

    def pieces(self, path: KeyPath) -> Iterable[np.ndarray]:
        """Return the tensor in pieces, one behind the other along the first axis; each may be any view."""


@dataclass(frozen=True)
class InMemory:
    """Tensors in memory."""

    layout: FileLayout
    arrays: Mapping[KeyPath, np.ndarray]
    specs: Mapping[KeyPath, Spec]
    kinds: Mapping[KeyPath, str] = field(default_factory=dict)
    aliases: Mapping[KeyPath, KeyPath] = field(default_factory=dict)
    mapping: StateMapping | None = None

    def pieces(self, path: KeyPath) -> Iterable[np.ndarray]:
        """Return the array, whole."""
        return [self.arrays[path]]


def whole(tensors: Tensors, key: KeyPath) -> np.ndarray:
    """Return the tensor in one contiguous, native array."""
    pieces = list(tensors.pieces(key))
    array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return contiguous(array.astype(array.dtype.newbyteorder("="), copy=False))
