"""Run the Flax module, Linen or NNX, as a pure function of its state: outputs, gradients, state."""

import inspect
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from ..conversion.mapping import KeyPath
from ..conversion.state_kinds import FlaxSide, flax_side
from ..proof.cases import Framework
from .calls import Call, call_of
from .dropout import flax_patterns
from .errors import PortError
from .flax_dtypes import carries_in, is_narrow, retype, widened, widened_casts, working_dtype
from .trees import arrays_of_output

Leaves = dict[KeyPath, Any]
# What the arguments of a call that say whether it trains are named, and their values in training.
TRAINS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}
SEED = 0  # of Flax's own random operations


class Adapters(NamedTuple):
    """How the Flax module is called.

    Attributes:
        inputs: a function from torch's arguments to Flax's: an argument, a tuple, or a dict.
        outputs: a function from what it returns to what torch returns.
        method: the name of the method to call.
        train: the keywords of a call in training; found by their names by default.
    """

    inputs: Callable[..., Any] | None = None
    outputs: Callable[[Any], Any] | None = None
    method: str | None = None
    train: Mapping[str, Any] | None = None

    def call(self, call: Call) -> Call:
        """Return the call with Flax's arguments."""
        if self.inputs is None:
            return call
        return call_of(self.inputs(*call.args, **call.kwargs))

    def output(self, raw: Any) -> Any:
        """Return what the module returns as torch returns it."""
        return raw if self.outputs is None else self.outputs(raw)

    def keywords(self, function: Callable[..., Any], *, train: bool) -> dict[str, Any]:
        """Return the keywords that say whether the call trains."""
        if self.train is not None:
            return {
                name: value if train else not value
                for name, value in self.train.items()
                if train or isinstance(value, bool)
            }
        known = inspect.signature(function).parameters
        return {name: value is train for name, value in TRAINS.items() if name in known}


class LinenPort:
    """A Linen module.

    Args:
        module: the module, unbound.
        adapters: how it is called.

    Attributes:
        widened: the layers whose `dtype` is narrower than that of a run in float64.
        casts: the lines that cast to a narrower dtype, if torch has such lines too; else None.
    """

    api: Framework = "linen"

    def __init__(self, module: linen.Module, adapters: Adapters) -> None:
        self.module, self.adapters = module, adapters
        self.widened: dict[str, None] = {}
        self.casts: dict[str, None] | None = None
        self._function = getattr(module, adapters.method or "__call__")
        self._layers: dict[tuple[str, ...], linen.Module] = {}

    def template(self, call: Call) -> Any:
        """Return the variables of the module, without values."""

        def keep(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            self._layers.setdefault(context.module.path, context.module)
            return method(*args, **kwargs)

        with linen.intercept_methods(keep), carries_in(jnp.float64):
            return jax.eval_shape(lambda: self._fresh(call))

    def _fresh(self, call: Call) -> Any:
        """Return fresh variables."""
        made = self.adapters.call(call.replaced(on_device(call.arrays)))
        keywords = self.adapters.keywords(self._function, train=False)
        return self.module.init(
            _streams(SEED), *made.args, **made.kwargs, **keywords, method=self.adapters.method
        )

    def filled(self, template: Any, call: Call, known: Container[KeyPath]) -> Any:
        """Return the variables with fresh values where no value is known."""
        shapes = flatten_dict(dict(template))
        unknown = [path for path in shapes if path not in known]

        def values() -> Leaves:
            made = flatten_dict(dict(self._fresh(call)))
            return {path: made[path] for path in unknown}

        if not unknown:
            return template
        with carries_in(jnp.float64):
            return unflatten_dict(shapes | jax.jit(values)())

    def side(self, template: Any) -> FlaxSide:
        """Return the variables with what the layers, which existed when they were made, say."""
        return flax_side(template)._replace(layers=lambda: self._layers)

    def apply(
        self, leaves: Leaves, call: Call, *, train: bool, seed: int | jax.Array = SEED
    ) -> tuple[Any, Leaves]:
        """Return what the module returns, and its state after the call."""
        made = self.adapters.call(call)
        variables = unflatten_dict(leaves)
        others = [name for name in variables if name != "params"]
        dtype, module = working_dtype(leaves), self.module
        if is_narrow(module, dtype):
            module = module.clone(dtype=dtype)
            self.widened[type(module).__name__] = None
        with (
            _casting(self.casts, dtype),
            widened(dtype, self.widened),
            flax_patterns(),
            carries_in(dtype),
        ):
            raw, changed = module.apply(
                variables,
                *made.args,
                **made.kwargs,
                **self.adapters.keywords(self._function, train=train),
                mutable=others,
                rngs=_streams(seed),
                method=self.adapters.method,
            )
        after = {path: leaf for path, leaf in flatten_dict(dict(changed)).items() if path in leaves}
        return self.adapters.output(raw), after


class NnxPort:
    """An NNX model.

    Args:
        model: the model, which stays as it is.
        adapters: how it is called.

    Attributes:
        widened: as those of `LinenPort`.
        casts: likewise.
    """

    api: Framework = "nnx"

    def __init__(self, model: nnx.Module, adapters: Adapters) -> None:
        self.module, self.adapters = nnx.clone(model), adapters
        self.widened: dict[str, None] = {}
        self.casts: dict[str, None] | None = None
        self._names = flax_side(model).leaves.keys()

    def template(self, call: Call) -> Any:
        """Return the model, whose layers say their layouts."""
        return self.module

    def filled(self, template: Any, call: Call, known: Container[KeyPath]) -> Any:
        """Return the model, which has values."""
        return template

    def side(self, template: Any) -> FlaxSide:
        """Return the model's leaves with what its layers say."""
        return flax_side(template)

    def apply(
        self, leaves: Leaves, call: Call, *, train: bool, seed: int | jax.Array = SEED
    ) -> tuple[Any, Leaves]:
        """Return what the model returns, and its state after the call."""
        made = self.adapters.call(call)
        model, dtype = nnx.clone(self.module), working_dtype(leaves)
        nnx.update(model, unflatten_dict(leaves))
        self.widened |= dict.fromkeys(retype(model, dtype))
        streams: dict[str, Any] = {
            node.key.tag: jax.random.key(seed)
            for _, node in nnx.iter_graph(model)
            if isinstance(node, nnx.RngStream)
        }
        nnx.reseed(model, policy="match_shape", **streams)
        model.train() if train else model.eval()
        function = getattr(model, self.adapters.method or "__call__")
        keywords = self.adapters.keywords(function, train=train)
        with _casting(self.casts, dtype), flax_patterns():
            raw = function(*made.args, **made.kwargs, **keywords)
        after = {
            path: leaf for path, leaf in flax_side(model).leaves.items() if path in self._names
        }
        return self.adapters.output(raw), after


Port = LinenPort | NnxPort


def _casting(casts: dict[str, None] | None, dtype: Any) -> AbstractContextManager[None]:
    """Widen casts in a run in float64, if there is a place for their lines."""
    if casts is None or dtype != jnp.float64:
        return nullcontext()
    return widened_casts(casts)


def port_of(module: Any, adapters: Adapters) -> Port:
    """Return the Flax module as something to run.

    Raises:
        PortError: it is no Flax module.
    """
    if isinstance(module, linen.Module):
        return LinenPort(module, adapters)
    if isinstance(module, nnx.Module):
        return NnxPort(module, adapters)
    raise PortError(
        f"flax_module is of type {type(module).__name__}; expected a Linen module or an NNX model"
    )


def gradients_of(
    port: Port,
    leaves: Leaves,
    trained: list[KeyPath],
    call: Call,
    floats: Mapping[str, Any],
    cotangents: Mapping[str, np.ndarray],
    *,
    train: bool,
    seed: int | jax.Array = SEED,
) -> tuple[dict[str, Any], Leaves, Leaves, dict[str, Any]]:
    """Return outputs, state, and gradients by parameters and by inputs, of a function to trace."""
    fixed = {path: leaf for path, leaf in leaves.items() if path not in trained}

    def forward(params: Leaves, inputs: dict[str, Any]) -> tuple[Any, Any]:
        raw, after = port.apply(params | fixed, call.replaced(inputs), train=train, seed=seed)
        outputs = named(raw)
        total = sum(
            (outputs[name] * cotangents[name].astype(outputs[name].dtype)).sum()
            for name in cotangents
            if name in outputs
            and outputs[name].shape == cotangents[name].shape
            and jnp.issubdtype(outputs[name].dtype, jnp.inexact)
        )
        return jnp.asarray(total, dtype=_widest(params, inputs)), (outputs, after)

    params = {path: leaves[path] for path in trained}
    (by_params, by_inputs), (outputs, after) = jax.grad(forward, argnums=(0, 1), has_aux=True)(
        params, dict(floats)
    )
    return outputs, after, by_params, by_inputs


def _widest(params: Leaves, inputs: Mapping[str, Any]) -> Any:
    leaves = [*params.values(), *inputs.values()]
    return jnp.result_type(*leaves) if leaves else jnp.float32


def named(raw: Any) -> dict[str, Any]:
    """Return the arrays of an output by name; the parts of complex ones are a last axis."""
    found = on_device(arrays_of_output(raw, "Flax", "array"))
    return {
        name: jnp.stack([array.real, array.imag], axis=-1) if jnp.iscomplexobj(array) else array
        for name, array in found.items()
    }


def on_device(arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Return the arrays as JAX arrays."""
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def cast(leaves: Mapping[KeyPath, Any], dtype: str) -> Leaves:
    """Return the leaves with floating ones in another dtype."""
    return {
        path: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for path, leaf in leaves.items()
    }


def cast_call(call: Call, dtype: str) -> Call:
    """Return the call with floating arrays in another dtype."""
    return call.replaced({name: array.astype(dtype) for name, array in call.floats.items()})


def _streams(seed: int | jax.Array) -> dict[str, jax.Array]:
    return {name: jax.random.key(seed) for name in ("params", "dropout", "default")}
