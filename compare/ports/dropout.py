"""Draw the same dropout patterns in both frameworks, by the entries that are dropped.

Whether an entry is kept follows from its own number, so that neither the layout nor the order of
the calls matters: the leading digits of the number are thrown away, and what is left lies evenly
between 0 and 1. A pattern that is shared along axes follows from the mean size along them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from ..frameworks import Tensor, TorchDispatchMode, jax, jnp, linen, nnx, torch

# Even, so that what is left runs on over a power of 2. Roundings of one unit grow by it.
_FOLDS = 1018.0
_aten = torch.ops.aten
_MADE_LIKE = (_aten.empty_like.default, _aten.new_empty.default)
_PRODUCTS = (_aten.mul.Tensor, _aten.mul_.Tensor)


class SharedPatterns(TorchDispatchMode):
    """Draws torch's dropout patterns by the entries.

    They are the Bernoulli numbers that are written into an empty tensor made for another one, as
    `dropout`, attention and recurrent layers do, and multiplied with that other one.

    Attributes:
        drawn: how many patterns were drawn.
        is_foreign: whether one was multiplied with other entries than it was made for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drawn, self.is_foreign = 0, False
        # By the id of a pattern: the pattern, which so stays alive, and what it was made for.
        self._made_for: dict[int, tuple[Tensor, Tensor]] = {}
        self._patterns: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, or draw the pattern in its place."""
        if func is _aten.bernoulli_.float and id(args[0]) in self._made_for:
            _, entries = self._patterns[id(args[0])] = self._made_for.pop(id(args[0]))
            keep = args[1] if len(args) > 1 else 0.5
            self.drawn += 1
            return args[0].copy_(torch_uniform(entries, args[0].shape) < keep)
        if func in _PRODUCTS:
            for one, other in (args[:2], args[1::-1]):
                if id(one) in self._patterns:
                    self.is_foreign |= not _is_one(self._patterns[id(one)][1], other)
        result = func(*args, **(kwargs or {}))
        if func in _MADE_LIKE and args[0].is_floating_point() and _is_shared(args[0], result.shape):
            self._made_for[id(result)] = result, args[0]
        return result


def _is_one(entries: Tensor, other: Any) -> bool:
    """Return whether both are the same place in memory."""
    return isinstance(other, Tensor) and other.data_ptr() == entries.data_ptr()


def _is_shared(entries: Any, shape: Sequence[int]) -> bool:
    """Return whether a pattern of a shape is one for these entries, or is shared along axes."""
    return len(entries.shape) == len(shape) and all(
        count in (1, whole) for count, whole in zip(shape, entries.shape, strict=True)
    )


def torch_uniform(entries: Tensor, shape: Sequence[int]) -> Tensor:
    """Return numbers between 0 and 1 that follow from the entries, of a shape with shared axes."""
    with torch.no_grad():
        axes = [axis for axis, count in enumerate(shape) if count != entries.shape[axis]]
        means = entries.abs().mean(axes, keepdim=True) if axes else entries
        folded = torch.frexp(means).mantissa * _FOLDS
        return 2.0 * (folded - folded.floor() - 0.5).abs()


def jax_uniform(entries: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Return numbers between 0 and 1 that follow from the entries, of a shape with shared axes."""
    entries = jax.lax.stop_gradient(entries)
    axes = tuple(axis for axis, count in enumerate(shape) if count != entries.shape[axis])
    means = jnp.abs(entries).mean(axes, keepdims=True) if axes else entries
    folded = jnp.frexp(means)[0] * _FOLDS
    return 2.0 * jnp.abs(folded - jnp.floor(folded) - 0.5)


@contextmanager
def flax_patterns() -> Iterator[None]:
    """Draw the patterns of Flax's Dropout by the entries, in Linen and in NNX."""
    of_nnx = nnx.Dropout.__call__

    def call(
        layer: nnx.Dropout, inputs: jax.Array, *, deterministic: Any = None, rngs: Any = None
    ) -> jax.Array:
        given = layer.deterministic if deterministic is None else deterministic
        if given or given is None:  # without either, its own error
            return of_nnx(layer, inputs, deterministic=deterministic, rngs=rngs)
        return _dropped(inputs, layer.rate, layer.broadcast_dims)

    with linen.intercept_methods(_of_linen), patch.object(nnx.Dropout, "__call__", call):
        yield


def _of_linen(
    proceed: Callable[..., Any], args: Any, kwargs: Any, context: linen.module.InterceptorContext
) -> Any:
    layer = context.module
    if not isinstance(layer, linen.Dropout) or context.method_name != "__call__":
        return proceed(*args, **kwargs)
    deterministic = kwargs.get("deterministic", args[1] if len(args) > 1 else None)
    given = layer.deterministic if deterministic is None else deterministic
    if given or given is None:
        return proceed(*args, **kwargs)
    return _dropped(
        kwargs.get("inputs", args[0] if args else None), layer.rate, layer.broadcast_dims
    )


def _dropped(inputs: Any, rate: float, shared: Sequence[int]) -> jax.Array:
    """Return what is left of the inputs, each entry divided by the share that is kept."""
    if rate in (0.0, 1.0):
        return inputs if rate == 0.0 else jnp.zeros_like(inputs)
    along = [axis % inputs.ndim for axis in shared]
    shape = [1 if axis in along else count for axis, count in enumerate(inputs.shape)]
    keep = jnp.broadcast_to(jax_uniform(inputs, shape) < 1.0 - rate, inputs.shape)
    return jax.lax.select(keep, inputs / (1.0 - rate), jnp.zeros_like(inputs))
