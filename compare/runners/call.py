"""Call a multi-head module with what a call may be given beside the inputs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from ..conversion.convert import linen_to_torch
from ..conversion.tensors import numpy_state, numpy_to_tensor, tensor_to_numpy
from ..proof.cases import Config, Framework, State
from .jax_settings import jax_on
from .run import flax_forward, flax_state, flax_template, ready_linen, ready_nnx, ready_torch


class Call(NamedTuple):
    """The arguments of a call.

    Attributes:
        inputs: (*batch, queries, input_embedding_dim).
        inputs_k: what the keys are projected from; None is `inputs`.
        inputs_v: what the values are projected from; None is `inputs_k`.
        blocked: True blocks: (queries, keys), or (*batch, heads, queries, keys) where any axis may
            be 1.
    """

    inputs: np.ndarray
    inputs_k: np.ndarray | None = None
    inputs_v: np.ndarray | None = None
    blocked: np.ndarray | None = None


def call_module(
    framework: Framework,
    config: Config,
    state: State,
    call: Call,
    device: str = "cpu",
    *,
    weights: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the outputs of a module in evaluation, and the attention weights if asked for."""
    if framework == "torch":
        module: Any = ready_torch(config, state, device, None)
        inputs, options = _torch_arguments(call, device)
        with torch.no_grad():
            if not weights:
                return tensor_to_numpy(module(inputs, **options)), None
            outputs, kept = module(inputs, **options, need_weights=True, average_attn_weights=False)
            return tensor_to_numpy(outputs), tensor_to_numpy(kept)
    with jax_on(device, call.inputs.dtype):
        array, options = _flax_arguments(call)
        sown: Any
        if framework == "nnx":
            model: Any = ready_nnx(config, state, None)
            captured: Any = nnx.capture(model, nnx.Intermediate)
            outputs, intermediates = captured(array, **options, sow_weights=weights)
            sown = nnx.to_pure_dict(intermediates)
        else:
            apply, variables = ready_linen(config, state, None)
            outputs, sown = apply(
                variables, array, **options, sow_weights=weights, mutable=["intermediates"]
            )
            sown = sown.get("intermediates", {})
        return np.asarray(outputs), np.asarray(sown["attention_weights"][0]) if sown else None


def call_gradient(
    framework: Framework,
    config: Config,
    state: State,
    call: Call,
    cotangent: np.ndarray,
    device: str = "cpu",
) -> dict[str, np.ndarray]:
    """Return the gradient of sum(outputs * cotangent), by torch name and for `inputs`."""
    if framework == "torch":
        module: Any = ready_torch(config, state, device, None)
        inputs, options = _torch_arguments(call, device)
        arguments = {**dict(module.named_parameters()), "inputs": inputs.requires_grad_()}
        outputs = module(inputs, **options)
        incoming = numpy_to_tensor(cotangent).to(device)
        found = torch.autograd.grad(outputs, list(arguments.values()), incoming)
        return numpy_state(dict(zip(arguments, found, strict=True)))
    with jax_on(device, call.inputs.dtype):
        array, options = _flax_arguments(call)
        params, buffers = flax_state(state, flax_template(framework, config))
        forward = flax_forward(framework, config)

        def scalar(params: Any, inputs: jax.Array) -> jax.Array:
            return (forward(params, buffers, None, inputs, **options) * cotangent).sum()

        by_params, by_inputs = jax.grad(scalar, argnums=(0, 1))(params, array)
        by_name = numpy_state(linen_to_torch({"params": by_params}))
        return {**by_name, "inputs": np.asarray(by_inputs)}


def _torch_arguments(call: Call, device: str) -> tuple[torch.Tensor, dict[str, Any]]:
    named = {"key": call.inputs_k, "value": call.inputs_v, "attn_mask": call.blocked}
    options = {
        name: numpy_to_tensor(array).to(device)
        for name, array in named.items()
        if array is not None
    }
    return numpy_to_tensor(call.inputs).to(device), options


def _flax_arguments(call: Call) -> tuple[jax.Array, dict[str, Any]]:
    allowed = None if call.blocked is None else ~call.blocked
    named = {"inputs_k": call.inputs_k, "inputs_v": call.inputs_v, "mask": allowed}
    options = {name: jnp.asarray(array) for name, array in named.items() if array is not None}
    return jnp.asarray(call.inputs), options
