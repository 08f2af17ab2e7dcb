"""Run both modules once more and record every value, to find where they part."""

from typing import Any

import jax
import torch

from ..conversion.tensors import numpy_to_tensor
from .calls import Call
from .divergence import first_divergence
from .flax_side import Leaves, Port, named
from .record_jax import record
from .record_torch import TorchRecorder
from .report import Divergence
from .torch_side import SEED, TorchSide, plain_kernels
from .torch_side import tensors_of as outputs_of
from .values import Trace


def torch_trace(side: TorchSide, state: Any, call: Call, *, train: bool) -> Trace:
    """Return the values of a call of the torch module in float64."""
    module = side.module("float64", state).train(train)
    inputs = {
        name: numpy_to_tensor(array.copy()).double()
        if name in call.floats
        else numpy_to_tensor(array.copy())
        for name, array in call.arrays.items()
    }
    recorder = TorchRecorder()
    for tensor in (*inputs.values(), *module.state_dict(keep_vars=True).values()):
        if isinstance(tensor, torch.Tensor):
            recorder.add_root(tensor)
    placed = call.replaced(inputs)
    with plain_kernels(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        with recorder.modules_of(module), recorder:
            outputs = side.called(module, placed)
    for name, tensor in outputs_of(outputs).items():
        if (index := recorder.index_of(tensor)) is not None:
            recorder.trace.outputs[name] = index
    return recorder.trace


def flax_trace(port: Port, leaves: Leaves, call: Call, *, train: bool) -> Trace:
    """Return the values of a call of the Flax module in float64."""

    def function(leaves: Leaves, arrays: dict[str, Any]) -> dict[str, Any]:
        return named(port.apply(leaves, call.replaced(arrays), train=train)[0])

    arrays = {name: jax.numpy.asarray(array) for name, array in call.arrays.items()}
    return record(function, leaves, arrays)


def divergence(
    side: TorchSide, port: Port, state: Any, leaves: Leaves, call: Call, *, train: bool
) -> Divergence:
    """Return where the outputs of the two modules part first."""
    return first_divergence(
        torch_trace(side, state, call, train=train), flax_trace(port, leaves, call, train=train)
    )
