"""Write valid checkpoints and damage them at random.

A change hits either raw bytes or the structure. Structural changes recompute lengths and checksums,
so that they reach the code behind the format's own checks.
"""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import save_checkpoint
from ..checkpoint.convert import convert_checkpoint

FORMATS = ("safetensors", "msgpack", "torch", "sharded", "orbax")
_NAMES = ("mask", "W_query.weight", "W_key.weight", "W_value.weight")
_BOUNDARY_NUMBERS = (
    0,
    1,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63,
    2**64 - 1,
)
_JSON_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**62,
    2**70,
    1e308,
    "",
    "F32",
    "F64",
    "BOOL",
    "float32",
    "int4",
    "../x",
    "/etc/passwd",
    "..",
    "a/../../x",
    "\x1b[31m\u202e",
    "\0",
    [],
    [0],
    [2**62, 0],
    [-1],
    [7, 7],
    {},
    {"a": 1},
    [[]],
    "mask",
    "W_key.weight",
    "torch",
    "linen",
)


def state() -> dict[str, torch.Tensor]:
    """Return the state that every valid checkpoint holds."""
    torch.manual_seed(0)
    return {name: torch.randn(3, 3) for name in _NAMES}


def seeds(folder: Path, file_format: str) -> list[Path]:
    """Write valid checkpoints of a format: with our manifest, and by the plain library."""
    if file_format == "sharded":
        source = save_checkpoint(folder / "state.safetensors", state())
        convert_checkpoint(source, folder / "shards", shard_bytes=80)
        source.unlink()
        return [folder / "shards"]
    suffix = {
        "safetensors": ".safetensors",
        "msgpack": ".msgpack",
        "torch": ".pth",
        "orbax": ".orbax",
    }[file_format]
    paths = [save_checkpoint(folder / f"state{suffix}", state())]
    if file_format == "torch":
        torch.save(state(), folder / "plain.pth")
        torch.save(state(), folder / "old.pth", _use_new_zipfile_serialization=False)
        paths += [folder / "plain.pth", folder / "old.pth"]
    if file_format == "safetensors":
        from safetensors.torch import save_file

        save_file(state(), folder / "plain.safetensors")
        paths.append(folder / "plain.safetensors")
    return paths


def mutated(file_format: str, data: bytes, rng: random.Random) -> bytes:
    """Return the bytes of a file after random changes."""
    if rng.random() < 0.5:
        try:
            return _STRUCTURE_CHANGES[file_format](data, rng)
        except (KeyError, ValueError, zipfile.BadZipFile, struct.error, IndexError):
            pass  # this file has no such structure
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        data = rng.choice(_BYTE_CHANGES)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) or 1)
    if not data:
        return data
    flipped = data[start] ^ 1 << rng.randrange(8)
    return data[:start] + bytes([flipped]) + data[start + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _insert(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.choice((1, 2, 8, 64))) + data[start:]


def _remove(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 2, 8, 64)) :]


def _copy(data: bytes, rng: random.Random) -> bytes:
    source, target = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    return data[:target] + data[source : source + rng.choice((4, 16, 128))] + data[target:]


def _number(data: bytes, rng: random.Random) -> bytes:
    width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    value = (rng.choice(_BOUNDARY_NUMBERS) % 256**width).to_bytes(width, order)
    start = rng.randrange(len(data) + 1)
    return data[:start] + value + data[start + width :]


_Change = Callable[[bytes, random.Random], bytes]
_BYTE_CHANGES: tuple[_Change, ...] = (
    _flip,
    _flip,
    _cut,
    _insert,
    _remove,
    _copy,
    _number,
)


def _header(data: bytes, rng: random.Random) -> bytes:
    """Change the JSON of a safetensors header and correct the length before it."""
    length = int.from_bytes(data[:8], "little")
    header = _json(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _pickles_in(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in archive.namelist() if name.endswith(".pkl")]


def _record(data: bytes, rng: random.Random) -> bytes:
    """Change a record of a zip archive and rewrite the archive with correct checksums."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        chosen = rng.choice([*old.namelist(), *_pickles_in(old), *_pickles_in(old)])
        for name in old.namelist():
            content = old.read(name)
            if name == chosen:
                change = _json if name.endswith(".json") else rng.choice(_BYTE_CHANGES)
                change = _pickle if name.endswith(".pkl") else change
                content = change(content, rng)
            new.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


def _json(data: bytes, rng: random.Random) -> bytes:
    """Change one value in JSON, or in JSON that is stored in a string inside it."""
    root: Any = {"": json.loads(data)}
    parent: Any = root
    key: Any = ""
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.85:
        parent = parent[key]
        key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    value = parent[key]
    if isinstance(value, str) and value[:1] == "{" and rng.random() < 0.9:
        parent[key] = _json(value.encode(), rng).decode()
    elif rng.random() < 0.2:
        del parent[key]
    elif isinstance(parent, dict) and rng.random() < 0.2:
        parent[rng.choice(("mask", "x", "W_key.weight", "__metadata__"))] = parent.pop(key)
    else:
        parent[key] = rng.choice(_JSON_VALUES)
    return json.dumps(next(iter(root.values()), None)).encode()


# Pieces of pickles: what torch writes for tensors, what it never writes, and numbers too large.
_PICKLE_PIECES = (
    *(bytes([code]) for code in b"().]}0aseutQRbN12Kq\x85\x86\x87\x88\x89\x81\x8f\x90\x93\x94\x97"),
    b"K\x03",
    b"q\x01",
    b"h\x01",
    b"M\xff\xff",
    b"J\xff\xff\xff\x7f",
    b"J\xff\xff\xff\xff",
    b"r\xff\xff\xff\x7f",
    b"j\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 8,
    b"X\x04\0\0\0mask",
    b"X\x07\0\0\0storage",
    b"X\x01\0\0\x000",
    b"X\xff\xff\xff\x7fab",
    b"\x8d" + b"\xff" * 7 + b"\x0fa",
    b"\x96" + b"\0\0\0\x77" + b"\0" * 4,
    b"\x95" + b"\xff" * 7 + b"\x7f",
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_tensor_v3\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch\nfloat8_e4m3fn\n",
    b"ctorch\nSize\n",
    b"cbuiltins\nbytearray\n",
    b"cbuiltins\nexec\n",
    b"cos\nsystem\n",
    b"(S'true'\nios\nsystem\n",
)


def _pickle(data: bytes, rng: random.Random) -> bytes:
    """Insert, remove or exchange pieces of a pickle."""
    for _ in range(rng.choice((1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        end = start + rng.choice((0, 0, 1, 2, 5))
        pieces = b"".join(rng.choice(_PICKLE_PIECES) for _ in range(rng.choice((1, 1, 2, 8))))
        data = data[:start] + pieces + data[end:]
    return data if rng.random() < 0.8 else b"\x80\x02" + data[-200:]


def _directory(data: bytes, rng: random.Random) -> bytes:
    """Change the directory of a zip archive, or give it a second one or a second end."""
    begin, end = data.index(b"PK\1\2"), data.rindex(b"PK\5\6")
    directory, tail = data[begin:end], data[end:]
    changed = rng.choice(_BYTE_CHANGES)(directory, rng)
    return rng.choice(
        (
            data[:begin] + changed + tail,
            data[:begin] + changed + directory + tail,
            data[:begin] + directory + changed + tail,
            data + directory + tail,
            data[:begin] + directory + rng.choice(_BYTE_CHANGES)(tail, rng),
            data[:begin] + directory + tail[:-2] + b"\x04\0" + b"PK\5\6",
            rng.choice(_BYTE_CHANGES)(data[:begin], rng) + directory + tail,
        )
    )


def _torch(data: bytes, rng: random.Random) -> bytes:
    return rng.choice((_record, _record, _directory))(data, rng)


_STRUCTURE_CHANGES: dict[str, _Change] = {
    "safetensors": _header,
    "torch": _torch,
    "sharded": _json,
    "orbax": _json,
}
