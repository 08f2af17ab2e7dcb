"""`match` pairs names: what it finds, what it refuses, and that one error lists everything."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import compare
from compare.conversion.errors import ConversionError
from compare.conversion.mapping import LINEN, NNX, Row, StateMapping
from compare.proof.cases import PRIME_BIAS
from compare.runners.run import build_nnx, linen_template

from ..support import torch_module


def shapes(tree: Any) -> Any:
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: type(x) is tuple,
    )


TWO = {
    "params": {
        "Dense_0": {"kernel": (3, 5), "bias": (5,)},
        "Dense_1": {"kernel": (5, 5), "bias": (5,)},
    }
}


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(3, 5)
        self.fc2 = torch.nn.Linear(5, 5)


def test_the_attention_is_found_as_the_table_has_it() -> None:
    config = replace(PRIME_BIAS, num_heads=1)
    linen = compare.match(torch_module(config), linen_template(config, buffer=True))
    assert [row[:4] for row in map(_cells, linen.rows)] == [
        row[:4] for row in map(_cells, LINEN.rows)
    ]
    model = compare.match(torch_module(config).state_dict(), build_nnx(config, buffer=True))
    assert [row[:4] for row in map(_cells, model.rows)] == [
        row[:4] for row in map(_cells, NNX.rows)
    ]
    assert str(linen).splitlines()[1].split() == ["mask", "buffers/mask", "buffer", "same"]


def _cells(row: Row) -> tuple[Any, ...]:
    return row.torch_key, row.path, row.layout, row.kind


def test_a_square_kernel_of_a_layer_is_transposed_whatever_its_shape() -> None:
    square = {"params": {"kernel": (4, 4)}}
    (row,) = compare.match(torch.nn.Linear(4, 4, bias=False), shapes(square)).rows
    assert row.layout == "transposed"


def test_other_names_are_said_and_nothing_is_guessed() -> None:
    with pytest.raises(ConversionError) as caught:
        compare.match(Block(), shapes(TWO))
    assert len(caught.value.mismatch.missing) == len(caught.value.mismatch.unexpected) == 4
    assert (
        "+ unexpected fc1.weight (5, 3): the target has no place for it; "
        "did you mean Dense_0.weight?"
    ) in str(caught.value)
    assert "rename=" in str(caught.value)
    table = compare.match(Block(), shapes(TWO), rename={"fc1": "Dense_0", "fc2": "Dense_1"})
    assert {row.torch_key: row.place for row in table.rows}["fc2.weight"] == "params/Dense_1/kernel"
    nested = torch.nn.ModuleDict({"h": torch.nn.ModuleList([Block(), Block()])})
    deep = {"params": {f"layer_{i}": TWO["params"] for i in range(2)}}
    table = compare.match(
        nested, shapes(deep), rename={"h.*.fc1": "layer_*.Dense_0", "h.*.fc2": "layer_*.Dense_1"}
    )
    assert {row.place for row in table.rows if row.torch_key == "h.1.fc2.bias"} == {
        "params/layer_1/Dense_1/bias"
    }


def test_rules_that_nothing_uses_are_named() -> None:
    with pytest.raises(ConversionError) as caught:
        compare.match(
            torch.nn.Linear(3, 5),
            shapes({"params": {"kernel": (3, 5), "bias": (5,)}}),
            rename={"wieght": "kernel"},
            layouts={"wight": "transposed"},
            policy={"attn.bias": "ignore"},
        )
    for part in (
        "wieght: this rename rule fits no key; did you mean weight?",
        "wight: this layout fits no key; did you mean weight?",
        "attn.bias: this policy fits nothing that is left",
    ):
        assert part in str(caught.value)


def test_what_could_be_two_things_is_ambiguous() -> None:
    both = shapes({"params": {"n": {"kernel": (3, 3), "scale": (3,)}}})
    with pytest.raises(
        ConversionError,
        match=r"n.weight: ambiguous: it could be params/n/kernel and params/n/scale",
    ):
        compare.match({"n.weight": torch.zeros(3)}, both)


def test_trained_on_one_side_only_is_refused() -> None:
    module = torch.nn.Module()
    module.register_buffer("mask", torch.ones(3, 3))
    with pytest.raises(ConversionError, match="mask: is a buffer in torch and a parameter in Flax"):
        compare.match(module, shapes({"params": {"mask": (3, 3)}}))


def test_shapes_verify() -> None:
    with pytest.raises(
        ConversionError, match=r"weight has shape \(3, 4\); params/kernel needs \(5, 3\)"
    ):
        compare.match({"weight": torch.zeros(3, 4)}, shapes({"params": {"kernel": (3, 5)}}))
    mapping = compare.match({"weight": torch.zeros(3)}, shapes({"params": {"kernel": (3,)}}))
    assert [row.layout for row in mapping.rows] == ["same"]


def test_a_transposed_convolution_is_not_guessed() -> None:
    kernel = shapes({"params": {"kernel": (2, 4, 4)}})
    module = torch.nn.ConvTranspose1d(4, 4, 2, bias=False)
    with pytest.raises(
        ConversionError,
        match=r'do not say .*layouts=\{"weight": "conv"\} if True, "conv_transpose"',
    ):
        compare.match(module, kernel)
    assert compare.match(module, kernel, layouts={"weight": "conv"}).rows[0].layout == "conv"
    for flipped, layout in ((True, "conv"), (False, "conv_transpose")):
        model = nnx.ConvTranspose(
            4,
            4,
            (2,),
            padding="VALID",
            transpose_kernel=flipped,
            use_bias=False,
            rngs=nnx.Rngs(0),
        )
        assert compare.match(module, model).rows[0].layout == layout
    with pytest.raises(ValueError, match=r"needs numbers, as in flatten:C,H,W"):
        compare.match(module, kernel, layouts={"weight": "flatten:a"})


LEGACY = {
    "h.0.attn.bias": torch.tril(torch.ones(4, 4, dtype=torch.uint8)).view(1, 1, 4, 4),
    "h.0.attn.masked_bias": torch.tensor(-1e4),
    "h.0.w": torch.ones(2),
}


def test_gpt2s_legacy_mask_is_dropped_only_while_it_is_the_causal_one() -> None:
    template = shapes({"params": {"h": {"0": {"w": (2,)}}}})
    table = compare.match(LEGACY, template)
    assert [(item.torch_key, item.policy) for item in table.left] == [
        ("h.0.attn.bias", "verify"),
        ("h.0.attn.masked_bias", "verify"),
    ]
    compare.torch_to_linen(LEGACY, template)
    edited = {**LEGACY, "h.0.attn.bias": LEGACY["h.0.attn.bias"].clone()}
    edited["h.0.attn.bias"][0, 0, 3, 0] = 0
    with pytest.raises(
        ConversionError,
        match=r"attn.bias: was edited: 1 of its 16 entries differ from the causal mask",
    ):
        compare.torch_to_linen(edited, template)
    with pytest.raises(
        ConversionError, match=r"masked_bias: is 3, which is not a fill value of causal masks"
    ):
        compare.torch_to_linen({**LEGACY, "h.0.attn.masked_bias": torch.tensor(3.0)}, template)
    dropped = compare.match(edited, template, policy={"*.attn.bias": "ignore"})
    assert "params" in compare.torch_to_linen(edited, template, mapping=dropped)
    with pytest.raises(ConversionError, match=r"unexpected h.0.attn.bias"):
        compare.match(LEGACY, template, policy={"*.attn.bias": "refuse"})
    with pytest.raises(ValueError, match="there is no 'drop'; there are ignore, verify and refuse"):
        compare.match(LEGACY, template, policy={"*.attn.bias": "drop"})  # type: ignore[dict-item]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.float32])
@pytest.mark.parametrize("flip", [False, True])
def test_a_legacy_mask_comes_back(dtype: torch.dtype, flip: bool, tmp_path: Path) -> None:
    """The mapping knows how to make again what it left out, in memory and through files."""
    mask = torch.tril(torch.ones(1, 1, 4, 4))
    mask = 1e-4 * (1 - mask) if flip and dtype.is_floating_point else 1 - mask if flip else mask
    state = {**LEGACY, "h.0.attn.bias": mask.to(dtype)}
    template = shapes({"params": {"h": {"0": {"w": (2,)}}}})
    table = compare.match(state, template)
    variables = compare.torch_to_linen(state, template, mapping=table)
    table.save(tmp_path / "map.json")
    for mapping in (table, StateMapping.load(tmp_path / "map.json")):
        _require_same(compare.linen_to_torch(variables, mapping=mapping), state)
    source = compare.save_checkpoint(tmp_path / "a.pth", state)
    like = compare.save_checkpoint(tmp_path / "like.msgpack", variables)
    compare.convert_checkpoint(source, tmp_path / "b.msgpack", like=like)
    compare.convert_checkpoint(tmp_path / "b.msgpack", tmp_path / "c.safetensors", layout="torch")
    _require_same(compare.read_checkpoint(tmp_path / "c.safetensors"), state)
    assert compare.verify_checkpoint(source, tmp_path / "c.safetensors") == []


def _require_same(state: Any, expected: Any) -> None:
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor), key


def test_a_mask_that_no_constant_makes_does_not_come_back() -> None:
    mask = torch.tril(torch.rand(4, 4) + 1)
    template = shapes({"params": {"h": {"0": {"w": (2,)}}}})
    table = compare.match({**LEGACY, "h.0.attn.bias": mask}, template)
    variables = {"params": {"h": {"0": {"w": jnp.ones(2)}}}}
    back = compare.linen_to_torch(variables, mapping=table)
    assert "h.0.attn.bias" not in back and "h.0.attn.masked_bias" in back


def test_a_mask_that_torch_lacks_is_kept_only_on_demand() -> None:
    module, model = torch_module(buffer=False), build_nnx(PRIME_BIAS, buffer=True)
    with pytest.raises(ConversionError, match="missing mask"):
        compare.match(module, model)
    table = compare.match(module, model, policy={"mask": "verify"})
    compare.torch_to_nnx(module, model, mapping=table)
    assert float(model.mask[...].sum()) == 21.0
    model.mask[...] = model.mask[...].at[2, 0].set(1.0)
    with pytest.raises(ConversionError, match="mask: was edited: 1 of its 49 entries"):
        compare.torch_to_nnx(module, model, mapping=table)


def test_a_tied_weight_has_one_place_and_both_names() -> None:
    embed, head = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4, bias=False)
    head.weight = embed.weight
    module = torch.nn.ModuleDict({"embed": embed, "head": head})
    template = shapes({"params": {"embed": {"embedding": (4, 3)}}})
    table = compare.match(module, template)
    assert [row.kind for row in table.rows] == ["parameter", "alias"]
    variables = compare.torch_to_linen(module, template, mapping=table)
    state = compare.linen_to_torch(variables, mapping=table)
    assert torch.equal(state["head.weight"], state["embed.weight"])
    apart = {**state, "head.weight": state["head.weight"] + 1}
    with pytest.raises(
        ConversionError, match=r"head.weight: is tied to embed.weight in Flax, and has other values"
    ):
        compare.torch_to_linen(apart, template, mapping=table)


CONTAINERS: dict[str, Any] = {
    "ModuleDict": lambda: torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4)}),
    "Module": lambda: _with_child(torch.nn.Module()),
    "a class of one's own": lambda: _with_child(type("Own", (torch.nn.Module,), {})()),
}


def _with_child(module: torch.nn.Module) -> torch.nn.Module:
    module.a = torch.nn.Linear(3, 4)
    return module


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_may_have_state_of_its_own(name: str) -> None:
    source = CONTAINERS[name]()
    source.register_buffer("mask", torch.arange(2.0))
    source.register_parameter("scale", torch.nn.Parameter(torch.arange(3.0)))

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.a = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
            self.mask = nnx.Variable(jnp.zeros(2))
            self.scale = nnx.Param(jnp.zeros(3))

    table = compare.match(source, Model())
    model = compare.torch_to_nnx(source, Model(), mapping=table)
    assert model.mask[...].tolist() == [0, 1] and model.scale[...].tolist() == [0, 1, 2]
    source.load_state_dict(compare.nnx_to_torch(model, mapping=table))


def test_parameters_in_a_list_or_dict_pair_by_their_names() -> None:
    tensors = [torch.nn.Parameter(torch.arange(2.0)), torch.nn.Parameter(torch.arange(3.0))]
    names = {"0": tensors[0], "1": tensors[1]}
    template = shapes({"params": {"p": {"0": (2,), "1": (3,)}}})
    for container in (torch.nn.ParameterList(tensors), torch.nn.ParameterDict(names)):
        variables = compare.torch_to_linen(torch.nn.ModuleDict({"p": container}), template)
        assert variables["params"]["p"]["1"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", [torch.nn.LazyLinear, torch.nn.LazyConv1d])
def test_a_lazy_layer_is_refused_by_name(kind: Any) -> None:
    layer = torch.nn.LazyLinear(4) if kind is torch.nn.LazyLinear else torch.nn.LazyConv1d(4, 2)
    source = torch.nn.ModuleDict({"a": layer, "b": torch.nn.Linear(3, 4)})
    kernel = (3, 4) if kind is torch.nn.LazyLinear else (2, 3, 4)
    names = {"a": {"kernel": kernel, "bias": (4,)}, "b": {"kernel": (3, 4), "bias": (4,)}}
    template = shapes({"params": names})
    called = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4), "b": torch.nn.Linear(3, 4)})
    message = r"a\.weight: a lazy layer has no values yet: call the module once first"
    with pytest.raises(ConversionError, match=message) as caught:
        compare.match(source, template)
    assert not caught.value.mismatch.missing
    with pytest.raises(ConversionError, match=message):
        compare.torch_to_linen(source, template)
    if kind is torch.nn.LazyLinear:
        table = compare.match(called, template)
        with pytest.raises(ConversionError, match=message):
            compare.torch_to_linen(source, template, mapping=table)


def test_a_key_that_is_no_name_is_refused() -> None:
    template = shapes({"params": {"3": (2,)}})
    message = "3: the key is an int; a state dict has names: write '3'"
    state: Any = {3: torch.zeros(2)}
    for work in (compare.match, compare.torch_to_linen):
        with pytest.raises(ConversionError, match=message):
            work(state, template)
    assert compare.torch_to_linen({"3": torch.zeros(2)}, template)["params"]["3"].shape == (2,)


def test_a_layout_that_has_no_effect_is_refused() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.c = nnx.LSTMCell(3, 3, rngs=nnx.Rngs(0))
            self.a = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))

    layers = {"c": torch.nn.LSTMCell(3, 3), "a": torch.nn.MultiheadAttention(4, 2)}
    source = torch.nn.ModuleDict(layers)
    for key in ("c.weight_ih", "a.in_proj_weight", "a.out_proj.weight", "a.*"):
        with pytest.raises(ConversionError, match="this layout is not used"):
            compare.match(source, Model(), layouts={key: "same"})
        with pytest.raises(ValueError, match="there is no layout 'no such layout'"):
            compare.match(source, Model(), layouts={key: "no such layout"})


def test_integer_steps_of_an_nnx_list() -> None:
    model = nnx.Sequential(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 2, rngs=nnx.Rngs(0)))
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    table = compare.match(module, model, rename={"*": "layers.*"})
    assert ("layers", 1, "kernel") in table.by_path
    compare.torch_to_nnx(module, model, mapping=table)
    last, linear = model.layers[1], module[1]
    assert isinstance(last, nnx.Linear) and isinstance(linear, torch.nn.Linear)
    assert np.array_equal(last.kernel[...], linear.weight.detach().numpy().T)


def test_a_table_is_saved_and_read(tmp_path: Path) -> None:
    cell = torch.nn.LSTMCell(2, 3)
    table = compare.match(cell, nnx.LSTMCell(2, 3, rngs=nnx.Rngs(0)))
    table.save(tmp_path / "map.json")
    assert StateMapping.load(tmp_path / "map.json") == table
    assert "weight_ih[1/4]" in str(table) and "bias_ih[0/4] + bias_hh[0/4]" in str(table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("rows"), "not a valid mapping: expected an object"),
        (lambda content: content.update(flax="haiku"), "flax: 'haiku'"),
        (
            lambda content: content["rows"][0].update(layout="rotated"),
            "there is no layout 'rotated'",
        ),
        (lambda content: content["rows"][0].update(path=[]), r"has the path \[\]"),
        (lambda content: content["rows"][0].update(kind="gradient"), "kind 'gradient'"),
        (lambda content: content["rows"].append(content["rows"][0]), "mask twice"),
        (lambda content: content["rows"][1].update(part=[3, 2]), r"has the part \[3, 2\]"),
        (
            lambda content: content["rows"][1].update(part=[1, 2]),
            "the parts of W_query.weight must each occur exactly once",
        ),
        (
            lambda content: content["rows"][0].update(kind="alias"),
            "is an alias of mask, which has no row of its own",
        ),
        (lambda content: content["rows"][0].update(torch_key=3), "has the torch keys 3"),
        (lambda content: content["rows"][0].update(size=3), "unexpected keyword argument 'size'"),
        (lambda content: content["left"].append(["a", "drop", None]), "with the policy 'drop'"),
        (
            lambda content: content["left"].append(["a", "verify", None, {"shape": 3}]),
            "not a valid mapping: TypeError",
        ),
        (
            lambda content: content["left"].append(
                [
                    "a",
                    "verify",
                    None,
                    {"shape": [3], "dtype": "bool", "pattern": "tril", "value": "1"},
                ]
            ),
            r"a mask is bool \[3\], tril of 1",
        ),
        (
            lambda content: content["left"].append(
                ["m", "verify", None, dict(shape=[0, 3], dtype="bool", pattern="tril", value="1")]
            ),
            r"a mask is bool \[0, 3\], tril of 1",
        ),
    ],
)
def test_files_that_are_no_table(change: Any, message: str, tmp_path: Path) -> None:
    content = json.loads(json.dumps(NNX.as_json()))
    change(content)
    (tmp_path / "map.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        StateMapping.load(tmp_path / "map.json")
    assert str(tmp_path / "map.json") in str(caught.value)
    assert "ValueError" not in str(caught.value)


def test_a_mapping_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    layer = torch.nn.Linear(3, 2, bias=False)
    mapping = compare.match(layer, {"params": {"kernel": jnp.zeros((3, 2))}})
    with pytest.raises(compare.MappingError, match="is a folder: name a file in it"):
        mapping.save(tmp_path / "mine")
    (tmp_path / "loop.json").symlink_to("loop.json")
    with pytest.raises(compare.MappingError, match="is a link that leads to itself"):
        mapping.save(tmp_path / "loop.json")
    with pytest.raises(compare.MappingError, match="cannot be written: embedded null byte"):
        mapping.save("mine\0")
    assert (tmp_path / "mine" / "precious").read_text() == "x"


def test_inputs_without_a_module_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs has no effect without module"):
        compare.match(torch.nn.Linear(3, 2), {"params": {}}, inputs=(1,))
