"""Find which torch entry belongs to which Flax array: by name. Shapes only verify."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from flax import nnx
from torch import Tensor

from .apply_mapping import unfit
from .errors import ConversionError, Mismatch, MismatchEntry
from .layers import compound_rows, layer_types, nnx_layouts, refusal
from .layouts import layout
from .mapping import KeyPath, Left, Policy, Row, StateMapping, slashed
from .state_kinds import FlaxSide, flax_side, one_trained, same_memory, torch_kinds

# What a torch leaf may be called in Flax.
LEAVES = {
    "weight": ("kernel", "scale", "embedding", "negative_slope", "weight"),
    "running_mean": ("mean", "running_mean"),
    "running_var": ("var", "running_var"),
}
# What GPT-2's attention once stored, and what may be dropped only while it says what anyone would
# recompute.
LEGACY = re.compile(r"(^|\.)attn\.(bias|masked_bias)$")


def match(
    source: torch.nn.Module | Mapping[str, Any],
    template: Any,
    *,
    rename: Mapping[str, str] | None = None,
    layouts: Mapping[str, str] | None = None,
    policy: Mapping[str, Policy] | None = None,
) -> StateMapping:
    """Return the table that pairs the entries of a torch module or state dict with those of a Flax model.

    Args:
        source: a module, whose layers then say their layout themselves, or a state dict. Of a state
            dict a weight of two axes that becomes a kernel is taken for a Linear's, one of three to
            five for a convolution's that is not transposed.
        template: Linen variables or their `jax.eval_shape`, or an NNX model.
        rename: torch name to Flax name, dotted, each the whole name of an entry or of a module
            above it; `*` stands for one step: `{"h.*.attn": "blocks.*.attention"}`. The longest
            rule that fits is taken.
        layouts: torch key (a pattern) to one of `compare.conversion.layouts`, where neither side
            says it: `{"head.weight": "flatten:8,4,4"}` for a Linear behind a flattened image.
        policy: torch key or Flax path (a pattern) to what may happen if the other side lacks it:
            `ignore`, `verify` (only if it is the causal mask that anyone would recompute) or
            `refuse`, the default. GPT-2's `attn.bias` and `attn.masked_bias` are verified unless
            said otherwise.

    Raises:
        ConversionError: everything in one: layers without a counterpart, entries missing,
            unexpected or ambiguous, of another shape or kind, rules that nothing used.
        ValueError: a layout that does not exist.
    """
    mapping, mismatch = pair(source, template, rename=rename, layouts=layouts, policy=policy)
    if mismatch:
        raise ConversionError(
            mismatch, 'Pair names that differ by rename={"torch.name": "Flax.name"}.'
        )
    return mapping


def pair(
    source: torch.nn.Module | Mapping[str, Any],
    template: Any,
    *,
    rename: Mapping[str, str] | None = None,
    layouts: Mapping[str, str] | None = None,
    policy: Mapping[str, Policy] | None = None,
) -> tuple[StateMapping, Mismatch]:
    """Like `match`, with the rows that were found and the list of what does not fit."""
    flax = flax_side(template)
    tensors = (
        source.state_dict(keep_vars=True) if isinstance(source, torch.nn.Module) else dict(source)
    )
    types = layer_types(source)
    kinds = {key: tensor.kind for key, tensor in tensors.items() if hasattr(tensor, "kind")}
    kinds |= torch_kinds(source) if isinstance(source, torch.nn.Module) else {}
    names, refused = _renamed(tensors, rename or {})
    refused += [
        MismatchEntry(prefix, "", reason=reason)
        for prefix, layer in types.items()
        if (reason := refusal(layer))
    ]
    chosen, unused = _chosen_layouts(tensors, layouts or {})
    refused += unused
    hints = nnx_layouts(template) if isinstance(template, nnx.Module) else {}
    rows, left = compound_rows(tensors, names, flax)
    done = (
        {row.torch_key for row in rows}
        | {row.plus for row in rows}
        | {item.torch_key for item in left}
    )
    for key in [key for key in tensors if key not in done]:
        found = _candidates(key, names[key], flax)
        if len(found) > 1:
            places = " and ".join(slashed(path) for path in found)
            refused.append(
                MismatchEntry(
                    key, "", reason=f"ambiguous: it could be {places}; say which by rename"
                )
            )
            done.add(key)
        elif found:
            try:
                rows.append(_row(key, found[0], tensors[key], flax, types, hints, chosen, kinds))
            except ValueError as error:
                refused.append(MismatchEntry(key, slashed(found[0]), reason=str(error)))
            done.add(key)
    rows, twice = _each_once(rows)
    refused += [*twice, *_other_heads(rows, types)]
    rows += _aliases(tensors, rows, done)
    done |= {row.torch_key for row in rows}
    mapping = StateMapping(tuple(_in_order(rows, tensors)), tuple(left), flax=flax.kind)
    return _settled(mapping, tensors, flax, done, names, refused, policy or {})


def _renamed(
    tensors: Iterable[str], rename: Mapping[str, str]
) -> tuple[dict[str, str], list[MismatchEntry]]:
    """Return every torch key under its Flax name, dotted, and the rules that nothing used."""
    rules = sorted(rename.items(), key=lambda rule: -rule[0].count("."))
    patterns = [
        (re.compile(re.escape(old).replace(r"\*", r"([^.]+)") + r"(?=\.|$)"), old, new)
        for old, new in rules
    ]
    names, used = {}, set()
    for key in tensors:
        names[key] = key
        for pattern, old, new in patterns:
            if found := pattern.match(key):
                used.add(old)
                names[key] = _filled(new, found.groups()) + key[found.end() :]
                break
    unused = [
        MismatchEntry(old, "", reason=f"renames to {new}, with another number of *")
        for old, new in rename.items()
        if old.count("*") != new.count("*")
    ]
    unused += [
        MismatchEntry(old, "", reason=_near("this rename rule fits no key", old, tensors))
        for old in rename.keys() - used
    ]
    return names, unused


def _filled(new: str, steps: Sequence[str]) -> str:
    """Return the name with each `*` replaced by the step that the rule's own took."""
    for step in steps:
        new = new.replace("*", step, 1)
    return new


def _chosen_layouts(
    tensors: Iterable[str], layouts: Mapping[str, str]
) -> tuple[dict[str, str], list[MismatchEntry]]:
    chosen: dict[str, str] = {}
    unused = []
    for pattern, name in layouts.items():
        fitting = [key for key in tensors if fnmatchcase(key, pattern)]
        chosen |= dict.fromkeys(fitting, name)
        if not fitting:
            unused.append(
                MismatchEntry(
                    pattern, "", reason=_near("this layout fits no key", pattern, tensors)
                )
            )
    return chosen, unused


def _near(words: str, name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"{words}; did you mean {close[0]}?" if close else words


def _candidates(key: str, name: str, flax: FlaxSide) -> list[KeyPath]:
    """Return the Flax paths that the torch key may belong to."""
    prefix, _, leaf = name.rpartition(".")
    dot = f"{prefix}." if prefix else ""
    leaves = LEAVES.get(leaf, (leaf,)) if key.rpartition(".")[2] in LEAVES else (leaf,)
    return [path for other in leaves for path in flax.by_name.get(dot + other, ())]


def _row(
    key: str,
    path: KeyPath,
    tensor: Any,
    flax: FlaxSide,
    types: Mapping[str, torch.nn.Module],
    hints: Mapping[KeyPath, str],
    chosen: Mapping[str, str],
    kinds: Mapping[str, str],
) -> Row:
    """Return the row of one tensor.

    Raises:
        ValueError: neither side says how the one lies to the other, or their kinds differ.
    """
    kind = flax.kinds[path]
    mine = kinds.get(key, kind)
    if one_trained(mine, kind):
        raise ValueError(
            f"is a {mine} in torch and a {kind} in Flax: one is trained, the other is not"
        )
    shape = tuple(flax.leaves[path].shape)
    layer = types.get(key.rpartition(".")[0])
    name = chosen.get(key) or _layout(key, path, tensor, shape, layer, hints.get(path))
    layout(name, shape)
    known = {"buffer": "buffer", "statistics": "statistics"}.get(mine, "parameter")
    return Row(key, path, name, known, shape=shape if name.startswith("heads") else None)  # type: ignore[arg-type]


def _layout(
    key: str,
    path: KeyPath,
    tensor: Any,
    shape: Sequence[int],
    layer: torch.nn.Module | None,
    hint: str | None,
) -> str:
    """Return the layout that the leaf's name and the layers on both sides say; `hint` is the NNX layer's.

    Raises:
        ValueError: they do not say it.
    """
    leaf, rank, torch_rank = path[-1], len(shape), len(getattr(tensor, "shape", ()))
    if leaf == "negative_slope":
        return "scalar"
    if (
        leaf != "kernel"
        or key.rpartition(".")[2] != "weight"
        or isinstance(layer, torch.nn.Bilinear)
    ):
        return "same"
    transposed = isinstance(layer, torch.nn.modules.conv._ConvTransposeNd)
    if hint in ("conv", "conv_transpose") and (transposed or layer is None):
        return hint
    if hint == "same" and layer is None:
        return hint
    if transposed and hint is None:
        raise ValueError(
            f"the layer is a {type(layer).__name__}, and Flax variables do not say whether theirs was built with "
            f'transpose_kernel: layouts={{"{key}": "conv"}} if True, "conv_transpose" if False, Flax\'s default'
        )
    if rank == 3 and torch_rank == 2 and isinstance(layer, torch.nn.Linear | None):
        if path[-2] in ("query", "key", "value", "out"):
            return "heads_out" if path[-2] == "out" else "heads_in"
        raise ValueError(
            f'one side has two axes, the other three: if these are heads, layouts={{"{key}": "heads_in"}}, or '
            '"heads_out" behind the attention'
        )
    if rank == 2 and isinstance(layer, torch.nn.Linear | None) and hint in (None, "general"):
        return "transposed"
    if (
        rank >= 3
        and isinstance(layer, torch.nn.modules.conv._ConvNd | None)
        and hint is None
        and not transposed
    ):
        return "conv"
    kind = "torch" if layer is None else f"the {type(layer).__name__} in torch"
    raise ValueError(
        f'{kind} does not say how this kernel lies: layouts={{"{key}": "transposed"}}, or another'
    )


def _each_once(rows: Sequence[Row]) -> tuple[list[Row], list[MismatchEntry]]:
    """Return the rows, each Flax path once, and a complaint for each that would be taken twice."""
    taken: dict[KeyPath, Row] = {}
    refused = []
    for row in rows:
        if row.path in taken:
            reason = f"would become {row.place}, as {taken[row.path].torch_key} does: say which by rename"
            refused.append(MismatchEntry(row.torch_key, row.place, reason=reason))
        else:
            taken[row.path] = row
    return list(taken.values()), refused


def _other_heads(rows: Sequence[Row], types: Mapping[str, torch.nn.Module]) -> list[MismatchEntry]:
    """Complain of attention whose number of heads, which no shape in torch shows, is another in Flax."""
    refused = []
    for row in rows:
        layer = types.get(row.torch_key.rpartition(".")[0])
        heads = layer.num_heads if isinstance(layer, torch.nn.MultiheadAttention) else None
        if row.layout == "heads_in" and row.shape and heads not in (None, row.shape[1]):
            reason = f"has {heads} heads in torch and {row.shape[1]} in Flax"
            refused.append(MismatchEntry(row.torch_key, row.place, reason=reason))
    return refused


def allowing(
    mapping: StateMapping,
    tensors: Iterable[str],
    leaves: Mapping[KeyPath, Any],
    policy: Mapping[str, Policy],
) -> StateMapping:
    """Return the table with what it does not know, and the policy allows to be left, among what is left."""
    known = mapping.by_key.keys() | {item.torch_key for item in mapping.left}
    used: set[str] = set()
    left = []
    for key in [key for key in tensors if key not in known]:
        if (decided := _decide(key, policy, used)) in ("ignore", "verify"):
            left.append(Left(key, str(decided)))
    for path in [path for path in leaves if path not in mapping.by_path]:
        place = slashed(path)
        if place not in known and (decided := _decide(place, policy, used)) in ("ignore", "verify"):
            left.append(Left(place, str(decided), path))
    return StateMapping(mapping.rows, (*mapping.left, *left), mapping.flax)


def _aliases(tensors: Mapping[str, Any], rows: Sequence[Row], done: set[Any]) -> list[Row]:
    """Return a row for each key that Flax has no place of its own for, but that shares the memory of one that has."""
    homes: dict[Any, Row] = {}
    for row in rows:
        memory = _memory(tensors[row.torch_key])
        if memory is not None and row.part is None:
            homes.setdefault(memory, row)
    found = []
    for key in [key for key in tensors if key not in done]:
        home = homes.get(_memory(tensors[key]))
        if home is not None:
            found.append(Row(key, home.path, home.layout, "alias", shape=home.shape))
    return found


def _memory(tensor: Any) -> Any:
    """Return what the names of one tensor have in common; a tensor of a file says it itself."""
    return same_memory(tensor) if isinstance(tensor, Tensor) else getattr(tensor, "memory", None)


def _in_order(rows: Iterable[Row], tensors: Mapping[str, Any]) -> list[Row]:
    order = {key: index for index, key in enumerate(tensors)}
    return sorted(rows, key=lambda row: order[row.torch_key])


def _settled(
    mapping: StateMapping,
    tensors: Mapping[str, Any],
    flax: FlaxSide,
    done: set[Any],
    names: Mapping[str, str],
    refused: list[MismatchEntry],
    policy: Mapping[str, Policy],
) -> tuple[StateMapping, Mismatch]:
    """Settle what has no counterpart by the policy, and list what remains."""
    left, unexpected = list(mapping.left), []
    used: set[str] = set()
    for key in [key for key in tensors if key not in done]:
        decided = _decide(key, policy, used)
        if decided is None and key.endswith("num_batches_tracked"):
            decided = "ignore"
        elif decided is None and LEGACY.search(key):
            decided = "verify"
        if decided in ("ignore", "verify"):
            left.append(Left(key, decided))
        else:
            unexpected.append(key)
    homes = {row.path for row in mapping.rows}
    taken = homes | {
        path for entry in refused for path in flax.leaves if slashed(path) == entry.place
    }
    missing, kept = [], []
    for path in [path for path in flax.leaves if path not in taken]:
        place = slashed(path)
        decided = _decide(place, policy, used)
        if decided in ("ignore", "verify"):
            kept.append(Left(place, decided, path))
        else:
            missing.append(
                MismatchEntry(
                    torch_name(path, flax), place, expected=tuple(flax.leaves[path].shape)
                )
            )
    refused += [
        MismatchEntry(rule, "", reason="this policy fits nothing that is left")
        for rule in policy.keys() - used
    ]
    unfitting = [entry for row in mapping.rows for entry in _shapes(row, tensors, flax)]
    refused += [entry for entry in unfitting if entry.reason]
    misshaped = [entry for entry in unfitting if not entry.reason]
    table = StateMapping(mapping.rows, (*left, *kept), mapping.flax)
    extra = tuple(
        MismatchEntry(
            key, "", _shape(tensors[key]), reason=_like(tensors[key], names[key], missing)
        )
        for key in unexpected
    )
    return table, Mismatch(tuple(missing), extra, tuple(misshaped), tuple(refused))


def _decide(name: str, policy: Mapping[str, Policy], used: set[str]) -> Policy | None:
    for pattern, decided in policy.items():
        if fnmatchcase(name, pattern):
            used.add(pattern)
            if decided not in ("ignore", "verify", "refuse"):
                raise ValueError(
                    f"policy {pattern}: there is no {decided!r}; there are ignore, verify and refuse"
                )
            return decided
    return None


def _shapes(row: Row, tensors: Mapping[str, Any], flax: FlaxSide) -> Iterable[MismatchEntry]:
    for key in filter(None, (row.torch_key, row.plus)):
        entry = unfit(row, key, tensors[key], flax.leaves[row.path].shape)
        if entry is not None:
            yield entry


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(getattr(tensor, "shape", ()))


def torch_name(path: KeyPath, flax: FlaxSide) -> str:
    """Return what torch would call the entry if the modules had the same names."""
    *modules, leaf = flax.names[path]
    known = {
        "kernel": "weight",
        "scale": "weight",
        "embedding": "weight",
        "negative_slope": "weight",
    }
    stats = (
        {"mean": "running_mean", "var": "running_var"} if flax.kinds[path] == "statistics" else {}
    )
    return ".".join((*modules, (known | stats).get(leaf, leaf)))


def _like(tensor: Any, name: str, missing: Sequence[MismatchEntry]) -> str:
    """Say which missing entry this one may be: the only one of its size, or near by name."""
    close = get_close_matches(name, [entry.name for entry in missing], n=1)
    size = sorted(_shape(tensor))
    alike = [entry.name for entry in missing if sorted(entry.expected or ()) == size]
    best = alike if len(alike) == 1 else close
    return f"did you mean {best[0]}?" if best else ""
