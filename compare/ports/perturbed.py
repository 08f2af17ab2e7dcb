"""Run torch with every floating result moved by one unit in the last place, up or down.

How far the outputs move says how well the function is conditioned: what another order of the same
operations may change. Source: Parker, "Monte Carlo Arithmetic", UCLA CSD-970002, 1997.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..frameworks import Tensor, TorchDispatchMode, _disable_current_modes, torch
from .result import PARTS, Result

# With five samples, the largest of five normal deviations is below 1/25 of their spread once in
# 3e7 times: 0.032 ** 5. So 50 times the largest covers at least twice the spread.
SAMPLES, FACTOR = 5, 50.0
FIRST = 1  # samples with a backward pass; the others have one only where gradients differ
# Functions whose whole results are rounded.
_ROUNDED = {
    *("tanh", "sigmoid", "exp", "expm1", "exp2", "erf", "erfc", "log", "log1p", "log2", "log10"),
    *("sin", "cos", "tan", "atan", "atan2", "sinh", "cosh", "rsqrt", "_softmax", "_log_softmax"),
    *("gelu", "silu", "softplus", "log_sigmoid_forward", "logsumexp", "mish", "elu"),
}
_PART = 1 << 15  # entries that are moved together: they stay in the processor's cache
_PLACES = 1024.0  # the binary places of a number that is taken for exact: ten
_BATCH_NORMS = (torch.ops.aten.native_batch_norm.default, torch.ops.aten.cudnn_batch_norm.default)


class Perturbed(TorchDispatchMode):
    """Multiply the floating results of operations by 1 + u or 1 - u, drawn for each entry.

    Args:
        seed: the seed of the signs.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = np.random.default_rng(seed)
        signs = 2.0 * self._random.integers(2, size=4 * _PART) - 1.0
        self._factors = {
            dtype: (1.0 + torch.finfo(dtype).eps * signs).astype(numpy)
            for dtype, numpy in ((torch.float64, np.float64), (torch.float32, np.float32))
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and move its results, in their place if it wrote them there."""
        result = func(*args, **(kwargs or {}))
        for argument in written_by(func, args):
            self.move(argument)
        if any(argument.alias_info is not None for argument in func._schema.returns):
            return result  # a view, or what was written
        is_rounded = func.overloadpacket.__name__.rstrip("_") in _ROUNDED
        if isinstance(result, Tensor):
            return self._moved(result, is_rounded=is_rounded)
        if isinstance(result, tuple | list):
            return type(result)(
                self._moved(one, is_rounded=is_rounded) if isinstance(one, Tensor) else one
                for one in result
            )
        return result

    def move(self, tensor: Tensor) -> None:
        """Move each entry of the tensor by one unit in the last place.

        Whole numbers, and those with few binary places, are exact and stay: they are counts, masks
        and numbers of regions, which are asked whether they are equal. What is rounded, as the 1 of
        a saturated tanh, is moved too.
        """
        moved = self._moved(tensor)
        if moved.data_ptr() != tensor.data_ptr():
            tensor.copy_(moved)

    def _moved(self, tensor: Tensor, *, is_rounded: bool = False) -> Tensor:
        """Return the tensor with its entries moved in place if its memory allows, or a copy."""
        if tensor.dtype not in self._factors or not tensor.numel():
            return tensor
        with _disable_current_modes():  # other modes have nothing to do here, and take time
            flat = tensor.detach().resolve_neg().contiguous().view(-1)
            with np.errstate(over="ignore", invalid="ignore"):
                self._move(flat.numpy(), self._factors[tensor.dtype], is_rounded)
            return flat.view(tensor.shape)

    def _move(self, array: np.ndarray, factors: np.ndarray, is_rounded: bool) -> None:
        """Move the entries of a flat array.

        The signs are drawn once, and for each part the place where its own begin.
        """
        of_part = np.empty((2, min(_PART, array.size)), array.dtype)
        for start in range(0, array.size, _PART):
            part = array[start : start + _PART]
            scaled, whole = of_part[:, : part.size]
            np.multiply(part, _PLACES, out=scaled)  # infinite for the largest, which stay as well
            is_exact = np.isinf(scaled) if is_rounded else np.rint(scaled, out=whole) == scaled
            first = self._random.integers(factors.size - _PART)
            of_entries = factors[first : first + part.size]
            np.multiply(part, of_entries, out=part, where=~is_exact if is_exact.any() else True)


def written_by(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """Return the arguments that an operation writes into, as its schema says."""
    places = [
        place
        for place, argument in enumerate(func._schema.arguments[: len(args)])
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if func in _BATCH_NORMS and args[5]:
        places = [3, 4]  # the running statistics, of which its schema says nothing
    return [args[place] for place in places if isinstance(args[place], Tensor)]


def keep_farthest(farthest: Result, moved: Result, exact: Result) -> None:
    """Widen how far results move, one number for each array, by what a run in the mode gave."""
    for part in PARTS:
        sizes, arrays = getattr(farthest, part), getattr(exact, part)
        for name, array in getattr(moved, part).items():
            sizes[name] = np.maximum(sizes.get(name, 0.0), _distance(array, arrays[name]))


def _distance(moved: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Return how far the entries lie apart at most where the exact one is finite."""
    with np.errstate(invalid="ignore"):
        differences = np.abs(moved.astype(np.float64) - exact)
    farthest = np.max(differences, initial=0.0, where=np.isfinite(exact))
    return np.nan_to_num(farthest, nan=np.inf)
