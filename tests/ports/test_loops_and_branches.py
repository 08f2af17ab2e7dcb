"""Values within `while` and `cond`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen

import compare
from compare.ports.record_jax import record

GIVEN = jnp.arange(1.0, 4.0)


def products(function: Callable[..., Any]) -> list[float]:
    """Return the first entries of the products that the function computes."""
    trace = record(lambda inputs: {"": function(inputs)}, GIVEN)
    return [float(value.array.flat[0]) for value in trace.values if value.operation == "mul"]


def doubled(steps: Any, inputs: Any) -> Any:
    return jax.lax.fori_loop(0, steps, lambda _, hidden: 2.0 * hidden, inputs)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: doubled(jnp.argmax(x) + 1, x), [2, 4, 8]),
        (lambda x: doubled(jnp.argmin(x), x), []),
        (lambda x: jax.lax.cond(x[0] > 0, lambda y: 3 * y, lambda y: 5 * y, x), [3]),
        (lambda x: jax.lax.switch(jnp.argmax(x), [jnp.sin, jnp.cos, lambda y: 7 * y], x), [7]),
        (
            lambda x: jax.jit(
                lambda y: jax.lax.cond(y[0] < 0, jnp.sin, lambda z: doubled(jnp.argmax(z), z), y)
            )(x),
            [2, 4],
        ),
        (lambda x: doubled(jnp.argmax(x), doubled(jnp.argmax(x), x)), [2, 4, 8, 16]),
        (lambda x: jax.vmap(lambda y: jax.lax.cond(y > 2, lambda z: 3 * z, jnp.sin, y))(x), [3]),
        # Not looked into: more steps than are kept, and what each step of a scan may do otherwise.
        (lambda x: doubled(jnp.argmax(x) + 600, x * 1.0), [1]),
        (
            lambda x: (
                jax.lax.scan(
                    lambda c, y: (jax.lax.cond(y > 1, lambda z: 3 * z, jnp.sin, c), c), x[0], x
                )[0]
                * 2
            ),
            None,
        ),
    ],
    ids=["while", "no step", "cond", "switch", "nested", "twice", "vmap", "long", "in a scan"],
)
def test_each_step_and_the_branch_that_is_taken(
    function: Callable[..., Any], expected: list[float] | None
) -> None:
    made = products(function)
    if expected is None:
        assert len(made) == 1
    else:
        assert made == expected
    trace = record(lambda inputs: {"": function(inputs)}, GIVEN)
    assert np.allclose(trace.values[trace.outputs[""]].array, function(GIVEN), rtol=1e-6)


class Torch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.fc(inputs)
        for _ in range(3):
            hidden = torch.tanh(hidden) * 1.5
        return hidden


class Flax(linen.Module):
    factor: float

    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        def step(state: tuple[Any, Any]) -> tuple[Any, Any]:
            hidden = jnp.tanh(state[1])
            return state[0] + 1, hidden * self.factor  # FACTOR

        hidden = linen.Dense(4, name="fc")(inputs)
        return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, hidden))[1]


@pytest.mark.slow
def test_a_loop_without_gradients_is_compared_without_them() -> None:
    given = np.random.default_rng(0).standard_normal((2, 4))
    right = compare.check_port(Torch(), Flax(1.5), given, dtypes=())
    assert right.held, str(right)
    assert "gradients are not compared, because JAX has none of a `while` loop" in str(right)
    assert all(finding.check != "gradients" for finding in right.findings)
    wrong = compare.check_port(Torch(), Flax(1.4), given, dtypes=())
    assert wrong.divergence is not None
    assert "* self.factor" in wrong.divergence.flax_source[0].code
    assert "* 1.5" in wrong.divergence.torch_source[0].code
