"""The kind of state of each entry of a module, in every framework.

| kind | PyTorch | Flax Linen | Flax NNX | saved | trained |
| --- | --- | --- | --- | --- | --- |
| parameter | `nn.Parameter` | `params` | `nnx.Param` | yes | yes |
| buffer | `register_buffer` | `buffers`, or any other | any other `nnx.Variable` | yes | no |
| statistics | running statistics of a norm | `batch_stats` | `nnx.BatchStat` | yes | no |
| not saved | buffer, `persistent=False` | `cache` | `nnx.Cache`, `nnx.Intermediate` | no | no |
| alias | second name of a tensor | - | second path to a Variable | once | - |
| stream | - | - | `nnx.RngState` | no | no |
| left behind | plain tensor attribute | - | plain array attribute | no | no |

For Linen the table names collections. The collection `intermediates` is not saved either.

Sources: the PyTorch documentation of `Module.register_buffer`; Flax's guides on variable
collections and on NNX filters.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from ..files.printable import kind_of
from ..frameworks import Tensor, is_lazy, jax, nnx, torch
from .mapping import KeyPath, slashed, words
from .trees import is_nested, leaves_of

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_COLLECTION_KINDS = {
    "params": "parameter",
    "batch_stats": "statistics",
    "cache": "not saved",
    "intermediates": "not saved",
}
SAVED = ("parameter", "buffer", "statistics")


class StateEntry(NamedTuple):
    """One entry of a module.

    Attributes:
        path: the path of the entry.
        kind: the kind of state.
        value: the tensor, array or abstract value.
        first: for an alias, the first path of the same value.
    """

    path: KeyPath
    kind: str
    value: Any
    first: KeyPath | None = None

    @property
    def name(self) -> str:
        """The path as one name: dotted in torch, with slashes in Flax."""
        return slashed(self.path)


def entries(source: Any) -> list[StateEntry]:
    """Return every entry of a torch module, an NNX model or Linen variables, in its own order.

    Raises:
        TypeError: the source is none of these.
    """
    if isinstance(source, torch.nn.Module):
        return [
            StateEntry((name,), kind, value, first) for name, kind, value, first in _torch(source)
        ]
    if isinstance(source, nnx.Module):
        return list(_nnx(source))
    if isinstance(source, Mapping) and not isinstance(source, nnx.State):
        return linen_entries(source)
    raise TypeError(f"got {kind_of(source)}; expected a torch or NNX module, or Linen variables")


def linen_entries(variables: Mapping[str, Any]) -> list[StateEntry]:
    """Return the entries of Linen variables. The collection determines the kind.

    Raises:
        TypeError: the variables do not begin with collections.
    """
    if variables and not is_nested(variables):
        name = next(iter(variables))
        raise TypeError(f'{name!r} is not a collection: give all variables, {{"params": ...}}')
    leaves = leaves_of(variables)
    return [StateEntry(path, linen_kind(path), leaf) for path, leaf in leaves.items()]


def linen_kind(path: KeyPath) -> str:
    """Return the kind of a leaf of Linen variables, from its collection."""
    return _COLLECTION_KINDS.get(path[0], "buffer")


def torch_kinds(module: torch.nn.Module) -> dict[str, str]:
    """Return the kind of every name in the module. An alias has the kind of its first name."""
    named_values = list(_torch(module))
    kinds = {name: kind for name, kind, _, first in named_values if first is None}
    aliases = {name: first[0] for name, _, _, first in named_values if first is not None}
    return kinds | {name: kinds[first] for name, first in aliases.items()}


def one_trained(kind: str, other: str) -> bool:
    """Return whether both kinds are known and exactly one of them is trained."""
    return "unknown" not in (kind, other) and (kind == "parameter") != (other == "parameter")


def nnx_kind(variable: Any) -> str:
    """Return the kind of a leaf of an NNX state."""
    if not isinstance(variable, nnx.Variable):
        return "left behind"
    for kind, types in (
        ("stream", nnx.RngState),
        ("parameter", nnx.Param),
        ("statistics", nnx.BatchStat),
        ("not saved", (nnx.Cache, nnx.Intermediate)),
    ):
        if isinstance(variable, types):
            return kind
    return "buffer"


def same_memory(tensor: Tensor) -> tuple[Any, ...] | None:
    """Return a key that is the same for two names of one tensor; None if it has no memory."""
    if is_lazy(tensor) or tensor.is_nested or tensor.layout != torch.strided:
        return None
    if tensor.is_meta or not tensor.numel():
        return None
    views = tensor.is_conj(), tensor.is_neg()
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, *views)


def _torch(module: torch.nn.Module) -> Iterator[tuple[str, str, Any, KeyPath | None]]:
    seen: dict[Any, str] = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        is_norm = isinstance(child, torch.nn.modules.batchnorm._NormBase)
        tensors: list[tuple[str, str, Tensor]] = [
            (name, "parameter", value)
            for name, value in child._parameters.items()
            if value is not None
        ]
        for name, value in child._buffers.items():
            kind = "statistics" if is_norm and name in STATISTICS else "buffer"
            if value is not None:
                tensors.append(
                    (
                        name,
                        "not saved" if name in child._non_persistent_buffers_set else kind,
                        value,
                    )
                )
        tensors += [(name, "left behind", value) for name, value in _plain(vars(child))]
        for name, kind, value in tensors:
            first = seen.setdefault(
                (kind == "left behind", same_memory(value) or id(value)), dot + name
            )
            yield (
                (dot + name, "alias", value, (first,))
                if first != dot + name
                else (dot + name, kind, value, None)
            )


def _plain(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield plain tensor attributes, also one level deep inside lists, tuples and dicts."""
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            yield name, value
        elif not name.startswith("_") and isinstance(value, list | tuple | dict):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            yield from (
                (f"{name}[{key!r}]", item) for key, item in items if isinstance(item, Tensor)
            )


def _nnx(model: nnx.Module) -> Iterator[StateEntry]:
    seen: dict[int, KeyPath] = {}
    for path, leaf in _nnx_leaves(model, (), frozenset()):
        first = seen.setdefault(id(leaf), path)
        value = leaf.get_value()
        yield (
            StateEntry(path, "alias", value, first)
            if first != path
            else StateEntry(path, nnx_kind(leaf), value)
        )
    for path, leaf in nnx.iter_graph(model):
        if isinstance(leaf, jax.Array | np.ndarray):
            yield StateEntry(path, "left behind", leaf)


def _nnx_leaves(node: Any, path: KeyPath, above: frozenset[int]) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every Variable with every path to it; `nnx.state` returns each Variable only once."""
    if isinstance(node, nnx.Variable):
        yield path, node
    elif id(node) not in above and nnx.graphlib.is_node(node):
        for name, child in nnx.graphlib.iter_children(node):
            if not str(name).startswith("_pytree__"):
                yield from _nnx_leaves(child, (*path, name), above | {id(node)})


FlaxKind = Literal["linen", "nnx"]


class FlaxSide(NamedTuple):
    """The saved entries of a Flax model.

    Attributes:
        kind: the Flax API of the model.
        leaves: the arrays, or abstract arrays, by path.
        kinds: the kind of state of each path.
        names: the names of each path as strings, without the collection.
        by_name: the paths of each dotted name, without the collection.
        layers: a function that returns the layers and functions of an NNX model, or of a Linen
            module, by path without the collection, as strings. Variables and files have none.
    """

    kind: FlaxKind
    leaves: dict[KeyPath, Any]
    kinds: dict[KeyPath, str]
    names: dict[KeyPath, tuple[str, ...]]
    by_name: dict[str, list[KeyPath]]
    layers: Callable[[], Mapping[tuple[str, ...], Any]] = dict


def flax_side(template: Any) -> FlaxSide:
    """Return the saved entries of Linen variables or an NNX model: no caches, no random streams.

    Raises:
        TypeError: the template is neither, or has a leaf without a shape.
    """
    if isinstance(template, FlaxSide):
        return template
    if isinstance(template, nnx.Module):
        side = _side("nnx", [entry for entry in entries(template) if entry.kind in SAVED])
        return side._replace(layers=partial(_nnx_layers, template))
    if isinstance(template, nnx.State):
        flat = nnx.to_flat_state(template)
        return _side(
            "nnx",
            [
                StateEntry(path, nnx_kind(leaf), leaf.get_value())
                for path, leaf in flat
                if nnx_kind(leaf) in SAVED
            ],
        )
    if isinstance(template, Mapping):
        return _side("linen", [entry for entry in linen_entries(template) if entry.kind in SAVED])
    if isinstance(template, type):
        raise TypeError(f"template is the class {template.__name__}; give an instance of it")
    raise TypeError(
        f"template is {kind_of(template)}; expected Linen variables, as "
        "`jax.eval_shape(module.init, key, inputs)` gives them, or an NNX model"
        + (': give {"params": state.params}' if hasattr(template, "params") else "")
    )


def _nnx_layers(model: nnx.Module) -> dict[tuple[str, ...], Any]:
    return {words(path): node for path, node in nnx.iter_graph(model) if callable(node)}


def specs_side(
    kind: FlaxKind, specs: Mapping[KeyPath, Any], kinds: Mapping[KeyPath, str]
) -> FlaxSide:
    """Return the Flax side of a file. Its shapes are known, and its kinds if it has a manifest."""
    linen_kinds = {path: linen_kind(path) for path in specs} if kind == "linen" else {}
    return _side(
        kind,
        [
            StateEntry(path, kinds.get(path, linen_kinds.get(path, "unknown")), spec)
            for path, spec in specs.items()
        ],
    )


def _side(kind: FlaxKind, saved: list[StateEntry]) -> FlaxSide:
    leaves = {entry.path: entry.value for entry in saved}
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape"):
            raise TypeError(f"template {slashed(path)} is {kind_of(leaf)}; expected an array")
    names = {path: words(path[1:] if kind == "linen" else path) for path in leaves}
    by_name: dict[str, list[KeyPath]] = {}
    for path, name in names.items():
        by_name.setdefault(".".join(name), []).append(path)
    return FlaxSide(kind, leaves, {entry.path: entry.kind for entry in saved}, names, by_name)
