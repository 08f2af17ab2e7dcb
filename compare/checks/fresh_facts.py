"""What must be true of fresh modules, apart from their weights and their state."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

from ..conversion.tensors import tensor_to_numpy
from ..proof.agreement import identical
from ..proof.cases import Config, Framework
from ..runners.run import build_linen, build_nnx, build_torch

OF_HEADS = ("num_heads", "out_bias", "num_kv_heads", "scale")  # the multi-head class has them


def _torch_facts(config: Config) -> dict[str, bool]:
    """Return what must be true of torch modules: their device, what copies and parents keep."""
    with torch.device("meta"):
        abstract = build_torch(config, buffer=True).state_dict()
    devices = {tensor.device.type for tensor in abstract.values()}
    edited: Any = build_torch(config, buffer=True)
    edited.mask[0, -1] = -2.5
    parent = torch.nn.Sequential(build_torch(config, buffer=True))
    parent.load_state_dict({f"0.{name}": value for name, value in edited.state_dict().items()})
    kept = {
        "a copy keeps the mask": deepcopy(edited),
        "a pickled copy keeps the mask": pickle.loads(pickle.dumps(edited)),
        "a parent loads the mask": parent[0],
    }
    same = {
        name: identical(tensor_to_numpy(module.mask), tensor_to_numpy(edited.mask)).held
        for name, module in kept.items()
    }
    return {"all on the default device": devices == {"meta"}, **same}


def _linen_facts(config: Config) -> dict[str, bool]:
    """Return what must be true of Linen modules: they are values, and draw by their own path."""
    module = build_linen(config, buffer=True)
    others = {
        field.name: replace(config, **{field.name: _another(config, field.name)})
        for field in fields(config)
        if field.name not in OF_HEADS or config.num_heads is not None
    }
    facts = {
        f"unequal if another {name}": build_linen(other, buffer=True) != module
        for name, other in others.items()
    }
    half = replace(config, dropout=0.5)

    class Stack(linen.Module):
        def setup(self) -> None:
            self.one, self.two = build_linen(half, buffer=True), build_linen(half, buffer=True)

        def __call__(self, inputs: jax.Array) -> list[jax.Array]:
            return [layer(inputs, deterministic=False) for layer in (self.one, self.two)]

    inputs = jax.random.normal(
        jax.random.key(2), (2, config.context_length, config.input_embedding_dim)
    )
    outputs, variables = build_linen(half, buffer=True).init_with_output(jax.random.key(0), inputs)
    applied = build_linen(half, buffer=True).apply(variables, inputs)
    facts["the first call is as the others"] = bool((outputs == applied).all())
    shared = {name: {"one": tree, "two": tree} for name, tree in variables.items()}
    one, two = Stack().apply(shared, inputs, rngs={"dropout": jax.random.key(1)})
    return {**facts, "each layer drops its own": bool((one != two).any())}


def _another(config: Config, name: str) -> Any:
    """Return another valid value of a constructor argument."""
    value = getattr(config, name)
    if name == "implementation":
        return "reference" if value != "reference" else "fused"
    if name == "dropout":
        return 1.0 - value if value != 0.5 else 0.25
    if name == "num_heads":
        return 1 if value == config.output_embedding_dim else config.output_embedding_dim
    if name == "num_kv_heads":
        return 1 if value != 1 else None
    if name == "scale":
        return None if value is not None else 2.0
    if isinstance(value, tuple):
        return value[1:] + value[:1]
    return not value if isinstance(value, bool) else 2 * value


def _nnx_facts(config: Config) -> dict[str, bool]:
    """Return what must be true of NNX models: dropout draws from its own stream."""
    ones = jnp.ones((8, 8, 8, 8) if config.num_heads else (8, 8, 8))
    half = replace(config, dropout=0.5)

    def dropped(params: int, dropout: int) -> list[float]:
        rngs = nnx.Rngs(params=params, dropout=dropout)
        classes = type(build_nnx(half, buffer=True))
        model: Any = classes(**half.arguments, rngs=rngs)
        return np.asarray(model.dropout(ones)).ravel().tolist()

    return {
        "dropout draws from its stream": dropped(0, 1) != dropped(0, 2),
        "dropout leaves the other streams": dropped(0, 1) == dropped(5, 1),
    }


FRESH_FACTS: dict[Framework, Callable[[Config], dict[str, bool]]] = {
    "torch": _torch_facts,
    "linen": _linen_facts,
    "nnx": _nnx_facts,
}
