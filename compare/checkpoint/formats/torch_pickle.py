"""Read the pickle of a torch file as a description of its tensors.

A pickle is a program for a stack machine. Python's own machine looks up and calls any function that
the program names. The machine in this file knows only the opcodes that `torch.save` writes for
tensors, and in the place of torch's functions it has functions that describe: a tensor becomes a
`View`, which says where its values are. Declared sizes must lie within the pickle, the memory that
its objects take is counted, and no object is compared, hashed or printed as a whole.

Source: `pickletools`, for the opcodes; `torch._weights_only_unpickler`, for those that torch uses;
`torch._utils`, for the arguments of the functions.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ...files.errors import FileError
from ...files.memory import Budget
from ...files.printable import kind_of
from ...frameworks import torch

# No opcode makes an object that takes more.
_BYTES_PER_OPCODE = 250
_COUNT_EVERY = 4096
_MAX_LINE, _MAX_ARGUMENTS, _MAX_AXES = 200, 16, 64

# What the functions that rebuild other tensors make, as an error should call it.
_OTHERS = {
    "_rebuild_meta_tensor_no_storage": "meta",
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_qtensor": "sparse",
    "_rebuild_nested_tensor": "nested",
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
}


# Functions and classes whose results say nothing about the values of a tensor.
_DROPPED = {
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
}


class UnsafePickleError(Exception):
    """The pickle contains more than `torch.save` writes for tensors."""


class Dtype(NamedTuple):
    """A dtype of torch, by its name."""

    name: str


class Storage(NamedTuple):
    """A stored block of numbers, by the key of its record."""

    key: str
    dtype: str
    numel: int


class View(NamedTuple):
    """A tensor: which part of a storage it shows, and how."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_conj: bool = False
    is_neg: bool = False


class Other(NamedTuple):
    """A tensor without plain values: "meta", "sparse" or "nested"."""

    what: str


class Opaque(NamedTuple):
    """What a function or class that is no part of tensors would make. It was not called."""

    what: str


def build(
    raw: bytes, path: Path, budget: Budget, *, may_go_on: bool = False
) -> tuple[Any, int, tuple[str, ...]]:
    """Return what the pickle describes, with a `View` or `Other` for each tensor, and its length.

    In the place of anything that is no part of tensors there is an `Opaque`. The last result has
    the names of these functions and classes.

    Args:
        raw: the bytes that begin with the pickle.
        path: the file, for errors.
        budget: the limit of what is read and held.
        may_go_on: whether other bytes may follow the pickle.

    Raises:
        UnsafePickleError: it needs an opcode that torch does not write for tensors and numbers.
        EOFError: it ends too early.
        FileError: what it would build does not fit the budget.
    """
    machine = _Machine(raw)
    try:
        while not machine.is_done:
            count = machine.run(_COUNT_EVERY)
            budget.hold(count * _BYTES_PER_OPCODE, path, "its pickle")
    except (EOFError, FileError, UnsafePickleError):
        raise
    except Exception as error:  # the functions here, on arguments of any type
        raise UnsafePickleError(type(error).__name__) from error
    if machine.position != len(raw) and not may_go_on:
        raise UnsafePickleError("bytes after its end")
    return machine.result, machine.position, tuple(machine.foreign)


class _Function(NamedTuple):
    """A function that the pickle may call."""

    call: Callable[..., Any]


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.position = raw, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.foreign: dict[str, None] = {}
        self.is_done, self.result = False, None

    def run(self, steps: int) -> int:
        """Run so many opcodes, or to the end, and return how many were run."""
        for count in range(1, steps + 1):
            if self.position >= len(self.raw):
                raise EOFError("its pickle ends too early")
            operation = _OPERATIONS.get(self.raw[self.position])
            if operation is None:
                raise UnsafePickleError("an opcode that torch does not write")
            self.position += 1
            operation(self)
            if self.is_done:
                return count
        return steps

    def take(self, nbytes: int) -> bytes:
        """Return the next bytes."""
        end = self.position + nbytes
        if end > len(self.raw):
            raise EOFError("its pickle ends too early")
        part = self.raw[self.position : end]
        self.position = end
        return part

    def number(self, nbytes: int) -> int:
        """Return the next unsigned number."""
        return int.from_bytes(self.take(nbytes), "little")

    def line(self) -> str:
        """Return the text up to the next line break."""
        end = self.raw.find(b"\n", self.position, self.position + _MAX_LINE)
        if end < 0:
            raise (EOFError if len(self.raw) < self.position + _MAX_LINE else UnsafePickleError)(
                "a name without an end"
            )
        text = self.raw[self.position : end].decode("ascii")
        self.position = end + 1
        return text

    def since_mark(self) -> list[Any]:
        """Take what was pushed since the last mark."""
        begin = self.marks.pop()
        if begin > len(self.stack):
            raise UnsafePickleError("a mark below the stack")
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def protocol(self) -> None:
        """Skip the number of the protocol: the opcodes say what is needed."""
        self.take(1)

    def stop(self) -> None:
        """End with the only value on the stack."""
        (self.result,) = self.stack
        self.is_done = True

    def tuple_of(self, size: int) -> None:
        """Replace the last values by a tuple."""
        if size > len(self.stack):
            raise UnsafePickleError("an empty stack")
        begin = len(self.stack) - size
        self.stack[begin:] = [tuple(self.stack[begin:])]

    def append(self, items: list[Any]) -> None:
        """Append items to the list on the stack."""
        if type(self.stack[-1]) is Opaque:
            return
        if type(self.stack[-1]) is not list:
            raise UnsafePickleError("an item of something that is not a list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values into the dict on the stack."""
        target = self.stack[-1]
        if type(target) is Opaque:
            return
        if type(target) is not dict or len(items) % 2:
            raise UnsafePickleError("a key of something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Others can be made to have one hash, or a hash that takes for ever.
            if type(key) is not str and not (type(key) is int and abs(key) < 2**31):
                raise UnsafePickleError(f"a key that is {kind_of(key)}")
            target[key] = value

    def set_item(self) -> None:
        """Put one key and value into the dict below them."""
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def append_one(self) -> None:
        """Append one item to the list below it."""
        item = self.stack.pop()
        self.append([item])

    def reduce(self) -> None:
        """Call a function."""
        arguments, function = self.stack.pop(), self.stack.pop()
        self.push(_called(function, arguments))

    def build(self) -> None:
        """Drop the attributes of a dict: those of a state dict say nothing about its tensors."""
        self.stack.pop()
        if type(self.stack[-1]) not in (dict, Opaque):
            raise UnsafePickleError("attributes of something that is not a dict")

    def look_up(self) -> None:
        """Push the stand-in for a function or class; one that is no part of tensors is noted."""
        found = _global(self.line(), self.line())
        if type(found) is Opaque:
            self.foreign[found.what] = None
        self.push(found)

    def storage(self) -> None:
        """Replace a persistent id by the storage that it names."""
        pid = self.stack.pop()
        if type(pid) is not tuple or len(pid) not in (5, 6):
            raise UnsafePickleError("a storage of another kind")
        word, dtype, key, _, numel, *view = pid
        if word != "storage" or type(dtype) is not Dtype:
            raise UnsafePickleError("a storage of another kind")
        if view and view[0] is not None:
            raise UnsafePickleError("a view of a storage")
        if type(key) is not str or type(numel) is not int or not 0 <= numel < 2**63:
            raise UnsafePickleError("a storage without a key and a size")
        self.push(Storage(key, dtype.name, numel))


_BY_CODE: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b".": _Machine.stop,
    b"(": lambda it: it.marks.append(len(it.stack)),
    b"c": _Machine.look_up,
    b"R": _Machine.reduce,
    b"\x81": _Machine.reduce,
    b"b": _Machine.build,
    b"Q": _Machine.storage,
    b"N": lambda it: it.push(None),
    b"\x88": lambda it: it.push(True),
    b"\x89": lambda it: it.push(False),
    b"K": lambda it: it.push(it.number(1)),
    b"M": lambda it: it.push(it.number(2)),
    b"J": lambda it: it.push(int.from_bytes(it.take(4), "little", signed=True)),
    b"\x8a": lambda it: it.push(int.from_bytes(it.take(it.number(1)), "little", signed=True)),
    b"G": lambda it: it.push(struct.unpack(">d", it.take(8))[0]),
    b"X": lambda it: it.push(it.take(it.number(4)).decode("utf-8", "surrogatepass")),
    b"U": lambda it: it.push(it.take(it.number(1)).decode("ascii")),
    b")": lambda it: it.push(()),
    b"t": lambda it: it.push(tuple(it.since_mark())),
    b"\x85": lambda it: it.tuple_of(1),
    b"\x86": lambda it: it.tuple_of(2),
    b"\x87": lambda it: it.tuple_of(3),
    b"]": lambda it: it.push([]),
    b"a": _Machine.append_one,
    b"e": lambda it: it.append(it.since_mark()),
    b"}": lambda it: it.push({}),
    b"s": _Machine.set_item,
    b"u": lambda it: it.set_items(it.since_mark()),
    b"h": lambda it: it.push(it.memo[it.number(1)]),
    b"j": lambda it: it.push(it.memo[it.number(4)]),
    b"q": lambda it: it.memo.__setitem__(it.number(1), it.stack[-1]),
    b"r": lambda it: it.memo.__setitem__(it.number(4), it.stack[-1]),
}
_OPERATIONS = {code[0]: operation for code, operation in _BY_CODE.items()}


def _global(module: str, name: str) -> Any:
    """Return the stand-in for a function or class of torch."""
    if (module, name) == ("collections", "OrderedDict"):
        return _Function(_empty_dict)
    if module in ("torch", "torch.storage") and name in _STORAGES:
        return Dtype(_STORAGES[name])
    if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
        return Dtype(name)
    if (module, name) in _DROPPED:
        return _Function(lambda *_: None)
    if (module, name) == ("torch", "Size"):
        return _Function(_size)
    if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
        return _Function(_rebuilt_with_attributes)
    if module == "torch._utils" and name in _OTHERS:
        return _Function(lambda *_: Other(_OTHERS[name]))
    if module == "torch._utils" and name in _REBUILD:
        return _Function(_REBUILD[name])
    return Opaque(f"{module}.{name}")


def _called(function: Any, arguments: Any) -> Any:
    """Return the result of a function, whose arguments must be few: they may come again and again.

    What is no part of tensors is not called, and stands for its result.

    Raises:
        UnsafePickleError: it is not a function, or they are not its arguments.
    """
    if type(function) is Opaque:
        return function
    if type(function) is not _Function or type(arguments) is not tuple:
        raise UnsafePickleError("a call of something else")
    if len(arguments) > _MAX_ARGUMENTS:
        raise UnsafePickleError(f"a call with {len(arguments):,} arguments")
    return function.call(*arguments)


def _size(sizes: Any) -> tuple[Any, ...]:
    """Return the tuple of a `torch.Size`."""
    if type(sizes) not in (tuple, list) or len(sizes) > _MAX_AXES:
        raise UnsafePickleError("a size that is no list of numbers")
    return tuple(sizes)


def _empty_dict(*arguments: Any) -> dict[Any, Any]:
    """Return the dict of `OrderedDict()`; one that is made of a list is not read."""
    if arguments:
        raise UnsafePickleError("an OrderedDict with arguments")
    return {}


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> View:
    """Describe the tensor of `_rebuild_tensor_v2`; its last argument has the bits of a view."""
    bits = rest[2] if len(rest) > 2 else {}
    return _view(storage, offset, shape, strides, storage.dtype, bits)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> View:
    """Describe the tensor of `_rebuild_tensor_v3`, whose storage has no dtype."""
    bits = rest[3] if len(rest) > 3 else {}
    return _view(storage, offset, shape, strides, rest[2].name, bits)


def _view(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str, bits: Any) -> View:
    if not isinstance(storage, Storage) or len(shape) != len(strides) or len(shape) > _MAX_AXES:
        raise UnsafePickleError("a tensor without a storage")
    numbers = (offset, *shape, *strides)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise UnsafePickleError("a tensor whose sizes are not numbers")
    bits = bits or {}
    return View(
        storage,
        dtype,
        offset,
        tuple(shape),
        tuple(strides),
        bits.get("conj") is True,
        bits.get("neg") is True,
    )


def _first(data: Any, *_: Any) -> Any:
    """Return the tensor of a parameter."""
    return data


def _rebuilt_with_attributes(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    """Return the tensor of `_rebuild_from_type_v2`, without its Python attributes."""
    return _called(function, arguments)


_REBUILD: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _tensor,
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _tensor_v3,
    "_rebuild_parameter": _first,
    "_rebuild_parameter_with_state": _first,
}
