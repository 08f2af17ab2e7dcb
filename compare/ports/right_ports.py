"""Right ports: the examples in other styles, in other sizes and with other numbers."""

import re
import tomllib
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np

from .wrong_ports import EXAMPLES, text_of

_SEED = re.compile(r"(?<=manual_seed\()\d+|(?<=default_rng\()\d+")


class Change(NamedTuple):
    """Another way to write an example, or another size of it.

    Attributes:
        example: the name of the example.
        name: what is other.
        changes: pairs of an old text, and of what stands in its place.
        group: of one group, one change at most fits.
        conflicts: the names of changes beside which it does not fit.
    """

    example: str
    name: str
    changes: list[tuple[str, str]]
    group: str = ""
    conflicts: tuple[str, ...] = ()

    def fits(self, others: list["Change"]) -> bool:
        """Return whether it fits beside others."""
        return not any(
            self.name in other.conflicts
            or other.name in self.conflicts
            or (self.group and self.group == other.group)
            for other in others
        )


class RightPort(NamedTuple):
    """A right port: an example with some changes, and with another seed."""

    example: str
    changes: list[Change]
    seed: int

    def __str__(self) -> str:
        """Say what is other."""
        seed = [f"seed {self.seed}"] if self.seed else []
        return "; ".join([self.example, *(one.name for one in self.changes), *seed])

    def text(self) -> str:
        """Return the text of the file.

        Raises:
            ValueError: the example does not have an old text.
        """
        text = text_of(self.example)
        for change in self.changes:
            for old, new in change.changes:
                if old not in text:
                    raise ValueError(f"{self} has no {old!r}")
                text = text.replace(old, new)
        return _SEED.sub(lambda found: str(int(found[0]) + 100 * self.seed), text)


@cache
def known() -> tuple[list[Change], list[Change]]:
    """Return the styles and the sizes."""
    text = files("compare.ports.examples").joinpath("styles.toml").read_text(encoding="utf-8")
    stored = tomllib.loads(text)
    styles, sizes = ([Change(**one) for one in stored[kind]] for kind in ("style", "size"))
    return styles, sizes


def drawn(number: int) -> RightPort:
    """Return the right port of this number: one example after another, each in its own way."""
    random = np.random.default_rng(number)
    example = EXAMPLES[number % len(EXAMPLES)]
    styles, sizes = ([one for one in kind if one.example == example] for kind in known())
    chosen: list[Change] = []
    for place in random.permutation(len(styles)):
        if random.random() < 0.5 and styles[place].fits(chosen):
            chosen.append(styles[place])
    chosen.sort(key=styles.index)
    size = random.integers(len(sizes) + 1)
    return RightPort(example, [*chosen, *sizes[size : size + 1]], number // len(EXAMPLES))
