"""Many names that do not pair are answered soon: no step compares each with each."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from flax.serialization import msgpack_serialize
from safetensors.torch import save_file

import compare

pytestmark = pytest.mark.filterwarnings("ignore::compare.checkpoint.errors.UnverifiedCheckpoint")
# A step that compares each with each takes minutes with so many.
COUNT = 20_000
SECONDS = 4.0


@contextmanager
def soon() -> Iterator[None]:
    # Measuring coverage, as the mechanical bugs do, takes several times as long.
    seconds = SECONDS if sys.gettrace() is None else 5 * SECONDS
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


def template(layer: str) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    one = np.ones(1, np.float32)
    return {"params": {f"{layer}_{i:05d}": {"wt": one} for i in range(COUNT)}}


@pytest.mark.parametrize("name", ["model_block_{}.kernel_weight", "module.net_layer_{}.wt"])
def test_a_match_that_fails(name: str) -> None:
    source = {name.format(f"{i:05d}"): torch.ones(1) for i in range(COUNT)}
    with soon(), pytest.raises(compare.ConversionError):
        compare.match(source, template("net_layer"))


def test_a_match_of_modules_that_are_all_different() -> None:
    one = np.ones(1, np.float32)
    source = {f"x{i}.w": torch.ones(1).expand(i + 1) for i in range(COUNT)}
    modules = {f"y{i}": {"w": np.broadcast_to(one, (i + 1,))} for i in range(COUNT)}
    with soon(), pytest.raises(compare.ConversionError):
        compare.match(source, {"params": modules})


@pytest.mark.parametrize(
    "suffix",
    ["msgpack", *(pytest.param(name, marks=pytest.mark.again) for name in ("safetensors", "pth"))],
)
def test_a_load_and_a_comparison_that_fail(suffix: str, here: Path) -> None:
    path = Path(f"many.{suffix}")
    state = {f"block.{i}.weight": torch.ones(1) for i in range(COUNT)}
    if suffix == "msgpack":
        path.write_bytes(msgpack_serialize(template("block")))
    elif suffix == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    Path("others.msgpack").write_bytes(msgpack_serialize(template("net_layer")))
    with soon(), pytest.raises(compare.CheckpointError):
        compare.load_checkpoint(path, template("net_layer"))
    with soon():
        if suffix == "msgpack":
            assert compare.verify_checkpoint(path, "others.msgpack")
        else:
            with pytest.raises(compare.CheckpointError):
                compare.verify_checkpoint(path, "others.msgpack")


def test_stars_do_not_explode() -> None:
    source = {"a" * 4000: torch.ones(1)}
    for rule in ({"**********z": "q"}, {"**z": "q*"}):
        with soon(), pytest.raises(compare.ConversionError):
            compare.match(source, {"params": {"b": {"c": np.ones(1)}}}, rename=rule)
