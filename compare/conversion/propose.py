"""Rename rules for the modules that `structure` pairs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

from .compound_units import is_compound, with_compound
from .groups import rules_of
from .renamed import renamed
from .structure import Pair, Shape, Unit, pair_units, units_of

Steps = Sequence[str]

# So many rules are not looked through for those that another one makes needless.
MANY_RULES = 100


def proposed_rules(
    torch: Mapping[str, Shape], flax: Mapping[str, Shape], names: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Return rename rules, and the torch names that only their order tells apart.

    Args:
        torch: the shapes of the torch entries, by name.
        flax: the shapes of the Flax entries, by the names that torch would give them.
        names: the dotted Flax name of each of these.
    """
    # What the torch model itself holds has no module whose name a rule could give.
    own = [unit for unit in units_of(torch) if unit.steps]
    pairs = pair_units(*with_compound(own, units_of(flax)))
    twins = [units for pair in pairs for units in pair.units()]
    left = _left(torch, [one for one, _ in twins])
    others = _left(flax, [other for _, other in twins])
    # The size of a bias alone says too little.
    left = {name: shape for name, shape in left.items() if not name.endswith(".bias")}
    for name in left.keys() & others.keys():  # these pair by themselves
        if prod(left[name]) == prod(others[name]):
            del left[name], others[name]
    pairs += pair_units(_alone(left), _alone({names[name]: others[name] for name in others}))
    unsure = [
        _dotted(unit.steps)
        for pair in pairs
        if pair.why == "order"
        for unit in pair.torch.units.values()
    ]
    return _rules(pairs), unsure


def _left(entries: Mapping[str, Shape], paired: Iterable[Unit]) -> dict[str, Shape]:
    """Return the entries that are in none of these units."""
    own = {_dotted(unit.steps) for unit in paired}
    above = tuple(_dotted((*unit.steps, "")) for unit in paired if is_compound(unit))
    return {
        name: shape
        for name, shape in entries.items()
        if name.rpartition(".")[0] not in own and not name.startswith(above)
    }


def _alone(entries: Mapping[str, Shape]) -> list[Unit]:
    """Return each entry as a unit."""
    return [
        Unit(tuple(name.split(".")), frozenset({("", prod(shape))}))
        for name, shape in entries.items()
        if "*" not in name
    ]


def _rules(pairs: Iterable[Pair]) -> dict[str, str]:
    """Return the fewest rules found that give each unit of torch the name of its twin."""
    short: dict[str, str] = {}
    full: dict[str, tuple[str, str]] = {}
    wanted: dict[str, str] = {}
    for pair in pairs:
        for old, new, units in _named(pair):
            short.setdefault(*_without_common_end(old, new))
            for one, other in units:
                wanted[_dotted(one.steps)] = _dotted(other.steps)
                full[_dotted(one.steps)] = _dotted(old), _dotted(new)
    rules = {old: new for old, new in short.items() if old and old != new}
    rules |= dict(full[name] for name in _misnamed(wanted, rules) if name)
    misnamed = _misnamed(wanted, rules)
    if len(rules) > MANY_RULES:
        return rules
    for old in sorted(rules, key=lambda old: (-old.count("."), old)):
        fewer = {name: new for name, new in rules.items() if name != old}
        if _misnamed(wanted, fewer) <= misnamed:
            rules = fewer
    return rules


def _named(pair: Pair) -> Iterator[tuple[Steps, Steps, list[tuple[Unit, Unit]]]]:
    """Yield the names of both series with their units; unit by unit if a star cannot say it."""
    units = list(pair.units())
    stars = [_dotted(series.steps).count("*") for series in (pair.torch, pair.flax)]
    if pair.torch.units.keys() == pair.flax.units.keys() and stars[0] == stars[1]:
        yield pair.torch.steps, pair.flax.steps, units
    else:
        yield from ((one.steps, other.steps, [(one, other)]) for one, other in units)


def _without_common_end(one: Steps, other: Steps) -> tuple[str, str]:
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return _dotted(one), _dotted(other)


def _misnamed(wanted: Mapping[str, str], rules: Mapping[str, str]) -> set[str]:
    """Return the names that the rules do not turn into the wanted ones."""
    names, _ = renamed(wanted, rules_of(rules), "")
    return {name for name, new in wanted.items() if names[name] != new}


def _dotted(steps: Steps) -> str:
    return ".".join(steps)
