"""Parameters and buffers from PyTorch to Flax and back, bit for bit, everything accounted for.

The mask is state: it travels with the weights. No value changes, no entry is invented: dtypes follow the
source (but for int64, which becomes int32 where JAX has x64 off, if every value fits), and by default one
error lists all that does not fit before anything is changed.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, overload

import jax
import numpy as np
import torch
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from torch import Tensor

from .errors import ConversionError, Entry, Mismatch, Shape
from .mapping import ROWS, Path, Row
from .transfer import Untransferable, to_jax, to_torch

StateDict = dict[str, Tensor]
Variables = dict[str, Any]
Source = torch.nn.Module | Mapping[str, Tensor]
Model = TypeVar("Model", bound=nnx.Module)


@overload
def torch_to_linen(
    source: Source, template: Mapping[str, Any], *, copy: bool = True, strict: Literal[True] = True
) -> Variables: ...
@overload
def torch_to_linen(
    source: Source, template: Mapping[str, Any], *, copy: bool = True, strict: Literal[False]
) -> tuple[Variables, Mismatch]: ...
def torch_to_linen(
    source: Source, template: Mapping[str, Any], *, copy: bool = True, strict: bool = True
) -> Variables | tuple[Variables, Mismatch]:
    """Return Linen variables with the values of a torch module.

    Args:
        source: a module, or its state dict. Weights are (out, in).
        template: the variables of the Linen module, or their `jax.eval_shape`: its entries are the
            ones wanted. A template on chosen devices (committed or with a sharding) places the result.
        copy: False shares memory with the torch tensors (see `compare.transfer.to_jax`): editing a
            tensor in place then changes the "immutable" JAX array.
        strict: False converts what fits. What does not keeps the template's value, or is left out
            where the template is abstract.

    Returns:
        New variables, `{"params": ..., "buffers": ...}`, kernels (in, out), in the source's dtypes;
        with `strict=False` these and the lists of what did not fit.

    Raises:
        ConversionError: entries missing, unexpected, of another shape, or not representable.
    """
    wanted = _linen_leaves(template)
    for path, leaf in wanted.items():
        if not hasattr(leaf, "shape"):
            raise TypeError(f"template {'/'.join(map(str, path))} is a {type(leaf).__name__}; expected an array")
    arrays, mismatch = _to_flax(_state_dict(source), wanted, {row.linen_path: row for row in ROWS}, copy)
    if mismatch and strict:
        raise ConversionError(mismatch)
    kept = {path: leaf for path, leaf in wanted.items() if not isinstance(leaf, jax.ShapeDtypeStruct)}
    variables = unflatten_dict(kept | arrays)
    return variables if strict else (variables, mismatch)


@overload
def torch_to_nnx(source: Source, model: Model, *, copy: bool = True, strict: Literal[True] = True) -> Model: ...
@overload
def torch_to_nnx(
    source: Source, model: Model, *, copy: bool = True, strict: Literal[False]
) -> tuple[Model, Mismatch]: ...
def torch_to_nnx(
    source: Source, model: Model, *, copy: bool = True, strict: bool = True
) -> Model | tuple[Model, Mismatch]:
    """Fill an NNX model with the values of a torch module and return that same model.

    The model is touched only after everything was validated. Random streams stay as they are.

    Args:
        source: a module, or its state dict. Weights are (out, in).
        model: the model to fill. Values land where the model's were, if it was placed on chosen
            devices. Of an abstract model (`nnx.eval_shape`) Params and Buffers are filled, and its random
            streams and plain arrays stay abstract: build a real one to train it.
        copy: False shares memory with the torch tensors (see `compare.transfer.to_jax`).
        strict: False converts what fits and leaves the rest of the model as it was.

    Returns:
        `model`, in the source's dtypes; with `strict=False` the model and the lists of what did not fit.

    Raises:
        ConversionError: entries missing, unexpected, of another shape, or not representable.
    """
    wanted = {path: variable.get_value() for path, variable in _nnx_variables(model).items()}
    arrays, mismatch = _to_flax(_state_dict(source), wanted, {row.nnx_path: row for row in ROWS}, copy)
    if mismatch and strict:
        raise ConversionError(mismatch)
    nnx.update(model, unflatten_dict(arrays))
    return model if strict else (model, mismatch)


@overload
def linen_to_torch(variables: Mapping[str, Any], *, copy: bool = True, strict: Literal[True] = True) -> StateDict: ...
@overload
def linen_to_torch(
    variables: Mapping[str, Any], *, copy: bool = True, strict: Literal[False]
) -> tuple[StateDict, Mismatch]: ...
def linen_to_torch(
    variables: Mapping[str, Any], *, copy: bool = True, strict: bool = True
) -> StateDict | tuple[StateDict, Mismatch]:
    """Return the torch state dict that holds the values of Linen variables.

    Args:
        variables: `{"params": ..., "buffers": ...}`; the leaves may be sharded.
        copy: False shares memory with the JAX arrays (see `compare.transfer.to_torch`): an in-place
            edit of the tensor then changes the "immutable" JAX array.
        strict: False converts what fits.

    Returns:
        A state dict for `load_state_dict`, weights (out, in), on the CPU unless shared; with
        `strict=False` the state dict and the lists of what did not fit.

    Raises:
        ConversionError: entries missing, unexpected, of a wrong rank, or not representable.
    """
    state, mismatch = _from_flax(_linen_leaves(variables), {row.linen_path: row for row in ROWS}, copy)
    if mismatch and strict:
        raise ConversionError(mismatch)
    return state if strict else (state, mismatch)


@overload
def nnx_to_torch(model: nnx.Module, *, copy: bool = True, strict: Literal[True] = True) -> StateDict: ...
@overload
def nnx_to_torch(model: nnx.Module, *, copy: bool = True, strict: Literal[False]) -> tuple[StateDict, Mismatch]: ...
def nnx_to_torch(
    model: nnx.Module, *, copy: bool = True, strict: bool = True
) -> StateDict | tuple[StateDict, Mismatch]:
    """Return the torch state dict that holds the Params and Buffers of an NNX model.

    Random streams have no counterpart in a state dict and are left out.

    Args:
        model: the model; its arrays may be sharded.
        copy: False shares memory with the JAX arrays (see `compare.transfer.to_torch`).
        strict: False converts what fits.

    Returns:
        A state dict for `load_state_dict`, weights (out, in), on the CPU unless shared; with
        `strict=False` the state dict and the lists of what did not fit.

    Raises:
        ConversionError: entries missing, unexpected, of a wrong rank, or not representable.
    """
    leaves = {path: variable.get_value() for path, variable in _nnx_variables(model).items()}
    state, mismatch = _from_flax(leaves, {row.nnx_path: row for row in ROWS}, copy)
    if mismatch and strict:
        raise ConversionError(mismatch)
    return state if strict else (state, mismatch)


def _state_dict(source: Source) -> Mapping[str, Any]:
    if isinstance(source, torch.nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        return source
    raise TypeError(f"source is a {type(source).__name__}; expected a torch.nn.Module or its state dict")


def _linen_leaves(variables: Mapping[str, Any]) -> dict[Path, Any]:
    if not isinstance(variables, Mapping) or isinstance(variables, nnx.State):
        raise TypeError(f"got a {type(variables).__name__}; expected Linen variables, as `model.init` returns them")
    return flatten_dict(variables)


def _nnx_variables(model: nnx.Module) -> dict[Path, nnx.Variable]:
    """Return the model's state by path, without the random streams and plain arrays."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nnx.Module")
    leaves = nnx.to_flat_state(nnx.state(model))
    return {
        path: leaf for path, leaf in leaves if isinstance(leaf, nnx.Variable) and not isinstance(leaf, nnx.RngState)
    }


def _to_flax(
    tensors: Mapping[str, Any], wanted: Mapping[Path, Any], rows: Mapping[Path, Row], copy: bool
) -> tuple[dict[Path, jax.Array], Mismatch]:
    """Convert each wanted entry that the tensors have in the right shape; list the others."""
    arrays: dict[Path, jax.Array] = {}
    missing, misshaped, refused = [], [], []
    taken = set()
    for path, row, leaf in _in_order(wanted, rows):
        place = "/".join(map(str, path))
        expected = _torch_shape(row, leaf.shape)
        if row is None or row.torch_key not in tensors:
            missing.append(Entry(row.torch_key if row else place, place, expected=expected))
            continue
        taken.add(row.torch_key)
        tensor = tensors[row.torch_key]
        if not isinstance(tensor, Tensor):
            reason = f"is a {type(tensor).__name__}, not a tensor"
            refused.append(Entry(row.torch_key, place, expected=expected, reason=reason))
        elif tuple(tensor.shape) != expected:
            misshaped.append(Entry(row.torch_key, place, tuple(tensor.shape), expected))
        else:
            try:
                array = to_jax(tensor, transpose=row.layout == "transposed", copy=copy)
                arrays[path] = _place_like(array, leaf, copy)
            except Untransferable as error:
                refused.append(Entry(row.torch_key, place, tuple(tensor.shape), expected, str(error)))
    unexpected = [
        Entry(key, "", found=tuple(getattr(value, "shape", ()))) for key, value in tensors.items() if key not in taken
    ]
    return arrays, Mismatch(tuple(missing), tuple(unexpected), tuple(misshaped), tuple(refused))


def _from_flax(leaves: Mapping[Path, Any], rows: Mapping[Path, Row], copy: bool) -> tuple[StateDict, Mismatch]:
    """Convert each leaf that has a row; list the others, and the required rows that lack a leaf."""
    state: StateDict = {}
    unexpected, refused = [], []
    for path, row, leaf in _in_order(leaves, rows):
        place = "/".join(map(str, path))
        if row is None:
            unexpected.append(Entry(place, place, found=tuple(getattr(leaf, "shape", ()))))
        elif not isinstance(leaf, jax.Array | np.ndarray):
            refused.append(Entry(row.torch_key, place, reason=f"is a {type(leaf).__name__}, not an array of values"))
        elif row.layout == "transposed" and leaf.ndim != 2:
            refused.append(Entry(row.torch_key, place, reason=f"{place} is {leaf.shape}; a kernel is (in, out)"))
        else:
            try:
                state[row.torch_key] = to_torch(leaf, transpose=row.layout == "transposed", copy=copy)
            except Untransferable as error:
                refused.append(Entry(row.torch_key, place, leaf.shape, reason=str(error)))
    missing = [
        Entry(row.torch_key, "/".join(map(str, path)))
        for path, row in rows.items()
        if row.required and path not in leaves
    ]
    return state, Mismatch(tuple(missing), tuple(unexpected), refused=tuple(refused))


def _in_order(leaves: Mapping[Path, Any], rows: Mapping[Path, Row]) -> Iterable[tuple[Path, Row | None, Any]]:
    """Yield the leaves in the order of the table, those without a row last."""
    yield from ((path, row, leaves[path]) for path, row in rows.items() if path in leaves)
    yield from ((path, None, leaf) for path, leaf in leaves.items() if path not in rows)


def _torch_shape(row: Row | None, shape: Shape) -> Shape:
    return tuple(reversed(shape)) if row is not None and row.layout == "transposed" else tuple(shape)


def _place_like(array: jax.Array, leaf: Any, copy: bool) -> jax.Array:
    """Return the array where the leaf was put on purpose: committed, or abstract with a sharding."""
    chosen = leaf.committed if isinstance(leaf, jax.Array) else getattr(leaf, "sharding", None) is not None
    if not chosen:
        return array
    if not copy and not array.sharding.is_equivalent_to(leaf.sharding, array.ndim):
        raise Untransferable(f"the template is on {leaf.sharding}, the tensor on {array.device}; use copy=True")
    return jax.device_put(array, leaf.sharding)
