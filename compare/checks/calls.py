"""What must be true of each call of a module: whom it calls, and that it changes no state."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

import flax_impl

from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..proof.cases import Framework, Trial
from ..runners.run import build_linen, ready_linen, ready_nnx, ready_torch


def _torch_facts(trial: Trial) -> dict[str, bool]:
    """Call a torch module with hooks, with only its dropout in training, and with another one."""
    module: Any = ready_torch(trial.config, trial.state, "cpu", None)
    inputs = numpy_to_tensor(trial.inputs)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    called: set[str] = set()
    hooks = []
    for name, child in module.named_children():
        hooks += [
            child.register_forward_pre_hook(lambda *_, name=name: called.add(f"before {name}")),
            child.register_forward_hook(lambda *_, name=name: called.add(f"after {name}")),
        ]
        if child is module.dropout:
            hooks[-1].remove()  # a pre-hook alone must be enough
    with torch.no_grad():
        expected = module(inputs)
        [hook.remove() for hook in hooks]
        module.train()(inputs)
        module.eval().dropout.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            differs = bool((module(inputs) != expected).any())
        module.dropout = _TorchHalf().eval()
        halved = bool((module(inputs) != expected).any())
    names = {name for name, _ in module.named_children()}
    wanted = {f"{when} {name}" for name in names for when in ("before", "after")}
    state = module.state_dict()
    return {
        "every child is called": called == wanted - {"after dropout"},
        "dropout alone may be in training": differs,
        "another dropout is called in eval": halved,
        "a call leaves the state": all(
            tensor_to_numpy(state[name]).tobytes() == tensor_to_numpy(value).tobytes()
            for name, value in before.items()
        ),
    }


class _TorchHalf(torch.nn.Dropout):
    """A dropout that halves the weights in evaluation."""

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        return weights / 2


class _NnxHalf(nnx.Dropout):
    """A dropout that halves the weights in evaluation."""

    def __call__(self, inputs: Any, **_: Any) -> Any:
        return inputs / 2


def _linen_facts(trial: Trial) -> dict[str, bool]:
    _, variables = ready_linen(trial.config, trial.state, None)
    module: Any = build_linen(trial.config, buffer=True)
    rngs = {"dropout": jax.random.key(0)}
    expected = module.apply(variables, trial.inputs)
    with_key = module.apply(variables, trial.inputs, deterministic=True, rngs=rngs)
    kept = []
    for deterministic in (True, False):
        _, after = module.apply(
            variables, trial.inputs, deterministic=deterministic, rngs=rngs, mutable=["buffers"]
        )
        mask = after["buffers"]["mask"]
        kept.append(np.asarray(mask).tobytes() == trial.mask.tobytes())
    return {
        "a key alone drops nothing": np.asarray(with_key).tobytes()
        == np.asarray(expected).tobytes(),
        "a call leaves the state": all(kept),
    }


def _nnx_facts(trial: Trial) -> dict[str, bool]:
    model: Any = ready_nnx(trial.config, trial.state, None)
    kinds = (nnx.Param, flax_impl.nnx.Buffer)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, kinds)))
    expected = np.asarray(model(trial.inputs))
    model.train()
    model(trial.inputs)
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, kinds)))
    model.eval()
    model.dropout = _NnxHalf(0.5, deterministic=True, rngs=nnx.Rngs(0))
    halved = bool((np.asarray(model(trial.inputs)) != expected).any())
    same = jax.tree.map(lambda one, two: one.tobytes() == two.tobytes(), before, after)
    return {
        "another dropout is called in eval": halved,
        "a call leaves the state": jax.tree.all(same),
    }


CALL_FACTS: dict[Framework, Callable[[Trial], dict[str, bool]]] = {
    "torch": _torch_facts,
    "linen": _linen_facts,
    "nnx": _nnx_facts,
}
