"""Suggestions for names that do not match: a rename rule, or the most similar name."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

# A suggestion compares one name with all others, so only the first unmatched names get one.
MAX_SUGGESTIONS = 10
# Prefixes that wrappers add to every name: DataParallel, torch.compile, Lightning.
WRAPPERS = ("module", "_orig_mod", "model", "net")


def near(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the name with the most similar spelling, or None."""
    return next(iter(get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def rename_rules(unexpected: Sequence[str], missing: Collection[str]) -> dict[str, str]:
    """Return the rename rules that turn unexpected torch names into missing ones.

    Two kinds are known: a wrapper's prefix ("module.a.b" for "a.b"), and a numbered list that Flax
    writes with an underscore ("blocks.0.b" for "blocks_0.b").

    Args:
        unexpected: torch names without a counterpart.
        missing: the names of Flax entries without a counterpart, in torch's spelling.
    """
    rules: dict[str, str] = {}
    missing_names = set(missing)
    for name in unexpected:
        for wrapper in WRAPPERS:
            bare = name.removeprefix(f"{wrapper}.")
            if bare != name and bare in missing_names:
                rules[f"{wrapper}.*"] = "*"
        if re.sub(r"\.(\d+)(?=\.|$)", r"_\1", name) in missing_names:
            for number in re.finditer(r"\.\d+(?=\.|$)", name):
                old = re.sub(r"\.\d+(?=\.|$)", ".*", name[: number.end()])
                rules[old] = re.sub(r"\.\*", "_*", old)
    return rules


def collection_hint(template: Any) -> str:
    """Return what to do about Linen variables that lack the collection `params`, or nothing."""
    if isinstance(template, Mapping) and template and "params" not in template:
        return 'The template has no collection "params": give all variables, {"params": ...}. '
    return ""


def rename_hint(unexpected: Sequence[str], missing: Collection[str]) -> str:
    """Return the rules as an argument to paste, or an empty string if there are none."""
    rules = rename_rules(unexpected, missing)
    return f"The names pair with rename={json.dumps(rules)}. " if rules else ""
