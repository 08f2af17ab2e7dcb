"""Outputs in every dtype against the float64 reference."""

from collections.abc import Iterator

import numpy as np

from ..proof import tolerances
from ..proof.agreement import Finding, same_names
from ..proof.cases import Framework, Trial
from ..proof.parity import against_reference
from ..proof.rounding_bound import PRECISIONS, overflow
from ..runners.products import leaking_dtypes
from ..runners.run import compiled


def check_outputs(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Compare the outputs in every dtype in which the trial cannot overflow.

    The trial's dropout pattern is applied.
    """
    forward = compiled(framework, trial.config, device)
    for dtype, precision in PRECISIONS.items():
        rounded = trial.rounded(dtype)
        state, inputs, keep = rounded.state, rounded.inputs, rounded.keep
        _, num_heads, scale = trial.config.options
        if overflow(inputs, state, rounded.mask, precision, num_heads, scale):
            continue
        outputs = forward(state, inputs, keep)
        agreed = against_reference(outputs, trial.config, state, inputs, keep)
        is_leak = framework == "torch" and np.isnan(agreed.found) and not np.isnan(agreed.expected)
        why = (
            tolerances.LEAKING.format(dtype=dtype)
            if is_leak and dtype in leaking_dtypes()
            else tolerances.OUTPUT
        )
        yield Finding(f"outputs in {dtype}", framework, trial.name, agreed, why)
        of_dtype = same_names([outputs.dtype.name], [dtype])
        yield Finding("dtype of the outputs", framework, trial.name, of_dtype, tolerances.NAMES)
