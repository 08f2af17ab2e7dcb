"""Run the torch module once more and record every value."""

from typing import Any

import numpy as np

from ..conversion.tensors import tensor_to_numpy
from ..frameworks import torch
from .calls import Call
from .dropout import SharedPatterns
from .record_torch import TorchRecorder
from .result import NamedArrays
from .torch_dtypes import in_float64
from .torch_side import SEED, TorchSide, passed, placed_inputs, plain_kernels, weighted_sum
from .torch_side import tensors_of as outputs_of
from .values import Gradients, Trace


def torch_trace(
    side: TorchSide,
    state: Any,
    call: Call,
    *,
    train: bool,
    cotangents: NamedArrays | None = None,
) -> tuple[Trace, Gradients]:
    """Return the values of a call of the torch module in float64, and gradients by them.

    There are gradients if there are cotangents.
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
    trace, buffers = (
        recorder.trace,
        {key: after[key] for key in after if key not in side.parameters},
    )
    for followed, tensors in ((trace.outputs, outputs), (trace.buffers, buffers)):
        for name, tensor in tensors.items():
            if (
                isinstance(tensor, torch.Tensor)
                and (index := recorder.index_of(tensor)) is not None
            ):
                followed[name] = index
    if cotangents is None:
        return trace, {}
    total = weighted_sum(outputs, cotangents)
    made = {index: tensor for index, tensor in enumerate(recorder.tensors) if tensor.requires_grad}
    if not isinstance(total, torch.Tensor) or not made:
        return trace, {}
    found = torch.autograd.grad(total, list(made.values()), allow_unused=True)
    return trace, {
        index: np.zeros(tensor.shape) if gradient is None else tensor_to_numpy(gradient).copy()
        for (index, tensor), gradient in zip(made.items(), found, strict=True)
    }
