"""A fresh module: its weights, its mask, the kinds of its state, its mode and its streams."""

import pickle
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx
from flax.traverse_util import flatten_dict

from ..conversion.tensors import numpy_state, tensor_to_numpy
from ..proof import tolerances
from ..proof.agreement import Agreement, Finding, identical, same_names
from ..proof.cases import Config, Framework, State, Trial
from ..proof.reference import causal_mask
from ..runners.run import build_linen, build_nnx, build_torch

LAYERS = ("W_query", "W_key", "W_value", "out_proj")


def check_fresh(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Build modules from seeds, with the configuration of the trial.

    The weights are those of the library's own layers, bit for bit, if these are built from the same
    seed in the order of the formula.
    """

    def finding(name: str, agreed: Agreement) -> Finding:
        why = tolerances.NAMES if agreed.found == agreed.expected else tolerances.BITS
        return Finding(f"fresh: {name}", framework, trial.name, agreed, why)

    config = trial.config
    built, own = _weights(framework, config), _library_weights(framework, config)
    yield finding("names of the weights", same_names(built, own))
    for name in sorted(built.keys() & own.keys()):
        yield finding(f"the library's {name}", identical(built[name], own[name]))
    causal = causal_mask(config.context_length).astype(np.float32)
    for name, mask in _masks(framework, config).items():
        dtype = same_names([mask.dtype.name], ["float32"])
        yield finding(f"the mask {name}", dtype if not dtype.held else identical(mask, causal))
    for buffer in (True, False) if config.num_heads is None else (True,):
        kinds = _kinds(framework, config, buffer=buffer)
        name = "state with the buffer" if buffer else "state without it"
        yield finding(name, same_names(kinds, _expected_kinds(framework, config, buffer=buffer)))
    yield finding("the mode", same_names([_mode(framework, config)], ["training"]))
    facts = _linen_facts(config) if framework == "linen" else {}
    facts |= _nnx_facts(config) if framework == "nnx" else {}
    facts |= _torch_facts(config) if framework == "torch" else {}
    for name, is_so in facts.items():
        yield finding(name, same_names([str(is_so)], ["True"]))


def _weights(framework: Framework, config: Config) -> State:
    """Return the weights of a module that is built from the seed 0, by path."""
    if framework == "torch":
        return _seeded(lambda: build_torch(config, buffer=True).named_parameters())
    if framework == "linen":
        return _flat(build_linen(config, buffer=True).init(jax.random.key(0), _inputs(config)))
    return _flat({"params": nnx.to_pure_dict(nnx.state(build_nnx(config, buffer=True), nnx.Param))})


def _library_weights(framework: Framework, config: Config) -> State:
    """Return the weights of the library's own layers, built from the same seed in order."""
    width, bias = config.output_embedding_dim, config.qkv_bias
    names = LAYERS[:3] if config.num_heads is None else LAYERS

    def sizes(name: str) -> tuple[int, int, bool]:
        if name == "out_proj":
            return width, width, True
        return config.input_embedding_dim, width, bias

    if framework == "torch":

        def build() -> Any:
            layers = {name: torch.nn.Linear(*sizes(name)) for name in names}
            return torch.nn.ModuleDict(layers).named_parameters()

        return _seeded(build)
    if framework == "nnx":
        rngs = nnx.Rngs(0)
        layers = {}
        for name in names:
            inner, outer, has_bias = sizes(name)
            layer = nnx.Linear(inner, outer, use_bias=has_bias, rngs=rngs)
            layers[name] = nnx.to_pure_dict(nnx.state(layer))
        return _flat({"params": layers})

    class Layers(linen.Module):
        def setup(self) -> None:
            for name in names:
                _, outer, has_bias = sizes(name)
                setattr(self, name, linen.Dense(outer, use_bias=has_bias))

        def __call__(self, inputs: jax.Array) -> Any:
            outputs = [getattr(self, name)(inputs) for name in names[:3]]
            return self.out_proj(outputs[0]) if config.num_heads else outputs

    return _flat(Layers().init(jax.random.key(0), _inputs(config)))


def _seeded(build: Any) -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return numpy_state({name: value.detach() for name, value in build()})


def _flat(variables: Any) -> State:
    return {
        ".".join(path): np.asarray(value)
        for path, value in flatten_dict(dict(variables["params"])).items()
    }


def _inputs(config: Config) -> jax.Array:
    return jnp.ones((1, 1, config.input_embedding_dim), jnp.float32)


def _masks(framework: Framework, config: Config) -> dict[str, np.ndarray]:
    """Return the masks of modules that are built in several ways, one after the other."""
    if framework == "torch":
        first: Any = build_torch(config, buffer=True)
        first.mask.fill_(3.0)
        masks = {"after another's edit": build_torch(config, buffer=True).mask}
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            masks["where float64 is the default"] = build_torch(config, buffer=True).mask
        finally:
            torch.set_default_dtype(before)
        return numpy_state(masks)

    def build(seed: int) -> Any:
        if framework == "nnx":
            return build_nnx(config, buffer=True).mask[...]
        module = build_linen(config, buffer=True)
        return module.init(jax.random.key(seed), _inputs(config))["buffers"]["mask"]

    traced = jax.jit(lambda: build(0))()
    other: Any = build_nnx(config, buffer=True)
    other.mask[...] = jnp.full_like(other.mask[...], 3.0)
    arrays = {"under jit": traced, "after another's edit": build(0)}
    with jax.enable_x64(True):
        arrays["where x64 is on"] = build(0)
    return {name: np.asarray(array) for name, array in arrays.items()}


def _kinds(framework: Framework, config: Config, *, buffer: bool) -> set[str]:
    """Return each name of a fresh module's state with its kind: "mask Buffer"."""
    if framework == "torch":
        module = build_torch(config, buffer=buffer)
        saved = module.state_dict()
        return {
            f"{name} {type(tensor).__name__}{'' if name in saved else ' unsaved'}"
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        }
    if framework == "linen":
        variables = build_linen(config, buffer=buffer).init(jax.random.key(0), _inputs(config))
        return {f"{path[-2]}.{path[-1]} {path[0]}" for path in flatten_dict(variables)}
    return {
        f"{'.'.join(map(str, path))} {type(variable).__name__}"
        for path, variable in nnx.to_flat_state(nnx.state(build_nnx(config, buffer=buffer)))
        if not issubclass(type(variable), nnx.RngState)
    } | _bases(build_nnx(config, buffer=buffer).mask)


def _bases(mask: Any) -> set[str]:
    """Return what a filter by type takes the mask for."""
    return {f"mask is {kind.__name__}" for kind in type(mask).__mro__[1:] if kind is not object}


def _expected_kinds(framework: Framework, config: Config, *, buffer: bool) -> set[str]:
    names = LAYERS[:3] if config.num_heads is None else LAYERS
    weight, parameter = {
        "torch": ("weight", "Parameter"),
        "linen": ("kernel", "params"),
        "nnx": ("kernel", "Param"),
    }[framework]
    kinds = {f"{name}.{weight} {parameter}" for name in names}
    kinds |= {f"{name}.bias {parameter}" for name in names if config.qkv_bias or name == LAYERS[3]}
    if framework == "nnx":
        own: Any = nnx.Variable(jnp.zeros(1)) if buffer else jnp.zeros(1)
        bases = type(own).__mro__ if buffer else type(own).__mro__[1:]
        kinds |= {f"mask is {kind.__name__}" for kind in bases if kind is not object}
        kinds.add("mask Buffer" if buffer else f"mask {type(own).__name__}")
    elif buffer:
        kinds.add({"torch": "mask Tensor", "linen": "buffers.mask buffers"}[framework])
    return kinds


def _mode(framework: Framework, config: Config) -> str:
    """Return the mode that a fresh module is in; Linen's modules have none."""
    if framework == "torch":
        is_training = all(module.training for module in build_torch(config, buffer=True).modules())
    else:
        model: Any = build_nnx(config, buffer=True)
        is_training = framework == "linen" or not model.dropout.deterministic
    return "training" if is_training else "evaluation"


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
        if field.name != "num_heads" or config.num_heads is not None
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

    inputs = jnp.ones((2, config.context_length, config.input_embedding_dim))
    variables = build_linen(half, buffer=True).init(jax.random.key(0), inputs)
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
        return 1 if value != 1 else config.output_embedding_dim
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
