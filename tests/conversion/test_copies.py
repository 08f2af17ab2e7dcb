"""Tensors that one side keeps once and the other twice: a head tied to an embedding."""

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

import compare
from compare import ConversionError

TIED = {"head.weight": "embed.weight"}


class Torch(torch.nn.Module):
    """It has the head's weight if `is_tied`; otherwise it uses the embedding's."""

    def __init__(self, is_tied: bool, width: int = 3) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, width)
        if is_tied:
            self.head = torch.nn.Linear(width, 5, bias=False)
            self.head.weight = self.embed.weight


class Two(nnx.Module):
    def __init__(self, width: int = 3, seed: int = 0) -> None:
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(5, width, rngs=rngs)
        self.head = nnx.Linear(width, 5, use_bias=False, rngs=rngs)


class One(nnx.Module):
    def __init__(self) -> None:
        self.embed = nnx.Embed(5, 3, rngs=nnx.Rngs(0))


def arguments(error: ConversionError) -> Any:
    (text,) = re.findall(r"pass tied=({.*?})", str(error))
    return json.loads(text)


def test_one_tensor_of_torch_becomes_two_arrays(tmp_path: Path) -> None:
    source = Torch(False)
    with pytest.raises(ConversionError, match=r"if torch uses embed\.weight there") as refused:
        compare.match(source, Two())
    assert arguments(refused.value) == TIED
    mapping = compare.match(source, Two(), tied=TIED)
    model = compare.torch_to_nnx(source, Two(), mapping=mapping)
    weight = source.embed.weight.detach().numpy()
    np.testing.assert_array_equal(model.embed.embedding, weight)
    np.testing.assert_array_equal(model.head.kernel, weight.T)
    assert "transposed, copied" in str(mapping)
    assert compare.StateMapping.from_json(json.loads(json.dumps(mapping.as_json()))) == mapping

    assert {*compare.nnx_to_torch(model, mapping=mapping)} == {"embed.weight"}
    path = compare.save_checkpoint(tmp_path / "a.safetensors", source, mapping=mapping)
    compare.convert_checkpoint(path, tmp_path / "a.msgpack")
    loaded = compare.load_checkpoint(tmp_path / "a.msgpack", Two(seed=1))
    np.testing.assert_array_equal(loaded.head.kernel, weight.T)
    compare.convert_checkpoint(tmp_path / "a.msgpack", tmp_path / "a.pth")
    assert not compare.verify_checkpoint(path, tmp_path / "a.pth")
    assert not compare.verify_checkpoint(path, tmp_path / "a.msgpack", mapping=mapping)

    model.head.kernel[...] = model.head.kernel[...].at[0, 0].add(1)
    with pytest.raises(ConversionError, match="is one tensor in torch, and head/kernel has other"):
        compare.nnx_to_torch(model, mapping=mapping)
    compare.save_checkpoint(tmp_path / "edited.msgpack", model, mapping=mapping)
    with pytest.raises(compare.CheckpointError, match="is one tensor in torch, and head/kernel"):
        compare.convert_checkpoint(tmp_path / "edited.msgpack", tmp_path / "edited.pth")


def test_an_equal_copy_in_torch_is_left_out_and_comes_back(tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in Torch(True).state_dict().items()}
    assert {*state} == {"embed.weight", "head.weight"}
    with pytest.raises(ConversionError, match=r"it equals embed\.weight") as refused:
        compare.match(state, One())
    assert arguments(refused.value) == TIED
    mapping = compare.match(state, One(), tied=TIED)
    model = compare.torch_to_nnx(state, One(), mapping=mapping)
    back = compare.nnx_to_torch(model, mapping=mapping)
    assert all(torch.equal(back[key], value) for key, value in state.items())
    path = compare.save_checkpoint(tmp_path / "a.safetensors", state, mapping=mapping)
    compare.convert_checkpoint(path, tmp_path / "a.msgpack")
    assert not compare.verify_checkpoint(path, tmp_path / "a.msgpack", mapping=mapping)
    compare.convert_checkpoint(tmp_path / "a.msgpack", tmp_path / "a.pth")
    again = compare.read_checkpoint(tmp_path / "a.pth")
    assert all(torch.equal(again[key], value) for key, value in state.items())
    state["head.weight"][0, 0] += 1
    with pytest.raises(ConversionError, match=r"is tied to embed\.weight in Flax, and has other"):
        compare.torch_to_nnx(state, One(), mapping=mapping)


def test_a_module_that_ties_them_needs_no_rule_where_flax_has_both() -> None:
    mapping = compare.match(Torch(True), Two())
    assert [row.twin for row in mapping.rows] == [False, False]
    with pytest.raises(ConversionError, match="is no copy: both sides have it"):
        compare.match(Torch(True), Two(), tied=TIED)


def test_a_square_copy_is_asked_about() -> None:
    with pytest.raises(ConversionError) as refused:
        compare.match(Torch(False, 5), Two(5), tied=TIED)
    (text,) = re.findall(r"pass layouts=({.*?})", str(refused.value))
    assert "neither side" not in str(refused.value)
    mapping = compare.match(Torch(False, 5), Two(5), tied=TIED, layouts=json.loads(text))
    assert mapping.rows[1].layout == "transposed" and mapping.rows[1].twin


@pytest.mark.parametrize(
    ("tied", "message"),
    [
        ({"head.weight": "wte.weight"}, "is tied to wte.weight, which torch does not have"),
        ({"lm_head.weight": "embed.weight"}, "is a copy that neither side has"),
        ({"embed.weight": "embed.weight"}, "is tied to embed.weight, which is no tensor"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(tied: dict[str, str], message: str) -> None:
    with pytest.raises(ConversionError, match=re.escape(message)) as refused:
        compare.match(Torch(False), One(), tied=tied)
    assert not refused.value.mismatch.unexpected


def test_a_copy_of_another_shape_is_refused() -> None:
    state = {"embed.weight": torch.ones(5, 3), "head.weight": torch.ones(3, 5)}
    with pytest.raises(ConversionError, match=r"is tied to embed.weight, but is \(3, 5\), not"):
        compare.match(state, One(), tied=TIED)


def test_a_copy_without_its_original_is_no_mapping() -> None:
    row = {"torch_key": "a", "path": ["params", "a"], "twin": True}
    with pytest.raises(ValueError, match="params/a is a copy of a, which has no row of its own"):
        compare.StateMapping.from_json({"flax": "linen", "rows": [row], "left": []})


def test_linen_variables() -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            hidden = nn.Embed(5, 3, name="embed")(tokens)
            outputs: jax.Array = nn.Dense(5, use_bias=False, name="head")(hidden)
            return outputs

    source, tokens = Torch(False), jnp.arange(5)
    variables = Model().init(jax.random.key(0), tokens)
    mapping = compare.match(source, variables, tied=TIED)
    made = compare.torch_to_linen(source, variables, mapping=mapping)
    weight = source.embed.weight.detach()
    expected = weight @ weight.T
    outputs: Any = Model().apply(made, tokens)
    np.testing.assert_allclose(outputs, expected.numpy(), rtol=1e-5, atol=1e-6)


def variables(**modules: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "params": {
            name: {leaf: np.zeros(shape, np.float32) for leaf, shape in leaves.items()}
            for name, leaves in modules.items()
        }
    }


@pytest.mark.parametrize(
    ("state", "template", "rules", "message"),
    [
        (
            {"emb.weight": (5, 3)},
            variables(head={"kernel": (3, 5)}),
            {"tied": {"head.weight": "emb.weight"}},
            "is tied to emb.weight, which is no tensor that pairs",
        ),
        (
            {"layers.0.weight": (5, 3)},
            variables(layers={"kernel": (2, 3, 5)}),
            {"stack": {"layers.*": "layers"}, "tied": {"layers.1.weight": "layers.0.weight"}},
            "one of them is stacked",
        ),
        (
            {"a.weight": (5, 3)},
            variables(a={"kernel": (3, 5)}),
            {"tied": {"b.weight": "c.weight", "c.weight": "a.weight"}},
            "b.weight: is tied to c.weight, which torch does not have",
        ),
    ],
)
def test_a_copy_that_cannot_be_said_is_refused(
    state: Any, template: Any, rules: Any, message: str
) -> None:
    source = {key: torch.ones(shape) for key, shape in state.items()}
    with pytest.raises(ConversionError, match=re.escape(message)):
        compare.match(source, template, **rules)


@pytest.mark.parametrize("tied", ["l.0.weight", "l.1.weight"])
def test_a_copy_of_a_slice_is_refused(tied: str) -> None:
    source = {key: torch.ones(8, 4) for key in ("l.0.weight", "l.1.weight", "h.weight")}
    template = variables(l={"kernel": (2, 4, 8)})
    with pytest.raises(ConversionError, match="one of them is stacked"):
        compare.match(source, template, stack={"l.*": "l"}, tied={"h.weight": tied})


def both_files(mapping: Any, made: Any, state: Any, folder: Path) -> None:
    back = compare.linen_to_torch(made, mapping=mapping)
    assert back.keys() == state.keys()
    path = compare.save_checkpoint(folder / "x.msgpack", made, mapping=mapping)
    compare.convert_checkpoint(path, folder / "y.pth", mapping=mapping)
    stored = compare.read_checkpoint(folder / "y.pth")
    for values in (back, stored):
        assert all(torch.equal(values[key], state[key]) for key in state)


def test_a_copy_of_a_tensor_in_parts_and_parts_of_a_copy(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(8, 4)}
    modules: Any = {"q": {"kernel": (4, 4)}, "k": {"kernel": (4, 4)}, "h": {"kernel": (4, 8)}}
    template = variables(**modules)
    weight = state["a.weight"].numpy()
    for rules in (
        {"split": {"a": ["q", "k"]}, "tied": {"h.weight": "a.weight"}},
        {"split": {"b": ["q", "k"]}, "tied": {"b.weight": "a.weight"}, "rename": {"a": "h"}},
    ):
        layouts = {"*.weight": "transposed"}
        mapping = compare.match(state, template, layouts=layouts, **rules)  # type: ignore[arg-type]
        made = compare.torch_to_linen(state, template, mapping=mapping)
        for name, expected in (("q", weight[:4].T), ("k", weight[4:].T), ("h", weight.T)):
            np.testing.assert_array_equal(made["params"][name]["kernel"], expected)
        both_files(mapping, made, state, tmp_path)
        made["params"]["k"]["kernel"] = made["params"]["k"]["kernel"] + 1
        with pytest.raises(ConversionError, match="is one tensor in torch"):
            compare.linen_to_torch(made, mapping=mapping)
        compare.save_checkpoint(tmp_path / "x.msgpack", made, mapping=mapping)
        with pytest.raises(compare.CheckpointError, match="is one tensor in torch"):
            compare.convert_checkpoint(tmp_path / "x.msgpack", tmp_path / "z.pth")


def test_attention_may_be_a_copy() -> None:
    def flax() -> nnx.MultiHeadAttention:
        return nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))

    attention = torch.nn.MultiheadAttention(4, 2)
    source = torch.nn.ModuleDict({"a": attention})
    model = nnx.Dict(a=flax(), b=flax())
    tied = {f"b.{key}": f"a.{key}" for key in attention.state_dict()}
    mapping = compare.match(source, model, tied=tied)
    made = compare.torch_to_nnx(source, model, mapping=mapping)
    np.testing.assert_array_equal(made["a"].key.kernel, made["b"].key.kernel)
    back = compare.nnx_to_torch(made, mapping=mapping)
    assert all(torch.equal(back[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize(
    ("shape", "message"), [(None, "missing"), ((4, 7, 1), "h/kernel: the layout transposed")]
)
def test_a_file_without_the_copy_or_with_another_is_refused(
    shape: tuple[int, ...] | None, message: str, tmp_path: Path
) -> None:
    template = variables(e={"embedding": (7, 4)}, h={"kernel": (4, 7)})
    mapping = compare.match({"e.weight": torch.ones(7, 4)}, template, tied={"h.weight": "e.weight"})
    other = variables(e={"embedding": (7, 4)}, **({"h": {"kernel": shape}} if shape else {}))
    compare.save_checkpoint(tmp_path / "x.msgpack", other)
    with pytest.raises(compare.CheckpointError, match=message):
        compare.convert_checkpoint(tmp_path / "x.msgpack", tmp_path / "y.pth", mapping=mapping)
