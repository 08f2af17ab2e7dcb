"""Run both modules once more and record every value, to find where they part."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..conversion.mapping import KeyPath
from ..conversion.tensors import tensor_to_numpy
from .backward import first_gradient
from .blame import lines_of
from .calls import Call
from .comparison import Comparison
from .divergence import first_divergence
from .dropout import SharedPatterns
from .flax_side import Leaves, Port, named, on_device
from .record_jax import record, record_gradients
from .record_torch import TorchRecorder
from .report import Divergence
from .result import NamedArrays
from .torch_dtypes import in_float64
from .torch_side import SEED, TorchSide, passed, placed_inputs, plain_kernels, weighted_sum
from .torch_side import tensors_of as outputs_of
from .values import Trace

Gradients = dict[int, np.ndarray]


def torch_trace(
    side: TorchSide,
    state: Any,
    call: Call,
    *,
    train: bool,
    cotangents: NamedArrays | None = None,
    buffers: Sequence[str] = (),
) -> tuple[Trace, Gradients]:
    """Return the values of a call of the torch module in float64, and gradients by them.

    There are gradients if there are cotangents. If there are names of buffers, these after the call
    are what is followed in place of the outputs.
    """
    module = side.module("float64", state).train(train)
    inputs = passed(placed_inputs(call, "float64", has_gradients=cotangents is not None))
    recorder = TorchRecorder()
    for tensor in (*inputs.values(), *module.state_dict(keep_vars=True).values()):
        if isinstance(tensor, torch.Tensor):
            recorder.add_root(tensor)
    placed = call.replaced(inputs)
    with (
        in_float64(side.widened),
        plain_kernels(),
        SharedPatterns(),
        torch.random.fork_rng(devices=[]),
        torch.set_grad_enabled(cotangents is not None),
    ):
        torch.manual_seed(SEED)
        with recorder.modules_of(module), recorder:
            outputs = outputs_of(side.called(module, placed))
    after = module.state_dict()
    followed = {name: after[name] for name in buffers} or outputs
    for name, tensor in followed.items():
        if (index := recorder.index_of(tensor)) is not None:
            recorder.trace.outputs[name] = index
    if cotangents is None:
        return recorder.trace, {}
    total = weighted_sum(outputs, cotangents)
    tensors = {
        index: tensor for index, tensor in enumerate(recorder.tensors) if tensor.requires_grad
    }
    if not isinstance(total, torch.Tensor) or not tensors:
        return recorder.trace, {}
    found = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
    return recorder.trace, {
        index: np.zeros(tensor.shape) if gradient is None else tensor_to_numpy(gradient).copy()
        for (index, tensor), gradient in zip(tensors.items(), found, strict=True)
    }


def gradient_divergence(
    side: TorchSide,
    port: Port,
    state: Any,
    leaves: Leaves,
    call: Call,
    cotangents: NamedArrays,
    *,
    train: bool,
) -> Divergence | None:
    """Return where the gradients part, walking back from the outputs; None if it cannot be told."""
    return first_gradient(
        torch_trace(side, state, call, train=train, cotangents=cotangents),
        record_gradients(
            outputs_by_name(port, call, train=train), cotangents, leaves, on_device(call.arrays)
        ),
    )


def lone_casts(
    side: TorchSide, port: Port, state: Any, leaves: Leaves, call: Call, *, train: bool
) -> Divergence | None:
    """Return where Flax casts a value to a narrower dtype that torch does not cast, if it does."""
    ours, _ = torch_trace(side, state, call, train=train)
    theirs = flax_trace(port, leaves, call, train=train)
    compared = Comparison(ours, theirs)
    cast = {index for index, value in enumerate(ours.values) if "_to_copy" in value.operation}
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


def divergence(
    side: TorchSide,
    port: Port,
    state: Any,
    leaves: Leaves,
    call: Call,
    *,
    train: bool,
    suspects: Mapping[str, frozenset[str]],
) -> Divergence:
    """Return where the outputs of the two modules part first."""
    ours, _ = torch_trace(side, state, call, train=train)
    theirs = flax_trace(port, leaves, call, train=train)
    return first_divergence(ours, theirs, suspects=suspects)


def state_divergence(
    side: TorchSide,
    port: Port,
    state: Any,
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

    ours, _ = torch_trace(side, state, call, train=train, buffers=tuple(changed))
    theirs = record(function, leaves, on_device(call.arrays))
    return first_divergence(ours, theirs, "state", suspects=suspects)
