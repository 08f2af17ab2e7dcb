"""Loading returns the saved bits in every format: awkward values, names, views and ties."""

import hashlib
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis.extra import numpy as hnp

import compare
from compare.checkpoint import blocks
from compare.checkpoint.convert import convert_checkpoint
from compare.checkpoint.errors import CheckpointError, UnverifiedCheckpoint
from compare.checkpoint.formats import format_of, open_checkpoint, safetensors
from compare.checkpoint.manifest import checksum
from compare.checkpoint.reader import PART_BYTES
from compare.checkpoint.tensors import Tensors, spec_of, tensors_of
from compare.checkpoint.verify import verify_checkpoint
from compare.conversion.mapping import Policy, Row, StateMapping
from compare.dtypes import DTYPES, numpy_dtype
from compare.files.writing import NO_RULES
from compare.proof.cases import PRIME_BIAS
from compare.runners.run import linen_template

from ..support import same_bits, torch_module
from .faults import change_manifest

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies

SUFFIXES = (".pth", ".safetensors", ".msgpack", ".orbax")
BITS = np.random.default_rng(0).integers(0, 256, 16 * 7 * 3, dtype=np.uint8)


def held(arrays: dict[tuple[Any, ...], np.ndarray], layout: Any) -> Tensors:
    return tensors_of(layout, arrays)


def through(
    path: Path, arrays: dict[tuple[Any, ...], np.ndarray]
) -> dict[tuple[Any, ...], np.ndarray]:
    """Write the arrays and read them back.

    If the format knows only torch names, the paths are joined to names.
    """
    chosen = format_of(path)
    torch_names = chosen.layouts == ("torch",)
    named = (
        {("/".join(map(str, key)),): array for key, array in arrays.items()}
        if torch_names
        else arrays
    )
    chosen.write(path, held(named, "torch" if torch_names else "nnx"), NO_RULES)
    with open_checkpoint(path) as stored:
        assert stored.checked
        arrays_read = dict(stored.read())
    return {key: arrays_read[name] for key, name in zip(arrays, named, strict=True)}


def of_dtype(dtype: str) -> np.ndarray:
    """A 7x3 array of random bits, with NaN payloads, -0.0 and subnormal numbers."""
    kind = numpy_dtype(dtype)
    if dtype == "bool":
        return (BITS[:21] % 2).astype(bool).reshape(7, 3)
    return BITS[: 21 * kind.itemsize].copy().view(kind).reshape(7, 3)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_keeps_every_bit(dtype: str, suffix: str, tmp_path: Path) -> None:
    if (suffix, dtype) == (".safetensors", "complex128"):
        with pytest.raises(
            CheckpointError, match=r"which safetensors lacks.*save it as .pth, .msgpack or .orbax"
        ):
            through(tmp_path / "state.safetensors", {("x",): of_dtype(dtype)})
        return
    loaded = through(tmp_path / f"state{suffix}", {("x",): of_dtype(dtype)})
    assert same_bits(loaded[("x",)], of_dtype(dtype))


VIEWS: dict[str, np.ndarray] = {
    "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "strided": np.arange(12, dtype=np.float32)[::2],
    "negative stride": np.arange(12, dtype=np.float32)[::-1],
    "big-endian": np.arange(12, dtype=">f4"),
    "expanded": np.broadcast_to(np.float32(3), (4, 5)),
    "read-only": np.frombuffer(np.arange(6, dtype=np.float32).tobytes(), np.float32),
    "0-d": np.array(2.5, np.float32),
    "one": np.zeros((1, 1, 1), np.float32),
    "large transposed": np.arange(3_000_000, dtype=np.float32).reshape(1500, 2000).T,
    "large reversed": np.arange(3_000_000, dtype=np.uint16).reshape(1000, 3000)[::-1],
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", VIEWS)
def test_any_view_is_saved_as_it_looks(name: str, suffix: str, tmp_path: Path) -> None:
    """The plain libraries do not save every view correctly.

    `safetensors.numpy.save_file` 0.8.0 writes a transposed view in memory order, and Flax's msgpack
    writes a big-endian array in its byte order.
    """
    loaded = through(
        tmp_path / f"state{suffix}", {("x",): VIEWS[name], ("y",): np.ones(2, np.int8)}
    )
    native = VIEWS[name].astype(VIEWS[name].dtype.newbyteorder("="))
    assert same_bits(loaded[("x",)], np.array(native, order="C"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_tensors(suffix: str, tmp_path: Path) -> None:
    arrays = {("x",): np.zeros((0, 3), np.float32), ("y",): np.ones(2, np.float32)}
    if suffix == ".orbax":
        with pytest.raises(CheckpointError, match=r"Orbax cannot store arrays without elements: x"):
            through(tmp_path / "state.orbax", arrays)
    else:
        assert through(tmp_path / f"state{suffix}", arrays)[("x",)].shape == (0, 3)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_name(suffix: str, tmp_path: Path) -> None:
    names = [
        ("höher", "層"),
        ("a b", "c.d"),
        ("x", 0),
        ("x", 10),
        ("x", 2),
        ("__metadata", "é\u202e"),
    ]
    arrays = {name: np.full(3, index, np.float32) for index, name in enumerate(names)}
    loaded = through(tmp_path / f"state{suffix}", arrays)
    assert list(loaded) == names, (
        "numbers in paths do not come back as numbers, or in another order"
    )
    assert all(same_bits(loaded[name], arrays[name]) for name in names)


def test_names_that_would_coincide_are_refused(tmp_path: Path) -> None:
    one, two = np.zeros(2, np.float32), np.ones(2, np.float32)
    for suffix in (".msgpack", ".orbax"):
        with pytest.raises(
            CheckpointError,
            match=r"the same when written as strings|two names would be the same",
        ):
            through(tmp_path / f"state{suffix}", {("x", 0): one, ("x", "0"): two})
        with pytest.raises(CheckpointError, match="lies within another array"):
            through(tmp_path / f"state{suffix}", {("x",): one, ("x", "y"): two})
    with pytest.raises(CheckpointError, match="is empty or looks like a path"):
        through(tmp_path / "state.safetensors", {("b/c",): one, ("b", "c"): two})
    with pytest.raises(CheckpointError, match="is reserved by the format"):
        through(tmp_path / "state.safetensors", {("__metadata__",): one})
    assert not list(tmp_path.iterdir())


@given(
    hnp.arrays(
        st.sampled_from(
            [
                np.dtype(name)
                for name in ("f8", "f4", "f2", "i8", "u1", "?", "c8", ml_dtypes.bfloat16)
            ]
        ),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
        elements=st.integers(0, 1),
        fill=st.nothing(),
    ),
    st.permutations(range(4)),
)
def test_any_array_through_safetensors(
    tmp_path_factory: Any, array: np.ndarray, order: list[int]
) -> None:
    view = array.transpose([axis for axis in order if axis < array.ndim])
    path = tmp_path_factory.mktemp("drawn") / "state.safetensors"
    loaded = through(path, {("x",): view, ("y",): array})
    assert same_bits(loaded[("x",)], np.array(view, order="C"))
    assert same_bits(loaded[("y",)], array)


class Tied(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))


class NnxTied(nnx.Module):
    def __init__(self, seed: int) -> None:
        self.embed = nnx.Embed(4, 3, rngs=nnx.Rngs(seed))
        self.scale = nnx.BatchStat(jnp.ones(()))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_tied_weight_is_read_once_and_tied_again(suffix: str, tmp_path: Path) -> None:
    source, target, model = Tied(1), Tied(2), NnxTied(3)
    mapping = compare.match(source, model)
    path = compare.save_checkpoint(tmp_path / f"state{suffix}", source, mapping=mapping)
    with open_checkpoint(path) as stored:
        assert len(stored.specs) == 2
    compare.load_checkpoint(path, target)
    assert torch.equal(target.head.weight, source.embed.weight)
    assert target.head.weight is target.embed.weight
    compare.load_checkpoint(path, model)
    assert np.array_equal(model.embed.embedding[...], source.embed.weight.detach().numpy())
    state = compare.read_checkpoint(path)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    back = compare.save_checkpoint(tmp_path / f"model{suffix}", model, mapping=mapping)
    compare.load_checkpoint(back, Tied(4))


@pytest.mark.filterwarnings("ignore::compare.checkpoint.errors.UnverifiedCheckpoint")
def test_names_that_a_module_ties_must_agree(tmp_path: Path) -> None:
    apart = {**Tied(1).state_dict(), "head.weight": torch.zeros(4, 3)}
    target, before = Tied(2), Tied(2).embed.weight
    with pytest.raises(
        CheckpointError, match=r"head.weight: is tied to embed.weight in the module, and has other"
    ):
        compare.load_checkpoint(
            compare.save_checkpoint(tmp_path / "state.safetensors", apart), target
        )
    assert torch.equal(target.embed.weight, before)
    lone = {key: tensor for key, tensor in Tied(1).state_dict().items() if key != "head.weight"}
    compare.load_checkpoint(compare.save_checkpoint(tmp_path / "lone.safetensors", lone), target)
    assert torch.equal(target.head.weight, Tied(1).embed.weight)
    from safetensors.torch import save_model

    save_model(Tied(5), str(tmp_path / "model.safetensors"))
    compare.load_checkpoint(tmp_path / "model.safetensors", target)
    assert torch.equal(target.head.weight, Tied(5).embed.weight)
    assert "head.weight" in compare.read_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize("bytes_each", [30, 40, 10**6])
def test_our_msgpack_is_flaxs(
    bytes_each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunks of large arrays are Flax's too; Flax splits arrays above 1 GiB."""
    from flax import serialization

    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", bytes_each)
    arrays = {
        ("a", "b"): VIEWS["transposed"],
        ("a", "c"): np.zeros((0, 2), np.float32),
        ("d",): of_dtype("bfloat16"),
    }
    ours = through(tmp_path / "state.msgpack", arrays)
    theirs = serialization.msgpack_restore((tmp_path / "state.msgpack").read_bytes())
    tree = {"a": {"b": arrays[("a", "b")], "c": arrays[("a", "c")]}, "d": arrays[("d",)]}
    (tmp_path / "theirs.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    with open_checkpoint(tmp_path / "theirs.msgpack") as stored:
        back = dict(stored.read())
    for path, array in arrays.items():
        plain = theirs[path[0]] if len(path) == 1 else theirs[path[0]][path[1]]
        for other in (ours[path], back[path], plain):
            assert same_bits(np.asarray(other), np.array(array, order="C"))


def test_tied_names_are_all_in_the_librarys_state_dict(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = Tied(1)
    path = compare.save_checkpoint(tmp_path / "tied.safetensors", source)
    convert_checkpoint(path, tmp_path / "shards", shard_bytes=1)
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    state = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    for plain in (load_file(path), state):
        target = Tied(2)
        target.load_state_dict(plain)
        assert torch.equal(target.head.weight, source.embed.weight)
    for checkpoint in (path, tmp_path / "shards"):
        back = compare.read_checkpoint(checkpoint)
        assert back["head.weight"] is back["embed.weight"], "still tied"
        assert verify_checkpoint(checkpoint, path) == []


def test_a_damaged_copy_of_a_tied_tensor_is_named(tmp_path: Path) -> None:
    source = Tied(1)
    path = compare.save_checkpoint(tmp_path / "tied.safetensors", source)
    data = bytearray(path.read_bytes())
    values = source.embed.weight.detach().numpy().tobytes()
    first = data.index(values)
    second = data.index(values, first + 1)
    for begin in (first, second):
        damaged = bytearray(data)
        damaged[begin + 5] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match=r"the values of (embed|head)\.weight are not those"
        ):
            compare.load_checkpoint(path, Tied(3))


def test_a_file_without_a_manifest_says_so(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "state.pth")
    with pytest.warns(UnverifiedCheckpoint, match="has no manifest"):
        compare.read_checkpoint(tmp_path / "state.pth")


def test_our_safetensors_are_the_librarys(tmp_path: Path) -> None:
    """The library reads every tensor and writes the same data in the same order."""
    from safetensors.torch import load_file, save

    state = {
        "b": torch.ones(3, dtype=torch.int8),
        "a": torch.arange(4.0),
        "c": torch.ones(2, dtype=torch.bfloat16),
    }
    path = compare.save_checkpoint(tmp_path / "state.safetensors", state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in load_file(path).items())
    ours, theirs = path.read_bytes(), save(state)
    length = int.from_bytes(theirs[:8], "little")
    assert ours.endswith(theirs[8 + length :])
    assert len(ours) % 8 == len(theirs) % 8
    assert safetensors._DTYPES.keys() == set(DTYPES) - {"complex128"}


def test_a_reader_keeps_what_it_opened(tmp_path: Path) -> None:
    """If the file is replaced while open, the reader returns the old values.

    If the file is cut, the reader raises an error and does not crash.
    """
    path = compare.save_checkpoint(tmp_path / "state.safetensors", {"x": torch.zeros(PART_BYTES)})
    with open_checkpoint(path) as stored:
        compare.save_checkpoint(path, {"x": torch.ones(PART_BYTES)})
        ((_, array),) = stored.read()
        assert not array.any()
    with open_checkpoint(path) as stored:
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size - 2000)
        for stored.mapped in (False, True):
            with pytest.raises(CheckpointError, match="fewer: it was cut after it was opened"):
                list(stored.read())
    with pytest.raises(ValueError, match="the checkpoint is closed"):
        list(stored.read())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".msgpack", ".orbax", ""])
def test_reading_ends_with_the_checkpoint(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No read continues after the close, because the descriptor may then be another file's."""
    monkeypatch.setattr(blocks, "BATCH_BYTES", 1)
    tree = {name: np.full(5, index, np.float32) for index, name in enumerate("abc")}
    tensors = {name: torch.from_numpy(array) for name, array in tree.items()}
    source: Any = {"params": tree} if suffix in (".msgpack", ".orbax") else tensors
    path = compare.save_checkpoint(tmp_path / f"first{suffix or '.safetensors'}", source)
    if not suffix:
        convert_checkpoint(path, tmp_path / "shards", shard_bytes=8)
        path = tmp_path / "shards"
    with open_checkpoint(path) as stored:
        entries = stored.read()
        next(entries)
    with open_checkpoint(path), pytest.raises(ValueError, match="the checkpoint is closed"):
        next(entries)


def test_a_mapped_torch_file_that_is_removed_stays_readable(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "state.pth", {"x": torch.ones(PART_BYTES)})
    with open_checkpoint(path) as stored:
        path.unlink()
        stored.mapped = True
        ((_, array),) = stored.read()
        assert array.all()


def test_a_large_tensor_is_checked_and_copied_where_it_lies(tmp_path: Path) -> None:
    module = torch.nn.Linear(600, 1000)
    assert module.weight.nbytes > PART_BYTES
    path = compare.save_checkpoint(tmp_path / "state.safetensors", module)
    raw = path.read_bytes()
    loaded = compare.load_checkpoint(path, torch.nn.Linear(600, 1000))
    assert torch.equal(loaded.weight, module.weight)
    with torch.no_grad():
        loaded.weight.zero_()
    assert path.read_bytes() == raw
    path.write_bytes(raw[:-1000] + bytes([raw[-1000] ^ 1]) + raw[-999:])
    with pytest.raises(CheckpointError, match="are not those that were saved; expected crc32"):
        compare.load_checkpoint(path, loaded)
    assert not loaded.weight.any()


def test_a_manifest_of_version_1_is_checked_too(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)

    def older(manifest: dict[str, Any], values: bytes = tensor.numpy().tobytes()) -> None:
        manifest["version"] = 1
        for entry in manifest["tensors"]:
            entry.pop("crc32", None)
            entry["sha256"] = hashlib.sha256(b"float32[6]" + values).hexdigest()

    path = compare.save_checkpoint(tmp_path / "state.safetensors", {"x": tensor})
    change_manifest(path, older)
    assert torch.equal(compare.read_checkpoint(path)["x"], tensor)
    change_manifest(path, lambda manifest: older(manifest, bytes(24)))
    with pytest.raises(CheckpointError, match="are not those that were saved; expected sha256"):
        compare.read_checkpoint(path)


def test_the_checksum_is_that_of_python() -> None:
    """An installation without the fast library can then also check the file."""
    pieces = [np.arange(100_000, dtype=np.float32), np.ones(3, np.float32)]
    spec = spec_of(np.concatenate(pieces))
    expected = zlib.crc32(b"".join(map(np.ndarray.tobytes, pieces)), zlib.crc32(b"float32[100003]"))
    assert checksum(pieces, spec) == f"{expected:08x}"


@pytest.mark.parametrize("suffix", (".pth", ".safetensors"))
def test_views_of_torch_tensors(suffix: str, tmp_path: Path) -> None:
    """Each view is saved by its values, without the rest of its storage."""
    whole = torch.arange(1_000_000.0).view(1000, 1000)
    state = {
        **{"transposed": whole[:3, :4].T, "upper": whole[:2, :2], "lower": whole[1:3, :2]},
        **{"conjugate": torch.tensor([1 + 2j]).conj(), "expanded": torch.ones(1, 3).expand(5, 3)},
    }
    path = compare.save_checkpoint(tmp_path / f"state{suffix}", state)
    assert path.stat().st_size < 10_000
    loaded = compare.read_checkpoint(path)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_a_folder_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.orbax").symlink_to(through_orbax(tmp_path / "real.orbax"))
    with open_checkpoint(tmp_path / "link.orbax") as stored:
        assert dict(stored.read())[("x",)].tolist() == [1.0, 1.0]


def through_orbax(path: Path) -> Path:
    through(path, {("x",): np.ones(2, np.float32)})
    return path


def test_abstract_leaves_are_not_saved(tmp_path: Path) -> None:
    template = {"params": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}
    for suffix in (".safetensors", ".msgpack", ".orbax"):
        with pytest.raises(
            CheckpointError, match="params/kernel: is a ShapeDtypeStruct, not an array of values"
        ):
            compare.save_checkpoint(tmp_path / f"state{suffix}", template)
    with pytest.raises(CheckpointError, match="weight: a meta tensor has no values"):
        compare.save_checkpoint(tmp_path / "state.pth", torch.nn.Linear(2, 3, device="meta"))
    assert not list(tmp_path.iterdir())


def test_saving_onto_what_was_just_loaded(tmp_path: Path) -> None:
    for suffix in (".pth", ".safetensors"):
        path = compare.save_checkpoint(tmp_path / f"state{suffix}", {"x": torch.arange(9.0)})
        compare.save_checkpoint(path, compare.read_checkpoint(path))
        assert torch.equal(compare.read_checkpoint(path)["x"], torch.arange(9.0))


def test_casting_is_only_by_name(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    module.register_buffer("mask", torch.tensor([[0.0, 1e-30], [2.0, 0.0]]))
    path = compare.save_checkpoint(tmp_path / "wide.safetensors", module)
    convert_checkpoint(path, tmp_path / "half.safetensors", dtype="float16")
    assert verify_checkpoint(path, tmp_path / "half.safetensors", dtype="float16") == []
    assert {entry.name for entry in verify_checkpoint(path, tmp_path / "half.safetensors")} == {
        "weight",
        "bias",
    }
    half = compare.read_checkpoint(tmp_path / "half.safetensors")
    assert half["weight"].dtype == torch.float16
    assert torch.equal(half["mask"], module.get_buffer("mask")), "the mask was cast: 1e-30 blocks"
    with pytest.raises(
        CheckpointError, match=r"weight: is torch.float16; the module has torch.float32"
    ):
        compare.load_checkpoint(tmp_path / "half.safetensors", module)
    compare.load_checkpoint(tmp_path / "half.safetensors", module, cast=True)
    assert torch.equal(module.weight, half["weight"].float())
    with pytest.raises(
        CheckpointError,
        match=r"x has numbers beyond float16; .*up to 1e\+06: choose float64 or float32 or",
    ):
        convert_checkpoint(
            compare.save_checkpoint(tmp_path / "big.pth", {"x": torch.tensor([1e6])}),
            tmp_path / "no.pth",
            dtype="float16",
        )
    with pytest.raises(CheckpointError, match=r"cannot be cast to int8: choose one of float64"):
        convert_checkpoint(path, tmp_path / "no.pth", dtype="int8")
    assert not (tmp_path / "no.pth").exists()


def test_a_cast_to_a_dtype_that_torch_lacks_keeps_the_files(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "a.pth", torch_module())
    narrow = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float8_e3m4),
        linen_template(PRIME_BIAS, buffer=True),
    )
    loaded = compare.load_checkpoint(path, narrow, cast=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded)} == {"float32"}


def test_a_policy_says_what_may_be_missing_or_left_over(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    module.register_buffer("mask", torch.triu(torch.ones(2, 2), 1))
    path = compare.save_checkpoint(
        tmp_path / "state.safetensors",
        {
            "weight": torch.ones(2, 2),
            "bias": torch.ones(2),
            "extra": torch.zeros(3),
            "attn.bias": torch.ones(2, 2).tril(),
        },
    )
    allowed: dict[str, Policy] = {"extra": "ignore", "attn.bias": "verify", "mask": "verify"}
    for left_out in allowed:
        with pytest.raises(CheckpointError, match=left_out):
            compare.load_checkpoint(
                path, module, policy={key: allowed[key] for key in allowed if key != left_out}
            )
    compare.load_checkpoint(path, module, policy=allowed)
    assert float(module.weight.detach().sum()) == 4.0
    module.get_buffer("mask")[1, 0] = 1.0
    with pytest.raises(CheckpointError, match="missing mask"):
        compare.load_checkpoint(path, module, policy=allowed)


@pytest.mark.parametrize("suffix", [".msgpack", ".orbax", ".safetensors"])
def test_collections_with_one_name(suffix: str, tmp_path: Path) -> None:
    """Each comes back to its own; one that the target lacks is named."""
    one, two = jnp.full(3, 1.0), jnp.full(3, 2.0)
    variables = {"params": {"scale": one}, "ema": {"scale": two}}
    path = compare.save_checkpoint(tmp_path / f"a{suffix}", variables)
    empty = jax.tree.map(jnp.zeros_like, variables)
    loaded = compare.load_checkpoint(path, empty)
    assert loaded["params"]["scale"].tolist() == [1, 1, 1]
    assert loaded["ema"]["scale"].tolist() == [2, 2, 2]
    with pytest.raises(compare.CheckpointError, match="unexpected ema/scale"):
        compare.load_checkpoint(path, {"params": empty["params"]})


def test_linen_and_nnx_read_each_others_files(tmp_path: Path) -> None:
    from flax import linen as nn

    linen, model = nn.Dense(3), nnx.Linear(2, 3, rngs=nnx.Rngs(1))
    variables = linen.init(jax.random.key(0), jnp.ones((1, 2)))
    for suffix in (".safetensors", ".msgpack", ".orbax"):
        compare.load_checkpoint(
            compare.save_checkpoint(tmp_path / f"linen{suffix}", variables), model
        )
        assert np.array_equal(model.kernel[...], variables["params"]["kernel"])
        model.kernel[...] += 1.0
        loaded = compare.load_checkpoint(
            compare.save_checkpoint(tmp_path / f"nnx{suffix}", model), variables
        )
        assert np.array_equal(loaded["params"]["kernel"], model.kernel[...])
        wrong = {"params": variables["params"], "buffers": {"mask": jnp.ones(2)}}
        with pytest.raises(
            CheckpointError,
            match=r"missing mask: the source has nothing for buffers/mask \(2,\)",
        ):
            compare.load_checkpoint(tmp_path / f"nnx{suffix}", wrong)
        trained = {"buffers": variables["params"]}
        with pytest.raises(
            CheckpointError, match="is a parameter in the file and a buffer in the target"
        ):
            compare.load_checkpoint(tmp_path / f"linen{suffix}", trained)


def test_what_says_nothing_of_the_other_framework_is_refused(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "state.safetensors", torch.nn.Linear(2, 3))
    with pytest.raises(
        CheckpointError, match=r"does not say how its names pair .*: give --map FILE, or --like"
    ):
        convert_checkpoint(path, tmp_path / "state.msgpack")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    like = compare.save_checkpoint(tmp_path / "like.orbax", model)
    done = convert_checkpoint(path, tmp_path / "state.msgpack", like=like)
    assert {(line.source, line.target) for line in done.lines} == {
        ("weight", "kernel"),
        ("bias", "bias"),
    }
    with pytest.raises(CheckpointError, match="does not pair with"):
        convert_checkpoint(
            compare.save_checkpoint(tmp_path / "x.pth", {"x": torch.ones(1)}),
            tmp_path / "y.msgpack",
            like=like,
        )
    with pytest.raises(CheckpointError, match="has the torch layout, as the source has"):
        convert_checkpoint(path, tmp_path / "y.msgpack", like=path)
    wrong = StateMapping((Row("weight", ("params", "kernel")), Row("gone", ("params", "bias"))))
    with pytest.raises(
        CheckpointError, match=r"(?s)does not fit the mapping.*missing gone.*unexpected bias"
    ):
        convert_checkpoint(path, tmp_path / "y.msgpack", mapping=wrong)
    assert not (tmp_path / "y.msgpack").exists()
