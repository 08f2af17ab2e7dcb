"""Record what a torch module gives, for a port that is judged where torch is not installed."""

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..conversion.layer_facts import facts_of
from ..conversion.layers import is_unknown, refusal
from ..conversion.state_kinds import torch_kinds
from ..conversion.tensors import tensor_to_numpy
from ..files.printable import kind_of, shown
from ..files.reading import as_path
from ..frameworks import is_parametrized, nn, torch
from .calls import Call, calls_of, rows_of
from .errors import PortError
from .fingerprints import fingerprint
from .live import LiveReference, known_dtypes
from .perturbed import SAMPLES
from .record_file import write
from .reference import DRAWN, GIVEN, Case, spread_of
from .result import PARTS, NamedArrays
from .sketch import MAX_ENTRIES, sketched
from .torch_side import TorchSide
from .values import Trace

_MIN_KEPT = 1 << 24  # bytes of values between inputs and outputs that are kept whole
_SHARE_KEPT = 16  # or this part of the weights, for each run


def record(
    path: str | PathLike[str],
    torch_module: nn.Module,
    inputs: Any,
    *,
    outputs: Callable[[Any], Any] | None = None,
    method: str | None = None,
    dtypes: Sequence[str] = ("float32",),
) -> Path:
    """Record a torch module for `compare.check_port(path, flax_module)`, which needs no torch.

    The file has the inputs, the state, and what the module gives for them as `check_port` asks:
    outputs, gradients, state and the values between, in float64 with how far they move under
    roundings, and the outputs in the working dtypes. Large gradients and values between are stored
    as sums and quantiles. Neither the module nor the inputs are changed, and JAX is not needed.

    Args:
        path: the file, safetensors with a head in JSON. One that is there is replaced.
        torch_module: the module.
        inputs: one call or a list of calls, as for `check_port`.
        outputs: a function of what the module returns, to what is compared.
        method: the method to call in place of the module itself.
        dtypes: the working dtypes: "float32", "bfloat16", "float16".

    Returns:
        The path of the file.

    Raises:
        PortError: the module cannot be recorded.
        FileError: the file cannot be written.
    """
    target = as_path(path)
    if not isinstance(torch_module, nn.Module):
        raise PortError(f"torch_module is {kind_of(torch_module)}; expected a torch module")
    if method is not None and not callable(getattr(torch_module, str(method), None)):
        raise PortError(f"{type(torch_module).__name__} has no method {method!r}")
    if any(map(is_parametrized, torch_module.modules())):
        raise PortError(
            "the module computes weights from other tensors: record compare.fold(torch_module)"
        )
    for name, layer in torch_module.named_modules():
        if not is_unknown(layer) and (reason := refusal(layer)):
            raise PortError(f"{shown(name)}: {reason}" if name else reason)
    calls, working = calls_of(inputs), known_dtypes(dtypes)
    with torch.inference_mode(False), torch.enable_grad():
        reference = LiveReference(TorchSide(torch_module, outputs, method), calls, sketched)
        head, groups = _Recorder(reference, working).content()
    write(target, head, groups)
    return target


class _Recorder:
    """Asks a module all that a judge may ask, and keeps the answers by name."""

    def __init__(self, reference: LiveReference, dtypes: Sequence[str]) -> None:
        self.reference, self.dtypes = reference, dtypes
        self.groups: dict[str, Mapping[str, np.ndarray]] = {}  # by how their names begin
        self.kept = 0  # bytes of values that are kept whole, for each run

    def content(self) -> tuple[dict[str, Any], dict[str, Mapping[str, np.ndarray]]]:
        """Return the head and the arrays of the file."""
        module = self.reference.source()
        state = {key: tensor_to_numpy(value) for key, value in self.reference.state(GIVEN).items()}
        first = _first_names(module)
        self.groups["state/"] = {key: state[key] for key in state if first[key] == key}
        size = sum(array.nbytes for array in state.values())
        # For each run: both weights on each call, some in training too.
        self.kept = max(_MIN_KEPT, size // _SHARE_KEPT) // len(self.reference.calls)
        spreads = {
            name: spread_of(state[name])
            for name, parameter in module.named_parameters()
            if parameter.is_floating_point()
        }
        self.groups["spreads/"] = {key: np.array(spread) for key, spread in spreads.items()}
        drawn = self.reference.state(DRAWN)
        head: dict[str, Any] = {
            "module": type(module).__name__,
            "torch": torch.__version__,
            "state_names": list(state),
            "aliases": {key: name for key, name in first.items() if key != name and key in state},
            "parameters": self.reference.parameters,
            "kinds": {key: kind for key, kind in torch_kinds(module).items() if key in state},
            "layers": facts_of(module),
            "drawn": {key: checksum(tensor_to_numpy(drawn[key])) for key in spreads},
            "calls": [self._call(number, call) for number, call in enumerate(self.reference.calls)],
        }
        head["cases"] = [
            case
            for weights in (GIVEN, DRAWN)
            for number in range(len(self.reference.calls))
            for case in self._cases(weights, number)
        ]
        head["notes"] = list(self.reference.notes)
        head["widened"] = list(self.reference.widened)
        return head, self.groups

    def _call(self, number: int, call: Call) -> dict[str, Any]:
        self.groups[f"call {number}/"] = call.arrays
        tree = call.replaced({name: _Name(name) for name in call.arrays})
        return {"args": _as_json(tree.args), "kwargs": _as_json(tree.kwargs)}

    def _cases(self, weights: str, number: int) -> list[dict[str, Any]]:
        modes = self.reference.modes(weights, number)
        found = []
        for train, plain in modes.items():
            case = Case(weights, number, train)
            start = start_of(case)
            result, farthest = self.reference.exact(case, samples=SAMPLES)
            for part in PARTS:
                self.groups[f"{start}{part}/"] = getattr(result, part)
                moved = getattr(farthest, part)
                self.groups[f"{start}moved {part}/"] = {
                    key: np.asarray(moved[key]) for key in moved
                }
            self.groups[f"{start}biased/"] = result.biased
            self.groups[f"{start}float32/"] = plain.outputs
            for dtype in self.dtypes:
                if dtype != "float32" and not result.drawn:
                    self.groups[f"{start}{dtype}/"] = self.reference.outputs(case, dtype)
            trace, gradients = self.reference.trace(case, has_gradients=True)
            found.append(
                {
                    "case": [weights, number, train],
                    "drawn": result.drawn,
                    "trace": self._trace(start, case, trace, gradients),
                }
            )
        longer = Case(weights, number, is_longer=True)
        if not rows_of(self.reference.calls[number], modes[False].outputs):
            return found
        with suppress(PortError):  # torch takes no other number of rows
            self.groups[f"{start_of(longer)}outputs/"] = self.reference.outputs(longer)
        return found

    def _trace(
        self, start: str, case: Case, trace: Trace, gradients: Mapping[int, np.ndarray]
    ) -> dict[str, Any]:
        roots = [*(f"call/{name}" for name in self.reference.calls[case.number].arrays)]
        roots += [f"state/{key}" for key in self.reference.state(case.weights)]
        left = self.kept
        values: list[list[Any]] = []
        stored: NamedArrays = {}
        lines: dict[tuple[Any, ...], int] = {}
        for index, value in enumerate(trace.values):
            array = value.array
            row: list[Any] = [
                value.operation,
                list(value.parents),
                value.depends,
                [lines.setdefault(astuple(line), len(lines)) for line in value.lines],
                list(array.shape),
            ]
            if index < len(roots):
                row += ["root", roots[index]]
            elif array.size <= MAX_ENTRIES or array.nbytes <= left:
                name = hashlib.sha256(array.tobytes()).hexdigest()[:32] + array.dtype.name
                left -= 0 if name in stored else array.nbytes
                stored[name] = np.ascontiguousarray(array).reshape(-1)
                row += ["whole", name]
            else:
                quantiles, is_few = fingerprint(array)
                stored[f"quantiles {index}"] = quantiles
                row += ["quantiles", f"quantiles {index}", is_few]
            values.append(row)
        self.groups[f"{start}values/"] = stored
        small = {
            str(index): array for index, array in gradients.items() if array.size <= MAX_ENTRIES
        }
        self.groups[f"{start}gradients by values/"] = small
        return {
            "values": values,
            "lines": [list(line) for line in lines],
            "outputs": trace.outputs,
            "buffers": trace.buffers,
        }


class _Name(str):
    """The name of an array in the place of the array."""


def start_of(case: Case) -> str:
    """Return how the names of the arrays of a run begin."""
    mode = "longer" if case.is_longer else "training" if case.train else "inference"
    return f"{case.weights}/{case.number}/{mode}/"


def checksum(array: np.ndarray) -> int:
    """Return a number that tells whether drawn entries are the same elsewhere."""
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def _first_names(module: nn.Module) -> dict[str, str]:
    """Return for each name in the state dict the first name of the same tensor."""
    seen: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {key: seen.setdefault(id(tensor), key) for key, tensor in state.items()}


def _as_json(tree: Any) -> Any:
    """Return nested arguments as JSON: what is no list is named.

    Raises:
        PortError: an argument is neither an array, a number, a text, nor made of them.
    """
    match tree:
        case _Name():
            return {"array": str(tree)}
        case dict() if all(isinstance(key, str) for key in tree):
            return {"dict": {key: _as_json(value) for key, value in tree.items()}}
        case tuple() if not hasattr(tree, "_fields"):
            return {"tuple": [_as_json(value) for value in tree]}
        case list():
            return [_as_json(value) for value in tree]
        case None | bool() | int() | str():
            return tree
        case float() if np.isfinite(tree):
            return tree
    what = repr(tree) if isinstance(tree, float) else kind_of(tree)
    raise PortError(f"an argument is {what}, which a record cannot keep: give arrays")
