"""Wrappers that put a step before the names of a module: torch.compile, DataParallel and others."""

from collections.abc import Collection, Iterable

import torch
from torch import nn

_WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.optim.swa_utils.AveragedModel,
)


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
    if isinstance(module, torch._dynamo.OptimizedModule):
        return "_orig_mod"
    return "module" if isinstance(module, _WRAPPERS) else None


def common_prefix(longer: Collection[str], shorter: Iterable[str]) -> str:
    """Return what all longer names begin with, and the shorter ones lack, or nothing.

    Each shorter name has to be one of the longer ones without it: `module.` for `module.fc.bias`
    and `fc.bias`.
    """
    wanted = set(shorter)
    if not wanted or not longer:
        return ""
    first = min(longer)
    for name in sorted(wanted):
        for other in [other for other in longer if other.endswith(f".{name}")]:
            prefix = other[: -len(name)]
            rest = {each.removeprefix(prefix) for each in longer if each.startswith(prefix)}
            if first.startswith(prefix) and len(rest) == len(longer) and wanted <= rest:
                return prefix
        return ""
    return ""
