"""An MLP with batch normalization and a residual branch, in PyTorch and in Flax Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F


class TorchMlp(torch.nn.Module):
    """Standardizes each row, then classifies it with a residual MLP."""

    def __init__(
        self,
        features: int = 6,
        hidden: int = 8,
        classes: int = 5,
        temperature: float = 0.7,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.fc1 = torch.nn.Linear(features, hidden)
        self.bn1 = torch.nn.BatchNorm1d(hidden)
        self.fc2 = torch.nn.Linear(hidden, hidden)
        self.bn2 = torch.nn.BatchNorm1d(hidden)
        self.head = torch.nn.Linear(hidden, classes)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        mean = inputs.mean(dim=-1, keepdim=True)
        std = inputs.std(dim=-1, keepdim=True)
        scaled = (inputs - mean) / (std + 1e-3)
        trunk = self.fc1(scaled)
        trunk = self.bn1(trunk)
        trunk = F.leaky_relu(trunk, negative_slope=0.1)
        branch = self.fc2(trunk)
        branch = self.bn2(branch)
        branch = F.leaky_relu(branch, negative_slope=0.2)
        merged = trunk + branch
        logits = self.head(merged)
        logits = logits / self.temperature
        return torch.softmax(logits, dim=-1)


class FlaxMlp(nn.Module):
    """The port of TorchMlp."""

    hidden: int = 8
    classes: int = 5
    temperature: float = 0.7

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        frozen = not train
        mu = jnp.mean(x, axis=-1, keepdims=True)
        sigma = jnp.std(x, axis=-1, ddof=1, keepdims=True)
        x = (x - mu) / (sigma + 1e-3)
        x = nn.Dense(self.hidden, name="fc1")(x)
        x = nn.BatchNorm(use_running_average=frozen, momentum=0.9, epsilon=1e-5, name="bn1")(x)
        x = nn.leaky_relu(x, negative_slope=0.1)
        y = nn.Dense(self.hidden, name="fc2")(x)
        y = nn.BatchNorm(use_running_average=frozen, momentum=0.9, epsilon=1e-5, name="bn2")(y)
        y = nn.leaky_relu(y, negative_slope=0.2)
        x = x + y
        x = nn.Dense(self.classes, name="head")(x)
        x = x / self.temperature
        return nn.softmax(x, axis=-1)


def torch_module() -> torch.nn.Module:
    """The seeded module, with running statistics as after some training."""
    torch.manual_seed(0)
    module = TorchMlp()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for norm in (module.bn1, module.bn2):
            norm.running_mean.normal_(0.0, 0.3)
            norm.running_var.uniform_(0.3, 1.5)
    return module.eval()


def flax_module() -> nn.Module:
    """The Linen module, without variables."""
    return FlaxMlp()


def inputs() -> np.ndarray:
    """Seven rows of six features."""
    rng = np.random.default_rng(0)
    return rng.normal(0.5, 1.3, size=(7, 6)).astype(np.float32)
