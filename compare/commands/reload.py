"""Load checkpoints into fresh modules, in a process that knows nothing of the one that saved them.

`python -m compare.commands.reload IMPLEMENTATION PATH...` prints, for each path, what was loaded:
the mask that the module now works with, and a checksum of the parameters' bits. The class with the
buffer is used where the path's name begins with `with`.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import load_checkpoint
from ..conversion.convert import linen_to_torch, nnx_to_torch
from ..conversion.tensors import numpy_state
from ..proof.cases import NOTEBOOK, State
from ..runners.run import build_nnx, build_torch, linen_mask, linen_template


def checksum(state: State) -> str:
    """Return a digest of the parameters, by name, dtype, shape and bits."""
    digest = hashlib.sha256()
    for key in sorted(state.keys() - {"mask"}):
        array = state[key]
        digest.update(f"{key} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def load(framework: str, path: Path) -> tuple[Any, State]:
    """Load the checkpoint into a fresh module; return its mask and its state."""
    buffer = path.name.startswith("with-")
    if framework == "torch":
        module = load_checkpoint(path, build_torch(NOTEBOOK, buffer=buffer))
        return module.mask, numpy_state(module.state_dict())
    if framework == "nnx":
        model = load_checkpoint(path, build_nnx(NOTEBOOK, buffer=buffer))
        return model.mask, numpy_state(nnx_to_torch(model))
    variables = load_checkpoint(path, linen_template(NOTEBOOK, buffer=buffer))
    return linen_mask(NOTEBOOK, variables, buffer=buffer), numpy_state(linen_to_torch(variables))


def main() -> None:
    """Print the JSON list of what each path gave."""
    framework, *paths = sys.argv[1:]
    found = []
    for path in map(Path, paths):
        mask, state = load(framework, path)
        found.append(
            {"path": str(path), "mask": np.asarray(mask).tolist(), "parameters": checksum(state)}
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
