"""The masks that a call is given, as in `torch.nn.MultiheadAttention`: True blocks."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from .attention import blocked_pairs
from .validation import check_pairs, weights_shape


def with_call_masks(
    mask: Shaped[Tensor, "context_length context_length"],
    attn_mask: Bool[Tensor, "*batch queries keys"] | None,
    key_padding_mask: Bool[Tensor, "*batch keys"] | None,
    queries: Float[Tensor, "*batch heads queries head_dim"],
    keys: Float[Tensor, "*batch heads keys head_dim"],
) -> Shaped[Tensor, "*batch queries keys"]:
    """Return the stored mask, or with masks of the call the pairs that any of them blocks.

    Args:
        mask: the stored mask; any nonzero entry blocks.
        attn_mask: True blocks. It is (queries, keys), or (*batch, heads, queries, keys) where any
            axis may be 1, or (batch * heads, queries, keys), as in `torch.nn.MultiheadAttention`.
        key_padding_mask: True where a key is padding, which no query attends to.
        queries: the projected queries.
        keys: the projected keys.

    Raises:
        TypeError: a mask of the call is no tensor.
        ValueError: a mask of the call is not boolean, or has another shape.
    """
    if attn_mask is None and key_padding_mask is None:
        return mask
    num_queries, num_keys = queries.shape[-2], keys.shape[-2]
    weights = weights_shape(queries.shape, keys.shape)
    blocked = blocked_pairs(mask, num_queries, num_keys)[(None,) * (queries.ndim - 2)]
    if attn_mask is not None:
        _check_boolean(attn_mask, "attn_mask")
        is_of_both = len(weights) == 4 and attn_mask.ndim == 3
        if is_of_both and attn_mask.shape[0] == weights[0] * weights[1]:
            attn_mask = attn_mask.unflatten(0, weights[:2])
        check_pairs(attn_mask.shape, weights, "attn_mask")
        blocked = blocked | attn_mask
    if key_padding_mask is not None:
        _check_boolean(key_padding_mask, "key_padding_mask")
        padding = key_padding_mask[..., None, None, :]
        check_pairs(padding.shape, weights, "key_padding_mask, with axes for heads and queries,")
        blocked = blocked | padding
    return blocked


def _check_boolean(mask: Tensor, name: str) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} is a {type(mask).__name__}; expected a torch.Tensor")
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{name} has dtype {mask.dtype}; expected torch.bool, True where a key is blocked"
        )
