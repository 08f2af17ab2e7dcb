"""Keep what a test checked, and check it again with the same inputs and weights."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..files.printable import shown
from ..files.writing import write_text
from ..frameworks import Tensor, nn
from .calls import calls_of
from .errors import PortError
from .record_file import RecordFile, write
from .torch_side import TorchSide

_STATE = "state/"
_SCRIPT = '''"""Check a port once more, with the inputs and the weights with which it differed.

The test is {test}; its check of number {number} is repeated. Run `python replay_{name}.py`.
"""

import os
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    os.chdir(folder / {root!r})
    sys.exit(pytest.main([*{options!r}, str(folder / "{name}.safetensors")]))
'''


def keep(
    folder: Path,
    name: str,
    module: nn.Module,
    inputs: Any,
    *,
    number: int,
    test: str,
    root: Path,
    options: Sequence[str],
) -> Path:
    """Write replay_NAME.py and NAME.safetensors, which check the port again; return the script.

    Args:
        folder: where to write them.
        name: their name.
        module: the torch module.
        inputs: the inputs.
        number: which check of the test it is, from 1.
        test: the test, from the root of the tests.
        root: the root of the tests.
        options: what pytest needs besides.
    """
    state = {
        key: tensor_to_numpy(tensor)
        for key, tensor in module.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    of_calls = {f"call {place}/": call.arrays for place, call in enumerate(calls_of(inputs))}
    folder.mkdir(parents=True, exist_ok=True)
    head = {"calls": [], "number": number, "test": test}
    write(folder / f"{name}.safetensors", head, {_STATE: state, **of_calls})
    text = _SCRIPT.format(
        test=test,
        number=number,
        name=name,
        root=os.path.relpath(root, folder),
        options=[test, *options, "--port-replay"],
    )
    script = folder / f"replay_{name}.py"  # pytest takes it for no file of tests
    write_text(script, text)
    return script


def replayed(path: Path, number: int, module: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """Return a copy of the module with the state of the file, and its inputs.

    Both are returned as they are if the file is of another check of the test than this number's.

    Raises:
        PortError: the file is of another module, or of other calls.
    """
    file = RecordFile(path)
    kept = file.head.get("number")
    if not isinstance(kept, int):
        raise PortError(f"{shown(path)} was not kept by --port-report: give --port-replay one")
    if kept != number:
        return module, inputs
    calls = calls_of(inputs)
    state = file.named(_STATE)
    of_calls = [file.named(f"call {place}/") for place in range(len(calls))]
    _require_same(path, "the state", module.state_dict(), state)
    for call, arrays in zip(calls, of_calls, strict=True):
        _require_same(path, "the inputs", call.arrays, arrays)
    tensors = {key: numpy_to_tensor(array.copy()) for key, array in state.items()}
    copied = TorchSide(module, None, None).module(state=tensors)
    again = [call.replaced(arrays) for call, arrays in zip(calls, of_calls, strict=True)]
    return copied, [call.kwargs or call.args for call in again]


def _require_same(path: Path, what: str, own: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    shapes, others = (
        {name: tuple(array.shape) for name, array in named.items() if hasattr(array, "shape")}
        for named in (own, kept)
    )
    for name in [*shapes, *others]:
        if shapes.get(name) != others.get(name):
            raise PortError(
                f"{shown(path)} does not fit {what} of the test: {shown(name)} has the shape "
                f"{others.get(name)} in the file and {shapes.get(name)} in the test, which has "
                "changed since: run it with --port-report again"
            )
