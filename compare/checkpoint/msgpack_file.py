"""The Flax msgpack format: Linen variables as NumPy arrays."""

from pathlib import Path

from flax import serialization

from ..convert import StateDict
from ..errors import CheckpointError
from .atomic import atomic_file
from .tree import state_to_tree, tree_to_state


def write(path: Path, state: StateDict) -> None:
    """Write the state as Linen variables."""
    with atomic_file(path) as stream:
        stream.write(serialization.msgpack_serialize(state_to_tree(state)))


def read(path: Path) -> StateDict:
    """Read Linen variables and return them as a state dict.

    Raises:
        CheckpointError: no msgpack file, or no Linen variables of arrays.
    """
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack and NumPy raise a dozen unrelated types on bad bytes
        raise CheckpointError(path, f"not a whole Flax msgpack file ({error or type(error).__name__})") from error
    return tree_to_state(path, tree)
