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


def is_transformed() -> bool:
    """Return whether `torch.func`, forward-mode differentiation or `make_fx` is at work.

    If torch lacks a query, the result is True: the formula is correct in every transform.
    """
    is_functional = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
    is_forward = getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0
    return bool(is_functional()) or is_forward or _is_proxied()


def _is_proxied() -> bool:
    key = getattr(getattr(torch._C, "_TorchDispatchModeKey", None), "PROXY", None)
    get_mode = getattr(torch._C, "_get_dispatch_mode", None)
    return get_mode is None or key is None or get_mode(key) is not None
