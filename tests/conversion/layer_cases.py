"""Layers with random hyperparameters, each in torch, Linen and NNX."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from flax import nnx
from torch import Tensor

F64: dict[str, Any] = {"param_dtype": jnp.float64}


@dataclass
class Case:
    """A layer in its three forms, and how to call each with the same NumPy inputs.

    Channels come last in the inputs.
    """

    torch: torch.nn.Module
    linen: Any
    nnx: Any
    inputs: tuple[np.ndarray, ...]
    call_torch: Callable[..., Tensor] = lambda module, *inputs: module(*inputs)
    call_linen: Callable[..., Any] = lambda module, variables, *inputs: module.apply(
        variables, *inputs
    )
    call_nnx: Callable[..., Any] = lambda model, *inputs: model(*inputs)
    layouts: Mapping[str, str] = field(default_factory=dict)


def channels_last(module: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    # Contiguous: torch 2.13 ends the process in the backward pass of a GroupNorm whose gradient is
    # strided.
    return module(inputs.movedim(-1, 1).contiguous()).movedim(1, -1).contiguous()


def linear(random: np.random.Generator) -> Case:
    fan_in, fan_out, bias = (
        int(random.integers(1, 9)),
        int(random.integers(1, 9)),
        bool(random.integers(2)),
    )
    return Case(
        torch.nn.Linear(fan_in, fan_out, bias),
        nn.Dense(fan_out, use_bias=bias, **F64),
        nnx.Linear(fan_in, fan_out, use_bias=bias, rngs=nnx.Rngs(0), **F64),
        (random.standard_normal((2, 3, fan_in)),),
    )


class Bilinear(nn.Module):
    features: int

    @nn.compact
    def __call__(self, left: Any, right: Any) -> Any:
        shape = (self.features, left.shape[-1], right.shape[-1])
        kernel = self.param("kernel", nn.initializers.normal(), shape, jnp.float64)
        bias = self.param("bias", nn.initializers.normal(), (self.features,), jnp.float64)
        return jnp.einsum("bi,oij,bj->bo", left, kernel, right) + bias


class NnxBilinear(nnx.Module):
    def __init__(self, left: int, right: int, features: int) -> None:
        self.kernel = nnx.Param(jnp.zeros((features, left, right), jnp.float64))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float64))

    def __call__(self, left: Any, right: Any) -> Any:
        return jnp.einsum("bi,oij,bj->bo", left, self.kernel[...], right) + self.bias[...]


def bilinear(random: np.random.Generator) -> Case:
    left, right, features = (int(size) for size in random.integers(1, 6, 3))
    return Case(
        torch.nn.Bilinear(left, right, features),
        Bilinear(features),
        NnxBilinear(left, right, features),
        (random.standard_normal((4, left)), random.standard_normal((4, right))),
    )


class TorchEinsum(torch.nn.Module):
    """A layer whose weight has the same order of axes in Flax's Einsum."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape))
        self.bias = torch.nn.Parameter(torch.zeros(shape[0], shape[2]))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,oij->boj", inputs, self.weight) + self.bias


def einsum(random: np.random.Generator) -> Case:
    out, fan_in, features = (int(size) for size in random.integers(1, 6, 3))
    equation, shape = "bi,oij->boj", (out, fan_in, features)
    return Case(
        TorchEinsum(shape),
        nn.Einsum(shape, equation, **F64),
        nnx.Einsum(equation, shape, (out, features), rngs=nnx.Rngs(0), **F64),
        (random.standard_normal((4, fan_in)),),
        layouts={"weight": "same"},  # by default, a kernel of three axes is a convolution's
    )


def embedding(random: np.random.Generator) -> Case:
    count, features = int(random.integers(2, 9)), int(random.integers(1, 9))
    return Case(
        torch.nn.Embedding(count, features),
        nn.Embed(count, features, **F64),
        nnx.Embed(count, features, rngs=nnx.Rngs(0), **F64),
        (random.integers(0, count, (3, 5)),),
    )


def convolution(rank: int, random: np.random.Generator) -> Case:
    groups = int(random.integers(1, 4))
    fan_in, fan_out = groups * int(random.integers(1, 4)), groups * int(random.integers(1, 4))
    window, stride, dilation = (tuple(map(int, random.integers(1, 4, rank))) for _ in range(3))
    padding = tuple(int(random.integers(0, size + 1)) for size in window)
    bias = bool(random.integers(2))
    kind: Any = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[rank]
    options: Any = dict(
        padding=[(size, size) for size in padding],
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=bias,
    )
    sizes = [
        dilation[axis] * (window[axis] - 1) + 1 + int(random.integers(1, 4)) for axis in range(rank)
    ]
    return Case(
        kind(fan_in, fan_out, window, stride, padding, dilation, groups, bias),
        nn.Conv(fan_out, window, stride, **options, **F64),
        nnx.Conv(fan_in, fan_out, window, stride, **options, rngs=nnx.Rngs(0), **F64),
        (random.standard_normal((2, *sizes, fan_in)),),
        channels_last,
    )


def convolution_transposed(rank: int, random: np.random.Generator) -> Case:
    fan_in, fan_out = int(random.integers(1, 5)), int(random.integers(1, 5))
    window, stride, dilation = (tuple(map(int, random.integers(1, 4, rank))) for _ in range(3))
    extent = [dilation[axis] * (window[axis] - 1) for axis in range(rank)]
    padding = [int(random.integers(0, size + 1)) for size in extent]
    more = [int(random.integers(0, max(stride[axis], dilation[axis]))) for axis in range(rank)]
    kind: Any = {
        1: torch.nn.ConvTranspose1d,
        2: torch.nn.ConvTranspose2d,
        3: torch.nn.ConvTranspose3d,
    }[rank]
    flipped = bool(random.integers(2))
    options: Any = dict(
        padding=[
            (extent[axis] - padding[axis], extent[axis] - padding[axis] + more[axis])
            for axis in range(rank)
        ],
        kernel_dilation=dilation,
        transpose_kernel=flipped,
    )
    return Case(
        kind(fan_in, fan_out, window, stride, tuple(padding), tuple(more), dilation=dilation),
        nn.ConvTranspose(fan_out, window, stride, **options, **F64),
        nnx.ConvTranspose(fan_in, fan_out, window, stride, **options, rngs=nnx.Rngs(0), **F64),
        (random.standard_normal((2, *random.integers(2, 6, rank), fan_in)),),
        channels_last,
        layouts={"weight": "conv" if flipped else "conv_transpose"},
    )


class Flattened(nn.Module):
    features: int
    window: tuple[int, int]

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        maps = nn.Conv(self.features, self.window, padding="VALID", name="conv", **F64)(inputs)
        return nn.Dense(3, name="head", **F64)(maps.reshape(len(maps), -1))


class NnxFlattened(nnx.Module):
    def __init__(self, fan_in: int, features: int, window: tuple[int, int], size: int) -> None:
        self.conv = nnx.Conv(fan_in, features, window, padding="VALID", rngs=nnx.Rngs(0), **F64)
        self.head = nnx.Linear(size, 3, rngs=nnx.Rngs(0), **F64)

    def __call__(self, inputs: Any) -> Any:
        maps = self.conv(inputs)
        return self.head(maps.reshape(len(maps), -1))


def pair(random: np.random.Generator, low: int, high: int) -> tuple[int, int]:
    first, second = random.integers(low, high, 2)
    return int(first), int(second)


def flattened(random: np.random.Generator) -> Case:
    """A Linear after a flattened image: torch flattens (C, H, W), Flax (H, W, C)."""
    fan_in, features = int(random.integers(1, 4)), int(random.integers(2, 5))
    window, image = pair(random, 1, 4), pair(random, 4, 7)
    maps = [image[axis] - window[axis] + 1 for axis in range(2)]
    size = features * maps[0] * maps[1]
    module = torch.nn.Sequential()
    module.add_module("conv", torch.nn.Conv2d(fan_in, features, window))
    module.add_module("flatten", torch.nn.Flatten())
    module.add_module("head", torch.nn.Linear(size, 3))
    return Case(
        module,
        Flattened(features, window),
        NnxFlattened(fan_in, features, window, size),
        (random.standard_normal((2, *image, fan_in)),),
        lambda module, inputs: module(inputs.movedim(-1, 1)),
        layouts={"head.weight": f"flatten:{features},{maps[0]},{maps[1]}"},
    )


def layer_norm(random: np.random.Generator) -> Case:
    size, eps = int(random.integers(2, 9)), 10.0 ** -random.uniform(3, 6)
    return Case(
        torch.nn.LayerNorm(size, eps),
        nn.LayerNorm(epsilon=eps, use_fast_variance=False, **F64),
        nnx.LayerNorm(size, epsilon=eps, use_fast_variance=False, rngs=nnx.Rngs(0), **F64),
        (random.standard_normal((2, 3, size)),),
    )


def rms_norm(random: np.random.Generator) -> Case:
    size, eps = int(random.integers(2, 9)), 10.0 ** -random.uniform(3, 6)
    return Case(
        torch.nn.RMSNorm(size, eps),
        nn.RMSNorm(epsilon=eps, **F64),
        nnx.RMSNorm(size, epsilon=eps, rngs=nnx.Rngs(0), **F64),
        (random.standard_normal((2, 3, size)),),
    )


def group_norm(random: np.random.Generator) -> Case:
    groups, each, eps = (
        int(random.integers(1, 4)),
        int(random.integers(1, 4)),
        10.0 ** -random.uniform(3, 6),
    )
    options: Any = dict(num_groups=groups, epsilon=eps, use_fast_variance=False)
    return Case(
        torch.nn.GroupNorm(groups, groups * each, eps),
        nn.GroupNorm(**options, **F64),
        nnx.GroupNorm(groups * each, **options, rngs=nnx.Rngs(0), **F64),
        (random.standard_normal((2, 3, 5, groups * each)),),
        channels_last,
    )


def batch_norm(rank: int, random: np.random.Generator) -> Case:
    """Batch norm in evaluation mode, which reads the running statistics."""
    size, eps = int(random.integers(1, 6)), 10.0 ** -random.uniform(3, 6)
    kind = {1: torch.nn.BatchNorm1d, 2: torch.nn.BatchNorm2d, 3: torch.nn.BatchNorm3d}[rank]
    module = kind(size, eps).eval()
    module.running_mean = torch.from_numpy(random.standard_normal(size))
    module.running_var = torch.from_numpy(random.uniform(0.1, 3.0, size))
    return Case(
        module,
        nn.BatchNorm(use_running_average=True, epsilon=eps, **F64),
        nnx.BatchNorm(
            size,
            use_running_average=True,
            momentum=0.9,
            epsilon=eps,
            rngs=nnx.Rngs(0),
            **F64,
        ),
        (random.standard_normal((3, *random.integers(2, 4, rank), size)),),
        channels_last,
    )


def instance_norm(random: np.random.Generator) -> Case:
    size, eps = int(random.integers(1, 6)), 10.0 ** -random.uniform(3, 6)
    options: Any = dict(epsilon=eps, use_fast_variance=False)
    return Case(
        torch.nn.InstanceNorm2d(size, eps, affine=True),
        nn.InstanceNorm(**options, **F64),
        nnx.InstanceNorm(size, **options, rngs=nnx.Rngs(0), **F64),
        (random.standard_normal((2, 4, 5, size)),),
        channels_last,
    )


def prelu(random: np.random.Generator) -> Case:
    return Case(
        torch.nn.PReLU(), nn.PReLU(**F64), nnx.PReLU(**F64), (random.standard_normal((3, 4)),)
    )


def wide_attention(query: Any, key: Any, value: Any, mask: Any = None, **_: Any) -> Any:
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def attention(separate: bool, random: np.random.Generator) -> Case:
    """Multi-head attention with one fused input matrix or three separate ones.

    With separate matrices, keys and values come from other inputs, of other widths.
    """
    heads, each, bias = (
        int(random.integers(1, 4)),
        int(random.integers(1, 4)),
        bool(random.integers(2)),
    )
    size = heads * each
    module = torch.nn.MultiheadAttention(size, heads, bias=bias, batch_first=True)
    if separate:
        module = torch.nn.MultiheadAttention(
            size, heads, bias=bias, kdim=size + 1, vdim=size + 2, batch_first=True
        )
    queries, keys, values = (
        random.standard_normal((2, 5, width))
        for width in ((size, size + 1, size + 2) if separate else (size, size, size))
    )
    blocked = (
        np.triu(np.ones((5, 5), dtype=bool), 1)
        if random.integers(2)
        else np.eye(5, k=1, dtype=bool)
    )
    options: Any = dict(num_heads=heads, qkv_features=size, out_features=size, use_bias=bias)
    flax_nnx = None
    if not separate:  # NNX has a single width for keys and values
        # NNX's own attention always takes the softmax in float32.
        flax_nnx = nnx.MultiHeadAttention(
            in_features=size,
            **options,
            attention_fn=wide_attention,
            decode=False,
            rngs=nnx.Rngs(0),
            **F64,
        )
    return Case(
        module,
        nn.MultiHeadDotProductAttention(**options, **F64),
        flax_nnx,
        (queries, keys, values),
        lambda module, *inputs: module(
            *inputs, attn_mask=torch.from_numpy(blocked), need_weights=False
        )[0],
        lambda module, variables, queries, keys, values: module.apply(
            variables, queries, inputs_k=keys, inputs_v=values, mask=~blocked
        ),
        lambda model, *inputs: model(*inputs, mask=~blocked),
    )


def lstm(optimized: bool, random: np.random.Generator) -> Case:
    fan_in, size = int(random.integers(1, 6)), int(random.integers(1, 6))
    cell = nnx.OptimizedLSTMCell if optimized else nnx.LSTMCell
    return Case(
        torch.nn.LSTMCell(fan_in, size),
        (nn.OptimizedLSTMCell if optimized else nn.LSTMCell)(size, **F64),
        cell(fan_in, size, rngs=nnx.Rngs(0), **F64),
        (
            random.standard_normal((3, fan_in)),
            random.standard_normal((3, size)),
            random.standard_normal((3, size)),
        ),
        lambda module, inputs, hidden, memory: torch.cat(module(inputs, (hidden, memory)), dim=-1),
        lambda module, variables, inputs, hidden, memory: jnp.concatenate(
            module.apply(variables, (memory, hidden), inputs)[0][::-1], axis=-1
        ),
        lambda model, inputs, hidden, memory: jnp.concatenate(
            model((memory, hidden), inputs)[0][::-1], axis=-1
        ),
    )


def gru(random: np.random.Generator) -> Case:
    """A GRU cell. NNX lacks the bias inside the reset gate, so its test sets that bias to 0."""
    fan_in, size = int(random.integers(1, 6)), int(random.integers(1, 6))
    return Case(
        torch.nn.GRUCell(fan_in, size),
        nn.GRUCell(size, **F64),
        nnx.GRUCell(fan_in, size, rngs=nnx.Rngs(0), **F64),
        (random.standard_normal((3, fan_in)), random.standard_normal((3, size))),
        call_linen=lambda module, variables, inputs, hidden: module.apply(
            variables, hidden, inputs
        )[0],
        call_nnx=lambda model, inputs, hidden: model(hidden, inputs)[0],
    )


class Tied(torch.nn.Module):
    """One matrix both embeds the input words and scores the output words."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(count, size)
        self.head = torch.nn.Linear(size, count, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(tokens)))


class LinenTied(nn.Module):
    count: int
    size: int

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        embed = nn.Embed(self.count, self.size, name="embed", **F64)
        return embed.attend(jnp.tanh(embed(tokens)))


class NnxTied(nnx.Module):
    def __init__(self, count: int, size: int) -> None:
        self.embed = nnx.Embed(count, size, rngs=nnx.Rngs(0), **F64)

    def __call__(self, tokens: Any) -> Any:
        return self.embed.attend(jnp.tanh(self.embed(tokens)))


def tied(random: np.random.Generator) -> Case:
    count, size = int(random.integers(2, 9)), int(random.integers(1, 9))
    tokens = random.integers(0, count, (2, 3))
    return Case(Tied(count, size), LinenTied(count, size), NnxTied(count, size), (tokens,))


LAYERS: dict[str, Callable[[np.random.Generator], Case]] = {
    **{
        "linear": linear,
        "bilinear": bilinear,
        "einsum": einsum,
        "embedding": embedding,
        "flattened": flattened,
    },
    **{f"conv{rank}d": partial(convolution, rank) for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": partial(convolution_transposed, rank) for rank in (1, 2, 3)},
    **{f"batch_norm{rank}d": partial(batch_norm, rank) for rank in (1, 2, 3)},
    **{
        "layer_norm": layer_norm,
        "rms_norm": rms_norm,
        "group_norm": group_norm,
        "instance_norm": instance_norm,
    },
    **{
        "prelu": prelu,
        "attention": partial(attention, False),
        "attention_separate": partial(attention, True),
    },
    **{
        "lstm": partial(lstm, False),
        "lstm_optimized": partial(lstm, True),
        "gru": gru,
        "tied": tied,
    },
}
