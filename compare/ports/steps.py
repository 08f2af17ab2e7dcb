"""Lay the two runs side by side: line for line, with how far their values lie apart."""

from collections.abc import Iterator

import numpy as np

from .comparison import VIEWS, Comparison, plain_name
from .fingerprints import sizes
from .report import SourceLine, Step


def steps_of(compared: Comparison) -> tuple[Step, ...]:
    """Return the lines of the torch run in order, each with Flax's line for the same value."""
    found: list[Step] = []
    for ours, theirs, error in _pairs(compared):
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
    compared: Comparison,
) -> Iterator[tuple[SourceLine, SourceLine | None, float | None]]:
    """Yield torch's lines, and for each the line of the value that matches, or of the likeliest.

    The likeliest is the next value without a match that the same operation makes in the same sizes;
    of an output, the output of the same name.
    """
    ends = dict(zip(*(trace.outputs.values() for trace in compared.traces), strict=False))
    torch, flax = (trace.values for trace in compared.traces)
    lone = [index for index, value in enumerate(flax) if not compared.is_matched(1, index)]
    for index, value in enumerate(torch):
        is_view = any(step in value.operation for step in VIEWS)
        is_end = index in ends
        if value.source is None or not value.depends or (is_view and not is_end):
            continue
        partners = compared.matches[0][index]
        if not partners and is_end:
            partners = [ends[index]]
        elif not partners:
            partners = [
                one
                for one in lone
                if plain_name(flax[one].operation) == plain_name(value.operation)
                and sizes(flax[one].array) == sizes(value.array)
            ][:1]
            lone = [one for one in lone if one not in partners]
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
    scale = np.abs(ours[finite]).max()
    return float(np.abs(ours - theirs)[finite].max() / (scale or 1.0))
