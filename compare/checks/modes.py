"""Training and evaluation: dropout only in training, and the mask obeyed in both."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import jax
import numpy as np
import torch

from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..proof import tolerances
from ..proof.agreement import Agreement, Finding, agreement, identical, same_names
from ..proof.cases import Framework, Trial, draw
from ..proof.parity import against_reference, exact_and_limit
from ..runners.jax_settings import jax_on
from ..runners.run import build_linen, ready_linen, ready_nnx, ready_torch, run
from .calls import CALL_FACTS

RATES = (0.1, 0.6, 0.9, 1.0)  # on both sides of 1/2, and the largest


def check_modes(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Run the module itself in both modes, at several rates, in float32.

    In `eval`, its outputs are the reference's at every rate. In training, each call drops other
    weights, the same random state drops the same ones, and without dropout an edit of the mask is
    obeyed.
    """
    trial = trial._replace(keep=None).rounded("float32")

    def finding(name: str, case: str, agreed: Agreement, why: str) -> Finding:
        return Finding(f"modes: {name}", framework, case, agreed, why)

    for rate in RATES:
        config = replace(trial.config, dropout=rate)
        outputs = run(framework, config, trial.state, trial.inputs, device=device)
        agreed = against_reference(outputs, config, trial.state, trial.inputs)
        yield finding("no dropout in eval", f"rate {rate}", agreed, tolerances.OUTPUT)
    half = trial._replace(config=replace(trial.config, dropout=0.5))
    call, _ = _in_training(framework, half, device)
    first, again, second = call(0), call(0), call(1)
    case = "rate 0.5"
    yield finding("the same random state", case, identical(again, first), tolerances.BITS)
    differs = np.array([float((first != second).any())])
    yield finding("another call", case, agreement(differs, np.ones(1), 0.0), tolerances.BITS)
    none = trial._replace(config=replace(trial.config, dropout=0.0))
    call, edit = _in_training(framework, none, device)
    for mask in (trial.mask, _edited(trial)):
        edit(mask)
        exact, limit = exact_and_limit(none.config, none.masked("", mask).state, none.inputs)
        agreed = agreement(call(0), exact, limit)
        yield finding("an edit is obeyed in training", trial.name, agreed, tolerances.OUTPUT)
    yield from _everything_dropped(framework, trial, device, finding)
    edited, closed = -2.5 * trial.mask, trial.mask.copy()
    closed[1] = 1.0
    for case, mask in ((trial.name, edited), (f"{trial.name}, a row closed", closed)):
        for name, is_so in CALL_FACTS[framework](half.masked("", mask)).items():
            yield finding(name, case, same_names([str(is_so)], ["True"]), tolerances.NAMES)


def _everything_dropped(
    framework: Framework, trial: Trial, device: str, finding: Callable[..., Finding]
) -> Iterator[Finding]:
    """Drop every weight: the context is 0, with as many tokens as the fused path is used for."""
    package = "torch_impl" if framework == "torch" else "flax_impl"
    long = import_module(f"{package}.dispatch").MIN_FUSED_TOKENS + 1
    for tokens in (trial.inputs.shape[1], long):
        config = replace(trial.config, dropout=1.0, context_length=tokens)
        drawn = draw(config, tokens, np.random.default_rng(9), batch=1).rounded("float32")
        call, _ = _in_training(framework, drawn, device)
        outputs = call(0)
        bias = drawn.state.get("out_proj.bias", np.zeros((), np.float32))
        agreed = agreement(outputs, np.broadcast_to(bias, outputs.shape), 0.0)
        yield finding("rate 1 drops all", f"{tokens} tokens", agreed, tolerances.BITS)


def _edited(trial: Trial) -> np.ndarray:
    """Return another mask: the last token may not see the first, and all else is open."""
    mask = np.zeros_like(trial.mask)
    mask[trial.inputs.shape[1] - 1, 0] = 1.0
    return mask


def _in_training(
    framework: Framework, trial: Trial, device: str
) -> tuple[Callable[[int], np.ndarray], Callable[[np.ndarray], None]]:
    """Return a call of one module in training mode with a seed, and a function to edit its mask."""
    if framework == "torch":
        module = ready_torch(trial.config, trial.state, device, None).train()
        inputs = numpy_to_tensor(trial.inputs).to(device)

        def call_torch(seed: int) -> np.ndarray:
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.no_grad():
                torch.manual_seed(0)
                for _ in range(seed):  # another call with the state that the last one left
                    module(inputs)
                return tensor_to_numpy(module(inputs))

        def edit_torch(mask: np.ndarray) -> None:
            module.mask.copy_(torch.from_numpy(mask))

        return call_torch, edit_torch
    if framework == "linen":
        _, variables = ready_linen(trial.config, trial.state, None)
        model: Any = build_linen(trial.config, buffer=True)

        def call_linen(seed: int) -> np.ndarray:
            rngs = {"dropout": jax.random.key(seed)}
            with jax_on(device):
                return np.asarray(
                    model.apply(variables, trial.inputs, deterministic=False, rngs=rngs)
                )

        return call_linen, lambda mask: variables.update(buffers={"mask": jax.numpy.array(mask)})

    def call_nnx(seed: int) -> np.ndarray:
        with jax_on(device):
            model: Any = ready_nnx(trial.config, {**trial.state, "mask": masks[-1]}, None)
            model.train()
            for _ in range(seed):
                model(trial.inputs)
            return np.asarray(model(trial.inputs))

    masks = [trial.mask]
    return call_nnx, masks.append
