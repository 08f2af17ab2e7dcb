"""The mask as state: not trained, but saved, converted, and obeyed after an edit."""

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
from ..runners.jax_settings import jax_on
from ..runners.run import build_linen, build_nnx, build_torch, linen_template

SUFFIXES = (".pth", ".safetensors", ".msgpack")


def check_state(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Compare the names that are trained and saved, then the values of state with an edited mask.

    The converter and every file format must return the state bit for bit.
    """
    trial = trial.rounded("float32")
    edited = trial.masked(trial.name, np.where(trial.mask != 0, np.float32(-2.5), trial.mask))

    def finding(name: str, agreed: Agreement, why: str) -> Finding:
        return Finding(f"state: {name}", framework, trial.name, agreed, why)

    trained, saved = _trained_and_saved(framework, trial)
    yield finding(
        "what is trained", same_names(trained, trial.state.keys() - {"mask"}), tolerances.NAMES
    )
    yield finding("what is saved", same_names(saved, trial.state), tolerances.NAMES)
    yield finding("the mask when built", _fresh_mask(framework, trial), tolerances.BITS)
    holder = _with_state(framework, edited.state, edited)
    yield finding(
        "through the converter", _same_state(_state_of(holder), edited.state), tolerances.BITS
    )
    with tempfile.TemporaryDirectory() as folder:
        for suffix in SUFFIXES:
            path = save_checkpoint(Path(folder) / f"state{suffix}", holder)
            loaded = load_checkpoint(path, _fresh(framework, trial))
            yield finding(
                f"through {suffix}", _same_state(_state_of(loaded), edited.state), tolerances.BITS
            )
    yield finding("64 bits refused or kept", _int64_mask(framework, trial), tolerances.BITS)
    yield finding("an edit is obeyed", _edit_obeyed(framework, trial, device), tolerances.OUTPUT)


def _fresh(framework: Framework, trial: Trial) -> Any:
    """Return a fresh torch or NNX module, or the template of Linen variables."""
    if framework == "torch":
        return build_torch(trial.config, buffer=True)
    if framework == "linen":
        return linen_template(trial.config, buffer=True)
    return build_nnx(trial.config, buffer=True)


def _with_state(framework: Framework, state: State, trial: Trial) -> Any:
    """Return a torch or NNX module, or Linen variables, with this state."""
    holder = _fresh(framework, trial)
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


def _trained_and_saved(framework: Framework, trial: Trial) -> tuple[set[str], set[str]]:
    """Return the torch names that an optimizer gets and those that a checkpoint gets."""
    holder = _fresh(framework, trial)
    if framework == "torch":
        return {name for name, _ in holder.named_parameters()}, set(holder.state_dict())
    if framework == "linen":
        return _torch_names(holder["params"]), set().union(*map(_torch_names, holder.values()))
    trained = _torch_names(nnx.to_pure_dict(nnx.state(holder, nnx.Param)))
    return trained, trained | _torch_names(
        nnx.to_pure_dict(nnx.state(holder, flax_impl.nnx.Buffer))
    )


def _torch_names(tree: Any) -> set[str]:
    """Return the dotted torch names of a Flax tree; torch calls a `kernel` a `weight`."""
    return {".".join(path).replace("kernel", "weight") for path in flatten_dict(tree)}


def _fresh_mask(framework: Framework, trial: Trial) -> Agreement:
    """Compare the mask of a fresh module with the causal mask."""
    causal = causal_mask(trial.config.context_length).astype(np.float32)
    if framework == "linen":
        inputs = jax.numpy.ones((1, 1, trial.config.input_embedding_dim))
        fresh = build_linen(trial.config, buffer=True).init(jax.random.key(0), inputs)
        return identical(np.asarray(fresh["buffers"]["mask"]), causal)
    return identical(_state_of(_fresh(framework, trial))["mask"], causal)


def _same_state(actual: State, expected: State) -> Agreement:
    """Compare names and bits of two states, and return the worst agreement."""
    names = same_names(actual, expected)
    values = [identical(array, actual[key]) for key, array in expected.items() if key in actual]
    return max([names, *values], key=lambda agreed: agreed.ratio)


def _int64_mask(framework: Framework, trial: Trial) -> Agreement:
    """Convert an int64 mask whose entries do not fit 32 bits.

    The conversion must keep the values. Without x64, JAX cannot, and must refuse the conversion.
    """
    wide = np.where(trial.mask != 0, 2**40, 0)
    state = {**trial.state, "mask": wide}
    if framework == "torch":
        module = build_torch(trial.config, buffer=True)
        module.load_state_dict(torch_state(state), assign=True)
        return identical(tensor_to_numpy(module.mask), wide)
    try:
        kept = _state_of(_with_state(framework, state, trial))["mask"]
    except ConversionError:
        with jax.enable_x64(True):
            kept = _state_of(_with_state(framework, state, trial))["mask"]
    return agreement(kept, wide, 0.0)


def _edit_obeyed(framework: Framework, trial: Trial, device: str) -> Agreement:
    """Run a program, edit its mask, and run it again: the outputs must follow the edited mask."""
    tokens, size = trial.inputs.shape[1], trial.config.context_length
    opened = np.zeros((size, size), dtype=np.float32)
    opened[tokens - 1, 0] = 1.0
    exact, limit = exact_and_limit(trial.config, trial.masked("", opened).state, trial.inputs)
    holder = _with_state(framework, trial.state, trial)
    if framework == "torch":
        module, inputs = holder.to(device).eval(), numpy_to_tensor(trial.inputs).to(device)
        with torch.no_grad():
            module(inputs)
            module.mask.copy_(torch.from_numpy(opened))
            return agreement(tensor_to_numpy(module(inputs)), exact, limit)
    with jax_on(device):
        if framework == "linen":
            linen = build_linen(trial.config, buffer=True)
            # jit caches a bound method by its instance; a new function is always traced anew.
            forward = jax.jit(lambda variables, inputs: linen.apply(variables, inputs))
            forward(holder, trial.inputs)
            edited = {**holder, "buffers": {"mask": jax.numpy.asarray(opened)}}
            return agreement(np.asarray(forward(edited, trial.inputs)), exact, limit)
        holder.eval()
        call = nnx.jit(lambda model, inputs: model(inputs))
        call(holder, trial.inputs)
        holder.mask[...] = jax.numpy.asarray(opened)
        return agreement(np.asarray(call(holder, trial.inputs)), exact, limit)
