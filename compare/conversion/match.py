"""Match torch entries with Flax arrays by name. Shapes are only checked, never used to match."""

import glob
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from ..files.memory import collector_paused
from ..files.printable import kind_of, shown
from ..files.warn import warn
from ..frameworks import Tensor, is_parametrized, linen, torch
from .apply_mapping import same_bits, unfit
from .arguments import require_rules
from .errors import (
    ConversionError,
    Mismatch,
    MismatchEntry,
    Refused,
    TrainingDifference,
    entry_of,
)
from .fold import fold as folded
from .fold import names_of_shared_parts, parts_by_name
from .groups import Shaped, parts_by_key, rules_of, stacks_of
from .inferred_layout import inferred_layout, is_turned
from .layers import (
    compound_rows,
    flax_layouts,
    is_conv1d_of_transformers,
    layer_types,
    refusal,
)
from .layouts import has_own_shape, known_layout, layout
from .mapping import KeyPath, Left, Policy, Refill, Row, StateMapping, slashed
from .paired_layers import PairedLayers, allowing_of, is_frozen
from .parts import Part, Split, as_split, parts_of_sizes
from .policies import decide, require_policy
from .renamed import chosen_layouts, renamed, unused_names, with_nearest
from .state_kinds import FlaxSide, flax_side, one_trained, same_memory, torch_kinds
from .stated import linen_layers
from .suggest import MAX_SUGGESTIONS, Nearest, collection_hint, rename_hint, split_hint, stack_hint
from .tables import table_of
from .tensors import UNINITIALIZED, Untransferable, is_uninitialized, shape_of
from .undecided import Choice, Undecided, is_of_our_attention, questions
from .unmatched import host_values, refill_of
from .wrappers import require_torch, without_wrapper

_FOLDED = "only a part from which"
# The names that a torch leaf may have in Flax.
LEAVES = {
    "weight": ("kernel", "scale", "embedding", "negative_slope", "weight"),
    "running_mean": ("mean", "running_mean"),
    "running_var": ("var", "running_var"),
}
_ADAPTER = (
    "is of a LoRA adapter, which is added to a weight: convert the state of PEFT's "
    "model.merge_and_unload()"
)
LORA = re.compile(r"(^|\.)lora_((embedding_)?[AB]|magnitude_vector)(\.|$)")
# Old GPT-2 files store the causal mask. It may be dropped only if it is the standard causal mask.
LEGACY = re.compile(r"(^|\.)attn\.(bias|masked_bias)$")


def match(
    source: torch.nn.Module | Mapping[str, Any],
    template: Any,
    *,
    rename: Mapping[str, str] | None = None,
    split: Mapping[str, Sequence[str] | Split] | None = None,
    stack: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
    fold: bool = False,
    layouts: Mapping[str, str] | None = None,
    policy: Mapping[str, Policy] | None = None,
    prefix: str = "",
    module: linen.Module | None = None,
    inputs: Any = None,
) -> StateMapping:
    """Pair the entries of a torch module or state dict with those of a Flax model.

    Args:
        source: a module, whose layers say their layout, or a state dict, whose layouts the shapes
            say, or the NNX layers. A kernel that fits in two layouts, as a square matrix does, is
            asked about.
        template: Linen variables or their `jax.eval_shape`, or an NNX model.
        rename: torch names to Flax names, dotted. Each is the whole name of an entry or of a module
            above it; `*` stands for one step: `{"h.*.attn": "blocks.*.attention"}`. The longest
            rule that fits wins: that of more steps, then of fewer `*`, then of more letters.
        split: torch names, as in `rename`, to the Flax names of their parts along the axis of the
            outputs: `{"h.*.qkv": ["h.*.query", "h.*.key", "h.*.value"]}`. The parts lie one after
            another, and may differ in length. Where they alternate head by head, as in GPT-NeoX,
            or lie along another axis, pass `compare.Split` instead of the list.
        stack: numbered torch names to the Flax names of what `nn.scan` or `nnx.vmap` stacks along
            the first axis: `{"layers.*": "layers"}`. The last `*` is the number. Parts of `split`
            are stacked by their own names.
        tied: torch names of copies that one side alone keeps, to the names of the tensors that they
            equal: `{"lm_head.weight": "embed_tokens.weight"}`. A copy in torch is left out if its
            values are the same; one in Flax is made, and must have them on the way back.
        fold: pair plain tensors in the place of what weight norm, spectral norm, pruning and other
            parametrizations store, as `compare.fold` makes them. The mapping is then for these.
        layouts: torch keys (patterns) to layouts of `compare.conversion.layouts`, for tensors whose
            layout neither side shows: `{"head.weight": "flatten:8,4,4"}` for a Linear that follows
            a flattened image.
        policy: torch keys or Flax paths (patterns) to what happens to an entry that exists on one
            side only: `ignore`, `verify` (allow it only if it is the causal mask, or a table of
            positions, sinusoids, rotary frequencies or relative positions) or `refuse`, the
            default. GPT-2's `attn.bias` and `attn.masked_bias` are verified by default. For what
            two layers say differently there is only `ignore`, which allows it:
            `{"conv.padding": "ignore"}`, and `{"scale.kind": "ignore"}` for what one side alone
            trains.
        prefix: what the torch names begin with and the Flax names do not: "module." for a state
            dict of DataParallel. Rules of `rename` see the names without it.
        module: the Linen module of the variables, so that its layers can be compared with torch's.
            An NNX model needs none.
        inputs: with `module`, the arguments of its call: a tuple, or a dict of keywords.

    Returns:
        The mapping, good for both directions. Of a module within `torch.compile`, DataParallel or
        AveragedModel it has the names of the module within, into which the way back leads.

    Raises:
        ConversionError: one list of everything wrong: layers without a counterpart, or that compute
            something else; entries that are missing, unexpected, ambiguous, or differ in shape or
            kind; unused rules.
        ValueError: a layout or a policy that does not exist; a module without inputs.
        TypeError: a rule that is no dict of names; a source or template that is none.

    Warns:
        TrainingDifference: layers that compute the same but are trained in another way.
    """
    side = flax_side(template)
    source = folded(source) if fold else source
    if module is None and inputs is not None:
        raise ValueError("inputs has no effect without module: give the Linen module, too")
    if module is not None:
        if inputs is None:
            raise ValueError(
                "module: its layers exist only when it is called: give inputs=(…,), as its call "
                "takes them"
            )
        layers = linen_layers(module, inputs)
        side = side._replace(layers=lambda: layers)
    with collector_paused():
        mapping, mismatch = pair(
            source,
            side,
            rename=rename,
            split=split,
            stack=stack,
            tied=tied,
            layouts=layouts,
            policy=policy,
            prefix=prefix,
        )
        if mismatch:
            raise ConversionError(mismatch, collection_hint(template) + _advice(mismatch))
    return mapping


def _advice(mismatch: Mismatch) -> str:
    if not (mismatch.unexpected and mismatch.missing):
        return ""
    if any(entry.reason.startswith(_FOLDED) for entry in mismatch.unexpected):
        return "Pass fold=True, or give compare.fold(source). "
    unexpected = {entry.name: entry.found or () for entry in mismatch.unexpected}
    missing = {entry.name: entry.expected or () for entry in mismatch.missing}
    hint = split_hint(unexpected, missing) or stack_hint(unexpected, missing)
    hint = hint or rename_hint(unexpected, missing)
    return hint or (
        'Pair names that differ with rename={"torch.name": "Flax.name"}; '
        "compare.suggest(source, template) proposes rules to look at."
    )


def pair(
    source: torch.nn.Module | Mapping[str, Any],
    template: Any,
    *,
    rename: Mapping[str, str] | None = None,
    split: Mapping[str, Sequence[str] | Split] | None = None,
    stack: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
    layouts: Mapping[str, str] | None = None,
    policy: Mapping[str, Policy] | None = None,
    prefix: str = "",
) -> tuple[StateMapping, Mismatch]:
    """Return the mapping and the list of what does not fit. The arguments are those of `match`."""
    require_rules(
        prefix,
        rename=rename,
        split=split,
        stack=stack,
        tied=tied,
        layouts=layouts,
        policy=policy,
    )
    matcher = _Matcher(
        source,
        template,
        rename or {},
        split or {},
        stack or {},
        tied or {},
        layouts or {},
        policy or {},
        prefix,
    )
    matcher.refuse_unreadable()
    matcher.refuse_layers()
    matcher.pair_compound_layers()
    matcher.pair_parts()
    matcher.pair_stacks()
    matcher.pair_by_name()
    matcher.drop_repeated_paths()
    matcher.pair_copies()
    matcher.pair_aliases()
    mapping, mismatch = matcher.settle()
    if matcher.trained_differently and not mismatch:
        warn("\n".join(matcher.trained_differently), TrainingDifference)
    return mapping, mismatch


class _Matcher:
    """One call of `match`: its arguments, the pairs found so far, and the refused entries."""

    def __init__(
        self,
        source: torch.nn.Module | Mapping[str, Any],
        template: Any,
        rename: Mapping[str, str],
        split: Mapping[str, Sequence[str] | Split],
        stack: Mapping[str, str],
        tied: Mapping[str, str],
        layouts: Mapping[str, str],
        policy: Mapping[str, Policy],
        prefix: str,
    ) -> None:
        require_torch(source)
        if isinstance(source, torch.nn.Module):
            source = without_wrapper(source, (*rename, *split, *stack, *layouts, *policy, prefix))
        self.flax = flax_side(template)
        self.tensors: dict[str, Any] = (
            source.state_dict(keep_vars=True)
            if isinstance(source, torch.nn.Module)
            else dict(source)
        )
        self.layers = layer_types(source)
        self.kinds: dict[str, str] = {
            key: tensor.kind for key, tensor in self.tensors.items() if hasattr(tensor, "kind")
        }
        if isinstance(source, torch.nn.Module):
            kinds = torch_kinds(source)
            # A frozen parameter may pair with either kind, and is then of that kind.
            self.kinds |= {
                key: kind for key, kind in kinds.items() if not is_frozen(self.tensors.get(key))
            }
        self.flax_layers = self.flax.layers()
        self.flax_layouts = flax_layouts(self.flax_layers)
        self.policy, self.used_policies = policy, set[str]()
        for name in layouts.values():
            known_layout(name)
        for rule, decided in policy.items():
            require_policy(rule, decided)
        unnamed = [key for key in self.tensors if not isinstance(key, str)]
        self.refused = [_unnamed(key) for key in unnamed]
        for key in unnamed:
            del self.tensors[key]
        stored_parts = parts_by_name(self.tensors)
        self.parts = {
            key: f"{_FOLDED} {name} is computed ({found.what}): pass fold=True"
            for name, found in stored_parts.items()
            for key in found.keys.values()
        }
        self.parts |= {key: _ADAPTER for key in self.tensors if LORA.search(key)}
        self.tied = tied
        # A copy that torch does not keep is looked for in Flax under its name.
        self.twins = {
            copy: first
            for copy, first in tied.items()
            if copy not in self.tensors and first in self.tensors
        }
        for copy, first in self.twins.items():
            self.tensors[copy] = self.tensors[first]
            self.kinds |= {copy: self.kinds[first]} if first in self.kinds else {}
        rules = rules_of(rename)
        self.names, used = renamed(self.tensors, rules, prefix)
        shared = names_of_shared_parts(stored_parts, self.names, self.flax.by_name)
        self.names |= shared
        self.parts = {key: reason for key, reason in self.parts.items() if key not in shared}
        self.layer_names, used_by_layers = renamed(self.layers, rules, prefix)
        unfitting_names = unused_names(self.tensors, rename, used | used_by_layers, prefix)
        self.trained_differently: list[str] = []
        self.layouts, unused_layouts = chosen_layouts(self.tensors, layouts)
        self.rules = layouts
        self.used_layouts: set[str] = set()
        self.split, self.stack = split, stack
        self.used_stacks: set[str] = set()
        self.part_places: set[str] = set()
        self.refused += [*unfitting_names, *unused_layouts]
        self.rows: list[Row] = []
        self.left: list[Left] = []
        self.done: set[str] = set()
        self.undecided: dict[str, tuple[Choice, str]] = {}
        self.decided: dict[str, str] = {}

    def refuse_unreadable(self) -> None:
        """Refuse the tensors that have no shape yet, once each, and not their Flax paths too."""
        for key in [key for key, tensor in self.tensors.items() if is_uninitialized(tensor)]:
            paths = _candidates(key, self.names[key], self.flax)
            place = slashed(paths[0]) if len(paths) == 1 else ""
            self.refused.append(MismatchEntry(key, place, reason=UNINITIALIZED))
            del self.tensors[key]

    def refuse_layers(self) -> None:
        """Refuse the layers that Flax does not have."""
        for prefix, layer in self.layers.items():
            dot = f"{prefix}." if prefix else ""
            if is_parametrized(layer) and not any(key.startswith(dot) for key in self.parts):
                continue  # Flax stores the parts, too
            if reason := refusal(layer):
                self.refused.append(MismatchEntry(prefix or "the module", "", reason=reason))

    def refuse_unused_layouts(self) -> None:
        """Refuse each rule of `layouts` that fits a key, but was not needed for any."""
        for pattern in self.rules:
            keys = [key for key in self.tensors if fnmatchcase(key, pattern)]
            if keys and not self.used_layouts & {*keys}:
                what = "attention and recurrent layers, and tied or unmatched tensors, take none"
                reason = f"this layout is not used: {what}; leave it out"
                self.refused.append(MismatchEntry(pattern, "", reason=reason))

    def pair_compound_layers(self) -> None:
        """Pair attention, LSTM and GRU, which one framework stores in one piece."""
        self.rows, self.left = compound_rows(self.tensors, self.names, self.flax)
        for row in self.rows:
            flax_kind = self.flax.kinds[row.path]
            torch_kind = self.kinds.get(row.torch_key, flax_kind)
            if error := self._trained_on_one_side(row.torch_key, torch_kind, flax_kind):
                self.refused.append(entry_of(row.torch_key, row.place, error))
        keys = {key for row in self.rows for key in (row.torch_key, row.plus) if key}
        self.done |= keys | {item.torch_key for item in self.left}

    def pair_parts(self) -> None:
        """Pair each part of the tensors that `split` names with the one Flax path of its name.

        Parts of numbered modules that `stack` names are stacked.
        """
        names = self._names_of_parts()
        pieces = {
            (key, index): name for key, (_, own) in names.items() for index, name in enumerate(own)
        }
        stacks = [
            (old, name, numbered)
            for old, new in self.stack.items()
            for name, numbered in stacks_of(pieces, old, new).items()
        ]
        for _, name, numbered in stacks:
            pieces |= dict.fromkeys(numbered.values(), name)
        parts = {
            piece: part
            for key, (rule, own) in names.items()
            for piece, part in self._parts(key, rule, [pieces[key, i] for i in range(len(own))])
        }
        single = parts.keys() - {piece for _, _, numbered in stacks for piece in numbered.values()}
        for piece in [piece for piece in parts if piece in single]:
            self._add_part(piece[0], *parts[piece])
        for old, name, numbered in stacks:
            self.used_stacks.add(old)
            keys = {number: piece[0] for number, piece in numbered.items() if piece in parts}
            if keys:
                _, part = parts[next(piece for piece in numbered.values() if piece in parts)]
                self._pair_stack(old, name, keys, part)

    def _names_of_parts(self) -> dict[str, tuple[Split, list[str]]]:
        """Return the rule of each torch key that is split, and the Flax names of its parts."""
        names: dict[str, tuple[Split, list[str]]] = {}
        for old, given in self.split.items():
            rule = as_split(given)
            keys = [key for key in self.tensors if key not in self.done]
            found = parts_by_key({key: self.names[key] for key in keys}, old, rule.parts)
            if not found:
                self._refuse_rule("split", old, keys)
            names |= {key: (rule, parts) for key, parts in found.items()}
            self.done |= found.keys()
        return names

    def _parts(
        self, key: str, rule: Split, names: Sequence[str]
    ) -> Iterator[tuple[tuple[str, int], tuple[KeyPath, Part]]]:
        """Yield the parts of one tensor with their Flax paths, or refuse the tensor."""
        shape = shape_of(self.tensors[key])
        paths = [_candidates(key, name, self.flax) for name in names]
        for name, found in zip(names, paths, strict=True):
            if len(found) != 1:
                choices = " or ".join(slashed(path) for path in found) or "nothing"
                reason = f"its part {name} could be {choices} in Flax"
                self.refused.append(MismatchEntry(key, "", shape, reason=reason))
        if any(len(found) != 1 for found in paths):
            return
        sizes = [prod(self.flax.leaves[found[0]].shape) for found in paths]
        try:
            parts = parts_of_sizes(sizes, self._axis(key, rule), rule.groups)
            parts[0].shape_in(shape)
        except ValueError as error:
            self.refused.append(entry_of(key, "", error, shape))
            return
        for index, (part, found) in enumerate(zip(parts, paths, strict=True)):
            yield (key, index), (found[0], part)

    def _axis(self, key: str, rule: Split) -> int:
        """Return the axis that is split: 0, or -1 for the last.

        Raises:
            ValueError: it lies between them.
        """
        rank = len(shape_of(self.tensors[key]))
        layer, axis = self.layers.get(key.rpartition(".")[0]), rule.axis
        if axis is None:
            axis = -1 if layer is not None and is_conv1d_of_transformers(layer) else 0
        if axis not in (0, -1, max(rank - 1, 1)):
            raise ValueError(f"axis {axis} cannot be split: pass axis=0, or -1 for the last")
        return 0 if axis == 0 or rank < 2 else -1

    def _add_part(self, key: str, path: KeyPath, part: Part) -> None:
        """Add the row of a part, or refuse it."""
        self.part_places.add(slashed(path))
        try:
            row = self._row(key, path, part=part)
            self.rows.append(replace(row, part=part))
        except Undecided as error:
            self.undecided[key] = error.choice, slashed(path)
        except ValueError as error:
            self.refused.append(entry_of(key, slashed(path), error))

    def _refuse_rule(self, rule: str, old: str, keys: Sequence[str]) -> None:
        """Refuse a split or stack whose name stands for none of the keys."""
        reason = with_nearest(f"this {rule} fits no key", old, Nearest(keys, cutoff=0.5))
        self.refused.append(MismatchEntry(old, "", reason=reason))

    def pair_stacks(self) -> None:
        """Pair each group of numbered tensors that `stack` names with the one path of its name."""
        for old, new in self.stack.items():
            keys = [key for key in self.tensors if key not in self.done]
            groups = stacks_of({key: self.names[key] for key in keys}, old, new)
            if not groups and old not in self.used_stacks:
                self._refuse_rule("stack", old, keys)
            for name, numbered in groups.items():
                self.done |= {*numbered.values()}
                self._pair_stack(old, name, numbered)

    def _pair_stack(
        self, old: str, name: str, numbered: Mapping[int, str], part: Part | None = None
    ) -> None:
        """Add the row of the tensors, or of that part of each, by their numbers, or refuse them."""
        keys = [numbered[number] for number in sorted(numbered)]
        paths = _candidates(keys[0], name, self.flax)
        kinds = {self.kinds[key] for key in keys if key in self.kinds}
        if [*sorted(numbered)] != list(range(len(keys))):
            reason = f"{old} stands for the numbers {sorted(numbered)}; expected 0, 1, 2 and so on"
        elif len(paths) != 1:
            choices = " or ".join(slashed(path) for path in paths) or "nothing"
            reason = f"the stack {name} could be {choices} in Flax"
        elif len(kinds) > 1:
            reason = f"they are of different kinds: {' and '.join(sorted(kinds))}"
        else:
            self._add_stack(keys, paths[0], part)
            return
        self.refused.append(
            MismatchEntry(keys[0], "", shape_of(self.tensors[keys[0]]), reason=reason)
        )

    def _add_stack(self, keys: Sequence[str], path: KeyPath, part: Part | None) -> None:
        self.part_places.add(slashed(path))
        whole = tuple(self.flax.leaves[path].shape)
        try:
            row, *others = (self._row(key, path, part, whole[1:]) for key in keys)
            if differing := [other for other in others if other.layout != row.layout]:
                raise ValueError(
                    f"is laid out as {row.layout}, and {differing[0].torch_key} as "
                    f"{differing[0].layout}: state one with layouts"
                )
            shape = whole if row.shape else None
            self.rows.append(replace(row, shape=shape, stack=tuple(keys), part=part))
        except Undecided as error:
            self.undecided |= {key: (error.choice, slashed(path)) for key in keys}
        except ValueError as error:
            self.refused.append(entry_of(keys[0], slashed(path), error))

    def pair_by_name(self) -> None:
        """Pair every other tensor with the one Flax path of its name."""
        for key in [key for key in self.tensors if key not in self.done]:
            paths = _candidates(key, self.names[key], self.flax)
            if not paths:
                continue
            self.done.add(key)
            if len(paths) > 1:
                choices = " and ".join(shown(slashed(path)) for path in paths)
                reason = f"ambiguous: it could be {choices}; give one another name in Flax"
                self.refused.append(MismatchEntry(key, "", reason=reason))
                continue
            try:
                self.rows.append(self._row(key, paths[0]))
            except Undecided as error:
                self.undecided[key] = error.choice, slashed(paths[0])
            except ValueError as error:
                self.refused.append(entry_of(key, slashed(paths[0]), error))

    def _row(
        self,
        key: str,
        path: KeyPath,
        part: Part | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Row:
        """Return the row of one tensor, of one part of it, or of one slice of the given shape.

        Raises:
            Undecided: it fits in two layouts.
            ValueError: neither side shows the layout, or the kinds of state differ.
        """
        flax_kind = self.flax.kinds[path]
        torch_kind = self.kinds.get(key, flax_kind)
        if key in self.parts and path[-1] != key.rpartition(".")[2]:
            raise ValueError(self.parts[key])
        if error := self._trained_on_one_side(key, torch_kind, flax_kind):
            raise error
        shape = tuple(self.flax.leaves[path].shape) if shape is None else shape
        layer = self.layers.get(key.rpartition(".")[0])
        if chosen := self.layouts.get(key):
            self.used_layouts.add(key)
        tensor = self.tensors[key]
        if part is not None:
            tensor = Shaped(part.shape_in(shape_of(tensor)))
        names = self.flax.names[path]
        flax_layer = self.flax_layers.get(names[:-1])
        is_matrix = layer is None and path[-1] == "kernel" and len(shape) == 2
        if not chosen and is_matrix and is_of_our_attention(key, self.tensors):
            chosen = "transposed"
        name = chosen or inferred_layout(
            key,
            path,
            tensor,
            shape,
            layer,
            flax_layer,
            self.flax_layouts.get(names),
            self.layouts.get("".join(key.rpartition(".")[:2]) + "weight"),
            turned=self._is_conv1d_turned,
        )
        layout(name, shape)
        if is_matrix and not chosen:
            self.decided[key] = name
        known = flax_kind if torch_kind == "unknown" else torch_kind
        kind = {"buffer": "buffer", "statistics": "statistics"}.get(known, "parameter")
        own_shape = shape if has_own_shape(name) else None
        return Row(key, path, name, kind, shape=own_shape)  # type: ignore[arg-type]

    def _trained_on_one_side(self, key: str, torch_kind: str, flax_kind: str) -> Refused | None:
        """Return why the kinds may not differ, or None if they do not, or the policy allows it."""
        name = f"{key}.kind"
        if not one_trained(torch_kind, flax_kind):
            return None
        if decide(name, self.policy, self.used_policies) == "ignore":
            return None
        kinds = f"is a {torch_kind} in torch and a {flax_kind} in Flax"
        return Refused(f"{kinds}: one is trained, the other is not", allowing_of(name))

    @cached_property
    def _is_conv1d_turned(self) -> bool:
        """Whether a Conv1D of transformers fits its Flax kernel only with its axes exchanged."""
        return any(
            is_turned(shape_of(tensor), self.flax.leaves[path].shape)
            for key, tensor in self.tensors.items()
            if key.endswith(".weight")
            and is_conv1d_of_transformers(self.layers.get(key.rpartition(".")[0]))
            for path in _candidates(key, self.names[key], self.flax)
        )

    def drop_repeated_paths(self) -> None:
        """Keep the first row of each Flax path, and refuse the others."""
        first_rows: dict[KeyPath, Row] = {}
        for row in self.rows:
            first = first_rows.setdefault(row.path, row)
            if first is not row:
                reason = (
                    f"would become {row.place}, as {first.torch_key} does: use rename to choose"
                )
                self.refused.append(MismatchEntry(row.torch_key, row.place, reason=reason))
        self.rows = list(first_rows.values())

    def pair_copies(self) -> None:
        """Pair what `tied` says is the same tensor, and one side has once."""
        for copy, first in self.tied.items():
            own = [row for row in self.rows if copy in row.keys]
            firsts = [row for row in self.rows if first in row.keys and row.kind != "alias"]
            reason = self._no_copy(copy, first, own, firsts)
            if reason:
                is_asked = copy in self.undecided or copy in {entry.name for entry in self.refused}
                if not is_asked:
                    self.refused.append(MismatchEntry(copy, "", reason=reason))
            elif copy in self.twins:
                self.rows = [
                    replace(row, torch_key=first, twin=True) if copy in row.keys else row
                    for row in self.rows
                ]
            else:
                self.rows.append(replace(firsts[-1], torch_key=copy, kind="alias", plus=None))
                self.done.add(copy)
        self.rows = [row for row in self.rows if not self.twins.keys() & {*row.keys}]
        for copy in self.twins:
            self.done.discard(copy)
            del self.tensors[copy]

    def _no_copy(
        self, copy: str, first: str, own: Sequence[Row], firsts: Sequence[Row]
    ) -> str | None:
        """Return why the rows of the two tensors cannot be those of a copy, or None."""
        if first not in self.tensors or first in self.twins:
            return f"is tied to {first}, which torch does not have"
        if copy == first or not firsts:
            return f"is tied to {first}, which is no tensor that pairs"
        if any(row.stack or row.plus for row in (*own, *firsts)):
            return f"is tied to {first}, and one of them is stacked, or added to another tensor"
        if copy in self.twins:
            return None if own else "is a copy that neither side has"
        if own or copy not in self.tensors:
            return "is no copy: both sides have it; leave it out of tied"
        if shape_of(self.tensors[copy]) != shape_of(self.tensors[first]):
            shapes = [shape_of(self.tensors[key]) for key in (copy, first)]
            return f"is tied to {first}, but is {shapes[0]}, not {shapes[1]}"
        return None

    def pair_aliases(self) -> None:
        """Pair each key without a Flax path that shares its memory with a paired one."""
        rows_by_memory: dict[Any, Row] = {}
        for row in [row for row in self.rows if not row.stack]:
            memory = _memory(self.tensors[row.torch_key])
            if memory is not None:
                rows_by_memory.setdefault(memory, row)
        for key in [key for key in self.tensors if key not in self.done]:
            first = rows_by_memory.get(_memory(self.tensors[key]))
            if first is not None:
                alias = replace(first, torch_key=key, kind="alias", plus=None)
                self.rows.append(alias)
                self.done.add(key)

    def settle(self) -> tuple[StateMapping, Mismatch]:
        """Apply the policy to entries without a counterpart, and list the remaining ones."""
        self.refuse_unused_layouts()
        self.refused += questions(self.undecided, self.decided, self.tensors)
        used_rules = self.used_policies
        layers = PairedLayers(self.rows, self.layers, self.layer_names, self.flax, self.flax_layers)
        refused, self.trained_differently = layers.judged(self.policy, used_rules)
        self.refused += refused
        self.trained_differently += layers.frozen(self.tensors, self.policy, used_rules)
        unexpected = self._leave_torch_entries(used_rules)
        missing = self._leave_flax_entries(used_rules)
        self.refused += [
            MismatchEntry(rule, "", reason="this policy fits nothing that is left")
            for rule in self.policy.keys() - used_rules
        ]
        unfitting = [entry for row in self.rows for entry in self._unfitting(row)]
        self.refused += [entry for entry in unfitting if entry.reason]
        misshaped = tuple(entry for entry in unfitting if not entry.reason)
        order = {key: index for index, key in enumerate(self.tensors)}
        rows = sorted(self.rows, key=lambda row: (order[row.torch_key], row.twin))
        mapping = StateMapping(tuple(rows), tuple(self.left), self.flax.kind)
        likely = self._suggestions(missing)
        lacking = {tuple(sorted(entry.expected or ())) for entry in missing}
        advice = {
            key: self._advice_on(key, lacking) or likely(key)
            for key in unexpected[:MAX_SUGGESTIONS]
        }
        entries = tuple(
            MismatchEntry(
                key,
                "",
                shape_of(self.tensors[key]),
                reason=self.parts.get(key) or advice.get(key, ""),
            )
            for key in unexpected
        )
        return mapping, Mismatch(tuple(missing), entries, misshaped, tuple(self.refused))

    def _leave_torch_entries(self, used_rules: set[str]) -> list[str]:
        """Leave the torch entries that the policy allows; return the others."""
        unexpected = []
        for key in [key for key in self.tensors if key not in self.done]:
            decided = decide(key, self.policy, used_rules)
            if decided is None and self._is_counter(key):
                decided = "ignore"
            elif decided is None and is_legacy_mask(key, self.tensors[key]):
                decided = "verify"
            if decided in ("ignore", "verify"):
                self.left.append(Left(key, decided, None, self._refill(key, decided)))
            else:
                unexpected.append(key)
        return unexpected

    def _is_counter(self, key: str) -> bool:
        """Return whether the entry counts the batches of a norm beside it."""
        prefix, _, leaf = key.rpartition(".")
        beside = f"{prefix}.running_mean" if prefix else "running_mean"
        is_counter = leaf == "num_batches_tracked" and beside in self.tensors
        return is_counter and shape_of(self.tensors[key]) == ()

    def _refill(self, key: str, decided: str) -> Refill | None:
        """Return how to make the entry again on the way back, if its values are known."""
        tensor = self.tensors[key]
        if decided != "verify" or not isinstance(tensor, Tensor | np.ndarray):
            return None
        try:
            return refill_of(host_values(tensor))
        except Untransferable:
            return None

    def _leave_flax_entries(self, used_rules: set[str]) -> list[MismatchEntry]:
        """Leave the Flax entries that the policy allows; return the others."""
        refused_names = {entry.place for entry in self.refused}
        refused_names |= {place for _, place in self.undecided.values()} | self.part_places
        paired = {row.path for row in self.rows}
        missing: list[MismatchEntry] = []
        for path, leaf in self.flax.leaves.items():
            name = slashed(path)
            if path in paired or name in refused_names:
                continue
            decided = decide(name, self.policy, used_rules)
            if decided in ("ignore", "verify"):
                self.left.append(Left(name, decided, path))
            else:
                expected, key = tuple(leaf.shape), torch_name(path, self.flax)
                reason = self._embedding(key, path) if len(missing) < MAX_SUGGESTIONS else ""
                missing.append(MismatchEntry(key, name, expected=expected, reason=reason))
        return missing

    def _advice_on(self, key: str, lacking: Collection[tuple[int, ...]]) -> str:
        """Return what to do about a torch tensor that Flax does not need, or "".

        Args:
            key: its name.
            lacking: the sizes of the entries that Flax lacks: it may be one of them.
        """
        tensor = self.tensors[key]
        try:
            array = host_values(tensor) if isinstance(tensor, Tensor) else None
        except Untransferable:
            return ""
        table = None if array is None else table_of(array)
        if table is None:
            return "" if tuple(sorted(shape_of(tensor))) in lacking else self._original(key)
        argument = json.dumps({glob.escape(key): "verify"}, ensure_ascii=False)
        return f"its values are a table of {table.pattern}: pass policy={argument} to leave it out"

    def _original(self, key: str) -> str:
        """Return the advice for a torch tensor that is an equal copy of one that pairs, or ""."""
        tensor = self.tensors[key]
        for row in self.rows if isinstance(tensor, Tensor) and tensor.numel() > 1 else ():
            other = self.tensors[row.torch_key]
            if not row.stack and shape_of(other) == shape_of(tensor) and _same_bits(tensor, other):
                return f"it equals {shown(row.torch_key)}: {_tie(key, row.torch_key)}"
        return ""

    def _embedding(self, key: str, path: KeyPath) -> str:
        """Return the advice for a kernel of an embedding's shape, which torch may tie, or ""."""
        shape = tuple(self.flax.leaves[path].shape)
        tables = [
            row.torch_key
            for row in self.rows
            if row.path[-1] == "embedding" and self.flax.leaves[row.path].shape == shape[::-1]
        ]
        if path[-1] != "kernel" or len(shape) != 2 or len(tables) != 1:
            return ""
        return f"if torch uses {shown(tables[0])} there, {_tie(key, tables[0])}"

    def _unfitting(self, row: Row) -> Iterable[MismatchEntry]:
        for key in row.keys:
            entry = unfit(row, key, self.tensors[key], self.flax.leaves[row.path].shape)
            if entry is not None:
                yield entry

    def _suggestions(self, missing: Sequence[MismatchEntry]) -> Callable[[str], str]:
        """Return a function that suggests a missing entry for a torch key.

        It is the only one of this size, or the nearest by name.
        """
        names_by_size: dict[tuple[int, ...], list[str]] = {}
        for entry in missing:
            size = tuple(sorted(entry.expected or ()))
            names_by_size.setdefault(size, []).append(entry.name)
        nearest = Nearest(entry.name for entry in missing)

        def suggest(key: str) -> str:
            alike = names_by_size.get(tuple(sorted(shape_of(self.tensors[key]))), [])
            best = alike[0] if len(alike) == 1 else nearest.to(self.names[key])
            return f"did you mean {shown(best)}?" if best else ""

        return suggest


def _tie(copy: str, first: str) -> str:
    """Return the argument that says that one is a copy of the other."""
    return f"pass tied={json.dumps({copy: first}, ensure_ascii=False)}"


def _same_bits(tensor: Tensor, other: Any) -> bool:
    """Return whether both are the same bits, where their values can be read."""
    try:
        return same_bits(tensor, other)
    except Untransferable:
        return False


def _unnamed(key: Any) -> MismatchEntry:
    reason = f"the key is {kind_of(key)}; a state dict has names: write {str(key)!r}"
    return MismatchEntry(repr(key), "", reason=reason)


def _candidates(key: str, name: str, flax: FlaxSide) -> list[KeyPath]:
    """Return the Flax paths that the torch key may belong to."""
    prefix, _, leaf = name.rpartition(".")
    dot = f"{prefix}." if prefix else ""
    leaves = LEAVES.get(leaf, (leaf,)) if key.rpartition(".")[2] in LEAVES else (leaf,)
    return [path for other in leaves for path in flax.by_name.get(dot + other, ())]


def _memory(tensor: Any) -> Any:
    """Return a key that is the same for all names of one tensor, or None."""
    return same_memory(tensor) if isinstance(tensor, Tensor) else getattr(tensor, "memory", None)


def is_legacy_mask(key: str, tensor: Any) -> bool:
    """Return whether it is the mask of GPT-2's old attention, not the bias of a layer `attn`."""
    return LEGACY.search(key) is not None and len(shape_of(tensor)) != 1


def torch_name(path: KeyPath, flax: FlaxSide) -> str:
    """Return what torch would call the entry if the modules had the same names."""
    *modules, leaf = flax.names[path]
    torch_leaves = {
        "kernel": "weight",
        "scale": "weight",
        "embedding": "weight",
        "negative_slope": "weight",
    }
    statistics = (
        {"mean": "running_mean", "var": "running_var"} if flax.kinds[path] == "statistics" else {}
    )
    return ".".join((*modules, (torch_leaves | statistics).get(leaf, leaf)))
