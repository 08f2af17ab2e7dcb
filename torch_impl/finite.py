"""What may be done if every input and every score is finite."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .autocast import without_autocast
from .context import is_differentiated


def are_finite(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Return whether no value and no score is inf or NaN: |q . k| <= head_dim max|q| max|k|."""
    # aminmax is the fastest single pass over a tensor that also propagates NaN and inf.
    tensors = map(_in_memory_order, (queries, keys, values))
    extremes = [extreme for tensor in tensors for extreme in torch.aminmax(tensor)]
    low, high, low_key, high_key, *of_values = torch.stack(extremes).tolist()
    max_score = queries.shape[-1] * max(-low, high) * max(-low_key, high_key)
    return all(map(math.isfinite, of_values)) and max_score <= torch.finfo(queries.dtype).max


def _in_memory_order(tensor: Tensor) -> Tensor:
    """Return the tensor with heads after tokens if they lie so, where one pass is much faster."""
    tensor = tensor.detach()
    is_turned = tensor.ndim > 2 and tensor.stride(-3) < tensor.stride(-2)
    return tensor.transpose(-3, -2) if is_turned else tensor


def finite_attention(
    queries: Float[Tensor, "*batch tokens head_dim"],
    keys: Float[Tensor, "*batch tokens head_dim"],
    values: Float[Tensor, "*batch tokens value_dim"],
    blocked: Bool[Tensor, "*mask_batch tokens tokens"],
    dropout: Callable[[Tensor], Tensor] | None,
) -> Float[Tensor, "*batch tokens value_dim"]:
    """Compute `reference_attention` with fewer copies of the weights, or by the library's kernel.

    The numbers are the same if all scores are finite and no row of the mask is closed. The library
    has no second derivatives, and no weights for the dropout.
    """
    if dropout is None and not is_differentiated(queries, keys, values):
        with without_autocast(queries):
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=~blocked)
    bias = torch.zeros_like(blocked, dtype=queries.dtype).masked_fill_(blocked, -torch.inf)
    scores = (queries @ keys.mT).div_(keys.shape[-1] ** 0.5).add_(bias)
    weights = torch.softmax(scores, dim=-1)
    return (weights if dropout is None else dropout(weights)) @ values
