"""The rules of `rename`, `split` and `stack`, and the torch keys that they stand for."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

# Each * of a rename rule is a group, and several in one step would be tried in every way.
MAX_STARS = 2
K = TypeVar("K")
Rule = tuple[re.Pattern[str], str, str]  # what it fits, and the old and the new name


def rules_of(rename: Mapping[str, str]) -> list[Rule]:
    """Return the rename rules, those that win first; none if one has too many `*`."""
    if with_too_many_stars(rename):
        return []
    ordered = sorted(
        rename.items(), key=lambda rule: (-rule[0].count("."), rule[0].count("*"), -len(rule[0]))
    )
    return [
        (re.compile(re.escape(old).replace(r"\*", r"([^.]+)") + r"(?=\.|$)"), old, new)
        for old, new in ordered
    ]


def with_too_many_stars(rename: Mapping[str, str]) -> list[str]:
    """Return the old names that have too many `*` between two dots."""
    return [old for old in rename if any(step.count("*") > MAX_STARS for step in old.split("."))]


def filled(new: str, steps: Sequence[str]) -> str:
    """Return the name with each `*` replaced by the step that it matched in the torch key."""
    for step in steps:
        new = new.replace("*", step, 1)
    return new


class Shaped(NamedTuple):
    """What has the shape of a part of a tensor."""

    shape: tuple[int, ...]


def parts_by_key(names: Mapping[str, str], old: str, parts: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of the parts of each torch key that the name, perhaps with `*`, stands for.

    Args:
        names: the torch keys with their names after `rename`.
        old: the name of an entry or of a module above it.
        parts: the Flax names of its parts.
    """
    found = {}
    for pattern, _, _ in rules_of({old: old}):
        for key, name in names.items():
            if fit := pattern.match(name):
                rest = name[fit.end() :]
                found[key] = [filled(part, fit.groups()) + rest for part in parts]
    return found


def stacks_of(names: Mapping[K, str], old: str, new: str) -> dict[str, dict[int, K]]:
    """Return the keys by their numbers, by the Flax name of what they make together.

    Args:
        names: the torch keys, or what stands for them, with their names after `rename`.
        old: the name of a numbered module, with `*` for the number.
        new: the Flax name of all of them.
    """
    found: dict[str, dict[int, K]] = {}
    for pattern, _, _ in rules_of({old: old}):
        for key, name in names.items():
            fit = pattern.match(name)
            if fit and fit.groups() and fit.groups()[-1].isdecimal():
                together = filled(new, fit.groups()[:-1]) + name[fit.end() :]
                found.setdefault(together, {})[int(fit.groups()[-1])] = key
    return found
