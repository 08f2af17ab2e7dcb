"""The stages of attention in order: queries, keys, values, scores, weights and context."""

from collections.abc import Iterable, Iterator

from ..proof import tolerances
from ..proof.agreement import Finding, agreement
from ..proof.cases import Framework, Trial
from ..proof.reference import attention_stages
from ..proof.rounding_bound import PRECISIONS, stage_bounds
from ..runners.record_stages import record_stages


def check_stages(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Compare each stage with the reference, in float64."""
    state, precision = trial.state, PRECISIONS["float64"]
    recorded = record_stages(framework, trial, device)
    options = trial.config.options
    exact = attention_stages(trial.inputs, state, trial.mask, trial.keep, *options)
    bound = stage_bounds(trial.inputs, state, trial.mask, precision, trial.keep, *options)
    for name in exact._fields:
        # Twice the bound, because both sides round. Blocked scores are -inf on both sides.
        limit = 2.0 * getattr(bound, name)
        agreed = agreement(getattr(recorded, name), getattr(exact, name), limit)
        yield Finding(f"stage: {name}", framework, trial.name, agreed, tolerances.OUTPUT)


def first_differing_stage(findings: Iterable[Finding]) -> str | None:
    """Return the first stage that exceeds its limit, or None."""
    return next(
        (finding.check.removeprefix("stage: ") for finding in findings if not finding.held), None
    )
