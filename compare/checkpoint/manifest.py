"""What a checkpoint says of itself: the layout, a checksum of every tensor, how torch and Flax names pair.

SHA-256, over dtype, shape and bytes in C order: Python itself has it, so whoever can read the file can check it, and
today's processors hash about as fast as disks read. It guards against accidents; who can rewrite the data can rewrite
this too.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ..mapping import Mapping as Table
from ..mapping import Path
from .blocks import blocks
from .spec import Spec, checked

KEY = "attention_parity"
VERSION = 1
POLARITY = "nonzero blocks"
PENDING = "0" * 64
LayoutName = Literal["torch", "linen", "nnx"]


class Record(NamedTuple):
    """One tensor: what it is, and the checksum of its values."""

    spec: Spec
    sha256: str
    kind: str


@dataclass(frozen=True)
class Manifest:
    """The manifest; `aliases` are further names of tensors that are stored once.

    A mask is declared by what its entries mean: of ours, any nonzero entry blocks.
    """

    layout: LayoutName
    records: Mapping[Path, Record]
    aliases: Mapping[Path, Path] = field(default_factory=dict)
    mapping: Table | None = None

    def with_checksums(self, sums: Mapping[Path, str]) -> "Manifest":
        """Return the manifest with these checksums in place of those that were pending."""
        records = {path: record._replace(sha256=sums[path]) for path, record in self.records.items()}
        return Manifest(self.layout, records, self.aliases, self.mapping)

    def dumps(self) -> str:
        """Return the manifest as JSON; its length does not depend on the checksums."""
        tensors = [
            {
                "path": list(path),
                **{"dtype": record.spec.dtype, "shape": list(record.spec.shape), "sha256": record.sha256},
                "kind": record.kind,
                **({"polarity": POLARITY} if is_mask(path, record.kind) else {}),
            }
            for path, record in self.records.items()
        ]
        content = {
            "version": VERSION,
            "layout": self.layout,
            "tensors": tensors,
            "aliases": [[list(path), list(first)] for path, first in self.aliases.items()],
            "mapping": self.mapping.as_json() if self.mapping else None,
        }
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def loads(cls, text: Any) -> "Manifest":
        """Return the manifest of that JSON.

        Raises:
            ValueError: none of ours, or of a version that is not known here.
        """
        try:
            content = json.loads(text)
            if content["version"] != VERSION:
                raise ValueError(f"its manifest has version {content['version']!r}; this program knows {VERSION}")
            if content["layout"] not in get_args(LayoutName):
                raise ValueError(f"layout {content['layout']!r}")
            records = dict(_record(entry) for entry in content["tensors"])
            if len(records) != len(content["tensors"]):
                raise ValueError("a tensor twice")
            aliases = {_path(path): _path(first) for path, first in content["aliases"]}
            if content["layout"] == "torch" and any(len(p) > 1 or type(p[0]) is int for p in (*records, *aliases)):
                raise ValueError("a torch name that is none")
            if any(first not in records or path in records for path, first in aliases.items()):
                raise ValueError("an alias of nothing")
            mapping = None if content["mapping"] is None else Table.from_json(content["mapping"])
        except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"its manifest is broken ({type(error).__name__}: {error})") from error
        return cls(content["layout"], records, aliases, mapping)


def _record(entry: Any) -> tuple[Path, Record]:
    path, digest = _path(entry["path"]), entry["sha256"]
    if not isinstance(digest, str) or len(digest) != 64 or not isinstance(entry["kind"], str):
        raise ValueError(f"its manifest is broken (checksum {digest!r} and kind {entry['kind']!r})")
    if entry.get("polarity", POLARITY) != POLARITY:
        raise ValueError(f"says of {'/'.join(map(str, path))} {entry['polarity']!r}; in these modules {POLARITY}")
    return path, Record(checked(entry["shape"], entry["dtype"]), digest, entry["kind"])


def _path(steps: Any) -> Path:
    if not isinstance(steps, list) or not steps or not all(type(step) in (str, int) for step in steps):
        raise ValueError(f"its manifest is broken (path {steps!r})")
    return tuple(steps)


def is_mask(path: Path, kind: str) -> bool:
    """Tell whether the entry is a mask: a buffer of that name."""
    return kind != "parameter" and str(path[-1]).rpartition(".")[2] == "mask"


def checksum(pieces: Iterable[np.ndarray], spec: Spec) -> str:
    """Return the checksum of the pieces, one behind the other along their first axis."""
    digest = start(spec)
    for piece in pieces:
        for block in blocks(piece):
            digest.update(block)
    return digest.hexdigest()


def start(spec: Spec) -> Any:
    """Return a hash that has seen dtype and shape, to be given the bytes."""
    return hashlib.sha256(f"{spec.dtype}{list(spec.shape)}".encode())
