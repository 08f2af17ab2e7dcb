"""No framework but one: what lies behind the mask changes no bit before it, unless it is NaN or infinite."""

from collections.abc import Iterator

import numpy as np

from ..proof import tolerances
from ..proof.agreement import Finding, agreement, identical
from ..proof.cases import Framework, Trial
from ..proof.reference import causal_mask
from ..runners.run import compiled

LATER = {"another token": 3.0, "a huge token": -1e30}


def check_causality(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Change the last tokens under the causal mask: yield whether a bit before them changed.

    With NaN or inf there, every row becomes NaN: 0 * NaN is NaN in `weights @ values`.
    """
    given = trial.masked(
        trial.name, causal_mask(trial.config.context_length).astype(np.float32)
    ).rounded("float32")
    first = given.inputs.shape[1] // 2
    call = compiled(framework, given.config, device)

    def outputs(later: float | None) -> np.ndarray:
        inputs = given.inputs.copy()
        if later is not None:
            inputs[:, first:] = later
        return call(given.state, inputs, given.keep)

    before = outputs(None)
    for name, later in LATER.items():
        agreed = identical(outputs(later)[:, :first], before[:, :first])
        yield Finding(f"causality: {name}", framework, trial.name, agreed, tolerances.BITS)
    nowhere = np.full_like(before, np.nan)
    for later in (np.nan, np.inf):
        agreed = agreement(outputs(later), nowhere, 0.0)
        yield Finding(
            f"causality: {later} reaches all", framework, trial.name, agreed, tolerances.BITS
        )
