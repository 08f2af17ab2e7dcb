"""What the checks are run on: a state, inputs and a pattern of dropout, in float64, to be rounded to any dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .cases import Config, State
from .dtypes import numpy_dtype
from .reference import causal_mask


class Trial(NamedTuple):
    """One configuration with everything that its output depends on.

    name: for the reader.
    config: the constructor arguments.
    state: a mask, and the parameters by torch's names, weights (out, in).
    inputs: (batch, tokens, input_embedding_dim).
    keep: (batch, tokens, tokens), or with heads (batch, heads, tokens, tokens), True where dropout keeps the weight;
        None for no dropout.
    """

    name: str
    config: Config
    state: State
    inputs: np.ndarray
    keep: np.ndarray | None = None

    def rounded(self, dtype: str) -> Trial:
        """Return the trial with weights and inputs rounded to the dtype; the mask stays as it is."""
        to: Any = numpy_dtype(dtype)
        state = {key: array if key == "mask" else array.astype(to) for key, array in self.state.items()}
        return self._replace(state=state, inputs=self.inputs.astype(to))

    def masked(self, name: str, mask: np.ndarray) -> Trial:
        """Return the trial under another mask."""
        return self._replace(name=name, state={**self.state, "mask": mask.copy()})

    @property
    def mask(self) -> np.ndarray:
        """The mask, (context_length, context_length)."""
        return self.state["mask"]

    @property
    def closed(self) -> bool:
        """Whether some row of the mask leaves nothing open among the tokens: that row is NaN."""
        tokens = self.inputs.shape[1]
        return bool((self.mask[:tokens, :tokens] != 0).all(axis=1).any())


def draw_parameters(config: Config, random: np.random.Generator, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Draw weights and biases in float64 by torch's names: normal, weights over sqrt(input_embedding_dim)."""
    parameters = {}
    for name in ("W_query", "W_key", "W_value", *["out_proj"] * (config.num_heads is not None)):
        width = config.output_embedding_dim if name == "out_proj" else config.input_embedding_dim
        shape = config.output_embedding_dim, width
        parameters[f"{name}.weight"] = scale * random.standard_normal(shape) / np.sqrt(width)
        if config.qkv_bias or name == "out_proj":
            parameters[f"{name}.bias"] = scale * random.standard_normal(config.output_embedding_dim)
    return parameters


def draw(config: Config, tokens: int, random: np.random.Generator, *, batch: int = 2, keep: bool = False) -> Trial:
    """Draw standard normal weights over sqrt(input_embedding_dim), biases and inputs; the mask is causal."""
    state = draw_parameters(config, random)
    state["mask"] = causal_mask(config.context_length).astype(np.float32)
    inputs = random.standard_normal((batch, tokens, config.input_embedding_dim))
    heads = () if config.num_heads is None else (config.num_heads,)
    kept = random.random((batch, *heads, tokens, tokens)) >= config.dropout if keep else None
    return Trial("causal", config, state, inputs, kept)


def fixed() -> list[Trial]:
    """Return the trials that every check is run on: between them, each part of the formula matters in one."""
    random = np.random.default_rng(211)
    prime = draw(Config(13, 11, 7, 0.4, qkv_bias=True), 5, random, keep=True)
    plain = prime._replace(keep=None)
    square = draw(Config(6, 6, 6, 0.25), 6, random)
    heads = draw(Config(11, 15, 7, 0.4, qkv_bias=True, num_heads=3), 5, random, keep=True)
    rows = np.arange(7)
    rectangle = ((rows[:, None] < 3) == (rows >= 4)).astype(np.float32)
    edited = prime.mask * np.where(rows % 2, 2.0, -0.5).astype(np.float32)
    closed = np.array(prime.mask)
    closed[2] = 1.0
    return [
        plain,
        plain.masked("rectangular mask", rectangle),
        prime.masked("dropout, edited mask", edited),
        plain.masked("a row closed", closed),
        heads._replace(name="three heads, dropout"),
        square._replace(name="square weights"),
    ]
