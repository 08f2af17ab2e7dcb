"""A job is one part of a command."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from ..report.model import Section

# The modules of the parts that lie in other packages. All other parts lie beside this module.
OTHER_MODULES = {
    "attention": "compare.bench.attention",
    "state": "compare.bench.checkpoints",
    "stream": "compare.bench.streaming",
    "contexts": "compare.bench.contexts",
    "kill": "compare.stress.kill",
    "fuzz": "compare.stress.fuzz",
    "layers": "compare.stress.layer_fuzz",
    "libraries": "compare.stress.libraries",
    "library-ports": "compare.ports.library_ports",
}


@dataclass(frozen=True)
class Job:
    """One part of a command, with the arguments of its `sections` function.

    Attributes:
        part: the name of the part: "checks", "kill".
        options: the keyword arguments.
        ahead: the position of the job in the order of the second process, which runs jobs ahead of
            their turn; None if it must not run this one.
        counts_bytes: whether `sections` also takes `progress`, a function that is called with the
            bytes done and the total number of bytes.
    """

    part: str
    options: dict[str, Any] = field(default_factory=dict)
    ahead: int | None = None
    counts_bytes: bool = False

    def sections(self, **more: Any) -> Iterator[Section | str]:
        """Run the part: yield its sections, and progress messages as strings before them."""
        sections: Callable[..., Iterator[Section | str]] = import_module(self.module).sections
        return sections(**self.options, **more)

    @property
    def module(self) -> str:
        """The name of the module whose `sections` function runs the part."""
        return OTHER_MODULES.get(self.part, f"compare.commands.{self.part}")
