"""The names after `rename`, the layouts that `layouts` states, and rules that fit nothing."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from .errors import MismatchEntry
from .groups import MAX_STARS, Rule, filled, with_too_many_stars
from .layers import cell_name
from .suggest import Nearest
from .wrappers import without_prefix


def renamed(
    names: Iterable[str], rules: Sequence[Rule], prefix: str
) -> tuple[dict[str, str], set[str]]:
    """Return the dotted Flax name of every torch name, and the old names of the rules used."""
    found, used = {}, set()
    names = list(names)
    plain = {without_prefix(name, prefix) for name in names}
    for name in names:
        bare = without_prefix(name, prefix)
        found[name] = cell = cell_name(bare, plain)
        for pattern, old, new in rules:
            if fit := pattern.match(cell) or pattern.match(bare):
                used.add(old)
                rest = fit.string[fit.end() :]
                found[name] = filled(new, fit.groups()) + rest if new else rest.removeprefix(".")
                break
    return found, used


def unused_names(
    tensors: Iterable[str], rename: Mapping[str, str], used: set[str], prefix: str
) -> list[MismatchEntry]:
    """Return an entry for each rename rule that cannot be used or was not, and for the prefix."""
    if too_many := with_too_many_stars(rename):
        reason = f"has more than {MAX_STARS} * between two dots"
        return [MismatchEntry(old, "", reason=reason) for old in too_many]
    unused = [
        MismatchEntry(
            old,
            "",
            reason=f"renames to {new}, with another number of *",
            mend=f"to stack them, pass stack={{{old!r}: {new!r}}} instead"
            if old.count("*") == new.count("*") + 1
            else "",
        )
        for old, new in rename.items()
        if old.count("*") != new.count("*")
    ]
    keys = list(tensors)
    if prefix and keys and all(without_prefix(key, prefix) == key for key in keys):
        unused.append(MismatchEntry(prefix, "", reason="no torch name has this prefix"))
    nearest = Nearest(keys, cutoff=0.5)
    unused += [
        MismatchEntry(old, "", reason=with_nearest("this rename rule fits no key", old, nearest))
        for old in rename.keys() - used
    ]
    return unused


def chosen_layouts(
    tensors: Iterable[str], layouts: Mapping[str, str]
) -> tuple[dict[str, str], list[MismatchEntry]]:
    """Return the stated layout of each tensor, and an entry for each rule that fits none."""
    chosen: dict[str, str] = {}
    unused = []
    nearest = Nearest(tensors, cutoff=0.5)
    for pattern, name in layouts.items():
        fitting = [key for key in tensors if fnmatchcase(key, pattern)]
        chosen |= dict.fromkeys(fitting, name)
        if not fitting:
            unused.append(
                MismatchEntry(
                    pattern, "", reason=with_nearest("this layout fits no key", pattern, nearest)
                )
            )
    return chosen, unused


def with_nearest(reason: str, name: str, nearest: Nearest) -> str:
    """Return the reason with the name that was perhaps meant."""
    best = nearest.to(name)
    return f"{reason}; did you mean {best}?" if best else reason
