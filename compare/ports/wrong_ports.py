"""Wrong ports of the examples: one change of the Flax side each, whose true lines are known."""

import tempfile
import tomllib
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

EXAMPLES = (
    "causal_attention",
    "conv_net",
    "lstm_tagger",
    "mlp_batch_norm",
    "pre_norm_block",
    "rotary_gqa",
    "routing",
    "upsampler",
)


class WrongPort(NamedTuple):
    """A bug that people make in porting, as a change of an example's text.

    Attributes:
        example: the name of the example.
        name: what is wrong.
        old: the text of the right port.
        new: the text of the wrong one.
        torch: a text in the torch line that computes what the changed line should.
        kind: what kind of bug it is.
    """

    example: str
    name: str
    old: str
    new: str
    torch: str
    kind: str

    def text(self) -> str:
        """Return the text of the example with the bug.

        Raises:
            ValueError: the example does not have the old text exactly once.
        """
        right = text_of(self.example)
        if right.count(self.old) != 1:
            raise ValueError(f"{self.example} has {self.old!r} {right.count(self.old)} times")
        return right.replace(self.old, self.new)

    def flax_line(self) -> int:
        """Return the number of the first line that changes."""
        lines = zip(text_of(self.example).splitlines(), self.text().splitlines(), strict=False)
        return next(number for number, (old, new) in enumerate(lines, 1) if old != new)

    def torch_line(self) -> int:
        """Return the number of the torch line."""
        lines = text_of(self.example).splitlines()
        return next(number for number, line in enumerate(lines, 1) if self.torch in line)


def text_of(example: str) -> str:
    """Return the text of an example."""
    return files("compare.ports.examples").joinpath(f"{example}.py").read_text(encoding="utf-8")


def wrong_ports() -> list[WrongPort]:
    """Return all wrong ports."""
    text = files("compare.ports.examples").joinpath("bugs.toml").read_text(encoding="utf-8")
    return [WrongPort(**bug) for bug in tomllib.loads(text)["bug"]]


class Named(NamedTuple):
    """Which lines the check named for a wrong port.

    `flax` and `torch` are the places of the true lines in the lists, from 0; None if they are not
    there.
    """

    is_detected: bool
    flax: int | None
    torch: int | None
    hint: str
    text: str


def reported(example: str, text: str, check: Any) -> Any:
    """Return what `check` reports on a file of an example's name with this text."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a wrong port may divide by zero
        file = Path(folder) / f"{example}.py"
        file.write_text(text, encoding="utf-8")
        return check(file)


def judged(bug: WrongPort, check: Any) -> Named:
    """Check a wrong port, and say where its true lines stand.

    Args:
        bug: the wrong port.
        check: a function that returns the report on the port that a file defines.
    """
    report = reported(bug.example, f"{bug.text()}\n\ndtypes = ()\n", check)
    parted = report.divergence
    flax = [source.line for source in parted.flax_source] if parted else []
    torch = [source.line for source in parted.torch_source] if parted else []
    return Named(
        not report.held,
        place_of(bug.flax_line(), flax),
        place_of(bug.torch_line(), torch),
        parted.hint if parted else "",
        str(report),
    )


def place_of(line: int, lines: Sequence[int]) -> int | None:
    """Return where the number of the line stands among those of named lines, from 0, or None."""
    return lines.index(line) if line in lines else None
