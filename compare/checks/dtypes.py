"""Gradients in every dtype, and the dtypes of outputs and gradients."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import jax
import numpy as np

from ..dtypes import numpy_dtype
from ..proof import tolerances
from ..proof.agreement import Finding, agreement, identical, same_names
from ..proof.cases import Config, Framework, Trial, draw
from ..runners.differentiate import DerivativeProblem, compiled_gradient
from ..runners.run import run
from .gradients import derivative_problem, exact_derivatives

# So small, and drawn with such seeds, that even in bfloat16 each gradient (but that of the keys'
# bias, which is 0) is at least three times its limit: one that is doubled, or is 0, exceeds it.
PROBLEMS = (
    ("one head", Config(2, 2, 3, 0.0), 74),
    ("two heads", Config(2, 4, 3, 0.0, num_heads=2), 1),
)
TOKENS = 3
DTYPES = ("float32", "bfloat16", "float16")


def check_dtypes(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Compare gradients in three dtypes with the derivative, on the formula and the fused path.

    Nothing of the trial is used.
    """
    for name, config, seed in PROBLEMS:
        causal = draw(config, TOKENS, np.random.default_rng(seed), batch=1)
        edited = causal.mask.copy()
        edited[2, 1], edited[0, 2] = 1.0, 0.0
        # Fused programs take a second each to compile; heads do not change them.
        paths: tuple[Literal["reference", "fused"], ...] = ("reference", "fused")
        for implementation in paths if config.num_heads is None else paths[:1]:
            chosen = causal._replace(config=replace(config, implementation=implementation))
            differentiate = compiled_gradient(framework, chosen.config, device)
            masks = {"causal": causal.mask}
            if implementation == "fused":  # each mask has a kernel of its own
                masks["edited"] = edited
            for mask_name, mask in masks.items():
                masked = chosen.masked(f"{name}, {implementation}, {mask_name}", mask)
                for dtype in DTYPES:
                    trial = masked.rounded(dtype)
                    yield from _in(dtype, framework, trial, differentiate, device)
        if framework != "torch":  # whose layers refuse them
            yield from _narrower_inputs(framework, causal, device)


def _narrower_inputs(framework: Framework, trial: Trial, device: str) -> Iterator[Finding]:
    """Compare inputs in half precision, which float32 parameters widen, with the wide ones."""
    state = trial.rounded("float32").state
    for dtype in ("bfloat16", "float16"):
        narrow = trial.rounded(dtype).inputs
        with jax.numpy_dtype_promotion("standard"):
            outputs = run(framework, trial.config, state, narrow, device=device)
        wide = run(framework, trial.config, state, narrow.astype(np.float32), device=device)
        same = same_names([outputs.dtype.name], ["float32"])
        agreed = identical(outputs, wide) if same.held else same
        yield Finding(
            "inputs are widened", framework, f"{trial.name}, {dtype}", agreed, tolerances.BITS
        )


def _in(
    dtype: str,
    framework: Framework,
    trial: Trial,
    differentiate: Callable[[DerivativeProblem], dict[str, np.ndarray]],
    device: str,
) -> Iterator[Finding]:
    outputs = run(framework, trial.config, trial.state, trial.inputs, device=device)
    agreed = same_names([outputs.dtype.name], [dtype])
    yield Finding("dtype of the outputs", framework, trial.name, agreed, tolerances.NAMES)
    low, wide = problems(trial, dtype)
    gradients = differentiate(low)
    dtypes = {array.dtype.name for array in gradients.values()}
    agreed = same_names(dtypes, [dtype])
    yield Finding("dtype of the gradients", framework, trial.name, agreed, tolerances.NAMES)
    for name, exact in exact_derivatives(wide).items():
        limit = tolerances.in_dtype(exact.value, dtype)
        agreed = agreement(gradients[name].astype(np.float64), exact.value.value, limit)
        case = f"{trial.name}, {name}"
        yield Finding(f"gradients in {dtype}", framework, case, agreed, tolerances.LOW_GRADIENT)


def problems(trial: Trial, dtype: str) -> tuple[DerivativeProblem, DerivativeProblem]:
    """Return the problem in the dtype, and the same numbers in float64."""
    target = numpy_dtype(dtype)
    problem = derivative_problem(trial)
    cotangent = problem.cotangent.astype(target)
    low = problem._replace(cotangent=cotangent)
    state = {
        key: array if key == "mask" else array.astype(np.float64)
        for key, array in trial.state.items()
    }
    wide = problem._replace(
        state=state,
        inputs=trial.inputs.astype(np.float64),
        cotangent=cotangent.astype(np.float64),
    )
    return low, wide
