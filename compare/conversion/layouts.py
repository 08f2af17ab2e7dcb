"""How a tensor is laid out in torch and in Flax. A layout only reorders values."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..frameworks import Tensor, torch
from .errors import Shape
from .rearranged import rearrangement

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
ALL = (*PLAIN, "flatten:C,H,W", "permuted:2,0,1", "(h d) e -> e h d")


class Layout(NamedTuple):
    """The steps from a torch tensor to a Flax array.

    Reshape to `split`, permute by `axes`, flip the axes in `flipped`, reshape to `flax_shape`.
    """

    torch_shape: Shape
    split: Shape
    axes: Shape
    flipped: Shape
    flax_shape: Shape


def layout(name: str, flax_shape: Sequence[int]) -> Layout:
    """Return the named layout for a Flax array of this shape.

    | name | torch | Flax |
    | --- | --- | --- |
    | `same` | any | the same |
    | `transposed` | Linear: (out, in) | (in, out) |
    | `conv` | Conv: (out, in / groups, *window) | (*window, in / groups, out) |
    | `conv` | ConvTranspose: (in, out, *window) | `transpose_kernel=True`: (*window, out, in) |
    | `conv_transpose` | ConvTranspose: (in, out, *window) | (*window, in, out), mirrored |
    | `heads_in` | (heads * head_dim, embed) | (embed, heads, head_dim) |
    | `heads_out` | (embed, heads * head_dim) | (heads, head_dim, embed) |
    | `heads_bias` | (heads * head_dim,) | (heads, head_dim) |
    | `scalar` | (1,) | () |
    | `flatten:C,H,W` | Linear after flattened NCHW: (out, C*H*W) | flattened NHWC: (H*W*C, out) |
    | `permuted:2,0,1` | any | torch's axes in that order |
    | `(h d) e -> e h d` | left of the arrow | right of it: any pattern of einops' `rearrange` |

    In a pattern, `1` is an axis of length 1, and lengths that the Flax array does not show follow
    after commas: `o (c h w) -> (h w c) o, h=4, w=4`.
    The mirrored window of `conv_transpose` is the one of `transpose_kernel=False`.

    Raises:
        ValueError: the layout does not exist, or does not fit an array of this rank or size.
    """
    shape = tuple(int(size) for size in flax_shape)
    rank = len(shape)
    name, numbers = known_layout(name)
    if is_pattern(name):
        return _rearranged(name, shape)
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
            name,
            shape,
            sorted(numbers) == list(range(rank)),
            f"{len(numbers)} axes, each named once",
        )
        split = tuple(shape[numbers.index(axis)] for axis in range(rank))
        return Layout(split, split, numbers, (), shape)
    if name == "flatten":
        _need(name, shape, rank == 2 and prod(numbers) == shape[0], f"({prod(numbers)}, out)")
        spatial = tuple(range(2, 1 + len(numbers)))
        return Layout((shape[1], shape[0]), (shape[1], *numbers), (*spatial, 1, 0), (), shape)
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


def is_pattern(name: str) -> bool:
    """Return whether the layout is a pattern of axes."""
    return "->" in name


def is_one_of(name: str, kinds: Sequence[str]) -> bool:
    """Return whether the layout is of one of these kinds, or a pattern."""
    return is_pattern(name) or name.partition(":")[0] in kinds


def has_own_shape(name: str) -> bool:
    """Return whether the Flax shape does not follow from torch's, so that the mapping gives it."""
    return name.startswith("heads") or is_pattern(name)


def _rearranged(pattern: str, shape: Shape) -> Layout:
    axes = rearrangement(pattern)
    try:
        lengths = axes.lengths(axes.flax, shape)
    except ValueError as error:
        raise ValueError(f"the layout {pattern} {error}") from None
    torch_shape = tuple(prod(lengths[name] for name in axis) for axis in axes.torch)
    split = tuple(lengths[name] for name in axes.names)
    return Layout(torch_shape, split, axes.order, (), shape)


def known_layout(name: str) -> tuple[str, Shape]:
    """Split the name of a layout into its kind and its numbers.

    Raises:
        ValueError: the layout does not exist.
    """
    if not isinstance(name, str):
        raise ValueError(f"a layout is a name or a pattern: {name!r}")
    if is_pattern(name):
        rearrangement(name)
        return name, ()
    kind, colon, numbers = name.partition(":")
    if kind not in ("flatten", "permuted"):
        if colon or kind not in PLAIN:
            raise ValueError(f"there is no layout {name!r}; there are {', '.join(ALL)}")
        return kind, ()
    try:
        values = tuple(int(number) for number in numbers.split(","))
        if min(values) < (1 if kind == "flatten" else 0):
            raise ValueError
        return kind, values
    except ValueError:
        raise ValueError(
            f"{kind}: needs numbers, as in {' and '.join(ALL[-3:-1])}; got {numbers!r}"
        ) from None


def flax_shape(name: str, torch_shape: Shape) -> Shape:
    """Return the Flax shape of a torch tensor of this shape.

    Raises:
        ValueError: the Flax shape does not follow from torch's, for example with attention heads.
    """
    if is_pattern(name):
        axes = rearrangement(name)
        lengths = axes.lengths(axes.torch, torch_shape)
        return tuple(prod(lengths[name] for name in axis) for axis in axes.flax)
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
        f"the Flax shape of {name} does not follow from {torch_shape}; the mapping must give it"
    )


def to_flax(chosen: Layout, tensor: Any) -> Any:
    """Return the tensor or array in Flax's layout, as a view where possible."""
    permuted = _permute(tensor.reshape(chosen.split), chosen.axes)
    return _flip(permuted, chosen.flipped).reshape(chosen.flax_shape)


def to_torch(chosen: Layout, array: Any) -> Any:
    """Return the array or tensor in torch's layout; the inverse of `to_flax`."""
    permuted_shape = tuple(chosen.split[axis] for axis in chosen.axes)
    unflipped = _flip(array.reshape(permuted_shape), chosen.flipped)
    inverse = tuple(chosen.axes.index(axis) for axis in range(len(chosen.axes)))
    return _permute(unflipped, inverse).reshape(chosen.torch_shape)


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
        raise ValueError(f"the layout {name} needs an array {wanted}; this one is {shape}")
