"""Run `masked_attention` itself, NumPy in and out."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import flax_impl
import torch_impl

from ..conversion.tensors import numpy_to_tensor, tensor_to_numpy
from ..proof.cases import Framework
from .jax_settings import jax_on

Heads = list[np.ndarray]  # queries, keys and values, (..., tokens, head_dim)


class Attention:
    """`masked_attention` of one framework on one device, "cpu" or "cuda"."""

    def __init__(self, framework: Framework, device: str) -> None:
        self.is_torch, self.device = framework == "torch", device

    def __call__(
        self,
        heads: Heads,
        mask: np.ndarray,
        implementation: Any,
        dropout: Callable[[Any], Any] | None = None,
    ) -> np.ndarray:
        """Return the outputs, like the queries in shape and dtype."""
        if self.is_torch:
            with torch.no_grad():
                return tensor_to_numpy(
                    self._torch(map(self._tensor, heads), mask, dropout, implementation)
                )
        with jax_on(self.device, heads[0].dtype):
            return np.asarray(self._jax(map(jnp.asarray, heads), mask, dropout, implementation))

    def gradients(
        self, heads: Heads, mask: np.ndarray, cotangent: np.ndarray, implementation: Any
    ) -> Heads:
        """Return the gradients with respect to the queries, keys and values."""
        if self.is_torch:
            return self.some_gradients(heads, mask, cotangent, implementation, (0, 1, 2))
        with jax_on(self.device, heads[0].dtype):

            def attend(*heads: jax.Array) -> jax.Array:
                return self._jax(heads, mask, None, implementation)

            _, pull_back = jax.vjp(attend, *map(jnp.asarray, heads))
            return [np.asarray(array) for array in pull_back(jnp.asarray(cotangent))]

    def some_gradients(
        self,
        heads: Heads,
        mask: np.ndarray,
        cotangent: np.ndarray,
        implementation: Any,
        needed: tuple[int, ...],
        *,
        twice: bool = False,
    ) -> Heads:
        """Return torch's gradients with respect to some of the heads; the others are constants."""
        tensors = [
            self._tensor(array).requires_grad_(index in needed) for index, array in enumerate(heads)
        ]
        outputs = self._torch(tensors, mask, None, implementation)
        gradients = torch.autograd.grad(
            outputs,
            [tensors[index] for index in needed],
            self._tensor(cotangent),
            create_graph=twice,
        )
        return [tensor_to_numpy(gradient.detach()) for gradient in gradients]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return numpy_to_tensor(array.copy()).to(self.device)

    def _torch(
        self, heads: Iterable[torch.Tensor], mask: np.ndarray, dropout: Any, implementation: Any
    ) -> torch.Tensor:
        """Run torch's. On the CPU the mask shares the memory of the array."""
        queries, keys, values = heads
        tensor = numpy_to_tensor(mask).to(self.device)
        return torch_impl.masked_attention(queries, keys, values, tensor, dropout, implementation)

    def _jax(
        self, heads: Iterable[jax.Array], mask: np.ndarray, dropout: Any, implementation: Any
    ) -> jax.Array:
        """Run Flax's. A mask that JAX would narrow stays a NumPy array."""
        queries, keys, values = heads
        array: Any = mask if mask.dtype.itemsize == 8 else jnp.asarray(mask)
        return flax_impl.masked_attention(queries, keys, values, array, dropout, implementation)
