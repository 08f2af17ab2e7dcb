"""The part of a file that holds the state, where a training program wrote more: `select`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...conversion.arguments import require_names
from ...conversion.mapping import KeyPath, slashed
from ...files.printable import shown, with_article
from ..errors import CheckpointError
from ..manifest import COLLECTIONS
from ..reader import Reader

Select = Sequence[str]
_MAX_LEVELS, _MAX_NODES = 3, 10_000
_STREAM = {"count", "key"}


class Part(NamedTuple):
    """The leaves of the selected part, and the names of what is not part of it.

    `leaves` has, by path within the part, the path in the file and the leaf.
    """

    leaves: dict[KeyPath, tuple[KeyPath, Any]]
    left_out: tuple[str, ...]


def as_select(select: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the parts; none if nothing is selected."""
    if isinstance(select, str):
        select = (select,)
    require_names(select=select)
    names = tuple(select)
    return tuple(name for name in names if name)


def require_none(path: Path, select: Select, reason: str, mend: str = "leave it out") -> None:
    """Raise CheckpointError if a part is selected of a file that has none."""
    if select:
        raise CheckpointError(
            path,
            f"select has no effect: {reason}",
            expected="no select",
            found=f"select={select[0]!r}",
            mend=mend,
            is_usage=True,
        )


def inner(path: Path, tree: Any, name: str) -> Any:
    """Return what lies in nested dicts and lists under names and indices joined by slashes.

    Raises:
        CheckpointError: there is no such part.
    """
    if isinstance(tree, dict) and name in tree:  # a name with a slash of its own
        return tree[name]
    node, above = tree, ""
    for step in name.split("/"):
        has = _children(node)
        if step not in has:
            where = f"{shown(above)} in it" if above else "it"
            raise CheckpointError(
                path,
                f"{where} has no part {shown(step)}",
                key=name,
                expected=f"one of {_listed(has)}" if has else "a part of a dict or list",
                found=f"select={name!r}",
                mend=f"select one of {_listed(has)}" if has else "leave select out",
                is_usage=True,
            )
        node, above = has[step], f"{above}{step}/"
    return node


def _children(node: Any) -> dict[Any, Any]:
    """Return the parts of a dict by name, or of a list by index; nothing for other things."""
    if type(node) in (list, tuple):
        return {str(index): child for index, child in enumerate(node)}
    return node if isinstance(node, dict) else {}


def flax_part(
    path: Path,
    tree: dict[Any, Any],
    select: Select,
    is_array: Callable[[Any], bool],
    what: Callable[[Any], str],
) -> Part:
    """Return the arrays of a Flax tree, or of the selected parts of it.

    A part that is named as a collection, and holds none itself, becomes that collection. `None` and
    random streams are left out.

    Args:
        path: the file, for errors.
        tree: nested dicts.
        select: the parts, by names joined by slashes.
        is_array: whether a leaf is an array.
        what: what a leaf is, for errors.

    Raises:
        CheckpointError: there is no such part, or it has a leaf that is no array.
    """
    found: dict[KeyPath, tuple[KeyPath, Any]] = {}
    for name in select or ("",):
        node = inner(path, tree, name) if name else tree
        steps = tuple(name.split("/")) if name else ()
        if not isinstance(node, dict):
            raise _no_part(path, name, what(node))
        begin = _collection(steps, node, select)
        for key, leaf in leaves(node):
            if begin + key in found:
                raise _no_part(path, name, f"{slashed(begin + key)} again")
            found[begin + key] = steps + key, leaf
    if found and all(len(key) > 1 and key[-1] == "value" for key in found):  # of an nnx.State
        found = {key[:-1]: place_and_leaf for key, place_and_leaf in found.items()}
    streams = _streams(found, is_array)
    kept = {}
    for key, (place, leaf) in found.items():
        if leaf is None or key[:-1] in streams or what(leaf) == "NoneType":
            continue
        if not is_array(leaf):
            raise _no_array(path, tree, slashed(place), what(leaf), is_array)
        kept[key] = place, leaf
    names = (f"{slashed(stream)} (a random stream)" for stream in streams)
    return Part(kept, (*not_selected(tree, select), *names))


def not_selected(tree: Any, select: Select, above: str = "") -> Iterator[str]:
    """Yield the names of what lies beside the selected parts; nothing if none is selected."""
    for key, child in _children(tree).items() if select else ():
        name = f"{above}{key}"
        if any(part.startswith(f"{name}/") for part in select):
            yield from not_selected(child, select, f"{name}/")
        elif name not in select:
            yield name


def leaves(tree: dict[Any, Any]) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the leaves of nested dicts with their paths, in order."""
    opened: list[tuple[KeyPath, Iterator[tuple[Any, Any]]]] = [((), iter(tree.items()))]
    while opened:
        path, entries = opened[-1]
        for name, value in entries:
            if isinstance(value, dict):
                opened.append(((*path, name), iter(value.items())))
                break
            yield (*path, name), value
        else:
            opened.pop()


def advice(tree: Any, is_state: Callable[[dict[Any, Any]], bool]) -> str:
    """Return the argument that selects the state in the tree, or an empty string."""
    return _selecting(_states(tree, is_state))


def _selecting(names: Sequence[str]) -> str:
    """Return the argument that selects one of these parts, or all that are collections."""
    if not names:
        return ""
    collections = [name for name in names if name in COLLECTIONS]
    if len(collections) > 1:
        flags = " ".join(f"--select {name}" for name in collections)
        return f"pass select={collections} ({flags})"
    ways = [f"select={name!r} (--select {name})" for name in collections or names[:3]]
    return f"pass {', or '.join(ways)}"


def collections_alone(stored: Reader) -> str:
    """Return the argument that selects the collections of a file that holds more, or nothing."""
    names = list(dict.fromkeys(path[0] for path in stored.specs))
    found = [name for name in names if name in COLLECTIONS]
    if stored.manifest is not None or stored.left_out or found == names:
        return ""
    return _selecting(found)


def _states(tree: Any, is_state: Callable[[dict[Any, Any]], bool]) -> list[str]:
    """Return the names of the outermost parts that are states."""
    level, nodes = [("", tree)], 0
    for depth in range(_MAX_LEVELS):
        below = []
        for above, node in level:
            for name, child in _children(node).items():
                nodes += 1
                is_name = isinstance(name, str) and ("/" not in name or not above)
                if is_name and isinstance(child, dict | list | tuple):
                    below.append((above + name, child))
            if nodes > _MAX_NODES:
                return []
        if found := [name for name, child in below if _is_state(child, is_state)]:
            return found
        level = [(f"{name}/", child) for name, child in below if name.count("/") == depth]
    return []


def _is_state(node: Any, is_state: Callable[[dict[Any, Any]], bool]) -> bool:
    return isinstance(node, dict) and bool(node) and is_state(node)


def _collection(steps: KeyPath, node: Mapping[Any, Any], select: Select) -> KeyPath:
    """Return the collection that the part becomes, as the beginning of its paths."""
    if len(select) == 1 and isinstance(node.get("params"), dict):
        return ()
    is_collection = bool(steps) and steps[-1] in COLLECTIONS
    return steps[-1:] if is_collection or len(select) > 1 else ()


def _streams(
    found: Mapping[KeyPath, tuple[KeyPath, Any]], is_array: Callable[[Any], bool]
) -> set[KeyPath]:
    """Return the paths of random streams, as NNX saves them: a counter and a key alone."""
    within: dict[KeyPath, dict[Any, Any]] = {}
    for key, (_, leaf) in found.items():
        within.setdefault(key[:-1], {})[key[-1]] = leaf
    return {
        place
        for place, node in within.items()
        if node.keys() == _STREAM and all(map(is_array, node.values())) and _is_stream(node)
    }


def _is_stream(node: Mapping[Any, Any]) -> bool:
    count, key = (getattr(node[name], "spec", node[name]) for name in ("count", "key"))
    return str(count.dtype) == str(key.dtype) == "uint32" and not tuple(count.shape)


def _no_array(
    path: Path, tree: dict[Any, Any], name: str, what: str, is_array: Callable[[Any], bool]
) -> CheckpointError:
    def is_state(node: dict[Any, Any]) -> bool:
        return all(leaf is None or is_array(leaf) for _, leaf in leaves(node))

    other = "save only the variables; for a TrainState, {'params': state.params}"
    return CheckpointError(
        path,
        f"{shown(name)}: is {with_article(what)}, not an array of values",
        key=name,
        expected="an array of values",
        found=with_article(what),
        mend=advice(tree, is_state) or other,
    )


def _no_part(path: Path, name: str, found: str) -> CheckpointError:
    return CheckpointError(
        path,
        f"the part {shown(name)} is no tree of arrays of its own",
        key=name,
        expected="names and arrays",
        found=found,
        mend="select a part that holds variables",
        is_usage=True,
    )


def _listed(names: Iterable[Any]) -> str:
    all_names = [shown(str(name)) for name in names]
    more = f" and {len(all_names) - 8} more" if len(all_names) > 8 else ""
    return ", ".join(all_names[:8]) + more
