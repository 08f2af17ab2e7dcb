"""The Flax side of a pairing: leaves by path, with their dotted names and kinds."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from flax import nnx

from .mapping import Path
from .taxonomy import SAVED, Held, entries, linen_entries, linen_kind, nnx_kind

FlaxKind = Literal["linen", "nnx"]


class FlaxSide(NamedTuple):
    """What a Flax model stores; `by_name` has the paths of each dotted name, without the collection."""

    kind: FlaxKind
    leaves: dict[Path, Any]
    kinds: dict[Path, str]
    names: dict[Path, tuple[str, ...]]
    by_name: dict[str, list[Path]]


def flax_side(template: Any) -> FlaxSide:
    """Return the stored entries of Linen variables or an NNX model: no caches, no random streams.

    Raises:
        TypeError: something else, or a leaf without a shape.
    """
    if isinstance(template, FlaxSide):
        return template
    if isinstance(template, nnx.Module):
        return _side("nnx", [held for held in entries(template) if held.kind in SAVED])
    if isinstance(template, nnx.State):
        flat = nnx.to_flat_state(template)
        return _side("nnx", [Held(path, nnx_kind(leaf), leaf.get_value()) for path, leaf in flat
                             if nnx_kind(leaf) in SAVED])  # fmt: skip
    if isinstance(template, Mapping):
        return _side("linen", [held for held in linen_entries(template) if held.kind in SAVED])
    raise TypeError(f"template is a {type(template).__name__}; expected Linen variables or an NNX model")


def specs_side(kind: FlaxKind, specs: Mapping[Path, Any], kinds: Mapping[Path, str]) -> FlaxSide:
    """Return the side of a file, of which shapes are known and perhaps kinds."""
    linen = {path: linen_kind(path) for path in specs} if kind == "linen" else {}
    return _side(kind, [Held(path, kinds.get(path, linen.get(path, "unknown")), spec) for path, spec in specs.items()])


def _side(kind: FlaxKind, held: list[Held]) -> FlaxSide:
    leaves = {entry.path: entry.value for entry in held}
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape"):
            raise TypeError(f"template {'/'.join(map(str, path))} is a {type(leaf).__name__}; expected an array")
    names = {path: tuple(map(str, path[1:] if kind == "linen" else path)) for path in leaves}
    by_name: dict[str, list[Path]] = {}
    for path, name in names.items():
        by_name.setdefault(".".join(name), []).append(path)
    return FlaxSide(kind, leaves, {entry.path: entry.kind for entry in held}, names, by_name)
