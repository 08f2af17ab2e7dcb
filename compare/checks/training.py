"""Training in float64: the same losses and parameters after every step, the mask as it was."""

from collections.abc import Iterator

from .. import limits
from ..agreement import Agreement, Finding, agreement, identical, same_names
from ..courses import RECIPES, course
from ..reference_training import Limited, reference_training
from ..run import Implementation
from ..training import Trained, train
from ..trials import Trial


def training(implementation: Implementation, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Train the standard course, which has its own trial, under each recipe."""
    for recipe in RECIPES:
        found = train(implementation, course(), recipe, device)
        yield from judged(implementation, recipe.name, found, reference_training(recipe))


def judged(implementation: Implementation, name: str, found: Trained, expected: Limited) -> Iterator[Finding]:
    """Yield a finding for the losses, one for the parameters and one for the mask."""

    def finding(what: str, agreed: Agreement, why: str) -> Finding:
        return Finding(f"training: {what}", implementation, name, agreed, why)

    run, limit = expected
    names = same_names(found.run.parameters, run.parameters)
    yield finding("what is trained", names, limits.NAMES)
    yield finding("losses", agreement(found.run.losses, run.losses, limit.losses), limits.TRAINING)
    each = [agreement(found.run.parameters[key], run.parameters[key], limit.parameters[key]) for key in run.parameters]
    yield finding("parameters", max(each, key=lambda agreed: agreed.ratio), limits.TRAINING)
    yield finding("mask untouched", identical(found.mask, course().start.mask), limits.BITS)
