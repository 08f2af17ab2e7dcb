"""Record the operands of torch's products, or make products leak as on a CPU with AMX.

The fused path is left where a dispatch mode sees the operations. `unseen` keeps it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# The positions of the left and the right operand among the arguments.
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
KERNELS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


@contextmanager
def unseen(mode: TorchDispatchMode) -> Iterator[Any]:
    """Enter the mode, without the package noticing it."""
    with patch("torch_impl.context.has_dispatch_mode", return_value=False), mode:
        yield mode


class WatchedProducts(TorchDispatchMode):
    """Collect the operands that are not finite, each with the name of its operation.

    `count` is the number of products.
    """

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
    """Let a NaN in a row of a left bfloat16 operand reach the row before it.

    oneDNN's issue 5717 has the same effect.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        product = function(*args, **(kwargs or {}))
        positions = PRODUCTS.get(function._schema.name.removeprefix("aten::"))
        if positions is None or product.dtype != torch.bfloat16:
            return product
        lost = args[positions[0]].isnan().any(dim=-1, keepdim=True)  # (..., rows, 1)
        row_before = torch.nn.functional.pad(lost[..., 1:, :], (0, 0, 0, 1))
        return product.masked_fill(row_before, torch.nan)
