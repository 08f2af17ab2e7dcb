"""The .msgpack files are Flax's, and the manifest in them does not disturb it."""

from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import torch
from flax import nnx, serialization

import compare
import flax_impl
from compare.checkpoint.errors import CheckpointError
from compare.checkpoint.formats import open_checkpoint
from compare.checkpoint.formats.msgpack_tree import ListError, Other, TreeReader
from compare.checkpoint.manifest import KEY
from compare.files.memory import Budget
from compare.files.reading import InputFile

from ..support import same_bits, torch_module


@pytest.mark.parametrize(
    "last", [np.array(3, np.float32), np.zeros((0, 2), np.float32), np.arange(6.0)]
)
def test_flax_reads_its_variables_and_nothing_else(last: np.ndarray, tmp_path: Path) -> None:
    model = flax_impl.CausalAttentionWithBuffer(3, 6, 6, 0.1)
    inputs = jnp.ones((1, 6, 3))
    variables = dict(model.init(jax.random.key(0), inputs))
    data = compare.save_checkpoint(tmp_path / "a.msgpack", variables).read_bytes()
    restored = serialization.msgpack_restore(data)
    assert jax.tree.map(jnp.shape, restored) == jax.tree.map(jnp.shape, variables)
    expected: Any = model.apply(variables, inputs)
    assert (jax.jit(model.apply)(restored, inputs) == jax.jit(model.apply)(variables, inputs)).all()
    assert (model.apply(serialization.from_bytes(variables, data), inputs) == expected).all()
    saved = compare.save_checkpoint(tmp_path / "b.msgpack", {"params": {"z": last}})
    assert same_bits(serialization.msgpack_restore(saved.read_bytes())["params"]["z"], last)
    assert same_bits(dict(read_back(saved))["params", "z"], last)


def test_nnx_takes_it_as_a_pure_dict(tmp_path: Path) -> None:
    one, other = (
        flax_impl.nnx.CausalAttentionWithBuffer(3, 6, 6, 0.1, rngs=nnx.Rngs(seed))
        for seed in (0, 1)
    )
    parameters: Any = nnx.to_pure_dict(nnx.state(one, nnx.Param))
    flat = {**parameters, "mask": one.mask[...]}
    path = compare.save_checkpoint(tmp_path / "a.msgpack", {"params": flat})
    weights, masks = nnx.state(other, nnx.Param, flax_impl.nnx.Buffer)
    restored = serialization.msgpack_restore(path.read_bytes())["params"]
    nnx.replace_by_pure_dict(masks, {"mask": restored.pop("mask")})
    nnx.replace_by_pure_dict(weights, restored)
    nnx.update(other, weights, masks)
    one.eval()
    other.eval()
    inputs = jnp.ones((1, 6, 3))
    assert jnp.array_equal(one(inputs), other(inputs))


def read_back(path: Path) -> list[Any]:
    with open_checkpoint(path) as stored:
        assert stored.checked
        return list(stored.read())


def test_a_msgpack_file_of_an_older_version_is_read(tmp_path: Path) -> None:
    """It has its manifest at the top level."""
    new = compare.save_checkpoint(tmp_path / "new.msgpack", torch_module())
    with open_checkpoint(new) as stored:
        assert stored.manifest is not None
        text = stored.manifest.dumps()
    tree = serialization.msgpack_restore(new.read_bytes())
    old = tmp_path / "old.msgpack"
    old.write_bytes(serialization.msgpack_serialize({**tree, KEY: text}))
    assert dict(read_back(old)).keys() == dict(read_back(new)).keys()
    state = compare.read_checkpoint(old)
    assert all(torch.equal(state[key], value) for key, value in torch_module().state_dict().items())
    damaged = old.read_bytes().replace(
        tree["params"]["W_key"]["kernel"].tobytes(), bytes(13 * 11 * 4)
    )
    old.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="the values of params/W_key/kernel are not those"):
        compare.read_checkpoint(old)


def test_a_msgpack_file_with_two_manifests_is_refused(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "a.msgpack", torch_module())
    data = path.read_bytes()
    entry = msgpack.packb(KEY) + msgpack.packb("{}")
    assert data[0] == 0x82, "a map of two entries"
    path.write_bytes(b"\x83" + entry + data[1:])
    with pytest.raises(CheckpointError, match="it has two manifests"):
        compare.read_checkpoint(path)


def tree(data: bytes, folder: Path) -> Any:
    """What the reader makes of these bytes."""
    (folder / "t.msgpack").write_bytes(data)
    with closing(InputFile(folder / "t.msgpack")) as file:
        return TreeReader(file, Budget(), KEY).read()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "NoneType"),
        (True, "bool"),
        (1.5, "float"),
        (b"x" * 300, "bytes"),
        ("text", "str"),
        ("x" * 31, "str"),
        ("x" * 70_000, "str"),
    ],
)
def test_what_is_no_array_is_known_by_its_type(value: Any, kind: str, tmp_path: Path) -> None:
    found = tree(msgpack.packb({"a": value, "b": {"c": value}}), tmp_path)
    assert found == {"a": Other(kind), "b": {"c": Other(kind)}}


@pytest.mark.parametrize("value", [0, 127, 128, 70_000, 2**40, -1, -32, -33, -70_000, -(2**40)])
def test_numbers_are_read_in_every_size(value: int, tmp_path: Path) -> None:
    assert tree(msgpack.packb({"a": value}), tmp_path) == {"a": value}


@pytest.mark.parametrize("length", [0, 1, 15, 16, 65_536])
def test_a_list_of_any_length_is_told_apart(length: int, tmp_path: Path) -> None:
    with pytest.raises(ListError) as caught:
        tree(msgpack.packb({"a": {"b": [1] * length}}), tmp_path)
    assert caught.value.path == ("a", "b")


@pytest.mark.parametrize("count", [0, 1, 15, 16, 65_536])
def test_a_map_of_any_length_is_read(count: int, tmp_path: Path) -> None:
    expected = {str(index): {"b": 1} for index in range(count)}
    assert tree(msgpack.packb(expected), tmp_path) == expected


def test_each_shorter_file_ends_too_early(tmp_path: Path) -> None:
    data = msgpack.packb({"a": {"name": 1}, "bc": 70_000, "d": 1.5})
    for size in range(len(data)):
        with pytest.raises(EOFError):
            tree(data[:size], tmp_path)
