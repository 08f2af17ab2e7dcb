"""Small rules of the converter, each where it makes a difference."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx, struct

import compare
from compare import ConversionError
from compare.conversion.apply_mapping import same_bits
from compare.conversion.layouts import layout, to_flax, to_torch
from compare.conversion.state_kinds import flax_side, same_memory, torch_kinds
from compare.conversion.tensors import numpy_to_tensor
from compare.conversion.unmatched import objection
from compare.conversion.wrappers import common_prefix


def test_tensors_without_memory_are_not_tied() -> None:
    assert same_memory(torch.empty(2, device="meta")) is None
    assert same_memory(torch.empty(0)) is None
    with torch.device("meta"):
        twins = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    assert "alias" not in torch_kinds(twins).values()


def test_the_dicts_of_a_module_are_not_its_attributes() -> None:
    module: Any = torch.nn.Linear(2, 2)
    module.kept = {"mask": torch.ones(2)}
    kinds = {"weight": "parameter", "bias": "parameter", "kept['mask']": "left behind"}
    assert torch_kinds(module) == kinds


def test_a_cache_is_no_state() -> None:
    one = np.ones(1, np.float32)
    side = flax_side({"params": {"a": one}, "cache": {"b": one}, "intermediates": {"c": one}})
    assert [*side.leaves] == [("params", "a")]


def test_values_that_are_no_tensors_are_not_the_same() -> None:
    assert not same_bits(np.ones(2), torch.ones(2))
    assert not same_bits(torch.ones(2), torch.ones(2, dtype=torch.float64))


def test_a_row_of_numbers_is_no_mask() -> None:
    assert objection("verify", np.ones(3)) == (
        "has shape (3,); a causal mask is square, and no known table has its values"
    )


@pytest.mark.parametrize(
    ("longer", "shorter", "prefix"),
    [
        (["a._orig_mod.x"], ["b.x"], ""),
        (["a._orig_mod.x"], ["a.x"], "_orig_mod."),
        ([], ["b.x"], ""),
        (["b.x"], [], ""),
    ],
)
def test_the_steps_of_wrappers_are_a_prefix_only_where_they_help(
    longer: list[str], shorter: list[str], prefix: str
) -> None:
    assert common_prefix(longer, shorter) == prefix


def test_the_window_of_float8_is_mirrored_too() -> None:
    window = torch.arange(3.0).reshape(1, 1, 3).to(torch.float8_e4m3fn)
    chosen = layout("conv_transpose", (3, 1, 1))
    assert to_flax(chosen, window).float().ravel().tolist() == [2, 1, 0]
    assert torch.equal(to_torch(chosen, to_flax(chosen, window)).float(), window.float())


def test_two_biases_of_different_dtypes_have_no_sum() -> None:
    cell = torch.nn.LSTMCell(2, 2)
    state = cell.state_dict()
    target = nnx.OptimizedLSTMCell(2, 2, rngs=nnx.Rngs(0))
    mapping = compare.match(state, target)
    state["bias_hh"] = state["bias_hh"].to(torch.float16)
    with pytest.raises(ConversionError, match=r"bias_ih: is torch.float32, but bias_hh, which is"):
        compare.torch_to_nnx(state, target, mapping=mapping)


def test_the_parts_of_a_view_are_named_by_their_tensor() -> None:
    source = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(4, 2)})
    model = nnx.Dict(attn=nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0)))
    mapping = compare.match(source, model)
    with pytest.raises(ConversionError, match=r"! attn\.in_proj_weight: several arrays make one"):
        compare.nnx_to_torch(model, mapping=mapping, copy=False)


def test_a_parametrized_buffer_stays_a_buffer() -> None:
    class Half(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values / 2

    module = torch.nn.Module()
    module.register_buffer("table", torch.ones(2))
    torch.nn.utils.parametrize.register_parametrization(module, "table", Half())
    folded: Any = compare.fold(module)
    assert dict(folded.named_buffers()).keys() == {"table"}
    assert folded.table.tolist() == [0.5, 0.5]


def test_a_norm_over_other_axes_is_told_both() -> None:
    source = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm((3, 4))})
    norm = nnx.LayerNorm(4, epsilon=1e-5, rngs=nnx.Rngs(0))
    norm.scale, norm.bias = (nnx.Param(jnp.ones((3, 4))) for _ in range(2))
    text = (
        "computes something else: normalized_shape=(3, 4) in torch, reduction_axes=-1 in Flax: "
        "give reduction_axes=(-2, -1) and feature_axes=(-2, -1) in Flax"
    )
    with pytest.raises(ConversionError, match=re.escape(text)):
        compare.match(source, nnx.Dict(norm=norm))


def test_a_stride_is_told_with_its_mend() -> None:
    source = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(1, 1, 3, stride=2)})
    model = nnx.Dict(conv=nnx.Conv(1, 1, (3, 3), padding="VALID", rngs=nnx.Rngs(0)))
    with pytest.raises(ConversionError, match=r"give strides=\(2, 2\) in Flax; compare\.match"):
        compare.match(source, model)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (5, 1, 2)])
def test_the_same_padding_of_a_transposed_convolution(
    kernel: int, stride: int, padding: int
) -> None:
    layer = torch.nn.ConvTranspose1d(1, 1, kernel, stride=stride, padding=padding)
    source = torch.nn.ModuleDict({"up": layer})
    model = nnx.Dict(
        up=nnx.ConvTranspose(1, 1, (kernel,), (stride,), padding="SAME", rngs=nnx.Rngs(0))
    )
    mapping = compare.match(source, model)
    compare.torch_to_nnx(source, model, mapping=mapping)
    inputs = torch.randn(1, 1, 6)
    expected = layer(inputs).detach().numpy()[0, 0]
    outputs = model["up"](jnp.asarray(inputs.numpy().swapaxes(1, 2)))
    np.testing.assert_allclose(np.asarray(outputs)[0, :, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_mask_of_one_number_is_made_again() -> None:
    refill = {"shape": [1], "dtype": "float32", "pattern": "full", "value": "-inf"}
    left = [["m", "verify", None, refill]]
    mapping = compare.StateMapping.from_json({"flax": "linen", "rows": [], "left": left})
    assert mapping.refills["m"].shape == (1,)


def test_a_mirrored_window_becomes_a_tensor() -> None:
    assert numpy_to_tensor(np.arange(3.0)[::-1]).tolist() == [2, 1, 0]
    assert numpy_to_tensor(np.ones((1, 2))[::-1]).tolist() == [[1, 1]]


def test_memory_of_arrays_is_shared_or_the_reason_is_named() -> None:
    template = {"params": {"fc": {"bias": jnp.zeros(3)}}}
    read_only = np.ones(3, np.float32)
    read_only.flags.writeable = False
    for array, reason in (
        (np.ones(3, np.float32)[::-1], "has negative strides"),
        (np.ones(3, ">f4"), "has a foreign byte order"),
        (read_only, "is read-only"),
    ):
        state: Any = {"fc.bias": array}
        with pytest.raises(ConversionError, match=f"{reason}, so memory cannot be shared; use cop"):
            compare.torch_to_linen(state, template, copy=False)
        assert compare.torch_to_linen(state, template)["params"]["fc"]["bias"].tolist() == [1] * 3
    shared: Any = torch.ones(16).numpy()  # which torch aligns, as XLA requires
    variables = compare.torch_to_linen(
        {"fc.bias": shared}, {"params": {"fc": {"bias": jnp.zeros(16)}}}, copy=False
    )
    shared[0] = 5.0
    assert variables["params"]["fc"]["bias"][0] == 5.0
    ones = jnp.ones(16)
    again = compare.torch_to_linen({"fc.bias": ones}, variables, copy=False)
    pointers = {one.unsafe_buffer_pointer() for one in (ones, again["params"]["fc"]["bias"])}
    assert len(pointers) == 1


def test_random_keys_are_ignored_but_not_verified() -> None:
    module = torch.nn.ModuleDict({"fc": torch.nn.Linear(3, 2)})
    variables: dict[str, Any] = {
        "params": {"fc": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}},
        "buffers": {"key": jax.random.key(0), "positions": jnp.arange(8, dtype=jnp.int4)},
    }
    policy: dict[str, Any] = {"buffers/key": "ignore", "buffers/positions": "verify"}
    mapping = compare.match(module, variables, policy=policy)
    assert compare.linen_to_torch(variables, mapping=mapping).keys() == module.state_dict().keys()
    assert compare.torch_to_linen(module, variables, mapping=mapping)["buffers"].keys() == {
        *variables["buffers"]
    }
    mapping = compare.match(module, variables, policy={"buffers/*": "verify"})
    for call in (
        lambda: compare.linen_to_torch(variables, mapping=mapping),
        lambda: compare.torch_to_linen(module, variables, mapping=mapping),
    ):
        with pytest.raises(ConversionError, match="buffers/key: dtype key<fry> has no torch"):
            call()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"rename": ["a"]}, r"rename is \['a'\]; expected a dict, as rename=\{\"h"),
        ({"rename": {"a": 1}}, "rename has 'a': 1; expected two names"),
        ({"rename": {1: "a"}}, "rename has 1: 'a'; expected two names"),
        ({"tied": {"a.weight": None}}, "tied has 'a.weight': None"),
        ({"stack": [("a", "b")]}, "stack is .* expected a dict"),
        ({"split": {3: ["a"]}}, "split has 3; expected a name"),
        ({"layouts": "same"}, "layouts is 'same'; expected a dict"),
        ({"policy": ["a"]}, "policy is .* expected a dict"),
        ({"prefix": None}, "prefix is None; expected text"),
    ],
)
def test_rules_of_another_type(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        compare.match({"a.weight": torch.zeros(3, 2)}, {"params": {}}, **rules)


@struct.dataclass
class Table:
    w: Any
    size: int = struct.field(pytree_node=False, default=3)


def test_static_fields_of_a_dataclass_are_no_leaves() -> None:
    source = {"t.w": torch.ones(2)}
    template = {"params": {"t": Table(jnp.zeros(2))}}
    variables = compare.torch_to_linen(source, template)
    assert variables["params"]["t"].size == 3
    assert variables["params"]["t"].w.tolist() == [1.0, 1.0]


def test_a_counter_at_0_is_a_table_of_zeros() -> None:
    source = {"w": torch.ones(2), "step": torch.tensor(0)}
    template = {"params": {"w": jnp.zeros(2)}}
    mapping = compare.match(source, template, policy={"step": "verify"})
    variables = compare.torch_to_linen(source, template, mapping=mapping)
    assert compare.linen_to_torch(variables, mapping=mapping)["step"].item() == 0


@dataclasses.dataclass
class Unknown:
    w: Any
    size: int = 3


def test_a_number_in_a_dataclass_that_jax_does_not_know_is_no_array() -> None:
    with pytest.raises(TypeError, match="t/size is an int; expected an array"):
        compare.match({"t.w": torch.ones(2)}, {"params": {"t": Unknown(jnp.zeros(2))}})
