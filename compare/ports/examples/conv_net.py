"""A small convolutional classifier, in PyTorch (NCHW) and in Flax NNX (NHWC)."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from flax import nnx


class TorchConvNet(torch.nn.Module):
    """A strided stem, a grouped dilated convolution with a channel shuffle, a linear head."""

    def __init__(self, channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(channels, 8, kernel_size=3, stride=2, padding=1)
        self.norm1 = torch.nn.GroupNorm(4, 8, eps=1e-5)
        self.mixer = torch.nn.Conv2d(8, 12, kernel_size=3, padding=2, dilation=2, groups=2)
        self.norm2 = torch.nn.GroupNorm(3, 12, eps=1e-5)
        self.point = torch.nn.Conv2d(12, 12, kernel_size=1, groups=4)
        self.head = torch.nn.Linear(12, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(image)
        hidden = self.norm1(hidden)
        hidden = F.relu(hidden)
        hidden = F.max_pool2d(hidden, kernel_size=3, stride=2, padding=1)
        mixed = self.mixer(hidden)
        mixed = self.norm2(mixed)
        mixed = F.gelu(mixed)
        batch, channels, height, width = mixed.shape
        grouped = mixed.reshape(batch, 2, channels // 2, height, width)
        shuffled = grouped.transpose(1, 2)
        shuffled = shuffled.reshape(batch, channels, height, width)
        pointwise = self.point(shuffled)
        merged = mixed + pointwise
        pooled = merged.mean(dim=(2, 3))
        return self.head(pooled)


class NnxConvNet(nnx.Module):
    """The port of TorchConvNet."""

    def __init__(self, channels: int = 3, classes: int = 5, *, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(channels, 8, (3, 3), strides=2, padding=1, rngs=rngs)
        self.norm1 = nnx.GroupNorm(8, num_groups=4, epsilon=1e-5, rngs=rngs)
        self.mixer = nnx.Conv(
            8,
            12,
            (3, 3),
            padding=2,
            kernel_dilation=2,
            feature_group_count=2,
            rngs=rngs,
        )
        self.norm2 = nnx.GroupNorm(12, num_groups=3, epsilon=1e-5, rngs=rngs)
        self.point = nnx.Conv(12, 12, (1, 1), feature_group_count=4, rngs=rngs)
        self.head = nnx.Linear(12, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        x = self.norm1(x)
        x = nnx.relu(x)
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        x = self.mixer(x)
        x = self.norm2(x)
        x = nnx.gelu(x, approximate=False)
        b, h, w, c = x.shape
        y = x.reshape(b, h, w, 2, c // 2)
        y = jnp.swapaxes(y, 3, 4)
        y = y.reshape(b, h, w, c)
        y = self.point(y)
        x = x + y
        x = jnp.mean(x, axis=(1, 2))
        return self.head(x)


def torch_module() -> torch.nn.Module:
    """The seeded module."""
    torch.manual_seed(1)
    module = TorchConvNet()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def flax_module() -> nnx.Module:
    """The NNX model."""
    return NnxConvNet(rngs=nnx.Rngs(0))


def inputs() -> np.ndarray:
    """Two images, NCHW, neither square nor of odd height."""
    rng = np.random.default_rng(1)
    return rng.normal(0.2, 1.0, size=(2, 3, 18, 14)).astype(np.float32)


def flax_inputs(image: jax.Array) -> jax.Array:
    """NCHW to NHWC."""
    return image.transpose(0, 2, 3, 1)
