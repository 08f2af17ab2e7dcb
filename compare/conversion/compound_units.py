"""Attention and recurrent layers, which one framework stores in one module, as one unit each."""

from collections.abc import Iterable, Sequence

from .structure import Unit

_ATTENTION = ("in_proj_weight", "q_proj_weight")
# What the cells and the attention of Flax consist of.
_CHILDREN = {
    "attention": [{"query", "key", "value", "out"}],
    "recurrent": [{"dense_i", "dense_h"}, {"ii", "hi", "ig", "hg"}, {"ir", "hr", "iz", "hz"}],
}


def with_compound(torch: Sequence[Unit], flax: Sequence[Unit]) -> tuple[list[Unit], list[Unit]]:
    """Return the units, with one for each layer that either side stores in one piece."""
    torch = _merged_torch(torch)
    kinds = {leaf for unit in torch for leaf, _ in unit.sizes} & _CHILDREN.keys()
    for kind in sorted(kinds):
        flax = _merged_flax(flax, kind)
    return list(torch), list(flax)


def is_compound(unit: Unit) -> bool:
    """Return whether the unit is such a layer."""
    return any(leaf in _CHILDREN for leaf, _ in unit.sizes)


def _merged_torch(units: Sequence[Unit]) -> list[Unit]:
    """Return the units with one for MultiheadAttention, and for each cell of LSTM and GRU."""
    found = {unit.steps: unit for unit in units}
    for unit in units:
        leaves = {leaf for leaf, _ in unit.sizes}
        if leaves & {*_ATTENTION}:
            out = found.pop((*unit.steps, "out_proj"), None)
            found[unit.steps] = _as_one("attention", unit.steps, [unit, *([out] if out else [])])
        elif "weight_hh" in leaves:
            found[unit.steps] = _as_one("recurrent", unit.steps, [unit])
    return list(found.values())


def _merged_flax(units: Sequence[Unit], kind: str) -> list[Unit]:
    """Return the units with one for each module that has the children of this kind."""
    children: dict[tuple[str, ...], list[Unit]] = {}
    for unit in units:
        children.setdefault(unit.steps[:-1], []).append(unit)
    merged = []
    for above, those in children.items():
        names = {unit.steps[-1] for unit in those if unit.steps}
        is_compound = any(names >= needed for needed in _CHILDREN[kind])
        merged += [_as_one(kind, above, those)] if is_compound else those
    return merged


def _as_one(kind: str, steps: tuple[str, ...], units: Iterable[Unit]) -> Unit:
    """Return one unit with the size of all weights; a bias may be stored twice, or not at all."""
    sizes = [size for unit in units for leaf, size in unit.sizes if "weight" in leaf]
    return Unit(steps, frozenset({(kind, sum(sizes))}))
