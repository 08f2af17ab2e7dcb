"""Attention one tile of the score matrix at a time, without the tiles that are fully blocked.

The forward pass is the recurrence of FlashAttention. For each strip of queries:

    m, l, acc = -inf, 0, 0            # running maximum, divisor and output of each query
    for each tile of the strip that has an unblocked pair:
        S = queries @ keys.T / sqrt(head_dim), -inf where blocked
        new_m = max(m, max(S))        # max and sum run over the keys of the tile
        P = exp(S - new_m)
        acc = acc * exp(m - new_m) + P @ values
        l = l * exp(m - new_m) + sum(P)
        m = new_m
    out, logsumexp = acc / l, m + log(l)

The backward pass computes P again. Per tile, with D = sum(grad * out) over head_dim:

    P, dP = exp(S - logsumexp), grad @ values.T
    dS = P * (dP - D)
    dq += dS @ keys / sqrt(head_dim); dk += dS.T @ queries / sqrt(head_dim); dv += P.T @ grad

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", and Dao et al.,
"FlashAttention", algorithms 1 and 4.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped

from .attention import is_nonzero, reference_attention
from .mask_tiles import Shape, Tiling, is_causal, tile_shapes, tilings

MAX_HEADS_AT_ONCE = 16  # the memory for the tiles grows with it


class Head(NamedTuple):
    """The inputs of one head: scaled queries, keys, values (tokens, head_dim), and the mask."""

    queries: Array
    keys: Array
    values: Array
    mask: Array


class Rows(NamedTuple):
    """What the backward pass needs of each query."""

    logsumexp: Array  # (tokens,)
    grad: Array  # (tokens, head_dim)
    inner: Array  # (tokens,): the sum of grad * out over head_dim, D in the paper


def fused_attention(
    queries: Float[Array, "*batch tokens head_dim"],
    keys: Float[Array, "*batch tokens head_dim"],
    values: Float[Array, "*batch tokens head_dim"],
    mask: Shaped[Array, "context_length context_length"],
) -> Float[Array, "*batch tokens head_dim"]:
    """Compute `reference_attention` in memory that is linear in the number of tokens.

    The mask is read on the device, so one compiled program serves every mask. bfloat16 and float16
    are computed in float32, or by cuDNN on a GPU if the mask is causal. In the formula, a NaN or
    inf in a blocked value reaches every row through 0 * NaN, and scores that overflow give NaN;
    here they may not. Second derivatives,
    forward over reverse or reverse over reverse, are those of the formula; cuDNN has none.

    Raises:
        TypeError: in `jax.jvp` of this function itself, which `jax.custom_vjp` does not allow.
    """
    is_plain = queries.dtype == keys.dtype == values.dtype
    is_plain = is_plain and queries.shape == keys.shape and keys.shape[:-1] == values.shape[:-1]
    if not is_plain or not queries.size or not values.size:
        return reference_attention(queries, keys, values, mask)
    shape = (*queries.shape[:-1], values.shape[-1])
    attend = _cudnn_if_causal if _cudnn_supports(queries, values) else _attend
    queries, keys, values = (
        jnp.reshape(array, (-1, *array.shape[-2:])) for array in (queries, keys, values)
    )
    return jnp.reshape(attend(queries, keys, values, mask), shape)


def _cudnn_supports(queries: Array, values: Array) -> bool:
    """Return whether cuDNN's flash attention may run: a GPU, half precision and narrow heads."""
    width = queries.shape[-1]
    is_half = queries.dtype in (jnp.bfloat16, jnp.float16)
    return (
        jax.default_backend() == "gpu"
        and is_half
        and values.shape[-1] == width <= 128
        and width % 8 == 0
    )


def _cudnn_if_causal(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    """Use cuDNN if the mask is causal, which is decided on the device, and tiles otherwise.

    The compiled program has both. On devices other than a GPU it has only tiles.
    """

    def decide(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
        return lax.cond(
            is_causal(mask, queries.shape[1]), _cudnn, _attend, queries, keys, values, mask
        )

    return lax.platform_dependent(queries, keys, values, mask, cuda=decide, default=_attend)


def _cudnn(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    # cuDNN takes (batch, tokens, heads, head_dim).
    heads = (array[:, :, None] for array in (queries, keys, values))
    return jax.nn.dot_product_attention(*heads, is_causal=True, implementation="cudnn")[:, :, 0]


@jax.custom_vjp
def _attend(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    return _forward(queries, keys, values, mask)[0]


def _attend_forward(
    queries: Array, keys: Array, values: Array, mask: Array
) -> tuple[Array, tuple[Array, ...]]:
    out, logsumexp = _forward(queries, keys, values, mask)
    return out, (queries, keys, values, mask, out, logsumexp)


def _attend_backward(residuals: tuple[Array, ...], grad: Array) -> tuple[Array | None, ...]:
    return *_backward(*residuals, grad), None


_attend.defvjp(_attend_forward, _attend_backward)


@jax.jit  # traced once for all layers with the same shapes
def _forward_heads(queries: Array, keys: Array, values: Array, mask: Array) -> tuple[Array, Array]:
    """Return the outputs (heads, tokens, head_dim) and the scores' logsumexps (heads, tokens)."""
    tiles = tilings(mask, queries.shape[1])
    return _map_heads(partial(_forward_head, mask, tiles), (queries, keys, values))


@jax.jit
def _backward_heads(
    queries: Array,
    keys: Array,
    values: Array,
    mask: Array,
    out: Array,
    logsumexp: Array,
    grad: Array,
) -> tuple[Array, Array, Array]:
    """Return the gradients of queries, keys and values."""
    tiles = tilings(mask, queries.shape[1])
    return _map_heads(
        partial(_backward_head, mask, tiles), (queries, keys, values, out, logsumexp, grad)
    )


@jax.custom_jvp
def _forward(queries: Array, keys: Array, values: Array, mask: Array) -> tuple[Array, Array]:
    return _forward_heads(queries, keys, values, mask)


@jax.custom_jvp
def _backward(
    queries: Array,
    keys: Array,
    values: Array,
    mask: Array,
    out: Array,
    logsumexp: Array,
    grad: Array,
) -> tuple[Array, Array, Array]:
    return _backward_heads(queries, keys, values, mask, out, logsumexp, grad)


def _map_heads(function: Callable[..., Any], arrays: tuple[Array, ...]) -> Any:
    """Map over the first dimension, at most `MAX_HEADS_AT_ONCE` heads at a time."""
    if arrays[0].shape[0] <= MAX_HEADS_AT_ONCE:
        return jax.vmap(function)(*arrays)
    return lax.map(lambda head: function(*head), arrays, batch_size=MAX_HEADS_AT_ONCE)


@_forward.defjvp
def _forward_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Any, Any]:
    *heads, mask = primals
    out, logsumexp = _forward(*primals)
    _, tangent = jax.jvp(partial(reference_attention, mask=mask), tuple(heads), tangents[:3])
    # Only `_backward` reads the logsumexp, and its rule does not use the tangent.
    return (out, logsumexp), (tangent, jnp.zeros_like(logsumexp))


@_backward.defjvp
def _backward_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Any, Any]:
    *heads, mask, _, _, grad = primals

    def reference(queries: Array, keys: Array, values: Array, grad: Array) -> tuple[Array, ...]:
        return jax.vjp(partial(reference_attention, mask=mask), queries, keys, values)[1](grad)

    # `out` and `logsumexp` are functions of the other inputs, so their tangents are not needed.
    return _backward(*primals), jax.jvp(reference, (*heads, grad), (*tangents[:3], tangents[6]))[1]


def _work_dtype(array: Array) -> Any:
    return jnp.float64 if array.dtype == jnp.float64 else jnp.float32


def _forward_head(
    mask: Shaped[Array, "context_length context_length"],
    tiles: tuple[Tiling, ...],
    queries: Float[Array, "tokens head_dim"],
    keys: Float[Array, "tokens head_dim"],
    values: Float[Array, "tokens head_dim"],
) -> tuple[Float[Array, "tokens head_dim"], Float[Array, " tokens"]]:
    """Return the outputs and the logsumexps of one head."""
    dtype = _work_dtype(queries)
    head = Head(
        queries.astype(dtype) * queries.shape[-1] ** -0.5,
        keys.astype(dtype),
        values.astype(dtype),
        mask,
    )
    results = jnp.zeros_like(head.values), jnp.zeros_like(head.queries[:, 0])
    for shape, tiling in zip(tile_shapes(queries.shape[0]), tiles, strict=True):
        results = lax.fori_loop(
            0, tiling.num_strips, partial(_forward_strip, head, shape, tiling), results
        )
    out, logsumexp = results
    return out.astype(values.dtype), logsumexp


def _forward_strip(
    head: Head, shape: Shape, tiling: Tiling, strip: Int[Array, ""], results: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Add the outputs and the logsumexps of one strip of queries to the results."""
    first_query, is_new = _strip_queries(head, shape, strip)
    queries = _take(head.queries, first_query, shape.queries)

    def add_tile(
        first_key: Int[Array, ""], blocked: Array | None, carry: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        m, l, acc = carry  # noqa: E741
        scores = _scores(queries, _take(head.keys, first_key, shape.keys), blocked)
        new_m = jnp.maximum(m, scores.max(axis=1))
        finite_m = jnp.where(new_m == -jnp.inf, 0.0, new_m)  # -inf - -inf would be NaN
        weights = jnp.exp(scores - finite_m[:, None])
        rescale = jnp.exp(m - finite_m)
        new_acc = acc * rescale[:, None] + weights @ _take(head.values, first_key, shape.keys)
        new_l = l * rescale + weights.sum(axis=1)
        return new_m, new_l, new_acc

    zero_acc = jnp.zeros_like(_take(head.values, first_query, shape.queries))
    zeros = jnp.zeros_like(queries[:, 0])
    carry = (zeros - jnp.inf, zeros, zero_acc)
    m, l, acc = _over_tiles(add_tile, head, shape, tiling, strip, first_query, carry)  # noqa: E741
    out, logsumexp = results
    # A closed row, which blocks every key, has l = 0 and becomes NaN.
    out = _put(out, acc / l[:, None], first_query, is_new)
    return out, _put(logsumexp, m + jnp.log(l), first_query, is_new)


def _backward_head(
    mask: Shaped[Array, "context_length context_length"],
    tiles: tuple[Tiling, ...],
    queries: Float[Array, "tokens head_dim"],
    keys: Float[Array, "tokens head_dim"],
    values: Float[Array, "tokens head_dim"],
    out: Float[Array, "tokens head_dim"],
    logsumexp: Float[Array, " tokens"],
    grad: Float[Array, "tokens head_dim"],
) -> tuple[Array, Array, Array]:
    """Return the gradients of the queries, keys and values of one head."""
    dtype, scale = _work_dtype(queries), queries.shape[-1] ** -0.5
    head = Head(queries.astype(dtype) * scale, keys.astype(dtype), values.astype(dtype), mask)
    grad = grad.astype(dtype)
    rows = Rows(logsumexp, grad, (grad * out.astype(dtype)).sum(axis=1))
    grads = jnp.zeros_like(head.queries), jnp.zeros_like(head.keys), jnp.zeros_like(head.values)
    for shape, tiling in zip(tile_shapes(queries.shape[0]), tiles, strict=True):
        grads = lax.fori_loop(
            0, tiling.num_strips, partial(_backward_strip, head, rows, shape, tiling), grads
        )
    grad_queries, grad_keys, grad_values = grads
    # As in the formula: a closed row, which blocks every key, has NaN weights for every key.
    grad_values = jnp.where((logsumexp > -jnp.inf).all(), grad_values, jnp.nan)
    return (
        (grad_queries * scale).astype(queries.dtype),
        grad_keys.astype(keys.dtype),
        grad_values.astype(values.dtype),
    )


def _backward_strip(
    head: Head,
    rows: Rows,
    shape: Shape,
    tiling: Tiling,
    strip: Int[Array, ""],
    grads: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """Add the gradients through one strip of queries."""
    first_query, is_new = _strip_queries(head, shape, strip)
    queries = _take(head.queries, first_query, shape.queries)
    logsumexp, grad, inner = (_take(array, first_query, shape.queries) for array in rows)
    # Queries that are in the strip before add nothing a second time: their weights are 0. Some of
    # their pairs here may be blocked, and without this, exp(score - logsumexp) would overflow.
    logsumexp = jnp.where(is_new, logsumexp, jnp.inf)

    def add_tile(
        first_key: Int[Array, ""], blocked: Array | None, carry: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        grad_queries, grad_keys, grad_values = carry
        keys = _take(head.keys, first_key, shape.keys)
        values = _take(head.values, first_key, shape.keys)
        weights = jnp.exp(_scores(queries, keys, blocked) - logsumexp[:, None])
        grad_scores = weights * (grad @ values.T - inner[:, None])
        if blocked is not None:
            grad_scores = jnp.where(blocked, 0.0, grad_scores)
        grad_queries = grad_queries + grad_scores @ keys
        grad_keys = _put(
            grad_keys, _take(grad_keys, first_key, shape.keys) + grad_scores.T @ queries, first_key
        )
        grad_values = _put(
            grad_values, _take(grad_values, first_key, shape.keys) + weights.T @ grad, first_key
        )
        return grad_queries, grad_keys, grad_values

    grad_queries, grad_keys, grad_values = grads
    carry = (jnp.zeros_like(queries), grad_keys, grad_values)
    strip_grad_queries, grad_keys, grad_values = _over_tiles(
        add_tile, head, shape, tiling, strip, first_query, carry
    )
    return _put(grad_queries, strip_grad_queries, first_query, is_new), grad_keys, grad_values


def _strip_queries(
    head: Head, shape: Shape, strip: Int[Array, ""]
) -> tuple[Int[Array, ""], Bool[Array, " queries"]]:
    """Return the first query of the strip, and which of its queries are not in the strip before.

    The last strip is moved back to end at the last query, so it may overlap the strip before.
    """
    nominal = strip.astype(jnp.int32) * shape.queries
    first_query = jnp.minimum(nominal, head.queries.shape[0] - shape.queries)
    return first_query, first_query + jnp.arange(shape.queries, dtype=jnp.int32) >= nominal


def _over_tiles(
    add_tile: Callable[[Array, Array | None, tuple[Array, ...]], tuple[Array, ...]],
    head: Head,
    shape: Shape,
    tiling: Tiling,
    strip: Int[Array, ""],
    first_query: Int[Array, ""],
    carry: tuple[Array, ...],
) -> tuple[Array, ...]:
    """Call `add_tile` for every tile of the strip. Tiles without a blocked pair skip the mask."""
    num_open, num_tiles = tiling.num_open[strip], tiling.num_tiles[strip]

    def tile_keys(tile: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """Return the first key of the tile before and after it is moved back to fit."""
        nominal = tiling.first[strip] + tiling.order[strip, tile] * shape.keys
        return nominal, jnp.minimum(nominal, head.keys.shape[0] - shape.keys)

    def blocked_pairs(tile: Int[Array, ""]) -> Bool[Array, "queries keys"]:
        nominal, first_key = tile_keys(tile)
        is_repeated = first_key + jnp.arange(shape.keys, dtype=jnp.int32) < nominal
        return (
            is_nonzero(lax.dynamic_slice(head.mask, (first_query, first_key), shape))
            | is_repeated[None]
        )

    def add_open_tile(tile: Int[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
        return add_tile(tile_keys(tile)[1], None, carry)

    def add_mixed_tile(
        tile: Int[Array, ""], blocked_and_carry: tuple[Array, tuple[Array, ...]]
    ) -> tuple[Array, tuple[Array, ...]]:
        blocked, carry = blocked_and_carry
        # The blocked pairs of the next tile are carried, to be computed once and not per head.
        return blocked_pairs(tile + 1), add_tile(tile_keys(tile)[1], blocked, carry)

    carry = lax.fori_loop(0, num_open, add_open_tile, carry)
    initial = blocked_pairs(num_open), carry
    return lax.fori_loop(num_open, num_tiles, add_mixed_tile, initial)[1]


def _scores(
    queries: Float[Array, "queries head_dim"],
    keys: Float[Array, "keys head_dim"],
    blocked: Bool[Array, "queries keys"] | None,
) -> Float[Array, "queries keys"]:
    scores = queries @ keys.T
    return scores if blocked is None else jnp.where(blocked, -jnp.inf, scores)


def _take(array: Array, start: Int[Array, ""], size: int) -> Array:
    return lax.dynamic_slice_in_dim(array, start, size)


def _put(
    array: Array, rows: Array, start: Int[Array, ""], is_new: Bool[Array, " rows"] | None = None
) -> Array:
    """Return the array with the rows written at `start`, or only those that `is_new` selects."""
    if is_new is not None:
        is_new = is_new.reshape(-1, *[1] * (rows.ndim - 1))
        rows = jnp.where(is_new, rows, _take(array, start, rows.shape[0]))
    return lax.dynamic_update_slice_in_dim(array, rows, start, 0)
