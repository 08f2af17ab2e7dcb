"""The undocumented parts of torch that this package uses; used with torch 2.11 to 2.13.

If torch lacks one of the operators, `torch_impl` still imports and always uses the formula.
"""

from typing import Any

import torch

# The CPU's flash attention. It also returns the logsumexp of the scores.
flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
flash_backward: Any = getattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None
)
# The gradient of a softmax, computed from its output.
softmax_backward: Any = getattr(torch, "_softmax_backward_data", None)

HAS_KERNELS = None not in (flash, flash_backward, softmax_backward)


def active_transforms() -> set[str]:
    """Return the kinds of the transforms of `torch.func` that are at work, such as "Vmap".

    If torch lacks the query, the result is {"unknown"}: the formula is correct in every transform.
    """
    is_active = getattr(torch._C, "_are_functorch_transforms_active", None)
    if is_active is None:
        return {"unknown"}
    if not is_active():
        return set()
    get_stack = getattr(torch._C._functorch, "get_interpreter_stack", lambda: None)
    return {each.key().name for each in get_stack() or ()} or {"unknown"}


def is_forward_mode() -> bool:
    """Return whether a level of forward-mode differentiation is open."""
    return getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


def has_global_hook() -> bool:
    """Return whether a hook is called for every module."""
    return bool(getattr(torch.nn.modules.module, "_has_any_global_hook", lambda: True)())


def is_batched(tensor: torch.Tensor) -> bool:
    """Return whether autograd maps its own backward pass, as in `jacobian(vectorize=True)`."""
    is_legacy_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda _: True)
    return bool(is_legacy_batched(tensor))


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Return whether a transform of `torch.func` maps or differentiates this tensor."""
    return bool(getattr(torch._C._functorch, "is_functorch_wrapped_tensor", lambda _: True)(tensor))


def has_dispatch_mode() -> bool:
    """Return whether a TorchDispatchMode sees every operation.

    `make_fx`, fake tensors, FlopCounterMode and selective checkpointing are such modes.
    """
    return bool(getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)())
