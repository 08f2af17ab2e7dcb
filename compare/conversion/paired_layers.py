"""What the layers that pair say besides their tensors, and what becomes of differences."""

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..frameworks import torch
from .difference import Difference
from .errors import MismatchEntry
from .layouts import is_pattern
from .mapping import Policy, Row, slashed
from .policies import decide
from .state_kinds import FlaxSide
from .stated import dense_differences, differences, embedding_differences

FlaxName = tuple[str, ...]


class PairedLayers(NamedTuple):
    """The layers of both sides, and the rows by which they pair.

    Attributes:
        rows: the rows of the mapping.
        layers: the torch layers, by name.
        names: the dotted Flax names of the torch layers.
        flax: the entries of the Flax model.
        flax_layers: the Flax layers, by name.
    """

    rows: Sequence[Row]
    layers: Mapping[str, torch.nn.Module]
    names: Mapping[str, str]
    flax: FlaxSide
    flax_layers: Mapping[FlaxName, Any]

    def judged(
        self, policy: Mapping[str, Policy], used: set[str]
    ) -> tuple[list[MismatchEntry], list[str]]:
        """Return what is computed differently, and lines on what is only trained differently.

        Args:
            policy: what is allowed, by patterns of names.
            used: takes the patterns that fit.
        """
        refused, trained = list(self._heads(policy, used)), []
        for prefix, place, found in self._differences():
            name = ".".join(filter(None, (prefix, found.fact)))
            decided = decide(name, policy, used)
            if decided == "ignore":  # nothing follows from a shape here that could be verified
                continue
            where = f"{found.torch} in torch, {found.flax} in Flax"
            mend = f"{found.mend}; {allowing_of(name)}"
            if found.trains_alone and decided is None:
                trained.append(f"{name}: trained differently: {where}: {mend}")
            else:
                reason = f"computes something else: {where}"
                refused.append(MismatchEntry(name, place, reason=reason, mend=mend))
        return refused, trained

    def frozen(
        self, tensors: Mapping[str, Any], policy: Mapping[str, Policy], used: set[str]
    ) -> list[str]:
        """Return a line on the frozen torch parameters that become parameters which Flax trains.

        The other arguments than `tensors`, by torch key, are those of `judged`.
        """
        frozen = [
            key
            for row in self.rows
            if row.kind == "parameter" and self.flax.kinds[row.path] == "parameter"
            for key in (row.stack or (row.torch_key,))
            if is_frozen(tensors[key]) and decide(f"{key}.requires_grad", policy, used) is None
        ]
        if not frozen:
            return []
        others = f" and {len(frozen) - 1:,} others" if len(frozen) > 1 else ""
        name = f"{frozen[0] if len(frozen) == 1 else '*'}.requires_grad"
        return [
            f"{frozen[0]}{others}: requires_grad=False in torch, trained as a parameter in "
            f"Flax: keep it in another collection, or leave it to optax.set_to_zero; "
            f"{allowing_of(name)}"
        ]

    def _heads(self, policy: Mapping[str, Policy], used: set[str]) -> Iterator[MismatchEntry]:
        """Yield attention whose number of heads differs: no shape in torch shows that number."""
        rows = {row.torch_key: row for row in self.rows if row.layout == "heads_in" and row.shape}
        for key, row in rows.items():
            prefix = key.rpartition(".")[0]
            layer = self.layers.get(prefix)
            if not isinstance(layer, torch.nn.MultiheadAttention) or row.shape is None:
                continue
            name = ".".join(filter(None, (prefix, "num_heads")))
            is_allowed = decide(name, policy, used) == "ignore"
            heads = row.slice_shape(row.shape)[1]
            if layer.num_heads != heads and not is_allowed:
                reason = f"has {layer.num_heads} heads in torch and {heads} in Flax"
                yield MismatchEntry(key, row.place, reason=reason, mend=allowing_of(name))

    def _differences(self) -> Iterator[tuple[str, str, Difference]]:
        """Yield the name of the torch layer, the place of the Flax layer, and what differs."""
        for prefix, path in self._pairs():
            for found in differences(self.layers[prefix], self.flax_layers[path]):
                if found.fact != "num_heads":  # the shapes show it, also where there is no layer
                    yield prefix, slashed(path), found
        pairs = [(row, key) for row in self.rows for key in row.keys]
        for row, key in pairs:
            prefix = key.rpartition(".")[0]
            layer = self.layers.get(prefix)
            if is_pattern(row.layout):
                flax_layer = self.flax_layers.get(self.flax.names[row.path][:-1])
                for found in dense_differences(layer, flax_layer):
                    yield prefix, row.place, found
            if isinstance(layer, torch.nn.Embedding) and row.kind != "alias" and not row.twin:
                for found in embedding_differences(layer):
                    yield prefix, row.place, found

    def _pairs(self) -> Iterable[tuple[str, FlaxName]]:
        """Return the names of the layers that have the same name, or a tensor in common."""
        pairs = {
            (prefix, tuple(name.split(".")) if name else ()) for prefix, name in self.names.items()
        }
        pairs |= {
            (key.rpartition(".")[0], self.flax.names[row.path][:-1])
            for row in self.rows
            if row.kind != "alias"
            for key in row.keys
        }
        pairs |= set(self._beside(pairs))
        return sorted(
            (prefix, path)
            for prefix, path in pairs
            if prefix in self.layers and path in self.flax_layers
        )

    def _beside(self, pairs: Iterable[tuple[str, FlaxName]]) -> Iterator[tuple[str, FlaxName]]:
        """Yield layers without state by their names, where all that pair beside them keep theirs.

        `1` of a Sequential pairs with `layers.1` if `0` pairs with `layers.0`, and `2` with
        `layers.2`.
        """
        containers: dict[str, set[FlaxName | None]] = {}
        for prefix, path in pairs:
            above, _, name = prefix.rpartition(".")
            if prefix in self.layers and path in self.flax_layers and prefix:
                containers.setdefault(above, set()).add(path[:-1] if path[-1:] == (name,) else None)
        paired = {prefix for prefix, path in pairs if path in self.flax_layers}
        for prefix in self.layers.keys() - paired:
            above, _, name = prefix.rpartition(".")
            places = containers.get(above, set())
            if len(places) == 1 and (place := next(iter(places))) is not None:
                yield prefix, (*place, name)


def allowing_of(name: str) -> str:
    """Return what allows a difference between two layers."""
    pattern = name if name.startswith("*") else glob.escape(name)
    return f"compare.match(…, policy={{{pattern!r}: 'ignore'}}) allows it"


def is_frozen(tensor: Any) -> bool:
    """Return whether it is a torch parameter that is not trained."""
    return isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad
