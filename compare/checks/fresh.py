"""A fresh module: its weights, its mask, the kinds of its state, its mode and its streams."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx
from flax.traverse_util import flatten_dict

from ..conversion.tensors import numpy_state
from ..proof import tolerances
from ..proof.agreement import Agreement, Finding, identical, same_names
from ..proof.cases import Config, Framework, State, Trial
from ..proof.reference import causal_mask
from ..runners.run import build_linen, build_nnx, build_torch
from .fresh_facts import FRESH_FACTS

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
    children = _children(framework, replace(config, dropout=0.0))
    yield finding("the layers without dropout", same_names(children, _children(framework, config)))
    yield finding("the mode", same_names([_mode(framework, config)], ["training"]))
    for name, is_so in FRESH_FACTS[framework](config).items():
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
    names, sizes = list(config.layers), config.layers.__getitem__
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
    model: Any = build_nnx(config, buffer=buffer)
    return _nnx_kinds(model) | _bases(model.mask)


def _nnx_kinds(model: Any, prefix: str = "") -> set[str]:
    return {
        f"{prefix}{'.'.join(map(str, path))} {type(variable).__name__}"
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def _bases(mask: Any) -> set[str]:
    """Return what a filter by type takes the mask for."""
    return {f"mask is {kind.__name__}" for kind in type(mask).__mro__[1:] if kind is not object}


def _expected_kinds(framework: Framework, config: Config, *, buffer: bool) -> set[str]:
    weight, parameter = {
        "torch": ("weight", "Parameter"),
        "linen": ("kernel", "params"),
        "nnx": ("kernel", "Param"),
    }[framework]
    kinds = {f"{name}.{weight} {parameter}" for name in config.layers}
    kinds |= {f"{name}.bias {parameter}" for name, (_, _, bias) in config.layers.items() if bias}
    if framework == "nnx":
        own: Any = nnx.Variable(jnp.zeros(1)) if buffer else jnp.zeros(1)
        bases = type(own).__mro__ if buffer else type(own).__mro__[1:]
        kinds |= {f"mask is {kind.__name__}" for kind in bases if kind is not object}
        kinds.add("mask Buffer" if buffer else f"mask {type(own).__name__}")
        kinds |= _nnx_kinds(nnx.Dropout(config.dropout, rngs=nnx.Rngs(0)), "dropout.")
    elif buffer:
        kinds.add({"torch": "mask Tensor", "linen": "buffers.mask buffers"}[framework])
    return kinds


def _children(framework: Framework, config: Config) -> set[str]:
    """Return each layer of a module with its class; its rate may be raised after it was built."""
    layers: dict[str, Any]
    if framework == "torch":
        layers = dict(build_torch(config, buffer=True).named_children())
    elif framework == "nnx":
        layers = {
            name: child
            for name, child in vars(build_nnx(config, buffer=True)).items()
            if isinstance(child, nnx.Module)
        }
    else:
        module = build_linen(config, buffer=True)
        variables = module.init(jax.random.key(0), _inputs(config))
        bound = module.bind(variables)
        layers = {name: getattr(bound, name) for name in (*LAYERS[:3], "attention_dropout")}
    return {f"{name} {type(layer).__name__}" for name, layer in layers.items()}


def _mode(framework: Framework, config: Config) -> str:
    """Return the mode that a fresh module is in; Linen's modules have none."""
    if framework == "torch":
        is_training = all(module.training for module in build_torch(config, buffer=True).modules())
    else:
        model: Any = build_nnx(config, buffer=True)
        is_training = framework == "linen" or not model.dropout.deterministic
    return "training" if is_training else "evaluation"
