"""Find where the gradients of two runs part first, while their values agree."""

from collections.abc import Iterable, Sequence

import numpy as np

from .blame import aligned, distinct, lines_of
from .comparison import Comparison
from .fingerprints import close
from .report import Divergence
from .values import Gradients, Trace

_STOPS = ("stop_gradient", "detach", "custom_jvp_call", "custom_vjp_call")
Traced = tuple[Trace, Gradients]


def first_gradient(torch: Traced, flax: Traced) -> Divergence | None:
    """Return the lines after which the gradients agree and before which they do not.

    Args:
        torch: the values of the torch run, and the gradients by them.
        flax: those of the Flax run.
    """
    compared = Comparison(torch[0], flax[0])
    traced = (torch, flax)
    parted = _parted(compared, traced)
    stops = tuple(_stops(compared, side, parted[side]) for side in (0, 1))
    lines = tuple(
        lines_of(
            compared,
            side,
            [
                *stops[side],
                *_counterparts(compared, 1 - side, stops[1 - side]),
                *_consumers(compared, side, parted[side]),
            ],
        )
        for side in (0, 1)
    )
    lines = tuple(
        [
            *lines[side][:1],
            *(line for one in lines[1 - side][:1] for line in aligned(compared, 1 - side, one)[:1]),
            *lines[side][1:],
        ]
        for side in (0, 1)
    )
    lines = tuple(distinct(side)[:3] for side in lines)
    if not any(lines):
        return None
    hint = "The values agree and their gradients do not: a cut, or a gradient of its own, is here."
    return Divergence("gradients", tuple(lines[0]), tuple(lines[1]), (), hint)


def _parted(compared: Comparison, traced: Sequence[Traced]) -> tuple[list[int], list[int]]:
    """Return the values of each side whose gradient is that of no value that matches."""
    parted: tuple[list[int], list[int]] = ([], [])
    for side in (0, 1):
        ours, theirs = traced[side][1], traced[1 - side][1]
        for index, gradient in ours.items():
            partners = [one for one in compared.matches[side][index] if one in theirs]
            if partners and not any(_is_same(gradient, theirs[one]) for one in partners):
                parted[side].append(index)
    return parted


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two gradients have the same entries, whatever their layout."""
    if one.size != other.size:
        return True  # of a value that is repeated on one side
    first, second = np.sort(one, axis=None), np.sort(other, axis=None)
    scale = max(np.abs(first).max(initial=0.0), np.abs(second).max(initial=0.0))
    return bool((close(first, second) | (np.abs(first - second) <= 1e-9 * scale)).all())


def _consumers(compared: Comparison, side: int, parted: Iterable[int]) -> list[int]:
    """Return what is made of the last values whose gradient differs."""
    values, differing = compared.traces[side].values, set(parted)
    children = compared.traces[side].children
    last = [
        index
        for index in differing
        if not differing & set(children.get(index, [])) and values[index].array.size > 1
    ]
    return sorted({child for index in last or differing for child in children.get(index, [])})


def _stops(compared: Comparison, side: int, parted: Iterable[int]) -> list[int]:
    """Return what cuts the gradient of values whose gradient differs; then what has its own."""
    trace = compared.traces[side]
    found = {child for index in parted for child in trace.children.get(index, [])}
    return [
        child for step in _STOPS for child in sorted(found) if step in trace.values[child].operation
    ]


def _counterparts(compared: Comparison, side: int, stops: Iterable[int]) -> list[int]:
    """Return the other side's values that match the first ones made of what is cut on this side."""
    children = compared.traces[side].children
    found: list[int] = []
    opened = [child for stop in stops for child in children.get(stop, [])]
    seen: set[int] = set()
    while opened:
        index = opened.pop(0)
        if index in seen:
            continue
        seen.add(index)
        if matches := compared.matches[side][index]:
            found += matches[:1]
        else:
            opened += children.get(index, [])
    return found
