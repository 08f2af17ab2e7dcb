"""Our modules in what JAX does to a function, beside the formula: the values are the same.

Derivatives are compared under `implementation="fused"` with few tokens, and what `"auto"` decides
by the number of tokens on both sides of its threshold.
"""

import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import Array, export, lax

import flax_impl
import flax_impl.nnx
from flax_impl import causal_mask, masked_attention
from flax_impl.dispatch import MIN_FUSED_TOKENS
from flax_impl.mask_tiles import MIN_TILED_TOKENS

TOKENS = 24
AGAIN = pytest.mark.again
LENGTHS = (MIN_FUSED_TOKENS - 1, MIN_FUSED_TOKENS)
Attend = Callable[..., Array]
Context = Callable[[Attend, tuple[Array, Array, Array], Array], Any]


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def heads(*shape: int) -> tuple[Array, Array, Array]:
    random = np.random.default_rng(sum(shape))
    queries, keys, values = (jnp.asarray(random.standard_normal(shape)) for _ in range(3))
    return queries, keys, values


def masks(tokens: int) -> dict[str, Array]:
    causal = np.asarray(causal_mask(tokens))
    edited, closed = causal.copy(), causal.copy()
    edited[tokens // 2 :, 3], edited[7, 9] = 2.0, 0.0
    closed[tokens // 2] = 1.0
    return {
        name: jnp.asarray(mask)
        for name, mask in (("causal", causal), ("edited", edited), ("closed", closed))
    }


def assert_same(found: Any, expected: Any, tokens: int) -> None:
    """Compare in float64: sums of `tokens` terms, in a chain of fewer than 64 operations."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        size = max(1.0, np.abs(np.nan_to_num(other)).max(initial=0.0))
        limit = 64 * tokens * 2.0**-53 * size
        assert np.allclose(one, other, rtol=0.0, atol=limit, equal_nan=True)


def loss(attend: Attend, mask: Array, *heads: Array) -> Array:
    return jnp.square(jnp.nan_to_num(attend(*heads, mask))).sum()


def evaluated(attend: Attend, heads: Any, mask: Array) -> Any:
    return attend(*heads, mask), jax.jit(attend)(*heads, mask)


def differentiated(attend: Attend, heads: Any, mask: Array) -> Any:
    everything = jax.grad(partial(loss, attend, mask), argnums=(0, 1, 2))
    of_the_keys = jax.grad(lambda keys: loss(attend, mask, heads[0], keys, heads[2]))
    of_the_mask = jax.grad(lambda mask: loss(attend, mask, *heads))
    return everything(*heads), of_the_keys(heads[1]), of_the_mask(mask)


def pushed_forward(attend: Attend, heads: Any, mask: Array) -> Any:
    def push(*heads: Array) -> Any:
        return jax.jvp(lambda *heads: attend(*heads, mask), heads, heads[::-1])

    inside = jax.jvp(jax.jit(lambda *heads: attend(*heads, mask)), heads, heads[::-1])
    return push(*heads), jax.jit(push)(*heads), inside


def linearized(attend: Attend, heads: Any, mask: Array) -> Any:
    outputs, push = jax.linearize(lambda *heads: attend(*heads, mask), *heads)
    pull = jax.linear_transpose(push, *heads)
    return outputs, push(*heads[::-1]), pull(jnp.nan_to_num(outputs))


def pulled_back(attend: Attend, heads: Any, mask: Array) -> Any:
    outputs, pull = jax.vjp(lambda *heads: attend(*heads, mask), *heads)
    return outputs, pull(jnp.nan_to_num(outputs))


def second_derivatives(attend: Attend, heads: Any, mask: Array) -> Any:
    gradient = jax.grad(partial(loss, attend, mask), argnums=(0, 1))

    def along(*heads: Array) -> Array:
        return sum((each * head).sum() for each, head in zip(gradient(*heads), heads, strict=False))

    def forward(*heads: Array) -> Any:
        return jax.jvp(partial(loss, attend, mask), heads, heads[::-1])[1]

    return (
        jax.jvp(gradient, heads, heads[::-1])[1],
        jax.grad(along)(*heads),
        jax.grad(forward)(*heads),
    )


def jacobians(attend: Attend, heads: Any, mask: Array) -> Any:
    queries, keys, values = (head[:1, :1] for head in heads)

    def last(queries: Array) -> Array:
        return attend(queries, keys, values, mask)[..., -1, :]

    def second(queries: Array) -> Array:
        return jnp.square(last(queries)).sum()

    return (
        jax.jacfwd(last)(queries),
        jax.jacrev(last)(queries),
        jax.hessian(second)(queries),
        jax.jacrev(jax.jacrev(second))(queries),
    )


def mapped_masks(attend: Attend, heads: Any, mask: Array) -> Any:
    both = jnp.stack([mask, jnp.zeros_like(mask), 1 - mask])
    each = jax.vmap(lambda mask: attend(*heads, mask))
    gradients = jax.vmap(
        jax.grad(lambda queries, mask: loss(attend, mask, queries, *heads[1:])), (None, 0)
    )
    of_all = jax.grad(
        lambda queries: jnp.nan_to_num(
            jax.vmap(lambda mask: attend(queries, *heads[1:], mask))(both)
        ).sum()
    )
    return each(both), gradients(heads[0], both), of_all(heads[0])


def mapped_twice(attend: Attend, heads: Any, mask: Array) -> Any:
    both = jnp.stack([mask, jnp.zeros_like(mask)])
    of_heads = jax.vmap(jax.grad(partial(loss, attend), argnums=(1, 2, 3)), (None, 0, 0, 0))
    last = jax.vmap(lambda queries: attend(queries, *heads[1:], mask), in_axes=-1, out_axes=1)
    return (
        jax.vmap(of_heads, (0, None, None, None))(both, *heads),
        last(jnp.stack([heads[0], 2 * heads[0]], axis=-1)),
    )


def pushed_through_a_map(attend: Attend, heads: Any, mask: Array) -> Any:
    each = jax.vmap(lambda *heads: attend(*heads, mask))
    tangents = jax.vmap(lambda along: jax.jvp(each, heads, (along, along, along))[1])
    return tangents(jnp.stack([heads[0], heads[1]]))


def rematerialized(attend: Attend, heads: Any, mask: Array) -> Any:
    kept = jax.checkpoint(partial(loss, attend, mask), policy=jax.checkpoint_policies.dots_saveable)
    return [jax.grad(each)(*heads) for each in (jax.checkpoint(partial(loss, attend, mask)), kept)]


def scanned(attend: Attend, heads: Any, mask: Array) -> Any:
    both = jnp.stack([jnp.zeros_like(mask), mask])

    def chain(queries: Array) -> Array:
        def step(carry: Array, mask: Array) -> tuple[Array, Array]:
            carry = jnp.nan_to_num(attend(carry, *heads[1:], mask))
            return carry, carry.sum()

        return lax.scan(step, queries, both)[0].sum()

    return jax.grad(chain)(heads[0]), jax.jvp(chain, (heads[0],), (heads[1],))


def shaped(attend: Attend, heads: Any, mask: Array) -> Any:
    shape = jax.eval_shape(attend, *heads, mask)
    return jnp.zeros(shape.shape, shape.dtype)


CONTEXTS: list[Context] = [
    evaluated,
    differentiated,
    pushed_forward,
    linearized,
    pulled_back,
    second_derivatives,
    jacobians,
    mapped_masks,
    mapped_twice,
    pushed_through_a_map,
    rematerialized,
    scanned,
    shaped,
]


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda each: each.__name__)
@pytest.mark.parametrize(
    "mask", ["edited", *(pytest.param(name, marks=AGAIN) for name in ("causal", "closed"))]
)
def test_it_is_the_formula(mask: str, context: Context) -> None:
    fused, formula = (
        context(
            partial(masked_attention, implementation=implementation),
            heads(2, 3, TOKENS, 4),
            masks(TOKENS)[mask],
        )
        for implementation in ("fused", "reference")
    )
    assert_same(fused, formula, TOKENS)


@pytest.mark.parametrize("shape", [(17, 41, 2), pytest.param((1, 200, 8), marks=AGAIN)])
def test_mapped_masks_of_many_pairs(shape: tuple[int, ...]) -> None:
    """From 82,000 pairs on, jaxlib 0.10.2 fuses a product with a sum, and gets both wrong."""
    tokens = shape[-2]
    fused, formula = (
        mapped_masks(
            partial(masked_attention, implementation=implementation),
            heads(*shape),
            masks(tokens)["edited"],
        )
        for implementation in ("fused", "reference")
    )
    assert_same(fused, formula, tokens)


@pytest.mark.again
@pytest.mark.parametrize("seed", range(30))
def test_it_is_the_formula_at_drawn_lengths(seed: int) -> None:
    draw = random.Random(seed)
    limit = MIN_TILED_TOKENS if seed % 10 == 0 else draw.choice([12, 40, 200])
    tokens = limit + draw.randint(-2, 2)
    context, mask = draw.choice(CONTEXTS), draw.choice(["causal", "edited", "closed"])
    shape = draw.choice([(3, tokens, 4), (2, 3, tokens, 4), (17, tokens, 2)])
    fused, formula = (
        context(
            partial(masked_attention, implementation=implementation),
            heads(*shape),
            masks(tokens)[mask],
        )
        for implementation in ("fused", "reference")
    )
    assert_same(fused, formula, tokens)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_auto_can_be_pushed_forward(tokens: int) -> None:
    given, mask = heads(1, tokens, 2), masks(tokens)["edited"]
    found, expected = (
        pushed_forward(partial(masked_attention, implementation=implementation), given, mask)
        for implementation in ("auto", "reference")
    )
    assert_same(found, expected, tokens)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(
    "dtype", ["int32", "complex128", "mixed", "one head of keys", "values alone"]
)
def test_auto_takes_the_same_arrays_at_every_length(dtype: str, tokens: int) -> None:
    queries, keys, values = heads(2, tokens, 2)
    if dtype == "int32":
        queries, keys, values = (
            jnp.round(4 * each).astype(dtype) for each in (queries, keys, values)
        )
    elif dtype == "complex128":
        queries, keys, values = (each.astype(dtype) for each in (queries, keys, values))
    elif dtype == "mixed":
        values = values.astype(jnp.float32)
    elif dtype == "one head of keys":
        keys, values = keys[:1], values[:1]
    else:
        values = jnp.concatenate([values, values], axis=-1)
    mask = masks(tokens)["edited"]
    with jax.numpy_dtype_promotion("standard"):
        found, expected = (
            masked_attention(queries, keys, values, mask, None, implementation)
            for implementation in ("auto", "reference")
        )
    assert not np.isnan(expected).any()
    assert_same(found, expected, tokens)


def module_and_inputs(tokens: int) -> tuple[Any, Any, Array]:
    module = flax_impl.CausalMultiHeadAttention(6, 8, 1024, 0.0, 2)
    inputs = heads(2, tokens, 6)[0]
    variables = module.init(jax.random.key(0), inputs[:, :4].astype(jnp.float32))
    return module, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables), inputs


@pytest.mark.parametrize(
    "symbols",
    ["b, 768", "b, t", *(pytest.param(symbols, marks=AGAIN) for symbols in ("b, 767", "2, t"))],
    ids=lambda each: each.replace(", ", "x"),
)
def test_exported_for_any_shape(symbols: str) -> None:
    module, variables, inputs = module_and_inputs(900)
    batch, tokens = export.symbolic_shape(symbols, constraints=["t <= 1024"] * ("t" in symbols))
    argument = jax.ShapeDtypeStruct((batch, tokens, 6), inputs.dtype)
    jax.eval_shape(module.apply, variables, argument)
    exported = export.export(jax.jit(module.apply))(variables, argument)
    gradient = jax.jit(jax.grad(lambda inputs, variables: module.apply(variables, inputs).sum()))
    of_inputs = export.export(gradient)(argument, variables)
    for size in (5, 900) if tokens not in (767, 768) else (int(tokens),):
        used = inputs[:, :size]
        assert_same(exported.call(variables, used), module.apply(variables, used), size)
        assert_same(of_inputs.call(used, variables), gradient(used, variables), size)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_idle_dropout_of_linen_is_still_there(tokens: int) -> None:
    module, variables, inputs = module_and_inputs(tokens)
    outputs, state = module.apply(variables, inputs, capture_intermediates=True)
    (weights,) = state["intermediates"]["attention_dropout"]["__call__"]
    assert weights.shape == (2, 2, tokens, tokens)
    assert_same(weights.sum(axis=-1), jnp.ones((2, 2, tokens)), tokens)
    assert_same(outputs, module.apply(variables, inputs), tokens)
    seen = []

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        seen.append(context.module.name)
        return call(*args, **kwargs)

    with linen.intercept_methods(intercept):
        module.apply(variables, inputs)
    assert "attention_dropout" in seen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short = inputs[:, :4].astype(jnp.float32)
        table = module.tabulate(jax.random.key(0), short, console_kwargs={"width": 200})
        assert "attention_dropout" in table


def test_idle_dropout_of_nnx_is_still_there() -> None:
    model = flax_impl.nnx.CausalMultiHeadAttention(6, 8, 1024, 0.0, 2, rngs=nnx.Rngs(0))
    inputs = jnp.asarray(heads(2, 10, 6)[0], jnp.float32)
    call = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
    _outputs, intermediates = call(inputs)
    assert "dropout" in intermediates
    assert flax_impl.nnx.dropout.dropping(model.dropout) is None, "nobody looks any more"


def test_the_bridge_keeps_the_collection_and_the_type() -> None:
    inputs = jnp.ones((1, 4, 6), jnp.float32)
    bridged = nnx.bridge.ToLinen(
        flax_impl.nnx.CausalMultiHeadAttention, args=(6, 8, 16, 0.0, 2), skip_rng=False
    )
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = bridged.init(keys, inputs)
    assert list(variables["buffers"]) == ["mask"]
    model = nnx.bridge.ToNNX(flax_impl.CausalMultiHeadAttention(6, 8, 16, 0.0, 2), rngs=nnx.Rngs(0))
    model.lazy_init(inputs)
    assert type(model.mask) is flax_impl.nnx.Buffer
    assert list(nnx.state(model, flax_impl.nnx.Buffer)) == ["mask"]
