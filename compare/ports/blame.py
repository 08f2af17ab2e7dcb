"""Choose which of the lines that a value comes from is the place, and which line answers to it."""

from collections import Counter
from collections.abc import Iterable, Sequence

from .comparison import VIEWS, Comparison, Place
from .places import between, returns_of
from .report import SourceLine
from .values import Value

_SCALES = ("mul", "div", "truediv", "divide", "multiply")


def place(line: SourceLine) -> Place:
    """Return the file and the number of a line."""
    return line.file, line.line


def lines_of(compared: Comparison, side: int, order: Iterable[int]) -> list[SourceLine]:
    """Return the lines of values, each once, in their order: the line to blame before the others.

    A line of a function that was right when it was reached from elsewhere is innocent: then the
    line that called it is to blame.
    """
    lines: dict[Place, SourceLine] = {}
    for index in order:
        value = _with_a_line(compared, side, index)
        if value is not None:
            for line in (_blamed(compared, side, index, value), value.lines[0]):
                lines.setdefault(place(line), line)
    return list(lines.values())


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


def misplaced(compared: Comparison, side: int) -> list[int]:
    """Return the operands of the first sources that the other side's sources do not have.

    Sources whose operands all have matches differ by the operands, if not by the operation: keys
    where there are values, or heads of another order.
    """
    other = 1 - side
    theirs = compared.traces[other].values
    near: set[int] = set()
    for source in compared.found[other][:3]:
        for parent in theirs[source].parents:
            near |= {parent, *theirs[parent].parents}
    if not near:
        return []
    values = compared.traces[side].values
    found = [
        made_at(compared, side, parent)
        for source in compared.found[side][:2]
        for parent in values[source].parents
        if values[parent].depends
        and values[parent].operation
        and compared.matches[side][parent]
        and not near & set(compared.matches[side][parent])
    ]
    return list(dict.fromkeys(found))


def is_unpacked(compared: Comparison, operands: Sequence[Sequence[int]]) -> bool:
    """Return whether the misplaced operands and what should be there come of one line each."""
    if not all(operands):
        return False
    for side in (0, 1):
        lines = compared.traces[side].values[operands[side][0]].lines[:1]
        wanted = [
            compared.traces[side].values[made_at(compared, side, partner)].lines[:1]
            for partner in compared.matches[1 - side][operands[1 - side][0]][:4]
        ]
        if not lines or lines not in wanted:
            return False
    return True


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
    """Return what is made of the value of the side that lacks a factor which the other applies."""
    found: tuple[list[int], list[int]] = ([], [])
    scales = [
        any(step in compared.traces[side].values[pair[side]].operation for step in _SCALES)
        for side in (0, 1)
    ]
    for side in (0, 1):
        if scales[1 - side] and not scales[side]:
            found[side].extend(compared.traces[side].children.get(pair[side], [])[:1])
    return found


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
        last = values[before].lines[:1] or values[index].lines[:1]
        for line in last:
            for end in returns_of(line):
                found += [*between(line, end, made), end]
    return found
