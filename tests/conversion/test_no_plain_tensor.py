"""State that is no plain torch tensor: converted, or named with the way out."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import compare
from compare.checkpoint.errors import CheckpointError
from compare.conversion.errors import ConversionError
from compare.conversion.tensors import numpy_to_tensor

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)
TEMPLATE = {"params": {"fc": {"kernel": jnp.zeros((3, 2))}}}


def read_only() -> np.ndarray:
    array = WEIGHT.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "value",
    [WEIGHT, read_only(), WEIGHT.T.copy().T, WEIGHT.astype(">f4"), jnp.asarray(WEIGHT)],
    ids=["numpy", "read-only", "strides", "big-endian", "jax"],
)
def test_arrays_as_a_state_dict(value: Any) -> None:
    variables = compare.torch_to_linen({"fc.weight": value}, TEMPLATE)
    assert np.array_equal(variables["params"]["fc"]["kernel"], WEIGHT.T)
    model = nnx.Dict(fc=nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0)))
    compare.torch_to_nnx({"fc.weight": value}, model)
    assert np.array_equal(model.fc.kernel[...], WEIGHT.T)


def test_bfloat16_arrays() -> None:
    value = jnp.asarray(WEIGHT, jnp.bfloat16)
    variables = compare.torch_to_linen({"fc.weight": value}, TEMPLATE)
    assert variables["params"]["fc"]["kernel"].dtype == jnp.bfloat16
    assert np.array_equal(variables["params"]["fc"]["kernel"], value.T)


@pytest.mark.parametrize("value", [np.array([["a"] * 3] * 2), np.float32(1), None, [1.0]])
def test_what_is_no_array_is_named(value: Any) -> None:
    with pytest.raises(ConversionError, match=r"fc\.weight"):
        compare.torch_to_linen({"fc.weight": value}, TEMPLATE)


class Secret(torch.Tensor):
    """A subclass that does not give its values, as DTensor and FakeTensor."""

    @staticmethod
    def __new__(cls) -> "Secret":
        return torch.Tensor._make_wrapper_subclass(cls, (2, 3))

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        if "detach" in str(function) or "alias" in str(function):
            return cls()
        raise NotImplementedError(str(function))


class Sharded(Secret):
    def full_tensor(self) -> torch.Tensor:
        return numpy_to_tensor(WEIGHT)


@pytest.mark.parametrize(
    ("value", "mend"), [(Secret(), "a plain tensor"), (Sharded(), r"tensor\.full_tensor\(\)")]
)
def test_a_tensor_without_values_is_named(value: torch.Tensor, mend: str, tmp_path: Path) -> None:
    said = rf"is a {type(value).__name__}, which decides itself what its values are; give {mend}"
    with pytest.raises(CheckpointError, match=rf"fc\.weight.*{said}"):
        compare.save_checkpoint(tmp_path / "state.pth", {"fc.weight": value})
    with pytest.raises(ConversionError, match=rf"fc\.weight: {said}"):
        compare.torch_to_linen({"fc.weight": value}, TEMPLATE)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::compare.UnverifiedCheckpoint")
def test_files_of_norms_without_a_counter(tmp_path: Path) -> None:
    """As torch wrote them before it had the counter; its own loading keeps the module's."""
    norm, kept = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    source, target = torch.nn.Sequential(norm), torch.nn.Sequential(kept)
    source(torch.randn(4, 2))
    state = {key: value for key, value in source.state_dict().items() if "num" not in key}
    torch.save(state, tmp_path / "old.pth")
    kept.num_batches_tracked = torch.tensor(5)
    compare.load_checkpoint(tmp_path / "old.pth", target)
    assert int(kept.num_batches_tracked) == 5
    assert torch.equal(target.state_dict()["0.running_mean"], state["0.running_mean"])
    torch.save({"0.weight": state["0.weight"], "0.bias": state["0.bias"]}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"missing 0\.num_batches_tracked"):
        compare.load_checkpoint(tmp_path / "less.pth", target)
    own: Any = torch.nn.Module()
    for name in ("running_mean", "num_batches_tracked"):
        own.register_buffer(name, torch.zeros(2))
    torch.save({"running_mean": torch.ones(2)}, tmp_path / "own.pth")
    with pytest.raises(CheckpointError, match="missing num_batches_tracked"):
        compare.load_checkpoint(tmp_path / "own.pth", own)
