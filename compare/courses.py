"""What a training run is given: the same start, batches, targets and patterns of dropout for every implementation."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from .cases import Config
from .dtypes import numpy_dtype
from .reference import attention_stages
from .trials import Trial, draw

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
ADAMW = Recipe("AdamW", learning_rate=0.004, weight_decay=0.05, max_norm=0.5, betas=(0.85, 0.98), eps=1e-7)
RECIPES = (SGD, ADAMW)


class Course(NamedTuple):
    """Everything that training depends on, but the recipe.

    start: the trial whose state is trained.
    inputs: (steps, batch, tokens, input_embedding_dim).
    targets: (steps, batch, tokens, output_embedding_dim); the loss is the mean of the squared distances.
    keeps: (steps, batch, tokens, tokens), True where dropout keeps the weight.
    """

    start: Trial
    inputs: np.ndarray
    targets: np.ndarray
    keeps: np.ndarray

    def rounded(self, dtype: str) -> Course:
        """Return the course in that dtype; what float32 holds, as all of it does, it keeps."""
        to: Any = numpy_dtype(dtype)
        return Course(self.start.rounded(dtype), self.inputs.astype(to), self.targets.astype(to), self.keeps)


@cache
def course() -> Course:
    """Return a course in float64 whose numbers are all float32's: a teacher's outputs, with noise, are learned."""
    random = np.random.default_rng(7)
    config = Config(3, 5, 6, 0.1, qkv_bias=True)
    tokens, batch = 5, 4
    start, teacher = (draw(config, tokens, random).rounded("float32").rounded("float64") for _ in range(2))
    inputs = random.standard_normal((STEPS, batch, tokens, 3)).astype(np.float32).astype(np.float64)
    taught = attention_stages(inputs, teacher.state, teacher.mask).context
    targets = (taught + 0.1 * random.standard_normal(taught.shape)).astype(np.float32).astype(np.float64)
    keeps = random.random((STEPS, batch, tokens, tokens)) >= config.dropout
    return Course(start, inputs, targets, keeps)
