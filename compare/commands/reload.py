"""Load checkpoints into fresh modules, in another process than the one that saved them.

`python -m compare.commands.reload FRAMEWORK PATH...` prints, for each path, the mask that the
module uses after loading, and a checksum of the parameters' bits. The class with the buffer is used
if the name of the path starts with "with-".
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
    """Return a digest of the parameters' names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for key in sorted(state.keys() - {"mask"}):
        array = state[key]
        digest.update(f"{key} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def load(framework: str, path: Path) -> tuple[Any, State]:
    """Load the checkpoint into a fresh module, and return its mask and its state."""
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
    """Load every path, and print a JSON list with one object per path."""
    framework, *paths = sys.argv[1:]
    results = []
    for path in map(Path, paths):
        mask, state = load(framework, path)
        results.append(
            {"path": str(path), "mask": np.asarray(mask).tolist(), "parameters": checksum(state)}
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
