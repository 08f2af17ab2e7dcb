"""Layouts written as a pattern of axes, and where one side has more axes than the other."""

import ast
import json
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import compare
from compare import ConversionError
from compare.conversion.layouts import flax_shape, layout, to_flax, to_torch
from compare.conversion.rearranged import of_bias, rearrangement, without_ones


def side(groups: Sequence[Sequence[str]]) -> str:
    return " ".join(f"({' '.join(group)})" if group else "1" for group in groups)


@st.composite
def patterns(draw: st.DrawFn) -> tuple[list[list[str]], list[list[str]], dict[str, int]]:
    """Draw the axes of both sides, and the length of each name."""
    names = list("abcde")[: draw(st.integers(1, 5))]
    sides = []
    for _ in range(2):
        groups: list[list[str]] = []
        for name in draw(st.permutations(names)):
            if groups and groups[-1] and draw(st.booleans()):
                groups[-1].append(name)
            else:
                groups += [[]] * draw(st.integers(0, 1)) + [[name]]
        sides.append(groups)
    return sides[0], sides[1], {name: draw(st.integers(0, 3)) for name in names}


@given(drawn=patterns())
def test_a_pattern_moves_each_value_where_einsum_does(drawn: Any) -> None:
    torch_axes, flax_axes, lengths = drawn
    stated = "".join(f", {name}={size}" for name, size in lengths.items() if size)
    pattern = f"{side(torch_axes)} -> {side(flax_axes)}{stated}"
    shapes = [
        tuple(prod(lengths[name] for name in group) for group in groups)
        for groups in (torch_axes, flax_axes)
    ]
    orders = ["".join(name for group in groups for name in group) for groups in drawn[:2]]
    there = np.arange(prod(shapes[0])).reshape(shapes[0])
    whole = there.reshape([lengths[name] for name in orders[0]])
    expected = np.einsum(f"{orders[0]}->{orders[1]}", whole).reshape(shapes[1])
    try:
        chosen = layout(pattern, shapes[1])
    except ValueError as error:  # an axis of length 0 hides the others of its group
        assert "does not show the length" in str(error) or 0 in lengths.values()
        return
    assert chosen.torch_shape == shapes[0]
    for values in (there, torch.from_numpy(there)):
        found = to_flax(chosen, values)
        np.testing.assert_array_equal(np.asarray(found), expected)
        np.testing.assert_array_equal(np.asarray(to_torch(chosen, found)), there)
    if 0 not in lengths.values():
        assert flax_shape(pattern, shapes[0]) == shapes[1]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a b -> a", "each name must be once on both sides"),
        ("a a -> a a", "each name must be once on both sides"),
        ("a -> b", "each name must be once on both sides"),
        ("a -> a -> a", "is no pattern"),
        ("(a b -> a b", "has a bracket that does not close"),
        ("a 2 -> 2 a", "'2' is no name of an axis"),
        ("(a b) -> a b, c=2", "'c=2' is not the length of one of its axes"),
        ("(a b) -> a b, a=3, a=2", "'a=2' is not the length of one of its axes"),
        ("(a b) -> a b, a=0", "'a=0' is not the length of one of its axes"),
    ],
)
def test_what_is_no_pattern_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        rearrangement(pattern)
    with pytest.raises(ValueError, match=re.escape(message)):
        compare.match(torch.nn.Linear(1, 1), {}, layouts={"weight": pattern})


def test_a_length_that_is_not_shown_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r'write it after the pattern, ", c=…"'):
        layout("o (c h) -> (c h) o", (6, 2))
    assert layout("o (c h) -> (c h) o, c=2", (6, 2)).split == (2, 2, 3)
    with pytest.raises(ValueError, match=r"needs an array \(c h\) o; this one is \(7, 2\)"):
        layout("o (c h) -> (c h) o, c=2", (7, 2))


class Dense(nn.Module):
    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        outputs: jax.Array = nn.Dense(5, name="layer", param_dtype=jnp.float64)(inputs)
        return outputs


def one_point(rank: int) -> torch.nn.Module:
    return [torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d][rank - 1](3, 5, 1)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_convolution_over_one_point_is_a_dense_layer(rank: int, tmp_path: Path) -> None:
    with jax.enable_x64(True):
        torch.manual_seed(0)
        source = torch.nn.ModuleDict({"layer": one_point(rank).double()})
        inputs = np.random.default_rng(0).normal(size=(2, 3, *(4,) * rank))
        last = np.moveaxis(inputs, 1, -1)
        variables = Dense().init(jax.random.key(0), last)
        mapping = compare.match(source, variables)
        assert mapping == compare.match(source.state_dict(), variables)
        made = compare.torch_to_linen(source, variables, mapping=mapping)
        outputs: Any = Dense().apply(made, last)
        expected = source["layer"](torch.from_numpy(inputs)).detach().numpy()
        np.testing.assert_allclose(np.moveaxis(outputs, -1, 1), expected, rtol=1e-12, atol=1e-14)
        back = compare.linen_to_torch(made, mapping=mapping)
        assert all(torch.equal(back[key], value) for key, value in source.state_dict().items())
        path = compare.save_checkpoint(tmp_path / "a.safetensors", source, mapping=mapping)
        compare.convert_checkpoint(path, tmp_path / "a.msgpack")
        compare.convert_checkpoint(tmp_path / "a.msgpack", tmp_path / "a.pth")
        assert not compare.verify_checkpoint(path, tmp_path / "a.pth")


def test_a_linear_layer_is_a_convolution_over_one_point() -> None:
    torch.manual_seed(0)
    source = torch.nn.ModuleDict({"layer": torch.nn.Linear(3, 5)})
    model = nnx.Dict(layer=nnx.Conv(3, 5, (1, 1), rngs=nnx.Rngs(0)))
    mapping = compare.match(source, model)
    compare.torch_to_nnx(source, model, mapping=mapping)
    inputs = torch.randn(2, 4, 4, 3)
    expected = source["layer"](inputs).detach().numpy()
    outputs = model["layer"](jnp.asarray(inputs.numpy()))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    back = compare.nnx_to_torch(model, mapping=mapping)
    assert torch.equal(back["layer.weight"], source.state_dict()["layer.weight"])


def dense(inputs: int) -> nnx.Dict:
    return nnx.Dict(layer=nnx.Linear(inputs, 4, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("layer", "fact"),
    [
        (torch.nn.Conv2d(4, 4, 1, stride=2), "stride"),
        (torch.nn.Conv2d(4, 4, 1, padding=1), "padding"),
        (torch.nn.ConvTranspose2d(4, 4, 1, stride=2), "stride"),
        (torch.nn.ConvTranspose2d(4, 4, 1, padding=1), "padding"),
        (torch.nn.ConvTranspose2d(4, 4, 1, stride=2, output_padding=1), "output_padding"),
        (torch.nn.Conv2d(4, 4, 1, padding="same"), None),
    ],
)
def test_what_a_dense_layer_cannot_say_is_refused(layer: Any, fact: str | None) -> None:
    source, model = torch.nn.ModuleDict({"layer": layer}), dense(4)
    if fact is None:
        compare.match(source, model)
        return
    with pytest.raises(ConversionError, match=rf"layer\.{fact}: computes something el") as refused:
        compare.match(source, model)
    policies = re.findall(r"policy=({.*?})", str(refused.value))
    policy = {name: rule for text in policies for name, rule in ast.literal_eval(text).items()}
    compare.match(source, model, policy=policy)


def test_groups_are_no_dense_layer() -> None:
    source = torch.nn.ModuleDict({"layer": torch.nn.Conv1d(4, 4, 1, groups=2)})
    for layouts in ({"layer.weight": "o i 1 -> i o"}, None):
        with pytest.raises(ConversionError, match=r"layer\.groups: computes something else"):
            compare.match(source, dense(2), layouts=layouts)


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ({"strides": 2}, "strides"),
        ({"padding": 1}, "padding"),
        ({"padding": ((0, 1), (0, 0))}, "padding"),
        ({"feature_group_count": 2}, "feature_group_count"),
        ({"input_dilation": 2}, "input_dilation"),
        ({"padding": "VALID"}, None),
    ],
)
def test_a_convolution_that_does_more_is_no_linear_layer(arguments: Any, fact: str | None) -> None:
    groups = arguments.get("feature_group_count", 1)
    source = torch.nn.ModuleDict({"layer": torch.nn.Linear(4 // groups, 4)})
    model = nnx.Dict(layer=nnx.Conv(4, 4, (1, 1), **arguments, rngs=nnx.Rngs(0)))
    if fact is None:
        compare.match(source, model)
        return
    with pytest.raises(ConversionError, match=rf"layer\.{fact}: computes something else: a dense"):
        compare.match(source, model)


def test_a_transposed_convolution_that_does_more_is_no_linear_layer() -> None:
    source = torch.nn.ModuleDict({"layer": torch.nn.Linear(3, 4)})
    model = nnx.Dict(layer=nnx.ConvTranspose(3, 4, (1, 1), strides=2, rngs=nnx.Rngs(0)))
    with pytest.raises(ConversionError, match=r"layer\.strides: computes something else"):
        compare.match(source, model, layouts={"layer.weight": "o i -> 1 1 i o"})


def test_two_convolutions_over_one_point_are_compared_as_such() -> None:
    source = torch.nn.ModuleDict({"layer": torch.nn.Conv2d(3, 5, 1, stride=2)})
    model = nnx.Dict(layer=nnx.Conv(3, 5, (1, 1), strides=2, padding=0, rngs=nnx.Rngs(0)))
    layouts = {"layer.weight": "o i a b -> a b i o"}
    rows = [compare.match(source, model, layouts=given).rows[0] for given in (layouts, None)]
    assert [row.layout for row in rows] == ["o i a b -> a b i o", "conv"]


def test_a_bias_has_no_pattern_where_its_axes_are_mixed_with_others() -> None:
    assert of_bias("(h d) e -> (e h) d") is None
    assert of_bias("1 e -> e 1") is None
    assert of_bias("(h d) e -> e (h d), h=2") == "(h d) -> (h d), h=2"


def test_a_square_one_of_a_state_dict_is_asked_about() -> None:
    source = torch.nn.ModuleDict({"layer": torch.nn.Conv2d(5, 5, 1)})
    layer = {"kernel": np.zeros((5, 5), np.float32), "bias": np.zeros(5, np.float32)}
    variables = {"params": {"layer": layer}}
    with pytest.raises(ConversionError) as refused:
        compare.match(source.state_dict(), variables)
    (argument,) = re.findall(r"pass layouts=({.*?})", str(refused.value))
    asked = compare.match(source.state_dict(), variables, layouts=json.loads(argument))
    assert asked == compare.match(source, variables)
    turned = compare.match(
        torch.nn.ModuleDict({"layer": torch.nn.ConvTranspose2d(5, 5, 1)}), variables
    )
    assert {row.layout for row in turned.rows} == {"i o 1 1 -> i o", "same"}


class Fused(nnx.Module):
    def __init__(self, features: tuple[int, ...]) -> None:
        self.qkv = nnx.LinearGeneral(6, features, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("torch_axes", ["(q h d)", "(h q d)"])
def test_a_fused_projection_in_one_dense_general(torch_axes: str) -> None:
    """The bias has the axes of the weight's outputs."""
    torch.manual_seed(0)
    source = torch.nn.ModuleDict({"qkv": torch.nn.Linear(6, 3 * 2 * 4)})
    layouts = {"qkv.weight": f"{torch_axes} e -> e q h d"}
    mapping = compare.match(source, Fused((3, 2, 4)), layouts=layouts)
    assert mapping.rows[1].layout == f"{torch_axes} -> q h d"
    model = compare.torch_to_nnx(source, Fused((3, 2, 4)), mapping=mapping)
    inputs = torch.randn(5, 6)
    expected = source["qkv"](inputs).detach().numpy()
    shape = {"(q h d)": (5, 3, 2, 4), "(h q d)": (5, 2, 3, 4)}[torch_axes]
    expected = expected.reshape(shape) if shape[1] == 3 else expected.reshape(shape).swapaxes(1, 2)
    outputs = model.qkv(jnp.asarray(inputs.numpy()))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    back = compare.nnx_to_torch(model, mapping=mapping)
    assert all(torch.equal(back[key], value) for key, value in source.state_dict().items())


def test_the_bias_is_reordered_with_the_outputs() -> None:
    torch.manual_seed(0)
    source = torch.nn.ModuleDict({"qkv": torch.nn.Linear(5, 12)})
    model = nnx.Dict(qkv=nnx.Linear(5, 12, rngs=nnx.Rngs(0)))
    layouts = {"qkv.weight": "(q h d) e -> e (h q d), q=3, h=2"}
    mapping = compare.match(source, model, layouts=layouts)
    compare.torch_to_nnx(source, model, mapping=mapping)
    inputs = torch.randn(2, 5)
    expected = source["qkv"](inputs).detach().numpy().reshape(2, 3, 2, 2).swapaxes(1, 2)
    outputs = model["qkv"](jnp.asarray(inputs.numpy()))
    np.testing.assert_allclose(outputs, expected.reshape(2, 12), rtol=1e-5, atol=1e-6)


def test_the_outputs_of_a_conv1d_are_its_last_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    class Conv1D(torch.nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(inputs, outputs))
            self.bias = torch.nn.Parameter(torch.randn(outputs))

    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")
    source = torch.nn.ModuleDict({"a": Conv1D(4, 6)})
    model = nnx.Dict(a=nnx.LinearGeneral(4, (2, 3), rngs=nnx.Rngs(0)))
    layouts = {"a.weight": "e (h d) -> e h d"}
    for side in (source, source.state_dict()):
        mapping = compare.match(side, model, layouts=layouts)
        assert mapping.rows[1].layout == "(h d) -> h d"
    square = torch.nn.ModuleDict({"a": Conv1D(4, 4)})
    other = nnx.Dict(a=nnx.LinearGeneral((2, 2), (2, 2), axis=(-2, -1), rngs=nnx.Rngs(0)))
    layouts = {"a.weight": "(a b) (h d) -> a b d h"}
    assert compare.match(square, other, layouts=layouts).rows[1].layout == "(h d) -> d h"
    with pytest.raises(ConversionError, match=r'"\(a b\) -> a b" and "\(h d\) -> d h" fit'):
        compare.match(square.state_dict(), other, layouts=layouts)


def test_the_patterns_that_fit_are_named() -> None:
    source = torch.nn.ModuleDict({"qkv": torch.nn.Linear(6, 3 * 2 * 4)})
    with pytest.raises(ConversionError) as refused:
        compare.match(source, Fused((3, 2, 4)))
    text = str(refused.value)
    assert '"(b c d) a -> a b c d"' in text
    layouts = {"qkv.weight": "(b c d) a -> a b c d"}
    assert (
        compare.match(source, Fused((3, 2, 4)), layouts=layouts).rows[1].layout
        == "(b c d) -> b c d"
    )


def test_the_kernels_of_gemma() -> None:
    """Its einsum kernels are (heads, embed, head_dim)."""

    class Gemma(nnx.Module):
        def __init__(self) -> None:
            self.q_proj = nnx.Einsum("BTE,HED->BTHD", (2, 6, 4), rngs=nnx.Rngs(0))

    torch.manual_seed(0)
    source = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 8, bias=False)})
    with pytest.raises(ConversionError, match=r"\(a c\) b -> a b c"):
        compare.match(source, Gemma())
    mapping = compare.match(source, Gemma(), layouts={"q_proj.weight": "(a c) b -> a b c"})
    model = compare.torch_to_nnx(source, Gemma(), mapping=mapping)
    inputs = torch.randn(1, 5, 6)
    expected = source["q_proj"](inputs).detach().numpy().reshape(1, 5, 2, 4)
    outputs = model.q_proj(jnp.asarray(inputs.numpy()))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("torch_shape", "flax_shape", "pattern"),
    [
        ((5, 1, 1), (5,), "a 1 1 -> a"),
        ((1, 4, 6), (4, 6), "1 a b -> a b"),
        ((2, 1, 5), (2, 5), "a 1 b -> a b"),
        ((4, 6), (1, 4, 1, 6), "a b -> 1 a 1 b"),
        ((4, 6), (1, 6, 4), None),
        ((1,), (), "1 -> "),
    ],
)
def test_axes_of_length_one(
    torch_shape: tuple[int, ...], flax_shape: tuple[int, ...], pattern: str | None
) -> None:
    assert without_ones(torch_shape, flax_shape) == pattern
    template = {"params": {"table": np.zeros(flax_shape, np.float32)}}
    source = {"table": torch.arange(prod(torch_shape)).float().reshape(torch_shape)}
    if pattern is None:
        with pytest.raises(ConversionError, match="has shape"):
            compare.match(source, template)
        return
    mapping = compare.match(source, template)
    made = compare.torch_to_linen(source, template, mapping=mapping)
    assert made["params"]["table"].shape == flax_shape
    assert made["params"]["table"].ravel().tolist() == source["table"].ravel().tolist()
    assert torch.equal(compare.linen_to_torch(made, mapping=mapping)["table"], source["table"])


def test_more_axes_than_letters_are_no_pattern() -> None:
    assert without_ones((2,) * 27, (*(2,) * 27, 1)) is None


def test_a_layout_is_a_text() -> None:
    wrong: Any = {"weight": 3}
    with pytest.raises(ValueError, match="a layout is a name or a pattern: 3"):
        compare.match(torch.nn.Linear(1, 1), {}, layouts=wrong)


def test_the_bias_of_a_layer_that_is_the_model_follows_its_weight() -> None:
    template = {"params": {"kernel": jnp.zeros((4, 3, 2, 4)), "bias": jnp.zeros((3, 2, 4))}}
    pattern = "(qkv h d) e -> e qkv h d"
    mapping = compare.match(torch.nn.Linear(4, 24), template, layouts={"weight": pattern})
    assert {row.torch_key for row in mapping.rows} == {"weight", "bias"}
