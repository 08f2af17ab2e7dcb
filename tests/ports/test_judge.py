"""The limits of the judge, and how it tells layouts that nothing says."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen

import compare
from compare.ports.calls import calls_of
from compare.ports.flax_side import Adapters, port_of
from compare.ports.judge import _limits, _limits_in, nearest, plain_jax
from compare.ports.live import LiveReference
from compare.ports.torch_side import TorchSide
from compare.ports.weights import Paired

EPS = float(np.finfo(np.float64).eps)


def test_a_limit_is_at_least_fifty_units_of_the_largest_entry() -> None:
    exact = {"whole": np.array([2.0, -8.0]), "moved": np.array([1.0, np.inf])}
    moved = {"whole": np.array(0.0), "moved": np.array(1e-12)}
    limits = _limits(moved, exact)
    assert float(limits["whole"]) == 50 * 8 * EPS
    assert float(limits["moved"]) == 50 * 1e-12


def test_a_limit_grows_with_the_roundoff_of_the_working_dtype() -> None:
    exact, limits = {"a": np.array([1.0, 2.0])}, {"a": np.array(1e-15)}
    growth = float(np.finfo(np.float32).eps) / EPS
    assert float(_limits_in("float32", limits, exact, exact)["a"]) == 1e-15 * growth
    own = {"a": np.array([1.0, 2.5])}
    assert float(_limits_in("float32", limits, own, exact)["a"]) == 4 * 0.5


class Product(torch.nn.Module):
    """Holds its weight as (in, out), as transformers' Conv1D does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 4))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight


class FlaxProduct(linen.Module):
    is_turned: bool

    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        kernel = self.param("kernel", linen.initializers.normal(), (4, 4))
        return jnp.matmul(inputs, kernel.T if self.is_turned else kernel)


@pytest.mark.parametrize("is_turned", [True, False])
def test_the_outputs_tell_a_layout_that_nothing_says(is_turned: bool) -> None:
    module, port = Product(), port_of(FlaxProduct(is_turned), Adapters())
    calls = calls_of(np.random.default_rng(0).standard_normal((3, 4)))
    with plain_jax("float64"):
        template = port.template(calls[0])
        found = [
            Paired(compare.match(module.state_dict(), template, layouts={"weight": name}), [], [])
            for name in ("transposed", "same")
        ]
        chosen = nearest(found, LiveReference(TorchSide(module, None, None), calls), port, template)
    assert chosen is found[0 if is_turned else 1]
