"""Determinism: repeated runs, compiled against eager, and batched against one entry at a time."""

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from unittest.mock import patch

import jax
import numpy as np
import torch

from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..proof import tolerances
from ..proof.agreement import Finding, agreement, identical
from ..proof.cases import Framework, Trial
from ..proof.parity import exact_and_limit
from ..runners.jax_settings import jax_on
from ..runners.run import compiled, flax_forward, flax_state, flax_template, ready_torch, run

Result = TypeVar("Result")
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def check_determinism(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Run the program twice and transformed, in float32.

    Two runs must give the same bits. Transformed programs must agree within rounding.
    """
    trial = trial.rounded("float32")

    def outputs(inputs: np.ndarray) -> np.ndarray:
        return run(framework, trial.config, trial.state, inputs, device=device, keep=trial.keep)

    eager = outputs(trial.inputs)
    repeated = identical(outputs(trial.inputs), eager)
    yield Finding("determinism: twice", framework, trial.name, repeated, tolerances.BITS)
    _, limit = exact_and_limit(trial.config, trial.state, trial.inputs, trial.keep)
    # A dropout pattern covers the whole batch; it cannot be applied to one entry at a time.
    if trial.keep is not None:
        return
    forward = compiled(framework, trial.config, device)
    if framework == "torch":
        transformed = {"vmap as the batch": _torch_vmap(trial, device)}
    else:
        transformed = _flax_transforms(framework, trial, device)
    transformed["a loop as the batch"] = np.concatenate(
        [forward(trial.state, entry[None]) for entry in trial.inputs]
    )
    for name, result in transformed.items():
        agreed = agreement(result, eager, 2.0 * limit)
        yield Finding(f"determinism: {name}", framework, trial.name, agreed, tolerances.TWICE)


def compiled_by_torch(trial: Trial, device: str = "cpu") -> Finding:
    """Compare `torch.compile` with eager mode, in float32.

    The first call takes seconds. On the CPU it needs a C++ compiler.
    """
    trial = trial.rounded("float32")
    eager = run("torch", trial.config, trial.state, trial.inputs, device=device, keep=trial.keep)
    _, limit = exact_and_limit(trial.config, trial.state, trial.inputs, trial.keep)
    agreed = agreement(_torch_compile(trial, device), eager, 2.0 * limit)
    return Finding(
        "determinism: torch.compile as eager", "torch", trial.name, agreed, tolerances.TWICE
    )


def _torch_compile(trial: Trial, device: str) -> np.ndarray:
    module = ready_torch(trial.config, trial.state, device, trial.keep)
    inputs = numpy_to_tensor(trial.inputs).to(device)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        # Inductor's default cache may hold kernels compiled for another instruction set.
        patch.dict(os.environ, {CACHE: os.environ.get(CACHE, folder)}),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        # In torch 2.13 the compiler imports a deprecated part of torch itself.
        warnings.filterwarnings(
            "ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning
        )
        return with_inductor(lambda: tensor_to_numpy(torch.compile(module)(inputs)))


def with_inductor(call: Callable[[], Result]) -> Result:
    """Return what a call returns that compiles with Inductor.

    Inductor first tries each instruction set of the processor, for eight seconds. It is only asked
    to if the C++ compiler lacks one of them, and the call is then made again.
    """
    from torch._dynamo.exc import BackendCompilerFailed  # these take a second to import
    from torch._inductor import config as inductor_config

    try:
        with inductor_config.patch({"cpp.vec_isa_ok": True}):
            return call()
    except BackendCompilerFailed:
        torch.compiler.reset()
        return call()


def _torch_vmap(trial: Trial, device: str) -> np.ndarray:
    module = ready_torch(trial.config, trial.state, device, None)
    inputs = numpy_to_tensor(trial.inputs).to(device)
    with torch.no_grad():
        return tensor_to_numpy(torch.vmap(lambda entry: module(entry[None])[0])(inputs))


def _flax_transforms(framework: Framework, trial: Trial, device: str) -> dict[str, np.ndarray]:
    forward = flax_forward(framework, trial.config)

    def batched(params: Any, buffers: Any, inputs: Any) -> jax.Array:
        return jax.vmap(lambda entry: forward(params, buffers, None, entry[None])[0])(inputs)

    with jax_on(device):
        state = flax_state(trial.state, flax_template(framework, trial.config))
        return {
            "jit as eager": np.asarray(jax.jit(forward)(*state, None, trial.inputs)),
            "vmap as the batch": np.asarray(jax.jit(batched)(*state, trial.inputs)),
        }
