"""The errors of the converter, and the lists in them."""

from dataclasses import dataclass
from functools import cached_property

from ..files.printable import shown
from .suggest import Nearest

Shape = tuple[int, ...]

# The most entries that a message lists in each group: a missing rename rule affects every layer.
MAX_LINES = 12


@dataclass(frozen=True)
class MismatchEntry:
    """One entry that did not fit.

    Attributes:
        name: the torch key, or the Flax path.
        place: where the target stores it: in most cases the Flax path.
        found: the shape in the source, in torch's layout. None if the source lacks the entry.
        expected: the shape in the target, in torch's layout. None if the target lacks the entry.
        reason: why it was refused.
    """

    name: str
    place: str
    found: Shape | None = None
    expected: Shape | None = None
    reason: str = ""


@dataclass(frozen=True)
class Mismatch:
    """Everything that did not fit. It is true if any list has an entry.

    Attributes:
        missing: entries that only the target has.
        unexpected: entries that only the source has.
        misshaped: entries that have different shapes in source and target.
        refused: entries that cannot be converted, each with a reason.
    """

    missing: tuple[MismatchEntry, ...] = ()
    unexpected: tuple[MismatchEntry, ...] = ()
    misshaped: tuple[MismatchEntry, ...] = ()
    refused: tuple[MismatchEntry, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped or self.refused)

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        nearest = Nearest(entry.name for entry in self.missing)
        groups = (
            (self.missing, _missing),
            (self.unexpected, lambda entry: _unexpected(entry, nearest)),
            (self.misshaped, _misshaped),
            (self.refused, lambda entry: f"! {shown(entry.name)}: {entry.reason}"),
        )
        lines: list[str] = []
        for entries, describe in groups:
            lines += [describe(entry) for entry in entries[:MAX_LINES]]
            if len(entries) > MAX_LINES:
                lines.append(f"  … and {len(entries) - MAX_LINES:,} more")
        return "\n".join(lines)


def _missing(entry: MismatchEntry) -> str:
    name, expected = shown(entry.name), _shape(entry.expected)
    return f"- missing {name}: the source has nothing for {shown(entry.place)} {expected}"


def _unexpected(entry: MismatchEntry, nearest: Nearest) -> str:
    best = None if entry.reason else nearest.to(entry.name)
    hint = entry.reason or (f"did you mean {shown(best)}?" if best else "")
    name, shape = shown(entry.name), _shape(entry.found)
    return f"+ unexpected {name} {shape}: the target has no place for it{hint and f'; {hint}'}"


def _misshaped(entry: MismatchEntry) -> str:
    needed = f"{shown(entry.place)} needs {_shape(entry.expected)}"
    return f"! {shown(entry.name)} has shape {_shape(entry.found)}; {needed}{_mend(entry)}"


def _shape(shape: Shape | None) -> str:
    return "" if shape is None else str(shape)


def _mend(entry: MismatchEntry) -> str:
    if entry.name.rpartition(".")[2] == "mask" and entry.found and len(set(entry.found)) == 1:
        return f": build the target with context_length={entry.found[0]}"
    return ""


class ConversionError(ValueError):
    """The source and the target do not have the same entries; `mismatch` lists the differences."""

    def __init__(self, mismatch: Mismatch, hint: str = "", *, has_strict: bool = False) -> None:
        self.mismatch = mismatch
        advice = (
            "Build both sides with the same arguments, or pass strict=False to convert what fits."
            if has_strict
            else ""
        )
        super().__init__(
            "the source does not fit the target; nothing was converted:\n"
            f"{mismatch}\n{f'{advice} {hint}'.strip()}".rstrip()
        )


class MappingError(ValueError):
    """A mapping file could not be read, or does not contain a valid mapping."""
