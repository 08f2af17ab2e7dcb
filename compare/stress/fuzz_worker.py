"""Read mutated checkpoints: `python -m compare.stress.fuzz_worker KIND SEED FIRST FOLDER`, until it is ended.

Input number N of a seed is always the same. A line is printed for each hundred inputs, and one for
each that did what no input may do.
"""

import json
import random
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from ..checkpoint.errors import CheckpointError
from ..checkpoint.formats import open_checkpoint
from ..conversion.mapping import slashed
from ..conversion.tensors import tensor_to_numpy
from .corrupt import mutated, seeds, state

SLOW_SECONDS = 5.0
# Beyond what the process has when it begins.
MEMORY_BYTES = 1 << 30
EVERY = 100


class Input:
    """The inputs of one format and seed, by number."""

    def __init__(self, kind: str, seed: str, folder: Path) -> None:
        self.kind, self.seed, self.folder = kind, seed, folder
        valid = folder / "valid"
        valid.mkdir(parents=True, exist_ok=True)
        self.valid = seeds(valid, kind)

    def make(self, number: int) -> Path:
        """Write input `number` and return its path."""
        draw = random.Random(f"{self.kind} {self.seed} {number}")
        source = draw.choice(self.valid)
        target = self.folder / source.name
        if source.is_file():
            target.write_bytes(mutated(self.kind, source.read_bytes(), draw))
            return target
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        file = draw.choice(sorted(path for path in target.rglob("*") if path.is_file()))
        shards = file.suffix == ".safetensors"
        file.write_bytes(mutated("safetensors" if shards else self.kind, file.read_bytes(), draw))
        return target


class WrongTensorsError(Exception):
    """A manifest vouches for what was read, and it is not what was saved."""


def outcome(path: Path) -> str:
    """Read the checkpoint: `refused`, `the same` as was saved, or `unverified`, since nothing tells.

    Raises:
        WrongTensorsError: a manifest vouches for a tensor that was not saved, for other values, or
            for fewer tensors.
    """
    try:
        with open_checkpoint(path) as stored:
            read = {slashed(key): array for key, array in stored.read()}
            if not stored.checked:
                return "unverified"
    except CheckpointError:
        return "refused"
    saved = _saved(flax_names=path.suffix in (".msgpack", ".orbax"))
    if wrong := sorted(saved.keys() ^ read.keys()):
        raise WrongTensorsError(
            f"{', '.join(wrong)}: in what was saved or in what was read, not in both"
        )
    for name, array in read.items():
        if not np.array_equal(array, saved[name]):
            raise WrongTensorsError(f"{name} has other values, and its checksum vouches for them")
    return "the same"


def _saved(flax_names: bool) -> dict[str, np.ndarray]:
    """Return what the valid checkpoints hold, under the names that the format gives."""
    arrays = {name: tensor_to_numpy(tensor) for name, tensor in state().items()}
    if not flax_names:
        return arrays
    mask = arrays.pop("mask")
    kernels = {
        f"params/{name.replace('.weight', '/kernel')}": array.T for name, array in arrays.items()
    }
    return {"buffers/mask": mask, **kernels}


def main() -> None:
    """Read inputs without end."""
    kind, seed, first, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    inputs = Input(kind, seed, folder)
    outcome(inputs.valid[0])  # what the first read allocates belongs to no input
    used = int(
        next(
            line for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line
        ).split()[1]
    )
    resource.setrlimit(resource.RLIMIT_AS, (used * 1024 + MEMORY_BYTES, used * 1024 + MEMORY_BYTES))
    counts: Counter[str] = Counter()
    number = first
    _say({"ready": True})
    while True:
        begin = time.process_time()  # not the clock: the machine may be busy with something else
        path = inputs.make(number)
        try:
            counts[outcome(path)] += 1
        except BaseException:
            _say({"bad": number, "why": traceback.format_exc()[-3000:]})
        if (seconds := time.process_time() - begin) > SLOW_SECONDS:
            _say({"bad": number, "why": f"took {seconds:.1f} s"})
        number += 1
        if (number - first) % EVERY == 0 or kind == "orbax":
            _say({"done": number, "counts": counts})
            counts.clear()


def _say(content: object) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
