"""Watch the operands of torch's products, or make products leak as they do on a CPU with AMX."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The position of the left and right operand in the arguments.
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
KERNELS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


class WatchedProducts(TorchDispatchMode):
    """Collect the operands of products that are not finite, by the operation's name; `count` counts the products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.not_finite: list[tuple[str, Tensor]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.removeprefix("aten::")
        positions = range(len(args)) if name in KERNELS else PRODUCTS.get(name, ())
        operands = [args[position] for position in positions if isinstance(args[position], Tensor)]
        self.count += bool(operands)
        self.not_finite += [(name, operand) for operand in operands if not operand.isfinite().all()]
        return function(*args, **(kwargs or {}))


class LeakingProducts(TorchDispatchMode):
    """Let a NaN in a row of the left operand reach the row before it, in bfloat16, as oneDNN's issue 5717 does."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        positions = PRODUCTS.get(function._schema.name.removeprefix("aten::"))
        if positions is None or found.dtype != torch.bfloat16:
            return found
        lost = args[positions[0]].isnan().any(dim=-1, keepdim=True)  # (..., rows, 1)
        return found.masked_fill(torch.nn.functional.pad(lost[..., 1:, :], (0, 0, 0, 1)), torch.nan)
