"""One missing rename rule is one line to paste, and hundreds of names take no time."""

import time

import jax
import jax.numpy as jnp
import pytest
import torch

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


def test_hundreds_of_names_are_compared_in_no_time() -> None:
    begin = time.process_time()
    with pytest.raises(compare.ConversionError, match="… and 1,188 more"):
        compare.match(state("layers.", 600), template("stages_", 600))
    assert time.process_time() - begin < 10
