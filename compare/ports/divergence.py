"""Find where the values of two runs part first: walk back from the outputs to what has no match."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .fingerprints import Fingerprints, close_rows, same_value
from .relations import Related, related
from .report import Divergence, SourceLine
from .values import Trace, Value

_MAX_LINES, _MAX_LAST, _MAX_PAIRS, _MAX_FIRST = 3, 3, 40, 6
_TELLING = 0.2  # the rank of relations that are no chance
_BROADCASTS = ("expand", "broadcast", "view", "reshape", "transpose", "permute", "squeeze")
_SCALES = ("mul", "div", "truediv", "divide", "multiply")


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
        ours, theirs = self.prints
        for index in range(len(flax.values)):
            if np.isnan(theirs.rows[index]).all() and theirs.values[index].array.size == 0:
                continue
            for candidate in np.flatnonzero(close_rows(ours.rows, theirs.rows[index])):
                is_few = bool(theirs.is_few[index] or ours.is_few[candidate])
                one, other = torch.values[candidate].array, flax.values[index].array
                if same_value(one, other, is_few=is_few):
                    self.matches[0][candidate].append(index)
                    self.matches[1][index].append(int(candidate))

        for side in (0, 1):
            self._drop_lone_repeats(side)

    def _drop_lone_repeats(self, side: int) -> None:
        """Let a value that repeats others match only one of its size, unless it is a mere view."""
        values, others = self.traces[side].values, self.traces[1 - side].values
        for index, partners in enumerate(self.matches[side]):
            value = values[index]
            if not partners or any(step in value.operation for step in _BROADCASTS):
                continue
            sizes = [others[partner].array.size for partner in partners]
            if max(sizes) < value.array.size and value.operation:
                self.matches[side][index] = []

    def is_matched(self, side: int, index: int) -> bool:
        """Return whether the value has a match, or depends on neither inputs nor state."""
        return bool(self.matches[side][index]) or not self.traces[side].values[index].depends

    def sources(self, side: int, ends: Iterable[int]) -> list[int]:
        """Return the unmatched values, all of whose parents match, from which the ends come."""
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
        self.walked = seen
        return sorted(found)


def first_divergence(torch: Trace, flax: Trace, what: str = "outputs") -> Divergence:
    """Return the lines where the runs part first.

    Args:
        torch: the values of the torch run, with its outputs.
        flax: those of the Flax run, with outputs of the same names.
        what: what the outputs are.
    """
    compared = Comparison(torch, flax)
    ends = _parting(compared)
    walked: list[set[int]] = []
    found: list[list[int]] = []
    for side in (0, 1):
        found.append(compared.sources(side, [pair[side] for pair in ends]))
        walked.append(compared.walked)
    pair, relation = _best_pair(compared, found, walked)
    hint = relation.hint if relation else _of_parents(compared, found, walked)
    lines = tuple(
        _lines(compared, side, found[side], walked[side], pair[side] if pair else None, relation)
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
    best: tuple[float, tuple[int, int], Related] | None = None
    torch, flax = (trace.values for trace in compared.traces)
    ours = _near(compared, 0, found[0], walked[0])
    theirs = _near(compared, 1, found[1], walked[1])
    for rank, one in enumerate(ours[:_MAX_PAIRS]):
        for other_rank, other in enumerate(theirs[:_MAX_PAIRS]):
            relation = related(torch[one].array, flax[other].array)
            if relation is None:
                continue
            score = relation.rank + 0.05 * (rank + other_rank)
            if best is None or score < best[0]:
                best = score, (one, other), relation
    return (None, None) if best is None else (best[1], best[2])


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
    order = list(found)
    if paired is not None:
        order = [paired, *order] if relation is not None and relation.is_sure else [*order, paired]
        if relation is not None and relation.is_scale:
            order = [*_scaling(values, walked, paired), *order]
    for index in list(order):
        order += [
            parent
            for parent in values[index].parents
            if not values[parent].depends and not compared.matches[side][parent]
        ]
    return tuple(_distinct(values, order)[:_MAX_LINES])


def _scaling(values: Sequence[Value], walked: set[int], paired: int) -> list[int]:
    """Return the products and quotients that scale the value, or of which it is made."""
    near = {paired, *values[paired].parents}
    near |= {index for index in walked if paired in values[index].parents}
    return sorted(
        index for index in near & walked if any(step in values[index].operation for step in _SCALES)
    )


def _distinct(values: Sequence[Value], order: Iterable[int]) -> list[SourceLine]:
    lines: dict[tuple[str, int], SourceLine] = {}
    for index in order:
        source = _source_of(values, index)
        if source is not None:
            lines.setdefault((source.file, source.line), source)
    return list(lines.values())


def _source_of(values: Sequence[Value], index: int) -> SourceLine | None:
    """Return the line of a value, or of the first of its children that has one."""
    source = values[index].source
    if source is not None:
        return source
    for child in range(index + 1, len(values)):
        if index in values[child].parents:
            return _source_of(values, child)
    return None


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
