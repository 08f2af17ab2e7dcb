"""What this package uses of torch that torch does not document; used with torch 2.11 to 2.13.

A torch that lacks one of these still imports `torch_impl`: everything is then computed by the formula.
"""

from typing import Any

import torch

# The CPU's flash attention, which returns the logarithm of the softmax's divisors too.
flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
flash_backward: Any = getattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None
)
# The gradient of a softmax from its outputs.
softmax_backward: Any = getattr(torch, "_softmax_backward_data", None)

HAS_KERNELS = None not in (flash, flash_backward, softmax_backward)


def is_transformed() -> bool:
    """Return whether a transform of `torch.func` or forward-mode differentiation is at work.

    True where torch no longer tells: the formula is right in every transform.
    """
    is_functional = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
    return bool(is_functional()) or getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0
