"""How one tensor lies in torch and in Flax: each layout is a reordering, so that no value ever changes."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import Shape

PLAIN = (
    "same",
    "transposed",
    "conv",
    "conv_transpose",
    "heads_in",
    "heads_out",
    "heads_bias",
    "scalar",
)
ALL = (*PLAIN, "flatten:C,H,W", "permuted:2,0,1")


class Layout(NamedTuple):
    """torch tensor -> reshape to `split` -> permute by `axes` -> flip `flipped` -> reshape to the Flax shape."""

    torch_shape: Shape
    split: Shape
    axes: Shape
    flipped: Shape
    flax_shape: Shape


def layout(name: str, flax_shape: Sequence[int]) -> Layout:
    """Return the layout of that name for a Flax array of that shape.

    | name | torch | Flax |
    | --- | --- | --- |
    | `same` | any | the same |
    | `transposed` | Linear: (out, in) | (in, out) |
    | `conv` | Conv: (out, in / groups, *window); ConvTranspose: (in, out, *window) | (*window, last two exchanged) |
    | `conv_transpose` | ConvTranspose: (in, out, *window) | `transpose_kernel=False`: (*window, in, out), mirrored |
    | `heads_in` | (heads * head_dim, embed) | (embed, heads, head_dim) |
    | `heads_out` | (embed, heads * head_dim) | (heads, head_dim, embed) |
    | `heads_bias` | (heads * head_dim,) | (heads, head_dim) |
    | `scalar` | (1,) | () |
    | `flatten:C,H,W` | Linear after flattening NCHW: (out, C*H*W) | after flattening NHWC: (H*W*C, out) |
    | `permuted:2,0,1` | any | torch's axes in that order |

    Raises:
        ValueError: no such layout, or one that an array of this rank or size cannot have.
    """
    shape = tuple(int(size) for size in flax_shape)
    rank = len(shape)
    name, given = known_layout(name)
    if name == "same":
        return Layout(shape, shape, tuple(range(rank)), (), shape)
    if name == "scalar":
        _need(name, shape, rank == 0, "()")
        return Layout((1,), (1,), (0,), (), shape)
    if name == "heads_bias":
        _need(name, shape, rank == 2, "(heads, head_dim)")
        return Layout((prod(shape),), shape, (0, 1), (), shape)
    if name == "permuted":
        _need(
            name, shape, sorted(given) == list(range(rank)), f"{len(given)} axes, each named once"
        )
        split = tuple(shape[given.index(axis)] for axis in range(rank))
        return Layout(split, split, given, (), shape)
    if name == "flatten":
        _need(name, shape, rank == 2 and prod(given) == shape[0], f"({prod(given)}, out)")
        spatial = tuple(range(2, 1 + len(given)))
        return Layout((shape[1], shape[0]), (shape[1], *given), (*spatial, 1, 0), (), shape)
    if name == "transposed":
        _need(name, shape, rank == 2, "(in, out)")
        return Layout(shape[::-1], shape[::-1], (1, 0), (), shape)
    if name == "heads_in":
        _need(name, shape, rank == 3, "(embed, heads, head_dim)")
        return Layout(
            (shape[1] * shape[2], shape[0]), (shape[1], shape[2], shape[0]), (2, 0, 1), (), shape
        )
    if name == "heads_out":
        _need(name, shape, rank == 3, "(heads, head_dim, embed)")
        return Layout(
            (shape[2], shape[0] * shape[1]), (shape[2], shape[0], shape[1]), (1, 2, 0), (), shape
        )
    _need(name, shape, 3 <= rank <= 5, "(*window, features, features)")
    window = tuple(range(2, rank))
    mirrored = name == "conv_transpose"
    axes = (*window, 0, 1) if mirrored else (*window, 1, 0)
    split = tuple(shape[axes.index(axis)] for axis in range(rank))
    return Layout(split, split, axes, tuple(range(rank - 2)) if mirrored else (), shape)


def known_layout(name: str) -> tuple[str, Shape]:
    """Return the layout's kind and its numbers.

    Raises:
        ValueError: there is no such layout.
    """
    kind, colon, numbers = name.partition(":")
    if kind not in ("flatten", "permuted"):
        if colon or kind not in PLAIN:
            raise ValueError(f"there is no layout {name!r}; there are {', '.join(ALL)}")
        return kind, ()
    try:
        found = tuple(int(number) for number in numbers.split(","))
        if min(found) < (kind == "flatten"):
            raise ValueError
        return kind, found
    except ValueError:
        raise ValueError(
            f"{kind}: needs numbers, as in {' and '.join(ALL[-2:])}; got {numbers!r}"
        ) from None


def flax_shape(name: str, torch_shape: Shape) -> Shape:
    """Return the shape that a torch tensor of that shape has in Flax.

    Raises:
        ValueError: a layout whose Flax shape does not follow from torch's, as that of heads.
    """
    kind = name.partition(":")[0]
    if kind == "same":
        return torch_shape
    if kind == "scalar":
        return ()
    if kind in ("transposed", "conv") and len(torch_shape) >= 2:
        return (*torch_shape[2:], torch_shape[1], torch_shape[0])
    if kind == "flatten" and len(torch_shape) == 2:
        return torch_shape[::-1]
    if kind == "conv_transpose" and len(torch_shape) >= 3:
        return (*torch_shape[2:], torch_shape[0], torch_shape[1])
    raise ValueError(
        f"the Flax shape of {name} does not follow from {torch_shape}; the mapping has to say it"
    )


def to_flax(chosen: Layout, tensor: Any) -> Any:
    """Return the torch tensor, or NumPy array in torch's layout, as Flax lays it: a view where that is possible."""
    found = _permute(tensor.reshape(chosen.split), chosen.axes)
    return _flip(found, chosen.flipped).reshape(chosen.flax_shape)


def to_torch(chosen: Layout, array: Any) -> Any:
    """Return the array, or tensor in Flax's layout, as torch lays it; the inverse of `to_flax`."""
    found = _flip(array.reshape(tuple(chosen.split[axis] for axis in chosen.axes)), chosen.flipped)
    inverse = tuple(chosen.axes.index(axis) for axis in range(len(chosen.axes)))
    return _permute(found, inverse).reshape(chosen.torch_shape)


def _permute(values: Any, axes: Shape) -> Any:
    return values.permute(axes) if isinstance(values, Tensor) else values.transpose(axes)


def _flip(values: Any, axes: Shape) -> Any:
    if not axes:
        return values
    if not isinstance(values, Tensor):
        return np.flip(values, axes)
    if values.element_size() > 1:
        return torch.flip(values, axes)
    return torch.flip(values.view(torch.uint8), axes).view(values.dtype)  # torch cannot flip float8


def _need(name: str, shape: Shape, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(f"the layout {name} is of an array {wanted}; this one is {shape}")
