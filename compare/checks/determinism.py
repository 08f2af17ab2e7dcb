"""The same program twice, compiled against eager, batched against one by one."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import jax
import numpy as np
import torch

from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..proof import tolerances
from ..proof.agreement import Finding, agreement, identical
from ..proof.cases import Framework, Trial
from ..proof.parity import exact_and_limit
from ..runners.run import compiled, flax_forward, flax_state, jax_on, ready_torch, run


def check_determinism(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Yield bits that are equal when run twice, and transforms of the program that stay within rounding, in float32."""
    given = trial.rounded("float32")

    def outputs(inputs: np.ndarray) -> np.ndarray:
        return run(framework, given.config, given.state, inputs, device=device, keep=given.keep)

    eager = outputs(given.inputs)
    again = identical(outputs(given.inputs), eager)
    yield Finding("determinism: twice", framework, trial.name, again, tolerances.BITS)
    _, limit = exact_and_limit(given.config, given.state, given.inputs, given.keep)
    if (
        given.keep is not None
    ):  # the pattern of dropout is the batch's, not one for each of its entries
        return
    call = compiled(framework, given.config, device)
    if framework == "torch":
        found = {"vmap as the batch": _mapped_by_torch(given, device)}
    else:
        found = _flax_transforms(framework, given, device)
    found["a loop as the batch"] = np.concatenate(
        [call(given.state, one[None]) for one in given.inputs]
    )
    for name, transformed in found.items():
        agreed = agreement(transformed, eager, 2.0 * limit)
        yield Finding(f"determinism: {name}", framework, trial.name, agreed, tolerances.TWICE)


def compiled_by_torch(trial: Trial, device: str = "cpu") -> Finding:
    """Compare `torch.compile` with eager; the first call takes seconds, and on the CPU needs a C++ compiler."""
    given = trial.rounded("float32")
    eager = run("torch", given.config, given.state, given.inputs, device=device, keep=given.keep)
    _, limit = exact_and_limit(given.config, given.state, given.inputs, given.keep)
    agreed = agreement(_run_compiled(given, device), eager, 2.0 * limit)
    return Finding(
        "determinism: torch.compile as eager", "torch", trial.name, agreed, tolerances.TWICE
    )


def _run_compiled(trial: Trial, device: str) -> np.ndarray:
    module = ready_torch(trial.config, trial.state, device, trial.keep)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        # Inductor's shared cache may hold kernels of a run under another instruction set.
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        # torch 2.13 warns of a part of its own that its compiler imports.
        warnings.filterwarnings(
            "ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning
        )
        return tensor_to_numpy(torch.compile(module)(numpy_to_tensor(trial.inputs).to(device)))


def _mapped_by_torch(trial: Trial, device: str) -> np.ndarray:
    module = ready_torch(trial.config, trial.state, device, None)
    inputs = numpy_to_tensor(trial.inputs).to(device)
    with torch.no_grad():
        return tensor_to_numpy(torch.vmap(lambda one: module(one[None])[0])(inputs))


def _flax_transforms(framework: Framework, trial: Trial, device: str) -> dict[str, np.ndarray]:
    forward = flax_forward(framework, trial.config)

    def mapped(params: Any, buffers: Any, inputs: Any) -> jax.Array:
        return jax.vmap(lambda one: forward(params, buffers, None, one[None])[0])(inputs)

    with jax_on(device):
        state = flax_state(framework, trial.config, trial.state)
        return {
            "jit as eager": np.asarray(jax.jit(forward)(*state, None, trial.inputs)),
            "vmap as the batch": np.asarray(jax.jit(mapped)(*state, trial.inputs)),
        }
