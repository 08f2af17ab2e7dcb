"""Convert parameters and buffers between PyTorch and Flax, bit for bit.

The mask is state and is converted with the weights. No value changes, and the result has the dtypes
of the source, with one exception: int64 becomes int32 if JAX has x64 off and every value fits. What
Flax has no place for comes back by its rule: zeros for a second bias, and the causal mask of a
mapping that left it out. No other entry is made. By default, one error lists everything that does
not fit before anything is changed.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar, overload

import numpy as np

from ..files.interrupts import uninterrupted
from ..files.printable import kind_of
from ..frameworks import Tensor, jax, nnx, torch, unflatten_dict
from .apply_mapping import flax_from_torch, torch_from_flax
from .arguments import require_flags
from .errors import ConversionError, Mismatch, MismatchEntry
from .fold import fold as folded
from .mapping import LINEN, NNX, KeyPath, StateMapping, require_mapping
from .match import pair
from .state_kinds import SAVED, FlaxSide, flax_side, linen_entries, linen_kind
from .tensors import Untransferable, as_shared_tensor, as_tensor
from .trees import with_leaves
from .wrappers import require_torch, without_wrapper

StateDict = dict[str, Tensor]
Variables = dict[str, Any]
Source = torch.nn.Module | Mapping[str, Tensor | np.ndarray | jax.Array]
Model = TypeVar("Model", bound=nnx.Module)


@overload
def torch_to_linen(
    source: Source,
    template: Mapping[str, Any],
    *,
    mapping: StateMapping | None = None,
    prefix: str = "",
    fold: bool = False,
    layouts: Mapping[str, str] | None = None,
    copy: bool = True,
    strict: Literal[True] = True,
) -> Variables: ...
@overload
def torch_to_linen(
    source: Source,
    template: Mapping[str, Any],
    *,
    mapping: StateMapping | None = None,
    prefix: str = "",
    fold: bool = False,
    layouts: Mapping[str, str] | None = None,
    copy: bool = True,
    strict: Literal[False],
) -> tuple[Variables, Mismatch]: ...
def torch_to_linen(
    source: Source,
    template: Mapping[str, Any],
    *,
    mapping: StateMapping | None = None,
    prefix: str = "",
    fold: bool = False,
    layouts: Mapping[str, str] | None = None,
    copy: bool = True,
    strict: bool = True,
) -> Variables | tuple[Variables, Mismatch]:
    """Return Linen variables with the values of a torch module.

    Args:
        source: a module, or its state dict, whose values may be NumPy or JAX arrays. Weights are
            (out, in).
        template: the variables of the Linen module, or their `jax.eval_shape`. It says which
            entries to return. If its arrays are committed or have a sharding, the result is placed
            on the same devices.
        mapping: how torch and Flax names pair. Default: what `compare.match` finds.
        prefix: without a mapping, what the torch names begin with and the Flax names do not.
        fold: whether to convert `compare.fold(source)`: plain tensors in the place of what weight
            norm, spectral norm, pruning and other parametrizations store.
        layouts: without a mapping, how tensors are laid out, as `compare.match` takes them.
        copy: False shares memory with the torch tensors (see `compare.conversion.tensors.to_jax`):
            editing a tensor in place then changes the "immutable" JAX array.
        strict: False converts what fits. Other entries keep the template's value, or are left out
            if the template is abstract.

    Returns:
        New variables, `{"params": ..., "buffers": ...}`, kernels (in, out), in the source's dtypes.
        With `strict=False`, also the lists of what did not fit.

    Raises:
        ValueError: a mapping that was made for Flax's other API.
        ConversionError: entries are missing, unexpected, of another shape, or not representable.
    """
    require_mapping(mapping)
    require_flags(fold=fold, copy=copy, strict=strict)
    leaves = _linen_leaves(template)
    side = flax_side(template)
    arrays, mismatch = _to_flax(
        folded(source) if fold else source, side, mapping, prefix, layouts, copy
    )
    if mismatch and strict:
        raise ConversionError(mismatch, has_strict=True)
    kept = {
        path: leaf for path, leaf in leaves.items() if not isinstance(leaf, jax.ShapeDtypeStruct)
    }
    variables = with_leaves(template, kept | arrays)
    return variables if strict else (variables, mismatch)


@overload
def torch_to_nnx(
    source: Source,
    model: Model,
    *,
    mapping: StateMapping | None = None,
    prefix: str = "",
    fold: bool = False,
    layouts: Mapping[str, str] | None = None,
    copy: bool = True,
    strict: Literal[True] = True,
) -> Model: ...
@overload
def torch_to_nnx(
    source: Source,
    model: Model,
    *,
    mapping: StateMapping | None = None,
    prefix: str = "",
    fold: bool = False,
    layouts: Mapping[str, str] | None = None,
    copy: bool = True,
    strict: Literal[False],
) -> tuple[Model, Mismatch]: ...
def torch_to_nnx(
    source: Source,
    model: Model,
    *,
    mapping: StateMapping | None = None,
    prefix: str = "",
    fold: bool = False,
    layouts: Mapping[str, str] | None = None,
    copy: bool = True,
    strict: bool = True,
) -> Model | tuple[Model, Mismatch]:
    """Fill an NNX model with the values of a torch module and return that same model.

    The model is changed only after everything was validated. Random streams are not changed.

    Args:
        source: a module, or its state dict, whose values may be NumPy or JAX arrays. Weights are
            (out, in).
        model: the model to fill. If its arrays are committed or have a sharding, the new values are
            placed on the same devices. In an abstract model (`nnx.eval_shape`), the saved state is
            filled; random streams and plain arrays stay abstract, so build a real model to train
            it.
        mapping: how torch and Flax names pair. Default: what `compare.match` finds.
        prefix: without a mapping, what the torch names begin with and the Flax names do not.
        fold: whether to convert `compare.fold(source)`: plain tensors in the place of what weight
            norm, spectral norm, pruning and other parametrizations store.
        layouts: without a mapping, how tensors are laid out, as `compare.match` takes them.
        copy: False shares memory with the torch tensors (see `compare.conversion.tensors.to_jax`).
        strict: False converts what fits and leaves the rest of the model as it was.

    Returns:
        `model`, in the source's dtypes. With `strict=False`, also the lists of what did not fit.

    Raises:
        ValueError: a mapping that was made for Flax's other API.
        ConversionError: entries are missing, unexpected, of another shape, or not representable.
    """
    require_mapping(mapping)
    require_flags(fold=fold, copy=copy, strict=strict)
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model is {kind_of(model)}; expected an nnx.Module")
    arrays, mismatch = _to_flax(
        folded(source) if fold else source, flax_side(model), mapping, prefix, layouts, copy
    )
    if mismatch and strict:
        raise ConversionError(mismatch, has_strict=True)
    with uninterrupted():
        nnx.update(model, unflatten_dict(arrays))
    return model if strict else (model, mismatch)


@overload
def linen_to_torch(
    variables: Mapping[str, Any],
    *,
    mapping: StateMapping | None = None,
    copy: bool = True,
    strict: Literal[True] = True,
) -> StateDict: ...
@overload
def linen_to_torch(
    variables: Mapping[str, Any],
    *,
    mapping: StateMapping | None = None,
    copy: bool = True,
    strict: Literal[False],
) -> tuple[StateDict, Mismatch]: ...
def linen_to_torch(
    variables: Mapping[str, Any],
    *,
    mapping: StateMapping | None = None,
    copy: bool = True,
    strict: bool = True,
) -> StateDict | tuple[StateDict, Mismatch]:
    """Return a torch state dict with the values of Linen variables.

    Args:
        variables: `{"params": ..., "buffers": ...}`; the leaves may be sharded.
        mapping: how torch and Flax names pair, from `compare.match`. Default: the mapping of the
            attention classes.
        copy: False shares memory with the JAX arrays (see `compare.conversion.tensors.to_torch`):
            an in-place edit of the tensor then changes the "immutable" JAX array.
        strict: False converts what fits.

    Returns:
        A state dict for `load_state_dict`, weights (out, in), on the CPU unless memory is shared.
        If the mapping was made of a module within `torch.compile`, DataParallel or AveragedModel,
        it is one for the module within.
        With `strict=False`, also the lists of what did not fit.

    Raises:
        ValueError: a mapping that was made for Flax's other API.
        ConversionError: entries are missing, unexpected, of a wrong rank, or not representable.
    """
    require_mapping(mapping)
    require_flags(copy=copy, strict=strict)
    leaves = {
        path: leaf for path, leaf in _linen_leaves(variables).items() if linen_kind(path) in SAVED
    }
    _require_api(mapping or LINEN, "linen")
    state, mismatch = torch_from_flax(leaves, mapping or LINEN, copy)
    if mismatch and strict:
        raise ConversionError(mismatch, _hint(mapping), has_strict=True)
    return state if strict else (state, mismatch)


@overload
def nnx_to_torch(
    model: nnx.Module,
    *,
    mapping: StateMapping | None = None,
    copy: bool = True,
    strict: Literal[True] = True,
) -> StateDict: ...
@overload
def nnx_to_torch(
    model: nnx.Module,
    *,
    mapping: StateMapping | None = None,
    copy: bool = True,
    strict: Literal[False],
) -> tuple[StateDict, Mismatch]: ...
def nnx_to_torch(
    model: nnx.Module,
    *,
    mapping: StateMapping | None = None,
    copy: bool = True,
    strict: bool = True,
) -> StateDict | tuple[StateDict, Mismatch]:
    """Return a torch state dict with the saved state of an NNX model.

    That is every Variable (Params, Buffers, statistics and others), except caches, intermediates
    and random streams.

    Args:
        model: the model; its arrays may be sharded.
        mapping: how torch and Flax names pair, from `compare.match`. Default: the mapping of the
            attention classes.
        copy: False shares memory with the JAX arrays (see `compare.conversion.tensors.to_torch`).
        strict: False converts what fits.

    Returns:
        A state dict for `load_state_dict`, weights (out, in), on the CPU unless memory is shared.
        If the mapping was made of a module within `torch.compile`, DataParallel or AveragedModel,
        it is one for the module within.
        With `strict=False`, also the lists of what did not fit.

    Raises:
        ValueError: a mapping that was made for Flax's other API.
        ConversionError: entries are missing, unexpected, of a wrong rank, or not representable.
    """
    require_mapping(mapping)
    require_flags(copy=copy, strict=strict)
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model is {kind_of(model)}; expected an nnx.Module")
    _require_api(mapping or NNX, "nnx")
    state, mismatch = torch_from_flax(flax_side(model).leaves, mapping or NNX, copy)
    if mismatch and strict:
        raise ConversionError(mismatch, _hint(mapping), has_strict=True)
    return state if strict else (state, mismatch)


def _state_dict(source: Source, mapping: StateMapping | None, copy: bool) -> Mapping[str, Any]:
    require_torch(source)
    if isinstance(source, torch.nn.Module):
        return without_wrapper(source, mapping.by_key if mapping else ()).state_dict()
    if copy:
        return {key: as_tensor(value) for key, value in source.items()}
    tensors, refused = dict[str, Any](), []
    for key, value in source.items():
        try:
            tensors[key] = as_shared_tensor(value)
        except Untransferable as error:
            refused.append(MismatchEntry(key, "", np.shape(value), reason=str(error)))
    if refused:
        raise ConversionError(Mismatch(refused=tuple(refused)))
    return tensors


def _linen_leaves(variables: Mapping[str, Any]) -> dict[KeyPath, Any]:
    if not isinstance(variables, Mapping) or isinstance(variables, nnx.State):
        raise TypeError(
            f"got {kind_of(variables)}; expected Linen variables, as `model.init` returns them"
        )
    return {entry.path: entry.value for entry in linen_entries(variables)}


def _to_flax(
    source: Source,
    side: FlaxSide,
    mapping: StateMapping | None,
    prefix: str,
    layouts: Mapping[str, str] | None,
    copy: bool,
) -> tuple[dict[KeyPath, jax.Array], Mismatch]:
    tensors = _state_dict(source, mapping, copy)
    if mapping is not None:
        for name, value in (("prefix", prefix), ("layouts", layouts)):
            if value:
                raise ValueError(f"{name} has no effect beside mapping: give it to compare.match")
        _require_api(mapping, side.kind)
        return flax_from_torch(tensors, side.leaves, mapping, copy)
    matched, unpaired = pair(source, side, prefix=prefix, layouts=layouts)
    arrays, mismatch = flax_from_torch(tensors, side.leaves, matched, copy)
    already_listed = {entry.name for entry in (*unpaired.refused, *unpaired.misshaped)}
    refused = tuple(entry for entry in mismatch.refused if entry.name not in already_listed)
    return arrays, replace(unpaired, refused=unpaired.refused + refused)


def _require_api(mapping: StateMapping, kind: str) -> None:
    """Raise ValueError for a mapping whose paths are those of Flax's other API."""
    if mapping.flax != kind:
        titles = {"linen": "Linen variables", "nnx": "an NNX model"}
        raise ValueError(
            f"the mapping is for {titles[mapping.flax]}, and this is {titles[kind]}: "
            "make another one with compare.match(source, template)"
        )


def _hint(mapping: StateMapping | None) -> str:
    return (
        ""
        if mapping
        else "For modules other than the attention classes, pass "
        "mapping=compare.match(module, template)."
    )
