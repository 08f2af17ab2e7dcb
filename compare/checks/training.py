"""Training in float64: the same losses and parameters after every step, and an unchanged mask."""

from collections.abc import Iterator

from ..proof import tolerances
from ..proof.agreement import Agreement, Finding, agreement, identical, same_names
from ..proof.cases import Framework, Trial
from ..proof.reference_training import RECIPES, Limited, course, reference_training
from ..runners.train import Trained, train


def check_training(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Train on the standard course under each recipe. The course has its own trial."""
    for recipe in RECIPES:
        trained = train(framework, course(), recipe, device)
        yield from training_findings(framework, recipe.name, trained, reference_training(recipe))


def training_findings(
    framework: Framework, recipe: str, trained: Trained, expected: Limited
) -> Iterator[Finding]:
    """Compare the trained names, the losses, the parameters and the mask with the reference."""

    def finding(name: str, agreed: Agreement, why: str) -> Finding:
        return Finding(f"training: {name}", framework, recipe, agreed, why)

    exact, limit = expected
    run = trained.run
    names = same_names(run.parameters, exact.parameters)
    yield finding("what is trained", names, tolerances.NAMES)
    yield finding("losses", agreement(run.losses, exact.losses, limit.losses), tolerances.TRAINING)
    parameters = [
        agreement(run.parameters[key], exact.parameters[key], limit.parameters[key])
        for key in exact.parameters
    ]
    worst = max(parameters, key=lambda agreed: agreed.ratio)
    yield finding("parameters", worst, tolerances.TRAINING)
    yield finding("mask untouched", identical(trained.mask, course().start.mask), tolerances.BITS)
