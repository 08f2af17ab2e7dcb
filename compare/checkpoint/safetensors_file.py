"""The safetensors format, as the torch front end writes it."""

from pathlib import Path

from ..convert import StateDict
from ..errors import CheckpointError
from .atomic import atomic_file


def write(path: Path, state: StateDict) -> None:
    """Write the state dict, with the metadata by which other tools know torch's layout."""
    from safetensors.torch import save

    with atomic_file(path) as stream:
        stream.write(save(state, metadata={"format": "pt"}))


def read(path: Path) -> StateDict:
    """Read the state dict into memory of its own, so that a file cut later cannot hurt.

    Raises:
        CheckpointError: no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(path, f"not a whole safetensors file ({error})") from error
