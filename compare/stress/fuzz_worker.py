"""Read mutated checkpoints until killed.

Usage: `python -m compare.stress.fuzz_worker FORMAT SEED FIRST FOLDER`.

Input number N of a seed is always the same. The process prints one line of JSON per hundred inputs,
and one for each bad input: one that raised an exception other than `CheckpointError`, loaded wrong
values or took too long.
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
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..checkpoint.convert import convert_checkpoint
from ..checkpoint.errors import CheckpointError
from ..checkpoint.formats import open_checkpoint
from ..conversion.mapping import slashed
from ..conversion.tensors import tensor_to_numpy
from .corrupt import mutated, seeds, state

SLOW_SECONDS = 5.0
MEMORY_BYTES = 1 << 30  # limit on top of what the process uses before the first input
BUDGET_BYTES = 64 << 20
# What the libraries may take on top of the budget, in kilobytes of resident memory.
SLACK_KILOBYTES = 200 << 10
CONVERT_EVERY = 20
REPORT_EVERY = 100


class Input:
    """The numbered inputs of one format and seed."""

    def __init__(self, file_format: str, seed: str, folder: Path) -> None:
        self.file_format, self.seed, self.folder = file_format, seed, folder
        valid_folder = folder / "valid"
        valid_folder.mkdir(parents=True, exist_ok=True)
        self.valid = seeds(valid_folder, file_format)

    def make(self, number: int) -> Path:
        """Write input `number` and return its path."""
        rng = random.Random(f"{self.file_format} {self.seed} {number}")
        source = rng.choice(self.valid)
        target = self.folder / source.name
        if source.is_file():
            target.write_bytes(mutated(self.file_format, source.read_bytes(), rng))
            return target
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        file = rng.choice(sorted(path for path in target.rglob("*") if path.is_file()))
        file_format = "safetensors" if file.suffix == ".safetensors" else self.file_format
        file.write_bytes(mutated(file_format, file.read_bytes(), rng))
        return target


class WrongTensorsError(Exception):
    """The tensors match their manifest but differ from what was saved."""


def outcome(path: Path) -> str:
    """Read the checkpoint and return "refused", "the same" or "unverified".

    "refused" means that it raised `CheckpointError`, "the same" that it has the tensors that were
    saved, and "unverified" that it has no manifest to compare them with.

    Raises:
        WrongTensorsError: the manifest accepts a missing tensor, an additional one or other values.
    """
    try:
        with open_checkpoint(path, BUDGET_BYTES) as stored:
            loaded = {slashed(key): array for key, array in stored.read()}
            if not stored.checked:
                return "unverified"
    except CheckpointError:
        return "refused"
    saved = _saved(flax_names=path.suffix in (".msgpack", ".orbax"))
    if unpaired := sorted(saved.keys() ^ loaded.keys()):
        raise WrongTensorsError(
            f"{', '.join(unpaired)}: saved but not loaded, or loaded but never saved"
        )
    for name, array in loaded.items():
        if not np.array_equal(array, saved[name]):
            raise WrongTensorsError(f"{name} has other values, although its checksum matches")
    return "the same"


class TouchedError(Exception):
    """Converting changed the source, or wrote more than the target."""


def convert(path: Path, out: Path) -> None:
    """Convert the checkpoint, and require that nothing but the target was written.

    Raises:
        TouchedError: something else was.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    before = _content(path)
    target = out / "target.safetensors"
    with suppress(CheckpointError):
        convert_checkpoint(path, target, memory=BUDGET_BYTES)
    if _content(path) != before:
        raise TouchedError(f"{path} was changed")
    if others := [entry.name for entry in out.iterdir() if entry != target]:
        raise TouchedError(f"{', '.join(others)} was left behind")


def _content(path: Path) -> dict[str, bytes]:
    files = path.rglob("*") if path.is_dir() else [path]
    return {str(file): file.read_bytes() for file in files if file.is_file()}


def _saved(flax_names: bool) -> dict[str, np.ndarray]:
    """Return the state of the valid checkpoints, under torch names or Flax paths."""
    arrays = {name: tensor_to_numpy(tensor) for name, tensor in state().items()}
    if not flax_names:
        return arrays
    mask = arrays.pop("mask")
    kernels = {
        f"params/{name.replace('.weight', '/kernel')}": array.T for name, array in arrays.items()
    }
    return {"buffers/mask": mask, **kernels}


def main() -> None:
    """Read one input after the other, forever."""
    file_format, seed, first, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    inputs = Input(file_format, seed, folder)
    outcome(inputs.valid[0])  # the first read allocates memory that no input should be charged for
    lines = Path("/proc/self/status").read_text().splitlines()
    used_kilobytes = int(next(line for line in lines if "VmSize" in line).split()[1])
    limit = used_kilobytes * 1024 + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak += BUDGET_BYTES // 1024 + SLACK_KILOBYTES
    counts: Counter[str] = Counter()
    number = first
    _send({"ready": True})
    while True:
        begin = time.process_time()  # not wall time: other processes may be busy
        path = inputs.make(number)
        try:
            counts[outcome(path)] += 1
            if number % CONVERT_EVERY == 0:
                convert(path, folder / "out")
        except BaseException:
            _send({"bad": number, "why": traceback.format_exc()[-3000:]})
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > peak:
            _send({"bad": number, "why": f"took more than {peak:,} kB of memory"})
            return  # the peak stays: a new process goes on
        if (seconds := time.process_time() - begin) > SLOW_SECONDS:
            _send({"bad": number, "why": f"took {seconds:.1f} s"})
        number += 1
        if (number - first) % REPORT_EVERY == 0 or file_format == "orbax":
            _send({"done": number, "counts": counts})
            counts.clear()


def _send(message: object) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
