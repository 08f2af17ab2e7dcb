"""The parts that a command is made of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from ..report.model import Section

# The parts that have a package of their own; the others are modules beside this one.
HOMES = {
    "attention": "compare.bench.attention",
    "state": "compare.bench.checkpoints",
    "stream": "compare.bench.streaming",
    "kill": "compare.stress.kill",
    "fuzz": "compare.stress.fuzz",
}


@dataclass(frozen=True)
class Job:
    """One part of a command, and the arguments of its `sections`.

    Attributes:
        part: the name of the part: "checks", "kill".
        options: the keyword arguments.
        ahead: the order in which a second process takes the job before its turn; None if it may
            not.
        counts_bytes: whether the part also takes `progress`, a function of the bytes done and the
            bytes in all.
    """

    part: str
    options: dict[str, Any] = field(default_factory=dict)
    ahead: int | None = None
    counts_bytes: bool = False

    def sections(self, **more: Any) -> Iterator[Section | str]:
        """Run the part: yield its sections, and before each, in words, what is being done."""
        sections: Callable[..., Iterator[Section | str]] = import_module(self.module).sections
        return sections(**self.options, **more)

    @property
    def module(self) -> str:
        """The module that does it."""
        return HOMES.get(self.part, f"compare.commands.{self.part}")
