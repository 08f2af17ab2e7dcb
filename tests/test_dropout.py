"""Each framework's own dropout: rate, scale, independence of positions; by exact binomial limits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from scipy.stats import binom

import flax_impl
import torch_impl

# Two-sided, for each count below: the chance that an honest dropout is accused.
FALSE_ALARM = 1e-10
SHAPE = (64, 128, 128)
RATE = 0.3


def torch_dropout(device: str) -> np.ndarray:
    torch.manual_seed(0)
    module = torch_impl.CausalAttentionWithBuffer(3, 5, 128, RATE).train()
    return module.dropout(torch.ones(SHAPE, device=device)).cpu().numpy()


def linen_dropout(device: str) -> np.ndarray:
    module = flax_impl.CausalAttentionWithBuffer(3, 5, 128, RATE)
    ones = jax.device_put(jnp.ones(SHAPE), jax.devices(device)[0])

    def drop(module: flax_impl.CausalAttentionWithBuffer) -> jax.Array:
        return module.attention_dropout(ones, deterministic=False)

    variables = {"buffers": {"mask": jnp.zeros((128, 128))}}
    return np.asarray(module.apply(variables, method=drop, rngs={"dropout": jax.random.key(0)}))


def nnx_dropout(device: str) -> np.ndarray:
    model = flax_impl.nnx.CausalAttentionWithBuffer(3, 5, 128, RATE, rngs=nnx.Rngs(0))
    model.train()
    return np.asarray(model.dropout(jax.device_put(jnp.ones(SHAPE), jax.devices(device)[0])))


def within(count: int, total: int, probability: float) -> bool:
    """Whether the count lies within the exact binomial limits."""
    lower, upper = binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], total, probability)
    return bool(lower <= count <= upper)


@pytest.mark.parametrize("draw", [torch_dropout, linen_dropout, nnx_dropout])
def test_rate_scale_and_independence(draw: Callable[[str], np.ndarray], device: str) -> None:
    dropped = draw(device)
    kept = dropped != 0
    # The scale is a quotient of two rounded numbers: at most two roundings from the exact one.
    assert np.abs(dropped[kept] * (1 - RATE) - 1).max() <= 3 * 2.0**-24
    assert within(int(kept.sum()), kept.size, 1 - RATE)
    both_alike = RATE**2 + (1 - RATE) ** 2
    for axis in range(3):
        # Disjoint neighbors, so that the pairs are independent of each other too.
        first, second = (np.take(kept, range(start, kept.shape[axis], 2), axis=axis) for start in (0, 1))
        assert within(int((first == second).sum()), first.size, both_alike), f"neighbors along axis {axis}"


def test_the_limits_would_see_a_wrong_rate() -> None:
    random = np.random.default_rng(0)
    total = int(np.prod(SHAPE))
    assert within(int((random.random(total) >= RATE).sum()), total, 1 - RATE)
    assert not within(int((random.random(total) >= RATE + 0.005).sum()), total, 1 - RATE)
