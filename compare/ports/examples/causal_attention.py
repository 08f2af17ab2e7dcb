"""Causal self-attention whose mask is state, in PyTorch and in Flax Linen."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch


class TorchAttention(torch.nn.Module):
    """Attention with several heads; the mask, True where attention is blocked, is a buffer."""

    mask: torch.Tensor
    seen: torch.Tensor
    average: torch.Tensor

    def __init__(self, dim: int = 10, heads: int = 2, context_length: int = 9) -> None:
        super().__init__()
        self.heads = heads
        self.W_query = torch.nn.Linear(dim, dim, bias=False)
        self.W_key = torch.nn.Linear(dim, dim, bias=False)
        self.W_value = torch.nn.Linear(dim, dim, bias=False)
        self.out_proj = torch.nn.Linear(dim, dim)
        blocked = torch.ones(context_length, context_length, dtype=torch.bool).triu(1)
        self.register_buffer("mask", blocked)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int32))
        self.register_buffer("average", torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, dim = x.shape
        queries = self.W_query(x).view(batch, tokens, self.heads, dim // self.heads)
        keys = self.W_key(x).view(batch, tokens, self.heads, dim // self.heads)
        values = self.W_value(x).view(batch, tokens, self.heads, dim // self.heads)
        queries = queries.transpose(1, 2)
        keys = keys.transpose(1, 2)
        values = values.transpose(1, 2)
        scores = queries @ keys.transpose(2, 3)
        blocked = self.mask[:tokens, :tokens]
        scores = scores.masked_fill(blocked, -torch.inf)
        scores = scores / math.sqrt(keys.shape[-1])
        weights = torch.softmax(scores, dim=-1)
        context = (weights @ values).transpose(1, 2)
        context = context.reshape(batch, tokens, dim)
        if self.training:
            self.seen += batch
            level = context.detach().mean(dim=(0, 1))
            self.average.lerp_(level, 0.1)
        context = context - self.average
        return self.out_proj(context)


class FlaxAttention(nn.Module):
    """The port of TorchAttention; the mask is a variable of the collection `buffers`."""

    heads: int = 2
    context_length: int = 9

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        b, t, d = x.shape
        shape = (self.context_length, self.context_length)
        mask = self.variable("buffers", "mask", lambda: jnp.triu(jnp.ones(shape, bool), k=1))
        seen = self.variable("buffers", "seen", lambda: jnp.zeros((), jnp.int32))
        average = self.variable("buffers", "average", lambda: jnp.zeros(d))
        q = nn.Dense(d, use_bias=False, name="W_query")(x)
        k = nn.Dense(d, use_bias=False, name="W_key")(x)
        v = nn.Dense(d, use_bias=False, name="W_value")(x)
        q = q.reshape(b, t, self.heads, -1).swapaxes(1, 2)
        k = k.reshape(b, t, self.heads, -1).swapaxes(1, 2)
        v = v.reshape(b, t, self.heads, -1).swapaxes(1, 2)
        logits = jnp.einsum("bhqd,bhkd->bhqk", q, k)
        blocked = mask.value[:t, :t]
        logits = jnp.where(blocked, -jnp.inf, logits)
        logits = logits / math.sqrt(d // self.heads)
        probs = nn.softmax(logits, axis=-1)
        y = jnp.einsum("bhqk,bhkd->bqhd", probs, v)
        y = y.reshape(b, t, d)
        if train and not self.is_initializing():
            seen.value += b
            level = jnp.mean(jax.lax.stop_gradient(y), axis=(0, 1))
            average.value += 0.1 * (level - average.value)
        y = y - average.value
        return nn.Dense(d, name="out_proj")(y)


def torch_module() -> torch.nn.Module:
    """The seeded module, whose mask was edited: the first token is seen by none but itself."""
    torch.manual_seed(7)
    module = TorchAttention()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        module.average.normal_(0.0, 0.3)
        module.mask[1:, 0] = True
    return module.eval()


def flax_module() -> nn.Module:
    """The Linen module, without variables."""
    return FlaxAttention()


def inputs() -> np.ndarray:
    """Three sequences of seven tokens, shorter than the mask."""
    rng = np.random.default_rng(7)
    return rng.normal(0.1, 1.0, size=(3, 7, 10)).astype(np.float32)
