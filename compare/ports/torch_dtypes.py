"""Run torch in float64 where the module asks for a narrower dtype by name.

`x.float()`, `softmax(x, dtype=torch.float32)` and tables made in torch's default dtype would hide a
difference behind the roundings of float32. The working dtypes are run as they are.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..frameworks import TorchDispatchMode, torch
from .values import frames_from, lines_of_frames

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class Widened(TorchDispatchMode):
    """Replaces narrower floating dtypes that are asked for by float64.

    Attributes:
        lines: where they are asked for, as `file:line`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation in float64."""
        kwargs = kwargs or {}
        if kwargs.get("dtype") in _NARROW:
            for line in lines_of_frames(frames_from(sys._getframe(1)), str(func), "")[:1]:
                self.lines[line.place] = None
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextmanager
def in_float64(mode: Widened) -> Iterator[None]:
    """Run torch in float64, with float64 as its default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mode:
            yield
    finally:
        torch.set_default_dtype(before)
