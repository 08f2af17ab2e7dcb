"""Read the pickle of a torch file as a description of its tensors. No pickled code is run.

The pickle is first looked through, opcode by opcode: only what `torch.save` writes for tensors is
let through, every declared size must lie within the pickle, and the memory that its objects take is
counted. Then Python's unpickler builds it with functions of this module in the place of torch's, so
that a tensor becomes a `View`, which says where its values are.

Source: `torch._weights_only_unpickler`, whose opcodes are let through here, and `torch._utils`.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...files.memory import Budget

# The opcodes that `torch.save` uses; torch's own safe reader knows no others.
_OPCODES = re.findall(
    r"\w+",
    """
    PROTO STOP MARK GLOBAL REDUCE BUILD NEWOBJ BINPERSID NONE NEWTRUE NEWFALSE
    BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_SET
    EMPTY_DICT SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT
    """,
)
_KNOWN = {ord(code.code): code for code in pickletools.opcodes if code.name in _OPCODES}
# For each opcode, how many bytes its argument takes, or the code of a counted argument.
_ARGUMENT = {byte: code.arg.n if code.arg else 0 for byte, code in _KNOWN.items()}
_PUT = {ord("q"): 1, ord("r"): 4}
_STOP = ord(".")
# No opcode makes an object that takes more.
_BYTES_PER_OPCODE = 250

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


def scan(raw: bytes | memoryview, begin: int, path: Path, budget: Budget) -> int:
    """Look through the pickle that begins at this offset, and return the offset of its end.

    Raises:
        UnsafePickleError: it has an opcode that `torch.save` does not write.
        EOFError: it ends too early, or declares more than there is.
        FileError: what it would build does not fit the budget.
    """
    position, size, count = begin, len(raw), 0
    while position < size:
        opcode = raw[position]
        position += 1
        count += 1
        argument = _ARGUMENT.get(opcode)
        if argument is None:
            raise UnsafePickleError(f"opcode {opcode:#x}")
        if opcode in _PUT:
            width = _PUT[opcode]
            # Python's unpickler makes room for all smaller numbers too.
            if int.from_bytes(raw[position : position + width], "little") > count:
                raise UnsafePickleError("a memo of another program")
            position += width
        elif argument >= 0:
            position += argument
        elif argument == pickletools.UP_TO_NEWLINE:
            for _ in range(2):
                position = _line_end(raw, position)
        else:
            width = 4 if argument == pickletools.TAKEN_FROM_ARGUMENT4U else 1
            position += width + int.from_bytes(raw[position : position + width], "little")
        if opcode == _STOP and position <= size:
            used = position - begin
            budget.hold(count * _BYTES_PER_OPCODE + used, path, "its pickle")
            return position
    raise EOFError("its pickle ends too early")


def _line_end(raw: bytes | memoryview, position: int) -> int:
    end = bytes(raw[position : position + 200]).find(b"\n")
    if end < 0:
        raise UnsafePickleError("a name of more than 200 characters")
    return position + end + 1


def build(raw: bytes, path: Path, budget: Budget) -> Any:
    """Return what the pickle describes, with a `View` or `Other` for each tensor.

    Raises:
        UnsafePickleError: it needs a function or class that is not a part of tensors.
        EOFError: it ends too early.
        FileError: what it would build does not fit the budget.
    """
    if scan(raw, 0, path, budget) != len(raw):
        raise UnsafePickleError("bytes after its end")
    try:
        return _Unpickler(io.BytesIO(raw)).load()
    except UnsafePickleError:
        raise
    except Exception as error:  # the unpickler and the functions here, on arguments of any type
        raise UnsafePickleError(f"{type(error).__name__}: {error}") from error


class _Unpickler(pickle.Unpickler):
    """Builds dicts, lists, numbers and descriptions of tensors; nothing is looked up in modules."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a function or class of torch."""
        if (module, name) == ("collections", "OrderedDict"):
            return _make(_Dict)
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return Dtype(_STORAGES[name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return Dtype(name)
        if (module, name) == ("torch", "Size"):
            return _make(tuple)
        if (module, name) in (("torch", "device"), ("torch.serialization", "_get_layout")):
            return _make(str)
        if (module, name) in (("torch", "Tensor"), ("torch.nn.parameter", "Parameter")):
            return _make(Dtype)
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _make(_rebuilt_with_attributes)
        if module == "torch._utils" and name in _OTHERS:
            return _make(lambda *_: Other(_OTHERS[name]))
        if module == "torch._utils" and name in _REBUILD:
            return _make(_REBUILD[name])
        raise UnsafePickleError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage that a tensor refers to."""
        word, dtype, key, _, numel, *view = pid
        if word != "storage" or not isinstance(dtype, Dtype) or view not in ([], [None]):
            raise UnsafePickleError("a storage of another kind")
        if not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise UnsafePickleError("a storage without a key and a size")
        return Storage(key, dtype.name, numel)


class _Dict(dict[Any, Any]):
    """A dict whose attributes are dropped: those of a state dict say nothing about its tensors."""

    def __setstate__(self, state: Any) -> None:
        """Drop the attributes."""


def _make(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a new function for each load, because a pickle may set attributes of it."""
    return lambda *arguments: function(*arguments)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> View:
    """Describe the tensor of `_rebuild_tensor_v2`; its last argument has the bits of a view."""
    bits = rest[2] if len(rest) > 2 else {}
    return _view(storage, offset, shape, strides, storage.dtype, bits)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> View:
    """Describe the tensor of `_rebuild_tensor_v3`, whose storage has no dtype."""
    bits = rest[3] if len(rest) > 3 else {}
    return _view(storage, offset, shape, strides, rest[2].name, bits)


def _view(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str, bits: Any) -> View:
    if not isinstance(storage, Storage) or len(shape) != len(strides) or len(shape) > 64:
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


def _rebuilt_with_attributes(
    function: Callable[..., Any], _kind: Any, arguments: Any, _state: Any
) -> Any:
    """Return the tensor of `_rebuild_from_type_v2`, without its Python attributes."""
    return function(*arguments)


_REBUILD: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _tensor,
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _tensor_v3,
    "_rebuild_parameter": _first,
    "_rebuild_parameter_with_state": _first,
}
