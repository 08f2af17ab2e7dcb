"""Load a state dict into a torch module. Everything is checked before anything is changed."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ..conversion.apply_mapping import same_bits
from ..conversion.convert import StateDict
from ..conversion.errors import ConversionError, Mismatch, MismatchEntry, dropping
from ..conversion.mapping import Policy
from ..conversion.policies import decided
from ..conversion.state_kinds import one_trained, same_memory, torch_kinds
from ..conversion.tensors import UNINITIALIZED, is_uninitialized
from ..conversion.unmatched import lacking, objection_to
from ..dtypes import FLOATING
from ..files.interrupts import uninterrupted
from ..files.printable import kind_of
from ..frameworks import Tensor, is_lazy, torch
from .tensors import Spec


def require_fit(
    module: torch.nn.Module,
    specs: Mapping[str, Spec],
    kinds: Mapping[str, str],
    policy: Mapping[str, Policy],
    left: Mapping[str, str],
    cast: bool,
) -> set[str]:
    """Compare names, shapes and dtypes with the module's, and return the names to drop.

    `left` has the mapping's rule for each torch name that Flax has no place for.

    Raises:
        ConversionError: entries do not fit; the error lists all of them.
    """
    module_state = module.state_dict(keep_vars=True)
    wanted = {
        key: entry
        for key, entry in module_state.items()
        if isinstance(entry, Tensor) and not is_lazy(entry)
    }
    lazy = {key for key, entry in module_state.items() if is_uninitialized(entry)}
    tied, module_kinds = _tied(wanted), torch_kinds(module)
    missing = [
        MismatchEntry(key, "the module's", expected=tuple(tensor.shape), reason=reason)
        for key, tensor in wanted.items()
        if key not in specs
        and not _is_counter(module, key, specs)
        and not tied.get(key, set()) & specs.keys()
        and (reason := lacking(tensor, decided(key, policy) or left.get(key))) is not None
    ]
    extra = [key for key in specs if key not in wanted and key not in lazy]
    dropped = {key for key in extra if decided(key, policy) in ("ignore", "verify")}
    unexpected = tuple(
        MismatchEntry(key, "", specs[key].shape) for key in extra if key not in dropped
    )
    misshaped = []
    refused = [
        MismatchEntry(
            key,
            "the module",
            reason=f"is {kind_of(entry)} in the module; only tensors are stored",
            mend="keep it as a buffer, or leave get_extra_state out",
        )
        for key, entry in module_state.items()
        if key not in wanted and key not in lazy
    ]
    refused += [MismatchEntry(key, "the module", reason=UNINITIALIZED) for key in lazy]
    refused += [
        MismatchEntry(
            key,
            "the module",
            reason=f"is a {kinds[key]} in the file and a {module_kinds[key]} in the module",
            mend="register it on both sides alike",
        )
        for key in wanted
        if one_trained(kinds.get(key, "unknown"), module_kinds.get(key, "unknown"))
    ]
    cast_by_to = (*FLOATING, "complex64", "complex128")  # by `module.to(dtype)`
    is_uniform = len({spec.dtype for spec in specs.values() if spec.dtype in cast_by_to}) == 1
    for key in [key for key in wanted if key in specs]:
        if specs[key].shape != tuple(wanted[key].shape):
            misshaped.append(
                MismatchEntry(key, "the module", specs[key].shape, tuple(wanted[key].shape))
            )
        elif reason := _refusal(key, specs[key].dtype, wanted[key], cast, is_uniform):
            refused.append(MismatchEntry(key, "the module", reason=reason))
    mismatch = Mismatch(tuple(missing), unexpected, tuple(misshaped), tuple(refused))
    if mismatch:
        raise ConversionError(mismatch)
    return {key for key in dropped if decided(key, policy) == "ignore"}


def _is_counter(module: torch.nn.Module, key: str, specs: Mapping[str, Any]) -> bool:
    """Return whether the entry counts the batches of a norm, which files of old torch lack.

    torch's own `load_state_dict` keeps the module's value then.
    """
    prefix, _, leaf = key.rpartition(".")
    if leaf != "num_batches_tracked" or key.removesuffix(leaf) + "running_mean" not in specs:
        return False
    return isinstance(module.get_submodule(prefix), torch.nn.modules.batchnorm._NormBase)


def named_by_hooks(module: torch.nn.Module, specs: Mapping[str, Spec]) -> dict[str, str]:
    """Return the names that the module's own hooks give to entries of other names.

    torch's `load_state_dict` calls these hooks first: weight norm's, for example, rename what files
    of old torch call `weight_g`. Here they see tensors without values.
    """
    tensors = [*module.parameters(), *module.buffers()]
    has_hooks = any(child._load_state_dict_pre_hooks for child in module.modules())
    if not has_hooks or any(map(is_uninitialized, tensors)):  # a lazy layer's make its tensors
        return {}
    marks = {
        key: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
        for key, spec in specs.items()
    }
    before, names = _Before.of(module), {}
    try:
        for key, mark in _after_hooks(module, dict(marks), ""):
            names[id(mark)] = key
    except Exception:  # a hook that needs values; loading calls it again
        return {}
    finally:
        with uninterrupted():
            before.restore()
    return {
        key: names[id(mark)]
        for key, mark in marks.items()
        if names.get(id(mark), key) != key and names[id(mark)] not in specs
    }


def _after_hooks(
    module: torch.nn.Module, state: dict[str, Any], prefix: str
) -> Iterator[tuple[str, Any]]:
    """Yield the names of the module's entries and the values that it would get."""
    for hook in module._load_state_dict_pre_hooks.values():
        hook(state, prefix, {}, True, [], [], [])
    for name in (*module._parameters, *module._buffers):
        if prefix + name in state:
            yield prefix + name, state[prefix + name]
    for name, child in module._modules.items():
        if child is not None:
            begin = f"{prefix}{name}."
            inner = {key: value for key, value in state.items() if key.startswith(begin)}
            yield from _after_hooks(child, inner, begin)


def fill_torch(module: torch.nn.Module, state: StateDict) -> Callable[[], torch.nn.Module]:
    """Check the values, and return a function that loads them into the module and returns it.

    Raises:
        ConversionError: names that are tied or overlap in memory in the module have different
            values, or an entry that the module lacks is not the standard causal mask.
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
                    mend="load it into a module that does not tie them",
                )
            )
    refused += _overwritten(wanted, state) if not refused else []
    for key in [key for key in state if key not in wanted]:
        if reason := objection_to(state[key], "verify"):
            shape, mend = tuple(state[key].shape), dropping(key)
            refused.append(MismatchEntry(key, "", shape, reason=reason, mend=mend))
    if refused:
        raise ConversionError(Mismatch(refused=tuple(refused)))
    fitting = {key: tensor for key, tensor in state.items() if key in wanted}

    def assign() -> torch.nn.Module:
        if any(map(_runs_own_code, module.modules())):
            return _load(module, fitting, _Before.of(module))
        with uninterrupted():
            return _load(module, fitting, None)

    return assign


def _load(module: torch.nn.Module, state: StateDict, before: "_Before | None") -> torch.nn.Module:
    """Load a state that was checked; if code of the module's own raises, restore the module."""
    try:
        result = module.load_state_dict(state, strict=False)
        missed = [] if result is None else [*result.missing_keys, *result.unexpected_keys]
        if lost := [key for key in missed if key in state]:
            raise ValueError(f"{lost[0]} was not loaded; hooks give it another name")
    except BaseException as error:
        if before is not None:
            with uninterrupted():
                before.restore()
        if not isinstance(error, Exception):
            raise
        reason = f"load_state_dict failed: {type(error).__name__}: {error}"
        mend = "see what its hooks and its own loading expect"
        entry = MismatchEntry("state", "the module", reason=reason, mend=mend)
        raise ConversionError(Mismatch(refused=(entry,))) from error
    return module


class _Held(NamedTuple):
    """One tensor of a module, and what it was: its memory, its values and whether it is trained."""

    tensor: Tensor
    memory: Tensor
    values: Tensor
    requires_grad: bool


class _Before(NamedTuple):
    """What a module held before its own code ran: tensors, layers and attributes, by name."""

    held: list[_Held]
    names: list[tuple[dict[str, Any], dict[str, Any]]]

    @classmethod
    def of(cls, module: torch.nn.Module) -> "_Before":
        children = list(module.modules())
        names = [
            named
            for child in children
            for named in (vars(child), child._parameters, child._buffers, child._modules)
        ]
        tensors = [
            tensor
            for child in children
            for tensor in (*child._parameters.values(), *child._buffers.values())
            if tensor is not None
        ]
        held = []
        for tensor in [tensor for tensor in tensors if not is_uninitialized(tensor)]:
            memory = tensor.data.as_subclass(Tensor)
            held.append(_Held(tensor, memory, memory.clone(), tensor.requires_grad))
        return cls(held, [(named, dict(named)) for named in names])

    def restore(self) -> None:
        """Put the tensors back under their names, and their memory and values into them."""
        for named, tensors in self.names:
            named.clear()
            named.update(tensors)
        for tensor, memory, values, requires_grad in self.held:
            memory.copy_(values)
            tensor.data = memory
            tensor.requires_grad_(requires_grad)


_OWN = ("_load_from_state_dict", "load_state_dict", "state_dict")
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _runs_own_code(module: torch.nn.Module) -> bool:
    """Return whether loading a state dict into this module runs code other than torch's."""
    hooks = (
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
        module._state_dict_hooks,
        module._state_dict_pre_hooks,
    )
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return bool(
        any(hooks)
        or any(name in vars(module) for name in _OWN)
        or any(not getattr(type(module), name).__module__.startswith("torch.nn.") for name in _OWN)
        or any(type(tensor) not in _PLAIN for tensor in tensors if tensor is not None)
    )


def _overwritten(wanted: Mapping[str, Tensor], state: StateDict) -> list[MismatchEntry]:
    """List the entries that an entry in overlapping memory would overwrite with other values."""
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
                reason = (
                    "lies in the same memory as another entry of the module, "
                    "which has other values here"
                )
                mend = "give the entries memory of their own: `tensor.clone()`"
                refused.append(MismatchEntry(key, "the module", reason=reason, mend=mend))
    return refused


def _view(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """Return a view of another storage with the tensor's offset, shape and strides."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _tied(wanted: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Return all names of each tensor that has several, by each of its names."""
    names_by_memory: dict[Any, set[str]] = {}
    for key, tensor in wanted.items():
        memory = same_memory(tensor)
        if memory is not None:
            names_by_memory.setdefault(memory, set()).add(key)
    return {key: names for names in names_by_memory.values() if len(names) > 1 for key in names}


def _refusal(key: str, dtype: str, expected: Tensor, cast: bool, is_uniform: bool) -> str | None:
    """Return why a tensor of this dtype cannot be copied into the module's tensor, or None.

    `is_uniform` says whether all floating tensors of the file have one dtype.
    """
    file_dtype: torch.dtype = getattr(torch, dtype)
    if expected.is_meta:
        return "the module is on the meta device: `to_empty(device=...)` first"
    if expected.is_inference() and not torch.is_inference_mode_enabled():
        return (
            f"the module's is an inference tensor: `{assignment(key, expected, 'clone()')}` first"
        )
    if reason := _no_memory_of_its_own(key, expected):
        return reason
    floating = file_dtype.is_floating_point and expected.dtype.is_floating_point
    if file_dtype == expected.dtype:
        return None
    # JAX without x64 makes int32 of int64; the way back loses no value.
    may_cast = floating or (file_dtype, expected.dtype) == (torch.int32, torch.int64)
    if may_cast and cast:
        return None
    one = assignment(key, expected, f"to({file_dtype})")
    whole = f"module.to({file_dtype})" if floating and is_uniform else one
    mend = f"`{whole}` first" + (", or pass cast=True" if may_cast else "")
    return f"is {file_dtype}; the module has {expected.dtype}: {mend}"


def _no_memory_of_its_own(key: str, expected: Tensor) -> str | None:
    """Return why values cannot be copied into each entry of a module's tensor, or None."""
    if expected.is_nested:
        return "the module's is a nested tensor; keep its parts one by one"
    if expected.is_quantized or expected.layout != torch.strided:
        call = "dequantize()" if expected.is_quantized else "to_dense()"
        kind = "quantized" if expected.is_quantized else "sparse"
        return f"the module's is a {kind} tensor: `{assignment(key, expected, call)}` first"
    if _overlaps_itself(expected):
        statement = assignment(key, expected, "contiguous()")
        return f"the module's is a view whose entries share memory: `{statement}` first"
    return None


def _overlaps_itself(tensor: Tensor) -> bool:
    """Return whether two entries of a tensor lie at one place, as in an expanded view."""
    steps = sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1
    )
    span, may_overlap = 0, False
    for stride, size in steps:
        may_overlap |= stride <= span
        span += stride * (size - 1)
    if not may_overlap or not tensor.numel():
        return False
    if steps[0][0] == 0:
        return True
    places = torch.zeros(span + 1, dtype=torch.bool)
    places.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(places.sum()) < tensor.numel()


def assignment(key: str, tensor: Tensor, call: str) -> str:
    """Return the statement that replaces a tensor of the module by what a call on it returns."""
    prefix, _, name = key.rpartition(".")
    owner = f"module.get_submodule({prefix!r})" if prefix else "module"
    old = f"{owner}.{name}" if name.isidentifier() else f"getattr({owner}, {name!r})"
    new = f"{old}.{call}"
    if isinstance(tensor, torch.nn.Parameter):
        is_trained = "" if tensor.requires_grad else ", requires_grad=False"
        new = f"torch.nn.Parameter({old}.detach().{call}{is_trained})"
    if name.isidentifier():
        return f"{old} = {new}"
    return f"setattr({owner}, {name!r}, {new})"
