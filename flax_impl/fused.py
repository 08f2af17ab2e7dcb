"""The attention of `reference_attention`, a tile of the score matrix at a time, without the tiles that are closed."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped

from .attention import is_nonzero, reference_attention
from .mask_tiles import Shape, Tiling, is_causal, tile_shapes, tilings

HEADS = 16  # at once; the memory that tiles take grows with it


class Head(NamedTuple):
    """What a tile of scores is made from: scaled queries and keys and values, (tokens, head_dim), and the mask."""

    queries: Array
    keys: Array
    values: Array
    mask: Array


class Rows(NamedTuple):
    """What the gradients need to know of each query: two of shape (tokens,), the gradient (tokens, head_dim)."""

    logsumexp: Array
    grad: Array
    inner: Array  # the sum of gradient * output, over head_dim


def fused_attention(
    queries: Float[Array, "*batch tokens head_dim"],
    keys: Float[Array, "*batch tokens head_dim"],
    values: Float[Array, "*batch tokens head_dim"],
    mask: Shaped[Array, "context_length context_length"],
) -> Float[Array, "*batch tokens head_dim"]:
    """Return what `reference_attention` does, in memory that grows with the tokens and not with their square.

    The mask is looked at on the device: one compiled program serves every mask. bfloat16 and
    float16 are computed in float32, or on a GPU by cuDNN where the mask is causal. A NaN or inf
    behind the mask may stay out of the rows that the formula's 0 * NaN brings it to. Second
    derivatives, forward over reverse or reverse twice, are those of the reference; cuDNN has none.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", and Dao et al.,
    "FlashAttention", algorithms 1 and 4.

    Raises:
        TypeError: in `jax.jvp` of this function itself, which `jax.custom_vjp` does not allow.
    """
    if not queries.size or not values.size:
        return reference_attention(queries, keys, values, mask)
    flat = [jnp.reshape(array, (-1, *array.shape[-2:])) for array in (queries, keys, values)]
    attend = _cudnn_if_causal if _takes_cudnn(queries, values) else _attend
    return jnp.reshape(
        attend(flat[0], flat[1], flat[2], mask), (*queries.shape[:-1], values.shape[-1])
    )


def _takes_cudnn(queries: Array, values: Array) -> bool:
    """Tell whether cuDNN's flash attention, where there is one, takes the dtype and the width of the heads."""
    width = queries.shape[-1]
    is_half = queries.dtype in (jnp.bfloat16, jnp.float16)
    return (
        jax.default_backend() == "gpu"
        and is_half
        and values.shape[-1] == width <= 128
        and width % 8 == 0
    )


def _cudnn_if_causal(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    """Decide on the device: both are in the compiled program, and on another device than a GPU only tiles."""

    def decide(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
        return lax.cond(
            is_causal(mask, queries.shape[1]), _cudnn, _attend, queries, keys, values, mask
        )

    return lax.platform_dependent(queries, keys, values, mask, cuda=decide, default=_attend)


def _cudnn(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    heads = (
        array[:, :, None] for array in (queries, keys, values)
    )  # (batch, tokens, heads, head_dim)
    return jax.nn.dot_product_attention(*heads, is_causal=True, implementation="cudnn")[:, :, 0]


@jax.custom_vjp
def _attend(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    return _forward(queries, keys, values, mask)[0]


def _attend_forward(
    queries: Array, keys: Array, values: Array, mask: Array
) -> tuple[Array, tuple[Array, ...]]:
    out, logsumexp = _forward(queries, keys, values, mask)
    return out, (queries, keys, values, mask, out, logsumexp)


def _attend_backward(kept: tuple[Array, ...], grad: Array) -> tuple[Array | None, ...]:
    return *_backward(*kept, grad), None


_attend.defvjp(_attend_forward, _attend_backward)


@jax.jit  # so that it is traced once for all layers of the same shapes
def _forward_heads(queries: Array, keys: Array, values: Array, mask: Array) -> tuple[Array, Array]:
    """Return the outputs, (heads, tokens, head_dim), and the logarithms of the softmax's divisors, (heads, tokens)."""
    tiles = tilings(mask, queries.shape[1])
    return _by_heads(partial(_forward_head, mask, tiles), (queries, keys, values))


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
    return _by_heads(
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


def _by_heads(function: Callable[..., Any], heads: tuple[Array, ...]) -> Any:
    """Map over the first dimension, so many heads at once that their tiles stay small."""
    if heads[0].shape[0] <= HEADS:
        return jax.vmap(function)(*heads)
    return lax.map(lambda head: function(*head), heads, batch_size=HEADS)


@_forward.defjvp
def _forward_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Any, Any]:
    *heads, mask = primals
    out, logsumexp = _forward(*primals)
    tangent = jax.jvp(partial(reference_attention, mask=mask), tuple(heads), tangents[:3])[1]
    # Only `_backward` is given the logsumexp, and its rule asks for no tangent of it.
    return (out, logsumexp), (tangent, jnp.zeros_like(logsumexp))


@_backward.defjvp
def _backward_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Any, Any]:
    *heads, mask, _, _, grad = primals

    def reference(queries: Array, keys: Array, values: Array, grad: Array) -> tuple[Array, ...]:
        return jax.vjp(partial(reference_attention, mask=mask), queries, keys, values)[1](grad)

    # `out` and `logsumexp` are functions of the rest, so their tangents say nothing new.
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
    dtype = _work_dtype(queries)
    head = Head(
        queries.astype(dtype) * queries.shape[-1] ** -0.5,
        keys.astype(dtype),
        values.astype(dtype),
        mask,
    )
    found = jnp.zeros_like(head.values), jnp.zeros_like(head.queries[:, 0])
    for shape, tiling in zip(tile_shapes(queries.shape[0]), tiles, strict=True):
        found = lax.fori_loop(
            0, tiling.num_strips, partial(_forward_strip, head, shape, tiling), found
        )
    return found[0].astype(values.dtype), found[1]


def _forward_strip(
    head: Head, shape: Shape, tiling: Tiling, number: Int[Array, ""], found: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Add the outputs of one strip of queries."""
    at, is_new = _strip(head, shape, number)
    queries = _take(head.queries, at, shape.queries)

    def add(
        at_key: Int[Array, ""], blocked: Array | None, sums: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        largest, divisor, context = sums
        scores = _scores(queries, _take(head.keys, at_key, shape.keys), blocked)
        new_largest = jnp.maximum(largest, scores.max(axis=1))
        base = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)  # -inf - -inf would be NaN
        weights = jnp.exp(scores - base[:, None])
        shrink = jnp.exp(largest - base)
        context = context * shrink[:, None] + weights @ _take(head.values, at_key, shape.keys)
        return new_largest, divisor * shrink + weights.sum(axis=1), context

    context = jnp.zeros_like(_take(head.values, at, shape.queries))
    zeros = jnp.zeros_like(queries[:, 0])
    sums = (zeros - jnp.inf, zeros, context)
    largest, divisor, context = _over_tiles(add, head, shape, tiling, number, at, sums)
    outs, logsumexps = found
    # A row without an open key has the divisor 0, so that it is NaN.
    outs = _put(outs, context / divisor[:, None], at, is_new)
    return outs, _put(logsumexps, largest + jnp.log(divisor), at, is_new)


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
    dtype, scale = _work_dtype(queries), queries.shape[-1] ** -0.5
    head = Head(queries.astype(dtype) * scale, keys.astype(dtype), values.astype(dtype), mask)
    grad = grad.astype(dtype)
    rows = Rows(logsumexp, grad, (grad * out.astype(dtype)).sum(axis=1))
    grads = jnp.zeros_like(head.queries), jnp.zeros_like(head.keys), jnp.zeros_like(head.values)
    for shape, tiling in zip(tile_shapes(queries.shape[0]), tiles, strict=True):
        grads = lax.fori_loop(
            0, tiling.num_strips, partial(_backward_strip, head, rows, shape, tiling), grads
        )
    # As the formula's: the weights of a row that is blocked everywhere are NaN for every key.
    grad_values = jnp.where((logsumexp > -jnp.inf).all(), grads[2], jnp.nan)
    return (
        (grads[0] * scale).astype(queries.dtype),
        grads[1].astype(keys.dtype),
        grad_values.astype(values.dtype),
    )


def _backward_strip(
    head: Head,
    rows: Rows,
    shape: Shape,
    tiling: Tiling,
    number: Int[Array, ""],
    grads: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """Add the gradients through one strip of queries."""
    at, is_new = _strip(head, shape, number)
    queries = _take(head.queries, at, shape.queries)
    logsumexp, grad, inner = (_take(array, at, shape.queries) for array in rows)
    # Rows that the strip before has done add nothing again.
    grad, inner = jnp.where(is_new[:, None], grad, 0.0), jnp.where(is_new, inner, 0.0)

    def add(
        at_key: Int[Array, ""], blocked: Array | None, sums: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        grad_queries, grad_keys, grad_values = sums
        keys, values = _take(head.keys, at_key, shape.keys), _take(head.values, at_key, shape.keys)
        weights = jnp.exp(_scores(queries, keys, blocked) - logsumexp[:, None])
        grad_scores = weights * (grad @ values.T - inner[:, None])
        if blocked is not None:
            grad_scores = jnp.where(blocked, 0.0, grad_scores)
        grad_queries = grad_queries + grad_scores @ keys
        grad_keys = _put(
            grad_keys, _take(grad_keys, at_key, shape.keys) + grad_scores.T @ queries, at_key
        )
        grad_values = _put(
            grad_values, _take(grad_values, at_key, shape.keys) + weights.T @ grad, at_key
        )
        return grad_queries, grad_keys, grad_values

    sums = (jnp.zeros_like(queries), *grads[1:])
    grad_queries, grad_keys, grad_values = _over_tiles(add, head, shape, tiling, number, at, sums)
    return _put(grads[0], grad_queries, at, is_new), grad_keys, grad_values


def _strip(
    head: Head, shape: Shape, number: Int[Array, ""]
) -> tuple[Int[Array, ""], Bool[Array, " queries"]]:
    """Return where the strip begins, and which of its queries no strip before it has: the last is moved to fit."""
    start = number.astype(jnp.int32) * shape.queries
    at = jnp.minimum(start, head.queries.shape[0] - shape.queries)
    return at, at + jnp.arange(shape.queries, dtype=jnp.int32) >= start


def _over_tiles(
    add: Callable[[Array, Array | None, tuple[Array, ...]], tuple[Array, ...]],
    head: Head,
    shape: Shape,
    tiling: Tiling,
    number: Int[Array, ""],
    at: Int[Array, ""],
    sums: tuple[Array, ...],
) -> tuple[Array, ...]:
    """Add up the strip's tiles; those that are open everywhere do not read the mask."""
    num_open, num_tiles = tiling.num_open[number], tiling.num_tiles[number]

    def place(tile: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """Return the tile's first key, and where it begins: the last tile is moved to fit."""
        first = tiling.first[number] + tiling.order[number, tile] * shape.keys
        return first, jnp.minimum(first, head.keys.shape[0] - shape.keys)

    def blocked(tile: Int[Array, ""]) -> Bool[Array, "queries keys"]:
        first, at_key = place(tile)
        is_seen = at_key + jnp.arange(shape.keys, dtype=jnp.int32) < first
        return is_nonzero(lax.dynamic_slice(head.mask, (at, at_key), shape)) | is_seen[None]

    def add_mixed(
        tile: Int[Array, ""], carried: tuple[Array, tuple[Array, ...]]
    ) -> tuple[Array, tuple[Array, ...]]:
        here, sums = carried
        # Handed on, so that it is made once and not once for each head.
        return blocked(tile + 1), add(place(tile)[1], here, sums)

    sums = lax.fori_loop(0, num_open, lambda tile, sums: add(place(tile)[1], None, sums), sums)
    return lax.fori_loop(num_open, num_tiles, add_mixed, (blocked(num_open), sums))[1]


def _scores(
    queries: Float[Array, "queries head_dim"],
    keys: Float[Array, "keys head_dim"],
    blocked: Bool[Array, "queries keys"] | None,
) -> Float[Array, "queries keys"]:
    scores = queries @ keys.T
    return scores if blocked is None else jnp.where(blocked, -jnp.inf, scores)


def _take(array: Array, at: Int[Array, ""], size: int) -> Array:
    return lax.dynamic_slice_in_dim(array, at, size)


def _put(
    array: Array, part: Array, at: Int[Array, ""], is_new: Bool[Array, " rows"] | None = None
) -> Array:
    """Put the part where it belongs, of its rows only the new ones."""
    if is_new is not None:
        is_new = is_new.reshape(-1, *[1] * (part.ndim - 1))
        part = jnp.where(is_new, part, _take(array, at, part.shape[0]))
    return lax.dynamic_update_slice_in_dim(array, part, at, 0)
