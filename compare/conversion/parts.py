"""Parts of one torch tensor, each of which is a Flax array of its own: a fused projection."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import gcd
from typing import Any, NamedTuple

import numpy as np

from ..frameworks import Tensor, torch
from .errors import Shape


class Split(NamedTuple):
    """How `compare.match` splits a tensor: a rule of `split`.

    The lengths of the parts follow from the Flax arrays, so they need not be equal.

    Attributes:
        parts: the Flax names of the parts, in their order.
        axis: the torch axis that is split. Default: the axis of the outputs, which is the last of
            transformers' Conv1D and otherwise the first.
        groups: how often the parts repeat along the axis: 1 where each part lies in one piece, as
            in GPT-2; the number of heads where they alternate head by head, as in GPT-NeoX and
            BLOOM; the number of key heads in InternLM2, where a group is some queries, one key and
            one value.
    """

    parts: Sequence[str]
    axis: int | None = None
    groups: int = 1


@dataclass(frozen=True)
class Part:
    """Which part of a torch tensor a Flax array is.

    Attributes:
        index: the number of the part.
        sizes: the lengths of all parts, as their smallest ratio: (4, 1, 1).
        axis: the torch axis along which the parts lie: 0, or -1 for the last.
        groups: how often the parts repeat along it.
    """

    index: int
    sizes: tuple[int, ...]
    axis: int = 0
    groups: int = 1

    def __str__(self) -> str:
        """Return `[0/3]`, with what is not usual: `[0 of 4:1:1, axis -1, in 8 groups]`."""
        is_equal = len({*self.sizes}) == 1
        sizes = f"/{len(self.sizes)}" if is_equal else f" of {':'.join(map(str, self.sizes))}"
        axis = f", axis {self.axis}" if self.axis else ""
        groups = f", in {self.groups} groups" if self.groups > 1 else ""
        return f"[{self.index}{sizes}{axis}{groups}]"

    @property
    def count(self) -> int:
        """The number of parts."""
        return len(self.sizes)

    @property
    def lies_in_pieces(self) -> bool:
        """Whether the tensor's memory is that of one part after another."""
        return self.axis == 0 and self.groups == 1

    def shape_in(self, whole: Sequence[int]) -> Shape:
        """Return the shape of the part of a tensor with this shape.

        Raises:
            ValueError: the axis cannot be divided so.
        """
        shape = list(whole)
        length = shape[self.axis] if shape else 0
        if not shape or length % (self.groups * sum(self.sizes)):
            raise ValueError(f"{self._division()}: it is {tuple(shape)}")
        shape[self.axis] = length // sum(self.sizes) * self.sizes[self.index]
        return tuple(shape)

    def _division(self) -> str:
        is_equal = len({*self.sizes}) == 1
        which = {0: "first", -1: "last"}[self.axis]
        sizes = "equal parts" if is_equal else f"parts of {' : '.join(map(str, self.sizes))}"
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"its {which} axis has no {self.count} {sizes}{groups}"

    def shape_of_whole(self, part: Sequence[int]) -> Shape:
        """Return the shape of the tensor whose part has this shape.

        Raises:
            ValueError: no tensor has such a part.
        """
        shape = list(part)
        size = self.groups * self.sizes[self.index]
        if not shape or shape[self.axis] % size:
            raise ValueError(f"is no part {self} of a tensor: it is {tuple(shape)}")
        shape[self.axis] = shape[self.axis] // self.sizes[self.index] * sum(self.sizes)
        return tuple(shape)

    def of(self, tensor: Any) -> Any:
        """Return this part of a tensor or array: a view, where it lies in one piece.

        Raises:
            ValueError: the axis cannot be divided so.
        """
        shape = self.shape_in(tensor.shape)
        axis = self.axis % len(shape)
        unit = tensor.shape[axis] // (self.groups * sum(self.sizes))
        begin = sum(self.sizes[: self.index]) * unit
        length = tensor.shape[axis] // self.groups
        grouped = tensor.reshape(*shape[:axis], self.groups, length, *shape[axis + 1 :])
        taken = (slice(None),) * (axis + 1) + (slice(begin, begin + self.sizes[self.index] * unit),)
        return grouped[taken].reshape(shape)

    def join(self, parts: Sequence[Any]) -> Any:
        """Return the tensor or array of all its parts, in their order.

        Raises:
            ValueError: their shapes are not those of the parts of one tensor.
        """
        shape = self.shape_of_whole(parts[self.index].shape)
        shapes = [tuple(part.shape) for part in parts]
        if shapes != [replace(self, index=i).shape_in(shape) for i in range(self.count)]:
            raise ValueError(f"its parts imply different shapes: {' and '.join(map(str, shapes))}")
        axis = self.axis % len(shape)
        grouped = [
            part.reshape(
                *shape[:axis], self.groups, part.shape[axis] // self.groups, *shape[axis + 1 :]
            )
            for part in parts
        ]
        is_torch = isinstance(grouped[0], Tensor)
        joined = torch.cat(grouped, axis + 1) if is_torch else np.concatenate(grouped, axis + 1)
        return joined.reshape(shape)

    def as_json(self) -> Any:
        """Return `[index, count]` for equal parts along the first axis; otherwise a dict."""
        if self == equal_part(self.index, self.count):
            return [self.index, self.count]
        return asdict(self)


_FIELDS = [field.name for field in fields(Part)]


def as_split(rule: Sequence[str] | Mapping[str, Any] | Split) -> Split:
    """Return the rule: a list of names, or a `Split`, which JSON has as an object.

    Raises:
        ValueError: it is none.
    """
    wrong = f"split: {rule!r} is no list of Flax names, nor compare.Split(names, axis, groups)"
    if isinstance(rule, Mapping):
        if not {"parts"} <= rule.keys() <= {*Split._fields}:
            raise ValueError(wrong)
        rule = Split(**rule)
    split = rule if isinstance(rule, Split) else Split(rule)
    are_names = isinstance(split.parts, list | tuple) and all(
        isinstance(name, str) for name in split.parts
    )
    is_place = split.axis is None or type(split.axis) is int
    if not are_names or not split.parts or not is_place:
        raise ValueError(wrong)
    if type(split.groups) is not int or split.groups < 1:
        raise ValueError(f"split: groups is {split.groups!r}; expected a positive integer")
    return split


def equal_part(index: int, count: int) -> Part:
    """Return one of so many equal parts along the first axis."""
    return Part(index, (1,) * count)


def parts_of_sizes(sizes: Sequence[int], axis: int, groups: int) -> list[Part]:
    """Return the parts whose arrays have these numbers of elements.

    Raises:
        ValueError: one of them is empty.
    """
    if not all(sizes):
        raise ValueError("a part of it is empty in Flax, which does not say how long the parts are")
    divisor = gcd(*sizes)
    ratio = tuple(size // divisor for size in sizes)
    return [Part(index, ratio, axis, groups) for index in range(len(sizes))]


def part_from_json(content: Any) -> Part | None:
    """Return the part that `Part.as_json` returned as JSON data.

    Raises:
        ValueError: it is none.
    """
    if content is None or isinstance(content, Part):
        return content
    if isinstance(content, list | tuple) and len(content) == 2:
        index, count = content
        if type(index) is int and type(count) is int and 0 <= index < count:
            return equal_part(index, count)
    if isinstance(content, dict) and content.keys() == {*_FIELDS}:
        index, sizes, axis, groups = (content[name] for name in _FIELDS)
        are_sizes = isinstance(sizes, list | tuple) and all(
            type(size) is int and size > 0 for size in sizes
        )
        is_place = type(index) is int and type(groups) is int and groups > 0
        is_place = is_place and type(axis) is int and axis in (0, -1)
        if are_sizes and is_place and 0 <= index < len(sizes):
            return Part(index, tuple(sizes), axis, groups)
    raise ValueError(
        f"the part {content}; expected [i, n] with 0 <= i < n, or its index, sizes, axis and groups"
    )
