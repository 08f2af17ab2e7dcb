"""The types of the arguments that `compare.match` and others take, checked before any is used."""

from collections.abc import Collection, Mapping
from typing import Any

_EXAMPLES = {
    "rename": '{"h.*.attn": "blocks.*.attention"}',
    "split": '{"qkv": ["query", "key", "value"]}',
    "stack": '{"layers.*": "layers"}',
    "tied": '{"lm_head.weight": "wte.weight"}',
    "layouts": '{"fc.weight": "transposed"}',
    "policy": '{"attn.bias": "verify"}',
}
# Of the others, whoever uses a value refuses what it does not know.
_NAMES = ("rename", "stack", "tied")


def require_flags(**flags: Any) -> None:
    """Raise TypeError for an argument that is not True or False: `cast="float16"` is not."""
    for argument, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{argument} is {flag!r}; expected True or False")


def require_names(**names: Any) -> None:
    """Raise TypeError for an argument that is not a list of texts: a text, None and 3 are not."""
    for argument, listed in names.items():
        if (
            isinstance(listed, str | Mapping)
            or not isinstance(listed, Collection)
            or not all(isinstance(name, str) for name in listed)
        ):
            example = [listed] if isinstance(listed, str) else ["a", "b"]
            raise TypeError(f"{argument} is {listed!r}; expected a list of texts, as {example}")


def require_callback(progress: Any) -> None:
    """Raise TypeError for a progress that cannot be called."""
    if not callable(progress):
        raise TypeError(
            f"progress is {progress!r}; expected a function of the bytes done and the total bytes, "
            "or leave it out"
        )


def require_rules(prefix: Any, **rules: Any) -> None:
    """Raise TypeError for a prefix that is no text, or a rule that is no dict of names.

    Args:
        prefix: the prefix.
        rules: what was passed, by the names of the arguments; None is no rule.
    """
    if not isinstance(prefix, str):
        raise TypeError(f'prefix is {prefix!r}; expected text, as prefix="module."')
    for argument, rule in rules.items():
        example = f"{argument}={_EXAMPLES[argument]}"
        if rule is not None and not isinstance(rule, Mapping):
            raise TypeError(f"{argument} is {rule!r}; expected a dict, as {example}")
        for old, new in (rule or {}).items():
            if not isinstance(old, str) or (argument in _NAMES and not isinstance(new, str)):
                raise TypeError(
                    f"{argument} has {old!r}: {new!r}; expected two names, as {example}"
                    if argument in _NAMES
                    else f"{argument} has {old!r}; expected a name, as {example}"
                )
