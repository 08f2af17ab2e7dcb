"""Every check on the fixed trials: state, stages, causality, determinism, gradients, dropout, training."""

from collections.abc import Iterator, Sequence

import numpy as np

from ..checks import CHECKS
from ..checks.determinism import compiled_by_torch
from ..checks.stages import first_parted
from ..checks.training import judged
from ..proof import cases, tolerances
from ..proof.agreement import Finding
from ..proof.cases import FRAMEWORKS, TITLES
from ..proof.reference_training import (
    RECIPES,
    STEPS,
    Recipe,
    TrainingRun,
    course,
    reference_training,
)
from ..report.model import Block, Curves, Panels, Section
from ..report.verdicts import ratio_table, settle
from ..runners.products import leaking_dtypes
from ..runners.record_stages import record_stages
from ..runners.run import devices_to_run
from ..runners.train import train

TITLE = {
    "state": "State: the mask is saved, moved, obeyed, and never trained",
    "stages": "Stages in float64: where would they part?",
    "outputs": "Outputs in four dtypes, under every kind of mask",
    "causality": "Causality: what is blocked changes no bit",
    "determinism": "Determinism: twice, compiled, batched",
    "gradients": "Gradients and Hessian-vector products in float64",
    "fused": "Fused attention in float64 and float32",
    "dropout": "Dropout: each framework's own",
    "training": f"Training: {STEPS} steps in float64",
}

TEXT = {
    "state": "The mask is edited to -2.5 and sent through the converter and files. An int64 mask with an entry that 32 "
    "bits do not hold is refused where JAX has x64 off. An edit is obeyed by the same module, compiled or not.",
    "stages": "Each intermediate against the reference. A failure names the first that parts; later ones follow it.",
    "outputs": "The trials round to each dtype; the reference computes from what they round to.",
    "causality": "Tokens of the second half are replaced: no bit of the first half may change. NaN or inf there does "
    "reach every row, in every implementation alike, because the formula multiplies it by a weight of 0.",
    "determinism": "The same program twice gives the same bits; a transformed one stays within rounding.",
    "gradients": "Of inputs and every parameter, against the derivative written out; buffers have none. The limit is "
    "a running error bound, as the written-out formula computes it.",
    "fused": "600 tokens, where kernels, strips and tiles are at work, under masks of every kind: outputs and "
    "gradients against the same reference; and the mask edited after it was used, by every way that there is.",
    "dropout": "Half a million ones are dropped with a fixed seed: share kept, scale, and whether neighbors agree more "
    "often than chance has it. The streams differ between the frameworks; given the same pattern, outputs, gradients "
    "and training agree, as the other checks show.",
    "training": "The same batches, patterns of dropout, weight decay and clipping: `torch.optim` against Optax, under "
    "Linen and `nnx.Optimizer`. The limit is each step's running error bound, carried on by the training itself.",
}


def sections(
    names: Sequence[str] = (), device: str | None = None, *, slow: bool = False
) -> Iterator[Section | str]:
    """Yield a section for each check and device; on the way, what is being done. No names: all of them.

    `slow` adds what takes long: `torch.compile`.
    """
    for name in names or CHECKS:
        for device_name in devices_to_run(device):
            section = Section(
                TITLE[name] + ("" if device_name == "cpu" else " (CUDA)"), [TEXT[name]]
            )
            if name == "training":
                yield from _train(section, device_name)
            else:
                for framework in FRAMEWORKS:
                    yield f"{name}: {TITLES[framework]} on {device_name}"
                    given = cases.fixed_trials()
                    some = {
                        "state": [given[0], given[-1]],
                        "dropout": [given[0], given[-1]],
                        "fused": [given[0]],
                    }
                    for trial in some.get(name, given):
                        section.findings += CHECKS[name](framework, trial, device_name)
            if name == "determinism" and slow:
                yield "determinism: torch.compile"
                section.findings.append(compiled_by_torch(cases.fixed_trials()[0], device_name))
            if name == "outputs":
                section.blocks += [
                    f"{tolerances.LEAKING.format(dtype=dtype)}." for dtype in leaking_dtypes()
                ]
            section.blocks.append(ratio_table(section.findings))
            if name == "stages":
                section.blocks += [_parted(section.findings), *_weights(device_name)]
            section.checks += settle(
                section.findings, name if device_name == "cpu" else f"{name} on cuda"
            )
            yield section


def _parted(findings: Sequence[Finding]) -> str:
    parted = {
        TITLES[framework]: first_parted(
            finding for finding in findings if finding.implementation == framework
        )
        for framework in FRAMEWORKS
    }
    said = [f"{framework}: {stage}" for framework, stage in parted.items() if stage]
    return f"The first stage that parts: {', '.join(said)}." if said else "No stage parts."


def _weights(device: str) -> Iterator[Panels]:
    """Yield the mask and the attention weights of the first two trials, first of the batch."""
    for trial in cases.fixed_trials()[:2]:
        recorded = {TITLES[name]: record_stages(name, trial, device) for name in FRAMEWORKS}
        matrices = {name: found.weights[0].tolist() for name, found in recorded.items()}
        tokens = trial.inputs.shape[1]
        shown = {"mask": (trial.mask[:tokens, :tokens] != 0).astype(float).tolist(), **matrices}
        yield Panels(f"attention weights, {trial.name}", shown, decimals=2)


def _train(section: Section, device: str) -> Iterator[str]:
    blocks: list[Block] = []
    for recipe in RECIPES:
        yield f"training: the reference, {recipe.name}"
        expected = reference_training(recipe)
        curves: dict[str, TrainingRun] = {}
        for framework in FRAMEWORKS:
            yield f"training: {TITLES[framework]} on {device}, {recipe.name}"
            found = train(framework, course(), recipe, device)
            section.findings += judged(framework, recipe.name, found, expected)
            curves[f"{framework} float64"] = found.run
            curves[f"{framework} float32"] = train(
                framework, course().rounded("float32"), recipe, device
            ).run
        blocks += _pictures(recipe, expected.run, expected.limits, curves)
    section.blocks += blocks


MARKED = (1, 2, 5, 10, 20, 50, 100, 200)


def _pictures(
    recipe: Recipe, exact: TrainingRun, limit: TrainingRun, found: dict[str, TrainingRun]
) -> list[Block]:
    """Return the loss, and how the runs part from the reference with the step; of float32 it is only reported."""
    steps = list(range(1, STEPS + 1))

    def apart(run: TrainingRun) -> list[float]:
        each = [
            np.abs(run.parameters[key] - exact.parameters[key]).reshape(STEPS, -1)
            for key in exact.parameters
        ]
        return np.concatenate(each, axis=1).max(axis=1).tolist()

    series = {"limit float64": _largest(limit), **{name: apart(run) for name, run in found.items()}}
    keys = {
        key: max(
            float(np.abs(run.parameters[key] - array).max())
            for name, run in found.items()
            if "float32" in name
        )
        for key, array in exact.parameters.items()
    }
    worst = max(keys, key=lambda key: keys[key])
    text = f"{recipe.name} in float32 parts most in {worst}, by {keys[worst]:.1e}" + (
        ": its exact gradient is 0, and Adam divides what rounding leaves of it by its own size."
        if recipe.name == "AdamW" and worst == "W_key.bias"
        else "."
    )
    return [
        Curves(
            f"{recipe.name}: loss",
            "step",
            "loss",
            steps,
            {"reference": exact.losses.tolist()},
            MARKED,
        ),
        Curves(
            f"{recipe.name}: largest distance of a parameter from the reference",
            "step",
            "distance",
            steps,
            series,
            MARKED,
        ),
        text,
    ]


def _largest(run: TrainingRun) -> list[float]:
    return (
        np.concatenate([array.reshape(STEPS, -1) for array in run.parameters.values()], axis=1)
        .max(axis=1)
        .tolist()
    )
