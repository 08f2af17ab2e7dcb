"""Queries, keys, values, scores, weights and context in that order, so that the first that parts is named."""

from collections.abc import Iterable, Iterator

from ..proof import tolerances
from ..proof.agreement import Finding, agreement
from ..proof.cases import Framework, Trial
from ..proof.reference import attention_stages
from ..proof.rounding_bound import PRECISIONS, stage_bounds
from ..runners.record_stages import record_stages


def check_stages(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Yield a finding for each stage, in float64."""
    arrays, precision = trial.state, PRECISIONS["float64"]
    found = record_stages(framework, trial, device)
    asked = trial.config.dropout, trial.config.num_heads
    exact = attention_stages(trial.inputs, arrays, trial.mask, trial.keep, *asked)
    bound = stage_bounds(trial.inputs, arrays, trial.mask, precision, trial.keep, *asked)
    for name in exact._fields:
        # -inf, where scores are blocked, is compared as such; both sides round.
        agreed = agreement(getattr(found, name), getattr(exact, name), 2.0 * getattr(bound, name))
        yield Finding(f"stage: {name}", framework, trial.name, agreed, tolerances.OUTPUT)


def first_parted(findings: Iterable[Finding]) -> str | None:
    """Return the first stage that lies beyond its limit, or nothing."""
    return next(
        (finding.check.removeprefix("stage: ") for finding in findings if not finding.held), None
    )
