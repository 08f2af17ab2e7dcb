"""The checks: each takes one implementation and one trial, and yields what it compared as findings."""

from collections.abc import Callable, Iterator

from ..proof.agreement import Finding
from ..proof.cases import Implementation, Trial
from .causality import causality
from .determinism import determinism
from .dropout import dropout
from .fused import fused
from .gradients import gradients
from .outputs import outputs
from .stages import stages
from .state import state
from .training import training

CheckFunction = Callable[[Implementation, Trial, str], Iterator[Finding]]

# In the order in which a fault should be looked for.
CHECKS: dict[str, CheckFunction] = {
    "state": state,
    "stages": stages,
    "outputs": outputs,
    "causality": causality,
    "determinism": determinism,
    "gradients": gradients,
    "fused": fused,
    "dropout": dropout,
    "training": training,
}

# These bring what they run on, and take of a trial its rate of dropout or its heads at most.
ON_THEIR_OWN = ("fused", "dropout", "training")

__all__ = ["CHECKS", "ON_THEIR_OWN", "CheckFunction", *CHECKS]
