"""Save again and again in children that are to be killed: `python -m compare.stress.kill_worker PATH`.

For each line on standard input, `FIRST`, a child is forked that saves a state of FIRST, FIRST + 1,
... at PATH until it is killed; its process number is printed. Forking spares each try the seconds
of importing both frameworks.
"""

import os
import sys
import warnings
from pathlib import Path

import orbax.checkpoint  # noqa: F401  imported here, so that the children need not
import torch

from ..checkpoint import save_checkpoint

NAMES = ("mask", "W_query.weight", "W_key.weight", "W_value.weight")
SIZE = 256


def state(value: int) -> dict[str, torch.Tensor]:
    """Return a state every number of which is the value, so that a mixture of two is told from either."""
    return {name: torch.full((SIZE, SIZE), float(value)) for name in NAMES}


def main() -> None:
    """Fork a child for each line."""
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
