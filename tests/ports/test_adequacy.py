"""What inputs would not have noticed, by mutants of the Flax module."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen

import compare
from compare.ports import adequacy
from compare.ports.judge import Judge
from compare.ports.reference import Case
from compare.ports.result import Result


class Padded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.fc(inputs)) - 0.5
        return torch.where(keep[..., None] > 0, hidden, 0.0)


class FlaxPadded(linen.Module):
    @linen.compact
    def __call__(self, inputs: Any, keep: Any) -> Any:
        hidden = linen.relu(linen.Dense(4, name="fc")(inputs)) - 0.5
        is_kept = keep[..., None] > 0
        return jnp.where(is_kept, hidden, 0.0)


@pytest.mark.parametrize("is_padded", [True, False])
def test_a_line_that_no_input_tests_is_named(is_padded: bool) -> None:
    inputs = np.random.default_rng(0).standard_normal((3, 5, 4))
    keep = np.ones((3, 5), np.int32)
    if is_padded:
        keep[1, 3:] = 0
    given = (inputs, keep)
    report = compare.check_port(Padded(), FlaxPadded(), given, dtypes=(), adequacy=True)
    assert report.held
    assert report.adequacy is not None
    assert report.adequacy.noticed > 5
    missed = [mutant.line.code for mutant in report.adequacy.missed if mutant.line]
    assert ("is_kept = keep[..., None] > 0" in missed) is not is_padded, str(report)
    assert ("not noticed: " in str(report)) is not is_padded
    assert report.as_json()["adequacy"]["noticed"] == report.adequacy.noticed


def test_mutants_within_a_scan_are_tried() -> None:
    class TorchSum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(2))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            total = torch.zeros_like(inputs[0])
            for row in inputs:
                total = 0.5 * total + self.scale * row
            return total

    class FlaxSum(linen.Module):
        @linen.compact
        def __call__(self, inputs: Any) -> Any:
            scale = self.param("scale", linen.initializers.ones, (2,))

            def step(total: Any, row: Any) -> tuple[Any, None]:
                return 0.5 * total + scale * row, None

            return jax.lax.scan(step, jnp.zeros_like(inputs[0]), inputs)[0]

    one, several = (np.random.default_rng(0).standard_normal((count, 2)) for count in (1, 3))
    report = compare.check_port(TorchSum(), FlaxSum(), one, dtypes=(), adequacy=True)
    assert report.adequacy is not None
    assert report.adequacy.alike > 0  # what is halved is 0
    noticed = report.adequacy.noticed
    report = compare.check_port(TorchSum(), FlaxSum(), several, dtypes=(), adequacy=True)
    assert report.adequacy is not None
    assert report.adequacy.noticed > noticed


class Scaled(torch.nn.Module):
    """Its outputs do not show the factor of the gradient, nor, in inference, the momentum."""

    average: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(4, 4)
        self.register_buffer("average", torch.zeros(4))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.fc(inputs)
        if self.training:
            self.average.mul_(0.75).add_(hidden.detach().mean(0), alpha=0.25)
        return hidden + 3.0 * (hidden - hidden.detach())


class FlaxScaled(linen.Module):
    @linen.compact
    def __call__(self, inputs: Any, train: bool = False) -> Any:
        average = self.variable("buffers", "average", lambda: jnp.zeros(4))
        hidden = linen.Dense(4, name="fc")(inputs)
        fixed = jax.lax.stop_gradient(hidden)
        if train:
            average.value = 0.75 * average.value + 0.25 * fixed.mean(0)
        return hidden + 3.0 * (hidden - fixed)


def test_gradients_and_training_notice_mutants_too(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = np.random.default_rng(0).standard_normal((3, 4))
    report = compare.check_port(Scaled(), FlaxScaled(), inputs, dtypes=(), adequacy=True)
    assert report.held, str(report)
    with_all = report.adequacy
    assert with_all is not None
    assert not with_all.missed
    monkeypatch.setattr(adequacy._Program, "seen_by_gradients", lambda self, keys: set())
    report = compare.check_port(Scaled(), FlaxScaled(), inputs, dtypes=(), adequacy=True)
    assert report.adequacy is not None
    assert report.adequacy.alike > with_all.alike  # 3.0, which the gradients alone show
    asked = Judge._asked

    def without_state(self: Judge, case: Case, limits: Result) -> adequacy.Asked:
        return asked(self, case, limits)._replace(limits=Result(limits.outputs))

    monkeypatch.undo()
    monkeypatch.setattr(Judge, "_asked", without_state)
    report = compare.check_port(Scaled(), FlaxScaled(), inputs, dtypes=(), adequacy=True)
    assert report.adequacy is not None
    assert report.adequacy.alike > with_all.alike  # 0.75 and 0.25, which the state alone shows
