"""A top-2 mixture of experts with a load-balancing value, in PyTorch and in Flax NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx


class TorchMoe(torch.nn.Module):
    """Sends each token to its best experts, each a two-layer MLP."""

    def __init__(self, dim: int = 6, hidden: int = 5, experts: int = 4, top_k: int = 2) -> None:
        super().__init__()
        self.experts = experts
        self.top_k = top_k
        self.gate = torch.nn.Linear(dim, experts)
        self.w1 = torch.nn.Parameter(0.5 * torch.randn(experts, dim, hidden))
        self.b1 = torch.nn.Parameter(0.2 * torch.randn(experts, hidden))
        self.w2 = torch.nn.Parameter(0.5 * torch.randn(experts, hidden, dim))
        self.b2 = torch.nn.Parameter(0.2 * torch.randn(experts, dim))

    def forward(
        self, tokens: torch.Tensor, valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        flat = tokens.reshape(-1, tokens.shape[-1])
        real = valid.reshape(-1, 1).to(flat.dtype)
        logits = self.gate(flat)
        probs = torch.softmax(logits, dim=-1)
        top_probs, top_index = torch.topk(probs, self.top_k, dim=-1)
        top_probs = top_probs / top_probs.sum(dim=-1, keepdim=True)
        dispatch = F.one_hot(top_index, self.experts).to(flat.dtype)
        combine = torch.einsum("tk,tke->te", top_probs, dispatch)
        combine = combine * real
        hidden = torch.einsum("td,edh->teh", flat, self.w1)
        hidden = hidden + self.b1
        hidden = F.gelu(hidden, approximate="tanh")
        result = torch.einsum("teh,ehd->ted", hidden, self.w2)
        result = result + self.b2
        mixed = torch.einsum("ted,te->td", result, combine)
        mixed = mixed.reshape(tokens.shape)
        count = real.sum()
        load = combine.detach().sum(dim=0) / count
        importance = (probs * real).sum(dim=0) / count
        balance = self.experts * (load * importance).sum()
        return mixed, balance


class NnxMoe(nnx.Module):
    """The port of TorchMoe."""

    def __init__(
        self,
        dim: int = 6,
        hidden: int = 5,
        experts: int = 4,
        top_k: int = 2,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.experts = experts
        self.top_k = top_k
        self.gate = nnx.Linear(dim, experts, rngs=rngs)
        self.w1 = nnx.Param(0.5 * jax.random.normal(rngs.params(), (experts, dim, hidden)))
        self.b1 = nnx.Param(jnp.zeros((experts, hidden)))
        self.w2 = nnx.Param(0.5 * jax.random.normal(rngs.params(), (experts, hidden, dim)))
        self.b2 = nnx.Param(jnp.zeros((experts, dim)))

    def __call__(self, tokens: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = tokens.reshape(-1, tokens.shape[-1])
        keep = valid.reshape(-1, 1).astype(x.dtype)
        scores = self.gate(x)
        probs = nnx.softmax(scores, axis=-1)
        values, index = jax.lax.top_k(probs, self.top_k)
        values = values / jnp.sum(values, axis=-1, keepdims=True)
        chosen = nnx.one_hot(index, self.experts, dtype=x.dtype)
        weights = jnp.einsum("tk,tke->te", values, chosen)
        weights = weights * keep
        h = jnp.einsum("td,edh->teh", x, self.w1[...])
        h = h + self.b1[...]
        h = nnx.gelu(h, approximate=True)
        y = jnp.einsum("teh,ehd->ted", h, self.w2[...])
        y = y + self.b2[...]
        out = jnp.einsum("ted,te->td", y, weights)
        out = out.reshape(tokens.shape)
        total = jnp.sum(keep)
        share = jnp.sum(jax.lax.stop_gradient(weights), axis=0) / total
        importance = jnp.sum(probs * keep, axis=0) / total
        aux = self.experts * jnp.sum(share * importance)
        return out, aux


def torch_module() -> torch.nn.Module:
    """The seeded module."""
    torch.manual_seed(5)
    module = TorchMoe()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def flax_module() -> nnx.Module:
    """The NNX model."""
    return NnxMoe(rngs=nnx.Rngs(0))


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Two sequences of up to four tokens; `valid` is false at padding."""
    rng = np.random.default_rng(5)
    tokens = rng.normal(0.1, 1.0, size=(2, 4, 6)).astype(np.float32)
    valid = np.arange(4) < np.array([4, 3])[:, None]
    return tokens, valid
