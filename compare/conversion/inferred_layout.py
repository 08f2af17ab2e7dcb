"""The layout of a torch tensor in Flax, from the leaf's name and the layers on both sides."""

import glob
import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

from ..files.printable import kind_of, shown
from ..frameworks import linen, nnx, torch
from .layers import is_conv1d_of_transformers
from .layouts import is_pattern, layout
from .mapping import KeyPath
from .rearranged import fitting, of_bias, without_ones
from .tensors import shape_of
from .undecided import TURNED, Undecided, matrix_layout

_PROJECTIONS = (("query",), ("key",), ("value",))
_MAX_PATTERNS = 4


def inferred_layout(
    key: str,
    path: KeyPath,
    tensor: Any,
    shape: Sequence[int],
    layer: torch.nn.Module | None,
    flax_layer: Any,
    hint: str | None,
    kernel: str | None = None,
    *,
    turned: bool = False,
) -> str:
    """Return the layout that follows from the leaf's name and the layers on both sides.

    Args:
        key: the torch key.
        path: the Flax path.
        tensor: the torch tensor, or what has its shape.
        shape: the shape of the Flax array.
        layer: the torch layer, if it is known.
        flax_layer: the Flax layer, if it is known.
        hint: the layout that the type of the Flax layer requires, if any.
        kernel: for a bias, the layout that the user states for the weight beside it.
        turned: whether kernels of Flax are (out, in) where torch has transformers' Conv1D.

    Raises:
        Undecided: the kernel fits in two layouts.
        ValueError: the layout does not follow from them.
    """
    leaf, torch_shape = path[-1], shape_of(tensor)
    rank, torch_rank = len(shape), len(torch_shape)
    pattern = json.dumps(glob.escape(key), ensure_ascii=False)
    is_weight = key.rpartition(".")[2] == "weight"
    if leaf == "bias" and torch_rank == 1 and kernel and is_pattern(kernel):
        return _bias_beside(kernel, torch_shape, shape, layer, pattern)
    if leaf == "bias" and torch_rank == 1 and rank > 1:
        return _bias_layout(path, torch_shape, shape, kernel, pattern)
    if leaf == "negative_slope":
        return "scalar"
    if leaf == "kernel" and not is_weight and rank > 1:
        raise ValueError(
            f"nothing says how this kernel is laid out, which torch calls {shown(key)}: pass "
            f'layouts={{{pattern}: "same"}}, "transposed", or another layout'
        )
    if leaf != "kernel" or not is_weight or isinstance(layer, torch.nn.Bilinear):
        return (rank != torch_rank and without_ones(torch_shape, shape)) or "same"
    transposed = isinstance(layer, torch.nn.modules.conv._ConvTransposeNd)
    if found := _of_one_point(torch_shape, shape, layer, hint):
        return found
    if hint in ("conv", "conv_transpose") and (transposed or layer is None):
        return hint
    if hint == "same" and layer is None and rank == torch_rank:
        return hint
    if transposed and hint is None and rank == torch_rank:
        raise ValueError(
            f"the layer is {kind_of(layer)}, and Flax variables do not say whether it was "
            f'built with transpose_kernel: pass layouts={{{pattern}: "conv"}} if True, '
            '"conv_transpose" if False (the default)'
        )
    if rank == 3 and torch_rank == 2 and isinstance(layer, torch.nn.Linear | None):
        if path[-2] in ("query", "key", "value", "out"):
            name = "heads_out" if path[-2] == "out" else "heads_in"
            if layer is None and len(set(torch_shape)) == 1:
                raise Undecided(name)
            return name
        raise ValueError(
            "one side has two axes, the other three: if these are attention heads, pass "
            f'layouts={{{pattern}: "heads_in"}}, or "heads_out" for the output'
            f"{_patterns(torch_shape, shape)}"
        )
    if rank == torch_rank == 1 and hint is None:
        return "same"
    if rank == 2 and hint in (None, "general"):
        if isinstance(layer, torch.nn.Linear):
            return "transposed"
        if layer is None:
            return matrix_layout(torch_shape, shape)
        if is_conv1d_of_transformers(layer):
            return _conv1d_layout(torch_shape, shape, flax_layer, turned)
    if (
        rank >= 3
        and isinstance(layer, torch.nn.modules.conv._ConvNd | None)
        and hint is None
        and not transposed
        and torch_rank == rank
    ):
        is_square = len(set(torch_shape[:2])) == 1
        if layer is None and is_square and not isinstance(flax_layer, linen.Conv | nnx.Conv):
            raise Undecided("conv", "conv_transpose")
        return "conv"
    kind = "torch" if layer is None else f"the {type(layer).__name__} in torch"
    usual = '"transposed"' if rank == torch_rank == 2 else '"…", a layout or a pattern'
    raise ValueError(
        f"{kind} does not say how this kernel is laid out: pass layouts={{{pattern}: {usual}}}"
        + (", or another layout" if rank == torch_rank == 2 else _patterns(torch_shape, shape))
    )


def is_turned(torch_shape: Sequence[int], shape: Sequence[int]) -> bool:
    """Return whether a matrix fits only if its axes are exchanged."""
    return tuple(torch_shape) == tuple(shape)[::-1] != tuple(shape)


def _conv1d_layout(
    torch_shape: Sequence[int], shape: Sequence[int], flax_layer: Any, turned: bool
) -> str:
    """Return the layout of the (in, out) kernel of transformers' Conv1D.

    Raises:
        Undecided: it, or another one, fits only if Flax's is (out, in), as in FlaxConv1D.
    """
    if isinstance(flax_layer, linen.Dense | nnx.Linear):
        return "same"
    if is_turned(torch_shape, shape) or (turned and torch_shape[0] == torch_shape[1]):
        raise Undecided(TURNED, "same")
    return "same"


def _bias_layout(
    path: KeyPath,
    torch_shape: Sequence[int],
    shape: Sequence[int],
    kernel: str | None,
    pattern: str,
) -> str:
    """Return the layout of a bias that has more axes in Flax, as that of DenseGeneral.

    Raises:
        ValueError: nothing says the order of its axes.
    """
    if kernel == "heads_in" or (len(shape) == 2 and path[-2:-1] in _PROJECTIONS and not kernel):
        return "heads_bias"
    if ones := without_ones(torch_shape, shape):
        return ones
    weight = pattern.removesuffix('bias"') + 'weight"'
    raise ValueError(
        f"one side has one axis, the other {len(shape)}: state the pattern of its weight "
        f'({weight}) with layouts, or pass layouts={{{pattern}: "(a b) -> a b"}} for it'
        f"{_patterns(torch_shape, shape)}"
    )


def _bias_beside(
    kernel: str,
    torch_shape: Sequence[int],
    shape: Sequence[int],
    layer: torch.nn.Module | None,
    pattern: str,
) -> str:
    """Return the layout of a bias whose weight has a pattern: that of the weight's outputs.

    Raises:
        ValueError: nothing says which axis of the weight are the outputs, or they are not alone.
    """
    axes = [0, 1]
    if isinstance(layer, torch.nn.Linear | torch.nn.modules.conv._ConvNd):
        axes = [int(isinstance(layer, torch.nn.modules.conv._ConvTransposeNd))]
    elif layer is not None and is_conv1d_of_transformers(layer):
        axes = [1]
    found = [name for axis in axes if (name := of_bias(kernel, axis))]
    fits = {_plain(name) for name in found if _has_shapes(name, torch_shape, shape)}
    if len(fits) != 1:
        raise ValueError(
            f'say how its axes are ordered: layouts={{{pattern}: "(a b) -> a b"}}, or "same"'
            + (f"; {' and '.join(map(json.dumps, sorted(fits)))} fit" if fits else "")
        )
    return fits.pop()


def _plain(pattern: str) -> str:
    """Return "same" for a pattern whose two sides are the same."""
    torch_axes, _, flax_axes = pattern.partition(",")[0].partition(" -> ")
    return "same" if torch_axes == flax_axes else pattern


def _has_shapes(name: str, torch_shape: Sequence[int], shape: Sequence[int]) -> bool:
    try:
        return layout(name, shape).torch_shape == tuple(torch_shape)
    except ValueError:
        return False


def _of_one_point(
    torch_shape: Sequence[int], shape: Sequence[int], layer: torch.nn.Module | None, hint: Any
) -> str | None:
    """Return the layout between a matrix and a convolution over one point, or None.

    Raises:
        Undecided: a square one of a state dict.
    """
    rank, torch_rank = len(shape), len(torch_shape)
    behind, before = " 1" * (torch_rank - 2), "1 " * (rank - 2)
    if torch_rank in (3, 4, 5) and rank == 2:
        is_point = {*torch_shape[2:]} == {1}
    elif torch_rank == 2 and rank in (3, 4, 5) and not hint:
        is_point = {*shape[:-2]} == {1} and sorted(torch_shape) == sorted(shape[-2:])
    else:
        return None
    if not is_point:
        return None
    usual, turned = (f"{axes}{behind} -> {before}i o" for axes in ("o i", "i o"))
    if isinstance(layer, torch.nn.modules.conv._ConvTransposeNd):
        return turned
    if isinstance(layer, torch.nn.Linear | torch.nn.modules.conv._ConvNd):
        return usual
    if layer is not None:
        return None
    if torch_shape[0] == torch_shape[1]:
        raise Undecided(usual, turned)
    return usual if tuple(torch_shape[1::-1]) == tuple(shape[-2:]) else turned


def _patterns(torch_shape: Sequence[int], shape: Sequence[int]) -> str:
    """Return the patterns in which the torch tensor has the shape of the Flax array, as advice."""
    found = list(islice(fitting(torch_shape, shape), _MAX_PATTERNS))
    return f"; these patterns fit too: {', '.join(map(json.dumps, found))}" if found else ""
