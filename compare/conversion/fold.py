"""Fold weight norm, spectral norm, pruning and other parametrizations into plain tensors.

torch stores what such a tensor is computed from. The value here is that of a call in eval mode.
Sources: `torch.nn.utils.parametrize`, `parametrizations`, `weight_norm`, `spectral_norm`, `prune`.
"""

import copy
import re
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from ..frameworks import (
    SpectralNorm,
    Tensor,
    WeightNorm,
    nn,
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
    torch,
)
from .tensors import as_tensor, shape_of
from .wrappers import require_torch

_SCALED = {"original0": "g", "original1": "v"}
_PARAMETRIZED = re.compile(r"(?P<prefix>(?:.*\.)?)parametrizations\.(?P<leaf>[^.]+)\.(?P<part>.+)")


class Parts(NamedTuple):
    """What a tensor is computed from.

    Attributes:
        what: the method, in words.
        keys: the keys of its parts, by what they are: "g" and "v", "orig" and "mask", ...
    """

    what: str
    keys: dict[str, str]


def parts_by_name(state: Mapping[str, Any]) -> dict[str, Parts]:
    """Return the parts of each tensor of a state dict that is stored as parts, by its name."""
    names = state.keys()
    found: dict[str, dict[str, str]] = {}
    for key in sorted(names):
        if fit := _PARAMETRIZED.fullmatch(key):
            found.setdefault(fit["prefix"] + fit["leaf"], {})[fit["part"]] = key
            continue
        name, _, part = key.rpartition("_")
        if part in ("g", "v", "orig", "mask", "u") and name and name not in names:
            found.setdefault(name, {})[part] = key
    by_name = {}
    for name, parts in found.items():
        if what := _what({part: shape_of(state[key]) for part, key in parts.items()}):
            by_name[name] = Parts(what, parts)
    return by_name


def names_of_shared_parts(
    stored: Mapping[str, Parts], names: Mapping[str, str], flax: Container[str]
) -> dict[str, str]:
    """Return the Flax names of the parts of weight norm that Flax stores as well, by torch key.

    Args:
        stored: the parts of each tensor.
        names: the dotted Flax name of each torch key, with the parts as torch calls them.
        flax: the dotted names in Flax. The parts are called `weight_g` and `weight_v` there.
    """
    shared: dict[str, str] = {}
    for parts in stored.values():
        if parts.what == "weight norm":
            own = {key: _as_before(names[key]) for key in parts.keys.values()}
            shared |= own if all(name in flax for name in own.values()) else {}
    return shared


def _as_before(name: str) -> str:
    """Return the name that torch gave a part of weight norm before it had parametrizations."""
    fit = _PARAMETRIZED.fullmatch(name)
    return name if fit is None else f"{fit['prefix']}{fit['leaf']}_{_SCALED[fit['part']]}"


def _what(parts: Mapping[str, tuple[int, ...]]) -> str:
    """Return the name of the method that stores parts of these shapes, or nothing."""
    stored = parts.keys()
    is_scaled = stored in ({"g", "v"}, {"original0", "original1"})
    if is_scaled and _axis(*(parts[part] for part in sorted(stored))) is not None:
        return "weight norm"
    if stored in ({"orig", "u"}, {"orig", "u", "v"}, {"original", "0._u", "0._v"}):
        return "spectral norm"
    if stored == {"orig", "mask"} and parts["orig"] == parts["mask"]:
        return "pruning"
    is_other = any(part.startswith("original") for part in stored)
    return "a parametrization of torch" if is_other else ""


def _axis(scale: tuple[int, ...], direction: tuple[int, ...]) -> int | None:
    """Return the axis along which weight norm has a scale each, -1 for one scale, or None."""
    if not scale:
        return -1
    for axis, size in enumerate(direction):
        if scale == (*(1 for _ in direction[:axis]), size, *(1 for _ in direction[axis + 1 :])):
            return axis
    return None


def fold(source: Any) -> Any:
    """Return a copy of the module, or of the state dict, with plain tensors for stored parts.

    Args:
        source: a torch module, which stays as it is, or its state dict.

    Raises:
        TypeError: the source is neither, or a key of the state dict is no text.
        ValueError: a state dict does not say how a tensor is computed from its parts.
    """
    require_torch(source)
    if isinstance(source, nn.Module):
        return _folded_module(source)
    if wrong := [key for key in source if not isinstance(key, str)]:
        raise TypeError(
            f"the state dict has the key {wrong[0]!r}; expected names: write '{wrong[0]}'"
        )
    state = dict(source)
    for name, parts in parts_by_name(source).items():
        value = _value(name, parts, source)
        for key in parts.keys.values():
            del state[key]
        state[name] = value
    return state


def _folded_module(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        # A deep copy of what was computed with a gradient is refused by torch.
        computed = [
            value
            for child in module.modules()
            for held in vars(child).values()
            for value in (held if isinstance(held, list | tuple) else (held,))
            if isinstance(value, Tensor) and not value.is_leaf
        ]
        folded = copy.deepcopy(module, {id(value): value.detach().clone() for value in computed})
    modes = {child: child.training for child in folded.modules()}
    folded.eval()  # spectral norm changes its vectors in training
    for child in list(folded.modules()):
        for hook in reversed(list(child._forward_pre_hooks.values())):  # the last one lies inside
            if isinstance(hook, WeightNorm):
                remove_weight_norm(child, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(child, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(child, hook._tensor_name)
        if parametrize.is_parametrized(child):
            _replace_parametrized(child)
    for child, is_training in modes.items():
        child.training = is_training
    return folded


def _replace_parametrized(module: nn.Module) -> None:
    """Replace the parametrized tensors of one module by their values.

    `remove_parametrizations` would change the class, which the copy shares with the original.
    """
    lists: dict[str, Any] = dict(module.parametrizations.items())  # type: ignore[operator, union-attr]
    values = {name: getattr(module, name).detach().clone() for name in lists}
    original_class = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.__class__ = original_class
    for name, stored in lists.items():
        originals = list(stored.parameters(recurse=False))
        if originals:
            is_trained = any(original.requires_grad for original in originals)
            module.register_parameter(name, nn.Parameter(values[name], is_trained))
        else:
            module.register_buffer(name, values[name])


def _value(name: str, parts: Parts, state: Mapping[str, Any]) -> Tensor:
    """Return the value of the tensor, from the parts in a state dict.

    Raises:
        ValueError: the parts do not say how it is computed, or do not fit together.
    """
    tensors = {part: as_tensor(state[key]) for part, key in parts.keys.items()}
    if parts.what == "pruning":
        return tensors["mask"].to(tensors["orig"].dtype) * tensors["orig"]
    if parts.what == "weight norm":
        scale, direction = (tensors[part] for part in sorted(tensors))
        axis = _axis(tuple(scale.shape), tuple(direction.shape))
        if axis is not None:
            return torch._weight_norm(direction, scale, axis)
    raise ValueError(
        f"{name} is stored as the parts of {parts.what}, and a state dict does not say how they "
        "make it: fold its module, with compare.fold(module)"
    )
