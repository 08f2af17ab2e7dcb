"""Scaled dot-product attention with a stored mask: the reference formula."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Shaped

from .validation import check_shapes


def causal_mask(context_length: int) -> Float[Array, "context_length context_length"]:
    """Return the float32 mask with 1 above the diagonal: token i cannot attend to token j > i."""
    return jnp.triu(jnp.ones((context_length, context_length), dtype=jnp.float32), k=1)


def is_nonzero(mask: Shaped[Array, "..."]) -> Bool[Array, "..."]:
    """Return which entries are not 0. NaN is not 0.

    The bits are compared, because XLA on the CPU treats subnormal numbers as 0. A NumPy array is
    looked at before JAX narrows it to 32 bits.
    """
    if isinstance(mask, np.ndarray):
        return jnp.asarray(mask != 0)
    if jnp.issubdtype(mask.dtype, jnp.complexfloating):
        return is_nonzero(mask.real) | is_nonzero(mask.imag)
    if not jnp.issubdtype(mask.dtype, jnp.floating):
        return mask.astype(bool)
    if mask.dtype.name == "float8_e8m0fnu":  # powers of 2: this dtype has no 0
        return jnp.ones(mask.shape, bool)
    if jnp.finfo(mask.dtype).bits < 8:
        mask = mask.astype(jnp.float32)  # exact
    bits = jax.lax.bitcast_convert_type(mask, jnp.dtype(f"uint{8 * mask.dtype.itemsize}"))
    if mask.dtype.name.endswith("fnuz"):  # these have no -0.0: its bits are NaN
        return bits != 0
    return bits << 1 != 0  # drop the sign bit: -0.0 counts as 0


def reference_attention(
    queries: Float[Array, "*batch queries head_dim"],
    keys: Float[Array, "*keys_batch tokens head_dim"],
    values: Float[Array, "*keys_batch tokens value_dim"],
    mask: Shaped[Array, "*mask_batch context_length context_length"],
    dropout: Callable[[Array], Array] = lambda weights: weights,
    scale: float | None = None,
) -> Float[Array, "*batch queries value_dim"]:
    """Return softmax(queries @ keys.T / sqrt(head_dim)) @ values over the unblocked keys.

    With a `scale`, the scores are multiplied by it instead.

    If there are fewer queries than keys, as with a cache of keys, they are the last tokens. A mask
    of more than two axes is (*batch, queries, keys), for these queries and keys.

    Any nonzero entry of the mask blocks, whatever its dtype. A row that blocks every key gives NaN.
    A NaN or inf in a blocked value still reaches every row, because 0 * NaN is NaN.

    Source: Vaswani et al., "Attention Is All You Need", section 3.2.1.
    """
    if not queries.shape == keys.shape == values.shape:
        keys, values = for_each_head(queries, keys), for_each_head(queries, values)
        check_shapes(queries.shape, keys.shape, values.shape)
    num_queries, num_tokens, head_dim = queries.shape[-2], *keys.shape[-2:]
    blocked = blocked_pairs(mask, num_queries, num_tokens)  # (..., queries, tokens)
    scores = queries @ keys.mT  # (..., queries, tokens)
    # Before the mask: -inf divided as a complex number is NaN.
    scores = scores / head_dim**0.5 if scale is None else scores * float(scale)
    scores = jnp.where(blocked, -jnp.inf, scores)
    weights = jax.nn.softmax(scores, axis=-1)  # (..., queries, tokens)
    return dropout(weights) @ values  # (..., queries, value_dim)


def blocked_pairs(
    mask: Shaped[Array, "*batch context_length context_length"], num_queries: int, num_tokens: int
) -> Bool[Array, "*batch queries tokens"]:
    """Return which of the first `num_tokens` keys are blocked for each of the last queries."""
    if mask.ndim > 2:  # it is for these queries and keys
        return is_nonzero(mask)
    blocked = is_nonzero(mask[:num_tokens, :num_tokens])
    return blocked[num_tokens - num_queries :] if num_queries < num_tokens else blocked


def for_each_head(
    queries: Float[Array, "*batch queries head_dim"], keys: Float[Array, "*keys_batch tokens width"]
) -> Float[Array, "*batch tokens width"]:
    """Return the keys or values once for each head of the queries, (batch, heads, tokens, width).

    Consecutive heads of queries share one head of keys, as in grouped-query attention.

    Source: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", 2023.
    """
    if queries.ndim < 4 or keys.ndim < 4 or queries.shape[-3] == keys.shape[-3]:
        return keys
    groups, rest = divmod(queries.shape[-3], keys.shape[-3] or 1)
    return keys if rest or keys.shape[-3] == 1 else repeated(keys, groups)


def repeated(
    heads: Float[Array, "*batch heads tokens width"], copies: int
) -> Float[Array, "*batch heads_and_copies tokens width"]:
    """Return each head `copies` times in a row. Heads that are sharded stay where they are."""
    *leading, num_heads, num_tokens, width = heads.shape
    shape = (*leading, num_heads, copies, num_tokens, width)
    each = jnp.broadcast_to(heads[..., None, :, :], shape)
    return each.reshape(*leading, num_heads * copies, num_tokens, width)
