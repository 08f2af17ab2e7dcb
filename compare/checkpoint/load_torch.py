"""Put a state dict into a torch module: everything is looked at before anything is touched."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..conversion.apply_mapping import same_bits
from ..conversion.convert import StateDict
from ..conversion.errors import ConversionError, Mismatch, MismatchEntry
from ..conversion.mapping import Policy
from ..conversion.state_kinds import one_trained, same_memory, torch_kinds
from ..conversion.unmatched import decided, host_values, may_lack, objection
from .tensors import Spec


def require_fit(
    module: torch.nn.Module,
    specs: Mapping[str, Spec],
    kinds: Mapping[str, str],
    policy: Mapping[str, Policy],
    left: set[str],
    cast: bool,
) -> set[str]:
    """Compare names, shapes and dtypes with the module's; return the file's names that may be dropped.

    Raises:
        ConversionError: everything that does not fit.
    """
    held = module.state_dict()
    wanted = {
        key: entry
        for key, entry in held.items()
        if isinstance(entry, Tensor) and not is_lazy(entry)
    }
    tied, own_kinds = _tied(wanted), torch_kinds(module)
    missing = [
        MismatchEntry(key, "the module's", expected=tuple(tensor.shape))
        for key, tensor in wanted.items()
        if key not in specs
        and not tied.get(key, set()) & specs.keys()
        and key not in left
        and not may_lack(key, tensor, policy)
    ]
    extra = [key for key in specs if key not in wanted]
    dropped = {key for key in extra if decided(key, policy) in ("ignore", "verify")}
    unexpected = tuple(
        MismatchEntry(key, "", specs[key].shape) for key in extra if key not in dropped
    )
    misshaped = []
    refused = [
        MismatchEntry(
            key,
            "the module",
            reason=f"is a {type(entry).__name__} in the module; only tensors are stored",
        )
        for key, entry in held.items()
        if key not in wanted
    ]
    refused += [
        MismatchEntry(
            key,
            "the module",
            reason=f"is a {kinds[key]} in the file and a {own_kinds[key]} in the module",
        )
        for key in wanted
        if one_trained(kinds.get(key, "unknown"), own_kinds.get(key, "unknown"))
    ]
    for key in [key for key in wanted if key in specs]:
        if specs[key].shape != tuple(wanted[key].shape):
            misshaped.append(
                MismatchEntry(key, "the module", specs[key].shape, tuple(wanted[key].shape))
            )
        elif reason := _refusal(key, specs[key].dtype, wanted[key], cast):
            refused.append(MismatchEntry(key, "the module", reason=reason))
    mismatch = Mismatch(tuple(missing), unexpected, tuple(misshaped), tuple(refused))
    if mismatch:
        raise ConversionError(mismatch)
    return {key for key in dropped if decided(key, policy) == "ignore"}


def fill_torch(module: torch.nn.Module, state: StateDict) -> Callable[[], torch.nn.Module]:
    """Look at the values, and return what puts them into the module and returns it.

    Raises:
        ConversionError: names that the module ties, or keeps in overlapping memory, have different
            values; or an entry without a place that is not the causal mask that anyone would
            recompute.
    """
    wanted = {key: entry for key, entry in module.state_dict().items() if isinstance(entry, Tensor)}
    refused = []
    for key, others in _tied(wanted).items():
        first = next((other for other in wanted if other in others and other in state), key)
        if key in state and first != key and not same_bits(state[key], state[first]):
            refused.append(
                MismatchEntry(
                    key,
                    "the module",
                    reason=f"is tied to {first} in the module, and has other values",
                )
            )
    refused += _overwritten(wanted, state) if not refused else []
    for key in [key for key in state if key not in wanted]:
        if reason := objection("verify", host_values(state[key])):
            refused.append(MismatchEntry(key, "", tuple(state[key].shape), reason=reason))
    if refused:
        raise ConversionError(Mismatch(refused=tuple(refused)))
    fitting = {key: tensor for key, tensor in state.items() if key in wanted}

    def assign() -> torch.nn.Module:
        hooked = any(child._load_state_dict_pre_hooks for child in module.modules())
        before = {key: tensor.clone() for key, tensor in wanted.items()} if hooked else {}
        try:
            module.load_state_dict(fitting, strict=False)  # all keys were looked at one by one
        except Exception as error:  # of a hook that the module has
            with torch.no_grad():
                for key, tensor in before.items():
                    wanted[key].copy_(tensor)
            reason = f"load_state_dict refuses: {type(error).__name__}: {error}"
            raise ConversionError(
                Mismatch(refused=(MismatchEntry("state", "the module", reason=reason),))
            ) from error
        return module

    return assign


def _overwritten(wanted: Mapping[str, Tensor], state: StateDict) -> list[MismatchEntry]:
    """List the entries that another one, which lies in the same memory in part, would overwrite with other values."""
    storages: dict[int, list[str]] = {}
    for key, tensor in wanted.items():
        if key in state and same_memory(tensor) is not None:
            storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(key)
    refused = []
    for keys in [
        keys for keys in storages.values() if len({same_memory(wanted[key]) for key in keys}) > 1
    ]:
        scratch = wanted[keys[0]].untyped_storage().clone()
        views = {key: _view(wanted[key], scratch) for key in keys}
        for key, view in views.items():
            view.copy_(state[key])
        for key, view in views.items():
            if not same_bits(view, state[key].to(view.dtype)):
                reason = "lies in the same memory as another entry of the module, which has other values here"
                refused.append(MismatchEntry(key, "the module", reason=reason))
    return refused


def _view(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """Return what the tensor would be in another storage."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _tied(wanted: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Return, for each name of a tensor that has several, all its names."""
    names: dict[Any, set[str]] = {}
    for key, tensor in wanted.items():
        memory = same_memory(tensor)
        if memory is not None:
            names.setdefault(memory, set()).add(key)
    return {key: found for found in names.values() if len(found) > 1 for key in found}


def _refusal(key: str, dtype: str, expected: Tensor, cast: bool) -> str | None:
    """Say why a tensor of that dtype cannot be copied into the module's as it is, or nothing."""
    found: torch.dtype = getattr(torch, dtype)
    if expected.is_meta:
        return "the module is on the meta device: `to_empty(device=...)` first"
    if expected.is_inference() and not torch.is_inference_mode_enabled():
        return f"the module's is an inference tensor: `module.{key} = module.{key}.clone()` first"
    if any(
        stride == 0 and size > 1
        for stride, size in zip(expected.stride(), expected.shape, strict=True)
    ):
        return f"the module's is expanded, many entries in one place: `module.{key} = module.{key}.clone()` first"
    floating = found.is_floating_point and expected.dtype.is_floating_point
    if found == expected.dtype or (cast and floating):
        return None
    if (found, expected.dtype) == (
        torch.int32,
        torch.int64,
    ):  # what JAX without x64 made of int64: no value is lost
        return None
    mend = f"module.to({found})" if floating else f"module.{key} = module.{key}.to({found})"
    return f"is {found}; the module has {expected.dtype}: `{mend}` first"
