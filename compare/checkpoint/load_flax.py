"""Load a file in Flax's layout into Linen variables or an NNX model, by name.

It does not matter which of the two wrote the file.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from ..conversion.apply_mapping import place_like
from ..conversion.errors import ConversionError, Mismatch, MismatchEntry, dropping
from ..conversion.mapping import KeyPath, Policy, dotted, slashed
from ..conversion.policies import decided
from ..conversion.state_kinds import FlaxSide, linen_entries, one_trained, specs_side
from ..conversion.tensors import Untransferable, numpy_to_tensor, to_jax
from ..conversion.trees import with_leaves
from ..conversion.unmatched import lacking, objection
from ..dtypes import FLOATING
from ..files.interrupts import uninterrupted
from .manifest import is_cast
from .reader import Reader
from .transforms import cast_array


def flax_leaves(
    stored: Reader, side: FlaxSide, policy: Mapping[str, Policy], cast: bool
) -> dict[KeyPath, jax.Array]:
    """Return the target's leaves with the values of the file.

    Raises:
        ConversionError: entries do not fit; the error lists all of them.
    """
    names = {path: ".".join(name) for path, name in side.names.items()}
    file_side = specs_side(
        "linen" if stored.layout == "linen" else "nnx", stored.specs, stored.kinds
    )
    by_name = dict(file_side.by_name)
    for path, first in stored.aliases.items():
        by_name.setdefault(dotted(path[1:] if stored.layout == "linen" else path), [first])
    same_paths: dict[KeyPath, KeyPath] = {}
    if file_side.kind == side.kind:  # Linen's paths begin with the collection, NNX's do not
        same_paths = {path: path for path in file_side.leaves} | dict(stored.aliases)
    missing, misshaped, refused = [], [], []
    pairs: dict[KeyPath, KeyPath] = {}
    used: set[KeyPath] = set()
    for path, leaf in side.leaves.items():
        target_name, sources = slashed(path), by_name.get(names[path], [])
        if path in same_paths:  # two collections may have one name
            sources = [same_paths[path]]
        used.update(sources)
        if not sources:
            if (reason := lacking(leaf, decided(target_name, policy))) is not None:
                expected = tuple(leaf.shape)
                missing.append(
                    MismatchEntry(names[path], target_name, expected=expected, reason=reason)
                )
        elif len(sources) > 1:
            refused.append(
                MismatchEntry(
                    names[path],
                    target_name,
                    reason=f"could be {' or '.join(map(slashed, sources))}",
                )
            )
        elif (shape := stored.specs[sources[0]].shape) != tuple(leaf.shape):
            misshaped.append(MismatchEntry(names[path], target_name, shape, tuple(leaf.shape)))
        elif one_trained(file_side.kinds[sources[0]], side.kinds[path]):
            reason = (
                f"is a {file_side.kinds[sources[0]]} in the file and a {side.kinds[path]} "
                "in the target: one is trained, the other is not"
            )
            refused.append(MismatchEntry(names[path], target_name, reason=reason))
        else:
            pairs[path] = sources[0]
    extra = [path for path in file_side.leaves if path not in used]
    allowed = {path for path in extra if decided(slashed(path), policy) in ("ignore", "verify")}
    unexpected = tuple(
        MismatchEntry(slashed(path), "", stored.specs[path].shape)
        for path in extra
        if path not in allowed
    )
    if missing or unexpected or misshaped or refused:
        raise ConversionError(
            Mismatch(tuple(missing), unexpected, tuple(misshaped), tuple(refused))
        )
    verified = {path for path in allowed if decided(slashed(path), policy) == "verify"}
    arrays = dict(stored.read(dict.fromkeys([*pairs.values(), *sorted(verified, key=str)])))
    for path in verified:
        if (refusal := objection("verify", arrays[path])) is not None:
            name, shape = slashed(path), arrays[path].shape
            entry = MismatchEntry(name, "", shape, reason=refusal, mend=dropping(name))
            refused.append(entry)
    leaves = {}
    for path, source in pairs.items():
        try:
            array, leaf = arrays[source], side.leaves[path]
            may_cast = cast and is_cast(path, side.kinds[path])
            if may_cast and {array.dtype.name, np.dtype(leaf.dtype).name} <= {*FLOATING}:
                array = cast_array(stored.path, names[path], array, np.dtype(leaf.dtype))
            leaves[path] = _leaf(array, leaf)
        except Untransferable as error:
            refused.append(MismatchEntry(names[path], "", arrays[source].shape, reason=str(error)))
    if refused:
        raise ConversionError(Mismatch(refused=tuple(refused)))
    return leaves


def install(target: Any, leaves: Mapping[KeyPath, jax.Array]) -> Any:
    """Put the leaves into the NNX model and return it, or return new Linen variables."""
    if isinstance(target, nnx.Module):
        with uninterrupted():
            nnx.update(target, unflatten_dict(dict(leaves)))
        return target
    kept = {
        entry.path: entry.value
        for entry in linen_entries(target)
        if not isinstance(entry.value, jax.ShapeDtypeStruct)
    }
    return with_leaves(target, {**kept, **leaves})


def _leaf(array: np.ndarray, leaf: Any) -> jax.Array:
    tensor = numpy_to_tensor(array if array.flags.writeable else array.copy())
    return place_like(to_jax(tensor, copy=True, owned=True), leaf, copy=True)
