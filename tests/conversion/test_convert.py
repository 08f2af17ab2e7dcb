"""Each entry arrives in its place bit for bit; a misfit is listed and changes nothing."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from flax.core import freeze
from hypothesis.extra import numpy as hnp

import compare
from compare.conversion.errors import ConversionError
from compare.conversion.mapping import ROWS
from compare.conversion.tensors import (
    Untransferable,
    numpy_to_tensor,
    tensor_to_numpy,
    to_jax,
    to_torch,
)
from compare.proof.cases import PRIME, PRIME_BIAS, Config
from compare.runners.run import build_nnx, linen_template

from ..support import linen_variables, nnx_model, same_bits, state_of, torch_module

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies

SQUARE = Config(5, 5, 7, 0.1, qkv_bias=True)
# -0.0, a subnormal, a quiet and a signaling NaN with payloads, infinity, the largest finite number
AWKWARD = np.array([0x80000000, 1, 0x7FC12345, 0xFF812345, 0x7F800000, 0x7F7FFFFF], dtype=np.uint32)


def test_each_entry_has_its_place() -> None:
    config = replace(SQUARE, num_heads=1)
    module = torch_module(config)
    variables = compare.torch_to_linen(module, linen_template(config, buffer=True))
    model = compare.torch_to_nnx(module, build_nnx(config, buffer=True))
    for name in ("W_query", "W_key", "W_value", "out_proj"):
        linear = getattr(module, name)
        for kernel in (variables["params"][name]["kernel"], getattr(model, name).kernel[...]):
            assert np.array_equal(kernel, linear.weight.detach().numpy().T)
            assert not np.array_equal(kernel, linear.weight.detach().numpy())
        for bias in (variables["params"][name]["bias"], getattr(model, name).bias[...]):
            assert np.array_equal(bias, linear.bias.detach().numpy())
    for mask in (variables["buffers"]["mask"], model.mask[...]):
        assert np.array_equal(mask, module.mask.numpy())
    assert {row.torch_key for row in ROWS} == set(module.state_dict())


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_round_trip_keeps_every_bit(dtype: str, copy: bool) -> None:
    state = state_of(PRIME_BIAS, dtype)
    for tensor in state.values():
        carrier = tensor.view(
            {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
        )
        carrier.view(-1)[: len(AWKWARD)] = torch.from_numpy(AWKWARD.view(np.int32)).to(
            carrier.dtype
        )
    with jax.enable_x64(dtype == "float64"):
        variables = compare.torch_to_linen(
            state, linen_template(PRIME_BIAS, buffer=True), copy=copy
        )
        model = compare.torch_to_nnx(state, build_nnx(PRIME_BIAS, buffer=True), copy=copy)
        for back in (
            compare.linen_to_torch(variables, copy=copy),
            compare.nnx_to_torch(model, copy=copy),
        ):
            assert list(back) == list(state)
            for key, tensor in state.items():
                assert same_bits(tensor_to_numpy(back[key]), tensor_to_numpy(tensor)), key


@given(
    hnp.arrays(
        st.sampled_from(
            [
                np.dtype(name)
                for name in ("f4", "f2", "i1", "u1", "i2", "i4", "?", "c8", ml_dtypes.bfloat16)
            ]
        ),
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=7),
        elements=st.integers(0, 1),
        fill=st.nothing(),
    ),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_any_bits_survive_the_transfer(array: np.ndarray, random: Any, transpose: bool) -> None:
    raw = random.randbytes(array.nbytes)
    if array.dtype != np.bool_:  # a bool can only be a byte 0 or 1
        array = np.frombuffer(bytearray(raw), dtype=array.dtype).reshape(array.shape)
    tensor = numpy_to_tensor(array)
    there = to_jax(tensor.mT if transpose else tensor, copy=True)
    assert there.shape == (array.shape[::-1] if transpose else array.shape)
    back = to_torch(there, copy=True)
    assert same_bits(tensor_to_numpy(back.mT if transpose else back), array)


def test_copies_are_independent() -> None:
    module, template = torch_module(), linen_template(PRIME_BIAS, buffer=True)
    variables, model = (
        compare.torch_to_linen(module, template),
        compare.torch_to_nnx(module, nnx_model()),
    )
    before = jax.tree.map(np.array, variables)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(17.0)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.asarray, variables)))
    assert float(model.mask.max()) == 1.0
    for state in (compare.linen_to_torch(variables), compare.nnx_to_torch(model)):
        for tensor in state.values():
            tensor.fill_(23.0)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.asarray, variables)))
    assert float(model.mask.max()) == 1.0


def test_shared_memory_is_shared() -> None:
    """With `copy=False`, an in-place edit on one side shows on the other, both ways."""
    module = torch_module()
    variables = compare.torch_to_linen(module, linen_template(PRIME_BIAS, buffer=True), copy=False)
    with torch.no_grad():
        module.mask.fill_(5.0)
        module.W_query.weight[3, 2] = 19.0
    assert float(variables["buffers"]["mask"][0, 0]) == 5.0
    assert float(variables["params"]["W_query"]["kernel"][2, 3]) == 19.0
    compare.linen_to_torch(variables, copy=False)["W_key.bias"].fill_(29.0)
    assert float(variables["params"]["W_key"]["bias"][0]) == 29.0


def test_what_cannot_be_shared_is_refused() -> None:
    strided = {**state_of(PRIME, "float32"), "mask": torch.zeros(14, 14)[::2, ::2]}
    with pytest.raises(ConversionError, match=r"mask: memory cannot be shared .*use copy=True"):
        compare.torch_to_linen(strided, linen_template(PRIME, buffer=True), copy=False)
    variables = compare.torch_to_linen(strided, linen_template(PRIME, buffer=True))
    assert np.array_equal(variables["buffers"]["mask"], np.zeros((7, 7)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_would_have_to_be_copied_is_not_shared_without_a_word() -> None:
    conjugated = torch.tensor([[1 + 2j, 3 - 4j]]).conj()
    assert np.array_equal(to_jax(conjugated, copy=True), [[1 - 2j, 3 + 4j]])
    with pytest.raises(Untransferable, match="conjugated or negated view"):
        to_jax(conjugated, copy=False)
    for view in (torch.ones(7, 7) * 1j).conj(), (torch.ones(7, 7) * 1j).conj().imag:
        state = {**state_of(PRIME, "float32"), "mask": view}
        with pytest.raises(ConversionError, match=r"mask: a conjugated or negated view"):
            compare.torch_to_linen(state, linen_template(PRIME, buffer=True), copy=False)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    state = {**state_of(PRIME, "float32"), "mask": nested}
    with pytest.raises(ConversionError, match=r"mask: a nested tensor; store its parts"):
        compare.torch_to_linen(state, linen_template(PRIME, buffer=True))
    foreign = np.array([1.0, 2.0], dtype=">f4")
    assert to_torch(foreign, copy=True).tolist() == [1.0, 2.0]
    with pytest.raises(Untransferable, match="foreign byte order"):
        to_torch(foreign, copy=False)


def test_one_error_lists_everything() -> None:
    source = torch_module(PRIME, buffer=False).state_dict()
    source["W_qeury.bias"] = torch.zeros(11)
    source["W_key.weight"] = torch.zeros(11, 12)
    with pytest.raises(ConversionError) as caught:
        compare.torch_to_linen(source, linen_template(PRIME_BIAS, buffer=True))
    mismatch = caught.value.mismatch
    assert {(entry.name, entry.expected) for entry in mismatch.missing} == {
        *(("mask", (7, 7)), ("W_query.bias", (11,)), ("W_key.bias", (11,)), ("W_value.bias", (11,)))
    }
    assert [(entry.name, entry.found) for entry in mismatch.unexpected] == [("W_qeury.bias", (11,))]
    assert [(e.name, e.found, e.expected) for e in mismatch.misshaped] == [
        ("W_key.weight", (11, 12), (11, 13))
    ]
    message = str(caught.value)
    for part in (
        "- missing mask: the source has nothing for buffers/mask (7, 7)",
        "+ unexpected W_qeury.bias (11,): the target has no place for it; "
        "did you mean W_query.bias?",
        "! W_key.weight has shape (11, 12); params/W_key/kernel needs (11, 13)",
        "strict=False",
    ):
        assert part in message


def test_the_wrong_context_length_names_the_right_one() -> None:
    with pytest.raises(ConversionError, match=r"mask has shape \(7, 7\).*context_length=7"):
        compare.torch_to_nnx(torch_module(PRIME), build_nnx(Config(13, 11, 5, 0.1), buffer=True))


def test_the_mask_is_never_invented() -> None:
    source = torch_module(PRIME, buffer=False)
    model = build_nnx(PRIME, buffer=True)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with pytest.raises(ConversionError, match="missing mask"):
        compare.torch_to_linen(source, linen_template(PRIME, buffer=True))
    with pytest.raises(ConversionError, match="missing mask"):
        compare.torch_to_nnx(source, model)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after)), (
        "a refused conversion touched the model"
    )


def test_strict_false_converts_what_fits() -> None:
    source = {**torch_module(PRIME, buffer=False).state_dict(), "extra": torch.zeros(2)}
    del source["W_key.weight"]
    abstract, mismatch = compare.torch_to_linen(
        source, linen_template(PRIME, buffer=True), strict=False
    )
    assert {entry.name for entry in mismatch.missing} == {"mask", "W_key.weight"}
    assert [entry.name for entry in mismatch.unexpected] == ["extra"]
    assert "buffers" not in abstract
    assert abstract["params"].keys() == {"W_query", "W_value"}

    template = linen_variables(PRIME)
    kept, again = compare.torch_to_linen(source, template, strict=False)
    assert again == mismatch
    assert kept["buffers"]["mask"] is template["buffers"]["mask"]

    model = build_nnx(PRIME, buffer=True)
    model.mask[...] = 3.0 * model.mask[...]
    same, again = compare.torch_to_nnx(source, model, strict=False)
    assert same is model
    assert {entry.place for entry in again.missing} == {"mask", "W_key/kernel"}
    assert again.unexpected == mismatch.unexpected
    assert float(model.mask.max()) == 3.0
    assert np.array_equal(model.W_query.kernel[...], source["W_query.weight"].numpy().T)

    variables = linen_variables(PRIME)
    variables["params"]["head"] = {"kernel": jnp.zeros((2, 3))}
    state, mismatch = compare.linen_to_torch(variables, strict=False)
    assert list(state) == ["mask", "W_query.weight", "W_key.weight", "W_value.weight"]
    assert [(entry.name, entry.found) for entry in mismatch.unexpected] == [
        ("params/head/kernel", (2, 3))
    ]
    extended: Any = model
    extended.head = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state, mismatch = compare.nnx_to_torch(model, strict=False)
    assert {entry.name for entry in mismatch.unexpected} == {"head/kernel", "head/bias"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mask", torch.empty(7, 7, device="meta"), "mask: a meta tensor has no values"),
        ("mask", torch.zeros(7, 7).to_sparse(), "mask: a sparse or quantized tensor"),
        (
            "mask",
            torch.zeros(7, 7, dtype=torch.float64),
            "mask: JAX would narrow torch.float64.*jax_enable_x64",
        ),
        (
            "mask",
            torch.full((7, 7), 2**31),
            "mask: values from 2147483648 to 2147483648 do not fit int32",
        ),
        ("mask", [[0.0]], "mask: is a list, not a tensor"),
    ],
)
def test_values_that_would_be_lost_are_refused(key: str, value: Any, message: str) -> None:
    source = {**state_of(PRIME, "float32"), key: value}
    with pytest.raises(ConversionError, match=message):
        compare.torch_to_linen(source, linen_template(PRIME, buffer=True))


def test_int64_narrows_only_when_every_value_fits() -> None:
    source = {**state_of(PRIME, "float32"), "mask": torch.full((7, 7), 2**31 - 1)}
    variables = compare.torch_to_linen(source, linen_template(PRIME, buffer=True))
    assert variables["buffers"]["mask"].dtype == jnp.int32
    assert int(variables["buffers"]["mask"].max()) == 2**31 - 1
    with jax.enable_x64(True):
        wide = compare.torch_to_linen(source, linen_template(PRIME, buffer=True))
        assert wide["buffers"]["mask"].dtype == jnp.int64


def test_flax_values_that_torch_cannot_hold_are_refused() -> None:
    variables = linen_variables(PRIME)
    broken = {**variables, "buffers": {"mask": jax.ShapeDtypeStruct((7, 7), jnp.float32)}}
    with pytest.raises(ConversionError, match="mask: is a ShapeDtypeStruct, not an array"):
        compare.linen_to_torch(broken)
    with pytest.raises(ConversionError, match=r"mask: dtype key<fry> has no torch counterpart"):
        compare.linen_to_torch({**variables, "buffers": {"mask": jax.random.key(0)}})
    variables["buffers"]["mask"].delete()
    with pytest.raises(
        ConversionError, match="mask: the array was deleted, as a donated argument is"
    ):
        compare.linen_to_torch(variables)
    with pytest.raises(
        ConversionError, match=r"W_key/kernel: .*transposed needs an array \(in, out\); .* \(13,\)"
    ):
        compare.linen_to_torch(
            {"params": {**linen_variables(PRIME)["params"], "W_key": {"kernel": jnp.zeros(13)}}}
        )
    with pytest.raises(ConversionError, match=r"missing W_query.weight"):
        compare.linen_to_torch({})


def test_wrong_kinds_of_argument() -> None:
    variables, model = linen_variables(PRIME), nnx_model(PRIME)
    with pytest.raises(
        TypeError, match=r"source is a list; expected a torch module or its state dict"
    ):
        compare.torch_to_linen([1], variables)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="expected Linen variables"):
        compare.linen_to_torch(model)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="got a State; expected Linen variables"):
        compare.linen_to_torch(nnx.state(model))
    with pytest.raises(TypeError, match=r"model is a dict; expected an nnx.Module"):
        compare.torch_to_nnx(torch_module(PRIME), variables)  # type: ignore[call-overload]
    with pytest.raises(
        TypeError, match="template params/W_query/kernel is a str; expected an array"
    ):
        compare.torch_to_linen(torch_module(PRIME), {"params": {"W_query": {"kernel": "no"}}})


def test_templates_of_every_kind() -> None:
    module = torch_module(PRIME)
    concrete = compare.torch_to_linen(module, freeze(linen_variables(PRIME)))
    abstract = compare.torch_to_linen(module, linen_template(PRIME, buffer=True))
    assert jax.tree.all(jax.tree.map(np.array_equal, concrete, abstract))
    model = compare.torch_to_nnx(module, nnx.eval_shape(lambda: build_nnx(PRIME, buffer=True)))
    assert np.array_equal(model.mask[...], module.mask.numpy())
    assert not jax.tree.leaves(concrete)[0].committed


def test_random_streams_stay_as_they_are() -> None:
    model = build_nnx(PRIME, buffer=True)
    model.train()
    model(jnp.zeros((1, 3, 13)))
    count = int(model.dropout.rngs.count[...])
    compare.torch_to_nnx(torch_module(PRIME), model)
    assert int(model.dropout.rngs.count[...]) == count == 1


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_tensors_without_a_numpy_dtype_are_refused() -> None:
    with pytest.raises(Untransferable, match=r"dtype torch.complex32 has no NumPy counterpart"):
        tensor_to_numpy(torch.zeros(2).to(torch.complex64).to(torch.complex32))
    with pytest.raises(Untransferable, match="dtype object has no torch counterpart"):
        numpy_to_tensor(np.array([None]))


def test_state_on_cuda_converts_both_ways(device: str) -> None:
    module = torch_module(PRIME).to(device)
    variables = jax.device_put(
        compare.torch_to_linen(module, linen_template(PRIME, buffer=True)), jax.devices(device)[0]
    )
    for key, tensor in compare.linen_to_torch(variables).items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, module.state_dict()[key].cpu())
