"""What the multi-head module may be given: masks, keys from elsewhere, other axes, dtypes."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ..proof import tolerances
from ..proof.agreement import Finding, agreement, identical, same_names
from ..proof.cases import Framework, State, Trial
from ..proof.reference import Stages, attention_stages
from ..proof.rounding_bound import PRECISIONS, stage_bounds
from ..runners.call import Call, call_gradient, call_module
from .argument_facts import ARGUMENT_FACTS
from .gradients import derivative_problem, exact_derivatives

IMPLEMENTATIONS: tuple[Literal["reference", "fused"], ...] = ("reference", "fused")


def check_arguments(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Call the module in float64 with every argument of a call, and compare with the reference.

    The trial has several heads; its dropout pattern is not used.
    """
    for name, call in calls(trial).items():
        exact, limit = exact_call(trial, call)
        for implementation in IMPLEMENTATIONS:
            config = replace(trial.config, implementation=implementation)
            outputs, _ = call_module(framework, config, trial.state, call, device)
            agreed = agreement(outputs, exact.context, limit.context)
            case = f"{implementation}, {name}"
            yield Finding("arguments: outputs", framework, case, agreed, tolerances.OUTPUT)
        asked, weights = call_module(
            framework, trial.config, trial.state, call, device, weights=True
        )
        agreed = agreement(asked, exact.context, limit.context)
        yield Finding(
            "arguments: outputs", framework, f"weights, {name}", agreed, tolerances.OUTPUT
        )
        assert weights is not None
        agreed = agreement(weights, exact.weights, limit.weights)
        yield Finding("arguments: weights", framework, name, agreed, tolerances.OUTPUT)
    yield from _gradients(framework, trial, device)
    for name, (found, expected) in ARGUMENT_FACTS[framework](trial).items():
        same = same_names([found.dtype.name], [expected.dtype.name])
        agreed = identical(found, expected) if same.held else same
        yield Finding("arguments: facts", framework, name, agreed, tolerances.BITS)


def calls(trial: Trial) -> dict[str, Call]:
    """Return calls by name. No mask of a call blocks a query's own key, except where it says so."""
    random = np.random.default_rng(17)
    inputs, heads = trial.inputs, trial.config.num_heads
    batch, tokens, width = inputs.shape
    others = random.standard_normal((2, batch, tokens, width))
    own = np.eye(tokens, dtype=bool)

    def blocked(*leading: int) -> np.ndarray:
        return (random.random((*leading, tokens, tokens)) < 0.4) & ~own

    padded = np.zeros((batch, 1, 1, tokens), bool)
    padded[0, ..., 0] = padded[1, ..., 1:3] = True  # closes rows: query 0 sees no key
    few = inputs[:, -2:]
    closed = blocked(batch, heads or 1)
    closed[0, 0, 3] = True  # a row of one head
    return {
        "one mask": Call(inputs, blocked=blocked()),
        "a mask for each sequence": Call(inputs, blocked=blocked(batch, 1)),
        "a mask for each head": Call(inputs, blocked=blocked(1, heads or 1)),
        "a mask for each sequence and head": Call(inputs, blocked=closed),
        "padding": Call(inputs, blocked=padded),
        "nothing blocked": Call(inputs, blocked=np.zeros((1, 1, tokens, tokens), bool)),
        "keys from elsewhere": Call(inputs, others[0]),
        "values from elsewhere": Call(inputs, others[0], others[1]),
        "fewer queries": Call(few, others[0]),
        "fewer queries, a mask": Call(few, others[0], blocked=blocked(batch, 1)[..., :2, :]),
        "no batch": Call(inputs[0]),
        "no batch, a mask": Call(inputs[0], blocked=blocked(heads or 1)),
        "two axes of batch": Call(np.stack([inputs, others[0], others[1]])),
        "one query, no batch": Call(inputs[0, -1:], others[0, 0]),
    }


def exact_call(trial: Trial, call: Call) -> tuple[Stages, Stages]:
    """Return the stages of a call in float64, and the limits of another computation of them."""
    mask = mask_of(trial, call)
    _, num_heads, scale = trial.config.options
    options: dict[str, Any] = {"num_heads": num_heads, "scale": scale}
    options |= {"inputs_k": call.inputs_k, "inputs_v": call.inputs_v}
    exact = attention_stages(call.inputs, trial.state, mask, **options)
    bound = stage_bounds(call.inputs, trial.state, mask, PRECISIONS["float64"], **options)
    return exact, Stages(*(2.0 * each for each in bound))  # both sides round


def mask_of(trial: Trial, call: Call) -> np.ndarray:
    """Return which pairs the stored mask or that of the call blocks, (..., queries, keys)."""
    queries = call.inputs.shape[-2]
    tokens = (call.inputs if call.inputs_k is None else call.inputs_k).shape[-2]
    stored = trial.mask[None, tokens - queries : tokens, :tokens] != 0
    return stored if call.blocked is None else stored | call.blocked


def _gradients(framework: Framework, trial: Trial, device: str) -> Iterator[Finding]:
    """The gradients under masks of the call are those under a stored mask of the same pairs."""
    without_dropout = trial._replace(keep=None)
    problem = derivative_problem(without_dropout)
    for name in ("one mask", "a mask for each sequence"):
        call = calls(trial)[name]
        state: State = {**trial.state, "mask": mask_of(trial, call)}
        expected = exact_derivatives(problem._replace(state=state))
        for implementation in IMPLEMENTATIONS:
            config = replace(trial.config, implementation=implementation)
            found = call_gradient(framework, config, trial.state, call, problem.cotangent, device)
            for key, exact in expected.items():
                limit = tolerances.both_sides(exact.value)
                agreed = agreement(found[key], exact.value.value, limit)
                case = f"{implementation}, {name}, {key}"
                yield Finding("arguments: gradients", framework, case, agreed, tolerances.GRADIENT)
