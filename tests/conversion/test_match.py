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
from compare.conversion.mapping import LINEN, NNX, Left, Row, StateMapping
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


def test_a_square_kernel_is_transposed_whatever_its_shape() -> None:
    square = {"params": {"kernel": (4, 4)}}
    (row,) = compare.match({"weight": torch.eye(4)}, shapes(square)).rows
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
        ConversionError, match=r"weight has shape \(3, 5\); params/kernel needs \(5, 3\)"
    ):
        compare.match({"weight": torch.zeros(3, 5)}, shapes({"params": {"kernel": (3, 5)}}))
    with pytest.raises(ConversionError, match="torch does not say how this kernel is laid out"):
        compare.match({"weight": torch.zeros(3)}, shapes({"params": {"kernel": (3,)}}))


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
            4, 4, (2,), transpose_kernel=flipped, use_bias=False, rngs=nnx.Rngs(0)
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
    assert table.left == (Left("h.0.attn.bias", "verify"), Left("h.0.attn.masked_bias", "verify"))
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
    ],
)
def test_files_that_are_no_table(change: Any, message: str, tmp_path: Path) -> None:
    content = json.loads(json.dumps(NNX.as_json()))
    change(content)
    (tmp_path / "map.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        StateMapping.load(tmp_path / "map.json")
    assert str(tmp_path / "map.json") in str(caught.value)
