"""Build one implementation with a given state, run it, and hand out NumPy."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx

import flax_impl
import torch_impl

from ..conversion.convert import torch_to_linen, torch_to_nnx
from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy, torch_state
from ..proof.cases import Config, Framework, State

TorchAttention = (
    torch_impl.CausalAttentionWithBuffer
    | torch_impl.CausalAttentionWithoutBuffers
    | torch_impl.CausalMultiHeadAttention
)
LinenAttention = (
    flax_impl.CausalAttentionWithBuffer
    | flax_impl.CausalAttentionWithoutBuffers
    | flax_impl.CausalMultiHeadAttention
)
NnxAttention = (
    flax_impl.nnx.CausalAttentionWithBuffer
    | flax_impl.nnx.CausalAttentionWithoutBuffers
    | flax_impl.nnx.CausalMultiHeadAttention
)


def build_torch(config: Config, *, buffer: bool) -> TorchAttention:
    """Return a fresh torch module, with or without the buffer; with heads, always with it."""
    if config.num_heads is not None:
        return torch_impl.CausalMultiHeadAttention(**config.arguments)
    kind = (
        torch_impl.CausalAttentionWithBuffer if buffer else torch_impl.CausalAttentionWithoutBuffers
    )
    return kind(**config.arguments)


def build_linen(config: Config, *, buffer: bool) -> LinenAttention:
    """Return the Linen module, with or without the buffer."""
    if config.num_heads is not None:
        return flax_impl.CausalMultiHeadAttention(**config.arguments)
    kind = (
        flax_impl.CausalAttentionWithBuffer if buffer else flax_impl.CausalAttentionWithoutBuffers
    )
    return kind(**config.arguments)


def build_nnx(config: Config, *, buffer: bool) -> NnxAttention:
    """Return a fresh NNX model, with or without the buffer."""
    if config.num_heads is not None:
        return flax_impl.nnx.CausalMultiHeadAttention(**config.arguments, rngs=nnx.Rngs(0))
    kind = (
        flax_impl.nnx.CausalAttentionWithBuffer
        if buffer
        else flax_impl.nnx.CausalAttentionWithoutBuffers
    )
    return kind(**config.arguments, rngs=nnx.Rngs(0))


def linen_template(config: Config, *, buffer: bool) -> dict[str, Any]:
    """Return the shapes of the Linen variables, without making them."""
    inputs = jax.ShapeDtypeStruct((1, 1, config.input_embedding_dim), jnp.float32)
    return jax.eval_shape(build_linen(config, buffer=buffer).init, jax.random.key(0), inputs)


def linen_mask(config: Config, variables: Mapping[str, Any], *, buffer: bool) -> jax.Array:
    """Return the mask that the Linen module works with: its variable, or the constant that it makes."""
    mask = build_linen(config, buffer=buffer).bind(variables).mask
    return mask.value if isinstance(mask, linen.module.Variable) else mask


def missing_cuda() -> str | None:
    """Return which framework sees no CUDA device, or nothing if both see one."""
    lacking = [] if torch.cuda.is_available() else ["torch"]
    try:
        jax.devices("cuda")
    except RuntimeError:
        lacking.append("jax")
    return f"no CUDA device is seen by {' and '.join(lacking)}" if lacking else None


def sees_accelerator() -> bool:
    """Return whether either framework sees another device than the CPU."""
    return torch.cuda.is_available() or jax.default_backend() != "cpu"


def devices_to_run(device: str | None) -> list[str]:
    """Return the devices to run on: the one asked for, or the CPU and CUDA where both frameworks see it."""
    if device is not None:
        return [device]
    return ["cpu"] if missing_cuda() else ["cpu", "cuda"]


@contextmanager
def jax_on(
    device: str, dtype: Any = np.float32, matmul: Literal["highest", "default"] = "highest"
) -> Iterator[None]:
    """Run JAX on that device, with x64 where the dtype is float64, and with products kept from TF32."""
    x64 = np.dtype(dtype) == np.float64
    with (
        jax.enable_x64(x64),
        jax.default_matmul_precision(matmul),
        jax.default_device(jax.devices(device)[0]),
    ):
        yield


def run(
    framework: Framework,
    config: Config,
    state: State,
    inputs: np.ndarray,
    *,
    device: str = "cpu",
    keep: np.ndarray | None = None,
    matmul: Literal["highest", "default"] = "highest",
) -> np.ndarray:
    """Return the outputs of one implementation, (batch, tokens, output_embedding_dim).

    Args:
        framework: which one; the class with the buffer if the state has a mask.
        config: the constructor arguments.
        state: the parameters by torch's names, in the working precision. Flax gets them converted.
        inputs: (batch, tokens, input_embedding_dim), in the state's dtype.
        device: "cpu" or "cuda", for either framework. float32 products are kept from TF32.
        keep: (batch, tokens, tokens), True where dropout keeps the weight, in place of each
            framework's own draw; None runs without dropout.
        matmul: "default" leaves JAX the precision of products that it takes unasked, on a GPU TF32.
    """
    runner = {"torch": _run_torch, "linen": _run_linen, "nnx": _run_nnx}[framework]
    if framework == "torch":
        return runner(config, state, inputs, device, keep)
    with jax_on(device, inputs.dtype, matmul):
        return runner(config, state, inputs, jax.devices(device)[0], keep)


def compiled(
    framework: Framework, config: Config, device: str = "cpu"
) -> Callable[..., np.ndarray]:
    """Return a function of state, inputs and, optionally, `keep`, like `run`, that keeps its compiled program.

    The class with the buffer is run. In Flax it is compiled whole, where `run` goes step by step.
    """
    if framework == "torch":

        def call_torch(
            state: State, inputs: np.ndarray, keep: np.ndarray | None = None
        ) -> np.ndarray:
            return _run_torch(config, state, inputs, device, keep)

        return call_torch
    forward = jax.jit(flax_forward(framework, config))

    def call(state: State, inputs: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
        with jax_on(device, inputs.dtype):
            return np.asarray(forward(*flax_state(framework, config, state), keep, inputs))

    return call


def flax_state(framework: Framework, config: Config, state: State) -> tuple[Any, Any]:
    """Return the params and the buffers, as trees, that `flax_forward` takes."""
    if framework == "linen":
        variables = torch_to_linen(torch_state(state), linen_template(config, buffer=True))
        return variables.pop("params"), variables
    model = torch_to_nnx(torch_state(state), _abstract_nnx(config))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param)), nnx.state(model, flax_impl.nnx.Buffer)


def flax_forward(
    framework: Framework,
    config: Config,
    prepare: Callable[[NnxAttention], None] = lambda model: None,
) -> Callable[[Any, Any, Any, Any], jax.Array]:
    """Return the forward pass as a function of params, buffers, the kept weights or None, and inputs.

    Linen and NNX take the same arrays in the same order, under the same name: where both are the
    same program, JAX's compilation cache compiles it once. `prepare` is called with the NNX model
    of each call.
    """
    return _linen_forward(config) if framework == "linen" else _nnx_forward(config, prepare)


def _linen_forward(config: Config) -> Callable[[Any, Any, Any, Any], jax.Array]:
    def forward(params: Any, buffers: Any, keep: Any, inputs: Any) -> jax.Array:
        return linen_apply(config, keep, buffer=True)({"params": params, **buffers}, inputs)

    return forward


def _nnx_forward(
    config: Config, prepare: Callable[[NnxAttention], None]
) -> Callable[[Any, Any, Any, Any], jax.Array]:
    split: Any = nnx.split(_abstract_nnx(config), nnx.Param, flax_impl.nnx.Buffer, ...)
    graph, _, _, rest = split

    def forward(params: Any, buffers: Any, keep: Any, inputs: Any) -> jax.Array:
        model = nnx.merge(graph, nnx.State(params), buffers, rest)
        if keep is not None:
            model.dropout = NnxFunction(partial(_drop, config, keep))
        prepare(model)
        return model(inputs)

    return forward


def _abstract_nnx(config: Config) -> NnxAttention:
    """Return the NNX model in `eval` mode, with the buffer, without its arrays."""
    model: NnxAttention = nnx.eval_shape(partial(build_nnx, config, buffer=True))
    model.eval()
    return model


def _drop(config: Config, keep: Any, weights: jax.Array) -> jax.Array:
    return jnp.where(keep, weights / (1.0 - config.dropout), 0.0)


def _run_torch(
    config: Config, state: State, inputs: np.ndarray, device: Any, keep: np.ndarray | None
) -> np.ndarray:
    module = ready_torch(config, state, device, keep)
    with torch.no_grad():
        return tensor_to_numpy(module(numpy_to_tensor(inputs).to(device)))


def _run_linen(
    config: Config, state: State, inputs: np.ndarray, device: Any, keep: np.ndarray | None
) -> np.ndarray:
    apply, variables = ready_linen(config, state, keep)
    return np.asarray(apply(jax.device_put(variables, device), jax.device_put(inputs, device)))


def _run_nnx(
    config: Config, state: State, inputs: np.ndarray, device: Any, keep: np.ndarray | None
) -> np.ndarray:
    model = ready_nnx(config, state, keep)
    nnx.update(model, jax.device_put(nnx.state(model), device))
    return np.asarray(model(jax.device_put(inputs, device)))


def ready_torch(
    config: Config, state: State, device: Any, keep: np.ndarray | None
) -> TorchAttention:
    """Return the module with this state on the device, in `eval` mode or dropping what `keep` does not keep."""
    module = build_torch(config, buffer="mask" in state)
    module.load_state_dict(torch_state(state), assign=True)
    module.to(device).eval()
    module.mask = module.mask.to(device)  # without the buffer, `.to` has left it behind
    if keep is not None:
        kept = torch.from_numpy(keep).to(device)
        module.dropout = TorchFunction(
            lambda weights: torch.where(kept, weights / (1.0 - config.dropout), 0.0)
        )  # type: ignore[assignment]
    return module


def linen_apply(
    config: Config, keep: Any, *, buffer: bool
) -> Callable[[Mapping[str, Any], jax.Array], jax.Array]:
    """Return `apply` of the Linen module, deterministic or dropping what `keep`, an array, does not keep."""
    model = build_linen(config, buffer=buffer)

    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: linen.module.InterceptorContext
    ) -> Any:
        if keep is None or not isinstance(context.module, linen.Dropout):
            return call(*args, **kwargs)
        return _drop(config, keep, args[0])

    def apply(variables: Mapping[str, Any], inputs: jax.Array) -> Any:
        with linen.intercept_methods(intercept):
            return model.apply(variables, inputs, deterministic=keep is None)

    return apply


def ready_linen(
    config: Config, state: State, keep: np.ndarray | None
) -> tuple[Callable[[Mapping[str, Any], jax.Array], jax.Array], dict[str, Any]]:
    """Return `apply` and the variables, deterministic or dropping what `keep` does not keep."""
    buffer = "mask" in state
    return linen_apply(config, keep, buffer=buffer), torch_to_linen(
        torch_state(state), linen_template(config, buffer=buffer)
    )


def ready_nnx(config: Config, state: State, keep: np.ndarray | None) -> NnxAttention:
    """Return the model with this state, in `eval` mode or dropping what `keep` does not keep."""
    model = torch_to_nnx(torch_state(state), build_nnx(config, buffer="mask" in state))
    model.eval()
    if keep is not None:
        model.dropout = NnxFunction(partial(_drop, config, keep))  # type: ignore[assignment]
    return model


class TorchFunction(torch.nn.Module):
    """A function in the place of a child module, such as dropout with a given pattern."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        """Apply the function."""
        return self.function(weights)


class NnxFunction(nnx.Module):
    """A function in the place of a child module, such as dropout with a given pattern."""

    def __init__(self, function: Callable[[jax.Array], jax.Array]) -> None:
        self.function = function

    def __call__(self, weights: jax.Array) -> jax.Array:
        """Apply the function."""
        return self.function(weights)
