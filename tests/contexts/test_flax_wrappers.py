"""Our modules in what Flax does to a module, beside the formula: the values are the same."""

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import core, linen, nnx, serialization
from flax.training.train_state import TrainState
from jax import Array, lax

from flax_impl.nnx import Buffer

from .jax_formula import FEATURES, WIDTH, inputs, linen_pair, masks, nnx_pair
from .test_jax_transforms import assert_same

TOKENS = 24
AGAIN = pytest.mark.again
MASKS = [pytest.param("causal", marks=AGAIN), "edited", pytest.param("closed", marks=AGAIN)]
LinenContext = Callable[[Any, Array], Any]
NnxContext = Callable[[Any, Array], Any]


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def initialized(module: Any, given: Array, mask: Array) -> Any:
    """The variables, with parameters in float64, and this mask wherever there is one."""
    variables = module.init(jax.random.key(0), given.astype(jnp.float32))
    return {
        "params": jax.tree.map(lambda array: array.astype(jnp.float64), variables["params"]),
        "buffers": jax.tree.map(lambda _: mask, variables["buffers"]),
    }


def variables_of(module: Any, mask: Array) -> Any:
    return initialized(module, inputs(TOKENS), mask)


def size(outputs: Array) -> Array:
    return jnp.square(jnp.nan_to_num(outputs)).sum()


class _Stack(linen.Module):
    """Three layers by `nn.scan`, with a mask each or one for all."""

    module: Any
    mask_axes: Any

    @linen.compact
    def __call__(self, tokens: Array) -> Array:
        def step(module: Any, carried: Array, _: None) -> tuple[Array, None]:
            return carried + module(carried[..., :FEATURES]), None

        axes: Any = {"params": 0, "buffers": 0} if self.mask_axes == 0 else {"params": 0}
        scanned = linen.scan(
            step,
            variable_axes=axes,
            variable_broadcast=False if self.mask_axes == 0 else "buffers",
            split_rngs={"params": True},
            length=3,
        )
        return scanned(self.module, tokens, None)[0]


def _scanned(module: Any, mask: Array, axes: int | None) -> Any:
    tokens = inputs(TOKENS, features=WIDTH)
    stack = _Stack(module, axes)
    variables = initialized(stack, tokens, mask)
    if axes == 0:
        different = jnp.stack([mask, mask.T, mask * 0.0])
        variables["buffers"] = jax.tree.map(lambda _: different, variables["buffers"])
    apply: Callable[..., Any] = stack.apply
    gradient = jax.grad(lambda params: size(apply({**variables, "params": params}, tokens)))
    return stack.apply(variables, tokens), gradient(variables["params"])


def scanned_with_a_mask_each(module: Any, mask: Array) -> Any:
    return _scanned(module, mask, 0)


def scanned_with_one_mask(module: Any, mask: Array) -> Any:
    return _scanned(module, mask, None)


def lifted(module: Any, mask: Array) -> Any:
    """`nn.remat`, `nn.jit` and `nn.vmap` of the class, over two members with a mask each."""
    variables, given = variables_of(module, mask), inputs(TOKENS)
    fields = {name: getattr(module, name) for name in module.__dataclass_fields__}
    fields = {name: value for name, value in fields.items() if name not in ("parent", "name")}
    found = []
    for lift in (linen.remat, linen.jit):
        other = lift(type(module))(**fields)
        gradient = jax.grad(
            lambda params, other=other: size(other.apply({**variables, "params": params}, given))
        )
        found.append((other.apply(variables, given), gradient(variables["params"])))
    members = linen.vmap(
        type(module),
        variable_axes={"params": 0, "buffers": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=2,
    )(**fields)
    doubled = jax.tree.map(lambda array: jnp.stack([array, array * 2.0]), variables)
    return found, members.apply(doubled, given)


def in_a_sequence(module: Any, mask: Array) -> Any:
    stack = linen.Sequential([module, linen.Dense(FEATURES), linen.relu])
    given = inputs(TOKENS)
    return stack.apply(initialized(stack, given, mask), given)


def shared(module: Any, mask: Array) -> Any:
    class Twice(linen.Module):
        layer: Any

        def __call__(self, tokens: Array) -> Array:
            return self.layer(self.layer(tokens)[..., :FEATURES])

    twice, variables = Twice(module), variables_of(module, mask)
    return twice.apply({name: {"layer": tree} for name, tree in variables.items()}, inputs(TOKENS))


def trained(module: Any, mask: Array) -> Any:
    """A TrainState whose optimizer sees the parameters alone."""
    variables, given = variables_of(module, mask), inputs(TOKENS)
    state = TrainState.create(
        apply_fn=module.apply, params=variables["params"], tx=optax.adamw(1e-3)
    )
    with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to an int32 power
        for _ in range(2):
            gradients = jax.grad(
                lambda params: size(
                    module.apply({"params": params, "buffers": variables["buffers"]}, given)
                )
            )(state.params)
            state = state.apply_gradients(grads=gradients)
    return state.params


def serialized(module: Any, mask: Array) -> Any:
    variables, given = variables_of(module, mask), inputs(TOKENS)
    fresh = jax.tree.map(jnp.zeros_like, variables)
    read = serialization.from_bytes(fresh, serialization.to_bytes(variables))
    again = pickle.loads(pickle.dumps(module))
    return read["buffers"]["mask"], again.apply(core.freeze(jax.tree.map(jnp.asarray, read)), given)


def with_mutable_buffers(module: Any, mask: Array) -> Any:
    variables, given = variables_of(module, mask), inputs(TOKENS)
    outputs, changed = module.apply(variables, given, mutable=["buffers", "intermediates"])
    bound = module.bind(variables)
    return outputs, changed, bound(given)


def dropping(module: Any, mask: Array) -> Any:
    module = module.clone(dropout=0.4)
    key = {"dropout": jax.random.key(3)}
    return module.apply(variables_of(module, mask), inputs(TOKENS), deterministic=False, rngs=key)


LINEN: list[LinenContext] = [
    scanned_with_a_mask_each,
    scanned_with_one_mask,
    lifted,
    in_a_sequence,
    shared,
    trained,
    serialized,
    with_mutable_buffers,
    dropping,
]


@pytest.mark.parametrize("context", LINEN, ids=lambda each: each.__name__)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.slow
def test_linen_is_the_formula(mask: str, context: LinenContext) -> None:
    found, expected = (context(module, masks()[mask]) for module in linen_pair())
    assert_same(found, expected, TOKENS)


def edited_under_jit(model: Any, given: Array) -> Any:
    """An edit outside and one inside are both seen, without another trace."""
    traces = []

    @nnx.jit
    def call(model: Any, given: Array) -> Array:
        traces.append(1)
        outputs = model(given)
        model.mask[...] = model.mask[...].at[20:, 2].set(1.0)
        return outputs

    found = [call(model, given), call(model, given)]
    model.mask[...] = masks()["closed"]
    found.append(call(model, given))
    assert len(traces) == 1
    return found, model.mask[...]


def differentiated_by_kind(model: Any, given: Array) -> Any:
    def loss(model: Any) -> Array:
        return size(model(given))

    kinds = (nnx.Param, Buffer)
    return [
        nnx.to_pure_dict(nnx.grad(loss, argnums=nnx.DiffState(0, kind))(model)) for kind in kinds
    ]


def optimized(model: Any, given: Array) -> Any:
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(2):
            optimizer.update(model, nnx.grad(lambda model: size(model(given)))(model))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def mapped_and_scanned(model: Any, given: Array) -> Any:
    parts: Any = nnx.split(model, (nnx.Param, Buffer), ...)
    graph, state, rest = parts
    doubled = jax.tree.map(lambda array: jnp.stack([array, array * 2.0]), state)
    by_kind: Any = {(nnx.Param, Buffer): 0, ...: None}
    axes = nnx.StateAxes(by_kind)
    members = nnx.merge(graph, doubled, rest)

    def call(model: Any, given: Array) -> Any:
        return model(given)

    def step(model: Any, carried: Array) -> Any:
        return model(carried)[..., :FEATURES] + carried

    mapped = nnx.vmap(call, in_axes=(axes, None))
    scanned = nnx.scan(step, in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
    return mapped(members, given), scanned(members, given)


def rematerialized(model: Any, given: Array) -> Any:
    call = nnx.remat(lambda model, given: model(given))
    gradient = nnx.grad(lambda model: size(call(model, given)))(model)
    return call(model, given), nnx.to_pure_dict(gradient)


def split_and_merged(model: Any, given: Array) -> Any:
    parts: Any = nnx.split(model, nnx.Param, Buffer, ...)
    graph, params, buffers, rest = parts
    edited = jax.tree.map(lambda mask: mask.at[18:, 5].set(1.0), buffers)
    merged = nnx.merge(graph, params, edited, rest)
    pure = jax.jit(lambda state: nnx.merge(graph, state, edited, rest)(given))
    view = nnx.clone(model)
    nnx.update(view, edited)
    gradient = jax.grad(lambda state: size(nnx.merge(graph, state, buffers, rest)(given)))(params)
    return merged(given), pure(params), view(given), model(given), nnx.to_pure_dict(gradient)


def branched_and_looped(model: Any, given: Array) -> Any:
    def call(model: Any, given: Array) -> Any:
        return model(given)[..., :FEATURES]

    chosen = nnx.cond(jnp.asarray(True), call, lambda _, given: given, model, given)
    looped = lax.fori_loop(0, 2, lambda _, carried: call(model, carried), given)
    return chosen, looped


def donated(model: Any, given: Array) -> Any:
    expected = model(given)
    call = nnx.jit(lambda model, given: model(given)[..., :FEATURES], donate_argnums=1)
    return expected, call(model, given.copy())


NNX: list[NnxContext] = [
    edited_under_jit,
    differentiated_by_kind,
    optimized,
    mapped_and_scanned,
    rematerialized,
    split_and_merged,
    branched_and_looped,
    donated,
]


@pytest.mark.parametrize("context", NNX, ids=lambda each: each.__name__)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.slow
def test_nnx_is_the_formula(mask: str, context: NnxContext) -> None:
    found, expected = (
        context(_in_double(model, masks()[mask]), inputs(TOKENS)) for model in nnx_pair()
    )
    assert_same(found, expected, TOKENS)


def _in_double(model: Any, mask: Array) -> Any:
    params = jax.tree.map(lambda array: array.astype(jnp.float64), nnx.state(model, nnx.Param))
    nnx.update(model, params)
    model.mask[...] = mask
    return model


@pytest.mark.slow
def test_nnx_dropout_is_the_formulas() -> None:
    """Each scan step and each member draws from a stream of its own, as in the formula."""

    by_kind: Any = {nnx.RngState: 0, ...: None}
    axes = nnx.StateAxes(by_kind)

    def step(model: Any, carried: Array) -> Any:
        return model(carried)[..., :FEATURES] + carried

    scanned = nnx.split_rngs(splits=3)(
        nnx.scan(step, in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
    )

    def call(model: Any, given: Array) -> Any:
        return model(given), model(given), scanned(model, given)

    found, expected = (
        call(_in_double(model, masks()["edited"]), inputs(TOKENS)) for model in nnx_pair(0.4)
    )
    assert_same(found, expected, TOKENS)
    assert bool((found[0] != found[1]).any())
