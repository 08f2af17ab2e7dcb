"""Two checkpoints of one state, under other names and in other layouts."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from typer.testing import CliRunner

import compare
from compare.checkpoint.verify import compare_checkpoints
from compare.cli import app

from ..support import torch_module


class Model(nnx.Module):
    def __init__(self) -> None:
        self.layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))


def linen_and_nnx(
    folder: Path, *, slip: float = 0.0
) -> tuple[Path, Path, list[compare.StateMapping]]:
    """One state in both; only its torch names pair `dense` in Linen with `layer` in NNX."""
    source = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4)})
    template = {"params": {"dense": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}}
    to_linen = compare.match(source, template, rename={"a": "dense"})
    to_nnx = compare.match(source, Model(), rename={"a": "layer"})
    variables = compare.torch_to_linen(source, template, mapping=to_linen)
    variables["params"]["dense"]["bias"] += slip
    model = compare.torch_to_nnx(source, Model(), mapping=to_nnx)
    linen = compare.save_checkpoint(folder / "linen.msgpack", variables, mapping=to_linen)
    nnx_file = compare.save_checkpoint(folder / "nnx.msgpack", model, mapping=to_nnx)
    return linen, nnx_file, [to_linen, to_nnx]


def test_linen_and_nnx_are_compared_under_their_torch_names(tmp_path: Path) -> None:
    linen, model, mappings = linen_and_nnx(tmp_path)
    assert compare.verify_checkpoint(linen, model, mapping=mappings) == []
    assert compare.verify_checkpoint(model, linen, mapping=mappings) == []
    with pytest.raises(compare.CheckpointError, match=r"proves nothing: give --map twice"):
        compare.verify_checkpoint(linen, model)


def test_a_difference_is_named_as_torch_names_it(tmp_path: Path) -> None:
    linen, model, mappings = linen_and_nnx(tmp_path, slip=1e-3)
    (difference,) = compare.verify_checkpoint(linen, model, mapping=mappings)
    assert difference.name == "a.bias"


def test_differences_come_in_the_order_of_the_files(tmp_path: Path) -> None:
    names = [f"layers.{index}" for index in range(30)]
    one = compare.save_checkpoint(tmp_path / "a.pth", {name: torch.ones(1) for name in names})
    two = compare.save_checkpoint(tmp_path / "b.pth", {"other": torch.ones(1)})
    differing = [difference.name for difference in compare.verify_checkpoint(one, two)]
    assert differing == [*names, "other"]


def test_a_mapping_without_effect_is_refused(tmp_path: Path) -> None:
    source = torch_module()
    one = compare.save_checkpoint(tmp_path / "a.pth", source)
    two = compare.save_checkpoint(tmp_path / "b.safetensors", source)
    mapping = compare.match(
        torch.nn.Linear(1, 1), {"params": {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}}
    )
    with pytest.raises(
        compare.CheckpointError, match=r"mapping= and like= have no effect.*leave them out"
    ):
        compare.verify_checkpoint(one, two, mapping=mapping)


class _Layer(nnx.Module):
    def __init__(self, layer: nnx.Module) -> None:
        self.a = layer


LAYERS: dict[str, Any] = {
    "Linear": (torch.nn.Linear(3, 4), lambda rngs: nnx.Linear(3, 4, rngs=rngs)),
    "LSTMCell": (torch.nn.LSTMCell(3, 4), lambda rngs: nnx.LSTMCell(3, 4, rngs=rngs)),
    "BatchNorm": (torch.nn.BatchNorm1d(4), lambda rngs: nnx.BatchNorm(4, momentum=0.9, rngs=rngs)),
    "MultiheadAttention": (
        torch.nn.MultiheadAttention(4, 2),
        lambda rngs: nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs),
    ),
    "ConvTranspose": (
        torch.nn.ConvTranspose1d(3, 4, 2),
        lambda rngs: nnx.ConvTranspose(3, 4, (2,), padding="VALID", rngs=rngs),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_order_of_the_two_does_not_matter(name: str, tmp_path: Path) -> None:
    layer, make = LAYERS[name]
    source = torch.nn.ModuleDict({"a": layer})
    table = compare.match(source, _Layer(make(nnx.Rngs(0))))
    one = compare.save_checkpoint(tmp_path / "a.pth", source, mapping=table)
    other = tmp_path / "b.msgpack"
    compare.convert_checkpoint(one, other)
    counter = ["*.num_batches_tracked"] if name == "BatchNorm" else []
    # The names of a transposed convolution do not say that it is one.
    for mapping in (table,) if name == "ConvTranspose" else (None, table):
        ignore = [] if mapping else counter
        assert compare.verify_checkpoint(one, other, mapping=mapping, ignore=ignore) == []
        assert compare.verify_checkpoint(other, one, mapping=mapping, ignore=ignore) == []
    bias = next(key for key in source.state_dict() if "bias" in key)
    source.state_dict()[bias][1] += 1e-3
    edited = compare.save_checkpoint(tmp_path / "c.pth", source, mapping=table)
    differences = compare.verify_checkpoint(edited, other, mapping=table)
    assert len(differences) == 1
    assert compare.verify_checkpoint(other, edited, mapping=table) == differences


def tied(names: list[str], others: list[str]) -> dict[str, torch.Tensor]:
    """Entries of which the first share one tensor."""
    one = torch.ones(2)
    return {name: one for name in names} | {name: torch.ones(2) for name in others}


def test_names_that_are_tied_on_one_side_are_named(tmp_path: Path) -> None:
    one = compare.save_checkpoint(tmp_path / "a.pth", tied(["a", "b"], ["c", "d"]))
    two = compare.save_checkpoint(tmp_path / "b.pth", tied(["a", "b", "c"], ["d"]))
    found = {each.name: each.what for each in compare.verify_checkpoint(one, two)}
    assert found == {
        "a": found["a"],
        "b": found["b"],
        "c": "is tied to nothing in the source, " + found["c"].partition(", ")[2],
    }
    assert found["a"].startswith("is tied to b in the source, ")
    assert found["a"].endswith(" and 1 more in the target")
    assert found["c"].endswith(" and 1 more in the target")
    assert compare.verify_checkpoint(two, two) == []


def test_a_file_that_claims_another_pairing_is_named(tmp_path: Path) -> None:
    source = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3)})
    template = {"params": {"a": {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}}}
    true = compare.match(source, template)
    false = compare.match(source, template, layouts={"a.weight": "same"})
    one = compare.save_checkpoint(tmp_path / "a.pth", source)
    variables = compare.torch_to_linen(source, template, mapping=false)
    two = compare.save_checkpoint(tmp_path / "b.msgpack", variables, mapping=false)
    comparison = compare_checkpoints(one, two, mapping=true)
    assert comparison.claims == (str(two),)
    claims = [each.what for each in comparison.differences if "claims" in each.what]
    assert claims == [f"{two} claims a.weight (same); it is a.weight (transposed)"]


@pytest.mark.parametrize("is_turned", [False, True])
def test_an_entry_on_one_side_only_is_named_in_both_orders(is_turned: bool, tmp_path: Path) -> None:
    source = {"a.weight": torch.rand(4, 3), "a.bias": torch.zeros(4)}
    kernel = jnp.asarray(source["a.weight"].T.numpy())
    variables = {"params": {"a": {"kernel": kernel, "bias": jnp.zeros(4)}, "b": {"bias": kernel}}}
    sides = [
        compare.save_checkpoint(tmp_path / "a.pth", source),
        compare.save_checkpoint(tmp_path / "b.msgpack", variables),
    ]
    one, two = sides[::-1] if is_turned else sides
    (difference,) = compare.verify_checkpoint(one, two)
    assert difference.name == "params/b/bias" and "has no counterpart" in difference.what


def test_what_is_on_one_side_is_said_of_that_side(tmp_path: Path) -> None:
    linen, model, mappings = linen_and_nnx(tmp_path)
    comparison = compare_checkpoints(linen, model, mapping=mappings, dtype="bfloat16")
    whats = {difference.what for difference in comparison.differences}
    assert whats == {
        "is bfloat16 (4, 3) in the source, float32 (4, 3) in the target",
        "is bfloat16 (4,) in the source, float32 (4,) in the target",
    }


def slipped(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A state, and the same with 1e-3 added to an entry of 1 beside one of 10, and to a buffer."""
    state = {"a": torch.tensor([1.0, -10.0], dtype=dtype), "steps": torch.tensor([3])}
    other = {**state, "a": state["a"] + torch.tensor([1e-3, 0.0], dtype=dtype)}
    one = compare.save_checkpoint(folder / "one.safetensors", state)
    return one, compare.save_checkpoint(folder / "two.safetensors", other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_a_tolerance_where_it_is_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    paths = slipped(tmp_path, dtype)
    (found,) = compare.verify_checkpoint(*paths)
    assert found.name == "a" and found.what.endswith(", by up to 0.0001 of its largest entry")
    assert compare.verify_checkpoint(*paths, tolerance=1.1e-4) == []
    assert compare.verify_checkpoint(*paths, tolerance=0.9e-4) == [found]
    for wrong in (-1.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a number from 0 to below 1"):
            compare.verify_checkpoint(*paths, tolerance=wrong)
    run = CliRunner().invoke(app, ["verify", *map(str, paths), "--tolerance", "1e-3"])
    assert run.exit_code == 0 and "within 0.001 of the largest" in " ".join(run.output.split())
    assert CliRunner().invoke(app, ["verify", *map(str, paths)]).exit_code == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, 5.0])),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 5.0])),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, -torch.inf])),
        (torch.tensor([True]), torch.tensor([False])),
        (torch.tensor([0.0]), torch.tensor([1e-9])),
    ],
)
def test_no_tolerance_covers_these(one: torch.Tensor, other: torch.Tensor, tmp_path: Path) -> None:
    paths = [
        compare.save_checkpoint(tmp_path / f"{index}.pth", {"a": tensor})
        for index, tensor in enumerate((one, other))
    ]
    (found,) = compare.verify_checkpoint(*paths, tolerance=0.9)
    assert found.name == "a"


@pytest.mark.parametrize("name", ["mask", "attn.mask", "h.0.attn.mask"])
def test_a_tolerance_does_not_cover_a_mask_of_a_state_dict(name: str, tmp_path: Path) -> None:
    paths = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for path, entry in zip(paths, (1.0, 1.25), strict=True):
        compare.save_checkpoint(path, {name: torch.tensor([entry, 2.0])})
    (found,) = compare.verify_checkpoint(*paths, tolerance=0.9)
    assert found.name == name


def test_a_tolerance_does_not_cover_buffers(tmp_path: Path) -> None:
    source = torch_module()
    one = compare.save_checkpoint(tmp_path / "one.pth", source)
    source.mask[0, 1] += 1e-6
    two = compare.save_checkpoint(tmp_path / "two.pth", source)
    (found,) = compare.verify_checkpoint(one, two, tolerance=0.9)
    assert found.name == "mask"


def test_what_is_nan_on_both_sides_is_not_apart(tmp_path: Path) -> None:
    values = torch.tensor([torch.nan, 1.0, -0.0])
    one = compare.save_checkpoint(tmp_path / "one.pth", {"a": values})
    two = compare.save_checkpoint(tmp_path / "two.pth", {"a": torch.tensor([-torch.nan, 1.0, 0.0])})
    assert len(compare.verify_checkpoint(one, two)) == 1
    assert compare.verify_checkpoint(one, two, tolerance=0.0) == []


@pytest.mark.filterwarnings("ignore::compare.UnverifiedCheckpoint")
def test_what_one_side_says_is_a_buffer_has_no_tolerance(tmp_path: Path) -> None:
    module = torch.nn.Module()
    module.register_buffer("table", torch.tensor([1.0, 1e-7]))
    says = compare.save_checkpoint(tmp_path / "says.pth", module)
    torch.save({"table": torch.tensor([1.0, 0.0])}, tmp_path / "plain.pth")
    for paths in ((says, tmp_path / "plain.pth"), (tmp_path / "plain.pth", says)):
        assert len(compare.verify_checkpoint(*paths, tolerance=1e-3)) == 1
    for index, value in enumerate((1e-7, 0.0)):
        torch.save({"mask": torch.tensor([1.0, value])}, tmp_path / f"mask{index}.pth")
    masks = tmp_path / "mask0.pth", tmp_path / "mask1.pth"
    assert len(compare.verify_checkpoint(*masks, tolerance=1e-3)) == 1
    variables = {"params": {}, "buffers": {"table": jnp.asarray([1.0, 0.0])}}
    flax = compare.save_checkpoint(tmp_path / "flax.msgpack", variables)
    torch.save({"table": torch.tensor([1.0, 1e-7])}, tmp_path / "torch.pth")
    for paths in ((flax, tmp_path / "torch.pth"), (tmp_path / "torch.pth", flax)):
        assert len(compare.verify_checkpoint(*paths, tolerance=1e-3)) == 1
