"""What inputs would not have noticed, by mutants of the Flax module."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen

import compare


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
            import jax

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
