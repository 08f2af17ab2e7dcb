"""List the entries of a module in memory that the user names as `package.module:name`."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import nnx

from ..checkpoint.errors import CheckpointError
from ..checkpoint.tensors import Spec, spec_of
from ..conversion.mapping import slashed
from ..conversion.state_kinds import entries
from ..conversion.unmatched import host_values
from ..files.printable import shown


@dataclass(frozen=True)
class InspectedEntry:
    """One entry. `spec` is None where it has no plain array of values.

    `parts` yields its values in consecutive flat parts.
    """

    name: str
    kind: str
    spec: Spec | None
    parts: Callable[[], Iterable[np.ndarray]]


def imported(source: str) -> Any:
    """Return the object `package.module:name`; a function is called first.

    The module is imported, which runs its code; it may lie in the current folder.

    Raises:
        CheckpointError: it cannot be imported, or is not a module or variables.
    """
    module_name, _, name = source.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        target = getattr(import_module(module_name), name)
        if callable(target) and not isinstance(target, torch.nn.Module | nnx.Module):
            target = target()
        entries(target)
    # The user's module may raise anything when it is imported or called.
    except (Exception, SystemExit) as error:
        raise CheckpointError(
            source,
            f"is not a module that can be inspected ({type(error).__name__}: {shown(error)})",
            expected="package.module:name of a torch or NNX module, Linen variables, or a "
            "function without arguments that returns one",
            found=type(error).__name__,
            mend="name one of these",
            is_usage=True,
        ) from error
    finally:
        sys.path.pop(0)
    return target


def module_entries(source: str) -> list[InspectedEntry]:
    """Return the entries of the object `package.module:name`; a function is called first.

    Raises:
        CheckpointError: it cannot be imported, or is not a module or variables.
    """
    listed = []
    for entry in entries(imported(source)):
        kind = f"alias of {slashed(entry.first)}" if entry.first is not None else entry.kind
        if kind == "left behind":
            kind = "plain: will be left behind"
        array = _values(entry.value) if entry.kind != "stream" else None
        spec = spec_of(array) if array is not None else None
        listed.append(InspectedEntry(entry.name, kind, spec, _parts_of(array)))
    return listed


def _parts_of(array: np.ndarray | None) -> Callable[[], Iterable[np.ndarray]]:
    return lambda: [] if array is None else [np.ascontiguousarray(array).reshape(-1)]


def _values(value: Any) -> np.ndarray | None:
    """Return the values as an array, or None where there is no plain array."""
    try:
        array = host_values(value)
        return array if array is None or spec_of(array) else None
    except (ValueError, TypeError, RuntimeError):
        return None
