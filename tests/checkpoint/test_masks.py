"""An edited mask survives every format, from each implementation into each, in new processes."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import compare
from compare.checkpoint.convert import convert_checkpoint
from compare.checkpoint.errors import CheckpointError
from compare.checkpoint.formats import open_checkpoint
from compare.conversion.convert import torch_to_linen, torch_to_nnx
from compare.conversion.tensors import numpy_to_tensor, tensor_to_numpy
from compare.dtypes import numpy_dtype
from compare.proof.cases import FRAMEWORKS, PRIME
from compare.runners.run import build_nnx, build_torch, linen_template
from compare.subprocesses import ON_CPU, run_module

from ..support import linen_variables, nnx_model, same_bits, state_of, torch_module
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
    **{
        dtype: _with(2.0, dtype)
        for dtype in ("float16", "bfloat16", "int8", "uint8", "int32", "float8_e4m3fn")
    },
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


@pytest.mark.slow
def test_every_edit_in_every_format_from_each_into_each(tmp_path: Path) -> None:
    expected = {}
    for number, mask in enumerate(EDITS.values()):
        for writer, holder in holders(mask).items():
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


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_mask_with_nan_is_refused_by_all(suffix: str, tmp_path: Path) -> None:
    mask = CAUSAL.copy()
    mask[0, 1] = np.nan
    path = compare.save_checkpoint(tmp_path / f"state{suffix}", holders(mask)["linen"])
    for target in (torch_module(PRIME), linen_variables(PRIME), nnx_model(PRIME)):
        with pytest.raises(
            CheckpointError, match=r"mask holds NaN.*found 1 NaN: write 0 where a mask is open"
        ):
            compare.load_checkpoint(path, target)


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
