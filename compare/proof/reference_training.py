"""Training written out in NumPy float64, with limits for another float64 run of the same steps.

One step computes new parameters and optimizer moments from the old ones. Run on `Bounded`, it also
bounds the rounding error that this step alone adds to each of them. To measure how these errors
grow, the course is trained again with every error added, under random signs
(`compare.proof.tolerances.worst_case`).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..dtypes import numpy_dtype
from .cases import Config, Trial, draw
from .reference import attention_stages
from .reference_gradient import attention_forward, attention_gradient
from .running_error import Bounded
from .tolerances import TRAINING_SAMPLES, worst_case

STEPS = 200


class Recipe(NamedTuple):
    """An optimizer with its settings, under torch's names.

    `max_norm` clips the norm of the gradient over all parameters.
    """

    name: str
    learning_rate: float
    weight_decay: float
    max_norm: float
    momentum: float = 0.0
    betas: tuple[float, float] = (0.0, 0.0)
    eps: float = 0.0


# Clipping takes effect in some steps but not in all. Every setting differs from its default.
SGD = Recipe("SGD", learning_rate=0.2, weight_decay=0.01, max_norm=0.5, momentum=0.8)
ADAMW = Recipe(
    "AdamW", learning_rate=0.004, weight_decay=0.05, max_norm=0.5, betas=(0.85, 0.98), eps=1e-7
)
RECIPES = (SGD, ADAMW)


class Course(NamedTuple):
    """Everything that training depends on, except the recipe.

    Attributes:
        start: the trial whose state is trained.
        inputs: (steps, batch, tokens, input_embedding_dim).
        targets: (steps, batch, tokens, output_embedding_dim); the loss is the mean squared error.
        keeps: (steps, batch, tokens, tokens), True where dropout keeps the weight.
    """

    start: Trial
    inputs: np.ndarray
    targets: np.ndarray
    keeps: np.ndarray

    def rounded(self, dtype: str) -> Course:
        """Return the course in the dtype. Rounding to float32 changes no value of `course()`."""
        target: Any = numpy_dtype(dtype)
        return Course(
            self.start.rounded(dtype),
            self.inputs.astype(target),
            self.targets.astype(target),
            self.keeps,
        )


@cache
def course() -> Course:
    """Return a float64 course that learns the outputs of a teacher, with noise.

    Every number in it can be represented in float32.
    """
    random = np.random.default_rng(7)
    config = Config(3, 5, 6, 0.1, qkv_bias=True)
    tokens, batch = 5, 4
    start, teacher = (
        draw(config, tokens, random).rounded("float32").rounded("float64") for _ in range(2)
    )
    inputs = random.standard_normal((STEPS, batch, tokens, 3)).astype(np.float32).astype(np.float64)
    outputs = attention_stages(inputs, teacher.state, teacher.mask).context
    targets = outputs + 0.1 * random.standard_normal(outputs.shape)
    targets = targets.astype(np.float32).astype(np.float64)
    keeps = random.random((STEPS, batch, tokens, tokens)) >= config.dropout
    return Course(start, inputs, targets, keeps)


# torch's `clip_grad_norm_` adds this to the norm before it divides by it.
CLIP_EPS = 1e-6

Arrays = dict[str, np.ndarray]


class TrainingRun(NamedTuple):
    """The loss before each step of a run, and each parameter after it, (steps, ...)."""

    losses: np.ndarray
    parameters: Arrays


class Limited(NamedTuple):
    """The reference run, and the limit for the distance of another run from it, entry by entry."""

    run: TrainingRun
    limits: TrainingRun


@cache
def reference_training(recipe: Recipe) -> Limited:
    """Return the reference run of the course under the recipe, with its limits."""
    run = _train(course(), recipe)
    arrays_per_parameter = 2 if recipe is SGD else 3  # the parameter and its moments
    error_counts = (
        arrays_per_parameter
        * sum(array[0, 0].size for array in run.parameters.values())
        * np.arange(1, STEPS + 1)
    )

    def limit(samples: np.ndarray) -> np.ndarray:
        deviations = np.moveaxis(samples[:, 1:] - samples[:, :1], 1, 0)
        # The reference rounds too.
        return 2.0 * worst_case(deviations, error_counts.reshape(-1, *[1] * (samples.ndim - 2)))

    exact = TrainingRun(
        run.losses[:, 0], {key: array[:, 0] for key, array in run.parameters.items()}
    )
    return Limited(
        exact,
        TrainingRun(
            limit(run.losses), {key: limit(array) for key, array in run.parameters.items()}
        ),
    )


def _train(course: Course, recipe: Recipe) -> TrainingRun:
    """Train 1 + TRAINING_SAMPLES times at once; the runs lie along the second axis of the result.

    The first run is the exact one. In the others, the largest error that rounding explains is added
    to every result of every step, with a random sign.
    """
    random, runs = np.random.default_rng(0), 1 + TRAINING_SAMPLES
    state: dict[str, tuple[np.ndarray, ...]] = {}
    for key, array in course.start.state.items():
        if key != "mask":
            parameter = np.repeat(array[None], runs, axis=0)
            state[key] = (parameter, *[np.zeros_like(parameter)] * (1 if recipe is SGD else 2))
    losses, history = [], []
    advance = _sgd if recipe is SGD else _adamw
    for step in range(len(course.inputs)):
        parameters = {key: arrays[0] for key, arrays in state.items()}
        loss, gradient = _loss_and_gradient(course, parameters, step)
        losses.append(_perturbed(loss, random))
        clipped = _clipped(gradient, recipe.max_norm)
        state = {
            key: tuple(
                _perturbed(result, random)
                for result in advance(recipe, clipped[key], arrays, step + 1)
            )
            for key, arrays in state.items()
        }
        history.append({key: arrays[0] for key, arrays in state.items()})
    return TrainingRun(
        np.array(losses),
        {key: np.stack([parameters[key] for parameters in history]) for key in state},
    )


def _loss_and_gradient(
    course: Course, parameters: Arrays, step: int
) -> tuple[Bounded, dict[str, Bounded]]:
    lifted = {key: Bounded.exact(array) for key, array in parameters.items()}
    lifted["inputs"] = Bounded.exact(course.inputs[step])
    dropout = course.keeps[step], course.start.config.dropout
    stages = attention_forward(lifted, course.start.mask, *dropout)
    difference = stages["context"] - Bounded.exact(course.targets[step])
    size = course.targets[step].size
    loss = (difference * difference).sum((-3, -2, -1)).scaled(1.0 / size)
    gradient = attention_gradient(
        lifted, stages, difference.scaled(2.0 / size, roundings=2), *dropout
    )
    del gradient["inputs"]
    return loss, gradient


def _clipped(gradient: dict[str, Bounded], max_norm: float) -> dict[str, Bounded]:
    """Scale by max_norm / (norm + 1e-6) where that is below 1, as `clip_grad_norm_` does."""
    squares = [
        (array * array).sum(tuple(range(1, array.value.ndim))) for array in gradient.values()
    ]
    total = squares[0]
    for square in squares[1:]:
        total = total + square
    norm = total.sqrt() + Bounded.exact(np.array(CLIP_EPS))
    factor = Bounded.exact(np.array(max_norm)) / norm
    below = factor.value < 1.0
    factor = Bounded(np.where(below, factor.value, 1.0), np.where(below, factor.error, 0.0))
    return {key: array * factor.spread(array.value.ndim - 1) for key, array in gradient.items()}


def _sgd(
    recipe: Recipe, gradient: Bounded, arrays: tuple[np.ndarray, ...], step: int
) -> tuple[Bounded, ...]:
    parameter, trace = map(Bounded.exact, arrays)
    gradient = gradient + parameter.scaled(recipe.weight_decay)
    trace = trace.scaled(recipe.momentum) + gradient
    return parameter - trace.scaled(recipe.learning_rate), trace


def _adamw(
    recipe: Recipe, gradient: Bounded, arrays: tuple[np.ndarray, ...], step: int
) -> tuple[Bounded, ...]:
    """Apply AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2)."""
    # A perturbed mean of squares can be negative; a rounded one cannot.
    mean_square = np.maximum(arrays[2], 0.0)
    parameter, first, second = map(Bounded.exact, (arrays[0], arrays[1], mean_square))
    beta_1, beta_2 = recipe.betas
    first = first.scaled(beta_1) + gradient.scaled(1.0 - beta_1, roundings=2)
    second = second.scaled(beta_2) + (gradient * gradient).scaled(1.0 - beta_2, roundings=2)
    unbiased_1 = first.scaled(1.0 / (1.0 - beta_1**step), roundings=_bias_roundings(beta_1, step))
    unbiased_2 = second.scaled(1.0 / (1.0 - beta_2**step), roundings=_bias_roundings(beta_2, step))
    direction = unbiased_1 / (unbiased_2.sqrt() + Bounded.exact(np.array(recipe.eps)))
    update = direction + parameter.scaled(recipe.weight_decay)
    return parameter - update.scaled(recipe.learning_rate), first, second


def _bias_roundings(beta: float, step: int) -> int:
    """Return how many roundings cover the errors of 1 / (1 - beta**step) and of a product with it.

    The power takes `step` multiplications; the subtraction from 1 amplifies their relative error.
    """
    power = beta**step
    return int(np.ceil((step + 1) * power / (1.0 - power))) + 3


def _perturbed(result: Bounded, random: np.random.Generator) -> np.ndarray:
    """Add the error bound, with a random sign, in every run except the first."""
    signs = random.choice((-1.0, 1.0), result.shape)
    signs[0] = 0.0
    return result.value + signs * result.error
