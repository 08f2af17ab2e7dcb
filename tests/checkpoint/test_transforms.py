"""Names, layouts and ties of a file are brought into the other framework's, or refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import compare
from compare.checkpoint.convert import _has_names_of
from compare.checkpoint.tensors import Tensors, tensors_of
from compare.checkpoint.transforms import _part_shape, relaid, watched
from compare.conversion.mapping import Row, StateMapping
from compare.conversion.parts import equal_part

HERE = Path("a.pth")


def arrays(layout: Any, **values: np.ndarray) -> Tensors:
    paths = {(name,) if layout == "torch" else tuple(name.split("_")): name for name in values}
    return tensors_of(layout, {path: values[name] for path, name in paths.items()})


def test_a_layout_that_does_not_fit_is_refused_in_both_directions() -> None:
    table = StateMapping((Row("w", ("params", "w"), "transposed"),))
    with pytest.raises(compare.CheckpointError, match="w: the Flax shape of transposed does not"):
        relaid(HERE, arrays("torch", w=np.ones(3)), table)
    with pytest.raises(compare.CheckpointError, match="params/w: the layout transposed needs"):
        relaid(HERE, arrays("linen", params_w=np.ones(3)), table)


TIED = StateMapping((Row("a", ("params", "a")), Row("b", ("params", "a"), kind="alias")))


def test_tied_names_must_have_the_same_values() -> None:
    ones, zeros = np.ones(3), np.zeros(3)
    with pytest.raises(compare.CheckpointError, match="b: is tied to a in Flax, and has other"):
        relaid(HERE, arrays("torch", a=ones, b=zeros), TIED)
    with pytest.raises(compare.CheckpointError, match="b: is tied to a in Flax, and has other"):
        relaid(HERE, arrays("torch", a=ones, b=ones.astype(np.float32)), TIED)
    for source in (
        arrays("torch", a=ones, b=ones.copy()),
        tensors_of("torch", {("a",): ones}, aliases={("b",): ("a",)}),
        tensors_of("torch", {("b",): ones}, aliases={("a",): ("b",)}),
    ):
        found = relaid(HERE, source, TIED)
        assert list(found.specs) == [("params", "a")]
        assert np.array_equal(next(iter(found.pieces(("params", "a")))), ones)
    back = relaid(HERE, arrays("linen", params_a=ones), TIED)
    assert (list(back.specs), dict(back.aliases)) == ([("a",)], {("b",): ("a",)})
    assert back.kinds["a",] == "parameter"


def test_a_tied_name_of_an_entry_that_is_absent_is_absent_too() -> None:
    rows = (Row("a", ("params", "a"), required=False), TIED.rows[1], Row("c", ("params", "c")))
    back = relaid(HERE, arrays("linen", params_c=np.ones(2)), StateMapping(rows))
    assert (list(back.specs), dict(back.aliases)) == ([("c",)], {})


def test_a_part_of_a_number_is_the_number() -> None:
    row = Row("w", ("w",), part=equal_part(1, 3))
    assert _part_shape(row, ()) == ()
    assert _part_shape(row, (6, 2)) == (2, 2)
    assert _part_shape(Row("w", ("w",)), (6, 2)) == (6, 2)


def test_the_progress_ends_with_every_byte() -> None:
    seen: list[tuple[int, int]] = []
    source = arrays("torch", a=np.ones(3), b=np.ones((2, 2), np.float32))
    counted = watched(source, lambda done, total: seen.append((done, total)))
    for path in counted.specs:
        list(counted.pieces(path))
    assert seen == [(24, 40), (40, 40)]


def test_whether_a_mapping_names_a_checkpoint() -> None:
    table = StateMapping((Row("w", ("a", "w")),), flax="nnx")

    def stored(layout: str, path: tuple[str, ...]) -> Any:
        return SimpleNamespace(layout=layout, specs={path: None})

    assert _has_names_of(table, stored("nnx", ("a", "w")))
    assert not _has_names_of(table, stored("linen", ("a", "w")))
    assert not _has_names_of(table, stored("nnx", ("b", "w")))


def test_a_folder_that_is_not_there_yet_has_no_slash(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    with pytest.raises(compare.CheckpointError, match="ends with a slash, and is not a folder yet"):
        compare.convert_checkpoint(path, f"{tmp_path}/new/")
    assert not (tmp_path / "new").exists()


def test_a_row_is_required_unless_it_says_otherwise() -> None:
    assert Row("w", ("w",)).required
    state = {"v": torch.ones(2)}
    with pytest.raises(compare.ConversionError, match="missing w"):
        table = StateMapping((Row("v", ("params", "v")), Row("w", ("params", "w"))))
        compare.torch_to_linen(
            state, {"params": {"v": jnp.ones(2), "w": jnp.ones(2)}}, mapping=table
        )


@pytest.mark.parametrize(
    "refill",
    [
        {"dtype": "float3"},
        {"pattern": "diagonal"},
        {"value": 1.0},
        {"value": "one"},
        {"shape": [4]},
        {"shape": [-4, 4]},
        {"shape": 4},
    ],
)
def test_a_mask_that_cannot_be_made_again_is_no_mapping(refill: dict[str, Any]) -> None:
    known = {"shape": [4, 4], "dtype": "float32", "pattern": "triu", "value": "1.0"}
    content = {"flax": "linen", "rows": [], "left": [["mask", "verify", None, known]]}
    (left,) = StateMapping.from_json(content).left
    assert left.refill is not None and left.refill.dtype == "float32"
    content["left"] = [["mask", "verify", None, known | refill]]
    with pytest.raises(ValueError, match="not a valid mapping"):
        StateMapping.from_json(content)
