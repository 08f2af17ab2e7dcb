"""Outputs in every dtype against the float64 reference."""

from collections.abc import Iterator

import numpy as np

from ..proof import tolerances
from ..proof.agreement import Finding
from ..proof.cases import Framework, Trial
from ..proof.parity import against_reference
from ..proof.rounding_bound import PRECISIONS, overflow
from ..runners.products import leaking_dtypes
from ..runners.run import compiled


def check_outputs(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Yield a finding for each dtype, but where the dtype may overflow; with the trial's pattern of dropout."""
    call = compiled(framework, trial.config, device)
    for dtype, precision in PRECISIONS.items():
        given = trial.rounded(dtype)
        if overflow(given.inputs, given.state, given.mask, precision, given.config.num_heads):
            continue
        found = call(given.state, given.inputs, given.keep)
        agreed = against_reference(found, given.config, given.state, given.inputs, given.keep)
        is_leak = framework == "torch" and np.isnan(agreed.found) and not np.isnan(agreed.expected)
        why = (
            tolerances.LEAKING.format(dtype=dtype)
            if is_leak and dtype in leaking_dtypes()
            else tolerances.OUTPUT
        )
        yield Finding(f"outputs in {dtype}", framework, trial.name, agreed, why)
