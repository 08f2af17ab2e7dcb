"""Shards as other programs write them: of torch files, of variants, without their index."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import compare
from compare.checkpoint.errors import CheckpointError
from compare.checkpoint.formats import open_checkpoint

STATE = {"a": torch.randn(3, 2), "b": torch.randn(2, 3).mT, "c": torch.randn(700, 700)}
pytestmark = pytest.mark.filterwarnings("ignore::compare.UnverifiedCheckpoint")


def shards(folder: Path, suffix: str = ".bin", index: str = "pytorch_model.bin.index.json") -> Path:
    """Write two shards and their index: `c` lies in the second."""
    folder.mkdir(exist_ok=True)
    save: Any = torch.save if suffix.endswith(".bin") else safetensors.torch.save_file
    weight_map: dict[str, str] = {}
    for number, keys in enumerate((("a", "b"), ("c",)), 1):
        name = f"model-{number:05}-of-00002{suffix}"
        save({key: STATE[key].contiguous() for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def holds_all(path: Path) -> bool:
    state = compare.read_checkpoint(path)
    return list(state) == list(STATE) and all(torch.equal(state[key], STATE[key]) for key in STATE)


def test_torch_shards_are_read(tmp_path: Path) -> None:
    folder = shards(tmp_path / "bins")
    assert holds_all(folder)
    assert holds_all(folder / "pytorch_model.bin.index.json")
    lines = compare.convert_checkpoint(folder, tmp_path / "one.safetensors").lines
    assert [line.source for line in lines] == list(STATE)
    assert holds_all(tmp_path / "one.safetensors")
    assert compare.verify_checkpoint(folder, tmp_path / "one.safetensors") == []
    module = torch.nn.ParameterDict(dict.fromkeys(STATE, torch.zeros(1)))
    for key, value in STATE.items():
        module[key] = torch.nn.Parameter(torch.zeros_like(value))
    compare.load_checkpoint(folder, module)
    assert all(torch.equal(module[key], STATE[key]) for key in STATE)
    with open_checkpoint(folder) as stored:
        parts = list(stored.parts(("c",)))
    assert torch.equal(torch.from_numpy(parts[0][:700]), STATE["c"][0])
    with pytest.raises(CheckpointError, match=r"more memory is needed for c"):
        compare.read_checkpoint(folder, memory=100_000)


def test_tied_names_within_a_torch_shard(tmp_path: Path) -> None:
    name = "m-00001-of-00001.bin"
    torch.save({"a": STATE["a"], "tied": STATE["a"]}, tmp_path / name)
    index = {"weight_map": {"a": name, "tied": name}}
    (tmp_path / "m.bin.index.json").write_text(json.dumps(index))
    state = compare.read_checkpoint(tmp_path)
    assert state["a"].data_ptr() == state["tied"].data_ptr()


@pytest.mark.parametrize("suffix", [".bin", ".fp16.safetensors"])
def test_an_index_that_says_something_else(suffix: str, tmp_path: Path) -> None:
    index = f"model{suffix[-12:]}.index.json"
    folder = shards(tmp_path / "x", suffix, index)
    content = json.loads((folder / index).read_text())
    first, second = sorted(set(content["weight_map"].values()))
    for weight_map, said in (
        ({**content["weight_map"], "b": second}, f"b is in {first}"),
        ({**content["weight_map"], "d": second}, f"d is not in {second}"),
        ({"a": first, "c": second}, f"b is in {first}"),
    ):
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=said):
            compare.read_checkpoint(folder)


def test_a_variant_is_read(tmp_path: Path) -> None:
    assert holds_all(
        shards(tmp_path / "v", ".fp16.safetensors", "model.safetensors.index.fp16.json")
    )


def test_of_two_variants_one_is_to_be_named(tmp_path: Path) -> None:
    folder = shards(tmp_path / "v", ".fp16.safetensors", "model.safetensors.index.fp16.json")
    shards(tmp_path / "v", ".safetensors", "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="holds 2 checkpoints in shards") as caught:
        compare.read_checkpoint(folder)
    named = Path(caught.value.mend.removeprefix("give one, as "))
    assert named.name == "model.safetensors.index.fp16.json"
    assert holds_all(named)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_lost_index_is_said(suffix: str, tmp_path: Path) -> None:
    folder = shards(tmp_path / "v", suffix, "gone.json")
    with pytest.raises(CheckpointError, match=r"holds shards, .* but no index") as caught:
        compare.read_checkpoint(folder)
    assert "give" not in caught.value.mend, "one shard is not the checkpoint"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
def test_a_script_says_how_to_get_its_state(tmp_path: Path) -> None:
    path, new_path = tmp_path / "script.pt", tmp_path / "state.pt"
    module = torch.nn.Linear(2, 2)
    traced = torch.jit.trace(module, torch.ones(1, 2), check_trace=False)
    traced.save(path)
    with pytest.raises(CheckpointError, match="is a TorchScript archive") as caught:
        compare.read_checkpoint(path)
    exec(caught.value.mend.split("`")[1], {"torch": torch, "path": path, "new_path": new_path})
    assert torch.equal(compare.read_checkpoint(new_path)["weight"], module.weight)
