"""The checks. Each one runs one framework on one trial and yields a finding per comparison."""

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

# Ordered for debugging: a fault in one check explains failures in the later ones.
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

# These checks bring their own inputs. They use at most the dropout rate or the number of heads of
# the trial.
ON_THEIR_OWN = ("fused", "dropout", "training")

__all__ = ["CHECKS", "ON_THEIR_OWN", "CheckFunction"]
