"""The manifest of a checkpoint: the layout, the checksum of every tensor, and the mapping.

The checksum is CRC-32, as in zip and PNG, over dtype, shape and bytes in C order. CRC-32 catches
accidental damage: every burst of up to 32 bits, and all but one in four billion other changes. It
does not stop tampering: a program that can change the data can also change the checksum. Processors
compute it as fast as they read memory, and Python has it built in. The manifest ends with the
checksum of its own text, which version 2 had not. Version 1 used SHA-256.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ..conversion.layer_facts import Facts, require_valid
from ..conversion.mapping import KeyPath, StateMapping, slashed, words
from ..conversion.state_kinds import linen_kind
from ..files.memory import Budget
from ..files.printable import shown
from ..files.reading import parse_json
from .blocks import blocks
from .errors import CheckpointError
from .tensors import FileLayout, Spec, Tensors, checked

try:
    from isal.isal_zlib import crc32
except ImportError:  # the same checksums, seven times slower
    from zlib import crc32


KEY = "attention_parity"
VERSION = 3
POLARITY = "nonzero blocks"
_DIGITS = {"crc32": 8, "sha256": 64}
PENDING = "0" * _DIGITS["crc32"]
Algorithm = Literal["crc32", "sha256"]


class Record(NamedTuple):
    """One tensor: its shape and dtype, the checksum of its values, and its kind of state."""

    spec: Spec
    checksum: str
    kind: str


class Crc32:
    """A CRC-32 checksum with the interface of `hashlib`."""

    def __init__(self, first: bytes) -> None:
        self.value = crc32(first)

    def update(self, piece: Any) -> None:
        """Add the next piece."""
        self.value = crc32(piece, self.value)

    def hexdigest(self) -> str:
        """Return the checksum as eight hexadecimal digits."""
        return f"{self.value:08x}"


@dataclass(frozen=True)
class Manifest:
    """The manifest of a checkpoint.

    For the mask of the attention classes it also declares the polarity: a nonzero entry blocks.

    Attributes:
        layout: the framework whose names and shapes the tensors have.
        records: the record of each tensor, by path.
        aliases: further names of tensors, each with the first name. A further name has a record of
            its own if the format stores a copy under it.
        mapping: how torch and Flax names pair, if known.
        algorithm: the algorithm of the checksums.
        layers: what each torch layer says besides its tensors, by name.
    """

    layout: FileLayout
    records: Mapping[KeyPath, Record]
    aliases: Mapping[KeyPath, KeyPath] = field(default_factory=dict)
    mapping: StateMapping | None = None
    algorithm: Algorithm = "crc32"
    layers: Mapping[str, Facts] = field(default_factory=dict)

    def with_checksums(self, sums: Mapping[KeyPath, str]) -> "Manifest":
        """Return the manifest with these checksums instead of the pending ones."""
        records = {
            path: record._replace(checksum=sums[path]) for path, record in self.records.items()
        }
        return replace(self, records=records)

    def dumps(self) -> str:
        """Return the manifest as JSON. Its length does not depend on the checksums."""
        is_attention = any("W_query" in slashed(path) for path in self.records)
        tensors = [
            {
                "path": path,
                "dtype": record.spec.dtype,
                "shape": record.spec.shape,
                "crc32": record.checksum,
                "kind": record.kind,
                **({"polarity": POLARITY} if is_attention and is_mask(path, record.kind) else {}),
            }
            for path, record in self.records.items()
        ]
        content = {
            "version": VERSION,
            "layout": self.layout,
            "tensors": tensors,
            "aliases": list(self.aliases.items()),
            "mapping": self.mapping.as_json() if self.mapping else None,
            **({"layers": self.layers} if self.layers else {}),
        }
        return sealed(content)

    @classmethod
    def loads(cls, text: Any, path: Path, budget: Budget) -> "Manifest":
        """Return the manifest that this JSON of the checkpoint at `path` describes.

        Raises:
            FileError: it does not fit the budget.
            ValueError: the JSON is not a valid manifest, or its version is unknown.
        """
        try:
            content = parse_json(text, path, budget, "its manifest")
            if content["version"] not in (1, 2, VERSION):
                raise ValueError(
                    f"its manifest has version {content['version']!r}; this program knows {VERSION}"
                )
            if content["version"] == VERSION or "crc32" in content:
                _require_whole(text, content["crc32"])
            algorithm: Algorithm = "sha256" if content["version"] == 1 else "crc32"
            if content["layout"] not in get_args(FileLayout):
                raise ValueError(
                    f"its manifest has layout {content['layout']!r}; "
                    f"there are {', '.join(get_args(FileLayout))}"
                )
            records = dict(_record(entry, algorithm) for entry in content["tensors"])
            if len(records) != len(content["tensors"]):
                raise ValueError("its manifest has a tensor twice")
            aliases = {_path(path): _path(first) for path, first in content["aliases"]}
            if len(aliases) != len(content["aliases"]):
                raise ValueError("its manifest has an alias twice")
            for key in (*records, *aliases):
                if content["layout"] == "torch" and (len(key) > 1 or type(key[0]) is int):
                    raise ValueError(
                        f"its manifest has the path {list(key)}, which is not a torch name"
                    )
            for key, first in aliases.items():
                if first not in records:
                    raise ValueError(
                        f"alias {list(key)} refers to a tensor that is not in the file"
                    )
                if key in records and records[key][:2] != records[first][:2]:
                    raise ValueError(
                        f"alias {list(key)} is also the name of a tensor with other values"
                    )
            mapping = (
                None if content["mapping"] is None else StateMapping.from_json(content["mapping"])
            )
            layers = content.get("layers", {})
            require_valid(layers)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"its manifest is invalid ({type(error).__name__}: {error})"
            ) from error
        return cls(content["layout"], records, aliases, mapping, algorithm, layers)


def sealed(content: Mapping[str, Any]) -> str:
    """Return the content as JSON that ends with the checksum of the text before it."""
    text = json.dumps(content, separators=(",", ":"))
    return f'{text[:-1]},"crc32":"{crc32(text.encode()):08x}"}}'


def _require_whole(text: str | bytes, declared: Any) -> None:
    """Raise ValueError unless the manifest is as it was written."""
    raw = text if isinstance(text, bytes) else text.encode(errors="replace")
    end = f',"crc32":"{declared}"}}'.encode(errors="replace")
    whole = raw[: -len(end)] + b"}"
    if not raw.endswith(end) or f"{crc32(whole):08x}" != declared:
        raise ValueError("its manifest is damaged: its checksum is another")


def _record(entry: Any, algorithm: Algorithm) -> tuple[KeyPath, Record]:
    path, digest = _path(entry["path"]), entry[algorithm]
    if (
        not isinstance(digest, str)
        or len(digest) != _DIGITS[algorithm]
        or not isinstance(entry["kind"], str)
    ):
        raise ValueError(
            f"its manifest is invalid (checksum {digest!r} and kind {entry['kind']!r})"
        )
    if entry.get("polarity", POLARITY) != POLARITY:
        raise ValueError(
            f"its manifest declares {entry['polarity']!r} for {slashed(path)}; "
            f"in these modules {POLARITY}"
        )
    return path, Record(checked(entry["shape"], entry["dtype"]), digest, entry["kind"])


def _path(steps: Any) -> KeyPath:
    if (
        not isinstance(steps, list)
        or not steps
        or not all(type(step) in (str, int) for step in steps)
    ):
        raise ValueError(f"its manifest is invalid (path {steps!r})")
    return tuple(steps)


def is_mask(path: KeyPath, kind: str) -> bool:
    """Return whether the entry is a mask: a buffer named `mask`."""
    return kind != "parameter" and str(path[-1]).rpartition(".")[2] == "mask"


def is_cast(path: KeyPath, kind: str) -> bool:
    """Return whether a cast may change the entry: not a buffer, which may block by its values.

    Where the kind is not known, only an entry named `mask` is taken for a buffer.
    """
    return not (kind == "buffer" or is_mask(path, kind))


def checksum(pieces: Iterable[np.ndarray], spec: Spec, algorithm: Algorithm = "crc32") -> str:
    """Return the checksum of consecutive pieces of one tensor."""
    digest = start(spec, algorithm)
    for piece in pieces:
        for block in blocks(piece):
            digest.update(block)
    return digest.hexdigest()


def start(spec: Spec, algorithm: Algorithm = "crc32") -> Any:
    """Return a checksum object that includes dtype and shape, ready for the bytes."""
    header = f"{spec.dtype}{list(spec.shape)}".encode()
    return Crc32(header) if algorithm == "crc32" else hashlib.sha256(header)


COLLECTIONS = ("params", "buffers", "batch_stats")


def manifest_of(tensors: Tensors) -> Manifest:
    """Return the manifest with pending checksums."""
    kinds = {path: tensors.kinds.get(path) or _kind(path, tensors.layout) for path in tensors.specs}
    records = {path: Record(spec, PENDING, kinds[path]) for path, spec in tensors.specs.items()}
    return Manifest(
        tensors.layout, records, tensors.aliases, tensors.mapping, layers=tensors.layers
    )


def _kind(path: KeyPath, layout: FileLayout) -> str:
    return linen_kind(path) if layout == "linen" else "unknown"


def torch_or_flax(names: Iterable[str]) -> FileLayout:
    """Guess the layout of a file without a manifest: Linen's names begin with a collection."""
    parts = [name.split("/") for name in names]
    is_linen = bool(parts) and all(part[0] in COLLECTIONS and len(part) > 1 for part in parts)
    return "linen" if is_linen else "torch"


def linen_or_nnx(paths: Iterable[KeyPath]) -> FileLayout:
    """Guess the layout of a Flax tree without a manifest: Linen's top level has collections."""
    top_level = {path[0] for path in paths}
    is_linen = "params" in top_level or (bool(top_level) and top_level <= {*COLLECTIONS})
    return "linen" if is_linen else "nnx"


def in_manifests_order(
    path: Path, specs: Mapping[KeyPath, Spec], manifest: Manifest
) -> dict[KeyPath, Spec]:
    """Return the specs in the manifest's order, under the manifest's paths.

    A step of a path may be a number in the manifest and a string in the file.

    Raises:
        CheckpointError: the manifest and the file have different tensors.
    """
    stored = {words(key): spec for key, spec in specs.items()}
    ordered = {key: stored.pop(words(key), None) for key in manifest.records}
    absent = [key for key, spec in ordered.items() if spec is None]
    for key in [*absent, *stored]:
        name = shown(slashed(key))
        raise CheckpointError(
            path,
            f"the manifest declares {name}, which the file lacks"
            if key in absent
            else f"the manifest does not know {name}",
            key=slashed(key),
            expected="the same tensors in the file and its manifest",
            found="one of them alone has it",
            mend="the file was changed: take another copy",
        )
    for key, record in manifest.records.items():
        if ordered[key] != record.spec:
            raise CheckpointError(
                path,
                f"{shown(slashed(key))} is not as its manifest declares",
                key=slashed(key),
                expected=f"{record.spec.dtype} {record.spec.shape}",
                found=str(ordered[key]),
                mend="the file was changed: take another copy",
            )
    return {key: spec for key, spec in ordered.items() if spec is not None}
