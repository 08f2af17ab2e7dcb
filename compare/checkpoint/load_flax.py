"""From a file in Flax's layout into Linen variables or an NNX model: by name, whichever of the two wrote it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from ..conversion.apply_mapping import place_like
from ..conversion.errors import ConversionError, Mismatch, MismatchEntry
from ..conversion.mapping import KeyPath, Policy, dotted, slashed
from ..conversion.state_kinds import FlaxSide, linen_entries, one_trained, specs_side
from ..conversion.tensors import Untransferable, numpy_to_tensor, to_jax
from ..conversion.unmatched import decided, may_lack, objection
from ..dtypes import FLOATING
from .reader import Reader
from .transforms import cast_array


def flax_leaves(
    stored: Reader, side: FlaxSide, policy: Mapping[str, Policy], cast: bool
) -> dict[KeyPath, jax.Array]:
    """Return the target's leaves with the values of the file.

    Raises:
        ConversionError: everything that does not fit.
    """
    names = {path: ".".join(name) for path, name in side.names.items()}
    held = specs_side("linen" if stored.layout == "linen" else "nnx", stored.specs, stored.kinds)
    by_name = dict(held.by_name)
    for path, first in stored.aliases.items():
        by_name.setdefault(dotted(path[1:] if stored.layout == "linen" else path), [first])
    missing, misshaped, refused = [], [], []
    pairs: dict[KeyPath, KeyPath] = {}
    for path, leaf in side.leaves.items():
        place, found = slashed(path), by_name.get(names[path], [])
        if not found:
            missing += (
                []
                if may_lack(place, leaf, policy)
                else [MismatchEntry(names[path], place, expected=tuple(leaf.shape))]
            )
        elif len(found) > 1:
            refused.append(
                MismatchEntry(
                    names[path],
                    place,
                    reason=f"could be {' or '.join(slashed(p) for p in found)}",
                )
            )
        elif stored.specs[found[0]].shape != tuple(leaf.shape):
            misshaped.append(
                MismatchEntry(names[path], place, stored.specs[found[0]].shape, tuple(leaf.shape))
            )
        elif one_trained(mine := held.kinds[found[0]], its := side.kinds[path]):
            reason = f"is a {mine} in the file and a {its} in the target: one is trained, the other is not"
            refused.append(MismatchEntry(names[path], place, reason=reason))
        else:
            pairs[path] = found[0]
    taken = set(names.values())
    extra = [path for path in held.leaves if ".".join(held.names[path]) not in taken]
    known = {path for path in extra if decided(slashed(path), policy) in ("ignore", "verify")}
    unexpected = tuple(
        MismatchEntry(slashed(p), "", stored.specs[p].shape) for p in extra if p not in known
    )
    if missing or unexpected or misshaped or refused:
        raise ConversionError(
            Mismatch(tuple(missing), unexpected, tuple(misshaped), tuple(refused))
        )
    verified = {path for path in known if decided(slashed(path), policy) == "verify"}
    arrays = dict(stored.read(dict.fromkeys([*pairs.values(), *sorted(verified, key=str)])))
    for path in verified:
        if (why := objection("verify", arrays[path])) is not None:
            refused.append(MismatchEntry(slashed(path), "", arrays[path].shape, reason=why))
    leaves = {}
    for path, source in pairs.items():
        try:
            array, leaf = arrays[source], side.leaves[path]
            if cast and {array.dtype.name, np.dtype(leaf.dtype).name} <= {*FLOATING}:
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
        nnx.update(target, unflatten_dict(dict(leaves)))
        return target
    held = {entry.path: entry.value for entry in linen_entries(target)}
    kept = {path: leaf for path, leaf in held.items() if not isinstance(leaf, jax.ShapeDtypeStruct)}
    return unflatten_dict({**kept, **leaves})


def _leaf(array: np.ndarray, leaf: Any) -> jax.Array:
    tensor = numpy_to_tensor(array if array.flags.writeable else array.copy())
    return place_like(to_jax(tensor, copy=True, owned=True), leaf, copy=True)
