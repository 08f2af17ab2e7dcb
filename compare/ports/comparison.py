"""Which values of two runs match, and from which the ones without a match come."""

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np

from .fingerprints import Fingerprints, all_close, close_rows, same_size, same_value, sizes
from .stacks import stacks
from .values import Trace, Value

Place = tuple[str, int]  # a file and the number of a line
RightPlaces = dict[tuple[Place, ...], list[tuple[int, tuple[Place, ...]]]]
VIEWS = ("expand", "broadcast", "view", "reshape", "transpose", "permute", "squeeze", "clone")
_FILLED = ("zeros", "ones", "full", "copy", "convert", "select", "slice", "index")
_SAME = {
    "select_n": "where",
    "logistic": "sigmoid",
    "multiply": "mul",
    "dot_general": "mm",
    "addmm": "mm",
    "bmm": "mm",
    "clone": "copy",
    "zeros_like": "zeros",
}


def _is_uniform(value: Value) -> bool:
    array = value.array
    return value.is_whole and array.size > 1 and bool((array == array.flat[0]).all())


def _may_be_one(one: Value, other: Value) -> bool:
    """Return whether two values of one number each may be made by the same statement."""
    first, second = (plain_name(value.operation) for value in (one, other))
    return first == second or all(
        not name or any(step in name for step in (*VIEWS, *_FILLED)) for name in (first, second)
    )


def plain_name(operation: str) -> str:
    """Return the name of an operation that both frameworks have."""
    name = operation.removeprefix("aten.").partition(".")[0].rstrip("_")
    return _SAME.get(name, name)


class Comparison:
    """Which values of the torch run and of the Flax run match.

    Args:
        torch: the values of the torch run.
        flax: those of the Flax run.
    """

    def __init__(self, torch: Trace, flax: Trace) -> None:
        self.traces = (torch, flax)
        parts = self._with_stacks()
        self.prints = (Fingerprints(torch.values), Fingerprints(flax.values))
        self.matches: tuple[list[list[int]], list[list[int]]] = (
            [[] for _ in torch.values],
            [[] for _ in flax.values],
        )
        # Of each value, those of the other side with its entries in an order that differs.
        self.shuffled: tuple[dict[int, list[int]], dict[int, list[int]]] = ({}, {})
        for candidate, index in self._candidates():
            self.matches[0][candidate].append(index)
            self.matches[1][index].append(candidate)
        for side in (0, 1):
            self._drop_lone_repeats(side)
            for stack, indices in parts[side].items():
                for index in indices:
                    self.matches[side][index] += self.matches[side][stack]
        self.found: tuple[list[int], list[int]] = ([], [])
        self.end = (0, 0)
        self.is_made_of_both = False

    def _with_stacks(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """Add the stacks of values that loops make; return the parts of each."""
        lengths = [
            {length for value in trace.values for length in value.array.shape}
            for trace in self.traces
        ]
        made = [list(stacks(self.traces[side].values, lengths[1 - side])) for side in (0, 1)]
        parts: tuple[dict[int, list[int]], dict[int, list[int]]] = ({}, {})
        for side in (0, 1):
            for value, indices in made[side]:
                parts[side][self.traces[side].add(value)] = indices
        return parts

    def _candidates(self) -> Iterator[tuple[int, int]]:
        """Yield pairs of values that match.

        Where another value of the same sizes has the same entries in another order, a value of
        other sizes is no match: the entries then lie in another order here.
        """
        torch, flax = self.traces
        pairs: list[tuple[int, int]] = []
        odd: tuple[set[int], set[int]] = (set(), set())
        even: tuple[set[int], set[int]] = (set(), set())
        for index, value in enumerate(flax.values):
            if not value.array.size:
                continue
            for near in np.flatnonzero(close_rows(self.prints[0].rows, self.prints[1].rows[index])):
                candidate = int(near)
                one, other = torch.values[candidate], value
                if _is_uniform(one) and _is_uniform(other) and not _may_be_one(one, other):
                    continue
                is_few = bool(self.prints[1].is_few[index] or self.prints[0].is_few[candidate])
                is_whole = one.is_whole and other.is_whole
                same = same_value if is_whole else same_size
                is_same = same(one.array, other.array, is_few=is_few)
                if is_same:
                    pairs.append((candidate, index))
                if sizes(one.array) == sizes(other.array) and not is_few:
                    for side, place, partner in ((0, candidate, index), (1, index, candidate)):
                        (even if is_same else odd)[side].add(place)
                        if not is_same:
                            self.shuffled[side].setdefault(place, []).append(partner)
        dropped = [odd[side] - even[side] for side in (0, 1)]
        for candidate, index in pairs:
            if candidate not in dropped[0] and index not in dropped[1]:
                yield candidate, index

    def is_turned(self, side: int, index: int) -> bool:
        """Return whether the value is one of the other side with axes of one size exchanged."""
        values, others = self.traces[side].values, self.traces[1 - side].values
        array = values[index].array.squeeze()
        same = [
            others[partner].array.squeeze()
            for partner in self.matches[side][index]
            if others[partner].array.squeeze().shape == array.shape and others[partner].is_whole
        ]
        repeated = len(set(array.shape)) < array.ndim and values[index].is_whole
        return repeated and bool(same) and not any(all_close(one, array) for one in same)

    def _drop_lone_repeats(self, side: int) -> None:
        """Let a value that repeats others match only one of its size, unless it is a mere view."""
        values, others = self.traces[side].values, self.traces[1 - side].values
        for index, partners in enumerate(self.matches[side]):
            value = values[index]
            if not partners or any(step in value.operation for step in VIEWS):
                continue
            largest = max(others[partner].array.size for partner in partners)
            if largest < value.array.size and value.operation:
                self.matches[side][index] = []

    @cached_property
    def right_places(self) -> tuple[RightPlaces, RightPlaces]:
        """From where the lines of values that match were reached.

        For each line, and each with some of its callers: the indices of such values, and the
        callers beyond.
        """
        both: tuple[RightPlaces, RightPlaces] = ({}, {})
        for side in (0, 1):
            for index, value in enumerate(self.traces[side].values):
                if value.lines and value.depends and self.matches[side][index]:
                    places = tuple((line.file, line.line) for line in value.lines)
                    for depth in range(len(places)):
                        key, beyond = places[: depth + 1], places[depth + 1 :]
                        both[side].setdefault(key, []).append((index, beyond))
        return both

    def is_opposite(self, side: int, index: int) -> bool:
        """Return whether the value is a mask of which the other side has the opposite."""
        array = self.traces[side].values[index].array
        if array.dtype != bool or self.matches[side][index]:
            return False
        masks = (other.array for other in self.traces[1 - side].values)
        return any(
            np.array_equal(~array.squeeze(), mask.squeeze())
            if array.squeeze().shape == mask.squeeze().shape
            else same_value(~array, mask, is_few=True)
            for mask in masks
            if mask.dtype == bool and mask.size == array.size
        )

    def is_matched(self, side: int, index: int) -> bool:
        """Return whether the value has a match, or depends on neither inputs nor state."""
        return bool(self.matches[side][index]) or not self.traces[side].values[index].depends

    def sources(self, side: int, ends: Iterable[int]) -> tuple[list[int], set[int]]:
        """Return the unmatched values from which the ends come, and of which all parents match.

        Also return all unmatched values from there to the ends.
        """
        values = self.traces[side].values
        opened = [index for index in ends if not self.is_matched(side, index)]
        seen, found = set(opened), []
        while opened:
            index = opened.pop()
            unmatched = [one for one in values[index].parents if not self.is_matched(side, one)]
            opposite = {one for one in unmatched if self.is_opposite(side, one)}
            unmatched = [one for one in unmatched if one not in opposite]
            seen |= opposite
            if not unmatched:
                found.append(index)
            for parent in unmatched:
                if parent not in seen:
                    seen.add(parent)
                    opened.append(parent)
        return sorted(found), seen
