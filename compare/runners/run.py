"""Build one implementation with a given state, run it, and return NumPy arrays."""

from collections.abc import Callable, Mapping
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
from .jax_settings import jax_on

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
    module_class = (
        torch_impl.CausalAttentionWithBuffer if buffer else torch_impl.CausalAttentionWithoutBuffers
    )
    return module_class(**config.arguments)


def build_linen(config: Config, *, buffer: bool) -> LinenAttention:
    """Return the Linen module, with or without the buffer; with heads, always with it."""
    if config.num_heads is not None:
        return flax_impl.CausalMultiHeadAttention(**config.arguments)
    module_class = (
        flax_impl.CausalAttentionWithBuffer if buffer else flax_impl.CausalAttentionWithoutBuffers
    )
    return module_class(**config.arguments)


def build_nnx(config: Config, *, buffer: bool) -> NnxAttention:
    """Return a fresh NNX model, with or without the buffer; with heads, always with it."""
    if config.num_heads is not None:
        return flax_impl.nnx.CausalMultiHeadAttention(**config.arguments, rngs=nnx.Rngs(0))
    module_class = (
        flax_impl.nnx.CausalAttentionWithBuffer
        if buffer
        else flax_impl.nnx.CausalAttentionWithoutBuffers
    )
    return module_class(**config.arguments, rngs=nnx.Rngs(0))


def linen_template(config: Config, *, buffer: bool) -> dict[str, Any]:
    """Return the shapes and dtypes of the Linen variables, without creating arrays."""
    inputs = jax.ShapeDtypeStruct((1, 1, config.input_embedding_dim), jnp.float32)
    return jax.eval_shape(build_linen(config, buffer=buffer).init, jax.random.key(0), inputs)


def linen_mask(config: Config, variables: Mapping[str, Any], *, buffer: bool) -> jax.Array:
    """Return the mask that the Linen module uses: its variable, or its constant."""
    mask = build_linen(config, buffer=buffer).bind(variables).mask
    return mask.value if isinstance(mask, linen.module.Variable) else mask


def missing_cuda() -> str | None:
    """Return which frameworks see no CUDA device, or None if both see one."""
    without_cuda = [] if torch.cuda.is_available() else ["torch"]
    try:
        jax.devices("cuda")
    except RuntimeError:
        without_cuda.append("jax")
    return f"no CUDA device is seen by {' and '.join(without_cuda)}" if without_cuda else None


def sees_accelerator() -> bool:
    """Return whether a framework sees a device other than the CPU."""
    return torch.cuda.is_available() or jax.default_backend() != "cpu"


def devices_to_run(device: str | None) -> list[str]:
    """Return the device that was asked for, or the CPU, and CUDA if both frameworks see it."""
    if device is not None:
        return [device]
    return ["cpu"] if missing_cuda() else ["cpu", "cuda"]


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
        framework: the framework; the class with the buffer runs if the state has a mask.
        config: the constructor arguments.
        state: the parameters by their torch names, in the working dtype; converted for Flax.
        inputs: (batch, tokens, input_embedding_dim), in the state's dtype.
        device: "cpu" or "cuda"; on CUDA, torch's float32 products avoid TF32.
        keep: (batch, tokens, tokens), True where dropout keeps the weight. It replaces the
            framework's own random pattern; None runs without dropout.
        matmul: JAX's precision of float32 products. "highest" avoids TF32; "default" uses TF32 on
            GPUs.
    """
    runner = {"torch": _run_torch, "linen": _run_linen, "nnx": _run_nnx}[framework]
    if framework == "torch":
        return runner(config, state, inputs, device, keep)
    with jax_on(device, inputs.dtype, matmul):
        return runner(config, state, inputs, jax.devices(device)[0], keep)


def compiled(
    framework: Framework, config: Config, device: str = "cpu"
) -> Callable[..., np.ndarray]:
    """Return a function like `run`, of state, inputs and optional `keep`, that is compiled once.

    It runs the class with the buffer. In Flax, the whole forward pass is compiled, while `run`
    executes its operations one by one. In torch, nothing is compiled.
    """
    if framework == "torch":

        def call_torch(
            state: State, inputs: np.ndarray, keep: np.ndarray | None = None
        ) -> np.ndarray:
            return _run_torch(config, state, inputs, device, keep)

        return call_torch
    forward = jax.jit(flax_forward(framework, config))
    template = flax_template(framework, config)

    def call(state: State, inputs: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
        with jax_on(device, inputs.dtype):
            return np.asarray(forward(*flax_state(state, template), keep, inputs))

    return call


def flax_template(framework: Framework, config: Config) -> dict[str, Any] | NnxAttention:
    """Return the Linen variables or the NNX model, with shapes instead of arrays."""
    return linen_template(config, buffer=True) if framework == "linen" else _abstract_nnx(config)


def flax_state(state: State, template: dict[str, Any] | NnxAttention) -> tuple[Any, Any]:
    """Return the trees of params and buffers that the function of `flax_forward` takes."""
    if isinstance(template, dict):
        variables = torch_to_linen(torch_state(state), template)
        return variables.pop("params"), variables
    model = torch_to_nnx(torch_state(state), template)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param)), nnx.state(model, flax_impl.nnx.Buffer)


def flax_forward(
    framework: Framework,
    config: Config,
    prepare: Callable[[NnxAttention], None] = lambda model: None,
) -> Callable[..., jax.Array]:
    """Return the forward pass as a function of params, buffers, `keep` or None, and inputs.

    In Linen and NNX, the function has the same name and takes the same arrays in the same order. If
    both are the same program, JAX's compilation cache therefore compiles it only once. `prepare` is
    called with the NNX model at each call. Further keywords are those of the module's call.
    """
    return _linen_forward(config) if framework == "linen" else _nnx_forward(config, prepare)


def _linen_forward(config: Config) -> Callable[..., jax.Array]:
    def forward(params: Any, buffers: Any, keep: Any, inputs: Any, **options: Any) -> jax.Array:
        apply = linen_apply(config, keep, buffer=True)
        return apply({"params": params, **buffers}, inputs, **options)

    return forward


def _nnx_forward(
    config: Config, prepare: Callable[[NnxAttention], None]
) -> Callable[..., jax.Array]:
    split: Any = nnx.split(_abstract_nnx(config), nnx.Param, flax_impl.nnx.Buffer, ...)
    graph, _, _, rest = split

    def forward(params: Any, buffers: Any, keep: Any, inputs: Any, **options: Any) -> jax.Array:
        model = nnx.merge(graph, nnx.State(params), buffers, rest)
        if keep is not None:
            model.train()
            model.dropout = NnxFunction(partial(_drop, config, keep))
        prepare(model)
        return model(inputs, **options)

    return forward


def _abstract_nnx(config: Config) -> NnxAttention:
    """Return the NNX model with the buffer, in `eval` mode, with shapes instead of arrays."""
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
    """Return the module on the device, with this state.

    With `keep`, it is in training mode and its dropout keeps exactly those weights; without, it is
    in `eval` mode.
    """
    module = build_torch(config, buffer="mask" in state)
    module.load_state_dict(torch_state(state), assign=True)
    module.to(device).train(keep is not None)
    module.mask = module.mask.to(device)  # without the buffer, `.to` does not move it
    if keep is not None:
        kept = torch.from_numpy(keep).to(device)
        module.dropout = TorchFunction(
            lambda weights: torch.where(kept, weights / (1.0 - config.dropout), 0.0)
        )  # type: ignore[assignment]
    return module


def linen_apply(config: Config, keep: Any, *, buffer: bool) -> Callable[..., Any]:
    """Return `apply` of the Linen module, as a function of variables, inputs and other arguments.

    With `keep`, its dropout keeps exactly those weights; with None, it is deterministic.
    """
    model = build_linen(config, buffer=buffer)

    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: linen.module.InterceptorContext
    ) -> Any:
        if not isinstance(context.module, linen.Dropout):
            return call(*args, **kwargs)
        return _drop(config, keep, args[0])

    def apply(variables: Mapping[str, Any], inputs: jax.Array, **options: Any) -> Any:
        if keep is None:  # an interceptor would see the formula instead of the fused path
            return model.apply(variables, inputs, **options)
        with linen.intercept_methods(intercept):
            return model.apply(variables, inputs, deterministic=False, **options)

    return apply


def ready_linen(
    config: Config, state: State, keep: np.ndarray | None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return `linen_apply` for this state and its variables."""
    buffer = "mask" in state
    variables = torch_to_linen(torch_state(state), linen_template(config, buffer=buffer))
    return linen_apply(config, keep, buffer=buffer), variables


def ready_nnx(config: Config, state: State, keep: np.ndarray | None) -> NnxAttention:
    """Return the model with this state.

    With `keep`, it is in training mode and its dropout keeps exactly those weights; without, it is
    in `eval` mode.
    """
    model = torch_to_nnx(torch_state(state), build_nnx(config, buffer="mask" in state))
    model.eval()
    if keep is not None:
        model.train()
        model.dropout = NnxFunction(partial(_drop, config, keep))  # type: ignore[assignment]
    return model


class TorchFunction(torch.nn.Module):
    """A function in place of a child module, such as dropout with a fixed pattern."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        """Apply the function."""
        return self.function(weights)


class NnxFunction(nnx.Module):
    """A function in place of a child module, such as dropout with a fixed pattern."""

    def __init__(self, function: Callable[[jax.Array], jax.Array]) -> None:
        self.function = function

    def __call__(self, weights: jax.Array) -> jax.Array:
        """Apply the function."""
        return self.function(weights)
