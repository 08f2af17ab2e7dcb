"""Make text that came from outside printable: names, paths, messages of libraries."""

import re
from dataclasses import fields, is_dataclass, replace
from typing import Any

# The longest name that is shown whole.
MAX_LENGTH = 200
_NEWLINES = re.compile(r"(\n)")


def shown(name: object) -> str:
    """Return a name for printing in one line, shortened in the middle if it is long.

    Control characters, line breaks, bidirectional marks and lone surrogates become escapes, so that
    a name can neither control a terminal nor look like another name.
    """
    text = str(name)
    if len(text) > MAX_LENGTH:  # first, so that a name of megabytes costs nothing
        text = f"{text[: MAX_LENGTH // 2]}…{text[-MAX_LENGTH // 4 :]}"
    return text if text.isprintable() else _escaped(text)


def readable(text: str) -> str:
    """Return text of several lines for printing: all but its line breaks as in `shown`."""
    if text.isprintable():
        return text
    return "".join(
        part if part == "\n" or part.isprintable() else _escaped(part)
        for part in _NEWLINES.split(text)
    )


def all_readable(value: Any) -> Any:
    """Return plain data with every string in it made `readable`."""
    match value:
        case str():
            return readable(value)
        case dict():
            return {all_readable(key): all_readable(item) for key, item in value.items()}
        case list() | tuple() if not hasattr(value, "_fields"):
            return type(value)(map(all_readable, value))
        case _ if is_dataclass(value) and not isinstance(value, type):
            changed = {
                field.name: all_readable(getattr(value, field.name)) for field in fields(value)
            }
            return replace(value, **changed)
        case _:
            return value


def _escaped(text: str) -> str:
    return "".join(
        character.encode("unicode_escape").decode()
        if character == "\\" or not character.isprintable()
        else character
        for character in text
    )


def kind_of(value: Any) -> str:
    """Return the name of the value's class with its article: "an int", "a TrainState"."""
    return with_article(type(value).__name__)


def with_article(name: str) -> str:
    """Return the name of a class with its article."""
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
