"""An LSTM tagger that returns mean tag log-probabilities, in PyTorch and in Flax Linen."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

Carry = tuple[jax.Array, jax.Array]


class TorchTagger(torch.nn.Module):
    """Embeds tokens, runs an LSTM over them, and averages log-probabilities over real tokens."""

    def __init__(self, vocab: int = 11, dim: int = 6, hidden: int = 7, tags: int = 4) -> None:
        super().__init__()
        self.hidden = hidden
        self.embedding = torch.nn.Embedding(vocab, dim)
        self.input_proj = torch.nn.Linear(dim, 4 * hidden)
        self.hidden_proj = torch.nn.Linear(hidden, 4 * hidden)
        self.head = torch.nn.Linear(2 * hidden, tags)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        batch, steps = tokens.shape
        position = torch.arange(steps, device=tokens.device)
        valid = position[None, :] < lengths[:, None]
        embedded = self.embedding(tokens)
        embedded = embedded * math.sqrt(embedded.shape[-1])
        hidden = embedded.new_zeros(batch, self.hidden)
        cell = embedded.new_zeros(batch, self.hidden)
        outputs = []
        for step in range(steps):
            gates = self.input_proj(embedded[:, step]) + self.hidden_proj(hidden)
            in_gate, forget_gate, candidate, out_gate = gates.chunk(4, dim=-1)
            in_gate = torch.sigmoid(in_gate)
            forget_gate = torch.sigmoid(forget_gate)
            candidate = torch.tanh(candidate)
            out_gate = torch.sigmoid(out_gate)
            new_cell = forget_gate * cell + in_gate * candidate
            new_hidden = out_gate * torch.tanh(new_cell)
            keep = valid[:, step, None]
            cell = torch.where(keep, new_cell, cell)
            hidden = torch.where(keep, new_hidden, hidden)
            outputs.append(hidden)
        states = torch.stack(outputs, dim=1)
        previous = F.pad(states, (0, 0, 1, 0))[:, :-1]
        features = torch.cat([states, previous], dim=-1)
        scores = self.head(features)
        log_probs = torch.log_softmax(scores, dim=-1)
        log_probs = log_probs * valid[:, :, None]
        total = log_probs.sum(dim=1)
        return total / lengths[:, None]


class FlaxTagger(nn.Module):
    """The port of TorchTagger."""

    vocab: int = 11
    dim: int = 6
    hidden: int = 7
    tags: int = 4

    def setup(self) -> None:
        self.embedding = nn.Embed(self.vocab, self.dim)
        self.input_proj = nn.Dense(4 * self.hidden)
        self.hidden_proj = nn.Dense(4 * self.hidden)
        self.head = nn.Dense(self.tags)

    def step(self, carry: Carry, inputs: tuple[jax.Array, jax.Array]) -> tuple[Carry, jax.Array]:
        h, c = carry
        x, keep = inputs
        z = self.input_proj(x) + self.hidden_proj(h)
        i, f, g, o = jnp.split(z, 4, axis=-1)
        i = nn.sigmoid(i)
        f = nn.sigmoid(f)
        g = nn.tanh(g)
        o = nn.sigmoid(o)
        new_c = f * c + i * g
        new_h = o * nn.tanh(new_c)
        c = jnp.where(keep[:, None], new_c, c)
        h = jnp.where(keep[:, None], new_h, h)
        return (h, c), h

    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        b, t = tokens.shape
        mask = jnp.arange(t)[None, :] < lengths[:, None]
        x = self.embedding(tokens)
        x = x * math.sqrt(self.dim)
        zeros = jnp.zeros((b, self.hidden), dtype=x.dtype)
        scan = nn.scan(
            FlaxTagger.step,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        _, x = scan(self, (zeros, zeros), (x, mask))
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        x = jnp.concatenate([x, before], axis=-1)
        x = self.head(x)
        x = nn.log_softmax(x, axis=-1)
        x = x * mask[:, :, None]
        x = jnp.sum(x, axis=1)
        return x / lengths[:, None]


def torch_module() -> torch.nn.Module:
    """The seeded module."""
    torch.manual_seed(3)
    module = TorchTagger()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def flax_module() -> nn.Module:
    """The Linen module, without variables."""
    return FlaxTagger()


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Token ids of three sentences, padded with 0, and their lengths."""
    tokens = np.array([[4, 9, 2, 7, 1], [3, 10, 5, 0, 0], [8, 6, 6, 2, 0]], dtype=np.int32)
    return tokens, np.array([5, 3, 4], dtype=np.int32)
