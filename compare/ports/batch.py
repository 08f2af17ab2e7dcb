"""Check that the rows of a batch stay the same if others follow, as they do in torch."""

from collections.abc import Iterator

from ..proof.agreement import Finding, uncompared
from .calls import rows_of, with_more_rows
from .errors import PortError
from .findings import FLOAT64, compared
from .judge import Judge
from .reference import Case
from .result import NamedArrays


def batch_findings(judge: Judge, weights: str, number: int, label: str) -> Iterator[Finding]:
    """Yield what was found of the batch's own rows, if there is a batch, and torch keeps them.

    Args:
        judge: what compared the call last.
        weights: the weights with which it did.
        number: the number of the call. If inputs and outputs all have as many rows, these are a
            batch.
        label: what the state is.
    """
    exact, limits, api = judge.exact[number], judge.limits[number, False].outputs, judge.port.api
    call = judge.reference.calls[number]
    if not (count := rows_of(call, exact)):
        return
    case = f"{label}, inference"

    def of_rows(outputs: NamedArrays) -> Iterator[Finding]:
        rows = {name: array[:count] for name, array in outputs.items()}
        return compared(api, "batch", case, rows, exact, limits, FLOAT64)

    try:
        ours = judge.reference.outputs(Case(weights, number, is_longer=True))
        keeps = all(finding.held for finding in of_rows(ours))
    except PortError:  # torch takes no other number of rows
        return
    if not keeps:
        return
    try:
        theirs = judge.eager(weights, with_more_rows(call))
    except PortError as error:
        yield uncompared("batch", api, case, f"with twice as many rows, {error}")
        return
    yield from of_rows(theirs)
