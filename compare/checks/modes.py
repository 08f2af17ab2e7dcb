"""Training and evaluation: dropout only in training, and the mask obeyed in both."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

import flax_impl

from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..proof import tolerances
from ..proof.agreement import Agreement, Finding, agreement, identical, same_names
from ..proof.cases import Framework, Trial, draw
from ..proof.parity import against_reference, exact_and_limit
from ..runners.run import build_linen, jax_on, ready_linen, ready_nnx, ready_torch, run

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
    children: dict[Framework, Callable[[Trial], dict[str, bool]]] = {
        "torch": _torch_facts,
        "linen": _linen_facts,
        "nnx": _nnx_facts,
    }
    for name, is_so in children[framework](half.masked("", -2.5 * trial.mask)).items():
        yield finding(name, trial.name, same_names([str(is_so)], ["True"]), tolerances.NAMES)


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


def _torch_facts(trial: Trial) -> dict[str, bool]:
    """Return what must be true of calls: each child is called, and the state stays as it is."""
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
