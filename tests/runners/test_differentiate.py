"""The reference derivatives are those of the formula; each framework's are those of its module."""

from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch
from flax import nnx
from jax.test_util import check_grads

from compare.checks.gradients import derivative_problem, exact_derivatives
from compare.proof.cases import Config, Trial, draw
from compare.runners.differentiate import DerivativeProblem
from compare.runners.run import ready_linen, ready_nnx, ready_torch

from ..support import normal, numpy_state_of

SMALL = Config(3, 2, 5, 0.1, qkv_bias=True)


def test_the_written_out_gradient_is_the_derivative_to_50_digits() -> None:
    """Both derivatives lie within their running error bounds of mpmath's derivatives."""
    trial = draw(SMALL, 3, np.random.default_rng(0), batch=1, keep=True)
    problem = derivative_problem(trial)
    derivatives = exact_derivatives(problem)
    names = list(derivatives)
    sizes = [derivatives[name].value.value.size for name in names]

    with mpmath.workdps(50):
        at = mpmath.matrix(
            [*map(mpmath.mpf, np.concatenate([_entries(problem, name) for name in names]).tolist())]
        )
        along = np.concatenate([problem.direction[name].ravel() for name in names]).tolist()

        def shifted(index: int, by: Any, along_by: Any) -> Any:
            point = [
                entry + along_by * mpmath.mpf(step) for entry, step in zip(at, along, strict=True)
            ]
            point[index] += by
            return _scalar(trial, problem, dict(zip(names, _split(point, sizes), strict=True)))

        for index in range(0, sum(sizes), 3):
            name = names[int(np.searchsorted(np.cumsum(sizes), index, side="right"))]
            place = index - sum(sizes[: names.index(name)])
            first = mpmath.diff(lambda by, index=index: shifted(index, by, 0), 0)
            second = mpmath.diff(lambda by, t, index=index: shifted(index, by, t), (0, 0), (1, 1))
            pair = derivatives[name]
            for bounded, exact in ((pair.value, first), (pair.tangent, second)):
                error = abs(mpmath.mpf(float(bounded.value.ravel()[place])) - exact)
                assert error <= bounded.error.ravel()[place], (name, place)


def _entries(problem: DerivativeProblem, name: str) -> np.ndarray:
    return problem.inputs.ravel() if name == "inputs" else problem.state[name].ravel()


def _split(point: list[Any], sizes: list[int]) -> list[list[Any]]:
    ends = np.cumsum(sizes).tolist()
    return [point[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _scalar(trial: Trial, problem: DerivativeProblem, entries: dict[str, list[Any]]) -> Any:
    """The sum of outputs times cotangent, written out one entry at a time."""
    width, head, tokens = 3, 2, 3
    x = [entries["inputs"][width * t : width * (t + 1)] for t in range(tokens)]
    assert trial.keep is not None

    def project(name: str) -> list[list[Any]]:
        rows = [entries[f"{name}.weight"][width * h : width * (h + 1)] for h in range(head)]
        return [
            [mpmath.fdot(x[t], rows[h]) + entries[f"{name}.bias"][h] for h in range(head)]
            for t in range(tokens)
        ]

    queries, keys, values = project("W_query"), project("W_key"), project("W_value")
    total = mpmath.mpf(0)
    for t in range(tokens):
        raised = [
            mpmath.exp(mpmath.fdot(queries[t], keys[s]) / mpmath.sqrt(head)) for s in range(t + 1)
        ]
        kept = [s for s in range(t + 1) if trial.keep[0, t, s]]
        for h in range(head):
            mixed = mpmath.fsum(raised[s] * values[s][h] for s in kept) / mpmath.fsum(raised)
            total += (
                mixed
                / (1 - mpmath.mpf(trial.config.dropout))
                * mpmath.mpf(float(problem.cotangent[0, t, h]))
            )
    return total


@pytest.mark.slow
def test_torch_gradients_are_those_of_the_function() -> None:
    state = numpy_state_of(SMALL, "float64")
    module = ready_torch(SMALL, state, "cpu", None)
    names = [name for name, _ in module.named_parameters()]
    inputs = torch.from_numpy(normal(2, 3, 3)).double().requires_grad_()

    def function(inputs: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (inputs,)
        )

    arguments = (
        inputs,
        *(parameter.detach().requires_grad_() for parameter in module.parameters()),
    )
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.slow
def test_flax_gradients_are_those_of_the_function() -> None:
    state = numpy_state_of(SMALL, "float64")
    with jax.enable_x64(True):
        inputs = jnp.asarray(normal(2, 3, 3).astype(np.float64))
        apply, variables = ready_linen(SMALL, state, None)
        buffers = {"buffers": variables["buffers"]}
        check_grads(
            jax.jit(lambda params, inputs: apply({"params": params, **buffers}, inputs)),
            (variables["params"], inputs),
            2,
        )
        graph, *states = nnx.split(ready_nnx(SMALL, state, None), nnx.Param, ...)
        parameters, rest = states
        check_grads(
            jax.jit(lambda params, inputs: nnx.merge(graph, params, rest)(inputs)),
            (parameters, inputs),
            1,
        )
