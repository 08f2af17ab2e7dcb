"""What happens to entries that exist on one side only, by patterns of their names."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from .mapping import KeyPath, Left, Policy, StateMapping, slashed


def decided(name: str, policy: Mapping[str, Policy]) -> Policy | None:
    """Return the decision of the first pattern that fits the name, or None."""
    pattern = _pattern_of(name, policy)
    return None if pattern is None else policy[pattern]


def decide(name: str, policy: Mapping[str, Policy], used: set[str]) -> Policy | None:
    """Return the same, and note the pattern as used.

    Raises:
        ValueError: there is no such policy.
    """
    pattern = _pattern_of(name, policy)
    if pattern is None:
        return None
    used.add(pattern)
    require_policy(pattern, policy[pattern])
    return policy[pattern]


def _pattern_of(name: str, policy: Iterable[str]) -> str | None:
    return next((pattern for pattern in policy if fnmatchcase(name, pattern)), None)


def require_policy(pattern: str, decided: str) -> None:
    """Raise ValueError for a policy that does not exist."""
    if decided not in ("ignore", "verify", "refuse"):
        raise ValueError(
            f"policy {pattern}: there is no {decided!r}; there are ignore, verify and refuse"
        )


def allowing(
    mapping: StateMapping,
    tensors: Iterable[str],
    leaves: Mapping[KeyPath, Any],
    policy: Mapping[str, Policy],
) -> StateMapping:
    """Return the mapping without the pairs that one side lacks and the policy allows to leave out.

    Args:
        mapping: how the names pair.
        tensors: the torch names that are there.
        leaves: the Flax paths that are there.
        policy: what happens to an entry that exists on one side only.
    """
    if not policy:
        return mapping
    keys = dict.fromkeys(tensors)
    used: set[str] = set()

    def allowed(name: str) -> Policy | None:
        decided = decide(name, policy, used)
        return decided if decided in ("ignore", "verify") else None

    left = [item for item in mapping.left if decide(item.torch_key, policy, used) != "refuse"]
    rows = []
    for row in mapping.rows:
        here, there = all(key in keys for key in row.stack or (row.torch_key,)), row.path in leaves
        if here and not there and (decided := allowed(row.torch_key)):
            left.append(Left(row.torch_key, decided))
        elif there and not here and (decided := allowed(row.place) or allowed(row.torch_key)):
            left.append(Left(row.place, decided, row.path))
        else:
            rows.append(row)
    known = {*mapping.by_key, *(item.torch_key for item in left)}
    for key in [key for key in keys if key not in known]:
        if decided := allowed(key):
            left.append(Left(key, decided))
    for path in [path for path in leaves if path not in mapping.by_path]:
        name = slashed(path)
        if name not in known and (decided := allowed(name)):
            left.append(Left(name, decided, path))
    return StateMapping(tuple(rows), tuple(left), mapping.flax)
