"""An edited mask survives every format, from each implementation into each, in new processes."""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import compare
import flax_impl
from compare.checkpoint.convert import convert_checkpoint
from compare.checkpoint.errors import CheckpointError
from compare.checkpoint.formats import open_checkpoint
from compare.conversion.convert import torch_to_linen, torch_to_nnx
from compare.conversion.tensors import numpy_to_tensor, tensor_to_numpy
from compare.dtypes import DTYPES, numpy_dtype
from compare.proof.cases import FRAMEWORKS, PRIME
from compare.runners.run import build_nnx, build_torch, linen_template
from compare.subprocesses import ON_CPU, run_module

from ..support import linen_variables, same_bits, state_of, torch_module
from .mask_reader import digest

SUFFIXES = (".pth", ".safetensors", ".msgpack", ".orbax")
CAUSAL = np.triu(np.ones((7, 7), dtype=np.float32), 1)
WINDOW = np.float32(1) - np.tril(np.triu(np.ones((7, 7), dtype=np.float32), -2))


def _with(value: float, dtype: str = "float32") -> np.ndarray:
    return np.where(CAUSAL != 0, value, 0).astype(numpy_dtype(dtype))


def _signed_zero() -> np.ndarray:
    mask = CAUSAL.copy()
    mask[3, :4] = -0.0
    return mask


EDITS = {
    **{
        "as built": CAUSAL,
        "1 to 2": _with(2.0),
        "1 to -2.5": _with(-2.5),
        "1 to infinity": _with(np.inf),
    },
    **{
        "subnormal": _with(1e-42),
        "signed zero": _signed_zero(),
        "window": WINDOW,
        "all open": 0 * CAUSAL,
    },
    **{
        "all blocked": np.ones_like(CAUSAL),
        "not square symmetric": CAUSAL + 3 * np.eye(7, k=-3, dtype=np.float32),
    },
    **{dtype: _with(2.0, dtype) for dtype in ("bfloat16", "int8", "float8_e4m3fn")},
    "bool": CAUSAL.astype(bool),
    "int64": _with(2**31 - 1, "int64"),
}


def holders(mask: np.ndarray) -> dict[str, Any]:
    """The state with this mask, in each implementation."""
    state = {**state_of(PRIME, "float32"), "mask": numpy_to_tensor(mask.copy())}
    module = build_torch(PRIME, buffer=True)
    module.load_state_dict(state, assign=True)
    return {
        "torch": module,
        "linen": torch_to_linen(state, linen_template(PRIME, buffer=True)),
        "nnx": torch_to_nnx(state, build_nnx(PRIME, buffer=True)),
    }


@pytest.mark.parametrize("all_writers", [False, True])
@pytest.mark.slow
@pytest.mark.again
def test_every_edit_in_every_format_from_each_into_each(all_writers: bool, tmp_path: Path) -> None:
    """Either the writers are taken in turn, or all of them."""
    expected = {}
    for number, mask in enumerate(EDITS.values()):
        writers = FRAMEWORKS if all_writers else FRAMEWORKS[number % 3 :][:1]
        for writer in writers:
            holder = holders(mask)[writer]
            # Without x64, JAX narrows int64; it may, because every value fits.
            dtype = "int32" if mask.dtype == np.int64 and writer != "torch" else mask.dtype.name
            for suffix in SUFFIXES:
                path = compare.save_checkpoint(
                    tmp_path / f"{dtype}-{number}-{writer}{suffix}", holder
                )
                expected[str(path)] = mask.astype(numpy_dtype(dtype))
    for reader in FRAMEWORKS:
        digests = run_module("tests.checkpoint.mask_reader", [reader, *expected], ON_CPU)
        for name, mask in expected.items():
            wanted = mask.astype(np.int32) if mask.dtype == np.int64 and reader != "torch" else mask
            assert digests[name] == digest(wanted), (reader, name)


@pytest.mark.parametrize("name", ["1 to 2", "subnormal", "bool"])
@pytest.mark.slow
def test_every_edit_through_every_conversion(name: str, tmp_path: Path) -> None:
    for number, source in enumerate(SUFFIXES):
        first = compare.save_checkpoint(
            tmp_path / f"a{number}{source}", holders(EDITS[name])["nnx"]
        )
        for target in SUFFIXES:
            convert_checkpoint(first, tmp_path / f"b{number}{target}")
            mask = compare.read_checkpoint(tmp_path / f"b{number}{target}")["mask"]
            assert same_bits(tensor_to_numpy(mask), EDITS[name])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_dtype_and_polarity_are_declared(suffix: str, tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / f"state{suffix}", holders(EDITS["int8"])["torch"])
    with open_checkpoint(path) as stored:
        assert stored.manifest is not None
        (mask,) = [
            entry
            for entry in json.loads(stored.manifest.dumps())["tensors"]
            if entry["path"][-1] == "mask"
        ]
    assert (mask["dtype"], mask["kind"], mask["polarity"]) == ("int8", "buffer", "nonzero blocks")


# JAX without x64 has no 64-bit dtypes; int64 becomes int32.
IN_BOTH = sorted({*DTYPES} - {"float64", "complex128", "uint64"})
INPUTS = np.random.default_rng(0).standard_normal((2, 7, PRIME.input_embedding_dim), np.float32)


def _blocking_values(dtype: str) -> list[Any]:
    """Values that are not 0 in this dtype: the largest, the smallest, and NaN if there is one."""
    numpy = numpy_dtype(dtype)
    if dtype == "bool":
        return [True]
    if dtype == "int64":  # JAX without x64 holds what fits int32
        return [2**31 - 1, 1, -(2**31)]
    if numpy.kind in "iu":
        return [np.iinfo(numpy).max, 1, *([np.iinfo(numpy).min] if numpy.kind == "i" else [])]
    if numpy.kind == "c":
        return [1e-45j, complex(np.nan, 0), 2.0]
    limits = ml_dtypes.finfo(numpy)
    return [limits.max, limits.smallest_subnormal, np.nan]


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("dtype", IN_BOTH)
@pytest.mark.slow
def test_one_verdict_on_a_mask_of_every_dtype(dtype: str, tmp_path: Path) -> None:
    """What is not 0 blocks when called, and comes back from a file, in all three."""
    expected = _called(holders(CAUSAL))
    zero = dtype == "float8_e8m0fnu"  # it has powers of 2, and no 0
    for index, value in enumerate(_blocking_values(dtype)):
        pattern = np.ones_like(CAUSAL) if zero else CAUSAL
        mask = np.where(pattern != 0, value, 0 if not zero else 1).astype(numpy_dtype(dtype))
        sources = holders(mask)
        for framework, outputs in _called(sources).items():
            wanted = np.full_like(outputs, np.nan) if zero else expected[framework]
            assert np.array_equal(outputs, wanted, equal_nan=True), (framework, value)
        writers = sources if index == 0 else {"torch": sources["torch"]}
        for writer, source in writers.items():
            path = compare.save_checkpoint(tmp_path / f"{writer}{index}.msgpack", source)
            for target in holders(mask).values():
                loaded = compare.load_checkpoint(path, target, cast=dtype == "int64")
                assert same_bits(_mask_of(loaded), _mask_of(target)), (writer, value)


def _called(sources: dict[str, Any]) -> dict[str, np.ndarray]:
    linen = flax_impl.CausalAttentionWithBuffer(**_arguments())
    with torch.no_grad():
        return {
            "torch": sources["torch"].eval()(torch.from_numpy(INPUTS)).numpy(),
            "linen": np.asarray(linen.apply(sources["linen"], INPUTS)),
            "nnx": np.asarray(_evaluated(sources["nnx"])(INPUTS)),
        }


def _evaluated(model: Any) -> Any:
    model.eval()
    return model


def _arguments() -> dict[str, Any]:
    return {
        "input_embedding_dim": PRIME.input_embedding_dim,
        "output_embedding_dim": PRIME.output_embedding_dim,
        "context_length": 7,
        "dropout": 0.1,
    }


def _mask_of(holder: Any) -> np.ndarray:
    if isinstance(holder, dict):
        return np.asarray(holder["buffers"]["mask"])
    mask = holder.mask
    return tensor_to_numpy(mask) if isinstance(mask, torch.Tensor) else np.asarray(mask[...])


def test_a_cast_never_opens_a_mask(tmp_path: Path) -> None:
    """Whatever the buffer is called: 1e-30 would be 0 in float16."""
    source: Any = torch.nn.Module()
    source.register_buffer("causal", torch.from_numpy(_with(1e-30)))
    source.weight = torch.nn.Parameter(torch.ones(2))
    path = compare.save_checkpoint(tmp_path / "a.safetensors", source)
    convert_checkpoint(path, tmp_path / "half.pth", dtype="float16")
    half = compare.read_checkpoint(tmp_path / "half.pth")
    assert torch.equal(half["causal"], source.causal) and half["weight"].dtype == torch.float16
    target = copy.deepcopy(source).half()
    with pytest.raises(
        CheckpointError, match=r"causal is a buffer, and 21 of its values would change.*1e-30: keep"
    ):
        compare.load_checkpoint(path, target, cast=True)
    target.causal = target.causal.to(torch.float32)  # as the error says
    compare.load_checkpoint(path, target, cast=True)
    assert torch.equal(target.causal, source.causal) and target.weight.dtype == torch.float16
    variables = {
        "params": {"weight": jnp.ones(2, "float16")},
        "buffers": {"causal": jnp.ones((7, 7), "float16")},
    }
    loaded = compare.load_checkpoint(path, variables, cast=True)
    again = compare.save_checkpoint(tmp_path / "b.msgpack", loaded)
    for each in (loaded, compare.load_checkpoint(again, variables, cast=True)):
        assert each["params"]["weight"].dtype == jnp.float16
        assert same_bits(np.asarray(each["buffers"]["causal"]), _with(1e-30))


def test_a_state_dict_without_kinds_has_one_mask(tmp_path: Path) -> None:
    state = {"mask": torch.full((2, 2), 1e-30), "causal": torch.full((2, 2), 1e-30)}
    path = compare.save_checkpoint(tmp_path / "a.pth", {**state, "other.mask": state["mask"] * 1})
    convert_checkpoint(path, tmp_path / "b.pth", dtype="float16")
    half = compare.read_checkpoint(tmp_path / "b.pth")
    dtypes = {key: tensor.dtype for key, tensor in half.items()}
    kept, cast = torch.float32, torch.float16
    assert dtypes == {"mask": kept, "causal": cast, "other.mask": kept}


def test_an_exact_cast_of_a_buffer_is_made_only_on_demand(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "a.pth", torch_module(PRIME))
    half = torch_module(PRIME).half()
    with pytest.raises(CheckpointError, match=r"or pass cast=True"):
        compare.load_checkpoint(path, half)
    assert compare.load_checkpoint(path, half, cast=True).mask.dtype == torch.float16
    assert torch.equal(half.mask, torch.from_numpy(CAUSAL).half())


def test_an_integer_is_cast_only_on_demand(tmp_path: Path) -> None:
    target: Any = torch.nn.Module()
    target.register_buffer("step", torch.zeros(2, dtype=torch.int64))
    path = compare.save_checkpoint(
        tmp_path / "a.pth", {"step": torch.tensor([1, -(2**31)], dtype=torch.int32)}
    )
    with pytest.raises(
        CheckpointError, match=r"is torch.int32; the module has torch.int64.*cast=True"
    ):
        compare.load_checkpoint(path, target)
    assert compare.load_checkpoint(path, target, cast=True).step.tolist() == [1, -(2**31)]
    narrow = compare.save_checkpoint(tmp_path / "b.pth", {"step": torch.ones(2, dtype=torch.int16)})
    with pytest.raises(CheckpointError, match=r"is torch.int16; the module has torch.int64"):
        compare.load_checkpoint(narrow, target, cast=True)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_saved_on_the_device_loaded_on_the_cpu_and_back(
    suffix: str, device: str, tmp_path: Path
) -> None:
    """State saved on a GPU loads in processes that see no GPU, and back onto the GPU."""
    there = jax.devices(device)[0]
    for writer, holder in holders(EDITS["1 to 2"]).items():
        if writer == "torch":
            holder = holder.to(device)
        elif writer == "linen":
            holder = jax.device_put(holder, there)
        else:
            holder.mask[...] = jax.device_put(holder.mask[...], there)
        path = compare.save_checkpoint(tmp_path / f"float32-{writer}{suffix}", holder)
        for reader in FRAMEWORKS:
            digests = (
                run_module("tests.checkpoint.mask_reader", [reader, str(path)], ON_CPU)
                if device != "cpu"
                else {}
            )
            assert digests.get(str(path), digest(EDITS["1 to 2"])) == digest(EDITS["1 to 2"])
        module = build_torch(PRIME, buffer=True).to(device)
        assert compare.load_checkpoint(path, module).mask.device.type == device
        assert torch.equal(module.mask.cpu(), torch.from_numpy(EDITS["1 to 2"]))
        placed = jax.device_put(linen_variables(PRIME), there)
        loaded = compare.load_checkpoint(path, placed)
        assert loaded["buffers"]["mask"].devices() == {there}
        assert np.array_equal(loaded["buffers"]["mask"], EDITS["1 to 2"])
