"""What a checkpoint says of itself: the layout, a checksum of every tensor, how torch and Flax names pair.

CRC-32, as in zip and PNG, over dtype, shape and bytes in C order: no change within 32 bits escapes
it, any other one in four billion, and processors take it as fast as they read memory. Python itself
has it, so whoever can read the file can check it. It guards against accidents; who can rewrite the
data can rewrite any checksum beside them. Version 1 had SHA-256 instead.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ..conversion.errors import shown
from ..conversion.mapping import KeyPath, StateMapping, slashed
from ..conversion.state_kinds import linen_kind
from .blocks import blocks
from .errors import CheckpointError
from .tensors import FileLayout, Spec, Tensors, checked

try:
    from isal.isal_zlib import crc32
except ImportError:  # the same numbers, seven times slower
    from zlib import crc32


KEY = "attention_parity"
VERSION = 2
POLARITY = "nonzero blocks"
_DIGITS = {"crc32": 8, "sha256": 64}
PENDING = "0" * _DIGITS["crc32"]
Algorithm = Literal["crc32", "sha256"]


class Record(NamedTuple):
    """One tensor: what it is, and the checksum of its values."""

    spec: Spec
    checksum: str
    kind: str


class Crc32:
    """The checksum, taken piece by piece as `hashlib` does."""

    def __init__(self, first: bytes) -> None:
        self.value = crc32(first)

    def update(self, piece: Any) -> None:
        """Take in what comes next."""
        self.value = crc32(piece, self.value)

    def hexdigest(self) -> str:
        """Return it in eight digits."""
        return f"{self.value:08x}"


@dataclass(frozen=True)
class Manifest:
    """The manifest; `aliases` are further names of tensors that are stored once.

    A mask is declared by what its entries mean: of ours, any nonzero entry blocks.
    """

    layout: FileLayout
    records: Mapping[KeyPath, Record]
    aliases: Mapping[KeyPath, KeyPath] = field(default_factory=dict)
    mapping: StateMapping | None = None
    algorithm: Algorithm = "crc32"

    def with_checksums(self, sums: Mapping[KeyPath, str]) -> "Manifest":
        """Return the manifest with these checksums in place of those that were pending."""
        records = {
            path: record._replace(checksum=sums[path]) for path, record in self.records.items()
        }
        return Manifest(self.layout, records, self.aliases, self.mapping)

    def dumps(self) -> str:
        """Return the manifest as JSON; its length does not depend on the checksums."""
        tensors = [
            {
                "path": list(path),
                **{
                    "dtype": record.spec.dtype,
                    "shape": list(record.spec.shape),
                    "crc32": record.checksum,
                },
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
            if content["version"] not in (1, VERSION):
                raise ValueError(
                    f"its manifest has version {content['version']!r}; this program knows {VERSION}"
                )
            algorithm: Algorithm = "sha256" if content["version"] == 1 else "crc32"
            if content["layout"] not in get_args(FileLayout):
                raise ValueError(f"layout {content['layout']!r}")
            records = dict(_record(entry, algorithm) for entry in content["tensors"])
            if len(records) != len(content["tensors"]):
                raise ValueError("a tensor twice")
            aliases = {_path(path): _path(first) for path, first in content["aliases"]}
            if content["layout"] == "torch" and any(
                len(p) > 1 or type(p[0]) is int for p in (*records, *aliases)
            ):
                raise ValueError("a torch name that is none")
            if any(first not in records or path in records for path, first in aliases.items()):
                raise ValueError("an alias of nothing")
            mapping = (
                None if content["mapping"] is None else StateMapping.from_json(content["mapping"])
            )
        except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"its manifest is broken ({type(error).__name__}: {error})") from error
        return cls(content["layout"], records, aliases, mapping, algorithm)


def _record(entry: Any, algorithm: Algorithm) -> tuple[KeyPath, Record]:
    path, digest = _path(entry["path"]), entry[algorithm]
    if (
        not isinstance(digest, str)
        or len(digest) != _DIGITS[algorithm]
        or not isinstance(entry["kind"], str)
    ):
        raise ValueError(f"its manifest is broken (checksum {digest!r} and kind {entry['kind']!r})")
    if entry.get("polarity", POLARITY) != POLARITY:
        raise ValueError(
            f"says of {slashed(path)} {entry['polarity']!r}; in these modules {POLARITY}"
        )
    return path, Record(checked(entry["shape"], entry["dtype"]), digest, entry["kind"])


def _path(steps: Any) -> KeyPath:
    if (
        not isinstance(steps, list)
        or not steps
        or not all(type(step) in (str, int) for step in steps)
    ):
        raise ValueError(f"its manifest is broken (path {steps!r})")
    return tuple(steps)


def is_mask(path: KeyPath, kind: str) -> bool:
    """Tell whether the entry is a mask: a buffer of that name."""
    return kind != "parameter" and str(path[-1]).rpartition(".")[2] == "mask"


def checksum(pieces: Iterable[np.ndarray], spec: Spec, algorithm: Algorithm = "crc32") -> str:
    """Return the checksum of the pieces, one behind the other along their first axis."""
    digest = start(spec, algorithm)
    for piece in pieces:
        for block in blocks(piece):
            digest.update(block)
    return digest.hexdigest()


def start(spec: Spec, algorithm: Algorithm = "crc32") -> Any:
    """Return a checksum that has seen dtype and shape, to be given the bytes."""
    first = f"{spec.dtype}{list(spec.shape)}".encode()
    return Crc32(first) if algorithm == "crc32" else hashlib.sha256(first)


COLLECTIONS = ("params", "buffers", "batch_stats")


def manifest_of(tensors: Tensors) -> Manifest:
    """Return the manifest, its checksums pending."""
    kinds = {path: tensors.kinds.get(path) or _kind(path, tensors.layout) for path in tensors.specs}
    records = {path: Record(spec, PENDING, kinds[path]) for path, spec in tensors.specs.items()}
    return Manifest(tensors.layout, records, dict(tensors.aliases), tensors.mapping)


def _kind(path: KeyPath, layout: FileLayout) -> str:
    return linen_kind(path) if layout == "linen" else "unknown"


def torch_or_flax(names: Iterable[str]) -> FileLayout:
    """Tell the layout of a file without a manifest: names that begin with a collection are Linen's."""
    found = list(names)
    flax = bool(found) and all(name.split("/")[0] in COLLECTIONS and "/" in name for name in found)
    return "linen" if flax else "torch"


def linen_or_nnx(paths: Iterable[KeyPath]) -> FileLayout:
    """Tell the layout of a Flax tree without a manifest: Linen's begins with collections."""
    found = list(paths)
    first = {path[0] for path in found}
    return "linen" if found and ("params" in first or first <= set(COLLECTIONS)) else "nnx"


def in_manifests_order(
    path: Path, specs: Mapping[KeyPath, Spec], manifest: Manifest
) -> dict[KeyPath, Spec]:
    """Return the specs by the manifest's paths, whose steps may be numbers where the file has words.

    Raises:
        CheckpointError: the manifest speaks of other tensors than the file holds.
    """
    by_words = {tuple(map(str, key)): spec for key, spec in specs.items()}
    found = {key: by_words.pop(tuple(map(str, key)), None) for key in manifest.records}
    absent = [key for key, spec in found.items() if spec is None]
    for key in [*absent, *by_words]:
        name = slashed(key)
        side = "the manifest declares" if key in absent else "the manifest does not know"
        raise CheckpointError(
            path, f"{side} {shown(name)}", key=name, mend="the file was changed: take another copy"
        )
    for key, record in manifest.records.items():
        if found[key] != record.spec:
            raise CheckpointError(
                path,
                f"{shown(slashed(key))} is not as its manifest declares",
                key=slashed(key),
                expected=f"{record.spec.dtype} {record.spec.shape}",
                found=str(found[key]),
                mend="the file was changed: take another copy",
            )
    return {key: spec for key, spec in found.items() if spec is not None}


def no_name_twice(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return the pairs of a JSON or msgpack object as a dict.

    Raises:
        ValueError: a name stands twice, of which the libraries take the last.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {shown(name)} twice")
    return found
