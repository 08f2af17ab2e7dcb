"""The mapping between torch state dict entries and Flax arrays, used in both directions."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ..dtypes import DTYPES, INTEGERS, numpy_dtype
from ..files.errors import FileError
from ..files.memory import Budget
from ..files.printable import kind_of
from ..files.reading import as_path, parse_json, read_file
from ..files.writing import write_text
from .errors import MappingError
from .layouts import known_layout
from .parts import Part, part_from_json
from .tables import PATTERNS, require_table

_MAX_RANK = 64  # of NumPy's arrays
KeyPath = tuple[Any, ...]  # names, or integers for positions in an NNX list
Kind = Literal["parameter", "buffer", "statistics", "alias"]
Policy = Literal["ignore", "verify", "refuse"]


def slashed(path: KeyPath) -> str:
    """Return the path as Flax writes it: "params/W_query/kernel"."""
    return "/".join(map(str, path))


def words(path: KeyPath) -> tuple[str, ...]:
    """Return the path with strings only: a file has strings where an NNX list has integers."""
    return tuple(map(str, path))


def dotted(path: KeyPath) -> str:
    """Return the path as torch writes it: "W_query.weight"."""
    return ".".join(map(str, path))


@dataclass(frozen=True)
class Row:
    """One Flax array and the torch tensor that it corresponds to.

    Attributes:
        torch_key: the name in the torch state dict.
        path: the path in Flax: collection and names in Linen, names only in NNX.
        layout: the name of the layout, from `compare.conversion.layouts`.
        kind: the kind of state. An `alias` is a second torch key for the same array: a tied weight.
        required: False if both sides may lack it.
        part: which part of the torch tensor the array is. None if it is the whole tensor.
        plus: a second torch key whose tensor is added to the first, because Flax's cells have one
            bias and torch's have two. From Flax to torch, it becomes zeros.
        shape: the shape of the Flax array, if it does not follow from torch's: the number of heads.
        stack: the keys of several torch tensors that are the slices of the array along its first
            axis, as `nn.scan` makes it. `torch_key` is the first of them. With `part`, the same
            part of each.
        twin: whether another row makes an array of the same torch tensor, which is the one to take
            on the way back. The two arrays must then hold the same values.
    """

    torch_key: str
    path: KeyPath
    layout: str = "same"
    kind: Kind = "parameter"
    required: bool = True
    part: Part | None = None
    plus: str | None = None
    shape: tuple[int, ...] | None = None
    stack: tuple[str, ...] = ()
    twin: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of all torch tensors that the array is made of."""
        return self.stack or tuple(filter(None, (self.torch_key, self.plus)))

    @property
    def source(self) -> str:
        """The torch tensors, in words."""
        part = str(self.part) if self.part else ""
        if self.stack:
            return f"{self.stack[0]}{part} … {self.stack[-1]}{part}"
        return " + ".join(f"{key}{part}" for key in self.keys)

    def part_of(self, tensor: Any) -> Any:
        """Return the row's part of a torch tensor or array, or all of it.

        Raises:
            ValueError: the tensor has no such part.
        """
        return tensor if self.part is None else self.part.of(tensor)

    @property
    def how(self) -> str:
        """The layout, in words."""
        return f"stacked {self.layout}" if self.stack else self.layout + ", copied" * self.twin

    def slice_shape(self, flax_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape that one torch tensor has in Flax's layout.

        Raises:
            ValueError: the array has another number of slices.
        """
        shape = tuple(flax_shape)
        if not self.stack:
            return shape
        if shape[:1] != (len(self.stack),):
            raise ValueError(f"the mapping stacks {len(self.stack)} tensors; this is {shape}")
        return shape[1:]

    @property
    def place(self) -> str:
        """The path as one name, with slashes."""
        return slashed(self.path)


class Refill(NamedTuple):
    """How to make a causal mask or a table that was left out again.

    Attributes:
        shape: the shape.
        dtype: the name of the dtype.
        pattern: where the constant is: "tril" (on and below the diagonal of the last two axes),
            "triu" (above it) or "full"; it is 0 elsewhere. Or a rule of `tables`.
        value: the constant, as Python writes a float, or what the rule takes besides the shape.
    """

    shape: tuple[int, ...]
    dtype: str
    pattern: str
    value: str


class Left(NamedTuple):
    """An entry that exists on one side only, and the rule for leaving it out.

    Attributes:
        torch_key: the name in the torch state dict, or the Flax name if `path` is given.
        policy: `ignore` always leaves it out. `verify` leaves it out only if it is the standard
            causal mask, or a table of `tables`. `zero:2/3` leaves it out only if the third of its
            three parts is all zeros, because Flax has no bias there.
        path: the path in Flax, if torch is the side that lacks it. The target keeps its own value.
        refill: how to make it again on the way back to torch, if that is known.
    """

    torch_key: str
    policy: str
    path: KeyPath | None = None
    refill: Refill | None = None


@dataclass(frozen=True)
class StateMapping:
    """The rows of a whole module. One mapping serves both directions; each Flax array occurs once.

    Attributes:
        rows: the rows, in the order of the torch state dict.
        left: the entries without a counterpart on the other side.
        flax: the Flax API that the paths belong to. Linen's paths begin with the collection.
    """

    rows: tuple[Row, ...]
    left: tuple[Left, ...] = ()
    flax: Literal["linen", "nnx"] = "linen"

    def __str__(self) -> str:
        """Return the mapping as a text table, one line per row."""
        cells = [("torch", "Flax", "kind", "layout")]
        for row in self.rows:
            cells.append((row.source, row.place, row.kind, row.how))
        for item in self.left:
            sides = ("-", item.torch_key) if item.path else (item.torch_key, "-")
            cells.append((*sides, "left", item.policy))
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)

    def __post_init__(self) -> None:
        """Raise ValueError if two torch tensors would become one Flax array."""
        if path := _repeated_path(row.path for row in self.rows if row.kind != "alias"):
            raise ValueError(f"this mapping has {slashed(path)} twice")

    @cached_property
    def by_path(self) -> dict[KeyPath, Row]:
        """The rows by Flax path, without aliases."""
        return {row.path: row for row in self.rows if row.kind != "alias"}

    @cached_property
    def by_key(self) -> dict[str, list[Row]]:
        """The rows of each torch key, including all keys of a row and aliases, parts in order.

        Twins are not among them.
        """
        rows_by_key: dict[str, list[Row]] = {}
        for row in [row for row in self.rows if not row.twin]:
            for key in row.keys:
                rows_by_key.setdefault(key, []).append(row)
        return {
            key: sorted(rows, key=lambda row: row.part.index if row.part else 0)
            for key, rows in rows_by_key.items()
        }

    @cached_property
    def refills(self) -> dict[str, Refill]:
        """The torch keys without a counterpart that can be made again."""
        keys = self.left_keys()
        return {
            item.torch_key: item.refill
            for item in self.left
            if item.refill and item.torch_key in keys
        }

    def left_keys(self) -> set[str]:
        """Return the torch keys without a counterpart in Flax."""
        return set(self.left_policies())

    def left_policies(self) -> dict[str, str]:
        """Return the policies of the torch keys without a counterpart in Flax, by key."""
        return {
            item.torch_key: item.policy
            for item in self.left
            if item.path is None and item.torch_key not in self.by_key
        }

    def as_json(self) -> dict[str, Any]:
        """Return the mapping as JSON data."""
        return {
            "flax": self.flax,
            "rows": [_row_as_json(row) for row in self.rows],
            "left": [_left_as_json(item) for item in self.left],
        }

    @classmethod
    def from_json(cls, content: Any) -> "StateMapping":
        """Return the mapping that `as_json` returned as JSON data.

        Raises:
            ValueError: the data is not a valid mapping, or has a Flax path twice.
        """
        if not isinstance(content, dict) or not content.keys() >= {"flax", "rows", "left"}:
            raise ValueError(
                'not a valid mapping: expected an object with the fields "flax", "rows" and "left"'
            )
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
            is_clear = isinstance(error, ValueError)
            reason = str(error) if is_clear else f"{type(error).__name__}: {error}"
            raise ValueError(f"not a valid mapping: {reason}") from error
        if flax not in ("linen", "nnx"):
            raise ValueError(f'not a valid mapping: flax: {flax!r} is neither "linen" nor "nnx"')
        paths = {row.path for row in rows if row.kind != "alias"}
        for row in rows:
            if row.kind == "alias" and row.path not in paths:
                raise ValueError(
                    f"not a valid mapping: {row.torch_key} is an alias of {row.place}, "
                    "which has no row of its own"
                )
        mapping = cls(rows, left, flax)
        for row in rows:
            if row.twin and row.torch_key not in mapping.by_key:
                raise ValueError(
                    f"not a valid mapping: {row.place} is a copy of {row.torch_key}, "
                    "which has no row of its own"
                )
        for key, key_rows in mapping.by_key.items():
            parts = [row.part for row in key_rows if row.kind != "alias"]
            if not _is_complete(parts):
                raise ValueError(
                    f"not a valid mapping: the parts of {key} must each occur exactly once"
                )
        return mapping

    def save(self, path: str | PathLike[str]) -> None:
        """Write the mapping to a JSON file, atomically; a pipe or a device is written to as it is.

        Raises:
            MappingError: the file cannot be written.
        """
        path = as_path(path)
        try:
            write_text(path, json.dumps(self.as_json(), indent=1))
        except FileError as error:
            raise MappingError.from_file(error) from error
        except (OSError, ValueError) as error:  # ValueError: a name with a null
            reason = str(getattr(error, "strerror", None) or error)
            raise MappingError(
                path,
                f"cannot be written: {reason}",
                expected="a file in a folder that exists and may be written to",
                found=reason,
                mend="give another path",
            ) from error

    @classmethod
    def load(cls, path: str | PathLike[str], memory: int | None = None) -> "StateMapping":
        """Read the mapping from a JSON file.

        Args:
            path: the file.
            memory: the most bytes that reading it may take. Default: the memory that is free.

        Raises:
            MappingError: the file cannot be read, is not JSON, or is not a valid mapping.
        """
        path, budget = as_path(path), Budget(memory)
        try:
            raw = read_file(path, budget)
            content = parse_json(raw, path, budget, "its content")
        except OSError as error:
            reason = str(error.strerror or error)
            raise MappingError.of(path, f"cannot be read: {reason}", reason) from error
        except FileError as error:
            raise MappingError.from_file(error) from error
        except ValueError as error:
            reason = f"not JSON ({error})"
            raise MappingError.of(path, f"not a valid mapping: {reason}", reason) from error
        try:
            return cls.from_json(content)
        except ValueError as error:
            reason = str(error)
            raise MappingError.of(path, reason, reason) from error


def _is_complete(parts: Sequence[Part | None]) -> bool:
    """Return whether they are all parts of one tensor, in order, or the one that is all of it."""
    if not parts or parts[0] is None:
        return len(parts) < 2
    first = parts[0]
    return list(parts) == [replace(first, index=index) for index in range(first.count)]


def _row_as_json(row: Row) -> dict[str, Any]:
    return {**asdict(row), "part": row.part.as_json() if row.part else None}


def _row(entry: Any) -> Row:
    row = Row(**entry)
    if not isinstance(row.torch_key, str) or not isinstance(row.plus, str | None):
        raise ValueError(
            f"a row has the torch keys {row.torch_key!r} and {row.plus!r}; expected strings"
        )
    if row.kind not in get_args(Kind):
        kinds = ", ".join(get_args(Kind))
        raise ValueError(f"{row.torch_key} has the kind {row.kind!r}; expected one of {kinds}")
    if not isinstance(row.layout, str):
        raise ValueError(f"{row.torch_key} has the layout {row.layout!r}; expected a name")
    known_layout(row.layout)
    try:
        part = part_from_json(row.part)
    except ValueError as error:
        raise ValueError(f"{row.torch_key} has {error}") from None
    shape = None if row.shape is None else tuple(int(size) for size in row.shape)
    stack = _stack(row)
    return Row(
        row.torch_key,
        _path(row.path),
        row.layout,
        row.kind,
        bool(row.required),
        part,
        row.plus,
        shape,
        stack,
        bool(row.twin),
    )


def _stack(row: Row) -> tuple[str, ...]:
    """Return the keys of the slices, which JSON has as a list."""
    is_list = isinstance(row.stack, list | tuple) and all(type(key) is str for key in row.stack)
    if not is_list or (row.stack and (row.stack[0] != row.torch_key or row.plus)):
        raise ValueError(
            f"{row.torch_key} has the stack {row.stack!r}; expected a list of keys, of which it "
            "is the first"
        )
    return tuple(row.stack)


def _left_as_json(item: Left) -> list[Any]:
    entry: list[Any] = [item.torch_key, item.policy, item.path]
    return entry if item.refill is None else [*entry, item.refill._asdict()]


def _left(name: Any, policy: Any, path: Any, refill: Any = None) -> Left:
    if not isinstance(name, str) or not (
        policy in ("ignore", "verify") or re.fullmatch(r"zero:\d/[1-9]", str(policy))
    ):
        raise ValueError(
            f"{name!r} is left out with the policy {policy!r}; expected ignore, verify or zero:I/N"
        )
    made_again = None if refill is None else _refill(**refill)
    return Left(name, policy, None if path is None else _path(path), made_again)


def _refill(shape: Any, dtype: Any, pattern: Any, value: Any) -> Refill:
    is_shape = (
        isinstance(shape, list)
        and len(shape) <= _MAX_RANK
        and all(type(size) is int and size > 0 for size in shape)
    )
    if is_shape and dtype in DTYPES and pattern in PATTERNS and isinstance(value, str):
        require_table(pattern, tuple(shape), value)
        return Refill(tuple(shape), dtype, pattern, value)
    if (
        not is_shape
        or dtype not in DTYPES
        or pattern not in ("tril", "triu", "full")
        or not isinstance(value, str)
        or (pattern != "full" and len(shape) < 2)
    ):
        raise ValueError(f"a mask is {dtype} {shape}, {pattern} of {value}; expected tril or triu")
    if dtype in (*INTEGERS, "bool"):
        least, most = (0, 1) if dtype == "bool" else _range_of(dtype)
        if not least <= int(value) <= most:
            raise ValueError(f"a mask of {dtype} cannot hold {value}")
    else:
        float(value)
    return Refill(tuple(shape), dtype, pattern, value)


def _range_of(dtype: str) -> tuple[int, int]:
    info = np.iinfo(numpy_dtype(dtype))
    return int(info.min), int(info.max)


def _path(path: Any) -> KeyPath:
    if (
        not isinstance(path, list | tuple)
        or not path
        or not all(isinstance(name, str | int) for name in path)
    ):
        raise ValueError(f"a row has the path {path!r}; expected a list of names and integers")
    return tuple(path)


def _repeated_path(paths: Iterable[KeyPath]) -> KeyPath | None:
    seen: set[KeyPath] = set()
    for path in paths:
        if path in seen:
            return path
        seen.add(path)
    return None


class AttentionRow(NamedTuple):
    """One tensor of the attention classes, with its name in torch, Linen and NNX.

    `layout` is `transposed` if torch stores (out, in) and Flax stores (in, out).
    A `required` entry exists in every class and configuration.
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


Mapping = StateMapping  # an alias for one release


def require_mapping(mapping: Any) -> None:
    """Raise TypeError for what is no mapping; None is the default of each function."""
    if mapping is not None and not isinstance(mapping, StateMapping):
        raise TypeError(
            f"mapping is {kind_of(mapping)}; expected what `compare.match` or "
            "`compare.StateMapping.load(file)` returns"
        )
