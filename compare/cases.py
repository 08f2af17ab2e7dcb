"""The configurations and inputs that the commands and the suite run."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

# The parameters by torch's names, weights (out, in), and the mask if it is state.
State = dict[str, np.ndarray]


@dataclass(frozen=True)
class Config:
    """The constructor arguments that the three implementations share; with `num_heads`, of the class that has heads."""

    input_embedding_dim: int
    output_embedding_dim: int
    context_length: int
    dropout: float
    qkv_bias: bool = False
    num_heads: int | None = None
    implementation: Literal["reference", "fused", "auto"] = "auto"

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the constructors."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Case:
    """A configuration with the size of its inputs."""

    name: str
    config: Config
    batch: int
    tokens: int

    def inputs(self) -> np.ndarray:
        """Return standard normal inputs, float32, (batch, tokens, input_embedding_dim)."""
        shape = (self.batch, self.tokens, self.config.input_embedding_dim)
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


NOTEBOOK = Config(3, 5, 6, 0.1)

# Every dimension is another prime, so that a swapped axis is a wrong shape and not a wrong number.
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
