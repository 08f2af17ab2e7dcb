"""Which entry of a torch state dict lies where in Flax: a table, good for both directions."""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from .errors import MappingError
from .layouts import known_layout

KeyPath = tuple[Any, ...]  # names, or integers within an NNX list
Kind = Literal["parameter", "buffer", "statistics", "alias"]
Policy = Literal["ignore", "verify", "refuse"]


def slashed(path: KeyPath) -> str:
    """Return the path as Flax writes it: "params/W_query/kernel"."""
    return "/".join(map(str, path))


def dotted(path: KeyPath) -> str:
    """Return the path as torch writes it: "W_query.weight"."""
    return ".".join(map(str, path))


@dataclass(frozen=True)
class Row:
    """One tensor in its two places.

    Attributes:
        torch_key: its name in the state dict.
        path: where Flax keeps it: the collection and the names (Linen), or the names alone (NNX).
        layout: how the two lie to each other, by the names of `compare.conversion.layouts`.
        kind: what it is. An `alias` is a second torch key for one array: a tied weight.
        required: False where the absence of both sides is no error.
        part: (i, n) if only the i-th of n equal parts of the torch tensor, along its first axis, is
            meant.
        plus: a second torch key that is added to the first, as Flax's cells have one bias where
            torch's have two. On the way back it becomes zeros.
        shape: of the Flax array, where torch's does not say it: how many heads there are.
    """

    torch_key: str
    path: KeyPath
    layout: str = "same"
    kind: Kind = "parameter"
    required: bool = True
    part: tuple[int, int] | None = None
    plus: str | None = None
    shape: tuple[int, ...] | None = None

    @property
    def place(self) -> str:
        """The path, as one name."""
        return slashed(self.path)


class Left(NamedTuple):
    """An entry without a counterpart, and what is asked of it.

    Attributes:
        torch_key: its name, in the state dict or, if `path` is given, in Flax.
        policy: `ignore`: nothing. `verify`: that it is the causal mask which anyone would
            recompute. `zero:2/3`: that the third of three parts is zeros, for Flax adds nothing
            there.
        path: where in Flax it lies, if torch is the side that lacks it. The target's own value is
            kept.
    """

    torch_key: str
    policy: str
    path: KeyPath | None = None


@dataclass(frozen=True)
class StateMapping:
    """The rows of a whole module, each Flax array once: one table for both directions.

    Attributes:
        rows: in the order of the torch state dict.
        left: what has no counterpart on the other side.
        flax: whose paths these are. Linen's begin with the collection.
    """

    rows: tuple[Row, ...]
    left: tuple[Left, ...] = ()
    flax: Literal["linen", "nnx"] = "linen"

    def __str__(self) -> str:
        """Return the table in plain text, a line each."""
        cells = [("torch", "Flax", "kind", "layout")]
        for row in self.rows:
            part = f"[{row.part[0]}/{row.part[1]}]" if row.part else ""
            key = f"{row.torch_key}{part}" + (f" + {row.plus}{part}" if row.plus else "")
            cells.append((key, row.place, row.kind, row.layout))
        for item in self.left:
            sides = ("-", item.torch_key) if item.path else (item.torch_key, "-")
            cells.append((*sides, "left", item.policy))
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)

    def __post_init__(self) -> None:
        """Raise ValueError if two torch tensors would become one Flax array."""
        if twice := _twice(row.path for row in self.rows if row.kind != "alias"):
            raise ValueError(f"this mapping has {'/'.join(map(str, twice))} twice")

    @cached_property
    def by_path(self) -> dict[KeyPath, Row]:
        """The rows by where Flax keeps them, aliases left out."""
        return {row.path: row for row in self.rows if row.kind != "alias"}

    @cached_property
    def by_key(self) -> dict[str, list[Row]]:
        """The rows that make up each torch tensor, its parts in order; `plus` keys and aliases among them."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            for key in filter(None, (row.torch_key, row.plus)):
                found.setdefault(key, []).append(row)
        return {
            key: sorted(rows, key=lambda row: row.part or (0, 1)) for key, rows in found.items()
        }

    def left_keys(self) -> set[str]:
        """Return the torch keys that Flax has no place for."""
        return {item.torch_key for item in self.left if item.path is None} - self.by_key.keys()

    def as_json(self) -> dict[str, Any]:
        """Return the table as JSON has it."""
        return {
            "flax": self.flax,
            "rows": [asdict(row) for row in self.rows],
            "left": [list(item) for item in self.left],
        }

    @classmethod
    def from_json(cls, content: Any) -> "StateMapping":
        """Return the table that `as_json` gave.

        Raises:
            ValueError: something else, or a Flax path twice.
        """
        try:
            rows = tuple(_row(entry) for entry in content["rows"])
            left = tuple(_left(*item) for item in content["left"])
            flax = content["flax"]
        except (
            TypeError,
            KeyError,
            ValueError,
            AttributeError,
            IndexError,
            OverflowError,
        ) as error:
            raise ValueError(f"this is no mapping ({type(error).__name__}: {error})") from error
        if flax not in ("linen", "nnx"):
            raise ValueError(f"this is no mapping (flax: {flax!r})")
        homes = {row.path for row in rows if row.kind != "alias"}
        for row in rows:
            if row.kind == "alias" and row.path not in homes:
                raise ValueError(
                    f"this mapping has {row.torch_key} as an alias of {row.place}, which it lacks"
                )
        found = cls(rows, left, flax)
        for key, parts in found.by_key.items():
            own = [row.part or (0, 1) for row in parts if row.kind != "alias"]
            if own != [(index, len(own)) for index in range(len(own))]:
                raise ValueError(f"this mapping has other parts of {key} than each of them once")
        return found

    def save(self, path: str | PathLike[str]) -> None:
        """Write the table to a JSON file, atomically."""
        from ..files import atomic_file

        with atomic_file(Path(path)) as stream:
            stream.write(json.dumps(self.as_json(), indent=1).encode())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "StateMapping":
        """Read the table from a JSON file.

        Raises:
            MappingError: no such file, or something else in it.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise MappingError(f"{path}: {error}") from error


def _row(entry: Any) -> Row:
    row = Row(**entry)
    if not isinstance(row.torch_key, str) or not isinstance(row.plus, str | None):
        raise ValueError(f"a row has the torch keys {row.torch_key!r} and {row.plus!r}")
    if row.kind not in get_args(Kind):
        raise ValueError(f"{row.torch_key} has the kind {row.kind!r}")
    if not isinstance(row.layout, str):
        raise ValueError(f"{row.torch_key} has the layout {row.layout!r}")
    known_layout(row.layout)
    part = None
    if row.part is not None:
        part = (int(row.part[0]), int(row.part[1]))
        if len(row.part) != 2 or not 0 <= part[0] < part[1]:
            raise ValueError(f"{row.torch_key} has the part {row.part}")
    shape = None if row.shape is None else tuple(int(size) for size in row.shape)
    return Row(
        row.torch_key,
        _path(row.path),
        row.layout,
        row.kind,
        bool(row.required),
        part,
        row.plus,
        shape,
    )


def _left(name: Any, policy: Any, path: Any) -> Left:
    if not isinstance(name, str) or not (
        policy in ("ignore", "verify") or re.fullmatch(r"zero:\d/[1-9]", str(policy))
    ):
        raise ValueError(f"{name!r} is left with the policy {policy!r}")
    return Left(name, policy, None if path is None else _path(path))


def _path(path: Any) -> KeyPath:
    if (
        not isinstance(path, list | tuple)
        or not path
        or not all(isinstance(name, str | int) for name in path)
    ):
        raise ValueError(f"a row has the path {path!r}")
    return tuple(path)


def _twice(paths: Iterable[KeyPath]) -> KeyPath | None:
    seen: set[KeyPath] = set()
    for path in paths:
        if path in seen:
            return path
        seen.add(path)
    return None


class AttentionRow(NamedTuple):
    """One tensor of the attention classes in its three places.

    `layout` is `transposed` where torch stores (out, in) and Flax (in, out).
    `required` entries exist in every class and configuration.
    """

    torch_key: str
    linen_path: KeyPath
    nnx_path: KeyPath
    layout: str
    kind: Kind
    required: bool


def _projection(name: str, required: bool = True) -> tuple[AttentionRow, AttentionRow]:
    kernel, bias = (name, "kernel"), (name, "bias")
    return (
        AttentionRow(
            f"{name}.weight", ("params", *kernel), kernel, "transposed", "parameter", required
        ),
        AttentionRow(f"{name}.bias", ("params", *bias), bias, "same", "parameter", False),
    )


# In the order of the torch state dict.
ROWS: tuple[AttentionRow, ...] = (
    AttentionRow("mask", ("buffers", "mask"), ("mask",), "same", "buffer", False),
    *_projection("W_query"),
    *_projection("W_key"),
    *_projection("W_value"),
    *_projection("out_proj", required=False),
)
LINEN = StateMapping(
    tuple(Row(row.torch_key, row.linen_path, row.layout, row.kind, row.required) for row in ROWS)
)
NNX = StateMapping(
    tuple(Row(row.torch_key, row.nnx_path, row.layout, row.kind, row.required) for row in ROWS),
    flax="nnx",
)
