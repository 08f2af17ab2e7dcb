"""What the formats share: the manifest of tensors about to be written, and telling layouts apart by names."""

from collections.abc import Iterable

from ..mapping import Path
from ..taxonomy import linen_kind
from .manifest import PENDING, LayoutName, Manifest, Record
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
