"""A block in torch and its port in Linen and NNX, with places to go wrong."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

WIDTH = 8


class TorchBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH)
        self.out = torch.nn.BatchNorm1d(WIDTH)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(inputs)
        hidden = self.up(hidden)
        hidden = torch.nn.functional.gelu(hidden)  # TORCH GELU
        hidden = self.down(hidden)
        outputs = inputs + hidden  # TORCH RESIDUAL
        return self.out(outputs.transpose(1, 2)).transpose(1, 2)


class LinenBlock(linen.Module):
    approximate: bool = False
    momentum: float = 0.9
    factor: float = 1.0

    @linen.compact
    def __call__(self, inputs: Any, train: bool = False) -> Any:
        hidden = linen.LayerNorm(epsilon=1e-5, name="norm")(inputs)
        hidden = linen.Dense(2 * WIDTH, name="up")(hidden)
        hidden = linen.gelu(hidden, approximate=self.approximate)  # FLAX GELU
        hidden = linen.Dense(WIDTH, name="down")(hidden)
        if self.factor != 1.0:
            hidden = self.factor * hidden  # FLAX FACTOR
        outputs = inputs + hidden
        return linen.BatchNorm(
            use_running_average=not train, epsilon=1e-5, momentum=self.momentum, name="out"
        )(outputs)


class NnxBlock(nnx.Module):
    def __init__(self, shift: int = 0) -> None:
        rngs = nnx.Rngs(0)
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.out = nnx.BatchNorm(WIDTH, epsilon=1e-5, momentum=0.9, rngs=rngs)
        self.shift = shift

    def __call__(self, inputs: Any) -> Any:
        hidden = self.up(self.norm(inputs))
        hidden = jax.nn.gelu(hidden, approximate=False)
        hidden = self.down(hidden)
        if self.shift:
            hidden = jnp.roll(hidden, self.shift, axis=1)  # FLAX ROLL
        return self.out(inputs + hidden)


def inputs() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 5, WIDTH)).astype(np.float32)


def torch_block() -> TorchBlock:
    torch.manual_seed(0)
    return TorchBlock()
