"""Arguments of `convert_checkpoint` that have no effect, and files without a known suffix."""

from pathlib import Path

import jax.numpy as jnp
import pytest
import torch

import compare
from compare.checkpoint.convert import convert_checkpoint
from compare.checkpoint.errors import CheckpointError
from compare.checkpoint.formats import open_checkpoint
from compare.conversion.mapping import LINEN

from ..support import torch_module


@pytest.mark.parametrize(
    ("target", "layout", "holds"),
    [
        ("new.safetensors", "x", r"\.safetensors holds the layout 'torch' or 'flax'"),
        ("new.pth", "flax", r"\.pth holds the layout 'torch'"),
        ("new.msgpack", "torch", r"\.msgpack holds the layout 'flax'"),
        ("new.orbax", "torch", r"\.orbax holds the layout 'flax'"),
        ("new", "torch", "an Orbax folder holds the layout 'flax'"),
    ],
)
def test_a_layout_that_the_format_cannot_hold_is_refused(
    target: str, layout: str, holds: str, tmp_path: Path
) -> None:
    source = compare.save_checkpoint(tmp_path / "state.safetensors", torch_module())
    with pytest.raises(CheckpointError, match=rf"layout='{layout}': {holds}: leave layout .*out"):
        convert_checkpoint(source, tmp_path / target, layout=layout)  # type: ignore[arg-type]
    assert not (tmp_path / target).exists()


@pytest.mark.parametrize("argument", ["mapping", "like"])
@pytest.mark.parametrize(
    ("source", "target", "layout"),
    [
        ("state.safetensors", "new.pth", "torch"),
        ("state.safetensors", "new.safetensors", "torch"),
        ("state.msgpack", "new.orbax", "flax"),
    ],
)
def test_a_mapping_is_refused_if_the_layout_does_not_change(
    source: str, target: str, layout: str, argument: str, tmp_path: Path
) -> None:
    saved = compare.save_checkpoint(tmp_path / source, torch_module())
    other = compare.save_checkpoint(tmp_path / "other.msgpack", torch_module())
    options = {"mapping": LINEN} if argument == "mapping" else {"like": other}
    with pytest.raises(
        CheckpointError,
        match=rf"{argument} .*has no effect: .* both have the {layout} layout: leave it out",
    ):
        convert_checkpoint(saved, tmp_path / target, **options)
    assert not (tmp_path / target).exists()


def test_shards_take_a_layout_and_then_a_mapping(tmp_path: Path) -> None:
    source = compare.save_checkpoint(tmp_path / "state.safetensors", torch_module())
    with pytest.raises(CheckpointError, match=r"mapping .*has no effect"):
        convert_checkpoint(source, tmp_path / "shards", mapping=LINEN, shard_bytes=700)
    convert_checkpoint(source, tmp_path / "shards", mapping=LINEN, layout="flax", shard_bytes=700)
    with open_checkpoint(tmp_path / "shards") as stored:
        assert stored.layout == "linen"


def test_mapping_and_like_exclude_each_other(tmp_path: Path) -> None:
    source = compare.save_checkpoint(tmp_path / "state.safetensors", torch_module())
    like = compare.save_checkpoint(tmp_path / "like.msgpack", torch_module())
    with pytest.raises(CheckpointError, match="like has no effect beside mapping: leave"):
        convert_checkpoint(source, tmp_path / "new.msgpack", mapping=LINEN, like=like)


def test_a_file_without_a_suffix_is_told_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "passwd").write_text("root")
    with pytest.raises(
        CheckpointError,
        match=r"unknown suffix '': name it with one of \.pth, \.pt, \.bin, \.ckpt",
    ):
        open_checkpoint(tmp_path / "passwd")


def test_like_takes_the_mapping_of_a_checkpoint_that_has_one(tmp_path: Path) -> None:
    """Its names do not pair by themselves: `fc` in torch is `dense` in Linen."""
    source = torch.nn.ModuleDict({"fc": torch.nn.Linear(3, 4)})
    template = {"params": {"dense": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}}
    mapping = compare.match(source, template, rename={"fc": "dense"})
    variables = compare.torch_to_linen(source, template, mapping=mapping)
    like = compare.save_checkpoint(tmp_path / "like.msgpack", variables, mapping=mapping)
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    with pytest.warns(compare.UnverifiedCheckpoint):
        convert_checkpoint(tmp_path / "plain.pth", tmp_path / "new.orbax", like=like)
    assert compare.verify_checkpoint(tmp_path / "new.orbax", like) == []
    torch.save({"other.weight": torch.ones(4, 3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not pair with"):
        convert_checkpoint(tmp_path / "other.pth", tmp_path / "other.orbax", like=like)
