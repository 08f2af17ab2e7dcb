"""Training written out in NumPy float64, and how far rounding may carry anybody else's run of the same steps.

One step turns parameters and the optimizer's moments into new ones; run on `Bounded`, it also tells
how far rounding in that step alone may carry each of them. What these errors grow to is found by
training again with each of them in place, under random signs
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
    """An optimizer with its settings, in torch's words; `max_norm` clips the gradient's norm over all parameters."""

    name: str
    learning_rate: float
    weight_decay: float
    max_norm: float
    momentum: float = 0.0
    betas: tuple[float, float] = (0.0, 0.0)
    eps: float = 0.0


# Clipping is at work in some steps and not in others, and every setting differs from its default.
SGD = Recipe("SGD", learning_rate=0.2, weight_decay=0.01, max_norm=0.5, momentum=0.8)
ADAMW = Recipe(
    "AdamW", learning_rate=0.004, weight_decay=0.05, max_norm=0.5, betas=(0.85, 0.98), eps=1e-7
)
RECIPES = (SGD, ADAMW)


class Course(NamedTuple):
    """Everything that training depends on, but the recipe.

    start: the trial whose state is trained.
    inputs: (steps, batch, tokens, input_embedding_dim).
    targets: (steps, batch, tokens, output_embedding_dim); the loss is the mean of the squared
    distances.
    keeps: (steps, batch, tokens, tokens), True where dropout keeps the weight.
    """

    start: Trial
    inputs: np.ndarray
    targets: np.ndarray
    keeps: np.ndarray

    def rounded(self, dtype: str) -> Course:
        """Return the course in that dtype; what float32 holds, as all of it does, it keeps."""
        to: Any = numpy_dtype(dtype)
        return Course(
            self.start.rounded(dtype), self.inputs.astype(to), self.targets.astype(to), self.keeps
        )


@cache
def course() -> Course:
    """Return a course in float64 whose numbers are all float32's: a teacher's outputs, with noise, are learned."""
    random = np.random.default_rng(7)
    config = Config(3, 5, 6, 0.1, qkv_bias=True)
    tokens, batch = 5, 4
    start, teacher = (
        draw(config, tokens, random).rounded("float32").rounded("float64") for _ in range(2)
    )
    inputs = random.standard_normal((STEPS, batch, tokens, 3)).astype(np.float32).astype(np.float64)
    taught = attention_stages(inputs, teacher.state, teacher.mask).context
    targets = (
        (taught + 0.1 * random.standard_normal(taught.shape)).astype(np.float32).astype(np.float64)
    )
    keeps = random.random((STEPS, batch, tokens, tokens)) >= config.dropout
    return Course(start, inputs, targets, keeps)


# torch adds this to the norm that it clips by.
CLIP_EPS = 1e-6

Arrays = dict[str, np.ndarray]


class TrainingRun(NamedTuple):
    """A training run: the loss before each step, and each parameter after it, (steps, ...)."""

    losses: np.ndarray
    parameters: Arrays


class Limited(NamedTuple):
    """The reference's run, and the limits for the distance of another run from it, of the same shapes."""

    run: TrainingRun
    limits: TrainingRun


@cache
def reference_training(recipe: Recipe) -> Limited:
    """Train the course, with its limits."""
    run = _train(course(), recipe)
    moments = 2 if recipe is SGD else 3
    count = (
        moments
        * sum(array[0, 0].size for array in run.parameters.values())
        * np.arange(1, STEPS + 1)
    )

    def limit(found: np.ndarray) -> np.ndarray:
        deviations = np.moveaxis(found[:, 1:] - found[:, :1], 1, 0)
        # The reference rounds too.
        return 2.0 * worst_case(deviations, count.reshape(-1, *[1] * (found.ndim - 2)))

    exact = TrainingRun(
        run.losses[:, 0], {key: array[:, 0] for key, array in run.parameters.items()}
    )
    return Limited(
        exact,
        TrainingRun(
            limit(run.losses), {key: limit(array) for key, array in run.parameters.items()}
        ),
    )


def _train(given: Course, recipe: Recipe) -> TrainingRun:
    """Train 1 + TRAINING_SAMPLES times at once, the runs along the second axis of what is returned.

    The first run is the exact one. In the others every result of every step is moved by the most
    that rounding may move it, up or down.
    """
    signs, samples = np.random.default_rng(0), 1 + TRAINING_SAMPLES
    state: dict[str, tuple[np.ndarray, ...]] = {}
    for key, array in given.start.state.items():
        if key != "mask":
            parameter = np.repeat(array[None], samples, axis=0)
            state[key] = (parameter, *[np.zeros_like(parameter)] * (1 if recipe is SGD else 2))
    losses, history = [], []
    advance = _sgd if recipe is SGD else _adamw
    for step in range(len(given.inputs)):
        loss, gradient = _loss_and_gradient(
            given, {key: entry[0] for key, entry in state.items()}, step
        )
        losses.append(_moved(loss, signs))
        clipped = _clipped(gradient, recipe.max_norm)
        state = {
            key: tuple(_moved(new, signs) for new in advance(recipe, clipped[key], entry, step + 1))
            for key, entry in state.items()
        }
        history.append({key: entry[0] for key, entry in state.items()})
    return TrainingRun(
        np.array(losses), {key: np.stack([entry[key] for entry in history]) for key in state}
    )


def _loss_and_gradient(
    given: Course, parameters: Arrays, step: int
) -> tuple[Bounded, dict[str, Bounded]]:
    lifted = {key: Bounded.exact(array) for key, array in parameters.items()}
    lifted["inputs"] = Bounded.exact(given.inputs[step])
    dropped = given.keeps[step], given.start.config.dropout
    stages = attention_forward(lifted, given.start.mask, *dropped)
    apart = stages["context"] - Bounded.exact(given.targets[step])
    entries = given.targets[step].size
    loss = (apart * apart).sum((-3, -2, -1)).scaled(1.0 / entries)
    gradient = attention_gradient(
        lifted, stages, apart.scaled(2.0 / entries, roundings=2), *dropped
    )
    del gradient["inputs"]
    return loss, gradient


def _clipped(gradient: dict[str, Bounded], max_norm: float) -> dict[str, Bounded]:
    """Scale by max_norm / (norm + 1e-6) where that is below 1, as `torch.nn.utils.clip_grad_norm_` does."""
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
    recipe: Recipe, gradient: Bounded, entry: tuple[np.ndarray, ...], step: int
) -> tuple[Bounded, ...]:
    parameter, trace = map(Bounded.exact, entry)
    gradient = gradient + parameter.scaled(recipe.weight_decay)
    trace = trace.scaled(recipe.momentum) + gradient
    return parameter - trace.scaled(recipe.learning_rate), trace


def _adamw(
    recipe: Recipe, gradient: Bounded, entry: tuple[np.ndarray, ...], step: int
) -> tuple[Bounded, ...]:
    """Loshchilov and Hutter, "Decoupled Weight Decay Regularization", algorithm 2."""
    # No rounding makes a mean of squares negative.
    parameter, first, second = map(Bounded.exact, (*entry[:2], np.maximum(entry[2], 0.0)))
    beta_1, beta_2 = recipe.betas
    first = first.scaled(beta_1) + gradient.scaled(1.0 - beta_1, roundings=2)
    second = second.scaled(beta_2) + (gradient * gradient).scaled(1.0 - beta_2, roundings=2)
    # A power by `step` multiplications, and what a subtraction from 1 makes of their relative
    # error.
    unbiased_1 = first.scaled(1.0 / (1.0 - beta_1**step), roundings=_bias_roundings(beta_1, step))
    unbiased_2 = second.scaled(1.0 / (1.0 - beta_2**step), roundings=_bias_roundings(beta_2, step))
    direction = unbiased_1 / (unbiased_2.sqrt() + Bounded.exact(np.array(recipe.eps)))
    moved = direction + parameter.scaled(recipe.weight_decay)
    return parameter - moved.scaled(recipe.learning_rate), first, second


def _bias_roundings(beta: float, step: int) -> int:
    power = beta**step
    return int(np.ceil((step + 1) * power / (1.0 - power))) + 3


def _moved(new: Bounded, signs: np.random.Generator) -> np.ndarray:
    chosen = signs.choice((-1.0, 1.0), new.shape)
    chosen[0] = 0.0
    return new.value + chosen * new.error
