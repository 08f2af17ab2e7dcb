"""Linen variables as NumPy arrays: what the Flax formats store, in every dtype, without x64."""

from pathlib import Path
from typing import Any

from flax.traverse_util import unflatten_dict

from ..convert import StateDict, linen_to_torch
from ..errors import CheckpointError, ConversionError, Entry, Mismatch
from ..mapping import ROWS
from ..transfer import tensor_to_numpy


def state_to_tree(state: StateDict) -> dict[str, Any]:
    """Return the state dict as Linen variables, kernels (in, out).

    Raises:
        ConversionError: a key that has no place in the Linen variables.
    """
    rows = {row.torch_key: row for row in ROWS}
    unknown = tuple(Entry(key, "", tuple(tensor.shape)) for key, tensor in state.items() if key not in rows)
    if unknown:
        raise ConversionError(Mismatch(unexpected=unknown))
    leaves = {}
    for key, tensor in state.items():
        array = tensor_to_numpy(tensor)
        leaves[rows[key].linen_path] = array.T if rows[key].layout == "transposed" else array
    return unflatten_dict(leaves)


def tree_to_state(path: Path, tree: Any) -> StateDict:
    """Return the Linen variables read from `path` as a state dict.

    Raises:
        CheckpointError: anything but Linen variables of arrays.
    """
    if not isinstance(tree, dict):
        raise CheckpointError(path, f"holds a {type(tree).__name__}; expected Linen variables")
    try:
        return linen_to_torch(tree)
    except ConversionError as error:
        raise CheckpointError(
            path, f"holds no variables of these modules:\n{error.mismatch}", error.mismatch
        ) from error
