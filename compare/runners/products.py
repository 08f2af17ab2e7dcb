"""Check whether torch's matrix products on this processor keep a NaN to its own row."""

import torch

# Inner dimensions that are not multiples of a tile's width. The left operand has enough rows for
# the tiled kernels.
INNER_SIZES = (31, 33, 37, 65, 163, 257)
ROWS, COLUMNS = 64, 16


def leaking_dtypes() -> list[str]:
    """Return the dtypes in which a NaN row of the left operand reaches other rows, on the CPU.

    With torch 2.13 on CPUs with AMX, that is bfloat16 (oneDNN issue 5717).
    """
    return [
        name
        for name in ("float64", "float32", "bfloat16", "float16")
        if _leaks(getattr(torch, name))
    ]


def _leaks(dtype: torch.dtype) -> bool:
    for inner in INNER_SIZES:
        left, right = torch.ones(ROWS, inner, dtype=dtype), torch.ones(inner, COLUMNS, dtype=dtype)
        left[ROWS // 2] = torch.nan
        if int((left @ right).isnan().any(dim=1).sum()) != 1:
            return True
    return False
