"""Cases that once slipped through, mostly states, files and folders that others wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx, serialization
from flax.core import freeze

import compare
from compare.checkpoint.convert import convert_checkpoint
from compare.checkpoint.errors import CheckpointError
from compare.checkpoint.formats import open_checkpoint
from compare.checkpoint.manifest import KEY, Manifest, sealed
from compare.checkpoint.verify import verify_checkpoint
from compare.conversion.errors import ConversionError
from compare.conversion.mapping import Row, StateMapping
from compare.conversion.unmatched import objection
from compare.dtypes import FLOAT8, numpy_dtype
from compare.files.memory import Budget

from .faults import without_seal

pytestmark = pytest.mark.filterwarnings("ignore::compare.checkpoint.errors.UnverifiedCheckpoint")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_conjugate_is_not_a_tied_tensor(suffix: str, tmp_path: Path) -> None:
    z = torch.randn(3, dtype=torch.complex64)
    state = {"a": z, "b": z.conj()}
    tensors = compare.read_checkpoint(compare.save_checkpoint(tmp_path / f"state{suffix}", state))
    assert torch.equal(tensors["b"], z.conj())
    torch.save(state, tmp_path / "plain.pth")
    assert torch.equal(compare.read_checkpoint(tmp_path / "plain.pth")["b"], z.conj())


def test_shards_never_replace_what_is_not_theirs(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    source = compare.save_checkpoint(folder / "orig.safetensors", {"x": torch.ones(99)})
    with pytest.raises(CheckpointError, match="contains what is read"):
        convert_checkpoint(source, folder, shard_bytes=100)
    away = compare.save_checkpoint(tmp_path / "away.safetensors", {"x": torch.ones(99)})
    with pytest.raises(CheckpointError, match=r"holds orig.safetensors; it was not changed"):
        convert_checkpoint(away, folder, shard_bytes=100)
    assert source.exists()
    convert_checkpoint(away, tmp_path / "shards", shard_bytes=100)
    convert_checkpoint(away, tmp_path / "shards", shard_bytes=100)
    (tmp_path / "shards" / "lora.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"holds lora.safetensors; it was not changed"):
        convert_checkpoint(away, tmp_path / "shards", shard_bytes=100)
    with pytest.raises(CheckpointError, match="lies in what is read"):
        convert_checkpoint(tmp_path / "shards", tmp_path / "shards" / "merged.safetensors")


def test_a_file_is_not_converted_into_itself(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "state.safetensors", {"x": torch.ones(9)})
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="is what is read"):
        convert_checkpoint(path, path, dtype="bfloat16")
    assert path.read_bytes() == before


class One(nnx.Module):
    def __init__(self) -> None:
        self.x = nnx.Linear(3, 3, rngs=nnx.Rngs(0))


def test_two_entries_do_not_become_one() -> None:
    source = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    with pytest.raises(ConversionError, match=r"b.weight: would become x/kernel, as a.weight does"):
        compare.match(source, One(), rename={"a": "x", "b": "x"})
    with pytest.raises(ConversionError, match=r"\*: renames to x, with another number of \*"):
        compare.match(source, One(), rename={"*": "x"})
    with pytest.raises(ConversionError, match="would become x/kernel"):
        compare.match(
            {"x.weight": torch.ones(3, 3), "x.kernel": torch.ones(3, 3), "x.bias": torch.ones(3)},
            One(),
            layouts={"x.kernel": "same", "x.weight": "transposed"},
        )
    with pytest.raises(ValueError, match="this mapping has params/x twice"):
        StateMapping((Row("a", ("params", "x")), Row("b", ("params", "x"))))


def test_names_that_a_format_would_lose(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "state.orbax", {"params": {"x": jnp.ones(2)}})
    with pytest.raises(CheckpointError, match="Orbax joins names with dots"):
        compare.save_checkpoint(path, {"params": {"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}})
    with open_checkpoint(path) as stored:
        assert list(stored.specs) == [("params", "x")]
    with pytest.raises(CheckpointError, match="rename one"):
        compare.save_checkpoint(
            tmp_path / "s.msgpack", {"params": {"__msgpack_chunked_array__": {"k": jnp.ones(2)}}}
        )
    w = torch.ones(2)
    tied = compare.save_checkpoint(tmp_path / "tied.safetensors", {"w": w, KEY: w, "format": w})
    assert compare.read_checkpoint(tied).keys() == {"w", KEY, "format"}
    from safetensors.torch import save_file

    save_file({"pt": w}, str(tmp_path / "plain.safetensors"), metadata={"format": "pt"})
    assert compare.read_checkpoint(tmp_path / "plain.safetensors").keys() == {"pt"}


def test_the_number_of_heads_is_part_of_the_shape(tmp_path: Path) -> None:
    source = torch.nn.MultiheadAttention(6, 2)
    two, three = (nnx.MultiHeadAttention(n, 6, decode=False, rngs=nnx.Rngs(0)) for n in (2, 3))
    with pytest.raises(ConversionError, match="in_proj_weight: has 2 heads in torch and 3 in Flax"):
        compare.match(source, three)
    path = compare.save_checkpoint(tmp_path / "s.pth", source, mapping=compare.match(source, two))
    with pytest.raises(
        CheckpointError, match=r"the mapping is for \(6, 2, 3\) in Flax; this is \(6, 3, 2\)"
    ):
        compare.load_checkpoint(path, three)
    with pytest.raises(ConversionError, match="add_zero_attn=True has no counterpart"):
        compare.match(torch.nn.MultiheadAttention(6, 2, add_zero_attn=True), two)


class Conv1D(torch.nn.Module):
    """GPT-2's layer, whose weight has the shape (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            torch.nn.Parameter(torch.randn(3, 3)),
            torch.nn.Parameter(torch.zeros(3)),
        )


@pytest.mark.parametrize("layer", [Conv1D(), torch.nn.Embedding(3, 3)], ids=["own", "embedding"])
def test_a_layer_that_does_not_say_how_its_square_lies(layer: torch.nn.Module) -> None:
    source = torch.nn.ModuleDict({"x": layer})
    with pytest.raises(
        ConversionError, match=rf'the {type(layer).__name__} in torch does not say .*"x.weight"'
    ):
        compare.match(source, One())
    if isinstance(layer, Conv1D):
        table = compare.match(source, One(), layouts={"x.weight": "same"})
        model = compare.torch_to_nnx(source, One(), mapping=table)
        assert np.array_equal(model.x.kernel[...], layer.weight.detach().numpy())


def test_kernels_of_another_layer_in_nnx() -> None:
    conv = torch.nn.Conv1d(3, 3, 3)
    for model in (
        nnx.LinearGeneral((3,), (3, 3), rngs=nnx.Rngs(0)),
        nnx.ConvTranspose(3, 3, (3,), rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(
            ConversionError, match=r"does not say how this kernel is laid out|has shape"
        ):
            compare.match(conv, model)


class Overlapping(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
        self.dec.weight = torch.nn.Parameter(self.enc.weight.t())


def test_entries_in_overlapping_memory_must_agree(tmp_path: Path) -> None:
    module, w = Overlapping(), torch.randn(3, 3)
    before = module.enc.weight.detach().clone()
    path = compare.save_checkpoint(tmp_path / "s.pth", {"enc.weight": w, "dec.weight": w.clone()})
    with pytest.raises(CheckpointError, match="lies in the same memory as another entry"):
        compare.load_checkpoint(path, module)
    assert torch.equal(module.enc.weight, before)
    fitting = compare.save_checkpoint(
        tmp_path / "t.pth", {"enc.weight": w, "dec.weight": w.t().clone()}
    )
    assert torch.equal(compare.load_checkpoint(fitting, module).dec.weight, w.t())


class More(nnx.Module):
    def __init__(self) -> None:
        self.f, self.extra = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param(jnp.ones(2))


class Renamed(nnx.Module):
    def __init__(self) -> None:
        self.f = nnx.Linear(2, 2, rngs=nnx.Rngs(0))


def test_a_policy_beside_the_mapping_of_the_file(tmp_path: Path) -> None:
    linear = torch.nn.Linear(2, 2)
    source = torch.nn.ModuleDict({"l": linear})
    path = compare.save_checkpoint(
        tmp_path / "s.pth", source, mapping=compare.match(source, Renamed(), rename={"l": "f"})
    )
    with pytest.raises(CheckpointError, match="missing extra"):
        compare.load_checkpoint(path, More())
    model = compare.load_checkpoint(path, More(), policy={"extra": "ignore"})
    assert model.f.bias is not None
    assert np.array_equal(model.f.bias[...], linear.bias.detach().numpy())
    with pytest.raises(ValueError, match="there is no 'igmore'"):
        compare.load_checkpoint(path, source, policy={"x": "igmore"})  # type: ignore[dict-item]


def test_trained_in_the_file_and_not_in_the_module(tmp_path: Path) -> None:
    module = torch.nn.Module()
    module.register_buffer("w", torch.ones(2))
    path = compare.save_checkpoint(tmp_path / "s.pth", module)
    other = torch.nn.Module()
    other.w = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(
        CheckpointError, match="w: is a buffer in the file and a parameter in the module"
    ):
        compare.load_checkpoint(path, other)

    class Trained(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.zeros(2))

    with pytest.raises(CheckpointError, match="w: is a buffer in torch and a parameter in Flax"):
        compare.load_checkpoint(path, Trained())


@pytest.mark.parametrize("target", ["torch", "nnx"])
def test_a_cast_never_makes_infinity(target: str, tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "s.safetensors", {"weight": torch.full((2, 3), 1e10)})
    module: Any = torch.nn.Linear(3, 2, bias=False).half()
    if target == "nnx":
        module = nnx.Linear(3, 2, use_bias=False, param_dtype=jnp.float16, rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match=r"weight has numbers beyond float16; .*up to 1e\+10"):
        compare.load_checkpoint(path, module, cast=True)


def test_a_module_that_will_not_be_filled_is_left_as_it_was(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "s.pth", torch.nn.Linear(3, 3))
    module = torch.nn.Linear(3, 3)
    with torch.inference_mode():
        module.bias = torch.nn.Linear(3, 3).bias
    with pytest.raises(CheckpointError, match="the module's is an inference tensor"):
        compare.load_checkpoint(path, module)
    deep = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))

    def refuse(*_: Any) -> None:
        raise KeyError("not today")

    saved = compare.save_checkpoint(tmp_path / "deep.pth", deep)
    other = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    other[1].register_load_state_dict_pre_hook(refuse)
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="load_state_dict failed: KeyError: 'not today'"):
        compare.load_checkpoint(saved, other)
    assert all(torch.equal(tensor, before[key]) for key, tensor in other.state_dict().items())


class Late(torch.nn.Linear):
    """A layer whose own loading raises after torch's."""

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        raise KeyError("late")


def _with_post_hook() -> torch.nn.Module:
    def refuse(*_: Any) -> None:
        raise KeyError("late")

    module = torch.nn.Linear(3, 3)
    module.register_load_state_dict_post_hook(refuse)
    return module


def test_a_hook_that_takes_entries_or_replaces_them(tmp_path: Path) -> None:
    """What it takes is missed, and what it replaced before a failure is put back."""
    path = compare.save_checkpoint(tmp_path / "a.pth", torch.nn.Linear(2, 2))
    module = torch.nn.Linear(2, 2)
    before = module.weight
    values = before.detach().clone()
    handle = module.register_load_state_dict_pre_hook(
        lambda module, state, prefix, *_: state.pop(prefix + "weight")
    )
    with pytest.raises(CheckpointError, match="weight was not loaded; hooks give it another name"):
        compare.load_checkpoint(path, module)
    assert module.weight is before and torch.equal(before, values)
    handle.remove()

    def replace(module: Any, _keys: Any) -> None:
        module.weight = torch.nn.Parameter(module.weight.detach().clone())
        raise RuntimeError("late")

    module.register_load_state_dict_post_hook(replace)
    with pytest.raises(CheckpointError, match="late"):
        compare.load_checkpoint(path, module)
    assert module.weight is before and torch.equal(before, values)


class Odd(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(2))
        self.w = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


class Copies(Odd):
    def state_dict(self, *args: Any, **more: Any) -> Any:
        return {key: value.clone() for key, value in super().state_dict(*args, **more).items()}


class Raising(torch.nn.Parameter):
    def copy_(self, *_: Any) -> Any:
        raise RuntimeError("late")


def _fill_and_raise(module: Any, _keys: Any) -> None:
    module.cache.fill_(7)
    module.w.data = torch.ones(5)
    module.a.requires_grad_(False)
    raise RuntimeError("late")


def _after_the_copy(module: Any) -> None:
    true = module._load_from_state_dict

    def own(*args: Any) -> None:
        true(*args)
        raise RuntimeError("late")

    module._load_from_state_dict = own


ODD: dict[str, tuple[Any, Any]] = {
    "copies": (Copies, lambda m: m.register_load_state_dict_post_hook(_fill_and_raise)),
    "hook": (Odd, lambda m: m.register_load_state_dict_post_hook(_fill_and_raise)),
    "own method of one object": (Odd, _after_the_copy),
    "a parameter of its own class": (Odd, lambda m: setattr(m, "w", Raising(torch.zeros(2)))),
}


@pytest.mark.parametrize("name", ODD)
def test_a_failed_load_is_undone_whatever_raises(name: str, tmp_path: Path) -> None:
    make, prepare = ODD[name]
    module: Any = make()
    prepare(module)
    path = compare.save_checkpoint(tmp_path / "a.pth", {"a": torch.ones(2), "w": torch.ones(2)})
    with pytest.raises(CheckpointError, match="late"):
        compare.load_checkpoint(path, module)
    for tensor in (module.a, module.w, module.cache):
        assert torch.equal(tensor.detach().as_subclass(torch.Tensor), torch.zeros(2))
    assert module.a.requires_grad and module.w.requires_grad


def test_a_module_that_saves_under_other_names_is_not_half_loaded(tmp_path: Path) -> None:
    """Its hook renames what it saves, and nothing renames it back."""

    class Short(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(2, 1)
            self.register_state_dict_post_hook(self.shorten)

        @staticmethod
        def shorten(_module: Any, state: Any, *_: Any) -> None:
            for key in list(state):
                state[key.removeprefix("inner.")] = state.pop(key)

    path = compare.save_checkpoint(tmp_path / "a.pth", Short())
    with pytest.raises(CheckpointError, match="was not loaded; hooks give it another name"):
        compare.load_checkpoint(path, Short())


def test_mixed_dtypes_are_mended_one_by_one(tmp_path: Path) -> None:
    def two(one: torch.dtype, other: torch.dtype, *, trained: bool = True) -> Any:
        module: Any = torch.nn.Module()
        module.a = torch.nn.Parameter(torch.ones(1, dtype=one), trained)
        module.b = torch.nn.Parameter(torch.ones(1, dtype=other))
        return module

    path = compare.save_checkpoint(tmp_path / "a.pth", two(torch.complex64, torch.float16))
    module = two(torch.complex128, torch.float32)
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            compare.load_checkpoint(path, module)
        exec(caught.value.mend.split("`")[1], {"module": module, "torch": torch})
    compare.load_checkpoint(path, module)
    assert module.a.requires_grad and module.b.requires_grad
    module = two(torch.complex128, torch.float16, trained=False)
    with pytest.raises(CheckpointError) as caught:
        compare.load_checkpoint(path, module)
    exec(caught.value.mend.split("`")[1], {"module": module, "torch": torch})
    assert not module.a.requires_grad


def test_the_collections_of_a_foreign_file_say_what_is_a_buffer(tmp_path: Path) -> None:
    from flax import serialization

    variables = {"params": {"w": np.ones(2, "f4")}, "buffers": {"rope": np.full(2, 1 / 3, "f4")}}
    (tmp_path / "a.msgpack").write_bytes(serialization.msgpack_serialize(variables))
    convert_checkpoint(tmp_path / "a.msgpack", tmp_path / "b.msgpack", dtype="float16")
    restored = serialization.msgpack_restore((tmp_path / "b.msgpack").read_bytes())
    assert restored["params"]["w"].dtype == np.float16
    assert restored["buffers"]["rope"].dtype == np.float32
    mapping = compare.match({"w": torch.ones(2), "rope": torch.ones(2)}, variables)
    convert_checkpoint(tmp_path / "a.msgpack", tmp_path / "c.pth", mapping=mapping, dtype="float16")
    assert (
        compare.verify_checkpoint(
            tmp_path / "a.msgpack", tmp_path / "c.pth", mapping=mapping, dtype="float16"
        )
        == []
    )


@pytest.mark.parametrize("make", [_with_post_hook, lambda: Late(3, 3)])
def test_code_that_raises_after_the_load_undoes_it(
    make: Callable[[], torch.nn.Module], tmp_path: Path
) -> None:
    saved = compare.save_checkpoint(tmp_path / "s.pth", torch.nn.Linear(3, 3))
    module = make()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(CheckpointError, match="load_state_dict failed: KeyError: 'late'"):
        compare.load_checkpoint(saved, module)
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("name", ["x\0.pth", "x" * 300 + ".pth", "loop.pth"])
def test_paths_that_cannot_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    for attempt in (
        lambda path: compare.save_checkpoint(path, {"x": torch.ones(1)}),
        compare.read_checkpoint,
        lambda path: convert_checkpoint(path, tmp_path / "y.pth"),
    ):
        with pytest.raises(CheckpointError, match=r"is not a valid path|could not be"):
            attempt(f"{tmp_path}/{name}")


def test_lazy_layers_and_dicts_that_are_no_variables(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "s.pth", torch.nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match="a lazy layer has no values yet"):
        compare.save_checkpoint(tmp_path / "lazy.pth", torch.nn.LazyLinear(3))
    with pytest.raises(CheckpointError, match="weight: a lazy layer has no values yet"):
        compare.load_checkpoint(path, torch.nn.LazyLinear(3))
    with pytest.raises(TypeError, match="or a torch module instead of its state dict"):
        compare.load_checkpoint(path, torch.nn.Linear(3, 3).state_dict())
    template = {"params": {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}}
    for variables in (MappingProxyType(template), freeze(template)):
        loaded = compare.load_checkpoint(path, variables)
        assert loaded["params"]["kernel"].shape == (3, 3)
    deep: Any = jnp.ones(1)
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(CheckpointError, match="nested too deeply"):
        compare.save_checkpoint(tmp_path / "deep.msgpack", deep)
    for source in ({"params": {"a": 1.0}}, {"model": {"x": torch.ones(1)}, "epoch": 3}):
        with pytest.raises(CheckpointError, match=r"expected an array|not an array"):
            compare.save_checkpoint(tmp_path / "no.msgpack", source)


def test_an_nnx_state_as_orbax_has_it(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    model = One()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
    fresh = One()
    assert model.x.bias is not None and fresh.x.bias is not None
    fresh.x.bias[...] = jnp.ones(3)
    compare.load_checkpoint(tmp_path / "state", fresh)
    assert np.array_equal(fresh.x.bias[...], model.x.bias[...])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest["tensors"][0].update(path=[0]), "which is not a torch name"),
        (
            lambda manifest: manifest["tensors"][0].update(path=["a", "b"]),
            "which is not a torch name",
        ),
        (
            lambda manifest: manifest["mapping"].update(left=[["x", "zero:0/0", None]]),
            "is left out with the policy",
        ),
        (
            lambda manifest: manifest["mapping"]["rows"][0].update(layout="flatten:-1,-3"),
            "needs numbers",
        ),
        (lambda manifest: manifest["mapping"]["rows"][1].update(part=[1]), "not a valid mapping"),
    ],
)
def test_manifests_that_lie(change: Any, message: str, tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "s.safetensors", {"W_key.weight": torch.ones(2, 2)})
    with open_checkpoint(path) as stored:
        assert stored.manifest is not None
        content = json.loads(stored.manifest.dumps())
    change(content)
    with pytest.raises(ValueError, match=message):
        Manifest.loads(sealed(without_seal(content)), tmp_path, Budget())
    assert objection("zero:2/3", np.ones(())) == "has shape (), which cannot be split into 3 parts"


class Listed(nnx.Module):
    """A model with a list of layers, so that its paths contain numbers."""

    def __init__(self, seed: int) -> None:
        self.h = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(seed))])


@pytest.mark.parametrize("suffix", [".msgpack", ".orbax"])
def test_a_mapping_with_numbers_fits_a_file_with_words(suffix: str, tmp_path: Path) -> None:
    """Files that Flax and Orbax write have "0" where a list of NNX has 0."""
    model, module = Listed(0), torch.nn.Module()
    module.h = torch.nn.ModuleList([torch.nn.Linear(2, 3)])
    path = tmp_path / f"plain{suffix}"
    if suffix == ".msgpack":
        path.write_bytes(serialization.to_bytes(nnx.to_pure_dict(nnx.state(model))))
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, nnx.state(model))
    mapping, kernel = compare.match(module, model), np.asarray(model.h[0].kernel[...])
    assert np.array_equal(compare.read_checkpoint(path, mapping=mapping)["h.0.weight"], kernel.T)
    loaded: Any = compare.load_checkpoint(path, module, mapping=mapping)
    assert np.array_equal(loaded.h[0].weight.detach(), kernel.T)
    convert_checkpoint(path, tmp_path / "converted.pth", mapping=mapping)
    loaded = compare.load_checkpoint(tmp_path / "converted.pth", Listed(1))
    assert np.array_equal(loaded.h[0].kernel[...], kernel)


def test_verify_pairs_what_loading_pairs(tmp_path: Path) -> None:
    """Linen and NNX pair by name; torch and Flax pair as `match` does, without any option."""
    model, module = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), torch.nn.Linear(2, 3)
    kernel = model.kernel[...]
    assert model.bias is not None
    linen = compare.save_checkpoint(
        tmp_path / "a.msgpack", {"params": {"kernel": kernel, "bias": model.bias[...]}}
    )
    paths = [linen, compare.save_checkpoint(tmp_path / "b.orbax", model)]
    torch.save(compare.load_checkpoint(linen, module).state_dict(), tmp_path / "c.pth")
    paths.append(tmp_path / "c.pth")
    other = compare.save_checkpoint(
        tmp_path / "d.msgpack", {"params": {"kernel": kernel + 1, "bias": model.bias[...]}}
    )
    for path in paths:
        assert [verify_checkpoint(path, second) for second in paths] == [[], [], []]
        assert [difference.what.split()[0] for difference in verify_checkpoint(path, other)] == [
            "differs"
        ]


@pytest.mark.parametrize("name", FLOAT8)
def test_float8_is_cast_like_any_float(name: str, tmp_path: Path) -> None:
    kernel = np.array([[1, 2, 0.5], [4, 0.25, 8]], numpy_dtype(name))
    path = compare.save_checkpoint(tmp_path / "state.msgpack", {"params": {"kernel": kernel}})
    target = {"params": {"kernel": jnp.zeros((2, 3))}}
    convert_checkpoint(path, tmp_path / "cast.msgpack", dtype="float32")
    for variables in (
        compare.load_checkpoint(path, target, cast=True),
        compare.load_checkpoint(tmp_path / "cast.msgpack", target),
    ):
        assert variables["params"]["kernel"].dtype == np.float32
        assert np.array_equal(variables["params"]["kernel"], kernel.astype(np.float32))


def test_what_users_try_first_is_told_the_way(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    path = compare.save_checkpoint(tmp_path / "hub/model.safetensors", {"x": torch.ones(3)})
    (tmp_path / "other").mkdir()
    compare.save_checkpoint(tmp_path / "other/mine.safetensors", {"x": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"no _METADATA.*give .*other/mine.safetensors"):
        compare.read_checkpoint(tmp_path / "other")
    with ocp.CheckpointManager(tmp_path / "manager") as manager:
        for step in (9, 10):
            manager.save(step, args=ocp.args.StandardSave({"params": {"x": np.ones(3)}}))
    with pytest.raises(CheckpointError, match=r"give .*manager/10/default"):
        compare.read_checkpoint(tmp_path / "manager")
    (tmp_path / "state.msgpack").write_bytes(
        serialization.to_bytes({"step": 3, "params": {"x": np.ones(3)}})
    )
    with pytest.raises(CheckpointError, match=r"step: is an int.*pass select='params'"):
        compare.read_checkpoint(tmp_path / "state.msgpack")
    torch.save({"model": {"x": torch.ones(3)}, "epoch": 3}, tmp_path / "training.pth")
    with pytest.raises(CheckpointError, match=r"model is a dict.*pass select='model'"):
        compare.read_checkpoint(tmp_path / "training.pth")
    with pytest.raises(
        CheckpointError, match=r"would be a folder of shards.*name it without a suffix"
    ):
        convert_checkpoint(path, tmp_path / "new.msgpack", shard_bytes=8)
    with pytest.raises(TypeError, match=r"mapping is a dict; expected what `compare.match` or"):
        compare.load_checkpoint(path, torch.nn.Linear(2, 3), mapping={"a": "b"})  # type: ignore[call-overload]
