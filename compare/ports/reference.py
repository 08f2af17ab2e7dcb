"""What torch gives for the calls: computed from a module, or read from a record."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from .calls import Call, with_more_rows
from .result import NamedArrays, Result
from .trees import is_float
from .values import Gradients, Trace

GIVEN, DRAWN = "as given", "drawn again"  # the weights
_SEED = 7
_FLAT = 0.5  # the spread that is drawn for a parameter whose entries are all the same


class Case(NamedTuple):
    """A run: with these weights, on the call of this number.

    Attributes:
        weights: "as given" or "drawn again".
        number: the number of the call.
        train: whether in training mode.
        is_longer: whether the batch has as many other rows after its own.
    """

    weights: str
    number: int
    train: bool = False
    is_longer: bool = False


class Exact(NamedTuple):
    """What torch gives in float64.

    Attributes:
        result: outputs, gradients and state.
        farthest: how far each array moved at most under perturbation.
    """

    result: Result
    farthest: Result


class Reference(Protocol):
    """What torch gives for some calls.

    Attributes:
        calls: the calls.
        parameters: the torch names of what is trained.
        notes: what is not compared, and why.
        is_large: whether memory is short for it.
        is_live: whether the module is here, so that its state can be saved and loaded.
    """

    is_live: bool
    is_large: bool
    calls: Sequence[Call]
    parameters: list[str]
    notes: dict[str, None]

    @property
    def widened(self) -> Mapping[str, None]:
        """The lines that ask for a narrower dtype than that of a run in float64."""

    def source(self) -> Any:
        """Return what the state is paired by: the module, or its state with what is known."""

    def state(self, weights: str) -> Mapping[str, Any]:
        """Return the state dict, in the module's own dtype."""

    def modes(self, weights: str, number: int) -> dict[bool, Result]:
        """Return the runs in float32 of inference, and of training if it differs and is compared.

        Raises:
            PortError: the module draws random numbers in inference.
        """

    def exact(self, case: Case) -> Exact:
        """Return the run in float64, with gradients, and how far it moves.

        How far gradients move may be of fewer samples than the rest: then it is too little rather
        than too much, and `surer` tells it of all.
        """

    def surer(self, case: Case, exact: Exact) -> NamedArrays:
        """Return how far the gradients move in all samples: asked where they differ."""

    def outputs(self, case: Case, dtype: str = "float64") -> NamedArrays:
        """Return the outputs in a dtype.

        Raises:
            PortError: torch does not take a longer batch.
        """

    def reduced(self, arrays: NamedArrays) -> NamedArrays:
        """Return gradients or state as they are compared."""

    def trace(
        self, case: Case, *, has_gradients: bool = False, buffers: Sequence[str] = ()
    ) -> tuple[Trace, Gradients] | None:
        """Return the values of the run, and gradients by them; None if they are not known.

        If there are names of buffers, these after the call are followed in place of the outputs.
        """


def call_in(calls: Sequence[Call], case: Case) -> Call:
    """Return the call of a run."""
    call = calls[case.number]
    return with_more_rows(call) if case.is_longer else call


def cotangents_of(outputs: NamedArrays) -> NamedArrays:
    """Return what the floating outputs are multiplied with for gradients of their sum."""
    random = np.random.default_rng(1)
    return {
        name: random.standard_normal(array.shape)
        for name, array in outputs.items()
        if is_float(array)
    }


def spread_of(values: np.ndarray) -> tuple[float, float]:
    """Return the mean of a parameter's entries, and the spread with which others are drawn."""
    entries = values.astype(np.float64)
    spread = float(entries.std()) if entries.size > 1 else 0.0
    return float(entries.mean()) if entries.size else 0.0, spread or _FLAT


def draw(
    spreads: Mapping[str, tuple[float, float]], arrays: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names of parameters, and drawn entries in the shapes and dtypes of their arrays.

    Each is the mean plus a normal deviate of the spread: fresh biases of 0, scales of 1 and
    symmetric matrices hide bugs.
    """
    random = np.random.default_rng(_SEED)
    for name, (mean, spread) in spreads.items():
        array = arrays[name]
        drawn = mean + spread * random.standard_normal(array.shape)
        yield name, np.asarray(drawn).astype(array.dtype)
