"""The values that a run computed, each with the line that made it and the values it is made of."""

import linecache
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from types import FrameType

import numpy as np

from .report import SourceLine

# Frames of these are no lines of somebody's module. The directory of this package is one.
_LIBRARIES = ("torch", "jax", "jaxlib", "flax", "numpy", "einops", "optax", "chex", "jaxtyping")
_HERE = str(Path(__file__).parent)
_CALLERS = tuple(str(Path(__file__).with_name(f"{name}_side.py")) for name in ("torch", "flax"))
_STDLIB = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["platstdlib"])
_SITE = tuple({sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]})


@dataclass
class Value:
    """One value of a run.

    Attributes:
        array: its entries.
        operation: what made it: "aten.mm", "dot_general"; "" for inputs and state.
        source: the line that made it, if it is one of somebody's module.
        parents: the values it was made of, by their indices.
        depends: whether it depends on inputs or state.
        callers: the lines from which the line was reached, the nearest first.
        quantiles: of a value that is not kept whole, those of its entries.
        is_few: of such a value, whether it has few different numbers.
    """

    array: np.ndarray
    operation: str = ""
    source: SourceLine | None = None
    parents: tuple[int, ...] = ()
    depends: bool = True
    callers: tuple[SourceLine, ...] = ()
    quantiles: np.ndarray | None = None
    is_few: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether its entries are kept."""
        return self.quantiles is None

    @property
    def lines(self) -> tuple[SourceLine, ...]:
        """The line that made it and those from which it was reached; none if it is not known."""
        return () if self.source is None else (self.source, *self.callers)


Gradients = dict[int, np.ndarray]  # by the index of a value


@dataclass
class Trace:
    """The values of one run in their order.

    Attributes:
        values: the values.
        outputs: those that are followed back, by the names of the outputs.
        buffers: those that buffers have after the call, by their names.
    """

    values: list[Value] = field(default_factory=list)
    outputs: dict[str, int] = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)

    def following(self, buffers: Sequence[str]) -> "Trace":
        """Return the trace with these buffers in the place of the outputs, if there are any."""
        if not buffers:
            return self
        outputs = {name: self.buffers[name] for name in buffers if name in self.buffers}
        return Trace(self.values, outputs, self.buffers)

    @cached_property
    def children(self) -> dict[int, list[int]]:
        """The values that are made of each value; asked for when all are recorded."""
        children: dict[int, list[int]] = {}
        for index, value in enumerate(self.values):
            for parent in value.parents:
                children.setdefault(parent, []).append(index)
        return children

    def add(self, value: Value) -> int:
        """Add a value and return its index."""
        self.values.append(value)
        return len(self.values) - 1


def has_called(file: str) -> bool:
    """Return whether a file is the one that calls the module: what lies beyond calls the check."""
    return file in _CALLERS


@lru_cache(maxsize=4096)
def is_somebodys(file: str) -> bool:
    """Return whether a file is neither of a framework, of Python, nor of this package."""
    if file.startswith("<") or file.startswith(_HERE):
        return False
    for site in _SITE:
        if file.startswith(site):
            return Path(file).relative_to(site).parts[0] not in _LIBRARIES
    return not file.startswith(_STDLIB)


def frames_from(frame: FrameType | None) -> Iterator[tuple[str, int]]:
    """Yield the file and the line of a frame and of those that called it."""
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


def lines_of_frames(
    frames: Iterable[tuple[str, int]], operation: str, module: str
) -> tuple[SourceLine, ...]:
    """Return the lines of somebody's module that were running, the innermost first.

    Args:
        frames: the files and the numbers of the lines that were running, the innermost first.
        operation: what was run.
        module: the path of the module.
    """
    found: list[SourceLine] = []
    for file, line in frames:
        if is_somebodys(file):
            found.append(source_line(file, line, operation, module))
        elif found and has_called(file):
            break
    return tuple(found)


def source_line(file: str, line: int, operation: str, module: str = "") -> SourceLine:
    """Return the line of a file, with its text."""
    return SourceLine(file, line, linecache.getline(file, line).strip(), operation, module)
