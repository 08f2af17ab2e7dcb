"""Run the checks on the fixed trials, and show their findings and curves."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ..checks import CHECKS, trials_of
from ..checks.determinism import compiled_by_torch
from ..checks.stages import first_differing_stage
from ..checks.training import training_findings
from ..proof import cases, tolerances
from ..proof.agreement import Finding, crashed
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

# The steps whose values are printed below a training curve.
MARKED_STEPS = (1, 2, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True)
class CheckPart:
    """How one check is presented: the title of its section, and the explanation below it."""

    title: str
    text: str


CHECK_PARTS: dict[str, CheckPart] = {
    "fresh": CheckPart(
        "Fresh modules: weights, mask, kinds, mode and streams",
        "Built from one seed, the weights are those of the library's own layers, bit for bit. The "
        "mask is float32 and causal whatever is the default; no module shares it with another; "
        "what is trained and what is state are told apart by kind.",
    ),
    "state": CheckPart(
        "State: the mask is saved, moved, obeyed, and never trained",
        "The mask is edited to -2.5, then converted and written to files; the same values must "
        "come back. An int64 mask with an entry that does not fit 32 bits must be refused where "
        "JAX has x64 off. The same module, compiled or not, must obey an edit of its mask.",
    ),
    "stages": CheckPart(
        "Stages in float64: where does a framework first differ?",
        "Each intermediate result is compared with the reference. A failure names the first stage "
        "that differs; later stages only inherit the difference.",
    ),
    "outputs": CheckPart(
        "Outputs in four dtypes, under every kind of mask",
        "The trials are rounded to each dtype. The reference is computed from the rounded values.",
    ),
    "causality": CheckPart(
        "Causality: what is blocked changes no bit",
        "The tokens of the second half are replaced: no bit of the first half's outputs may "
        "change. NaN or inf there reaches every row, in all frameworks alike, because the "
        "formula multiplies it by a weight of 0.",
    ),
    "determinism": CheckPart(
        "Determinism: twice, compiled, batched",
        "Running the same program twice gives the same bits. A transformed program stays within "
        "rounding.",
    ),
    "modes": CheckPart(
        "Modes: dropout only in training, the mask obeyed in both",
        "The module itself is called: in `eval` at four rates of dropout, in training with two "
        "random states, and in training without dropout before and after an edit of its mask. Each "
        "child is called, and no call changes the state.",
    ),
    "dtypes": CheckPart(
        "Gradients in every dtype, and what the dtypes are",
        "Outputs and gradients must have the dtype of the inputs. The gradients of two small "
        "problems are compared with the derivative in float32, bfloat16 and float16, on the "
        "formula's path and the fused one.",
    ),
    "arguments": CheckPart(
        "Arguments: masks of a call, keys from elsewhere, weights",
        "A module with fewer heads of keys than of queries and a scale of its own is called with "
        "each argument. Outputs, weights and gradients are compared with the reference; what "
        "only has another form must give the same bits.",
    ),
    "gradients": CheckPart(
        "Gradients and Hessian-vector products in float64",
        "The derivatives with respect to the inputs and every parameter are compared with the "
        "written-out derivative. Buffers have none. The limit is a running error bound, computed "
        "along with the written-out derivative.",
    ),
    "function": CheckPart(
        "The function itself: masks of every dtype, one token, closed rows",
        "`masked_attention` on 200 tokens, by the formula and fused, without a module around it. "
        "Every entry but 0 blocks, in each dtype; the mask stays as it is; and the gradients "
        "beside a closed row, or of only some inputs, are those of the formula.",
    ),
    "fused": CheckPart(
        "Fused attention in float64 and float32",
        "600 tokens, enough for several kernels, strips and tiles, under masks of every kind. "
        "Outputs and gradients are compared with the same reference. The mask is also edited after "
        "its first use, in every possible way.",
    ),
    "sizes": CheckPart(
        "Sizes on both sides of every constant",
        "Outputs in float64, with more tokens than each constant in the sources, more heads, a "
        "larger batch and a wider head, under a causal, an edited and a narrow mask.",
    ),
    "dropout": CheckPart(
        "Dropout: each framework's own",
        "Half a million ones are dropped with a fixed seed. The check measures the share kept, the "
        "scale, and whether neighbors agree more often than by chance. The random streams differ "
        "between the frameworks. Given the same pattern, outputs, gradients and training agree, as "
        "the other checks show.",
    ),
    "training": CheckPart(
        f"Training: {STEPS} steps in float64",
        "The same batches, dropout patterns, weight decay and clipping: `torch.optim` against "
        "Optax under Linen and under `nnx.Optimizer`. The limit is the running error bound of each "
        "step, propagated through the later steps.",
    ),
}


def sections(
    names: Sequence[str] = (), device: str | None = None, *, slow: bool = False
) -> Iterator[Section | str]:
    """Yield one section per check and device, and progress messages in between.

    Args:
        names: the checks to run; all if empty.
        device: the device to run on; every device that both frameworks see if None.
        slow: whether to run `torch.compile` too, which takes long.
    """
    for name in names or CHECKS:
        for device_name in devices_to_run(device):
            yield from _run_check(name, device_name, slow=slow)


def _run_check(name: str, device: str, *, slow: bool) -> Iterator[Section | str]:
    """Run one check on one device, and yield progress messages and its section."""
    part = CHECK_PARTS[name]
    on_cpu = device == "cpu"
    section = Section(part.title if on_cpu else f"{part.title} (CUDA)", [part.text])
    if name == "training":
        yield from _train(section, device)
    else:
        yield from _run_trials(section, name, device)
    if name == "determinism" and slow:
        yield "determinism: torch.compile"
        section.findings.append(compiled_by_torch(cases.fixed_trials()[0], device))
    _add_results(section, name, device)
    section.checks += settle(section.findings, name if on_cpu else f"{name} on cuda")
    yield section


def _run_trials(section: Section, name: str, device: str) -> Iterator[str]:
    """Run one check on its trials in every framework, and collect its findings."""
    trials = trials_of(name)
    for framework in FRAMEWORKS:
        yield f"{name}: {TITLES[framework]} on {device}"
        for trial in trials:
            try:
                for finding in CHECKS[name](framework, trial, device):
                    section.findings.append(finding)
            except Exception as error:  # of the code under test
                section.findings.append(crashed(name, framework, trial.name, error))


RATIO_TEXT = "The largest error over its limit in each framework; up to 1 holds."


def _train(section: Section, device: str) -> Iterator[str]:
    """Train under every recipe in every framework; collect the findings and the curves."""
    for recipe in RECIPES:
        yield f"training: the reference, {recipe.name}"
        reference = reference_training(recipe)
        runs: dict[str, TrainingRun] = {}
        for framework in FRAMEWORKS:
            yield f"training: {TITLES[framework]} on {device}, {recipe.name}"
            try:
                trained = train(framework, course(), recipe, device)
                section.findings += training_findings(framework, recipe.name, trained, reference)
                runs[f"{framework} float64"] = trained.run
                rounded = train(framework, course().rounded("float32"), recipe, device)
                runs[f"{framework} float32"] = rounded.run
            except Exception as error:  # of the code under test
                section.findings.append(crashed("training", framework, recipe.name, error))
        section.blocks += _training_blocks(recipe, reference.run, reference.limits, runs)


def _add_results(section: Section, name: str, device: str) -> None:
    """Add the table of ratios to the section, and the blocks that only this check has."""
    if name == "outputs":
        section.blocks += [
            f"{tolerances.LEAKING.format(dtype=dtype)}." for dtype in leaking_dtypes()
        ]
    section.blocks += [RATIO_TEXT, ratio_table(section.findings)]
    if name == "stages":
        section.blocks += [_first_differences(section.findings), *_weight_panels(device)]


def _first_differences(findings: Sequence[Finding]) -> str:
    """Say which stage is the first to differ in each framework."""
    differences = []
    for framework in FRAMEWORKS:
        stage = first_differing_stage(
            finding for finding in findings if finding.implementation == framework
        )
        if stage is not None:
            differences.append(f"{TITLES[framework]}: {stage}")
    if not differences:
        return "No stage differs."
    return f"The first stage that differs: {', '.join(differences)}."


def _weight_panels(device: str) -> Iterator[Panels]:
    """Yield the mask and the attention weights of the first two trials, first batch entry only."""
    for trial in cases.fixed_trials()[:2]:
        tokens = trial.inputs.shape[1]
        matrices = {"mask": (trial.mask[:tokens, :tokens] != 0).astype(float).tolist()}
        for framework in FRAMEWORKS:
            with suppress(Exception):  # of the code under test; it is a finding already
                weights = record_stages(framework, trial, device).weights
                matrices[TITLES[framework]] = weights[0].tolist()
        yield Panels(f"attention weights, {trial.name}", matrices, decimals=2)


def _training_blocks(
    recipe: Recipe, exact: TrainingRun, limit: TrainingRun, runs: dict[str, TrainingRun]
) -> list[Block]:
    """Return the curves of the loss and of the distance from the reference, and a note on float32.

    float32 is shown but not judged.
    """
    steps = list(range(1, STEPS + 1))

    def distances(run: TrainingRun) -> list[float]:
        differences = {
            key: np.abs(run.parameters[key] - exact.parameters[key]) for key in exact.parameters
        }
        return _largest_by_step(differences)

    losses = {"reference": exact.losses.tolist()}
    losses |= {name: run.losses.tolist() for name, run in runs.items() if "float64" in name}
    series = {"limit float64": _largest_by_step(limit.parameters)}
    series |= {name: distances(run) for name, run in runs.items()}
    return [
        Curves(
            f"{recipe.name}: loss",
            "step",
            "loss",
            steps,
            losses,
            MARKED_STEPS,
        ),
        Curves(
            f"{recipe.name}: largest distance of a parameter from the reference",
            "step",
            "distance",
            steps,
            series,
            MARKED_STEPS,
        ),
        _worst_in_float32(recipe, exact, runs),
    ]


def _worst_in_float32(recipe: Recipe, exact: TrainingRun, runs: dict[str, TrainingRun]) -> str:
    """Say which parameter differs most from the reference in float32, and by how much."""
    rounded = [run for name, run in runs.items() if "float32" in name]
    if not rounded:
        return f"In float32, {recipe.name} was not run."
    distances = {
        key: max(float(np.abs(run.parameters[key] - array).max()) for run in rounded)
        for key, array in exact.parameters.items()
    }
    worst = max(distances, key=lambda key: distances[key])
    text = (
        f"In float32, {recipe.name} differs most from the reference in {worst}, "
        f"by {distances[worst]:.1e}."
    )
    if recipe.name == "AdamW" and worst == "W_key.bias":
        text += (
            " Its exact gradient is 0: only rounding noise remains, and AdamW divides that noise "
            "by its own size."
        )
    return text


def _largest_by_step(parameters: dict[str, np.ndarray]) -> list[float]:
    """Return the largest entry of all arrays at each step."""
    rows = [array.reshape(STEPS, -1) for array in parameters.values()]
    return np.concatenate(rows, axis=1).max(axis=1).tolist()
