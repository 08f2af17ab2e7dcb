"""What a module gave for one call, as NumPy arrays."""

from dataclasses import dataclass, field

import numpy as np

NamedArrays = dict[str, np.ndarray]
PARTS = ("outputs", "gradients", "state")  # of a result that are compared


@dataclass(frozen=True)
class Result:
    """What one call of a module gave.

    Attributes:
        outputs: the outputs by name.
        gradients: the gradients of the outputs' product with the cotangents, by the names of the
            parameters, and by `input NAME` for the inputs. In torch's names and layouts.
        state: the buffers after the call, by their torch names.
        biased: what running variances would be if they were made of the biased variance of the
            batch, as Flax's BatchNorm makes them.
        drawn: how many dropout patterns were drawn.
        is_random: whether a pattern was used for other entries than it was made for.
    """

    outputs: NamedArrays
    gradients: NamedArrays = field(default_factory=dict)
    state: NamedArrays = field(default_factory=dict)
    biased: NamedArrays = field(default_factory=dict)
    drawn: int = 0
    is_random: bool = False


def is_equal(one: Result, other: Result) -> bool:
    """Return whether two results have equal outputs and state; counters of batches may differ."""
    return all(
        np.array_equal(array, getattr(other, part).get(name), equal_nan=array.dtype.kind == "f")
        for part in ("outputs", "state")
        for name, array in getattr(one, part).items()
        if not name.endswith("num_batches_tracked")
    )
