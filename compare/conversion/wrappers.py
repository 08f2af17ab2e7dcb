"""Wrappers that put a step before the names of a module: torch.compile, DataParallel and others."""

import sys
from collections.abc import Iterable

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
    # Only who has compiled a module has imported torch._dynamo, which takes a second.
    if "torch._dynamo" in sys.modules and isinstance(module, torch._dynamo.OptimizedModule):
        return "_orig_mod"
    return "module" if isinstance(module, _WRAPPERS) else None


def common_prefix(longer: Iterable[str], shorter: Iterable[str]) -> str:
    """Return what all longer names begin with, and the shorter ones lack, or nothing.

    Each shorter name has to be one of the longer ones without it: `module.` for `module.fc.bias`
    and `fc.bias`.
    """
    names, wanted = set(longer), set(shorter)
    if not names or not wanted:
        return ""
    first, last = min(names), max(names)
    for end in [index + 1 for index, letter in enumerate(first) if letter == "."]:
        prefix = first[:end]
        # What the first and the last begin with, all between them begin with.
        if last.startswith(prefix) and all(prefix + name in names for name in wanted):
            return prefix
    return ""
