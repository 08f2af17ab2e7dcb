"""What a torch layer and its Flax layer say besides their tensors, and where they differ."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..frameworks import jax, linen, nn, nnx, torch
from .activations import activation_differences
from .difference import Difference

Comparison = Callable[[Any, Any], Iterator[Difference]]
Pads = tuple[tuple[int, int], ...]
_INTEGERS = (int, np.integer)


def differences(torch_layer: nn.Module, flax_layer: Any) -> Iterator[Difference]:
    """Yield what the layers say differently. Layers that are not a known pair say nothing.

    Args:
        torch_layer: a torch layer.
        flax_layer: a Linen or NNX layer, or an activation function.
    """
    for torch_types, flax_types, compare in _PAIRS:
        if isinstance(torch_layer, torch_types) and isinstance(flax_layer, flax_types):
            yield from compare(torch_layer, flax_layer)
            return
    if isinstance(torch_layer, _NORMS) and isinstance(flax_layer, _FLAX_NORMS):
        ours, theirs = type(torch_layer).__name__, type(flax_layer).__name__
        yield Difference("type", ours, theirs, "take the norm of the same name")
    yield from activation_differences(torch_layer, flax_layer)


def embedding_differences(layer: nn.Embedding) -> Iterator[Difference]:
    """Yield what the layer says that no Embed of Flax can say."""
    for fact, value, nothing in (
        ("padding_idx", layer.padding_idx, None),
        ("scale_grad_by_freq", layer.scale_grad_by_freq, False),
    ):
        if value != nothing:
            yield Difference(
                fact,
                f"{fact}={value!r}",
                "an Embed, which has no such thing",
                "change the gradient of its embedding in Flax",
                trains_alone=True,
            )


def dense_differences(torch_layer: Any, flax_layer: Any) -> Iterator[Difference]:
    """Yield what a convolution over one point says that a dense layer on the other side cannot.

    Args:
        torch_layer: the torch layer, if it is known.
        flax_layer: the Flax layer, if it is known.
    """
    is_torchs = isinstance(torch_layer, nn.modules.conv._ConvNd)
    is_flaxs = isinstance(flax_layer, _FLAX_CONVS)
    if is_torchs == is_flaxs:
        return
    layer = torch_layer if is_torchs else flax_layer
    rank = len(layer.kernel_size) if not isinstance(layer.kernel_size, int) else 1
    if {*_each(layer.kernel_size, rank)} != {1}:
        return
    for fact, value in (_torch_facts if is_torchs else _flax_facts)(layer, rank):
        stated, nothing = f"{fact}={value!r}", "a dense layer, which has none"
        framework = "Flax" if is_torchs else "torch"
        mend = f"do the same to its input in {framework}, or build a convolution there"
        yield Difference(fact, *((stated, nothing) if is_torchs else (nothing, stated)), mend)


def _torch_facts(layer: Any, rank: int) -> Iterator[tuple[str, Any]]:
    """Yield what makes the convolution over one point more than a dense layer."""
    for fact, nothing in (("stride", 1), ("padding", 0), ("output_padding", 0), ("groups", 1)):
        value = getattr(layer, fact, nothing)
        if fact == "padding" and isinstance(value, str):  # "same" and "valid" add nothing here
            continue
        if {*_each(value, rank)} != {nothing}:
            yield fact, value


def _flax_facts(layer: Any, rank: int) -> Iterator[tuple[str, Any]]:
    """Yield the same of a convolution of Flax."""
    if {*_each(layer.strides, rank)} != {1}:
        yield "strides", layer.strides
    padding = layer.padding
    if not isinstance(padding, str) and any(map(any, _pairs(padding, rank))):
        yield "padding", padding
    if getattr(layer, "feature_group_count", 1) != 1:
        yield "feature_group_count", layer.feature_group_count
    if {*_each(getattr(layer, "input_dilation", 1), rank)} != {1}:
        yield "input_dilation", layer.input_dilation
    if layer.mask is not None:
        yield "mask", "…"


def linen_layers(module: linen.Module, inputs: Any) -> dict[tuple[str, ...], linen.Module]:
    """Return the layers of a Linen module by path. They exist only when the module is called.

    Args:
        module: the module.
        inputs: the arguments of its call, a tuple, or a dict of keywords. Shapes are enough.

    Raises:
        ValueError: the module cannot be called with these inputs.
    """
    layers: dict[tuple[str, ...], linen.Module] = {}

    def keep(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layers.setdefault(context.module.path, context.module)
        return method(*args, **kwargs)

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    if not isinstance(inputs, Mapping | tuple | list):
        inputs = (inputs,)
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    try:
        with linen.intercept_methods(keep):
            jax.eval_shape(partial(module.init, keys, **kwargs), *args)
    except Exception as error:  # whatever the module's own code raises
        raise ValueError(
            f"module {type(module).__name__} cannot be called with these inputs "
            f"({type(error).__name__}: {error}); give inputs=(…,) or a dict, as its call takes them"
        ) from error
    return layers


def _unequal(
    fact: str, torch_says: Any, flax_name: str, flax_says: Any, trains_alone: bool = False
) -> Iterator[Difference]:
    """Yield a difference if the two values are not equal."""
    if torch_says != flax_says:
        yield _difference(fact, torch_says, flax_name, flax_says, torch_says, trains_alone)


def _difference(
    fact: str,
    torch_says: Any,
    flax_name: str,
    flax_says: Any,
    wanted: Any,
    trains_alone: bool = False,
) -> Difference:
    """Return the difference of two values, of which Flax's should be the wanted one."""
    return Difference(
        fact,
        f"{fact}={torch_says!r}",
        f"{flax_name}={flax_says!r}",
        f"give {flax_name}={wanted!r} in Flax",
        trains_alone,
    )


def _conv(layer: Any, flax: Any) -> Iterator[Difference]:
    rank = len(layer.kernel_size)
    yield from _unequal("stride", layer.stride, "strides", _each(flax.strides, rank))
    dilation = _each(flax.kernel_dilation, rank)
    yield from _unequal("dilation", layer.dilation, "kernel_dilation", dilation)
    yield from _unequal("groups", layer.groups, "feature_group_count", flax.feature_group_count)
    yield from _not_in_torch("input_dilation", _each(flax.input_dilation, rank), (1,) * rank)
    yield from _not_in_torch("mask", flax.mask, None)
    pads, mode = _torch_pads(layer)
    flax_pads, flax_mode = _flax_pads(flax, _reach(layer.kernel_size, dilation))
    is_same = pads == flax_pads and (mode == flax_mode or not any(map(sum, pads)))
    if not is_same:
        yield Difference(
            "padding",
            f"padding={layer.padding!r}" + (f", padding_mode={mode!r}" if mode != "zeros" else ""),
            f"padding={flax.padding!r}",
            _padding_mend(pads, mode, _reach(layer.kernel_size, layer.dilation)),
        )


def _reach(sizes: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Return how far the last entry of a window lies from the first, on each axis."""
    return [step * (size - 1) for size, step in zip(sizes, dilations, strict=True)]


def _halves(reach: Sequence[int]) -> Pads:
    """Return the padding that keeps each axis as long as it is, the larger half after it."""
    return tuple((far // 2, far - far // 2) for far in reach)


def _torch_pads(layer: Any) -> tuple[Pads, str]:
    """Return how much is added before and after each axis, and with what."""
    twice = layer._reversed_padding_repeated_twice
    pairs = [tuple(twice[first : first + 2]) for first in range(0, len(twice), 2)]
    return tuple(reversed(pairs)), layer.padding_mode


def _flax_pads(flax: Any, reach: Sequence[int]) -> tuple[Pads | None, str]:
    """Return how much is added to each axis, or None if that depends on the input's size."""
    padding, rank = flax.padding, len(reach)
    if not isinstance(padding, str):
        return _pairs(padding, rank), "zeros"
    kind = padding.upper()
    if kind == "VALID":
        return ((0, 0),) * rank, "zeros"
    if kind in ("CIRCULAR", "REFLECT"):
        return _halves(reach), kind.lower()
    if kind == "CAUSAL":
        return tuple((far, 0) for far in reach), "zeros"
    if any(
        stride > 1 and far for stride, far in zip(_each(flax.strides, rank), reach, strict=True)
    ):
        return None, "zeros"
    return tuple(half if kind == "SAME" else half[::-1] for half in _halves(reach)), "zeros"


def _padding_mend(pads: Pads, mode: str, reach: Sequence[int]) -> str:
    if mode == "zeros":
        return f"give padding={pads!r} in Flax"
    if mode in ("circular", "reflect") and pads == _halves(reach):
        return f"give padding={mode.upper()!r} in Flax"
    names = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}
    widths = ((0, 0), *pads, (0, 0))
    return (
        f"give padding='VALID' in Flax, and its inputs as jnp.pad(inputs, {widths!r}, "
        f"mode={names[mode]!r})"
    )


def _conv_transpose(layer: Any, flax: Any) -> Iterator[Difference]:
    rank = len(layer.kernel_size)
    yield from _unequal("stride", layer.stride, "strides", _each(flax.strides, rank))
    dilation = _each(flax.kernel_dilation, rank)
    yield from _unequal("dilation", layer.dilation, "kernel_dilation", dilation)
    yield from _not_in_torch("mask", flax.mask, None)
    reach = _reach(layer.kernel_size, layer.dilation)
    pads = tuple(
        (far - pad, far - pad + more)
        for far, pad, more in zip(reach, layer.padding, layer.output_padding, strict=True)
    )
    if _transposed_pads(flax.padding, reach, layer.stride, rank) != pads:
        yield Difference(
            "padding",
            f"padding={layer.padding!r}, output_padding={layer.output_padding!r}",
            f"padding={flax.padding!r}",
            f"give padding={pads!r} in Flax",
        )


def _transposed_pads(
    padding: Any, reach: Sequence[int], strides: Sequence[int], rank: int
) -> Pads | None:
    """Return how much `jax.lax.conv_transpose` adds to each axis of its input.

    Source: its function `_conv_transpose_padding`.
    """
    if not isinstance(padding, str):
        return _pairs(padding, rank)
    pads = []
    for far, stride in zip(reach, strides, strict=True):
        if not far and stride == 1:
            pads.append((0, 0))
        elif padding.upper() == "VALID":
            pads.append((far, stride - 1 + max(far + 1 - stride, 0)))
        elif padding.upper() == "SAME":
            total = far + stride - 1
            before = far if stride > far else math.ceil(total / 2)
            pads.append((before, total - before))
        else:
            return None
    return tuple(pads)


def _epsilon(layer: Any, flax: Any) -> Iterator[Difference]:
    eps = layer.eps
    if eps is None:  # RMSNorm takes that of the inputs' dtype
        weight = layer.weight
        eps = torch.finfo(torch.float32 if weight is None else weight.dtype).eps
    if not math.isclose(eps, flax.epsilon, rel_tol=1e-6):
        yield _difference("eps", layer.eps, "epsilon", flax.epsilon, eps)


def _batch_norm(layer: Any, flax: Any) -> Iterator[Difference]:
    yield from _epsilon(layer, flax)
    if layer.momentum is None:
        yield Difference(
            "momentum",
            "momentum=None, the average of all batches",
            f"momentum={flax.momentum!r}",
            "give momentum in torch",
            trains_alone=True,
        )
    elif not math.isclose(1 - layer.momentum, flax.momentum, rel_tol=1e-9, abs_tol=1e-12):
        yield Difference(
            "momentum",
            f"momentum={layer.momentum!r}",
            f"momentum={flax.momentum!r}",
            f"give momentum={round(1 - layer.momentum, 12)!r} in Flax, which keeps that share",
            trains_alone=True,
        )


def _layer_norm(layer: Any, flax: Any) -> Iterator[Difference]:
    yield from _epsilon(layer, flax)
    axes = flax.reduction_axes
    count = 1 if isinstance(axes, int) else len(axes)
    if count != len(layer.normalized_shape):
        wanted = tuple(range(-len(layer.normalized_shape), 0))
        yield Difference(
            "normalized_shape",
            f"normalized_shape={layer.normalized_shape!r}",
            f"reduction_axes={axes!r}",
            f"give reduction_axes={wanted!r} and feature_axes={wanted!r} in Flax",
        )


def _group_norm(layer: Any, flax: Any) -> Iterator[Difference]:
    yield from _epsilon(layer, flax)
    groups = flax.num_groups
    if groups is None:
        groups = layer.num_channels // flax.group_size
    yield from _unequal("num_groups", layer.num_groups, "num_groups", groups)


def _dropout(layer: Any, flax: Any) -> Iterator[Difference]:
    yield from _unequal("p", layer.p, "rate", flax.rate, trains_alone=True)


def _attention(layer: Any, flax: Any) -> Iterator[Difference]:
    yield from _unequal("num_heads", layer.num_heads, "num_heads", flax.num_heads)
    rate = layer.dropout
    yield from _unequal("dropout", rate, "dropout_rate", flax.dropout_rate, trains_alone=True)
    yield from _not_in_torch("normalize_qk", flax.normalize_qk, False)


def _not_in_torch(fact: str, value: Any, nothing: Any) -> Iterator[Difference]:
    is_absent = value is nothing or (not hasattr(value, "shape") and value == nothing)
    if not is_absent:
        shown = f"{fact}=…" if hasattr(value, "shape") else f"{fact}={value!r}"
        yield Difference(fact, f"no {fact}", shown, f"leave {fact} out in Flax")


def _each(value: Any, rank: int) -> tuple[int, ...]:
    """Return one number for each axis. None means 1."""
    if value is None:
        return (1,) * rank
    return (int(value),) * rank if isinstance(value, _INTEGERS) else tuple(map(int, value))


def _pairs(padding: Any, rank: int) -> Pads:
    """Return the numbers before and after each axis, from any of Flax's ways to say them."""
    each = (padding,) * rank if isinstance(padding, _INTEGERS) else padding
    return tuple(
        (int(pad), int(pad)) if isinstance(pad, _INTEGERS) else (int(pad[0]), int(pad[1]))
        for pad in each
    )


_PAIRS: tuple[tuple[Any, Any, Comparison], ...] = (
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), (linen.Conv, nnx.Conv), _conv),
    (
        nn.modules.conv._ConvTransposeNd,
        (linen.ConvTranspose, nnx.ConvTranspose),
        _conv_transpose,
    ),
    (nn.modules.batchnorm._BatchNorm, (linen.BatchNorm, nnx.BatchNorm), _batch_norm),
    (nn.modules.instancenorm._InstanceNorm, (linen.InstanceNorm, nnx.InstanceNorm), _epsilon),
    (nn.LayerNorm, (linen.LayerNorm, nnx.LayerNorm), _layer_norm),
    (nn.RMSNorm, (linen.RMSNorm, nnx.RMSNorm), _layer_norm),
    (nn.GroupNorm, (linen.GroupNorm, nnx.GroupNorm), _group_norm),
    (
        (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        (linen.Dropout, nnx.Dropout),
        _dropout,
    ),
    (
        nn.MultiheadAttention,
        (linen.MultiHeadDotProductAttention, nnx.MultiHeadAttention),
        _attention,
    ),
)
_FLAX_CONVS = (linen.Conv, nnx.Conv, linen.ConvTranspose, nnx.ConvTranspose)
_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
)
_FLAX_NORMS = tuple(
    getattr(package, name)
    for package in (linen, nnx)
    for name in ("BatchNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "GroupNorm")
)
