"""What the converter raises, and the lists that it reports."""

from dataclasses import dataclass

from .suggest import near

Shape = tuple[int, ...]

# How many entries of a kind a message lists: a missing rename rule concerns every layer.
MAX_LINES = 12


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
        missing_names = [entry.name for entry in self.missing]
        kinds = (
            (self.missing, _missing),
            (self.unexpected, lambda entry: _unexpected(entry, missing_names)),
            (self.misshaped, _misshaped),
            (self.refused, lambda entry: f"! {shown(entry.name)}: {entry.reason}"),
        )
        lines: list[str] = []
        for entries, line in kinds:
            lines += [line(entry) for entry in entries[:MAX_LINES]]
            if len(entries) > MAX_LINES:
                lines.append(f"  … and {len(entries) - MAX_LINES:,} more")
        return "\n".join(lines)


def _missing(entry: MismatchEntry) -> str:
    name, expected = shown(entry.name), _shape(entry.expected)
    return f"- missing {name}: {shown(entry.place)} {expected} finds nothing"


def _unexpected(entry: MismatchEntry, missing_names: list[str]) -> str:
    best = None if entry.reason else near(entry.name, missing_names)
    hint = entry.reason or (f"did you mean {best}?" if best else "")
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
    """The source and the target do not hold the same entries; `mismatch` has the lists."""

    def __init__(self, mismatch: Mismatch, hint: str = "", *, has_strict: bool = False) -> None:
        self.mismatch = mismatch
        advice = "Build both sides with the same arguments and class"
        advice += ", or pass strict=False to convert what fits." if has_strict else "."
        super().__init__(
            "the source does not fit the target; nothing was converted:\n"
            f"{mismatch}\n{advice} {hint}".rstrip()
        )


class MappingError(ValueError):
    """A file or some JSON is no table of `compare.match`."""


def shown(name: object) -> str:
    """Return a name from a file as it may be printed: control characters escaped, and not endless."""
    text = str(name)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:100]}…{text[-50:]}"
