"""Convert one tensor between torch and JAX, bit for bit, by copy or by shared memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import DTYPES, is_extended, numpy_dtype
from ..files.printable import kind_of
from ..frameworks import HAS_TORCH, Tensor, is_lazy, jax, jnp, torch

# Dtypes that NumPy lacks are viewed as unsigned integers of the same width.
_CARRIERS = {1: (torch.uint8, np.uint8), 2: (torch.uint16, np.uint16)}


UNINITIALIZED = "a lazy layer has no values yet: call the module once first"
NESTED = "a nested tensor; store its parts one by one"


class Untransferable(ValueError):
    """The value has no exact counterpart in the other framework; the message says why."""


def tensor_to_numpy(tensor: Any) -> np.ndarray:
    """Return the tensor as a NumPy array, sharing memory if the tensor is on the CPU.

    A NumPy array is returned as it is.
    bfloat16 and float8 become the `ml_dtypes` of the same name.

    Raises:
        Untransferable: a meta, sparse or quantized tensor, a dtype without a NumPy counterpart, or
            a subclass of Tensor that computes its values, as DTensor.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = dense(tensor).cpu()
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        if not is_extended(name):
            return tensor.numpy()
        carrier, _ = _CARRIERS[tensor.element_size()]
        return tensor.view(carrier).numpy().view(numpy_dtype(name))
    except (TypeError, AttributeError) as error:
        raise Untransferable(f"dtype {tensor.dtype} has no NumPy counterpart") from error


def as_tensor(value: Any) -> Any:
    """Return a NumPy or JAX array as a tensor, and anything else as it is.

    A NumPy array that can be written to shares its memory with the tensor. Without torch, arrays
    are returned as they are.
    """
    if not HAS_TORCH:
        return value
    try:
        if isinstance(value, np.ndarray) and value.flags.writeable:
            return numpy_to_tensor(value)
        if isinstance(value, np.ndarray | jax.Array):
            return numpy_to_tensor(np.array(to_host(value)))
    except Untransferable:
        return value
    return value


def as_shared_tensor(value: Any) -> Any:
    """Return a NumPy or JAX array as a tensor that shares its memory, and anything else as it is.

    Raises:
        Untransferable: the memory cannot be shared.
    """
    return to_torch(value, copy=False) if isinstance(value, jax.Array | np.ndarray) else value


def numpy_to_tensor(array: np.ndarray) -> Tensor:
    """Return the array as a CPU tensor, sharing memory; the inverse of `tensor_to_numpy`.

    Raises:
        Untransferable: torch does not have the dtype.
    """
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        if not is_extended(native.dtype.name):
            is_mirrored = any(stride < 0 for stride in native.strides)  # which torch does not have
            return torch.from_numpy(native.copy() if is_mirrored else native)
        _, carrier = _CARRIERS[native.dtype.itemsize]
        return torch.from_numpy(native.view(carrier)).view(getattr(torch, native.dtype.name))
    except (TypeError, AttributeError) as error:
        raise Untransferable(f"dtype {array.dtype} has no torch counterpart") from error


def numpy_state(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the state dict as NumPy arrays, sharing memory for tensors on the CPU."""
    return {key: tensor_to_numpy(tensor) for key, tensor in state.items()}


def torch_state(state: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return the arrays as a torch state dict, sharing memory."""
    return {key: numpy_to_tensor(array) for key, array in state.items()}


def to_jax(tensor: Any, *, copy: bool, owned: bool = False) -> jax.Array:
    """Return the tensor as a JAX array of the same dtype.

    A copy is made in host memory and placed on JAX's default device. With `copy=False`, the array
    aliases the tensor through DLPack and stays on its device: an in-place edit of the tensor then
    changes the array, which JAX assumes to be immutable.

    int64 becomes int32 if x64 is off, but only if every value fits. `owned=True` says that nothing
    else uses the tensor, so that a copy may take over its memory.

    Raises:
        Untransferable: as `tensor_to_numpy`; a 64-bit value that JAX would narrow with loss; with
            `copy=False`, a tensor whose memory cannot be shared.
    """
    if isinstance(tensor, np.ndarray):
        return jax.device_put(np.array(tensor, order="C"))
    tensor = _fit_x64(dense(tensor, copy=copy), copy=copy)
    if copy:
        # `device_put` keeps the memory if JAX can; `jnp.asarray` would copy it twice.
        return jax.device_put(
            np.array(tensor_to_numpy(tensor), order="C", copy=None if owned else True)
        )
    try:
        return jax.dlpack.from_dlpack(tensor, copy=False)
    except Exception as error:  # the class of XLA's errors differs between versions
        raise Untransferable(f"memory cannot be shared ({error}); use copy=True") from error


def to_torch(array: jax.Array | np.ndarray, *, copy: bool) -> Any:
    """Return the array as a tensor of the same dtype.

    A copy is made on the CPU; the parts of a sharded array are gathered. With `copy=False`, the
    tensor aliases the array through DLPack and stays on its device: an in-place edit of the tensor
    then changes the array, which JAX assumes to be immutable.

    Raises:
        Untransferable: torch does not have the dtype; a donated array; with `copy=False`, an array
            whose memory cannot be shared.
    """
    _require_values(array)
    if not HAS_TORCH:
        return np.array(np.asarray(array), order="C")
    if copy:
        return numpy_to_tensor(np.array(np.asarray(array), order="C", copy=True))
    if isinstance(array, np.ndarray) and array.dtype.name not in DTYPES:
        raise Untransferable(f"torch has no dtype {array.dtype}")
    if isinstance(array, np.ndarray) and (reason := _unsharable(array)):
        raise Untransferable(f"the array {reason}, so memory cannot be shared; use copy=True")
    try:
        return torch.from_dlpack(array) if isinstance(array, jax.Array) else numpy_to_tensor(array)
    except Exception as error:  # the class of XLA's errors differs between versions
        raise Untransferable(f"memory cannot be shared ({error}); use copy=True") from error


def _unsharable(array: np.ndarray) -> str | None:
    """Return why torch cannot use the memory of a NumPy array, or None if it can."""
    if not array.flags.writeable:
        return "is read-only"
    if any(stride < 0 for stride in array.strides):
        return "has negative strides"
    return None if array.dtype.isnative else "has a foreign byte order"


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Return the array as a NumPy array, gathered from every device.

    Raises:
        Untransferable: a donated array, or one without plain values, such as typed keys.
    """
    _require_values(array)
    return np.asarray(array)


def _require_values(array: jax.Array | np.ndarray) -> None:
    if isinstance(array, jax.Array) and array.is_deleted():
        raise Untransferable(
            "the array was deleted, as a donated argument is; convert it before it is donated"
        )
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.extended):
        raise Untransferable(f"dtype {array.dtype} has no torch counterpart")


def dense(tensor: Any, *, copy: bool = True) -> Any:
    """Return the tensor detached, with its conjugate and negative bits applied.

    Raises:
        Untransferable: a lazy, nested, meta, sparse or quantized tensor, or a subclass as DTensor,
            which has no plain values;
            with `copy=False`, a conjugated or negated view, whose values are not in memory.
    """
    if isinstance(tensor, np.ndarray) and not HAS_TORCH:
        return tensor
    if not isinstance(tensor, Tensor):
        raise Untransferable(f"is {kind_of(tensor)}, not a tensor; give torch.as_tensor(...)")
    if is_lazy(tensor):
        raise Untransferable(UNINITIALIZED)
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        mend = "tensor.full_tensor()" if hasattr(tensor, "full_tensor") else "a plain tensor"
        raise Untransferable(
            f"is {kind_of(tensor)}, which decides itself what its values are; give {mend}"
        )
    if tensor.is_nested:
        raise Untransferable(NESTED)
    if tensor.device.type == "meta":
        raise Untransferable(
            "a meta tensor has no values; materialize the module first (`to_empty`, then load)"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise Untransferable(
            "a sparse or quantized tensor; convert it with `to_dense()` or `dequantize()` first"
        )
    if not copy and (tensor.is_conj() or tensor.is_neg()):
        raise Untransferable("a conjugated or negated view cannot share memory; use copy=True")
    return tensor.detach().resolve_conj().resolve_neg()


def is_uninitialized(value: Any) -> bool:
    """Return whether the value is the tensor of a lazy layer that was never called."""
    return isinstance(value, Tensor) and is_lazy(value)


def is_nested(value: Any) -> bool:
    """Return whether the value is a nested tensor, which has no one shape."""
    return isinstance(value, Tensor) and value.is_nested


def shape_of(value: Any) -> tuple[int, ...]:
    """Return the shape of a tensor, an array or a spec, or () if it has none yet."""
    if is_uninitialized(value) or is_nested(value):
        return ()
    return tuple(getattr(value, "shape", ()))


def _fit_x64(tensor: Tensor, *, copy: bool) -> Tensor:
    """Return a tensor that JAX can hold: with x64 off, int64 becomes int32 if every value fits."""
    if jax.config.read("jax_enable_x64") or tensor.dtype not in (
        torch.int64,
        torch.uint64,
        torch.float64,
        torch.complex128,
    ):
        return tensor
    if tensor.dtype != torch.int64:
        raise Untransferable(
            f"JAX would narrow {tensor.dtype} to 32 bits; enable x64 "
            "(`jax.config.update('jax_enable_x64', True)`) or cast the module first"
        )
    limits = torch.iinfo(torch.int32)
    if tensor.numel() and (tensor.min() < limits.min or tensor.max() > limits.max):
        raise Untransferable(
            f"values from {tensor.min()} to {tensor.max()} do not fit int32; enable x64 "
            "(`jax.config.update('jax_enable_x64', True)`)"
        )
    if not copy:
        raise Untransferable(
            "int64 becomes int32 if x64 is off, so memory cannot be shared; use copy=True"
        )
    return tensor.to(torch.int32)
