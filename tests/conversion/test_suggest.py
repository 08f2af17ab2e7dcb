"""One missing rename rule is one line to paste, and hundreds of names take no time."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx

import compare
from compare.conversion.suggest import rename_rules

LAYERS = 12


def state(prefix: str, layers: int = LAYERS) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{layer}.{name}.weight": torch.zeros(3, 4)
        for layer in range(layers)
        for name in ("fc", "proj")
    }


def template(
    name: str, layers: int = LAYERS
) -> dict[str, dict[str, dict[str, dict[str, jax.Array]]]]:
    module = {part: {"kernel": jnp.zeros((4, 3))} for part in ("fc", "proj")}
    return {"params": {f"{name}{layer}": module for layer in range(layers)}}


@pytest.mark.parametrize(
    ("prefix", "rules"),
    [
        ("blocks.", {"blocks.*": "blocks_*"}),
        ("module.blocks_", {"module.*": "*"}),
        ("_orig_mod.blocks_", {"_orig_mod.*": "*"}),
    ],
)
def test_the_rule_is_one_line_to_paste(prefix: str, rules: dict[str, str]) -> None:
    with pytest.raises(compare.ConversionError) as caught:
        compare.match(state(prefix), template("blocks_"))
    message = str(caught.value)
    assert "strict" not in message, "match has no such argument"
    assert len(message.splitlines()) < 35
    assert f"rename={rules}".replace("'", '"') in message
    mapping = compare.match(state(prefix), template("blocks_"), rename=rules)
    assert len(mapping.rows) == 2 * LAYERS


def test_names_that_have_nothing_in_common_get_no_rule() -> None:
    assert rename_rules(["encoder.0.fc.weight"], {"decoder_0.fc.weight"}) == {}


def test_a_module_that_can_be_only_one_is_suggested() -> None:
    source = torch.nn.ModuleDict({"fc1": torch.nn.Linear(3, 4), "fc2": torch.nn.Linear(4, 5)})
    dense = {
        f"dense{index}": {"kernel": jnp.zeros(sizes), "bias": jnp.zeros(sizes[1])}
        for index, sizes in enumerate([(3, 4), (4, 5)])
    }
    with pytest.raises(compare.ConversionError) as caught:
        compare.match(source, {"params": dense})
    assert 'rename={"fc1": "dense0", "fc2": "dense1"}' in str(caught.value)
    compare.match(source, {"params": dense}, rename={"fc1": "dense0", "fc2": "dense1"})


def test_modules_that_are_alike_get_no_rule() -> None:
    source = torch.nn.ModuleDict({"fc1": torch.nn.Linear(4, 4), "fc2": torch.nn.Linear(4, 4)})
    layer = {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}
    with pytest.raises(compare.ConversionError, match=r"torch\.name"):
        compare.match(source, {"params": {"dense0": layer, "dense1": layer}})


def test_hundreds_of_names_are_compared_in_no_time() -> None:
    begin = time.process_time()
    with pytest.raises(compare.ConversionError, match="… and 1,188 more"):
        compare.match(state("layers.", 600), template("stages_", 600))
    assert time.process_time() - begin < 10


class Box(nnx.Module):
    def __init__(self) -> None:
        self.layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))


PARAMS = {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}


@pytest.mark.parametrize(
    ("source", "template", "error", "message"),
    [
        (torch.nn.Linear(3, 4), PARAMS, TypeError, r'give all variables, {"params": \.\.\.}'),
        (torch.nn.Linear(3, 4), {"a": PARAMS}, ValueError, r'no collection "params"'),
        (torch.nn.Linear, {"params": PARAMS}, TypeError, "the class Linear; give an instance"),
        (torch.nn.Linear(3, 4), Box, TypeError, "the class Box; give an instance"),
    ],
    ids=["params alone", "no collection", "torch class", "Flax class"],
)
def test_a_usual_mistake_is_named_in_one_line(
    source: Any, template: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compare.match(source, template)


def test_a_mapping_of_the_other_api_is_named() -> None:
    mapping = compare.match(torch.nn.Linear(3, 4), {"params": PARAMS})
    with pytest.raises(ValueError, match="is for Linen variables, and this is an NNX model"):
        compare.torch_to_nnx(
            torch.nn.Linear(3, 4), nnx.Linear(3, 4, rngs=nnx.Rngs(0)), mapping=mapping
        )
