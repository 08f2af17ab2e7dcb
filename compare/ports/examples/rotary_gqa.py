"""Rotary grouped-query attention with a sliding window, in PyTorch and in Flax Linen."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch


def torch_rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cosine + turned * sine


class TorchAttention(torch.nn.Module):
    """Pre-normalized attention with fewer key and value heads than query heads."""

    def __init__(
        self, dim: int = 16, heads: int = 4, kv_heads: int = 2, window: int = 3, cap: float = 2.0
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = dim // heads
        self.window = window
        self.cap = cap
        self.norm = torch.nn.RMSNorm(dim, eps=1e-5)
        self.query = torch.nn.Linear(dim, heads * self.head_dim, bias=False)
        self.key = torch.nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.value = torch.nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.out = torch.nn.Linear(heads * self.head_dim, dim)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        normed = self.norm(x)
        query = self.query(normed).view(batch, length, self.heads, self.head_dim)
        key = self.key(normed).view(batch, length, self.kv_heads, self.head_dim)
        value = self.value(normed).view(batch, length, self.kv_heads, self.head_dim)
        index = torch.arange(0, self.head_dim, 2, dtype=x.dtype, device=x.device)
        frequency = 100.0 ** (-index / self.head_dim)
        angles = positions[:, :, None].to(x.dtype) * frequency
        angles = torch.cat([angles, angles], dim=-1)[:, :, None, :]
        cosine = torch.cos(angles)
        sine = torch.sin(angles)
        query = torch_rotate(query, cosine, sine)
        key = torch_rotate(key, cosine, sine)
        key = key.repeat_interleave(self.heads // self.kv_heads, dim=2)
        value = value.repeat_interleave(self.heads // self.kv_heads, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key)
        scores = scores / math.sqrt(self.head_dim)
        scores = self.cap * torch.tanh(scores / self.cap)
        step = torch.arange(length, device=x.device)
        distance = step[:, None] - step[None, :]
        allowed = (distance >= 0) & (distance < self.window)
        scores = scores.masked_fill(~allowed, -1e30)
        weights = torch.softmax(scores, dim=-1)
        context = torch.einsum("bhqk,bkhd->bqhd", weights, value)
        return x + self.out(context.flatten(2))


def flax_rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-b, a], axis=-1)
    return x * cos + rotated * sin


class FlaxAttention(nn.Module):
    """The port of TorchAttention."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 4
    window: int = 3
    cap: float = 2.0

    @nn.compact
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        b, t, d = x.shape
        y = nn.RMSNorm(epsilon=1e-5, name="norm")(x)
        q = nn.Dense(self.heads * self.head_dim, use_bias=False, name="query")(y)
        k = nn.Dense(self.kv_heads * self.head_dim, use_bias=False, name="key")(y)
        v = nn.Dense(self.kv_heads * self.head_dim, use_bias=False, name="value")(y)
        q = q.reshape(b, t, self.heads, self.head_dim)
        k = k.reshape(b, t, self.kv_heads, self.head_dim)
        v = v.reshape(b, t, self.kv_heads, self.head_dim)
        inv_freq = 100.0 ** (-jnp.arange(0, self.head_dim, 2, dtype=x.dtype) / self.head_dim)
        theta = positions[:, :, None].astype(x.dtype) * inv_freq
        theta = jnp.concatenate([theta, theta], axis=-1)[:, :, None, :]
        cos = jnp.cos(theta)
        sin = jnp.sin(theta)
        q = flax_rotate(q, cos, sin)
        k = flax_rotate(k, cos, sin)
        k = jnp.repeat(k, self.heads // self.kv_heads, axis=2)
        v = jnp.repeat(v, self.heads // self.kv_heads, axis=2)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        logits = logits / math.sqrt(self.head_dim)
        logits = self.cap * jnp.tanh(logits / self.cap)
        offset = jnp.arange(t)[:, None] - jnp.arange(t)[None, :]
        mask = (offset >= 0) & (offset < self.window)
        logits = jnp.where(mask, logits, -1e30)
        probs = nn.softmax(logits, axis=-1)
        y = jnp.einsum("bhqk,bkhd->bqhd", probs, v)
        y = y.reshape(b, t, self.heads * self.head_dim)
        return x + nn.Dense(d, name="out")(y)


def torch_module() -> torch.nn.Module:
    """The seeded module."""
    torch.manual_seed(6)
    module = TorchAttention()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def flax_module() -> nn.Module:
    """The Linen module, without variables."""
    return FlaxAttention()


def inputs() -> dict[str, np.ndarray]:
    """Two rows of packed sequences: positions start again at each sequence."""
    rng = np.random.default_rng(6)
    x = rng.normal(0.1, 1.0, size=(2, 7, 16)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4, 0, 1], [0, 1, 0, 1, 2, 3, 4]], dtype=np.int32)
    return {"x": x, "positions": positions}
