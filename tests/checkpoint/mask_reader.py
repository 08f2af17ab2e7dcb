"""Load each checkpoint into a fresh module, in a process of its own, and print its mask's digest.

`python -m tests.checkpoint.mask_reader IMPLEMENTATION PATH...`. The name of each path begins with
the dtype of its mask.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compare.checkpoint import load_checkpoint
from compare.conversion.tensors import tensor_to_numpy
from compare.proof.cases import PRIME
from compare.runners.run import build_nnx, build_torch, linen_template


def mask_of(implementation: str, path: Path) -> np.ndarray:
    """Return the mask that the module uses after the load."""
    if implementation == "torch":
        module = build_torch(PRIME, buffer=True)
        module.mask = module.mask.to(getattr(torch, path.name.split("-")[0]))
        return tensor_to_numpy(load_checkpoint(path, module).mask)
    target: Any = (
        linen_template(PRIME, buffer=True)
        if implementation == "linen"
        else build_nnx(PRIME, buffer=True)
    )
    loaded = load_checkpoint(path, target)
    return np.asarray(loaded["buffers"]["mask"] if implementation == "linen" else loaded.mask[...])


def digest(mask: np.ndarray) -> str:
    """Return dtype, shape and a checksum of the bits."""
    checksum = hashlib.sha256(np.ascontiguousarray(mask).tobytes()).hexdigest()[:16]
    return f"{mask.dtype} {mask.shape} {checksum}"


if __name__ == "__main__":
    print(json.dumps({path: digest(mask_of(sys.argv[1], Path(path))) for path in sys.argv[2:]}))
