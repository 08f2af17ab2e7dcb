"""Fork children that save a checkpoint repeatedly until they are killed.

Usage: `python -m compare.stress.kill_worker PATH`. Each line on standard input is a number FIRST.
For each line the worker forks a child and prints its process id. The child saves states filled with
FIRST, FIRST + 1, ... at PATH until it is killed. Forking saves each try the seconds of importing
both frameworks.
"""

import os
import sys
import warnings
from pathlib import Path

import orbax.checkpoint  # noqa: F401  imported here so that no child has to
import torch

from ..checkpoint import save_checkpoint

NAMES = ("mask", "W_query.weight", "W_key.weight", "W_value.weight")
SIZE = 256


def state(value: int) -> dict[str, torch.Tensor]:
    """Return a state filled with one value, so that a mixture of two states is detected."""
    return {name: torch.full((SIZE, SIZE), float(value)) for name in NAMES}


def main() -> None:
    """Fork a child for each line of standard input."""
    path = Path(sys.argv[1])
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            value = int(line)
            while True:
                save_checkpoint(path, state(value))
                value += 1
        print(child, flush=True)
        os.waitpid(child, 0)
        print("gone", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
