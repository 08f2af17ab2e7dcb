"""Closed rows: rows of the mask that block every key. The formula gives NaN for them.

On CPUs with AMX, torch 2.13 multiplies bfloat16 in tiles that read past the end of a row: a NaN or
inf in one row of the left operand reaches the row before it (oneDNN issue 5717). So the weights
of closed rows are set to zero before the product, and the rows are filled with NaN after it.
"""

import weakref
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .attention import reference_attention
from .context import is_traced

# Masks without closed rows. The key is the mask's `id`; the value is the mask, and the number of
# tokens, the version and the address for which it had no closed row.
_open_masks: dict[int, tuple[weakref.ref[Tensor], tuple[int, int, int]]] = {}


def closed_rows(
    mask: Shaped[Tensor, "context_length context_length"], num_tokens: int, dtype: torch.dtype
) -> Bool[Tensor, "tokens 1"] | None:
    """Return which of the first `num_tokens` rows are closed, or None if no row is closed.

    A row is closed if it blocks all of the first `num_tokens` keys. Where the mask's values cannot
    be read (see `is_traced`), the result is a tensor even if no row is closed.

    Args:
        mask: any nonzero entry blocks.
        num_tokens: how many rows and columns are used.
        dtype: the dtype of the products. In bfloat16 and float16 on a CPU, the mask is read at
            every call. Otherwise the answer is cached until the mask's version changes. A write
            through `.data` or NumPy does not change the version, so it goes unnoticed here; the
            formula still makes the row NaN.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return find_closed(mask[:num_tokens, :num_tokens])
    is_always_read = dtype in (torch.bfloat16, torch.float16) and mask.device.type == "cpu"
    cached = _open_masks.get(id(mask))
    if cached is not None and not is_always_read:
        weak_mask, stamp = cached
        if weak_mask() is mask and stamp == (num_tokens, mask._version, mask.data_ptr()):
            return None
    closed = find_closed(mask[:num_tokens, :num_tokens])
    is_plain = (
        type(mask) in (Tensor, nn.Parameter) and not mask.is_meta and mask.layout == torch.strided
    )
    if not is_plain or is_traced(mask) or closed.any():
        return closed
    if not is_always_read and not mask.is_inference():
        key, stamp = id(mask), (num_tokens, mask._version, mask.data_ptr())
        _open_masks[key] = weakref.ref(mask, lambda _: _open_masks.pop(key, None)), stamp
    return None


def find_closed(mask: Shaped[Tensor, "*batch queries keys"]) -> Bool[Tensor, "*batch queries 1"]:
    """Return which rows block every key."""
    return mask.bool().all(dim=-1, keepdim=True)


def guarded_attention(
    queries: Float[Tensor, "*batch queries head_dim"],
    keys: Float[Tensor, "*keys_batch tokens head_dim"],
    values: Float[Tensor, "*keys_batch tokens value_dim"],
    mask: Shaped[Tensor, "*mask_batch context_length context_length"],
    closed: Bool[Tensor, "*mask_batch queries 1"] | None,
    dropout: Callable[[Tensor], Tensor] = lambda weights: weights,
    scale: float | None = None,
) -> Float[Tensor, "*batch queries value_dim"]:
    """Compute `reference_attention` without multiplying the NaN weights of closed rows."""
    if closed is None:
        return reference_attention(queries, keys, values, mask, dropout, scale)
    weight_sums = torch.full_like(values[..., :1], torch.nan)

    def drop(weights: Tensor) -> Tensor:
        nonlocal weight_sums
        dropped = dropout(weights)
        weight_sums = torch.where(closed, dropped, 0.0).sum(dim=-1, keepdim=True)
        return dropped.masked_fill(closed, 0.0)

    outputs = reference_attention(queries, keys, values, mask, drop, scale)
    return _fill(outputs, closed, weight_sums, values.sum(dim=-2, keepdim=True))


def for_all_heads(
    closed: Bool[Tensor, "*batch heads queries 1"], context: Tensor
) -> Bool[Tensor, "*batch queries 1"] | None:
    """Return which rows are closed in a head, or None where no product leaks into other rows.

    Where a head's row is closed, the guard makes the gradient of all heads' weights NaN.
    """
    is_leaking = context.dtype in (torch.bfloat16, torch.float16) and context.device.type == "cpu"
    return closed.any(dim=-3) if is_leaking else None


def guarded_projection(
    linear: nn.Module,
    inputs: Float[Tensor, "*batch tokens embed"],
    closed: Bool[Tensor, "tokens 1"] | None,
) -> Float[Tensor, "*batch tokens output_embedding_dim"]:
    """Compute `linear(inputs)` without multiplying the NaN inputs of closed rows."""
    # A parametrization such as spectral norm takes a step whenever the weight is read.
    if closed is None or not isinstance(linear, nn.Linear) or parametrize.is_parametrized(linear):
        return linear(inputs)
    input_sums = torch.where(closed, inputs, 0.0).sum(dim=-1, keepdim=True)
    outputs = linear(inputs.masked_fill(closed, 0.0))
    return _fill(outputs, closed, input_sums, linear.weight.sum(dim=1), linear.bias)


def _fill(
    outputs: Tensor,
    closed: Bool[Tensor, "tokens 1"],
    left_sums: Tensor,
    right_sums: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Fill the closed rows of a product: NaN where the sums of the left operand's rows are NaN.

    The gradient of the right operand is then NaN too, as in the formula.
    """
    filled = left_sums * right_sums if bias is None else left_sums * right_sums + bias
    return torch.where(closed, filled.to(outputs.dtype), outputs)
