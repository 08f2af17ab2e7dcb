"""A pre-norm Transformer block written out by hand, in PyTorch and in Flax Linen."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F


class TorchBlock(torch.nn.Module):
    """Causal self-attention with key padding, then a GELU MLP."""

    def __init__(self, dim: int = 12, heads: int = 3, hidden: int = 20) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = torch.nn.LayerNorm(dim, eps=1e-5)
        self.query = torch.nn.Linear(dim, dim)
        self.key = torch.nn.Linear(dim, dim)
        self.value = torch.nn.Linear(dim, dim)
        self.out = torch.nn.Linear(dim, dim)
        self.norm2 = torch.nn.LayerNorm(dim, eps=1e-5)
        self.up = torch.nn.Linear(dim, hidden)
        self.down = torch.nn.Linear(hidden, dim)

    def split(self, projected: torch.Tensor) -> torch.Tensor:
        batch, length, dim = projected.shape
        heads = projected.view(batch, length, self.heads, dim // self.heads)
        return heads.transpose(1, 2)

    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        normed = self.norm1(x)
        query = self.split(self.query(normed))
        key = self.split(self.key(normed))
        value = self.split(self.value(normed))
        scores = query @ key.transpose(-2, -1)
        scores = scores / math.sqrt(query.shape[-1])
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        allowed = causal & valid[:, None, None, :]
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1)
        context = weights @ value
        context = context.transpose(1, 2).reshape(batch, length, dim)
        attended = self.out(context)
        x = x + attended
        normed = self.norm2(x)
        expanded = self.up(normed)
        activated = F.gelu(expanded)
        contracted = self.down(activated)
        return x + contracted


class FlaxBlock(nn.Module):
    """The port of TorchBlock."""

    heads: int = 3
    hidden: int = 20

    def split_heads(self, y: jax.Array) -> jax.Array:
        b, t, d = y.shape
        return y.reshape(b, t, self.heads, d // self.heads)

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        b, t, d = x.shape
        y = nn.LayerNorm(epsilon=1e-5, name="norm1")(x)
        q = self.split_heads(nn.Dense(d, name="query")(y))
        k = self.split_heads(nn.Dense(d, name="key")(y))
        v = self.split_heads(nn.Dense(d, name="value")(y))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        logits = logits / math.sqrt(q.shape[-1])
        causal = jnp.tril(jnp.ones((t, t), dtype=bool))
        mask = jnp.logical_and(causal, valid[:, None, None, :])
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
        probs = nn.softmax(logits, axis=-1)
        y = jnp.einsum("bhqk,bkhd->bqhd", probs, v)
        y = y.reshape(b, t, d)
        y = nn.Dense(d, name="out")(y)
        x = x + y
        y = nn.LayerNorm(epsilon=1e-5, name="norm2")(x)
        y = nn.Dense(self.hidden, name="up")(y)
        y = nn.gelu(y, approximate=False)
        y = nn.Dense(d, name="down")(y)
        return x + y


def torch_module() -> torch.nn.Module:
    """The seeded module."""
    torch.manual_seed(2)
    module = TorchBlock()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def flax_module() -> nn.Module:
    """The Linen module, without variables."""
    return FlaxBlock()


def inputs() -> dict[str, np.ndarray]:
    """Three sequences of up to six tokens; `valid` is false at padding."""
    rng = np.random.default_rng(2)
    x = rng.normal(0.1, 1.0, size=(3, 6, 12)).astype(np.float32)
    valid = np.arange(6) < np.array([6, 4, 5])[:, None]
    valid[0, 2] = False
    return {"x": x, "valid": valid}
