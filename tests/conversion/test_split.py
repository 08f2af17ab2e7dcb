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
from compare import ConversionError, Split
from compare.conversion.parts import Part, equal_part, part_from_json

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
        (
            {"blocks.*.qkv": Split([*SPLIT["blocks.*.qkv"]], axis=-1)},
            "(18, 6); blocks/0/query/kernel needs (6, 18): its parts fit along another axis",
        ),
        ({"blocks.*.qkv": Split([*SPLIT["blocks.*.qkv"]], groups=4)}, "has no 3 equal parts in 4"),
        ({"blocks.*.qkv": ["a", "b", "c"]}, "its part a.weight could be nothing in Flax"),
        ({"blocks.*.qkv": ["a", "b", "c", "d"]}, "its part d.weight could be nothing in Flax"),
        ({"blocks.*.qkv": ["blocks.*.query"] * 3}, "would become blocks/0/query/kernel"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(split: Any, message: str) -> None:
    with pytest.raises(
        ConversionError, match=re.escape(message) if "|" not in message else message
    ):
        compare.match(torch_model(), Flax(), split=split)


EMBED, HEADS, KEY_HEADS, WIDTH = 6, 4, 2, 3


class Grouped(nnx.Module):
    """Grouped-query attention: fewer keys and values than queries."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.query = nnx.LinearGeneral(EMBED, (HEADS, WIDTH), rngs=rngs)
        self.key = nnx.LinearGeneral(EMBED, (KEY_HEADS, WIDTH), rngs=rngs)
        self.value = nnx.LinearGeneral(EMBED, (KEY_HEADS, WIDTH), rngs=rngs)


PARTS = ["query", "key", "value"]


def fused(order: str) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    """Return a fused projection, and its weight by part: (head, place, embed)."""
    heads = dict(zip(PARTS, (HEADS, KEY_HEADS, KEY_HEADS), strict=True))
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(count, WIDTH, EMBED)) for name, count in heads.items()}
    if order == "Phi-3":
        rows = [weights[name].reshape(-1, EMBED) for name in PARTS]
    else:  # InternLM2: a group is the queries of one key, the key and the value
        per_key = HEADS // KEY_HEADS
        rows = []
        for group in range(KEY_HEADS):
            queries = weights["query"][group * per_key : (group + 1) * per_key]
            rows += [queries.reshape(-1, EMBED), weights["key"][group], weights["value"][group]]
    layer = torch.nn.Linear(EMBED, (HEADS + 2 * KEY_HEADS) * WIDTH, bias=False)
    layer.weight.data = torch.from_numpy(np.concatenate(rows)).float()
    return torch.nn.ModuleDict({"qkv": layer}), weights


@pytest.mark.parametrize(("order", "groups"), [("Phi-3", 1), ("InternLM2", KEY_HEADS)])
def test_parts_of_grouped_heads(order: str, groups: int, tmp_path: Path) -> None:
    source, weights = fused(order)
    rule = Split(PARTS, groups=groups)
    layouts = {"qkv.weight": "(h d) e -> e h d"}
    policy: Any = {"*/bias": "ignore"}
    mapping = compare.match(source, Grouped(), split={"qkv": rule}, layouts=layouts, policy=policy)
    model = compare.torch_to_nnx(source, Grouped(), mapping=mapping)
    for name, weight in weights.items():
        kernel = np.asarray(getattr(model, name).kernel)
        np.testing.assert_array_equal(kernel, weight.astype(np.float32).transpose(2, 0, 1))
    with pytest.raises(ConversionError, match=r'split={"qkv": \["query", "key", "value"\]}; if'):
        compare.match(source, Grouped(), policy=policy)
    assert compare.StateMapping.from_json(json.loads(json.dumps(mapping.as_json()))) == mapping
    in_groups = ", in 2 groups" if groups > 1 else ""
    assert f"qkv.weight[0 of 2:1:1{in_groups}]" in str(mapping)
    both_ways(source, model, mapping, tmp_path)


def both_ways(
    source: torch.nn.Module, model: nnx.Module, mapping: compare.StateMapping, folder: Path
) -> None:
    """Check the way back in memory and through files."""
    state = source.state_dict()
    back = compare.nnx_to_torch(model, mapping=mapping)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())
    path = compare.save_checkpoint(folder / "state.safetensors", source, mapping=mapping)
    compare.convert_checkpoint(path, folder / "state.msgpack")
    compare.convert_checkpoint(folder / "state.msgpack", folder / "back.pth")
    assert not compare.verify_checkpoint(path, folder / "back.pth")
    assert not compare.verify_checkpoint(path, folder / "state.msgpack", mapping=mapping)


class Conv1D(torch.nn.Module):
    """The linear layer of transformers, which stores (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(inputs, outputs))
        self.bias = torch.nn.Parameter(torch.randn(outputs))


class Three(nnx.Module):
    def __init__(self) -> None:
        for name in PARTS:
            setattr(self, name, nnx.Linear(EMBED, EMBED, rngs=nnx.Rngs(0)))


def test_a_conv1d_is_split_along_its_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")
    torch.manual_seed(0)
    source = torch.nn.ModuleDict({"c_attn": Conv1D(EMBED, 3 * EMBED)})
    mapping = compare.match(source, Three(), split={"c_attn": PARTS})
    model = compare.torch_to_nnx(source, Three(), mapping=mapping)
    weight, bias = (value.numpy() for value in source.state_dict().values())
    for index, name in enumerate(PARTS):
        layer, begin = getattr(model, name), index * EMBED
        np.testing.assert_array_equal(layer.kernel, weight[:, begin : begin + EMBED])
        np.testing.assert_array_equal(layer.bias, bias[begin : begin + EMBED])
    both_ways(source, model, mapping, tmp_path)

    state = source.state_dict()
    rule = {"c_attn": Split(PARTS, axis=-1)}
    with pytest.raises(ConversionError, match="a state dict does not say"):
        compare.match(state, Three(), split=rule)
    layouts = {"c_attn.weight": "same"}
    assert compare.match(state, Three(), split=rule, layouts=layouts) == mapping


def test_heads_that_alternate_as_in_gpt_neox(tmp_path: Path) -> None:
    heads, width = 2, 3
    torch.manual_seed(0)
    source = torch.nn.ModuleDict({"qkv": torch.nn.Linear(EMBED, 3 * EMBED)})
    mapping = compare.match(source, Three(), split={"qkv": Split(PARTS, groups=heads)})
    model = compare.torch_to_nnx(source, Three(), mapping=mapping)
    inputs = torch.randn(5, EMBED)
    fused_outputs: torch.Tensor = source["qkv"](inputs)
    outputs = fused_outputs.reshape(5, heads, 3 * width).split(width, dim=-1)
    for name, expected in zip(PARTS, outputs, strict=True):
        found = np.asarray(getattr(model, name)(jnp.asarray(inputs.numpy())))
        np.testing.assert_allclose(
            found.reshape(5, heads, width), expected.detach().numpy(), rtol=1e-5, atol=1e-6
        )
    both_ways(source, model, mapping, tmp_path)
    with pytest.raises(ConversionError, match="memory cannot be shared; use copy=True"):
        compare.torch_to_nnx(source, Three(), mapping=mapping, copy=False)


def test_parts_of_stacked_layers(tmp_path: Path) -> None:
    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            for name in PARTS:
                setattr(self, name, nnx.Linear(EMBED, EMBED, rngs=rngs))

    class Stacked(nnx.Module):
        def __init__(self) -> None:
            build = nnx.vmap(Layer, in_axes=(0,), out_axes=0)
            self.layers = nnx.split_rngs(splits=2)(build)(nnx.Rngs(0))

    torch.manual_seed(0)
    layers = [torch.nn.ModuleDict({"qkv": torch.nn.Linear(EMBED, 3 * EMBED)}) for _ in range(2)]
    source = torch.nn.ModuleDict({"h": torch.nn.ModuleList(layers)})
    rules: Any = {
        "split": {"h.*.qkv": [f"h.*.{name}" for name in PARTS]},
        "stack": {"h.*": "layers"},
    }
    mapping = compare.match(source, Stacked(), **rules)
    model = compare.torch_to_nnx(source, Stacked(), mapping=mapping)
    for index, name in enumerate(PARTS):
        weights = [source.state_dict()[f"h.{number}.qkv.weight"].chunk(3) for number in range(2)]
        expected = np.stack([weight[index].numpy().T for weight in weights])
        np.testing.assert_array_equal(getattr(model.layers, name).kernel, expected)
    assert "h.0.qkv.weight[1/3] … h.1.qkv.weight[1/3]" in str(mapping)
    both_ways(source, model, mapping, tmp_path)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Split([], groups=2), "is no list of Flax names"),
        ("query", "is no list of Flax names"),
        ({"names": PARTS}, "is no list of Flax names"),
        (Split(PARTS, groups=0), "groups is 0; expected a positive integer"),
    ],
)
def test_what_is_no_split_is_refused(rule: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare.match(torch_model(), Flax(), split={"blocks.*.qkv": rule})


def test_equal_parts_are_written_as_before() -> None:
    assert equal_part(1, 3).as_json() == [1, 3]
    assert equal_part(1, 3).lies_in_pieces
    other = Part(0, (2, 1), -1, 4)
    assert part_from_json(other.as_json()) == other and not other.lies_in_pieces


def test_a_split_may_be_an_object_of_json() -> None:
    rule: Any = {"parts": SPLIT["blocks.*.qkv"], "axis": 0}
    assert compare.match(torch_model(), Flax(), split={"blocks.*.qkv": rule}) == compare.match(
        torch_model(), Flax(), split=SPLIT
    )


@pytest.mark.parametrize(
    "part",
    [
        {"index": 2, "sizes": [1, 1], "axis": 0, "groups": 1},
        {"index": 0, "sizes": [1, 1], "axis": 1, "groups": 1},
        {"index": 0, "sizes": [1, 1], "axis": -1.0, "groups": 1},
        {"index": 0, "sizes": [1, 0], "axis": 0, "groups": 1},
        {"index": 0, "sizes": [0, 1], "axis": 0, "groups": 1},
        {"index": 0, "sizes": [1, 1], "axis": 0, "groups": 0},
        {"index": 0, "sizes": [1, 1], "axis": 0},
        [True, 2],
    ],
)
def test_a_part_that_is_none_is_no_mapping(part: Any) -> None:
    row = {"torch_key": "a", "path": ["params", "a"], "part": part}
    with pytest.raises(ValueError, match="a has the part"):
        compare.StateMapping.from_json({"flax": "linen", "rows": [row], "left": []})


@pytest.mark.parametrize(("torch_shape", "kernels"), [((6, 0), (0, 3)), ((6, 3), (3, 0))])
def test_empty_parts_are_refused(torch_shape: Any, kernels: Any) -> None:
    template = {name: {"kernel": np.zeros(kernels, np.float32)} for name in ("q", "k")}
    with pytest.raises(ConversionError, match="a part of it is empty in Flax"):
        compare.match(
            {"a.weight": torch.ones(torch_shape)}, {"params": template}, split={"a": ["q", "k"]}
        )


def test_an_axis_that_is_none_is_refused() -> None:
    rule = {"blocks.*.qkv": Split(SPLIT["blocks.*.qkv"], axis=7)}
    with pytest.raises(ConversionError, match="axis 7 cannot be split: pass axis=0, or -1"):
        compare.match(torch_model(), Flax(), split=rule)
