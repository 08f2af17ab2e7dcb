"""What a torch module gave, read from a record. Nothing here needs torch."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..conversion.layer_facts import layers_from, require_valid
from ..conversion.layers import KnownState
from ..files.printable import shown
from .calls import Call
from .errors import PortError
from .fingerprints import QUANTILES
from .memory import LARGE
from .record import checksum, start_of
from .record_file import RecordFile, placeholder, reading
from .reference import DRAWN, GIVEN, Case, Exact, draw
from .report import SourceLine
from .result import PARTS, NamedArrays, Result
from .sketch import sketched
from .trees import is_float
from .values import Gradients, Trace, Value


class _Tensor(np.ndarray):
    """An entry of a state dict that knows its kind, and which other names it has."""

    kind: str
    memory: object


class RecordedReference:
    """What a torch module gave, as `compare.record` wrote it.

    Args:
        path: the file.

    Raises:
        PortError: it is no record.
        FileError: it cannot be read.
    """

    is_live = False

    def __init__(self, path: Path) -> None:
        self._file = RecordFile(path)
        self.is_large = path.stat().st_size > 4 * LARGE
        with reading(path):
            head = self._file.head
            self.parameters = [key for key in head["parameters"] if key in head["kinds"]]
            if self.parameters != head["parameters"]:
                raise ValueError("its parameters are no names of its state")
            self.notes: dict[str, None] = dict.fromkeys(head["notes"])
            self.widened: dict[str, None] = dict.fromkeys(head["widened"])
            require_valid(head["layers"])
            self._layers = layers_from(head["layers"])
            self._cases = {Case(*one["case"]): one for one in head["cases"]}
            self.calls: Sequence[Call] = [
                self._call(number, tree) for number, tree in enumerate(head["calls"])
            ]
            wanted = {(one, call) for one in (GIVEN, DRAWN) for call in range(len(self.calls))}
            if not wanted or {case[:2] for case in self._cases if not case.train} != wanted:
                raise ValueError("its runs are not those of its calls")
        # Of the last weights alone: a large model has no room for more.
        self.state = lru_cache(maxsize=1)(self._state)

    def _call(self, number: int, tree: Mapping[str, Any]) -> Call:
        arrays = self._file.named(f"call {number}/")
        return Call(_from_json(tree["args"], arrays), _from_json(tree["kwargs"], arrays))

    def source(self) -> KnownState:
        """Return the state with the layers that are known."""
        tensors: dict[str, Any] = {}
        state = self.state(GIVEN)
        with reading(self._file.path):
            kinds, aliases = self._file.head["kinds"], self._file.head["aliases"]
            for key, array in state.items():
                tensor: Any = array.view(_Tensor)
                tensor.kind, tensor.memory = kinds[key], aliases.get(key, key)
                tensors[key] = tensor
        return KnownState(tensors, self._layers)

    def _state(self, weights: str) -> Mapping[str, np.ndarray]:
        with reading(self._file.path):
            state = self._file.named("state/")
            if weights == DRAWN:
                self._draw(state)
            aliases = self._file.head["aliases"]
            return {key: state[aliases.get(key, key)] for key in self._file.head["state_names"]}

    def _draw(self, state: dict[str, np.ndarray]) -> None:
        head = self._file.head
        stored = self._file.named("spreads/")
        spreads = {key: (float(mean), float(spread)) for key, (mean, spread) in stored.items()}
        if spreads.keys() != head["drawn"].keys():
            raise ValueError("what is drawn is not known")
        for key, drawn in draw(spreads, state):
            if checksum(drawn) != head["drawn"][key]:
                raise PortError(
                    f"NumPy {np.__version__} draws other weights for {key} than the NumPy of the "
                    f"record {shown(self._file.path)}: record the module again with this version"
                )
            state[key] = drawn

    def modes(self, weights: str, number: int) -> dict[bool, Result]:
        """Return the outputs in float32 in inference, and in training if it is compared."""
        cases = [case for case in self._cases if case[:2] == (weights, number)]
        with reading(self._file.path):
            return {
                case.train: Result(self._file.named(f"{start_of(case)}float32/")) for case in cases
            }

    def exact(self, case: Case) -> Exact:
        """Return the run in float64, and how far it moves."""
        start, known = start_of(case), self._cases[case]

        def named(what: str) -> NamedArrays:
            return self._file.named(f"{start}{what}/")

        with reading(self._file.path):
            exact = Result(
                named("outputs"),
                named("gradients"),
                named("state"),
                named("biased"),
                int(known["drawn"]),
            )
            moved = Result(named("moved outputs"), named("moved gradients"), named("moved state"))
            for part in PARTS:
                sizes = getattr(moved, part)
                if getattr(exact, part).keys() != sizes.keys() or any(map(np.ndim, sizes.values())):
                    raise ValueError(f"how far its {part} move is not known")
            if not exact.biased.keys() <= exact.state.keys():
                raise ValueError("it has variances of no buffer")
        return Exact(exact, moved)

    def surer(self, case: Case, exact: Exact) -> NamedArrays:
        """Return how far the gradients move: what is recorded is of all samples."""
        return exact.farthest.gradients

    def outputs(self, case: Case, dtype: str = "float64") -> NamedArrays:
        """Return the outputs in a dtype.

        Raises:
            PortError: they are not recorded.
        """
        part = "outputs" if dtype == "float64" else dtype
        with reading(self._file.path):
            found = self._file.named(f"{start_of(case)}{part}/")
        if not found:
            raise PortError(
                f"{shown(self._file.path)} has no outputs in {dtype}: record them with "
                f"compare.record(…, dtypes=[{dtype!r}])"
            )
        return found

    def reduced(self, arrays: NamedArrays) -> NamedArrays:
        """Return gradients or state as the record has them."""
        return sketched(arrays)

    def trace(
        self, case: Case, *, has_gradients: bool = False, buffers: Sequence[str] = ()
    ) -> tuple[Trace, Gradients] | None:
        """Return the values of the run, and gradients by them, if they are recorded."""
        if case not in self._cases:
            return None
        with reading(self._file.path):
            trace = self._trace(case, self._cases[case]["trace"])
            named = self._file.named(f"{start_of(case)}gradients by values/")
            gradients = {int(index): array for index, array in named.items()}
            if not set(gradients) <= set(range(len(trace.values))):
                raise ValueError("there are gradients by values that are not there")
        return trace.following(buffers), gradients if has_gradients else {}

    def _trace(self, case: Case, stored: Mapping[str, Any]) -> Trace:
        lines = [_line(*parts) for parts in stored["lines"]]
        trace = Trace()
        for index, row in enumerate(stored["values"]):
            operation, parents, depends, places, shape, how, name, *few = row
            if not all(isinstance(parent, int) and 0 <= parent < index for parent in parents):
                raise ValueError(f"value {index} is made of values that come later")
            value = Value(placeholder(tuple(shape)), str(operation), None, tuple(parents))
            value.depends = bool(depends)
            value.source = lines[places[0]] if places else None
            value.callers = tuple(lines[place] for place in places[1:])
            if how == "root":
                value.array = self._root(case, name)
            elif how == "whole":
                whole = self._file.array(f"{start_of(case)}values/{name}")
                value.array = whole.reshape(tuple(shape))
            else:
                value.quantiles = self._file.array(f"{start_of(case)}values/{name}")
                value.is_few = bool(few[0])
                if value.quantiles.shape != (QUANTILES,):
                    raise ValueError(f"value {index} has no {QUANTILES} quantiles")
            trace.add(value)
        for followed, indices in ((trace.outputs, "outputs"), (trace.buffers, "buffers")):
            followed |= {str(name): int(index) for name, index in stored[indices].items()}
            if not set(followed.values()) <= set(range(len(trace.values))):
                raise ValueError(f"its {indices} are values that are not there")
        return trace

    def _root(self, case: Case, name: str) -> np.ndarray:
        """Return an input or an entry of the state, in float64 if it is floating."""
        kind, _, key = name.partition("/")
        if kind == "call":
            array = self.calls[case.number].arrays[key]
        else:
            array = self.state(case.weights)[key]
        return array.astype(np.float64) if is_float(array) else array


def _line(file: str, line: int, code: str, operation: str, module: str) -> SourceLine:
    return SourceLine(str(file), int(line), str(code), str(operation), str(module))


def _from_json(tree: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Return nested arguments from JSON; the inverse of how they were written."""
    if isinstance(tree, list):
        return [_from_json(value, arrays) for value in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "array":
        return arrays[value]
    if kind == "tuple":
        return tuple(_from_json(one, arrays) for one in value)
    return {key: _from_json(one, arrays) for key, one in value.items()}
