"""The limits of the judge, and how it tells layouts that nothing says."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen

import compare
from compare.ports import live
from compare.ports.calls import calls_of
from compare.ports.flax_side import Adapters, port_of
from compare.ports.judge import _limits, _limits_in, nearest, plain_jax
from compare.ports.live import LiveReference
from compare.ports.reference import GIVEN, Case, Exact
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


def test_gradients_are_asked_of_all_samples_where_they_differ() -> None:
    calls = calls_of(np.random.default_rng(0).standard_normal((3, 4)))
    reference = LiveReference(TorchSide(torch.nn.Linear(4, 4), None, None), calls)
    exact = reference.exact(Case(GIVEN, 0))
    first = {name: float(size) for name, size in exact.farthest.gradients.items()}
    surer = reference.surer(Case(GIVEN, 0), exact)
    assert all(surer[name] >= size for name, size in first.items())
    assert surer["weight"] > first["weight"]


@pytest.mark.parametrize(("size", "holds"), [(1e-11, True), (1e-14, False)])
def test_a_gradient_that_the_first_sample_refuses_is_judged_by_all(
    size: float, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = np.random.default_rng(0).standard_normal((3, 4))
    exact = LiveReference.exact

    def without_first(self: LiveReference, case: Case, **options: Any) -> Exact:
        found = exact(self, case, **options)
        for name in found.farthest.gradients:
            found.result.gradients[name] *= 1.0 + 1e-11  # as if torch had rounded otherwise
            found.farthest.gradients[name] = np.array(0.0)
        return found

    def surer(self: LiveReference, case: Case, exact: Exact) -> dict[str, np.ndarray]:
        return {name: np.array(size) for name in exact.result.gradients}

    monkeypatch.setattr(LiveReference, "exact", without_first)
    monkeypatch.setattr(LiveReference, "surer", surer)
    assert compare.check_port(torch.nn.Linear(4, 4), linen.Dense(4), inputs).held == holds


def test_a_large_module_is_judged_by_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LARGE", 20_000)
    inputs = np.random.default_rng(0).standard_normal((2, 160))
    module, flax = torch.nn.Linear(160, 160), linen.Dense(160)
    report = compare.check_port(module, flax, inputs)
    assert report.held
    assert "weighted sums of neighbours" in str(report)
    wrong = compare.check_port(module, _HalfGradient(160), inputs)
    assert [one.case for one in wrong.findings if not one.held and one.check == "gradients"]


class Product(torch.nn.Module):
    """Holds its weight as (in, out), as transformers' Conv1D does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 4))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight


class _HalfGradient(linen.Dense):
    """Has half the gradient of one entry of its kernel."""

    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        shape = (inputs.shape[-1], self.features)
        kernel = self.param("kernel", linen.initializers.normal(), shape)
        bias = self.param("bias", linen.initializers.zeros, (self.features,))
        halved = jnp.zeros(shape).at[3, 5].set(0.5)
        kernel = kernel * (1 - halved) + jax.lax.stop_gradient(kernel) * halved
        return inputs @ kernel + bias


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
