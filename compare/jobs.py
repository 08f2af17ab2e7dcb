"""The parts that a command is made of."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Job:
    """One part of a command: a module of `compare.scripts` and the arguments of its `sections`.

    `ahead`: in which order a second process does it before its turn comes; None if it may not.
    """

    part: str
    options: dict[str, Any] = field(default_factory=dict)
    ahead: int | None = None
