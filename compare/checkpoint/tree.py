"""Linen variables as NumPy arrays: what the Flax formats store, in every dtype, without x64."""

from pathlib import Path
from typing import Any

from flax.traverse_util import unflatten_dict

from ..convert import StateDict, linen_to_torch
from ..errors import CheckpointError, ConversionError, Entry, Mismatch
from ..layouts import flax_shape, layout, to_flax
from ..mapping import LINEN, Mapping
from ..transfer import tensor_to_numpy
from ..walk import combined


def state_to_tree(state: StateDict, mapping: Mapping = LINEN) -> dict[str, Any]:
    """Return the state dict as Linen variables, kernels (in, out).

    Raises:
        ConversionError: a key that has no place in the Linen variables, or a tensor of another shape.
    """
    known = set(mapping.by_key)
    unexpected = tuple(Entry(key, "", tuple(tensor.shape)) for key, tensor in state.items() if key not in known)
    leaves, refused = {}, []
    for row in mapping.rows:
        if row.kind == "alias" or row.torch_key not in state:
            continue
        try:
            tensors = [state[key] for key in (row.torch_key, row.plus) if key is not None]
            array = tensor_to_numpy(combined(row, tensors, copy=True))
            leaves[row.path] = to_flax(layout(row.layout, row.shape or flax_shape(row.layout, array.shape)), array)
        except (ValueError, KeyError) as error:
            refused.append(Entry(row.torch_key, row.place, tuple(state[row.torch_key].shape), reason=str(error)))
    if unexpected or refused:
        raise ConversionError(Mismatch(unexpected=unexpected, refused=tuple(refused)))
    return unflatten_dict(leaves)


def tree_to_state(path: Path, tree: Any, mapping: Mapping = LINEN) -> StateDict:
    """Return the Linen variables read from `path` as a state dict.

    Raises:
        CheckpointError: anything but Linen variables of arrays.
    """
    if not isinstance(tree, dict):
        raise CheckpointError(path, f"holds a {type(tree).__name__}; expected Linen variables")
    try:
        return linen_to_torch(tree, mapping=mapping)
    except ConversionError as error:
        raise CheckpointError(
            path, f"holds no variables of these modules:\n{error.mismatch}", error.mismatch
        ) from error
