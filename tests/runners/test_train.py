"""Gradient clipping in training, which Optax computes in a different way from torch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from compare.runners.train import clip_grad_norm

MAX_NORM = 0.5


def clipped(
    gradients: dict[str, np.ndarray], clip: optax.GradientTransformation
) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        updates = {name: jnp.asarray(array) for name, array in gradients.items()}
        updates, _ = clip.update(updates, clip.init(updates))
        return {name: np.asarray(array) for name, array in updates.items()}


@pytest.mark.parametrize("gradient", [[3e20], [[-2e19]], 3e20])
def test_one_entry_whose_square_overflows_is_clipped(gradient: Any) -> None:
    array = np.array(gradient, np.float32)
    parameter = torch.nn.Parameter(torch.zeros(array.shape))
    parameter.grad = torch.from_numpy(array.copy())
    torch.nn.utils.clip_grad_norm_([parameter], MAX_NORM)
    ours = clipped({"scale": array}, clip_grad_norm(MAX_NORM))["scale"]
    np.testing.assert_array_equal(ours, parameter.grad.numpy())
    assert np.abs(ours).max() == MAX_NORM


def test_nothing_to_clip() -> None:
    assert clipped({}, clip_grad_norm(MAX_NORM)) == {}


def test_clipping_keeps_each_dtype() -> None:
    gradients = {"a": np.full(3, 0.5, np.float32), "b": np.full(2, 0.25)}
    ours = clipped(gradients, clip_grad_norm(MAX_NORM))
    assert {name: array.dtype for name, array in ours.items()} == {
        name: array.dtype for name, array in gradients.items()
    }


@pytest.mark.parametrize("scale", [1e-8, 0.01, 1.0, 1e6], ids=["tiny", "below", "above", "huge"])
def test_clipping_is_torchs(scale: float) -> None:
    """The norm of all parameters lies on both sides of the limit; float64 shows errors of 1e-6."""
    generator = np.random.default_rng(0)
    gradients = {
        "kernel": scale * generator.normal(size=(3, 4)),
        "bias": scale * generator.normal(size=4),
    }
    parameters = [
        torch.nn.Parameter(torch.zeros(array.shape, dtype=torch.float64))
        for array in gradients.values()
    ]
    for parameter, array in zip(parameters, gradients.values(), strict=True):
        parameter.grad = torch.from_numpy(array.copy())
    torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
    ours = clipped(gradients, clip_grad_norm(MAX_NORM))
    for parameter, name in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        # One rounding each for the square, the sum of 16, the root, the quotient and the product.
        np.testing.assert_allclose(
            ours[name], parameter.grad.numpy(), rtol=32 * np.finfo(np.float64).eps, atol=0
        )
    plain = clipped(gradients, optax.clip_by_global_norm(MAX_NORM))
    if scale == 1.0:
        assert not np.allclose(plain["bias"], ours["bias"], rtol=1e-8, atol=0), (
            "Optax's own clipping would have passed this test"
        )
