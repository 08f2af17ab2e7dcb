"""Put a state dict into a torch module: everything is looked at before anything is touched."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from ..convert import StateDict
from ..errors import ConversionError, Entry, Mismatch
from ..left import host_values, objection
from ..mapping import Policy
from ..taxonomy import same_memory
from ..walk import same_bits
from .spec import Spec


def require_fit(
    module: torch.nn.Module,
    specs: Mapping[str, Spec],
    policy: Mapping[str, Policy],
    left: set[str],
    cast: bool,
) -> set[str]:
    """Compare names, shapes and dtypes with the module's; return the file's names that may be dropped.

    Raises:
        ConversionError: everything that does not fit.
    """
    held = module.state_dict()
    wanted = {key: entry for key, entry in held.items() if isinstance(entry, Tensor)}
    tied = _tied(wanted)
    missing = [
        Entry(key, "the module's", expected=tuple(tensor.shape))
        for key, tensor in wanted.items()
        if key not in specs and not tied.get(key, set()) & specs.keys() and not _may_lack(key, tensor, policy, left)
    ]
    extra = [key for key in specs if key not in wanted]
    dropped = {key for key in extra if _decided(key, policy) in ("ignore", "verify")}
    unexpected = tuple(Entry(key, "", specs[key].shape) for key in extra if key not in dropped)
    misshaped = []
    refused = [
        Entry(key, "the module", reason=f"is a {type(entry).__name__} in the module; only tensors are stored")
        for key, entry in held.items()
        if key not in wanted
    ]
    for key in [key for key in wanted if key in specs]:
        if specs[key].shape != tuple(wanted[key].shape):
            misshaped.append(Entry(key, "the module", specs[key].shape, tuple(wanted[key].shape)))
        elif reason := _refusal(key, specs[key].dtype, wanted[key], cast):
            refused.append(Entry(key, "the module", reason=reason))
    mismatch = Mismatch(tuple(missing), unexpected, tuple(misshaped), tuple(refused))
    if mismatch:
        raise ConversionError(mismatch)
    return {key for key in dropped if _decided(key, policy) == "ignore"}


def fill_torch(
    module: torch.nn.Module, state: StateDict, policy: Mapping[str, Policy]
) -> Callable[[], torch.nn.Module]:
    """Look at the values, and return what puts them into the module and returns it.

    Raises:
        ConversionError: names that the module ties have different values, or one that may be dropped only while it
            is the causal mask was edited.
    """
    wanted = {key: entry for key, entry in module.state_dict().items() if isinstance(entry, Tensor)}
    refused = []
    for key, others in _tied(wanted).items():
        first = next((other for other in wanted if other in others and other in state), key)
        if key in state and first != key and not same_bits(state[key], state[first]):
            refused.append(Entry(key, "the module", reason=f"is tied to {first} in the module, and has other values"))
    for key in [key for key in state if key not in wanted]:
        if reason := objection("verify", host_values(state[key])):
            refused.append(Entry(key, "", tuple(state[key].shape), reason=reason))
    if refused:
        raise ConversionError(Mismatch(refused=tuple(refused)))
    fitting = {key: tensor for key, tensor in state.items() if key in wanted}

    def assign() -> torch.nn.Module:
        module.load_state_dict(fitting, strict=False)  # all keys were looked at one by one
        return module

    return assign


def _tied(wanted: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Return, for each name of a tensor that has several, all its names."""
    names: dict[Any, set[str]] = {}
    for key, tensor in wanted.items():
        memory = same_memory(tensor)
        if memory is not None:
            names.setdefault(memory, set()).add(key)
    return {key: found for found in names.values() if len(found) > 1 for key in found}


def _may_lack(key: str, own: Tensor, policy: Mapping[str, Policy], left: set[str]) -> bool:
    decided = _decided(key, policy)
    return key in left or decided == "ignore" or (decided == "verify" and not objection("verify", host_values(own)))


def _decided(key: str, policy: Mapping[str, Policy]) -> Policy | None:
    return next((decided for pattern, decided in policy.items() if fnmatchcase(key, pattern)), None)


def _refusal(key: str, dtype: str, expected: Tensor, cast: bool) -> str:
    """Say why a tensor of that dtype cannot be copied into the module's as it is, or nothing."""
    found: torch.dtype = getattr(torch, dtype)
    if expected.is_meta:
        return "the module is on the meta device: `to_empty(device=...)` first"
    if any(stride == 0 and size > 1 for stride, size in zip(expected.stride(), expected.shape, strict=True)):
        return f"the module's is expanded, many entries in one place: `module.{key} = module.{key}.clone()` first"
    floating = found.is_floating_point and expected.dtype.is_floating_point
    if found == expected.dtype or (cast and floating):
        return ""
    if (found, expected.dtype) == (torch.int32, torch.int64):  # what JAX without x64 made of int64: no value is lost
        return ""
    mend = f"module.to({found})" if floating else f"module.{key} = module.{key}.to({found})"
    return f"is {found}; the module has {expected.dtype}: `{mend}` first"
