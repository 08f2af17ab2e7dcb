"""Tables that one side computes are left out if they are what their shape says, and made again."""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import compare
from compare.conversion.tables import table_of
from compare.conversion.tensors import tensor_to_numpy
from compare.conversion.unmatched import objection


def rotary(width: int, base: float) -> torch.Tensor:
    """As transformers' Llama computes it."""
    return 1.0 / (base ** (torch.arange(0, width, 2).float() / width))


def whisper(tokens: int, width: int) -> torch.Tensor:
    increment = math.log(10_000) / (width // 2 - 1)
    scales = torch.exp(-increment * torch.arange(width // 2))
    angles = torch.arange(tokens)[:, None] * scales[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def annotated(tokens: int, width: int) -> torch.Tensor:
    """As the Annotated Transformer computes it."""
    table = torch.zeros(1, tokens, width)
    positions = torch.arange(0, tokens).unsqueeze(1)
    scales = torch.exp(torch.arange(0, width, 2) * -(math.log(10000.0) / width))
    table[0, :, 0::2] = torch.sin(positions * scales)
    table[0, :, 1::2] = torch.cos(positions * scales)
    return table


def marian(tokens: int, width: int) -> torch.Tensor:
    angles = np.array(
        [
            [position / np.power(10000, 2 * (j // 2) / width) for j in range(width)]
            for position in range(tokens)
        ]
    )
    table = np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1)
    return torch.from_numpy(table).float()


def fairseq(tokens: int, width: int, padding: int) -> torch.Tensor:
    scales = torch.exp(torch.arange(width // 2).float() * -(math.log(10000) / (width // 2 - 1)))
    angles = torch.arange(tokens).float()[:, None] * scales[None]
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    table[padding] = 0
    return table


def swin(height: int, width: int) -> torch.Tensor:
    axes = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    coordinates = torch.stack(axes).flatten(1)
    relative = (coordinates[:, :, None] - coordinates[:, None]).permute(1, 2, 0).contiguous()
    relative[:, :, 0] += height - 1
    relative[:, :, 1] += width - 1
    relative[:, :, 0] *= 2 * width - 1
    return relative.sum(-1)


def beit(size: int) -> torch.Tensor:
    index = torch.zeros((size * size + 1,) * 2, dtype=torch.int64)
    index[1:, 1:] = swin(size, size)
    count = (2 * size - 1) ** 2 + 3
    index[0, 0:], index[0:, 0], index[0, 0] = count - 3, count - 2, count - 1
    return index


TABLES = {
    "positions": torch.arange(512),
    "positions (1, n)": torch.arange(77).expand(1, -1).to(torch.int32),
    "token types": torch.zeros(1, 40, dtype=torch.int64),
    "llama": rotary(64, 10_000.0),
    "llama 3": rotary(128, 500_000.0),
    "llama in bfloat16": rotary(64, 10_000.0).bfloat16(),
    "whisper": whisper(1500, 64),
    "annotated": annotated(300, 32),
    "marian": marian(200, 30),
    "marian in float16": marian(200, 30).half(),
    "fairseq": fairseq(60, 16, 1),
    "swin": swin(7, 7),
    "swin, a wide window": swin(4, 6),
    "beit": beit(5),
}
# Their bits are those of float64 rounded once, so that the way back can make them again.
MADE_AGAIN = {
    "positions",
    "positions (1, n)",
    "token types",
    "marian",
    "marian in float16",
    "swin",
    "swin, a wide window",
    "beit",
}


def state_with(table: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"fc.weight": torch.randn(2, 3), "table": table}


TEMPLATE = {"params": {"fc": {"kernel": jnp.zeros((3, 2))}}}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_left_out_and_made_again(name: str, tmp_path: Path) -> None:
    state = state_with(TABLES[name])
    mapping = compare.match(state, TEMPLATE, policy={"table": "verify"})
    variables = compare.torch_to_linen(state, TEMPLATE, mapping=mapping)
    mapping.save(tmp_path / "map.json")
    loaded = compare.StateMapping.load(tmp_path / "map.json")
    assert loaded == mapping
    back = compare.linen_to_torch(variables, mapping=loaded)
    if name in MADE_AGAIN:
        assert back["table"].dtype == state["table"].dtype
        assert torch.equal(back["table"], state["table"])
    else:
        assert "table" not in back or torch.equal(back["table"], state["table"])


@pytest.mark.parametrize("name", TABLES)
def test_another_value_is_refused(name: str) -> None:
    table = TABLES[name].clone()
    values = table.flatten()
    index = values.numel() // 3
    values[index] = values[index] + (1 if not table.is_floating_point() else 0.02)
    state = state_with(values.view(table.shape))
    mapping = compare.match(state, TEMPLATE, policy={"table": "verify"})
    with pytest.raises(compare.ConversionError, match="table: "):
        compare.torch_to_linen(state, TEMPLATE, mapping=mapping)


@pytest.mark.parametrize("name", sorted(TABLES.keys() - {"token types"}))
def test_the_message_gives_the_argument(name: str) -> None:
    state = state_with(TABLES[name])
    with pytest.raises(
        compare.ConversionError, match=r'pass policy=\{"table": "verify"\}'
    ) as caught:
        compare.match(state, TEMPLATE)
    found = table_of(tensor_to_numpy(TABLES[name]))
    assert found is not None and f"a table of {found.pattern}" in str(caught.value)


def test_what_is_no_table() -> None:
    random: Any = np.random.default_rng(0)
    for array in (
        np.zeros(0, np.int64),
        np.array(3),
        np.ones((3, 3)),
        np.ones(3),
        np.array([0, 1, 3]),
        np.zeros((4, 6)),
        np.array([1.0, 0.1]),
        random.standard_normal((9, 8)),
        random.standard_normal(5),
        np.array([1.0, 0.5, 0.4]),
        np.array([1.0, np.nan, 0.25]),
        np.array([1.0, 1.0, 1e-300]),
        1e16 ** -(np.arange(16) / 16),
        np.arange(4) + 0j,
        np.array([True, False]),
    ):
        assert table_of(array) is None, array


def test_a_kind_that_differs_is_allowed_by_name() -> None:
    module = torch.nn.Module()
    module.register_buffer("scale", torch.ones(3))
    template = {"params": {"scale": jnp.zeros(3)}}
    with pytest.raises(compare.ConversionError, match="one is trained") as caught:
        compare.match(module, template)
    (refused,) = caught.value.mismatch.refused
    assert refused.mend == "compare.match(…, policy={'scale.kind': 'ignore'}) allows it"
    mapping = compare.match(module, template, policy={"scale.kind": "ignore"})
    variables = compare.torch_to_linen(module, template, mapping=mapping)
    assert np.asarray(variables["params"]["scale"]).tolist() == [1.0, 1.0, 1.0]
    assert compare.linen_to_torch(variables, mapping=mapping)["scale"].tolist() == [1.0, 1.0, 1.0]


def test_a_value_of_integers_or_bool_is_no_fill_value() -> None:
    """Numbers that -1e4 wraps to, and True, may be state."""
    for array in (np.int8(-16), np.uint8(240), np.bool_(True), np.int64(np.iinfo(np.int64).min)):
        assert objection("verify", np.asarray(array)) is not None
    assert objection("verify", np.asarray(-1e4, np.float32)) is None


def test_tables_with_axes_of_length_one_between() -> None:
    """As PyTorch's own tutorial stores it: (tokens, 1, width)."""
    table = annotated(20, 8).transpose(0, 1)
    assert table.shape == (20, 1, 8)
    state = state_with(table)
    mapping = compare.match(state, TEMPLATE, policy={"table": "verify"})
    compare.torch_to_linen(state, TEMPLATE, mapping=mapping)


def test_values_of_numpy_are_made_again() -> None:
    state: Any = {"fc.weight": np.zeros((2, 3), np.float32), "steps": np.arange(5)}
    policy: Any = {"steps": "verify"}
    layouts = {"fc.weight": "transposed"}
    mapping = compare.match(state, TEMPLATE, policy=policy, layouts=layouts)
    back = compare.linen_to_torch(
        compare.torch_to_linen(state, TEMPLATE, mapping=mapping), mapping=mapping
    )
    assert back["steps"].tolist() == [0, 1, 2, 3, 4]
