"""Find where the values of two runs part first: walk back from the outputs to what has no match."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from .fingerprints import Fingerprints, all_close, close_rows, same_value, sizes
from .places import between, built_at, returned_after
from .relations import Related, related
from .report import Divergence, SourceLine
from .values import Trace, Value

_MAX_LINES, _MAX_LAST, _MAX_PAIRS, _MAX_FIRST = 3, 3, 40, 6
_NONE: Mapping[str, frozenset[str]] = {}
_TELLING = 0.2  # the rank of relations that are no chance
_BROADCASTS = ("expand", "broadcast", "view", "reshape", "transpose", "permute", "squeeze")
_FILLED = ("zeros", "ones", "full", "copy", "convert", "select", "slice", "index")
_SCALES = ("mul", "div", "truediv", "divide", "multiply")


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
    return array.size > 1 and bool((array == array.flat[0]).all())


def _may_be_one(one: Value, other: Value) -> bool:
    """Return whether two values of one number each may be made by the same statement."""
    first, second = (_plain(value.operation) for value in (one, other))
    return first == second or all(
        not name or any(step in name for step in (*_BROADCASTS, *_FILLED))
        for name in (first, second)
    )


def _plain(operation: str) -> str:
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
        self.found: tuple[list[int], list[int]] = ([], [])
        self.end = (0, 0)
        self.is_made_of_both = False

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
                is_same = same_value(one.array, other.array, is_few=is_few)
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
            if others[partner].array.squeeze().shape == array.shape
        ]
        repeated = len(set(array.shape)) < array.ndim
        return repeated and bool(same) and not any(all_close(one, array) for one in same)

    def _drop_lone_repeats(self, side: int) -> None:
        """Let a value that repeats others match only one of its size, unless it is a mere view."""
        values, others = self.traces[side].values, self.traces[1 - side].values
        for index, partners in enumerate(self.matches[side]):
            value = values[index]
            if not partners or any(step in value.operation for step in _BROADCASTS):
                continue
            largest = max(others[partner].array.size for partner in partners)
            if largest < value.array.size and value.operation:
                self.matches[side][index] = []

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
            if not unmatched:
                found.append(index)
            for parent in unmatched:
                if parent not in seen:
                    seen.add(parent)
                    opened.append(parent)
        return sorted(found), seen


def first_divergence(
    torch: Trace, flax: Trace, what: str = "outputs", suspects: Mapping[str, frozenset[str]] = _NONE
) -> Divergence:
    """Return the lines where the runs part first.

    Args:
        torch: the values of the torch run, with its outputs.
        flax: those of the Flax run, with outputs of the same names.
        what: what the outputs are.
        suspects: arguments of layers that are known to differ, by the last step of their names.
    """
    compared = Comparison(torch, flax)
    ends = _parting(compared)
    found, walked = zip(
        *(compared.sources(side, [pair[side] for pair in ends]) for side in (0, 1)), strict=True
    )
    compared.found = (found[0], found[1])
    compared.end = (ends[0][0], ends[0][1]) if ends else (0, 0)
    pair, relation = _best_pair(compared, found, walked)
    hint = relation.hint if relation else _of_parents(compared, found, walked)
    compared.is_made_of_both = relation is None and bool(hint)
    lines = tuple(
        _near_lines(
            compared,
            side,
            _lines(
                compared, side, found[side], walked[side], pair[side] if pair else None, relation
            ),
            suspects,
        )
        for side in (0, 1)
    )
    return Divergence(what, lines[0], lines[1], _last_equal(compared, found), hint)


def _parting(compared: Comparison) -> list[tuple[int, int]]:
    """Return the outputs that differ, as pairs of indices; all of them if none does."""
    torch, flax = compared.traces
    pairs = list(zip(torch.outputs.values(), flax.outputs.values(), strict=False))
    parted = [pair for pair in pairs if pair[1] not in compared.matches[0][pair[0]]]
    return parted or pairs


def _best_pair(
    compared: Comparison, found: Sequence[Sequence[int]], walked: Sequence[set[int]]
) -> tuple[tuple[int, int] | None, Related | None]:
    """Return the two unmatched values that are the likeliest one statement, and their relation."""
    torch, flax = (trace.values for trace in compared.traces)
    later = [_near(compared, side, found[side], walked[side]) for side in (0, 1)]
    for ours, theirs in ((found[0], found[1]), (later[0], later[1])):
        best: tuple[float, tuple[int, int], Related] | None = None
        for rank, one in enumerate(ours[:_MAX_PAIRS]):
            for other_rank, other in enumerate(theirs[:_MAX_PAIRS]):
                relation = related(torch[one].array, flax[other].array)
                if relation is None:
                    continue
                score = relation.rank + 0.05 * (rank + other_rank)
                if best is None or score < best[0]:
                    best = score, (one, other), relation
        if best is not None:
            return best[1], best[2]
    return None, None


def _of_parents(
    compared: Comparison, found: Sequence[Sequence[int]], walked: Sequence[set[int]]
) -> str:
    """Return how a value without a partner is made of one that both sides have."""
    for side, name, other in ((1, "Flax", "torch"), (0, "torch", "Flax")):
        if not found[side]:
            continue
        values = compared.traces[side].values
        for index, ancestors in _first_values(compared, side, found[side][0], walked[side]):
            for ancestor in ancestors:
                relation = related(values[ancestor].array, values[index].array)
                if relation is not None and relation.rank <= _TELLING:
                    what = relation.hint.replace("torch's", "one that both have,")
                    what = what.replace("Flax's value", f"{name}'s value")
                    return f"{what} {other} has no such value."
    return ""


def _first_values(
    compared: Comparison, side: int, first: int, walked: set[int]
) -> Iterator[tuple[int, list[int]]]:
    """Yield the first unmatched values, with the matched ones that they are made of."""
    values = compared.traces[side].values
    made_of: dict[int, list[int]] = {}
    for index in sorted(index for index in walked if index >= first)[:_MAX_FIRST]:
        ancestors: dict[int, None] = {}
        for parent in values[index].parents:
            if compared.matches[side][parent]:
                ancestors[parent] = None
            ancestors |= dict.fromkeys(made_of.get(parent, []))
        made_of[index] = list(ancestors)
        yield index, made_of[index]


def _near(compared: Comparison, side: int, found: Sequence[int], walked: set[int]) -> list[int]:
    """Return the sources and the unmatched values that come of them, in their order."""
    first = min(found, default=0)
    return sorted(index for index in walked if index >= first)


def _lines(
    compared: Comparison,
    side: int,
    found: Sequence[int],
    walked: set[int],
    paired: int | None,
    relation: Related | None,
) -> tuple[SourceLine, ...]:
    """Return the lines of one side, the likeliest first."""
    values = compared.traces[side].values
    order = list(found) or [compared.end[side]]
    if paired is not None:
        order = [paired, *order] if relation is not None and relation.is_sure else [*order, paired]
        if relation is not None and relation.is_scale:
            order = [*_scaling(values, walked, paired), *order]
    order = [*_turned(compared, side, found), *order, *_misplaced(compared, side, found)]
    for index in compared.found[1 - side][:1]:  # the statement that has its entries in order
        order = [*sorted(compared.shuffled[1 - side].get(index, []))[:1], *order]
    for index in list(order):
        order += _constants(compared, side, index)
    return tuple(distinct_lines(compared.traces[side], order))


def _near_lines(
    compared: Comparison,
    side: int,
    lines: Sequence[SourceLine],
    suspects: Mapping[str, frozenset[str]],
) -> tuple[SourceLine, ...]:
    """Return the lines with those near them that may be the place, the likeliest first."""
    if not lines:
        return ()
    values = compared.traces[side].values
    first, *rest = lines
    built = built_at(first, frozenset().union(*suspects.values()))
    sure = [line for line in built if line.module in suspects] if side == 1 else []
    near: list[SourceLine] = []
    if side == 1:
        if not compared.found[1]:
            near = returned_after(first)
        elif compared.found[0] and _is_left_out(compared):
            made = {(one.source.file, one.source.line) for one in values if one.source}
            parents = [values[index].source for index in values[compared.found[1][0]].parents]
            near = [line for parent in parents if parent for line in between(parent, first, made)]
    order = [*sure[:1], *near[:1], first, *rest, *built]
    if compared.is_made_of_both:  # then this line is one that torch does not have
        order = [*sure[:1], first, *near[:1], *rest, *built]
    return tuple(dict.fromkeys(order))[:_MAX_LINES]


def _is_left_out(compared: Comparison) -> bool:
    """Return whether the two first sources are made by different operations."""
    first, second = (
        _plain(compared.traces[side].values[compared.found[side][0]].operation) for side in (0, 1)
    )
    return first != second


def _turned(compared: Comparison, side: int, found: Sequence[int]) -> list[int]:
    """Return the first values whose axes are exchanged, of those that the first source is made of.

    A product of keys and queries in place of queries and keys is such a value.
    """
    values = compared.traces[side].values
    opened = [parent for index in found[:1] for parent in values[index].parents]
    seen: set[int] = set()
    first: list[int] = []
    while opened:
        index = opened.pop()
        if index in seen or not compared.is_turned(side, index):
            continue
        seen.add(index)
        above = [one for one in values[index].parents if compared.is_turned(side, one)]
        opened += above
        if not above:
            first.append(index)
    return sorted(first)


def _misplaced(compared: Comparison, side: int, found: Sequence[int]) -> list[int]:
    """Return the operands of the first source that the other side's first source does not have.

    Two sources whose operands both have matches differ by the operands, if not by the operation:
    keys where there are values, or heads of another order.
    """
    other = 1 - side
    if not found or not compared.found[other]:
        return []
    theirs = compared.traces[other].values[compared.found[other][0]].parents
    near = set(theirs)
    for parent in theirs:
        near.update(compared.traces[other].values[parent].parents)
    values = compared.traces[side].values
    return [
        _made_at(compared, side, parent)
        for parent in values[found[0]].parents
        if values[parent].depends
        and values[parent].operation
        and not near & set(compared.matches[side][parent])
    ]


def _made_at(compared: Comparison, side: int, index: int) -> int:
    """Return the value of which this one is a mere view, transposed, split or repeated."""
    values = compared.traces[side].values
    while any(step in values[index].operation for step in _BROADCASTS):
        above = [parent for parent in values[index].parents if values[parent].operation]
        if len(above) != 1:
            break
        index = above[0]
    return index


def _constants(compared: Comparison, side: int, index: int) -> list[int]:
    """Return the constants without a match that a value is made of, the earliest first."""
    values = compared.traces[side].values
    opened = [
        parent
        for parent in values[index].parents
        if not values[parent].depends and values[parent].array.size > 1
    ]
    seen: list[int] = []
    while opened:
        one = opened.pop()
        if one in seen or values[one].source is None:
            continue
        seen.append(one)
        opened += [parent for parent in values[one].parents if values[parent].array.size > 1]
    unmatched = [one for one in seen if not compared.matches[side][one]]
    return sorted(unmatched) or sorted(seen, reverse=True)[:1]


def _scaling(values: Sequence[Value], walked: set[int], paired: int) -> list[int]:
    """Return the products and quotients that scale the value, or of which it is made."""
    near = {paired, *values[paired].parents}
    near |= {index for index in walked if paired in values[index].parents}
    return sorted(
        index for index in near & walked if any(step in values[index].operation for step in _SCALES)
    )


def distinct_lines(trace: Trace, order: Iterable[int]) -> list[SourceLine]:
    """Return the lines of the values, each once, in their order."""
    lines: dict[tuple[str, int], SourceLine] = {}
    for index in order:
        source = _source_of(trace, index)
        if source is not None:
            lines.setdefault((source.file, source.line), source)
    return list(lines.values())


def _source_of(trace: Trace, index: int) -> SourceLine | None:
    """Return the line of a value, or of the first of its children that has one."""
    source = trace.values[index].source
    children = trace.children.get(index, [])
    return _source_of(trace, children[0]) if source is None and children else source


def _last_equal(compared: Comparison, found: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Return the lines of the matched values that the sources are made of."""
    torch, flax = (trace.values for trace in compared.traces)
    lines: dict[str, None] = {}
    for index in found[1]:
        for parent in flax[index].parents:
            matches = compared.matches[1][parent]
            ours = torch[matches[-1]].source if matches else None
            theirs = flax[parent].source
            if ours and theirs:
                lines[f"{_short(ours)} and {_short(theirs)}"] = None
    return tuple(lines)[-_MAX_LAST:]


def _short(source: SourceLine) -> str:
    return f"{source.file.rpartition('/')[2]}:{source.line} `{source.code}`"
