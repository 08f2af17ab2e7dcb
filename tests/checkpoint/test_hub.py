"""A folder that is laid out as on the Hugging Face Hub is the file of weights in it."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import compare

pytestmark = pytest.mark.filterwarnings("ignore::compare.UnverifiedCheckpoint")
STATE = {"fc.weight": torch.randn(4, 3), "fc.bias": torch.randn(4)}


def folder_with(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "some" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for name in names:
        compare.save_checkpoint(folder / name, STATE if "flax" not in name else VARIABLES)
    return folder


TEMPLATE = {"params": {"dense": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}}
VARIABLES = {
    "params": {
        "dense": {
            "kernel": jnp.asarray(STATE["fc.weight"].numpy().T),
            "bias": jnp.asarray(STATE["fc.bias"].numpy()),
        }
    }
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_one_file_of_weights_is_read(name: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, name)
    state = compare.read_checkpoint(folder)
    rename = compare.suggest(state, TEMPLATE).rename
    assert rename == {"fc": "dense"}
    mapping = compare.match(state, TEMPLATE, rename=rename)
    variables = compare.load_checkpoint(folder, TEMPLATE, mapping=mapping)
    assert np.array_equal(variables["params"]["dense"]["kernel"], STATE["fc.weight"].numpy().T)


def test_the_file_of_flax_is_read(tmp_path: Path) -> None:
    variables = compare.load_checkpoint(folder_with(tmp_path, "flax_model.msgpack"), TEMPLATE)
    assert np.array_equal(variables["params"]["dense"]["bias"], STATE["fc.bias"].numpy())


def test_of_several_files_one_must_be_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "pytorch_model.bin", "model.safetensors")
    with pytest.raises(compare.CheckpointError, match="holds 2 checkpoints") as caught:
        compare.read_checkpoint(folder)
    assert caught.value.mend == f"give one, as {folder / 'model.safetensors'}"
    assert compare.read_checkpoint(folder / "model.safetensors").keys() == STATE.keys()


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    blob = compare.save_checkpoint(tmp_path / "blob.safetensors", STATE)
    folder = folder_with(tmp_path)
    (folder / "model.safetensors").symlink_to(blob)
    with pytest.raises(compare.CheckpointError, match="link out of it") as caught:
        compare.read_checkpoint(folder)
    assert str(blob) in caught.value.mend
    assert compare.read_checkpoint(blob).keys() == STATE.keys()
