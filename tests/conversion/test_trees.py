"""Trees as JAX programs have them: boxes, lists, tuples, named tuples, dataclasses, None."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import struct
from flax.core import freeze

import compare


@struct.dataclass
class Layer:
    kernel: Any
    bias: Any


class Named(NamedTuple):
    kernel: Any
    bias: Any


class TrainState(NamedTuple):
    step: int
    params: Any


def same_structure(tree: Any, other: Any) -> bool:
    structure: Any = jax.tree.structure(tree)
    return bool(structure == jax.tree.structure(other))


def partitioned() -> tuple[nn.Dense, Any]:
    kernel_init = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
    module = nn.Dense(3, kernel_init=kernel_init)
    return module, module.init(jax.random.key(0), jnp.ones((1, 2)))


def test_boxes_are_opened_and_kept(tmp_path: Path) -> None:
    module, variables = partitioned()
    linear, inputs = torch.nn.Linear(2, 3), np.ones((1, 2), np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), inputs)
    for template in (variables, abstract, freeze(variables)):
        made = compare.torch_to_linen(linear, template)
        assert made["params"]["kernel"].names == (None, "model")
        expected = linear(torch.from_numpy(inputs)).detach().numpy()
        outputs: Any = module.apply(made, inputs)
        np.testing.assert_allclose(outputs, expected, rtol=1e-6)
    state = compare.linen_to_torch(made, mapping=compare.match(linear, made))
    assert torch.equal(state["weight"], linear.weight)
    for name in ("box.msgpack", "box.orbax", "box.safetensors"):
        saved = compare.save_checkpoint(tmp_path / name, made)
        loaded = compare.load_checkpoint(saved, abstract)
        assert same_structure(loaded, made)
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded, made))


def test_nodes_of_every_kind_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(2, 3 - 1) for _ in range(4)))
    kernel, bias = jnp.zeros((2, 2)), jnp.zeros(2)
    plain = {"kernel": kernel, "bias": bias, "scale": None}
    tree = {"params": [plain, Layer(kernel, bias), Named(kernel, bias), (plain,)[0]]}
    mapping = compare.match(layers, tree, layouts={"*.weight": "transposed"})
    made = compare.torch_to_linen(layers, tree, mapping=mapping)
    assert same_structure(made, tree)
    for layer, node in zip(layers, made["params"], strict=True):
        is_dict = isinstance(node, dict)
        stored = node["kernel"] if is_dict else node.kernel
        np.testing.assert_array_equal(stored, layer.weight.detach().numpy().T)  # type: ignore[operator]
    state = compare.linen_to_torch(made, mapping=mapping)
    assert all(torch.equal(state[name], value) for name, value in layers.state_dict().items())
    for name in ("tree.msgpack", "tree.orbax", "tree.safetensors"):
        loaded = compare.load_checkpoint(compare.save_checkpoint(tmp_path / name, made), tree)
        assert same_structure(loaded, tree)
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded, made))


def test_what_is_no_tree_of_arrays_is_named() -> None:
    linear = torch.nn.Linear(2, 2)
    state = TrainState(3, {"kernel": jnp.ones((2, 2))})
    with pytest.raises(TypeError, match=r'TrainState.*give {"params": state.params}'):
        compare.match(linear, state)
    with pytest.raises(TypeError, match="params/kernel is a float; expected an array"):
        compare.match(linear, {"params": {"kernel": 1.0}})
    endless: dict[str, Any] = {}
    endless["params"] = {"inner": endless}
    with pytest.raises(RecursionError):
        compare.match(linear, endless)
