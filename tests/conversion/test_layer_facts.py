"""What layers say goes into a manifest and comes back; anything else in its place is refused."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compare
from compare.checkpoint.errors import CheckpointError
from compare.checkpoint.formats import open_checkpoint
from compare.conversion.layer_facts import LAYER_BYTES, facts_of, layers_from, require_valid
from compare.files.memory import Budget

LAYERS = nn.ModuleDict(
    {
        "linear": nn.Linear(2, 3),
        "embedding": nn.Embedding(5, 2, padding_idx=1),
        "conv": nn.Conv2d(4, 4, (3, 1), stride=2, padding="valid", groups=2),
        "up": nn.ConvTranspose1d(2, 2, 3, stride=2, output_padding=1),
        "norm": nn.LayerNorm((2, 3), eps=1e-3),
        "batch": nn.BatchNorm1d(3, momentum=None),
        "groups": nn.GroupNorm(2, 4),
        "attention": nn.MultiheadAttention(4, 2, dropout=0.1),
        "dropout": nn.Dropout(0.3),
        "gelu": nn.GELU("tanh"),
    }
)


def stored() -> dict[str, dict[str, Any]]:
    """Return the facts as a manifest holds them."""
    facts: dict[str, dict[str, Any]] = json.loads(json.dumps(facts_of(LAYERS)))
    return facts


def test_facts_come_back() -> None:
    require_valid(stored())
    layers = layers_from(stored())
    assert layers.keys() >= LAYERS.keys()
    for name, facts in stored().items():
        layer, original = layers[name], LAYERS.get_submodule(name)
        assert isinstance(original, type(layer))
        for fact in facts.keys() - {"type"}:
            said = getattr(original, fact)
            said = tuple(said) if isinstance(said, list) else said
            assert getattr(layer, fact) == said, (name, fact)
        assert not list(layer.parameters())


def test_an_eps_that_the_dtype_gives_is_a_number() -> None:
    (facts,) = facts_of(nn.RMSNorm(2).double()).values()
    assert facts["eps"] == torch.finfo(torch.float64).eps


@pytest.mark.parametrize(
    ("name", "fact", "value"),
    [
        ("conv", "type", "Sequential"),
        ("conv", "type", None),
        ("conv", "stride", [2]),
        ("conv", "stride", [2, -1]),
        ("conv", "stride", "abc"),
        ("conv", "padding", "full"),
        ("conv", "groups", 0),
        ("conv", "groups", True),
        ("conv", "_reversed_padding_repeated_twice", [0, 0]),
        ("conv", "forward", "x"),
        ("embedding", "padding_idx", 1.5),
        ("norm", "normalized_shape", [2.0]),
        ("norm", "eps", None),
        ("batch", "track_running_stats", 1),
        ("dropout", "p", "0.3"),
        ("gelu", "approximate", 1),
    ],
)
def test_other_facts_are_refused(name: str, fact: str, value: Any) -> None:
    facts = stored()
    facts[name][fact] = value
    with pytest.raises(ValueError, match=name):
        require_valid(facts)


def test_what_is_no_dict_of_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="its layers are a list"):
        require_valid([])
    with pytest.raises(ValueError, match="fc"):
        require_valid({"fc": ["Linear"]})


def test_a_small_file_does_not_take_much_memory_by_its_layers(tmp_path: Path) -> None:
    path = compare.save_checkpoint(tmp_path / "state.pth", LAYERS)
    with open_checkpoint(path) as stored:
        assert len(stored.layers) == len(facts_of(LAYERS))
        stored.budget = Budget(LAYER_BYTES * len(stored.layers) - 1)
        with pytest.raises(CheckpointError, match="the layers that its manifest describes"):
            _ = stored.layers
    tracemalloc.start()
    made = layers_from({str(index): facts_of(nn.Linear(1, 1))[""] for index in range(200)})
    assert tracemalloc.get_traced_memory()[0] < LAYER_BYTES * len(made)
    tracemalloc.stop()
