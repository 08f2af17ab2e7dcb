"""Choose which of the lines that a value comes from is the place, and which line answers to it."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from .comparison import VIEWS, Comparison, Place, plain_name
from .places import between, returns_of
from .report import SourceLine
from .values import Value

SCALES = ("mul", "div", "truediv", "divide", "multiply")


def place(line: SourceLine) -> Place:
    """Return the file and the number of a line."""
    return line.file, line.line


def lines_of(compared: Comparison, side: int, order: Iterable[int]) -> list[SourceLine]:
    """Return the lines of values, each once, in their order: the line to blame before the others.

    A line of a function that was right when it was reached from elsewhere is innocent: then the
    line that called it is to blame.
    """
    lines: list[SourceLine] = []
    for index in order:
        value = _with_a_line(compared, side, index)
        if value is not None:
            lines += [_blamed(compared, side, index, value), value.lines[0]]
    return distinct(lines)


def distinct(lines: Iterable[SourceLine]) -> list[SourceLine]:
    """Return the lines, each where it stands first."""
    found: dict[Place, SourceLine] = {}
    for line in lines:
        found.setdefault(place(line), line)
    return list(found.values())


def _with_a_line(compared: Comparison, side: int, index: int) -> Value | None:
    """Return the value, or the first of those made of it that has a line."""
    trace = compared.traces[side]
    while True:
        value = trace.values[index]
        children = trace.children.get(index, [])
        if value.source is not None or not children:
            return value if value.source is not None else None
        index = children[0]


def _blamed(compared: Comparison, side: int, index: int, value: Value) -> SourceLine:
    places = tuple(map(place, value.lines))
    for depth, line in enumerate(value.lines):
        right = compared.right_places[side].get(places[: depth + 1], [])
        if not any(one < index and beyond != places[depth + 1 :] for one, beyond in right):
            return line
    return value.lines[0]


def aligned(compared: Comparison, side: int, line: SourceLine) -> list[SourceLine]:
    """Return the other side's lines whose values are those of a line, the most alike first."""
    values, others = compared.traces[side].values, compared.traces[1 - side].values
    counts: Counter[Place] = Counter()
    lines: dict[Place, SourceLine] = {}
    for index, value in enumerate(values):
        if not value.depends or place(line) not in map(place, value.lines):
            continue
        found = {
            place(other): other
            for partner in compared.matches[side][index][:4]
            for other in others[partner].lines[:1]
        }
        lines |= found
        counts.update(found.keys())
    return [lines[one] for one, _ in counts.most_common(2)]


class Operands(NamedTuple):
    """Operands of two lines that differ: one of each side, which the other side's line lacks."""

    torch: int
    flax: int

    def is_unpacked(self, compared: Comparison) -> bool:
        """Return whether each side's operand and what should be there come of one line."""
        for side in (0, 1):
            values = compared.traces[side].values
            line = values[self[side]].lines[:1]
            wanted = [
                values[made_at(compared, side, partner)].lines[:1]
                for partner in _partners(compared, 1 - side, self[1 - side])
            ]
            if not line or line not in wanted:
                return False
        return True


def misplaced(compared: Comparison) -> list[Operands]:
    """Return which operands of the first lines that differ the other side's line does not have.

    Lines whose operands all have matches differ by the operands, if not by the operation: keys
    where there are values, or heads of another order.
    """
    lines = [
        list(dict.fromkeys(compared.traces[side].values[one].lines for one in compared.found[side]))
        for side in (0, 1)
    ]
    found = []
    for ours, theirs in zip(lines[0][:3], lines[1][:3], strict=False):
        operands = [_operands(compared, side, (ours, theirs)[side]) for side in (0, 1)]
        odd = [
            [
                one
                for one in operands[side]
                if (partners := _partners(compared, side, one))
                and not partners & _closure(compared, 1 - side, operands[1 - side])
            ]
            for side in (0, 1)
        ]
        if odd[0] and odd[1]:
            pair = (made_at(compared, side, odd[side][0]) for side in (0, 1))
            found.append(Operands(*pair))
    return found


def _operands(compared: Comparison, side: int, lines: tuple[SourceLine, ...]) -> list[int]:
    """Return the values that match of which a line, reached in one way, makes what does not."""
    values = compared.traces[side].values
    return list(
        dict.fromkeys(
            parent
            for index, value in enumerate(values)
            if value.lines[:1] == lines[:1]
            or list(map(place, value.lines)) == list(map(place, lines))
            if not compared.is_matched(side, index)
            for parent in value.parents
            if values[parent].depends
            and values[parent].operation
            and compared.matches[side][parent]
        )
    )


def _closure(compared: Comparison, side: int, operands: Iterable[int]) -> set[int]:
    return {near for one in operands for near in (one, made_at(compared, side, one))}


def _partners(compared: Comparison, side: int, index: int) -> set[int]:
    """Return the values of the other side that match and have as many entries."""
    size = compared.traces[side].values[index].array.size
    others = compared.traces[1 - side].values
    return {one for one in compared.matches[side][index] if others[one].array.size == size}


def made_by(compared: Comparison, side: int, product: int) -> list[int]:
    """Return the values of which a product is made, before they were scaled and turned."""
    values = compared.traces[side].values
    found = []
    for index in values[made_at(compared, side, product)].parents:
        while True:
            index = made_at(compared, side, index)
            above = [one for one in values[index].parents if values[one].depends]
            if len(above) != 1 or not any(step in values[index].operation for step in SCALES):
                break
            index = above[0]
        found.append(index)
    lines = {values[index].lines[:1] for index in found}
    return found[:1] if len(found) > 1 and len(lines) == 1 else []


def made_at(compared: Comparison, side: int, index: int) -> int:
    """Return the value of which this one is a mere view, transposed, split or repeated."""
    values = compared.traces[side].values
    while any(step in values[index].operation for step in VIEWS):
        above = [parent for parent in values[index].parents if values[parent].operation]
        if len(above) != 1:
            break
        index = above[0]
    return index


def unscaled(compared: Comparison, pair: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Return what is made of values that are no products by a factor: one may be missing there."""
    found: tuple[list[int], list[int]] = ([], [])
    for side in (0, 1):
        trace = compared.traces[side]
        if not any(step in trace.values[pair[side]].operation for step in SCALES):
            found[side].extend(trace.children.get(pair[side], [])[:1])
    return found


def counterparts(compared: Comparison, side: int) -> list[int]:
    """Return what this side makes, by the same operation, of what the other side's source is of.

    What has a partner of its own, as each of several layers on one input has, is none.
    """
    other = 1 - side
    values, theirs = compared.traces[side].values, compared.traces[other].values
    found = []
    for source in compared.found[other][:1]:
        name, size = plain_name(theirs[source].operation), theirs[source].array.size
        for parent in theirs[source].parents:
            for partner in compared.matches[other][parent][:4]:
                for child in compared.traces[side].children.get(partner, []):
                    is_alike = plain_name(values[child].operation) == name
                    has_own = any(
                        compared.matches[other][one] == [child]
                        for one in compared.matches[side][child]
                    )
                    if is_alike and values[child].array.size == size and not has_own:
                        found.append(child)
    return found[-1:]


def handed_on(compared: Comparison, side: int, index: int) -> list[SourceLine]:
    """Return the lines of a loop's body that hand on what the value takes from the step before."""
    values = compared.traces[side].values
    made = {place(line) for value in values for line in value.lines}
    found: list[SourceLine] = []
    for parent in values[index].parents:
        root = made_at(compared, side, parent)
        if values[root].operation or not values[root].parents:
            continue
        (before,) = values[root].parents[:1]
        own = set(map(place, values[index].lines))
        shared = [line for line in values[before].lines if place(line) in own]
        for line in (shared or values[before].lines or values[index].lines)[:1]:
            for end in returns_of(line):
                found += [*between(line, end, made), end]
    return found
