"""First and second derivatives of the same scalar in the three implementations, in float64, by torch's names.

The scalar is the sum of outputs times a fixed cotangent; it depends on the parameters and the
inputs. Buffers are given, not differentiated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ..conversion.convert import linen_to_torch, torch_to_linen
from ..conversion.tensors import numpy_state, torch_state
from ..proof.cases import Config, Framework, State
from .run import flax_forward, flax_state, jax_on, linen_template, ready_torch


class Derivatives(NamedTuple):
    """The gradient, and the product of the Hessian with a direction, by entry; `inputs` is one of them."""

    gradient: dict[str, np.ndarray]
    hessian_vector: dict[str, np.ndarray]


class DerivativeProblem(NamedTuple):
    """What is differentiated, where, and along which direction; everything in float64.

    config: the constructor arguments.
    state: the parameters by torch's names, and the mask.
    inputs: (batch, tokens, input_embedding_dim).
    cotangent: (batch, tokens, output_embedding_dim).
    direction: for each parameter by its torch key, and for `inputs`, an array of its shape.
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
    """Differentiate one implementation on the device, "cpu" or "cuda"."""
    if framework == "torch":
        return _torch(problem, device)
    with jax_on(device, np.float64):
        return _flax(framework, problem)


def gradient(
    framework: Framework, problem: DerivativeProblem, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Return the first derivatives alone; torch's by plain autograd, not by its function transforms."""
    if framework == "torch":
        module = ready_torch(problem.config, problem.state, device, problem.keep)
        inputs = torch.from_numpy(problem.inputs).to(device).requires_grad_()
        given = {**dict(module.named_parameters()), "inputs": inputs}
        cotangent = torch.from_numpy(problem.cotangent).to(device)
        found = torch.autograd.grad(module(inputs), list(given.values()), cotangent)
        return numpy_state(dict(zip(given, found, strict=True)))
    with jax_on(device, np.float64):
        by_flax, at, others = _flax_gradient(framework, problem)
        return _by_torch_name(*jax.jit(by_flax)(*at, *others))


def _torch(problem: DerivativeProblem, device: str) -> Derivatives:
    module = ready_torch(problem.config, problem.state, device, problem.keep)
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    along = {name: torch.from_numpy(array).to(device) for name, array in problem.direction.items()}
    cotangent = torch.from_numpy(problem.cotangent).to(device)

    def scalar(parameters: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        outputs = torch.func.functional_call(module, parameters, (inputs,))
        return (outputs * cotangent).sum()

    gradient = torch.func.grad(scalar, argnums=(0, 1))

    # Reverse over reverse: torch's forward mode warns of its own deprecated parts.
    def gradient_along(parameters: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        by_name, by_inputs = gradient(parameters, inputs)
        products = [(by_name[name] * along[name]).sum() for name in by_name]
        return sum(products, (by_inputs * along["inputs"]).sum())

    at = (parameters, torch.from_numpy(problem.inputs).to(device))
    found = gradient(*at), torch.func.grad(gradient_along, argnums=(0, 1))(*at)
    first, second = (numpy_state({**by_name, "inputs": by_inputs}) for by_name, by_inputs in found)
    return Derivatives(first, second)


def _flax(framework: Framework, problem: DerivativeProblem) -> Derivatives:
    direction = {key: array for key, array in problem.direction.items() if key != "inputs"}
    along = torch_to_linen(
        torch_state({**direction, "mask": problem.state["mask"]}),
        linen_template(problem.config, buffer=True),
    )
    tangents = along["params"], jnp.asarray(problem.direction["inputs"])
    gradient, at, given = _flax_gradient(framework, problem)

    def derivatives(at: Any, tangents: Any, given: Any) -> Any:
        return jax.jvp(lambda params, inputs: gradient(params, inputs, *given), at, tangents)

    first, second = jax.jit(derivatives)(at, tangents, given)
    return Derivatives(_by_torch_name(*first), _by_torch_name(*second))


def _flax_gradient(
    framework: Framework, problem: DerivativeProblem
) -> tuple[Callable[..., Any], tuple[Any, Any], tuple[Any, Any, Any]]:
    """Return the gradient by Linen's params and inputs as a function, where to take it, and what else it is given."""
    forward = flax_forward(framework, problem.config)
    params, buffers = flax_state(framework, problem.config, problem.state)

    def scalar(params: Any, inputs: Any, buffers: Any, keep: Any, cotangent: Any) -> jax.Array:
        return (forward(params, buffers, keep, inputs) * cotangent).sum()

    at = params, jnp.asarray(problem.inputs)
    return (
        jax.grad(scalar, argnums=(0, 1)),
        at,
        (buffers, problem.keep, jnp.asarray(problem.cotangent)),
    )


def _by_torch_name(parameters: Any, inputs: jax.Array) -> dict[str, np.ndarray]:
    return {**numpy_state(linen_to_torch({"params": parameters})), "inputs": np.asarray(inputs)}
