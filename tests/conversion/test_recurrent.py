"""LSTM and GRU of several layers and directions, as cells of Flax."""

import json
import re
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

import compare

SIZE, FAN_IN = 3, 2
CELLS = {"lstm": nn.OptimizedLSTMCell, "plain lstm": nn.LSTMCell, "gru": nn.GRUCell}


class Layers(nn.Module):
    """One RNN after another, each in one direction or in two."""

    cell: Any
    count: int
    is_both: bool

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        def run(name: str, **arguments: Any) -> Any:
            cell = self.cell(SIZE, name=name, param_dtype=jnp.float64)
            outputs: Any = nn.RNN(cell, **arguments)(inputs)
            return outputs

        for index in range(self.count):
            there = run(f"there_{index}")
            if self.is_both:
                back = run(f"back_{index}", reverse=True, keep_order=True)
            inputs = jnp.concatenate((there, back), axis=-1) if self.is_both else there
        return inputs


PLAIN_RUN = {("lstm", 1, False), ("plain lstm", 2, False), ("gru", 2, True)}
CASES = [
    pytest.param(*case, marks=[] if case in PLAIN_RUN else [pytest.mark.again])
    for case in product(CELLS, (1, 2), (False, True))
]


@pytest.mark.parametrize(("name", "count", "is_both"), CASES)
def test_the_outputs_are_those_of_torch(name: str, count: int, is_both: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.GRU if name == "gru" else torch.nn.LSTM
    source = torch.nn.ModuleDict(
        {"rnn": layer(FAN_IN, SIZE, count, batch_first=True, bidirectional=is_both).double()}
    )
    rename = {"rnn.l0": "there_0", "rnn.l0_reverse": "back_0"} if is_both else {"rnn": "there_0"}
    if count > 1:
        steps = {"": "there", "_reverse": "back"} if is_both else {"": "there"}
        rename = {
            f"rnn.l{index}{end}": f"{start}_{index}"
            for end, start in steps.items()
            for index in range(count)
        }
    with jax.enable_x64(True):
        inputs = np.random.default_rng(0).normal(size=(2, 5, FAN_IN))
        model = Layers(CELLS[name], count, is_both)
        template = jax.eval_shape(model.init, jax.random.key(0), inputs)
        state = source.state_dict()
        mapping = compare.match(state, template, rename=rename)
        made = compare.torch_to_linen(state, template, mapping=mapping)
        expected = source["rnn"](torch.from_numpy(inputs))[0].detach().numpy()
        outputs: Any = model.apply(made, inputs)
        np.testing.assert_allclose(outputs, expected, rtol=1e-12, atol=1e-14)
        back = compare.linen_to_torch(made, mapping=mapping)
        source.load_state_dict(back)
        again = source["rnn"](torch.from_numpy(inputs))[0].detach().numpy()
        np.testing.assert_allclose(again, expected, rtol=1e-12, atol=1e-14)
    assert compare.StateMapping.from_json(json.loads(json.dumps(mapping.as_json()))) == mapping


def test_a_module_is_told_to_match_its_state_dict() -> None:
    model = Layers(nn.OptimizedLSTMCell, 1, False)
    with jax.enable_x64(True):
        template = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2, FAN_IN)))
    source = torch.nn.ModuleDict({"there_0": torch.nn.LSTM(FAN_IN, SIZE)})
    with pytest.raises(compare.ConversionError, match=re.escape("match its state dict instead")):
        compare.match(source, template)
    assert len(compare.match(source.state_dict(), template).rows) == 12


def test_projected_outputs_are_refused() -> None:
    state = torch.nn.LSTM(FAN_IN, SIZE, proj_size=1).state_dict()
    cell = nn.OptimizedLSTMCell(SIZE)
    carry = jnp.ones((1, SIZE))
    template = jax.eval_shape(cell.init, jax.random.key(0), (carry, carry), jnp.ones((1, FAN_IN)))
    with pytest.raises(compare.ConversionError, match="weight_hr_l0"):
        compare.match(state, template)
