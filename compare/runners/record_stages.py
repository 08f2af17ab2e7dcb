"""Record every intermediate result of one implementation from outside, while its module runs."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import jax
import numpy as np
import torch
from flax import linen
from torch.overrides import TorchFunctionMode

from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..proof.cases import Framework, Trial
from ..proof.reference import Stages
from .jax_settings import jax_on
from .run import NnxFunction, flax_forward, flax_state, flax_template, ready_torch

# The stage that each child module outputs. The scores are recorded as the input of the softmax.
PRODUCERS = {
    "W_query": "queries",
    "W_key": "keys",
    "W_value": "values",
    "dropout": "weights",
    "attention_dropout": "weights",
}


def record_stages(framework: Framework, trial: Trial, device: str = "cpu") -> Stages:
    """Run the trial in its dtype and return its stages, shaped as in `compare.proof.reference`.

    Raises:
        ValueError: a stage was never computed, or more than once.
    """
    recorded: dict[str, list[Any]] = {name: [] for name in Stages._fields}
    if framework == "torch":
        _torch(trial, device, recorded)
    else:
        with jax_on(device, trial.inputs.dtype):
            (_linen if framework == "linen" else _nnx)(trial, recorded)
    for name, arrays in recorded.items():
        if len(arrays) != 1:
            raise ValueError(f"the stage {name} was computed {len(arrays)} times; expected once")
    convert = tensor_to_numpy if framework == "torch" else np.asarray
    return Stages(**{name: convert(arrays[0]) for name, arrays in recorded.items()})


def _torch(trial: Trial, device: str, recorded: dict[str, list[Any]]) -> None:
    module = ready_torch(trial.config, trial.state, device, trial.keep)
    for name, child in module.named_children():
        if name not in PRODUCERS:
            continue
        child.register_forward_hook(
            lambda _module, _inputs, output, name=name: recorded[PRODUCERS[name]].append(output)
        )

    class RecordScores(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function in (torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax):
                recorded["scores"].append(args[0])
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), RecordScores():
        recorded["context"].append(module(numpy_to_tensor(trial.inputs).to(device)))


def _linen(trial: Trial, recorded: dict[str, list[Any]]) -> None:
    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: linen.module.InterceptorContext
    ) -> Any:
        output = call(*args, **kwargs)
        if context.module.name in PRODUCERS:
            recorded[PRODUCERS[context.module.name]].append(output)
        return output

    state = flax_state(trial.state, flax_template("linen", trial.config))
    with linen.intercept_methods(intercept), _recorded_softmax(recorded):
        _run_compiled(flax_forward("linen", trial.config), state, trial, recorded)


def _nnx(trial: Trial, recorded: dict[str, list[Any]]) -> None:
    def record(model: Any) -> None:
        for name in ("W_query", "W_key", "W_value", "dropout"):
            setattr(
                model,
                name,
                NnxFunction(_recording(getattr(model, name), recorded[PRODUCERS[name]])),
            )

    state = flax_state(trial.state, flax_template("nnx", trial.config))
    with _recorded_softmax(recorded):
        _run_compiled(flax_forward("nnx", trial.config, record), state, trial, recorded)


def _run_compiled(
    forward: Callable[..., Any],
    state: tuple[Any, Any],
    trial: Trial,
    recorded: dict[str, list[Any]],
) -> None:
    """Run the forward pass as one compiled program that returns the recorded stages."""

    def stages(*arguments: Any) -> dict[str, list[Any]]:
        recorded["context"].append(forward(*arguments))
        return recorded

    recorded.update(jax.jit(stages)(*state, trial.keep, trial.inputs))


def _recorded_softmax(recorded: dict[str, list[Any]]) -> Any:
    """Return a patch that records the input of the softmax."""
    softmax = jax.nn.softmax

    def record(scores: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        recorded["scores"].append(scores)
        return softmax(scores, *args, **kwargs)

    return patch.object(jax.nn, "softmax", record)


def _recording(call: Callable[[Any], Any], into: list[Any]) -> Callable[[Any], Any]:
    def recorded(inputs: Any) -> Any:
        into.append(call(inputs))
        return into[-1]

    return recorded
