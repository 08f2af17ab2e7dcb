"""Layers that one framework stores in one tensor: every part must fit, in both directions."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import torch
from flax import nnx

import compare
from compare.checkpoint.errors import CheckpointError
from compare.conversion.errors import ConversionError
from compare.conversion.mapping import StateMapping


class Attention(nnx.Module):
    def __init__(self) -> None:
        self.a = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))


class Cell(nnx.Module):
    def __init__(self) -> None:
        self.c = nnx.LSTMCell(2, 3, rngs=nnx.Rngs(0))


def attention() -> tuple[Any, Any, StateMapping]:
    source = torch.nn.ModuleDict({"a": torch.nn.MultiheadAttention(6, 2)})
    model = Attention()
    mapping = compare.match(source, model)
    return source, compare.torch_to_nnx(source, model, mapping=mapping), mapping


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_parts_of_different_dtypes_are_refused(part: str, suffix: str, tmp_path: Path) -> None:
    source, model, mapping = attention()
    kernel = getattr(model.a, part).kernel
    kernel.set_value(kernel[...].astype(jnp.bfloat16))
    message = "in_proj_weight: its parts have different dtypes: (torch.)?(float32|bfloat16) and"
    with pytest.raises(ConversionError, match=message):
        compare.nnx_to_torch(model, mapping=mapping)
    path = compare.save_checkpoint(tmp_path / "a.msgpack", model)
    for work in (
        lambda: compare.convert_checkpoint(
            path, tmp_path / f"b{suffix}", mapping=mapping, layout="torch"
        ),
        lambda: compare.load_checkpoint(path, source, mapping=mapping),
        lambda: compare.read_checkpoint(path, mapping=mapping),
    ):
        with pytest.raises(CheckpointError, match=message):
            work()
    assert not (tmp_path / f"b{suffix}").exists()


def test_two_biases_of_different_dtypes_are_refused(tmp_path: Path) -> None:
    source: Any = torch.nn.ModuleDict({"c": torch.nn.LSTMCell(2, 3)})
    mapping = compare.match(source, Cell())
    source["c"].bias_hh.data = source["c"].bias_hh.data.half()
    path = compare.save_checkpoint(tmp_path / "a.pth", source)
    other = compare.save_checkpoint(tmp_path / "b.msgpack", Cell())
    message = "its parts have different dtypes: float32 and float16"
    for pair in ((path, other), (other, path)):
        with pytest.raises(CheckpointError, match=message):
            compare.verify_checkpoint(*pair, mapping=mapping)
    with pytest.raises(CheckpointError, match=message):
        compare.convert_checkpoint(path, tmp_path / "c.msgpack", mapping=mapping)


def test_a_tensor_without_all_of_its_parts_is_left_out() -> None:
    _, model, mapping = attention()
    kernel = model.a.query.kernel
    model.a.query.kernel = nnx.Param(kernel[...].reshape(6, 3, 2))
    state, mismatch = compare.nnx_to_torch(model, mapping=mapping, strict=False)
    assert "a.in_proj_weight" not in state and "a.out_proj.weight" in state
    assert [entry.place for entry in mismatch.refused] == ["a/query/kernel"]


class Shared(nnx.Module):
    def __init__(self) -> None:
        self.a = Attention().a
        self.b = self.a


def test_attention_with_two_names_has_them_on_both_sides() -> None:
    layer = torch.nn.MultiheadAttention(6, 2)
    source = torch.nn.ModuleDict({"a": layer, "b": layer})
    mapping = compare.match(source, Shared())
    model = compare.torch_to_nnx(source, Shared(), mapping=mapping)
    state = compare.nnx_to_torch(model, mapping=mapping)
    assert state.keys() == source.state_dict().keys()
    assert all(state[f"a.{key}"] is state[f"b.{key}"] for key in layer.state_dict())


def test_a_part_that_is_not_trained_is_refused() -> None:
    model: Any = Attention()
    for name in ("query", "key", "value", "out"):
        layer = getattr(model.a, name)
        layer.kernel = nnx.BatchStat(layer.kernel[...])
    source = torch.nn.ModuleDict({"a": torch.nn.MultiheadAttention(6, 2)})
    with pytest.raises(ConversionError, match="in_proj_weight: is a parameter in torch and a stat"):
        compare.match(source, model)


class Up(nnx.Module):
    def __init__(self) -> None:
        self.up = nnx.ConvTranspose(4, 4, (3,), rngs=nnx.Rngs(0))


def test_what_no_view_can_show_is_not_shared() -> None:
    _, model, mapping = attention()
    with pytest.raises(ConversionError, match="several arrays make one tensor, so memory"):
        compare.nnx_to_torch(model, mapping=mapping, copy=False)
    up: Any = torch.nn.ModuleDict({"up": torch.nn.ConvTranspose1d(4, 4, 3)})
    mapping = compare.match(up, Up(), policy={"up.padding": "ignore"})
    with pytest.raises(ConversionError, match="this layout makes a new tensor"):
        compare.nnx_to_torch(Up(), mapping=mapping, copy=False)


class Own(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.rand(4, 4))
        self.bias = torch.nn.Parameter(torch.zeros(4))


def test_a_kernel_of_ones_own_is_asked_about() -> None:
    source = torch.nn.ModuleDict({"d": Own()})

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.d = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    with pytest.raises(ConversionError, match=r"pass layouts=\{\"d.kernel\": \"same\"\}"):
        compare.match(source, Model())
    for layout in ("same", "transposed"):
        mapping = compare.match(source, Model(), layouts={"d.kernel": layout})
        assert mapping.by_key["d.kernel"][0].layout == layout


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [
        ([[0, 1, 5], [0, 0, -7], [0, 0, 0]], torch.float32),
        ([[0, 1, 1], [-0.0, 0, 1], [0, 0, 0]], torch.float32),
        ([[0, 1j, 1j], [0, 0, 1j], [0, 0, 0]], torch.complex64),
        ([[3.0]], torch.float32),
    ],
)
def test_what_would_not_come_back_is_not_left_out(mask: Any, dtype: torch.dtype) -> None:
    state = {"w": torch.zeros(2), "tri": torch.tensor(mask, dtype=dtype)}
    template = {"params": {"w": jnp.zeros(2)}}
    mapping = compare.match(state, template, policy={"tri": "verify"})
    with pytest.raises(ConversionError, match="tri: has the pattern of a causal mask, but not one"):
        compare.torch_to_linen(state, template, mapping=mapping)


@pytest.mark.parametrize("mask", [[[0.0]], [[1.0]], [[0, 1], [0, 0]]])
def test_a_small_causal_mask_is_one(mask: Any) -> None:
    state = {"w": torch.zeros(2), "tri": torch.tensor(mask)}
    template = {"params": {"w": jnp.zeros(2)}}
    mapping = compare.match(state, template, policy={"tri": "verify"})
    variables = compare.torch_to_linen(state, template, mapping=mapping)
    assert torch.equal(compare.linen_to_torch(variables, mapping=mapping)["tri"], state["tri"])


def test_the_order_of_the_rules_does_not_matter() -> None:
    rules = {"layer": "other", "l*": "m*", "*": "x.*"}
    tensors = {"layer": torch.zeros(1), "lab": torch.zeros(2), "a": torch.zeros(3)}
    names = {"other": jnp.zeros(1), "mab": jnp.zeros(2), "x": {"a": jnp.zeros(3)}}
    for rename in (rules, dict(reversed(rules.items()))):
        compare.match(tensors, {"params": names}, rename=rename)


def test_a_policy_that_does_not_exist() -> None:
    policy: Any = {"w": "foo"}
    with pytest.raises(ValueError, match="policy w: there is no 'foo'"):
        compare.match({"w": torch.zeros(2)}, {"params": {"w": jnp.zeros(2)}}, policy=policy)


def test_a_large_integer_mask_comes_back() -> None:
    state = {"w": torch.zeros(2), "tri": torch.ones(3, 3).triu(1).long() * (2**60 + 1)}
    template = {"params": {"w": jnp.zeros(2)}}
    mapping = compare.match(state, template, policy={"tri": "verify"})
    variables = compare.torch_to_linen(state, template, mapping=mapping)
    assert torch.equal(compare.linen_to_torch(variables, mapping=mapping)["tri"], state["tri"])


def test_only_a_counter_of_batches_is_left_out_unasked() -> None:
    template = {"params": {"w": jnp.zeros(2)}}
    counters = {"num_batches_tracked": torch.ones(2), "n.num_batches_tracked": torch.tensor(1)}
    for key, value in counters.items():
        with pytest.raises(ConversionError, match=f"unexpected {key}"):
            compare.match({"w": torch.zeros(2), key: value}, template)


def test_the_fill_of_a_mask_in_half_precision() -> None:
    """-1e4 is -9984 in bfloat16."""
    template = {"params": {"h": {"w": jnp.zeros(2)}}}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        state = {"h.w": torch.zeros(2), "h.attn.masked_bias": torch.tensor(-1e4, dtype=dtype)}
        mapping = compare.match(state, template)
        compare.torch_to_linen(state, template, mapping=mapping)
