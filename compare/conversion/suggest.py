"""Suggestions for names that do not match: a rename rule, or the most similar name."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from math import prod
from typing import Any

Shape = tuple[int, ...]

# A suggestion compares one name with all others, so only the first unmatched names get one.
MAX_SUGGESTIONS = 10
MAX_COMPARED, MAX_LENGTH = 200, 500
MAX_RULES = 100
# Prefixes that wrappers add to every name: DataParallel, torch.compile, Lightning.
WRAPPERS = ("module", "_orig_mod", "model", "net")

# The names of what is often stored in one piece, in the order in which it is stored.
_PARTS = (
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("W_query", "W_key", "W_value"),
    ("key", "value"),
    ("k", "v"),
    ("k_proj", "v_proj"),
    ("to_k", "to_v"),
    ("gate_proj", "up_proj"),
)


class Nearest:
    """Finds the name with the most similar spelling.

    Spellings are compared with a few hundred names at most: those that share the rarest word.
    """

    def __init__(self, names: Iterable[str], cutoff: float = 0.6) -> None:
        self._names, self._cutoff = list(names), cutoff

    @cached_property
    def _by_word(self) -> dict[str, list[str]]:
        by_word: dict[str, list[str]] = {}
        for name in self._names:
            for word in _words(name):
                by_word.setdefault(word, []).append(name)
        return by_word

    def to(self, name: str) -> str | None:
        """Return the name nearest to this one, or None if there is no similar one."""
        names = self._names
        if len(names) > MAX_COMPARED:
            shared = [self._by_word[word] for word in _words(name) if word in self._by_word]
            names = min(shared, key=len, default=[])[:MAX_COMPARED]
        return next(iter(get_close_matches(name[:MAX_LENGTH], names, 1, self._cutoff)), None)


def _words(name: str) -> set[str]:
    return set(name[:MAX_LENGTH].lower().replace("/", ".").replace("_", ".").split("."))


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


def module_rules(unexpected: Mapping[str, Shape], missing: Mapping[str, Shape]) -> dict[str, str]:
    """Return a rename rule for each module that only one module of the other side can be.

    Two modules can be the same if they have the same leaves with the same sizes, whatever the order
    of the axes. Nothing is returned unless every unexpected module has just one candidate.

    Args:
        unexpected: torch names without a counterpart, with their shapes.
        missing: the names of Flax entries without a counterpart, as torch would write them, with
            their shapes.
    """
    old, new = _signatures(unexpected), _signatures(missing)
    rivals = Counter(old.values())
    by_signature: dict[Any, list[str]] = {}
    for prefix, signature in new.items():
        by_signature.setdefault(signature, []).append(prefix)
    rules = {}
    for prefix, signature in old.items():
        candidates = by_signature.get(signature, [])
        if len(candidates) != 1 or rivals[signature] != 1 or not prefix or not candidates[0]:
            return {}
        rules[prefix] = candidates[0]
    return rules


def _signatures(entries: Mapping[str, Shape]) -> dict[str, tuple[Any, ...]]:
    """Return the leaves of each module with their sizes."""
    leaves: dict[str, list[Any]] = {}
    for name, shape in entries.items():
        prefix, _, leaf = name.rpartition(".")
        leaves.setdefault(prefix, []).append((leaf, tuple(sorted(shape))))
    return {prefix: tuple(sorted(items)) for prefix, items in leaves.items()}


def rename_hint(unexpected: Mapping[str, Shape], missing: Mapping[str, Shape]) -> str:
    """Return the rename rules as an argument to paste, or an empty string if there are none."""
    rules = rename_rules(list(unexpected), missing.keys()) or module_rules(unexpected, missing)
    is_short = 0 < len(rules) <= MAX_RULES
    return f"The names pair with rename={json.dumps(rules)}. " if is_short else ""


def split_hint(unexpected: Mapping[str, Shape], missing: Mapping[str, Shape]) -> str:
    """Return the split of fused projections as an argument to paste, or an empty string.

    Args:
        unexpected: torch names without a counterpart, with their shapes.
        missing: the names of Flax entries without a counterpart, as torch would write them, with
            their shapes.
    """
    rules: dict[str, list[str]] = {}
    for name, shape in unexpected.items():
        module, _, leaf = name.rpartition(".")
        above = module.rpartition(".")[0]
        dot = f"{above}." if above else ""
        for parts in _PARTS:
            names = [f"{dot}{part}.{leaf}" for part in parts]
            sizes = [prod(missing[each]) for each in names if each in missing]
            if len(sizes) == len(parts) and sum(sizes) == prod(shape):
                rules[_starred(module)] = [_starred(dot + part) for part in parts]
                break
    if not rules or len(rules) > MAX_RULES:
        return ""
    return (
        f"If the parts lie one after another in this order, not head by head as in GPT-NeoX, pass "
        f"split={json.dumps(rules)}; if head by head, compare.Split([…], groups=…) for the list. "
    )


def stack_hint(unexpected: Mapping[str, Shape], missing: Mapping[str, Shape]) -> str:
    """Return the stack of numbered modules as an argument to paste, or an empty string.

    The arguments are those of `split_hint`.
    """
    members: dict[tuple[str, str], list[Shape]] = {}
    for name, shape in unexpected.items():
        for number in re.finditer(r"\.\d+(?=\.)", name):
            begin, end = name[: number.start()], name[number.end() :]
            members.setdefault((begin, end), []).append(shape)
    rules = {}
    for (begin, end), shapes in members.items():
        size = sum(map(prod, shapes))
        if (
            len({*shapes}) == 1
            and prod(missing.get(begin + end, ())) == size
            and begin + end in missing
        ):
            rules[f"{_starred(begin)}.*"] = _starred(begin)
    return f"Pass stack={json.dumps(rules)}. " if 0 < len(rules) <= MAX_RULES else ""


def _starred(name: str) -> str:
    """Return the name with a star for each number."""
    return ".".join("*" if step.isdigit() else step for step in name.split("."))
