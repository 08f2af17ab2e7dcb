"""Named tensors that can be written, and their shapes and dtypes, known before they are read."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal, NamedTuple

import numpy as np

from ..conversion.layer_facts import Facts
from ..conversion.mapping import KeyPath, StateMapping
from ..dtypes import DTYPES, numpy_dtype
from .blocks import contiguous

FileLayout = Literal["torch", "linen", "nnx"]

# The most bytes that an array may have. Axes of size 0 do not count.
_MAX_BYTES = 2**62


class Spec(NamedTuple):
    """Shape and dtype of one tensor, in the layout of its file."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """The size of its values in bytes."""
        return prod(self.shape) * self.numpy.itemsize

    @property
    def numpy(self) -> np.dtype:
        """The NumPy dtype."""
        return numpy_dtype(self.dtype)


def spec_of(array: np.ndarray) -> Spec:
    """Return the spec of an array.

    Raises:
        ValueError: checkpoints do not support the dtype.
    """
    return checked(tuple(map(int, array.shape)), array.dtype.name)


def checked(shape: object, dtype: object) -> Spec:
    """Return the spec for a shape and a dtype that a file declares.

    Raises:
        ValueError: checkpoints do not support the dtype, or no array can have the shape.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    if not isinstance(shape, list | tuple) or not all(
        type(size) is int and size >= 0 for size in shape
    ):
        raise ValueError(f"shape {shape} is not a list of sizes")
    if (
        len(shape) > 32
        or prod(size for size in shape if size) * numpy_dtype(str(dtype)).itemsize > _MAX_BYTES
    ):
        raise ValueError(f"shape {list(shape)} is larger than any array can be")
    return Spec(tuple(shape), str(dtype))


@dataclass(frozen=True)
class Tensors:
    """Named tensors that can be written, from memory or from another file.

    Attributes:
        layout: the framework whose names and shapes these are.
        specs: shape and dtype by path. A torch name is a path of one step.
        pieces: a function that returns the tensor of a path in consecutive pieces along its first
            axis. A piece may be a view with any strides.
        kinds: the kind of state of each tensor, where it is known.
        aliases: further names of tensors, each with the first name.
        mapping: how torch and Flax names pair, if that is known.
        layers: what each torch layer says besides its tensors, by name.
        in_memory: whether the values are in memory already.
        copies: how many times a tensor is in memory while its pieces are read: once, and once more
            for another dtype and for a layout that no view shows.
    """

    layout: FileLayout
    specs: Mapping[KeyPath, Spec]
    pieces: Callable[[KeyPath], Iterable[np.ndarray]]
    kinds: Mapping[KeyPath, str] = field(default_factory=dict)
    aliases: Mapping[KeyPath, KeyPath] = field(default_factory=dict)
    mapping: StateMapping | None = None
    layers: Mapping[str, Facts] = field(default_factory=dict)
    in_memory: bool = False
    copies: int = 1

    @property
    def largest_bytes(self) -> int:
        """The memory that reading the largest tensor takes."""
        return self.copies * max((spec.nbytes for spec in self.specs.values()), default=0)


def tensors_of(
    layout: FileLayout,
    arrays: Mapping[KeyPath, np.ndarray],
    kinds: Mapping[KeyPath, str] | None = None,
    aliases: Mapping[KeyPath, KeyPath] | None = None,
    mapping: StateMapping | None = None,
    layers: Mapping[str, Facts] | None = None,
) -> Tensors:
    """Return arrays in memory as tensors that can be written.

    Raises:
        ValueError: checkpoints do not support a dtype.
    """

    def pieces(path: KeyPath) -> Iterable[np.ndarray]:
        return [arrays[path]]

    specs = {path: spec_of(array) for path, array in arrays.items()}
    return Tensors(
        layout, specs, pieces, kinds or {}, aliases or {}, mapping, layers or {}, in_memory=True
    )


def with_copies(tensors: Tensors) -> Tensors:
    """Return torch tensors with a copy under each further name, and the names still tied.

    The other layouts are returned as they are.
    """
    if tensors.layout != "torch" or not tensors.aliases:
        return tensors
    copies = {key: first for key, first in tensors.aliases.items() if first in tensors.specs}
    specs = {**tensors.specs, **{key: tensors.specs[first] for key, first in copies.items()}}
    kinds = {key: tensors.kinds[first] for key, first in copies.items() if first in tensors.kinds}
    return replace(
        tensors,
        specs=specs,
        kinds={**tensors.kinds, **kinds},
        pieces=lambda path: tensors.pieces(copies.get(path, path)),
    )


def whole(tensors: Tensors, key: KeyPath) -> np.ndarray:
    """Return the tensor as one contiguous array in native byte order."""
    pieces = list(tensors.pieces(key))
    array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return contiguous(array.astype(array.dtype.newbyteorder("="), copy=False))
