"""Find where the two modules part: compare every value of torch with every value of Flax."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..conversion.mapping import KeyPath
from .backward import Traced, first_gradient
from .blame import lines_of
from .calls import Call
from .comparison import Comparison
from .divergence import first_divergence
from .flax_side import Leaves, Port, named, on_device
from .record_jax import record, record_gradients
from .report import Divergence
from .result import NamedArrays
from .values import Trace


def gradient_divergence(
    torch: Traced,
    port: Port,
    leaves: Leaves,
    call: Call,
    cotangents: NamedArrays,
    *,
    train: bool,
) -> Divergence | None:
    """Return where the gradients part, walking back from the outputs; None if it cannot be told."""
    return first_gradient(
        torch,
        record_gradients(
            outputs_by_name(port, call, train=train), cotangents, leaves, on_device(call.arrays)
        ),
    )


def lone_casts(
    torch: Trace, port: Port, leaves: Leaves, call: Call, *, train: bool
) -> Divergence | None:
    """Return where Flax casts a value to a narrower dtype that torch does not cast, if it does."""
    theirs = flax_trace(port, leaves, call, train=train)
    compared = Comparison(torch, theirs)
    cast = {index for index, value in enumerate(torch.values) if "_to_copy" in value.operation}
    lone = [
        index
        for index, value in enumerate(theirs.values)
        if value.operation == "reduce_precision" and cast.isdisjoint(compared.matches[1][index])
    ]
    answers = [one for index in lone for one in compared.matches[1][index][-1:]]
    lines = (lines_of(compared, 0, answers), lines_of(compared, 1, lone))
    hint = "Flax casts this value to a narrower dtype, and torch does not."
    return Divergence("casts", tuple(lines[0]), tuple(lines[1]), (), hint) if lines[1] else None


def flax_trace(port: Port, leaves: Leaves, call: Call, *, train: bool) -> Trace:
    """Return the values of a call of the Flax module in float64."""
    return record(outputs_by_name(port, call, train=train), leaves, on_device(call.arrays))


def outputs_by_name(port: Port, call: Call, *, train: bool) -> Callable[..., dict[str, Any]]:
    """Return a function of leaves and arrays that returns the outputs of the call by name."""

    def function(leaves: Leaves, arrays: dict[str, Any]) -> dict[str, Any]:
        return named(port.apply(leaves, call.replaced(arrays), train=train)[0])

    return function


def results_by_name(
    port: Port, call: Call, trained: Collection[KeyPath], *, train: bool
) -> Callable[..., tuple[dict[str, Any], Leaves]]:
    """Return a function of leaves and arrays: the outputs by name, and the state after the call."""

    def function(leaves: Leaves, arrays: dict[str, Any]) -> tuple[dict[str, Any], Leaves]:
        raw, after = port.apply(leaves, call.replaced(arrays), train=train)
        return named(raw), {path: leaf for path, leaf in after.items() if path not in trained}

    return function


def divergence(
    torch: Trace,
    port: Port,
    leaves: Leaves,
    call: Call,
    *,
    train: bool,
    suspects: Mapping[str, frozenset[str]],
) -> Divergence:
    """Return where the outputs of the two modules part first."""
    theirs = flax_trace(port, leaves, call, train=train)
    return first_divergence(torch, theirs, suspects=suspects)


def state_divergence(
    torch: Trace,
    port: Port,
    leaves: Leaves,
    call: Call,
    changed: Mapping[str, KeyPath],
    *,
    train: bool,
    suspects: Mapping[str, frozenset[str]],
) -> Divergence:
    """Return where buffers part first, which are given as Flax paths by their torch names."""

    def function(leaves: Leaves, arrays: dict[str, Any]) -> dict[str, Any]:
        _, after = port.apply(leaves, call.replaced(arrays), train=train)
        return {name: after[path] for name, path in changed.items() if path in after}

    theirs = record(function, leaves, on_device(call.arrays))
    return first_divergence(torch, theirs, "state", suspects=suspects)
