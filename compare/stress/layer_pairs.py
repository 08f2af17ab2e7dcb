"""Pairs of a torch and a Flax layer whose arguments agree, or differ in one of them.

Inputs have their channels last, as Flax wants them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx
from torch import nn

F64: dict[str, Any] = {"dtype": jnp.float64, "param_dtype": jnp.float64}
_NNX_NAMES = {
    "Dense": "Linear",
    "DenseGeneral": "LinearGeneral",
    "MultiHeadDotProductAttention": "MultiHeadAttention",
}
# How often one argument of the Flax layer is drawn anew.
_DIFFERS = 0.35


@dataclass
class Pair:
    """A torch layer, its Flax layer in one of the two APIs, and what calls them.

    Attributes:
        name: the types of both layers and the arguments, for the report.
        layer: the torch layer, in evaluation.
        flax: a Linen module, or a function that makes the NNX model.
        inputs: the array that both are called with.
        channels_first: whether torch wants the channels in the second axis.
        layouts: what neither side shows.
        call_torch: calls the torch layer.
        call_flax: calls the NNX model, or the Linen module once its variables are bound.
        warned: whether a difference in training was warned of.
    """

    name: str
    layer: nn.Module
    flax: Any
    inputs: np.ndarray
    channels_first: bool = False
    layouts: Mapping[str, str] = field(default_factory=dict)
    call_torch: Callable[[Any, torch.Tensor], torch.Tensor] = lambda layer, inputs: layer(inputs)
    call_flax: Callable[[Any, jax.Array], jax.Array] = lambda layer, inputs: layer(inputs)
    warned: Callable[[], bool] = lambda: False

    def torch_outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the torch layer, channels last."""
        if not self.channels_first:
            return self.call_torch(self.layer, inputs)
        outputs = self.call_torch(self.layer, inputs.movedim(-1, 1).contiguous())
        # Contiguous: torch 2.13 ends the process in the backward pass of a GroupNorm whose gradient
        # is strided.
        return outputs.movedim(1, -1).contiguous()


class Draw:
    """Draws arguments, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.is_nnx = self.flag()

    def one(self, *choices: Any) -> Any:
        """Return one of the choices."""
        return choices[int(self.random.integers(len(choices)))]

    def flag(self, often: float = 0.5) -> bool:
        """Return True so often."""
        return bool(self.random.random() < often)

    def each(self, rank: int, *choices: Any) -> tuple[Any, ...]:
        """Return one of the choices for each axis."""
        return tuple(self.one(*choices) for _ in range(rank))

    def values(self, *shape: int) -> np.ndarray:
        """Return random numbers."""
        return self.random.standard_normal(shape)

    def altered(self, arguments: dict[str, Any], **choices: tuple[Any, ...]) -> dict[str, Any]:
        """Return the arguments, with now and then one of these drawn anew."""
        if not self.flag(_DIFFERS):
            return arguments
        name = self.one(*choices)
        return {**arguments, name: self.one(*choices[name])}

    def flax(self, name: str, sizes: Mapping[str, Any], **arguments: Any) -> Any:
        """Return the Linen module of that name, or a function that makes the NNX one.

        Args:
            name: the name of Linen's type.
            sizes: the sizes of NNX's layer, in its order and with Linen's names; Linen does not
                want those that begin with `in`.
            arguments: the arguments of both.
        """
        if self.is_nnx:
            layer = getattr(nnx, _NNX_NAMES.get(name, name))
            return lambda: layer(*sizes.values(), **arguments, **F64, rngs=nnx.Rngs(0))
        linen_sizes = {name: size for name, size in sizes.items() if not name.startswith("in")}
        return getattr(linen, name)(**linen_sizes, **arguments, **F64)


def _linear(draw: Draw) -> Pair:
    fan_in, out, bias = draw.one(1, 2, 3, 4), draw.one(1, 2, 4), draw.flag()
    rank = draw.one(0, 0, 1, 2)
    kinds = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d}
    more: dict[str, Any] = {"kernel_size": 1, "stride": draw.one(1, 1, 2)} if rank else {}
    if rank and draw.flag(0.2):
        more |= {"padding": 1}
    layer = kinds[rank](fan_in, out, bias=bias, **more)
    options = draw.altered({"use_bias": bias}, use_bias=(True, False))
    kind = draw.one("Dense", "DenseGeneral", "heads", "Conv")
    sizes: dict[str, Any] = {"in": fan_in, "features": out}
    layouts = {}
    if kind == "Conv":
        sizes |= {"kernel_size": (1,) * max(rank, 1)}
        options |= {"strides": draw.one(1, 1, 2), "padding": draw.one("SAME", "SAME", 0, 1)}
    elif kind == "heads":
        sizes |= {"features": (2, out // 2) if out > 1 else (1, 1)}
        layouts = {"*.weight": f"(a b) c{' 1' * rank} -> c a b"}
    flax = draw.flax("DenseGeneral" if kind == "heads" else kind, sizes, **options)
    inputs = draw.values(2, *(3,) * max(rank, 1), fan_in)
    return Pair(f"{layer} and {kind} {options}", layer, flax, inputs, rank > 0, layouts)


def _convolution(draw: Draw) -> Pair:
    rank, groups = draw.one(1, 1, 2, 3), draw.one(1, 1, 2)
    fan_in, out = groups * draw.one(1, 2), groups * draw.one(1, 2)
    window, stride, dilation = (
        draw.each(rank, 1, 2, 3),
        draw.each(rank, 1, 2),
        draw.each(rank, 1, 2),
    )
    mode = draw.one("zeros", "zeros", "circular", "reflect")
    pads = draw.each(rank, 0, 1)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    layer = kind(fan_in, out, window, stride, pads, dilation, groups, draw.flag(), mode)
    usual = {
        "strides": stride,
        "kernel_dilation": dilation,
        "feature_group_count": groups,
        "use_bias": layer.bias is not None,
        "padding": tuple((pad, pad) for pad in pads) if mode == "zeros" else mode.upper(),
    }
    options = draw.altered(
        usual,
        strides=(draw.each(rank, 1, 2), 1, 2, None),
        kernel_dilation=(draw.each(rank, 1, 2), 1, 2),
        feature_group_count=(1, groups),
        use_bias=(True, False),
        padding=("SAME", "VALID", "CIRCULAR", "REFLECT", 1, 0, ((0, 1),) * rank),
    )
    sizes = {"in": fan_in, "features": out, "kernel_size": window}
    flax = draw.flax("Conv", sizes, **options)
    shape = [spread * (size - 1) + 2 for size, spread in zip(window, dilation, strict=True)]
    return Pair(f"{layer} and {options}", layer, flax, draw.values(2, *shape, fan_in), True)


def _transposed(draw: Draw) -> Pair:
    rank, fan_in, out = draw.one(1, 1, 2), draw.one(1, 2, 3), draw.one(1, 2, 3)
    window, stride, dilation = (
        draw.each(rank, 1, 2, 3),
        draw.each(rank, 1, 2),
        draw.each(rank, 1, 2),
    )
    reach = [spread * (size - 1) for size, spread in zip(window, dilation, strict=True)]
    pads = tuple(draw.one(*range(far + 1)) for far in reach)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d)[rank - 1]
    layer = kind(fan_in, out, window, stride, pads, bias=draw.flag(), dilation=dilation)
    usual = {
        "strides": stride,
        "kernel_dilation": dilation,
        "use_bias": layer.bias is not None,
        "padding": tuple((far - pad, far - pad) for far, pad in zip(reach, pads, strict=True)),
        "transpose_kernel": draw.flag(),
    }
    options = draw.altered(
        usual,
        strides=(draw.each(rank, 1, 2), None),
        kernel_dilation=(draw.each(rank, 1, 2), None),
        use_bias=(True, False),
        padding=("SAME", "VALID", "CIRCULAR", 1, 0),
    )
    sizes = {"in": fan_in, "features": out, "kernel_size": window}
    flax = draw.flax("ConvTranspose", sizes, **options)
    layout = "conv" if options["transpose_kernel"] else "conv_transpose"
    layouts = {} if draw.is_nnx else {"*.weight": layout}
    inputs = draw.values(2, *draw.each(rank, 2, 3), fan_in)
    return Pair(f"{layer} and {options}", layer, flax, inputs, True, layouts)


def _norm(draw: Draw) -> Pair:
    size, epsilon = draw.one(2, 4), draw.one(1e-3, 1e-5)
    kind, affine = draw.one("Layer", "RMS", "Group", "Batch", "Instance"), draw.flag(0.8)
    groups = draw.one(1, 2)
    layers: dict[str, Callable[[], nn.Module]] = {
        "Layer": lambda: nn.LayerNorm(size, epsilon, affine, bias=affine and draw.flag()),
        "RMS": lambda: nn.RMSNorm(size, epsilon, affine),
        "Group": lambda: nn.GroupNorm(groups, size, epsilon, affine),
        "Batch": lambda: nn.BatchNorm1d(size, epsilon, affine=affine),
        "Instance": lambda: nn.InstanceNorm1d(size, epsilon, affine=affine),
    }
    layer: Any = layers[kind]()
    if kind == "Batch":
        layer.running_mean = torch.from_numpy(draw.values(size))
        layer.running_var = torch.from_numpy(draw.random.uniform(0.5, 2.0, size))
    other = kind if draw.flag(0.8) else draw.one(*layers)
    usual: dict[str, Any] = {"epsilon": epsilon, "use_scale": layer.weight is not None}
    if other != "RMS":
        usual |= {"use_bias": getattr(layer, "bias", None) is not None}
    if other == "Group":
        usual |= {"num_groups": groups}
    if other == "Batch":
        usual |= {"use_running_average": True, "momentum": draw.one(0.9, 0.99)}
    else:
        usual |= {} if other == "RMS" else {"use_fast_variance": False}
    choices: dict[str, tuple[Any, ...]] = {"epsilon": (1e-3, 1e-5), "use_scale": (True, False)}
    choices |= {"use_bias": (True, False)} if other != "RMS" else {}
    choices |= {"num_groups": (1, 2)} if other == "Group" else {}
    choices |= {"reduction_axes": (-1, (-2, -1))} if other in ("Layer", "RMS") else {}
    options = draw.altered(usual, **choices)
    flax = draw.flax(f"{other}Norm", {"in": size}, **options)
    inputs = draw.values(3, 4, size)
    is_first = kind in ("Group", "Batch", "Instance")
    return Pair(f"{layer} and {other}Norm {options}", layer, flax, inputs, is_first)


def _embedding(draw: Draw) -> Pair:
    count, size = draw.one(2, 5), draw.one(1, 3)
    layer = nn.Embedding(count, size, padding_idx=draw.one(None, None, 0))
    flax = draw.flax("Embed", {"num_embeddings": count, "features": size})
    return Pair(str(layer), layer, flax, draw.random.integers(0, count, (2, 3)))


def _prelu(draw: Draw) -> Pair:
    layer = nn.PReLU(draw.one(1, 1, 1, 4))
    flax: Any = linen.PReLU(param_dtype=jnp.float64)
    if draw.is_nnx:
        flax = partial(nnx.PReLU, param_dtype=jnp.float64)
    return Pair(str(layer), layer, flax, draw.values(2, 4, 3))


def _attention(draw: Draw) -> Pair:
    heads, width, bias = draw.one(1, 2), draw.one(2, 3), draw.flag()
    size = 2 * width
    layer = nn.MultiheadAttention(size, heads, draw.one(0.0, 0.1), bias, batch_first=True)
    usual = {"num_heads": heads, "use_bias": bias, "normalize_qk": False}
    options = draw.altered(usual, num_heads=(1, 2), use_bias=(True, False), normalize_qk=(True,))
    more: dict[str, Any] = {"dropout_rate": layer.dropout, "deterministic": True}
    more |= {"in_features": size, "decode": False} if draw.is_nnx else {}
    attention = "MultiHeadDotProductAttention"
    flax = draw.flax(attention, {}, attention_fn=_attended, **options, **more)

    def call(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = layer(inputs, inputs, inputs, need_weights=False)[0]
        return outputs

    inputs = draw.values(2, 3, size)
    return Pair(f"{layer} and {options}", layer, flax, inputs, call_torch=call)


def _attended(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    """Attend in float64: Flax's own attention takes the softmax in float32."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value)


class _TorchMlp(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(3, 4), activation

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.act(self.fc(inputs))
        return outputs


class _Mlp(nnx.Module):
    def __init__(self, activation: Callable[..., Any]) -> None:
        self.fc, self.act = nnx.Linear(3, 4, rngs=nnx.Rngs(0), **F64), activation

    def __call__(self, inputs: Any) -> Any:
        return self.act(self.fc(inputs))


def _activation(draw: Draw) -> Pair:
    """Only an NNX model stores its activation, so that it can be compared."""
    draw.is_nnx = True
    kinds = partial(nn.GELU, "tanh"), nn.LeakyReLU, nn.ELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.GELU
    at = draw.one(*range(len(kinds)))
    layer = _TorchMlp(kinds[at]())
    exact = partial(nnx.gelu, approximate=False)
    functions = nnx.gelu, nnx.leaky_relu, nnx.elu, nnx.relu, nnx.silu, nnx.tanh, exact
    function = functions[at] if draw.flag() else draw.one(*functions)
    name = f"{layer.act} and {getattr(function, '__name__', function)}"
    # Beyond 6, XLA's tanh in float64, which is off by seven roundings near 1, decides GELU's slope.
    return Pair(name, layer, lambda: _Mlp(function), draw.values(2, 3) / 2)


FAMILIES = {
    "linear and one-point convolutions": _linear,
    "convolutions": _convolution,
    "transposed convolutions": _transposed,
    "norms": _norm,
    "embeddings": _embedding,
    "PReLU": _prelu,
    "attention": _attention,
    "activations": _activation,
}
