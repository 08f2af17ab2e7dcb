"""Run torch with every floating result moved by one unit in the last place, up or down.

How far the outputs move says how well the function is conditioned: what another order of the same
operations may change. Source: Parker, "Monte Carlo Arithmetic", UCLA CSD-970002, 1997.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..frameworks import Tensor, TorchDispatchMode, _disable_current_modes, torch
from .result import PARTS, Result

# With five samples, the largest of five normal deviations is below 1/25 of their spread once in
# 3e7 times: 0.032 ** 5. So 50 times the largest covers at least twice the spread.
SAMPLES, FACTOR = 5, 50.0
# Functions whose whole results are rounded.
_ROUNDED = {
    *("tanh", "sigmoid", "exp", "expm1", "exp2", "erf", "erfc", "log", "log1p", "log2", "log10"),
    *("sin", "cos", "tan", "atan", "atan2", "sinh", "cosh", "rsqrt", "_softmax", "_log_softmax"),
    *("gelu", "silu", "softplus", "log_sigmoid_forward", "logsumexp", "mish", "elu"),
}
_PART = 1 << 17  # entries that are moved together: they stay in the processor's cache
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

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and move its results, in their place if it wrote them there."""
        result = func(*args, **(kwargs or {}))
        for argument in written_by(func, args):
            argument.copy_(self.moved(argument))
        if any(argument.alias_info is not None for argument in func._schema.returns):
            return result  # a view, or what was written
        is_rounded = func.overloadpacket.__name__.rstrip("_") in _ROUNDED
        if isinstance(result, Tensor):
            return self.moved(result, is_rounded=is_rounded)
        if isinstance(result, tuple | list):
            return type(result)(
                self.moved(one, is_rounded=is_rounded) if isinstance(one, Tensor) else one
                for one in result
            )
        return result

    def moved(self, tensor: Tensor, *, is_rounded: bool = False) -> Tensor:
        """Return the tensor with each entry moved by one unit in the last place.

        Whole numbers, and those with few binary places, are exact and stay: they are counts, masks
        and numbers of regions, which are asked whether they are equal. What is rounded, as the 1 of
        a saturated tanh, is moved too.
        """
        if tensor.dtype not in (torch.float64, torch.float32) or not tensor.numel():
            return tensor
        flat = tensor.contiguous().view(-1)
        moved = torch.empty_like(flat)
        with _disable_current_modes():  # other modes have nothing to do here, and take time
            for part, place in zip(flat.split(_PART), moved.split(_PART), strict=True):
                self._move(part, place, is_rounded)
        return moved.view(tensor.shape)

    def _move(self, tensor: Tensor, moved: Tensor, is_rounded: bool) -> None:
        """Write the moved entries of a flat tensor into another one."""
        eps, count = torch.finfo(tensor.dtype).eps, tensor.numel()
        packed = np.frombuffer(self._random.bytes(-(-count // 8)), np.uint8)
        signs = torch.from_numpy(np.unpackbits(packed, count=count))
        torch.mul(signs, 2.0 * eps, out=moved).add_(1.0 - eps)
        scaled = tensor * _PLACES  # infinite for the largest numbers, which stay as well
        is_exact = scaled.isinf() if is_rounded else scaled.round() == scaled
        moved.masked_fill_(is_exact, 1.0).mul_(tensor)


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


def deviations(run: Callable[[Perturbed], Result], exact: Result) -> Result:
    """Return how far results move at most under perturbation, one number for each array.

    Args:
        run: a run of the module within the mode, with its tensors and inputs moved by it as well.
        exact: the run without.
    """
    farthest = Result({}, {}, {})
    for seed in range(SAMPLES):
        _keep_farthest(farthest, run(Perturbed(seed)), exact)
    return farthest


def _keep_farthest(farthest: Result, moved: Result, exact: Result) -> None:
    for part in PARTS:
        sizes = getattr(farthest, part)
        for name, array in getattr(exact, part).items():
            distance = _distance(getattr(moved, part)[name], array)
            sizes[name] = np.maximum(sizes.get(name, 0.0), distance)


def _distance(moved: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Return how far the entries lie apart at most where the exact one is finite."""
    with np.errstate(invalid="ignore"):
        differences = np.abs(moved.astype(np.float64) - exact)
    farthest = np.max(differences, initial=0.0, where=np.isfinite(exact))
    return np.nan_to_num(farthest, nan=np.inf)
