"""Check the port that a file defines: `flax_module()`, and `torch_module()` with its `inputs()`.

In their place, the file may name a record: `record = "net.safetensors"`.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..conversion.errors import ConversionError
from ..files.errors import FileError
from ..files.printable import shown
from ..ports.check import check_port
from ..ports.errors import PortError
from ..ports.report import PortReport
from ..ports.section import section_of
from ..report.model import Section

_NEEDED = ("torch_module", "flax_module", "inputs")
# The names of what a file may also define, and the arguments of `check_port` that these are.
_FUNCTIONS = {"flax_inputs": "flax_inputs", "to_flax": "flax_inputs"}
_VALUES = {
    "rename": "rename",
    "split": "split",
    "stack": "stack",
    "tied": "tied",
    "layouts": "layouts",
    "policy": "policy",
    "train_kwargs": "train",
    "method": "method",
    "dtypes": "dtypes",
}


def sections(file: Path, adequacy: bool = False) -> Iterator[Section | str]:
    """Yield a progress message, then one section with the report.

    Args:
        file: the Python file, whose code is run.
        adequacy: whether to say which statements the inputs do not test.
    """
    yield f"checking the port of {file.name}"
    yield section_of(report_of(file, adequacy=adequacy), file.name)


def report_of(file: Path, *, adequacy: bool = False) -> PortReport:
    """Return the report on the port that the file defines.

    Raises:
        FileError: the file does not define a port, or it cannot be compared.
    """
    module = _imported(file)
    has_record = hasattr(module, "record")
    needed = _NEEDED[1:2] if has_record else _NEEDED
    if missing := [name for name in needed if not callable(getattr(module, name, None))]:
        raise _unusable(file, f"defines no function {missing[0]}()", "define it")
    if has_record and (both := [name for name in _NEEDED[::2] if hasattr(module, name)]):
        raise _unusable(file, f"defines record and {both[0]}(), which it has", "leave one out")
    if hasattr(module, "flax_inputs") and hasattr(module, "to_flax"):
        raise _unusable(file, "defines flax_inputs() and to_flax(), which are one", "leave one out")
    options: dict[str, Any] = {"adequacy": adequacy} | {
        argument: getattr(module, name)
        for name, argument in _FUNCTIONS.items()
        if hasattr(module, name)
    }
    for name, argument in _VALUES.items():
        if hasattr(module, name):
            value = getattr(module, name)
            options[argument] = value() if callable(value) else value
    outputs = [getattr(module, name, None) for name in ("from_torch", "from_flax")]
    if any(outputs):
        options["outputs"] = outputs
    try:
        made = [getattr(module, name)() for name in needed]
        if has_record:  # its path, from the folder of the file
            made.insert(0, file.parent / module.record)
        return check_port(*made, **options)
    except (PortError, ConversionError) as error:
        raise _unusable(file, f"cannot be compared: {error}", "see above") from error
    except Exception as error:  # the user's code may raise anything
        reason = f"raised {type(error).__name__}: {shown(error)}"
        raise _unusable(file, reason, "run the two modules by themselves first") from error


def _imported(file: Path) -> ModuleType:
    """Import the file, whose folder it may import from."""
    name = f"port_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise _unusable(file, "is not a Python file", "name a file that ends with .py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))
    sys.modules[name] = module  # dataclasses look themselves up, and Linen modules are some
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        reason = f"cannot be imported ({type(error).__name__}: {shown(error)})"
        raise _unusable(file, reason, "run it with python first") from error
    finally:
        sys.path.pop(0)
    return module


def _unusable(file: Path, reason: str, mend: str) -> FileError:
    expected = "a file that defines torch_module(), flax_module() and inputs(), or a record"
    return FileError(file, reason, expected=expected, found=reason, mend=mend, is_usage=True)
