"""What loading decides entry by entry: policies, tied names, memory, casts."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import compare
from compare.checkpoint.formats import open_checkpoint
from compare.checkpoint.formats.torch_pickle import (
    _MAX_ARGUMENTS,
    Storage,
    UnsafePickleError,
    _called,
    _Function,
    _view,
)
from compare.checkpoint.load import _owned
from compare.checkpoint.load_torch import _overlaps_itself
from compare.checkpoint.save import _root_cause
from compare.checkpoint.tensors import Tensors


def flax_file(folder: Path, mask: np.ndarray) -> Path:
    """Return a file of Linen variables with one more mask than the target below."""
    variables = {"params": {"w": jnp.ones(2)}, "buffers": {"mask": jnp.asarray(mask)}}
    return compare.save_checkpoint(folder / "a.msgpack", variables)


def test_a_mask_that_flax_lacks_is_left_out_only_if_it_is_the_causal_one(tmp_path: Path) -> None:
    target, policy = {"params": {"w": jnp.zeros(2)}}, {"buffers/mask": "verify"}
    causal = np.triu(np.ones((4, 4), np.float32), 1)
    loaded = compare.load_checkpoint(flax_file(tmp_path, causal), target, policy=policy)  # type: ignore[arg-type]
    assert loaded["params"]["w"].tolist() == [1.0, 1.0]
    causal[0, 0] = 1.0
    with pytest.raises(compare.CheckpointError, match="was edited: 1 of its 16 entries") as caught:
        compare.load_checkpoint(flax_file(tmp_path, causal), target, policy=policy)  # type: ignore[arg-type]
    assert "policy={'buffers/mask': 'ignore'} drops it" in str(caught.value)


class Tied(nnx.Module):
    def __init__(self, *, is_tied: bool) -> None:
        self.a = nnx.Param(jnp.arange(3.0))
        self.b = self.a if is_tied else nnx.Param(jnp.zeros(3))


@pytest.mark.parametrize("suffix", [".msgpack", ".orbax"])
def test_a_tied_name_fills_two_entries(suffix: str, tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / f"tied{suffix}", Tied(is_tied=True))
    model = compare.load_checkpoint(path, Tied(is_tied=False))
    assert model.b[...].tolist() == [0.0, 1.0, 2.0]
    template = {"params": {"a": jnp.zeros(3), "b": jnp.zeros(3)}}
    loaded = compare.load_checkpoint(path, template)
    assert loaded["params"]["b"].tolist() == [0.0, 1.0, 2.0]


class Masked(torch.nn.Module):
    mask: torch.Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, 1.0]).to(dtype))


def test_a_mask_in_float8_is_cast_where_every_value_stays(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "a.pth", Masked(torch.float8_e4m3fn))
    loaded = compare.load_checkpoint(path, Masked(torch.float32), cast=True)
    assert loaded.mask.tolist() == [0.0, 1.0]


class Hooked(torch.nn.Module):
    """A module that runs its own code when it is loaded, and has entries without a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2, bias=False)
        self.register_buffer("nothing", None)
        self.register_load_state_dict_post_hook(lambda *_: None)


def test_a_module_with_hooks_may_lack_a_bias(tmp_path: Path) -> None:
    source = Hooked()
    path = compare.save_checkpoint(tmp_path / "a.pth", source)
    loaded = compare.load_checkpoint(path, Hooked())
    assert torch.equal(loaded.linear.weight, source.linear.weight)


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((2, 3), (3, 2), False),  # 0 2 4 and 3 5 7
        ((2, 3), (2, 2), True),
        ((3,), (0,), True),
        ((1,), (0,), False),
        ((2, 2), (2, 1), False),
        ((2, 3), (1, 2), False),
        ((0, 2), (0, 0), False),
    ],
)
def test_which_views_overlap_themselves(
    shape: tuple[int, ...], strides: tuple[int, ...], expected: bool
) -> None:
    assert _overlaps_itself(torch.empty(9).as_strided(shape, strides)) is expected


def test_what_may_be_kept_and_what_is_copied() -> None:
    array = np.arange(6.0).reshape(2, 3)
    assert _owned(array) is array
    for other in (array.T, np.broadcast_to(array, (2, 3)), np.frombuffer(b"\0" * 8)):
        copy = _owned(other)
        assert copy is not other and copy.flags.writeable and copy.flags.c_contiguous
        assert np.array_equal(copy, other)


def test_what_a_pickle_may_call() -> None:
    function = _Function(lambda *arguments: len(arguments))
    assert _called(function, (0,) * _MAX_ARGUMENTS) == _MAX_ARGUMENTS
    with pytest.raises(UnsafePickleError, match=f"a call with {_MAX_ARGUMENTS + 1} arguments"):
        _called(function, (0,) * (_MAX_ARGUMENTS + 1))


def test_what_is_a_tensor_in_a_pickle() -> None:
    storage = Storage("0", "float32", 6)
    view = _view(storage, 1, (2,), (3,), "float32", None)
    assert (view.offset, view.is_conj, view.is_neg) == (1, False, False)
    for other in ("0", None, 6):
        with pytest.raises(UnsafePickleError, match="a tensor without a storage"):
            _view(other, 0, (2,), (1,), "float32", {})
    with pytest.raises(UnsafePickleError, match="a tensor without a storage"):
        _view(storage, 0, (2,), (1, 1), "float32", {})


def test_the_first_cause_is_named() -> None:
    first = OSError("no space")
    second, third = ValueError("b"), RuntimeError("c")
    second.__cause__, third.__cause__ = first, second
    assert _root_cause(third, None) is first
    assert _root_cause(third, second) is third
    first.__context__ = third  # a circle ends
    assert _root_cause(third, None) is first


def test_what_needs_more_memory_is_named(tmp_path: Path) -> None:
    one = compare.save_checkpoint(tmp_path / "a.safetensors", {"w": torch.ones(100_000)})
    two = {"w": torch.ones(100_000), "v": torch.ones(1)}
    many = compare.save_checkpoint(tmp_path / "b.safetensors", two)
    with pytest.raises(compare.CheckpointError, match=r"for w \(\(100000,\)\) than"):
        compare.read_checkpoint(one, memory=100_000)
    with pytest.raises(compare.CheckpointError, match=r"for w \(\(100000,\)\) and 1 more"):
        compare.read_checkpoint(many, memory=100_000)


def test_a_copy_in_another_layout_is_counted(tmp_path: Path) -> None:
    linear = torch.nn.Linear(512, 512, bias=False)
    path = compare.save_checkpoint(tmp_path / "a.safetensors", {"w": linear.weight.detach()})
    nbytes = 4 * 512**2
    compare.convert_checkpoint(path, tmp_path / "b.safetensors", memory=nbytes + 200_000)
    with pytest.raises(compare.CheckpointError, match="a tensor and its copies in another"):
        compare.convert_checkpoint(
            path, tmp_path / "b.safetensors", dtype="float64", memory=nbytes + 200_000
        )


def test_a_view_takes_memory_beside_what_it_shows(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(4, 6).T, "v": torch.ones(4, 6)}, tmp_path / "a.pth")
    with open_checkpoint(tmp_path / "a.pth") as stored:
        assert stored._extra_bytes(("w",)) == 4 * 24
        assert stored._extra_bytes(("v",)) == 0


def test_a_tensor_is_in_memory_once_by_default() -> None:
    def nothing(_: Any) -> list[np.ndarray]:
        return []

    assert Tensors("torch", {}, nothing).copies == 1
    assert Tensors("torch", {}, nothing).largest_bytes == 0


@pytest.mark.filterwarnings("ignore::compare.UnverifiedCheckpoint")
@pytest.mark.parametrize("is_zip", [True, False])
def test_views_of_one_storage_are_read_from_where_they_begin(is_zip: bool, tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {"end": base[7:], "begin": base[:3], "rows": base[2:].view(2, 5)}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
    found = compare.read_checkpoint(tmp_path / "a.pth")
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.filterwarnings("ignore::compare.UnverifiedCheckpoint")
def test_an_old_file_with_many_names_is_read_and_bounded(tmp_path: Path) -> None:
    """Its pickle is longer than what is read of it at first."""
    path, one = tmp_path / "a.pth", torch.ones(2)
    state = {f"a_name_that_is_not_short.{index}": one for index in range(3000)}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert compare.read_checkpoint(path).keys() == state.keys()
    with pytest.raises(compare.CheckpointError, match="more memory is needed for") as caught:
        compare.read_checkpoint(path, memory=400_000)
    assert caught.value.path == str(path)


def test_a_read_that_fails_within_a_large_tensor_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compare.save_checkpoint(tmp_path / "a.safetensors", {"w": torch.zeros(3_000_000)})

    def fail(*_: Any) -> None:
        raise OSError(5, "the disk is broken")

    with open_checkpoint(path) as stored:
        monkeypatch.setattr(stored, "fill", fail)
        with pytest.raises(compare.CheckpointError, match="the disk is broken") as caught:
            list(stored.parts(("w",)))
    assert caught.value.path == str(path)


def test_a_header_ends_before_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for missing, message in ((0, None), (1, "its header's length")):
        header = b"{}" + b" " * 6
        path.write_bytes((len(header) + missing).to_bytes(8, "little") + header)
        if message is None:
            with open_checkpoint(path) as stored:
                assert not stored.specs
            continue
        with pytest.raises(compare.CheckpointError, match=message):
            compare.read_checkpoint(path)


def test_the_steps_of_wrappers_are_taken_off(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    template = {
        "params": {
            "0": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)},
            "1": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)},
        }
    }
    for step in ("_orig_mod.", "_fsdp_wrapped_module."):
        state = {
            name.replace("1.", f"1.{step}_checkpoint_wrapped_module."): tensor
            for name, tensor in module.state_dict().items()
        }
        path = compare.save_checkpoint(tmp_path / "wrapped.pth", state)
        target = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
        with pytest.raises(
            compare.CheckpointError, match=f"2 names have this step.*prefix='{step}'"
        ):
            compare.load_checkpoint(path, target)
        compare.load_checkpoint(path, target, prefix=step)
        expected = module.state_dict()["1.weight"]
        assert torch.equal(target.state_dict()["1.weight"], expected)
        with pytest.raises(
            compare.ConversionError, match=f"2 names have this step.*prefix='{step}'"
        ):
            compare.match(state, template)
        made = compare.torch_to_linen(
            state, template, prefix=step, layouts={"*.weight": "transposed"}
        )
        np.testing.assert_array_equal(made["params"]["1"]["kernel"], expected.T)
    averaged = torch.optim.swa_utils.AveragedModel(module)
    path = compare.save_checkpoint(tmp_path / "ema.pth", averaged.state_dict())
    with pytest.raises(compare.CheckpointError) as refused:
        compare.load_checkpoint(path, target)
    assert "unexpected module.*: 4 names begin so" in str(refused.value)
    assert "unexpected n_averaged ()" in str(refused.value)
    compare.load_checkpoint(path, target, prefix="module.", policy={"n_averaged": "ignore"})


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_modules_own_hooks_give_old_names_new_ones(suffix: str, tmp_path: Path) -> None:
    class Renamed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(3)
            self.seen: list[str] = []
            self._register_load_state_dict_pre_hook(self.rename)

        def rename(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
            self.seen += state
            for name in [name for name in state if name.startswith(f"{prefix}ln.")]:
                state[name.replace("ln.", "norm.")] = state.pop(name)

    old = torch.nn.ModuleDict({"inner": torch.nn.ModuleDict({"ln": torch.nn.LayerNorm(3)})})
    torch.nn.init.normal_(old["inner"]["ln"].weight)  # type: ignore[index]
    path = compare.save_checkpoint(tmp_path / f"old{suffix}", old)
    new = torch.nn.ModuleDict({"inner": Renamed()})
    compare.load_checkpoint(path, new)
    expected = old.state_dict()["inner.ln.weight"]
    assert torch.equal(new.state_dict()["inner.norm.weight"], expected)

    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="weight_norm"):
        weight_norm = torch.nn.utils.weight_norm(torch.nn.Linear(2, 3))
    target = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 3))
    path = compare.save_checkpoint(tmp_path / f"norm{suffix}", weight_norm)
    compare.load_checkpoint(path, target)
    inputs = torch.ones(1, 2)
    assert torch.equal(target(inputs), weight_norm(inputs))
    other = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(compare.CheckpointError, match="has shape"):
        compare.load_checkpoint(path, other)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in before.items())
