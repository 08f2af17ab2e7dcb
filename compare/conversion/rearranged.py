"""Layouts written as a pattern of axes, as einops writes them: "(heads dim) e -> e heads dim".

Source of the notation: https://einops.rocks/api/rearrange
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, combinations
from math import prod
from typing import NamedTuple

from .errors import Shape

_AXIS = re.compile(r"\(([^()]*)\)|([^\s()]+)")
_NAME = re.compile(r"[A-Za-z_]\w*")
_SIZES = re.compile(r"([A-Za-z_]\w*)=([1-9]\d{0,17})")
_MAX_AXES = 6  # the patterns of more are too many to try
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

Axes = tuple[tuple[str, ...], ...]  # the names in each axis, from the outermost


class Rearrangement(NamedTuple):
    """The axes of a pattern, on both sides of its arrow.

    Attributes:
        torch: the names in each axis of the torch tensor; none in an axis of length 1.
        flax: the same of the Flax array.
        sizes: the lengths that the pattern states.
    """

    torch: Axes
    flax: Axes
    sizes: Mapping[str, int]

    @property
    def names(self) -> tuple[str, ...]:
        """The names in torch's order."""
        return tuple(chain(*self.torch))

    @property
    def order(self) -> Shape:
        """The positions in torch's order, of the names in Flax's."""
        return tuple(self.names.index(name) for name in chain(*self.flax))

    def lengths(self, axes: Axes, shape: Sequence[int]) -> dict[str, int]:
        """Return the length of each name, from the shape of one side.

        Raises:
            ValueError: the shape does not fit, or does not show a length.
        """
        text = " ".join(map(_axis_text, axes)) or "()"
        if len(shape) != len(axes):
            raise ValueError(f"needs an array {text}; this one is {tuple(shape)}")
        lengths = dict(self.sizes)
        for axis, length in zip(axes, shape, strict=True):
            unknown = [name for name in axis if name not in lengths]
            known = prod(lengths[name] for name in axis if name in lengths)
            if len(unknown) > 1:
                raise ValueError(
                    f"does not show the length of {unknown[0]}: write it after the pattern, "
                    f'", {unknown[0]}=…"'
                )
            if unknown and known and length % known == 0:
                lengths[unknown[0]] = length // known
            elif unknown or known != length:
                raise ValueError(f"needs an array {text}; this one is {tuple(shape)}")
        return lengths


@lru_cache(maxsize=1000)
def rearrangement(pattern: str) -> Rearrangement:
    """Return what the pattern says.

    Raises:
        ValueError: it is no pattern, or its two sides have different names.
    """
    axes_text, *stated = (part.strip() for part in pattern.split(","))
    sides = axes_text.split("->")
    if len(sides) != 2:
        raise ValueError(f'{pattern!r} is no pattern; write it as "(h d) e -> e h d"')
    torch, flax = (_axes(side, pattern) for side in sides)
    sizes: dict[str, int] = {}
    for text in stated:
        fit = _SIZES.fullmatch(text)
        if not fit or fit[1] not in chain(*torch) or fit[1] in sizes:
            raise ValueError(f"{pattern!r}: {text!r} is not the length of one of its axes")
        sizes[fit[1]] = int(fit[2])
    names = [*chain(*torch)]
    if len({*names}) < len(names) or sorted(names) != sorted(chain(*flax)):
        raise ValueError(f"{pattern!r}: each name must be once on both sides of the arrow")
    return Rearrangement(torch, flax, sizes)


def _axes(side: str, pattern: str) -> Axes:
    axes = []
    if _AXIS.sub("", side).strip():
        raise ValueError(f"{pattern!r}: {side.strip()!r} has a bracket that does not close")
    for group, single in _AXIS.findall(side):
        names = tuple(group.split()) if not single else () if single == "1" else (single,)
        if wrong := [name for name in names if not _NAME.fullmatch(name)]:
            raise ValueError(f"{pattern!r}: {wrong[0]!r} is no name of an axis")
        axes.append(names)
    return tuple(axes)


def _axis_text(axis: Sequence[str]) -> str:
    return axis[0] if len(axis) == 1 else f"({' '.join(axis)})" if axis else "1"


def text(torch: Axes, flax: Axes) -> str:
    """Return the pattern of these axes."""
    return " -> ".join(" ".join(map(_axis_text, axes)) for axes in (torch, flax))


def of_bias(pattern: str, outputs_axis: int = 0) -> str | None:
    """Return the pattern of the bias beside a kernel of this pattern, or None if it has none.

    The bias has the axes of the outputs, which are one axis of torch's weight.
    """
    found = rearrangement(pattern)
    torch = found.torch[outputs_axis : outputs_axis + 1]
    outputs = {*chain(*torch)}
    flax = tuple(axis for axis in found.flax if {*axis} & outputs)
    if not outputs or not all({*axis} <= outputs for axis in flax):
        return None
    sizes = "".join(f", {name}={size}" for name, size in found.sizes.items() if name in outputs)
    return text(torch, flax) + sizes


def without_ones(torch_shape: Sequence[int], flax_shape: Sequence[int]) -> str | None:
    """Return the pattern of two shapes that are the same but for axes of length 1, or None."""
    sizes = [size for size in torch_shape if size != 1]
    if sizes != [size for size in flax_shape if size != 1] or len(sizes) > len(_LETTERS):
        return None
    sides = []
    for shape in (torch_shape, flax_shape):
        following = iter(_LETTERS)
        sides.append(tuple((next(following),) if size != 1 else () for size in shape))
    return text(*sides)


def fitting(torch_shape: Sequence[int], flax_shape: Sequence[int]) -> Iterator[str]:
    """Yield the patterns in which a torch tensor becomes an array of more axes.

    Each of torch's axes holds one or more of Flax's, in any order that Flax's names allow.
    """
    if len(flax_shape) > _MAX_AXES:
        return
    names = tuple(_LETTERS[: len(flax_shape)])
    lengths = dict(zip(names, flax_shape, strict=True))

    def axes(rest: tuple[str, ...], sizes: Sequence[int]) -> Iterator[Axes]:
        if not sizes:
            if not rest:
                yield ()
            return
        for count in range(1, len(rest) - len(sizes) + 2):
            for chosen in combinations(rest, count):
                if prod(lengths[name] for name in chosen) == sizes[0]:
                    others = tuple(name for name in rest if name not in chosen)
                    for following in axes(others, sizes[1:]):
                        yield (chosen, *following)

    for torch in axes(names, tuple(torch_shape)):
        yield text(torch, tuple((name,) for name in names))
