"""Check that the rows of a batch stay the same if others follow, as they do in torch."""

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor

from ..proof.agreement import Finding, uncompared
from .calls import Call
from .errors import PortError
from .findings import FLOAT64, compared
from .judge import Judge
from .result import NamedArrays


def batch_findings(
    judge: Judge, state: Mapping[str, Tensor], call: Call, number: int, label: str
) -> Iterator[Finding]:
    """Yield what was found of the batch's own rows, if there is a batch, and torch keeps them.

    Args:
        judge: what compared the call last.
        state: the state with which it did.
        call: the call. If inputs and outputs all have as many rows, these are a batch.
        number: the number of the call.
        label: what the state is.
    """
    exact, limits, api = judge.exact[number], judge.limits[number], judge.port.api
    sizes = {array.shape[:1] for array in (*call.arrays.values(), *exact.values())}
    if len(sizes) != 1 or not (size := sizes.pop()):
        return
    case, longer = f"{label}, inference", with_more_rows(call)

    def of_rows(outputs: NamedArrays) -> Iterator[Finding]:
        rows = {name: array[: size[0]] for name, array in outputs.items()}
        return compared(api, "batch", case, rows, exact, limits, FLOAT64)

    try:
        ours = judge.side.run(state, longer).outputs
        keeps = all(finding.held for finding in of_rows(ours))
    except PortError:  # torch takes no other number of rows
        return
    if not keeps:
        return
    try:
        theirs = judge.eager(state, longer)
    except PortError as error:
        yield uncompared("batch", api, case, f"with twice as many rows, {error}")
        return
    yield from of_rows(theirs)


def with_more_rows(call: Call) -> Call:
    """Return the call with as many other rows, made of the same entries, after its own."""
    return call.replaced(
        {name: np.concatenate([array, np.roll(array, 1)]) for name, array in call.arrays.items()}
    )
