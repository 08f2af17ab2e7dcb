"""Projections that torch stores in one piece, and Flax in several."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx
from torch.nn import functional as F

import compare
from compare import ConversionError

SPLIT = {"blocks.*.qkv": ["blocks.*.query", "blocks.*.key", "blocks.*.value"]}


class TorchBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(6, 18), torch.nn.Linear(6, 6)


class Torch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(TorchBlock() for _ in range(2))


class Flax(nnx.Module):
    def __init__(self, dtype: Any = None) -> None:
        self.blocks = nnx.List(
            nnx.MultiHeadAttention(2, 6, decode=False, dtype=dtype, rngs=nnx.Rngs(index))
            for index in range(2)
        )


def torch_model() -> Torch:
    torch.manual_seed(0)
    return Torch()


def test_each_part_becomes_an_array_and_comes_back(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        source, target = torch_model().double(), Flax(jnp.float64)
        mapping = compare.match(source, target, split=SPLIT)
        compare.torch_to_nnx(source, target, mapping=mapping)
        inputs = np.random.default_rng(0).normal(size=(2, 4, 6))
        qkvs: list[Any] = [block.get_submodule("qkv") for block in source.blocks]
        for block, qkv in zip(target.blocks, qkvs, strict=True):
            parts = qkv(torch.from_numpy(inputs)).chunk(3, dim=-1)
            projections = (block.query, block.key, block.value)
            for part, project in zip(parts, projections, strict=True):
                outputs = np.asarray(project(jnp.asarray(inputs))).reshape(2, 4, 6)
                np.testing.assert_allclose(outputs, part.detach().numpy(), rtol=1e-12, atol=1e-14)
        state = compare.nnx_to_torch(target, mapping=mapping)
        assert all(torch.equal(state[key], value) for key, value in source.state_dict().items())
        path = compare.save_checkpoint(tmp_path / "state.safetensors", source, mapping=mapping)
        compare.convert_checkpoint(path, tmp_path / "state.msgpack")
        compare.convert_checkpoint(tmp_path / "state.msgpack", tmp_path / "back.pth")
        assert not compare.verify_checkpoint(path, tmp_path / "back.pth")
        loaded = compare.load_checkpoint(tmp_path / "state.msgpack", Flax())
        again = compare.nnx_to_torch(loaded, mapping=mapping)
        assert all(torch.equal(again[key], value) for key, value in source.state_dict().items())


def test_a_state_dict_is_asked_about_its_layout() -> None:
    source = torch_model().state_dict()
    with pytest.raises(ConversionError) as refused:
        compare.match(source, Flax(), split=SPLIT)
    arguments = re.findall(r"layouts=({.*?})", str(refused.value))
    layouts = {key: name for text in arguments for key, name in json.loads(text).items()}
    assert len(refused.value.mismatch.refused) == 2
    mapping = compare.match(source, Flax(), split=SPLIT, layouts=layouts)
    assert mapping == compare.match(torch_model(), Flax(), split=SPLIT)


def test_the_split_is_suggested_and_can_be_pasted() -> None:
    with pytest.raises(ConversionError, match="not head by head as in GPT-NeoX") as refused:
        compare.match(torch_model(), Flax())
    (argument,) = re.findall(r"split=({.*?\]})", str(refused.value))
    assert json.loads(argument) == SPLIT


def test_two_parts_of_a_linear_in_linen() -> None:
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, inputs: jax.Array) -> jax.Array:
            gate, up = nn.Dense(5, name="gate_proj"), nn.Dense(5, name="up_proj")
            return nn.silu(gate(inputs)) * up(inputs)

    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"gate_up": torch.nn.Linear(3, 10)})
    inputs = jnp.ones((2, 3))
    variables = Mlp().init(jax.random.key(0), inputs)
    mapping = compare.match(module, variables, split={"gate_up": ["gate_proj", "up_proj"]})
    made = compare.torch_to_linen(module, variables, mapping=mapping)
    gate, up = module["gate_up"](torch.ones(2, 3)).chunk(2, dim=-1)
    expected = (F.silu(gate) * up).detach().numpy()
    outputs = np.asarray(Mlp().apply(made, inputs))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"blocks.*.kqv": SPLIT["blocks.*.qkv"]}, "this split fits no key"),
        ({"blocks.*.qkv": ["blocks.*.query", "blocks.*.key"]}, "has shape|Flax array"),
        ({"blocks.*.qkv": ["a", "b", "c"]}, "its part a.weight could be nothing in Flax"),
        ({"blocks.*.qkv": ["a", "b", "c", "d"]}, "has no 4 equal parts: it is (18, 6)"),
        ({"blocks.*.qkv": ["blocks.*.query"] * 3}, "would become blocks/0/query/kernel"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(split: dict[str, list[str]], message: str) -> None:
    with pytest.raises(
        ConversionError, match=re.escape(message) if "|" not in message else message
    ):
        compare.match(torch_model(), Flax(), split=split)
