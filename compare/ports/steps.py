"""Lay the two runs side by side: line for line, with how far their values lie apart."""

from collections.abc import Iterator

import numpy as np

from .comparison import VIEWS, Comparison
from .report import SourceLine, Step


def steps_of(compared: Comparison, pair: tuple[int, int] | None) -> tuple[Step, ...]:
    """Return the lines of the torch run in order, each with Flax's line for the same value.

    Args:
        compared: the values of the two runs.
        pair: two values that do not match and are related, as indices.
    """
    found: list[Step] = []
    for ours, theirs, error in _pairs(compared, pair):
        torch, flax = _bare(ours), _bare(theirs) if theirs else None
        last = found[-1] if found else None
        if last and last.torch == torch and last.flax in (flax, None):
            errors = [one for one in (last.error, error) if one is not None]
            found[-1] = Step(torch, flax, max(errors, default=None))
        else:
            found.append(Step(torch, flax, error))
    return tuple(found)


def _bare(line: SourceLine) -> SourceLine:
    """Return a line without what was run in it: one line may make several values."""
    return SourceLine(line.file, line.line, line.code, "")


def _pairs(
    compared: Comparison, pair: tuple[int, int] | None
) -> Iterator[tuple[SourceLine, SourceLine | None, float | None]]:
    """Yield torch's lines, and for each Flax's line for the value that matches.

    An output without a match stands beside the output of the same name, and the first of the pair
    beside the second. For other values without a match nothing says which is theirs.
    """
    torch, flax = (trace.values for trace in compared.traces)
    ends = dict(zip(*(trace.outputs.values() for trace in compared.traces), strict=False))
    beside = ends | (dict([pair]) if pair else {})
    for index, value in enumerate(torch):
        is_view = any(step in value.operation for step in VIEWS)
        if value.source is None or not value.depends or (is_view and index not in beside):
            continue
        partners = compared.matches[0][index] or [beside[one] for one in [index] if one in beside]
        made = [one for one in partners if flax[one].source is not None][:1]
        if not made:
            yield value.source, None, None
        for one in made:
            yield value.source, flax[one].source, _distance(compared, index, one)


def _distance(compared: Comparison, torch: int, flax: int) -> float | None:
    """Return how far the quantiles of two values lie apart at most, relative to the largest."""
    ours, theirs = compared.prints[0].rows[torch], compared.prints[1].rows[flax]
    finite = np.isfinite(ours) & np.isfinite(theirs)
    if not finite.any():
        return None
    scale = np.abs(ours[finite]).max() or 1.0
    with np.errstate(over="ignore"):
        distance = float(np.abs(ours[finite] - theirs[finite]).max() / scale)
    return distance if np.isfinite(distance) else None
