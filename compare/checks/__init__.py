"""The checks: each takes one implementation and one trial, and yields what it compared as findings."""

from collections.abc import Callable, Iterator

from ..proof.agreement import Finding
from ..proof.cases import Framework, Trial
from .causality import check_causality
from .determinism import check_determinism
from .dropout import check_dropout
from .fused import check_fused
from .gradients import check_gradients
from .outputs import check_outputs
from .stages import check_stages
from .state import check_state
from .training import check_training

CheckFunction = Callable[[Framework, Trial, str], Iterator[Finding]]

# In the order in which a fault should be looked for.
CHECKS: dict[str, CheckFunction] = {
    "state": check_state,
    "stages": check_stages,
    "outputs": check_outputs,
    "causality": check_causality,
    "determinism": check_determinism,
    "gradients": check_gradients,
    "fused": check_fused,
    "dropout": check_dropout,
    "training": check_training,
}

# These bring what they run on, and take of a trial its rate of dropout or its heads at most.
ON_THEIR_OWN = ("fused", "dropout", "training")

__all__ = ["CHECKS", "ON_THEIR_OWN", "CheckFunction"]
