"""The checks. Each one runs one framework on one trial and yields a finding per comparison."""

from collections.abc import Callable, Iterator

from ..proof.agreement import Finding
from ..proof.cases import Framework, Trial, fixed_trials
from .arguments import check_arguments
from .causality import check_causality
from .determinism import check_determinism
from .dropout import check_dropout
from .dtypes import check_dtypes
from .fresh import check_fresh
from .function import check_function
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
    "fresh": check_fresh,
    "state": check_state,
    "stages": check_stages,
    "outputs": check_outputs,
    "causality": check_causality,
    "determinism": check_determinism,
    "modes": check_modes,
    "gradients": check_gradients,
    "dtypes": check_dtypes,
    "arguments": check_arguments,
    "function": check_function,
    "fused": check_fused,
    "sizes": check_sizes,
    "dropout": check_dropout,
    "training": check_training,
}

# The indices of the fixed trials on which a check runs, if not on all.
_ONE_HEAD_AND_SEVERAL = (0, 4)
_GROUPED_HEADS = 5
_TRIALS = {
    **dict.fromkeys(("state", "modes", "dropout"), _ONE_HEAD_AND_SEVERAL),
    "fresh": (*_ONE_HEAD_AND_SEVERAL, _GROUPED_HEADS),
    "arguments": (_GROUPED_HEADS,),
    # These bring their own inputs.
    **dict.fromkeys(("function", "dtypes", "fused", "sizes", "training"), (0,)),
}


def trials_of(check: str) -> list[Trial]:
    """Return the fixed trials on which a check runs."""
    trials = fixed_trials()
    return [trials[index] for index in _TRIALS.get(check, range(len(trials)))]


__all__ = ["CHECKS", "CheckFunction", "trials_of"]
