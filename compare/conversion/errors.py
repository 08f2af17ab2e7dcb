"""The errors of the converter, and the lists in them."""

import glob
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike

from ..files.errors import FileError
from ..files.printable import readable, shown
from .suggest import Nearest
from .wrappers import INNER_STEPS, common_prefix, without_prefix

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
        mend: the next step, if the reason does not say so.
        choices: if a layout was not known, the values of `layouts` that may be right.
    """

    name: str
    place: str
    found: Shape | None = None
    expected: Shape | None = None
    reason: str = ""
    mend: str = ""
    choices: tuple[dict[str, str], ...] = ()

    @property
    def policy_name(self) -> str:
        """The name that a policy for this entry has: the Flax path, if it has one."""
        return self.name if self.place.startswith("the module") else self.place or self.name


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

    @property
    def turned(self) -> "Mismatch":
        """The same, with source and target exchanged."""
        missing = tuple(replace(one, expected=one.found, found=None) for one in self.unexpected)
        extra = tuple(replace(one, found=one.expected, expected=None) for one in self.missing)
        shapes = tuple(
            replace(one, found=one.expected, expected=one.found) for one in self.misshaped
        )
        return Mismatch(missing, extra, shapes, self.refused)

    @property
    def prefix(self) -> str:
        """What all unexpected names begin with, if they are the missing ones without it."""
        return common_prefix(
            [entry.name for entry in self.unexpected], [entry.name for entry in self.missing]
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped or self.refused)

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        nearest = Nearest(entry.name for entry in self.missing)
        prefix = self.prefix
        others = [
            entry
            for entry in self.unexpected
            if not prefix or without_prefix(entry.name, prefix) == entry.name
        ]
        groups = (
            (() if prefix else self.missing, _missing),
            (others, lambda entry: _unexpected(entry, nearest)),
            (self.misshaped, _misshaped),
            (self.refused, _refused),
        )
        lines: list[str] = []
        if prefix:
            count = f"{len(self.unexpected) - len(others):,} names"
            is_inner = prefix in INNER_STEPS
            what = (
                f"{prefix}: {count} have this step" if is_inner else f"{prefix}*: {count} begin so"
            )
            lines.append(
                f"+ unexpected {shown(what)}, and the target's do not: pass prefix={prefix!r}"
            )
        for entries, describe in groups:
            lines += [describe(entry) for entry in entries[:MAX_LINES]]
            if len(entries) > MAX_LINES:
                lines.append(f"  … and {len(entries) - MAX_LINES:,} more")
        return readable("\n".join(lines))


def _missing(entry: MismatchEntry) -> str:
    name, expected = shown(entry.name), _shape(entry.expected)
    line = f"- missing {name}: the source has nothing for {shown(entry.place)} {expected}"
    return f"{line}; {entry.reason}" if entry.reason else line


def _refused(entry: MismatchEntry) -> str:
    mend = f": {entry.mend}" if entry.mend else ""
    return f"! {shown(entry.name)}: {entry.reason}{mend}"


def _unexpected(entry: MismatchEntry, nearest: Nearest) -> str:
    best = None if entry.reason else nearest.to(entry.name)
    hint = entry.reason or (f"did you mean {shown(best)}?" if best else "")
    name, shape = shown(entry.name), _shape(entry.found)
    return f"+ unexpected {name} {shape}: the target has no place for it{hint and f'; {hint}'}"


def _misshaped(entry: MismatchEntry) -> str:
    needed = f"{shown(entry.place)} needs {_shape(entry.expected)}"
    mend = f": {entry.mend}" if entry.mend else _mend(entry)
    return f"! {shown(entry.name)} has shape {_shape(entry.found)}; {needed}{mend}"


def _shape(shape: Shape | None) -> str:
    return "" if shape is None else str(shape)


def _mend(entry: MismatchEntry) -> str:
    if entry.name.rpartition(".")[2] == "mask" and entry.found and len(set(entry.found)) == 1:
        return f": build the target with context_length={entry.found[0]}"
    return ""


def dropping(name: str, policy: str = "verify") -> str:
    """Return what to do about an entry that its policy does not allow to leave out."""
    if policy.startswith("zero"):
        return "use Linen's cell, which has that bias, or set that part of it to 0"
    return f"policy={{{glob.escape(name)!r}: 'ignore'}} drops it"


class Refused(ValueError):
    """One entry is refused, with the next step."""

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(reason)
        self.mend = mend


def entry_of(name: str, place: str, error: ValueError, found: Shape | None = None) -> MismatchEntry:
    """Return the entry that was refused with this error, and the next step if the error has it."""
    mend = error.mend if isinstance(error, Refused) else ""
    return MismatchEntry(name, place, found, reason=str(error), mend=mend)


def next_step(mismatch: Mismatch, *, is_torch: bool = True, is_relaid: bool = False) -> str:
    """Return what to do about a checkpoint that does not fit the target, by its first entry.

    Args:
        mismatch: what does not fit.
        is_torch: whether the target is a torch module.
        is_relaid: whether it is one, and the file is in Flax's layout.
    """
    if mismatch.misshaped:
        first = mismatch.misshaped[0]
        name = shown(first.name)
        sizes = first.mend or _mend(first).removeprefix(": ")
        sizes = sizes or f"build {name} with the shape {first.found}"
        return f"{sizes}, or take the checkpoint of this model"
    if mismatch.refused:
        first = mismatch.refused[0]
        *_, advice = first.reason.rpartition(": ")
        return first.mend or (advice if advice != first.reason else "make it alike on both sides")
    if mismatch.missing and mismatch.unexpected:
        old, new = (
            [entry.name for entry in group] for group in (mismatch.unexpected, mismatch.missing)
        )
        if is_relaid and (common_prefix(old, new) or common_prefix(new, old)):
            return "pass mapping=compare.match(module, template, rename=…), which pairs the names"
        if prefix := common_prefix(old, new):
            return f"the file has a prefix: pass prefix={prefix!r}"
        if is_torch and (prefix := common_prefix(new, old)):
            path = prefix.removesuffix(".")
            return f"the target has a prefix: load it into module.get_submodule({path!r})"
    entry = (*mismatch.missing, *mismatch.unexpected)[0]
    effect = "keeps the target's own value" if mismatch.missing else "leaves it out"
    policy = f"policy={{{glob.escape(entry.policy_name)!r}: 'ignore'}}"
    return f"build the target as it was saved; {policy} {effect}"


class ConversionError(ValueError):
    """The source and the target do not have the same entries; `mismatch` lists the differences."""

    def __init__(self, mismatch: Mismatch, hint: str = "", *, has_strict: bool = False) -> None:
        self.mismatch = mismatch
        self.hint = hint.strip()
        advice = (
            "Build both sides with the same arguments, or pass strict=False to convert what fits."
            if has_strict
            else ""
        )
        super().__init__(
            "the source does not fit the target; nothing was converted:\n"
            f"{mismatch}\n{f'{advice} {hint}'.strip()}".rstrip()
        )


class TrainingDifference(UserWarning):
    """Two layers compute the same, but are trained in another way."""


class MappingError(FileError, ValueError):
    """A mapping file could not be read, or does not contain a valid mapping."""

    @classmethod
    def from_file(cls, error: FileError) -> "MappingError":
        """Return the error of a file as one of a mapping."""
        return cls(error.path, error.reason, **error.details)

    @classmethod
    def of(cls, path: str | PathLike[str], reason: str, found: str) -> "MappingError":
        """Return the error of a file that is no mapping."""
        return cls(
            path,
            reason,
            expected="a mapping: JSON written by StateMapping.save",
            found=found,
            mend="write it again with compare.match(source, template).save(path)",
        )
