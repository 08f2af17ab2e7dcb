"""Wrappers that put a step before the names of a module: torch.compile, DataParallel and others."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ..files.printable import kind_of
from ..frameworks import nn, nnx, torch

_WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.optim.swa_utils.AveragedModel,
)
# Steps that torch.compile, FSDP and activation checkpointing put before the names of any layer.
INNER_STEPS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def require_torch(source: Any) -> None:
    """Raise TypeError for what is neither a torch module nor its state dict."""
    if isinstance(source, type):
        raise TypeError(f"source is the class {source.__name__}; give an instance of it")
    if isinstance(source, nnx.Module) or not isinstance(source, nn.Module | Mapping):
        raise TypeError(f"source is {kind_of(source)}; expected a torch module or its state dict")


def without_wrapper(module: nn.Module, names: Iterable[str] = ()) -> nn.Module:
    """Return the module within `torch.compile`, DataParallel, DDP and AveragedModel.

    Args:
        module: the module.
        names: torch names or patterns of them. A wrapper that one of them begins with is kept.
    """
    first_steps = {name.partition(".")[0] for name in names}
    while True:
        step = _step(module)
        if step is None or step in first_steps:
            return module
        module = getattr(module, step)


def _step(module: nn.Module) -> str | None:
    """Return the name that a wrapper has for the module in it; None for other modules."""
    # Only who has compiled a module has imported torch._dynamo, which takes a second.
    if "torch._dynamo" in sys.modules and isinstance(module, torch._dynamo.OptimizedModule):
        return "_orig_mod"
    return "module" if isinstance(module, _WRAPPERS) else None


def common_prefix(longer: Iterable[str], shorter: Iterable[str]) -> str:
    """Return the prefix that makes a longer name of each shorter one, or nothing.

    It is `module.` for `module.fc.bias` and `fc.bias`, and `_orig_mod.` for `fc._orig_mod.bias`.
    """
    names, wanted = set(longer), set(shorter)
    if not wanted:
        return ""
    any_wanted = min(wanted)
    prefixes = {name.removesuffix(any_wanted) for name in names if name.endswith(f".{any_wanted}")}
    for prefix in sorted(prefixes, key=len):
        if all(prefix + name in names for name in wanted):
            return prefix
    step = next((step for step in INNER_STEPS if any(step in name for name in names)), "")
    if not step:
        return ""
    bare = {without_prefix(name, step) for name in names}
    if wanted <= bare:
        return step
    outer = common_prefix(bare, wanted)
    return outer + step if outer else ""


def without_prefix(name: str, prefix: str) -> str:
    """Return the torch name without the prefix, which may lack its last dot.

    The steps of torch's inner wrappers are taken off anywhere, if the prefix ends with one.
    """
    if not prefix.endswith(INNER_STEPS):
        return name.removeprefix(prefix).removeprefix("." if prefix else "")
    return _without_steps(name).removeprefix(_without_steps(prefix))


def _without_steps(name: str) -> str:
    return ".".join(step for step in name.split(".") if f"{step}." not in INNER_STEPS)
