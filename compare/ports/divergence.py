"""Find where the values of two runs part first: walk back from the outputs to what has no match."""

from collections.abc import Iterator, Mapping, Sequence

from .blame import (
    SCALES,
    Operands,
    aligned,
    counterparts,
    distinct,
    handed_on,
    lines_of,
    made_at,
    made_by,
    misplaced,
    unscaled,
)
from .comparison import VIEWS, Comparison, plain_name
from .places import between, built_at, conditions_of, returned_after
from .relations import Related, related
from .report import Divergence, SourceLine
from .steps import steps_of
from .values import Trace, Value

_MAX_LINES, _MAX_LAST, _MAX_PAIRS, _MAX_FIRST = 3, 3, 40, 6
_NONE: Mapping[str, frozenset[str]] = {}
_TELLING = 0.2  # the rank of relations that are no chance


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
    operands = misplaced(compared)
    tables = [_tables(compared, side) for side in (0, 1)]
    first = [
        [
            *(lines_of(compared, side, tables[side][:1]) if all(tables) else []),
            *_lines(compared, side, found[side], walked[side], pair, relation, operands),
        ]
        for side in (0, 1)
    ]
    lines = [_near_lines(compared, side, first[side], first[1 - side], suspects) for side in (0, 1)]
    last_equal, steps = _last_equal(compared, found), steps_of(compared, pair if relation else None)
    return Divergence(what, lines[0], lines[1], last_equal, hint, steps)


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
                relation = _relation(torch[one], flax[other])
                if relation is None:
                    continue
                score = relation.rank + 0.05 * (rank + other_rank)
                if best is None or score < best[0]:
                    best = score, (one, other), relation
        if best is not None:
            return best[1], best[2]
    return None, None


def _relation(torch: Value, flax: Value) -> Related | None:
    """Return how two values are related, if both are kept whole."""
    return related(torch.array, flax.array) if torch.is_whole and flax.is_whole else None


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
                relation = _relation(values[ancestor], values[index])
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
    pair: tuple[int, int] | None,
    relation: Related | None,
    operands: Sequence[Operands],
) -> list[SourceLine]:
    """Return the lines of one side, the likeliest first."""
    values = compared.traces[side].values
    order = list(found) or [compared.end[side]]
    if pair is not None:
        paired = pair[side]
        order = [paired, *order] if relation is not None and relation.is_sure else [*order, paired]
        if relation is not None and relation.is_scale:
            scaled = unscaled(compared, pair)[side]
            order = [*_scaling(values, walked, paired), *order[:1], *scaled, *order[1:]]
    if unpacked := [pair[side] for pair in operands if pair.is_unpacked(compared)]:
        order = [*unpacked[:1], *order]
    near = [*(pair[side] for pair in operands), *counterparts(compared, side)]
    order = [*order[:1], *near, *order[1:]]
    turned = _turned(compared, side, found)
    order = [*turned, *(one for index in turned for one in made_by(compared, side, index)), *order]
    for index in compared.found[1 - side][:1]:  # the statement that has its entries in order
        order = [*sorted(compared.shuffled[1 - side].get(index, []))[:1], *order]
    for index in list(order):
        opposite = [one for one in values[index].parents if compared.is_opposite(side, one)]
        order += [*opposite, *_constants(compared, side, index)]
    operands_of_first = [
        made_at(compared, side, parent)
        for index in found[:1]
        for parent in values[index].parents
        if values[parent].operation
    ]
    order += sorted(operands_of_first, reverse=True)
    return lines_of(compared, side, order)


def _near_lines(
    compared: Comparison,
    side: int,
    lines: Sequence[SourceLine],
    others: Sequence[SourceLine],
    suspects: Mapping[str, frozenset[str]],
) -> tuple[SourceLine, ...]:
    """Return the lines with those near them that may be the place, the likeliest first.

    One of them answers to the first of the other side's lines, if values of both match.
    """
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
    answers = [line for other in others[:1] for line in aligned(compared, 1 - side, other)[:1]]
    handed = [
        line for index in compared.found[side][:1] for line in handed_on(compared, side, index)
    ]
    rest = [*handed, *answers, *rest]
    order = [*sure[:1], *near[:1], first, *rest, *built]
    if compared.is_made_of_both:  # then this line is one that torch does not have
        order = [*sure[:1], first, *near[:1], *conditions_of(first), *rest, *built]
    return tuple(distinct(order)[:_MAX_LINES])


def _is_left_out(compared: Comparison) -> bool:
    """Return whether the two first sources are made by different operations."""
    first, second = (
        plain_name(compared.traces[side].values[compared.found[side][0]].operation)
        for side in (0, 1)
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
        if index in seen:
            continue
        seen.add(index)
        if not compared.is_turned(side, index):
            if any(step in values[index].operation for step in VIEWS):
                opened += values[index].parents
            continue
        above = [one for one in values[index].parents if compared.is_turned(side, one)]
        opened += above
        if not above:
            first.append(index)
    return sorted(first)


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
    unmatched = [
        one for one in seen if not compared.matches[side][one] or compared.is_turned(side, one)
    ]
    return sorted(unmatched) or sorted(seen, reverse=True)[:1]


def _tables(compared: Comparison, side: int) -> list[int]:
    """Return the constants without a match of which the first source is made, or a mask itself.

    A mask that the other side has the other way round is no such constant.
    """
    values = compared.traces[side].values
    if not compared.found[side]:
        return []
    index = compared.found[side][0]
    if any(
        not compared.matches[side][one] and not compared.is_opposite(side, one)
        for one in values[index].parents
        if not values[one].depends and values[one].array.size > 1
    ):
        return _constants(compared, side, index)
    return [index] if values[index].array.dtype == bool else []


def _scaling(values: Sequence[Value], walked: set[int], paired: int) -> list[int]:
    """Return the products and quotients that scale the value, or of which it is made."""
    near = {paired, *values[paired].parents}
    near |= {index for index in walked if paired in values[index].parents}
    return sorted(
        index for index in near & walked if any(step in values[index].operation for step in SCALES)
    )


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
    return f"{source.place} `{source.code}`"
