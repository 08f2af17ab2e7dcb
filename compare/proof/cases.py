"""The configurations and inputs used by the commands and the tests."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from ..dtypes import numpy_dtype
from .reference import causal_mask

Framework = Literal["torch", "linen", "nnx"]
FRAMEWORKS: tuple[Framework, ...] = ("torch", "linen", "nnx")
TITLES: dict[str, str] = {"torch": "PyTorch", "linen": "Flax Linen", "nnx": "Flax NNX"}

# The parameters by their torch names, weights (out, in), and the mask if it is state.
State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Config:
    """The constructor arguments that the three implementations share.

    `num_heads` selects the multi-head class, None the classes with a single head. `out_bias`,
    `num_kv_heads` and `scale` belong to the multi-head class.
    """

    input_embedding_dim: int
    output_embedding_dim: int
    context_length: int
    dropout: float
    qkv_bias: bool | tuple[bool, bool, bool] = False
    num_heads: int | None = None
    implementation: Literal["reference", "fused", "auto"] = "auto"
    out_bias: bool = True
    num_kv_heads: int | None = None
    scale: float | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for the constructors, without those that are None."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.num_heads is None:
            del given["out_bias"]
        return given

    @property
    def options(self) -> tuple[float, int | None, float | None]:
        """What the formula needs beside the arrays: dropout, num_heads and scale."""
        return self.dropout, self.num_heads, self.scale

    @property
    def layers(self) -> dict[str, tuple[int, int, bool]]:
        """The linear layers in the order of the formula: inputs, outputs, whether with a bias."""
        inner, outer = self.input_embedding_dim, self.output_embedding_dim
        kv_dim = outer
        if self.num_heads is not None and self.num_kv_heads is not None:
            kv_dim = outer // self.num_heads * self.num_kv_heads
        each = self.qkv_bias if isinstance(self.qkv_bias, tuple) else (self.qkv_bias,) * 3
        layers = {
            "W_query": (inner, outer, each[0]),
            "W_key": (inner, kv_dim, each[1]),
            "W_value": (inner, kv_dim, each[2]),
        }
        if self.num_heads is not None:
            layers["out_proj"] = outer, outer, self.out_bias
        return layers


@dataclass(frozen=True)
class Case:
    """A configuration and the size of its inputs."""

    name: str
    config: Config
    batch: int
    tokens: int

    def inputs(self) -> np.ndarray:
        """Return standard normal inputs, float32, (batch, tokens, input_embedding_dim)."""
        shape = (self.batch, self.tokens, self.config.input_embedding_dim)
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


NOTEBOOK = Config(3, 5, 6, 0.1)

# Every dimension is a different prime, so that a swapped axis gives a wrong shape, not a wrong
# number.
PRIME = Config(13, 11, 7, 0.1)
PRIME_BIAS = Config(13, 11, 7, 0.1, qkv_bias=True)
LONG = Config(61, 31, 67, 0.1, qkv_bias=True)

CASES = (
    Case("notebook", NOTEBOOK, batch=2, tokens=6),
    Case("primes", PRIME, batch=2, tokens=5),
    Case("primes, bias", PRIME_BIAS, batch=2, tokens=5),
    Case("primes, full length", PRIME_BIAS, batch=3, tokens=7),
    Case("primes, one token", PRIME_BIAS, batch=1, tokens=1),
    Case("long, bias", LONG, batch=2, tokens=53),
)


class Trial(NamedTuple):
    """One configuration with everything that its output depends on.

    Attributes:
        name: shown in reports.
        config: the constructor arguments.
        state: the mask, and the parameters by their torch names, weights (out, in).
        inputs: (batch, tokens, input_embedding_dim).
        keep: (batch, tokens, tokens), or with heads (batch, heads, tokens, tokens), True where
            dropout keeps the weight; None for no dropout.
    """

    name: str
    config: Config
    state: State
    inputs: np.ndarray
    keep: np.ndarray | None = None

    def rounded(self, dtype: str) -> Trial:
        """Return the trial with weights and inputs rounded to the dtype; the mask is unchanged."""
        target: Any = numpy_dtype(dtype)
        state = {
            key: array if key == "mask" else array.astype(target)
            for key, array in self.state.items()
        }
        return self._replace(state=state, inputs=self.inputs.astype(target))

    def masked(self, name: str, mask: np.ndarray) -> Trial:
        """Return the trial with another name and mask."""
        return self._replace(name=name, state={**self.state, "mask": mask.copy()})

    @property
    def mask(self) -> np.ndarray:
        """The mask, (context_length, context_length)."""
        return self.state["mask"]

    @property
    def closed(self) -> bool:
        """Whether a row of the mask blocks every token, so that its output is NaN."""
        tokens = self.inputs.shape[1]
        return bool((self.mask[:tokens, :tokens] != 0).all(axis=1).any())


def draw_parameters(
    config: Config, random: np.random.Generator, scale: float = 1.0
) -> dict[str, np.ndarray]:
    """Draw float64 parameters by their torch names.

    The standard deviation of biases is `scale`, that of weights `scale` / sqrt(input width).
    """
    parameters = {}
    for name, (inner, outer, has_bias) in config.layers.items():
        weight = random.standard_normal((outer, inner))
        parameters[f"{name}.weight"] = scale * weight / np.sqrt(inner)
        if has_bias:
            parameters[f"{name}.bias"] = scale * random.standard_normal(outer)
    return parameters


def draw(
    config: Config, tokens: int, random: np.random.Generator, *, batch: int = 2, keep: bool = False
) -> Trial:
    """Draw a trial: parameters, standard normal inputs, and with `keep` a dropout pattern.

    The mask is causal.
    """
    state = draw_parameters(config, random)
    state["mask"] = causal_mask(config.context_length).astype(np.float32)
    inputs = random.standard_normal((batch, tokens, config.input_embedding_dim))
    heads = () if config.num_heads is None else (config.num_heads,)
    pattern = random.random((batch, *heads, tokens, tokens)) >= config.dropout if keep else None
    return Trial("causal", config, state, inputs, pattern)


def fixed_trials() -> list[Trial]:
    """Return the trials that every check runs.

    Each part of the formula changes the result of at least one of them.
    """
    random = np.random.default_rng(211)
    prime = draw(Config(13, 11, 7, 0.4, qkv_bias=True), 5, random, keep=True)
    plain = prime._replace(keep=None)
    square = draw(Config(6, 6, 6, 0.25), 6, random)
    heads = draw(Config(11, 15, 7, 0.4, qkv_bias=True, num_heads=3), 5, random, keep=True)
    grouped = draw(
        Config(
            5,
            24,
            7,
            0.4,
            qkv_bias=(True, False, True),
            num_heads=6,
            out_bias=False,
            num_kv_heads=2,
            scale=-0.75,
        ),
        5,
        random,
        keep=True,
    )
    rows = np.arange(7)
    rectangle = ((rows[:, None] < 3) == (rows >= 4)).astype(np.float32)
    edited = prime.mask * np.where(rows % 2, 2.0, -0.5).astype(np.float32)
    edited[1, 3] = np.nan  # NaN is not 0, so it blocks
    closed = np.array(prime.mask)
    closed[2] = 1.0
    return [
        plain,
        plain.masked("rectangular mask", rectangle),
        prime.masked("dropout, edited mask", edited),
        plain.masked("a row closed", closed),
        heads._replace(name="three heads, dropout"),
        grouped._replace(name="grouped heads, scale"),
        square._replace(name="square weights"),
    ]
