"""The checks. Each one runs one framework on one trial and yields a finding per comparison."""

from collections.abc import Callable, Iterator

from ..proof.agreement import Finding
from ..proof.cases import Framework, Trial
from .causality import check_causality
from .determinism import check_determinism
from .dropout import check_dropout
from .dtypes import check_dtypes
from .fused import check_fused
from .gradients import check_gradients
from .modes import check_modes
from .outputs import check_outputs
from .sizes import check_sizes
from .stages import check_stages
from .state import check_state
from .training import check_training

CheckFunction = Callable[[Framework, Trial, str], Iterator[Finding]]

# Ordered for debugging: a fault in one check explains failures in the later ones.
CHECKS: dict[str, CheckFunction] = {
    "state": check_state,
    "stages": check_stages,
    "outputs": check_outputs,
    "causality": check_causality,
    "determinism": check_determinism,
    "modes": check_modes,
    "gradients": check_gradients,
    "dtypes": check_dtypes,
    "fused": check_fused,
    "sizes": check_sizes,
    "dropout": check_dropout,
    "training": check_training,
}

# These checks bring their own inputs or draw their own modes: one trial is enough for them.
ON_THEIR_OWN = ("modes", "dtypes", "fused", "sizes", "dropout", "training")

__all__ = ["CHECKS", "ON_THEIR_OWN", "CheckFunction"]
