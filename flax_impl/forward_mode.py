"""Forward-mode derivatives of the fused path, and its own reverse mode, in one rule.

`jax.custom_vjp` refuses `jax.jvp`. Here a primitive stands for the tangent of the output: its
values are the formula's, and its transpose is the fused backward pass.

Source: JAX documentation, "JAX Internals: primitives".
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .attention import reference_attention

NUM_RESIDUALS = 6  # queries, keys, values, mask, out, logsumexp

Backward = Callable[..., tuple[Array, Array, Array]]


def tangent_of(backward: Backward) -> Callable[..., Array]:
    """Return the function (queries, keys, values, mask, out, logsumexp, *tangents) -> tangent.

    `backward(queries, keys, values, mask, out, logsumexp, grad)` returns the gradients of queries,
    keys and values.
    """
    primitive = Primitive("masked_attention_tangent")

    def evaluate(*arrays: Array, axes: tuple[Any, ...]) -> Array:
        return _mapped(_formula_tangent, axes)(*arrays)

    def shape(*avals: Any, axes: tuple[Any, ...]) -> Any:
        return avals[-1]

    def differentiate(primals: Any, tangents: Any, *, axes: tuple[Any, ...]) -> tuple[Any, Any]:
        # Only queries, keys, values and their tangents move the result.
        moving = [0, 1, 2, *range(NUM_RESIDUALS, len(primals))]

        def of_moving(*arrays: Array) -> Array:
            everything = list(primals)
            for index, array in zip(moving, arrays, strict=True):
                everything[index] = array
            return evaluate(*everything, axes=axes)

        moved = [ad.instantiate_zeros(tangents[index]) for index in moving]
        result = primitive.bind(*primals, axes=axes)
        return result, jax.jvp(of_moving, [primals[index] for index in moving], moved)[1]

    def transpose(grad: Any, *arrays: Any, axes: tuple[Any, ...]) -> list[Any]:
        nothing = [None] * NUM_RESIDUALS
        if type(grad) is ad.Zero:
            return nothing + [None] * (len(arrays) - NUM_RESIDUALS)
        residuals = arrays[:NUM_RESIDUALS]
        grads = _mapped(backward, [(*each[:NUM_RESIDUALS], 0) for each in axes])(*residuals, grad)
        is_linear = map(ad.is_undefined_primal, arrays[NUM_RESIDUALS:])
        return nothing + [
            each if is_asked else None for each, is_asked in zip(grads, is_linear, strict=True)
        ]

    def batch(arrays: Any, dims: Any, *, axes: tuple[Any, ...]) -> tuple[Array, int]:
        size = next(
            array.shape[dim] for array, dim in zip(arrays, dims, strict=True) if dim is not None
        )
        # Every tangent gets the mapped axis, so that its gradient has one.
        tangents = [
            jnp.broadcast_to(array, (size, *array.shape))
            if dim is None
            else jnp.moveaxis(array, dim, 0)
            for array, dim in zip(arrays[NUM_RESIDUALS:], dims[NUM_RESIDUALS:], strict=True)
        ]
        mapped = (*dims[:NUM_RESIDUALS], *[0] * len(tangents))
        outer = primitive.bind(*arrays[:NUM_RESIDUALS], *tangents, axes=(mapped, *axes))
        return outer, 0

    primitive.def_impl(lambda *arrays, axes: jax.jit(partial(evaluate, axes=axes))(*arrays))
    primitive.def_abstract_eval(shape)
    mlir.register_lowering(primitive, mlir.lower_fun(evaluate, multiple_results=False))
    ad.primitive_jvps[primitive] = differentiate
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    return partial(primitive.bind, axes=())


def _formula_tangent(
    queries: Array,
    keys: Array,
    values: Array,
    mask: Array,
    out: Array,
    logsumexp: Array,
    *tangents: Array,
) -> Array:
    formula = partial(reference_attention, mask=mask)
    return jax.jvp(formula, (queries, keys, values), tangents)[1]


def _mapped(function: Callable[..., Any], axes: Any) -> Callable[..., Any]:
    """Return the function mapped over the axes of each `vmap`, the outermost first."""
    for each in reversed(axes):
        function = jax.vmap(function, in_axes=each)
    return function
