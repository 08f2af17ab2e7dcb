"""The torch zip format: a state dict of CPU tensors, read without running any pickled code."""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from ..convert import StateDict
from ..errors import CheckpointError
from .atomic import atomic_file


def write(path: Path, state: StateDict) -> None:
    """Write the state dict; to a stream, so that the bytes do not depend on the file's name."""
    with atomic_file(path) as stream:
        torch.save(state, stream)


def read(path: Path) -> StateDict:
    """Read the state dict onto the CPU, wherever it was saved.

    Raises:
        CheckpointError: no torch file, or anything in it but a dict of tensors.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(2)
            if not (start == b"PK" or re.fullmatch(rb"\x80[\x02-\x05]", start)):  # a zip, or a pickle of old
                raise ValueError(f"it begins with {start!r}")
            stream.seek(0)
            state = torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            path, "holds more than a state dict of tensors, and was not run; save `module.state_dict()` instead"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(path, f"not a whole torch file ({error or type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(path, f"holds a {type(state).__name__}; expected a state dict, names to tensors")
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(path, f"{key} is a {type(value).__name__}; expected a tensor")
    return dict(state)
