"""Gradients and Hessian-vector products agree in float64, and are those of the function that is computed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.test_util import check_grads

from compare.cases import PRIME, PRIME_BIAS, Config
from compare.check import agreement
from compare.derivatives import Derivatives, Problem, derivatives
from compare.rounding import FLOAT64_RELATIVE
from compare.run import ready_linen, ready_nnx, ready_torch
from compare.transfer import numpy_state

from .support import normal, state_of
from .test_outputs import RECTANGLE

TOKENS = 5
KEEP = np.random.default_rng(1).random((2, TOKENS, TOKENS)) >= 0.4
DROPPING = Config(13, 11, 7, 0.4, qkv_bias=True)
SMALL = Config(3, 2, 5, 0.1, qkv_bias=True)


def differentiate(name: Any, config: Config, mask: np.ndarray | None, keep: np.ndarray | None) -> Derivatives:
    state = state_of(config, "float64", mask)
    inputs = normal(2, TOKENS, config.input_embedding_dim).astype(np.float64)
    cotangent = normal(2, TOKENS, config.output_embedding_dim, seed=1).astype(np.float64)
    shapes = {key: array.shape for key, array in numpy_state(state).items() if key != "mask"} | {"inputs": inputs.shape}
    direction = {key: normal(*shape, seed=2).astype(np.float64) for key, shape in shapes.items()}
    return derivatives(name, Problem(config, state, inputs, cotangent, direction, keep))


@pytest.mark.parametrize(
    ("config", "mask", "keep"),
    [
        (PRIME, None, None),
        (PRIME_BIAS, None, None),
        (PRIME_BIAS, np.array(RECTANGLE, dtype=np.float32), None),
        (DROPPING, None, KEEP),
    ],
    ids=["no bias", "bias", "rectangular mask", "dropout"],
)
@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_first_and_second_derivatives_equal_torch(
    name: str, config: Config, mask: np.ndarray | None, keep: np.ndarray | None
) -> None:
    expected, found = differentiate("torch", config, mask, keep), differentiate(name, config, mask, keep)
    for kind in ("gradient", "hessian_vector"):
        ours, theirs = getattr(found, kind), getattr(expected, kind)
        assert ours.keys() == theirs.keys()
        assert "mask" not in ours
        # A key's bias shifts a row's scores alike, and without dropout a value's bias is only added: gradients and
        # second derivatives that are exactly 0. So all are judged by the largest.
        largest = max(np.abs(array).max() for array in theirs.values())
        for key in theirs:
            result = agreement(ours[key], theirs[key], FLOAT64_RELATIVE * largest)
            assert result.held, (kind, key, result)
            assert key.endswith("bias") or np.abs(theirs[key]).max() > 1e-3 * largest, f"{key} is not put to the test"


def test_torch_gradients_are_those_of_the_function() -> None:
    state = state_of(SMALL, "float64")
    module = ready_torch(SMALL, state, "cpu", None)
    names = [name for name, _ in module.named_parameters()]
    inputs = torch.from_numpy(normal(2, 3, 3)).double().requires_grad_()

    def function(inputs: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (inputs,))

    arguments = (inputs, *(parameter.detach().requires_grad_() for parameter in module.parameters()))
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_flax_gradients_are_those_of_the_function() -> None:
    state = state_of(SMALL, "float64")
    with jax.enable_x64(True):
        inputs = jnp.asarray(normal(2, 3, 3).astype(np.float64))
        apply, variables = ready_linen(SMALL, state, None)
        buffers = {"buffers": variables["buffers"]}
        check_grads(
            lambda params, inputs: apply({"params": params, **buffers}, inputs), (variables["params"], inputs), 2
        )
        graph, parameters, rest = nnx.split(ready_nnx(SMALL, state, None), nnx.Param, ...)
        check_grads(lambda params, inputs: nnx.merge(graph, params, rest)(inputs), (parameters, inputs), 2)
