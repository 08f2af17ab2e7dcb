"""The weights that both modules are given: paired by name, as given and drawn again."""

import glob
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..checkpoint.load import load_checkpoint
from ..checkpoint.save import save_checkpoint
from ..conversion.apply_mapping import torch_tensors
from ..conversion.convert import torch_to_linen, torch_to_nnx
from ..conversion.errors import ConversionError, Mismatch, MismatchEntry, TrainingDifference
from ..conversion.layers import KnownState, is_unknown, layer_types
from ..conversion.mapping import KeyPath, StateMapping, slashed
from ..conversion.match import pair
from ..conversion.parts import Part
from ..conversion.proposal import suggest
from ..conversion.state_kinds import flax_side
from ..conversion.tensors import tensor_to_numpy
from ..files.printable import shown
from ..frameworks import Tensor, flatten_dict, nn, nnx
from .flax_side import Leaves, NnxPort, Port
from .result import NamedArrays
from .trees import is_float

_DIFFERS = "computes something else: "


class Paired(NamedTuple):
    """How the state of the two modules pairs.

    Attributes:
        mapping: the mapping.
        differing: what the layers say differently. The runs show what comes of it.
        alone: the names that one side alone has.
        notes: by which rules entries were paired that the user gave no rules for.
    """

    mapping: StateMapping
    differing: list[str]
    alone: list[str]
    notes: tuple[str, ...] = ()


def paired(module: nn.Module, template: Any, rules: Mapping[str, Any]) -> list[Paired]:
    """Return how the state may pair: as the rules say, or as `compare.suggest` proposes.

    There are several ways if nothing says how kernels are laid out. A proposal and a layout are
    guesses; that the two modules are the same function with them, the runs show.

    Raises:
        ConversionError: the state does not pair.
    """
    try:
        return _with_layouts(module, template, rules)
    except ConversionError:
        if rules.get("rename") is not None:
            raise
        proposal = suggest(module, template, prefix=rules.get("prefix", ""))
        if not proposal.rename:
            raise
        try:
            found = _with_layouts(module, template, {**rules, "rename": proposal.rename})
        except ConversionError:
            found = []
        if not found:
            raise
    rename = json.dumps(proposal.rename, ensure_ascii=False)
    note = f"names are paired as compare.suggest proposes: rename={rename}"
    if proposal.in_order:
        note += f"; only their order tells {', '.join(map(shown, proposal.in_order))} apart"
    return [one._replace(notes=(note, *one.notes)) for one in found]


def _with_layouts(module: nn.Module, template: Any, rules: Mapping[str, Any]) -> list[Paired]:
    """Return how the state pairs: in several ways if nothing says how kernels are laid out."""
    try:
        return [_paired(module, template, rules)]
    except ConversionError as error:
        unknown, refused = error, error.mismatch.refused
        if not refused or not all(entry.choices for entry in refused):
            raise
    found = []
    for number in range(max(len(entry.choices) for entry in refused)):
        layouts: dict[str, str] = {}
        for entry in refused:
            layouts |= entry.choices[min(number, len(entry.choices) - 1)]
        given = {**rules, "layouts": {**layouts, **(rules.get("layouts") or {})}}
        argument = json.dumps(layouts, ensure_ascii=False)
        note = f"nothing says how kernels are laid out; the outputs fit layouts={argument}"
        with suppress(ConversionError):
            found.append(_paired(module, template, given)._replace(notes=(note,)))
    if not found:
        raise unknown
    return found


def _paired(module: nn.Module, template: Any, rules: Mapping[str, Any]) -> Paired:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingDifference)
        alone: list[MismatchEntry] = []
        layers = layer_types(module)
        known = {name: layer for name, layer in layers.items() if not is_unknown(layer)}
        source: nn.Module | KnownState = module
        if len(known) < len(layers):  # whether Flax computes the same as the others, the runs show
            source = KnownState(module.state_dict(), known)
        mapping, mismatch = pair(source, template, **rules)
        stated = [entry for entry in mismatch.refused if entry.reason.startswith(_DIFFERS)]
        if stated:
            policy = dict(rules.get("policy") or {})
            policy |= {glob.escape(entry.name): "ignore" for entry in stated}
            mapping, mismatch = pair(source, template, **{**rules, "policy": policy})
        alone = [*mismatch.missing, *mismatch.unexpected]
        is_one_sided = not (mismatch.missing and mismatch.unexpected)
        if alone and is_one_sided and not (mismatch.misshaped or mismatch.refused):
            policy = dict(rules.get("policy") or {}) | {
                glob.escape(entry.policy_name): "ignore" for entry in (*stated, *alone)
            }
            mapping, mismatch = pair(source, template, **{**rules, "policy": policy})
    if mismatch:
        raise ConversionError(mismatch, _advice(mismatch))
    facts = [f"{entry.name}: {entry.reason.removeprefix(_DIFFERS)}" for entry in stated]
    return Paired(mapping, facts, [entry.policy_name for entry in alone])


def _advice(mismatch: Mismatch) -> str:
    return (
        'Pair names that differ with rename={"torch.name": "Flax.name"}; '
        "compare.suggest(torch_module, template) proposes rules to look at."
        if mismatch.missing or mismatch.unexpected
        else ""
    )


def in_float64(tensor: Any) -> Any:
    """Return a tensor or array, in float64 if it is floating."""
    if isinstance(tensor, Tensor):
        return tensor.double() if tensor.is_floating_point() else tensor
    return tensor.astype(np.float64) if is_float(tensor) else tensor


def leaves_for(
    port: Port, template: Any, state: Mapping[str, Any], mapping: StateMapping
) -> Leaves:
    """Return Flax's leaves with the values of a torch state dict."""
    if isinstance(port, NnxPort):
        return _leaves(torch_to_nnx(dict(state), nnx.clone(port.module), mapping=mapping))
    return _leaves(torch_to_linen(dict(state), template, mapping=mapping))


def _leaves(filled: Any) -> Leaves:
    """Return the leaves of an NNX model or of Linen variables."""
    if isinstance(filled, nnx.Module):
        return flax_side(filled).leaves
    return flatten_dict(dict(filled))


def pulled_back(
    mapping: StateMapping,
    gradients: dict[KeyPath, Any],
    reduced: Callable[[NamedArrays], NamedArrays],
) -> NamedArrays:
    """Return gradients by Flax's arrays as gradients by torch's tensors, and empty the dict.

    The mapping moves entries, copies them and adds tensors, so its transpose does the reverse:
    copies are added up, and both tensors of a sum have the gradient of the sum. For what is copied
    or added nowhere, such as buffers, it is the conversion itself. Each is reduced at once.
    """
    found: NamedArrays = {}
    sums: dict[str, dict[int, Any]] = {}  # by tensor, and by the number of its part
    rows = [row for row in mapping.rows if row.path in gradients and row.kind != "alias"]
    last = {row.path: row for row in rows}
    waiting = Counter(key for row in rows for key in row.keys)
    for row in rows:
        made = torch_tensors(row, gradients[row.path])
        if row is last[row.path]:
            del gradients[row.path]
        number = row.part.index if row.part else 0
        for key in made:
            array = tensor_to_numpy(made[row.torch_key if key == row.plus else key])
            of_key = sums.setdefault(key, {})
            of_key[number] = of_key[number] + array if number in of_key else array
            waiting[key] -= 1
            if not waiting[key]:
                found |= reduced(_joined(key, row.part, sums.pop(key)))
    return found


def _joined(key: str, part: Part | None, arrays: dict[int, Any]) -> NamedArrays:
    """Return a tensor by name, of its parts; nothing if some are missing."""
    if part is None:
        return {key: arrays[0]}
    if len(arrays) < part.count:
        return {}
    return {key: part.join([np.ascontiguousarray(arrays[i]) for i in sorted(arrays)])}


def differs_after_a_file(
    state: Mapping[str, Any], port: Port, template: Any, mapping: StateMapping, leaves: Leaves
) -> list[str]:
    """Return the Flax paths whose bits differ when torch's state comes through a file."""
    if not state or not leaves:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(Path(folder) / "state.safetensors", dict(state))
        target = nnx.clone(port.module) if isinstance(port, NnxPort) else template
        again = _leaves(load_checkpoint(path, target, mapping=mapping))
    return sorted(
        slashed(path)
        for path, leaf in leaves.items()
        if path in mapping.by_path
        and np.asarray(again[path]).tobytes() != np.asarray(leaf).tobytes()
    )
