"""Record every value that a torch module computes, with the line of the module that made it."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..conversion.tensors import tensor_to_numpy
from ..frameworks import Tensor, TorchDispatchMode, nn, torch
from .perturbed import written_by
from .report import SourceLine
from .values import Trace, Value, frames_from, lines_of_frames

_Key = tuple[Any, ...]


class TorchRecorder(TorchDispatchMode):
    """Records each operation's results at once, because they may be overwritten later.

    Attributes:
        trace: the values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self._made: dict[_Key, int] = {}
        self._last: dict[int, int] = {}  # of each storage, the value that was written last
        self.tensors: list[Tensor] = []  # of the values; alive, so that no storage is used again
        self._modules: list[str] = []

    def add_root(self, tensor: Tensor) -> None:
        """Record an input, a parameter or a buffer."""
        self._note(tensor, self.trace.add(Value(_array(tensor))))

    def index_of(self, tensor: Tensor) -> int | None:
        """Return the index of the value that the tensor holds, if it was recorded."""
        storage = tensor.untyped_storage()._cdata
        return self._made.get(_key(tensor), self._last.get(storage))

    @contextmanager
    def modules_of(self, module: nn.Module) -> Iterator[None]:
        """Know within which submodule an operation runs."""
        handles = []
        for name, child in module.named_modules():

            def enter(*_: Any, name: str = name) -> None:
                self._modules.append(name)

            def leave(*_: Any) -> None:
                self._modules.pop()

            handles.append(child.register_forward_pre_hook(enter))
            handles.append(child.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and record its results."""
        kwargs = kwargs or {}
        tensors = list(_tensors_in((args, kwargs)))
        parents = [index for tensor in tensors if (index := self.index_of(tensor)) is not None]
        result = func(*args, **kwargs)
        name = str(func).removesuffix(".default")
        lines = self._lines(name)
        depends = any(self.trace.values[index].depends for index in parents)
        written = written_by(func, args)
        for tensor in [*_tensors_in(result), *written]:
            if tensor.device.type == "meta":
                continue
            # What lies in memory that nothing has written to is no value, and differs each time.
            array = np.zeros(tensor.shape) if "empty" in name else _array(tensor)
            value = Value(array, name, None, tuple(dict.fromkeys(parents)), depends)
            value.source, value.callers = next(iter(lines), None), lines[1:]
            self._note(tensor, self.trace.add(value), is_written=bool(written))
        return result

    def _note(self, tensor: Tensor, index: int, *, is_written: bool = False) -> None:
        storage = tensor.untyped_storage()._cdata
        if is_written:
            for key in [key for key in self._made if key[0] == storage]:
                del self._made[key]
        self._made[_key(tensor)] = index
        if is_written or storage not in self._last:
            self._last[storage] = index
        self.tensors.append(tensor)

    def _lines(self, operation: str) -> tuple[SourceLine, ...]:
        module = self._modules[-1] if self._modules else ""
        return lines_of_frames(frames_from(sys._getframe(2)), operation, module)


def _key(tensor: Tensor) -> _Key:
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
    )


def _array(tensor: Tensor) -> np.ndarray:
    with torch.no_grad():
        return tensor_to_numpy(tensor).copy()


def _tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for child in tree.values():
            yield from _tensors_in(child)
    elif isinstance(tree, tuple | list):
        for child in tree:
            yield from _tensors_in(child)
