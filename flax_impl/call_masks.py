"""The mask that a call is given, as in Flax's attention: an entry of 0 blocks."""

from jax import Array
from jaxtyping import Float, Shaped

from .attention import blocked_pairs, is_nonzero
from .validation import check_pairs, weights_shape


def with_call_mask(
    stored: Shaped[Array, "context_length context_length"],
    mask: Shaped[Array, "*batch_heads queries keys"] | None,
    queries: Float[Array, "*batch heads queries head_dim"],
    keys: Float[Array, "*batch heads keys head_dim"],
) -> Shaped[Array, "*batch_heads queries keys"]:
    """Return the stored mask, or with a mask of the call the pairs that one of them blocks.

    Args:
        stored: the stored mask; any nonzero entry blocks.
        mask: an entry of 0 or False blocks, as in `flax.linen.make_attention_mask`. It is
            (queries, keys), or (*batch, heads, queries, keys) where any axis may be 1.
        queries: the projected queries.
        keys: the projected keys.

    Raises:
        ValueError: the mask has another shape.
    """
    if mask is None:
        return stored
    num_queries, num_keys = queries.shape[-2], keys.shape[-2]
    check_pairs(mask.shape, weights_shape(queries.shape, keys.shape), "mask")
    blocked = blocked_pairs(stored, num_queries, num_keys)[(None,) * (queries.ndim - 2)]
    return blocked | ~is_nonzero(mask)[(None,) * (queries.ndim - mask.ndim)]


def given(inputs: Array, inputs_k: Array | None, inputs_v: Array | None) -> tuple[Array, Array]:
    """Return what keys and values are projected from; values alone would have no keys."""
    if isinstance(inputs_k, bool):
        raise TypeError(f"inputs_k is {inputs_k}: give `deterministic` by its name")
    if inputs_k is None and inputs_v is not None:
        raise ValueError("inputs_v is given without inputs_k: give both, or inputs_k alone")
    inputs_k = inputs if inputs_k is None else inputs_k
    return inputs_k, inputs_k if inputs_v is None else inputs_v
