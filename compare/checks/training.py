"""Training in float64: the same losses and parameters after every step, the mask as it was."""

from collections.abc import Iterator

from ..proof import tolerances
from ..proof.agreement import Agreement, Finding, agreement, identical, same_names
from ..proof.cases import Framework, Trial
from ..proof.reference_training import RECIPES, Limited, course, reference_training
from ..runners.train import Trained, train


def check_training(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Train the standard course, which has its own trial, under each recipe."""
    for recipe in RECIPES:
        found = train(framework, course(), recipe, device)
        yield from judged(framework, recipe.name, found, reference_training(recipe))


def judged(framework: Framework, name: str, found: Trained, expected: Limited) -> Iterator[Finding]:
    """Yield a finding for the losses, one for the parameters and one for the mask."""

    def finding(what: str, agreed: Agreement, why: str) -> Finding:
        return Finding(f"training: {what}", framework, name, agreed, why)

    run, limit = expected
    names = same_names(found.run.parameters, run.parameters)
    yield finding("what is trained", names, tolerances.NAMES)
    yield finding(
        "losses", agreement(found.run.losses, run.losses, limit.losses), tolerances.TRAINING
    )
    each = [
        agreement(found.run.parameters[key], run.parameters[key], limit.parameters[key])
        for key in run.parameters
    ]
    yield finding("parameters", max(each, key=lambda agreed: agreed.ratio), tolerances.TRAINING)
    yield finding("mask untouched", identical(found.mask, course().start.mask), tolerances.BITS)
