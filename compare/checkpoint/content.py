"""What the formats share: the manifest of tensors about to be written, and telling layouts apart by names."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

from ..conversion.errors import shown
from ..conversion.mapping import Path
from ..conversion.state_kinds import linen_kind
from .errors import CheckpointError
from .manifest import PENDING, LayoutName, Manifest, Record
from .spec import Spec
from .stored import Tensors

COLLECTIONS = ("params", "buffers", "batch_stats")


def manifest_of(tensors: Tensors) -> Manifest:
    """Return the manifest, its checksums pending."""
    kinds = {path: tensors.kinds.get(path) or _kind(path, tensors.layout) for path in tensors.specs}
    records = {path: Record(spec, PENDING, kinds[path]) for path, spec in tensors.specs.items()}
    return Manifest(tensors.layout, records, dict(tensors.aliases), tensors.mapping)


def _kind(path: Path, layout: LayoutName) -> str:
    return linen_kind(path) if layout == "linen" else "unknown"


def torch_or_flax(names: Iterable[str]) -> LayoutName:
    """Tell the layout of a file without a manifest: names that begin with a collection are Linen's."""
    found = list(names)
    flax = bool(found) and all(name.split("/")[0] in COLLECTIONS and "/" in name for name in found)
    return "linen" if flax else "torch"


def linen_or_nnx(paths: Iterable[Path]) -> LayoutName:
    """Tell the layout of a Flax tree without a manifest: Linen's begins with collections."""
    found = list(paths)
    first = {path[0] for path in found}
    return "linen" if found and ("params" in first or first <= set(COLLECTIONS)) else "nnx"


def in_manifests_order(path: FilePath, specs: Mapping[Path, Spec], manifest: Manifest) -> dict[Path, Spec]:
    """Return the specs by the manifest's paths, whose steps may be numbers where the file has words.

    Raises:
        CheckpointError: the manifest speaks of other tensors than the file holds.
    """
    by_words = {tuple(map(str, key)): spec for key, spec in specs.items()}
    found = {key: by_words.pop(tuple(map(str, key)), None) for key in manifest.records}
    absent = [key for key, spec in found.items() if spec is None]
    for key in [*absent, *by_words]:
        name = "/".join(map(str, key))
        side = "the manifest declares" if key in absent else "the manifest does not know"
        raise CheckpointError(path, f"{side} {shown(name)}", key=name, mend="the file was changed: take another copy")
    for key, record in manifest.records.items():
        if found[key] != record.spec:
            raise CheckpointError(
                path, f"{shown('/'.join(map(str, key)))} is not as its manifest declares", key="/".join(map(str, key)),
                expected=f"{record.spec.dtype} {record.spec.shape}", found=str(found[key]),
                mend="the file was changed: take another copy",
            )  # fmt: skip
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
