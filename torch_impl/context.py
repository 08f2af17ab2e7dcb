"""Who runs the attention: Python now, a compiler later, a transform, or somebody who listens."""

from typing import Literal

import torch
from torch import Tensor

from .private_api import active_transforms, has_dispatch_mode, is_forward_mode, is_wrapped

AttentionPath = Literal["formula", "operator", "kernels"]


def possible_path(tensor: Tensor) -> AttentionPath:
    """Return how the attention may be computed, before anything is asked of sizes and values.

    Returns:
        "formula": no decision may depend on the values of a tensor, or somebody looks at each
            operation: export, tracers, the meta device, CUDA graph capture, dispatch modes,
            forward-mode differentiation, and transforms of `torch.func` other than vmap and grad.
        "operator": the values are known when `operator.py` runs: in a compiled program, and in
            vmap and grad.
        "kernels": the values can be read now.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "formula"
    if torch.compiler.is_compiling():
        return "operator"
    transforms = active_transforms()
    is_unreadable = (
        tensor.is_meta
        or is_forward_mode()
        or has_dispatch_mode()
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )
    if is_unreadable or transforms - {"Vmap", "Grad"}:
        return "formula"
    return "operator" if transforms else "kernels"


def is_traced(tensor: Tensor) -> bool:
    """Return whether no decision may depend on the values of a tensor.

    In `vmap` and `grad`, the values of a tensor that they do not map or differentiate can be read.
    """
    path = possible_path(tensor)
    if path == "operator":
        return torch.compiler.is_compiling() or is_wrapped(tensor)
    return path == "formula"


def is_transformed() -> bool:
    """Return whether a transform of `torch.func`, or forward-mode differentiation, is at work."""
    return bool(active_transforms()) or is_forward_mode()


def is_differentiated(*tensors: Tensor) -> bool:
    """Return whether autograd records what is done to one of the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_surely_less(number: int, limit: int) -> bool:
    """Return `number < limit`, and False where a compiler would have to assume one answer."""
    if not torch.compiler.is_compiling():
        return number < limit
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return statically_known_true(number < limit)
