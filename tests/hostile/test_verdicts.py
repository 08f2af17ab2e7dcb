"""No file decides how it is checked, and nothing counts as held that was not compared."""

from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import compare
from compare.checkpoint.convert import convert_checkpoint
from compare.checkpoint.formats import msgpack
from compare.checkpoint.tensors import tensors_of
from compare.conversion.mapping import Left, Row, StateMapping

from .conftest import Command

pytestmark = pytest.mark.filterwarnings("ignore::compare.checkpoint.errors.UnverifiedCheckpoint")
STATE = {"a.weight": torch.arange(9.0).reshape(3, 3), "b.weight": torch.eye(3)}


def lying(*rows: tuple[str, str, str]) -> StateMapping:
    return StateMapping(
        tuple(Row(f"{key}.weight", ("params", place, "kernel"), how) for key, place, how in rows)
    )


LINEARS = {"*.weight": "transposed"}  # of square matrices, which a state dict does not say


@pytest.mark.parametrize(
    "mapping",
    [
        lying(("a", "b", "transposed"), ("b", "a", "transposed")),
        lying(("a", "a", "same"), ("b", "b", "same")),
    ],
    ids=["exchanged", "untransposed"],
)
def test_the_verified_file_does_not_bring_the_rule(
    mapping: StateMapping, here: Path, command: Command
) -> None:
    torch.save(STATE, "v.pth")
    convert_checkpoint("v.pth", "got.msgpack", mapping=mapping)
    differences = compare.verify_checkpoint("v.pth", "got.msgpack", layouts=LINEARS)
    assert any("got.msgpack claims" in difference.what for difference in differences)
    assert any("differs in" in difference.what for difference in differences)
    code, printed = command("verify", "v.pth", "got.msgpack", "--layout-of", "*.weight=transposed")
    assert code == 1
    assert "The mapping in got.msgpack did not decide this" in printed
    mapping.save("map.json")
    assert command("verify", "v.pth", "got.msgpack", "--map", "map.json")[0] == 0
    assert command("verify", "v.pth", "got.msgpack", "--like", "got.msgpack")[0] == 0
    assert compare.verify_checkpoint("got.msgpack", "v.pth", layouts=LINEARS), "the other direction"


def test_a_tensor_on_one_side_only_is_a_finding(here: Path, command: Command) -> None:
    norm = torch.nn.BatchNorm1d(3)
    torch.save(norm.state_dict(), "n.pth")
    variables = {
        "params": {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)},
        "batch_stats": {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)},
    }
    Path("n.msgpack").write_bytes(flax.serialization.msgpack_serialize(variables))
    code, printed = command("verify", "n.pth", "n.msgpack")
    assert code == 1
    assert "num_batches_tracked has no counterpart" in printed
    assert "--ignore num_batches_tracked" in printed
    code, _ = command("verify", "n.pth", "n.msgpack", "--ignore", "num_batches_tracked")
    assert code == 0


def test_a_mapping_that_leaves_out_by_itself_is_no_excuse(here: Path) -> None:
    """The file claims that one of its tensors has no counterpart."""
    torch.save(STATE, "v.pth")
    variables = {"params": {"a": {"kernel": STATE["a.weight"].T.numpy()}}}
    claim = StateMapping(lying(("a", "a", "transposed")).rows, (Left("b.weight", "ignore"),))
    compare.save_checkpoint("got.msgpack", variables, mapping=claim)
    for pair in (("v.pth", "got.msgpack"), ("got.msgpack", "v.pth")):
        differences = compare.verify_checkpoint(*pair, layouts=LINEARS)
        assert [one.name for one in differences if "no counterpart" in one.what] == ["b.weight"]
        assert compare.verify_checkpoint(*pair, layouts=LINEARS, ignore=["b.*"]) == []
        with pytest.raises(compare.CheckpointError, match=r"ignore='c' has no effect"):
            compare.verify_checkpoint(*pair, layouts=LINEARS, ignore=["b.*", "c"])


@pytest.mark.parametrize("verb", ["verify", "convert", "inspect"])
def test_nothing_compared_is_not_run(verb: str, here: Path, command: Command) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        save_file({}, name)
    code, printed = command(verb, "one.safetensors", "two.safetensors")
    assert code == 1
    assert "NOT everything held" in printed and "not run" in printed
    with pytest.raises(compare.CheckpointError, match="nothing was compared"):
        compare.verify_checkpoint("one.safetensors", "two.safetensors")


def test_two_tensors_whose_joined_names_coincide_are_two(here: Path, command: Command) -> None:
    for name, value in (("x", 1), ("y", 2)):
        tree: Any = {
            "params": {"a/b": np.zeros(2, np.float32), "a": {"b": np.full(2, value, np.float32)}}
        }
        Path(f"{name}.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    for verb in ("inspect", "verify"):
        assert command(verb, "x.msgpack", "y.msgpack")[0] == 1
        assert command(verb, "x.msgpack", "x.msgpack")[0] == 0


def test_a_checksum_is_named_for_what_it_proves(command: Command) -> None:
    assert "every value is as it was saved (checksums)" in command("inspect", "a.pth")[1]


def test_what_a_name_is_tied_to_is_compared(here: Path, command: Command) -> None:
    one, other = torch.ones(4), torch.zeros(4)
    torch.save({"a": one, "b": other, "c": one}, "v1.pth")
    torch.save({"a": one, "b": other, "c": other}, "v2.pth")
    torch.save({"a": one, "b": other, "c": one.clone()}, "v3.pth")
    torch.save({"c": one, "a": one, "b": other}, "v4.pth")
    for left, right, code in (("v1", "v2", 1), ("v1", "v3", 1), ("v1", "v4", 0), ("v1", "v1", 0)):
        assert command("verify", f"{left}.pth", f"{right}.pth")[0] == code
        assert command("verify", f"{right}.pth", f"{left}.pth")[0] == code
    arrays = {("a",): np.ones(2, np.float32), ("b",): np.zeros(2, np.float32)}
    for name, aliases in (("n1", {("c",): ("a",)}), ("n2", {("c",): ("b",)}), ("n3", {})):
        msgpack.write(Path(f"{name}.msgpack"), tensors_of("nnx", arrays, {}, aliases))
    assert compare.verify_checkpoint("n1.msgpack", "n1.msgpack") == []
    assert compare.verify_checkpoint("n1.msgpack", "n2.msgpack")
    assert compare.verify_checkpoint("n1.msgpack", "n3.msgpack")
