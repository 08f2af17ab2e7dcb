"""Gradients and Hessian-vector products in float64 against the written-out derivative."""

from collections.abc import Iterator

import numpy as np

from ..proof import tolerances
from ..proof.agreement import Finding, agreement, same_names
from ..proof.cases import Config, Framework, Trial
from ..proof.dual_numbers import Dual
from ..proof.reference_gradient import attention_forward, attention_gradient
from ..proof.remembered import remembered
from ..proof.running_error import Bounded
from ..runners.differentiate import DerivativeProblem, derivatives, gradient


def check_gradients(framework: Framework, trial: Trial, device: str = "cpu") -> Iterator[Finding]:
    """Compare which entries have a gradient, then the first and second derivative of each entry.

    Buffers must have no gradient.
    """
    if trial.closed:
        if trial.keep is None:  # a weight of NaN that is dropped is 0
            yield from _closed(framework, trial, device)
        return
    problem = derivative_problem(trial)
    expected = exact_derivatives(problem)
    actual = derivatives(framework, problem, device)
    names = same_names(actual.gradient, expected)
    yield Finding("gradients: of what", framework, trial.name, names, tolerances.NAMES)
    for name in sorted(expected.keys() & actual.gradient.keys()):
        first, second = expected[name].value, expected[name].tangent
        agreed = agreement(actual.gradient[name], first.value, tolerances.both_sides(first))
        yield Finding("gradients", framework, f"{trial.name}, {name}", agreed, tolerances.GRADIENT)
        agreed = agreement(actual.hessian_vector[name], second.value, tolerances.regrouped(second))
        yield Finding(
            "Hessian-vector products",
            framework,
            f"{trial.name}, {name}",
            agreed,
            tolerances.HESSIAN,
        )
    if framework == "torch":
        yield from _frozen(trial, problem, actual.gradient, device)


def _closed(framework: Framework, trial: Trial, device: str) -> Iterator[Finding]:
    """Compare the gradients where the mask closes rows, whose weights are NaN.

    All pairs of such a row are blocked, so the gradient of its scores is 0: queries and keys have
    the gradient of an open row that is not looked at. The values get 0 * NaN, and so do the inputs.
    """
    tokens = trial.inputs.shape[1]
    closed = (trial.mask[:tokens, :tokens] != 0).all(axis=1)
    opened = trial.mask.copy()
    opened[:tokens][closed] = 0.0
    problem = derivative_problem(trial)
    unseen = problem.cotangent * ~closed[:, None]
    expected = exact_derivatives(
        problem._replace(state={**trial.state, "mask": opened}, cotangent=unseen)
    )
    gradients = gradient(framework, problem, device)
    for name, exact in expected.items():
        value, limit = exact.value.value, tolerances.both_sides(exact.value)
        if not name.startswith(("W_query", "W_key")):
            value = np.full_like(value, np.nan)
        agreed = agreement(gradients[name], value, limit)
        case = f"{trial.name}, {name}"
        yield Finding("gradients", framework, case, agreed, tolerances.GRADIENT)


def _frozen(
    trial: Trial, problem: DerivativeProblem, gradients: dict[str, np.ndarray], device: str
) -> Iterator[Finding]:
    """Freeze the parameters of one layer at a time: the other gradients are as before."""
    for layer in ("W_query", "W_key", "W_value"):
        some = gradient("torch", problem, device, frozen=layer)
        kept = {name for name in gradients if not name.startswith(layer)}
        names = same_names(some, kept)
        case = f"{trial.name}, {layer}"
        yield Finding("gradients: with a frozen layer", "torch", case, names, tolerances.NAMES)
        for name in sorted(kept & some.keys()):
            limit = tolerances.both_sides(exact_derivatives(problem)[name].value)
            agreed = agreement(some[name], gradients[name], limit)
            case = f"{trial.name}, without {layer}: {name}"
            yield Finding("gradients", "torch", case, agreed, tolerances.GRADIENT)


def derivative_problem(trial: Trial) -> DerivativeProblem:
    """Return the trial with a random cotangent and a random direction."""
    random = np.random.default_rng(1)
    arrays = {**trial.state, "inputs": trial.inputs}
    cotangent = random.standard_normal((*trial.inputs.shape[:2], trial.config.output_embedding_dim))
    direction = {
        key: random.standard_normal(array.shape) for key, array in arrays.items() if key != "mask"
    }
    return DerivativeProblem(
        trial.config, trial.state, trial.inputs, cotangent, direction, trial.keep
    )


def exact_derivatives(problem: DerivativeProblem) -> dict[str, Dual]:
    """Return the derivatives by torch name, each with its running error bound.

    The value is the gradient; the tangent is the Hessian-vector product.
    """
    arrays = {**problem.state, "inputs": problem.inputs}
    mask = arrays.pop("mask")
    return _exact_derivatives(
        problem.config, arrays, mask, problem.cotangent, problem.direction, problem.keep
    )


@remembered
def _exact_derivatives(
    config: Config,
    arrays: dict[str, np.ndarray],
    mask: np.ndarray,
    cotangent: np.ndarray,
    direction: dict[str, np.ndarray],
    keep: np.ndarray | None,
) -> dict[str, Dual]:
    dual_arrays = {
        key: Dual(Bounded.exact(array), Bounded.exact(direction[key]))
        for key, array in arrays.items()
    }
    dual_cotangent = Dual(Bounded.exact(cotangent), Bounded.exact(np.zeros_like(cotangent)))
    options = keep, *config.options
    stages = attention_forward(dual_arrays, mask, *options)
    return attention_gradient(dual_arrays, stages, dual_cotangent, *options)
