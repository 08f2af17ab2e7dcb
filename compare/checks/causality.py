"""Causality: changing finite later tokens changes no bit of the outputs for earlier tokens."""

from collections.abc import Iterator

import numpy as np

from ..proof import tolerances
from ..proof.agreement import Finding, agreement, identical
from ..proof.cases import Framework, Trial
from ..proof.reference import causal_mask
from ..runners.run import compiled

LATER = {"another token": 3.0, "a huge token": -1e30}


def check_causality(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Replace the later tokens under the causal mask and compare the outputs of the earlier ones.

    Finite replacements must not change a bit. NaN or inf must turn every output into NaN, because
    0 * NaN is NaN in `weights @ values`.
    """
    causal = trial.masked(
        trial.name, causal_mask(trial.config.context_length).astype(np.float32)
    ).rounded("float32")
    num_earlier = causal.inputs.shape[1] // 2
    forward = compiled(framework, causal.config, device)

    def outputs(later: float | None) -> np.ndarray:
        inputs = causal.inputs.copy()
        if later is not None:
            inputs[:, num_earlier:] = later
        return forward(causal.state, inputs, causal.keep)

    unchanged = outputs(None)
    for name, later in LATER.items():
        agreed = identical(outputs(later)[:, :num_earlier], unchanged[:, :num_earlier])
        yield Finding(f"causality: {name}", framework, trial.name, agreed, tolerances.BITS)
    all_nan = np.full_like(unchanged, np.nan)
    for later in (np.nan, np.inf):
        agreed = agreement(outputs(later), all_nan, 0.0)
        yield Finding(
            f"causality: {later} reaches all", framework, trial.name, agreed, tolerances.BITS
        )
