"""Compute first and second derivatives of the same scalar in the three implementations, in float64.

The scalar is the sum of the outputs times a fixed cotangent. It is differentiated with respect to
the parameters and the inputs; buffers are constants. The results have torch's names.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ..conversion.convert import linen_to_torch, torch_to_linen
from ..conversion.tensors import numpy_state, numpy_to_tensor, torch_state
from ..proof.cases import Config, Framework, State
from .jax_settings import jax_on
from .run import NnxAttention, flax_forward, flax_state, flax_template, linen_template, ready_torch


class Derivatives(NamedTuple):
    """The gradient and a Hessian-vector product, by torch name and for `inputs`."""

    gradient: dict[str, np.ndarray]
    hessian_vector: dict[str, np.ndarray]


class DerivativeProblem(NamedTuple):
    """The function to differentiate, the point, and the direction, all in float64.

    Attributes:
        config: the constructor arguments.
        state: the parameters by their torch names, and the mask.
        inputs: (batch, tokens, input_embedding_dim).
        cotangent: (batch, tokens, output_embedding_dim).
        direction: an array for each parameter, by its torch name, and for `inputs`, of its shape.
        keep: (batch, tokens, tokens), True where dropout keeps the weight; None for no dropout.
    """

    config: Config
    state: State
    inputs: np.ndarray
    cotangent: np.ndarray
    direction: dict[str, np.ndarray]
    keep: np.ndarray | None = None


def derivatives(
    framework: Framework, problem: DerivativeProblem, device: str = "cpu"
) -> Derivatives:
    """Differentiate one implementation twice on the device, "cpu" or "cuda"."""
    if framework == "torch":
        return _torch(problem, device)
    with jax_on(device, np.float64):
        return _flax(framework, problem)


def gradient(
    framework: Framework,
    problem: DerivativeProblem,
    device: str = "cpu",
    *,
    frozen: str | None = None,
) -> dict[str, np.ndarray]:
    """Return the first derivatives alone, in the dtype of the inputs; torch uses plain autograd.

    The parameters of the layer `frozen` are constants; only torch can freeze.
    """
    if framework == "torch":
        outputs, arguments = _torch_outputs(problem, device, frozen)
        cotangent = numpy_to_tensor(problem.cotangent).to(device)
        gradients = torch.autograd.grad(outputs, list(arguments.values()), cotangent)
        return numpy_state(dict(zip(arguments, gradients, strict=True)))
    return compiled_gradient(framework, problem.config, device)(problem)


def compiled_gradient(
    framework: Framework, config: Config, device: str = "cpu"
) -> Callable[[DerivativeProblem], dict[str, np.ndarray]]:
    """Return `gradient` of problems of this configuration, compiled once for each dtype in Flax."""
    if framework == "torch":
        return lambda problem: gradient("torch", problem, device)
    compiled = jax.jit(_flax_gradient(framework, config))
    template = flax_template(framework, config)

    def call(problem: DerivativeProblem) -> dict[str, np.ndarray]:
        with jax_on(device, problem.inputs.dtype):
            point, constants = _flax_arguments(problem, template)
            return _by_torch_name(*compiled(*point, *constants))

    return call


def hessian_vector(
    framework: Framework, problem: DerivativeProblem, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Return the Hessian-vector product alone; torch uses plain autograd, as fused attention needs.

    Under `torch.func`, which `derivatives` uses, torch's attention is the formula.
    """
    if framework != "torch":
        return derivatives(framework, problem, device).hessian_vector
    outputs, arguments = _torch_outputs(problem, device)
    cotangent = numpy_to_tensor(problem.cotangent).to(device).requires_grad_()
    gradients = torch.autograd.grad(outputs, list(arguments.values()), cotangent, create_graph=True)
    products = [
        (gradient * numpy_to_tensor(problem.direction[name]).to(device)).sum()
        for name, gradient in zip(arguments, gradients, strict=True)
    ]
    total = torch.stack(products).sum()
    second = torch.autograd.grad(total, list(arguments.values()), materialize_grads=True)
    return numpy_state(dict(zip(arguments, second, strict=True)))


def _torch_outputs(
    problem: DerivativeProblem, device: str, frozen: str | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the outputs, and what they are differentiated by: the parameters and the inputs."""
    module = ready_torch(problem.config, problem.state, device, problem.keep)
    if frozen is not None:
        module.get_submodule(frozen).requires_grad_(False)
    inputs = numpy_to_tensor(problem.inputs).to(device).requires_grad_()
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    return module(inputs), {**trained, "inputs": inputs}


def _torch(problem: DerivativeProblem, device: str) -> Derivatives:
    module = ready_torch(problem.config, problem.state, device, problem.keep)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    direction = {
        name: torch.from_numpy(array).to(device) for name, array in problem.direction.items()
    }
    cotangent = torch.from_numpy(problem.cotangent).to(device)

    def scalar(parameters: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        outputs = torch.func.functional_call(module, parameters, (inputs,))
        return (outputs * cotangent).sum()

    gradient = torch.func.grad(scalar, argnums=(0, 1))

    # Reverse over reverse: torch's forward mode emits deprecation warnings.
    def gradient_along(parameters: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        by_parameters, by_inputs = gradient(parameters, inputs)
        products = [(by_parameters[name] * direction[name]).sum() for name in by_parameters]
        return sum(products, (by_inputs * direction["inputs"]).sum())

    point = (parameters, torch.from_numpy(problem.inputs).to(device))
    by_parameters, by_inputs = gradient(*point)
    first = numpy_state({**by_parameters, "inputs": by_inputs})
    by_parameters, by_inputs = torch.func.grad(gradient_along, argnums=(0, 1))(*point)
    second = numpy_state({**by_parameters, "inputs": by_inputs})
    return Derivatives(first, second)


def _flax(framework: Framework, problem: DerivativeProblem) -> Derivatives:
    direction = {key: array for key, array in problem.direction.items() if key != "inputs"}
    flax_direction = torch_to_linen(
        torch_state({**direction, "mask": problem.state["mask"]}),
        linen_template(problem.config, buffer=True),
    )
    tangents = flax_direction["params"], jnp.asarray(problem.direction["inputs"])
    gradient = _flax_gradient(framework, problem.config)
    point, constants = _flax_arguments(problem, flax_template(framework, problem.config))

    def derivatives(point: Any, tangents: Any, constants: Any) -> Any:
        return jax.jvp(lambda params, inputs: gradient(params, inputs, *constants), point, tangents)

    first, second = jax.jit(derivatives)(point, tangents, constants)
    return Derivatives(_by_torch_name(*first), _by_torch_name(*second))


def _flax_gradient(framework: Framework, config: Config) -> Callable[..., Any]:
    """Return the gradient function. It takes the params, the inputs and then the constants."""
    forward = flax_forward(framework, config)

    def scalar(params: Any, inputs: Any, buffers: Any, keep: Any, cotangent: Any) -> jax.Array:
        return (forward(params, buffers, keep, inputs) * cotangent).sum()

    return jax.grad(scalar, argnums=(0, 1))


def _flax_arguments(
    problem: DerivativeProblem, template: dict[str, Any] | NnxAttention
) -> tuple[tuple[Any, Any], tuple[Any, Any, Any]]:
    """Return the params and inputs of the problem, and its constants."""
    params, buffers = flax_state(problem.state, template)
    point = params, jnp.asarray(problem.inputs)
    return point, (buffers, problem.keep, jnp.asarray(problem.cotangent))


def _by_torch_name(parameters: Any, inputs: jax.Array) -> dict[str, np.ndarray]:
    return {**numpy_state(linen_to_torch({"params": parameters})), "inputs": np.asarray(inputs)}
