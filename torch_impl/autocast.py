"""What `torch.autocast` does to a kernel of attention: its inputs are cast, once."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def lowered(tensor: Tensor) -> Tensor:
    """Return the tensor in autocast's dtype, if autocast is active for it.

    Autocast casts float32, bfloat16 and float16 for a product, never float64. Source: PyTorch
    documentation, "Automatic Mixed Precision package", on the ops that autocast to float16.
    """
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensor
    is_cast = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if is_cast else tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which the products of such tensors are computed in their own dtype."""
    return torch.autocast(tensor.device.type, enabled=False)
