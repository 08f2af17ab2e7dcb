"""An upsampling residual block with squeeze-and-excitation, in PyTorch and in Flax Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F


class TorchUpsampler(torch.nn.Module):
    """Normalizes, upsamples, convolves, and gates the channels of the result."""

    def __init__(self, channels: int = 6, squeezed: int = 4) -> None:
        super().__init__()
        self.norm = torch.nn.GroupNorm(3, channels, eps=1e-6)
        self.conv1 = torch.nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.squeeze = torch.nn.Linear(channels, squeezed)
        self.excite = torch.nn.Linear(squeezed, channels)
        self.skip = torch.nn.Conv2d(channels, channels, kernel_size=1)
        self.conv2 = torch.nn.Conv2d(
            channels,
            channels,
            kernel_size=3,
            padding=1,
            padding_mode="reflect",
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(image)
        hidden = F.silu(hidden)
        hidden = F.interpolate(hidden, scale_factor=2, mode="nearest")
        hidden = self.conv1(hidden)
        pooled = hidden.mean(dim=(2, 3))
        reduced = self.squeeze(pooled)
        reduced = F.relu(reduced)
        expanded = self.excite(reduced)
        gate = torch.sigmoid(expanded)
        gated = hidden * gate[:, :, None, None]
        larger = F.interpolate(image, scale_factor=2, mode="nearest")
        shortcut = self.skip(larger)
        merged = (gated + shortcut) * 0.5**0.5
        return self.conv2(merged)


class FlaxUpsampler(nn.Module):
    """The port of TorchUpsampler."""

    channels: int = 6
    squeezed: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = nn.GroupNorm(num_groups=3, epsilon=1e-6, name="norm")(x)
        y = nn.silu(y)
        y = jax.image.resize(y, (b, 2 * h, 2 * w, c), method="nearest")
        y = nn.Conv(self.channels, (3, 3), padding=1, name="conv1")(y)
        s = jnp.mean(y, axis=(1, 2))
        s = nn.Dense(self.squeezed, name="squeeze")(s)
        s = nn.relu(s)
        s = nn.Dense(self.channels, name="excite")(s)
        s = nn.sigmoid(s)
        y = y * s[:, None, None, :]
        x = jnp.repeat(x, 2, axis=1)
        x = jnp.repeat(x, 2, axis=2)
        x = nn.Conv(self.channels, (1, 1), name="skip")(x)
        y = (x + y) / jnp.sqrt(2.0)
        y = jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        return nn.Conv(self.channels, (3, 3), padding="VALID", name="conv2")(y)


def torch_module() -> torch.nn.Module:
    """The seeded module."""
    torch.manual_seed(4)
    module = TorchUpsampler()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def flax_module() -> nn.Module:
    """The Linen module, without variables."""
    return FlaxUpsampler()


def inputs() -> np.ndarray:
    """Two images, NCHW."""
    rng = np.random.default_rng(4)
    return rng.normal(0.3, 1.0, size=(2, 6, 3, 5)).astype(np.float32)


def flax_inputs(image: jax.Array) -> jax.Array:
    """NCHW to NHWC."""
    return image.transpose(0, 2, 3, 1)


def from_flax(outputs: jax.Array) -> jax.Array:
    """NHWC to NCHW."""
    return outputs.transpose(0, 3, 1, 2)
