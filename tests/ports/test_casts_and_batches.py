"""Casts to a narrower dtype, and rows of a batch that depend on each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

import compare

GIVEN = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


class Torch(torch.nn.Module):
    """A linear layer, an RMS norm that may be computed in float32, and a softmax."""

    def __init__(self, casts: bool) -> None:
        super().__init__()
        self.casts = casts
        self.fc = torch.nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.fc(inputs)
        squares = (hidden.float() if self.casts else hidden).pow(2)
        hidden = (hidden * torch.rsqrt(squares.mean(-1, keepdim=True) + 1e-6)).type_as(hidden)
        return torch.softmax(1.3 * hidden, -1)


def computed(hidden: Any, norm_casts: bool, softmax_casts: bool) -> Any:
    squares = (hidden.astype(jnp.float32) if norm_casts else hidden) ** 2
    hidden = (hidden * jax.lax.rsqrt(squares.mean(-1, keepdims=True) + 1e-6)).astype(hidden.dtype)
    scores = 1.3 * hidden
    return jax.nn.softmax(scores.astype(jnp.float32) if softmax_casts else scores)  # CAST


class Linen(linen.Module):
    norm_casts: bool = False
    softmax_casts: bool = False
    dtype: Any = None

    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        hidden = linen.Dense(4, dtype=self.dtype, name="fc")(inputs)
        return computed(hidden, self.norm_casts, self.softmax_casts)


class Nnx(nnx.Module):
    def __init__(
        self, norm_casts: bool = False, softmax_casts: bool = False, dtype: Any = None
    ) -> None:
        self.fc = nnx.Linear(4, 4, dtype=dtype, rngs=nnx.Rngs(0))
        self.norm_casts, self.softmax_casts = norm_casts, softmax_casts

    def __call__(self, inputs: Any) -> Any:
        return computed(self.fc(inputs), self.norm_casts, self.softmax_casts)


BOTH = pytest.mark.parametrize("make", [Linen, pytest.param(Nnx, marks=pytest.mark.again)])


@BOTH
def test_casts_of_both_are_judged_apart(make: Any) -> None:
    report = compare.check_port(Torch(True), make(norm_casts=True), GIVEN)
    assert report.held, str(report)
    assert report.slip < 1e-12
    notes = [note for note in report.notes if "asks for a narrower dtype in" in note]
    assert [note.partition(" ")[0] for note in notes] == ["torch", "Flax"]
    assert all("test_casts_and_batches.py:" in note for note in notes)
    assert compare.check_port(Torch(True), make(), GIVEN, dtypes=()).held
    before = torch.get_default_dtype(), jax.config.read("jax_enable_x64")
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
    ):  # nothing that was traced without the cast is kept
        function = jax.jit(lambda hidden: computed(hidden, True, False))
        exact = jax.jit(lambda hidden: computed(hidden, False, False))
        hidden = jnp.asarray(GIVEN, jnp.float64) / 3
        assert not jnp.array_equal(function(hidden), exact(hidden))
    assert before == (torch.get_default_dtype(), jax.config.read("jax_enable_x64"))


@BOTH
def test_a_dtype_that_a_layer_says_is_widened(make: Any) -> None:
    report = compare.check_port(Torch(False), make(dtype=jnp.float32), GIVEN)
    assert report.held, str(report)
    assert report.slip < 1e-12
    (note,) = (note for note in report.notes if "narrower dtype" in note)
    assert note.startswith(
        ("Flax asks for a narrower dtype in fc;", "Flax asks for a narrower dtype in Linen;")
    )


@BOTH
def test_a_cast_of_flax_alone_is_a_difference(make: Any) -> None:
    report = compare.check_port(Torch(True), make(True, True), GIVEN, dtypes=())
    assert {one.check for one in report.findings if not one.held} == {"casts"}
    assert report.divergence is not None
    assert "# CAST" in report.divergence.flax_source[0].code
    assert "torch.softmax" in report.divergence.torch_source[0].code
    report = compare.check_port(Torch(False), make(False, True), GIVEN, dtypes=())
    assert not report.held
    assert report.divergence is not None
    assert "# CAST" in report.divergence.flax_source[0].code
    assert "rounded to float32" in report.divergence.hint


class Rows(linen.Module):
    way: str = ""

    @linen.compact
    def __call__(self, inputs: Any) -> Any:
        hidden = linen.Dense(4, name="fc")(inputs)
        if self.way == "mixed":
            hidden = hidden - hidden.mean(0) + hidden[:1]  # MIXED
        if self.way == "fixed":
            hidden = hidden.reshape(1, 4)
        return jnp.tanh(hidden)


class TorchRows(torch.nn.Module):
    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.fc, self.mixed = torch.nn.Linear(4, 4), mixed

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.fc(inputs)
        return torch.tanh(hidden - hidden.mean(0) + hidden[:1] if self.mixed else hidden)


def test_other_rows_change_nothing() -> None:
    one_row = GIVEN[:1]
    assert compare.check_port(TorchRows(), Rows(), one_row, dtypes=()).held
    report = compare.check_port(TorchRows(), Rows("mixed"), one_row, dtypes=())
    assert {one.check for one in report.findings if not one.held} == {"batch"}
    assert report.divergence is not None
    assert "# MIXED" in report.divergence.flax_source[0].code
    report = compare.check_port(TorchRows(), Rows("fixed"), one_row, dtypes=())
    assert "with twice as many rows, the Flax module raised TypeError" in str(report)
    report = compare.check_port(TorchRows(True), Rows("mixed"), GIVEN, dtypes=())
    assert report.held, str(report)
    assert "batch" not in {one.check for one in report.findings}
