"""Stack the values of a loop, so that they match what the other side computes at once.

A Python loop over the batch or over time makes one value a step; `vmap`, a convolution or an
associative scan makes one value of all of them.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from .values import Value

_MAX_ENTRIES = 1 << 20
_MAX_IN_ALL = 1 << 24
_EACH = (1, 2, 3)  # how often one operation may stand in the line of a loop


def stacks(values: Sequence[Value], lengths: set[int]) -> Iterator[tuple[Value, list[int]]]:
    """Yield stacks of values that one line made again and again, with the indices of their parts.

    Args:
        values: the values of a run.
        lengths: how many parts a stack may have: the lengths of the other side's axes.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, value in enumerate(values):
        is_part = value.source is not None and value.depends and value.is_whole
        if is_part and value.array.size:
            places = tuple((line.file, line.line) for line in value.lines)
            groups.setdefault((places, value.operation, value.array.shape), []).append(index)
    left = _MAX_IN_ALL
    for group in groups.values():
        for each in _EACH:
            for length in lengths:
                if length < 2 or len(group) % (each * length):
                    continue
                for begin in range(0, len(group), each * length):
                    for first in range(each):
                        parts = group[begin + first : begin + each * length : each]
                        size = values[parts[0]].array.size * length
                        if size > min(left, _MAX_ENTRIES):
                            continue
                        left -= size
                        yield _stack([values[part] for part in parts]), parts


def _stack(parts: Sequence[Value]) -> Value:
    parents = tuple(dict.fromkeys(parent for part in parts for parent in part.parents))
    array = np.stack([part.array for part in parts])
    return Value(array, parts[0].operation, parts[0].source, parents, True, parts[0].callers)
