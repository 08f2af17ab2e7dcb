"""The calls that both modules are given: inputs as torch takes them, kept as NumPy arrays."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..conversion.tensors import Untransferable, tensor_to_numpy, to_host
from ..frameworks import torch
from .errors import PortError
from .trees import Arrays, is_array, is_float, named_arrays, replaced


class Call(NamedTuple):
    """One call: its positional arguments and its keywords, with NumPy arrays."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def arrays(self) -> Arrays:
        """The arrays in it by name: "0" for the first argument, "mask" for a keyword."""
        return {
            name: array
            for name, array in named_arrays(self._named()).items()
            if isinstance(array, np.ndarray)
        }

    @property
    def floats(self) -> dict[str, np.ndarray]:
        """The floating arrays in it, by name: what gradients are taken by."""
        return {name: array for name, array in self.arrays.items() if is_float(array)}

    def replaced(self, arrays: Mapping[str, Any]) -> "Call":
        """Return the call with other arrays in the place of those of these names."""
        tree = replaced(self._named(), lambda name, array: arrays.get(name, array))
        return Call(tuple(tree[str(index)] for index in range(len(self.args))), _keywords(tree))

    def _named(self) -> dict[str, Any]:
        return {str(index): value for index, value in enumerate(self.args)} | self.kwargs


def _keywords(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if not name.isdigit()}


def calls_of(inputs: Any) -> list[Call]:
    """Return the calls: a list has several; a tuple has arguments, a dict keywords, of one.

    Raises:
        PortError: there is no call.
    """
    calls = [_call(one) for one in (inputs if isinstance(inputs, list) else [inputs])]
    if not calls:
        raise PortError("inputs is an empty list: give at least one call")
    return calls


def _call(one: Any) -> Call:
    call = call_of(replaced(one, _taken))
    if wrong := [key for key in call.kwargs if not isinstance(key, str)]:
        raise PortError(f"inputs has the keyword {wrong[0]!r}: keywords are names")
    return call


def _taken(name: str, array: Any) -> np.ndarray:
    """Return the input of this name as a NumPy array of numbers."""
    which = f"input {name}" if name else "the input"
    try:
        taken = to_numpy(array)
    except Untransferable as error:
        raise PortError(f"{which}: {error}") from error
    if taken.dtype.kind in "OSU":
        raise PortError(f"{which} has dtype {taken.dtype}: give numbers or truth values")
    return taken


def call_of(given: Any) -> Call:
    """Return the call of a dict of keywords, a tuple of arguments, or one argument."""
    if isinstance(given, dict):
        return Call((), given)
    return Call(given, {}) if isinstance(given, tuple) else Call((given,), {})


def to_numpy(array: Any) -> np.ndarray:
    """Return a tensor or array as a NumPy array of its own memory."""
    if isinstance(array, torch.Tensor):
        return tensor_to_numpy(array).copy()
    return np.array(to_host(array)) if is_array(array) else np.asarray(array)


def with_more_rows(call: Call) -> Call:
    """Return the call with as many other rows, made of the same entries, after its own."""
    return call.replaced(
        {name: np.concatenate([array, np.roll(array, 1)]) for name, array in call.arrays.items()}
    )


def rows_of(call: Call, outputs: Mapping[str, np.ndarray]) -> int:
    """Return how many rows the batch has; 0 if inputs and outputs do not all have as many."""
    sizes = {array.shape[:1] for array in (*call.arrays.values(), *outputs.values())}
    return sum(sizes.pop()) if len(sizes) == 1 else 0
