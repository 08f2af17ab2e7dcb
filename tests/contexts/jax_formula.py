"""The yardsticks in Flax: the formula as plain modules, with the names of ours."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import Array

import flax_impl
from flax_impl.nnx import Buffer

FEATURES, WIDTH, CONTEXT_LENGTH, HEADS = 6, 8, 40, 2


def attention(queries: Array, keys: Array, values: Array, mask: Array, drop: Any) -> Array:
    """The formula in two heads, as one reads it; the arguments are (..., tokens, WIDTH)."""
    tokens = queries.shape[-2]
    queries, keys, values = (
        array.reshape(*array.shape[:-1], HEADS, WIDTH // HEADS).swapaxes(-2, -3)
        for array in (queries, keys, values)
    )
    scores = queries @ keys.mT / (WIDTH // HEADS) ** 0.5
    weights = jax.nn.softmax(jnp.where(mask[:tokens, :tokens] != 0, -jnp.inf, scores), axis=-1)
    context = (drop(weights) @ values).swapaxes(-2, -3)
    return context.reshape(*context.shape[:-2], WIDTH)


class LinenFormula(nn.Module):
    """Causal self-attention in two heads."""

    dropout: float = 0.0

    def setup(self) -> None:
        for name in ("W_query", "W_key", "W_value"):
            setattr(self, name, nn.Dense(WIDTH, use_bias=False))
        self.out_proj = nn.Dense(WIDTH)
        self.attention_dropout = nn.Dropout(self.dropout)
        self.mask = self.variable("buffers", "mask", flax_impl.causal_mask, CONTEXT_LENGTH)

    def __call__(self, inputs: Array, *, deterministic: bool = True) -> Array:
        def drop(weights: Array) -> Array:
            return self.attention_dropout(weights, deterministic=deterministic)

        projected = self.W_query(inputs), self.W_key(inputs), self.W_value(inputs)
        return self.out_proj(attention(*projected, self.mask.value, drop))


class NnxFormula(nnx.Module):
    """Causal self-attention in two heads."""

    def __init__(self, dropout: float, *, rngs: nnx.Rngs) -> None:
        self.W_query = nnx.Linear(FEATURES, WIDTH, use_bias=False, rngs=rngs)
        self.W_key = nnx.Linear(FEATURES, WIDTH, use_bias=False, rngs=rngs)
        self.W_value = nnx.Linear(FEATURES, WIDTH, use_bias=False, rngs=rngs)
        self.out_proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.mask = Buffer(flax_impl.causal_mask(CONTEXT_LENGTH))

    def __call__(self, inputs: Array) -> Array:
        projected = self.W_query(inputs), self.W_key(inputs), self.W_value(inputs)
        return self.out_proj(attention(*projected, self.mask[...], self.dropout))


def linen_pair(dropout: float = 0.0) -> list[Any]:
    sizes = FEATURES, WIDTH, CONTEXT_LENGTH, dropout, HEADS
    return [
        flax_impl.CausalMultiHeadAttention(*sizes, implementation="fused"),
        LinenFormula(dropout),
    ]


def nnx_pair(dropout: float = 0.0) -> list[Any]:
    """The same weights, because both draw them in the same order."""
    sizes = FEATURES, WIDTH, CONTEXT_LENGTH, dropout, HEADS
    ours = flax_impl.nnx.CausalMultiHeadAttention(*sizes, implementation="fused", rngs=nnx.Rngs(0))
    return [ours, NnxFormula(dropout, rngs=nnx.Rngs(0))]


def inputs(tokens: int, batch: int = 2, features: int = FEATURES) -> Array:
    return jax.random.normal(jax.random.key(tokens), (batch, tokens, features))


def masks() -> dict[str, Array]:
    causal = flax_impl.causal_mask(CONTEXT_LENGTH)
    return {
        "causal": causal,
        "edited": causal.at[15:, 3].set(2.0).at[7, 9].set(0.0),
        "closed": causal.at[12].set(1.0),
    }
