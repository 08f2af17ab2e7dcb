"""What the converter raises, and the lists that it reports."""

from dataclasses import dataclass
from difflib import get_close_matches

Shape = tuple[int, ...]


@dataclass(frozen=True)
class MismatchEntry:
    """One entry that did not fit: its torch key (or Flax path), where Flax keeps it, both shapes.

    Shapes are in torch's layout; `found` is None if the source lacks the entry, `expected` if the
    target does.
    """

    name: str
    place: str
    found: Shape | None = None
    expected: Shape | None = None
    reason: str = ""


@dataclass(frozen=True)
class Mismatch:
    """Everything that did not fit. True if there is anything.

    `missing`: the target has it, the source does not. `unexpected`: the other way round.
    `misshaped`: both have it, with different shapes. `refused`: it cannot be carried without loss.
    """

    missing: tuple[MismatchEntry, ...] = ()
    unexpected: tuple[MismatchEntry, ...] = ()
    misshaped: tuple[MismatchEntry, ...] = ()
    refused: tuple[MismatchEntry, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped or self.refused)

    def __str__(self) -> str:
        wanted = [entry.name for entry in self.missing]
        lines = [
            f"- missing {shown(entry.name)}: {shown(entry.place)} {_shape(entry.expected)} finds nothing"
            for entry in self.missing
        ]
        for entry in self.unexpected:
            close = get_close_matches(entry.name, wanted, n=1)
            hint = (
                f"; {entry.reason or f'did you mean {close[0]}?'}" if entry.reason or close else ""
            )
            lines.append(
                f"+ unexpected {shown(entry.name)} {_shape(entry.found)}: the target has no place for it{hint}"
            )
        for entry in self.misshaped:
            lines.append(
                f"! {shown(entry.name)} has shape {_shape(entry.found)}; "
                f"{shown(entry.place)} needs {_shape(entry.expected)}{_mend(entry)}"
            )
        lines += [f"! {shown(entry.name)}: {entry.reason}" for entry in self.refused]
        return "\n".join(lines)


def _shape(shape: Shape | None) -> str:
    return "" if shape is None else str(shape)


def _mend(entry: MismatchEntry) -> str:
    if entry.name.rpartition(".")[2] == "mask" and entry.found and len(set(entry.found)) == 1:
        return f": build the target with context_length={entry.found[0]}"
    return ""


class ConversionError(ValueError):
    """The source and the target do not hold the same entries; `mismatch` has the lists."""

    def __init__(self, mismatch: Mismatch, hint: str = "") -> None:
        self.mismatch = mismatch
        super().__init__(
            f"the source does not fit the target; nothing was converted:\n{mismatch}\n"
            "Build both sides with the same arguments and class, "
            f"or pass strict=False to convert what fits. {hint}".rstrip()
        )


class MappingError(ValueError):
    """A file or some JSON is no table of `compare.match`."""


def shown(name: object) -> str:
    """Return a name from a file as it may be printed: control characters escaped, and not endless."""
    text = str(name)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:100]}…{text[-50:]}"
