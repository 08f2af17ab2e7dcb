"""Attention one tile of the score matrix at a time, without the tiles that are fully blocked.

The forward pass is the recurrence of FlashAttention. For each strip of queries:

    m, l, acc = lowest, 0, 0          # running maximum, divisor and output of each query
    for each tile of the strip that has an unblocked pair:
        S = queries @ keys.T / sqrt(head_dim), -inf where blocked
        new_m = max(m, max(S))        # max and sum run over the keys of the tile
        P = exp(S - new_m)
        acc = acc * exp(m - new_m) + P @ values
        l = l * exp(m - new_m) + sum(P)
        m = new_m
    out, logsumexp = acc / l, m + log(l)

`lowest` is the lowest finite number. The backward pass computes P again. Per tile, with
D = sum(grad * out) over head_dim:

    P, dP = exp(S - logsumexp), grad @ values.T
    dS = P * (dP - D)
    dq += dS @ keys / sqrt(head_dim); dk += dS.T @ queries / sqrt(head_dim); dv += P.T @ grad

All heads are computed together. The leading dimensions, such as batch and heads, stay as they are,
so that an array that is sharded along them stays where it is.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", and Dao et al.,
"FlashAttention", algorithms 1 and 4.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Shaped

from .attention import reference_attention
from .forward_mode import tangent_of
from .mask_tiles import Shape, Tile, is_causal, over_strips, tile_shape

DTYPES = ("float64", "float32", "bfloat16", "float16")


def kernels_take(queries: Array, keys: Array, values: Array) -> bool:
    """Return whether the fused path takes arrays of these dtypes, shapes and shardings.

    The numbers of tokens and of features have to be known: in a program for any number of tokens
    the formula is taken. So it is if the tokens are sharded along an explicit axis of a mesh.
    """
    sizes = *queries.shape[-2:], values.shape[-1]
    return (
        queries.dtype == keys.dtype == values.dtype
        and queries.dtype.name in DTYPES
        and all(isinstance(size, int) for size in sizes)
        and queries.shape == keys.shape
        and keys.shape[:-1] == values.shape[:-1]
        and 0 not in (*queries.shape, values.shape[-1])
        and not any(_has_sharded_tokens(array) for array in (queries, keys, values))
    )


def _has_sharded_tokens(array: Array) -> bool:
    """Return whether the type of the array says that tokens or features are on several devices."""
    spec = jax.typeof(array).sharding.spec
    return len(spec) == array.ndim and spec[-2:] != (None, None)


def fused_attention(
    queries: Float[Array, "*batch tokens head_dim"],
    keys: Float[Array, "*batch tokens head_dim"],
    values: Float[Array, "*batch tokens value_dim"],
    mask: Shaped[Array, "context_length context_length"],
) -> Float[Array, "*batch tokens value_dim"]:
    """Compute `reference_attention` in memory that is linear in the number of tokens.

    The mask is read on the device, so one compiled program serves every mask. bfloat16 and float16
    are computed in float32, or by cuDNN on a GPU if the mask is causal. In the formula, a NaN or
    inf in a blocked value reaches every row through 0 * NaN, and scores that overflow give NaN;
    here they may not. Forward-mode and second derivatives are those of the formula; cuDNN has none.
    The arrays are such as `kernels_take`.
    """
    attend = _cudnn_if_causal if _cudnn_supports(queries, values) else _attend
    shape = (*queries.shape[:-1], values.shape[-1])
    # XLA computes products with one leading dimension fastest. A size of 1 is never sharded.
    queries, keys, values = (
        array.reshape([size for size in array.shape[:-2] if size != 1] + [*array.shape[-2:]])
        for array in (queries, keys, values)
    )
    return attend(*_varying_alike(queries, keys, values, mask)).reshape(shape)


def _varying_alike(*arrays: Array) -> list[Array]:
    """Return the arrays, in `shard_map`, as varying over the same axes: a loop asks for it.

    Source: JAX documentation, "Manual parallelism with shard_map", on scan and vma.
    """
    varying = [_manual_axes(array) for array in arrays]
    everywhere: frozenset[str] = frozenset().union(*varying)
    return [
        lax.pcast(array, tuple(everywhere - axes), to="varying") if everywhere - axes else array
        for array, axes in zip(arrays, varying, strict=True)
    ]


def _manual_axes(array: Array) -> frozenset[str]:
    """Return the axes of a mesh over which the array varies; some versions of JAX say `vma`."""
    array_type: Any = jax.typeof(array)
    manual = getattr(array_type, "mat", None)
    return getattr(array_type, "vma", frozenset()) if manual is None else manual.varying


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
            is_causal(mask, queries.shape[-2]), _cudnn, _attend, queries, keys, values, mask
        )

    return lax.platform_dependent(queries, keys, values, mask, cuda=decide, default=_attend)


def _cudnn(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    # cuDNN takes (batch, tokens, heads, head_dim).
    heads = (_four_dims(array).swapaxes(1, 2) for array in (queries, keys, values))
    out = jax.nn.dot_product_attention(*heads, is_causal=True, implementation="cudnn")
    return out.swapaxes(1, 2).reshape(queries.shape)


def _four_dims(array: Array) -> Array:
    """Return the array as (batch, heads, tokens, head_dim)."""
    if array.ndim > 4:
        return array.reshape(-1, *array.shape[-3:])
    return array[(None,) * (4 - array.ndim)]


def _attend(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    return _forward(queries, keys, values, mask)[0]


def _forward_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Any, Any]:
    out, logsumexp = _forward(*primals)
    # Only `_backward` reads the logsumexp, and its rule does not use the tangent.
    tangent = _tangent(*primals, out, logsumexp, *tangents[:3])
    return (out, logsumexp), (tangent, jnp.zeros_like(logsumexp))


def _backward_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Any, Any]:
    *heads, mask, _, _, grad = primals

    def reference(queries: Array, keys: Array, values: Array, grad: Array) -> tuple[Array, ...]:
        return jax.vjp(partial(reference_attention, mask=mask), queries, keys, values)[1](grad)

    # `out` and `logsumexp` are functions of the other inputs, so their tangents are not needed.
    return _backward(*primals), jax.jvp(reference, (*heads, grad), (*tangents[:3], tangents[6]))[1]


def _work_dtype(array: Array) -> Any:
    return jnp.float64 if array.dtype == jnp.float64 else jnp.float32


def _shape(queries: Array) -> Shape:
    *leading, num_tokens, _ = queries.shape
    is_known = all(isinstance(size, int) for size in leading)
    return tile_shape(num_tokens, math.prod(leading) if is_known else None)


@jax.custom_jvp
@jax.jit  # traced once for all layers with the same shapes
def _forward(queries: Array, keys: Array, values: Array, mask: Array) -> tuple[Array, Array]:
    """Return the outputs (*batch, tokens, head_dim) and the logsumexps (*batch, tokens, 1)."""
    dtype, shape, num_tokens = _work_dtype(queries), _shape(queries), queries.shape[-2]
    scale, out_dtype = queries.shape[-1] ** -0.5, values.dtype
    queries, keys, values = (array.astype(dtype) for array in (queries, keys, values))

    def add_strip(
        first_query: Int[Array, ""], is_new: Array, over_tiles: Any, results: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        strip_queries = _take(queries, first_query, shape.queries) * scale

        def add_tile(tile: Tile, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            m, l, acc = carry  # noqa: E741

            def block(scores: Array) -> Array:
                return jnp.where(tile.blocked, -jnp.inf, scores)

            scores = strip_queries @ _take(keys, tile.first_key, shape.keys).mT
            scores = lax.cond(tile.is_open, lambda scores: scores, block, scores)
            new_m = jnp.maximum(m, scores.max(axis=-1, keepdims=True))
            weights, rescale = jnp.exp(scores - new_m), jnp.exp(m - new_m)
            new_acc = acc * rescale + weights @ _take(values, tile.first_key, shape.keys)
            return new_m, l * rescale + weights.sum(axis=-1, keepdims=True), new_acc

        zeros = jnp.zeros_like(strip_queries[..., :1])
        zero_acc = jnp.zeros_like(_take(values, first_query, shape.queries))
        # A finite number, because -inf - -inf would be NaN.
        m, l, acc = over_tiles(add_tile, (zeros + jnp.finfo(dtype).min, zeros, zero_acc))  # noqa: E741
        out, logsumexp = results
        # A closed row, which blocks every key, has l = 0 and becomes NaN.
        return (
            _put(out, (acc / l).astype(out_dtype), first_query, is_new),
            _put(logsumexp, m + jnp.log(l), first_query, is_new),
        )

    results = jnp.zeros_like(values, dtype=out_dtype), jnp.zeros_like(queries[..., :1])
    return over_strips(mask, num_tokens, shape, add_strip, results)


@jax.custom_jvp
@jax.jit
def _backward(
    queries: Array,
    keys: Array,
    values: Array,
    mask: Array,
    out: Array,
    logsumexp: Array,
    grad: Array,
) -> tuple[Array, Array, Array]:
    """Return the gradients of queries, keys and values."""
    dtypes = queries.dtype, keys.dtype, values.dtype
    dtype, shape, num_tokens = _work_dtype(queries), _shape(queries), queries.shape[-2]
    scale = queries.shape[-1] ** -0.5
    scaled, keys, values, grad = (
        array.astype(dtype) for array in (queries.astype(dtype) * scale, keys, values, grad)
    )
    inner = (grad * out.astype(dtype)).sum(axis=-1, keepdims=True)

    def add_strip(
        first_query: Int[Array, ""],
        is_new: Array,
        over_tiles: Any,
        grads: tuple[Array, Array, Array],
    ) -> tuple[Array, Array, Array]:
        strip_queries, strip_grad, strip_inner, strip_logsumexp = (
            _take(array, first_query, shape.queries) for array in (scaled, grad, inner, logsumexp)
        )

        def add_tile(tile: Tile, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            grad_queries, grad_keys, grad_values = carry
            tile_keys = _take(keys, tile.first_key, shape.keys)
            tile_values = _take(values, tile.first_key, shape.keys)
            weights = jnp.exp(strip_queries @ tile_keys.mT - strip_logsumexp)
            weights = jnp.where(tile.blocked, 0.0, weights)
            grad_scores = weights * (strip_grad @ tile_values.mT - strip_inner)
            # In a closed row, the gradient and the sum are NaN.
            grad_scores = jnp.where(tile.blocked, 0.0, grad_scores)
            return (
                grad_queries + grad_scores @ tile_keys,
                _add(grad_keys, _turned_product(grad_scores, strip_queries), tile.first_key),
                _add(grad_values, _turned_product(weights, strip_grad), tile.first_key),
            )

        grad_queries, *others = grads
        carry = jnp.zeros_like(strip_queries), *others
        strip_grad_queries, grad_keys, grad_values = over_tiles(add_tile, carry)
        return _put(grad_queries, strip_grad_queries, first_query, is_new), grad_keys, grad_values

    zeros = jnp.zeros_like(scaled), jnp.zeros_like(keys), jnp.zeros_like(values)
    grad_queries, grad_keys, grad_values = over_strips(mask, num_tokens, shape, add_strip, zeros)
    # As in the formula: a closed row, which blocks every key, has NaN weights for every key.
    is_finite = (logsumexp > -jnp.inf).all(axis=-2, keepdims=True)
    grad_values = jnp.where(is_finite, grad_values, jnp.nan)
    grads = grad_queries * scale, grad_keys, grad_values
    grad_queries, grad_keys, grad_values = (
        array.astype(dtype) for array, dtype in zip(grads, dtypes, strict=True)
    )
    return grad_queries, grad_keys, grad_values


_forward.defjvp(_forward_jvp)
_backward.defjvp(_backward_jvp)
_tangent = tangent_of(_backward)


def _turned_product(
    left: Float[Array, "*batch queries keys"], right: Float[Array, "*batch queries width"]
) -> Float[Array, "*batch keys width"]:
    """Return left.mT @ right, in the form that XLA computes without a copy of `left`."""
    return (right.mT @ left).mT


def _take(array: Array, start: Int[Array, ""], size: int) -> Array:
    """Return `size` rows. The start is inside, so that it need not be tested.

    All rows are the array itself: jaxlib 0.10.2 computes wrong products of a slice of all rows
    whose start is mapped, where it fuses them with a sum (jax-ml/jax issue 39103).
    """
    if size == array.shape[-2]:
        return array
    return lax.dynamic_slice_in_dim(array, start, size, axis=-2, allow_negative_indices=False)


def _put(
    array: Array, rows: Array, start: Int[Array, ""], is_new: Bool[Array, " rows"] | None = None
) -> Array:
    """Return the array with the rows written at `start`, or only those that `is_new` selects."""
    if rows.shape == array.shape:
        return rows
    if is_new is not None and array.shape[-2] % rows.shape[-2]:
        rows = jnp.where(is_new[:, None], rows, _take(array, start, rows.shape[-2]))
    zero = jnp.zeros_like(start)
    first = [*[zero] * (array.ndim - 2), start, zero]
    return lax.dynamic_update_slice(array, rows, first, allow_negative_indices=False)


def _add(array: Array, rows: Array, start: Int[Array, ""]) -> Array:
    return _put(array, _take(array, start, rows.shape[-2]) + rows, start)
