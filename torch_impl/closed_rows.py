"""Rows of the mask that block every key: NaN in the formula, and never an operand of a product.

On CPUs with AMX, torch 2.13 multiplies bfloat16 in tiles that read past the end of a row: a NaN or
inf in one row of the left operand reaches the row before it (oneDNN issue 5717). So the weights of
closed rows are set to zero, the product is taken, and the rows are filled with NaN afterwards.
"""

import weakref
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from .attention import reference_attention
from .private_api import is_transformed

# By `id`: the mask, and the number of tokens, version and address with which it had no closed row.
_open_masks: dict[int, tuple[weakref.ref[Tensor], tuple[int, int, int]]] = {}


def closed_rows(
    mask: Shaped[Tensor, "context_length context_length"], num_tokens: int, dtype: torch.dtype
) -> Bool[Tensor, "tokens 1"] | None:
    """Return which of the first `num_tokens` rows block all of as many keys, or None if it is known that none does.

    Args:
        mask: any nonzero entry blocks.
        num_tokens: how many rows and columns are used.
        dtype: the dtype of the products. In bfloat16 and float16 on a CPU the mask is read at every
            call. Otherwise the answer is remembered until the mask's version changes, so a write
            through `.data` or NumPy is not seen here: the row is NaN all the same, by the formula.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return find_closed(mask[:num_tokens, :num_tokens])
    is_read_anew = dtype in (torch.bfloat16, torch.float16) and mask.device.type == "cpu"
    remembered = _open_masks.get(id(mask))
    if remembered is not None and not is_read_anew:
        weak_mask, stamp = remembered
        if weak_mask() is mask and stamp == (num_tokens, mask._version, mask.data_ptr()):
            return None
    closed = find_closed(mask[:num_tokens, :num_tokens])
    is_plain = (
        type(mask) in (Tensor, nn.Parameter) and not mask.is_meta and mask.layout == torch.strided
    )
    if not is_plain or is_traced(mask) or closed.any():
        return closed
    if not is_read_anew and not mask.is_inference():
        key, stamp = id(mask), (num_tokens, mask._version, mask.data_ptr())
        _open_masks[key] = weakref.ref(mask, lambda _: _open_masks.pop(key, None)), stamp
    return None


def find_closed(mask: Shaped[Tensor, "queries keys"]) -> Bool[Tensor, "queries 1"]:
    """Return which rows block every key."""
    return mask.bool().all(dim=-1, keepdim=True)


def is_traced(tensor: Tensor) -> bool:
    """Return whether a compiler or a transform is at work, so that no value may be read."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or is_transformed()
        or torch.is_autocast_enabled(tensor.device.type)
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def guarded_attention(
    queries: Float[Tensor, "*batch tokens head_dim"],
    keys: Float[Tensor, "*batch tokens head_dim"],
    values: Float[Tensor, "*batch tokens head_dim"],
    mask: Shaped[Tensor, "context_length context_length"],
    closed: Bool[Tensor, "tokens 1"] | None,
    dropout: Callable[[Tensor], Tensor] = lambda weights: weights,
) -> Float[Tensor, "*batch tokens head_dim"]:
    """Return what `reference_attention` returns, without multiplying the NaN weights of closed rows."""
    if closed is None:
        return reference_attention(queries, keys, values, mask, dropout)
    lost = torch.full_like(values[..., :1], torch.nan)

    def drop(weights: Tensor) -> Tensor:
        nonlocal lost
        dropped = dropout(weights)
        lost = torch.where(closed, dropped, 0.0).sum(dim=-1, keepdim=True)
        return dropped.masked_fill(closed, 0.0)

    outputs = reference_attention(queries, keys, values, mask, drop)
    return _fill(outputs, closed, lost, values.sum(dim=-2, keepdim=True))


def guarded_projection(
    linear: nn.Module,
    inputs: Float[Tensor, "*batch tokens embed"],
    closed: Bool[Tensor, "tokens 1"] | None,
) -> Float[Tensor, "*batch tokens output_embedding_dim"]:
    """Return `linear(inputs)`, without multiplying the NaN inputs of closed rows."""
    if closed is None or not isinstance(linear, nn.Linear):
        return linear(inputs)
    lost = torch.where(closed, inputs, 0.0).sum(dim=-1, keepdim=True)
    outputs = linear(inputs.masked_fill(closed, 0.0))
    return _fill(outputs, closed, lost, linear.weight.sum(dim=1), linear.bias)


def _fill(
    outputs: Tensor,
    closed: Bool[Tensor, "tokens 1"],
    lost: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Fill the closed rows: NaN where `lost` is NaN, and then so is the gradient of `right`, as in the formula."""
    filled = lost * right if bias is None else lost * right + bias
    return torch.where(closed, filled.to(outputs.dtype), outputs)
