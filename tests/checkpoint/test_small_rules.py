"""Small rules of the files, each where it makes a difference."""

import copy
import json
import os
import pickle
import re
import struct
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax.serialization import msgpack_restore, msgpack_serialize
from flax.training import train_state
from safetensors.numpy import save_file

import compare
from compare.checkpoint.errors import CheckpointError
from compare.checkpoint.formats import open_checkpoint, parts, torch_pickle, zip_directory
from compare.checkpoint.formats.msgpack_tree import TreeReader
from compare.checkpoint.load import _snapshot, steady
from compare.checkpoint.manifest import Manifest
from compare.checkpoint.reader import PART_BYTES, Reader
from compare.checkpoint.transforms import _new_copies, relaid
from compare.checkpoint.verify import compare_checkpoints
from compare.conversion.errors import Mismatch, MismatchEntry
from compare.conversion.mapping import LINEN, Row, StateMapping
from compare.files.memory import Budget
from compare.files.reading import InputFile

from ..support import torch_module
from .test_transforms import HERE, arrays

pytestmark = pytest.mark.filterwarnings("ignore::compare.UnverifiedCheckpoint")
ONE = np.ones(1, np.float32)


def test_our_attention_in_a_plain_file_needs_no_mapping(tmp_path: Path) -> None:
    module = torch_module()
    torch.save(module.state_dict(), tmp_path / "a.pth")
    compare.convert_checkpoint(tmp_path / "a.pth", tmp_path / "a.msgpack")
    restored = msgpack_restore((tmp_path / "a.msgpack").read_bytes())
    (tmp_path / "plain.msgpack").write_bytes(msgpack_serialize(restored))
    compare.convert_checkpoint(tmp_path / "plain.msgpack", tmp_path / "b.pth")
    state = compare.read_checkpoint(tmp_path / "b.pth")
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())


def nested(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + b"\xc0"


def test_500_levels_of_msgpack_are_read(tmp_path: Path) -> None:
    path = tmp_path / "deep.msgpack"
    for depth, is_read in ((500, True), (501, False)):
        path.write_bytes(nested(depth))
        with closing(InputFile(path)) as file:
            reader = TreeReader(file, Budget(None), "")
            if is_read:
                reader.read()
            else:
                with pytest.raises(ValueError, match="nested too deeply"):
                    reader.read()


@pytest.mark.parametrize("leaf", ["text", [1, 2]])
def test_a_leaf_that_is_no_array_is_named(leaf: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.msgpack"
    path.write_bytes(msgpack.packb({"params": {"a": leaf}}))
    with pytest.raises(CheckpointError) as refused:
        compare.read_checkpoint(path)
    assert refused.value.key == "params/a"
    assert refused.value.expected == "an array of values"


def test_the_search_for_parts_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_MAX_NODES", 3)
    tree: dict[str, Any] = {"state": {"w": 1}, "epoch": 1, "step": 2}
    assert parts._states(tree, lambda node: "w" in node) == ["state"]
    assert parts._states({**tree, "more": 3}, lambda node: "w" in node) == []


def test_metadata_that_does_not_fit_is_not_read(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "a.orbax", {"params": {"a": ONE}})
    with (path / "more.json").open("wb") as file:
        os.truncate(file.fileno(), 400_000_000)
    with (
        pytest.raises(CheckpointError, match=r"more\.json"),
        open_checkpoint(path, 300_000_000),
    ):
        pass


def test_an_index_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(CheckpointError, match=r"index\.json is not a regular file"):
        compare.read_checkpoint(tmp_path)


def built(raw: bytes) -> Any:
    return torch_pickle.build(raw, Path("a.pth"), Budget(None))[0]


def test_an_old_pickle_has_short_texts() -> None:
    assert built(b"\x80\x02U\x03abc.") == "abc"
    with pytest.raises(torch_pickle.UnsafePickleError, match="UnicodeDecodeError"):
        built(b"\x80\x02U\x01\xff")


def test_the_copies_that_a_sum_makes_are_counted() -> None:
    plain, plus = Row("a", ("a",)), Row("b", ("b",), plus="c")
    flat, pattern = Row("d", ("d",), "flatten:1,1,1"), Row("e", ("e",), "a b -> b a")
    counts = [_new_copies(StateMapping((plain, more))) for more in (plus, flat, pattern)]
    assert [_new_copies(StateMapping((plain,))), *counts] == [0, 2, 1, 1]


def test_the_lists_of_an_error_do_not_change() -> None:
    with pytest.raises(CheckpointError) as refused:
        relaid(HERE, arrays("torch", w=np.ones(2)), StateMapping((Row("v", ("params", "v")),)))
    cause: Any = refused.value.__cause__
    missing, unexpected = MismatchEntry("v", "params/v"), MismatchEntry("w", "", (2,))
    assert cause.mismatch == Mismatch((missing,), (unexpected,))


def test_the_dtypes_that_hold_a_number_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": np.array([1e300])}, path)
    with pytest.raises(CheckpointError) as refused:
        compare.convert_checkpoint(path, tmp_path / "b.safetensors", dtype="bfloat16")
    assert refused.value.mend == "choose float64"


def test_both_files_claim_their_mapping_in_order(tmp_path: Path) -> None:
    module = torch_module()
    paths = [
        compare.save_checkpoint(tmp_path / name, module, mapping=LINEN)
        for name in ("a.safetensors", "b.msgpack")
    ]
    assert compare_checkpoints(*paths).claims == tuple(map(str, paths))


def test_one_mapping_for_a_linen_and_an_nnx_file_is_refused(tmp_path: Path) -> None:
    source = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3)})
    model = nnx.Dict(a=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    variables = {"params": nnx.to_pure_dict(nnx.state(model))}
    mappings = [compare.match(source, template) for template in (variables, model)]
    paths = [
        compare.save_checkpoint(tmp_path / f"{name}.msgpack", side)
        for name, side in (("linen", variables), ("nnx", model))
    ]
    assert not compare.verify_checkpoint(*paths, mapping=mappings)
    with pytest.raises(CheckpointError) as refused:
        compare.verify_checkpoint(*paths, mapping=mappings[0])
    assert refused.value.expected == "no mapping, or one from torch to each"
    assert refused.value.found == "one"


def test_a_rule_of_the_call_sets_the_mapping_of_the_file_aside(tmp_path: Path) -> None:
    source = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3)})
    model = nnx.Dict(a=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    mapping = compare.match(source, model)
    path = compare.save_checkpoint(tmp_path / "a.safetensors", source, mapping=mapping)
    compare.load_checkpoint(path, model)
    with pytest.raises(CheckpointError, match=r"b\.weight: this layout fits no key"):
        compare.load_checkpoint(path, model, layouts={"b.weight": "same"})


def test_hooks_see_the_dtype_of_what_is_stored(tmp_path: Path) -> None:
    class Old(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
            self._register_load_state_dict_pre_hook(self.renamed)

        def renamed(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
            if f"{prefix}w" in state and state[f"{prefix}w"].dtype == torch.float64:
                state[f"{prefix}weight"] = state.pop(f"{prefix}w")

    torch.save({"w": torch.ones(2, dtype=torch.float64)}, tmp_path / "old.pth")
    module = Old()
    compare.load_checkpoint(tmp_path / "old.pth", module)
    assert module.weight.tolist() == [1, 1]


def test_what_lies_in_the_same_memory_is_named(tmp_path: Path) -> None:
    module = torch.nn.Module()
    whole = torch.zeros(4)
    module.register_buffer("first", whole[:3])
    module.register_buffer("last", whole[1:])
    torch.save({"first": torch.ones(3), "last": torch.full((3,), 2.0)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="! first: lies in the same memory as another"):
        compare.load_checkpoint(tmp_path / "a.pth", module)


def test_the_largest_tensor_is_named_where_memory_is_short(tmp_path: Path) -> None:
    torch.save({"large": torch.ones(3_000_000), "small": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as refused:
        compare.read_checkpoint(tmp_path / "a.pth", memory=8_000_000)
    assert refused.value.key == "large"


def test_what_lies_aligned_is_mapped(tmp_path: Path) -> None:
    """Mapped values take no memory of the budget."""
    tensors = {name: np.ones(PART_BYTES // 4, np.float32) for name in "abc"}
    save_file(tensors, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as stored:
        reader: Any = stored
        reader.mapped = True
        assert [reader._is_mapped(path) for path in reader.specs] == [True] * 3


def test_a_leaf_of_the_call_is_named_without_a_template(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        compare.save_checkpoint(tmp_path / "a.msgpack", {"params": {"a": object()}})
    assert refused.value.reason == "params/a is an object; expected an array"


def test_two_fields_of_long_numbers_are_refused() -> None:
    field = struct.pack("<2HQ", 1, 8, 5)
    assert zip_directory._long(field, 2**32 - 1) == (5,)
    with pytest.raises(ValueError, match="invalid extra field"):
        zip_directory._long(field * 2, 2**32 - 1)


def test_a_text_is_no_array(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        compare.save_checkpoint(tmp_path / "a.orbax", {"params": {"a": np.array(["text"])}})
    assert refused.value.key == "params/a"


def test_work_on_a_file_that_changes_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": ONE}, path)
    found = []

    def work(stored: Reader) -> int:
        found.append(sum(spec.nbytes for spec in stored.specs.values()))
        if len(found) == 1:
            save_file({"w": np.ones(2, np.float32)}, tmp_path / "new")
            (tmp_path / "new").replace(path)
        return found[-1]

    assert steady(path, work) == 8
    assert found == [4, 8]


def test_a_folder_of_shards_that_changes_is_read_again(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {}}))
    before = _snapshot(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "b"}}))
    assert not before.is_current()
    assert _snapshot(tmp_path).is_current()


def test_an_error_passes_from_one_process_to_another(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "a.pth", torch.nn.Linear(3, 2))
    with pytest.raises(compare.CheckpointError) as caught:
        compare.load_checkpoint(path, torch.nn.Linear(4, 2))
    for again in (copy.copy(caught.value), pickle.loads(pickle.dumps(caught.value))):
        assert str(again) == str(caught.value)
        assert again.mismatch == caught.value.mismatch
        assert (again.path, again.key, again.mend) == (str(path), caught.value.key, again.mend)


def test_arguments_of_other_kinds(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    path = compare.save_checkpoint(tmp_path / "a.pth", layer)
    wrong: Any = {"a": "b"}
    variables = {"params": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
    for call in (
        lambda: compare.torch_to_linen(layer, variables, mapping=wrong),
        lambda: compare.torch_to_nnx(layer, nnx.Linear(3, 2, rngs=nnx.Rngs(0)), mapping=wrong),
        lambda: compare.linen_to_torch(variables, mapping=wrong),
        lambda: compare.nnx_to_torch(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), mapping=wrong),
        lambda: compare.save_checkpoint(tmp_path / "b.pth", layer, mapping=wrong),
        lambda: compare.load_checkpoint(path, layer, mapping=wrong),
        lambda: compare.convert_checkpoint(path, tmp_path / "b.pth", mapping=wrong),
        lambda: compare.verify_checkpoint(path, path, mapping=wrong),
    ):
        with pytest.raises(TypeError, match=r"mapping is a dict; expected what `compare\.match`"):
            call()
    with pytest.raises(TypeError, match=r"ignore is 'a'; expected a list of texts, as \['a'\]"):
        compare.verify_checkpoint(path, path, ignore="a")
    other: Any
    for other in (3, None, [3]):
        with pytest.raises(TypeError, match=r"select is .*; expected a list of texts"):
            compare.read_checkpoint(path, select=other)
        with pytest.raises(TypeError, match=r"ignore is .*; expected a list of texts"):
            compare.verify_checkpoint(path, path, ignore=other)
    for other in ("5", True, 1.5):
        with pytest.raises(TypeError, match=r"memory is .*; expected a whole number of bytes"):
            compare.load_checkpoint(path, layer, memory=other)
    with pytest.raises(ValueError, match="memory is -1; expected a number of bytes, 0 or more"):
        compare.open_checkpoint(path, -1)
    other = 3
    for call in (
        lambda: compare.convert_checkpoint(path, tmp_path / "b.pth", progress=other),
        lambda: compare.verify_checkpoint(path, path, progress=other),
    ):
        with pytest.raises(TypeError, match="progress is 3; expected a function"):
            call()
    with pytest.raises(TypeError, match="path is an int; expected the name of a file"):
        compare.convert_checkpoint(path, tmp_path / "b.msgpack", like=other)
    with pytest.raises(TypeError, match="the state dict has the key 3; expected names: write '3'"):
        compare.fold({3: torch.ones(2)})
    mapping = compare.match(layer, variables)
    with pytest.raises(compare.MappingError, match="cannot be written: No such file"):
        mapping.save(tmp_path / "none" / "a.json")
    with pytest.raises(TypeError, match="path is a NoneType; expected the name of a file"):
        compare.StateMapping.load(cast("Any", None))
    rules: Any = ["fc"]
    with pytest.raises(TypeError, match=r"policy is .* expected a dict"):
        compare.load_checkpoint(path, layer, policy=rules)


@pytest.mark.parametrize(
    ("content", "select"),
    [
        ({"a/b": {"w": torch.ones(1)}, "epoch": 1}, "a/b"),
        ({"models": [{"w": torch.ones(1)}], "epoch": 1}, "models/0"),
        (({"w": torch.ones(1)}, 3), "0"),
        ({"a": ({"b": [1, {"w": torch.ones(1)}]},)}, "a/0/b"),
    ],
)
def test_a_state_with_a_slash_in_its_name_or_in_a_list(
    content: Any, select: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "a.pth")
    if select == "a/0/b":  # deeper than the search goes
        select += "/1"
    else:
        with pytest.raises(CheckpointError, match=re.escape(f"pass select={select!r} (--select")):
            compare.read_checkpoint(tmp_path / "a.pth")
    assert compare.read_checkpoint(tmp_path / "a.pth", select=select)["w"].tolist() == [1.0]


def test_a_file_of_one_tensor_is_named_for_it(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds a tensor; expected a state dict"):
        compare.read_checkpoint(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_named(tmp_path: Path) -> None:
    state = {"a": torch.nested.nested_tensor([torch.ones(2)])}
    with pytest.raises(CheckpointError, match="a nested tensor"):
        compare.save_checkpoint(tmp_path / "a.pth", state)


def test_a_prefix_is_not_advised_where_it_has_no_effect(tmp_path: Path) -> None:
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    target = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    path = compare.save_checkpoint(tmp_path / "a.msgpack", model)
    with pytest.raises(CheckpointError) as caught:
        compare.load_checkpoint(path, target)
    assert caught.value.mend == (
        "pass mapping=compare.match(module, template, rename=…), which pairs the names"
    )
    mapping = compare.match(target, model, rename={"*": "layers.*"})
    compare.load_checkpoint(path, target, mapping=mapping)


def test_a_train_state_is_no_state_but_its_params_are(tmp_path: Path) -> None:
    state = train_state.TrainState.create(
        apply_fn=print, params={"w": jnp.ones(1)}, tx=optax.sgd(0.1)
    )
    wrong: Any = state
    with pytest.raises(CheckpointError, match=r'variables, as {"params": state\.params}'):
        compare.save_checkpoint(tmp_path / "a.msgpack", wrong)
    compare.save_checkpoint(tmp_path / "a.msgpack", {"params": state.params})


def test_arguments_of_another_type(tmp_path: Path) -> None:
    layer, anything = torch.nn.Linear(3, 2), cast("Any", compare)
    path = compare.save_checkpoint(tmp_path / "a.pth", layer)
    for call, message in (
        (lambda: anything.load_checkpoint(path, layer, cast="float16"), "cast is 'float16'; exp"),
        (lambda: anything.save_checkpoint(layer, path), "path is a Linear; expected the name of"),
        (lambda: anything.read_checkpoint(5), "path is an int; expected the name of a file"),
        (lambda: anything.convert_checkpoint(5, path), "path is an int; expected the name of"),
        (lambda: anything.fold(5), "source is an int; expected a torch module or its state dict"),
        (lambda: anything.match(None, {}), "source is a NoneType; expected a torch module or its"),
        (lambda: anything.torch_to_linen(layer, {"params": {}}, copy=5), "copy is 5; expected Tr"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(CheckpointError, match="shard_bytes=0 is no size: give one, as 2_000_000"):
        compare.convert_checkpoint(path, tmp_path / "shards", shard_bytes=0)


@pytest.mark.parametrize("name", ["a.pth", "a.msgpack"])
def test_a_policy_for_no_name_is_refused(name: str, tmp_path: Path) -> None:
    layer = torch.nn.ModuleDict({"fc": torch.nn.Linear(3, 2)})
    template = {"params": {"fc": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}}
    mapping = compare.match(layer, template)
    path = compare.save_checkpoint(tmp_path / name, layer, mapping=mapping)
    targets: tuple[Any, ...] = (layer, template)
    for target in targets:
        with pytest.raises(CheckpointError, match="fits policy mask: leave it out, or correct"):
            compare.load_checkpoint(path, target, mapping=mapping, policy={"mask": "ignore"})


def frequencies() -> torch.nn.Module:
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.ones(2))
    module.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(0, 8, 2) / 8))
    return module


@pytest.mark.parametrize("name", ["a.msgpack", "a.safetensors"])
@pytest.mark.parametrize("digit", [b"3", b"0"])
def test_a_bit_of_the_manifest_is_not_lost(name: str, digit: bytes, tmp_path: Path) -> None:
    template = {"params": {"w": jnp.zeros(2)}}
    policy: Any = {"inv_freq": "verify"}
    mapping = compare.match(frequencies(), template, policy=policy)
    source = template if name.endswith("safetensors") else frequencies()
    compare.save_checkpoint(tmp_path / name, source, mapping=mapping)
    if name.endswith("safetensors"):
        compare.save_checkpoint(tmp_path / name, frequencies(), mapping=mapping)
    raw = (tmp_path / name).read_bytes()
    assert raw.count(b'"10000.0') + raw.count(b'\\"10000.0') >= 1
    (tmp_path / name).write_bytes(raw.replace(b"10000.0", digit + b"0000.0"))
    with pytest.raises(CheckpointError, match="its manifest is damaged"):
        compare.load_checkpoint(tmp_path / name, frequencies())


def test_a_manifest_without_a_checksum_of_its_own_is_read(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "a.safetensors", torch.nn.Linear(3, 2))
    with open_checkpoint(path) as stored:
        assert stored.manifest is not None
        text = stored.manifest.dumps()
        manifest = stored.manifest
    old = text.replace('"version":3', '"version":2')
    old = old[: old.rindex(',"crc32"')] + "}"
    again = Manifest.loads(old, path, Budget(None))
    assert again == manifest
    with pytest.raises(ValueError, match="its manifest is damaged"):
        Manifest.loads(text.replace('"torch"', '"linen"'), path, Budget(None))


@pytest.mark.parametrize(
    "refill",
    [
        {"shape": [4], "dtype": "float32", "pattern": "frequencies", "value": "0.0"},
        {"shape": [4], "dtype": "int64", "pattern": "full", "value": "9" * 30},
        {"shape": [1] * 70, "dtype": "float32", "pattern": "full", "value": "1.0"},
    ],
)
def test_a_refill_that_cannot_be_made_is_no_mapping(refill: dict[str, Any]) -> None:
    left = [["m", "verify", None, refill]]
    with pytest.raises(ValueError):
        StateMapping.from_json({"flax": "linen", "rows": [], "left": left})


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_wrapped_module_is_saved_and_filled_by_the_mapping_of_it(
    wrap: Any, tmp_path: Path
) -> None:
    source = wrap(torch.nn.ModuleDict({"fc": torch.nn.Linear(3, 4)}))
    template = {"params": {"fc": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}}
    mapping = compare.match(source, template)
    path = compare.save_checkpoint(tmp_path / "a.msgpack", source, mapping=mapping)
    target = wrap(torch.nn.ModuleDict({"fc": torch.nn.Linear(3, 4)}))
    assert compare.load_checkpoint(path, target, mapping=mapping) is target
    assert torch.equal(target.module["fc"].weight, source.module["fc"].weight)


def test_a_prefix_before_the_steps_of_wrappers(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    target = torch.nn.ModuleDict({"a": layer})
    state = {
        f"module.a._orig_mod.{name}": torch.ones(2, 2)[: 2 if name == "weight" else 1].squeeze()
        for name in ("weight", "bias")
    }
    path = compare.save_checkpoint(tmp_path / "a.pth", state)
    with pytest.raises(CheckpointError, match=r"pass prefix='module\._orig_mod\.'"):
        compare.load_checkpoint(path, target)
    compare.load_checkpoint(path, target, prefix="module._orig_mod.")
    assert layer.weight.sum() == 4


def test_the_polarity_is_declared_for_the_attention_classes_alone(tmp_path: Path) -> None:
    module = torch.nn.Module()
    module.register_buffer("mask", torch.tril(torch.ones(3, 3)))
    path = compare.save_checkpoint(tmp_path / "a.safetensors", module)
    assert b"nonzero blocks" not in path.read_bytes()
    path = compare.save_checkpoint(tmp_path / "b.safetensors", torch_module())
    assert b"nonzero blocks" in path.read_bytes()
