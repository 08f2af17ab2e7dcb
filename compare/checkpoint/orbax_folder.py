"""The Orbax format: a folder of Linen variables, as `StandardCheckpointer` writes it."""

import re
from pathlib import Path

import jax
import numpy as np

from ..convert import StateDict
from ..errors import CheckpointError
from .atomic import atomic_folder
from .tree import state_to_tree, tree_to_state

# What Orbax itself puts into the folder of a checkpoint.
_OWN = re.compile(
    r"_METADATA|_CHECKPOINT_METADATA|_sharding|array_metadatas|d|manifest\.ocdbt|ocdbt\.process_\d+|commit_success\.txt"
)


def write(path: Path, state: StateDict) -> None:
    """Write the state as Linen variables, in place of an old Orbax folder if there is one.

    Raises:
        CheckpointError: an array without elements, which Orbax cannot store; a folder of another kind.
    """
    import orbax.checkpoint as ocp

    empty = [key for key, tensor in state.items() if not tensor.numel()]
    if empty:
        raise CheckpointError(path, f"Orbax cannot store arrays without elements: {', '.join(empty)}")
    if path.exists() and not _is_orbax(path):
        raise CheckpointError(path, "is a folder that Orbax did not write; it was left alone: choose another name")
    if path.exists() and (strange := sorted(entry.name for entry in path.iterdir() if not _OWN.fullmatch(entry.name))):
        raise CheckpointError(
            path, f"holds {', '.join(strange)} beside an Orbax checkpoint; it was left alone: choose another name"
        )
    with atomic_folder(path) as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), state_to_tree(state), force=True)
        checkpointer.wait_until_finished()


def read(path: Path) -> StateDict:
    """Read Linen variables into host memory, whatever devices they were saved from.

    Raises:
        CheckpointError: no Orbax folder, or no Linen variables of arrays.
    """
    import orbax.checkpoint as ocp

    if not _is_orbax(path):
        raise CheckpointError(path, "is not a finished Orbax checkpoint (it has no _METADATA)")
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            saved = checkpointer.metadata(path.absolute()).item_metadata.tree
            to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            tree = checkpointer.restore(path.absolute(), args=ocp.args.PyTreeRestore(restore_args=to_numpy))
    except Exception as error:  # Orbax and TensorStore share no error class
        raise CheckpointError(path, f"not a whole Orbax checkpoint ({str(error).splitlines()[0]})") from error
    return tree_to_state(path, tree)


def _is_orbax(path: Path) -> bool:
    return (path / "_METADATA").is_file()
