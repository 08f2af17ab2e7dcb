"""CheckpointError refuses every hostile file, and the target of the load stays unchanged."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import compare
from compare.checkpoint.convert import convert_checkpoint
from compare.checkpoint.errors import CheckpointError, UnverifiedCheckpoint
from compare.proof.cases import PRIME
from compare.runners.run import build_nnx

from ..support import linen_variables, torch_module
from .faults import DATA_FAULTS, FAULTS

# Words that would advise the user to switch off a safeguard.
FORBIDDEN = ("weights_only=False", "partial_restore", "Traceback")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.slow
def test_the_fault_is_named_and_nothing_is_touched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library that makes the file may warn
        path = FAULTS[name].make(tmp_path)
    before = _content(tmp_path)
    for target in (
        torch_module(PRIME, seed=5),
        linen_variables(PRIME),
        build_nnx(PRIME, buffer=True),
    ):
        initial = _values(target)
        with warnings.catch_warnings(), pytest.raises(CheckpointError) as caught:
            warnings.simplefilter("ignore", UnverifiedCheckpoint)
            compare.load_checkpoint(path, target)
        error, message = caught.value, str(caught.value)
        parts = error.path, error.key, error.expected, error.found, error.mend
        assert all(parts), parts
        assert re.search(FAULTS[name].says, message.replace("\n", " ")), message
        assert message.startswith(str(path))
        assert not any(word in message for word in FORBIDDEN)
        after = _values(target)
        assert all(np.array_equal(initial[key], after[key], equal_nan=True) for key in initial)
    assert _content(tmp_path) == before, "the load left a file behind or ran code"


def _values(target: Any) -> dict[str, np.ndarray]:
    if isinstance(target, torch.nn.Module):
        return {key: tensor.numpy().copy() for key, tensor in target.state_dict().items()}
    leaves = (
        jax.tree.leaves(nnx.state(target, nnx.Param))
        if isinstance(target, nnx.Module)
        else jax.tree.leaves(target)
    )
    return {str(index): np.array(leaf) for index, leaf in enumerate(leaves)}


def _content(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


# These files are not damaged; their state does not fit the module.
WHOLE = ("state", "msgpack: extra collection", "msgpack: a dict for the mask")


@pytest.mark.parametrize("name", [name for name in FAULTS if not name.startswith(WHOLE)])
@pytest.mark.slow
def test_a_conversion_refuses_it_too(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = FAULTS[name].make(tmp_path)
        (tmp_path / "out").mkdir()
        with pytest.raises(CheckpointError):
            convert_checkpoint(path, tmp_path / "out" / "new.msgpack")
    assert not list((tmp_path / "out").iterdir())


SCRIPT = """
import json, sys, warnings
from pathlib import Path
from compare.proof.cases import PRIME
from compare.checkpoint import load_checkpoint
from compare.checkpoint.errors import CheckpointError
from tests.checkpoint.faults import DATA_FAULTS
from tests.support import torch_module
warnings.simplefilter("ignore")
said = {}
for number, (name, fault) in enumerate(DATA_FAULTS.items()):
    folder = Path(sys.argv[1], str(number))
    folder.mkdir()
    path = fault.make(folder)
    try:
        load_checkpoint(path, torch_module(PRIME))
    except CheckpointError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


@pytest.mark.slow
def test_orbax_folders_with_broken_data(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for name, fault in DATA_FAULTS.items():
        assert re.search(fault.says, said.get(name, "nothing was refused")), (name, said.get(name))


def test_the_readme_counts_them() -> None:
    readme = (Path(__file__).parents[2] / "compare/checkpoint/README.md").read_text(
        encoding="utf-8"
    )
    assert f"is a table of {len(FAULTS) + len(DATA_FAULTS)} hostile and damaged files" in readme
