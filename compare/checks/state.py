"""The mask as state: what kind of entry it is, and that it survives conversion, checkpoints and compiled programs."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from flax.traverse_util import flatten_dict

import flax_impl

from ..checkpoint import load_checkpoint, save_checkpoint
from ..conversion.convert import linen_to_torch, nnx_to_torch, torch_to_linen, torch_to_nnx
from ..conversion.errors import ConversionError
from ..conversion.tensors import numpy_state, numpy_to_tensor, tensor_to_numpy, torch_state
from ..proof import tolerances
from ..proof.agreement import Agreement, Finding, agreement, identical, same_names
from ..proof.cases import Framework, State, Trial
from ..proof.parity import exact_and_limit
from ..proof.reference import causal_mask
from ..runners.run import build_linen, build_nnx, build_torch, jax_on, linen_template

SUFFIXES = (".pth", ".safetensors", ".msgpack")


def check_state(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Yield what is trained, what is saved, and that state with an edited mask comes back bit for bit."""
    given = trial.rounded("float32")
    edited = given.masked(trial.name, np.where(given.mask != 0, np.float32(-2.5), given.mask))

    def finding(what: str, agreed: Agreement, why: str) -> Finding:
        return Finding(f"state: {what}", framework, trial.name, agreed, why)

    trained, saved = _kinds(framework, given)
    yield finding(
        "what is trained", same_names(trained, given.state.keys() - {"mask"}), tolerances.NAMES
    )
    yield finding("what is saved", same_names(saved, given.state), tolerances.NAMES)
    yield finding("the mask when built", _built(framework, given), tolerances.BITS)
    holder = _filled(framework, edited.state, edited)
    yield finding(
        "through the converter", _same_state(_state_of(holder), edited.state), tolerances.BITS
    )
    with tempfile.TemporaryDirectory() as folder:
        for suffix in SUFFIXES:
            path = save_checkpoint(Path(folder) / f"state{suffix}", holder)
            loaded = load_checkpoint(path, _empty(framework, given))
            yield finding(
                f"through {suffix}", _same_state(_state_of(loaded), edited.state), tolerances.BITS
            )
    yield finding("64 bits refused or kept", _wide(framework, given), tolerances.BITS)
    yield finding("an edit is obeyed", _edit_obeyed(framework, given, device), tolerances.OUTPUT)


def _empty(framework: Framework, trial: Trial) -> Any:
    if framework == "torch":
        return build_torch(trial.config, buffer=True)
    return (
        linen_template(trial.config, buffer=True)
        if framework == "linen"
        else build_nnx(trial.config, buffer=True)
    )


def _filled(framework: Framework, state: State, trial: Trial) -> Any:
    holder = _empty(framework, trial)
    if framework == "torch":
        holder.load_state_dict(torch_state(state))
        return holder
    return (torch_to_linen if framework == "linen" else torch_to_nnx)(torch_state(state), holder)


def _state_of(holder: Any) -> State:
    if isinstance(holder, torch.nn.Module):
        return numpy_state(holder.state_dict())
    return numpy_state(
        nnx_to_torch(holder) if isinstance(holder, nnx.Module) else linen_to_torch(holder)
    )


def _kinds(framework: Framework, trial: Trial) -> tuple[set[str], set[str]]:
    """Return the torch names of what an optimizer is given, and of what a checkpoint holds, for a fresh module."""
    holder = _empty(framework, trial)
    if framework == "torch":
        return {name for name, _ in holder.named_parameters()}, set(holder.state_dict())
    if framework == "linen":
        return _torch_names(holder["params"]), set().union(*map(_torch_names, holder.values()))
    trained = _torch_names(nnx.to_pure_dict(nnx.state(holder, nnx.Param)))
    return trained, trained | _torch_names(
        nnx.to_pure_dict(nnx.state(holder, flax_impl.nnx.Buffer))
    )


def _torch_names(tree: Any) -> set[str]:
    """Return dotted names: a `kernel` is torch's `weight`."""
    return {".".join(path).replace("kernel", "weight") for path in flatten_dict(tree)}


def _built(framework: Framework, trial: Trial) -> Agreement:
    """Compare the mask of a fresh module with the causal one."""
    causal = causal_mask(trial.config.context_length).astype(np.float32)
    if framework == "linen":
        inputs = jax.numpy.ones((1, 1, trial.config.input_embedding_dim))
        fresh = build_linen(trial.config, buffer=True).init(jax.random.key(0), inputs)
        return identical(np.asarray(fresh["buffers"]["mask"]), causal)
    return identical(_state_of(_empty(framework, trial))["mask"], causal)


def _same_state(found: State, expected: State) -> Agreement:
    """Return the worst comparison of two states."""
    names = same_names(found, expected)
    each = [identical(array, found[key]) for key, array in expected.items() if key in found]
    return max([names, *each], key=lambda agreed: agreed.ratio)


def _wide(framework: Framework, trial: Trial) -> Agreement:
    """Convert an int64 mask with an entry that 32 bits do not hold: refused without x64, kept with it."""
    wide = np.where(trial.mask != 0, 2**40, 0)
    state = {**trial.state, "mask": wide}
    if framework == "torch":
        module = build_torch(trial.config, buffer=True)
        module.load_state_dict(torch_state(state), assign=True)
        return identical(tensor_to_numpy(module.mask), wide)
    try:
        kept = _state_of(_filled(framework, state, trial))["mask"]
    except ConversionError:
        with jax.enable_x64(True):
            kept = _state_of(_filled(framework, state, trial))["mask"]
    return agreement(kept, wide, 0.0)


def _edit_obeyed(framework: Framework, trial: Trial, device: str) -> Agreement:
    """Run, edit the mask the framework's own way, run the same program again: which mask did it use?"""
    tokens, size = trial.inputs.shape[1], trial.config.context_length
    opened = np.zeros((size, size), dtype=np.float32)
    opened[tokens - 1, 0] = 1.0
    exact, limit = exact_and_limit(trial.config, trial.masked("", opened).state, trial.inputs)
    holder = _filled(framework, trial.state, trial)
    if framework == "torch":
        module, inputs = holder.to(device).eval(), numpy_to_tensor(trial.inputs).to(device)
        with torch.no_grad():
            module(inputs)
            module.mask.copy_(torch.from_numpy(opened))
            return agreement(tensor_to_numpy(module(inputs)), exact, limit)
    with jax_on(device):
        if framework == "linen":
            linen = build_linen(trial.config, buffer=True)
            # A new function each time: jit remembers a bound method by what it is bound to.
            forward = jax.jit(lambda variables, inputs: linen.apply(variables, inputs))
            forward(holder, trial.inputs)
            edited = {**holder, "buffers": {"mask": jax.numpy.asarray(opened)}}
            return agreement(np.asarray(forward(edited, trial.inputs)), exact, limit)
        holder.eval()
        call = nnx.jit(lambda model, inputs: model(inputs))
        call(holder, trial.inputs)
        holder.mask[...] = jax.numpy.asarray(opened)
        return agreement(np.asarray(call(holder, trial.inputs)), exact, limit)
